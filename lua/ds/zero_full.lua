--- ds.zero: models that no rank holds as a whole, and whole parameters of them where a script wants
-- some.
--
--     local model = ds.zero.init(function() return GPT { … } end)      -- sharded from the start
--     ds.zero.gathered(model.wte.weight, function() … end)             -- whole inside
--     ds.zero.get_full(p, "fp32")  ds.zero.set_full(p, values)         -- also "grad", "exp_avg" …
--
-- They work at every stage and on one rank; every rank calls them alike.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local nn = require "ds.nn"
local comm = require "ds.comm"
local zero_params = require "ds.zero_params"
local offload = require "ds.offload"
local F = require "ds.functional"

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice = tensor.view.slice_flat

local M = {}

local WHOLE = 4096 -- elements: parameters with fewer are not worth the exchange

local nursery -- parameters that no engine has yet

--- Builds a model whose parameters are split over the ranks as soon as they exist, so that it may
-- be larger than a rank's memory. Values are rank 0's, as ds.initialize has it for other models.
-- Parameters may be initialised in place in f, each with itself (nn.init, copy_, mul_ …).
-- @tparam function f builds and returns the model
-- @return what f returns
function M.init(f, ...)
  if type(f) ~= "function" then
    raise("zero.init: expects a function that builds the model, got %s", type(f))
  end
  if comm.world_size() == 1 then return f(...) end
  if nn.on_parameter then raise("zero.init: one runs already; it can't be nested") end
  nursery = nursery or zero_params.new { device = tensor.default_device }
  nn.on_parameter = function(p)
    if p:numel() >= WHOLE and p.device ~= "meta" then nursery:shard(p, 0) end
  end
  nursery.root = 0
  local function done(ok, ...)
    nn.on_parameter = nil
    if ok then nursery:close_all() end
    nursery.root = nil
    if not ok then error((...), 0) end
    return ...
  end
  return done(xpcall(f, border.note, ...))
end

--- Parameters from one, a list of them, or a module.
local function list_of(what, params)
  if nn.is_module(params) then return params:parameters() end
  if tensor.is_tensor(params) then params = { params } end
  if type(params) ~= "table" then
    raise("%s: expects a parameter, a list of them or a module, got %s", what, type(params))
  end
  for i, p in ipairs(params) do
    if not tensor.is_tensor(p) or not p._parameter then
      raise("%s: entry %d is no parameter", what, i)
    end
  end
  return params
end

--- What other ranks have of a whole parameter is set to what one rank has.
local function send(p, root)
  scope.no_grad(function()
    if p._c.dense == 1 then
      check(C.ds_broadcast(p._c, root, comm.world(), nil), "zero.gathered")
    else
      local dense = p:contiguous()
      check(C.ds_broadcast(dense._c, root, comm.world(), nil), "zero.gathered")
      run("copy", p.device, p._c, dense._c)
    end
    if p._engine then p._engine.zero:take_values(p) end
  end)
end

--- Runs f() while these parameters are whole on every rank.
-- @tparam Tensor|table|Module params
-- @tparam function f
-- @tparam[opt] table options { modifier_rank = 0 }: f changes them (in ds.no_grad), and what it
--   made of them on this rank is kept, on all; without it, changes are lost
-- @return what f returns
function M.gathered(params, f, options)
  options = F.options_of("zero.gathered", options, { modifier_rank = true })
  params = list_of("zero.gathered", params)
  local root = options.modifier_rank
  if root and (type(root) ~= "number" or root < 0 or root >= comm.world_size()) then
    raise("zero.gathered: modifier_rank %s is no rank from 0 to %d", tostring(root),
      comm.world_size() - 1)
  end
  return zero_params.hold(params, root, function()
    local function done(...)
      for _, p in ipairs(root and params or {}) do send(p, root) end
      return ...
    end
    return done(f())
  end)
end

local function engine_of(what, p)
  list_of(what, p)
  if not p._engine or not p._flat then
    raise("%s: the parameter is not trained by an engine; ds.initialize comes first", what)
  end
  return p._engine
end

--- Calls f(stretch, from) for what this rank has of one vector of a parameter.
local function each_stretch(engine, p, name, what, f)
  local rule = engine.optimizer.param_groups[p._flat.group].rule
  local known = name == "fp32" or name == "grad"
  for _, key in ipairs(rule.state) do known = known or key == name end
  if not known then
    raise("%s: there is no '%s'; there are fp32, grad, %s", what, tostring(name),
      table.concat(rule.state, ", "))
  end
  engine.zero:each_owned(p, function(piece, from, segment, at)
    local flat = name == "fp32" and segment.p or name == "grad" and segment.g
      or segment.state[name]
    offload.each(offload.slice(flat, at, piece.shape), function(t, first) f(t, from + first) end)
  end)
end

--- Gradients of the last backward, averaged over the ranks, not scaled; nil after a step.
local function full_gradient(engine, p)
  local zero = engine.zero
  local there = not p._fresh
  if zero.stage >= 2 then there = p._reached end
  if not there then return nil end
  local full = tensor.zeros(p:numel(), { device = p.device })
  if zero.stage >= 2 then
    each_stretch(engine, p, "grad", "zero.get_full", function(stretch, from)
      run("copy", p.device, slice(full, from, stretch.shape)._c, stretch._c)
    end)
    full = comm.all_reduce(full)
  else
    run("copy", p.device, full._c, p.grad:reshape(-1)._c)
    full = comm.all_reduce(full, engine.config.gradient_allreduce_op)
  end
  return full / engine:loss_scale()
end

--- A whole vector of a parameter, on every rank.
-- @tparam Tensor p trained by an engine
-- @tparam[opt="fp32"] string name "fp32" (the master copy), "grad" (since the last step; averaged
--   over the ranks, not scaled), or a piece of the optimizer's state, as "exp_avg"
-- @treturn Tensor|nil f32, of p's shape, a copy; nil: no gradient has come since the last step
function M.get_full(p, name)
  local engine = engine_of("zero.get_full", p)
  name = name or "fp32"
  return scope.no_grad(function()
    if name == "grad" then
      local g = full_gradient(engine, p)
      return g and g:view(unpack(p.shape))
    end
    local full = tensor.zeros(p:numel(), { device = p.device })
    each_stretch(engine, p, name, "zero.get_full", function(stretch, from)
      run("copy", p.device, slice(full, from, stretch.shape)._c, stretch._c)
    end)
    return comm.all_reduce(full):view(unpack(p.shape))
  end)
end

--- Sets a whole vector of a parameter; with "fp32" its weights follow.
-- @tparam Tensor p trained by an engine
-- @tparam Tensor values of p's shape, the same on every rank
-- @tparam[opt="fp32"] string name as get_full's
function M.set_full(p, values, name)
  local engine = engine_of("zero.set_full", p)
  tensor.need_tensor(values, "zero.set_full", 2)
  if border.shape_string(values.shape) ~= border.shape_string(p.shape) then
    raise("zero.set_full: the values are %s, the parameter is %s",
      border.shape_string(values.shape), border.shape_string(p.shape))
  end
  name = name or "fp32"
  if name == "grad" and engine.zero.stage < 2 then
    return scope.no_grad(function()
      run("mul_scalar", p.device, p.grad._c, values:to(p.grad.dtype)._c, engine:loss_scale(), 0)
      p._fresh = false
      engine.zero:outdate(p)
    end)
  end
  scope.no_grad(function()
    local flat = values:float():contiguous():view(-1)
    if name == "grad" then flat = flat * engine:loss_scale() end
    local zero = engine.zero
    zero:each_piece(p, function(piece, from, s, at)
      local to = name == "fp32" and s.p or name == "grad" and s.g or s.state[name]
      if not to then each_stretch(engine, p, name, "zero.set_full") end
      local part = slice(flat, from, piece.shape)
      offload.each(offload.slice(to, at, piece.shape), function(t, first)
        run("copy", p.device, t._c, slice(part, first, t.shape)._c)
      end, true)
      if name == "fp32" and s.low then
        run("copy", p.device, slice(s.low:view(-1), at, piece.shape)._c, part._c)
      end
    end)
    if name == "fp32" then zero:gather() end
    if name == "grad" then p._reached, p._flat.bucket.fresh = true, false end
  end)
end

return M
