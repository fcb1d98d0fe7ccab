"Linear attention: three forms are one function, whatever the length, chunk and state; what it stores; what it refuses."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from memnotes.core.learner import Schedule, fit
from memnotes.core.sequence import Attention, Block, SequenceModel, Transformer, nbytes
from memnotes.core.tasks import AssociativeRecall, CopyFirst
from memnotes.horizon.fixed_state import bits_recovered, pairs_at, recalled, store, sum_recall
from memnotes.horizon.forms import (FEATURE_MAPS, FORMS, DeltaRule, GatedLinearAttention, LinearAttention, chunked, delta_chunked,
                                    delta_recurrent, dpfp, parallel, recurrent, taylor2)
from memnotes.horizon.linear_attention import Shift, book, recall_model, rewritten, stepped

D = 12
KINDS = {**{n: lambda n=n, **k: LinearAttention(D, 2, n, **k) for n in FEATURE_MAPS}, "gla": lambda **k: GatedLinearAttention(D, 2, **k),
         "retnet": lambda **k: GatedLinearAttention(D, 2, "retnet", **k), "delta": lambda **k: DeltaRule(D, 2, **k)}


def normal(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apart(a, b): return ((a - b).abs().max()/b.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(t=st.integers(1, 40), batch=st.integers(1, 3), chunk=st.integers(1, 48), carried=st.booleans())
def test_three_forms_are_one_function(kind, t, batch, chunk, carried):
    torch.manual_seed(0)
    first = KINDS[kind](form="recurrent").double()
    state = normal(*first.init_state(batch).shape, seed=2).abs() if carried else None
    out = {}
    for form in FORMS:
        m, x = KINDS[kind](form=form, chunk=chunk).double(), normal(batch, t, D, seed=1).requires_grad_()
        m.load_state_dict(first.state_dict())
        y, end = m(x, state)
        out[form] = (y, end, torch.autograd.grad((y**2).sum() + (end**2).sum(), x)[0])
    for form in ("parallel", "chunked"):
        for got, want in zip(out[form], out["recurrent"]): assert got.shape == want.shape and apart(got, want) <= 1e-10


@settings(max_examples=10, deadline=None, derandomize=True)
@given(t=st.integers(1, 7), chunk=st.integers(1, 9), batch=st.integers(1, 2), heads=st.integers(1, 2), f=st.integers(1, 3), e=st.integers(1, 3))
def test_gradcheck_of_the_chunked_rules(t, chunk, batch, heads, f, e):
    q, k, v, S = (normal(batch, heads, *s, seed=i).requires_grad_() for i,s in enumerate([(t, f), (t, f), (t, e), (f, e)]))
    g, beta = -normal(batch, heads, t, f, seed=4).abs().requires_grad_(), normal(batch, heads, t, 1, seed=5).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: chunked(*a, size=chunk), (q, k, v, S))
    assert torch.autograd.gradcheck(lambda *a: chunked(*a, size=chunk), (q, k, v, S, g))
    assert torch.autograd.gradcheck(lambda *a: delta_chunked(*a, size=chunk), (q, k, v, S, beta))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(t=st.integers(1, 5), chunk=st.integers(1, 6), batch=st.integers(1, 2))
def test_gradcheck_of_the_mixers(kind, t, chunk, batch):
    torch.manual_seed(0)
    m = KINDS[kind](chunk=chunk).double()
    names, x = dict(m.named_parameters()), normal(batch, t, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: torch.func.functional_call(m, dict(zip(names, p)), (x,)), (x, *(p.detach().clone().requires_grad_() for p in names.values())), fast_mode=True)


def test_a_gate_that_forgets_all_it_may_stays_finite_in_float32():
    torch.manual_seed(0)
    m, ref = (GatedLinearAttention(D, 2, chunk=128, form=form) for form in ("chunked", "recurrent"))
    with torch.no_grad(): m.gate.bias.fill_(-100) # -100/16 a step, held at -1
    ref.load_state_dict(m.state_dict())
    x = torch.randn(1, 300, D, requires_grad=True)
    y = m(x)[0]
    g, = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and g.isfinite().all() and apart(y.double(), ref.double()(x.double())[0]) < 1e-4


def test_a_sequence_of_thousands_in_float32_is_the_definition():
    torch.manual_seed(0)
    for kind in ("elu", "retnet", "delta"):
        m = KINDS[kind](form="chunked")
        ref = KINDS[kind](form="recurrent").double()
        ref.load_state_dict(m.state_dict())
        x = normal(1, 2000, D)
        with torch.no_grad(): assert apart(m(x.float())[0].double(), ref(x)[0]) < 1e-5


def test_features_have_the_widths_and_values_of_their_papers():
    q, k = normal(50, 6), normal(50, 6, seed=1)
    s = (q*k).sum(-1)/math.sqrt(6)
    assert taylor2(q).shape[-1] == 1 + 6 + 21 and apart((taylor2(q)*taylor2(k)).sum(-1), 1 + s + s**2/2) < 1e-12
    x = torch.tensor([[1., -2.]])
    r = [1., 0., 0., 2.] # relu of (1, -2, -1, 2)
    assert dpfp(x, 2).tolist() == [[r[i]*r[i-s] for s in (1, 2) for i in range(4)]]
    assert all((phi(q) >= 0).all() for n,phi in FEATURE_MAPS.items() if n != "taylor2")


def test_the_delta_rule_replaces_and_the_sum_adds():
    k, old, new = F.normalize(normal(1, 1, 4), dim=-1), normal(1, 1, 3, seed=1), normal(1, 1, 3, seed=2)
    two, beta, S = torch.cat([k, k], 1), torch.ones(1, 2, 1, dtype=torch.float64), torch.zeros(1, 4, 3, dtype=torch.float64)
    assert apart(k @ delta_recurrent(two, two, torch.cat([old, new], 1), S, beta)[1], new) < 1e-12
    assert apart(k @ recurrent(two, two, torch.cat([old, new], 1), S)[1], old + new) < 1e-12


def test_the_state_has_a_size_and_the_cache_has_none():
    x = normal(2, 30, D).float()
    for make in KINDS.values(): assert nbytes(make()(x)[1]) == nbytes(make()(x[:,:3])[1]) == nbytes(make().init_state(2))
    f = Attention(D, 2)
    assert nbytes(f(x)[1]) - nbytes(f(x[:,:3])[1]) == 27*2*2*D*4


def test_no_buffer_of_time_times_state_in_the_chunked_forms():
    "Everything the chunked forms keep for the backward pass is smaller than one state for each position."
    t, d = 512, 16
    for rule in ("sum", "delta"):
        kept, (q, k, v) = [], (normal(1, 1, t, d, seed=i).requires_grad_() for i in range(3))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            S = torch.zeros(1, 1, d, d, dtype=torch.float64)
            chunked(q, k, v, S) if rule == "sum" else delta_chunked(q, k, v, S, torch.ones(1, 1, t, 1, dtype=torch.float64))
        assert max(kept) <= t*64 < t*d*d


def test_stepping_a_transformer_is_reading_it_and_its_cache_is_never_rewritten():
    torch.manual_seed(0)
    tokens = torch.randint(20, (2, 15))
    soft = Transformer(20, D, 2, 2).double()
    linear = SequenceModel(20, D, [Block(make()) for make in KINDS.values()]).double()
    for model in (soft, linear):
        out, end = stepped(model, tokens)
        assert apart(out, model(tokens)[0]) < 1e-10
        assert (rewritten(stepped(model, tokens[:,:9])[1], end) == 0) == (model is soft)


def test_a_language_model_of_each_kind_trains():
    for make in (KINDS["elu"], KINDS["gla"], KINDS["delta"]):
        torch.manual_seed(0)
        task = CopyFirst(vocab=9, lag=6, batch_size=16)
        learner = fit(SequenceModel(task.vocab, D, [Block(make()), Block(make())]), task, Schedule(.01, 60, 5), window=4)
        assert sum(learner.losses[-5:]) < sum(learner.losses[:5])


def test_capacity_is_what_theory_says():
    d = V = 64
    n = round(V*d/(2*math.log(V)))
    keys, words = F.normalize(normal(n, d), dim=-1), torch.randint(V, (n,), generator=torch.Generator().manual_seed(1))
    got = recalled(store(keys, F.one_hot(words, V).double()), keys).eq(words).double().mean().item()
    assert abs(got - sum_recall(n, d, V)) < .06 and abs(sum_recall(pairs_at(.99, d, V), d, V) - .99) < 1e-6
    keys, values = keys[:d], normal(d, 3, seed=4)
    assert apart(keys @ store(keys, values, "least squares"), values) < 1e-9
    assert bits_recovered(10, 1., 8) == 30 and bits_recovered(10, 1/8, 8) == 0 and bits_recovered(10, .05, 8) == 0


def test_a_book_keeps_facts_and_questions_and_states_other_keys():
    task = AssociativeRecall(32, 8, 4, 4, 16, key_tokens=1)
    x = task.batch(0, "test", 0, 0)["tokens"]
    for noise in (False, True):
        y = book(x, 4, 8, 32, 100, noise)
        assert y.shape == (32, 116) and torch.equal(y[:,:8], x[:,:8]) and torch.equal(y[:,-8:], x[:,-8:])
        if noise: assert (y[:,8:-8] >= 40).all()
        else: assert not (y[:,8:-8:2,None] == x[:,None,:8:2]).any() and (y[:,9:-8:2] < 8).all()
    assert book(x, 4, 8, 32, 0).shape == (32, 16)
    model = recall_model(task.vocab, DeltaRule(16, 2))
    assert model(x)[0].shape == (32, 32, task.vocab)


@pytest.mark.parametrize("make, message", [
    (lambda: LinearAttention(D, 5), "n_heads: expected a divisor of d_model=12; got 5"),
    (lambda: LinearAttention(D, 2, "softmax"), "feature_map: expected one of 'elu', 'relu2', 'taylor2', 'dpfp', or a function; got 'softmax'"),
    (lambda: LinearAttention(D, 2, form="scan"), "form: expected one of 'parallel', 'recurrent', 'chunked'; got 'scan'"),
    (lambda: LinearAttention(D, 2, chunk=0), "chunk: expected at least 1 position; got 0"),
    (lambda: LinearAttention(D, 2, d_key=0), "d_key: expected at least 1"),
    (lambda: GatedLinearAttention(D, 2, "mamba"), "decay: expected 'gla' or 'retnet'; got 'mamba'"),
    (lambda: GatedLinearAttention(D, 2, chunk=256), "chunk: expected at most 128"),
    (lambda: LinearAttention(D, 2)(torch.zeros(2, 0, D)), r"x: expected \(batch, time ≥ 1, 12\); got \(2, 0, 12\)"),
    (lambda: DeltaRule(D, 2)(torch.zeros(2, 3, 5)), r"x: expected .*; got \(2, 3, 5\)"),
    (lambda: dpfp(torch.zeros(2, 3), 6), "nu: expected 1 to 5"),
    (lambda: Shift(0), "d_model: expected at least 1; got 0"),
    (lambda: store(torch.zeros(3, 2), torch.zeros(4, 2)), r"keys, values: expected \(n, d\) and \(n, e\)"),
    (lambda: store(torch.zeros(3, 2), torch.zeros(3, 2), "hebb"), "rule: expected 'sum', 'delta' or 'least squares'; got 'hebb'"),
    (lambda: sum_recall(5, 4, 1), "n, d, V: expected at least"),
    (lambda: pairs_at(.001, 4, 8), "recall: expected between chance"),
    (lambda: bits_recovered(5, 1.5, 4), "recall: expected a share"),
    (lambda: book(torch.zeros(1, 16, dtype=torch.long), 4, 8, 32, 3), "between: expected an even number"),
])
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_parallel_and_recurrent_refuse_nothing_that_one_step_allows():
    q, S = normal(1, 1, 3), normal(1, 3, 2)
    v = normal(1, 1, 2)
    assert apart(parallel(q, q, v, S)[0], recurrent(q, q, v, S)[0]) < 1e-12


def test_the_delta_rule_stores_orthogonal_keys_exactly_and_overwrites_a_key():
    keys, values = torch.eye(6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    assert apart(keys @ store(keys, values, "delta"), values) < 1e-12
    twice = store(torch.cat([keys, keys[:1]]), torch.cat([values, -values[:1]]), "delta")
    assert apart(keys[:1] @ twice, -values[:1]) < 1e-12 # a sum would recall 0
