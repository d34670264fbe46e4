--- Operations made in Lua: a script's own gradients, and operations on lists of tensors. Their
-- records hold inputs by position, in any number.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"

local raise = border.raise
local Record, needs = autograd.Record, autograd.needs

local M = {}

--- Notes tensors and values for backward. In a Function's forward.
function Record:save(...)
  self.kept = { n = select("#", ...), ... }
end

--- What save() was given. In a Function's backward.
function Record:saved()
  return unpack(self.kept, 1, self.kept.n)
end

--- Whether the gradient of argument i is wanted.
function Record:needs(i)
  return needs(self[i])
end

local numbers = {}
local function up_to(n)
  if not numbers[n] then
    numbers[n] = {}
    for i = 1, n do numbers[n][i] = i end
  end
  return numbers[n]
end

local function record_function(fn, r, inputs, n_out, ...)
  local outputs = {}
  for i = 1, n_out do
    local y = select(i, ...)
    if not tensor.is_tensor(y) then raise("%s: forward must return tensors", fn.name) end
    outputs[i] = "y" .. i
    for j = 1, #inputs do
      if y == r[j] then
        y = tensor.view.alias(y)
        break
      end
    end
    r["y" .. i] = y
    y._rec, y.requires_grad = r, true
  end
  r.op = { name = fn.name, inputs = up_to(#inputs), outputs = outputs, saved = {}, many = true,
    args = {}, backward = fn.backward_many }
  autograd.place(r)
  local out = {}
  for i = 1, n_out do out[i] = r["y" .. i] end
  return unpack(out, 1, n_out)
end

local function pack_values(...) return { n = select("#", ...), ... } end

--- An operation with its own gradient, written in Lua.
-- `forward(ctx, …)` computes with tensor methods (unrecorded) and `ctx:save(…)`s what backward
-- needs; `backward(ctx, dy…)` returns one gradient, or nil, for each argument of forward, in order.
-- @usage local sign = ds.Function("sign_ste", { forward = …, backward = … }); y = sign(x)
function M.Function(name, spec)
  if type(name) ~= "string" or type(spec) ~= "table" or type(spec.forward) ~= "function"
    or type(spec.backward) ~= "function" then
    raise("Function: expects (name, { forward = function, backward = function })")
  end
  local fn = { name = name }
  function fn.backward_many(r, dys)
    local given = pack_values(spec.backward(r, unpack(dys)))
    local grads = {}
    for i = 1, r.count do
      local g, t = given[i], r.arguments[i]
      if g and tensor.is_tensor(t) then
        if not tensor.is_tensor(g) then
          raise("%s: backward returned a %s for argument %d", name, type(g), i)
        end
        if border.shape_string(g.shape) ~= border.shape_string(t.shape) then
          raise("%s: backward returned %s for argument %d of shape %s", name,
            border.shape_string(g.shape), i, border.shape_string(t.shape))
        end
        grads[r.position[i]] = g
      end
    end
    return grads
  end
  return function(...)
    local r = { mark = 0, count = select("#", ...), arguments = {}, position = {} }
    setmetatable(r, Record)
    local wanted, inputs = false, {}
    for i = 1, r.count do
      local t = select(i, ...)
      if tensor.is_tensor(t) then
        tensor.need_tensor(t, name, i)
        inputs[#inputs + 1] = t
        r[#inputs] = t
        r.position[i] = #inputs
        wanted = wanted or t.requires_grad
      end
      r.arguments[i] = t
    end
    local grad = scope.grad
    scope.grad = false
    local results = pack_values(pcall(spec.forward, r, ...))
    scope.grad = grad
    if not results[1] then error(results[2], 0) end
    if not (grad and wanted) then return unpack(results, 2, results.n) end
    return record_function(fn, r, inputs, results.n - 1, unpack(results, 2, results.n))
  end
end

--- An operation on a list of tensors and one further argument, as cat.
-- @tparam table spec forward(list, argument) → Tensor; backward(r, dy) → a table of gradients
function M.variadic(name, spec)
  local op_of = {}
  local order = autograd.order
  order[#order + 1] = name
  tensor.tags[#order] = name
  autograd.ops[name] = { name = name, backward = spec.backward, variadic = true }
  return function(tensors, argument)
    local wanted = false
    for i, t in ipairs(tensors) do
      tensor.need_tensor(t, name, i)
      wanted = wanted or t.requires_grad
    end
    tensor.revive_all(name, unpack(tensors))
    local y = spec.forward(tensors, argument)
    if not (scope.grad and wanted) then return y end
    local n = #tensors
    op_of[n] = op_of[n] or { name = name, inputs = up_to(n), outputs = { "y" }, saved = {},
      args = {}, many = true, backward = function(r, dys) return spec.backward(r, dys[1]) end }
    local r = autograd.place(setmetatable({ op = op_of[n], mark = 0, y = y, list = tensors,
      dim = argument }, Record))
    for i = 1, n do r[i] = tensors[i] end
    y._rec, y.requires_grad = r, true
    return y
  end
end

return M
