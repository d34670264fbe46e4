-- Reductions: rows, columns and whole tensors, in one piece and in several, aligned and not.

local ffi = require "ffi"
local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local both, randn, run = helper.both, helper.randn, tensor.run
local nan, inf = 0 / 0, math.huge

local forward = { gradient = false }

-- Shapes, and what of them is reduced: along rows, columns, both; short, long, in pieces, odd.
local cases = {
  { { 7 } }, { { 1 } }, { { 1, 1 }, 1 }, { { 3, 5 }, 1 }, { { 3, 5 }, 2 }, { { 19, 4 }, 2 },
  { { 5, 1003 }, 2 }, { { 9, 2048 }, 2 }, { { 3, 9001 }, 2 }, { { 20011 } }, { { 2, 9001 }, 1 },
  { { 611, 24 }, 1 }, { { 611, 7 }, 1 }, { { 1031, 1 }, 1 }, { { 1, 1031 }, 1 },
  { { 1000, 264 }, 1 }, { { 2, 3, 4 }, { 1, 3 } }, { { 3, 130, 33 }, { 1, 2 } },
  { { 3, 5, 200 }, { 1, 3 } }, { { 2, 300, 32 }, 2 }, { { 4, 3, 5, 6 }, { 2, 4 } },
  { { 4, 3, 5, 6 }, { 1, 3 } }, { { 3, 2, 6001 }, { 1, 3 } },
}

local function all_cases(name, make, dtypes, options)
  for _, case in ipairs(cases) do
    local x = make(case[1])
    for _, dtype in ipairs(dtypes) do
      both(("%s of %s %s"):format(name, dtype, table.concat(case[1], " x ")),
        function(t) return t[name](t, case[2]) end, { x:to(dtype) }, options or forward)
    end
  end
end

local function shifted(shape) return randn(shape, { shift = 0.5 }) end
local function near_one(shape) return randn(shape, { scale = 0.01, shift = 1 }) end

local function integers(shape) return randn(shape, { scale = 40 }):to("i64"):keep() end

describe("reductions on cuda", function()
  it("sum", function() all_cases("sum", shifted, { "f32", "bf16", "f16" }) end)
  it("mean", function() all_cases("mean", shifted, { "f32", "bf16" }) end)
  it("max", function() all_cases("amax", randn, { "f32", "bf16" }) end)
  it("min", function() all_cases("amin", randn, { "f32", "f16" }) end)
  it("prod", function() all_cases("prod", near_one, { "f32", "bf16" }, { tol = 2 ^ -7 }) end)

  it("of integers", function()
    for _, name in ipairs { "sum", "prod", "amax", "amin" } do
      all_cases(name, integers, { "i64", name == "sum" and "u8" or "i32" })
    end
  end)

  it("of truths", function()
    local x = randn { 40, 33 }
    for _, bound in ipairs { -9, 0, 9 } do
      for _, name in ipairs { "all", "any", "sum" } do
        for dim = 0, 2 do
          both(name, function(t) return t[name](t, dim > 0 and dim or nil) end, { x:gt(bound) })
        end
      end
    end
  end)

  it("takes any strides", function()
    local x = randn { 6, 40, 9 }
    local views = {
      function(t) return t:transpose(1, 3) end,
      function(t) return t:permute(2, 3, 1) end,
      function(t) return t:narrow(3, 2, 7) end,
      function(t) return t:narrow(2, 3, 33):narrow(3, 2, 1) end,
      function(t) return t:narrow(1, 2, 1):expand(5, 40, 9) end,
      function(t) return t:select(3, 4):unsqueeze(1) end,
      function(t) return t:narrow(3, 3, 1):expand(6, 40, 70) end,
    }
    for i, view in ipairs(views) do
      for _, dim in ipairs { 1, 2, 3, { 1, 2 }, { 1, 3 }, { 2, 3 }, { 1, 2, 3 } } do
        for _, dtype in ipairs { "f32", "bf16", "i32" } do
          both("view " .. i, function(t) return view(t):sum(dim), view(t):amax(dim) end,
            { x:to(dtype) }, forward)
        end
      end
    end
  end)

  it("of nothing", function()
    for _, name in ipairs { "sum", "prod", "mean" } do
      both(name, function(t) return t[name](t), t[name](t, 1), t[name](t, 2) end,
        { ds.zeros(0, 3) })
    end
    both("all", function(t) return t:all(), t:any() end, { ds.zeros(0, 3):gt(1) })
    assert.has_error(function() return ds.zeros({ 0, 3 }, { device = "cuda" }):amax() end)
  end)

  it("NaN wins, and infinities are kept", function()
    local x = randn({ 70, 40 }):tolist()
    x[3][5], x[69][5], x[70][39], x[1][1], x[2][2] = nan, inf, nan, -inf, inf
    local t = ds.tensor(x)
    for dim = 1, 2 do
      both("NaN", function(a)
        return a:amax(dim), a:amin(dim), a:argmax(dim), a:argmin(dim), a:sum(dim)
      end, { t })
    end
    both("all -inf", function(a) return a:amax(), a:argmax(), a:argmin() end,
      { ds.full({ 300 }, -inf) })
  end)

  it("argmax and argmin find the first", function()
    for _, case in ipairs(cases) do
      if type(case[2]) ~= "table" then
        local x = randn(case[1], { scale = 3 }):round()
        for name, t in pairs { argmax = x, argmin = x:to "i32", argmin_ = x:to "bf16" } do
          both(name, function(a) return a[name:gsub("_", "")](a, case[2]) end, { t })
        end
      end
    end
    both("last", function(t) return t:argmax(), t:transpose(1, 2):argmax(1) end,
      { ds.arange(0, 9000):reshape(90, 100) })
  end)

  it("adds to results, and in a wider type", function()
    for _, shape in ipairs { { 500, 24 }, { 500, 7 }, { 2, 9001 } } do
      local x, old = randn(shape, { dtype = "bf16" }), randn { 1, shape[2] }
      local expected = old + x:float():sum(1, { keepdim = true })
      local y = old:to("f32", "cuda")
      run("sum", "cuda", y._c, x:to("bf16", "cuda")._c, 1)
      helper.same(expected, y, "sum +=")
    end
    local y = ds.full({ 1 }, 5, { device = "cuda" })
    run("sum", "cuda", y._c, ds.zeros({ 0 }, { device = "cuda" })._c, 1)
    assert.equal(5, y:item())
  end)

  it("give their gradients", function()
    for _, name in ipairs { "sum", "mean", "amax", "amin", "prod" } do
      for dim = 1, 2 do
        both(name, function(t) return t[name](t, dim) end,
          { randn({ 9, 14 }, { grad = true, scale = 0.2, shift = 1 }) })
      end
    end
  end)

  it("gives the same bits every time", function()
    local x = randn({ 257, 300 }):to("f32", "cuda")
    local first = { x:sum():item(), x:sum(1):tolist(), x:sum(2):tolist() }
    assert.same(first, { x:sum():item(), x:sum(1):tolist(), x:sum(2):tolist() })
  end)

  it("sum_squares", function()
    local sum = ffi.new "double[1]"
    for _, case in ipairs { { { 0 } }, { { 3 } }, { { 70001 } }, { { 33, 40 } } } do
      for _, dtype in ipairs { "f32", "bf16", "f16" } do
        local x = randn(case[1], { dtype = dtype })
        run("sum_squares", "cpu", sum, x._c)
        local expected = sum[0]
        run("sum_squares", "cuda", sum, x:to(dtype, "cuda")._c)
        assert.near(expected, sum[0], 1e-5 * expected)
        if #case[1] == 2 then
          run("sum_squares", "cuda", sum, x:to(dtype, "cuda"):t()._c)
          assert.near(expected, sum[0], 1e-5 * expected)
        end
      end
    end
  end)

  it("refuses what it does not take", function()
    local x = ds.zeros({ 3, 4 }, { device = "cuda" })
    local function y(shape, dtype) return ds.zeros(shape, { device = "cuda", dtype = dtype })._c end
    assert.has_error(function() run("sum", "cuda", y { 3, 2 }, x._c, 0) end)
    assert.has_error(function() run("sum", "cuda", y { 3 }, x._c, 0) end)
    assert.has_error(function() run("argmax", "cuda", y { 3, 1 }, x._c, 1) end)
    assert.has_error(function() run("argmax", "cuda", y({ 3, 1 }, "i64"), x._c, 2) end)
  end)
end)

describe("reduce_ranks on cuda", function()
  local codes = { f32 = 0, bf16 = 1, f16 = 2, i64 = 4, i32 = 5, u8 = 6 }

  -- y of a type from n parts of a type, each begun `odd` elements in, on a device.
  local function joined(device, parts, from, to, op, scale, odd)
    local held, pointers = {}, ffi.new("const void *[?]", #parts)
    for i, part in ipairs(parts) do
      held[i] = part:to(from):to(from, device):narrow(1, 1 + odd, part.shape[1] - odd)
      pointers[i - 1] = held[i]._c.data
    end
    local y = ds.empty({ parts[1].shape[1] - odd }, { dtype = to, device = device })
    run("reduce_ranks", device, y._c, pointers, codes[from], #parts, op, scale)
    return y
  end

  it("has the CPU's bits", function()
    for _, case in ipairs { { "f32", "f32" }, { "bf16", "f32" }, { "f32", "bf16" },
      { "f16", "f16" }, { "i64", "i64" }, { "i32", "i32" }, { "u8", "u8" } } do
      local float = not case[1]:find "[iu]"
      for _, n in ipairs { 1, 2, 3, 6 } do
        local parts = {}
        for i = 1, n do parts[i] = randn({ 1029 }, { scale = 20, shift = 100 }) end
        for op = 0, 3 do
          if float or op ~= 1 then
            for odd = 0, 1 do
              local function on(device)
                return joined(device, parts, case[1], case[2], op, float and 0.3 or 1, odd)
              end
              helper.same(on "cpu", on "cuda", ("%s to %s, %d"):format(case[1], case[2], op), 0)
            end
          end
        end
      end
    end
  end)

  it("refuses a mean of integers", function()
    assert.has_error(function() joined("cuda", { randn { 4 } }, "i32", "i32", 1, 1, 0) end)
    assert.has_error(function() joined("cuda", { randn { 4 } }, "f32", "i32", 0, 1, 0) end)
  end)
end)
