-- Every operation: its gradient against finite differences, its shape on the meta device, its
-- values against plain Lua. The cases are matched with the list of operations: a new one without a
-- case fails.

local ds = require "ds"
local autograd = require "ds.autograd"
local tensor = require "ds.tensor"
local host = require("ds.ffi").host
local F = ds.F
local gradcheck, close = ds.testing.gradcheck, ds.testing.assert_close

local function randn(...) return ds.randn(...) end
-- values away from kinks at 0 and ±1, and from each other
local function spread(n) return ds.arange(n, { dtype = "f64" }) * 0.37 - 1.93 end
local function positive(...) return ds.rand(...) + 0.5 end
local function ids(values) return ds.tensor(values, "i64") end

-- Inputs where a unary operation is defined and smooth.
local unary_inputs = {
  default = function() return randn(3, 4) end,
  sqrt = function() return positive(3, 4) end, rsqrt = function() return positive(3, 4) end,
  log = function() return positive(3, 4) end, log1p = function() return positive(3, 4) end,
  reciprocal = function() return positive(3, 4) end,
  abs = function() return spread(12):reshape(3, 4) end,
  relu = function() return spread(12):reshape(3, 4) end,
}

local mask = function()
  return ds.tensor { { true, false, true, true }, { false, true, true, false } }
end

-- name → function() returning f and its inputs
local cases = {
  add = function() return function(a, b) return a + b end, { randn(2, 3, 4), randn(3, 1) } end,
  sub = function() return function(a, b) return a - b end, { randn(4), randn(3, 4) } end,
  mul = function() return function(a, b) return a * b end, { randn(2, 1, 4), randn(3, 4) } end,
  div = function() return function(a, b) return a / b end, { randn(3, 4), positive(4) } end,
  pow = function() return function(a, b) return a ^ b end, { positive(3, 4), randn(3, 4) } end,
  maximum = function()
    return function(a, b) return a:maximum(b) end, { spread(6), spread(6) * -0.8 + 0.1 }
  end,
  minimum = function()
    return function(a, b) return a:minimum(b) end, { spread(6), spread(6) * -0.8 + 0.1 }
  end,
  add_scalar = function() return function(a) return 2 + a + 1 end, { randn(3) } end,
  sub_scalar = function() return function(a) return (2 - a) * (a - 3) end, { randn(3) } end,
  mul_scalar = function() return function(a) return 3 * a * -2 end, { randn(3) } end,
  div_scalar = function() return function(a) return 2 / a + a / 4 end, { positive(3) } end,
  pow_scalar = function() return function(a) return a ^ 3 + 2 ^ a end, { positive(3) } end,
  maximum_scalar = function() return function(a) return a:maximum(0.3) end, { spread(8) } end,
  minimum_scalar = function() return function(a) return a:minimum(0.3) end, { spread(8) } end,
  clamp = function() return function(a) return a:clamp(-0.5, 0.9) end, { spread(9) } end,
  where = function()
    return function(a, b) return ds.where(mask(), a, b) end, { randn(2, 4), randn(4) }
  end,
  masked_fill = function()
    return function(a) return a:masked_fill(mask(), 7) end, { randn(2, 4) }
  end,
  to = function() return function(a) return a:to("f64") * 2 end, { randn(3) } end,
  clone = function() return function(a) return a:clone() * a end, { randn(3) } end,
  reshape = function()
    return function(a) return a:transpose(1, 2):reshape(6) ^ 2 end, { randn(2, 3) }
  end,
  transpose = function()
    return function(a) return a:transpose(1, -1) * 2 end, { randn(2, 3, 4) }
  end,
  permute = function() return function(a) return a:permute(3, 1, 2) ^ 2 end, { randn(2, 3, 4) } end,
  narrow = function() return function(a) return a:narrow(2, 2, 2) ^ 2 end, { randn(3, 4) } end,
  select = function() return function(a) return a:select(1, -1) ^ 2 end, { randn(3, 4) } end,
  expand = function() return function(a) return a:expand(2, 3, 4) ^ 2 end, { randn(3, 1) } end,
  cat = function()
    return function(a, b) return ds.cat({ a, b, a }, 2) ^ 2 end, { randn(2, 3), randn(2, 1) }
  end,
  gather = function()
    return function(a) return a:gather(2, ids { { 0, 0 }, { 2, 1 } }) ^ 2 end, { randn(2, 3) }
  end,
  index_select = function()
    return function(a) return a:index_select(1, ids { 2, 0, 2 }) ^ 2 end, { randn(3, 2) }
  end,
  masked_select = function()
    return function(a) return a:masked_select(mask()) ^ 2 end, { randn(2, 4) }
  end,
  triangle = function()
    return function(a) return a:tril() + a:triu(1) * 2 end, { randn(2, 3, 3) }
  end,
  sum = function() return function(a) return a:sum({ 1, 3 }) ^ 2 end, { randn(2, 3, 4) } end,
  mean = function()
    return function(a) return a:mean(2, { keepdim = true }) ^ 2 end, { randn(2, 3, 4) }
  end,
  max = function() return function(a) return a:amax(2) end, { spread(12):reshape(3, 4) } end,
  min = function() return function(a) return a:amin(1) end, { spread(12):reshape(3, 4) } end,
  prod = function() return function(a) return a:prod(2) end, { positive(3, 4) } end,
  cumsum = function() return function(a) return a:cumsum(2) ^ 2 end, { randn(3, 4) } end,
  sort = function()
    return function(a) return (a:sort(1, { descending = true })) ^ 2 end, { randn(5, 2) }
  end,
  topk = function() return function(a) return (a:topk(2, 1)) ^ 2 end, { randn(5, 2) } end,
  matmul = function()
    return function(a, b) return a:matmul(b) end, { randn(2, 1, 3, 4), randn(5, 4, 2) }
  end,
  linear = function()
    return function(x, w, b) return F.linear(x, w, b, { activation = "gelu" }) + F.linear(x, w) end,
      { randn(2, 3, 4), randn(5, 4), randn(5) }
  end,
  mlp = function()
    return function(x, w1, b1, w2, b2)
      return F.mlp(x, w1, b1, w2, b2, { activation = "gelu" }) * 2
        + F.mlp(x, w1, nil, w2, nil, { activation = "silu" })
    end, { randn(2, 3, 4), randn(5, 4), randn(5), randn(2, 5), randn(2) }
  end,
  dropout = function() return function(a) return F.dropout(a, 0.4) end, { randn(4, 5) } end,
  softmax = function() return function(a) return a:softmax(2) end, { randn(2, 3, 4) } end,
  log_softmax = function() return function(a) return a:log_softmax(-1) end, { randn(3, 4) } end,
  layer_norm = function()
    return function(x, w, b) return F.layer_norm(x, w, b) end, { randn(3, 5), randn(5), randn(5) }
  end,
  add_layer_norm = function()
    return function(x, d, w, b)
      local s, y = F.layer_norm(x, w, b, 1e-5, d)
      return s * 2, y
    end, { randn(3, 5), randn(3, 5), randn(5), randn(5) }
  end,
  rms_norm = function()
    return function(x, w) return F.rms_norm(x, w) end, { randn(3, 5), randn(5) }
  end,
  add_rms_norm = function()
    return function(x, d, w)
      local s, y = F.rms_norm(x, w, nil, 1e-5, d)
      return s * 2, y
    end, { randn(3, 5), randn(3, 5), randn(5) }
  end,
  embedding = function()
    return function(w) return F.embedding(ids { { 0, 3 }, { 3, 1 } }, w) ^ 2 end, { randn(4, 3) }
  end,
  rotary = function()
    return function(x) return F.rotary(x, { offset = 2 }) ^ 2 end, { randn(1, 3, 2, 4) }
  end,
  attention = function()
    return function(q, k, v)
      return F.scaled_dot_product_attention(q, k, v, { causal = true }),
        F.scaled_dot_product_attention(q, k, v,
          { mask = ds.tensor { { true, false, true, true, true } } })
    end, { randn(2, 3, 4, 2), randn(2, 5, 2, 2), randn(2, 5, 2, 2) }
  end,
  packed_attention = function()
    return function(x)
      return F.attention(x, { n_head = 4, n_kv_head = 2, causal = true, dropout = 0.2 })
    end, { randn(2, 3, 16) }
  end,
  cross_entropy = function()
    return function(x)
      return F.cross_entropy(x, ids { 1, 0, -100, 3 }), F.cross_entropy(x, ids { 1, 0, 2, 3 },
        { reduction = "none", label_smoothing = 0.1 })
    end, { randn(4, 5) }
  end,
  linear_cross_entropy = function()
    return function(x, w)
      return F.linear_cross_entropy(x, w, ids { 1, 0, -100, 3 }) * 3
    end, { randn(4, 6), randn(5, 6) }
  end,
}
for _, entry in ipairs(host.unary) do
  if entry.saved then
    cases[entry.name] = function()
      return tensor.methods[entry.name], { (unary_inputs[entry.name] or unary_inputs.default)() }
    end
  end
end

describe("gradients", function()
  for _, name in ipairs(autograd.order) do
    if autograd.ops[name].backward then
      it(name, function()
        assert(cases[name], "operation '" .. name .. "' has a gradient and no case in this file")
        ds.seed(7)
        local f, inputs = cases[name]()
        gradcheck(f, inputs)
      end)
    end
  end
end)

describe("low precision", function()
  -- f32 and bf16 follow f64, forward and backward
  for dtype, tolerance in pairs { f32 = 2e-5, bf16 = 4e-2, f16 = 6e-3 } do
    it(dtype, function()
      for _, name in ipairs(autograd.order) do
        if autograd.ops[name].backward and name ~= "to" then
          ds.seed(11)
          local f, inputs = cases[name]()
          local function run(to)
            local leaves = {}
            for i, t in ipairs(inputs) do
              leaves[i] = t:to(dtype):to(to):detach():requires_grad_():keep()
            end
            ds.seed(5)
            local out, total = { f(unpack(leaves)) }, nil
            for _, y in ipairs(out) do
              if y:is_floating_point() then
                y:keep()
                total = total and total + y:float():sum() or y:float():sum()
              end
            end
            total:backward()
            for _, t in ipairs(leaves) do out[#out + 1] = t.grad end
            return out
          end
          local fine, coarse = run("f64"), run(dtype)
          for i, y in ipairs(fine) do
            if y:is_floating_point() then
              local size = math.max(1, y:double():abs():amax():item())
              local ok, message = pcall(close, coarse[i], y,
                { rtol = tolerance, atol = tolerance * size })
              assert(ok, name .. " output " .. i .. ": " .. tostring(message))
            end
          end
        end
      end
    end)
  end
end)

describe("the meta device", function()
  it("gives every operation's shapes and dtypes", function()
    for _, name in ipairs(autograd.order) do
      if autograd.ops[name].backward and name ~= "masked_select" then
        ds.seed(3)
        local f, inputs = cases[name]()
        local shadow = {}
        for i, t in ipairs(inputs) do shadow[i] = t:to("meta") end
        local real = { f(unpack(inputs)) }
        local ok, message = pcall(function()
          local meta = ds.on("meta", function() return { f(unpack(shadow)) } end)
          for i, y in ipairs(real) do
            assert.same(y.shape, meta[i].shape)
            assert.equal(y.dtype, meta[i].dtype)
            assert.equal("meta", meta[i].device)
          end
        end)
        assert(ok, name .. ": " .. tostring(message))
      end
    end
  end)
end)

describe("values", function()
  local x = ds.tensor { { 3, -1, 2 }, { 0, 5, -4 } }
  it("comparisons, logic and masks", function()
    assert.same({ { true, false, true }, { false, true, false } }, x:gt(0):tolist())
    assert.same({ { false, true, false }, { true, false, true } }, x:le(0):tolist())
    assert.same({ { true, true, true }, { false, true, true } },
      x:gt(0):logical_or(x:lt(0)):tolist())
    assert.same({ 3, 2, 5 }, x:masked_select(x:gt(0)):tolist())
    assert.is_true(x:eq(x):all():item())
    assert.is_false(x:isnan():any():item())
    assert.same({ { 3, 0, 2 }, { 0, 5, 0 } }, ds.where(x:gt(0), x, 0):tolist())
  end)
  it("reductions", function()
    assert.equal(5, x:sum():item())
    assert.same({ 3, 4, -2 }, x:sum(1):tolist())
    assert.same({ { 4 }, { 1 } }, x:sum(-1, { keepdim = true }):tolist())
    local values, indices = x:max(2)
    assert.same({ 3, 5 }, values:tolist())
    assert.same({ 0, 1 }, indices:tolist())
    assert.equal(5, x:argmin():item())
    assert.equal(-4, x:min():item())
    assert.equal(6, ds.ones(2, 3, { dtype = "bool" }):sum():item())
    close(x:var(2), ds.tensor { 13 / 3, 61 / 3 })
  end)
  it("order", function()
    local values, indices = x:sort(2)
    assert.same({ { -1, 2, 3 }, { -4, 0, 5 } }, values:tolist())
    assert.same({ { 1, 2, 0 }, { 2, 0, 1 } }, indices:tolist())
    assert.same({ { 3, 2 }, { 5, 0 } }, (x:topk(2)):tolist())
    assert.same({ { 3, 2, 4 }, { 0, 5, 1 } }, x:cumsum(2):tolist())
    assert.same({ { 0, 0, 1 }, { 1, 0, 0 } }, F.one_hot(ids { 2, 0 }, 3):tolist())
  end)
  it("integers stay integers, division does not", function()
    local n = ids { 7, 2 }
    assert.equal("i64", (n * n).dtype)
    assert.equal("f32", (n / 2).dtype)
    assert.equal("f32", (n * 0.5).dtype)
    assert.equal("i64", (n + 1).dtype)
    assert.equal("f32", (n + ds.ones(2)).dtype)
    assert.same({ 3.5, 1 }, (n / 2):tolist())
  end)
end)
