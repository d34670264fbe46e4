-- Random numbers and dropout: the CPU's bits, whatever the strides.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local floats = { "f32", "bf16", "f16" }
local sizes = { 0, 1, 3, 4, 5, 8, 127, 1000, 2048, 5003 }

local function both(what, f, inputs) helper.both(what, f, inputs, { tol = 0 }) end
local start = helper.randn { 1 } -- brings the device

describe("random numbers", function()
  it("are the CPU's, for every size", function()
    for _, dtype in ipairs(floats) do
      for _, n in ipairs(sizes) do
        both(("%s %d"):format(dtype, n), function(x)
          local options = { dtype = dtype, device = x.device }
          local u = ds.empty(n, options):uniform_(-1.3, 2.7)
          local z = ds.empty(n, options):normal_(0.4, 3)
          return ds.rand(n, options), ds.randn(n, options), u, z
        end, { start })
      end
    end
  end)

  it("count in row-major order, whatever the strides", function()
    for _, dtype in ipairs(floats) do
      both(dtype, function(x)
        local y = ds.zeros(31, 50, { dtype = dtype, device = x.device })
        y:t():normal_()
        local z = ds.zeros(31, 50, { dtype = dtype, device = x.device })
        z:narrow(2, 3, 33):uniform_()
        local a = ds.zeros(200, { dtype = dtype, device = x.device })
        a:narrow(1, 2, 197):uniform_()
        local b = ds.zeros(90, 70, { dtype = dtype, device = x.device })
        b:t():uniform_()
        return y, z, a, b
      end, { start })
    end
  end)

  it("go on where the last ones ended, up to large offsets", function()
    both("stream", function(x)
      local a = ds.rand(5, { device = x.device })
      return a, ds.rand(6, { device = x.device })
    end, { start })
    both("offset", function(x)
      local y = ds.zeros(37, { device = x.device })
      tensor.run("uniform", x.device, y._c, 0, 1, 2 ^ 40 + 3, 2 ^ 32 - 2)
      return y
    end, { start })
  end)

  it("are whole", function()
    for _, dtype in ipairs { "i64", "i32", "u8", "bool" } do
      for _, n in ipairs(sizes) do
        both(("%s %d"):format(dtype, n), function(x)
          local options = { dtype = dtype, device = x.device }
          return ds.randint(0, dtype == "bool" and 2 or 200, n, options)
        end, { start })
      end
    end
    both("negative", function(x)
      return ds.randint(-2 ^ 31, 2 ^ 31, 99, { device = x.device }),
        ds.randint(-5, -4, 9, { dtype = "i32", device = x.device })
    end, { start })
  end)

  it("refuse what the CPU refuses", function()
    for _, device in ipairs { "cpu", "cuda" } do
      local x = ds.zeros(3, { device = device })
      assert.error_matches(function() tensor.run("uniform", device, x._c, 0, 1 / 0, 1, 1) end,
        "uniform: parameters 0 and inf must be finite")
      assert.error_matches(function() tensor.run("randint", device, x._c, 0, 3, 1, 1) end,
        "randint: not for f32, only for integers")
      assert.error_matches(function()
        ds.randint(0, 300, 3, { dtype = "u8", device = device })
      end, "randint: 299 is not a value of u8")
      assert.error_matches(function() tensor.run("dropout", device, x._c, x._c, 1.5, 1, 1) end,
        "dropout: p is 1.5, but it must be between 0 and 1")
    end
  end)
end)

describe("dropout", function()
  local function drop(x, p)
    local y = tensor.new(x.shape, x.dtype, x.device)
    tensor.run("dropout", x.device, y._c, x._c, p, 5, 3)
    return y
  end

  it("drops the CPU's elements", function()
    for _, dtype in ipairs(floats) do
      for _, n in ipairs(sizes) do
        both(("%s %d"):format(dtype, n), function(x)
          return drop(x, 0.3), drop(x, 0), drop(x, 1)
        end, { helper.randn({ n }, { dtype = dtype }) })
      end
      both(dtype, function(x) return drop(x:t(), 0.5), drop(x:narrow(2, 2, 9), 0.5) end,
        { helper.randn({ 31, 60 }, { dtype = dtype }) })
    end
  end)

  it("keeps an element whose number is p", function()
    both("p", function(x)
      local u = ds.zeros_like(x)
      tensor.run("uniform", x.device, u._c, 0, 1, 5, 3)
      return drop(x, u:select(1, 6):item())
    end, { helper.randn { 20 } })
  end)

  it("works in place", function()
    both("in place", function(x)
      local y = x:clone()
      tensor.run("dropout", x.device, y._c, y._c, 0.5, 5, 3)
      return y
    end, { helper.randn { 999 } })
  end)

  it("has the CPU's gradient", function()
    for _, dtype in ipairs(floats) do
      both(dtype, function(x) return ds.F.dropout(x, 0.4) end,
        { helper.randn({ 40, 41 }, { dtype = dtype, grad = true }) })
    end
  end)
end)
