"""Hopfield layers against a bare SDPA call with the same projections: L = 1024, 8 heads of width 64, 2 threads, forward without gradient.

Ours and the peers alternate in one process; medians of the repetitions. Asked: one update ≤ 1.15 × bare SDPA, four updates ≤ 4.5 × one.
Run: python benchmarks/hopfield.py [repetitions]; writes benchmarks/hopfield.csv.
"""
import csv, resource, statistics, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import machine
from memnotes.attention.hopfield import Hopfield

LENGTH, N_HEADS, D_HEAD, THREADS = 1024, 8, 64, 2


def bare(one):
    "The projections of a layer around one call."
    def run(x):
        q, k, v = (one.heads(f(x)) for f in (one.query, one.key, one.value))
        return one.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return run


def hflayers(one):
    "The original layer, where it is installed; it is not on PyPI."
    from hflayers import Hopfield as Original # type: ignore[import-not-found]
    layer = Original(input_size=N_HEADS*D_HEAD, num_heads=N_HEADS, hidden_size=D_HEAD, batch_first=True).eval()
    return lambda x: layer(x)


def clock(f, x):
    start = time.perf_counter()
    f(x)
    return 1e3*(time.perf_counter() - start)


@torch.no_grad()
def main(repetitions):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x, d = torch.randn(1, LENGTH, N_HEADS*D_HEAD), N_HEADS*D_HEAD
    one = Hopfield(d, N_HEADS).eval()
    layers = {n: Hopfield(d, N_HEADS, n_updates=n).eval() for n in (4,)}
    layers["sparsemax"] = Hopfield(d, N_HEADS, alpha=2.).eval()
    for layer in layers.values(): layer.load_state_dict(one.state_dict())
    arms, missing = {"bare SDPA": bare(one), "one update": one, "four updates": layers[4], "one update, sparsemax": layers["sparsemax"]}, {}
    try: arms["hflayers, one update"] = hflayers(one)
    except Exception as e: missing["hflayers, one update"] = f"not measured: {type(e).__name__}: {e}"
    assert (arms["bare SDPA"](x) - one(x)).abs().max() < 1e-5
    times = {name: [] for name in arms}
    for i in range(repetitions + 2):
        for name,f in arms.items():
            t = clock(f, x)
            if i > 1: times[name].append(t)
    ms = {name: statistics.median(t) for name,t in times.items()}
    base = {"four updates": "one update"}
    rows = [dict(arm=n, milliseconds=f"{m:.1f}", spread=f"{min(times[n]):.1f} to {max(times[n]):.1f}", against=base.get(n, "bare SDPA"), ratio=f"{m/ms[base.get(n, 'bare SDPA')]:.2f}",
        asked={"one update": "<= 1.15", "four updates": "<= 4.5"}.get(n, "")) for n,m in ms.items()]
    rows += [dict(arm=n, milliseconds="", spread=why, against="", ratio="", asked="") for n,why in missing.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    rows = [r | dict(repetitions=repetitions, process_peak_MiB=f"{peak:.0f}", machine=machine()) for r in rows]
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader(), out.writerows(rows)
    for r in rows: print(f"{r['arm']:24} {r['milliseconds']:>8} ms  {r['ratio']:>5} × {r['against']:12} {r['asked']:8} {r['spread']}")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
