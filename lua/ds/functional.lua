--- F: activations, dropout, norms, attention, losses, and the products of products.lua. Functions
-- that hold no parameters.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local shapes = require "ds.shapes"
local ops = require "ds.ops"
local views = require "ds.views"
local products = require "ds.products"
require "ds.reductions"

local raise, shape_string = border.raise, border.shape_string
local options_of, need_floating = shapes.options_of, shapes.need_floating
local need_like, need_targets, fine = shapes.need_like, shapes.need_targets, shapes.fine
local define, needs, sink = autograd.define, autograd.needs, autograd.sink
local new, dim_of, floating, run = tensor.new, tensor.dim_of, tensor.floating, tensor.run
local methods, numel_of = tensor.methods, tensor.numel_of
local heads = tensor.borrow.heads

local F = { matmul = products.matmul, linear = products.linear, mlp = products.mlp,
  linear_cross_entropy = products.linear_cross_entropy }

F.options_of = options_of

-- ---- activations

for _, name in ipairs { "relu", "silu", "tanh", "sigmoid", "softplus" } do
  F[name] = methods[name]
end

--- GELU, x Φ(x); `{ approximate = "tanh" }` for the tanh form.
function F.gelu(x, options)
  options = options_of("gelu", options, { approximate = true })
  if options.approximate == "tanh" then return methods.gelu_tanh(x) end
  return methods.gelu(x)
end

local draw = tensor.draw
local dropout = define("dropout", {
  args = { "p", "seed", "offset" }, kernel = "dropout",
  infer = function(x)
    need_floating(x, "dropout")
    return new(x.shape, x.dtype, x.device)
  end,
  spare = true,
  backward = function(r, dy) return F.dropout_(dy:contiguous(), r.p, r.seed, r.offset) end,
})
F.dropout_ = dropout
--- Zeroes elements with probability p and scales the rest by 1/(1 − p).
function F.dropout(x, p, options)
  options = options_of("dropout", options, { training = true })
  tensor.need_tensor(x, "dropout", 1)
  if type(p) ~= "number" or p < 0 or p > 1 then
    raise("dropout: p must be between 0 and 1, not %s", tostring(p))
  end
  if p == 0 or options.training == false then return x end
  return dropout(x:contiguous(), p, draw(numel_of(x.shape)))
end

for _, name in ipairs { "softmax", "log_softmax" } do
  local op = define(name, {
    args = { "axis" }, kernel = name,
    infer = function(x)
      need_floating(x, name)
      return new(x.shape, x.dtype, x.device)
    end,
    backward = function(r, dy)
      local dx = new(r.x.shape, r.x.dtype, r.x.device)
      run(name .. "_backward", dx.device, dx._c, dy._c, r.y._c, r.axis)
      return dx
    end,
  })
  methods[name] = function(self, dim)
    tensor.need_tensor(self, name, 1)
    if dim == nil then raise("%s: expects the dimension, as x:%s(-1)", name, name) end
    return op(self, dim_of(dim, #self.shape, name) - 1)
  end
  F[name] = methods[name]
end

-- ---- norms

local function norm_shapes(what, x, delta, w, b)
  need_floating(x, what)
  local width = x.shape[#x.shape]
  if not width then raise("%s: expects at least one dimension", what) end
  for i, t in ipairs { w or false, b or false } do
    local name = i == 1 and "weight" or "bias"
    if t then
      need_like(what, x, t, "the " .. name)
      if #t.shape ~= 1 or t.shape[1] ~= width then
        raise("%s: %s %s does not match input %s (must be [%d])", what, name, shape_string(t.shape),
          shape_string(x.shape), width)
      end
    end
  end
  if delta then
    need_like(what, x, delta, "the second input")
    if shape_string(delta.shape) ~= shape_string(x.shape) then
      raise("%s: inputs %s and %s differ", what, shape_string(x.shape), shape_string(delta.shape))
    end
  end
  local lead = {}
  for i = 1, #x.shape - 1 do lead[i] = x.shape[i] end
  return lead, x.dtype == "f64" and "f64" or "f32"
end

--- dx, dw, db of a norm whose normalised input was `x`.
local function norm_gradients(r, x, dy, dsum)
  local dw, db, add_w, add_b
  if needs(r.w) then dw, add_w = sink(r.w) end
  if needs(r.b) then db, add_b = sink(r.b) end
  local dx = new(x.shape, x.dtype, x.device)
  if dw and db and add_w ~= add_b then -- one fresh, one not: the kernel knows one mode
    local fresh = add_w == 0 and dw or db
    run("fill", fresh.device, fresh._c, 0)
    add_w = 1
  end
  run("norm_backward", x.device, dx._c, dw and dw._c or nil, db and db._c or nil,
    dy:contiguous()._c, x._c, r.w and r.w._c or nil, r.mean and r.mean._c or nil, r.rstd._c,
    dsum and dsum:contiguous()._c or nil, add_w or add_b or 0)
  return dx, dw, db
end

local function define_norm(name, with_mean)
  local mean_arg = with_mean and "mean" or "nil"
  local function stats(lead, dtype, device)
    local rstd = new(lead, dtype, device)
    if with_mean then return new(lead, dtype, device), rstd end
    return rstd
  end
  local saved = with_mean and { "mean", "rstd" } or { "rstd" }
  local plain = define(name, {
    inputs = { "x", "w?", "b?" }, args = { "eps" }, saved = saved, kernel = "norm",
    call = { "y", "nil", mean_arg, "rstd", "x", "nil", "w", "b", "eps" },
    infer = function(x, w, b)
      local lead, dtype = norm_shapes(name, x, nil, w, b)
      return new(x.shape, x.dtype, x.device), stats(lead, dtype, x.device)
    end,
    backward = function(r, dy) return norm_gradients(r, r.x, dy) end,
  })
  local fused = define("add_" .. name, {
    inputs = { "x", "delta", "w?", "b?" }, args = { "eps", "into" }, outputs = { "sum", "y" },
    saved = saved, kernel = "norm",
    call = { "y", "sum", mean_arg, "rstd", "x", "delta", "w", "b", "eps" }, partial = true,
    infer = function(x, delta, w, b, _, into)
      local lead, dtype = norm_shapes(name, x, delta, w, b)
      return into or new(x.shape, x.dtype, x.device), new(x.shape, x.dtype, x.device),
        stats(lead, dtype, x.device)
    end,
    backward = function(r, dsum, dy)
      if not dy then return dsum, dsum end
      local dx, dw, db = norm_gradients(r, r.sum, dy, dsum or nil)
      return dx, dx, dw, db
    end,
  })
  local why = ("by %s { inplace = true }, whose sum has its memory"):format(name)
  --- With `delta`, normalises x + delta and returns the sum as well: `sum, y`.
  -- @tparam[opt] table options { inplace = true }: where nothing else needs delta, the sum takes
  --   its memory, and delta is gone
  F[name] = function(x, w, b, eps, delta, options)
    eps = eps or 1e-5
    tensor.need_tensor(x, name, 1)
    if not delta then return plain(x:contiguous(), w, b, eps) end
    tensor.need_tensor(delta, name, 5)
    local into = options and options.inplace and autograd.spare(delta)
      and tensor.view.alias(delta) or nil
    local sum, y = fused(x:contiguous(), delta:contiguous(), w, b, eps, into)
    if into then scope.release(delta, why) end
    return sum, y
  end
end
define_norm("layer_norm", true)
define_norm("rms_norm", false)

-- ---- embedding, rotary

local embedding = define("embedding", {
  inputs = { "w", "index" }, kernel = "embedding", call = { "y", "w", "index" },
  unread = { w = true },
  infer = function(w, index)
    if index.dtype ~= "i64" and index.dtype ~= "i32" and index.dtype ~= "u8" then
      raise("embedding: indices must be i64 or i32, not %s", index.dtype)
    end
    if #w.shape ~= 2 then
      raise("embedding: the weight must be [rows x width], not %s", shape_string(w.shape))
    end
    local shape = { unpack(index.shape) }
    shape[#shape + 1] = w.shape[2]
    return new(shape, w.dtype, w.device)
  end,
  backward = function(r, dy)
    local dw, add = sink(r.w)
    run("embedding_backward", dw.device, dw._c, dy:contiguous()._c, r.index._c, add)
    return dw
  end,
})
--- Rows of w [V x C] by 0-based index […] → [… C].
function F.embedding(index, w) return embedding(w, index) end

local rotary = define("rotary", {
  args = { "offset", "base", "interleaved", "inverse" }, kernel = "rotary",
  infer = function(x)
    need_floating(x, "rotary")
    if #x.shape ~= 4 or x.shape[4] % 2 ~= 0 then
      raise("rotary: expects [B x T x H x D] with an even D, got %s", shape_string(x.shape))
    end
    return new(x.shape, x.dtype, x.device)
  end,
  backward = function(r, dy)
    return F.rotary_(dy, r.offset, r.base, r.interleaved, 1 - r.inverse)
  end,
})
F.rotary_ = rotary
--- Rotary position embedding (Su et al. 2021) of x [B x T x H x D]: position t + offset, t from 0.
-- @tparam[opt] table options { base = 10000, offset = 0, interleaved = false }
function F.rotary(x, options)
  options = options_of("rotary", options, { base = true, offset = true, interleaved = true })
  return rotary(x, options.offset or 0, options.base or 10000, options.interleaved and 1 or 0, 0)
end

-- ---- attention

local function check_attention(q, k, v, mask)
  need_floating(q, "attention")
  need_like("attention", q, k, "the key")
  need_like("attention", q, v, "the value")
  local a, b, c = q.shape, k.shape, v.shape
  if #a ~= 4 or #b ~= 4 or #c ~= 4 or a[1] ~= b[1] or a[4] ~= b[4]
    or shape_string(b) ~= shape_string(c) or b[3] == 0 or a[3] % b[3] ~= 0 then
    raise("attention: query %s, key %s, value %s do not fit; "
      .. "expects [B x T x H x D] and [B x S x G x D] with H a multiple of G",
      shape_string(a), shape_string(b), shape_string(c))
  end
  if mask then
    local want, m = { a[1], a[3], a[2], b[2] }, mask.shape
    if mask.dtype ~= "bool" and not floating[mask.dtype] then
      raise("attention: the mask must be bool or floating, not %s", mask.dtype)
    end
    for i = 0, math.max(#m, 4) - 1 do
      local have = m[#m - i] or 1
      if have ~= 1 and have ~= want[4 - i] then
        raise("attention: mask %s does not broadcast to %s", shape_string(m), shape_string(want))
      end
    end
  end
end

local function dense_last(t)
  if t._c.stride[#t.shape - 1] == 1 or t.shape[#t.shape] == 1 then return t end
  return t:contiguous()
end

local attention = define("attention", {
  inputs = { "q", "k", "v", "mask?" }, args = { "causal", "scale", "p", "seed", "offset" },
  saved = { "lse" }, kernel = "attention",
  infer = function(q, k, v, mask)
    check_attention(q, k, v, mask)
    local s = q.shape
    return new(s, q.dtype, q.device),
      new({ s[1], s[3], s[2] }, q.dtype == "f64" and "f64" or "f32", q.device)
  end,
  backward = function(r, dy)
    local q, k, v = r.q, r.k, r.v
    local dq, dk, dv = new(q.shape, q.dtype, q.device), new(k.shape, k.dtype, k.device),
      new(v.shape, v.dtype, v.device)
    run("attention_backward", q.device, dq._c, dk._c, dv._c, dense_last(dy)._c,
      r.y._c, r.lse._c, q._c, k._c, v._c, r.mask and r.mask._c or nil,
      r.causal, r.scale, r.p, r.seed, r.offset)
    return dq, dk, dv
  end,
})

local attention_options = {
  causal = true, mask = true, dropout = true, scale = true, training = true,
}

local function dropout_numbers(options, numel)
  local p = options.training ~= false and options.dropout or 0
  if p == 0 then return 0, 0, 0 end
  return p, draw(numel)
end

--- softmax(q kᵀ · scale + mask) v: q [B x T x H x D], k and v [B x S x G x D], H a multiple of G.
-- @tparam[opt] table options { causal = false (row t sees s ≤ t + S − T),
--   mask = bool (false: hidden) or floating (added), [B x H x T x S] by broadcasting,
--   scale = 1/√D, dropout = 0 }
function F.scaled_dot_product_attention(q, k, v, options)
  options = options_of("attention", options, attention_options)
  for i, t in ipairs { q or false, k or false, v or false } do
    tensor.need_tensor(t, "attention", i)
  end
  local s = q.shape
  local mask = options.mask
  if mask and #mask.shape < 4 then
    local shape = { unpack(mask.shape) }
    while #shape < 4 do table.insert(shape, 1, 1) end
    mask = mask:reshape(shape)
  end
  if mask and floating[mask.dtype] and mask.requires_grad then
    raise("attention: a mask has no gradient; use mask:detach()")
  end
  return attention(dense_last(q), dense_last(k), dense_last(v), mask, options.causal and 1 or 0,
    options.scale or 1 / math.sqrt(s[4] or 1),
    dropout_numbers(options, numel_of { s[1] or 1, s[2] or 1, s[3] or 1, k.shape[2] or 1 }))
end

local packed_attention = define("packed_attention", {
  inputs = { "qkv" }, args = { "h", "g", "d", "causal", "scale", "p", "seed", "offset" },
  saved = { "lse" },
  infer = function(qkv, h, g, d, causal, scale, p, seed, offset)
    local b, t = qkv.shape[1], qkv.shape[2]
    local y = new({ b, t, h * d }, qkv.dtype, qkv.device)
    local lse = new({ b, h, t }, qkv.dtype == "f64" and "f64" or "f32", qkv.device)
    run("attention", qkv.device, heads(1, y, 0, h, d), lse._c, heads(2, qkv, 0, h, d),
      heads(3, qkv, h, g, d), heads(4, qkv, h + g, g, d), nil, causal, scale, p, seed, offset)
    return y, lse
  end,
  backward = function(r, dy)
    local qkv, h, g, d = r.qkv, r.h, r.g, r.d
    local dqkv = new(qkv.shape, qkv.dtype, qkv.device)
    run("attention_backward", qkv.device, heads(1, dqkv, 0, h, d), heads(2, dqkv, h, g, d),
      heads(3, dqkv, h + g, g, d), heads(4, dy:contiguous(), 0, h, d), heads(5, r.y, 0, h, d),
      r.lse._c, heads(6, qkv, 0, h, d), heads(7, qkv, h, g, d), heads(8, qkv, h + g, g, d), nil,
      r.causal, r.scale, r.p, r.seed, r.offset)
    return dqkv
  end,
})

--- Self-attention on the packed projection qkv [B x T x (H + 2G)·D] → [B x T x H·D],
-- without a copy.
-- @tparam table options { n_head = H, n_kv_head = H, causal = false, scale = 1/√D, dropout = 0 }
function F.attention(qkv, options)
  options = options_of("attention", options, {
    n_head = true, n_kv_head = true, causal = true, dropout = true, scale = true, training = true,
  })
  tensor.need_tensor(qkv, "attention", 1)
  need_floating(qkv, "attention")
  local h = options.n_head
  local g = options.n_kv_head or h
  local s = qkv.shape
  if type(h) ~= "number" or #s ~= 3 or h % g ~= 0 or s[3] % (h + 2 * g) ~= 0 then
    raise("attention: input %s with %s heads and %s key heads; "
      .. "expects [B x T x (H + 2G)·D] with H a multiple of G",
      shape_string(s), tostring(h), tostring(g))
  end
  local d = s[3] / (h + 2 * g)
  return packed_attention(qkv:contiguous(), h, g, d, options.causal and 1 or 0,
    options.scale or 1 / math.sqrt(d), dropout_numbers(options, s[1] * h * s[2] * s[2]))
end

-- ---- losses

local loss_reductions = { none = 0, mean = 1, sum = 2 }

local cross_entropy = define("cross_entropy", {
  inputs = { "logits", "target" }, args = { "ignore", "smoothing", "reduction" },
  outputs = { "loss" }, saved = { "lse" }, kernel = "cross_entropy",
  call = { "loss", "lse", "logits", "target", "ignore", "smoothing", "reduction" },
  infer = function(logits, _, _, _, reduction)
    local n = logits.shape[1]
    return new(reduction == 0 and { n } or {}, fine(logits), logits.device),
      new({ n }, fine(logits), logits.device)
  end,
  backward = function(r, dloss)
    local d = new(r.logits.shape, r.logits.dtype, r.logits.device)
    run("cross_entropy_backward", d.device, d._c, dloss:contiguous()._c, r.logits._c,
      r.target._c, r.lse._c, r.ignore, r.smoothing, r.reduction)
    return d
  end,
})

--- Cross-entropy of logits [… V] and class indices […], in f32.
-- @tparam[opt] table options { ignore_index = −100, label_smoothing = 0,
--   reduction = "mean" | "sum" | "none" }
function F.cross_entropy(logits, target, options)
  options = options_of("cross_entropy", options, {
    ignore_index = true, label_smoothing = true, reduction = true,
  })
  tensor.need_tensor(logits, "cross_entropy", 1)
  tensor.need_tensor(target, "cross_entropy", 2)
  need_targets("cross_entropy", logits, target)
  local reduction = loss_reductions[options.reduction or "mean"]
  if not reduction then
    raise("cross_entropy: unknown reduction '%s'; there are mean, sum, none", options.reduction)
  end
  local v = logits.shape[#logits.shape]
  local loss = cross_entropy(logits:reshape(-1, v):contiguous(), target:reshape(-1):contiguous(),
    options.ignore_index or -100, options.label_smoothing or 0, reduction)
  return reduction == 0 and loss:reshape(target.shape) or loss
end

--- Mean squared error; { reduction = "mean" | "sum" | "none" }.
function F.mse_loss(x, y, options)
  options = options_of("mse_loss", options, { reduction = true })
  local d = (x - y):square()
  local how = options.reduction or "mean"
  return how == "mean" and d:mean() or how == "sum" and d:sum() or d
end

F.where, F.cat, F.stack = ops.where, views.cat, views.stack
function F.one_hot(x, classes) return x:one_hot(classes) end

return F
