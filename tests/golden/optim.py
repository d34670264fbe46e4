#!/usr/bin/env python3
"""Makes optim.json: parameters after each of ten steps of PyTorch's optimizers, in f64; and
optim_whole.json: after some of twenty steps of those that need whole tensors.

Not in PyTorch and written here from the papers: Lion (Chen et al. 2023, algorithm 2); Lamb (You et
al. 2019, algorithm 2), with the bounds of the ratio that DeepSpeed's FusedLamb has. Muon is PyTorch's,
once as it is, in bf16, and once with its Newton-Schulz iteration in f64; what is no matrix goes to
AdamW with DeepSpeed's settings, and more dimensions are flattened.

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


class Lamb(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 bias_correction=True, max_coeff=10.0, min_coeff=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      bias_correction=bias_correction, most=max_coeff,
                                      least=min_coeff, step=0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            b1, b2 = group["betas"]
            c1, c2 = (1 - b1 ** group["step"], 1 - b2 ** group["step"])
            if not group["bias_correction"]:
                c1 = c2 = 1.0
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                v.mul_(b2).add_(p.grad ** 2, alpha=1 - b2)
                update = (m / c1) / ((v / c2).sqrt() + group["eps"]) + group["weight_decay"] * p
                weights, length, ratio = p.norm(), update.norm(), 1.0
                if weights > 0 and length > 0:
                    ratio = (weights / length).clamp(group["least"], group["most"])
                p -= group["lr"] * ratio * update


def newton_schulz_f64(g, coefficients, steps, eps):
    a, b, c = coefficients
    x = g / (g.norm() + eps)
    for _ in range(steps):
        r = x @ x.mT
        x = a * x + (b * r + c * r @ r) @ x
    return x


class Muon:
    """PyTorch's for matrices, AdamW for the rest."""

    def __init__(self, params, lr, adam_lr=None, muon_lr=None, momentum=0.95, nesterov=True,
                 weight_decay=0.0, ns_method="gram"):
        self.matrices = [(p, p.detach().reshape(len(p), -1).clone()) for p in params if p.ndim > 1]
        self.rest = [p for p in params if p.ndim < 2]
        for _, m in self.matrices:
            m.requires_grad_()
        self.exact = ns_method == "gram"
        self.muon = torch.optim.Muon([m for _, m in self.matrices], lr=muon_lr or lr,
                                     momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        self.adam = torch.optim.AdamW(self.rest, lr=adam_lr or lr, betas=(0.9, 0.95), eps=1e-10,
                                      weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        theirs = torch.optim._muon._zeropower_via_newtonschulz
        for p, m in self.matrices:
            m.grad = p.grad.reshape(m.shape)
        if self.exact:
            torch.optim._muon._zeropower_via_newtonschulz = newton_schulz_f64
        self.muon.step()
        torch.optim._muon._zeropower_via_newtonschulz = theirs
        self.adam.step()
        for p, m in self.matrices:
            p.copy_(m.reshape(p.shape))


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
WHOLE_SHAPES, WHOLE_STEPS, SHOWN = [(4, 7), (6, 3), (3, 3), (5,), (2, 3, 2)], 20, (1, 2, 10, 20)
WHOLE = [
    ("Lamb", Lamb, dict(lr=0.1)),
    ("Lamb", Lamb, dict(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
    ("Lamb", Lamb, dict(lr=0.1, weight_decay=0.01, max_coeff=0.6, min_coeff=0.5)),
    ("Lamb", Lamb, dict(lr=0.01, bias_correction=False)),
    ("Muon", Muon, dict(lr=0.1)),
    ("Muon", Muon, dict(lr=0.01, muon_lr=0.1, momentum=0.8, nesterov=False, weight_decay=0.1)),
    ("Muon", Muon, dict(lr=0.1, adam_lr=0.02)),
    ("Muon", Muon, dict(lr=0.1, ns_method="standard", weight_decay=0.1)),
]


def numbers(tensors):
    return [[float("%.9g" % v) for v in t.detach().flatten().tolist()] for t in tensors]


def run(make, params, start, gradients, shown=None):
    params = {k: v for k, v in params.items() if k != "adam_w_mode"}
    weights = [w.clone().requires_grad_() for w in start]
    optimizer = make(weights, **params)
    curve = []
    for number, step in enumerate(gradients, 1):
        for w, g in zip(weights, step):
            w.grad = g.clone()
        optimizer.step()
        if not shown or number in shown:
            curve.append(numbers(weights))
    return curve


def draw(shape):
    return (torch.randn(shape, dtype=torch.float64) * 64).round() / 64


def write(name, shapes, steps, runs, shown=None):
    start = [draw(s) for s in shapes]
    gradients = [[draw(s) for s in shapes] for _ in range(steps)]
    gradients[0][1].view(-1)[0] = 0.0  # what never had a gradient must not divide by zero
    out = dict(
        shapes=shapes, start=numbers(start), gradients=[numbers(g) for g in gradients],
        steps=shown or list(range(1, steps + 1)),
        runs=[dict(type=t, params=p, weights=run(make, p, start, gradients, shown))
              for t, make, p in runs],
    )
    with open(os.path.join(HERE, name), "w") as f:
        json.dump(out, f, separators=(",", ":"))
        f.write("\n")


def main():
    torch.manual_seed(2)
    write("optim.json", SHAPES, STEPS, RUNS)
    write("optim_whole.json", WHOLE_SHAPES, WHOLE_STEPS, WHOLE, SHOWN)


if __name__ == "__main__":
    main()
