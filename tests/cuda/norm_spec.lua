-- Layer norm and RMS norm: rows in parts of warps, in warps, in blocks, and those that fit nowhere.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local F, run = ds.F, tensor.run
local randn, both = helper.randn, helper.both

-- Sums in another order, gradients of weights over all rows: a little more than one rounding.
local tolerance = { f32 = 3e-5, bf16 = 2 ^ -6, f16 = 2 ^ -9 }

-- Rows and columns: one thread a row, parts of warps, a warp, several warps (some idle), loops.
local shapes = { { 3, 8 }, { 5, 40 }, { 37, 64 }, { 2, 3, 256 }, { 9, 768 }, { 3, 1032 },
  { 5, 1600 }, { 2, 4096 }, { 7, 1 }, { 4, 33 }, { 1, 12296 } }

describe("norms on cuda", function()
  for _, dtype in ipairs { "f32", "bf16", "f16" } do
    local options = { tol = tolerance[dtype], grad_tol = tolerance[dtype] * 2 }

    it("give the CPU's rows and gradients in " .. dtype, function()
      for _, shape in ipairs(shapes) do
        local c, name = shape[#shape], ("%s [%s]"):format(dtype, table.concat(shape, " x "))
        local function of(s, grad) return randn(s, { dtype = dtype, grad = grad, shift = 0.5 }) end
        local x, w, b, delta = of(shape, true), of({ c }, true), of({ c }, true), of(shape, true)
        -- rows of one element: the gradient is a rounding error of 0 times 1 / sqrt(eps)
        local how = c == 1 and { tol = options.tol, gradient = false } or options
        both("layer_norm " .. name, function(...) return F.layer_norm(...) end, { x, w, b }, how)
        both("rms_norm " .. name, function(...) return F.rms_norm(...) end, { x, w }, options)
        both("layer_norm, sum " .. name, function(...)
          local sum, y = F.layer_norm(...)
          return y, sum
        end, { x, w, b, 1e-5, delta }, how)
      end
    end)
  end

  it("take many rows a block", function()
    local rows = helper.simulated and 45 or 1500 -- more than there are blocks
    local function of(shape) return randn(shape, { dtype = "bf16", grad = true }) end
    both("rows in turn", function(...)
      local sum, y = F.layer_norm(...)
      return y, sum
    end, { of { rows, 1032 }, of { 1032 }, of { 1032 }, 1e-5, of { rows, 1032 } },
      { tol = tolerance.bf16, grad_tol = tolerance.bf16 * 2 })
  end)

  it("go without weights, and with one of them only", function()
    local x = randn({ 5, 48 }, { grad = true })
    local b = randn({ 48 }, { grad = true })
    both("plain", function(t) return F.layer_norm(t) end, { x })
    both("plain rms", function(t) return F.rms_norm(t) end, { x })
    both("bias only", function(t, v) return F.layer_norm(t, nil, v) end, { x, b }, { tol = 3e-5 })
    both("fixed weight", function(t, v) return F.layer_norm(t, v) end,
      { x, randn { 48 } }, { tol = 3e-5 })
  end)

  it("take rows that are further apart, and memory that is not aligned", function()
    for _, case in ipairs { { 4, 48, 0 }, { 3, 44, 4 }, { 3, 45, 1 }, { 5, 32, 3 } } do
      local rows, c, at = unpack(case)
      local base, dy = randn { rows, 64 }, randn { rows, c }
      both("narrow " .. table.concat(case, " "), function(x, g, w)
        local part = tensor.view.narrow(x, 2, at + 1, c)
        local y = ds.empty({ rows, 64 }, { device = x.device })
        local out = tensor.view.narrow(y, 2, at + 1, c)
        local function stat() return ds.empty({ rows }, { device = x.device }) end
        local mean, rstd, dx = stat(), stat(), ds.empty({ rows, c }, { device = x.device })
        local dw = ds.full({ c }, 2, { device = x.device })
        local db = ds.full({ c }, 3, { device = x.device })
        run("norm", x.device, out._c, nil, mean._c, rstd._c, part._c, nil, w._c, nil, 1e-5)
        run("norm_backward", x.device, dx._c, dw._c, db._c, g._c, part._c, w._c, mean._c, rstd._c,
          g._c, 1)
        local whole = ds.empty({ rows, c }, { device = x.device })
        run("norm", x.device, whole._c, nil, nil, rstd._c, part._c, nil, nil, nil, 1e-5)
        return dx, dw, db, mean, rstd, whole
      end, { base, dy, randn { c } }, { tol = 3e-5 })
    end
  end)

  it("take x and y of different dtypes", function()
    both("f32 to bf16", function(x, w, dy)
      local y = ds.empty({ 3, 64 }, { dtype = "bf16", device = x.device })
      local rstd = ds.empty({ 3 }, { device = x.device })
      local dx = ds.empty({ 3, 64 }, { device = x.device })
      local dw = ds.empty({ 64 }, { dtype = "bf16", device = x.device })
      run("norm", x.device, y._c, nil, nil, rstd._c, x._c, nil, w._c, nil, 1e-5)
      run("norm_backward", x.device, dx._c, dw._c, nil, dy._c, x._c, w._c, nil, rstd._c, nil, 0)
      return y, rstd, dx, dw
    end, { randn { 3, 64 }, randn({ 64 }, { dtype = "f16" }),
      randn({ 3, 64 }, { dtype = "bf16" }) }, { tol = 2 ^ -7 })
  end)

  it("give gradients of 0 for no rows", function()
    both("no rows", function(x, w, b) return F.layer_norm(x, w, b) end,
      { randn({ 0, 16 }, { grad = true }), randn({ 16 }, { grad = true }),
        randn({ 16 }, { grad = true }) })
  end)

  it("show NaN in its own row only", function()
    local x = randn { 4, 64 }
    x:narrow(1, 2, 1):narrow(2, 7, 1):fill_(0 / 0)
    both("NaN", function(t) return F.layer_norm(t) end, { x }, { tol = 3e-5 })
  end)

  it("give the same bits every time, whatever the memory held", function()
    local x, dy = helper.on("cuda", randn { 67, 96 }), helper.on("cuda", randn { 67, 96 })
    local first
    for i = 1, 3 do
      local function new(...) return ds.full({ ... }, i, { device = "cuda" }) end
      local y, mean, rstd, dx, dw, db = new(67, 96), new(67), new(67), new(67, 96), new(96), new(96)
      run("norm", "cuda", y._c, nil, mean._c, rstd._c, x._c, nil, nil, nil, 1e-5)
      run("norm_backward", "cuda", dx._c, dw._c, db._c, dy._c, x._c, nil, mean._c, rstd._c, nil, 0)
      local bits = { y:tolist(), dx:tolist(), dw:tolist(), db:tolist() }
      first = first or bits
      assert.same(first, bits)
    end
  end)

  it("refuse what does not fit, by name", function()
    local function ones(...) return ds.full({ ... }, 1, { device = "cuda" }) end
    local x, y, one, three = ones(3, 8), ones(3, 8), ones(1), ones(3)
    local function says(text, ...)
      local ok, why = pcall(run, "norm", "cuda", ...)
      assert.is_false(ok)
      assert.truthy(tostring(why):find(text, 1, true), tostring(why))
    end
    says("rstd has 1 elements", y._c, nil, nil, one._c, x._c, nil, nil, nil, 0)
    says("w has 3 elements", y._c, nil, nil, three._c, x._c, nil, three._c, nil, 0)
    says("sum and delta belong together", y._c, y._c, nil, three._c, x._c, nil, nil, nil, 0)
    says("the input's shape", three._c, nil, nil, three._c, x._c, nil, nil, nil, 0)
    local far = ds.ones({ 3, 8 }, { device = "cpu" })
    says("not on cuda", y._c, nil, nil, three._c, far._c, nil, nil, nil, 0)
  end)
end)
