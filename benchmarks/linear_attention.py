"""Causal linear attention against fused softmax attention: 8 heads of width 64, batch 1, one thread unless another number is given.

Ours and SDPA alternate in one process; medians of the repetitions. Asked, in multiples of SDPA's time: elu + 1 at most 0.8 at T = 1024 and at most 1/6 at
16,384; the delta rule at most 1.3 and at most 1/5; Taylor-2 (keys of 16, as its paper uses, and of 64) without a target.
Run: python benchmarks/linear_attention.py [threads]; writes benchmarks/linear_attention.csv.
"""
import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from bench import alternately, machine
from memnotes.horizon.forms import chunked, delta_chunked, elu1, taylor2

HEADS, WIDTH = 8, 64
ASKED = {("elu + 1", 1024): .8, ("elu + 1", 16384): 1/6, ("delta rule", 1024): 1.3, ("delta rule", 16384): .2}


def normalised(phi):
    "Linear attention from raw queries, keys and values."
    def run(q, k, v, beta):
        q, k, v = phi(q), phi(k), F.pad(v, (0, 1), value=1.)
        y = chunked(q, k, v, q.new_zeros(1, HEADS, q.shape[-1], v.shape[-1]))[0]
        return y[...,:-1]/y[...,-1:]
    return run


def delta(q, k, v, beta):
    q, k = (F.normalize(F.silu(x), dim=-1) for x in (q, k))
    return delta_chunked(q, k, v, v.new_zeros(1, HEADS, WIDTH, WIDTH), beta)[0]


def softmax(q, k, v, beta): return F.scaled_dot_product_attention(q, k, v, is_causal=True)


RULES = {"softmax (SDPA)": (softmax, WIDTH), "elu + 1": (normalised(elu1), WIDTH), "delta rule": (delta, WIDTH),
         "Taylor-2, keys of 16": (normalised(taylor2), 16), "Taylor-2, keys of 64": (normalised(taylor2), WIDTH)}


def arm(rule, t, backward):
    f, width = RULES[rule]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, t, n, requires_grad=backward) for n in (width, width, WIDTH))
    beta = torch.rand(1, HEADS, t, 1, requires_grad=backward)
    def step():
        if not backward: return f(q, k, v, beta)
        f(q, k, v, beta).sum().backward()
        for x in (q, k, v, beta): x.grad = None
    return step


def main(threads=1):
    torch.set_num_threads(threads)
    rows = []
    for t in (1024, 16384):
        for backward in (False, True) if t == 1024 else (True,):
            rules = [r for r in RULES if not (t == 16384 and r == "Taylor-2, keys of 64")] # its features alone take 1.1 GB, their gradients and chunks several times that
            took = alternately({r: arm(r, t, backward) for r in rules}, 9 if t == 1024 else 5, warm=int(t == 1024))
            for r,s in took.items():
                rows.append(dict(rule=r, T=t, passes="forward + backward" if backward else "forward", milliseconds=round(1e3*s, 1), times_sdpa=round(s/took["softmax (SDPA)"], 3),
                                 faster=round(took["softmax (SDPA)"]/s, 2), asked=round(ASKED[r, t], 3) if backward and (r, t) in ASKED else ""))
    table = pd.DataFrame(rows).assign(machine=machine())
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, lineterminator="\n")
    print(table.drop(columns="machine").to_string(index=False), machine(), sep="\n")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
