"""The chain of a language model as one tree walk through its state, against feeding every context from its beginning, one by one and in batches.

python benchmarks/markov.py prints the table and writes benchmarks/markov.csv; peer and ours alternate in one process.
"""
from pathlib import Path

import numpy as np, pandas as pd, torch

from bench import alternately, machine
from memnotes.attention.chain import n_states, next_token, states, transition_matrix
from memnotes.core.sequence import Transformer

REPETITIONS, SIZES = 5, [(4, 4), (4, 5), (8, 3)]


def one_by_one(model, vocab, context):
    "A Python loop over states."
    return torch.cat([next_token(model(s[s >= 0][None])[0][:,-1]) for s in states(vocab, context)])

def in_batches(model, vocab, context, batch=4096):
    "Contexts of one length side by side, each from its beginning."
    every, start, out = states(vocab, context), 0, []
    for l in range(1, context+1):
        rows = every[start:start + vocab**l, context-l:]
        out += [next_token(model(part)[0][:,-1]) for part in rows.split(batch)]
        start += vocab**l
    return torch.cat(out)

@torch.no_grad()
def main():
    torch.set_num_threads(2)
    rows = []
    for vocab,context in SIZES:
        torch.manual_seed(0)
        model = Transformer(vocab, 32, 2, 4).eval()
        ours = lambda: transition_matrix(model, vocab, context)
        peers = {"Python loop over states": lambda: one_by_one(model, vocab, context), "batches by length": lambda: in_batches(model, vocab, context)}
        P = ours()
        for name,peer in peers.items():
            assert np.abs(P.data.reshape(-1, vocab) - peer().numpy()).max() < 1e-5
            mid = alternately({"peer": peer, "ours": ours}, REPETITIONS, warm=0)
            n = n_states(vocab, context)
            rows.append(dict(vocab=vocab, context=context, states=n, peer=name, ours_s=round(mid["ours"], 4), peer_s=round(mid["peer"], 4),
                             ours_states_per_s=round(n/mid["ours"]), ratio=round(mid["peer"]/mid["ours"], 2), repetitions=REPETITIONS, machine=machine()))
    table = pd.DataFrame(rows)
    print(table.drop(columns="machine").to_string(index=False))
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, lineterminator="\n")

if __name__ == "__main__": main()
