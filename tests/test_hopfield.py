"Attention as a Hopfield network: against entmax, nn.MultiheadAttention, brute force, autograd; and what bad input says."
import math

import pytest
import torch
from torch import nn

from memnotes.attention.hopfield import (CausalHopfield, Hopfield, HopfieldLayer, HopfieldPooling, attend, binary_update, capacity_constant, critical_number, energy,
                                         entmax, error_bound, fixed_points, metastable_size, retrieve, separation, stored_exactly, update)
from memnotes.attention.keys import Heads, balanced, beyond, by_document, heads, in_gauge, looks, regauge, second_look, weights
from memnotes.core.sequence import Attention, Block, MLP, SequenceModel, Transformer
from memnotes.core.cells import LSTM

KINDS = (1, 1.5, 2)
every_kind = pytest.mark.parametrize("alpha", KINDS)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-12):
    assert a.shape == b.shape and (a - b).abs().max().item() <= tol*max(1., b.abs().max().item())


# -- the maps

@pytest.mark.parametrize("alpha, theirs", [(1.5, "entmax15"), (2, "sparsemax")])
def test_entmax_is_the_librarys(alpha, theirs):
    peer = getattr(pytest.importorskip("entmax"), theirs)
    for scale in (.1, 1, 10):
        ours, other = (rand(40, 33).mul(scale).requires_grad_() for _ in range(2))
        close(entmax(ours, alpha), peer(other, dim=-1))
        w = rand(40, 33, seed=1)
        (entmax(ours, alpha)*w).sum().backward(), (peer(other, dim=-1)*w).sum().backward()
        close(ours.grad, other.grad)


@every_kind
def test_entmax_sums_to_one_ignores_what_is_masked_and_passes_gradcheck(alpha):
    z = rand(7, 20)
    masked = z.masked_fill(torch.arange(20) >= 12, -math.inf)
    close(entmax(masked, alpha)[:,:12], entmax(z[:,:12], alpha))
    assert entmax(masked, alpha)[:,12:].count_nonzero() == 0
    close(entmax(z, alpha).sum(-1), torch.ones(7).double())
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), rand(3, 5).requires_grad_())


def test_a_row_masked_throughout_is_zero_and_nan_stays_nan():
    empty = torch.full((1, 4), -math.inf)
    assert entmax(empty, 2.).count_nonzero() == 0 and entmax(empty, 1.5).count_nonzero() == 0
    assert entmax(torch.tensor([[math.nan, 1.]]), 2.).isnan().any()


def test_entmax_says_what_is_wrong():
    with pytest.raises(ValueError, match="alpha: expected 1 .softmax., 1.5 .entmax. or 2 .sparsemax.; got 3"): entmax(rand(2, 3), 3)


# -- energy and update

@every_kind
@pytest.mark.parametrize("beta", [.3, torch.tensor([.2, 1.5]).double()[:,None,None]])
def test_update_is_the_state_minus_the_gradient(alpha, beta):
    stored, state = rand(2, 9, 5), rand(2, 4, 5, seed=1).requires_grad_()
    grad, = torch.autograd.grad(energy(state, stored, beta, alpha).sum(), state)
    close(update(state, stored, beta, alpha), (state - grad).detach())
    assert (energy(state, stored, beta, alpha) >= -1e-12).all()
    assert torch.autograd.gradcheck(lambda s, x: energy(s, x, beta, alpha), (state, stored.requires_grad_()))
    assert torch.autograd.gradcheck(lambda s, x: update(s, x, beta, alpha), (state, stored))


@every_kind
def test_float32_follows_float64_and_batches_are_independent(alpha):
    stored, state = rand(3, 40, 16), rand(3, 10, 16, seed=1)
    close(update(state.float(), stored.float(), .25, alpha).double(), update(state, stored, .25, alpha), 1e-5)
    for i in range(3): close(update(state[i], stored[i], .25, alpha), update(state, stored, .25, alpha)[i])


@every_kind
def test_masks_hide_and_causal_is_a_mask(alpha):
    q, k, v = rand(2, 6, 5), rand(2, 6, 5, seed=1), rand(2, 6, 3, seed=2)
    tri = torch.ones(6, 6, dtype=torch.bool).tril()
    close(attend(q, k, v, .7, alpha, tri), attend(q, k, v, .7, alpha, causal=True))
    close(attend(q, k, v, .7, alpha, tri)[:,2], attend(q[:,2:3], k[:,:3], v[:,:3], .7, alpha)[:,0])


@every_kind
def test_retrieve_counts_the_updates_that_moved(alpha):
    stored = 10*torch.eye(6).double()
    r = retrieve(stored + .1*rand(6, 6), stored, 1., alpha=alpha)
    assert (r.n_updates == 1).all() and r.energies.shape == (3, 6)
    close(r.state, stored, 1e-9)
    assert (retrieve(stored, stored, 1., alpha=alpha).n_updates == 0).all()
    assert (retrieve(rand(6, 6), rand(30, 6, seed=1), .5, alpha=alpha, max_updates=1).energies.shape) == (2, 6)
    long = retrieve(rand(50, 8), rand(200, 8, seed=1), .4, alpha=alpha, max_updates=300)
    assert (long.energies.diff(dim=0) <= 1e-10).all()


def test_separation_is_what_brute_force_finds():
    x = rand(2, 7, 4)
    brute = torch.stack([torch.stack([min(p[i] @ (p[i] - p[j]) for j in range(7) if j != i) for i in range(7)]) for p in x])
    close(separation(x), brute)
    for beta in (.1, 1., 10.):
        need = 2/(beta*7) + math.log(2*6*7*beta*x[0].norm(dim=-1).max()**2)/beta
        assert torch.equal(stored_exactly(x[0], beta), brute[0] >= need)
        assert torch.equal(stored_exactly(x, beta, 1.5), brute >= 2/beta)


def test_metastable_size_counts_the_fewest():
    w = torch.tensor([[.5, .3, .15, .05], [.91, .03, .03, .03], [.25, .25, .25, .25]]).double()
    assert metastable_size(w).tolist() == [3, 1, 4] and metastable_size(w, .5).tolist() == [1, 1, 2] and metastable_size(w, 1.).max() == 4


def test_fixed_points_knows_kept_metastable_and_mean():
    angle = torch.arange(3)*2*math.pi/3 # three patterns around the first axis, seven far apart
    three = 10*torch.eye(10)[:1] + .2*(angle.cos()[:,None]*torch.eye(10)[8] + angle.sin()[:,None]*torch.eye(10)[9])
    pair = torch.cat([three, 10*torch.eye(10)[1:8]]).double()
    hot, cold = fixed_points(pair, .01), fixed_points(pair, 1.)
    assert hot.mean.all() and not hot.kept.any()
    assert cold.kept[3:].all() and cold.metastable[:3].all() and cold.size.tolist() == [3]*3 + [1]*7
    longer = fixed_points(torch.stack([pair[0], 2*pair[0]]), 1.)
    assert longer.kept.tolist() == [False, True] and longer.taken.tolist() == [True, False]
    both = fixed_points(torch.stack([pair, pair]), 1.)
    assert torch.equal(both.kept[0], cold.kept) and torch.equal(both.size[1], cold.size)
    double = fixed_points(torch.cat([pair[2:4], pair[2:3]]), 1.)
    assert double.kept.tolist() == [False, True, False] # a pattern stored twice is no minimum of its own


@pytest.mark.parametrize("distance", [0., .01, .05])
def test_no_error_is_above_its_bound(distance):
    x = rand(100, 64)
    state = x + distance*nn.functional.normalize(rand(100, 64, seed=1), dim=-1)
    for beta in (.1, .25, .5): assert ((update(state, x, beta) - x).norm(dim=-1) <= error_bound(x, beta, distance)).all()


@pytest.mark.parametrize("call, message", [
    (lambda: update(rand(2, 3), rand(0, 3), 1.), r"stored: expected \(…, n, d\) with n ≥ 1 patterns; got \(0, 3\); store at least one"),
    (lambda: update(rand(2, 4), rand(5, 3), 1.), r"state: expected \(…, s, 3\), as wide as stored; got \(2, 4\)"),
    (lambda: energy(rand(2, 3), rand(5, 3), 0.), "beta: expected above 0; got 0.0"),
    (lambda: retrieve(rand(2, 3), rand(5, 3), -1.), "beta: expected above 0; got -1.0"),
    (lambda: update(rand(2, 2, 3), rand(2, 5, 3), torch.tensor([1., -1.])[:,None,None]), "beta: expected above 0"),
    (lambda: retrieve(rand(2, 3), rand(5, 3), 1., max_updates=0), "max_updates: expected at least 1; got 0"),
    (lambda: separation(rand(1, 3)), "stored: expected at least 2 patterns to separate; got 1"),
    (lambda: fixed_points(rand(1, 3), 1.), "stored: expected at least 2 patterns; got 1"),
    (lambda: metastable_size(rand(3).softmax(-1), 1.5), "mass: expected above 0 and at most 1; got 1.5"),
    (lambda: capacity_constant(1, 3, .1), "d, K, p, beta: expected d ≥ 2"),
    (lambda: critical_number(1), "d: expected at least 2 bits; got 1"),
    (lambda: binary_update(torch.ones(1, 3), torch.ones(0, 3)), "stored: expected"),
    (lambda: binary_update(torch.ones(1, 4), torch.ones(2, 3)), "state: expected 3 bits, as many as stored; got 4"),
    (lambda: binary_update(torch.ones(1, 3), torch.ones(2, 3), 2.5), "degree: expected an integer ≥ 2 or math.inf; got 2.5"),
    (lambda: Hopfield(30, 4), "n_heads: expected a divisor of d_model=30; got 4; or give d_head"),
    (lambda: Hopfield(32, 0), "n_heads: expected"),
    (lambda: Hopfield(32, 4, beta=[1., 2.]), r"beta: expected one number or n_heads=4 of them, above 0; got \[1.0, 2.0\]"),
    (lambda: Hopfield(32, 4, beta=0.), "beta: expected one number"),
    (lambda: Hopfield(32, 4, n_updates=0), "n_updates: expected at least 1; got 0"),
    (lambda: Hopfield(32, 4, alpha=3.), "alpha: expected 1, 1.5 or 2; got 3.0"),
    (lambda: HopfieldLayer(32, 4, n_patterns=0), "n_patterns: expected at least 1; got 0; an empty memory holds nothing"),
    (lambda: HopfieldPooling(32, 4, n_queries=0), "n_queries: expected at least 1; got 0"),
    (lambda: Hopfield(32, 4)(torch.randn(2, 5, 16)), r"state: expected \(b, s, 32\); got \(2, 5, 16\)"),
    (lambda: Hopfield(32, 4)(torch.randn(2, 5, 32), torch.randn(2, 0, 32)), "an empty memory holds nothing"),
    (lambda: beyond(torch.eye(5).expand(1, 1, -1, -1), 0), "start: expected at least 1"),
    (lambda: regauge(Transformer(9, 8, 2, 2), []), "gauges: expected one for each of 2 layers; got 0"),
    (lambda: regauge(Transformer(9, 8, 1, 2, qk_norm=True), [torch.ones(2, 2) + 0j]), "model: qk_norm fixes the size of keys"),
])
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()


# -- binary memories

@pytest.mark.parametrize("degree", [2, 3, 5, 8, math.inf])
def test_binary_update_compares_the_energies_of_both_values(degree):
    sign = lambda *s, seed: rand(*s, seed=seed).sign()
    stored, state = sign(6, 11, seed=0), sign(30, 11, seed=1)
    f = torch.exp if degree == math.inf else lambda m: (m/11)**degree
    for i in range(11):
        up, down = (f(state.index_fill(1, torch.tensor(i), v) @ stored.T).sum(-1) for v in (1., -1.))
        clear = (up - down).abs() > 1e-9*up.abs().max()
        assert torch.equal(binary_update(state, stored, degree)[clear,i], (up - down).sign()[clear])
    assert torch.equal(binary_update(state.view(5, 6, 11), stored.expand(5, -1, -1), degree).view(30, 11), binary_update(state, stored, degree))


def test_a_tie_changes_nothing_and_a_single_pattern_is_found():
    x = torch.tensor([[1., 1, -1, -1]])
    assert torch.equal(binary_update(x, torch.cat([x, x*torch.tensor([1, 1, 1, -1.])])[:1]), x)
    balanced_, pair = torch.tensor([[1., 1]]), torch.tensor([[1., 1], [1, -1]])
    assert torch.equal(binary_update(balanced_, pair), balanced_) # Σx_i x_j = 0: no field
    assert round(critical_number(100)) == 11 and critical_number(20, math.inf) == 1024


# -- layers

def test_module_is_multihead_attention():
    ours, theirs = Hopfield(24, 4, bias=True).double(), nn.MultiheadAttention(24, 4, batch_first=True).double()
    w, b = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    for f,wi,bi in zip((ours.query, ours.key, ours.value), w, b): f.weight.data, f.bias.data = wi, bi
    ours.output.load_state_dict(theirs.out_proj.state_dict())
    q, kv = rand(3, 5, 24), rand(3, 9, 24, seed=1)
    mask = rand(5, 9, seed=2) > -.5
    close(ours(q, kv, mask), theirs(q, kv, kv, attn_mask=~mask, need_weights=False)[0])


@every_kind
def test_exactly_so_many_updates_each_head_with_its_beta(alpha):
    betas = torch.tensor([.1, .5, 2.]).double()
    for n in (1, 2, 5):
        m = Hopfield(12, 3, d_head=6, d_stored=7, beta=betas, n_updates=n, alpha=alpha).double()
        state, stored = rand(2, 4, 12), rand(2, 8, 7, seed=1)
        q, k, v = m.heads(m.query(state)), m.heads(m.key(stored)), m.heads(m.value(stored))
        out = []
        for h in range(3):
            s = q[:,h]
            for i in range(n): s = entmax(betas[h]*(s @ k[:,h].mT), alpha) @ (v if i == n-1 else k)[:,h]
            out.append(s)
        close(m(state, stored), m.output(torch.cat(out, -1)))


def test_tol_ends_where_nothing_moves():
    torch.manual_seed(0)
    free = Hopfield(16, 2, beta=2., n_updates=200).double()
    stopped = Hopfield(16, 2, beta=2., n_updates=200, tol=1e-10).double()
    stopped.load_state_dict(free.state_dict())
    x = rand(2, 6, 16)
    close(stopped(x), free(x), 1e-8)


def test_connected_values_are_the_keys():
    m = Hopfield(16, 2, connected=True).double()
    q, k = m.heads(m.query(rand(1, 3, 16))), m.heads(m.key(rand(1, 5, 16, seed=1)))
    close(m(rand(1, 3, 16), rand(1, 5, 16, seed=1)), m.output(attend(q, k, k, 8**-.5).transpose(1, 2).flatten(2)))
    assert sum(p.numel() for p in m.parameters()) == 3*16*16


@pytest.mark.parametrize("make", [lambda: Hopfield(8, 2, n_updates=2, beta=[.5, 2.]), lambda: HopfieldLayer(8, 2, 5, alpha=1.5), lambda: HopfieldPooling(8, 2, 3, alpha=2), lambda: CausalHopfield(8, 2, n_updates=2)])
def test_layers_pass_gradcheck_and_rows_are_independent(make):
    torch.manual_seed(0)
    m = make().double()
    out = lambda x: y[0] if isinstance(y := m(x), tuple) else y
    x = rand(3, 4, 8).requires_grad_()
    assert torch.autograd.gradcheck(out, x)
    for i in range(3): close(out(x)[i:i+1], out(x[i:i+1]))
    assert out(x.float().double()).dtype == torch.float64 and m.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


def test_pooling_does_not_see_the_order_and_a_layer_is_a_channel():
    torch.manual_seed(0)
    pool, x = HopfieldPooling(8, 2, 3).double(), rand(2, 7, 8)
    close(pool(x), pool(x[:,torch.randperm(7)]))
    close(pool(x, torch.arange(7)[None] < 4), pool(x[:,:4]))
    y, _ = Block(Attention(8, 2), HopfieldLayer(8, 2, 5))(x.float())
    assert y.shape == x.shape


# -- keys of a model

def model(**kwargs):
    torch.manual_seed(0)
    m = Transformer(50, 24, 3, 6, 3, norm="rms", channel="swiglu", **kwargs).double().requires_grad_(False)
    for p in m.parameters(): p.mul_(10 if p.ndim > 1 else 1)
    return m


TOKENS = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kwargs", [dict(), dict(bias=True), dict(positions="none")])
def test_heads_are_the_models_and_gauges_leave_it(kwargs):
    m = model(**kwargs)
    for block,h in zip(m.blocks, heads(m, TOKENS)):
        y = weights(h.query, h.key) @ h.value.repeat_interleave(2, 1)
        close(block.mixer.output(y.transpose(1, 2).flatten(2)), h.output)
    a = [(torch.complex(rand(3, 2, seed=i), rand(3, 2, seed=9+i))).exp() for i in range(3)]
    other = regauge(m, a)
    close(other(TOKENS)[0], m(TOKENS)[0], 1e-10)
    for g,h,new in zip(a, heads(m, TOKENS), heads(other, TOKENS)): close(in_gauge(h.key, g), new.key, 1e-10)
    level = regauge(m, [balanced(b.mixer) for b in m.blocks])
    for b in level.blocks: close(balanced(b.mixer).real, torch.ones(3, 2).double())


def test_the_second_look_depends_on_the_gauge_and_the_first_does_not():
    h = heads(model(), TOKENS)[0]
    a = torch.full((3, 2), 3., dtype=torch.complex128)
    q, k = in_gauge(h.query, (1/a).repeat_interleave(2, 0)), in_gauge(h.key, a)
    close(weights(q, k), weights(h.query, h.key))
    assert (second_look(q, k) - second_look(h.query, h.key)).abs().max() > .01


def test_heads_refuse_other_mixers():
    with pytest.raises(TypeError, match="model: expected core.sequence.Attention in every block"): heads(SequenceModel(9, 8, [Block(LSTM(8), MLP(8))]), TOKENS[:,:3]*0)


def test_looks_tell_sink_own_and_previous_apart():
    t = 12
    see = lambda w: looks(w[None,None].double(), 4)
    own, prev, sink = torch.eye(t), torch.eye(t).roll(-1, 1), torch.zeros(t, t)
    sink[:,0], sink[range(t),range(t)] = .95, .05
    assert see(own).own == 1 and see(own).one == 1 and see(own).sink == 0
    assert see(prev).previous == 1 and see(prev).own == 0
    r = see(sink)
    assert r.one_all == 1 and r.own == 1 and abs(r.sink - .95) < 1e-6
    flat = see(torch.ones(t, t).tril()/torch.arange(1, t+1)[:,None])
    assert flat.one == 0 and flat.size > .85


def test_intervals_come_from_documents():
    value, (low, high) = by_document(torch.tensor([[1., 2, 3, 4, 5]]))
    assert value == 3 and 1 <= low < 3 < high <= 5 and by_document(torch.ones(1, 4))[1] == (1, 1)
    assert isinstance(heads(model(), TOKENS)[0], Heads)
