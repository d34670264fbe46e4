--- Optimizers: rules over flat buffers, and the optimizer object that applies one.
--
-- A rule sees parameters p, gradients g and its own state as long vectors in fp32, and the settings
-- h of a parameter group. Built-in rules are one fused kernel over the whole vector; rules written
-- in Lua are given blocks of at most 256K elements, so that their temporaries stay in the cache:
--
--     ds.optimizer("SignSGD", {
--       granularity = "flat", state = { "m" }, defaults = { lr = 1e-4, momentum = 0.9 },
--       step = function(p, g, s, h)
--         s.m:mul_(h.momentum):add_(g, 1 - h.momentum); p:add_(s.m:sign(), -h.lr)
--       end,
--     })
--
-- What a rule runs over is a segment: { p, g, low, state }. The engine makes one a group, over its
-- flat buffers; an optimizer used alone makes one a parameter.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local raise, run = border.raise, tensor.run

local M = { registry = {} }
local registry = M.registry

local BLOCK = 256 * 1024 -- elements a Lua rule sees at a time

-- ---- rules

local function canonical(name)
  if registry[name] then return name end
  local lower = tostring(name):lower()
  for known in pairs(registry) do
    if known:lower() == lower then return known end
  end
end
M.canonical = canonical

--- Registers an optimizer for the JSON config and `ds.optim[name]`.
-- @tparam string name
-- @tparam table rule
--   granularity "flat" (the default)
--   state       names of the vectors it keeps, zero at first
--   defaults    settings and their defaults; others are refused
--   step        function(p, g, s, h): changes p and s in place; h has the group's settings and
--               `step`, counted from 1
function M.register(name, rule)
  if type(name) ~= "string" or type(rule) ~= "table" or
    (type(rule.step) ~= "function" and not rule.fused) then
    raise("optimizer: expects (name, { state =, defaults =, step = function(p, g, s, h) })")
  end
  if canonical(name) then raise("optimizer '%s' is already registered", name) end
  local granularity = rule.granularity or "flat"
  if granularity ~= "flat" then
    raise("optimizer '%s': granularity '%s' is not in this version yet; there is \"flat\"", name,
      tostring(granularity))
  end
  rule.state, rule.defaults, rule.name = rule.state or {}, rule.defaults or {}, name
  rule.defaults.lr = rule.defaults.lr or 1e-3
  registry[name] = rule
  M[name] = function(params, settings) return M.new(name, params, settings) end
end

local function handle(t) return t and t._c or nil end

local function adam(decoupled_default)
  return {
    state = { "exp_avg", "exp_avg_sq" },
    defaults = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
      bias_correction = true, adam_w_mode = true },
    fused = function(s, h, gscale)
      local b1, b2 = h.betas[1], h.betas[2]
      local c1, c2 = 1, 1
      if h.bias_correction ~= false then c1, c2 = 1 - b1 ^ h.step, 1 - b2 ^ h.step end
      run("adam", s.p.device, s.p._c, s.state.exp_avg._c, s.state.exp_avg_sq._c, handle(s.low),
        s.g._c, h.lr, b1, b2, h.eps, h.weight_decay, c1, c2, gscale,
        (decoupled_default or h.adam_w_mode ~= false) and 1 or 0)
    end,
  }
end
M.register("Adam", adam(false))   -- AdamW unless adam_w_mode is false, as in DeepSpeed
M.register("AdamW", adam(true))

M.register("SGD", {
  state = { "momentum_buffer" },
  defaults = { lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false },
  fused = function(s, h, gscale)
    if h.nesterov and (h.momentum == 0 or h.dampening ~= 0) then
      raise("SGD: nesterov needs a momentum and no dampening")
    end
    run("sgd", s.p.device, s.p._c, h.momentum ~= 0 and s.state.momentum_buffer._c or nil,
      handle(s.low), s.g._c, h.lr, h.momentum, h.dampening, h.weight_decay,
      h.nesterov and 1 or 0, h.step == 1 and 1 or 0, gscale)
  end,
})

M.register("Lion", {
  state = { "exp_avg" },
  defaults = { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 },
  fused = function(s, h, gscale)
    run("lion", s.p.device, s.p._c, s.state.exp_avg._c, handle(s.low), s.g._c, h.lr,
      h.betas[1], h.betas[2], h.weight_decay, gscale)
  end,
})

M.register("Adagrad", {
  state = { "sum" },
  defaults = { lr = 1e-2, eps = 1e-10, weight_decay = 0, initial_accumulator_value = 0 },
  initial = { sum = "initial_accumulator_value" },
  fused = function(s, h, gscale)
    run("adagrad", s.p.device, s.p._c, s.state.sum._c, handle(s.low), s.g._c, h.lr, h.eps,
      h.weight_decay, gscale)
  end,
})

--- A rule in Lua over one segment, block by block.
local function run_blocks(rule, s, h, gscale)
  local n, slice = s.p:numel(), tensor.view.slice_flat
  local flat = {}
  local function vector(t) return t:view(-1) end
  flat.p, flat.g = vector(s.p), vector(s.g)
  for name, t in pairs(s.state) do flat[name] = vector(t) end
  for at = 0, n - 1, BLOCK do
    scope.no_grad(function()
      local shape = { math.min(BLOCK, n - at) }
      local state = {}
      for _, name in ipairs(rule.state) do state[name] = slice(flat[name], at, shape) end
      local g = slice(flat.g, at, shape)
      if gscale ~= 1 then g = g * gscale end
      rule.step(slice(flat.p, at, shape), g, state, h)
    end)
  end
  if s.low then run("copy", s.p.device, s.low._c, s.p._c) end
end

-- ---- optimizer objects

local Optimizer = {}
Optimizer.__index = Optimizer
M.Optimizer = Optimizer

local function is_group(entry) return type(entry) == "table" and entry.params ~= nil end

local function copy_setting(v)
  return type(v) == "table" and { unpack(v) } or v
end

--- Settings checked against the rule's, with `base` where nothing is given.
local function settings_of(rule, given, base)
  local h = {}
  for key, default in pairs(rule.defaults) do
    h[key] = copy_setting(base and base[key] ~= nil and base[key] or default)
  end
  if base then
    for key in pairs(rule.defaults) do
      if base[key] ~= nil then h[key] = copy_setting(base[key]) end
    end
  end
  for key, value in pairs(given) do
    if key ~= "params" and key ~= "name" then
      if rule.defaults[key] == nil then
        local names = {}
        for k in pairs(rule.defaults) do names[#names + 1] = k end
        table.sort(names)
        raise("%s: unknown setting '%s'; there are %s", rule.name, tostring(key),
          table.concat(names, ", "))
      end
      if type(value) ~= type(rule.defaults[key]) then
        raise("%s: %s must be a %s, not %s", rule.name, key, type(rule.defaults[key]),
          tostring(value))
      end
      h[key] = copy_setting(value)
    end
  end
  return h
end

--- Lists of parameters, or of groups { params = {…}, lr =, weight_decay = … }, as groups.
local function groups_of(rule, params, settings)
  local base = settings_of(rule, settings or {})
  local list = params
  if not is_group(params[1]) then list = { { params = params } } end
  local groups, seen = {}, {}
  for i, given in ipairs(list) do
    if not is_group(given) then raise("%s: entry %d has no params", rule.name, i) end
    local group = settings_of(rule, given, base)
    group.name = given.name
    group.params = {}
    for j, p in ipairs(given.params) do
      tensor.need_tensor(p, rule.name, j)
      if seen[p] then raise("%s: parameter %d of group %d is in two groups", rule.name, j, i) end
      seen[p] = true
      if p.requires_grad then group.params[#group.params + 1] = p end
    end
    if #group.params > 0 then groups[#groups + 1] = group end
  end
  if #groups == 0 then raise("%s: there are no parameters that require a gradient", rule.name) end
  return groups
end

--- An optimizer over parameters, or parameter groups with settings of their own.
-- @tparam string name as registered, any case
-- @tparam table params { p, … } or { { params = { p, … }, lr =, weight_decay = … }, … }
-- @tparam[opt] table settings
function M.new(name, params, settings)
  local known = canonical(name)
  if not known then
    local names = {}
    for n in pairs(registry) do names[#names + 1] = n end
    table.sort(names)
    raise("unknown optimizer '%s'; there are %s", tostring(name), table.concat(names, ", "))
  end
  if type(params) ~= "table" or tensor.is_tensor(params) then
    raise("%s: expects a table of parameters, got %s", known, type(params))
  end
  local rule = registry[known]
  return setmetatable({
    name = known, rule = rule, param_groups = groups_of(rule, params, settings), steps = 0,
  }, Optimizer)
end

local function new_state(rule, group, p)
  local state = {}
  for _, key in ipairs(rule.state) do
    local initial = rule.initial and rule.initial[key]
    state[key] = tensor.full(p.shape, initial and group[initial] or 0,
      { dtype = p.dtype, device = p.device }):keep()
  end
  return state
end

--- Segments made by the engine, { group = number of its group, p, g, low }, any number a group.
function Optimizer:bind(segments)
  self.segments = {}
  for i in ipairs(self.param_groups) do self.segments[i] = {} end
  for _, s in ipairs(segments) do
    s.state = new_state(self.rule, self.param_groups[s.group], s.p)
    table.insert(self.segments[s.group], s)
  end
end

-- Used alone: one segment a parameter; a low-precision one gets an fp32 master.
local function own_segments(self, group)
  group._own = group._own or {}
  local out = {}
  for _, p in ipairs(group.params) do
    if p.grad then
      local s = group._own[p]
      if not s then
        local low = p.dtype ~= "f32" and p.dtype ~= "f64"
        local master = low and p:detach():to("f32"):keep() or p:detach()
        s = { p = master, low = low and p or nil }
        s.state = new_state(self.rule, group, master)
        group._own[p] = s
      end
      s.g = p.grad:contiguous()
      out[#out + 1] = s
    end
  end
  return out
end

--- One update. Gradients are multiplied by `gscale` as they are read.
-- @tparam[opt=1] number gscale
function Optimizer:step(gscale)
  gscale = gscale or 1
  self.steps = self.steps + 1
  scope.no_grad(function()
    for i, group in ipairs(self.param_groups) do
      group.step = self.steps
      for _, s in ipairs(self.segments and self.segments[i] or own_segments(self, group)) do
        if self.rule.fused then
          self.rule.fused(s, group, gscale)
        else
          run_blocks(self.rule, s, group, gscale)
        end
      end
    end
  end)
end

--- Drops the gradients.
function Optimizer:zero_grad()
  for _, group in ipairs(self.param_groups) do
    for _, p in ipairs(group.params) do
      if p._engine then p._fresh = true else p.grad = nil end
    end
  end
end

--- Settings and counters; the vectors are saved by the engine.
function Optimizer:state_dict()
  local groups = {}
  for i, group in ipairs(self.param_groups) do
    local out = { initial_lr = group.initial_lr, lr_scale = group.lr_scale }
    for key in pairs(self.rule.defaults) do out[key] = copy_setting(group[key]) end
    groups[i] = out
  end
  return { name = self.name, steps = self.steps, param_groups = groups }
end

--- Takes what state_dict() gave, for the same optimizer and number of groups.
function Optimizer:load_state_dict(state)
  if state.name ~= self.name then
    raise("the saved optimizer is %s, this one %s", tostring(state.name), self.name)
  end
  if #state.param_groups ~= #self.param_groups then
    raise("the saved optimizer has %d parameter groups, this one %d", #state.param_groups,
      #self.param_groups)
  end
  self.steps = state.steps
  for i, saved in ipairs(state.param_groups) do
    for key, value in pairs(saved) do self.param_groups[i][key] = copy_setting(value) end
  end
end

function Optimizer:__tostring()
  local lines = {}
  for i, group in ipairs(self.param_groups) do
    local n = 0
    for _, p in ipairs(group.params) do n = n + p:numel() end
    lines[i] = ("  group %d: %d tensors, %d numbers, lr %g, weight decay %g"):format(i,
      #group.params, n, group.lr, group.weight_decay or 0)
  end
  return ("%s {\n%s\n}"):format(self.name, table.concat(lines, "\n"))
end

return M
