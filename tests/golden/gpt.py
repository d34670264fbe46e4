#!/usr/bin/env python3
"""Makes gpt.json: what PyTorch computes for the nano GPT, compared in tests/lua/gpt_spec.lua.

Weights and batches come from one stream of integers that both sides compute, so the file holds
results only: the first loss, each parameter's gradient (its norm, and its product with a vector
from the stream), and the loss curve of 200 AdamW steps.

    build/peers/bin/python tests/golden/gpt.py
"""
import json
import os
import sys

import torch

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import peer_gpt  # noqa: E402

SEED, STEPS, WEIGHT_DECAY, BETAS, EPS, LR, CLIP = 2024, 200, 0.1, (0.9, 0.99), 1e-8, 1e-3, 1.0


class Stream:
    """Park and Miller's generator (48271, 2^31 - 1): below 2^53, so exact in Lua's numbers too."""

    def __init__(self, seed):
        self.state = seed

    def integer(self):
        self.state = self.state * 48271 % 2147483647
        return self.state

    def uniform(self, n):
        """n numbers in (-1, 1)."""
        return torch.tensor([self.integer() / 1073741823.5 - 1 for _ in range(n)], dtype=torch.float64)


def fill(model, stream):
    """Linear and embedding weights: std 0.02; norm weights around 1; biases not zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            u = stream.uniform(p.numel()).view(p.shape)
            if p.dim() > 1:
                p.copy_(u * 0.035)
            elif name.endswith("weight"):
                p.copy_(1 + u * 0.1)
            else:
                p.copy_(u * 0.02)


def batches(c, stream):
    text = open(os.path.join(ROOT, "models", "gpt", "shakespeare.txt"), "rb").read()
    ids = {b: i for i, b in enumerate(sorted(set(text)))}
    train = [ids[b] for b in text[: len(text) * 9 // 10]]
    T = c["block_size"]
    while True:
        starts = [stream.integer() % (len(train) - T) for _ in range(c["batch"])]
        rows = torch.tensor([train[s : s + T + 1] for s in starts])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def curve(c, dtype=torch.float32):
    stream = Stream(SEED)
    model = peer_gpt.GPT(c).to(dtype)
    fill(model, stream)
    probes = [stream.uniform(p.numel()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        peer_gpt.param_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, eps=EPS
    )
    losses, norms, gradients = [], [], []
    for (x, y), _ in zip(batches(c, stream), range(STEPS)):
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        if not losses:
            for (name, p), probe in zip(model.named_parameters(), probes):
                g = p.grad.double().flatten()
                gradients.append(
                    dict(name=name, shape=list(p.shape), norm=g.norm().item(), probe=(g @ probe).item())
                )
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, gradients


def main():
    c = peer_gpt.CONFIGS["nano"]
    losses, norms, gradients = curve(c)
    out = dict(
        torch=torch.__version__, model=c, seed=SEED, lr=LR, betas=BETAS, eps=EPS,
        weight_decay=WEIGHT_DECAY, clip=CLIP, losses=losses, norms=norms, parameters=gradients,
    )
    rounded = json.loads(json.dumps(out), parse_float=lambda s: float("%.9g" % float(s)))
    with open(os.path.join(ROOT, "tests", "golden", "gpt.json"), "w") as f:
        json.dump(rounded, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
