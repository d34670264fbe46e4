-- Order along a dimension: sort and topk in shared memory, by tiles and by bytes; cumsum.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local both, randn, run = helper.both, helper.randn, tensor.run
local nan, inf = 0 / 0, math.huge
local forward = { gradient = false, tol = 0 }

-- Few different values, so that ties show whether the order is stable.
local function coarse(shape, dtype) return (randn(shape) * 4):round():to(dtype) end

describe("sort on cuda", function()
  it("short lines, along any dimension", function()
    for _, shape in ipairs { { 1 }, { 2 }, { 37 }, { 600 }, { 5, 1 }, { 9, 8 }, { 33, 40 },
      { 3, 20, 7 } } do
      for dim = 1, #shape do
        for _, descending in ipairs { false, true } do
          both("sort", function(t) return t:sort(dim, { descending = descending }) end,
            { coarse(shape, "f32") }, forward)
        end
      end
    end
    both("a view", function(t) return t:transpose(1, 2):narrow(1, 2, 5):sort(1) end,
      { randn { 11, 9 } }, forward)
  end)

  it("all dtypes", function()
    for _, dtype in ipairs { "f32", "bf16", "f16", "i64", "i32", "u8" } do
      local x = randn({ 3, 100 }, { scale = 99 })
      if dtype == "u8" then x = coarse({ 3, 100 }, "f32"):abs() end
      for _, descending in ipairs { false, true } do
        both(dtype, function(t) return t:sort(-1, { descending = descending }) end,
          { x:to(dtype) }, forward)
      end
    end
    both("bool", function(t) return t:sort(1) end, { randn({ 90 }):gt(0) }, forward)
    local wide = ds.arange(0, 300, { dtype = "i64" }) * -2 ^ 40
    both("i64", function(t) return t:sort(1) end, { wide:to "i64" }, forward)
  end)

  it("NaN is the largest, -0 is 0", function()
    local t = ds.tensor { 1, nan, -inf, 0, -0.0, inf, nan, -1, 0, -0.0 }
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      for _, descending in ipairs { false, true } do
        both("sort and topk", function(x)
          local values, indices = x:sort(1, { descending = descending })
          return values, indices, x:topk(4, 1, { largest = descending })
        end, { t:to(dtype) }, forward)
      end
    end
  end)

  it("long lines", function()
    for i, dtype in ipairs { "f32", "bf16", "i32", "u8", "i64" } do
      local x = randn({ 2, 9001 }, { scale = 9 })
      if dtype == "u8" then x = x:abs() end
      both("long " .. dtype, function(t) return t:sort(2, { descending = i % 2 == 0 }) end,
        { x:round():to(dtype) }, forward)
    end
    both("a strided one", function(t) return t:t():sort(1) end, { coarse({ 2, 4100 }, "f16") },
      forward)
  end)

  it("lines of more tiles than a block has threads", function()
    local x = (randn { 1050001 } * 40):abs():to "u8"
    local values, indices = x:sort(1)
    local v, i = x:to("u8", "cuda"):sort(1)
    assert.is_true(v:to("u8", "cpu"):eq(values):all():item())
    assert.is_true(i:to("i64", "cpu"):eq(indices):all():item())
  end)

  it("topk", function()
    for _, case in ipairs { { { 5, 40 }, 3, 2 }, { { 40, 5 }, 7, 1 }, { { 2, 9001 }, 5, 2 },
      { { 9001, 2 }, 1, 1 }, { { 2, 20000 }, 1000, 2 }, { { 6000 }, 1500, 1 },
      { { 4097 }, 1024, 1 }, { { 3, 4 }, 4, 2 }, { { 3, 4 }, 0, 2 } } do
      for _, dtype in ipairs { "f32", "i64" } do
        for _, largest in ipairs { true, false } do
          both("topk", function(t) return t:topk(case[2], case[3], { largest = largest }) end,
            { coarse(case[1], dtype) }, forward)
        end
      end
    end
  end)

  it("of nothing, and of what does not fit", function()
    both("sort", function(t) return t:sort(1) end, { ds.zeros(0, 3) }, forward)
    both("sort", function(t) return t:sort(2) end, { ds.zeros(0, 3) }, forward)
    local x = ds.zeros({ 3, 4 }, { device = "cuda" })
    local function call(name, shape, dtype, dim)
      local values = ds.zeros(shape, { device = "cuda" })
      local indices = ds.zeros(shape, { device = "cuda", dtype = dtype })
      run(name, "cuda", values._c, indices._c, x._c, dim, 0)
    end
    call("topk", { 3, 2 }, "i64", 1)
    assert.has_error(function() call("sort", { 3, 3 }, "i64", 1) end)
    assert.has_error(function() call("topk", { 3, 5 }, "i64", 1) end)
    assert.has_error(function() call("topk", { 3, 2 }, "i32", 1) end)
    assert.has_error(function() call("sort", { 3, 4 }, "i64", 2) end)
  end)

  it("gives its gradient", function()
    both("sort", function(t) return (t:sort(1)) end, { randn({ 9, 5 }, { grad = true }) })
    both("topk", function(t) return (t:topk(3, 2)) end, { randn({ 9, 5 }, { grad = true }) })
  end)
end)

describe("cumsum on cuda", function()
  it("along any dimension, both ways", function()
    for _, shape in ipairs { { 1 }, { 7 }, { 2500 }, { 20000 }, { 3, 9000 }, { 300, 40 }, { 40, 7 },
      { 2, 200, 33 }, { 3, 2, 5 } } do
      for dim = 1, #shape do
        for reverse = 0, 1 do
          for _, dtype in ipairs { "f32", "bf16", "i64" } do
            local x = randn(shape, { shift = 0.3, scale = dtype == "i64" and 40 or 1 })
            both("cumsum", function(t)
              local y = ds.empty(t.shape, { dtype = dtype, device = t.device })
              run("cumsum", t.device, y._c, t._c, dim - 1, reverse)
              return y
            end, { x:to(dtype) }, { gradient = false })
          end
        end
      end
    end
  end)

  it("of views, in place, of other integers", function()
    both("a view", function(t) return t:t():cumsum(1), t:narrow(2, 3, 50):cumsum(2) end,
      { randn { 40, 60 } }, { gradient = false })
    both("in place", function(t)
      local y = t:detach()
      run("cumsum", t.device, y._c, y._c, 1, 1)
      run("cumsum", t.device, y._c, y._c, 0, 0)
      return y
    end, { randn { 300, 40 } })
    both("truths", function(t) return t:cumsum(1) end, { randn({ 5000 }):gt(0) })
    both("i32", function(t) return t:cumsum(2) end, { coarse({ 3, 5 }, "i32") })
    both("nothing", function(t) return t:cumsum(1), t:cumsum(2) end, { ds.zeros(0, 3) })
    both("NaN", function(t) return t:cumsum(1) end, { ds.tensor { 1, nan, 2, inf } })
  end)

  it("gives its gradient", function()
    both("cumsum", function(t) return t:cumsum(2) end, { randn({ 3, 40 }, { grad = true }) })
  end)

  it("refuses what does not fit", function()
    local x = ds.zeros({ 3, 4 }, { device = "cuda" })
    local function on(shape, dtype)
      return ds.zeros(shape, { device = "cuda", dtype = dtype })._c
    end
    assert.has_error(function() run("cumsum", "cuda", on { 3, 3 }, x._c, 1, 0) end)
    assert.has_error(function() run("cumsum", "cuda", on({ 3, 4 }, "i64"), x._c, 1, 0) end)
    assert.has_error(function() run("cumsum", "cuda", on { 3, 4 }, x._c, 2, 0) end)
  end)
end)
