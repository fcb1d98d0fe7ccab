"Persistent vectors: the merged kernel against the concatenation, the layer against core's attention, feed-forward layers against attention."
import copy

import pytest
import torch
import torch.nn.functional as F

from memnotes.core.sequence import Attention, Block, MLP, Transformer
from memnotes.inside.all_attention import (AllAttention, AllAttentionBlock, MemoryAttention, PersistentAttention, PersistentVectors, SoftmaxFFN,
    attention_as_ffn, ffn_as_attention, flashes, halves, joint_attention, memory_mass, persistent_attention, says, top_places, watch, without_memory)
from memnotes.inside.merged import flash

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
size = lambda module: sum(p.numel() for p in module.parameters())


def parts(b=2, h=3, t=7, s=7, d=8, n=5, dtype=torch.float64, device="cpu", seed=0):
    torch.manual_seed(seed)
    shapes = [(b, h, t, d), (b, h, s, d), (b, h, s, d), (b, h, t, d), (h, n, d), (h, n, d)]
    return [torch.randn(s, dtype=dtype).to(device).requires_grad_() for s in shapes]


def by_hand(query, key, value, probe, memory_key, memory_value, seen=None):
    "The equation, weight by weight, in float64."
    query, key, value, probe, memory_key, memory_value = (x.double() for x in (query, key, value, probe, memory_key, memory_value))
    context = query @ key.mT
    if seen is not None: context = context.masked_fill(~seen, -torch.inf)
    weights = (torch.cat([context, probe @ memory_key.mT], -1)/query.shape[-1]**.5).softmax(-1)
    return weights[...,:key.shape[2]] @ value + weights[...,key.shape[2]:] @ memory_value


def relative(a, b): return ((a.double() - b.double()).abs().max()/b.double().abs().max()).item()


# -- the kernel

@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 5e-7), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("t, s, seen", [(7, 7, "causal"), (70, 70, "causal"), (3, 9, "mask"), (1, 9, None), (5, 5, None)])
@pytest.mark.parametrize("f", [persistent_attention, joint_attention])
def test_both_computations_are_the_equation(f, t, s, seen, dtype, tol, device):
    x = parts(t=t, s=s, dtype=dtype, device=device)
    mask = torch.ones(t, s, dtype=torch.bool, device=device).tril(s-t) if seen else None
    y = f(*x, mask if seen == "mask" else None, seen == "causal")
    assert y.dtype == dtype and relative(y, by_hand(*x, mask)) <= tol


@pytest.mark.parametrize("device", devices)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("n, d, t", [(1, 4, 1), (40, 16, 70), (300, 32, 130)])
def test_merged_backward_is_autograds(n, d, t, dtype, tol, device):
    x = parts(t=t, s=t, n=n, d=d, dtype=dtype, device=device)
    weight = torch.randn(x[0].shape, dtype=dtype).to(device)
    ours = torch.autograd.grad((persistent_attention(*x, is_causal=True)*weight).sum(), x)
    wide = [p.detach().double().requires_grad_() for p in x]
    seen = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    reference = torch.autograd.grad((by_hand(*wide, seen)*weight.double()).sum(), wide)
    if n == t == 1: ours, reference = ours[1:], reference[1:] # two weights: the scores' gradients nearly cancel
    assert max(relative(a, b) for a,b in zip(ours, reference)) <= tol


def test_gradcheck_of_both_and_second_derivatives_of_one():
    x = parts(1, 2, 4, 4, 4, 3)
    assert torch.autograd.gradcheck(lambda *x: persistent_attention(*x, is_causal=True), x)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    assert torch.autograd.gradcheck(lambda *x: persistent_attention(*x, mask), parts(1, 2, 4, 6, 4, 3))
    assert torch.autograd.gradgradcheck(lambda *x: joint_attention(*x, is_causal=True), x)
    g, = torch.autograd.grad(persistent_attention(*x, is_causal=True).pow(2).sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): g.sum().backward()


def test_layout_does_not_matter():
    x = parts()
    turned = [p.detach().mT.contiguous().mT.requires_grad_() for p in x] # last axis strided
    assert torch.allclose(persistent_attention(*turned, is_causal=True), persistent_attention(*x, is_causal=True), atol=1e-14)
    pick = lambda y: y[...,::2].sum() # a gradient with gaps
    for a,b in zip(torch.autograd.grad(pick(persistent_attention(*turned)), turned), torch.autograd.grad(pick(joint_attention(*x)), x)): assert torch.allclose(a, b, atol=1e-12)
    for a,b in zip(torch.autograd.grad(persistent_attention(*x).mT.sum(), x), torch.autograd.grad(joint_attention(*x).sum(), x)): assert torch.allclose(a, b, atol=1e-12)


def test_the_fallback_is_chosen_by_device_dtype_and_transform():
    x = parts()
    assert all(flashes(x[0].to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)) and not flashes(x[0].to("meta"))
    assert persistent_attention(*(p.to("meta") for p in x), is_causal=True).is_meta
    one = lambda q, k, v, p: persistent_attention(q[None], k[None], v[None], p[None], *x[4:], is_causal=True)[0]
    assert torch.allclose(torch.func.vmap(one)(*x[:4]), persistent_attention(*x, is_causal=True), atol=1e-13)


def test_flash_returns_the_log_normaliser():
    q, k, v, *_ = parts(t=9, s=9)
    y, lse = flash(q.detach(), k.detach(), v.detach(), is_causal=True)
    scores = (q @ k.mT/8**.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-13) and torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-13)


# -- the layer

@pytest.fixture
def layer():
    torch.manual_seed(0)
    return PersistentAttention(16, 2, 6).double()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 9, 16, dtype=torch.float64)


def test_without_its_vectors_the_layer_is_cores_attention(layer, x):
    plain = Attention(16, 2).double()
    plain.load_state_dict({k: v for k,v in layer.state_dict().items() if not k.startswith("memory")})
    with without_memory(layer) as silent: assert torch.allclose(silent(x)[0], plain(x)[0], atol=1e-13)
    assert not torch.allclose(layer(x)[0], plain(x)[0], atol=1e-3) # and its hooks are gone
    for a,b in zip(layer(x)[1].values(), plain(x)[1].values()): assert torch.equal(a, b)


def test_halves_make_the_whole(layer, x):
    h = halves(layer, x)
    y = layer.output(((1 - h.mass[...,None])*h.context + h.mass[...,None]*h.memory).transpose(1, 2).flatten(2))
    assert torch.allclose(y, layer(x)[0], atol=1e-13)
    assert torch.allclose(h.weights.sum(-1), h.mass, atol=1e-14) and torch.equal(memory_mass(layer, x), h.mass)
    assert torch.allclose(h.weights @ layer.memory()[1], h.mass[...,None]*h.memory, atol=1e-13)
    _, state = layer(x[:,:4])
    assert torch.allclose(memory_mass(layer, x[:,4:], state), h.mass[:,:,4:], atol=1e-13)


def test_mass_goes_from_nothing_to_everything(layer, x):
    q = layer.inputs(x)[0].probe.flatten(2)
    assert memory_mass(layer, x).min() > 0
    with torch.no_grad(): layer.query.weight.zero_() # all scores 0: an even share
    even = 6/(6 + torch.arange(1, 10).double())
    assert torch.allclose(memory_mass(layer, x), even.expand(3, 2, 9), atol=1e-14) and q.isfinite().all()


def test_the_vectors_have_no_position(x):
    "A head that meets only its vectors (the keys of the context are far below) answers alike everywhere."
    torch.manual_seed(0)
    layer = PersistentAttention(16, 2, 6).double()
    far = lambda p: layer.init_state(3) | dict(position=torch.full((3,), p))
    assert torch.allclose(layer(x, far(0))[0], layer(x, far(1000))[0], atol=1e-11) # only differences of positions count
    same = x[:,:1].expand(-1, 9, -1)
    assert torch.allclose(halves(layer, same).memory[:,:,1:], halves(layer, same).memory[:,:,:-1], atol=1e-13)


def test_reparametrisation_changes_the_parameters_only():
    torch.manual_seed(0); a = PersistentVectors(2, 50, 16)
    torch.manual_seed(0); b = PersistentVectors(2, 50, 16, reparametrised=False)
    for u,v in zip(a(), b()): assert torch.allclose(u, v, atol=1e-6) and abs(u.std() - 1) < .1
    assert torch.allclose(a.key*4, b.key, atol=1e-6) and torch.allclose(a.value*50**.5, b.value, atol=1e-6)


def test_parameters_are_those_of_an_mlp():
    block, twin = AllAttentionBlock(16, 2, 40), Block(Attention(16, 2), MLP(16, 40))
    assert size(block.mixer.memory) == size(MLP(16, 40)) and size(twin) - size(block) == 16 # a norm
    assert block.channel is None and size(AllAttention(11, 16, 3, 2, 20, d_ff=20)) == size(Transformer(11, 16, 3, 2, d_ff=40))


def test_half_precision_and_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer.float()(x.float())
        y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16 and relative(y, copy.deepcopy(layer).double()(x)[0]) < .05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.count_nonzero() for p in layer.parameters())


def test_a_model_learns():
    torch.manual_seed(0)
    model, tokens = AllAttention(7, 16, 2, 2, 12), torch.randint(7, (4, 1)).expand(4, 12) # a byte repeated
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    cost = lambda: F.cross_entropy(model(tokens)[0][:,:-1].flatten(0, 1), tokens[:,1:].flatten())
    before = cost().item()
    for _ in range(40):
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()
    assert cost().item() < before/4


# -- feed-forward layers

@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_softmax_ffn_is_attention_and_back(groups, x):
    torch.manual_seed(0)
    ffn = SoftmaxFFN(16, 24, groups).double()
    y = torch.cat([(x @ u.T).softmax(-1) for u in ffn.up.weight.chunk(groups)], -1) @ ffn.down.weight.T
    assert torch.allclose(ffn(x), y, atol=1e-14) and torch.allclose(ffn_as_attention(ffn)(x), y, atol=1e-13)
    back = attention_as_ffn(ffn_as_attention(ffn))
    assert back.n_groups == groups and torch.allclose(back.up.weight, ffn.up.weight, atol=1e-14) and torch.equal(back.down.weight, ffn.down.weight)


def test_the_memory_half_is_a_wide_ffn(layer, x):
    only = layer.output(halves(layer, x).memory.transpose(1, 2).flatten(2))
    ffn = attention_as_ffn(layer)
    assert ffn.up.weight.shape == (12, 16) and torch.allclose(ffn(x), only, atol=1e-13)
    alone = MemoryAttention(16, 4, 5).double()
    assert torch.allclose(attention_as_ffn(alone)(x), alone(x), atol=1e-13)
    assert attention_as_ffn(copy.deepcopy(layer).float()).up.weight.dtype == torch.float32


# -- looking inside

def test_watch_sees_every_persistent_layer_and_leaves_no_hook():
    torch.manual_seed(0)
    model, tokens = AllAttention(11, 16, 3, 2, 6).eval(), torch.randint(11, (2, 5))
    seen = watch(model, tokens, lambda m, x: (m, x))
    assert [m for m,_ in seen] == [b.mixer for b in model.blocks] and torch.equal(seen[0][1], model.blocks[0].norm1(model.embed(tokens)))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(TypeError): watch(model, tokens.float(), memory_mass)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert watch(Transformer(11, 16), tokens, memory_mass) == []


def test_top_places_and_what_a_vector_says():
    torch.manual_seed(0)
    model, weights = AllAttention(11, 16, 1, 2, 6), torch.rand(3, 2, 5, 6)
    places = top_places(weights, 4)
    assert places.shape == (12, 4)
    for h in range(2):
        for n in range(6): assert torch.equal(places[6*h + n], weights[:,h,:,n].flatten().topk(4).indices)
    mixer, said = model.blocks[0].mixer, says(model, model.blocks[0].mixer)
    value = torch.zeros(2, 8)
    value[1] = mixer.memory()[1][1,3]
    assert said.shape == (12, 11)
    assert torch.allclose(F.cosine_similarity(said[9], model.head(model.norm(mixer.output(value.flatten()))), 0), torch.tensor(1.), atol=1e-4)


# -- bad input

@pytest.mark.parametrize("make, message", [
    (lambda: PersistentAttention(16, 3), "n_heads: expected a divisor of d_model=16; got 3"),
    (lambda: PersistentAttention(16, 2, 0), "n_persistent: expected at least 1 vector a head .*; got 0"),
    (lambda: PersistentAttention(16, 2, 4, window=0), "window: expected at least 1"),
    (lambda: PersistentAttention(16, 2, 4, positions="sine"), "positions: expected one of"),
    (lambda: PersistentAttention(16, 2, 4)(torch.zeros(1, 2, 8)), r"x: expected width d_model=16; got shape \(1, 2, 8\)"),
    (lambda: SoftmaxFFN(16, 24, 5), "n_groups: expected a divisor of d_ff=24; got 5"),
    (lambda: MemoryAttention(16, 3), "n_heads: expected a divisor of d_model=16, or d_head given; got 3"),
    (lambda: top_places(torch.rand(2, 2, 3, 4), 7), "k: expected 1 to 6, the number of places; got 7"),
])
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("make, message", [
    (lambda: ffn_as_attention(MLP(16)), "ffn: expected a SoftmaxFFN, whose activation is a softmax; got MLP"),
    (lambda: attention_as_ffn(Attention(16, 2)), "layer: expected a PersistentAttention or MemoryAttention; got Attention"),
])
def test_bad_types_are_named(make, message):
    with pytest.raises(TypeError, match=message): make()


@pytest.mark.parametrize("f", [persistent_attention, joint_attention])
def test_mismatched_parts_are_named(f):
    q, k, v, p, mk, mv = parts()
    with pytest.raises(ValueError, match=r"memory_key: expected shape \(heads, n, width\) = \(3, n, 8\); got \(2, 5, 8\)"): f(q, k, v, p, mk[:2], mv)
    with pytest.raises(ValueError, match=r"memory_value: expected that of memory_key"): f(q, k, v, p, mk, mv[:,:4])
    with pytest.raises(ValueError, match="is_causal: .* 7 queries, 6 keys"): f(q, k[:,:,:6], v[:,:,:6], p, mk, mv, is_causal=True)
    with pytest.raises(ValueError, match=r"mask: expected Booleans of shape \(7, 7\)"): f(q, k, v, p, mk, mv, torch.ones(7, 6, dtype=torch.bool))
