"""The plain PyTorch GPT that models/gpt is compared with.

Like nanoGPT's: biases as in GPT-2, LayerNorm with bias, exact GELU, tied embeddings,
F.scaled_dot_product_attention. Parameters have the names of models/gpt.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

CONFIGS = {  # the rows of `make bench`: also in scripts/bench_step.lua
    "nano": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, batch=12),
    "char": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, batch=16),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=256, vocab_size=50257, batch=4),
}


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c["n_head"]
        self.c_attn = nn.Linear(c["n_embd"], 3 * c["n_embd"])
        self.c_proj = nn.Linear(c["n_embd"], c["n_embd"])

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c["n_embd"], 4 * c["n_embd"])
        self.c_proj = nn.Linear(4 * c["n_embd"], c["n_embd"])

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c["n_embd"])
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c["n_embd"])
        self.mlp = MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte = nn.Embedding(c["vocab_size"], c["n_embd"])
        self.wpe = nn.Embedding(c["block_size"], c["n_embd"])
        self.h = nn.ModuleList(Block(c) for _ in range(c["n_layer"]))
        self.ln_f = nn.LayerNorm(c["n_embd"])
        for name, p in self.named_parameters():
            if p.dim() > 1:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * c["n_layer"]) if residual else 0.02
                nn.init.normal_(p, std=std)
            elif "ln_" not in name:
                nn.init.zeros_(p)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.h:
            h = block(h)
        logits = F.linear(self.ln_f(h), self.wte.weight)  # tied with the embedding
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def param_groups(model, weight_decay):
    """Weight decay for matrices only, as in nanoGPT."""
    parameters = list(model.parameters())
    return [
        dict(params=[p for p in parameters if p.dim() > 1], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0),
    ]
