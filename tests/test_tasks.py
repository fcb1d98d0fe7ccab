"Tasks: pure, windowed, disjoint, solvable by an exact rule and by nothing less, resumable in Lightning."
import math, os, time, tracemalloc, warnings

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from memnotes.core.tasks import AssociativeRecall, Brackets, Copy, CopyFirst, Keys, Task, draw, hash_key, permute

TASKS = dict(
    marked=CopyFirst(17, 40, batch_size=3), same=CopyFirst(9, 40, "same_alphabet", batch_size=3), bos=CopyFirst(10, 40, "bos", batch_size=3),
    copy=Copy(10, (2, 7), 9, batch_size=3),
    single=AssociativeRecall(batch_size=3, distance=20), multi=AssociativeRecall(12, 9, 5, 5, 31, batch_size=3),
    one_token=AssociativeRecall(12, 9, 5, 5, 8, key_tokens=1, batch_size=3),
    rival=AssociativeRecall(12, 9, 5, 5, 62, distractor="rival", batch_size=3),
    repeat=AssociativeRecall(4, 9, 5, 5, 62, distractor="repeat", batch_size=3),
    repeat_first=AssociativeRecall(4, 9, 5, 5, 62, distractor="repeat", answer="first", batch_size=3),
    reordered=AssociativeRecall(12, 9, 5, 5, 62, distractor="rival", asked="reordered", batch_size=3),
    corrupted=AssociativeRecall(9, 9, 5, 5, 62, key_tokens=3, distractor="rival", asked="corrupted", batch_size=3),
    paraphrased=AssociativeRecall(12, 9, 5, 5, 62, distractor="rival", asked="paraphrased", batch_size=3),
    brackets=Brackets(length=150, batch_size=3), deep=Brackets(2, 32, 2, (0, 1), 150, .8, "closing", batch_size=3),
    bare=Brackets(5, 3, 0, length=90, batch_size=3), apart=Brackets(gap=(17, 40), length=200, loss="closing", batch_size=3))
LONG = os.environ.get("LONG") == "1"
every = pytest.mark.parametrize("name", TASKS)


def tensor_keys(batch): return [k for k,v in batch.items() if isinstance(v, torch.Tensor)]

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)

def join(windows): return {k: torch.cat([w[k] for w in windows], 1) for k in tensor_keys(windows[0])}


@every
def test_batch_is_pure_and_well_formed(name):
    task = TASKS[name]
    a = task.batch(1, "train", 0, 5)
    for step in (0, 6): task.batch(2, "test", 1, step)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert same(a, task.batch(1, "train", 0, 5))
    assert torch.equal(before, torch.get_rng_state())
    shape = task.batch_size, task.length
    assert all(a[k].shape == shape for k in tensor_keys(a))
    assert a["tokens"].dtype == a["targets"].dtype == torch.int64 and a["mask"].dtype == torch.bool
    for k in ("tokens", "targets"): assert a[k].min() >= 0 and a[k].max() < task.vocab
    assert a["mask"].any(1).all() and a["position"] == 0 and a["step"] == 5 and a["last"]
    assert len(task.names) == task.vocab == len(set(task.names))
    assert len(task.show(a, limit=10).split("\n")) == 2


@settings(max_examples=400 if LONG else 40, deadline=None)
@given(st.sampled_from(list(TASKS)), st.integers(1, 210), st.integers(0, 60), st.integers(0, 3))
def test_windows_join_to_the_batch(name, window, start, step):
    task = TASKS[name]
    whole,parts = task.batch(0, "train", 0, step),list(task.windows(0, "train", 0, step, window, start))
    if start >= task.length: assert parts == []; return
    joined = join(parts)
    assert all(torch.equal(joined[k], whole[k][:,start:]) for k in joined) and joined.keys() == set(tensor_keys(whole))
    assert [w["position"] for w in parts] == list(range(start, task.length, window))
    assert [w["last"] for w in parts] == [False]*(len(parts)-1) + [True]


def test_a_window_that_starts_at_the_end_is_empty():
    for task in TASKS.values(): assert list(task.windows(0, "train", 0, 0, 8, task.length)) == []


@every
def test_seeds_splits_ranks_and_steps_are_streams_of_their_own(name):
    task = TASKS[name]
    wide = type(task).__new__(type(task))
    wide.__dict__.update(task.__dict__ | dict(batch_size=64))
    places = [(s, split, r, t) for s in (0, 1) for split in ("train", "validation", "test") for r in (0, 1) for t in (0, 1)]
    keys = np.concatenate([wide.keys(*p).ravel() for p in places])
    assert len(np.unique(keys)) == len(keys) == 64*24
    if task.length < 30: return
    rows = [tuple(x) for p in places for x in wide.batch(*p)["tokens"].tolist()]
    assert len(set(rows)) == len(rows)


def test_swapping_seed_rank_and_step_changes_the_key():
    assert len({int(hash_key("t", *p)[0]) for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))}) == 6


# exact solvers: they read tokens only
def solve(task, tokens, mask): # predictions at the masked positions
    out = []
    if isinstance(task, CopyFirst): return [tokens[task.at]]
    if isinstance(task, Copy): return tokens[:sum(mask)]
    if isinstance(task, Brackets):
        stack,at = [],{}
        for i,x in enumerate(tokens):
            if x < task.kinds: stack.append(x)
            elif x < 2*task.kinds: stack.pop()
            at[i] = task.kinds + stack[-1] if stack else None
        return [at[i] for i,on in enumerate(mask) if on]
    w,values,known = task.width,task.n_values,{}
    end = task.n_pairs*w + task.distance
    def name(words):
        words = [x-values for x in words]
        if task.asked == "paraphrased": words = [x % task.space.n_words for x in words]
        return frozenset(words) if task.asked == "reordered" else tuple(words)
    for i in range(0, (task.n_pairs + task.rivals)*w, w):
        key = name(tokens[i:i+w-1])
        if task.answer == "last" or key not in known: known[key] = tokens[i+w-1]
    for i in range(end, len(tokens), w):
        key = name(tokens[i:i+w-1])
        if task.asked == "corrupted":
            fits = [k for k in known if sum(a != b for a,b in zip(k, key)) == 1 and task.space.n_words in key]
            assert len(fits) == 1
            key = fits[0]
        out.append(known[key])
    return out


def score(task, steps=4, shift=0): # shift: read another row than the one asked about
    right = total = 0
    for step in range(steps):
        b = task.batch(0, "test", 0, step)
        on = b.get("closing", b["mask"])
        for x,y,m in zip(b["tokens"].roll(shift, 0), b["targets"], on):
            guess = solve(task, x.tolist(), m.tolist())
            right += sum(p == t for p,t in zip(guess, y[m].tolist()))
            total += int(m.sum())
    return right/total


@every
def test_an_exact_solver_is_always_right(name): assert score(TASKS[name]) == 1


@pytest.mark.parametrize("name", ["marked", "same", "bos", "copy", "multi", "rival"])
def test_the_same_solver_on_another_row_is_not(name):
    task = TASKS[name]
    if name in ("multi", "rival"): # another row states other keys: ask which of its values would do
        b = task.batch(0, "test", 0, 0)
        assert (b["targets"] == b["targets"].roll(1, 0))[b["mask"]].float().mean() < .6
    else: assert score(task, 16, shift=1) < .5


def test_a_wrong_solver_is_at_chance():
    wrong = CopyFirst(17, 40, batch_size=256)
    said = torch.cat([wrong.batch(0, "test", 0, s)["targets"][:,-1].roll(1) == wrong.batch(0, "test", 0, s)["targets"][:,-1] for s in range(8)])
    assert abs(said.float().mean() - wrong.chance) < 4*math.sqrt(wrong.chance*(1-wrong.chance)/len(said))
    b = Brackets(length=4000, batch_size=8).batch(0, "test", 0, 0)
    first = (b["targets"][b["closing"]] == 3).float().mean()
    assert abs(first - 1/3) < .03


def test_the_first_instead_of_the_last_value_is_wrong_where_keys_repeat():
    task = AssociativeRecall(4, 9, 5, 5, 62, distractor="repeat", batch_size=32)
    task.answer = "first"
    first = task.batch(0, "test", 0, 0)
    task.answer = "last"
    last = task.batch(0, "test", 0, 0)
    assert .1 < (first["targets"] == last["targets"])[last["mask"]].float().mean() < .9
    assert (first["distance"][last["mask"]] >= last["distance"][last["mask"]]).all()


def test_chance_is_what_the_majority_class_gets():
    for task in (CopyFirst(17, 5, batch_size=4096), Copy(10, 3, batch_size=4096), AssociativeRecall(n_values=8, batch_size=4096)):
        b = task.batch(0, "test", 0, 0)
        share = torch.bincount(b["targets"][b["mask"]], minlength=task.vocab).double()/b["mask"].sum()
        assert abs(share.max() - task.chance) < .03 and share.count_nonzero() == round(1/task.chance)
        assert abs(-(share[share > 0]*share[share > 0].log()).sum() - task.entropy) < .01


@every
def test_distance_points_at_what_must_be_recalled(name):
    task,b = TASKS[name],TASKS[name].batch(0, "train", 0, 0)
    on = b.get("closing", b["mask"])
    for x,y,d,m in zip(b["tokens"], b["targets"], b["distance"], on):
        at = m.nonzero().ravel()
        assert torch.equal(x[at-d[at]] + (task.kinds if isinstance(task, Brackets) else 0), y[at])
        assert not d[~m].any()


@pytest.mark.parametrize("name", ["brackets", "deep", "bare", "apart"])
def test_brackets_are_balanced_bounded_and_ended(name):
    task,b = TASKS[name],TASKS[name].batch(0, "train", 0, 0)
    for r in range(task.batch_size):
        depth,fresh = 0,True
        for i,x in enumerate(b["tokens"][r].tolist()):
            if x < task.kinds: depth,fresh = depth+1,False
            elif x < 2*task.kinds: depth -= 1
            elif x == 2*task.kinds: assert depth == 0 and not fresh; fresh = True
            assert 0 <= depth <= task.max_depth
            assert b["depth"][r,i] == depth and b["may_end"][r,i] == (depth == 0 and not fresh)
    low,high = task.gap
    assert b["distance"][b["closing"]].min() >= low
    assert b["may_end"][b["targets"] == 2*task.kinds].all()
    assert torch.equal(b["closing"], (b["targets"] >= task.kinds) & (b["targets"] < 2*task.kinds))


def test_gap_sets_the_distance_of_every_pair():
    exact = Brackets(max_depth=1, gap=(100, 100), length=2000, batch_size=4).batch(0, "test", 0, 0)
    assert (exact["distance"][exact["closing"]] == 100).all()
    runs = Brackets(gap=(0, 8), length=20000, max_depth=1).batch(0, "test", 0, 0)
    share = torch.bincount(runs["distance"][runs["closing"]]).double()
    share /= share.sum()
    law = torch.tensor([math.log((r+2)/(r+1)) for r in range(9)]).double()/math.log(10)
    assert (share - law).abs().max() < .01
    deep = Brackets(max_depth=32, deepen=.6, gap=(0, 1), length=4000).batch(0, "test", 0, 0)
    assert deep["depth"].max() == 32


def test_rival_facts_never_state_a_key_twice():
    for asked,tokens,n in (("exact", 2, 12), ("reordered", 2, 14), ("corrupted", 3, 9)):
        task = AssociativeRecall(n, 5, 4, 4, 60, tokens, "rival", asked, batch_size=16)
        key = task.keys(0, "train", 0, 0)
        number = task.number(key, np.arange(task.n_pairs + task.rivals)[None])
        words = task.words(key, np.arange(task.n_pairs + task.rivals)[None])
        for row in number: assert len(set(row)) == len(row)
        for row in words: assert len({frozenset(w) if asked == "reordered" else tuple(w) for w in row.tolist()}) == len(row)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**31))
def test_permute_is_a_permutation(n, seed):
    image = permute(hash_key("p", seed, np.arange(2)[:,None]), np.arange(n)[None], n)
    assert (np.sort(image) == np.arange(n)).all()


def test_permute_favours_nothing():
    n,rows = 6,30_000
    image = permute(hash_key("p", np.arange(rows)[:,None]), np.arange(n)[None], n)
    for j in range(n): assert (np.abs(np.bincount(image[:,j], minlength=n)/rows - 1/n) < .0108).all()
    pairs = np.bincount(image[:,0]*n + image[:,1], minlength=n*n).reshape(n, n)/rows
    assert (np.abs(pairs[~np.eye(n, dtype=bool)] - 1/(n*(n-1))) < .0055).all() # five standard errors


def test_the_network_behind_permute_favours_nothing():
    n,rows = 300,40_000
    image = permute(hash_key("q", np.arange(rows)[:,None]), np.arange(4)[None], n)
    for j in range(4): assert ((np.bincount(image[:,j], minlength=n) - rows/n)**2/(rows/n)).sum() < 380 # 299 degrees of freedom, p = .001
    for a,b in ((0, 1), (0, 2), (1, 3)):
        gap = np.bincount((image[:,a] - image[:,b]) % n, minlength=n)[1:]
        assert ((gap - rows/(n-1))**2/(rows/(n-1))).sum() < 380


def test_draws_are_uniform_and_independent_of_their_neighbours():
    x = draw(hash_key("u", np.arange(64)[:,None]), np.arange(20_000)[None], 10)
    expected = x.size/10
    chi = ((np.bincount(x.ravel()) - expected)**2/expected).sum()
    assert chi < 27.9 # 9 degrees of freedom, p = .001
    for a,b in ((x[:,1:], x[:,:-1]), (x[1:], x[:-1])):
        pairs,expected = np.bincount((a*10+b).ravel()),a.size/100
        assert ((pairs-expected)**2/expected).sum() < 148.2 # 99 degrees of freedom, p = .001


def test_keys_beyond_the_hash_and_pairs_far_out():
    keys = Keys(60_000, 2, "reordered")
    number = np.array([[0, 1, 2, keys.n-1]])
    words = keys.spell(number)[0]
    assert (words[:,0] < words[:,1]).all() and words[-1].tolist() == [59_998, 59_999]
    with pytest.raises(ValueError, match="2\\^32"): Keys(2000, 3)


# size and speed
@pytest.mark.parametrize("task", [CopyFirst(17, 10**6, batch_size=2), Brackets(length=10**6 if LONG else 50_000, batch_size=2, gap=(0, 64)),
    AssociativeRecall(1024, 64, 4, 4, 10**6, distractor="repeat", batch_size=2)], ids=lambda t: type(t).__name__)
def test_a_long_lag_streams_in_the_memory_of_a_window(task):
    window = 1024
    tracemalloc.start()
    n = seen = 0
    for w in task.windows(0, "train", 0, 0, window): n,seen = n + w["tokens"].shape[1],seen + int(w["mask"].sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == task.length and seen > 0
    assert peak < 2**20*(2 if isinstance(task, AssociativeRecall) else .5) # one sequence as int64: 8 MB


def test_copy_first_makes_a_million_tokens_a_second():
    task = CopyFirst(17, 1024)
    task.batch(0, "train", 0, 0)
    start = time.process_time()
    n = sum(task.batch(0, "train", 0, s)["tokens"].numel() for s in range(20))
    assert n/(time.process_time()-start) > 1e6


# in Lightning
class Watch(LightningModule):
    "Nothing to learn: it notes what it is shown."
    def __init__(self, stop=None): super().__init__(); self.w,self.seen,self.shown,self.stop = torch.nn.Parameter(torch.zeros(1)),[],[],stop
    def note(self, b): return b["step"], b["position"], b["tokens"].sum().item(), b["targets"].sum().item()
    def training_step(self, b, i):
        if self.stop is not None and len(self.seen) == self.stop: raise RuntimeError("power cut")
        self.seen.append(self.note(b))
        return self.w.sum()
    def validation_step(self, b, i): self.shown.append(self.note(b))
    def test_step(self, b, i): self.shown.append(self.note(b))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)


def trainer(path, **kwargs):
    warnings.filterwarnings("ignore")
    return Trainer(**dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                          default_root_dir=path, num_sanity_val_steps=0) | kwargs)


@pytest.mark.parametrize("name", ["same", "rival", "brackets"])
def test_a_fit_sees_the_windows_in_order_and_resumes_in_mid_sequence(name, tmp_path):
    def task(): t = TASKS[name]; t.window = 32; return t
    try:
        whole = Watch()
        trainer(tmp_path, max_steps=13).fit(whole, task())
        expected = [Watch.note(None, w) for step in range(9) for w in TASKS[name].windows(0, "train", 0, step, 32)][:13]
        assert whole.seen == expected
        again = Watch()
        trainer(tmp_path, max_steps=13).fit(again, task())
        assert again.seen == expected # a second fit of the same task object starts at its start
        first = Watch()
        t = trainer(tmp_path, max_steps=4)
        t.fit(first, task())
        t.save_checkpoint(tmp_path/"four.ckpt")
        rest = Watch()
        trainer(tmp_path, max_steps=13).fit(rest, task(), ckpt_path=tmp_path/"four.ckpt", weights_only=True)
        assert first.seen + rest.seen == expected
    finally: TASKS[name].window = None


def test_a_checkpoint_inside_an_epoch_and_a_crash_lose_and_repeat_nothing(tmp_path):
    task = CopyFirst(9, 9, window=4, eval_batches=1)
    expected = [Watch.note(None, w) for step in range(9) for w in task.windows(0, "train", 0, step, 4)][:14]
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    crash = Watch(stop=8)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, max_steps=14, limit_train_batches=5, enable_checkpointing=True, callbacks=[kept]).fit(crash, task)
    assert task.cursor == expected[8][:2] # the window in hand was not finished
    for done in (3, 6):
        rest = Watch()
        trainer(tmp_path, max_steps=14, limit_train_batches=5).fit(rest, CopyFirst(9, 9, window=4, eval_batches=1), ckpt_path=tmp_path/f"step={done}.ckpt", weights_only=True)
        assert rest.seen == expected[done:]


def test_validation_and_test_show_the_same_sequences_every_time_and_move_nothing(tmp_path):
    task,watch = CopyFirst(9, 9, window=4, eval_batches=2),Watch()
    trainer(tmp_path, max_steps=6, limit_train_batches=3, val_check_interval=3).fit(watch, task)
    expected = [Watch.note(None, w) for step in range(2) for w in task.windows(0, "validation", 0, step, 4)]
    assert watch.shown == expected*2 and task.cursor == (2, 0)
    watch.shown = []
    trainer(tmp_path).test(watch, task)
    assert watch.shown == [Watch.note(None, w) for step in range(2) for w in task.windows(0, "test", 0, step, 4)]


def test_start_and_rank_choose_the_stream(tmp_path):
    task,watch = CopyFirst(9, 9, start=7),Watch()
    trainer(tmp_path, max_steps=2).fit(watch, task)
    assert [s[0] for s in watch.seen] == [7, 8]
    class Other: global_rank,training = 3,False
    task.trainer,task._given = Other(),None
    task.setup("fit")
    assert same(next(iter(task.train_dataloader())), task.batch(0, "train", 3, 7))


@pytest.mark.parametrize("make, says", [
    (lambda: CopyFirst(17, 0), "lag=0.*integer >= 1"), (lambda: CopyFirst(17, 2.5), "lag=2.5"), (lambda: CopyFirst(1, 5, "same_alphabet"), "vocab=1.*two words"),
    (lambda: CopyFirst(4, 5), "vocab=4.*>= 5"), (lambda: CopyFirst(17, 5, "second"), "first='second'.*same_alphabet"), (lambda: CopyFirst(17, 5, batch_size=0), "batch_size=0"),
    (lambda: CopyFirst(17, 5, window=0), "window=0.*window=None"), (lambda: CopyFirst(17, 5, seed=-1), "seed=-1"), (lambda: CopyFirst(True, 5), "vocab=True"),
    (lambda: Copy(3), "vocab=3"), (lambda: Copy(10, 0), "payload=0"), (lambda: Copy(10, (4, 2)), "payload=2.*least <= most"), (lambda: Copy(10, 2, -1), "delay=-1"),
    (lambda: AssociativeRecall(n_queries=9), "n_queries=9.*n_pairs=8.*raise n_pairs"), (lambda: AssociativeRecall(2, n_pairs=5), "n_pairs=5.*5 different keys.*4 exist.*raise n_keys"),
    (lambda: AssociativeRecall(10, distance=3000, distractor="rival"), "distance=3000.*1008 different keys.*100 exist"), (lambda: AssociativeRecall(1), "n_keys=1"),
    (lambda: AssociativeRecall(n_values=1), "n_values=1"), (lambda: AssociativeRecall(asked="shouted"), "asked='shouted'"), (lambda: AssociativeRecall(distractor="fog"), "distractor='fog'"),
    (lambda: AssociativeRecall(answer="any"), "answer='any'"), (lambda: AssociativeRecall(asked="reordered", key_tokens=3), "key_tokens=3.*key_tokens=2"),
    (lambda: AssociativeRecall(asked="corrupted", key_tokens=1), "key_tokens=1"),
    (lambda: Brackets(0), "kinds=0"), (lambda: Brackets(max_depth=0), "max_depth=0"), (lambda: Brackets(gap=(5, 2)), "gap=2.*least <= most"), (lambda: Brackets(deepen=1), "deepen=1"),
    (lambda: Brackets(loss="none"), "loss='none'"), (lambda: Brackets(filler=-1), "filler=-1"), (lambda: Brackets(filler=0, gap=(3, 5)), "filler=0 but gap=\\(3, 5\\).*use gap=\\(0, 0\\)"), (lambda: Brackets(gap=3), "gap=3.*least, most"), (lambda: Task(1, 5), "vocab=1"),
    (lambda: CopyFirst(17, 5).batch(0, "dev", 0, 0), "split='dev'.*validation"), (lambda: CopyFirst(17, 5).batch(0, "train", -1, 0), "rank=-1"),
    (lambda: CopyFirst(17, 5).batch(0, "train", 0, -1), "step=-1"), (lambda: next(CopyFirst(17, 5).windows(0, "train", 0, 0, 0)), "window=0"),
    (lambda: next(Brackets().windows(0, "train", 0, 0, 8, -1)), "start=-1"), (lambda: Task(4, 5, names=["a"]), "names")])
def test_bad_input_says_what_came_and_what_to_do(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_a_task_without_a_stream_says_so():
    with pytest.raises(NotImplementedError, match="Task defines neither span nor windows"): Task(4, 5).batch(0, "train", 0, 0)
