-- Reading and writing at indices, and masks: the CPU's values, the same bits every time.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local all = { "f32", "bf16", "f16", "i64", "i32", "u8", "bool" }
local summed = { "f32", "bf16", "f16", "i64", "i32", "u8" }

local function values(shape, dtype)
  if tensor.floating[dtype] then return helper.randn(shape, { dtype = dtype }) end
  if dtype == "bool" then return helper.randn(shape):gt(0):keep() end
  return ds.randint(0, 20, shape, { dtype = dtype, device = "cpu" }):keep()
end
local function indices(bound, shape, dtype)
  return ds.randint(0, bound, shape, { dtype = dtype or "i64", device = "cpu" }):keep()
end

local ffi = require "ffi"
ffi.cdef [[int setenv(const char *, const char *, int); int unsetenv(const char *);]]

--- f() twice; a simulated GPU runs its threads backwards the second time.
local function either_way(f)
  f()
  ffi.C.setenv("DS_SIMT_BACKWARDS", "1", 1)
  local ok, message = pcall(f)
  ffi.C.unsetenv "DS_SIMT_BACKWARDS"
  if not ok then error(message, 0) end
end

-- Sums of bf16 and f16 are rounded once on both devices, but in another order.
local function tolerance(dtype) return dtype == "bf16" and 2 ^ -6 or nil end

describe("gather and index_select", function()
  it("read every dtype, along every dimension", function()
    for _, dtype in ipairs(all) do
      for _, kind in ipairs { "i64", "i32", "u8" } do
        helper.both(dtype .. " by " .. kind, function(x, i1, i2, i3)
          return x:gather(1, i1), x:gather(2, i2), x:t():gather(1, i2:t()), x:gather(2, i3),
            x:index_select(1, i1:select(2, 1)), x:index_select(2, i2:select(1, 2)),
            x:t():index_select(2, i1:select(2, 3))
        end, { values({ 7, 13 }, dtype), indices(7, { 9, 11 }, kind), indices(13, { 5, 30 }, kind),
          indices(13, { 7, 1 }, kind) })
      end
    end
  end)

  it("read whole rows", function()
    for _, dtype in ipairs { "u8", "bf16", "f32", "i64" } do
      helper.both(dtype, function(x, i)
        return x:index_select(1, i), x:narrow(2, 17, 16):index_select(1, i),
          x:narrow(2, 2, 16):index_select(1, i), x:reshape(6, 4, 16):index_select(2, i:clamp(0, 3)),
          x:index_select(1, i:narrow(1, 1, 0))
      end, { values({ 6, 64 }, dtype), indices(6, { 100 }) })
      helper.both(dtype .. " that begin anywhere", function(x, i)
        return x:narrow(2, 1, 16):index_select(1, i)
      end, { values({ 6, 65 }, dtype), indices(6, { 9 }) })
    end
  end)

  it("have the CPU's gradients", function()
    helper.both("gather", function(x, i) return x:gather(2, i) end,
      { helper.randn({ 5, 9 }, { grad = true }), indices(9, { 5, 40 }) })
    helper.both("gather one", function(x, i) return x:gather(2, i) end,
      { helper.randn({ 50, 9 }, { grad = true }), indices(9, { 50, 1 }) })
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      helper.both("index_select " .. dtype, function(x, i) return x:index_select(1, i) end,
        { helper.randn({ 11, 40 }, { grad = true, dtype = dtype }), indices(11, { 70 }) },
        { tol = tolerance(dtype) })
      helper.both("index_select 2", function(x, i) return x:index_select(2, i) end,
        { helper.randn({ 3, 11, 5 }, { grad = true, dtype = dtype }), indices(11, { 70 }) },
        { tol = tolerance(dtype) })
    end
  end)

  it("cut what is too large for one launch", function()
    helper.both("rows", function(x, i) return x:index_select(1, i) end,
      { values({ 6, 48 }, "f32"), indices(6, { 200 }) })
    helper.both("elements", function(x, i) return x:gather(2, i) end,
      { values({ 3, 11 }, "f32"), indices(11, { 3, 3001 }) })
    helper.both("one_hot", function(i) return i:one_hot(1201) end, { indices(1201, { 7 }) })
    helper.both("one_hot", function(i) return i:one_hot(3) end, { indices(3, { 3000 }) })
  end)

  it("tell of a wrong index with the next wait, and read no memory that is not x's", function()
    local x = ds.ones(3, 4, { device = "cuda" })
    local wrong = ds.tensor({ 0, 2, 3 }, { device = "cuda", dtype = "i64" })
    local y = x:index_select(1, wrong)
    assert.error_matches(function() return x:tolist() end, "index_select: index 3 is not in 0 to 2")
    assert.same({ { 1, 1, 1, 1 }, { 1, 1, 1, 1 }, { 0, 0, 0, 0 } }, y:tolist())
    y = x:gather(1, ds.tensor({ { -1 } }, { device = "cuda", dtype = "i64" }))
    assert.error_matches(function() return y:tolist() end, "gather: index %-1 is not in 0 to 2")
    assert.same({ { 0 } }, y:tolist())
    local z = ds.zeros(3, { device = "cuda" })
    z:scatter_add_(1, wrong, ds.ones(3, { device = "cuda" }))
    assert.error_matches(function() return z:tolist() end, "scatter_add: index 3 is not in 0 to 2")
    assert.same({ 1, 0, 1 }, z:tolist())
  end)
end)

describe("scatter_, scatter_add_, index_add", function()
  it("write every dtype, along every dimension, the last one winning", function()
    for _, dtype in ipairs(all) do
      for _, kind in ipairs { "i64", "i32", "u8" } do
        helper.both(dtype .. " by " .. kind, function(x, y, i1, i2, i3)
          return x:clone():scatter_(1, i1, y), x:clone():scatter_(2, i2, y),
            x:t():clone():t():scatter_(2, i2, y), x:clone():scatter_(2, i3, y),
            x:clone():t():scatter_(1, i2:t(), y:t())
        end, { values({ 9, 13 }, dtype), values({ 9, 13 }, dtype), indices(9, { 8, 11 }, kind),
          indices(13, { 5, 12 }, kind), indices(13, { 9, 1 }, kind) }, { tol = 0 })
      end
    end
  end)

  it("add every dtype", function()
    for _, dtype in ipairs(summed) do
      helper.both(dtype, function(x, y, i1, i2, i3)
        return x:clone():scatter_add_(1, i1, y), x:clone():scatter_add_(2, i2, y),
          x:t():clone():t():scatter_add_(2, i2, y), x:clone():scatter_add_(2, i3, y)
      end, { values({ 9, 13 }, dtype), values({ 9, 13 }, dtype), indices(9, { 8, 11 }),
        indices(13, { 5, 12 }, "i32"), indices(13, { 9, 1 }) }, { tol = tolerance(dtype) })
    end
  end)

  it("put thousands of elements into a few places, into thousands, and into one", function()
    for _, places in ipairs { 1, 3, 260, 70000 } do
      for _, dtype in ipairs(places < 999 and { "f32", "bf16", "i64" } or { "f32" }) do
        local n = 5000
        local x, i = values({ n }, dtype), indices(places, { n })
        local what = ("%d to %d, %s"):format(n, places, dtype)
        either_way(function()
          helper.both(what, function(v, at)
            local y = ds.zeros(places, { dtype = dtype, device = v.device })
            return y:scatter_add_(1, at, v)
          end, { x, i }, { tol = dtype == "f32" and 1e-4 or tolerance(dtype) })
          helper.both(what, function(v, at)
            local y = ds.zeros(places, { dtype = dtype, device = v.device })
            return y:scatter_(1, at, v)
          end, { x, i }, { tol = 0 })
        end)
      end
    end
  end)

  it("add rows", function()
    for _, dtype in ipairs(summed) do
      for _, places in ipairs { 1, 6, 300 } do -- at 1 and 6 sums of u8 wrap around
        helper.both(dtype, function(v, at)
          local out = {}
          for k, width in ipairs { 1, 40, 33 } do
            local y = ds.full({ places, 40 }, 1, { dtype = dtype, device = v.device })
            tensor.run("index_add", v.device, y:narrow(2, 1, width)._c, at._c,
              v:narrow(2, 1, width)._c, 0)
            out[k] = y
          end
          local z = ds.full({ 40, places }, 1, { dtype = dtype, device = v.device })
          tensor.run("index_add", v.device, z._c, at._c, v:t()._c, 1)
          return out[1], out[2], out[3], z
        end, { values({ 300, 40 }, dtype), indices(places, { 300 }) },
          { tol = dtype == "f32" and 1e-4 or dtype == "f16" and 2 ^ -9 or tolerance(dtype) })
      end
    end
  end)

  it("give the same bits every time", function()
    local x, i = values({ 3000 }, "f32"):to "cuda", indices(7, { 3000 }):to "cuda"
    local function once()
      return ds.zeros(7, { device = "cuda" }):scatter_add_(1, i, x):tolist()
    end
    local first = once()
    either_way(function() assert.same(first, once()) end)
  end)

  it("one_hot", function()
    for _, kind in ipairs { "i64", "i32", "u8" } do
      helper.both(kind, function(i)
        return i:one_hot(9), i:t():one_hot(11), i:select(1, 1):one_hot(9)
      end, { indices(9, { 5, 7 }, kind) })
    end
  end)

  it("refuse what the CPU refuses", function()
    for _, device in ipairs { "cpu", "cuda" } do
      local x, f = ds.zeros(3, { device = device }), ds.zeros(3, { device = device, dtype = "i32" })
      assert.error_matches(function() tensor.run("gather", device, x._c, x._c, x._c, 0) end,
        "gather: the index is f32, but it must be i64 or i32")
      assert.error_matches(function() tensor.run("gather", device, f._c, x._c, f._c, 0) end,
        "gather: f32 cannot be mixed with i32")
      assert.error_matches(function() tensor.run("gather", device, x._c, x._c, f._c, 1) end,
        "gather: dimension 2 is not in a tensor of 1")
      assert.error_matches(function()
        tensor.run("scatter", device, x:narrow(1, 1, 2)._c, f._c, x:narrow(1, 1, 2)._c, 0)
      end, "scatter: %[3%] does not match %[2%]")
      assert.error_matches(function()
        tensor.run("index_add", device, x._c, f:narrow(1, 1, 2)._c, x._c, 0)
      end, "index_add: 2 indices do not match size 3")
    end
  end)
end)

describe("masks", function()
  it("select and scatter every dtype", function()
    for _, dtype in ipairs(all) do
      for _, shape in ipairs { { 7, 13 }, { 41, 120 }, { 0, 3 }, { 1, 1 } } do
        local inputs = { values(shape, dtype), values(shape, "bool") }
        either_way(function()
          helper.both(dtype, function(x, m)
            local y, z = x:masked_select(m), x:clone()
            tensor.run("masked_scatter", x.device, z._c, m._c, ds.zeros_like(y)._c)
            local w = x:t():masked_select(m:t())
            return y, z, w, x:masked_select(m:logical_not()), x:narrow(1, 1, 0):masked_select(
              m:narrow(1, 1, 0))
          end, inputs)
        end)
      end
    end
  end)

  it("have the CPU's gradient", function()
    helper.both("masked_select", function(x, m) return x:masked_select(m) end,
      { helper.randn({ 9, 31 }, { grad = true }), values({ 9, 31 }, "bool") })
  end)

  it("take a mask that broadcasts, and count", function()
    local cell = require("ffi").new("int64_t[1]")
    helper.both("broadcast", function(x, m)
      tensor.run("mask_count", x.device, cell, m._c)
      local y = ds.zeros(tonumber(cell[0]) * 5, { device = x.device })
      tensor.run("masked_select", x.device, y._c, x._c, m._c)
      return y, tonumber(cell[0])
    end, { values({ 5, 17 }, "f32"), values({ 17 }, "bool") })
  end)
end)
