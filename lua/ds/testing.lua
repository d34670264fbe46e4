--- Checks for your own layers and operations: gradients against finite differences, closeness.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local nn = require "ds.nn"

local raise = border.raise
local M = {}

--- Raises unless |a − b| ≤ atol + rtol |b| everywhere; NaN is never close.
-- @tparam[opt] table options { rtol = 1e-5, atol = 1e-8 }
function M.assert_close(a, b, options)
  options = options or {}
  local rtol, atol = options.rtol or 1e-5, options.atol or 1e-8
  if type(b) == "number" then b = tensor.full_like(a, b) end
  if border.shape_string(a.shape) ~= border.shape_string(b.shape) then
    raise("assert_close: shapes %s and %s differ", border.shape_string(a.shape),
      border.shape_string(b.shape))
  end
  local function values(t) return t:detach():to("f64", "cpu"):reshape(-1):tolist() end
  local x, y = values(a), values(b)
  local worst, at = -1, 0
  for i = 1, #x do
    if x[i] ~= y[i] then
      local excess = math.abs(x[i] - y[i]) - (atol + rtol * math.abs(y[i]))
      local fine = excess <= 0 -- false for NaN
      if not fine and (excess ~= excess or excess > worst) then
        worst, at = excess, i
        if excess ~= excess then break end
      end
    end
  end
  if at > 0 then
    raise("assert_close: element %d of %d is %.9g, expected %.9g (rtol %g, atol %g)",
      at, #x, x[at], y[at], rtol, atol)
  end
  return true
end

--- The sum of the outputs times fixed weights: one number whose gradient touches every output.
local function objective(f, inputs, weights)
  local out = { f(unpack(inputs)) }
  local total
  for i, y in ipairs(out) do
    if tensor.is_tensor(y) and tensor.floating[y.dtype] then
      weights[i] = weights[i] or tensor.randn(y.shape, { dtype = "f64", device = "cpu" })
      local part = (y * weights[i]):sum()
      total = total and total + part or part
    end
  end
  if not total then raise("gradcheck: the function returned no floating tensor") end
  return total
end

local function check(f, inputs, options)
  local eps, rtol, atol = options.eps or 1e-6, options.rtol or 1e-6, options.atol or 1e-6
  local generator = tensor.generator
  local seed, offset = generator.seed, generator.offset
  local given, checked = {}, {}
  for i, t in ipairs(inputs) do
    if tensor.is_tensor(t) and tensor.floating[t.dtype] then
      given[i] = t:detach():to("f64", "cpu"):clone():requires_grad_():keep()
      checked[#checked + 1] = { name = "input " .. i, t = given[i] }
    else
      given[i] = tensor.is_tensor(t) and t:cpu() or t
    end
  end
  for i, p in ipairs(options.parameters or {}) do
    if p.dtype ~= "f64" then
      raise("gradcheck: parameter %d is %s; use module:to(\"f64\")", i, p.dtype)
    end
    p.grad = nil
    checked[#checked + 1] = { name = "parameter " .. i, t = p }
  end
  local weights = {}
  objective(f, given, weights)
  local function run()
    generator.seed, generator.offset = seed, offset
    return objective(f, given, weights)
  end
  run():backward()
  for _, c in ipairs(checked) do
    local numeric, p = {}, c.t:data_ptr()
    if c.t._c.dense ~= 1 then raise("gradcheck: %s must be contiguous", c.name) end
    for i = 0, c.t:numel() - 1 do
      local value, step = p[i], eps * math.max(1, math.abs(p[i]))
      p[i] = value + step
      local above = scope.no_grad(function() return run():item() end)
      p[i] = value - step
      local below = scope.no_grad(function() return run():item() end)
      p[i] = value
      numeric[i + 1] = (above - below) / (2 * step)
    end
    local analytic = c.t.grad and c.t.grad:to("f64"):reshape(-1):tolist() or {}
    for i, n in ipairs(numeric) do
      local a = analytic[i] or 0
      local fine = math.abs(a - n) <= atol + rtol * math.abs(n) -- false for NaN
      if not fine then
        raise("gradcheck: %s, element %d: backward gives %.9g, finite differences %.9g",
          c.name, i, a, n)
      end
    end
  end
  return true
end

--- Compares the gradients that backward computes with central differences, in f64 on the CPU.
-- Raises with the input, the element and both numbers where they differ.
-- @tparam function|Module f of tensors, returning one or several; of a module the parameters are
-- checked as well (it is in f64 meanwhile)
-- @tparam table inputs tensors; floating ones are checked (converted to f64), others passed on
-- @tparam[opt] table options { eps = 1e-6, rtol = 1e-6, atol = 1e-6,
--   parameters = {…}: checked as well }
-- @usage ds.testing.gradcheck(function(x) return my_layer(x) end, { ds.randn(2, 3) })
function M.gradcheck(f, inputs, options)
  options = options or {}
  if type(inputs) ~= "table" or tensor.is_tensor(inputs) then
    raise("gradcheck: expects a table of inputs, as ds.testing.gradcheck(f, { x })")
  end
  if not nn.is_module(f) then return tensor.on("cpu", check, f, inputs, options) end
  local parameters, dtypes = f:parameters(), {}
  local devices = {}
  for i, p in ipairs(parameters) do dtypes[i], devices[i] = p.dtype, p.device end
  f:to("cpu"):to("f64") -- there is no f64 elsewhere
  options.parameters = options.parameters or parameters
  local ok, message = pcall(tensor.on, "cpu", check, f, inputs, options)
  f:zero_grad()
  for i, p in ipairs(parameters) do
    local grad = p.requires_grad
    p.requires_grad = false
    tensor.repoint(p, p:to(dtypes[i], devices[i]))
    p.requires_grad = grad
  end
  if not ok then error(message, 0) end
  return true
end

return M
