"Copying the first word: batches are those of one long draw, a race ends where it should, and wrong names are caught."
import pytest
import torch

from memnotes.core.cells import GRU
from memnotes.horizon.copying import attending, race, recurrent, says, word_batch, word_task
from memnotes.horizon.stack import Stack

MAKERS = {"attention": attending(), "learned": attending("learned"), "linear": attending("learned", True), "gru": recurrent(GRU, 12)}


def stack(maker, k=2):
    models = []
    for s in range(k):
        torch.manual_seed(s)
        models.append(MAKERS[maker](17, 8))
    return Stack(models)


@pytest.mark.parametrize("first", ["marked", "same_alphabet"])
def test_batches_of_a_seed_differ_and_come_again(first):
    batches = [word_batch(first, 8, 4, 3, i) for i in range(17)]
    assert len({tuple(t.flatten().tolist()) for t,_ in batches}) == 17
    for tokens,words in batches: assert tokens.shape == (4, 9) and torch.equal(tokens[:,0], words) and (words < 8).all()
    assert all(torch.equal(a, b) for a,b in zip(batches[16], word_batch(first, 8, 4, 3, 16)))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_member_races_as_it_would_alone(maker):
    both, second = stack(maker), stack(maker)
    curves = race(both, lambda j, i: word_batch("marked", 8, 4, j, i), [1e-2, 3e-2], 12, [None, 4])
    second.theta = second.theta[1:]
    second.mean, second.square, second.updates = second.mean[1:], second.square[1:], second.updates[1:]
    assert race(second, lambda _, i: word_batch("marked", 8, 4, 1, i), [3e-2], 12, [4]) == [curves[1]]
    torch.testing.assert_close(both.theta[1:], second.theta, rtol=1e-3, atol=1e-4)


def test_a_race_ends_when_a_member_has_learned():
    runners = stack("gru")
    curves = race(runners, lambda j, i: word_batch("marked", 8, 16, 0, i), [3e-2, 1e-9], 120)
    assert 10 <= len(curves[0]) < 120 and sum(curves[0][-10:]) >= 9.9
    assert len(curves[1]) == 120
    right = says(runners, [word_task("marked", 8, 64)]*2, [5, 6])
    assert right[0] > .95 and right[1] < .6
    assert says(runners, [word_task("marked", 8, 64)]*2, [5, 6], runners.theta.flip(0))[1] > .95


def test_wrong_names_are_caught():
    with pytest.raises(ValueError, match="first"): word_task("bos", 8, 4)
    with pytest.raises(ValueError, match="lag"): word_batch("marked", 0, 4, 0, 0)
    with pytest.raises(ValueError, match="positions"): attending("sinusoid")(17, 8)
    with pytest.raises(ValueError, match="one batch"): says(stack("gru"), [word_task("marked", 8, 4)], [0])
