"Real-time recurrent learning: the gradient of full BPTT for every cell and any window; memory that does not grow; runs that were killed end with the same bits."
import os, random, resource, signal, subprocess, sys, time, warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from memnotes.core.cells import CELLS, Cell, Recurrent
from memnotes.core.learner import Schedule, fit
from memnotes.core.sequence import Transformer, detach, nbytes
from memnotes.core.tasks import Brackets, CopyFirst
from memnotes.horizon.rtrl import RTRL, Fleet, RTRLLearner, bptt_gradient, carry, influence_step, marked_words, one_hot, recall, recall_loss, rtrl_gradient, stream

LONG = os.environ.get("LONG") == "1"
VOCAB = 7


def model(name, n_layers=1, seed=0, d=5, n=4, **kw):
    torch.manual_seed(seed)
    m = Recurrent(name, VOCAB, d, n_layers, n, **kw).double()
    with torch.no_grad():
        for p in m.parameters(): p.add_(.3*torch.randn_like(p))
    return m


def text(rows, t, seed=0):
    torch.manual_seed(seed)
    mask = torch.rand(rows, t) < .4
    mask[0,-1] = True
    return *torch.randint(VOCAB, (2, rows, t)).unbind(0), mask


def apart(g, ref): return max((g[k] - r).abs().max() for k,r in ref.items()).item()/max(r.abs().max() for r in ref.values()).item()


@settings(max_examples=120 if LONG else 24, deadline=None)
@given(name=st.sampled_from(sorted(CELLS)), t=st.integers(1, 40), window=st.one_of(st.sampled_from([1, 7, 64, None]), st.integers(1, 50)), rows=st.integers(1, 3), d=st.integers(2, 7), n=st.integers(1, 6),
    seed=st.integers(0, 99), channel=st.sampled_from([None, "mlp"]), tied=st.booleans())
def test_fast_is_bptt(name, t, window, rows, d, n, seed, channel, tied):
    m, (x, y, k) = model(name, seed=seed, d=d, n=n, channel=channel, tied=tied), text(rows, t, seed)
    g = rtrl_gradient(m, x, y, window or t, k)
    assert list(g) == [n for n,_ in m.named_parameters()]
    assert apart(g, bptt_gradient(m, x, y, k)) <= 1e-10


@settings(max_examples=60 if LONG else 8, deadline=None)
@given(name=st.sampled_from(sorted(CELLS)), layers=st.integers(1, 2), t=st.integers(1, 13), window=st.integers(1, 15), rows=st.integers(1, 2), n=st.integers(1, 5), seed=st.integers(0, 99))
def test_generic_is_bptt(name, layers, t, window, rows, n, seed):
    m, (x, y, k) = model(name, layers, seed, n=n), text(rows, t, seed)
    assert apart(rtrl_gradient(m, x, y, window, k, "generic"), bptt_gradient(m, x, y, k)) <= 1e-10


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_alone(name):
    torch.manual_seed(0)
    cell, x = CELLS[name](4, 5).double(), torch.randn(2, 23, 4, dtype=torch.float64)
    weight = torch.randn(2, 23, 4, dtype=torch.float64)
    ref = torch.autograd.grad((cell(x)[0]*weight).sum(), list(cell.parameters()))
    for path in "fast", "generic":
        rtrl, state, got = RTRL(cell, path), None, [torch.zeros_like(p) for p in cell.parameters()]
        for a in range(0, 23, 9):
            y, state = rtrl(x[:,a:a+9], state)
            for s,g in zip(got, torch.autograd.grad((y*weight[:,a:a+9]).sum(), list(cell.parameters()))): s += g
        assert max((a-b).abs().max()/b.abs().max().clamp(min=1e-9) for a,b in zip(got, ref)) <= 1e-10
    assert "run" not in vars(cell)


def test_stretched_and_tanh_mingru_and_frozen_embedding():
    m, (x, y, k) = one_hot(VOCAB, 30, stretch=.2).double(), text(2, 25)
    m.blocks[0].mixer.squash = True
    assert apart(rtrl_gradient(m, x, y, 4, k), bptt_gradient(m, x, y, k)) <= 1e-10
    assert "embed.weight" not in rtrl_gradient(m, x, y, 4, k)


def test_two_layers_kept_apart_are_not_exact_but_the_last_is():
    m, (x, y, k) = model("gru", 2), text(2, 24)
    assert not RTRL(m, "fast").exact and RTRL(m).exact and RTRL(m).path == "generic"
    g, ref = rtrl_gradient(m, x, y, 6, k, "fast"), bptt_gradient(m, x, y, k)
    assert apart(g, ref) > 1e-4
    last = {n: r for n,r in ref.items() if "blocks.1.mixer" in n}
    assert apart({n: g[n] for n in last}, last) <= 1e-10


def test_influence_is_a_row_each():
    m, (x, *_) = model("lstm"), text(3, 12)
    rtrl, alone = RTRL(m), RTRL(m)
    _, state = rtrl(x, None)
    _, one = alone(x[1:2], None)
    for P,Q in zip(rtrl.influence[0], alone.influence[0]): assert (P[1:2] - Q).abs().max() <= 1e-12


def test_influence_can_be_saved_and_set():
    m, (x, *_) = model("elstm"), text(2, 12)
    rtrl = RTRL(m)
    _, state = rtrl(x, None)
    other = RTRL(m)
    other.influence = rtrl.influence
    take = lambda r: torch.autograd.grad(r(x, detach(state))[0].sum(), m.embed.weight)[0]
    assert torch.equal(take(other), take(rtrl))


class Odd(Cell):
    "A cell of nobody's: d' = tanh(d W + x), with a carry between neighbours."
    def __init__(self, d, n=None):
        super().__init__(d, n)
        self.W = nn.Parameter(torch.randn(self.d_hidden, self.d_hidden)/2)
        self.U = nn.Linear(d, self.d_hidden)
    def step(self, x, d): return (d@self.W + self.U(x)).tanh() + .1*d.roll(1, -1)


def test_any_cell_goes_the_generic_way():
    torch.manual_seed(0)
    m, (x, y, k) = Recurrent(Odd, VOCAB, 4).double(), text(2, 9)
    assert apart(rtrl_gradient(m, x, y, 4, k), bptt_gradient(m, x, y, k)) <= 1e-10
    with pytest.raises(ValueError, match="Odd has no fast path .*generic"): rtrl_gradient(m, x, y, 4, k, "fast")


def test_bad_input():
    m, (x, y, k) = model("gru"), text(2, 9)
    for window in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="window: expected an integer of at least 1"): rtrl_gradient(m, x, y, window)
    with pytest.raises(ValueError, match="path: expected 'fast', 'generic'"): RTRL(m, "quick")
    with pytest.raises(ValueError, match="targets: expected the shape"): rtrl_gradient(m, x, y[:,1:], 3)
    with pytest.raises(ValueError, match="no target counts"): rtrl_gradient(m, x, y, 3, torch.zeros_like(k))
    rtrl = RTRL(m)
    _, state = rtrl(x)
    with pytest.raises(ValueError, match="expected batch 2"): rtrl(x[:1], tuple(s[:1] for s in state) if isinstance(state, tuple) else dict(blocks=(state["blocks"][0][:1],)))
    gpt = Transformer(VOCAB, 8, 1, 2)
    with pytest.raises(ValueError, match="has no fast path"): RTRL(gpt, "fast")
    with pytest.raises(TypeError, match="state of fixed size"): RTRL(gpt)(x)
    with pytest.raises(ValueError, match="window: expected at least 1; got None"): RTRLLearner(m, Brackets(length=20), Schedule(1e-2, 4), None)
    fleet = Fleet([one_hot(17, 50) for _ in range(2)])
    with pytest.raises(ValueError, match="rising powers of two"): recall(fleet, [0, 1], [100])
    with pytest.raises(ValueError, match="seeds: expected 2"): recall(fleet, [0], [16])
    with pytest.raises(ValueError, match="models: expected arms=2"): Fleet([one_hot(17, 50)], 2)
    with pytest.raises(ValueError, match="window: expected an integer of at least 1"): bptt_gradient(m, x, y, window=0)
    for gradient in (lambda k: rtrl_gradient(m, x, y, 3, k), lambda k: bptt_gradient(m, x, y, k)):
        with pytest.raises(ValueError, match="mask: expected the shape of tokens"): gradient(k[:,1:])
        with pytest.raises(ValueError, match="no target counts"): gradient(torch.zeros_like(k))
    for bad in (2.5, True, -1): # neither rounded nor taken for 1
        with pytest.raises(ValueError, match="window: expected an integer"): bptt_gradient(m, x, y, window=bad)
    with pytest.raises(ValueError, match="probe=-1"): RTRLLearner(m, Brackets(length=20), Schedule(1e-2, 4), 8, probe=-1)
    with pytest.raises(ValueError, match="every=0"): stream(m, Brackets(length=20), Schedule(1e-2, 4), 8, out=".", every=0)


def test_influence_step_by_hand():
    torch.manual_seed(0)
    cell = CELLS["rnn"](1, 1).double()
    x, d = torch.randn(1, 3, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    P, w = 0., cell.rnn.weight_hh_l0.item()
    for x_t in x.unbind(1):
        before, d = d.item(), cell.step(x_t, d).detach()
        P = (1 - d.item()**2)*(w*P + before)
    assert abs(influence_step(cell, x, cell.init_state(1))["rnn.weight_hh_l0"].item() - P) <= 1e-12


@pytest.mark.parametrize("name", ["mingru", "lru", "gru"])
def test_bytes_carried_do_not_grow(name):
    m, sizes = model(name).float(), []
    rtrl, state = RTRL(m), None
    for _ in range(40):
        _, state = rtrl(torch.randint(VOCAB, (2, 16)), detach(state))
        sizes.append(nbytes(rtrl.influence) + nbytes(state))
    assert len(set(sizes)) == 1


def peak_gib():
    "Peak memory of this process; where Linux tells it, without that of the parent, which getrusage counts until exec."
    status = Path("/proc/self/status")
    if status.exists(): return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**(30 if sys.platform == "darwin" else 20)


def million():
    "Peak memory of RTRL over a lag of 10^6, in a process of its own."
    lag, m, task = 10**6, one_hot(17, 10**6, words=8), CopyFirst(17, 10**6, batch_size=4)
    rtrl, state = RTRL(m), None
    for batch in task.windows(0, "train", 0, 0, 4096):
        logits, state = rtrl(batch["tokens"], state, keep=not batch["last"])
    loss = nn.functional.cross_entropy(logits[:,-1], batch["targets"][:,-1])
    g = torch.autograd.grad(loss, m.blocks[0].mixer.candidate.weight)[0][:,:8]
    print(g.abs().max().item(), peak_gib(), lag)


def test_a_lag_of_a_million_streams_in_less_than_a_gigabyte():
    out = subprocess.run([sys.executable, __file__, "million"], capture_output=True, text=True, check=True, env=os.environ | dict(OMP_NUM_THREADS="1")).stdout.split()
    assert float(out[0]) > 0 and float(out[1]) <= 1., out


def test_the_fleet_is_its_networks():
    tokens = torch.stack([CopyFirst(17, 100, batch_size=3).batch(s, "train", 0, 0)["tokens"] for s in range(2)])
    models = [one_hot(17, 100, e).double() for e in (0., 1e-3, 0., 1e-3)] # two arms of two seeds
    fleet, cut = Fleet(models, 2), torch.tensor([False, False, True, True])
    loss, _ = recall_loss(fleet, marked_words(range(2), 17, 100, 0, batch=3), cut, torch.zeros(4, dtype=torch.float64))
    g = torch.autograd.grad(loss.sum(), fleet.candidate)[0]
    for i,m in enumerate(models):
        x = tokens[i % 2]
        y, k = torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
        y[:,-1], k[:,-1] = x[:,0], True
        ref = bptt_gradient(m, x, y, k, 64 if i > 1 else None)["blocks.0.mixer.candidate.weight"]
        assert (g[i] - ref).abs().max() <= 1e-10*ref.abs().max()
        assert (g[i][:,:8] == 0).all() == (i > 1)


@pytest.mark.parametrize("lag,window", [(1, 4), (7, 8), (63, 64), (64, 64), (1000, 7), (10_000, 64)])
def test_marked_words_are_the_tasks_sequences_cut_from_the_end(lag, window):
    parts = list(marked_words((3, 5), 17, lag, 2, batch=2, window=window, split="test"))
    assert {p.shape[-1] for p in parts[1:]} <= {window} and 1 <= parts[0].shape[-1] <= window
    whole = torch.stack([CopyFirst(17, lag, batch_size=2).batch(s, "test", 0, 2)["tokens"] for s in (3, 5)])
    assert torch.equal(torch.cat(parts, -1), whole)


def test_write_cost_is_the_gates_by_autograd():
    tokens = CopyFirst(17, 20, batch_size=3).batch(0, "train", 0, 0)["tokens"][None]
    m = one_hot(17, 20).double()
    fleet = Fleet([m])
    with_, without = (recall_loss(fleet, tokens.split([5, 8, 8], -1), torch.tensor([False]), torch.tensor([c], dtype=torch.float64))[0] for c in (.02, 0.))
    z = m.blocks[0].mixer.gate(m.embed(tokens[0])).sigmoid()
    assert abs((with_ - without).item() - .02*z.mean(2).sum(1).mean().item()) <= 1e-12


def test_recall_is_what_the_model_says():
    torch.manual_seed(0)
    models = [one_hot(17, 16) for _ in range(4)]
    got = recall(Fleet(models, 2), [3, 5], [16, 32], 4)
    for i,m in enumerate(models):
        for j,lag in enumerate((16, 32)):
            x = CopyFirst(17, lag, batch_size=4).batch((3, 5)[i % 2], "test", 0, 0)["tokens"]
            right = 0
            for w in range(8):
                x[:,0] = w
                right += (m(x)[0][:,-1].argmax(-1) == w).sum().item()
            assert abs(got[i,j].item() - right/32) < 1e-6


def test_carry_keeps_nothing_of_the_past_where_truncated():
    a, b = torch.rand(1, 5, 2, dtype=torch.float64), torch.rand(1, 5, 2, dtype=torch.float64)
    tokens = torch.tensor([[[0, 1, 1, 2, 2, 2]]])
    _, P, word, used = carry(a, b, tokens.split(3, -1), torch.tensor([[False, True]]))
    assert word.tolist() == [[0]] and used.tolist() == [[1, 2, 3, 0, 0]]
    assert (P[:,0,0,:2,1] == 0).all() and (P[1,0,0,:2,0] > 0).all()


def quiet_stream(*args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stream(*args, **kw)


@pytest.mark.parametrize("cell", ["gru", "lru", "elstm"])
def test_updates_at_the_end_are_those_of_full_bptt(cell):
    task, plan = Brackets(length=20, batch_size=3), Schedule(1e-2, 4, kind="constant")
    def fresh():
        torch.manual_seed(0)
        return Recurrent(cell, task.vocab, 6).double()
    whole = fit(fresh(), task, plan)
    for window in (1, 7, 64):
        mine = quiet_stream(fresh(), task, plan, window, online=False)
        assert all((p - q).abs().max() <= 1e-9 for p,q in zip(mine.model.parameters(), whole.model.parameters()))
        assert max(abs(a - b) for a,b in zip(mine.losses, whole.losses)) <= 1e-9


def test_it_says_when_it_is_not_exact():
    task = Brackets(length=40, batch_size=3)
    with pytest.warns(UserWarning, match=r"not exact here: 2 recurrent layers.* % of the gradient is wrong"): stream(Recurrent("gru", task.vocab, 6, 2), task, Schedule(1e-2, 3), 8, path="fast", probe=0)
    with pytest.warns(UserWarning, match="online updates make the influence stale; after 3 windows"): learner = stream(Recurrent("gru", task.vocab, 6), task, Schedule(1e-2, 6), 8)
    assert 0 < learner.errors["online"] < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream(Recurrent("gru", task.vocab, 6), task, Schedule(1e-2, 2), 8, online=False).errors == {}


class Spoil(L.Callback):
    def __init__(self, update): self.update = update
    def on_train_batch_start(self, trainer, learner, *_):
        if trainer.global_step == self.update:
            with torch.no_grad(): learner.model.blocks[0].mixer.rnn.bias_hh_l0.fill_(float("nan"))


@pytest.mark.parametrize("online", [True, False])
def test_nan_in_the_stream_stops_with_the_step(online, tmp_path):
    task = Brackets(length=32, batch_size=3)
    with pytest.raises(FloatingPointError, match=r"not finite at update 5 \(step \d, position \d+ of the stream\)"):
        quiet_stream(Recurrent("gru", task.vocab, 6), task, Schedule(1e-2, 20), 8, online=online, out=tmp_path, every=2, callbacks=[Spoil(5)])
    kept = torch.load(tmp_path/"last.ckpt", weights_only=True)
    assert kept["global_step"] == 4 and all(p.isfinite().all() for p in kept["state_dict"].values())


class Shrinks(Brackets):
    def windows(self, *args, **kw):
        for i,w in enumerate(super().windows(*args, **kw)): yield {k: v[:2] if i and isinstance(v, torch.Tensor) else v for k,v in w.items()}


def test_a_batch_size_that_changes_in_mid_stream():
    task = Shrinks(length=32, batch_size=3)
    with pytest.raises(ValueError, match="mid-stream"): quiet_stream(Recurrent("gru", task.vocab, 6), task, Schedule(1e-2, 20), 8)


class Plug(L.Callback):
    def __init__(self, update): self.update = update
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.update: raise InterruptedError


@pytest.mark.parametrize("cell,online", [("mingru", True), ("gru", True), ("lru", True), ("lstm", False)])
def test_interrupted_is_uninterrupted(cell, online, tmp_path):
    task, plan = Brackets(length=40, batch_size=3), Schedule(1e-2, 12, 4)
    def fresh():
        torch.manual_seed(0)
        return Recurrent(cell, task.vocab, 6)
    whole = quiet_stream(fresh(), task, plan, 8, online=online)
    with pytest.raises(InterruptedError): quiet_stream(fresh(), task, plan, 8, online=online, out=tmp_path, every=3, callbacks=[Plug(9)])
    again = quiet_stream(fresh(), task, plan, 8, online=online, resume=tmp_path/"last.ckpt")
    assert again.losses == whole.losses and all(torch.equal(p, q) for p,q in zip(again.model.parameters(), whole.model.parameters()))


def killed(out):
    task = Brackets(length=40, batch_size=3)
    class Tell(L.Callback):
        def on_train_batch_end(self, trainer, *_): print(trainer.global_step, flush=True)
    torch.manual_seed(0)
    last = Path(out)/"last.ckpt"
    learner = quiet_stream(Recurrent("mingru", task.vocab, 8), task, Schedule(1e-2, 30, 4), 8, out=out, every=4, resume=last if last.exists() else None, callbacks=[Tell()])
    torch.save(dict(model=learner.model.state_dict(), losses=learner.losses), Path(out)/"end.pt")


def test_kill_9_in_mid_stream(tmp_path):
    def start(out): return subprocess.Popen([sys.executable, __file__, str(out)], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert start(tmp_path/"whole").wait(120) == 0
    rng = random.Random(0)
    run = start(tmp_path/"cut")
    moment = rng.randrange(8, 18) # five windows a sequence: checkpoints at 8, 12 and 16 lie inside one
    for line in run.stdout:
        if int(line) >= moment: break
    time.sleep(rng.random()*.004)
    run.send_signal(signal.SIGKILL)
    assert run.wait(60) == -signal.SIGKILL
    saved = torch.load(tmp_path/"cut"/"last.ckpt", weights_only=True)["learner"]
    held = saved["ranks"][0]["state"]
    assert saved["place"] and held["state"] is not None and held["influence"] is not None
    assert start(tmp_path/"cut").wait(120) == 0
    whole, cut = (torch.load(tmp_path/name/"end.pt", weights_only=True) for name in ("whole","cut"))
    assert whole["losses"] == cut["losses"] and all(torch.equal(whole["model"][k], cut["model"][k]) for k in whole["model"])


if __name__ == "__main__": million() if sys.argv[1] == "million" else killed(sys.argv[1])
