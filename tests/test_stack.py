"A stack of one-block models answers and learns as its members do alone, whatever their windows; what it refuses."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from memnotes.core.cells import GRU, LRU, LSTM, MinGRU, Recurrent
from memnotes.core.sequence import Transformer
from memnotes.horizon.forms import LinearAttention
from memnotes.horizon.stack import Stack

V, D = 7, 6


def attending(positions, linear=False, **kw):
    m = Transformer(V, D, 1, 2, positions=positions, max_len=30, channel=None, tied=False, **kw)
    if linear: m.blocks[0].mixer = LinearAttention(D, 2)
    return m


def recurrent(cell, **kw): return Recurrent(cell, V, D, 1, 5, tied=False, **kw)


KINDS = {"gru": lambda: recurrent(GRU), "gru-wide": lambda: Recurrent(GRU, V, D, tied=False), "mingru-wide": lambda: Recurrent(MinGRU, V, D, tied=False), "lstm": lambda: recurrent(LSTM), "lru": lambda: recurrent(LRU), "mingru": lambda: recurrent(MinGRU), "mingru-tanh": lambda: recurrent(lambda d, n: MinGRU(d, n, 20, "tanh")),
    "attention": lambda: attending("none"), "attention-learned": lambda: attending("learned"), "linear": lambda: attending("none", True), "linear-learned": lambda: attending("learned", True)}


def members(kind, k):
    torch.manual_seed(0)
    made = [KINDS[kind]().double() for _ in range(k)]
    with torch.no_grad():
        for m in made:
            for n,p in m.named_parameters():
                if not n.endswith(("norm.weight", "norm1.weight", "nu", "theta")): p.add_(.3*torch.randn_like(p))
    return made


def alone(m, tokens, targets, window):
    x = m.embed(tokens) + (0 if m.positions is None else m.positions.weight[:tokens.shape[1]])
    y, block, state = m.blocks[0].norm1(x), m.blocks[0], None
    if window and window < y.shape[1]:
        with torch.no_grad(): state = block.mixer(y[:,:-window], None)[1]
        y = y[:,-window:]
    z = m.head(m.norm(x[:,-1:] + block.mixer(y, state)[0][:,-1:]))[:,0]
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(z, targets), list(m.parameters()))]), z.detach()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(t=st.integers(1, 30), b=st.integers(1, 3), windows=st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_each_member_gets_the_gradient_it_gets_alone(kind, t, b, windows, seed):
    models = members(kind, len(windows))
    torch.manual_seed(seed)
    tokens, targets = torch.randint(V, (len(windows), b, t)), torch.randint(V, (len(windows), b))
    g, z = Stack(models, torch.float64).gradient(tokens, targets, windows)
    for i,m in enumerate(models):
        want, logits = alone(m, tokens[i], targets[i], windows[i])
        assert (z[i] - logits).abs().max() <= 1e-10*logits.abs().max()
        assert (g[i] - want).abs().max() <= 1e-10*want.abs().max()


def test_a_member_that_rests_keeps_its_weights_and_its_count():
    models, tokens = members("gru", 3), torch.randint(V, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    stack = Stack(models, torch.float64)
    before = stack.theta.clone()
    right = stack.step(tokens, tokens[...,0], [.1, .01], None, [2, 0])
    assert len(right) == 2 and all(0 <= a <= 1 for a in right)
    assert (stack.theta[1] == before[1]).all() and (stack.theta[[0, 2]] != before[[0, 2]]).any(1).all() and stack.updates.tolist() == [1, 0, 1]


@pytest.mark.parametrize("models", [lambda: [recurrent(GRU), recurrent(LSTM)], lambda: [Recurrent("rnn", V, D, tied=False)], lambda: [recurrent(GRU, channel="mlp")], lambda: [Recurrent(GRU, V, D, 2, tied=False)],
    lambda: [recurrent(GRU, norm="rms")], lambda: [Recurrent(GRU, V, D)], lambda: [Transformer(V, 8, 1, 2, channel=None, tied=False)], lambda: [attending("none", window=3)], lambda: [attending("none", n_kv_heads=1)],
    lambda: [attending("none", bias=True)], lambda: [attending("none", qk_norm=True)], lambda: [recurrent(lambda d, n: MinGRU(d, n, stretch=.4))], lambda: []])
def test_a_kind_without_a_stacked_form_is_refused(models):
    with pytest.raises(ValueError, match="^models: "): Stack(models())


def test_bad_batches_windows_and_rates():
    stack, tokens = Stack([recurrent(GRU), recurrent(GRU)]), torch.randint(V, (2, 3, 9))
    for bad in (0, [1, 0], [-1, None]):
        with pytest.raises(ValueError, match="^window: expected at least 1"): stack(tokens, bad)
    for bad in (lambda: stack(tokens[:1]), lambda: stack(tokens, [3])):
        with pytest.raises(ValueError, match="^tokens, window: expected one batch and one window for each of 2"): bad()
    with pytest.raises(ValueError, match=f"^tokens: expected 0 to {V-1}"): stack(tokens + V)
    with pytest.raises(ValueError, match="^lr: expected a rate for each of 2"): stack.step(tokens, tokens[...,0], [.1])
