#!/usr/bin/env python3
"""The PyTorch side of `make bench`: a process that trains on command, so that sides take turns.

    bench_peer.py nano|char|gpt2 fp32|bf16 eager|compile|ddp|fsdp2|deepspeed0|…|deepspeed3
                  [--optimizer fused|loop] [--batch N] [--ranks N]

ddp is PyTorch's DistributedDataParallel, fsdp2 its fully_shard (a block at a time, whole after forward or
not: the latter), deepspeedN is DeepSpeed at that stage; all over gloo and with ranks of one thread each,
which this process starts; rank 0 reads the lines.

Full steps: forward, backward, clipping, AdamW. For each line on standard input one on standard output:

    SECONDS   trains that long, at least one step   → median_ms min_ms steps loss
    steps N   trains N steps                        → the same
    memory    → peak_kB now_kB import_kB faults     (peak since the last `reset`)
    reset     starts a new peak                     → ok
    q         ends
"""
import argparse
import os
import resource
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import peer_gpt


def status(key):
    """A line of /proc/self/status, in kB."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key + ":"):
                return int(line.split()[1])


IMPORT_KB = status("VmRSS")


def data(o, c):
    return torch.randint(0, c["vocab_size"], (2, o.batch or c["batch"], c["block_size"]))


def make_deepspeed_step(o):
    import deepspeed

    torch.manual_seed(0)
    c = peer_gpt.CONFIGS[o.config]
    model = peer_gpt.GPT(c)
    config = {
        "train_micro_batch_size_per_gpu": o.batch or c["batch"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": o.dtype == "bf16"},
        "zero_optimization": {"stage": int(o.mode[-1])},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=peer_gpt.param_groups(model, 0.1), config=config
    )
    x, y = data(o, c)

    def step():
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        return loss

    return step


def make_fsdp2_step(o):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    c = peer_gpt.CONFIGS[o.config]
    model = peer_gpt.GPT(c)
    mesh = init_device_mesh("cpu", (o.ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if o.dtype == "bf16" else MixedPrecisionPolicy()
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(peer_gpt.param_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), fused=True)
    x, y = data(o, c)

    def step():
        loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def make_step(o):
    if o.mode.startswith("deepspeed"):
        return make_deepspeed_step(o)
    if o.mode == "fsdp2":
        return make_fsdp2_step(o)
    torch.manual_seed(0)
    c = peer_gpt.CONFIGS[o.config]
    model = peer_gpt.GPT(c)
    fused = dict(fused=True) if o.optimizer == "fused" else dict(foreach=False)
    optimizer = torch.optim.AdamW(
        peer_gpt.param_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), **fused
    )
    forward = torch.compile(model) if o.mode == "compile" else model
    if o.mode == "ddp":
        forward = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    x, y = data(o, c)
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


def join(o):
    """Starts the other ranks, from rank 0, and makes the group."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(o.ranks), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(20000 + os.getpid() % 20000), DS_ACCELERATOR="cpu")
        for r in range(1, o.ranks):
            env = dict(os.environ, RANK=str(r), LOCAL_RANK=str(r))
            subprocess.Popen([sys.executable, *sys.argv], env=env, stdin=subprocess.DEVNULL)
    dist.init_process_group("gloo")
    return rank


def lines(rank):
    """Rank 0's standard input, on every rank."""
    while True:
        line = [sys.stdin.readline() if rank == 0 else None]
        dist.broadcast_object_list(line)
        if not line[0]:
            return
        yield line[0]


def quiet():
    """What libraries print goes to stderr; answers have stdout for themselves."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main():
    answers = quiet()
    parser = argparse.ArgumentParser()
    parser.add_argument("config", choices=sorted(peer_gpt.CONFIGS))
    parser.add_argument("dtype", choices=["fp32", "bf16"])
    modes = ["eager", "compile", "ddp", "fsdp2"] + ["deepspeed%d" % stage for stage in range(4)]
    parser.add_argument("mode", choices=modes)
    parser.add_argument("--optimizer", choices=["fused", "loop"], default="fused")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    o = parser.parse_args()
    rank, source = 0, sys.stdin
    if o.ranks > 1:
        rank = join(o)
        source = lines(rank)
    step = make_step(o)
    for line in source:
        if line.startswith("q"):
            break
        if o.ranks > 1 and line[0].isdigit():  # by time, ranks would make different numbers of steps
            text = train(step, steps=int(float(line)))
        else:
            text = answer(step, line)
        if rank == 0:
            print(text, flush=True, file=answers)


if __name__ == "__main__":
    main()
