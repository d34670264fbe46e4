#!/usr/bin/env python3
"""Makes optim.json: parameters after each of ten steps of PyTorch's optimizers, in f64.

Lion is not in PyTorch: it is written here from the paper (Chen et al. 2023, algorithm 2).

    build/peers/bin/python tests/golden/optim.py
"""
import json
import os

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
SHAPES, STEPS = [(3, 4), (5,)], 10


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = (b1 * m + (1 - b1) * p.grad).sign()
                p -= lr * (update + decay * p)
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


# type and params as a JSON config names them, and who computes it here
O = torch.optim
RUNS = [
    ("SGD", O.SGD, dict(lr=0.1)),
    ("SGD", O.SGD, dict(lr=0.1, weight_decay=0.01)),
    ("SGD", O.SGD, dict(lr=0.1, momentum=0.9)),
    ("SGD", O.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01)),
    ("SGD", O.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    ("Adam", O.Adam, dict(lr=0.01, weight_decay=0.1, adam_w_mode=False)),
    ("Adam", O.AdamW, dict(lr=0.01, weight_decay=0.1)),  # as DeepSpeed: decoupled unless told
    ("AdamW", O.AdamW, dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
    ("AdamW", O.AdamW, dict(lr=0.01, weight_decay=0.0)),
    ("Adagrad", O.Adagrad, dict(lr=0.05, eps=1e-10)),
    ("Adagrad", O.Adagrad, dict(lr=0.05, eps=1e-3, weight_decay=0.1)),
    ("Lion", Lion, dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)),
]


def numbers(tensors):
    return [[float("%.9g" % v) for v in t.detach().flatten().tolist()] for t in tensors]


def run(make, params, start, gradients):
    params = {k: v for k, v in params.items() if k != "adam_w_mode"}
    weights = [w.clone().requires_grad_() for w in start]
    optimizer = make(weights, **params)
    curve = []
    for step in gradients:
        for w, g in zip(weights, step):
            w.grad = g.clone()
        optimizer.step()
        curve.append(numbers(weights))
    return curve


def main():
    torch.manual_seed(2)
    draw = lambda s: (torch.randn(s, dtype=torch.float64) * 64).round() / 64
    start = [draw(s) for s in SHAPES]
    gradients = [[draw(s) for s in SHAPES] for _ in range(STEPS)]
    gradients[0][1][0] = 0.0  # what never had a gradient must not divide by zero
    out = dict(
        shapes=SHAPES, start=numbers(start), gradients=[numbers(g) for g in gradients],
        runs=[dict(type=t, params=p, weights=run(make, p, start, gradients)) for t, make, p in RUNS],
    )
    with open(os.path.join(HERE, "optim.json"), "w") as f:
        json.dump(out, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
