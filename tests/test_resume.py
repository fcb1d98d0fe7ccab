"A run that was stopped in mid-stream, with a carried state and dropout on, ends with the bits of one that was not."
import os, random, signal, subprocess, sys, time
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch

from memnotes.core.cells import Recurrent
from memnotes.core.learner import Schedule, fit
from memnotes.core.sequence import Transformer
from memnotes.core.tasks import Brackets, Copy

LONG = os.environ.get("LONG") == "1"


def build(task, cell):
    torch.manual_seed(0)
    if cell == "gpt": return Transformer(task.vocab, 16, 2, 2, dropout=.2)
    return Recurrent(cell, task.vocab, 16, 2, dropout=.2)


class Plug(L.Callback):
    "Stops the run inside an update: after the gradient, before the step."
    def __init__(self, update): self.update = update
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.update: raise InterruptedError


def same(a, b):
    assert a.losses == b.losses and a.scores == b.scores
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    mine, yours = (o.optimizers().optimizer.state_dict()["state"] for o in (a, b))
    assert all(torch.equal(mine[i][k], yours[i][k]) for i in mine for k in mine[i])


@pytest.mark.parametrize("validate", [None, 3])
@pytest.mark.parametrize("cell", ["gpt","lstm","mingru","lru"])
def test_interrupted_is_uninterrupted(cell, validate, tmp_path):
    rng = random.Random(f"{cell} {validate}")
    for _ in range(10 if LONG else 1):
        out = tmp_path/str(rng.random())
        task, s = Brackets(length=40, batch_size=3), Schedule(1e-2, 24, 4)
        options = dict(window=8, validate=validate)
        whole = fit(build(task, cell), task, s, **options)
        every, stop = rng.choice([1, 2, 3, 4, 7]), rng.randrange(7, 24)
        with pytest.raises(InterruptedError): fit(build(task, cell), task, s, out=out, every=every, callbacks=[Plug(stop)], **options)
        place = torch.load(out/"last.ckpt", weights_only=True)["learner"]["place"]
        assert place[0]*5 + place[1]//8 == stop//every*every
        again = fit(build(task, cell), task, s, resume=out/"last.ckpt", **options)
        same(again, whole)


def test_interrupted_twice_and_where_a_sequence_ends(tmp_path):
    task, s, options = Brackets(length=32, batch_size=3), Schedule(1e-2, 20, 4), dict(window=8)
    whole = fit(build(task, "gpt"), task, s, **options)
    for stop,resume in (5, None), (13, tmp_path/"last.ckpt"):
        with pytest.raises(InterruptedError): fit(build(task, "gpt"), task, s, out=tmp_path, every=4, callbacks=[Plug(stop)], resume=resume, **options)
        assert torch.load(tmp_path/"last.ckpt", weights_only=True)["learner"]["ranks"][0]["state"] is None
    same(fit(build(task, "gpt"), task, s, resume=tmp_path/"last.ckpt", **options), whole)


def test_windows_without_targets_before_the_checkpoint(tmp_path):
    task, s, options = Copy(vocab=6, payload=(2, 9), delay=20, batch_size=3), Schedule(1e-2, 17, 4), dict(window=3)
    whole = fit(build(task, "lstm"), task, s, **options)
    with pytest.raises(InterruptedError): fit(build(task, "lstm"), task, s, out=tmp_path, every=3, callbacks=[Plug(11)], **options)
    same(fit(build(task, "lstm"), task, s, resume=tmp_path/"last.ckpt", **options), whole)


def test_whole_sequences_and_logged_losses(tmp_path):
    task, s, options = Copy(vocab=6, payload=4, batch_size=3), Schedule(1e-2, 18, 4), dict(log_every_n_steps=1)
    fit(build(task, "gpt"), task, s, out=tmp_path/"whole", **options)
    with pytest.raises(InterruptedError): fit(build(task, "gpt"), task, s, out=tmp_path/"cut", every=5, callbacks=[Plug(12)], **options)
    fit(build(task, "gpt"), task, s, out=tmp_path/"cut", resume=tmp_path/"cut"/"last.ckpt", **options)
    read = lambda name: pd.read_csv(tmp_path/name/"metrics.csv").set_index("step")
    whole, first, second = read("whole/version_0"), read("cut/version_0"), read("cut/version_1")
    assert list(second.index) == list(range(10, 18))
    pd.testing.assert_frame_equal(pd.concat([first.loc[:9], second]), whole, check_exact=True)


def killed(out):
    "The run of a process of its own; prints each update, and leaves its bits when it is let."
    task = Brackets(length=40, batch_size=3)
    class Tell(L.Callback):
        def on_train_batch_end(self, trainer, *_): print(trainer.global_step, flush=True)
    last = Path(out)/"last.ckpt"
    learner = fit(build(task, "lstm"), task, Schedule(1e-2, 60, 4), window=8, out=out, every=3, resume=last if last.exists() else None, callbacks=[Tell()])
    torch.save(dict(model=learner.model.state_dict(), losses=learner.losses), Path(out)/"end.pt")


def test_kill_9_in_mid_stream(tmp_path):
    def start(out): return subprocess.Popen([sys.executable, __file__, str(out)], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert start(tmp_path/"whole").wait(120) == 0
    rng = random.Random(0)
    moments = sorted(rng.sample(range(4, 55), 20 if LONG else 1))
    for moment in moments:
        run = start(tmp_path/"cut")
        for line in run.stdout:
            if int(line) >= moment: break
        time.sleep(rng.random()*.004)
        run.send_signal(signal.SIGKILL)
        assert run.wait(60) == -signal.SIGKILL
        assert torch.load(tmp_path/"cut"/"last.ckpt", weights_only=True)["learner"]["place"]
    assert start(tmp_path/"cut").wait(120) == 0
    whole, cut = (torch.load(tmp_path/name/"end.pt", weights_only=True) for name in ("whole","cut"))
    assert whole["losses"] == cut["losses"] and all(torch.equal(whole["model"][k], cut["model"][k]) for k in whole["model"])


if __name__ == "__main__": killed(sys.argv[1])
