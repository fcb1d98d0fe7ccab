"Gradients by lag: exact where truncation cuts, right where it does not, and clear about bad input."
import math

import pytest, torch
from hypothesis import given, settings, strategies as st

from memnotes.core.cells import CELLS, Recurrent
from memnotes.core.sequence import Transformer
from memnotes.horizon.bptt import gradient_by_lag, log_gradient_by_lag, model_gradient_by_lag

pytestmark = pytest.mark.usefixtures("double")

MODELS = {name: lambda name=name: Recurrent(name, 7, d_model=8, n_layers=1) for name in CELLS}
MODELS |= {f"transformer {p}": lambda p=p: Transformer(7, d_model=8, n_layers=2, n_heads=2, positions=p, max_len=64) for p in ("rope", "learned", "none")}

@settings(max_examples=20, deadline=None)
@given(t=st.integers(1, 40), window=st.integers(1, 50))
def test_gradient_is_zero_exactly_beyond_the_window(t, window):
    W = torch.linalg.qr(torch.randn(4, 4))[0]
    g = gradient_by_lag(lambda d,x: W@d + x, torch.zeros(4), torch.randn(t, 4), window)
    last = (t-1) % window + 1
    assert g.shape == (t,) and g[:last].min() > 0 and g[last:].count_nonzero() == 0

@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("t,window", [(1, 64), (30, 1), (30, 7), (30, 30)])
def test_log_gradient_is_the_log_of_the_gradient(name, t, window):
    cell,xs = CELLS[name](5, 6),torch.randn(t, 5)
    want = gradient_by_lag(lambda d,x: cell.step(x[None], d), cell.init_state(1), xs).log10()
    assert (log_gradient_by_lag(cell.run, cell.init_state(1), xs, window) - want).abs().max() < 1e-10

def test_log_gradient_does_not_underflow():
    run = lambda x,d: (None, 2.**-x.shape[1]*d + (2.**-torch.arange(x.shape[1]).flip(0)[:,None]*x[0]).sum(0))
    got = log_gradient_by_lag(run, torch.zeros(1, 3), torch.ones(3000, 3))
    assert torch.allclose(got - got[0], -torch.arange(3000)*math.log10(2))

def test_log_gradient_of_nothing_is_minus_infinity():
    got = log_gradient_by_lag(lambda x,d: (None, x[:,-1]), torch.zeros(1, 2), torch.randn(20, 2), 4)
    assert got[0].isfinite() and (got[1:] == -math.inf).all()

@pytest.mark.parametrize("name", MODELS)
def test_model_gradient(name):
    model,tokens = MODELS[name](),torch.randint(7, (3, 20))
    whole = model_gradient_by_lag(model, tokens, range(20))
    assert whole.shape == (3, 20) and whole.min() > 0
    assert torch.equal(model_gradient_by_lag(model, tokens, [3, 0]), whole[:,[3, 0]])
    cut = model_gradient_by_lag(model, tokens, range(20), window=8)
    assert cut[:,:4].min() > 0 and cut[:,4:].count_nonzero() == 0
    alone = torch.cat([model_gradient_by_lag(model, row[None], [5]) for row in tokens])
    assert torch.allclose(alone, whole[:,5:6])

def test_model_gradient_leaves_the_model_alone():
    model,tokens = MODELS["gru"](),torch.randint(7, (1, 9))
    with torch.no_grad():
        before = model(tokens)[0]
        model_gradient_by_lag(model, tokens, [8])
        assert torch.equal(model(tokens)[0], before)
    assert all(p.grad is None for p in model.parameters()) and not model.embed._forward_hooks

def test_hook_goes_even_if_the_model_fails():
    model = Transformer(7, d_model=8, n_layers=1, n_heads=2, positions="learned", max_len=4)
    with pytest.raises(ValueError, match="max_len"): model_gradient_by_lag(model, torch.zeros(1, 9, dtype=torch.long), [0])
    assert not model.embed._forward_hooks

@pytest.mark.parametrize("window", [0, -3, 2.5, True])
def test_bad_window(window):
    step,xs = lambda d,x: d + x,torch.randn(4, 2)
    for call in (lambda: gradient_by_lag(step, torch.zeros(2), xs, window), lambda: log_gradient_by_lag(lambda x,d: (None, d + x.sum(1)), torch.zeros(1, 2), xs, window),
                 lambda: model_gradient_by_lag(MODELS["gru"](), torch.zeros(1, 4, dtype=torch.long), [0], window)):
        with pytest.raises(ValueError, match="window: expected an integer of at least 1"): call()

@pytest.mark.parametrize("lags", [[4], [-1], [0, 9], []])
def test_bad_lags(lags):
    with pytest.raises(ValueError, match="lags: expected 0 .* to 3"): model_gradient_by_lag(MODELS["rnn"](), torch.zeros(1, 4, dtype=torch.long), lags)

@pytest.mark.parametrize("tokens,error,said", [(torch.zeros(1, 4), TypeError, "int64 or int32"), ([[1, 2]], TypeError, "got list"), (torch.zeros(4, dtype=torch.long), ValueError, "shape .batch, time"),
    (torch.zeros(0, 4, dtype=torch.long), ValueError, "neither empty"), (torch.full((1, 4), 7), ValueError, "vocab=7")])
def test_bad_tokens(tokens, error, said):
    with pytest.raises(error, match=said): model_gradient_by_lag(MODELS["rnn"](), tokens, [0])

def test_no_inputs():
    with pytest.raises(ValueError, match="xs: expected inputs"): gradient_by_lag(lambda d,x: d, torch.zeros(2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="xs: expected inputs"): log_gradient_by_lag(lambda x,d: (None, d), torch.zeros(1, 2), torch.zeros(0, 2))
