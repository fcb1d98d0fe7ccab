"""Chunked exact RTRL against a step-by-step implementation and against backpropagation, one process, alternating; medians of the repetitions.

Element-wise: minGRU and eLSTM, batch 32, width 128, 512 units, 256 steps, windows of 64, a loss at every step. Asked: ≥ 8 × faster than one step at a time,
≤ 2 × a hand-written full BPTT, ≤ .8 × autograd through the same scan. Dense: tanh RNN, 128 units, batch 1, 256 steps in blocks of 128, so that the second block carries the first one's influence. Asked: ≥ 10 × faster than the textbook step.
The scan of `core.cells` has a backward pass of its own; "op by op" is autograd through the same recurrence written in plain operations, in chunks.
The .8 is out of reach here: backpropagation makes two matrix products of batch × steps × width × 2 units, one forward and one for the gradient, and exact RTRL makes a third one, of the same size, for the influence
that the next window needs. By hand backpropagation takes .77 of the time of autograd through the scan, so three products for two would be 1.15 × autograd if all else were free.
Run: python benchmarks/rtrl.py [repetitions]; writes benchmarks/rtrl.csv.
"""
import csv, sys
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import alternately, machine
from memnotes.core.cells import ELSTM, RNN, MinGRU, loop_scan, parallel_scan
from memnotes.core.sequence import detach
from memnotes.horizon.exact import RTRL

B, D, N, T, K, THREADS = 32, 128, 512, 256, 64, 2


def chunked(cell, x, q, window, goes_on=False):
    "Ours: gradient of Σ q·d over all steps; where the stream goes on, the influence is carried from the last window too."
    weights = [p for name,p in cell.named_parameters() if name.split(".")[0] not in ("output", "gate_cell") and not (isinstance(cell, ELSTM) and name.startswith("gate."))]
    part, state, total = RTRL(cell).parts[0], cell.init_state(len(x)), [torch.zeros_like(p) for p in weights]
    for a in range(0, x.shape[1], window):
        states, state = part(x[:,a:a+window], detach(state), keep=goes_on or a+window < x.shape[1])
        for t,g in zip(total, torch.autograd.grad((states*q[:,a:a+window]).sum(), weights)): t += g
    return total


@torch.no_grad()
def stepwise(cell, x, q):
    "A faithful step: traces of every weight, decayed, added to and contracted with the error at each step (Irie et al. 2023, Sec. 3)."
    c, n, lstm = x.new_zeros(len(x), N), 2, isinstance(cell, ELSTM)
    traces, biases, own = x.new_zeros(n, len(x), N, D), x.new_zeros(n, len(x), N), x.new_zeros(n, len(x), N)
    grads = [x.new_zeros(n, N, D), x.new_zeros(n, N), x.new_zeros(n, N)]
    first, second = (cell.forget, cell.candidate) if lstm else (cell.gate, cell.candidate)
    for x_t,q_t in zip(x.unbind(1), q.unbind(1)):
        if lstm:
            f, z = (first(x_t) + cell.w_forget*c).sigmoid(), (second(x_t) + cell.w_candidate*c).tanh()
            phi = torch.stack([(c-z)*f*(1-f), (1-f)*(1-z*z)])
            J, new = f + phi[1]*cell.w_candidate + phi[0]*cell.w_forget, f*c + (1-f)*z
        else:
            z, h = first(x_t).sigmoid(), second(x_t)
            phi, J, new = torch.stack([(h-c)*z*(1-z), z]), 1-z, (1-z)*c + z*h
        traces.mul_(J[...,None]).add_(phi[...,None]*x_t[:,None])
        biases.mul_(J).add_(phi)
        if lstm: own.mul_(J).add_(phi*c)
        grads[0] += torch.einsum("bn,gbnd->gnd", q_t, traces)
        grads[1] += (q_t*biases).sum(1)
        grads[2] += (q_t*own).sum(1)
        c = new
    return grads


@torch.no_grad()
def hand_written(cell, x, q):
    "Full BPTT of minGRU without autograd: one loop forward, one back, two matrix products."
    z, h = cell.gate(x).sigmoid(), cell.candidate(x)
    a, b, c, lam, p = 1-z, z*h, torch.empty_like(q), torch.empty_like(q), x.new_zeros(len(x), N)
    for t in range(T): p = torch.addcmul(b[:,t], a[:,t], p, out=c[:,t])
    p = x.new_zeros(len(x), N)
    for t in reversed(range(T)):
        torch.add(q[:,t], p, out=lam[:,t])
        p = a[:,t]*lam[:,t]
    dh = lam*z
    dz, X = (dh*a*(h - F.pad(c[:,:-1], (0,0,1,0)))).flatten(0, 1), x.flatten(0, 1)
    dh = dh.flatten(0, 1)
    return [dz.mT@X, dz.sum(0), dh.mT@X, dh.sum(0)]


def autograd(cell, x, q, scan, chunk=None):
    state, loss = cell.init_state(len(x)), 0
    for a in range(0, T, chunk or T):
        A, b = cell.coefficients(x[:,a:a+(chunk or T)])
        states = scan(A, b, state)
        state, loss = states[:,-1], loss + (states*q[:,a:a+(chunk or T)]).sum()
    return torch.autograd.grad(loss, [cell.gate.weight, cell.gate.bias, cell.candidate.weight, cell.candidate.bias])


def loop(cell, x, q):
    return torch.autograd.grad((cell.run(x, cell.init_state(len(x)))[0]*q).sum(), [cell.forget.weight, cell.forget.bias, cell.candidate.weight, cell.candidate.bias])


@torch.no_grad()
def textbook(cell, x, q):
    "P = J P + I over the full influence tensor, a step at a time (Williams and Zipser 1989)."
    W, n = torch.cat([cell.rnn.weight_hh_l0, cell.rnn.weight_ih_l0], 1), cell.d_hidden
    h, P, grad = x.new_zeros(len(x), n), x.new_zeros(len(x), n, n, W.shape[1]+1), 0
    i = torch.arange(n)
    for x_t,q_t in zip(x.unbind(1), q.unbind(1)):
        a = torch.cat([h, x_t, x_t.new_ones(len(x), 1)], 1)
        h = cell.step(x_t, h)
        slope = 1 - h*h
        P = torch.einsum("bkl,blij->bkij", slope[...,None]*W[:,:n], P)
        P[:,i,i] += slope[...,None]*a[:,None]
        grad = grad + torch.einsum("bk,bkij->ij", q_t, P)
    return grad[:,n:-1], grad[:,:n]


def close(a, b, tol=1e-3): assert max((p - r).abs().max()/r.abs().max() for p,r in zip(a, b)) < tol


def main(repetitions):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    x, q, rows = torch.randn(B, T, D), torch.randn(B, T, N)/100, []
    def put(name, took, base, asked):
        for arm,limit in asked.items(): rows.append(dict(bench=name, arm=arm, seconds=f"{took[arm]:.4f}", ours_seconds=f"{took[base]:.4f}", ours_over_arm=f"{took[base]/took[arm]:.3f}", asked=limit))
    cell = MinGRU(D, N, chrono=T)
    ways = {"ours, windows of 64": lambda: chunked(cell, x, q, K), "step by step": lambda: stepwise(cell, x, q), "BPTT by hand": lambda: hand_written(cell, x, q),
        "autograd through core's scan": lambda: autograd(cell, x, q, parallel_scan), "autograd op by op, chunks": lambda: autograd(cell, x, q, loop_scan, K)}
    ref = hand_written(cell, x, q)
    close(chunked(cell, x, q, K), ref), close(autograd(cell, x, q, loop_scan, K), ref), close(stepwise(cell, x, q)[0], ref[::2])
    put("minGRU", alternately(ways, repetitions), "ours, windows of 64", {"step by step": "<= 1/8", "BPTT by hand": "<= 2", "autograd through core's scan": "<= .8", "autograd op by op, chunks": "<= .8"})
    lstm = ELSTM(D, N, chrono=T)
    ways = {"ours, windows of 64": lambda: chunked(lstm, x, q, K), "step by step": lambda: stepwise(lstm, x, q), "autograd through the loop": lambda: loop(lstm, x, q)}
    put("eLSTM", alternately(ways, repetitions), "ours, windows of 64", {"step by step": "<= 1/8", "autograd through the loop": "<= .8"})
    rnn, x1, q1 = RNN(32, 128), torch.randn(1, 256, 32), torch.randn(1, 256, 128)/10
    ours = chunked(rnn, x1, q1, 64)
    close(ours[:2], textbook(rnn, x1, q1))
    ways = {"ours, blocks of 128": lambda: chunked(rnn, x1, q1, 128, True), "textbook step": lambda: textbook(rnn, x1, q1)}
    put("tanh RNN, 128 units", alternately(ways, repetitions), "ours, blocks of 128", {"textbook step": "<= 1/10"})
    rows[:] = [r | dict(repetitions=repetitions, machine=machine()) for r in rows]
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader(), out.writerows(rows)
    for r in rows: print(f"{r['bench']:22} ours {r['ours_seconds']} s / {r['arm']:30} {r['seconds']} s = {r['ours_over_arm']:>7}   asked {r['asked']}")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
