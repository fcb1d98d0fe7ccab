"The chain of a language model: counts, long run, tests on samples, cycles, and what a window leaves out."
import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from memnotes.attention import chain
from memnotes.attention.markov import (beyond, chi_square, closed_classes, entropy_rate, gram_counts, greedy_cycles, matrix_test, mixing_time, n_states, next_token,
                                       order_test, period, published_rate, refeed, rows_of, sampling_error, spectral_gap, state_number, states, stationary,
                                       transition_matrix, z_score)
from memnotes.core.cells import Recurrent
from memnotes.core.sequence import Transformer, generate

V = 3
MODELS = {
    "transformer": lambda: Transformer(V, 8, 2, 2),
    "learned-positions": lambda: Transformer(V, 8, 2, 2, positions="learned", max_len=6, dropout=.2),
    "windowed": lambda: Transformer(V, 8, 2, 2, window=2),
    "gru": lambda: Recurrent("gru", V, 8),
    "lstm": lambda: Recurrent("lstm", V, 8),
}

def made(name="transformer", seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval().requires_grad_(False)
    for p in model.parameters(): p.mul_(4)
    return model

two = lambda p, q: sp.csr_array([[1-p, p], [q, 1-q]])
wheel = lambda n: sp.csr_array(np.roll(np.eye(n), 1, axis=1))

def text(seed=0, b=500, t=60, model=None, K=2):
    start = torch.randint(V, (b, 1), generator=torch.Generator().manual_seed(seed))
    return refeed(model or made(), start, t, K, generator=torch.Generator().manual_seed(seed))[:,20:]


@pytest.mark.parametrize("vocab, context", [(2, 1), (2, 5), (3, 4), (7, 2)])
def test_states_are_all_contexts_numbered(vocab, context):
    every = states(vocab, context)
    assert every.shape == (n_states(vocab, context), context) and len({tuple(s) for s in every.tolist()}) == len(every)
    assert [state_number(s[s >= 0], vocab).item() for s in every] == list(range(len(every)))

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [1, 3])
def test_matrix_is_what_each_context_gives_alone(name, context):
    model = made(name)
    P = transition_matrix(model, V, context, temperature=.7, batch=4)
    assert P.shape == 2*(n_states(V, context),) and P.nnz == V*P.shape[0]
    dense, every = P.toarray(), states(V, context)
    for i,s in enumerate(every):
        p = next_token(model(s[s >= 0][None])[0][:,-1], .7)[0]
        for a in range(V):
            longer = torch.cat([s[s >= 0], torch.tensor([a])])[-context:]
            assert abs(dense[i, state_number(longer, V)] - p[a]) < 1e-12

def test_matrix_leaves_model_and_randomness_as_they_were():
    model = made("learned-positions").train()
    before, drawn = model.training, torch.random.get_rng_state()
    assert (transition_matrix(model, V, 2) != transition_matrix(model.eval(), V, 2)).nnz == 0
    assert before and torch.equal(drawn, torch.random.get_rng_state())

def test_greedy_matrix_has_one_successor_each():
    P = transition_matrix(made(), V, 3, temperature=0)
    assert P.nnz == P.shape[0] and set(P.data) == {1.}

def test_two_states_in_closed_form():
    p, q = .3, .1
    P, h = two(p, q), lambda x: -x*math.log(x) - (1-x)*math.log(1-x)
    assert np.allclose(stationary(P), [q/(p+q), p/(p+q)], atol=1e-14)
    assert spectral_gap(P) == pytest.approx(p+q, abs=1e-14)
    assert entropy_rate(P) == pytest.approx((q*h(p) + p*h(q))/(p+q), abs=1e-14)
    variance = p*q/(p+q)**2*(2-p-q)/(p+q)/1000
    assert sampling_error(P, 1000) == pytest.approx(math.sqrt(2/math.pi*variance), rel=1e-12)

@pytest.mark.parametrize("eps", [.25, .01, 1e-6])
@pytest.mark.parametrize("temperature", [.3, 1., 3.])
def test_mixing_time_is_the_first_power_near_enough(eps, temperature):
    P = transition_matrix(made(), V, 3, temperature)
    pi, M, n = stationary(P), P.toarray(), 1
    while np.abs(M - pi).sum(1).max()/2 > eps: M, n = M@P, n+1
    assert mixing_time(P, eps) == n

def test_what_never_mixes():
    assert mixing_time(wheel(5)) == math.inf and spectral_gap(wheel(5)) == pytest.approx(0, abs=1e-12)
    apart = sp.block_diag([two(.5, .5), two(.2, .3)]).tocsr()
    assert mixing_time(apart) == math.inf and len(closed_classes(apart)) == 2 and spectral_gap(apart) == pytest.approx(0, abs=1e-12)
    assert period(wheel(6), np.arange(6)) == 6 and period(two(.5, .5), np.arange(2)) == 1
    assert np.allclose(stationary(wheel(5)), .2)

def test_large_chains_by_iteration(monkeypatch):
    P = transition_matrix(made(), V, 6, temperature=2.)
    exact, gap = stationary(P), 1 - np.sort(np.abs(np.linalg.eigvals(P.toarray())))[-2]
    assert P.shape[0] > 512 and spectral_gap(P) == pytest.approx(gap, abs=1e-9)
    monkeypatch.setattr(chain, "DENSE", 10)
    assert np.abs(stationary(P) - exact).sum() < 1e-11
    with pytest.raises(ValueError, match="1,092; shorten context"): mixing_time(P)

def test_published_rate_bounds_every_entry():
    K, P = 2, transition_matrix(made(), V, 2)
    eps, pi, M = published_rate(P, K), stationary(P), np.linalg.matrix_power(P.toarray(), K)
    for n in range(K, 40):
        assert np.abs(M - pi).max() <= (1 - 2*eps)**(n//K - 1) + 1e-12
        M = M@P

def test_refeeding_is_generation_while_the_window_is_not_full():
    model, start = made(), torch.randint(V, (9, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(refeed(model, start, 5, 8, 0.), generate(model, start, 5, 0.))
    assert refeed(model, start, 0, 8).shape == (9, 0)

def test_samples_pass_and_wrong_ones_do_not():
    model, said = made(), text()
    P = transition_matrix(model, V, 2)
    assert abs(z_score(*order_test(said, V, 2))) < 4 and abs(z_score(*matrix_test(said, P, V, 2))) < 4
    assert z_score(*order_test(said, V, 1)) > 10 and z_score(*matrix_test(said, transition_matrix(made(seed=1), V, 2), V, 2)) > 10

def test_chi_square_is_scipys():
    table = np.array([[[30., 20, 25], [14, 28, 33]]])
    expected = stats.contingency.expected_freq(table[0])[None]
    got, df = chi_square(table.reshape(1, -1), expected.reshape(1, -1), 2)
    known = stats.chi2_contingency(table[0], correction=False)
    assert got == pytest.approx(known.statistic) and df == known.dof
    assert gram_counts(torch.tensor([[0, 1, 0, 1]]), 2, 2).tolist() == [[0, 2], [1, 0]]

def test_cycles_are_the_closed_classes():
    for seed in range(4):
        model, K = made(seed=seed), 3
        whole = states(V, K)[-V**K:]
        found = greedy_cycles(model, whole, K, V**K)
        P = transition_matrix(model, V, K, temperature=0)
        assert {len(c) for _,c in found} == {len(c) for c in closed_classes(P)}
        said = refeed(model, whole, 60, K, 0.)
        for row,(before, cycle) in zip(said.tolist(), found): assert row[before:] == (cycle*60)[:60-before]
    assert greedy_cycles(model, whole, K, 0) == [None]*len(whole)

def test_what_a_window_leaves_out():
    cached = transition_matrix(made("windowed"), V, 5)
    told = [beyond(cached, V, 5, s) for s in range(1, 6)]
    assert all(a >= b - 1e-12 for a,b in zip(told, told[1:])) and told[1] > 1e-6
    assert told[2:] == pytest.approx([0]*3, abs=1e-12) # two layers of width 2 see three tokens
    assert rows_of(cached, V, 5).sum(1) == pytest.approx(1)

BAD = {
    "one token": (lambda: n_states(1, 3), "vocab: expected at least 2"),
    "no window": (lambda: states(3, 0), "context: expected a window"),
    "too many": (lambda: transition_matrix(made(), V, 20), r"make 5230176600 states, more than the 1,048,576 that are enumerated; shorten context, merge tokens"),
    "far too many": (lambda: states(49152, 2048), r"about 10\^9608 states"),
    "other vocabulary": (lambda: transition_matrix(made(), V+1, 2), "vocab: the model has 3 tokens, got 4; pass vocab=model.vocab"),
    "over the limit": (lambda: transition_matrix(made("learned-positions"), V, 7), "reads at most 6 tokens, got 7; shorten context"),
    "cold": (lambda: transition_matrix(made(), V, 2, -1.), "temperature: expected 0"),
    "not square": (lambda: stationary(sp.csr_array(np.ones((2, 3))/3)), "P: expected a square matrix"),
    "columns sum to one": (lambda: spectral_gap(two(.3, .1).T), "transpose P"),
    "negative": (lambda: entropy_rate(two(-.1, .1)), "expected probabilities, got -0.1"),
    "two ends": (lambda: stationary(sp.eye_array(3)), "3 closed classes"),
    "eps": (lambda: mixing_time(two(.3, .1), 0), "eps: expected a total variation"),
    "training": (lambda: refeed(made().train(), torch.zeros(1, 1, dtype=torch.long), 1, 2), "model: is in training mode"),
    "no prompt": (lambda: refeed(made(), torch.zeros(1, 0, dtype=torch.long), 1, 2), "at least one token"),
    "nothing tested": (lambda: z_score(0., 0), "nothing is tested; sample more tokens"),
    "shared": (lambda: beyond(transition_matrix(made(), V, 2), V, 2, 3), "shared: expected 1 to context=2"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message): call()
