-- Elementwise kernels: every operation of ops.def, in every dtype, however operands lie.

local ds = require "ds"
local tensor = require "ds.tensor"
local host = require("ds.ffi").host
local helper = require "tests.cuda.helper"

local floats = { "f32", "bf16", "f16" }
local all = { "f32", "bf16", "f16", "i64", "i32", "u8" }

--- Values of a dtype: normal numbers, or small integers of both signs.
local function values(shape, dtype)
  if tensor.floating[dtype] then return helper.randn(shape, { dtype = dtype }) end
  local low = dtype == "u8" and 0 or -9
  return ds.randint(low, 100, shape, { dtype = "i64", device = "cpu" }):to(dtype):keep()
end

local function mask(shape) return helper.randn(shape):gt(0):keep() end

--- Calls a kernel on x's device: the result has x's shape and `dtype`.
local function kernel(name, x, dtype, ...)
  local y = tensor.new(x.shape, dtype, x.device)
  local args = { ... }
  for i = 1, #args do
    if tensor.is_tensor(args[i]) then args[i] = args[i]._c end
  end
  tensor.run(name, x.device, y._c, unpack(args))
  return y
end

-- How [n x 40] may lie: each gives a tensor of shape [4 x 33] or so, from the same numbers.
local lies = {
  dense = function(x) return x end,
  transposed = function(x) return x:t():contiguous():t() end,
  shifted = function(x) return x:reshape(-1):narrow(1, 2, 165):reshape(5, 33) end,
  rows = function(x) return x:narrow(2, 9, 16) end,
  gaps = function(x) return x:narrow(2, 4, 13) end,
}

describe("one input", function()
  for _, entry in ipairs(host.unary) do
    local name = entry.name
    it(name, function()
      for dtype_at, dtype in ipairs(entry.integer and all or floats) do
        local x, dy = values({ 5, 40 }, dtype), values({ 5, 40 }, dtype)
        for how, view in pairs(lies) do
          if how == "dense" or dtype_at == 1 then
            local what = name .. " " .. dtype .. " " .. how
            helper.both(what, function(v) return kernel(name, view(v), dtype, view(v)) end, { x })
            if tensor.floating[dtype] then
              helper.both(what .. " backward", function(v, d)
                return kernel(name .. "_backward", view(v), dtype, view(d), view(v))
              end, { x, dy })
            end
          end
        end
      end
    end)
  end

  it("takes zeros, infinities and NaN as the CPU does", function()
    local inf = math.huge
    local special = ds.tensor({ 0, -0.0, inf, -inf, 0 / 0, 1, -1, 0.5, 2.5, -2.5, 1e-41 },
      { device = "cpu" })
    for _, entry in ipairs(host.unary) do
      for _, dtype in ipairs(floats) do
        helper.both(entry.name .. " " .. dtype, function(x)
          return kernel(entry.name, x, x.dtype, x)
        end, { special:to(dtype) })
      end
    end
    for _, name in ipairs(host.binary) do
      helper.both(name, function(x)
        return kernel(name, x:reshape(11, 1):expand(11, 11), "f32", x:reshape(11, 1), x)
      end, { special })
    end
  end)

  it("works in place, and on nothing", function()
    helper.both("in place", function(x)
      local y = x:clone()
      y:exp_()
      y:t():neg_()
      return y
    end, { values({ 7, 13 }, "f32") })
    helper.both("nothing", function(x) return x:exp(), x:narrow(1, 1, 0) + 1 end,
      { values({ 0, 3 }, "f32") })
    helper.both("one number", function(x) return x:exp() end, { values({}, "bf16") })
  end)

  it("has the gradients of the CPU", function()
    for _, entry in ipairs(host.unary) do
      if entry.saved then
        helper.both(entry.name, function(x) return x[entry.name](x) end,
          { helper.randn({ 3, 9 }, { grad = true, shift = 0.5 }) })
      end
    end
  end)
end)

describe("two inputs", function()
  -- shapes that broadcast to [5 x 40], and ways to lie
  local pairs_of = {
    same = function(a, b) return a, b end,
    row = function(a, b) return a, b:select(1, 2) end,
    column = function(a, b) return a:narrow(2, 3, 1), b end,
    number = function(a, b) return a, b:select(1, 3):select(1, 5) end,
    transposed = function(a, b) return a, lies.transposed(b) end,
    shifted = function(a, b) return lies.shifted(a), lies.shifted(b) end,
    shifted_once = function(a, b) return lies.shifted(a), b:narrow(2, 1, 33) end,
    middle = function(a, b) return a:reshape(5, 5, 8), b:narrow(2, 1, 8):reshape(5, 1, 8) end,
    expanded = function(a, b) return a, b:select(1, 1):expand(5, 40) end,
  }

  local function check(name, dtypes, result)
    for dtype_at, dtype in ipairs(dtypes) do
      local a, b = values({ 5, 40 }, dtype), values({ 5, 40 }, dtype)
      for how, views in pairs(pairs_of) do
        if how == "same" or how == "row" or dtype_at == 1 then
          helper.both(name .. " " .. dtype .. " " .. how, function(x, y)
            local p, q = views(x, y)
            local wide = #p.shape > 2 and p or q
            if how == "row" or how == "number" then wide = p end
            return kernel(name, wide, result or dtype, p, q)
          end, { a, b })
        end
      end
      for flip = 0, 1 do
        for _, s in ipairs { 3, 2, tensor.floating[dtype] and 1.3 or 1 } do
          helper.both(("%s_scalar %s %g %d"):format(name, dtype, s, flip), function(x)
            return kernel(name .. "_scalar", x, result or dtype, x, s, flip),
              kernel(name .. "_scalar", lies.gaps(x), result or dtype, lies.gaps(x), s, flip)
          end, { a })
        end
      end
    end
  end

  for _, name in ipairs(host.binary) do
    local floating_only = name == "div" or name == "pow"
    it(name, function() check(name, floating_only and floats or all) end)
  end
  for _, name in ipairs(host.compare) do
    it(name, function()
      check(name, all, "bool")
      helper.both("bool", function(a, b) return kernel(name, a, "bool", a, b) end,
        { mask { 41 }, mask { 41 } })
    end)
  end

  it("knows powers that are something simpler", function()
    for _, p in ipairs { 2, 0.5, -0.5, -1, 0, 1 } do
      helper.both("pow " .. p, function(x) return x:pow(p) end, { values({ 37 }, "f32"):abs() })
    end
  end)

  it("has the gradients of the CPU", function()
    local function grad(shape) return helper.randn(shape, { grad = true, shift = 3 }) end
    for _, name in ipairs(host.binary) do
      helper.both(name, function(a, b) return a[name](a, b) end, { grad { 4, 9 }, grad { 4, 9 } })
      helper.both(name .. " by a number", function(a) return a[name](a, 1.7) end, { grad { 4, 9 } })
    end
  end)

  it("changes in place", function()
    helper.both("in place", function(x, y)
      local z = x:clone()
      z:add_(y):mul_(2):sub_(y:select(1, 1), 0.5):maximum_(0.1)
      z:add_(z)
      return z
    end, { values({ 5, 8 }, "f32"), values({ 5, 8 }, "f32") })
  end)

  it("takes rows of packs that begin anywhere, and rows that end in a pack", function()
    for _, dtype in ipairs(all) do
      helper.both(dtype, function(x, y)
        local a, b = x:narrow(2, 1, 16), y:narrow(2, 1, 13)
        local z = y:clone()
        z:narrow(2, 1, 13):add_(1)
        return a:clone(), b:clone(), a + a, b + b, a:lt(3), b:lt(3), z
      end, { values({ 5, 41 }, dtype), values({ 5, 48 }, dtype) })
    end
  end)

  it("cuts what is too large for one launch", function()
    for _, dtype in ipairs { "f32", "bf16" } do
      helper.both("dense", function(x, y) return x + y, x:ge(y) end,
        { values({ 9001 }, dtype), values({ 9001 }, dtype) })
      helper.both("rows", function(x, y) return x * y end,
        { values({ 3, 61, 40 }, dtype), values({ 61, 1 }, dtype) })
      helper.both("across", function(x, y) return x + y:t() end,
        { values({ 70, 71 }, dtype), values({ 71, 70 }, dtype) })
    end
  end)
end)

describe("the rest", function()
  it("add_scaled, clamp", function()
    for _, dtype in ipairs(all) do
      local x, y = values({ 5, 40 }, dtype), values({ 5, 40 }, dtype)
      for how, view in pairs(lies) do
        helper.both("clamp " .. dtype .. " " .. how, function(a)
          return kernel("clamp", view(a), dtype, view(a), -0.5, 20.7),
            kernel("clamp", view(a), dtype, view(a), -math.huge, 0.25),
            kernel("clamp", view(a), dtype, view(a), 0.5, math.huge)
        end, { x })
        helper.both("add_scaled " .. dtype .. " " .. how, function(a, b)
          local alpha = tensor.floating[dtype] and 0.3 or -1
          return kernel("add_scaled", view(a), dtype, view(a), view(b), alpha)
        end, { x, y })
        if tensor.floating[dtype] then
          helper.both("clamp_backward " .. dtype, function(a, b)
            return kernel("clamp_backward", view(a), dtype, view(b), view(a), -0.5, 0.7)
          end, { x, y })
        end
      end
    end
    helper.both("clamp", function(x) return x:clamp(-1, 1) end,
      { helper.randn({ 7, 9 }, { grad = true }) })
  end)

  it("where, masked_fill", function()
    for _, dtype in ipairs { "f32", "bf16", "f16", "i64", "i32", "u8", "bool" } do
      local a = dtype == "bool" and mask { 5, 40 } or values({ 5, 40 }, dtype)
      local b, c = a:flatten():clone():reshape(5, 40), mask { 5, 40 }
      if dtype ~= "bool" then b = values({ 5, 40 }, dtype) end
      for how, view in pairs(lies) do
        helper.both("where " .. dtype .. " " .. how, function(m, x, y)
          return kernel("where", view(x), dtype, view(m), view(x), view(y)),
            kernel("where", x, dtype, m:select(1, 1), x, y:select(1, 2)),
            kernel("masked_fill", view(x), dtype, view(x), view(m), 1)
        end, { c, a, b })
      end
    end
    helper.both("masked_fill", function(x, m) return x:masked_fill(m, -1.7), x:masked_fill(m,
      -math.huge) end, { values({ 5, 40 }, "bf16"), mask { 40 } })
    helper.both("gradients", function(m, x, y) return ds.where(m, x, y) end,
      { mask { 7 }, helper.randn({ 4, 7 }, { grad = true }),
        helper.randn({ 4, 7 }, { grad = true }) })
  end)

  it("logical operations, isfinite", function()
    helper.both("logical", function(a, b)
      return a:logical_and(b), a:logical_or(b:select(1, 1)), a:t():logical_not(), a:logical_not()
    end, { mask { 9, 37 }, mask { 9, 37 } })
    local x = ds.tensor({ 1, 1 / 0, -1 / 0, 0 / 0, 0, 6e4 }, { device = "cpu" })
    for _, dtype in ipairs(floats) do
      helper.both("isfinite " .. dtype, function(v) return v:isfinite(), v:isnan() end,
        { x:to(dtype) })
    end
  end)
end)

describe("what is refused", function()
  local function on_cuda(dtype) return ds.zeros(3, { device = "cuda", dtype = dtype }) end

  it("dtypes, by name", function()
    assert.has_error(function() tensor.run("exp", "cuda", on_cuda("i64")._c, on_cuda("i64")._c) end,
      "exp: not for i64; use :float() first")
    assert.has_error(function()
      tensor.run("add", "cuda", on_cuda("f32")._c, on_cuda("f32")._c, on_cuda("bf16")._c)
    end, "add: the result is f32, but it must be bf16")
    assert.has_error(function()
      tensor.run("mul_scalar", "cuda", on_cuda("i32")._c, on_cuda("i32")._c, 0.5, 0)
    end, "mul_scalar: mul: 0.5 is not a value of i32; use :float() first")
    local wide = ds.zeros(3, { device = "cpu", dtype = "f64" }):to "cuda"
    assert.has_error(function() return wide + wide end,
      "add: not for f64 on cuda; f64 is the CPU's")
  end)

  it("shapes", function()
    assert.has_error(function()
      tensor.run("exp", "cuda", on_cuda("f32")._c, ds.zeros(4, { device = "cuda" })._c)
    end, "exp: [4] does not broadcast to [3]")
  end)

  it("tensors of the CPU", function()
    assert.has_error(function()
      tensor.run("exp", "cuda", on_cuda("f32")._c, ds.zeros(3, { device = "cpu" })._c)
    end, "exp: an operand is not on cuda; use :to(\"cuda\")")
  end)
end)


describe("tensors on two devices", function()
  local function both()
    return ds.ones(3, 4, { device = "cuda" }), ds.ones(3, 4, { device = "cpu" })
  end
  local apart = "tensors on cuda and cpu"

  it("are refused by every operation of several inputs", function()
    local x, y = both()
    local positive, index = y:gt(0), ds.zeros(3, 4, { device = "cpu", dtype = "i64" })
    local w, row = ds.ones(4, 4, { device = "cpu" }), ds.ones(4, { device = "cpu" })
    local F = ds.F
    for what, f in pairs {
      ["add"] = function() return x + y end,
      ["lt"] = function() return x:lt(y) end,
      ["where"] = function() return ds.where(x:gt(0), y, y) end,
      ["masked_fill"] = function() return x:masked_fill(positive, 1) end,
      ["logical_and"] = function() return x:gt(0):logical_and(positive) end,
      ["gather"] = function() return x:gather(1, index) end,
      ["index_select"] = function() return x:index_select(1, index:select(1, 1)) end,
      ["masked_select"] = function() return x:masked_select(positive) end,
      ["matmul"] = function() return x:matmul(w) end,
      ["linear"] = function() return F.linear(x, w) end,
      ["embedding"] = function() return F.embedding(index, x) end,
      ["cross_entropy"] = function() return F.cross_entropy(x, index:select(2, 1)) end,
      ["layer_norm"] = function() return F.layer_norm(x, row, row) end,
      ["add_"] = function() return x:add_(y) end,
      ["mul_"] = function() return x:mul_(y) end,
      ["scatter_"] = function() return x:scatter_(1, index, x) end,
      ["scatter_add_"] = function() return x:scatter_add_(1, index:to "cuda", y) end,
      ["cat"] = function() return ds.cat({ x, y }, 1) end,
      ["backward"] = function()
        ds.ones(3, 4, { device = "cuda", requires_grad = true }):exp():backward(y)
      end,
    } do
      local ok, message = pcall(f)
      assert.is_false(ok, what)
      assert.is_truthy(message:find "tensors on cuda and cpu" or message:find
        "tensors on cpu and cuda", what .. ": " .. tostring(message))
    end
    assert.error_matches(function() return x + y end, "add: " .. apart)
  end)

  it("may be copied, and moved", function()
    local x, y = both()
    x:copy_(y * 3)
    assert.same({ 3, 3, 3, 3 }, x:select(1, 2):tolist())
    y:copy_(x)
    assert.same({ 3, 3, 3, 3 }, y:select(1, 2):tolist())
  end)
end)
