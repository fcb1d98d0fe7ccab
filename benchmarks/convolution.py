"""Gaussian attention over pixels, rows times columns, against the same with one weight for each pair of pixels, and against the convolution it can compute.

    python benchmarks/convolution.py          # writes benchmarks/convolution.csv
"""
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from bench import alternately, machine, peak_mib
from memnotes.attention.convolution import RelativeAttention2d, conv_as_attention

THREADS, REPEATS = 2, 5
IMAGE, BATCH = 32, 16


class Explicit(nn.Module):
    "Weights between all pairs of pixels by an explicit softmax over (HW)^2 scores, as Gaussian attention is usually written."
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        at = torch.cartesian_prod(torch.arange(IMAGE), torch.arange(IMAGE)).float()
        self.register_buffer("delta", at[None] - at[:,None])

    def forward(self, x):
        a = (-self.layer.alpha[:,None,None]*(self.delta - self.layer.centre[:,None,None]).square().sum(-1)).softmax(-1)
        y = torch.einsum("ohc,hbcn->bon", self.layer.weight, torch.einsum("hnm,bcm->hbcn", a, x.flatten(2)))
        return (y + self.layer.bias[:,None]).unflatten(-1, (IMAGE, IMAGE))


class Dense(nn.Module):
    "`RelativeAttention2d.dense`: scaled_dot_product_attention over three more features."
    def __init__(self, layer): super().__init__(); self.layer = layer
    def forward(self, x): return self.layer.dense(x)


def arms(channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
    layer = conv_as_attention(conv, 9.)
    pixels = RelativeAttention2d(channels, channels)
    pixels.load_state_dict(layer.state_dict())
    return {"rows x columns (ours)": pixels, "explicit, all pairs": Explicit(pixels), "SDPA, all pairs": Dense(pixels), "nn.Conv2d": conv}


def step(module, x):
    y = module(x)
    y.square().mean().backward()
    return y.detach()


def seconds(channels):
    "Medians, the arms taking turns; all must say the same."
    x, modules = torch.randn(BATCH, channels, IMAGE, IMAGE), arms(channels)
    first = {name: step(m, x) for name,m in modules.items()}
    apart = {name: ((y - first["nn.Conv2d"]).abs().max()/first["nn.Conv2d"].abs().max()).item() for name,y in first.items()}
    assert max(apart.values()) < .02, apart
    return alternately({name: lambda m=m: step(m, x) for name,m in modules.items()}, REPEATS, warm=0)


def peak(name, channels):
    "Peak memory of one step above what was there before it, MiB: called in a process of its own."
    module, x = arms(channels)[name], torch.randn(BATCH, channels, IMAGE, IMAGE)
    return peak_mib(lambda: step(module, x))


def main():
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1: return print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
    rows = []
    for channels in (16, 64):
        took = seconds(channels)
        for name,s in took.items():
            mb = json.loads(subprocess.run([sys.executable, __file__, name, str(channels)], capture_output=True, text=True, check=True).stdout)
            rows.append(dict(what=name, image=IMAGE, batch=BATCH, heads=9, channels=channels, seconds=round(s, 4), times_ours=round(s/took["rows x columns (ours)"], 2), peak_mib=round(mb), error=""))
    rows.append(dict(what="attention-cnn (Cordonnier et al. 2020)", image=IMAGE, batch=BATCH, heads=9, error="not measured: in no package index"))
    table = pd.DataFrame(rows).assign(machine=machine())
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, lineterminator="\n")
    print(table.drop(columns="machine").to_string(index=False), machine(), sep="\n")


if __name__ == "__main__": main()
