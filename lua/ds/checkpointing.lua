--- Activation checkpointing (Chen et al. 2016): a forward whose activations are not kept; backward
-- makes them again, with the same random numbers. Less memory for the price of a second forward.
--
--     y = ds.checkpoint(f, x)                                    any function or module
--     "activation_checkpointing": { "enabled": true }            the model's repeated blocks
--     ds.checkpointing.configure / checkpoint / is_configured    DeepSpeed's names
--
-- The record of such a forward has the arguments as its inputs. In backward f runs on leaves that
-- share their memory, and a backward of its own goes from what f gives to those leaves. Parameters
-- get their gradients there, directly. Those of a module are inputs of the record, too, which it
-- does not read: so ZeRO knows that their buckets are not complete before it is done.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local products = require "ds.products"
local nn = require "ds.nn"
local spec = require "ds.spec"

local raise, shape_string = border.raise, border.shape_string
local is_tensor = tensor.is_tensor

local M = {}

M.to_host = false -- DeepSpeed's cpu_checkpointing, of the engine that runs now, or by configure()

local function host() return require "ds.checkpointing_host" end

local function pack_values(...) return { n = select("#", ...), ... } end

-- ---- forward

--- Whether a plain table holds the result of an operation, however deep.
local function holds_history(value, seen)
  if type(value) ~= "table" or seen[value] or nn.is_module(value) then return false end
  if is_tensor(value) then return value._rec and true end
  seen[value] = true
  for _, v in pairs(value) do
    if holds_history(v, seen) then return true end
  end
  return false
end

--- Raises for what backward could not pass gradients through.
local function check_arguments(f, args)
  local kind = type(f)
  if kind ~= "function" and not (kind == "table" and (getmetatable(f) or {}).__call) then
    raise("checkpoint: expects a function or module and its arguments, not %s",
      kind == "table" and "a table" or tostring(f))
  end
  for i = 1, args.n do
    if is_tensor(args[i]) then
      tensor.need_tensor(args[i], "checkpoint", i)
    elseif holds_history(args[i], {}) then
      raise("checkpoint: argument %d is a table with tensors that have a history, which would get "
        .. "no gradient; pass them as arguments of their own", i)
    end
  end
end

--- f(…) without a record. The arguments are needed again, so nothing in it may take their memory.
local function run_unrecorded(f, args)
  local kept = {}
  for i = 1, args.n do
    if is_tensor(args[i]) and kept[args[i]] == nil then
      kept[args[i]] = args[i]._keep
      args[i]._keep = true
    end
  end
  local results = pack_values(pcall(scope.no_grad, f, unpack(args, 1, args.n)))
  for t, keep in pairs(kept) do t._keep = keep end
  if not results[1] then error(results[2], 0) end
  return pack_values(unpack(results, 2, results.n))
end

--- The parameters of a module whose gradients ZeRO waits for.
local function awaited(module)
  local out = {}
  for _, p in ipairs(module:parameters()) do
    if p._zero then out[#out + 1] = p end
  end
  return out
end

--- Whether t, given back by f, is f's alone to give a history.
local function is_fresh(t, seen)
  return not (seen[t] or t._rec or t.requires_grad or t._parameter)
end

-- ---- backward

--- f again, recorded, on the record's arguments; what was random is so again.
-- @treturn table what f takes
-- @treturn table what f gives
local function run_again(r)
  local again, generator = { n = r.arguments.n }, tensor.generator
  for i = 1, again.n do
    local t = r.arguments[i]
    again[i] = t
    if is_tensor(t) and not t._parameter then
      again[i] = tensor.view.alias(t)
      again[i].requires_grad = autograd.needs(t)
      again[i]._keep = true
    end
  end
  local seed, offset, loss_seed = generator.seed, generator.offset, products.loss_seed
  local to_host = M.to_host
  generator.seed, generator.offset, products.loss_seed = r.seed, r.offset, r.loss_seed
  scope.grad, M.to_host = true, r.to_host
  local out = pack_values(pcall(r.f, unpack(again, 1, again.n)))
  scope.grad, M.to_host = false, to_host
  generator.seed, generator.offset, products.loss_seed = seed, offset, loss_seed
  if not out[1] then error(out[2], 0) end
  return again, pack_values(unpack(out, 2, out.n))
end

local function shape_of(t) return is_tensor(t) and shape_string(t.shape) or type(t) end

local function backward(r, dys)
  local floor = autograd.now()
  if r.away then host().back(r.away) end
  local again, out = run_again(r)
  local roots, seeds = {}, {}
  for k, i in ipairs(r.results) do
    local y = out[i]
    if shape_of(y) ~= r.shapes[k] then
      raise("f gave %s as result %d in forward and gives %s now; it must do the same both times",
        r.shapes[k], i, shape_of(y))
    end
    if dys[k] and y.requires_grad then roots[#roots + 1], seeds[#seeds + 1] = y, dys[k] end
  end
  autograd.run(roots, seeds, false, floor)
  local grads = {}
  for k, i in ipairs(r.positions) do
    local g = again[i] ~= r.arguments[i] and again[i].grad
    if g then
      g._keep = false -- ours alone: goes as soon as it is used
      grads[k] = g
    end
  end
  return grads
end

-- ---- the record

local function name_inputs(r, args, params)
  local inputs, unread, positions = {}, {}, {}
  for i = 1, args.n do
    if is_tensor(args[i]) then
      positions[#positions + 1] = i
      inputs[#inputs + 1] = #inputs + 1
      r[#inputs] = args[i]
    end
  end
  for _, p in ipairs(params) do
    inputs[#inputs + 1] = #inputs + 1
    r[#inputs] = p
    unread[#inputs] = true
  end
  r.positions = positions
  return inputs, unread
end

--- Gives the floating tensors among the results a history.
local function name_outputs(r, args, results)
  local outputs, seen = {}, {}
  for i = 1, args.n do
    if is_tensor(args[i]) then seen[args[i]] = true end
  end
  r.results, r.shapes = {}, {}
  for i = 1, results.n do
    local y = results[i]
    if is_tensor(y) and tensor.floating[y.dtype] then
      if not is_fresh(y, seen) then y = tensor.view.alias(y) end
      seen[y] = true
      results[i] = y
      local k = #outputs + 1
      outputs[k], r.results[k], r.shapes[k] = "y" .. k, i, shape_string(y.shape)
      r[outputs[k]] = y
      y._rec, y.requires_grad = r, true
    elseif type(y) == "table" and not is_tensor(y) then
      raise("checkpoint: result %d of f is a table, and tensors in it would get no gradient; "
        .. "return them side by side, as `return a, b`", i)
    end
  end
  return outputs
end

--- What checkpoint() does; all of them come by here, also those of wrap().
-- @tparam function|Module f
-- @tparam[opt] Module module whose parameters f uses, and no others; nil: not known
-- @param ... f's arguments
function M.run(f, module, ...)
  local args = pack_values(...)
  check_arguments(f, args)
  if not scope.grad then return f(...) end
  local r = setmetatable({ mark = 0, f = f, arguments = args, seed = tensor.generator.seed,
    offset = tensor.generator.offset, loss_seed = products.loss_seed, to_host = M.to_host },
    autograd.Record)
  local results = run_unrecorded(f, args)
  local inputs, unread = name_inputs(r, args, module and awaited(module) or {})
  local outputs = name_outputs(r, args, results)
  r.op = { name = "checkpoint", inputs = inputs, unread = unread, outputs = outputs, saved = {},
    args = {}, many = true, partial = true, spare = true, backward = backward,
    nested = not module }
  autograd.place(r)
  r.away = M.to_host and host().depart(args)
  return unpack(results, 1, results.n)
end

--- Runs `f(…)` without keeping its activations; backward runs it again, with the same random
-- numbers. So f must do the same both times, and have no other effect. Where nothing is recorded
-- (ds.no_grad, evaluation) it is a plain call.
-- @usage x = ds.checkpoint(function(x) return self.mlp(x) end, x)
-- @tparam function|Module f
-- @param ... its arguments; tensors with a history stand here, not in tables and not as upvalues.
--   nil, numbers and so on pass through, both ways
-- @return what f returns
function M.checkpoint(f, ...) return M.run(f, nn.is_module(f) and f or nil, ...) end

-- ---- the blocks of a model

--- The outermost lists of two or more modules of one class: { { module, module, … }, … }.
local function repeated(t, found, seen)
  if seen[t] or is_tensor(t) then return found end
  seen[t] = true
  local same = nn.is_module(t[1]) and #t >= 2
  for _, m in ipairs(t) do same = same and getmetatable(m) == getmetatable(t[1]) end
  if same then
    found[#found + 1] = t
    return found
  end
  for key, v in pairs(t) do
    local private = type(key) == "string" and key:sub(1, 1) == "_"
    if type(v) == "table" and not private and (nn.is_module(v) or getmetatable(v) == nil) then
      repeated(v, found, seen)
    end
  end
  return found
end

--- Has the blocks of a model, the modules of its lists of two or more of one class, run under
-- checkpoint() from now on.
-- @tparam Module model
-- @tparam[opt] number most so many of each list: the first, whose activations are kept longest
-- @treturn table the blocks, for unwrap()
function M.wrap(model, most)
  local lists = nn.is_module(model) and repeated(model, {}, {}) or {}
  if #lists == 0 then
    raise("activation_checkpointing.enabled: the model has no list of modules of one class, as "
      .. "nn.list(n, function() return Block() end); use ds.checkpoint(f, …) in its forward")
  end
  local blocks = {}
  for _, list in ipairs(lists) do
    for i = 1, math.min(#list, most or #list) do
      local block, plain = list[i], list[i].forward
      local function forward(...) return plain(block, ...) end
      if rawget(block, "forward") == nil then
        block.forward = function(_, ...) return M.run(forward, block, ...) end
        blocks[#blocks + 1] = block
      end
    end
  end
  return blocks
end

--- Has blocks run plainly again.
-- @tparam table blocks what wrap() gave
function M.unwrap(blocks)
  for _, block in ipairs(blocks) do block.forward = nil end
  if package.loaded["ds.checkpointing_host"] then host().flush() end
end

-- ---- DeepSpeed's interface

-- Names of configure()'s arguments, and the config keys that they are.
local arguments = {
  contiguous_checkpointing = "contiguous_memory_optimization",
  num_checkpoints = "number_checkpoints",
  checkpoint_in_cpu = "cpu_checkpointing", synchronize = "synchronize_checkpoint_boundary",
}

local configured = false

--- DeepSpeed's settings of checkpoint(): under the names of the config section
-- activation_checkpointing, or of deepspeed.checkpointing.configure's arguments. Of those, here
-- cpu_checkpointing does something; what is not in this version is refused.
-- @tparam[opt] table options
function M.configure(options)
  local given = {}
  for key, value in pairs(options or {}) do given[arguments[key] or key] = value end
  local fields
  for _, field in ipairs(require("ds.config_schema").fields) do
    if field[1] == "activation_checkpointing" then fields = field.fields end
  end
  local context = spec.context()
  spec.check(context, fields, given, { path = "" })
  if #context.problems > 0 then
    raise("%s", table.concat(spec.messages(context, "checkpointing.configure"), "\n"))
  end
  configured = true
  if given.cpu_checkpointing ~= nil then M.to_host = given.cpu_checkpointing end
end

function M.is_configured() return configured end

return M
