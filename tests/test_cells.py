"""The cells against independent references: PyTorch's kernels, plain NumPy, torch.func, closed forms."""
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from memnotes.core.cells import CELLS, ELSTM, GRU, LRU, LSTM, RNN, MinGRU, Recurrent, chrono_bias, loop_scan, parallel_scan
from memnotes.core.sequence import leaves

LONG = os.environ.get("LONG") == "1"
every_cell = pytest.mark.parametrize("name", CELLS)
D, N = 4, 6


@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)


def close(a, b, tol=1e-12):
    a, b = (torch.as_tensor(v) for v in (a, b))
    return a.shape == b.shape and (a-b).abs().max().item() <= tol*max(1., b.abs().max().item())


# -- the scan

@settings(max_examples=2000 if LONG else 60, deadline=None, derandomize=not LONG)
@given(t=st.integers(1, 70), b=st.integers(1, 3), n=st.integers(1, 4), complex_=st.booleans(), start=st.booleans(), reverse=st.booleans(), seed=st.integers(0, 9))
def test_scan_is_the_loop(t, b, n, complex_, start, reverse, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.complex128 if complex_ else torch.float64, generator=g)
    a, x, h0 = draw(b, t, n).sgn()*torch.rand(b, t, n, generator=g).double(), draw(b, t, n), draw(b, n) if start else None
    expected = loop_scan(a.flip(1), x.flip(1), h0).flip(1) if reverse else loop_scan(a, x, h0)
    assert close(parallel_scan(a, x, h0, reverse), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [(2, 3), (8, 200)]) # few units: doubling; many, on a CPU: a loop in place
def test_scan_gradients_are_those_of_the_loop(rows, reverse):
    b, n = rows
    a, x, h0 = torch.rand(b, 37, n).double(), torch.randn(b, 37, n).double(), torch.randn(b, n).double()
    weight = torch.randn(b, 37, n).double()
    def gradients(f):
        args = [v.clone().requires_grad_() for v in (a, x, h0)]
        return torch.autograd.grad((f(*args)*weight).sum(), args)
    flipped = lambda a, x, h0: loop_scan(a.flip(1), x.flip(1), h0).flip(1)
    pairs = zip(gradients(partial(parallel_scan, reverse=reverse)), gradients(flipped if reverse else loop_scan))
    assert all(close(u, v, 1e-11) for u,v in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_derivatives_of_every_kind(dtype, reverse):
    a, x, h0 = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((1, 4, 2), (1, 4, 2), (1, 2)))
    f = partial(parallel_scan, reverse=reverse)
    assert torch.autograd.gradcheck(f, (a, x, h0), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(f, (a, x, h0))


def test_scan_under_vmap():
    a, x = torch.rand(5, 2, 9, 3).double(), torch.randn(5, 2, 9, 3).double()
    assert close(torch.func.vmap(parallel_scan)(a, x), torch.stack([loop_scan(*p) for p in zip(a, x)]))
    assert close(torch.func.vmap(parallel_scan, (None, 0))(a[0], x), torch.stack([loop_scan(a[0], v) for v in x]))


def test_scan_of_a_closed_gate_is_exact_and_long_products_do_not_overflow():
    t = 5000
    a, x = torch.full((1, t, 2), .5), torch.ones(1, t, 2)
    a[:,:,1] = 1
    h = parallel_scan(a, x)
    assert h[0,-1,0] == 2 and h[0,-1,1] == t # .5 sums to 2, 1 counts
    a[:,100] = 0
    assert torch.equal(parallel_scan(a, x)[:,100], x[:,100])
    assert parallel_scan(torch.tensor(-1.).expand(1, 1, 1), torch.ones(1, 6, 1)).flatten().tolist() == [1,0,1,0,1,0]


def test_scan_takes_broadcast_and_mixed_types():
    a, x = torch.rand(3), torch.randn(2, 7, 3, dtype=torch.complex64)
    assert close(parallel_scan(a, x), loop_scan(a.expand(2, 7, 3), x), 1e-6) and parallel_scan(a.bfloat16(), x.real.bfloat16()).dtype == torch.bfloat16


def test_scan_survives_a_million_steps():
    t = 2**20
    a, x = torch.full((1, t, 1), 1 - 1/t).double(), torch.ones(1, t, 1).double()
    exact = t*(1 - (1 - 1/t)**t)
    assert abs(parallel_scan(a, x)[0,-1,0].item()/exact - 1) < 1e-9


# -- every cell

def trajectory(cell, x, d):
    for x_t in x.unbind(1): d = cell.step(x_t, d)
    return d


@every_cell
def test_fast_form_is_step_and_read(name):
    cell, x = CELLS[name](D, N).double(), torch.randn(3, 20, D).double()
    d, ys = cell.init_state(3), []
    for x_t in x.unbind(1): ys.append(cell.read(d := cell.step(x_t, d), x_t))
    y, last = cell(x)
    assert close(y, torch.stack(ys, 1)) and all(close(u, v) for u,v in zip(leaves(last), leaves(d)))


@every_cell
def test_step_takes_one_row_or_many(name):
    cell, x = CELLS[name](D, N).double(), torch.randn(3, D).double()
    d = cell.step(x, cell.init_state(3))
    for i in range(3):
        one = cell.step(x[i], tuple(s[i] for s in zero) if isinstance(zero := cell.init_state(3), tuple) else zero[i])
        assert all(close(u, v[i]) for u,v in zip(leaves(one), leaves(d)))


@every_cell
def test_forward_influence_is_backpropagation(name):
    "dh_T/dθ accumulated forwards by torch.func (real-time recurrent learning in its plainest form) equals autograd's."
    cell, x = CELLS[name](D, N).double(), torch.randn(9, D).double()
    theta = {k: p.detach() for k,p in cell.named_parameters()}
    pack = lambda d: torch.cat([(torch.view_as_real(s) if s.is_complex() else s).flatten() for s in leaves(d)])
    shapes = [s[0] for s in leaves(cell.init_state(1))]
    def unpack(v):
        out = []
        for s in shapes:
            size = s.numel()*(2 if s.is_complex() else 1)
            piece, v = v[:size], v[size:]
            out.append(torch.view_as_complex(piece.reshape(-1, 2)) if s.is_complex() else piece)
        return tuple(out) if len(out) > 1 else out[0]
    class Step(torch.nn.Module):
        def __init__(self): super().__init__(); self.cell = cell
        def forward(self, x, v): return pack(self.cell.step(x, unpack(v)))
    step, theta = Step(), {f"cell.{k}": p for k,p in theta.items()}
    f = lambda theta, x, v: torch.func.functional_call(step, theta, (x, v))
    v, P = pack(cell.init_state(1)), None
    for x_t in x:
        J, I = torch.func.jacrev(f, argnums=(2, 0))(theta, x_t, v)
        P = I if P is None else {k: torch.tensordot(J, P[k], 1) + I[k] for k in I}
        v = f(theta, x_t, v)
    q = torch.randn_like(v)
    (q*pack(trajectory(cell, x[None], cell.init_state(1)))).sum().backward()
    for k,p in cell.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad # read-out parameters do not touch the state
        assert close(torch.tensordot(q, P[f"cell.{k}"], 1), expected, 1e-10)


@every_cell
def test_elementwise_cells_have_diagonal_jacobians(name):
    cell = CELLS[name](D, N).double()
    d = cell.init_state(1)
    if isinstance(d, tuple) or d.is_complex(): return
    J = torch.func.jacrev(cell.step, argnums=1)(torch.randn(D).double(), torch.randn(N).double())
    assert ((J - J.diagonal().diag()).count_nonzero() == 0) == cell.elementwise


@every_cell
def test_linear_cells_give_their_coefficients(name):
    cell = CELLS[name](D, N).double()
    assert hasattr(cell, "coefficients") == cell.linear and (cell.elementwise or not cell.linear)
    if not cell.linear: return
    x, d = torch.randn(3, D).double(), torch.randn_like(cell.init_state(3))
    a, b = cell.coefficients(x)
    assert close(cell.step(x, d), a*d + b) and close(cell.step(x, d) - cell.step(x, 0*d), a*d)


# -- one by one

@pytest.mark.parametrize("name, reference", [("rnn", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)])
def test_dense_steps_are_pytorchs(name, reference):
    "Our equations on copied weights against a kernel of PyTorch's that is not inside the cell."
    cell, theirs = CELLS[name](D).double(), reference(D, D, batch_first=True).double()
    with torch.no_grad():
        for a,b in zip(theirs.parameters(), cell.rnn.parameters()): a.copy_(b)
    x, d = torch.randn(3, 15, D).double(), cell.init_state(3)
    expected, last = theirs(x)
    for t in range(15): assert close(cell.read(d := cell.step(x[:,t], d), x[:,t]), expected[:,t])
    assert all(close(u, v[0]) for u,v in zip(leaves(d), leaves(last)))


def test_mingru_is_its_formula():
    cell, x = MinGRU(D, N).double(), np.random.default_rng(0).normal(size=(15, D))
    Wz, bz, Wh, bh, Wo = (p.detach().numpy() for p in (cell.gate.weight, cell.gate.bias, cell.candidate.weight, cell.candidate.bias, cell.output.weight))
    h, ys = np.zeros(N), []
    for x_t in x:
        z = 1/(1 + np.exp(-(Wz@x_t + bz)))
        h = (1-z)*h + z*(Wh@x_t + bh)
        ys.append(Wo@h)
    assert close(cell(torch.as_tensor(x)[None])[0][0].detach(), np.array(ys))


def test_lru_is_a_convolution():
    "y_t = Re(C Σ_s λ^{t-s} γ B x_s) + D x_t, summed directly."
    cell, x = LRU(D, N).double(), np.random.default_rng(0).normal(size=(25, D))
    nu, theta, log_gamma, B_re, B_im, C_re, C_im, skip = (getattr(cell, k).detach().numpy() for k in ("nu","theta","log_gamma","B_re","B_im","C_re","C_im","D"))
    lam, B, C = np.exp(-np.exp(nu) + 1j*np.exp(theta)), B_re + 1j*B_im, C_re + 1j*C_im
    y = [(C@sum(lam**(t-s)*np.exp(log_gamma)*(B@x[s]) for s in range(t+1))).real + skip*x[t] for t in range(25)]
    assert close(cell(torch.as_tensor(x)[None])[0][0].detach(), np.array(y))


def test_elstm_is_its_formula():
    cell, x = ELSTM(D, N).double(), np.random.default_rng(0).normal(size=(15, D))
    p = {k: v.detach().numpy() for k,v in cell.named_parameters()}
    sigmoid, c, ys = lambda v: 1/(1 + np.exp(-v)), np.zeros(N), []
    for x_t in x:
        f = sigmoid(p["forget.weight"]@x_t + p["forget.bias"] + p["w_forget"]*c)
        z = np.tanh(p["candidate.weight"]@x_t + p["candidate.bias"] + p["w_candidate"]*c)
        c = f*c + (1-f)*z
        ys.append(p["output.weight"]@(sigmoid(p["gate.weight"]@x_t + p["gate.bias"] + p["gate_cell.weight"]@c)*c))
    assert close(cell(torch.as_tensor(x)[None])[0][0].detach(), np.array(ys))


def test_elstm_jacobian():
    cell, x, d = ELSTM(D, N).double(), torch.randn(5, D).double(), torch.randn(5, N).double()
    J = torch.func.vmap(torch.func.jacrev(cell.step, argnums=1))(x, d)
    assert close(cell.jacobian(x, d), J.diagonal(dim1=1, dim2=2))


def test_a_closed_gate_keeps_the_very_bits():
    cell = MinGRU(D, N, stretch=1e-3)
    torch.nn.init.constant_(cell.gate.bias, -12.)
    d = torch.randn(2, N)
    assert torch.equal(cell(torch.randn(2, 3000, D), d)[1], d)
    a, _ = MinGRU(D, N, stretch=1e-3).coefficients(100*torch.randn(50, D))
    assert a.min() == 0 and a.max() == 1


# -- initialisation

def test_chrono_biases_spread_time_constants_evenly():
    bias = chrono_bias(20_000, 101)
    u = bias.exp()
    assert 1 <= u.min() and u.max() <= 100 and abs(u.mean() - 50.5) < 1
    assert np.allclose(np.quantile(u.numpy(), [.25, .75]), [25.75, 75.25], atol=1.5)


@pytest.mark.parametrize("cell, keep", [ # the gate by which the state is multiplied when inputs are zero
    (GRU(D, 500, chrono=300), lambda c: c.rnn.bias_ih_l0[500:1000] + c.rnn.bias_hh_l0[500:1000]),
    (LSTM(D, 500, chrono=300), lambda c: c.rnn.bias_ih_l0[500:1000] + c.rnn.bias_hh_l0[500:1000]),
    (MinGRU(D, 500, chrono=300), lambda c: -c.gate.bias),
    (ELSTM(D, 500, chrono=300), lambda c: c.forget.bias)])
def test_chrono_sets_the_keeping_gate(cell, keep):
    constants = 1/(1 - keep(cell).sigmoid())
    assert 2-1e-3 <= constants.min() and constants.max() <= 300.1 and abs(constants.mean().item() - 151) < 15
    state = cell.init_state(1)
    d = torch.ones(1, 500)
    state = (torch.zeros(1, 500), d) if isinstance(state, tuple) else d
    after = cell.step(torch.zeros(1, D), state)
    kept = after[1] if isinstance(after, tuple) else after
    assert kept.mean() > .9 # most of a state survives a step without input


def test_lstm_chrono_input_gate_is_the_negative_and_forget_bias_alone():
    b = LSTM(D, 50, chrono=99).rnn.bias_ih_l0
    assert torch.equal(b[:50], -b[50:100])
    one = LSTM(D, 50, forget_bias=1.).rnn
    assert torch.equal(one.bias_ih_l0[50:100] + one.bias_hh_l0[50:100], torch.ones(50)) and one.bias_ih_l0[:50].std() > 0


def test_lru_ring():
    cell = LRU(D, 4000, .5, .9, math.pi)
    r, phase = cell.lam.abs(), cell.lam.angle()
    assert .5 <= r.min() and r.max() <= .9 and phase.min() > 0 and phase.max() <= math.pi + 1e-5
    assert abs((r**2).mean() - (.25 + .81)/2) < .01 # uniform on the ring: uniform in r²
    assert close(cell.log_gamma.exp(), (1 - r**2).sqrt(), 1e-5)
    long = LRU(D, 500).chrono_(1000).lam.abs()
    assert .99 - 1e-6 <= long.min() and long.max() <= .9999 + 1e-6


def test_initial_gradients_at_a_long_lag():
    "In float32 a default LSTM's gradient at lag 1024 is exactly zero; chrono and ring initialisations let it through."
    def at_lag(make):
        torch.manual_seed(0)
        x = torch.randn(4, 1025, 16).requires_grad_()
        y, _ = make(16)(x)
        return torch.autograd.grad(y[:,-1].square().sum(), x)[0][:,0].abs().max().item()
    assert at_lag(LSTM) == at_lag(GRU) == at_lag(RNN) == 0
    assert min(at_lag(partial(LSTM, chrono=1024)), at_lag(partial(MinGRU, chrono=1024)), at_lag(lambda d: LRU(d).chrono_(1024))) > 1e-7


# -- errors

@pytest.mark.parametrize("call, message", [
    (lambda: LSTM(D, chrono=2), "chrono: expected a horizon above 2 steps; got 2"),
    (lambda: LRU(D).chrono_(1), "chrono: expected a horizon above 2"),
    (lambda: LRU(D, r_min=.9, r_max=.5), "expected 0 ≤ r_min < r_max < 1; got 0.9, 0.5"),
    (lambda: LRU(D, max_phase=7), "max_phase: expected above 0 and at most 2π; got 7"),
    (lambda: MinGRU(D, candidate="relu"), "candidate: expected 'linear' or 'tanh'; got 'relu'"),
    (lambda: MinGRU(D, stretch=-1), "stretch: expected 0 or more; got -1"),
    (lambda: GRU(0), "d_model, d_hidden: expected 1 or more; got 0"),
    (lambda: Recurrent("lstn", 5), "cell: expected one of rnn, gru, lstm, mingru, elstm, lru, or a cell class; got 'lstn'"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_recurrent_takes_classes_and_partials():
    tokens = torch.randint(5, (2, 6))
    for cell in (LSTM, partial(MinGRU, chrono=50, candidate="tanh"), "lru"):
        logits, state = Recurrent(cell, 5, D, d_hidden=N)(tokens)
        assert logits.shape == (2, 6, 5) and leaves(state)[0].shape == (2, N)
