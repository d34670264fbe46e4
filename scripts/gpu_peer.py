#!/usr/bin/env python3
"""The PyTorch side of scripts/gpu-check: a process that trains on command, so that sides take turns.

    gpu_peer.py MODEL [dtype=bf16] [batch=N] [device=cuda] [mode=compile|reduce-overhead|eager]
                [checkpoint=1] [init=F] [data=F]

The models are those of scripts/gpu_step.lua, written as PyTorch is fastest: fp32 weights under autocast
(AdamW on bf16 weights would lose accuracy), torch.compile, fused AdamW, scaled_dot_product_attention,
clipping to 1. init: a file of weights (safetensors, by our names) to begin with; data: a file of tokens,
"x" [steps x B x T + 1]. Lines and answers are gpu_step.lua's: warm N, steps N, curve N, rest, q.
"""
import json
import struct
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

MODELS = {  # as in scripts/gpu_step.lua
    "gpt2-124M": dict(layers=12, heads=12, width=768, context=1024, vocab=50304),
    "gpt2-350M": dict(layers=24, heads=16, width=1024, context=1024, vocab=50304),
    "gpt2-1558M": dict(layers=48, heads=25, width=1600, context=1024, vocab=50304),
    "llama-8B-4-layers": dict(layers=4, heads=32, groups=8, width=4096, ffn=14336, context=8192, vocab=128256),
    "tiny": dict(layers=2, heads=2, width=32, context=32, vocab=96),
    "tiny-llama": dict(layers=2, heads=4, groups=2, width=32, ffn=48, context=32, vocab=96),
}


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c["heads"]
        self.c_attn = nn.Linear(c["width"], 3 * c["width"])
        self.c_proj = nn.Linear(c["width"], c["width"])

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c["width"], 4 * c["width"])
        self.c_proj = nn.Linear(4 * c["width"], c["width"])

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c["width"]), nn.LayerNorm(c["width"])
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c["vocab"], c["width"]), nn.Embedding(c["context"], c["width"])
        self.h = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.ln_f = nn.LayerNorm(c["width"])

    def head(self):
        return self.wte.weight

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.h:
            h = checkpoint(block, h, use_reentrant=False) if self.saving else block(h)
        return F.cross_entropy(F.linear(self.ln_f(h), self.head()).flatten(0, 1), y.flatten())


def turn(x, cos, sin):
    """Rotary positions of [B, H, T, D], the halves of a head's width as pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class LlamaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, self.H, self.G = c["width"], c["heads"], c["groups"]
        self.D = C // self.H
        self.norm_1, self.norm_2 = nn.RMSNorm(C, eps=1e-5), nn.RMSNorm(C, eps=1e-5)
        self.qkv = nn.Linear(C, (self.H + 2 * self.G) * self.D, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * c["ffn"], bias=False)
        self.down = nn.Linear(c["ffn"], C, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        parts = self.qkv(self.norm_1(x)).split([self.H * self.D, self.G * self.D, self.G * self.D], dim=2)
        q, k, v = (t.view(B, T, -1, self.D).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c["vocab"], c["width"])
        self.layers = nn.ModuleList(LlamaBlock(c) for _ in range(c["layers"]))
        self.norm = nn.RMSNorm(c["width"], eps=1e-5)
        self.lm_head = nn.Linear(c["width"], c["vocab"], bias=False)
        D = c["width"] // c["heads"]
        angle = torch.arange(c["context"])[:, None] * 500000.0 ** (-torch.arange(0, D, 2) / D)[None]
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x, y):
        h = self.embed(x)
        for block in self.layers:
            arguments = (h, self.cos, self.sin)
            h = checkpoint(block, *arguments, use_reentrant=False) if self.saving else block(*arguments)
        return F.cross_entropy(self.lm_head(self.norm(h)).flatten(0, 1), y.flatten())


def read_safetensors(path):
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
    with open(path, "rb") as f:
        head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        body = bytearray(f.read())
    out = {}
    for name, t in head.items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            out[name] = torch.frombuffer(body[begin:end], dtype=types[t["dtype"]]).reshape(t["shape"])
    return out


class Trainer:
    def __init__(self, name, o):
        c = MODELS[name]
        self.o, self.c, self.cuda = o, c, o["device"] == "cuda"
        torch.manual_seed(1)
        with torch.device(o["device"]):
            model = Llama(c) if "groups" in c else GPT(c)
        model.saving = o.get("checkpoint") == "1"
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.02)
            if "init" in o:
                weights, own = read_safetensors(o["init"]), dict(model.named_parameters())
                if weights.keys() != own.keys():
                    sys.exit("gpu_peer: other names in %s: %s" % (o["init"], sorted(weights.keys() ^ own.keys())))
                for key, p in own.items():
                    p.copy_(weights[key])
        self.model = model
        matrices = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=self.cuda)
        mode = o["mode"] if self.cuda else "eager"
        self.forward = model if mode == "eager" else torch.compile(model, mode=None if mode == "compile" else mode)
        shape = (4, int(o["batch"]), c["context"] + 1)
        self.batches = torch.randint(0, c["vocab"], shape, device=o["device"])
        self.count = 0

    def step(self, x, y):
        with torch.autocast(self.o["device"], dtype=torch.bfloat16, enabled=self.o["dtype"] == "bf16"):
            loss = self.forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def next(self):
        self.count += 1
        tokens = self.batches[self.count % 4]
        return self.step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def warm(self, n):
        for _ in range(int(n)):
            loss = self.next()
        return dict(loss=loss.item())

    def steps(self, n):
        n = int(n)
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(n):
            loss = self.next()
        self.wait()
        elapsed, host = time.perf_counter() - start, float("inf")
        for _ in range(3):  # the host alone: a step that it queues while the device is idle
            t = time.perf_counter()
            self.next()
            host = min(host, time.perf_counter() - t)
            self.wait()
        out = dict(ms=elapsed * 1e3 / n, steps=n, loss=loss.item(), host_ms=host * 1e3)
        if self.cuda:
            out.update(peak=torch.cuda.max_memory_allocated(), cached=torch.cuda.max_memory_reserved())
        return out

    def curve(self, n):
        data, losses = read_safetensors(self.o["data"])["x"].to(self.o["device"]).long(), []
        for i in range(int(n)):
            loss = self.step(data[i, :, :-1].contiguous(), data[i, :, 1:].contiguous())
            losses.append(loss.item())
        return dict(losses=losses)

    def rest(self, _):
        self.wait()
        if self.cuda:
            torch.cuda.empty_cache()
        return dict(cached=torch.cuda.memory_reserved() if self.cuda else 0)


def main():
    o = dict(dtype="bf16", device="cuda", batch="1", mode="compile")
    o.update(word.split("=", 1) for word in sys.argv[2:])
    # TF32 only where PyTorch is to be fast; curves in fp32 are compared to the digit
    torch.set_float32_matmul_precision("highest" if o["dtype"] == "fp32" else "high")
    trainer = Trainer(sys.argv[1], o)
    print(json.dumps(dict(ready=True, parameters=sum(p.numel() for p in trainer.model.parameters()),
                          torch=torch.__version__)), flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "q":
            break
        print(json.dumps(getattr(trainer, word)(rest)), flush=True)


if __name__ == "__main__":
    main()
