#!/usr/bin/env python3
"""Makes ops.json: results and gradients of operations as PyTorch computes them in f64.

A case is a line: a name, the Lua expression that tests/lua/golden_spec.lua evaluates, the same in
Python, and the inputs. The gradients are those of Σ outputs · (fixed random numbers) for every
floating input. Most inputs are multiples of 1/64 below 4: all dtypes hold them, and the text is short.

    build/peers/bin/python tests/golden/ops.py
"""
import json
import os

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = {torch.float64: "float", torch.int64: "i64", torch.bool: "bool"}
CASES = []


def rand(*shape, scale=1.0):
    """Normal, but multiples of scale/64 below 4 scale, and never 0 (kinks belong to no case)."""
    x = (torch.randn(shape, dtype=torch.float64) * 64).round().clamp(-255, 255)
    return torch.where(x == 0, torch.ones_like(x), x) / 64 * scale


def positive(*shape):
    return rand(*shape).abs() + 0.25


def distinct(*shape):
    """No two equal: what sorts has one answer, and the maximum one gradient."""
    n = torch.Size(shape).numel()
    return ((torch.randperm(n).double() - n / 2) / 8).view(shape)


def ints(high, *shape):
    return torch.randint(0, high, shape)


def number(v, digits):
    if v != v or v in (float("inf"), float("-inf")):
        return str(v)
    return int(v) if v == int(v) and abs(v) < 2**31 else float("%.*g" % (digits, v))


def pack(t, digits=9):
    values = t.detach().flatten().tolist()
    return dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data=[number(v, digits) for v in values])


def case(name, lua, f, **inputs):
    """One line of ops.json. `lua` sees the inputs by name, and ds, nn, F."""
    args = {
        k: v.clone().requires_grad_() if v.dtype == torch.float64 else v for k, v in inputs.items()
    }
    outputs = f(*args.values())
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    seeds = [rand(*o.shape) if o.requires_grad else None for o in outputs]
    out = dict(name=name, lua=lua, inputs=[dict(name=k, **pack(v, 17)) for k, v in inputs.items()])
    if any(s is not None for s in seeds):
        wanted = {k: v for k, v in args.items() if v.requires_grad}
        loss = sum((o * s).sum() for o, s in zip(outputs, seeds) if s is not None)
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        out["seeds"] = [pack(s) if s is not None else False for s in seeds]
        out["grads"] = {
            k: pack(g if g is not None else torch.zeros_like(v))
            for (k, v), g in zip(wanted.items(), grads)
        }
    out["outputs"] = [pack(o) for o in outputs]
    CASES.append(out)


def elementwise():
    big = torch.tensor([-30.0, -9.5, -6.0, -3.25, -1.0, -0.015625, 0.015625, 1.0, 3.25, 6.0, 9.5, 30.0])
    x = torch.cat([big.double(), rand(9)])
    for name, f in dict(
        gelu=F.gelu, gelu_tanh=lambda x: F.gelu(x, approximate="tanh"), silu=F.silu, relu=F.relu,
        sigmoid=torch.sigmoid, tanh=torch.tanh, softplus=F.softplus, erf=torch.erf,
    ).items():
        case(name, f"x:{name}()", f, x=x)
    for name in "sqrt rsqrt reciprocal log log1p exp square abs neg sin cos".split():
        case(name, f"x:{name}()", lambda x, name=name: getattr(torch, name)(x), x=positive(3, 5))
    case("exp negative", "x:exp()", torch.exp, x=rand(3, 5))
    case("floor", "x:floor()", lambda x: torch.floor(x.detach()), x=rand(9, scale=4))
    case("ceil", "x:ceil()", lambda x: torch.ceil(x.detach()), x=rand(9, scale=4))
    case("round to even", "x:round()", lambda x: torch.round(x.detach()),
         x=torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.75, -2.75], dtype=torch.float64))
    case("sign", "x:sign()", lambda x: torch.sign(x.detach()),
         x=torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64))
    case("add broadcast", "a + b", lambda a, b: a + b, a=rand(2, 1, 4), b=rand(3, 1))
    case("sub broadcast", "a - b", lambda a, b: a - b, a=rand(4), b=rand(2, 3, 4))
    case("mul broadcast", "a * b", lambda a, b: a * b, a=rand(2, 3, 1), b=rand(1, 4))
    case("div broadcast", "a / b", lambda a, b: a / b, a=rand(3, 4), b=positive(3, 1))
    case("pow", "a:pow(b)", lambda a, b: a**b, a=positive(3, 4), b=rand(4))
    case("pow scalar", "a:pow(2.5)", lambda a: a**2.5, a=positive(3, 4))
    case("scalars", "2 - 3 * a / 4 + 1 / a", lambda a: 2 - 3 * a / 4 + 1 / a, a=positive(3, 4))
    case("add with alpha", "a:add(b, 0.5)", lambda a, b: torch.add(a, b, alpha=0.5), a=rand(3, 4), b=rand(4))
    case("maximum", "a:maximum(b)", torch.maximum, a=distinct(3, 4), b=distinct(3, 4) + 1 / 16)
    case("minimum", "a:minimum(b)", torch.minimum, a=distinct(3, 4), b=distinct(3, 4) + 1 / 16)
    case("clamp", "a:clamp(-0.5, 0.75)", lambda a: a.clamp(-0.5, 0.75), a=distinct(17) / 3)
    case("clamp below only", "a:clamp(-0.51)", lambda a: a.clamp(min=-0.51), a=distinct(9))
    case("where", "ds.where(c, a, b)", torch.where, c=ints(2, 3, 4).bool(), a=rand(3, 4), b=rand(4))
    case("masked_fill", "a:masked_fill(m, -2)", lambda a, m: a.masked_fill(m, -2.0),
         a=rand(2, 3, 4), m=ints(2, 3, 1).bool())
    for op in "eq ne lt le gt ge".split():
        case(op, f"a:{op}(b)", lambda a, b, op=op: getattr(torch, op)(a, b),
             a=ints(3, 3, 4).double(), b=ints(3, 4).double())


def reductions():
    x = rand(2, 3, 4)
    case("sum", "x:sum()", lambda x: x.sum(), x=x)
    case("sum of one dim", "x:sum(2)", lambda x: x.sum(1), x=x)
    case("sum of two dims", "x:sum({ 1, 3 })", lambda x: x.sum((0, 2)), x=x)
    case("mean keepdim", "x:mean(-1, { keepdim = true })", lambda x: x.mean(-1, keepdim=True), x=x)
    case("mean", "x:mean()", lambda x: x.mean(), x=x)
    case("amax", "x:amax(2)", lambda x: x.amax(1), x=distinct(2, 3, 4))
    case("amin", "x:amin(-1)", lambda x: x.amin(-1), x=distinct(2, 3, 4))
    case("max with indices", "x:max(2)", lambda x: tuple(x.max(1)), x=distinct(2, 5, 3))
    case("var", "x:var(2)", lambda x: x.var(1), x=x)
    case("logsumexp", "x:logsumexp(-1)", lambda x: x.logsumexp(-1), x=x)
    case("norm", "x:norm()", lambda x: x.norm(), x=x)
    case("prod", "x:prod(3)", lambda x: x.prod(2), x=positive(2, 3, 4))
    case("argmax", "x:argmax(2)", lambda x: x.argmax(1), x=distinct(2, 5, 3))
    case("argmin", "x:argmin(-1)", lambda x: x.argmin(-1), x=distinct(2, 5, 3))
    case("cumsum", "x:cumsum(2)", lambda x: x.cumsum(1), x=rand(2, 6, 3))
    case("sort", "x:sort(2)", lambda x: tuple(x.sort(1)), x=distinct(2, 6, 3))
    case("sort descending", "x:sort(-1, { descending = true })",
         lambda x: tuple(x.sort(-1, descending=True)), x=distinct(3, 9))
    case("sort is stable", "x:sort(1)", lambda x: tuple(x.detach().sort(stable=True)),
         x=ints(3, 12).double())
    case("topk", "x:topk(3)", lambda x: tuple(x.topk(3)), x=distinct(3, 9))
    case("topk smallest", "x:topk(2, 1, { largest = false })",
         lambda x: tuple(x.topk(2, 0, largest=False)), x=distinct(7, 2))
    case("all", "m:all(-1)", lambda m: m.all(-1), m=torch.tensor([[True, True], [True, False]]))
    case("any", "m:any(-1)", lambda m: m.any(-1), m=torch.tensor([[False, False], [True, False]]))


def indexing():
    index = ints(4, 2, 5, 3)
    case("gather", "x:gather(2, i)", lambda x, i: x.gather(1, i), x=rand(2, 4, 3), i=index)
    case("scatter_add_", "x:scatter_add_(2, i, s)",
         lambda x, i, s: x.detach().scatter_add(1, i, s.detach()), x=rand(2, 4, 3), i=index, s=rand(2, 5, 3))
    case("index_select", "x:index_select(2, i)", lambda x, i: x.index_select(1, i),
         x=rand(2, 4, 3), i=ints(4, 6))
    case("masked_select", "x:masked_select(m)", lambda x, m: x.masked_select(m),
         x=rand(3, 4), m=ints(2, 3, 4).bool())
    case("one_hot", "i:one_hot(5)", lambda i: F.one_hot(i, 5), i=ints(5, 2, 3))
    case("tril", "x:tril(1)", lambda x: x.tril(1), x=rand(2, 4, 5))
    case("triu", "x:triu(-1)", lambda x: x.triu(-1), x=rand(2, 4, 5))
    case("cat", "ds.cat({ a, b }, 2)", lambda a, b: torch.cat([a, b], 1), a=rand(2, 3), b=rand(2, 2))
    case("stack", "ds.stack({ a, b }, 2)", lambda a, b: torch.stack([a, b], 1), a=rand(2, 3), b=rand(2, 3))
    case("chunk", "x:chunk(3, -1)", lambda x: x.chunk(3, -1), x=rand(2, 7))
    case("split", "x:split({ 1, 2, 4 }, 2)", lambda x: x.split([1, 2, 4], 1), x=rand(2, 7))
    case("permute", "x:permute(3, 1, 2):contiguous() * 2", lambda x: x.permute(2, 0, 1) * 2, x=rand(2, 3, 4))
    case("views", "x:transpose(1, 2):narrow(1, 2, 2):reshape(-1)",
         lambda x: x.transpose(0, 1).narrow(0, 1, 2).reshape(-1), x=rand(3, 4, 2))
    case("expand", "x:expand(3, 2, 4) * y", lambda x, y: x.expand(3, 2, 4) * y, x=rand(2, 1), y=rand(3, 2, 4))
    case("embedding", "F.embedding(i, w)", lambda i, w: F.embedding(i, w), i=ints(5, 3, 4), w=rand(5, 6))


def linear_algebra():
    case("matmul", "a:matmul(b)", torch.matmul, a=rand(5, 7), b=rand(7, 3))
    case("matmul broadcast", "a:matmul(b)", torch.matmul, a=rand(2, 1, 3, 4), b=rand(5, 4, 2))
    case("matmul of one matrix", "a:matmul(b)", torch.matmul, a=rand(2, 3, 4), b=rand(4, 5))
    case("matmul of vectors", "a:matmul(b)", torch.matmul, a=rand(5), b=rand(2, 5, 3))
    case("matmul transposed", "a:transpose(-1, -2):matmul(b:transpose(-1, -2))",
         lambda a, b: a.mT @ b.mT, a=rand(2, 4, 3), b=rand(2, 5, 4))
    case("linear", "F.linear(x, w, b)", F.linear, x=rand(2, 3, 5), w=rand(4, 5), b=rand(4))
    case("linear without bias", "F.linear(x, w)", F.linear, x=rand(3, 5), w=rand(4, 5))
    for name, f in dict(gelu=F.gelu, relu=F.relu, silu=F.silu,
                        gelu_tanh=lambda x: F.gelu(x, approximate="tanh")).items():
        case(f"linear with {name}", f'F.linear(x, w, b, {{ activation = "{name}" }})',
             lambda x, w, b, f=f: f(F.linear(x, w, b)), x=rand(2, 3, 5), w=rand(4, 5), b=rand(4))


def norms_and_losses():
    x = rand(2, 3, 7)
    case("softmax", "x:softmax(-1)", lambda x: x.softmax(-1), x=x)
    case("softmax of a middle dim", "x:softmax(2)", lambda x: x.softmax(1), x=x)
    case("softmax, large numbers", "x:softmax(-1)", lambda x: x.softmax(-1), x=rand(3, 5) + 1000)
    case("log_softmax", "x:log_softmax(-1)", lambda x: x.log_softmax(-1), x=x * 4)
    case("log_softmax of the first dim", "x:log_softmax(1)", lambda x: x.log_softmax(0), x=x)
    w, b = rand(7), rand(7)
    case("layer_norm", "F.layer_norm(x, w, b)", lambda x, w, b: F.layer_norm(x, (7,), w, b), x=x, w=w, b=b)
    case("layer_norm with eps", "F.layer_norm(x, w, nil, 0.5)",
         lambda x, w: F.layer_norm(x, (7,), w, None, 0.5), x=x, w=w)
    case("layer_norm without affine", "F.layer_norm(x)", lambda x: F.layer_norm(x, (7,)), x=x)
    case("rms_norm", "F.rms_norm(x, w, nil, 1e-4)",
         lambda x, w: F.rms_norm(x, (7,), w, 1e-4), x=x, w=w)
    case("layer_norm of a sum", "F.layer_norm(x, w, b, nil, d)",
         lambda x, d, w, b: (x + d, F.layer_norm(x + d, (7,), w, b)), x=x, d=rand(2, 3, 7), w=w, b=b)
    case("rms_norm of a sum", "F.rms_norm(x, w, nil, 1e-4, d)",
         lambda x, d, w: (x + d, F.rms_norm(x + d, (7,), w, 1e-4)), x=x, d=rand(2, 3, 7), w=w)
    logits, target = rand(6, 5, scale=2), torch.tensor([0, 4, 2, 1, 3, 2])
    ignored = torch.tensor([0, -100, 2, 1, -100, 2])
    case("cross_entropy", "F.cross_entropy(x, y)", F.cross_entropy, x=logits, y=target)
    case("cross_entropy, ignored rows", "F.cross_entropy(x, y)",
         lambda x, y: F.cross_entropy(x, y), x=logits, y=ignored)
    case("cross_entropy, other ignore_index", "F.cross_entropy(x, y, { ignore_index = 2 })",
         lambda x, y: F.cross_entropy(x, y, ignore_index=2), x=logits, y=target)
    case("cross_entropy, smoothing", "F.cross_entropy(x, y, { label_smoothing = 0.1 })",
         lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), x=logits, y=ignored)
    case("cross_entropy, sum", 'F.cross_entropy(x, y, { reduction = "sum" })',
         lambda x, y: F.cross_entropy(x, y, reduction="sum"), x=logits, y=ignored)
    case("cross_entropy, none", 'F.cross_entropy(x, y, { reduction = "none" })',
         lambda x, y: F.cross_entropy(x, y, reduction="none"), x=logits, y=ignored)
    case("linear_cross_entropy", "F.linear_cross_entropy(x, w, y)",
         lambda x, w, y: F.cross_entropy(x @ w.T, y), x=rand(6, 8), w=rand(5, 8), y=target)
    case("linear_cross_entropy, ignored rows", "F.linear_cross_entropy(x, w, y)",
         lambda x, w, y: F.cross_entropy((x @ w.T).flatten(0, 1), y.flatten()),
         x=rand(2, 3, 8), w=rand(5, 8), y=ignored.view(2, 3))


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotary_angles(T, D, offset, base):
    angle = torch.outer(torch.arange(offset, offset + T).double(), base ** (-torch.arange(0, D, 2).double() / D))
    return angle[None, :, None, :]  # [1, T, 1, D/2]


def rotary(x, offset=0, base=10000.0):
    """As Llama in transformers: element i turns with element i + D/2."""
    angle = rotary_angles(x.shape[1], x.shape[-1], offset, base).repeat(1, 1, 1, 2)
    return x * angle.cos() + rotate_half(x) * angle.sin()


def rotary_interleaved(x, base=10000.0):
    """As in the paper (Su et al. 2021): element 2i turns with element 2i + 1."""
    angle = rotary_angles(x.shape[1], x.shape[-1], 0, base)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def sdpa(q, k, v, causal=False, mask=None, scale=None):
    """q [B, T, H, D], k and v [B, S, G, D]; causal: row t sees s ≤ t + S - T."""
    T, S = q.shape[1], k.shape[1]
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def packed(x, heads, groups):
    D = x.shape[-1] // (heads + 2 * groups)
    q, k, v = x.split([heads * D, groups * D, groups * D], -1)
    q, k, v = (t.unflatten(-1, (-1, D)) for t in (q, k, v))
    return sdpa(q, k, v, causal=True).flatten(-2)


def attention():
    call = "F.scaled_dot_product_attention(q, k, v, %s)"
    qkv = lambda T, S, H=2, G=2, D=4: dict(q=rand(2, T, H, D), k=rand(2, S, G, D), v=rand(2, S, G, D))
    case("attention", call % "{}", sdpa, **qkv(5, 5))
    case("attention, other length", call % "{}", sdpa, **qkv(3, 7))
    case("attention, causal", call % "{ causal = true }", lambda q, k, v: sdpa(q, k, v, True), **qkv(9, 9))
    case("attention, causal with a past", call % "{ causal = true }",
         lambda q, k, v: sdpa(q, k, v, True), **qkv(3, 8))
    case("attention, grouped", call % "{ causal = true }",
         lambda q, k, v: sdpa(q, k, v, True), **qkv(6, 6, H=6, G=2))
    case("attention, scale", call % "{ scale = 0.25 }", lambda q, k, v: sdpa(q, k, v, scale=0.25), **qkv(4, 4))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    case("attention, bool mask", call % "{ mask = m }",
         lambda q, k, v, m: sdpa(q, k, v, mask=m), **qkv(5, 5), m=mask)
    bias = rand(2, 5, 5)
    case("attention, added mask", call % "{ mask = m:detach() }",
         lambda q, k, v, m: sdpa(q, k, v, mask=m.detach()), **qkv(5, 5), m=bias)
    case("attention, long rows", call % "{ causal = true }", lambda q, k, v: sdpa(q, k, v, True),
         q=rand(1, 70, 1, 8), k=rand(1, 70, 1, 8), v=rand(1, 70, 1, 8))
    case("attention, packed", "F.attention(x, { n_head = 2, causal = true })",
         lambda x: packed(x, 2, 2), x=rand(2, 5, 24))
    case("attention, packed and grouped", "F.attention(x, { n_head = 4, n_kv_head = 2, causal = true })",
         lambda x: packed(x, 4, 2), x=rand(2, 5, 32))
    case("rotary", "F.rotary(x)", rotary, x=rand(2, 5, 2, 8))
    case("rotary with an offset", "F.rotary(x, { offset = 3, base = 500000 })",
         lambda x: rotary(x, 3, 500000.0), x=rand(1, 4, 2, 8))
    case("rotary interleaved", "F.rotary(x, { interleaved = true })", rotary_interleaved, x=rand(2, 5, 2, 8))


def main():
    torch.manual_seed(1)
    for family in (elementwise, reductions, indexing, linear_algebra, norms_and_losses, attention):
        family()
    with open(os.path.join(HERE, "ops.json"), "w") as f:
        lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in CASES)
        f.write("[\n" + lines + "\n]\n")


if __name__ == "__main__":
    main()
