-- Copies between any dtypes and strides, from device to device; fill, arange, triangle.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local all = { "f32", "bf16", "f16", "i64", "i32", "u8", "bool" }

local function values(shape, dtype)
  if tensor.floating[dtype] then return helper.randn(shape, { dtype = dtype, scale = 9 }) end
  if dtype == "bool" then return helper.randn(shape):gt(0):keep() end
  return ds.randint(dtype == "u8" and 0 or -300, dtype == "u8" and 256 or 300, shape,
    { dtype = dtype, device = "cpu" }):keep()
end

local views = {
  dense = function(x) return x end,
  transposed = function(x) return x:t() end,
  shifted = function(x) return x:reshape(-1):narrow(1, 2, x:numel() - 1) end,
  rows = function(x) return x:narrow(2, 2, x.shape[2] - 3) end,
  column = function(x) return x:select(2, 3) end,
  expanded = function(x) return x:select(1, 2):expand(3, x.shape[2]) end,
  columns_expanded = function(x) return x:narrow(2, 1, 1):expand(x.shape[1], 24) end,
}

describe("copy", function()
  it("keeps bits, however they lie", function()
    for _, dtype in ipairs(all) do
      for how, view in pairs(views) do
        helper.both(dtype .. " " .. how, function(x) return view(x):clone() end,
          { values({ 19, 40 }, dtype) })
      end
    end
  end)

  it("writes into views", function()
    for _, dtype in ipairs(all) do
      for how, view in pairs(views) do
        if not how:find "expanded" then
          helper.both(dtype .. " to " .. how, function(x, y)
            local to = y:clone()
            view(to):copy_(view(x))
            view(to:t():contiguous()):copy_(view(x:t()):clone())
            return to
          end, { values({ 24, 24 }, dtype), values({ 24, 24 }, dtype) })
        end
      end
    end
    helper.both("broadcast", function(x)
      return ds.zeros(3, 5, 7, { device = x.device }):copy_(x)
    end, { values({ 5, 1 }, "f32") })
  end)

  it("turns tiles", function()
    for _, dtype in ipairs { "u8", "bf16", "f32", "i64" } do
      for _, shape in ipairs { { 64, 64 }, { 128, 80 }, { 65, 130 }, { 8, 8 }, { 9, 200 } } do
        helper.both(("%s [%d x %d]"):format(dtype, shape[1], shape[2]), function(x)
          return x:t():clone()
        end, { values(shape, dtype) })
      end
      helper.both(dtype .. " in batches", function(x)
        return x:permute(1, 3, 2):clone(), x:permute(3, 2, 1):clone(), x:permute(2, 3, 1):clone(),
          x:permute(2, 1, 3):clone(), x:narrow(2, 2, 15):permute(3, 1, 2):clone()
      end, { values({ 3, 17, 33 }, dtype) })
    end
    helper.both("heads", function(x) return x:transpose(2, 3):clone(), x:permute(1, 3, 4, 2):clone()
    end, { values({ 2, 9, 3, 16 }, "bf16") })
  end)

  it("converts between all dtypes", function()
    for _, from in ipairs(all) do
      local x = values({ 9, 40 }, from)
      for _, to in ipairs(all) do
        for how, view in pairs(views) do
          if how == "dense" or how == "transposed" or how == "shifted" then
            helper.both(("%s to %s %s"):format(from, to, how), function(v)
              return view(v):to(to)
            end, { x }, { tol = 0 })
          end
        end
      end
    end
  end)

  it("rounds to nearest, saturates, and makes NaN 0 as the CPU does", function()
    local x = ds.tensor({ 0.5, 1.5, -1.5, 2.9, -2.9, 255.5, 256, -1, 1e10, -1e10, 1e20, -1e20,
      1 / 0, -1 / 0, 0 / 0, 1 + 2 ^ -8, 1 + 3 * 2 ^ -8, 1 + 2 ^ -11, 65519, 65520, 2 ^ -25, 3e-41 },
      { device = "cpu" })
    for _, to in ipairs(all) do
      helper.both("f32 to " .. to, function(v) return v:to(to) end, { x }, { tol = 0 })
    end
    local whole = ds.tensor({ 2 ^ 53, 2 ^ 31, -2 ^ 31, 2 ^ 24 + 1, 2 ^ 25 + 3, 300, -1, 257,
      65535, 2 ^ 40 + 2 ^ 32 + 1 }, { device = "cpu", dtype = "i64" })
    for _, to in ipairs(all) do
      helper.both("i64 to " .. to, function(v) return v:to(to) end, { whole }, { tol = 0 })
    end
  end)

  it("goes from device to device, f64 too", function()
    for _, dtype in ipairs(all) do
      local x = values({ 6, 10 }, dtype)
      local there = x:to "cuda"
      helper.same(x, there:to "cpu", dtype)
      helper.same(x:t(), there:t():to "cpu", dtype .. " transposed")
      helper.same(x:narrow(2, 2, 5), there:narrow(2, 2, 5):to "cpu", dtype .. " part")
      helper.same(x, x:t():to("cuda"):t():to "cpu", dtype .. " transposed first")
      helper.same(x:to "f64", there:to("f64", "cpu"), dtype .. " to f64")
      local back = ds.zeros(6, 10, { dtype = "f64", device = "cpu" })
      helper.same(x:to "f64", back:copy_(there), dtype .. " copied to f64")
    end
    local x = helper.randn({ 4, 5 }):to("f64"):keep()
    helper.same(x:float(), x:to("f32", "cuda"):to "cpu", "f64 to f32 on cuda")
    helper.same(x, x:to("cuda"):to "cpu", "f64 there and back")
    helper.same(x:t(), x:to("cuda"):t():to "cpu", "f64 transposed there")
    helper.same(x:float():to "f64", x:float():to("f64", "cuda"):to "cpu", "f32 to f64 on cuda")
    local wide = ds.zeros(4, 5, { device = "cuda" })
    wide:t():copy_(x:t())
    helper.same(x:float(), wide:to "cpu", "f64 into a view on cuda")
    assert.has_error(function() return x:to("cuda"):float() end,
      "to: copy: not for f64 on cuda; f64 is the CPU's")
  end)

  it("brings gradients back to where the tensor is", function()
    local x = helper.randn({ 3, 4 }, { grad = true })
    x:to("bf16", "cuda"):backward(ds.ones(3, 4, { dtype = "bf16", device = "cuda" }))
    assert.equal("cpu", x.grad.device)
    assert.equal("f32", x.grad.dtype)
    assert.same({ 1, 1, 1, 1 }, x.grad:select(1, 1):tolist())
  end)

  it("cuts what is too large for one launch", function()
    for _, to in ipairs { "bf16", "i64" } do
      helper.both(to, function(x) return x:to(to), x:t():to(to), x:t():clone() end,
        { values({ 101, 90 }, "f32") }, { tol = 0 })
    end
  end)
end)

describe("fill, arange, triangle", function()
  it("fills every dtype, dense and not", function()
    for _, dtype in ipairs(all) do
      for _, value in ipairs(dtype == "bool" and { 0, 1 } or { 0, 1, 7, 200 }) do
        helper.both(dtype, function(x)
          local y, z = x:clone(), x:clone()
          z:narrow(2, 2, 3):fill_(value)
          z:t():select(1, 7):fill_(value)
          return y:fill_(value), z, ds.full({ 3 }, value, { dtype = dtype, device = x.device })
        end, { values({ 7, 9 }, dtype) }, { tol = 0 })
      end
      helper.both("eye", function(x) return ds.eye(5, { dtype = dtype, device = x.device }) end,
        { values({ 1 }, dtype) })
    end
    helper.both("rounded once", function(x)
      return ds.full({ 3 }, 1 + 2 ^ -9 + 2 ^ -30, { dtype = x.dtype, device = x.device }),
        ds.full({ 3 }, -math.huge, { dtype = x.dtype, device = x.device }),
        ds.full({ 3 }, 0 / 0, { dtype = x.dtype, device = x.device })
    end, { values({ 1 }, "bf16") }, { tol = 0 })
    assert.has_error(function() ds.full({ 2 }, 300, { dtype = "u8", device = "cuda" }) end,
      "fill: 300 is not a value of u8; use :float() first")
  end)

  it("counts", function()
    for _, dtype in ipairs { "f32", "bf16", "f16", "i64", "i32", "u8" } do
      helper.both(dtype, function(x)
        local function on(...) return ds.arange(...) end
        return on(1, 200, { dtype = dtype, device = x.device }),
          on(100, 3, -7, { dtype = dtype, device = x.device }),
          on(0, { dtype = dtype, device = x.device })
      end, { values({ 1 }, "f32") }, { tol = 0 })
    end
    helper.both("linspace", function(x) return ds.linspace(-1, 2, 301, { device = x.device }) end,
      { values({ 1 }, "f32") }, { tol = 0 })
  end)

  it("cuts triangles", function()
    for _, dtype in ipairs(all) do
      helper.both(dtype, function(x)
        return x:tril(), x:triu(1), x:tril(-2), x:triu(-3), x:transpose(2, 3):tril(5), x:tril(-99),
          x:triu(-99), x:narrow(3, 2, 1):triu(), x:narrow(2, 2, 1):tril()
      end, { values({ 3, 17, 37 }, dtype) })
    end
    helper.both("gradient", function(x) return x:tril() end, { helper.randn({ 5, 7 },
      { grad = true }) })
    helper.both("matrix", function(x) return x:triu() end, { helper.randn { 41, 40 } })
  end)
end)
