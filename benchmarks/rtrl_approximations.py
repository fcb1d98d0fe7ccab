"""Approximations of RTRL: seconds and bytes a step, a dense tanh network of n units, 32 tokens, 4 rows, float32.

Run with `python benchmarks/rtrl_approximations.py`. Every round times all methods once, in turn, in one process; medians of 5 rounds, 2 threads.
A pass reads 32 steps with a loss at each, so that a step includes its share of the forward pass and of reading the gradient. BPTT is automatic differentiation
of the same pass. Bytes are those of the influence that is carried, counted; BPTT keeps its states, 32 of them here and more with every step."""
from pathlib import Path

import pandas as pd
import torch

from bench import alternately, machine
from memnotes.core.cells import RNN, Recurrent
from memnotes.core.learner import nats
from memnotes.horizon.rtrl_approximations import approximate_gradient, carried_numbers

VOCAB, ROWS, STEPS = 32, 4, 32
METHODS = ["SnAp-1", "e-prop", "RFLO", "UORO", "KF-RTRL", "OK-1", "OK-2", "RTRL", "SnAp-2"]


def main():
    torch.set_num_threads(2)
    rows = []
    for n in (32, 64, 128):
        torch.manual_seed(0)
        model = Recurrent(RNN, VOCAB, 32, d_hidden=n, tied=False)
        x, y = (torch.randint(0, VOCAB, (ROWS, STEPS)) for _ in range(2))
        def bptt(model=model, x=x, y=y):
            loss = nats(model(x)[0], y, torch.ones_like(x, dtype=torch.bool)).mean()
            torch.autograd.grad(loss, list(model.parameters()))
        chosen = METHODS if n <= 64 else [m for m in METHODS if m != "RTRL"] # `Exact` is written to be read; SnAp-2 of a dense network is the same gradient
        ways = {"BPTT": bptt} | {m: lambda m=m, model=model, x=x, y=y: approximate_gradient(model, x, y, 16, method=m) for m in chosen}
        took = alternately(ways, repeats=5 if n <= 64 else 3)
        for name, seconds in took.items():
            carried = STEPS*n if name == "BPTT" else carried_numbers(model, name)[0]
            rows.append(dict(method=name, n=n, us_per_step=round(1e6*seconds/STEPS, 1), times_bptt=round(seconds/took["BPTT"], 2), carried_bytes_per_row=4*carried, machine=machine()))
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__": main()
