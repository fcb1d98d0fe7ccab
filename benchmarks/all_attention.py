"""Persistent vectors against the MLP they replace: seconds and peak memory of a block, forward + backward.

Run with `python benchmarks/all_attention.py`. Every round times all ways once, in turn, in one process; medians of 5 rounds, 2 threads.
x-transformers (`attn_num_mem_kv`, an optional peer) is recorded as "not measured" where it is not installed."""
import statistics, sys, time
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from bench import machine
from memnotes.core.sequence import Attention, Block, MLP
from memnotes.inside.all_attention import AllAttentionBlock, PersistentAttention, joint_attention

B, T, D, H, THREADS, ROUNDS = 2, 1024, 512, 8, 2, 5


class Concatenated(PersistentAttention):
    "The same layer by concatenation with a mask."
    def forward(self, x, state=None):
        found, state = self.inputs(x, state)
        return self.output(joint_attention(*found).transpose(1, 2).flatten(2)), state


class PlainConcatenation(PersistentAttention):
    "Concatenation at the heads' own width: both memories see the rotated query, so it is another function, and the cheapest concatenation."
    def forward(self, x, state=None):
        f, state = self.inputs(x, state)
        every = lambda m: m.expand(len(x), -1, -1, -1)
        seen = torch.nn.functional.pad(torch.ones(T, T, dtype=torch.bool).tril(), (0, f.memory_key.shape[1]), value=True)
        y = torch.nn.functional.scaled_dot_product_attention(f.query, torch.cat([f.key, every(f.memory_key)], 2), torch.cat([f.value, every(f.memory_value)], 2), seen)
        return self.output(y.transpose(1, 2).flatten(2)), state


def peer(n):
    from x_transformers.x_transformers import Attention as Theirs
    layer = Theirs(D, dim_head=D//H, heads=H, causal=True, num_mem_kv=n, flash=True)
    class Wrapped(torch.nn.Module):
        d_model = D
        def __init__(self): super().__init__(); self.layer = layer
        def forward(self, x, state=None): return self.layer(x)[0], state
    return Block(Wrapped())


WAYS = {
    "FFN block": lambda n: Block(Attention(D, H), MLP(D, n)),
    "persistent, merged": lambda n: AllAttentionBlock(D, H, n),
    "persistent, concatenated": lambda n: Block(Concatenated(D, H, n)),
    "persistent, concatenated at half the width": lambda n: Block(PlainConcatenation(D, H, n)),
    "x-transformers, num_mem_kv": peer,
}


def step(block):
    x = torch.randn(B, T, D, requires_grad=True)
    started = time.perf_counter()
    block(x)[0].sum().backward()
    return time.perf_counter() - started


def peak(block):
    "Largest sum of live bytes that the allocator reports within a step, above its start."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step(block)
    live = most = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]": live += event.nbytes(); most = max(most, live)
    return most/2**20


def main():
    torch.set_num_threads(THREADS)
    rows = []
    for n in (1024, 2048):
        torch.manual_seed(0)
        blocks, errors = {}, {}
        for way,make in WAYS.items():
            try: blocks[way] = make(n); step(blocks[way])
            except (ImportError, TypeError) as error: errors[way] = f"not measured: {type(error).__name__}: {error}"
        took = {way: [] for way in blocks}
        for _ in range(ROUNDS):
            for way,block in blocks.items(): took[way].append(step(block))
        base = took["FFN block"]
        for way in WAYS:
            row = dict(n=n, way=way, seconds=None, ratio=None, low=None, high=None, peak_mib=None, note=errors.get(way, ""), machine=machine())
            if way in blocks:
                ratios = sorted(a/b for a,b in zip(took[way], base)) # of neighbours in time
                row |= dict(seconds=round(statistics.median(took[way]), 4), ratio=round(statistics.median(ratios), 3), low=round(ratios[1], 3), high=round(ratios[-2], 3), peak_mib=round(peak(blocks[way])))
            rows.append(row)
            print(f"N = {n:4d}  {way:43s}", f"{row['seconds']:.3f} s  {row['ratio']:.2f} of the FFN block [{row['low']:.2f}, {row['high']:.2f}]  {row['peak_mib']} MiB" if way in blocks else row["note"], flush=True)
        pd.DataFrame(rows).to_csv(Path(__file__).with_suffix(".csv"), index=False)


if __name__ == "__main__": sys.exit(main())
