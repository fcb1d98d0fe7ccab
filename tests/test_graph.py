"Attention along edges: every path of the program, its gradients, its peers, and what it says when the input is wrong."
import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from memnotes.attention import edges as E
from memnotes.attention.graph import (attention_of, band_graph, causal_graph, complete_graph, edge_attention, edges_for_mass, edges_to_mask,
                                      graph_layer, graph_of, heads_of, influence, mask_to_edges, message_passing, random_graph, receptive_field,
                                      relative_residual, renumber)
from memnotes.core.sequence import Attention, Block, SwiGLU, Transformer, causal_mask

seeded = lambda s=0: torch.Generator().manual_seed(s)
GRAPHS = {
    "complete": lambda n: complete_graph(n),
    "causal": lambda n: causal_graph(n),
    "band": lambda n: band_graph(n, 5),
    "random": lambda n: random_graph(n, 3, seeded()),
}
every_graph = pytest.mark.parametrize("name", GRAPHS)
STAR = torch.stack([torch.arange(70), torch.zeros(70, dtype=torch.long)])


def qkv(*shape, dtype=torch.float64, seed=1, dv=None):
    g = seeded(seed)
    return tuple(torch.randn(*shape[:-1], d, dtype=dtype, generator=g) for d in (shape[-1], shape[-1], dv or shape[-1]))


def sdpa(q, k, v, edges, **kw):
    return F.scaled_dot_product_attention(q, k, v, edges_to_mask(edges, q.shape[-2], k.shape[-2]), **kw)


def close(a, b, tol=1e-12):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tol*b.abs().max()


@pytest.fixture(params=["chosen", "single", "blocks", "dense"])
def path(request, monkeypatch):
    "Each way of computing, forced by its price."
    if request.param == "single": monkeypatch.setattr(E, "FETCH", -1) # a target of its own costs nothing
    if request.param == "blocks": monkeypatch.setattr(E, "BLOCK", 4), monkeypatch.setattr(E, "FETCH", 30)
    if request.param == "dense": monkeypatch.setattr(E, "FETCH", 10**9)
    return request.param


# -- equal to SDPA, to messages, to torch-geometric

@every_graph
@pytest.mark.parametrize("n", [1, 6, 67, 200])
def test_equals_sdpa_under_the_mask(name, n):
    if n < 3 and name == "random": return
    q, k, v = qkv(2, 3, n, 8, dv=5)
    e = GRAPHS[name](n)
    close(edge_attention(q, k, v, e), sdpa(q, k, v, e))
    close(edge_attention(q, k, v, e, scale=.3), sdpa(q, k, v, e, scale=.3))
    close(message_passing(q, k, v, e), sdpa(q, k, v, e))


def groups(e, size, t, s):
    "What `edge_attention` gathers: each target's own sources, or those of BLOCK targets."
    if size == 1: return E._neighbourhoods(*e, t)
    union, edge = torch.unique(e[1]//size*s + e[0], return_inverse=True)
    return E._blocks(union, edge, e[1], t, s, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 4, 64])
@every_graph
def test_every_block_size_is_the_same_function(name, size, monkeypatch):
    monkeypatch.setattr(E, "CACHE", 2000) # several pieces
    monkeypatch.setattr(E, "BLOCK", size)
    q, k, v = qkv(3, 67, 8)
    e = torch.cat([GRAPHS[name](67), STAR[:,:67]], 1)
    e = e[:,(e[1] < 20) | (e[1] > 29)] # some hear nothing
    close(E._gather_attend(q, k, v, groups(e, size, 67, 67), size, None), message_passing(q, k, v, e))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(t=st.integers(1, 40), s=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_mask_between_any_two_sets(t, s, share, seed):
    g = seeded(seed)
    mask = torch.rand(t, s, generator=g) < share
    q, k, v = torch.randn(2, t, 4, dtype=torch.float64, generator=g), *torch.randn(2, 2, s, 4, dtype=torch.float64, generator=g)
    e = mask_to_edges(mask)
    y = edge_attention(q, k, v, e)
    assert torch.allclose(y, message_passing(q, k, v, e), atol=1e-12) and torch.equal(edges_to_mask(e, t, s), mask)
    assert y[:,~mask.any(1)].count_nonzero() == 0


def test_an_edge_given_twice_weighs_twice(path):
    q, k, v = qkv(2, 70, 4)
    e = torch.cat([band_graph(70, 3)]*2 + [random_graph(70, 2, seeded())], 1)
    close(edge_attention(q, k, v, e), message_passing(q, k, v, e))


def test_order_and_kind_of_integers_do_not_matter(path):
    q, k, v = qkv(2, 70, 4)
    e = random_graph(70, 3, seeded())
    mixed = e[:,torch.randperm(e.shape[1], generator=seeded())].int()
    close(edge_attention(q, k, v, mixed), edge_attention(q, k, v, e))


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, .05), (torch.float16, .01)])
@every_graph
def test_keeps_dtype(name, dtype, tol):
    q, k, v = qkv(2, 130, 8)
    e = GRAPHS[name](130)
    y = edge_attention(q.to(dtype), k.to(dtype), v.to(dtype), e)
    assert y.dtype == dtype
    close(y.double(), edge_attention(q, k, v, e), tol)


@every_graph
def test_equals_torch_geometric(name):
    nn = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    conv, x, e = nn.TransformerConv(16, 8, heads=4, root_weight=False), torch.randn(150, 16), GRAPHS[name](150)
    heads = lambda y: y.view(150, 4, 8).transpose(0, 1)
    y = edge_attention(heads(conv.lin_query(x)), heads(conv.lin_key(x)), heads(conv.lin_value(x)), e)
    close(y.transpose(0, 1).flatten(1), conv(x, e), 1e-6)


# -- gradients

@every_graph
def test_gradcheck(name, path):
    q, k, v = (x.requires_grad_() for x in qkv(2, 9, 3))
    e = GRAPHS[name](9)[:,1:] # the first node loses an edge, on band and causal graphs its only one
    assert torch.autograd.gradcheck(lambda *x: edge_attention(*x, e), (q, k, v))


@every_graph
def test_gradients_equal_sdpa(name, path):
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 90, 4))
    e = GRAPHS[name](90)
    one, two = (torch.autograd.grad(f(q, k, v, e).pow(2).sum(), (q, k, v)) for f in (edge_attention, sdpa))
    for a,b in zip(one, two): close(a, b, 1e-10)


def test_a_node_without_edges_is_zero_and_has_no_nan_gradient(path):
    q, k, v = (x.requires_grad_() for x in qkv(2, 70, 4))
    e = random_graph(70, 3, seeded())
    e = e[:,e[1] != 7]
    y = edge_attention(q, k, v, e)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert y[:,7].count_nonzero() == 0 and all(g.isfinite().all() for g in grads) and grads[0][:,7].count_nonzero() == 0
    nothing = edge_attention(q, k, v, torch.empty(2, 0, dtype=torch.long))
    assert nothing.shape == q.shape and nothing.count_nonzero() == 0


def test_rows_of_the_batch_stay_apart(path):
    x = qkv(3, 2, 70, 4)[0].requires_grad_()
    e = random_graph(70, 3, seeded())
    g, = torch.autograd.grad(edge_attention(x, x, x, e)[1].sum(), x)
    assert g[0].count_nonzero() == g[2].count_nonzero() == 0 and g[1].count_nonzero() > 0
    close(edge_attention(x[1], x[1], x[1], e), edge_attention(x, x, x, e)[1])


def test_a_hub_does_not_make_the_others_pay():
    "Padded targets hold at most twice as many sources as there are."
    n = 4096
    e = torch.cat([torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.long)]), band_graph(n, 2)], 1)
    held = sum(sources.numel() for _,sources,_ in E._neighbourhoods(*e, n))
    assert held <= 2*e.shape[1]


# -- graphs

def test_graphs_are_their_masks():
    n = 12
    assert edges_to_mask(complete_graph(n), n).all()
    assert torch.equal(edges_to_mask(causal_graph(n), n), causal_mask(n, 0))
    for w in (1, 4, 12, 30): assert torch.equal(edges_to_mask(band_graph(n, w), n), causal_mask(n, 0, w))
    for e in (g(n) for g in GRAPHS.values()): assert torch.equal(mask_to_edges(edges_to_mask(e, n)), e) # sorted, none twice


def test_random_graph_draws_different_sources_evenly():
    e = random_graph(500, 4, seeded())
    mask = edges_to_mask(e, 500)
    assert (mask.sum(1) == 4).all() and torch.equal(e, random_graph(500, 4, seeded())) and edges_to_mask(random_graph(6, 6), 6).all()
    many = torch.stack([edges_to_mask(random_graph(5, 2, seeded(s)), 5) for s in range(400)]).double().mean(0)
    assert (many - .4).abs().max() < .1


def test_receptive_field_is_networkx_reach():
    e = random_graph(30, 1, seeded())
    for L in (0, 1, 3):
        G = nx.DiGraph(e.T.tolist())
        G.add_nodes_from(range(30))
        far = dict(nx.all_pairs_shortest_path_length(G, cutoff=L))
        assert torch.equal(receptive_field(e, 30, L), torch.tensor([[t in far[s] for s in range(30)] for t in range(30)]))


def test_influence_is_the_jacobian():
    torch.manual_seed(0)
    x, d = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    e = band_graph(6, 3)
    f = lambda x: edge_attention(x, x, x, e)
    J = torch.autograd.functional.jacobian(lambda x: (f(x[None])[0]*d).sum(-1), x).abs().amax(-1)
    close(influence(f, x, d), J)
    assert torch.equal(J == 0, ~receptive_field(e, 6, 1) | torch.eye(6, dtype=torch.bool)*(J == 0))


def test_renumbering_moves_the_output_along():
    q, k, v = qkv(2, 70, 4)
    order, e = torch.randperm(70, generator=seeded()), random_graph(70, 3, seeded())
    close(edge_attention(*(x[:,order] for x in (q, k, v)), renumber(e, order)), edge_attention(q, k, v, e)[:,order])


# -- layers

@pytest.mark.parametrize("make", [lambda: Attention(16, 4, 2), lambda: Attention(16, 2, positions="none", bias=True), lambda: Attention(16, 4, window=3, qk_norm=True)])
def test_a_block_is_a_graph_network(make):
    torch.manual_seed(0)
    block, x = Block(make(), SwiGLU(16), "rms").double().eval(), torch.randn(2, 9, 16, dtype=torch.float64)
    e = band_graph(9, block.mixer.window or 9)
    close(graph_layer(block, x, e), block(x)[0])
    order = torch.randperm(9)
    close(graph_layer(block, x[:,order], renumber(e, order), order), block(x)[0][:,order])
    A = attention_of(block.mixer, x)
    close(block.mixer.output((A@heads_of(block.mixer, x)[2]).transpose(1, 2).flatten(2)), block.mixer(x)[0])


def test_edges_for_mass_and_graph_of():
    A = torch.tensor([[1., 0, 0], [.5, .5, 0], [.05, .15, .8]])
    assert edges_for_mass(A).tolist() == [1, 2, 2] and edges_for_mass(A, 1.).tolist() == [1, 2, 3]
    G = graph_of(A, .1)
    assert isinstance(G, nx.DiGraph) and sorted(G.edges) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)] and G[1][2]["weight"] == pytest.approx(.15)
    assert graph_of(A, 0).number_of_edges() == 6 # weights of zero are no edges


def test_relative_residual():
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    R = (x - x.mean(-2, keepdim=True)).numpy()
    import numpy as np
    want = [np.sqrt(np.linalg.norm(r, 1)*np.linalg.norm(r, np.inf)/np.linalg.norm(y, 1)/np.linalg.norm(y, np.inf)) for r,y in zip(R, x.numpy())]
    close(relative_residual(x), torch.tensor(want))
    assert relative_residual(torch.ones(7, 3)) == 0


def test_windowed_model_reaches_its_receptive_field_and_no_further():
    torch.manual_seed(0)
    m = Transformer(11, 8, 3, 2, window=3).double()
    def f(x):
        for b in m.blocks: x = b(x)[0]
        return x
    felt = influence(f, torch.randn(12, 8, dtype=torch.float64), torch.randn(12, 8, dtype=torch.float64))
    assert torch.equal(felt > 0, receptive_field(band_graph(12, 3), 12, 3))


# -- bad input

x = torch.randn(2, 5, 4)
BAD = [
    (lambda: edge_attention(x, x, x, torch.tensor([[0, 5], [0, 1]])), ValueError, "edge_index: expected sources 0 to 4; got 0 to 5"),
    (lambda: edge_attention(x, x, x, torch.tensor([[0, 1], [-1, 1]])), ValueError, "edge_index: expected targets 0 to 4; got -1 to 1"),
    (lambda: edge_attention(x, x, x, torch.tensor([[0., 1]]*2)), TypeError, "edge_index: expected an int64 or int32 tensor .* got torch.float32"),
    (lambda: edge_attention(x, x, x, [[0], [0]]), TypeError, "edge_index: .* got list"),
    (lambda: edge_attention(x, x, x, torch.zeros(5, 3, dtype=torch.long)), ValueError, r"edge_index: expected shape \(2, edges\).* got \(5, 3\); transpose"),
    (lambda: edge_attention(x, x[:1], x, causal_graph(5)), ValueError, r"query, key, value: expected .* got \(2, 5, 4\), \(1, 5, 4\)"),
    (lambda: edge_attention(x, x[...,:3], x, causal_graph(5)), ValueError, "query, key, value"),
    (lambda: edge_attention(x, x, x[:,:4], causal_graph(4)), ValueError, "query, key, value"),
    (lambda: edge_attention(x[:,:0], x, x, causal_graph(5)), ValueError, "query, key: expected at least one"),
    (lambda: complete_graph(0), ValueError, "n: expected an integer from 1"),
    (lambda: causal_graph(2.5), ValueError, "n: expected an integer from 1 .* got 2.5"),
    (lambda: band_graph(5, 0), ValueError, "width: expected an integer from 1"),
    (lambda: random_graph(5, 6), ValueError, "degree: expected an integer from 1 to 5; got 6"),
    (lambda: mask_to_edges(torch.ones(3, 3)), TypeError, "mask: expected a Boolean matrix"),
    (lambda: mask_to_edges(torch.ones(3, dtype=torch.bool)), TypeError, "mask: expected a Boolean matrix"),
    (lambda: edges_to_mask(causal_graph(5), 4), ValueError, "expected sources 0 to 3"),
    (lambda: receptive_field(causal_graph(5), 5, -1), ValueError, "n_layers: expected an integer of at least 0; got -1"),
    (lambda: edges_for_mass(torch.ones(2, 2)/2, 0), ValueError, "mass: expected a share"),
    (lambda: graph_of(torch.ones(1, 2, 2)), ValueError, "attention: expected one head's matrix"),
    (lambda: graph_of(torch.eye(2), 2), ValueError, "threshold: expected a weight from 0 to 1"),
    (lambda: renumber(causal_graph(5), torch.arange(4)), ValueError, "expected sources 0 to 3"),
]

@pytest.mark.parametrize("call,kind,words", BAD, ids=[w[:30] for *_,w in BAD])
def test_says_what_is_wrong(call, kind, words):
    with pytest.raises(kind, match=words): call()
