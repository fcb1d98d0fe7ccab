"The bank against a dictionary, against faults, and inside models: any split, no gradient, checkpoints, detachable."
import copy, importlib.util, math, os, resource, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memnotes.core.learner import Schedule, evaluate, fit, quiet
from memnotes.core.sequence import Transformer, detach, is_store, leaves, nbytes, select
from memnotes.core.tasks import AssociativeRecall, Brackets
from memnotes.memory.attach import attach
from memnotes.memory.bank import GATES, KEYINGS, BankAttention, BankLearner, BankTransformer, MemoryBank, Remembered
from memnotes.memory.index import INDEXES, Cluster, Faiss
from memnotes.memory.store import hash_rows, mapped, top

LONG = os.environ.get("LONG") == "1"
D, V = 3, 2


# -- the bank against a plain dictionary

class Model:
    "One row: id -> dict(key, value, tag, hits, used, n), with the bank's rules in plain Python."
    def __init__(self, capacity, evict, duplicates): self.capacity, self.evict, self.duplicates, self.live = capacity, evict, duplicates, {}

    def write(self, i, key, value, tag, clock, written):
        n = 1
        if self.duplicates != "all":
            for old in [j for j,e in self.live.items() if e["key"] == key]:
                e = self.live.pop(old)
                if self.duplicates == "mean": value, n = [(a*e["n"] + b)/(e["n"]+1) for a,b in zip(e["value"], value)], e["n"] + 1
        self.live[i] = dict(key=key, value=value, tag=tag, hits=0, used=clock, n=n)

    def forget_fifo(self, written): self.live = {i:e for i,e in self.live.items() if i >= written - self.capacity}

    def forget(self, new):
        "The least worth keeping of the old ones, until all fit."
        by = {"lru": "used", "least_used": "hits"}[self.evict]
        while len(self.live) > self.capacity:
            old = [i for i in self.live if i not in new] or sorted(self.live)
            self.live.pop(min(old, key=lambda i: (self.live[i][by], i)))


number = st.integers(-3, 3)
INDEXES["cells of 4"] = partial(Cluster, cell=4, probes=10**6)
INDEXES["faiss from 8"] = partial(Faiss, probes=10**6, least=8)

class BankMachine(RuleBasedStateMachine):
    index = "exact"
    @initialize(capacity=st.integers(1, 9) | st.integers(10, 40), batch=st.integers(1, 3), evict=st.sampled_from(["fifo", "lru", "least_used"]),
                duplicates=st.sampled_from(["all", "last_write", "mean"]), ram=st.sampled_from([0, 1<<30]))
    def begin(self, capacity, batch, evict, duplicates, ram):
        self.bank = MemoryBank(D, V, capacity, batch, torch.float64, evict=evict, duplicates=duplicates, ram=ram, index=self.index)
        self.rows = [Model(capacity, evict, duplicates) for _ in range(batch)]
        self.written = self.clock = 0

    @rule(data=st.data(), n=st.integers(0, 6))
    def write(self, data, n): self.written_down(data, n)

    @rule(data=st.data(), n=st.integers(7, 30))
    def write_much(self, data, n): self.written_down(data, n, repeat=3)

    def written_down(self, data, n, repeat=1):
        bank, n = self.bank, n//repeat*repeat
        few = n//repeat
        draw = lambda d: [[[float(data.draw(number)) for _ in range(d)] for _ in range(few)]*repeat for _ in self.rows] # much is the same again
        keys, values, tags = draw(D), draw(V), [[data.draw(number) for _ in range(few)]*repeat for _ in self.rows]
        for i in range(0, n, bank.capacity): # a write longer than the bank goes piece by piece, as documented
            part = range(i, min(i+bank.capacity, n))
            for row,ks,vs,ts in zip(self.rows, keys, values, tags):
                for j in part: row.write(self.written+j, ks[j], vs[j], ts[j], self.clock, None)
                if bank.evict == "fifo": row.forget_fifo(self.written + part[-1] + 1)
                else: row.forget({self.written+j for j in part})
        shape = lambda x, d: torch.tensor(x, dtype=torch.float64).view(len(self.rows), n, d)
        ids = bank.write(shape(keys, D), shape(values, V), torch.tensor(tags, dtype=torch.long).view(len(self.rows), n))
        assert ids.tolist() == [list(range(self.written, self.written+n))]*len(self.rows)
        self.written += n

    @rule(data=st.data(), k=st.integers(1, 9), view=st.booleans())
    def read(self, data, k, view):
        k = min(k, self.bank.capacity)
        q = [[float(data.draw(number)) for _ in range(D)] for _ in self.rows]
        r = (self.bank.read_only() if view else self.bank).read(torch.tensor(q, dtype=torch.float64)[:,None], k)
        self.clock += not view
        for b,row in enumerate(self.rows):
            score = {i: sum(x*y for x,y in zip(q[b], e["key"])) for i,e in row.live.items()}
            ids = [i for i in r.ids[b,0].tolist() if i >= 0]
            assert len(ids) == len(set(ids)) == min(k, len(row.live)) and r.valid[b,0].sum() == len(ids)
            assert sorted((score[i] for i in ids), reverse=True) == pytest.approx(sorted(score.values(), reverse=True)[:k])
            for j,i in enumerate(ids):
                assert r.values[b,0,j].tolist() == pytest.approx(row.live[i]["value"]) and r.scores[b,0,j].item() == pytest.approx(score[i])
                if not view: row.live[i]["hits"], row.live[i]["used"] = row.live[i]["hits"]+1, self.clock
            assert not r.values[b,0][~r.valid[b,0]].count_nonzero() and (r.ids[b,0][~r.valid[b,0]] == -1).all()

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def delete(self, data):
        ids = [[data.draw(st.integers(-1, self.written + 2)) for _ in range(2)] for _ in self.rows]
        died = self.bank.delete(torch.tensor(ids))
        for row,n,i in zip(self.rows, died.tolist(), ids):
            before = len(row.live)
            for j in i: row.live.pop(j, None)
            assert n == before - len(row.live)

    @rule(data=st.data())
    def clear(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.rows)-1), max_size=3))
        self.bank.clear(torch.tensor(rows, dtype=torch.long))
        for i in rows: self.rows[i].live = {}

    @rule()
    def on_disk(self):
        path = Path(os.environ.get("PYTEST_TMP", "/tmp"))/f"bank-{os.getpid()}.safetensors"
        self.bank.save(path)
        self.bank = MemoryBank.load(path)
        path.unlink()

    @rule()
    def fork(self):
        old, self.bank = self.bank, self.bank.fork()
        old.clear()

    @invariant()
    def every_number_ever_given_is_itself_or_dead(self):
        if not hasattr(self, "bank"): return
        live = self.bank.stats()["live"]
        assert live == [len(row.live) for row in self.rows]
        for i in range(max(0, self.written-25), self.written+1):
            seen = self.bank.inspect(i)
            for b,row in enumerate(self.rows):
                assert bool(seen["alive"][b]) == (i in row.live)
                if e := row.live.get(i):
                    assert seen["key"][b].tolist() == e["key"] and seen["value"][b].tolist() == pytest.approx(e["value"])
                    assert (int(seen["tag"][b]), int(seen["hits"][b]), int(seen["used"][b]), int(seen["merged"][b])) == (e["tag"], e["hits"], e["used"], e["n"])
                else: assert not seen["key"][b].count_nonzero() and not seen["value"][b].count_nonzero()


class CellsMachine(BankMachine): index = "cells of 4"
class FaissMachine(BankMachine): index = "faiss from 8"
class MilvusMachine(BankMachine): index = "milvus"


def driven(machine, long, short, steps, *needs):
    "Its test: `long` histories of `steps` steps, or `short` ones; left out where an optional engine is missing."
    case = machine.TestCase
    case.settings = settings(max_examples=long if LONG else short, stateful_step_count=steps if LONG else 12, deadline=None, derandomize=not LONG, suppress_health_check=list(HealthCheck))
    return pytest.mark.skipif(not all(importlib.util.find_spec(n) for n in needs), reason="an optional engine")(case)


TestBank = driven(BankMachine, 110, 20, 40)
TestCells = driven(CellsMachine, 100, 15, 40)
TestFaiss = driven(FaissMachine, 40, 6, 40, "faiss")
TestMilvus = driven(MilvusMachine, 10, 2, 30, "pymilvus", "milvus_lite")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_whole_numbers_have_hashes_of_their_own(dtype):
    keys = torch.cartesian_prod(*[torch.arange(-3, 4)]*3).to(dtype)[None]
    assert hash_rows(keys).unique().numel() == 343


# -- faults

def unit(*shape, seed=0): return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(n=100, **kwargs):
    bank = MemoryBank(8, 4, 50, batch=2, **kwargs)
    bank.write(unit(2, n, 8), unit(2, n, 4, seed=1))
    return bank


@pytest.mark.parametrize("change, error, message", [
    (dict(capacity=0), ValueError, "capacity: expected an integer of at least 1; got 0"),
    (dict(d_key=0), ValueError, "d_key: expected an integer of at least 1"),
    (dict(batch=1.5), ValueError, "batch: expected an integer"),
    (dict(index="hnsw"), ValueError, "index: expected one of 'exact'.*got 'hnsw'"),
    (dict(evict="random"), ValueError, "evict: expected one of 'fifo', 'lru', 'least_used'"),
    (dict(duplicates="first"), ValueError, "duplicates: expected one of 'all', 'last_write', 'mean'"),
    (dict(dtype=torch.int64), TypeError, "dtype: expected a floating point"),
])
def test_a_bank_that_cannot_be(change, error, message):
    with pytest.raises(error, match=message): MemoryBank(**dict(d_key=8, d_value=4, capacity=5) | change)


def test_bad_writes_and_reads_change_nothing():
    bank = filled()
    before, k, v = bank.fork(), unit(2, 3, 8), unit(2, 3, 4)
    spoiled = k.clone()
    spoiled[1,2,3] = math.nan
    for call, error, message in [
        (lambda: bank.write(spoiled, v), ValueError, "keys: expected finite numbers"),
        (lambda: bank.write(k, v*math.inf), ValueError, "values: expected finite numbers"),
        (lambda: bank.write(k[:,:,:7], v), ValueError, r"keys: expected shape \(2, n, 8\)"),
        (lambda: bank.write(k[:1], v[:1]), ValueError, "keys: expected shape"),
        (lambda: bank.write(k, v[:,:2]), ValueError, "values: expected 3 of them, one a key; got 2"),
        (lambda: bank.write(k.long(), v), TypeError, "keys: expected a floating point tensor; got torch.int64"),
        (lambda: bank.write(k, v, torch.ones(2, 3)), ValueError, "tags: expected int64"),
        (lambda: bank.read(k, 51), ValueError, "k: expected at most capacity=50; got 51"),
        (lambda: bank.read(k, 0), ValueError, "k: expected an integer of at least 1"),
        (lambda: bank.read(spoiled, 2), ValueError, "queries: expected finite"),
        (lambda: bank.read_only().write(k, v), RuntimeError, "read-only view"),
        (lambda: bank.read_only().clear(), RuntimeError, "read-only view"),
        (lambda: bank.read_only().delete(torch.zeros(2, 1, dtype=torch.long)), RuntimeError, "read-only view"),
    ]:
        with pytest.raises(error, match=message): call()
    assert bank.written == before.written and all(torch.equal(getattr(bank, n), getattr(before, n)) for n in ("keys", "values", "ids", "hits"))


def test_k_beyond_what_is_there_is_marked():
    bank = MemoryBank(8, 4, 50, batch=2)
    assert not bank.read(unit(2, 3, 8), 5).valid.any()
    bank.write(unit(2, 2, 8), unit(2, 2, 4))
    r = bank.read(unit(2, 3, 8), 5)
    assert r.valid.sum(-1).eq(2).all() and (r.scores[~r.valid] == -math.inf).all()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 700), k=st.integers(1, 40), values=st.sampled_from([3, 10**6]), seed=st.integers(0, 99))
def test_top_is_topk(n, k, values, seed):
    "Also among ties, and where most is -inf."
    s = torch.randint(values, (2, 3, n), generator=torch.Generator().manual_seed(seed)).float()
    s[s < values//3] = -math.inf
    best, at = top(s, k)
    assert torch.equal(best, s.topk(min(k, n), -1).values) and torch.equal(s.gather(-1, at), best)
    assert all(len(row.unique()) == len(row) for row in at.flatten(0, 1))


def test_full_disk_while_growing_loses_nothing(tmp_path):
    bank = MemoryBank(64, 64, 100_000, ram=0, folder=tmp_path)
    first = unit(1, 60, 64)
    bank.write(first, first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1<<20, hard))
    try:
        with pytest.raises(OSError, match="folder: no room for .* the bank is as it was"): bank.write(*[unit(1, 20_000, 64, seed=1)]*2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert bank.written == 60 and torch.equal(bank.read(first, 1).values[:,:,0], first) and not list(tmp_path.iterdir())
    bank.write(*[unit(1, 20_000, 64, seed=1)]*2)
    assert bank.stats()["live"] == [20_060] and bank.stats()["mapped"] and not list(tmp_path.iterdir())


def test_mapped_tensor_leaves_no_file(tmp_path):
    x = mapped((3, 5), torch.bfloat16, tmp_path)
    x.fill_(2)
    assert x.sum() == 30 and x.is_shared() and not list(tmp_path.iterdir())


def test_truncated_foreign_and_unexpected_files(tmp_path):
    good = tmp_path/"bank.safetensors"
    filled().save(good)
    bad = tmp_path/"bad.safetensors"
    with pytest.raises(FileNotFoundError, match="no bank at"): MemoryBank.load(bad)
    for content in (good.read_bytes()[:-100], good.read_bytes()[:20], b"", b"PK\3\4 something else"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="no whole bank"): MemoryBank.load(bad)
    from safetensors.torch import save_file
    save_file(dict(keys=torch.ones(2)), bad)
    with pytest.raises(ValueError, match="something else"): MemoryBank.load(bad)
    with pytest.raises(ValueError, match=r"has d_key=8 \(expected 16\)"): MemoryBank.load(good, d_key=16)
    with pytest.raises(ValueError, match="has dtype=torch.float32 .expected torch.float64"): MemoryBank.load(good, dtype=torch.float64)
    assert MemoryBank.load(good, d_key=8, dtype=torch.float32).stats()["live"] == [50, 50]


def test_loaded_bank_is_mapped_and_private(tmp_path):
    bank = filled()
    bank.save(tmp_path/"a")
    raw, back = (tmp_path/"a").read_bytes(), MemoryBank.load(tmp_path/"a")
    back.write(unit(2, 60, 8, seed=5), unit(2, 60, 4))
    back.keys.zero_()
    assert (tmp_path/"a").read_bytes() == raw and back.written == 160


def test_kill_during_save_leaves_the_old_file(tmp_path):
    code = f"""
import torch
from memnotes.memory.store import MemoryBank
bank = MemoryBank(64, 64, 40_000)
bank.write(torch.ones(1, 40_000, 64), torch.ones(1, 40_000, 64))
bank.save(r"{tmp_path}/bank"); print("saved", flush=True)
while True: bank.save(r"{tmp_path}/bank")
"""
    for wait in (.02, .1):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "saved\n"
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert MemoryBank.load(tmp_path/"bank").stats()["live"] == [40_000]


def test_save_to_a_full_disk_keeps_the_old_file(tmp_path):
    filled().save(tmp_path/"bank")
    large = MemoryBank(64, 64, 50_000)
    large.write(*[torch.ones(1, 50_000, 64)]*2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1<<20, hard))
    try:
        with pytest.raises(OSError): large.save(tmp_path/"bank")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert MemoryBank.load(tmp_path/"bank").stats()["live"] == [50, 50] and [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_rows_and_views():
    bank = filled()
    r = select(bank, torch.tensor([1, 1, 0]))
    q = unit(2, 4, 8, seed=3)
    assert torch.equal(r.read(q[[1, 1, 0]], 3).ids, bank.read(q, 3).ids[[1, 1, 0]])
    assert is_store(bank) and detach(bank) is bank and nbytes(bank) == bank.nbytes() > 0
    hits = bank.hits.clone()
    bank.read_only().read(q, 3)
    assert torch.equal(bank.hits, hits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_in_its_own_precision_and_answers_in_the_queries(dtype):
    bank = MemoryBank(8, 4, 20, dtype=dtype)
    bank.write(unit(1, 9, 8), unit(1, 9, 4))
    r = bank.read(unit(1, 3, 8).requires_grad_(), 2)
    assert bank.keys.dtype == dtype and r.values.dtype == r.scores.dtype == torch.float32 and r.scores.requires_grad and not r.values.requires_grad


def test_another_index_plugs_in():
    "The protocol: an index sees every write, every death, and answers by numbers; a stale answer is marked dead."
    class Stale:
        def __init__(self, bank): self.bank, self.seen = bank, []
        def add(self, ids, keys): self.seen += ids[0].tolist()
        def delete(self, ids): pass
        def save(self): return {}
        def load(self, tensors): pass
        def search(self, queries, k, oldest=None):
            ids = torch.tensor(self.seen[:k]).expand(*queries.shape[:2], k)
            return queries.new_zeros(ids.shape), ids
    bank = MemoryBank(8, 4, 5, index=Stale)
    bank.write(unit(1, 8, 8), unit(1, 8, 4))
    r = bank.read(unit(1, 1, 8), 5)
    assert r.valid[0,0].tolist() == [False, False, False, True, True] and r.ids[0,0].tolist() == [-1, -1, -1, 3, 4]


# -- inside models

VOCAB = 11
def model(seed=0, **kwargs):
    torch.manual_seed(seed)
    return BankTransformer(VOCAB, 8, 2, 2, window=3, **dict(k=4) | kwargs).double().eval()


def text(b=3, t=24, seed=1): return torch.randint(VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def pieces(m, tokens, sizes, state=None):
    out = []
    for piece in tokens.split(list(sizes), 1):
        y, state = m(piece, state)
        out.append(y)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("keying", KEYINGS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("capacity", [0, 5, 100])
def test_any_split_is_one_pass(keying, gate, capacity):
    m, tokens = model(keying=keying, gate=gate, capacity=capacity), text()
    with torch.no_grad():
        whole = m(tokens)[0]
        for sizes in ([1]*24, [5, 1, 18], [12, 12], [2, 3, 7, 12]): assert (pieces(m, tokens, sizes)[0] - whole).abs().max() < 1e-10


@pytest.mark.parametrize("keying", KEYINGS)
def test_model_contracts(keying):
    m, tokens = model(keying=keying), text()
    whole, state = m(tokens)
    assert is_store(state) and leaves(state) == [] and nbytes(state) == state.nbytes() > 0
    assert torch.equal(m(tokens, m.init_state(3))[0], whole) and torch.equal(m(tokens)[0], whole)
    assert (m(tokens[1:2])[0] - whole[1:2]).abs().max() < 1e-10
    rows, more = torch.tensor([2, 0, 2]), text(t=7, seed=2)
    assert (m(more[rows], select(state, rows))[0] - m(more, state.fork())[0][rows]).abs().max() < 1e-10
    kept = []
    hook = m.embed.register_forward_hook(lambda mod, args, out: kept.append(out))
    logits = m(tokens)[0]
    hook.remove()
    for i in (0, 9, 22):
        g, = torch.autograd.grad(logits[:,i].sum(), kept[0], retain_graph=True)
        assert g[:,i+1:].count_nonzero() == 0 and g[:,i].count_nonzero() > 0
    m.train()
    m(tokens)[0].logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.count_nonzero() for n,p in m.named_parameters())
    assert torch.equal(copy.deepcopy(m)(tokens)[0], m(tokens)[0])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("keying", KEYINGS)
def test_mixer_gradcheck(keying, gate):
    torch.manual_seed(0)
    f = BankAttention(4, 2, window=2, k=20, keying=keying, gate=gate, beta=2., span=2).double()
    x = torch.randn(1, 5, 4, dtype=torch.double, requires_grad=True)
    names = dict(f.named_parameters())
    call = lambda x, *ps: torch.func.functional_call(f, dict(zip(names, ps)), (x,))[0]
    assert torch.autograd.gradcheck(call, (x, *(p.detach().clone().requires_grad_() for p in names.values())))


def test_stale_states_and_bad_arguments():
    m, tokens = model(), text()
    _, state = m(tokens)
    m(tokens, state)
    with pytest.raises(ValueError, match="go on from the latest state"): m(tokens, state)
    for kwargs, message in ((dict(keying="shared"), "keying: expected one of 'shifted'"), (dict(gate="hard"), "gate: expected one of"), (dict(k=0), "k: expected an integer"),
                            (dict(span=0), "span: expected"), (dict(capacity=-1), "capacity: expected"), (dict(beta=0.), "beta: expected a number above 0"),
                            (dict(bank_layers=(2,)), "bank_layers: expected numbers from 0 to 1; got 2")):
        with pytest.raises(ValueError, match=message): model(**kwargs)


def task(**kwargs): return AssociativeRecall(4, 4, 3, 3, 9, batch_size=4, seed=1, **kwargs)


def test_learner_resumes_to_the_bit(tmp_path):
    import lightning as L
    from memnotes.core.learner import Keep, WholeFiles
    def run(steps, out, resume=None): # three windows a sequence, a target in each: checkpoints fall in mid-stream
        torch.manual_seed(0)
        t = Brackets(length=24, batch_size=4, seed=1)
        m = BankTransformer(t.vocab, 8, 1, 2, window=4, k=4)
        learner = BankLearner(m, t, Schedule(1e-2, 6), 8, folder=out/"banks")
        with quiet(): L.Trainer(max_steps=steps, limit_val_batches=0, max_epochs=-1, logger=False, enable_progress_bar=False, enable_model_summary=False, deterministic=True,
            accelerator="cpu", callbacks=[Keep(out, 1)], plugins=[WholeFiles()]).fit(learner, datamodule=t, ckpt_path=resume)
        return learner
    whole = run(6, tmp_path/"a")
    run(2, tmp_path/"b")
    rest = run(6, tmp_path/"b", tmp_path/"b/last.ckpt")
    assert whole.losses == rest.losses and all(torch.equal(p, q) for p,q in zip(whole.model.parameters(), rest.model.parameters()))
    assert len(list((tmp_path/"a/banks").iterdir())) in (1, 2)


def test_pack_and_unpack_a_state(tmp_path):
    m, tokens = model(), text()
    _, state = m(tokens)
    learner = BankLearner(m, NoTask(), Schedule(1e-2, 3), folder=tmp_path)
    saved = learner.pack(detach(state))
    torch.save(saved, tmp_path/"state.pt")
    back = learner.unpack(torch.load(tmp_path/"state.pt", weights_only=True))
    assert isinstance(back, Remembered)
    more = text(t=5, seed=9)
    assert torch.equal(m(more, back)[0], m(more, state)[0])
    file, = tmp_path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="has sha256"): learner.unpack(saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"): learner.unpack(saved)


class NoTask: vocab, seed = VOCAB, 0


def test_fit_and_evaluate_leave_the_bank_to_the_sequence():
    torch.manual_seed(0)
    m, t = BankTransformer(task().vocab, 8, 1, 2, window=6, k=4), task()
    before = evaluate(m, t, steps=2, window=6)
    assert evaluate(m, t, steps=2, window=6) == before and abs(evaluate(m, t, steps=2)["loss"] - before["loss"]) < 1e-5
    fit(m, t, Schedule(1e-2, 3), window=6, validate=2)


def test_meta_device_finds_fixed_devices():
    torch.manual_seed(0)
    m = BankTransformer(VOCAB, 8, 1, 2, window=4, capacity=0).to("meta")
    assert m(text().to("meta"))[0].is_meta


# -- attached to a model

def host(seed=0):
    torch.manual_seed(seed)
    return Transformer(VOCAB, 8, 2, 2).eval().requires_grad_(False)


def test_attach_and_detach_leave_the_model_as_it_was():
    m, tokens = host(), text()
    want, weights = m(tokens)[0], copy.deepcopy(m.state_dict())
    with attach(m, MemoryBank(8, 1, 100, batch=3), share=.5, k=4) as a:
        first, second = m(tokens)[0], m(tokens)[0]
        assert torch.allclose(first.log_softmax(-1), want.log_softmax(-1), atol=1e-5) and not torch.allclose(second, want, atol=1e-2)
        assert a.banks[0].stats()["live"] == [46]*3 or a.banks[0].stats()["live"] == [47]*3
    assert torch.equal(m(tokens)[0], want) and all(torch.equal(weights[n], p) for n,p in m.state_dict().items())
    assert not m._forward_hooks and not m._forward_pre_hooks and not m.head._forward_pre_hooks


def test_attached_probabilities_are_the_mixture():
    m, tokens = host(), text(1, 12)
    bank = MemoryBank(8, 1, 100)
    keys, values = unit(1, 5, 8), torch.tensor([[[1.], [2.], [1.], [7.], [0.]]])
    bank.write(keys, values)
    plain = m(tokens)[0].softmax(-1)
    h = F.normalize(m.norm(m.hidden(tokens)[0]), dim=-1)
    w = (7.*(h @ keys.mT)).softmax(-1)
    want = .7*plain + .3*torch.zeros_like(plain).index_add_(-1, values[0,:,0].long(), w)
    with attach(m, bank, share=.3, k=5, beta=7., write=False): got = m(tokens)[0].exp()
    assert torch.allclose(got, want, atol=1e-6) and bank.written == 5


def test_attach_hidden_states_and_errors():
    m, tokens = host(), text()
    want = m(tokens)[0]
    banks = [MemoryBank(8, 8, 100, batch=3) for _ in range(2)]
    with attach(m, banks, layers=[0, 1], k=2, share=.2):
        assert torch.equal(m(tokens)[0], want)
        assert not torch.equal(m(tokens)[0], want)
    assert torch.equal(m(tokens)[0], want)
    for call, message in ((lambda: attach(m, banks[0]), "d_value"), (lambda: attach(m, banks, layers=[0]), "one a layer"), (lambda: attach(m, banks, layers=[0, 5]), "layers: expected"),
                          (lambda: attach(m, MemoryBank(8, 1, 9), share=1.5), "share: expected"), (lambda: attach(m, MemoryBank(4, 1, 9)), "d_key")):
        with pytest.raises(ValueError, match=message): call()


def test_attach_to_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=.3)).eval()
    from memnotes.core.pretrained import wrap
    m, tokens = wrap(hf), text()
    want = m(tokens)[0]
    with attach(m, MemoryBank(8, 1, 100, batch=3), share=.5, k=4):
        m(tokens)
        assert not torch.allclose(m(tokens)[0], want, atol=1e-2)
    assert torch.equal(m(tokens)[0], want) and torch.equal(hf(tokens).logits, want)
