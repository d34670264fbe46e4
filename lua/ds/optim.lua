--- Optimizers: rules, and the optimizer object that applies them.
--
-- A rule sees parameters p, gradients g and its own state in fp32 (f64 beside f64 parameters), and
-- the settings h of a parameter group. Its granularity says in which pieces:
--
--   "flat"    long vectors that tensors' borders do not show in; a rule in Lua is given blocks of
--             at most 256K elements, so that its temporaries stay in the cache
--   "tensor"  whole tensors in their shape
--   "matrix"  whole matrices [rows x cols]; more dimensions are flattened to [shape[1] x rest].
--             What is no matrix, embeddings and the output head go to another rule, the fallback
--
--     ds.optimizer("SignSGD", {
--       granularity = "flat", state = { "m" }, defaults = { lr = 1e-4, momentum = 0.9 },
--       step = function(p, g, s, h)
--         s.m:mul_(h.momentum):add_(g, 1 - h.momentum); p:add_(s.m:sign(), -h.lr)
--       end,
--     })
--
-- What a rule runs over is a segment: { p, g, low, state, group }. The engine makes them, one a
-- group for flat rules and one a parameter for the others; an optimizer used alone makes one a
-- parameter.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local raise, run = border.raise, tensor.run

local M = { registry = {} }
local registry = M.registry

local BLOCK = 256 * 1024 -- elements a flat rule in Lua sees at a time

-- ---- rules

local function find(name)
  if registry[name] then return name end
  local lower = tostring(name):lower()
  for known in pairs(registry) do
    if known:lower() == lower then return known end
  end
end

--- The name under which a rule is registered: any case, and DeepSpeed's names of classes.
local function canonical(name)
  return find(name) or find(require("ds.config_schema").optimizer_synonym(name))
end
M.canonical = canonical

--- The rule for what a matrix rule does not take, with all settings that a group may have.
local function add_fallback(name, rule)
  local given = rule.fallback or "AdamW"
  if type(given) ~= "table" then given = { given } end
  local fallback = registry[canonical(given[1]) or false]
  if not fallback or fallback.granularity == "matrix" then
    raise("optimizer '%s': its fallback '%s' is no optimizer of flat or tensor granularity", name,
      tostring(given[1]))
  end
  for key in pairs(given) do
    if key ~= 1 and fallback.defaults[key] == nil then
      raise("optimizer '%s': its fallback %s has no setting '%s'", name, fallback.name,
        tostring(key))
    end
  end
  for key, default in pairs(fallback.defaults) do
    if rule.settings[key] == nil then
      rule.settings[key] = given[key] == nil and default or given[key]
    end
  end
  rule.fallback, rule.choice = fallback, "use_" .. name:lower()
  rule.own_lr, rule.fallback_lr = name:lower() .. "_lr", fallback.name:lower() .. "_lr"
  rule.optional = { [rule.choice] = "boolean", [rule.own_lr] = "number",
    [rule.fallback_lr] = "number" }
end

local granularities = { flat = true, tensor = true, matrix = true }

--- Registers an optimizer for the JSON config and `ds.optim[name]`.
-- @tparam string name
-- @tparam table rule
--   granularity "flat" (the default), "tensor" or "matrix"
--   state       names of what it keeps, in the shape of p and zero at first
--   defaults    settings and their defaults; others are refused
--   step        function(p, g, s, h): changes p and s in place; h has the group's settings and
--               `step`, counted from 1
--   fallback    with "matrix": the optimizer of the parameters that are no matrices, by name
--               ("AdamW") or with other defaults ({ "AdamW", eps = 1e-10 })
-- With "matrix" and the name "X", a group may say use_x = true or false, and settings x_lr and
-- adamw_lr (the fallback's name) are rates for the one part and the other.
function M.register(name, rule)
  if type(name) ~= "string" or type(rule) ~= "table" or
    (type(rule.step) ~= "function" and not rule.fused) then
    raise("optimizer: expects (name, { state =, defaults =, step = function(p, g, s, h) })")
  end
  if find(name) then raise("optimizer '%s' is already registered", name) end
  rule.granularity = rule.granularity or "flat"
  if not granularities[rule.granularity] then
    raise("optimizer '%s': granularity is \"flat\", \"tensor\" or \"matrix\", not %s", name,
      tostring(rule.granularity))
  end
  rule.state, rule.defaults, rule.name = rule.state or {}, rule.defaults or {}, name
  rule.defaults.lr = rule.defaults.lr or 1e-3
  rule.settings, rule.optional = {}, {}
  for key, default in pairs(rule.defaults) do rule.settings[key] = default end
  if rule.granularity == "matrix" then
    add_fallback(name, rule)
  elseif rule.fallback then
    raise("optimizer '%s': only granularity \"matrix\" has a fallback", name)
  end
  registry[name] = rule
  M[name] = function(params, settings) return M.new(name, params, settings) end
end

-- ---- a rule in Lua over a segment

--- The gradient as a rule sees it: in the precision of p, scaled.
local function gradient(g, p, gscale)
  if g.dtype ~= p.dtype then g = g:to(p.dtype) end
  return gscale == 1 and g or g * gscale
end

local function run_blocks(rule, s, h, gscale)
  local n, slice = s.p:numel(), tensor.view.slice_flat
  for at = 0, n - 1, BLOCK do
    scope.no_grad(function()
      local shape = { math.min(BLOCK, n - at) }
      local state, p = {}, slice(s.p, at, shape)
      for _, name in ipairs(rule.state) do state[name] = slice(s.state[name], at, shape) end
      rule.step(p, gradient(slice(s.g, at, shape), p, gscale), state, h)
    end)
  end
end

local function as_matrix(t)
  if #t.shape == 2 then return t end
  return tensor.view.reshape(t, { t.shape[1], t:numel() / t.shape[1] })
end

local function run_whole(rule, s, h, gscale)
  if s.p:numel() == 0 then return end
  local form = rule.granularity == "matrix" and as_matrix or function(t) return t end
  scope.no_grad(function()
    local state = {}
    for _, name in ipairs(rule.state) do state[name] = form(s.state[name]) end
    rule.step(form(s.p), gradient(form(s.g), s.p, gscale), state, h)
  end)
end

local function apply(s, h, gscale, factor, rates)
  local rule = h.rule
  if rule.fused then return rule.fused(s, h, gscale, factor, rates) end
  if rule.granularity == "flat" then
    run_blocks(rule, s, h, gscale)
  else
    run_whole(rule, s, h, gscale)
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

local function check_setting(rule, key, value)
  local default = rule.settings[key]
  local kind = default ~= nil and type(default) or rule.optional[key]
  if not kind then
    local names = {}
    for _, set in ipairs { rule.settings, rule.optional } do
      for k in pairs(set) do names[#names + 1] = k end
    end
    table.sort(names)
    raise("%s: unknown setting '%s'; there are %s", rule.name, tostring(key),
      table.concat(names, ", "))
  end
  if type(value) ~= kind then
    raise("%s: %s must be a %s, not %s", rule.name, key, kind, tostring(value))
  end
end

--- Settings checked against the rule's, with `base` where nothing is given.
local function settings_of(rule, given, base)
  local h = {}
  for key, default in pairs(rule.settings) do h[key] = copy_setting(default) end
  for key, value in pairs(base or {}) do h[key] = copy_setting(value) end
  if given.lr and rule.own_lr then -- a group's own rate goes before those for all groups
    h[rule.own_lr], h[rule.fallback_lr] = nil, nil
  end
  for key, value in pairs(given) do
    if key ~= "params" and key ~= "name" then
      check_setting(rule, key, value)
      h[key] = copy_setting(value)
    end
  end
  return h
end

--- Whether a matrix rule takes this parameter: what the group says, what `p.use_muon` says, or by
-- its shape and what it is (as DeepSpeed does by name, and embeddings of any name).
local function takes(rule, settings, p)
  local use = settings[rule.choice]
  if use == nil then use = rawget(p, rule.choice) end
  if use and #p.shape < 2 then
    raise("%s: %s = true, but parameter %s%s is no matrix", rule.name, rule.choice,
      p._name and p._name .. " " or "", border.shape_string(p.shape))
  end
  if use ~= nil then return use end
  local name = (p._name or ""):lower()
  return #p.shape >= 2 and not p._embedding and not name:find "embed" and not name:find "lm_head"
end

local function add_group(groups, rule, name, params, settings, lr)
  if #params == 0 then return end
  local group = { rule = rule, name = name, params = params }
  for key in pairs(rule.defaults) do group[key] = copy_setting(settings[key]) end
  group.lr = lr or group.lr
  groups[#groups + 1] = group
end

--- What the user calls a group is two where a matrix rule shares it with its fallback: each has a
-- rate of its own, that a schedule moves.
local function add_groups(groups, rule, name, params, settings)
  if rule.granularity ~= "matrix" then
    return add_group(groups, rule, name, params, settings)
  end
  local matrices, rest = {}, {}
  for _, p in ipairs(params) do
    local part = takes(rule, settings, p) and matrices or rest
    part[#part + 1] = p
  end
  add_group(groups, rule, name, matrices, settings, settings[rule.own_lr])
  add_group(groups, rule.fallback, name, rest, settings, settings[rule.fallback_lr])
end

--- Lists of parameters, or of groups { params = {…}, lr =, weight_decay = … }, as groups.
local function groups_of(rule, params, settings)
  local base = settings_of(rule, settings or {})
  local list = params
  if not is_group(params[1]) then list = { { params = params } } end
  local groups, seen = {}, {}
  for i, given in ipairs(list) do
    if not is_group(given) then raise("%s: entry %d has no params", rule.name, i) end
    local trained = {}
    for j, p in ipairs(given.params) do
      if not tensor.is_tensor(p) then tensor.need_tensor(p, rule.name, j) end
      if seen[p] then raise("%s: parameter %d of group %d is in two groups", rule.name, j, i) end
      seen[p] = true
      if p.requires_grad then trained[#trained + 1] = p end
    end
    add_groups(groups, rule, given.name, trained, settings_of(rule, given, base))
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

local function new_state(rule, group, p, device)
  local state = {}
  for _, key in ipairs(rule.state) do
    local initial = rule.initial and rule.initial[key]
    state[key] = tensor.full(p.shape, initial and group[initial] or 0,
      { dtype = p.dtype, device = device or p.device }):keep()
  end
  return state
end

--- Takes the segments that the engine made: all that step() updates from now on.
-- @tparam table segments { p, g, low, group = index }, …: dense p (fp32) and g; low is the copy in
-- low precision or nil; in the parameter's shape where the group's rule needs whole tensors;
-- `device`: where the update is made, if p may lie elsewhere
-- @tparam[opt] table store where vectors of theirs lie that are not in memory (ds/offload.lua)
function Optimizer:bind(segments, store)
  self.segments, self.store = segments, store
  for _, s in ipairs(segments) do
    local group = self.param_groups[s.group]
    s.state = s.state or new_state(group.rule, group, s.p, s.device)
  end
end

-- Used alone: one segment a parameter; a low-precision one gets an fp32 master.
local function own_segments(group, index, out)
  group._own = group._own or {}
  for _, p in ipairs(group.params) do
    if p.grad then
      local s = group._own[p]
      if not s then
        local low = p.dtype ~= "f32" and p.dtype ~= "f64"
        local master = low and p:detach():to("f32"):keep() or p:detach()
        s = { p = master, low = low and p or nil, group = index }
        s.state = new_state(group.rule, group, master)
        group._own[p] = s
      end
      s.g = p.grad:contiguous()
      out[#out + 1] = s
    end
  end
end

--- Counts an update, which apply() then makes.
function Optimizer:advance()
  self.steps = self.steps + 1
  for _, group in ipairs(self.param_groups) do group.step = self.steps end
end

--- The update that advance() counted. Gradients are multiplied by `gscale` as they are read.
-- @tparam number gscale
-- @tparam[opt] Tensor factor f32 [1] on their device, by which they are multiplied, too; where it
-- is not finite nothing is changed. Only rules that are kernels take it, and rates
-- @tparam[opt] table rates by group, f64 [3] on the device: what rule.rates(group) gives
function Optimizer:apply(gscale, factor, rates)
  scope.no_grad(function()
    local segments = self.segments
    if not segments then
      segments = {}
      for i, group in ipairs(self.param_groups) do own_segments(group, i, segments) end
    end
    local function update(s)
      apply(s, self.param_groups[s.group], gscale, factor, rates and rates[s.group])
    end
    if self.store then return self.store:stream(update) end
    for _, s in ipairs(segments) do update(s) end
  end)
end

--- One update. @tparam[opt=1] number gscale @tparam[opt] Tensor factor as apply() takes it
function Optimizer:step(gscale, factor)
  self:advance()
  self:apply(gscale or 1, factor)
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
    for key in pairs(group.rule.defaults) do out[key] = copy_setting(group[key]) end
    groups[i] = out
  end
  return { name = self.name, steps = self.steps, param_groups = groups }
end

--- Raises unless state_dict() gave this for the same optimizer and number of groups.
function Optimizer:check_state_dict(state)
  if state.name ~= self.name then
    raise("the saved optimizer is %s, this one %s", tostring(state.name), self.name)
  end
  if #state.param_groups ~= #self.param_groups then
    raise("the saved optimizer has %d parameter groups, this one %d", #state.param_groups,
      #self.param_groups)
  end
end

--- Takes what state_dict() gave.
function Optimizer:load_state_dict(state)
  self:check_state_dict(state)
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
    lines[i] = ("  group %d%s: %d tensors, %d numbers, lr %g, weight decay %g"):format(i,
      group.rule ~= self.rule and " by " .. group.rule.name or "", #group.params, n, group.lr,
      group.weight_decay or 0)
  end
  return ("%s {\n%s\n}"):format(self.name, table.concat(lines, "\n"))
end

for _, entry in ipairs(require "ds.optim_rules") do M.register(entry[1], entry[2]) end
M.register("Muon", require "ds.optim_muon")

return M
