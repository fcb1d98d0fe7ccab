"Attention as a convolution: any convolution, every border, the bound on heads, kernels of heads, replaced heads, and what is refused."
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from memnotes.attention.convolution import (CausalRelativeAttention, RelativeAttention2d, attention_as_conv, causal_conv_as_attention,
                                            conv_as_attention)
from memnotes.attention.heads import attention_weights, fit_kernel, kernel_pattern, patterns, replaced, squared_errors
from memnotes.attention.taps import grid_share, heads_bound, positive_heads, unfolded
from memnotes.core.cells import Recurrent
from memnotes.core.sequence import Attention, Transformer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def relative(ours, theirs): return ((ours - theirs).abs().max()/theirs.abs().max()).item()
def image(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


KINDS = [dict(kernel_size=k, dilation=d, padding=p, padding_mode=m) for k in (1, 2, 3, 4, (2, 3)) for d in (1, 2) for p in (0, 1, "same") for m in ("zeros", "replicate", "reflect", "circular")]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_convolution_is_attention_and_reads_back(kind):
    torch.manual_seed(1)
    conv, x = nn.Conv2d(2, 3, **kind).double(), image(2, 2, 9, 10)
    layer = conv_as_attention(conv)
    assert layer.n_heads == math.prod(conv.kernel_size)
    assert relative(layer(x), conv(x)) <= 1e-12 and relative(layer.dense(x), conv(x)) <= 1e-12
    assert relative(attention_as_conv(layer)(x), conv(x)) <= 1e-12


def test_reading_back_gives_the_kernel_itself():
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    back = attention_as_conv(conv_as_attention(conv))
    assert back.weight.shape == conv.weight.shape and relative(back.weight, conv.weight) <= 1e-12 and torch.equal(back.bias, conv.bias)


def test_heads_on_the_pixels_alone_replicate_the_border():
    conv = nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate").double()
    alone, x = RelativeAttention2d(2, 3, 25).double(), image(1, 2, 7, 6)
    alone.load_state_dict(conv_as_attention(conv).state_dict())
    assert relative(alone(x), conv(x)) <= 1e-12
    assert attention_as_conv(alone).padding_mode == "replicate"


def test_a_blurred_layer_is_its_convolution_inside():
    torch.manual_seed(0)
    layer = RelativeAttention2d(2, 3, 4).double()
    conv = attention_as_conv(layer)
    r = max(conv.padding)
    x = image(1, 2, 2*r+4, 2*r+4)
    assert relative(layer(x)[...,r:-r,r:-r], conv(x)[...,r:-r,r:-r]) <= 1e-9


@pytest.mark.parametrize("d_content", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_keeps_dtype_and_rows_apart(d_content, dtype):
    torch.manual_seed(0)
    layer, x = RelativeAttention2d(2, 3, 4, d_content, padding=(1, 1, 0, 2)).to(dtype), image(3, 2, 5, 6).to(dtype)
    y = layer(x)
    assert y.shape == (3, 3, 5, 6) and y.dtype == dtype
    assert torch.allclose(layer(x[1:2]), y[1:2], atol=1e-5)
    assert relative(layer.dense(x), y) <= (1e-4 if dtype == torch.float32 else 1e-12)
    assert layer.to("meta")(x.to("meta")).is_meta


@pytest.mark.parametrize("d_content", [0, 2])
def test_layer_gradcheck(d_content):
    torch.manual_seed(0)
    layer, x = RelativeAttention2d(2, 2, 3, d_content, padding=(1, 0, 0, 1)).double(), image(1, 2, 3, 3).requires_grad_()
    names, values = zip(*layer.named_parameters())
    call = lambda x, *v: torch.func.functional_call(layer, dict(zip(names, v)), (x,))
    assert torch.autograd.gradcheck(call, (x, *(v.detach().clone().requires_grad_() for v in values)))


def test_no_weight_between_two_pixels_is_stored():
    "Largest tensor that autograd keeps: O(batch * heads * channels * pixels), not pixels squared."
    layer, x, kept = RelativeAttention2d(2, 2, 3), torch.randn(1, 2, 40, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): layer(x)
    assert max(kept) <= 3*2*40*40 < 40**4


@pytest.mark.parametrize("kind", [dict(kernel_size=3), dict(kernel_size=1), dict(kernel_size=4, dilation=3, padding=9, bias=False)], ids=str)
def test_causal_convolution_is_attention_in_any_split(kind):
    torch.manual_seed(0)
    conv, x = nn.Conv1d(3, 5, **kind).double(), image(2, 20, 3)
    layer, reach = causal_conv_as_attention(conv), conv.dilation[0]*(conv.kernel_size[0]-1)
    right = F.conv1d(F.pad(x.mT, (reach, 0)), conv.weight, conv.bias, dilation=conv.dilation).mT
    y, _ = layer(x)
    first, state = layer(x[:,:7])
    assert relative(y, right) <= 1e-12 and relative(torch.cat([first, layer(x[:,7:], state)[0]], 1), right) <= 1e-12


def test_future_gradient_is_zero():
    layer, x = CausalRelativeAttention(3, 2).double(), image(1, 9, 3).requires_grad_()
    g, = torch.autograd.grad(layer(x)[0][:,4].sum(), x)
    assert g[:,5:].count_nonzero() == 0 and g[:,4].count_nonzero() > 0


def test_eckart_young_bounds_every_layer_and_rank_suffices():
    for seed in range(5):
        kernel = image(4, 3, 3, 3, seed=seed)
        bound = heads_bound(kernel)
        assert bound.shape == (10,) and bound[-1] == 0 and abs(bound[0] - kernel.norm()) <= 1e-12
        for H in (1, 4, 8):
            torch.manual_seed(seed)
            a = unfolded(kernel).new_tensor(np.random.default_rng(seed).dirichlet(np.ones(9), H)).T
            assert (unfolded(kernel) - a@torch.linalg.lstsq(a, unfolded(kernel)).solution).norm() >= bound[H] - 1e-12
    depthwise = torch.diag_embed(image(3, 3, 4)).permute(2, 3, 0, 1)
    for kernel,most in ((kernel, 9), (depthwise, 5), (image(4, 3, 3, 3)*0 + image(4, 3, 1, 1), 1)):
        a, W = positive_heads(kernel)
        assert len(a) <= most and a.min() > 0 and (a.sum(1) - 1).abs().max() <= 1e-12
        assert relative(torch.einsum("hk,ohc->ock", a, W), kernel.flatten(2)) <= 1e-12


def test_grid_share_is_one_for_taps_and_small_for_a_crowd():
    taps = conv_as_attention(nn.Conv2d(1, 1, 3, padding=1))
    crowd = RelativeAttention2d(1, 1, 9)
    with torch.no_grad(): crowd.centre.zero_(), crowd.log_alpha.fill_(math.log(46))
    assert abs(grid_share(taps) - 1) <= 1e-6 and grid_share(crowd) <= 1/9 + 1e-6


# -- kernels of heads

def test_known_kernels_come_back():
    w = image(4, 20, seed=2)
    got = fit_kernel(kernel_pattern(w, 20, softmax=True)[None], softmax=True)
    assert torch.allclose(got.log_weight.exp(), w.softmax(-1), atol=1e-8) and torch.allclose(got.r2, torch.ones(4).double())
    previous = F.pad(torch.eye(9), (0, 1, 1, 0))[None,None] # one token back; the first, which has none, looks at itself
    previous[...,0,0] = 1
    got = fit_kernel(previous)
    assert got.log_weight[0].argmax() == 1 and torch.allclose(got.log_weight[0].exp(), torch.tensor([.1, 1] + [0]*8).double()) and got.r2 > .8


def test_a_convolution_is_the_mean_along_each_diagonal():
    A = image(3, 2, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf).softmax(-1)
    k = fit_kernel(A).log_weight.exp()
    for lag in range(7): assert torch.allclose(k[:,lag], A.diagonal(-lag, -2, -1).mean((0, -1)))
    P = fit_kernel(A).pattern(7)
    assert P.triu(1).count_nonzero() == 0 and torch.allclose(P.diagonal(-2, -2, -1), k[:,2,None].expand(-1, 5))


def test_no_other_optimiser_finds_a_better_kernel():
    A = image(5, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf).softmax(-1)
    def cost(w): return squared_errors(A, kernel_pattern(torch.from_numpy(w)[None], 12, softmax=True))[0].sum().item()
    theirs = minimize(cost, np.zeros(12), method="BFGS", options=dict(maxiter=500)).fun
    ours = cost(fit_kernel(A, softmax=True).log_weight[0].numpy())
    assert ours <= theirs + 1e-9 and theirs <= ours*(1 + 1e-4)


@pytest.mark.parametrize("t", [4, 16, 128])
def test_a_sink_is_no_convolution_but_a_softmax_over_lags(t):
    first = torch.zeros(1, 1, t, t).double()
    first[...,0] = 1
    assert fit_kernel(first).r2 < .1 and fit_kernel(first, softmax=True).r2 > .98 # its best kernel lies at infinity
    e, u = squared_errors(first, kernel_pattern(torch.zeros(1, t).double(), t, softmax=True))
    assert torch.allclose(e, u) # equal weights are uniform attention


def test_patterns_are_those_of_the_fused_attention_and_replacing_by_them_changes_nothing():
    torch.manual_seed(0)
    model = Transformer(30, 24, 3, 6, 2, qk_norm=True).double()
    for p in model.parameters(): p.data *= 3 if p.ndim > 1 else 1
    tokens = torch.randint(30, (2, 14))
    P, z = patterns(model, tokens), model(tokens)[0]
    assert P.shape == (2, 3, 6, 14, 14) and torch.allclose(P.sum(-1), torch.ones(()).double())
    which = torch.zeros(3, 6, dtype=torch.bool)
    which[0,1] = which[2] = True
    with replaced(model, P, which): assert relative(model(tokens)[0], z) <= 1e-10
    with replaced(model, P.mean(0).roll(1, 1), which): assert relative(model(tokens)[0], z) > 1e-2
    assert torch.equal(model(tokens)[0], z) # hooks are gone
    m, x = Attention(12, 3, positions="none", window=4).double(), image(1, 9, 12)
    value = m.value(x).unflatten(-1, (3, 4)).transpose(1, 2)
    assert relative(m.output((attention_weights(m, x)@value).transpose(1, 2).flatten(2)), m(x)[0]) <= 1e-12


# -- what is refused

@pytest.mark.parametrize("conv, message", [
    (nn.Conv2d(2, 2, 3, stride=2), r"conv: has stride=\(2, 2\); expected \(1, 1\)"),
    (nn.Conv2d(2, 2, 3, groups=2), "conv: has groups=2; expected 1"),
])
def test_conv_as_attention_refuses(conv, message):
    with pytest.raises(ValueError, match=message): conv_as_attention(conv)


@pytest.mark.parametrize("alpha", [0, -1., float("nan"), float("inf")])
def test_alpha_must_be_a_sharpness(alpha):
    with pytest.raises(ValueError, match="alpha: expected a finite sharpness above 0"): conv_as_attention(nn.Conv2d(1, 1, 3), alpha)
    with pytest.raises(ValueError, match="alpha: expected a finite sharpness above 0"): causal_conv_as_attention(nn.Conv1d(1, 1, 3), alpha)


def test_wrong_layers_and_images_are_refused():
    with pytest.raises(TypeError, match="conv: expected an nn.Conv2d, got Conv1d; use causal_conv_as_attention"): conv_as_attention(nn.Conv1d(1, 1, 3))
    with pytest.raises(TypeError, match="conv: expected an nn.Conv1d, got Conv2d"): causal_conv_as_attention(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match=r"conv: has padding=\(1,\) .*not causal; expected 0 or 2 zeros"): causal_conv_as_attention(nn.Conv1d(1, 1, 3, padding=1))
    with pytest.raises(ValueError, match="conv: has stride"): causal_conv_as_attention(nn.Conv1d(1, 1, 3, stride=2))
    with pytest.raises(ValueError, match=r"x: expected \(batch, 2, rows, columns\); got \(1, 3, 4, 4\)"): RelativeAttention2d(2, 2)(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="n_heads: expected at least 1; got 0"): RelativeAttention2d(2, 2, 0)
    with pytest.raises(ValueError, match="n_heads: expected at least 1; got 0"): CausalRelativeAttention(2, 0)
    with pytest.raises(ValueError, match="prefix: expected a number of zeros"): CausalRelativeAttention(2, 1, prefix=-1)
    with pytest.raises(ValueError, match="padding_mode: expected zeros, .* got 'mirror'"): RelativeAttention2d(2, 2, padding_mode="mirror")
    with pytest.raises(ValueError, match="padding: expected four numbers"): RelativeAttention2d(2, 2, padding=(1, 1))
    with pytest.raises(ValueError, match="grow: .* d_content=2 needs"): RelativeAttention2d(2, 2, d_content=2, grow=(-1, 0))
    with pytest.raises(ValueError, match="layer: has d_content=2"): attention_as_conv(RelativeAttention2d(2, 2, d_content=2))


@pytest.mark.parametrize("kind, message", [
    (dict(kernel_size=4, padding=3, padding_mode="reflect"), r"x: an image of 3 x 3 pixels is too small for padding=\(3, 3, 3, 3\) \(reflect\) .* at least 4 x 4"),
    (dict(kernel_size=2, padding=4, padding_mode="circular"), "x: an image of 3 x 3 .* at least 4 x 4"),
    (dict(kernel_size=4), "x: an image of 3 x 3 .* at least 4 x 4"),
], ids=str)
def test_even_kernels_say_when_the_image_is_too_small_for_their_padding(kind, message):
    with pytest.raises(ValueError, match=message): conv_as_attention(nn.Conv2d(1, 1, **kind))(torch.zeros(1, 1, 3, 3))


def test_heads_refuse_what_is_no_attention():
    with pytest.raises(ValueError, match=r"attention: expected \(documents, heads, t, t\); got \(3, 3\)"): fit_kernel(torch.eye(3))
    with pytest.raises(ValueError, match="attention: expected causal patterns whose rows sum to 1"): fit_kernel(torch.full((1, 1, 4, 4), .25))
    with pytest.raises(ValueError, match="t: expected 1 to 4, the lags of the kernel; got 5"): kernel_pattern(torch.zeros(1, 4), 5)
    with pytest.raises(TypeError, match="model: its blocks mix by LSTM; expected"): patterns(Recurrent("lstm", 11, 8), torch.zeros(1, 3, dtype=torch.long))
    model, tokens = Transformer(11, 8, 2, 2), torch.zeros(1, 5, dtype=torch.long)
    P, every = patterns(model, tokens), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="which: expected one Boolean for each of 2 layers and 2 heads; got"):
        with replaced(model, P, every[:1]): pass
    with replaced(model, P, every):
        with pytest.raises(ValueError, match="pattern: has 5 positions, the text 6"): model(torch.zeros(1, 6, dtype=torch.long))
        with pytest.raises(ValueError, match="state: replaced heads read a text from its beginning"): model(tokens[:,:2], model(tokens[:,:2])[1])
