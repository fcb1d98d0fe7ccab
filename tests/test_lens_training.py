"Portraits of small models: what they hold, what they must not change, and the numbers that come from them."
import math

import pytest
import torch

from memnotes.core.learner import Schedule
from memnotes.core.sequence import Transformer
from memnotes.inside.lens import FAMILIES
from memnotes.inside.lens_training import READERS, Portrait, numbers, portrait, shrinkage
from memnotes.inside.stream import rotated

VOCAB, D, N = 13, 16, 4


def gpt(n_layers=N, tied=True, size=8.):
    torch.manual_seed(0)
    model = Transformer(VOCAB, D, n_layers, 2, tied=tied).eval().requires_grad_(False)
    for p in model.parameters(): p.mul_(size if p.ndim > 1 else 1)
    return model


def text(seed, b=24, t=9): return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plain(): return portrait(gpt(), text(1), text(2))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_shrinkage_is_the_product(kind):
    s = Schedule(1e-2, 40, warmup=0 if kind == "constant" else 5, kind=kind)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1., weight_decay=.3)
    for i in range(s.steps):
        optimizer.param_groups[0]["lr"], weight.grad = s(i), torch.zeros_like(weight)
        optimizer.step()
    assert shrinkage(s, .3) == pytest.approx(weight[0].item(), rel=1e-12)
    assert shrinkage(s, 0) == 1
    if kind == "constant": assert shrinkage(s, .3) == pytest.approx((1 - .003)**40)


@pytest.mark.parametrize("wrong", [-.1, math.nan])
def test_shrinkage_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match="weight_decay: expected 0 or more, got"): shrinkage(Schedule(1e-2, 10), wrong)


def test_portrait_has_every_layer_and_reader(plain):
    assert READERS == ("logit lens", *FAMILIES)
    assert plain.kl.shape == plain.agree.shape == (len(READERS), N+1) and plain.echo.shape == (N+1,) and plain.turn.shape == plain.gap.shape == (N,)
    assert plain.kl[:,-1].abs().max() < 1e-5 and (plain.agree[:,-1] == 1).all() and plain.kl.min() > -1e-5
    assert plain.constant > 0 and ((plain.turn >= 0) & (plain.turn <= math.sqrt(2))).all()
    missing = plain.skip.isnan()
    assert missing[0,:,N-1:].all() and not missing[0,:,:N-1].any() and missing[1,:,N-2:].all() and not missing[1,:,:N-2].any()


def test_portrait_leaves_the_model_alone(plain):
    model = gpt()
    before, logits = {k: v.clone() for k,v in model.state_dict().items()}, model(text(3))[0]
    again = portrait(model, text(1), text(2))
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items()) and torch.equal(model(text(3))[0], logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(again.kl, plain.kl) and again.skip.nan_to_num().equal(plain.skip.nan_to_num()) # the same model, the same portrait


def test_a_rotated_copy_has_another_basis_and_the_same_content(plain):
    turned = portrait(rotated(gpt()), text(1), text(2))
    assert (turned.kl[-1] - plain.kl[-1]).abs().max() < 1e-2 and (turned.kl[READERS.index("orthogonal")] - plain.kl[READERS.index("orthogonal")]).abs().max() < 1e-2
    assert (turned.turn[1:] > plain.turn[1:]).all()
    assert (turned.agree[0,1:-1] < plain.agree[0,1:-1]).all()


def test_a_tied_head_echoes_what_comes_in():
    assert portrait(gpt(), text(1), text(2)).echo[0] > .9 > portrait(gpt(tied=False), text(1), text(2)).echo[0]


def test_a_model_needs_a_block_before_and_behind():
    with pytest.raises(ValueError, match="model: has 2 blocks; expected at least 3"): portrait(gpt(2), text(1), text(2))


def test_numbers_of_a_portrait_made_by_hand():
    kl = torch.tensor([[8., 4, 2, 1, 0], [6, 3, 2, 1, 0], [6, 2, 2, 1, 0], [6, 1, 1, 1, 0], [2, 1, 1, .5, 0]])
    skip = torch.tensor([[[9., 1, 2, math.nan, math.nan], [9, 4, 4, math.nan, math.nan]]])
    got = numbers(Portrait(kl, torch.zeros(5, 5), torch.zeros(5), torch.tensor([.1, .2, .3, .4]), skip, 4.))
    want = dict(head_beats_a_constant=1, gap_share=.5, rotation_gain=.5, turn=.3, skip=(.25+.5)/2, removed=.5, sensible_to_the_head=.5, sensible_to_a_translator=0)
    assert got == pytest.approx(want, abs=1e-6)


def test_numbers_see_the_extremes(plain):
    assert numbers(plain._replace(kl=0*plain.kl + 1e-9))["sensible_to_a_translator"] == 0
    assert numbers(plain._replace(skip=plain.skip[:,[1, 1]]))["skip"] == 1
    assert numbers(plain._replace(kl=plain.kl[[0]*5]))["gap_share"] == 0
