#!/usr/bin/env python3
"""The PyTorch side of `make bench`: a process that trains on command, so that sides take turns.

    bench_peer.py nano|char|gpt2 fp32|bf16 eager|compile [--optimizer fused|loop]

Full steps: forward, backward, clipping, AdamW. For each line on standard input one on standard output:

    SECONDS   trains that long, at least one step   → median_ms min_ms steps loss
    steps N   trains N steps                        → the same
    memory    → peak_kB now_kB import_kB faults     (peak since the last `reset`)
    reset     starts a new peak                     → ok
    q         ends
"""
import argparse
import resource
import sys
import time

import torch

import peer_gpt


def status(key):
    """A line of /proc/self/status, in kB."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key + ":"):
                return int(line.split()[1])


IMPORT_KB = status("VmRSS")


def make_step(o):
    torch.manual_seed(0)
    c = peer_gpt.CONFIGS[o.config]
    model = peer_gpt.GPT(c)
    fused = dict(fused=True) if o.optimizer == "fused" else dict(foreach=False)
    optimizer = torch.optim.AdamW(
        peer_gpt.param_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), **fused
    )
    forward = torch.compile(model) if o.mode == "compile" else model
    x, y = torch.randint(0, c["vocab_size"], (2, c["batch"], c["block_size"]))
    foreach = None if o.optimizer == "fused" else False

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=o.dtype == "bf16"):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def train(step, seconds=0.0, steps=1):
    times, start, loss = [], time.perf_counter(), None
    while len(times) < steps or time.perf_counter() - start < seconds:
        t = time.perf_counter()
        loss = step()
        times.append((time.perf_counter() - t) * 1e3)
    times.sort()
    return "%.4f %.4f %d %.4f" % (times[len(times) // 2], times[0], len(times), loss.item())


def answer(step, line):
    word = line.split()
    if word[0] == "memory":
        usage = resource.getrusage(resource.RUSAGE_SELF)
        faults = usage.ru_minflt + usage.ru_majflt
        return "%d %d %d %d" % (status("VmHWM"), status("VmRSS"), IMPORT_KB, faults)
    if word[0] == "reset":
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        return "ok"
    if word[0] == "steps":
        return train(step, steps=int(word[1]))
    return train(step, seconds=float(word[0]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", choices=sorted(peer_gpt.CONFIGS))
    parser.add_argument("dtype", choices=["fp32", "bf16"])
    parser.add_argument("mode", choices=["eager", "compile"])
    parser.add_argument("--optimizer", choices=["fused", "loop"], default="fused")
    step = make_step(parser.parse_args())
    for line in sys.stdin:
        if line.startswith("q"):
            break
        print(answer(step, line), flush=True)


if __name__ == "__main__":
    main()
