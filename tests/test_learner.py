"The learner: schedules' end points, masks and windows, reading without a trace, faults."
import copy, math, os, resource

import lightning as L
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from memnotes.core.cells import Recurrent
from memnotes.core.learner import KINDS, Learner, Schedule, Score, decayed, evaluate, fit, nats
from memnotes.core.sequence import Transformer
from memnotes.core.tasks import Brackets, Copy, CopyFirst

LONG = os.environ.get("LONG") == "1"


def build(task, cell="gpt", seed=0, dropout=0.):
    torch.manual_seed(seed)
    if cell == "gpt": return Transformer(task.vocab, 16, 1, 2, dropout=dropout)
    return Recurrent(cell, task.vocab, 16, dropout=dropout)


def equal(a, b): return all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters(), strict=True))


# schedules

@st.composite
def schedules(draw):
    kind, warmup = draw(st.sampled_from(KINDS)), draw(st.integers(0, 50))
    decay = draw(st.integers(1, 60)) if kind == "wsd" else None
    lr = draw(st.floats(1e-8, 10))
    least = warmup + dict(constant=1, wsd=1+(decay or 0)).get(kind, 2)
    min_lr = None if kind == "constant" else draw(st.one_of(st.none(), st.floats(0, 1).map(lambda f: min(lr, f*lr))))
    return Schedule(lr, least + draw(st.integers(0, 200)), warmup, kind, min_lr, decay)


@settings(max_examples=2000 if LONG else 150, deadline=None)
@given(schedules())
def test_schedule_end_points_are_exact_and_it_falls_after_the_peak(s):
    rates = [s(i) for i in range(s.steps)]
    assert rates[0] > 0 and rates[s.warmup] == s.lr == max(rates) and rates[-1] == s.min_lr == s(s.steps + 7)
    assert all(a < b for a,b in zip(rates[:s.warmup], rates[1:s.warmup+1]))
    assert all(a >= b >= s.min_lr for a,b in zip(rates[s.warmup:], rates[s.warmup+1:]))


def test_schedule_area_and_wsd_prefix():
    mean = lambda kind: math.fsum(Schedule(1., 2001, 0, kind, min_lr=.2)(i) for i in range(2001))/2001
    assert mean("cosine") == pytest.approx(.6, abs=1e-12) and mean("linear") == pytest.approx(.6, abs=1e-12)
    short, long = (Schedule(1e-3, n, 5, "wsd", decay=10) for n in (50, 500))
    assert [short(i) for i in range(40)] == [long(i) for i in range(40)] and short(45) < long(45)


@pytest.mark.parametrize("bad, words", [(dict(steps=10, warmup=11), "warmup=11"), (dict(kind="cosin"), "cosine, linear"), (dict(lr=0.), "lr"), (dict(lr=math.nan), "lr"),
    (dict(min_lr=1.), "min_lr"), (dict(warmup=-1), "warmup"), (dict(decay=3), "decay"), (dict(kind="wsd", decay=0), "decay"), (dict(kind="wsd", decay=99), "at least"),
    (dict(kind="constant", min_lr=1e-4), "min_lr"), (dict(steps=0), "steps")])
def test_schedule_refuses(bad, words):
    with pytest.raises(ValueError, match=words): Schedule(**dict(lr=1e-3, steps=20) | bad)


class Rates(L.Callback):
    def __init__(self): self.rates = []
    def on_before_optimizer_step(self, trainer, module, optimizer): self.rates.append([g["lr"] for g in optimizer.param_groups])


def test_every_update_uses_its_rate_also_between_windows_without_a_target():
    task, s, seen = CopyFirst(vocab=9, lag=31, batch_size=4), Schedule(1e-2, 12, 3), Rates()
    learner = fit(build(task), task, s, window=8, callbacks=[seen])
    assert seen.rates == [[s(i)]*2 for i in range(12)]
    assert len(learner.losses) == 12 and task.cursor == (12, 0)


def test_wsd_branch_from_a_shared_prefix_is_the_separate_run(tmp_path):
    task = Copy(vocab=6, payload=3, batch_size=4)
    long, short = (Schedule(1e-2, n, 2, "wsd", decay=5) for n in (40, 20))
    whole = fit(build(task, dropout=.1), task, short)
    fit(build(task, dropout=.1), task, long, out=tmp_path, every=14, max_steps=15)
    branch = fit(build(task, dropout=.1), task, short, resume=tmp_path/"last.ckpt")
    assert branch.losses == whole.losses and equal(branch.model, whole.model)


# loss, windows, decay

def by_hand(model, task, schedule, window):
    "Truncated BPTT without any of our machinery; the gradient reaches no further than a window."
    names = decayed(model)
    groups = [dict(params=[p for n,p in model.named_parameters() if (n in names) == side], weight_decay=.1*side) for side in (True, False)]
    optimizer, losses, step = torch.optim.AdamW([g for g in groups if g["params"]], betas=(.9,.95)), [], 0
    cut = lambda s: s.detach() if isinstance(s, torch.Tensor) else s if s is None else {k: cut(v) for k,v in s.items()} if isinstance(s, dict) else tuple(map(cut, s))
    while True:
        batch, state = task.batch(task.seed, "train", 0, step), None
        for i in range(0, task.length, window):
            piece = slice(i, i+window)
            logits, state = model(batch["tokens"][:,piece], state)
            state, mask = cut(state), batch["mask"][:,piece]
            if not mask.any(): continue
            for g in optimizer.param_groups: g["lr"] = schedule(len(losses))
            loss = F.cross_entropy(logits[mask], batch["targets"][:,piece][mask])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == schedule.steps: return losses
        step += 1


@pytest.mark.parametrize("cell", ["gpt","lstm","lru"])
@pytest.mark.parametrize("window", [None, 5])
def test_training_is_the_plain_loop(cell, window):
    task, s = Copy(vocab=6, payload=4, delay=3, batch_size=4), Schedule(1e-2, 15, 3)
    plain, ours = build(task, cell).double(), build(task, cell).double()
    losses = by_hand(plain, task, s, window or task.length)
    learner = fit(ours, task, s, window=window)
    torch.testing.assert_close(torch.tensor(learner.losses), torch.tensor(losses), rtol=0, atol=1e-10)
    for p,q in zip(plain.parameters(), ours.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_targets_outside_the_mask_do_not_count():
    logits, targets, mask = torch.randn(2, 5, 7), torch.randint(7, (2, 5)), torch.rand(2, 5) < .5
    other = torch.where(mask, targets, (targets+1) % 7)
    assert torch.equal(nats(logits, targets, mask), nats(logits, other, mask))
    torch.testing.assert_close(nats(logits, targets, mask).sum(), F.cross_entropy(logits[mask], targets[mask], reduction="sum"))


@pytest.mark.parametrize("tied", [True, False])
def test_decay_spares_norms_biases_and_embeddings(tied):
    model = Transformer(8, 16, 1, 2, tied=tied, bias=True, positions="learned", max_len=8)
    names = decayed(model)
    assert ("head.weight" in names) != tied and not any("embed" in n or "norm" in n or "bias" in n or "positions" in n for n in names)
    assert {n for n,_ in model.named_parameters() if n.endswith((".up.weight",".query.weight"))} <= names


class Bytes(Copy):
    "Two bytes behind every counted target."
    def windows(self, *args, **kwargs):
        for batch in super().windows(*args, **kwargs): yield batch | dict(n_bytes=2*batch["mask"].long())


def test_bits_per_byte_and_csv(tmp_path):
    task = Bytes(vocab=6, payload=3, batch_size=4)
    learner = fit(build(task), task, Schedule(1e-2, 8), out=tmp_path, validate=4, log_every_n_steps=1)
    csv = pd.read_csv(next(tmp_path.glob("version_0/metrics.csv")))
    rows = csv.dropna(subset="loss")
    assert rows.step.tolist() == list(range(8)) and rows.loss.tolist() == pytest.approx(learner.losses)
    assert rows.lr.tolist() == pytest.approx([learner.schedule(i) for i in range(8)]) and rows.accuracy.between(0, 1).all()
    assert rows.bits_per_byte.tolist() == pytest.approx([x/math.log(2)/2 for x in learner.losses], rel=1e-5)
    assert [s["update"] for s in learner.scores] == [4, 8] and csv["val/loss"].notna().sum() == 2
    got = evaluate(learner.model, task, steps=task.eval_batches)
    assert got["bits_per_byte"] == pytest.approx(got["loss"]/math.log(2)/2) and got["loss"] == pytest.approx(learner.scores[-1]["loss"], rel=1e-5)


# reading

def test_evaluate_is_pure_and_any_window_gives_the_same():
    task = Brackets(length=48, batch_size=4)
    model = build(task, dropout=.5).double().train()
    model.blocks[0].eval()
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    whole = evaluate(model, task, "test", 2, each=True)
    split = evaluate(model, task, "test", 2, window=7, each=True)
    assert model.training and not model.blocks[0].training and torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert abs(whole["loss"] - split["loss"]) < 1e-10
    order = ["step","example","position"]
    pd.testing.assert_frame_equal(whole["each"].sort_values(order, ignore_index=True), split["each"].sort_values(order, ignore_index=True), rtol=0, atol=1e-10)
    table = whole["each"]
    assert len(table) == whole["targets"] and table.nats.mean() == pytest.approx(whole["loss"], abs=1e-12)
    assert (table.target == table.predicted).mean() == pytest.approx(whole["accuracy"])


@pytest.mark.parametrize("cell", ["gpt","gru"])
def test_validation_leaves_no_trace(cell):
    task, s = Brackets(length=24, batch_size=4), Schedule(1e-2, 14, 2)
    blind = fit(build(task, cell, dropout=.3), task, s, window=8)
    seen = fit(build(task, cell, dropout=.3), task, s, window=8, validate=2)
    assert len(seen.scores) == 7 and blind.losses == seen.losses and equal(blind.model, seen.model)


def test_fit_leaves_global_state_and_depends_on_its_seed():
    task, s = Copy(vocab=6, payload=3, batch_size=4), Schedule(1e-2, 5)
    torch.manual_seed(5)
    noise, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    runs = [fit(build(task, dropout=.5), task, s, seed=k).losses for k in (1, 1, 2)]
    torch.manual_seed(5)
    assert runs[0] == runs[1] != runs[2]
    fit(copy.deepcopy(build(task)), task, s)
    model = build(task)
    noise = torch.get_rng_state()
    fit(model, task, s)
    assert torch.equal(noise, torch.get_rng_state()) and strict == torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["bf16-mixed","bf16-true","64-true"])
def test_precisions_of_the_trainer(precision):
    task = Copy(vocab=6, payload=3, batch_size=8)
    learner = fit(build(task), task, Schedule(2e-2, 40, 4), precision=precision, window=3)
    assert learner.losses[-1] < learner.losses[0]


def test_a_long_lag_streams():
    lag = 10**6 if LONG else 20_000
    task = CopyFirst(vocab=9, lag=lag, batch_size=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner = fit(build(task, "mingru"), task, Schedule(1e-3, 1, kind="constant"), window=256)
    assert len(learner.losses) == 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


# faults

class Poison(L.Callback):
    def __init__(self, update): self.update = update
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.update: next(module.model.parameters()).data[0] = math.nan


def test_nan_stops_with_its_update_and_keeps_the_last_good_checkpoint(tmp_path):
    task = Copy(vocab=6, payload=3, batch_size=4)
    with pytest.raises(FloatingPointError, match="at update 7"):
        fit(build(task), task, Schedule(1e-2, 20), out=tmp_path, every=3, callbacks=[Poison(7)])
    kept = torch.load(tmp_path/"last.ckpt", weights_only=True)
    assert kept["global_step"] == 6 and all(v.isfinite().all() for v in kept["state_dict"].values())
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".ckpt"]


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    task = Copy(vocab=6, payload=3, batch_size=4)
    with pytest.raises(FloatingPointError, match="not finite after update 6"):
        fit(build(task), task, Schedule(1e-2, 20), out=tmp_path, every=3, callbacks=[Poison(6)])
    assert torch.load(tmp_path/"last.ckpt", weights_only=True)["global_step"] == 3


def test_bad_pairs():
    task = Copy(vocab=6, payload=3, batch_size=4)
    s = Schedule(1e-2, 5)
    with pytest.raises(ValueError, match="vocab=6, the task has 9"): Learner(build(task), CopyFirst(vocab=9), s)
    with pytest.raises(ValueError, match="vocab=6, the task has 9"): evaluate(build(task), CopyFirst(vocab=9))
    with pytest.raises(ValueError, match="window: expected at least 1"): fit(build(task), task, s, window=0)
    with pytest.raises(ValueError, match="clip"): fit(build(task), task, s, clip=0)
    with pytest.raises(ValueError, match="out: "): fit(build(task), task, s, every=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere.ckpt"): fit(build(task), task, s, resume="nowhere.ckpt")
    with pytest.raises(ValueError, match="datamodule"):
        L.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(Learner(build(task), task, s), datamodule=copy.deepcopy(task))
    model = build(task)
    model.segment = 4
    with pytest.raises(ValueError, match="every 4 positions"): Learner(model, task, s, window=6)
    with pytest.raises(ValueError, match="no target"): Score().compute()


def test_batch_size_changed_in_mid_stream(tmp_path):
    task, s = Brackets(length=32, batch_size=4), Schedule(1e-2, 10)
    fit(build(task), task, s, window=8, out=tmp_path, every=2, max_steps=2)
    smaller = Brackets(length=32, batch_size=3)
    with pytest.raises(ValueError, match="changed in mid-stream"): fit(build(task), smaller, s, window=8, resume=tmp_path/"last.ckpt")
    with pytest.raises(ValueError, match="window: the checkpoint was written with 8; got 4"): fit(build(task), task, s, window=4, resume=tmp_path/"last.ckpt")
    with pytest.raises(ValueError, match="data: the checkpoint"): fit(build(task), Brackets(length=32, batch_size=4, seed=1), s, seed=0, window=8, resume=tmp_path/"last.ckpt")


class Store:
    is_store = True
    def detach(self): return self


def test_a_store_needs_a_learner_that_can_write_it_down():
    task = Copy(vocab=6, payload=3, batch_size=4)
    with pytest.raises(NotImplementedError, match="Store is a store"): Learner(build(task), task, Schedule(1e-2, 5)).pack(Store())
