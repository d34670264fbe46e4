-- Optimizers, the norm of all gradients and the factor that clips it, against the CPU's.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local run = tensor.run
local randn, both = helper.randn, helper.both

-- name, states, and its scalars; lr, c1 and c2 as the tensor `rates` would say them
local rules = {
  { "adam", 2, { 0.01, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.25, 0.5, 0 } },
  { "adam", 2, { 0.01, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.25, 0.5, 1 } },
  { "sgd", 0, { 0.01, 0, 0, 0.1, 0, 1, 0.5 } },
  { "sgd", 1, { 0.01, 0.9, 0.3, 0.1, 0, 1, 0.5 } },
  { "sgd", 1, { 0.01, 0.9, 0, 0.1, 1, 0, 0.5 } },
  { "lion", 1, { 0.01, 0.9, 0.99, 0.1, 0.5 } },
  { "adagrad", 1, { 0.01, 1e-10, 0.1, 0.5 } },
  { "lamb", 2, { 0.01, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.25, 0.01, 10, 0.5 } },
  { "lamb", 2, { 0.01, 0.9, 0.99, 1e-8, 0.1, 0.5, 0.25, 0.01, 0.02, 0.5 } },
}

local function handle(t) return t and t._c or nil end

--- Where n elements begin in longer memory: views whose addresses are aligned alike, or are not.
local function part(t, at, n) return tensor.view.narrow(t, 1, at + 1, n) end

--- One step of a rule; all its buffers afterwards.
local function step(rule, p, a, b, low, g, factor, rates)
  local name, states, scalars = unpack(rule)
  local args = { p._c }
  local n = 1
  for i, t in ipairs { a, b } do
    if i <= states then n = n + 1; args[n] = t._c end
  end
  if name == "sgd" and states == 0 then n = n + 1 end -- no momentum buffer
  args[n + 1], args[n + 2] = handle(low), g._c
  n = n + 2
  for i = 1, #scalars do args[n + i] = scalars[i] end
  n = n + #scalars
  args[n + 1], args[n + 2] = handle(factor), handle(rates)
  run(name, p.device, unpack(args, 1, n + 2))
  return p, a, b, low
end

local function buffers(n, g_dtype)
  local v = (randn { n } * 0.1):square()
  return randn { n }, randn({ n }, { scale = 0.1 }), v:keep(),
    randn({ n }, { dtype = g_dtype or "f32" })
end

describe("optimizers on cuda", function()
  for _, rule in ipairs(rules) do
    it(("step as on the CPU: %s %d"):format(rule[1], rule[2]), function()
      for _, case in ipairs { { 1, "f32" }, { 5, "bf16", "f16" }, { 1027, "bf16", "bf16" },
        { 5003, "f16", "f16" }, { 2048, "f32", "bf16" } } do
        local n, g_dtype, low = unpack(case)
        local p, a, b, g = buffers(n, g_dtype)
        both(("%s of %d"):format(rule[1], n), function(...)
          return step(rule, ...)
        end, { p, a, b, low and randn({ n }, { dtype = low }) or false, g })
      end
    end)
  end

  it("take memory that is aligned alike, and that is not", function()
    for _, at in ipairs { { 3, 3, 3, 3, 3 }, { 2, 6, 10, 2, 6 }, { 1, 2, 3, 4, 5 },
      { 0, 0, 0, 0, 1 } } do
      for _, i in ipairs { 1, 8 } do
        local n = 611
        local p, a, b, g = buffers(n + 10, "bf16")
        both(rules[i][1] .. " at " .. table.concat(at, " "), function(x, m, v, low, grad)
          step(rules[i], part(x, at[1], n), part(m, at[2], n), part(v, at[3], n),
            part(low, at[4], n), part(grad, at[5], n))
          return x, m, v, low
        end, { p, a, b, randn({ n + 10 }, { dtype = "f16" }), g })
      end
    end
  end)

  it("take the factor and the rates from the device", function()
    for _, rule in ipairs(rules) do
      local p, a, b, g = buffers(67)
      local factor = randn({ 1 }, { scale = 0, shift = 0.25 })
      local rates = ds.tensor({ 0.3, 0.7, 0.1 }, { dtype = "f64", device = "cpu" })
      both(rule[1] .. ", both", function(x, m, v, grad, f, r)
        return step(rule, x, m, v, nil, grad, f, r)
      end, { p, a, b, g, factor, rates:keep() })
    end
  end)

  it("skip a step whose factor is not finite", function()
    for _, rule in ipairs(rules) do
      for _, value in ipairs { 0 / 0, math.huge } do
        local p, a, b, g = buffers(67)
        local factor = helper.on("cuda", ds.full({ 1 }, value, { device = "cpu" }))
        local given, kept = {}, {}
        for i, t in ipairs { p, a, b, randn({ 67 }, { dtype = "bf16" }), g } do
          given[i], kept[i] = helper.on("cuda", t), t:to "f32":tolist()
        end
        given[6] = factor
        step(rule, unpack(given))
        for i = 1, 5 do assert.same(kept[i], given[i]:to "cpu":to "f32":tolist()) end
      end
    end
  end)

  it("do nothing to nothing", function()
    for _, rule in ipairs(rules) do
      local p, a, b, g = buffers(0)
      both(rule[1], function(...) return step(rule, ...) end, { p, a, b, false, g })
    end
  end)

  it("show a NaN in its weight, and nowhere else", function()
    for i = 1, 7 do
      local p, a, b, g = buffers(21)
      g:narrow(1, 13, 1):fill_(0 / 0)
      both(rules[i][1], function(...) return step(rules[i], ...) end, { p, a, b, false, g })
    end
  end)

  it("refuse what does not fit, by name", function()
    local function new(n, dtype)
      return ds.empty({ n }, { dtype = dtype or "f32", device = "cuda" })
    end
    local p, g, one = new(4), new(4), new(1)
    local function says(text, ...)
      local ok, why = pcall(step, rules[6], ...)
      assert.is_false(ok)
      assert.truthy(tostring(why):find(text, 1, true), tostring(why))
    end
    says("3 elements beside 4", p, new(3), nil, nil, g)
    says("state is bf16", p, new(4, "bf16"), nil, nil, g)
    says("f32 copy", p, new(4), nil, new(4), g)
    says("weights are bf16", new(4, "bf16"), new(4), nil, nil, g)
    says("gradients are i64", p, new(4), nil, nil, new(4, "i64"))
    says("factor is 4 numbers", p, new(4), nil, nil, g, g)
    says("rates is 1 numbers", p, new(4), nil, nil, g, nil, one)
    says("not on cuda", p, ds.zeros({ 4 }, { device = "cpu" }), nil, nil, g)
    says("weights' device", p, new(4), nil, nil, g, ds.zeros({ 1 }, { device = "cpu" }))
  end)
end)

describe("the norm of gradients on cuda", function()
  it("adds up squares, of any memory", function()
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      for _, case in ipairs { { 0, 0 }, { 1, 1 }, { 7, 3 }, { 1000, 0 }, { 20011, 5 } } do
        local n, at = unpack(case)
        both(("square_sum %s %d"):format(dtype, n), function(x, y)
          run("square_sum", x.device, y._c, part(x, at, n)._c, 0)
          local first = y:clone()
          run("square_sum", x.device, y._c, part(x, at, n)._c, 1)
          return first, y
        end, { randn({ n + at }, { dtype = dtype }), randn { 1 } })
      end
    end
  end)

  it("gives the factor", function()
    for _, case in ipairs { { 16, 0, 8, 1 }, { 256, 2, 4, 1 }, { 16, 8, 1, 0 }, { 0, 1, 1, 1 },
      { math.huge, 1, 4, 1 }, { 0 / 0, 1, 4, 1 }, { 0 / 0, 1, 4, 0 }, { math.huge, 1, 4, 0 } } do
      local squares, most, scale, skip = unpack(case)
      both("clip_factor of " .. squares, function(s)
        local factor = ds.empty({ 1 }, { device = s.device })
        local norm = ds.empty({ 1 }, { device = s.device })
        run("clip_factor", s.device, factor._c, norm._c, s._c, most, scale, skip)
        return factor, norm
      end, { ds.full({ 1 }, squares, { device = "cpu" }) })
    end
  end)
end)
