"Two processes on a CPU: other data on each, one gradient, equal parameters, and a resume to the same bits."
import os, subprocess, sys

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from memnotes.core.learner import Schedule, fit
from memnotes.core.sequence import Transformer
from memnotes.core.tasks import Copy, CopyFirst

TASKS = dict(even=lambda: CopyFirst(vocab=9, lag=11, batch_size=4), uneven=lambda: Copy(vocab=6, payload=(1, 9), delay=2, batch_size=2))
STEPS = 9


def build(task):
    torch.manual_seed(0)
    return Transformer(task.vocab, 16, 1, 2, dropout=.2)


class Watch(L.Callback):
    "Keeps the tokens and the gradient of the first update, unclipped."
    def on_train_start(self, *_): self.tokens, self.gradient = [], None
    def on_train_batch_start(self, trainer, module, batch, i): self.tokens.append(batch["tokens"].clone())
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.gradient is None: self.gradient = {n: p.grad.clone() for n,p in module.model.named_parameters()}


def worker(out):
    "Runs in both processes."
    rank, found = int(os.environ.get("LOCAL_RANK", 0)), {}
    ddp = dict(devices=2, strategy="ddp", accelerator="cpu")
    for name,make in TASKS.items():
        for window in None, 4:
            task, watch = make(), Watch()
            model = build(task)
            if window is None: model.apply(lambda m: setattr(m, "p", 0.) if isinstance(m, torch.nn.Dropout) else None)
            learner = fit(model, task, Schedule(1e-2, STEPS, 3), window=window, clip=.5, callbacks=[watch], validate=4, **ddp)
            found[f"{name} {window}"] = dict(tokens=watch.tokens, gradient=watch.gradient, losses=learner.losses, scores=learner.scores, model=model.state_dict())
    task = TASKS["uneven"]()
    fit(build(task), task, Schedule(1e-2, STEPS, 3), window=4, clip=.5, out=f"{out}/cut", every=5, max_steps=7, **ddp)
    learner = fit(build(task), task, Schedule(1e-2, STEPS, 3), window=4, clip=.5, resume=f"{out}/cut/last.ckpt", **ddp)
    found["resumed"] = dict(losses=learner.losses, model=learner.model.state_dict())
    torch.save(found, f"{out}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    clean = {k: v for k,v in os.environ.items() if k not in ("LOCAL_RANK","NODE_RANK","WORLD_SIZE","MASTER_ADDR","MASTER_PORT")}
    run = subprocess.run([sys.executable, __file__, str(out)], env=clean | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(out/f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [f"{name} {window}" for name in TASKS for window in (None, 4)])
def test_other_data_equal_parameters(found, case):
    a, b = (f[case] for f in found)
    assert len(a["tokens"]) == len(b["tokens"]) and not any(torch.equal(x, y) for x,y in zip(a["tokens"], b["tokens"]) if x.unique().numel() > 1 and y.unique().numel() > 1)
    assert len(a["losses"]) == STEPS and a["losses"] == b["losses"] and a["scores"] == b["scores"]
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(torch.equal(a["gradient"][k], b["gradient"][k]) for k in a["gradient"])


def alone(name):
    "Gradients and target counts of the first batch of each rank, without processes."
    task, out = TASKS[name](), []
    model = build(task).eval()
    for rank in range(2):
        batch = task.batch(0, "train", rank, 0)
        model.zero_grad()
        F.cross_entropy(model(batch["tokens"])[0][batch["mask"]], batch["targets"][batch["mask"]]).backward()
        out.append(({n: p.grad.clone() for n,p in model.named_parameters()}, batch["mask"].sum().item()))
    return out


@pytest.mark.parametrize("name", TASKS)
def test_gradient_is_the_mean_over_the_targets_of_all_ranks(found, name):
    (a, n), (b, m) = alone(name)
    assert (n == m) == (name == "even")
    for k,g in found[0][f"{name} None"]["gradient"].items():
        torch.testing.assert_close(g, (n*a[k] + m*b[k])/(n+m), rtol=0, atol=1e-6)
        if n == m: torch.testing.assert_close(g, (a[k] + b[k])/2, rtol=0, atol=1e-6)


def test_resumed_equals_uninterrupted(found):
    for f in found:
        assert f["resumed"]["losses"] == f["uneven 4"]["losses"]
        assert all(torch.equal(v, f["uneven 4"]["model"][k]) for k,v in f["resumed"]["model"].items())


if __name__ == "__main__": worker(sys.argv[1])
