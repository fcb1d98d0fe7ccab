"""The bank against KNNMemory of memorizing-transformers-pytorch: writes and reads at 512 … 65,536 keys, and who returns the right rows after capacity.

8 rows, width 64, 32 neighbours, 512 queries a row; alternating in one process, medians of 5. Asked: reads ≥ 2 × faster at every size to 6,144 keys, at exact
recall; write ≤ 5 µs a token. Peer: pip install --no-deps memorizing-transformers-pytorch faiss-cpu einops einops-exts joblib filelock.
Run: python benchmarks/bank.py [threads]; writes benchmarks/bank.csv.
"""
import csv, sys, tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import alternately, machine
from memnotes.memory.store import MemoryBank

ROWS, D, K, QUERIES = 8, 64, 32, 512
SIZES = 512, 2048, 6144, 16384, 65536


def unit(*shape): return F.normalize(torch.randn(*shape), dim=-1)


def peer(size, folder, rows=ROWS):
    from memorizing_transformers_pytorch.knn_memory import KNNMemory # type: ignore[import-not-found]
    return KNNMemory(dim=D, max_memories=size, num_indices=rows, memmap_filename=str(Path(folder)/f"memory-{size}.memmap"))


def self_recall(write, read, rounds=6, n=512):
    "Share of just-written keys that come back, write by write, in a store for 1200."
    out = []
    for _ in range(rounds):
        keys = unit(1, n, D)
        write(keys)
        out.append(f"{(read(keys) - keys).abs().amax(-1).lt(1e-5).float().mean().item():.2f}")
    return " ".join(out)


@torch.no_grad()
def main(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    for size in SIZES:
        keys, queries, new = unit(ROWS, size, D), unit(ROWS, QUERIES, D), unit(ROWS, 128, D)
        bank = MemoryBank(D, D, size, ROWS)
        bank.write(keys, keys)
        ways = {"bank read": lambda: bank.read(queries, K)}
        with tempfile.TemporaryDirectory() as folder:
            try:
                theirs = peer(size, folder)
                theirs.add(torch.stack([keys, keys], 2))
                if size <= 6144: ways["KNNMemory read"] = lambda: theirs.search(queries, K)
                failed = "" if size <= 6144 else "not run at this size"
            except Exception as e: failed = f"{type(e).__name__}: {e}"
            took = alternately(ways)
        took["bank write"] = alternately({"bank write": lambda: bank.write(new, new)})["bank write"]
        for name,per in (("bank read", ROWS*QUERIES), ("KNNMemory read", ROWS*QUERIES), ("bank write", ROWS*128)):
            got = took.get(name)
            rows.append(dict(keys=size, what=name, microseconds="not measured" if got is None else f"{1e6*got/per:.2f}", per="query" if "read" in name else "token and row",
                ratio=f"{got/took['bank read']:.2f}" if got and name == "KNNMemory read" else "", note=failed if got is None else ""))
    bank = MemoryBank(D, D, 1200)
    rows.append(dict(keys=1200, what="bank, share of own rows after each write of 512", microseconds="", per="", ratio="",
        note=self_recall(lambda k: bank.write(k, k), lambda k: bank.read(k, 1).values[:,:,0])))
    with tempfile.TemporaryDirectory() as folder:
        try:
            one = peer(1200, folder, 1)
            note = self_recall(lambda k: one.add(torch.stack([k, k], 2)), lambda k: one.search(k, 1)[0][:,:,0,1])
        except Exception as e: note = f"not measured: {type(e).__name__}: {e}"
    rows.append(dict(keys=1200, what="KNNMemory, share of own rows after each write of 512", microseconds="", per="", ratio="", note=note))
    for r in rows: r["machine"] = machine()
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    for r in rows: print(*(r[c] for c in ("keys", "what", "microseconds", "per", "ratio", "note")), sep="\t")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
