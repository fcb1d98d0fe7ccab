"""The logit lens against the two usual ways of computing it: time alternately in one process, peak memory in a process each.

    python benchmarks/lens.py            writes benchmarks/lens.csv

13 layers x 256 positions x 768, vocabulary 50,257, float32; KL, entropy, top-1, rank and cross-entropy of each layer. `materialised` keeps the logits of all
layers, as TransformerLens and nnsight examples do; `argsorted` is tuned-lens' trajectory (numpy, two argsorts for the rank). The lens' answers are held to float64.
"""
import subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from bench import alternately, machine, peak_mib
from memnotes.inside.lens import LogitLens
from memnotes.inside.stream import Residuals

LAYERS, T, D, V = 13, 256, 768, 50257
FIVE = ("kl", "entropy", "top1", "rank", "ce")

class Head(nn.Module):
    "What a lens needs of a model: its final norm and its head."
    def __init__(self):
        super().__init__()
        self.blocks, self.norm, self.head = nn.ModuleList([nn.Identity()]*(LAYERS - 1)), nn.LayerNorm(D, bias=False), nn.Linear(D, V, bias=False)

def given():
    "A head, and residuals that approach the last layer's."
    torch.manual_seed(0)
    model = Head().requires_grad_(False)
    model.head.weight.normal_(std=.1)
    last, tokens = torch.randn(1, T, D), torch.randint(V, (1, T))
    stream = torch.stack([last*l/(LAYERS - 1) + torch.randn(1, T, D)*(1 - l/(LAYERS - 1)) for l in range(LAYERS)])
    return model, Residuals(list(range(LAYERS)), stream, last, tokens, {})

def ours(model, res): return LogitLens(model).measure(res, measures=FIVE)

@torch.no_grad()
def materialised(model, res):
    "Logits of all layers at once."
    logp = model.head(model.norm(res.stream[:,0])).log_softmax(-1)
    p, target = logp.exp(), res.tokens[0].roll(-1)
    kl = (p[-1]*(logp[-1] - logp)).sum(-1)
    at = logp.gather(-1, target.expand(LAYERS, T)[...,None])
    return dict(kl=kl, entropy=-(p*logp).sum(-1), top1=logp.argmax(-1), rank=1 + (logp > at).sum(-1), ce=-at[...,0])

@torch.no_grad()
def argsorted(model, res):
    "The same in numpy, ranks by two argsorts."
    logp = model.head(model.norm(res.stream[:,0])).log_softmax(-1).numpy()
    p, target = np.exp(logp), res.tokens[0].roll(-1).numpy()
    rank = np.argsort(np.argsort(-logp, -1), -1)
    at = (np.arange(LAYERS)[:,None], np.arange(T), target[None])
    return dict(kl=(p[-1]*(logp[-1] - logp)).sum(-1), entropy=-(p*logp).sum(-1), top1=logp.argmax(-1), rank=1 + rank[at], ce=-logp[at])

WAYS = dict(ours=ours, materialised=materialised, argsorted=argsorted)

def error(model, res):
    "Largest difference of the lens from float64, in nats, over KL, entropy and cross-entropy."
    got, worst = ours(model, res), 0.
    wide = Head().double()
    wide.load_state_dict({n: p.double() for n,p in model.state_dict().items()})
    with torch.no_grad():
        p = wide.head(wide.norm(res.last[0].double())).log_softmax(-1)
        for i,h in enumerate(res.stream[:,0].double()):
            q = wide.head(wide.norm(h)).log_softmax(-1)
            want = dict(kl=(p.exp()*(p - q)).sum(-1), entropy=-(q.exp()*q).sum(-1))
            worst = max(worst, *((getattr(got, n)[i,0] - v).abs().max().item() for n,v in want.items()))
            worst = max(worst, (got.ce[i,0,:-1] + q[:-1].gather(-1, res.tokens[0,1:,None])[:,0]).abs().max().item())
    return worst

def main():
    if len(sys.argv) > 1:
        model, res = given()
        print(peak_mib(lambda: WAYS[sys.argv[1]](model, res)))
        return
    torch.set_num_threads(2)
    memory = {w: float(subprocess.run([sys.executable, __file__, w], capture_output=True, text=True, check=True).stdout) for w in WAYS}
    model, res = given()
    seconds = alternately({w: lambda f=f: f(model, res) for w,f in WAYS.items()}, 5)
    rows = [dict(way=w, extra_peak_mib=round(memory[w]), seconds=s, time_ratio=s/seconds["ours"], memory_ratio=memory[w]/memory["ours"],
                 error_nats=error(model, res) if w == "ours" else None) for w,s in seconds.items()]
    rows += [dict(way=peer, note="not measured: needs an environment of its own (pip install " + peer + ")") for peer in ("transformer-lens", "tuned-lens")]
    table = pd.DataFrame(rows).assign(machine=machine())
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")
    print(table.drop(columns="machine").to_string(index=False))

if __name__ == "__main__": main()
