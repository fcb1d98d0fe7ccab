"Indexes against exhaustive search, faults, and the parts that stand alone: product keys, filters, summaries."
import importlib.util, math, subprocess, sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from memnotes.memory.index import INDEXES, SUMMARIES, Bloom, Cluster, Faiss, MemoryBank, Milvus, ProductKeyMemory, false_positives, lost, neighbours, product_top, products, ranks

has = lambda *names: all(importlib.util.find_spec(n) for n in names)
needs_faiss = pytest.mark.skipif(not has("faiss"), reason="faiss-cpu is optional")
needs_milvus = pytest.mark.skipif(not has("pymilvus", "milvus_lite"), reason="pymilvus and milvus-lite are optional")
ALL = [pytest.param(partial(Cluster, cell=8, probes=10**6), id="cluster"), pytest.param(partial(Faiss, probes=10**6, least=40), id="faiss", marks=needs_faiss), pytest.param(Milvus, id="milvus", marks=needs_milvus)]
every_index = pytest.mark.parametrize("index", ALL)


def unit(*shape, seed=0): return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def lived(index, evict="fifo", rounds=7, **kwargs):
    bank = MemoryBank(6, 2, 100, batch=2, index=index, evict=evict, **kwargs)
    for i in range(rounds):
        x = unit(2, 30, 6, seed=i).to(bank.dtype)
        bank.write(x, x[:,:,:2])
        bank.delete(torch.randint(max(0, 30*i-50), 30*i+30, (2, 9), generator=torch.Generator().manual_seed(i)))
        if i == 4: bank.clear(torch.tensor([1]))
    return bank


# -- every index behind a bank

@pytest.mark.parametrize("index", ["exact", *ALL])
def test_no_query_finds_nothing(index):
    for bank in (MemoryBank(6, 2, 100, batch=2, index=index), lived(index)):
        r = bank.read(torch.zeros(2, 0, 6), 3)
        assert r.values.shape == (2, 0, 3, 2) and r.scores.shape == r.ids.shape == r.valid.shape == (2, 0, 3)



@every_index
@pytest.mark.parametrize("evict, dtype", [("fifo", torch.float32), ("lru", torch.float32), ("fifo", torch.float64)])
def test_answers_as_an_exhaustive_search_does(index, evict, dtype):
    got, want, q = lived(index, evict, dtype=dtype), lived("exact", evict, dtype=dtype), unit(2, 20, 6, seed=99).to(dtype)
    for bank in (got, got.fork()):
        r, e = bank.read(q, 12), want.read_only().read(q, 12)
        assert torch.equal(r.ids, e.ids) and torch.allclose(r.scores, e.scores) and torch.equal(r.values, e.values)
    oldest = torch.full((2, 20), 170)
    assert torch.equal(got.read_only().read(q, 12, oldest).ids, want.read_only().read(q, 12, oldest).ids)


@every_index
def test_an_empty_bank_and_a_cleared_one_answer_nothing(index):
    bank, q = MemoryBank(6, 2, 100, batch=2, index=index), unit(2, 3, 6)
    assert not bank.read(q, 4).valid.any()
    bank = lived(index)
    bank.clear()
    assert not bank.read(q, 4).valid.any()
    bank.write(q, q[:,:,:2])
    assert torch.equal(bank.read(q, 1).values[:,:,0], q[:,:,:2])


@every_index
def test_duplicates_are_found_once(index):
    bank = MemoryBank(6, 2, 100, batch=2, index=index, duplicates="last_write")
    x = unit(2, 30, 6)
    for i in range(5): bank.write(x, torch.full((2, 30, 2), float(i)))
    r = bank.read(x, 2)
    assert (r.values[:,:,0] == 4).all() and (r.ids[:,:,0] != r.ids[:,:,1]).all()


@every_index
def test_bad_inputs_change_nothing(index):
    bank = lived(index)
    q, k = unit(2, 5, 6, seed=50), unit(2, 3, 6)
    before = bank.read_only().read(q, 5).ids
    spoiled = k.clone()
    spoiled[0,1,2] = math.nan
    for call, message in ((lambda: bank.write(spoiled, k[:,:,:2]), "keys: expected finite"), (lambda: bank.write(k[:,:,:5], k[:,:,:2]), "keys: expected shape"),
                          (lambda: bank.read(spoiled, 2), "queries: expected finite"), (lambda: bank.read(q[:,:,:3], 2), "queries: expected shape"), (lambda: bank.read(q, 101), "k: expected at most capacity=100")):
        with pytest.raises(ValueError, match=message): call()
    assert torch.equal(bank.read_only().read(q, 5).ids, before)
    few = MemoryBank(6, 2, 100, index=index)
    few.write(k[:1], k[:1,:,:2])
    assert few.read(k[:1], 50).valid.sum(-1).eq(3).all() # k beyond what is there


@pytest.mark.parametrize("name", ["cluster", pytest.param("faiss", marks=needs_faiss), pytest.param("faiss_pq", marks=needs_faiss), pytest.param("milvus", marks=needs_milvus)])
def test_named_indexes_survive_a_file(name, tmp_path):
    bank, q = lived(name), unit(2, 9, 6, seed=3)
    bank.save(tmp_path/"bank")
    back = MemoryBank.load(tmp_path/"bank", index=name)
    assert torch.equal(back.read_only().read(q, 7).ids, bank.read_only().read(q, 7).ids)
    x = unit(2, 150, 6, seed=8)
    back.write(x, x[:,:,:2]) # the file is private to the loaded bank
    assert back.stats()["live"] == [100, 100] and torch.equal(MemoryBank.load(tmp_path/"bank").read(q, 7).ids, bank.read_only().read(q, 7).ids)


@pytest.mark.parametrize("module, name, extra", [("faiss", "faiss", ""), ("pymilvus", "milvus", "")])
def test_a_missing_package_is_named(module, name, extra):
    code = f"""
import sys; sys.modules["{module}"] = None
from memnotes.memory.index import MemoryBank
try: MemoryBank(4, 4, 9, index="{name}")
except ImportError as e: print(e)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"needs {module}" in said and "pip install -r requirements-index.txt" in said


# -- cells

def test_cells_recall_what_was_planted_and_stay_bounded():
    bank, seen = MemoryBank(16, 2, 5000, index=partial(Cluster, cell=64, probes=16)), []
    for i in range(24):
        x = unit(1, 1000, 16, seed=i)
        bank.write(x, x[:,:,:2])
        seen.append(bank.index.live.shape[1])
    assert bank.read(x, 1).ids[0,:,0].eq(torch.arange(23_000, 24_000)).double().mean() > .95
    assert seen[-1] <= 4*5000//64 and int(bank.index.live.sum()) == 5000


def test_cells_of_equal_keys_split_too():
    bank = MemoryBank(4, 1, 100, batch=2, index=partial(Cluster, cell=4, probes=3))
    bank.write(torch.ones(2, 100, 4), torch.arange(100.).expand(2, 100)[...,None])
    assert bank.index.live.sum(-1).tolist() == [100, 100] and bank.read(torch.ones(2, 1, 4), 3).valid.all()
    zeros = MemoryBank(4, 1, 50, index=partial(Cluster, cell=4, probes=99))
    zeros.write(torch.zeros(1, 50, 4), torch.zeros(1, 50, 1))
    assert zeros.read(torch.ones(1, 1, 4), 50).valid.sum() == 50


def test_cells_copy_the_bank_exactly():
    index = lived(partial(Cluster, cell=8)).index
    alive = index.ids >= 0
    for r in range(2):
        at, ok = index.bank.locate(index.ids[r][alive[r]].expand(2, -1))
        assert ok[r].all() and torch.equal(index.places[r][alive[r]], at[r]) and torch.equal(index.keys[r][alive[r]], index.bank.keys[r,at[r]])
        assert torch.equal(index.slots[r,at[r]], alive[r].flatten().nonzero()[:,0])
    assert torch.equal(alive.sum(-1), index.live) and (index.fill >= index.live).all()


@pytest.mark.parametrize("kwargs, message", [(dict(cell=1), "cell: expected an integer of at least 2; got 1"), (dict(probes=0), "probes: expected an integer of at least 1; got 0"), (dict(cell=2.5), "cell: ")])
def test_cells_that_cannot_be(kwargs, message):
    with pytest.raises(ValueError, match=message): MemoryBank(4, 4, 9, index=partial(Cluster, **kwargs))


@needs_faiss
def test_faiss_learns_late_relearns_and_reranks():
    bank = MemoryBank(16, 2, 4000, index=partial(Faiss, probes=8, least=500))
    x = unit(1, 6000, 16)
    for part in x.split(250, 1): bank.write(part, part[:,:,:2])
    assert bank.index.learned >= 500 and bank.read(x[:,-1000:], 1).ids[0,:,0].eq(torch.arange(5000, 6000)).double().mean() > .95
    rough, fine = (MemoryBank(16, 2, 4000, index=partial(Faiss, quantised=True, more=m, probes=99, least=500)) for m in (1, 8))
    hit = []
    for b in (rough, fine):
        b.write(x[:,:4000], x[:,:4000,:2])
        hit.append(b.read(F.normalize(x[:,:500] + .3*unit(1, 500, 16, seed=1), dim=-1), 1).ids[0,:,0].eq(torch.arange(500)).double().mean())
    assert hit[1] > hit[0] and hit[1] > .9


@needs_milvus
def test_milvus_wants_two_numbers():
    with pytest.raises(ValueError, match="d_key: Milvus needs vectors of at least 2"): MemoryBank(1, 1, 9, index=Milvus)


def test_unknown_index_names_those_there_are():
    with pytest.raises(ValueError, match="index: expected one of 'exact', 'cluster'.*got 'hnsw'"): MemoryBank(4, 4, 9, index="hnsw")
    assert {"exact", "cluster", "faiss", "faiss_pq", "milvus"} <= set(INDEXES)


# -- product keys

@pytest.mark.parametrize("n, m, k", [(5, 7, 1), (5, 7, 35), (40, 30, 50)])
def test_product_keys_are_brute_force(n, m, k):
    g = torch.Generator().manual_seed(0)
    a, b, u, v = (torch.randn(i, 6, generator=g).double() for i in (n, m, 20, 20))
    scores, ids = product_top(u, v, a, b, k)
    whole = ((u @ a.T)[:,:,None] + (v @ b.T)[:,None]).flatten(1).sort(descending=True)
    assert torch.equal(ids, whole.indices[:,:k]) and torch.allclose(scores, whole.values[:,:k])


def test_product_key_memory_gradcheck_and_any_shape():
    torch.manual_seed(0)
    f = ProductKeyMemory(4, n=5, heads=2, k=3, d_key=3).double()
    names = dict(f.named_parameters())
    x = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *ps: torch.func.functional_call(f, dict(zip(names, ps)), (x,)), (x, *(p.detach().clone().requires_grad_() for p in names.values())))
    assert torch.allclose(f(x)[0,1], f(x[0,1]), atol=1e-12) and f.to(torch.float32)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("call, message", [
    (lambda: ProductKeyMemory(4, n=2, k=5), "k: expected at most n²=4; got 5"), (lambda: ProductKeyMemory(4, heads=0), "heads: expected an integer"),
    (lambda: ProductKeyMemory(4)(torch.ones(2, 5)), "x: expected width d_model=4; got 5"), (lambda: product_top(*[torch.ones(2, 3)]*4, 5), "k: expected 1 to 4"),
    (lambda: product_top(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4), 2), "b: expected .n, 3."),
    (lambda: Bloom(0, 1), "bits: expected"), (lambda: Bloom(9, 0), "hashes: expected"), (lambda: ranks(torch.ones(1, 2), torch.ones(1, 2, 2), torch.zeros(1, dtype=torch.long), "sum"), "kind: expected one of"),
    (lambda: lost(torch.ones(2, 3), torch.ones(2, 2), torch.ones(2)), "found: expected"),
])
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()


# -- filters and summaries

@pytest.mark.parametrize("bits", [1, 7, 64, 1000])
def test_filter_denies_nothing_it_holds(bits):
    bloom, keys = Bloom(bits, 3, 4), torch.randint(-(1<<62), 1<<62, (200,), generator=torch.Generator().manual_seed(0))
    home = torch.arange(200) % 4
    for part, h in zip(keys.split(50), home.split(50)): bloom.add(part, h)
    assert bloom.route(keys).gather(1, home[:,None]).all() and bloom.route(keys).shape == (200, 4)
    with pytest.raises(TypeError, match="keys: expected int64"): bloom.add(keys.float())


def test_filter_follows_the_formula():
    bloom = Bloom(160_000, 5)
    bloom.add(torch.arange(20_000))
    assert bloom.route(torch.arange(20_000, 1_020_000)).double().mean().item() == pytest.approx(false_positives(160_000, 5, 20_000), rel=.05)
    assert false_positives(8, 1, 0) == 0 and false_positives(1, 1, 1e9) == 1


def test_summaries_rank_the_right_segment():
    keys = torch.eye(8).view(4, 2, 8)
    for kind in SUMMARIES: assert ranks(keys[:,1], keys, torch.arange(4), kind).tolist() == [0]*4
    assert ranks(keys[:,1], keys, torch.tensor([1, 0, 0, 0]), "mean").tolist() == [2, 2, 2, 2]


def test_measures():
    e = torch.tensor([[1, 2], [3, -1]])
    assert neighbours(e, torch.tensor([[2, 9], [3, 8]])) == 2/3 and lost(e, torch.tensor([[2, 1], [3, -1]]), torch.tensor([1, 3])) == .5
    bank = MemoryBank(4, 1, 50, index=partial(Cluster, cell=8, probes=99))
    bank.write(unit(1, 50, 4), torch.zeros(1, 50, 1))
    assert products(bank.index, unit(1, 3, 4)) == 50 + int((bank.index.live > 0).sum())
