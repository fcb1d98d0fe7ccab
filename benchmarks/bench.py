"What all benchmarks share: alternating timings, peak memory, and the machine in words."
import statistics, time
from pathlib import Path

import torch

def alternately(ways, repeats=5, warm=1):
    "Median seconds of each of several functions, called in turn so that a busy moment meets them all."
    took = {name: [] for name in ways}
    for turn in range(warm + repeats):
        for name,f in ways.items():
            began = time.perf_counter()
            f()
            if turn >= warm: took[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name,t in took.items()}

def _status(key):
    "A line of /proc/self/status, in MiB."
    return next(int(line.split()[1])/2**10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

def peak_mib(f):
    "Peak resident memory of one call above what was resident before it, in MiB (Linux); meaningful in a process of its own."
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    f()
    return _status("VmHWM") - before

def machine():
    "Processor, threads and torch, without the machine's name."
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown processor")
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
