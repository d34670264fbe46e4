-- Softmax and cross-entropy with their gradients: rows in registers, rows longer than these, lines
-- that lie across or on odd addresses.

local ds = require "ds"
local F = require "ds.functional"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local both, randn, run = helper.both, helper.randn, tensor.run
local nan, inf = 0 / 0, math.huge

local names = { "softmax", "log_softmax" }

describe("softmax on cuda", function()
  it("along rows", function()
    -- 40960 is longer than what a block keeps
    for _, shape in ipairs { { 1, 1 }, { 3, 8 }, { 70, 16 }, { 5, 48 }, { 3, 264 }, { 2, 5000 },
      { 2, 40960 }, { 7, 5 }, { 2, 257 }, { 2, 2051 } } do
      for _, name in ipairs(names) do
        for _, dtype in ipairs { "f32", "bf16" } do
          if shape[2] < 9999 or dtype == (name == "softmax" and "bf16" or "f32") then
            both(("%s of %s %d x %d"):format(name, dtype, unpack(shape)),
              function(t) return F[name](t, -1) end,
              { randn(shape, { dtype = dtype, grad = true, scale = 3 }) })
          end
        end
      end
    end
  end)

  it("along any dimension of any view", function()
    local x = randn({ 6, 35, 24 }, { scale = 2 })
    local views = {
      function(t) return t end,
      function(t) return t:transpose(1, 3) end,
      function(t) return t:permute(2, 3, 1) end,
      function(t) return t:narrow(3, 2, 16) end,
      function(t) return t:narrow(3, 9, 16) end,
      function(t) return t:narrow(2, 4, 1) end,
    }
    for i, view in ipairs(views) do
      for dim = 1, 3 do
        for _, name in ipairs(names) do
          for _, dtype in ipairs { "f16", "f32" } do
            local dy = randn({ 6, 35, 24 }, { dtype = dtype })
            both(("%s %d of view %d"):format(name, dim, i), function(t, g)
              local y = F[name](view(t), dim)
              local dx = ds.empty(y.shape, { dtype = dtype, device = t.device })
              run(name .. "_backward", t.device, dx._c, view(g)._c, y._c, dim - 1)
              return y, dx
            end, { x:to(dtype), dy }, { gradient = false })
          end
        end
      end
    end
  end)

  it("in place", function()
    for _, n in ipairs { 8, 13, 8192 } do
      both("softmax", function(t)
        local y = t:detach()
        run("softmax", t.device, y._c, y._c, 1)
        return y
      end, { randn { 3, n } })
    end
  end)

  it("of large numbers, infinities and NaN", function()
    local rows = { { 1e4, 1e4 - 1, -1e4, 3 }, { -inf, 0, 1, -inf }, { inf, 0, 1, 2 },
      { nan, 0, 1, 2 }, { -inf, -inf, -inf, -inf }, { -3e38, 3e38, 0, 0 } }
    for _, name in ipairs(names) do
      both(name, function(t) return F[name](t, -1), F[name](t:t(), 1) end, { ds.tensor(rows) },
        { tol = 1e-6 })
    end
    both("much of -inf", function(t) return F.softmax(t, -1) end,
      { ds.full({ 2, 4000 }, -inf):narrow(2, 1, 4000):to("f32") })
  end)

  it("of nothing", function()
    both("softmax", function(t) return F.softmax(t, 1), F.softmax(t, 2) end, { ds.zeros(0, 3) })
  end)

  it("refuses what does not fit", function()
    local x, y = ds.zeros({ 3, 4 }, { device = "cuda" }), ds.zeros({ 3, 5 }, { device = "cuda" })
    assert.has_error(function() run("softmax", "cuda", y._c, x._c, 1) end)
    assert.has_error(function() run("softmax", "cuda", x._c, x._c, 2) end)
    assert.has_error(function()
      run("softmax", "cuda", x._c, ds.zeros({ 3, 4 }, { device = "cuda", dtype = "bf16" })._c, 1)
    end)
  end)
end)

describe("cross_entropy on cuda", function()
  local function targets(n, classes, ignored)
    local list = {}
    for i = 1, n do list[i] = (i * 7919) % classes end
    if ignored then list[1], list[n] = -100, -100 end
    return ds.tensor(list, { dtype = "i64" })
  end

  it("with its gradient", function()
    for _, case in ipairs { { 1, 2 }, { 13, 10 }, { 70, 65 }, { 3, 1024 }, { 6, 1031 },
      { 2, 8200 } } do
      for _, dtype in ipairs { "f32", "bf16", "f16" } do
        for _, reduction in ipairs { "mean", "sum", "none" } do
          for _, smoothing in ipairs { 0, 0.1 } do
            both(("cross_entropy of %s %d x %d, %s"):format(dtype, case[1], case[2], reduction),
              function(x, t)
                return F.cross_entropy(x, t,
                  { reduction = reduction, label_smoothing = smoothing })
              end, { randn(case, { dtype = dtype, grad = true, scale = 2 }),
                targets(case[1], case[2], case[1] > 2) },
              { tol = 2e-5, grad_tol = helper.tolerance[dtype] * 2 })
          end
        end
      end
    end
  end)

  it("takes other targets, any strides and rows in place", function()
    for _, dtype in ipairs { "i32", "u8" } do
      both(dtype, function(x, t) return F.cross_entropy(x, t, { ignore_index = 3 }) end,
        { randn({ 20, 33 }, { grad = true }), targets(20, 33):to(dtype) }, { tol = 2e-5 })
    end
    both("strides", function(x, t)
      local function empty(shape) return ds.empty(shape, { device = x.device }) end
      local lse, loss, dx = empty { 5 }, empty { 5 }, empty { 40, 5 }
      local dloss = x:narrow(1, 1, 1):reshape(-1)
      x = x:t()
      run("cross_entropy", x.device, loss._c, lse._c, x._c, t._c, -100, 0, 0)
      run("cross_entropy_backward", x.device, dx:t()._c, dloss._c, x._c, t._c, lse._c, -100, 0, 0)
      local dense = ds.empty({ 5, 40 }, { device = x.device })
      run("cross_entropy_backward", x.device, dense._c, dloss._c, x._c, t._c, lse._c, -100, 0, 0)
      return loss, lse, dx, dense
    end, { randn { 40, 5 }, targets(5, 40) }, { tol = 2e-5 })
    both("in place", function(x, t)
      local lse = ds.empty({ 3 }, { device = x.device })
      local loss = ds.full({}, 2, { device = x.device })
      run("cross_entropy", x.device, loss._c, lse._c, x._c, t._c, -100, 0, 1)
      run("cross_entropy_backward", x.device, x._c, loss._c, x._c, t._c, lse._c, -100, 0, 1)
      return x
    end, { randn { 3, 1999 }, targets(3, 1999) }, { tol = 2e-5 })
  end)

  it("of NaN, of no rows and of ignored ones", function()
    local x = randn({ 2, 3 }):tolist()
    x[1][2] = nan
    both("NaN", function(a, t) return F.cross_entropy(a, t) end, { ds.tensor(x), targets(2, 3) })
    for _, reduction in ipairs { "mean", "sum", "none" } do
      local options = { reduction = reduction }
      both("ignored", function(a, t) return F.cross_entropy(a, t, options) end,
        { randn({ 2, 3 }, { grad = true }), ds.tensor({ -100, -100 }, { dtype = "i64" }) })
      both("no rows", function(a, t) return F.cross_entropy(a, t, options) end,
        { ds.zeros(0, 3), ds.zeros({ 0 }, { dtype = "i64" }) })
    end
  end)

  it("tells a bad target, and goes on", function()
    for _, bad in ipairs { 5, -1 } do
      local x, t = randn({ 2, 5 }):to("f32", "cuda"), ds.tensor({ 1, bad }, { dtype = "i64" })
      local loss = F.cross_entropy(x, t:to("i64", "cuda"), { reduction = "sum" })
      local ok, message = pcall(loss.item, loss)
      assert.is_false(ok)
      assert.matches("cross_entropy: index " .. bad .. " is not in 0 to 4", message, 1, true)
      assert.equal(x:sum():item(), x:sum():item()) -- it is told once
    end
  end)

  it("refuses shapes and dtypes that do not fit", function()
    local x = ds.zeros({ 3, 4 }, { device = "cuda" })
    local function on(shape, dtype)
      return ds.zeros(shape, { device = "cuda", dtype = dtype })._c
    end
    local function call(loss, lse, target, how)
      run("cross_entropy", "cuda", loss, lse, x._c, target, -100, 0, how)
    end
    call(on {}, on { 3 }, on({ 3 }, "i64"), 1)
    assert.has_error(function() call(on { 3 }, on { 3 }, on({ 3 }, "i64"), 1) end)
    assert.has_error(function() call(on {}, on { 2 }, on({ 3 }, "i64"), 1) end)
    assert.has_error(function() call(on {}, on({ 3 }, "bf16"), on({ 3 }, "i64"), 1) end)
    assert.has_error(function() call(on {}, on { 3 }, on({ 3 }, "f32"), 1) end)
    assert.has_error(function() call(on {}, on { 3 }, on({ 2 }, "i64"), 1) end)
  end)
end)
