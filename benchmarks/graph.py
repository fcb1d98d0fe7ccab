"""Attention along edges against torch-geometric's TransformerConv and SDPA under a Boolean mask, on four graphs.

Run: python benchmarks/graph.py. Ours and each peer alternate in one process; medians of the repetitions; writes benchmarks/graph.csv, with the machine's load average beside each row.
TransformerConv is timed whole, its three linear maps included; ours is timed with the same maps. SDPA and ours are compared without maps.
"""
import argparse
import os
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from bench import machine
from memnotes.attention.graph import band_graph, causal_graph, complete_graph, edge_attention, edges_to_mask, random_graph

H, D = 8, 64 # heads, width of each


def seconds(run):
    t = time.perf_counter()
    run()
    return time.perf_counter() - t


def backward(f, *leaves):
    def run():
        torch.autograd.grad(f().sum(), leaves)
    return run


def compare(ours, peer, repetitions):
    "Median milliseconds of both, taken in turns after one warm-up, and the median ratio of neighbours in time."
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repetitions)]
    a, b = (statistics.median(x) for x in zip(*pairs))
    return dict(ours_ms=1e3*a, peer_ms=1e3*b, ratio=b/a, ratio_of_pairs=statistics.median(p/o for o,p in pairs))


def against_pyg(edges, n, repetitions, width):
    from torch_geometric.nn import TransformerConv
    torch.manual_seed(0)
    conv, x = TransformerConv(H*width, width, heads=H, root_weight=False), torch.randn(n, H*width)
    split = lambda y: y.view(n, H, width).transpose(0, 1)
    ours = lambda: edge_attention(split(conv.lin_query(x)), split(conv.lin_key(x)), split(conv.lin_value(x)), edges).transpose(0, 1).reshape(n, -1)
    with torch.no_grad():
        y, ref = ours(), conv(x, edges)
        assert (y - ref).abs().max() <= 1e-5*ref.abs().max()
        yield "forward", compare(ours, lambda: conv(x, edges), repetitions)
    if width*edges.shape[1] > 2**24: return # backwards the peer holds many gigabytes on graphs like these
    leaves = [p for m in (conv.lin_query, conv.lin_key, conv.lin_value) for p in m.parameters()]
    yield "forward + backward", compare(backward(ours, *leaves), backward(lambda: conv(x, edges), *leaves), repetitions)


def against_sdpa(edges, n, repetitions):
    q, k, v = torch.randn(3, H, n, D, generator=torch.Generator().manual_seed(0))
    mask = edges_to_mask(edges, n)
    ours, peer = lambda: edge_attention(q, k, v, edges), lambda: F.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
    with torch.no_grad():
        assert (ours() - peer()).abs().max() <= 1e-5
        yield "forward", compare(ours, peer, repetitions)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    yield "forward + backward", compare(backward(ours, *leaves), backward(peer, *leaves), repetitions)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peer", default="", help="SDPA or TransformerConv; empty: both")
    parser.add_argument("--graph", default="", help="complete, causal, band or random; empty: all")
    parser.add_argument("--width", type=int, default=0, help="of a head, against TransformerConv; 0: 8 and 64")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g, where, path = torch.Generator().manual_seed(0), machine(), Path(__file__).with_suffix(".csv")
    def add(graph, n, edges, peer, passed, numbers):
        "Write the row at once, in place of an older one: the last comparisons take minutes."
        row = dict(graph=graph, n=n, edges=edges.shape[1], peer=peer, passed=passed, **numbers, repetitions=args.repetitions, machine=where, load=f"{os.getloadavg()[0]:.0f}")
        old = pd.read_csv(path) if path.exists() else pd.DataFrame()
        if len(old): old = old[~((old.graph == graph) & (old.n == n) & (old.peer == peer) & (old.passed == passed))]
        pd.concat([old, pd.DataFrame([row])]).sort_values(["peer", "n", "graph", "passed"]).to_csv(path, index=False, float_format="%.4g")
        print({k: round(v, 2) if isinstance(v, float) else v for k,v in row.items() if k != "machine"}, flush=True)
    n = 1024
    four = {"complete": complete_graph(n), "causal": causal_graph(n), "band 32": band_graph(n, 32), "random 32": random_graph(n, 32, g)}
    larger = [("band 32", 2048, band_graph(2048, 32)), ("band 32", 4096, band_graph(4096, 32)), ("random 32", 4096, random_graph(4096, 32, g))]
    if args.peer in ("", "SDPA"):
        for name,m,e in [(name, n, e) for name,e in four.items()] + larger:
            if not name.startswith(args.graph): continue
            for passed,numbers in against_sdpa(e, m, args.repetitions): add(name, m, e, f"SDPA, Boolean mask, {H} heads of {D}", passed, numbers)
    if args.peer in ("", "TransformerConv"):
        for name,e in reversed(four.items()): # the slowest last
            if not name.startswith(args.graph): continue
            for width in (args.width,) if args.width else (D//H, D):
                peer = f"TransformerConv, {H} heads of {width}"
                try:
                    for passed,numbers in against_pyg(e, n, args.repetitions, width): add(name, n, e, peer, passed, numbers)
                except ImportError as error: add(name, n, e, peer, "forward", dict(note=f"not measured: {error}"))


if __name__ == "__main__": main()
