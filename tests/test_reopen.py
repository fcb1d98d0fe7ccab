"Re-opened segments: the gradient of full BPTT, whatever the shapes; looks, filters, errors."
import math
from functools import partial

import lightning as L
import pytest
import torch
from hypothesis import given, settings, strategies as st

from memnotes.core.learner import Schedule, nats, quiet
from memnotes.core.tasks import AssociativeRecall
from memnotes.memory.keying import GATES, KEYINGS, BankTransformer
from memnotes.memory.reopen import (ReopenLearner, at_random, by_filter, by_keys, everything, file, live, maybe_holds, most, refile, reopened, run_in,
                                    segment_filters)
from memnotes.memory.ring import Read

V = 499
def build(seed=0, n_layers=1, window=4, k=5, **kwargs):
    torch.manual_seed(seed)
    return BankTransformer(V, 16, n_layers, 2, window=window, k=k, **kwargs).double()
def words(b, n, seed=0): # no word twice in a row: no ties
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(V, generator=g)[:n] for _ in range(b)])
def gradient(model, logits):
    found = torch.autograd.grad(logits.log_softmax(-1)[...,0].sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p,g in zip(model.parameters(), found)])
def opened(model, past, now, segments, length, tail=True, look=None, **kwargs):
    state = file(model, past)
    if tail: state = live(model, past, state)
    with reopened(model, state, past, lambda got: (segments, look), length, **kwargs): return model(now, state)[0]
def close(a, b): return (a - b).abs().max().item() <= 1e-10*b.abs().max().item()


@settings(max_examples=25, deadline=None)
@given(keying=st.sampled_from(KEYINGS), gate=st.sampled_from(GATES), n_layers=st.integers(1, 2), window=st.integers(1, 6), span=st.integers(1, 4), b=st.integers(1, 3),
       n=st.integers(2, 40), t=st.integers(1, 9), length=st.integers(1, 15), k=st.integers(1, 50), seed=st.integers(0, 99))
def test_all_open_is_full_bptt(keying, gate, n_layers, window, span, b, n, t, length, k, seed):
    model, text = build(seed, n_layers, window, k, keying=keying, gate=gate, span=span), words(b, n+t, seed)
    past, now = text[:,:n], text[:,n:]
    full = model(text)[0][:,n:]
    every = torch.arange(-(-n//length)).expand(b, -1)
    logits = opened(model, past, now, every, length)
    assert (logits - full).abs().max() <= 1e-10
    assert close(gradient(model, logits), gradient(model, full))


@settings(max_examples=15, deadline=None)
@given(keying=st.sampled_from(KEYINGS), n_layers=st.integers(1, 2), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_filing_is_the_models_state(keying, n_layers, cuts, seed):
    model, text = build(seed, n_layers, keying=keying), words(2, sum(cuts), seed)
    state = None
    for piece in text.split(cuts, 1): state = file(model, piece, state)
    with torch.no_grad(): _, other = model(text)
    a, b = state["blocks"][-1], other["blocks"][-1]
    assert a["position"] == b["position"] and a["bank"].written == b["bank"].written
    for name in ("keys", "values", "filed", "inputs", "recent"): assert torch.allclose(a[name], b[name], atol=1e-12, rtol=0), name
    n = a["bank"].size
    assert torch.allclose(a["bank"].keys[:,:n], b["bank"].keys[:,:n], atol=1e-12, rtol=0)
    more = words(2, 3, seed+1)
    with torch.no_grad(): assert torch.allclose(model(more, state)[0], model(more, other)[0], atol=1e-10, rtol=0)


def test_rows_choose_for_themselves_and_gradients_add():
    model, text = build(k=20), words(2, 48)
    past, now = text[:,:36], text[:,36:]
    go = lambda *rows: gradient(model, opened(model, past, now, torch.tensor(rows), 12))
    shut = go([-1], [-1])
    assert close(go([0], [2]), go([0], [-1]) + go([-1], [2]) - shut)
    assert not close(go([0], [2]), go([2], [0]))
    assert close(go([0, -1], [2, 1]), go([0, 0], [1, 2]))


def test_forward_is_untouched_without_look_and_reads_are_given_back():
    model, text = build(), words(2, 40)
    past, now = text[:,:30], text[:,30:]
    state = file(model, past)
    plain = model(now, state.fork())[0]
    assert torch.allclose(opened(model, past, now, torch.tensor([[0, 2], [1, -1]]), 10, tail=False), plain, atol=1e-12, rtol=0)
    bank = state["blocks"][-1]["bank"]
    with pytest.raises(ZeroDivisionError):
        with reopened(model, state, past, lambda got: 1/0, 10): model(now, state)
    assert "read" not in bank.__dict__
    assert torch.equal(model(now, state)[0], plain)


def test_look_reads_inside_the_segment_and_without_gradient_teaches_nothing():
    model, text = build(keying="separate+conv", k=50), words(2, 33)
    past, now = text[:,:30], text[:,30:]
    got, segments = [], torch.tensor([[2], [0]])
    state, look = file(model, past), torch.tensor([[[True], [False], [True]], [[True], [True], [False]]])
    bank = state["blocks"][-1]["bank"]
    with reopened(model, state, past, lambda found: (segments, look), 10):
        q = torch.nn.functional.normalize(torch.randn(2, 3, 16, dtype=torch.double), dim=-1)
        got = bank.read(q, 5)
    for row in range(2):
        for t in range(3):
            ids = set(got.ids[row,t][got.valid[row,t]].tolist())
            if look[row,t,0]: assert ids == {i for i in range(10*segments[row,0], 10*segments[row,0]+10) if i < bank.written}
            else: assert len(ids) == 5
    assert isinstance(got, Read) and got.scores.isneginf().eq(~got.valid).all()
    stored = bank.keys[torch.arange(2)[:,None,None],got.ids.clamp(min=0)]
    assert torch.allclose(got.scores[got.valid], (q[:,:,None]*stored).sum(-1)[got.valid], atol=1e-12)
    key = [model.blocks[0].mixer.bank_key.weight]
    out = [torch.autograd.grad(opened(model, past, now[:,:3], segments, 10, tail=False, look=look, gradient=g).sum(), key, allow_unused=True)[0] for g in (True, False)]
    assert out[0].count_nonzero() and (out[1] is None or not out[1].count_nonzero())


def test_look_sees_no_dead_entries():
    model, text = build(capacity=12), words(1, 40)
    state = file(model, text)
    with reopened(model, state, text, lambda got: (torch.tensor([[0, 2]]), torch.ones(1, 1, 2, dtype=torch.bool)), 10):
        got = state["blocks"][-1]["bank"].read(torch.ones(1, 1, 16, dtype=torch.double), 5)
    assert got.ids[got.valid].min() >= 37-12 and got.valid.sum() == 5 # 25 … 29


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), n=st.integers(1, 80), length=st.integers(1, 30), bits=st.integers(1, 300), hashes=st.integers(1, 6), gram=st.integers(1, 3), seed=st.integers(0, 99))
def test_filter_never_denies_what_it_holds(b, n, length, bits, hashes, gram, seed):
    past = torch.randint(50, (b, n), generator=torch.Generator().manual_seed(seed))
    filters = segment_filters(past, length, bits, hashes, gram)
    assert filters.shape == (b, -(-n//length), bits)
    held = maybe_holds(filters, past, hashes, gram)
    assert held.gather(2, (torch.arange(n)//length).expand(b, -1)[...,None]).all()


def test_filter_is_wrong_as_often_as_the_formula_says():
    g = torch.Generator().manual_seed(0)
    filters = segment_filters(torch.randint(100_000, (50, 480), generator=g), 24, 128)
    share = maybe_holds(filters, torch.randint(100_000, (50, 400), generator=g)).double().mean().item()
    assert share == pytest.approx((1 - math.exp(-4*24/128))**4, rel=.1)


def test_indexes_name_segments():
    assert most(torch.tensor([[0., 3., 1., 0.]]), 3).tolist() == [[1, 2, -1]]
    model, text = build(), words(3, 60)
    past = text[:,:50]
    now = torch.stack([past[:,20], past[:,21], text[:,55]], 1) # asks in the second place for what stood at 20, 21
    asked = torch.tensor([[False, True, False]]*3)
    segments, look = by_filter(model, None, past, now, asked, 10, m=2)
    assert (segments[:,0] == 2).all() and look[:,1,0].all() and not look[:,0].any()
    assert by_filter(model, None, past, now, asked, 10, look=False)[1] is None
    state = file(model, past)
    bank = state["blocks"][-1]["bank"]
    got = bank.read(bank.keys[:,12:13], 5)
    assert (by_keys(model, got, past, now[:,:1], asked[:,1:2], 10, 1)[0] == got.ids[:,0,:1]//10).any(-1).sum() >= 1
    lots = at_random(model, got, past, now, asked, 10, 3, True, generator=torch.Generator().manual_seed(0))
    assert lots[0].shape == (3, 3) and lots[1].sum() == 3 and everything(model, got, past, now, asked, 10)[0].tolist() == [[0, 1, 2, 3, 4]]*3


def test_errors_name_argument_and_remedy():
    model, past = build(), words(2, 30)
    state = file(model, past)
    ones = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="length: expected at least 1"): refile(model, past, ones, 0)
    with pytest.raises(TypeError, match="segments: expected int64"): refile(model, past, ones.float(), 10)
    with pytest.raises(ValueError, match="one row a text"): refile(model, past, ones[:1], 10)
    for wrong in (3, -2):
        with pytest.raises(ValueError, match="segments: expected -1 to 2"): refile(model, past, ones + wrong, 10)
    with pytest.raises(ValueError, match="past: expected the 30 tokens of 2 rows"):
        with reopened(model, state, past[:,:20], lambda got: (ones, None), 10): pass
    with pytest.raises(ValueError, match="past: expected the 30 tokens"): live(model, past[:,1:], state)
    with pytest.raises(ValueError, match="bank in the last block"): run_in(build(n_layers=2, bank_layers=(0,)))
    with pytest.raises(ValueError, match="bank in the last block"): file(build(capacity=0), past)
    with pytest.raises(ValueError, match="tokens: expected 0 to"): file(model, past + V)
    file(model, past, state)
    with pytest.raises(ValueError, match="go on from the latest state"): file(model, past, state)


def facts(**kwargs): return AssociativeRecall(32, 32, 8, 8, 24, batch_size=4, distractor="rival", **kwargs)
def trained(index, steps=3, **kwargs):
    torch.manual_seed(0)
    model, task = BankTransformer(80, 32, 1, 2, window=24, keying="separate+conv", gate="free", channel=None), facts()
    learner = ReopenLearner(model, task, Schedule(1e-2, steps), index, 24, weight_decay=0., **kwargs)
    before = model.blocks[0].mixer.bank_key.weight.detach().clone()
    with quiet(): L.Trainer(max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0, accelerator="cpu").fit(learner, datamodule=task)
    return learner, not torch.equal(before, model.blocks[0].mixer.bank_key.weight)


def test_learner_moves_the_key_map_only_through_open_segments():
    assert not trained(None)[1] and not trained(partial(by_filter, m=2), gradient=False)[1]
    for index in (partial(by_keys, m=1), partial(by_filter, m=1), everything): assert trained(index)[1]


def test_learner_with_everything_open_has_the_loss_and_gradient_of_one_pass():
    torch.manual_seed(0)
    model, batch = BankTransformer(80, 32, 1, 2, window=24, keying="separate+conv", gate="free", channel=None).double(), facts().batch(0, "train", 0, 0)
    past, now, mask = batch["tokens"][:,:-24], batch["tokens"][:,-24:], batch["mask"]
    loss = lambda logits: nats(logits, batch["targets"][:,-logits.shape[1]:], mask[:,-logits.shape[1]:]).sum()
    grads = lambda x: torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))])
    assert close(grads(loss(opened(model, past, now, torch.arange(2).expand(4, -1), 24))), grads(loss(model(batch["tokens"])[0])))
    assert trained(everything, tail=True)[0].losses == pytest.approx(trained(everything, tail=True)[0].losses, abs=0)


def test_learner_refuses_what_it_cannot_learn():
    model = BankTransformer(80, 32, 1, 2, window=24)
    with pytest.raises(ValueError, match="length: expected 1 to 71"): ReopenLearner(model, facts(), Schedule(1e-2, 3), everything, 72)
    with pytest.raises(ValueError, match="all targets in the last 12 tokens"):
        ReopenLearner(model, facts(), Schedule(1e-2, 3), None, 12).training_step(facts().batch(0, "train", 0, 0))
