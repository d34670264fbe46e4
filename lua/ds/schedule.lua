--- Learning-rate schedules: pure functions of the step, and the scheduler that applies one.
--
-- A schedule is `function(step, lr) -> lr [, momentum]`. `step` counts the optimizer's updates from
-- 0: the value for step n is used by update n, and nothing else is known, so there is nothing to
-- save and resuming is exact. `lr` is the rate of the parameter group (`initial_lr`).
--
-- DeepSpeed counts otherwise: its scheduler writes an initial value when it is made and the value
-- for its index i = 0, 1, 2… after each update. So update n uses index i = n - 1, and the initial
-- value for n = 0. The schedules with DeepSpeed's names follow that to the last digit, including
-- what surprises: from a minimum of 0, WarmupLR makes two updates with a rate of 0.
--
-- Nothing here is compiled by the JIT: compiled code may differ in the last bit, and all ranks must
-- agree on the rate.

local dsffi = require "ds.ffi"
local spec = require "ds.spec"

jit.off(true, true)

local M = {}
local registry = {}

--- Registers a schedule under the name used in the JSON config; it may replace a built-in one.
-- @tparam string name
-- @tparam function make `make(params)` returns `function(step, lr) -> lr [, momentum]`; steps count
-- from 0; momentum is a number, or the betas as a table
-- @tparam[opt] table fields what `params` may hold, as in ds/spec.lua; without it anything goes
function M.register(name, make, fields)
  if type(name) ~= "string" or type(make) ~= "function" then
    return dsffi.raise("ds.schedule(name, make): expected a string and a function, got %s and %s",
      type(name), type(make))
  end
  if registry[name] and not registry[name].builtin then
    return dsffi.raise("schedule '%s' is already registered", name)
  end
  jit.off(make, true)
  registry[name] = { make = make, fields = fields }
end

local function builtin(name, make, fields)
  registry[name] = { make = make, fields = fields, builtin = true }
end

--- The names of all schedules, sorted.
function M.names()
  local names = {}
  for name in pairs(registry) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- The fields and the description of a built-in schedule; nil for others.
function M.fields(name) return registry[name] and registry[name].fields end

-- DeepSpeed's schedules --------------------------------------------------------------------------

local warmup_type = { "warmup_type", "string", "log", enum = { "log", "linear" },
  "how the rate rises: with the logarithm of the step, or evenly" }
local warmup_num_steps = { "warmup_num_steps", "integer", 1000, min = 1,
  "steps of the rise; 1 counts as 2" }
local warmup_min_lr = { "warmup_min_lr", "number", 0, min = 0, "rate that the rise begins with" }
local total_num_steps = { "total_num_steps", "integer", nil,
  "steps of the whole training, the rise included", required = true, min = 1 }

-- How far the rise is at index i < w, 0 to 1.
local function rise(p, i, w)
  if p.warmup_type == "linear" then return i / w end
  return 1 / math.log(w) * math.log(i + 1)
end

-- The two that rise to a rate; `after(i, w)` is the share of it that is left behind the rise.
local function warmup(p, after)
  local w = math.max(2, p.warmup_num_steps)
  return function(step, lr)
    if step == 0 then return p.warmup_min_lr end
    local i = step - 1
    local delta = (p.warmup_max_lr or lr) - p.warmup_min_lr
    return p.warmup_min_lr + delta * (i < w and rise(p, i, w) or after(i, w))
  end
end

builtin("WarmupLR", function(p)
  return warmup(p, function() return 1 end)
end, {
  help = "Rises from warmup_min_lr to warmup_max_lr, then stays there.",
  warmup_min_lr,
  { "warmup_max_lr", "number", nil, "rate that the rise ends with; not given: the rate of the " ..
    "parameter group", min = 0 },
  warmup_num_steps, warmup_type,
})

builtin("WarmupDecayLR", function(p)
  local total = p.total_num_steps
  return warmup(p, function(i, w) return math.max(0, (total - i) / math.max(1, total - w)) end)
end, {
  help = "Rises from warmup_min_lr to warmup_max_lr, then falls evenly to 0 at total_num_steps.",
  total_num_steps, warmup_min_lr,
  { "warmup_max_lr", "number", 0.001, "rate that the rise ends with", min = 0 },
  warmup_num_steps, warmup_type,
})

builtin("WarmupCosineLR", function(p)
  local w = math.max(2, p.warmup_num_steps)
  local low, floor = p.warmup_min_ratio, p.cos_min_ratio
  local length = math.max(1, p.total_num_steps - w)
  return function(step, lr)
    if step == 0 then return 0 end -- DeepSpeed begins with 0, not with warmup_min_ratio
    local i = step - 1
    if i < w then return lr * (low + rise(p, i, w) * (1 - low)) end
    local cosine = (1 + math.cos(math.pi * math.min(1, (i - w + 1) / length))) / 2
    return lr * math.max(0, floor + (1 - floor) * cosine)
  end
end, {
  help = "Rises from warmup_min_ratio of the group's rate to all of it, then falls along a " ..
    "cosine to cos_min_ratio of it.",
  total_num_steps,
  { "warmup_min_ratio", "number", 0, "share of the rate that the rise begins with (from the " ..
    "second update on; the first has rate 0, as in DeepSpeed)", min = 0, max = 1 },
  warmup_num_steps,
  { "cos_min_ratio", "number", 0.0001, "share of the rate that is left at the end", min = 0,
    max = 1 },
  warmup_type,
})

-- Share of the way from the lower to the upper rate at count b = i + 1 inside a cycle.
local function cycle_share(p, b, first, second)
  local size = first + second
  local ratio = first / size
  local x = 1 + b / size - math.floor(1 + b / size)
  local rising = x <= ratio
  local stairs = p.cycle_first_stair_count
  if not rising then stairs = p.cycle_second_stair_count or stairs end
  if stairs == 0 then return rising and x / ratio or (x - 1) / (ratio - 1) end
  local at = math.fmod(b, size)
  local position = at <= first and at * stairs / first or (size - at) * stairs / second
  return math.floor(position) / stairs
end

builtin("OneCycle", function(p)
  local first = p.cycle_first_step_size
  local second = p.cycle_second_step_size or first
  local size = first + second
  local min_mom, max_mom = p.cycle_min_mom, p.cycle_max_mom
  local function decay(i, rate)
    if p.decay_step_size == 0 then return 1 end
    return 1 + rate * ((i - size + 1) / p.decay_step_size)
  end
  return function(step)
    local i = step - 1
    local lr, momentum
    if step == 0 then
      lr, momentum = p.cycle_min_lr, min_mom
    elseif i < size then
      local share = cycle_share(p, i + 1, first, second)
      lr = p.cycle_min_lr + (p.cycle_max_lr - p.cycle_min_lr) * share
      momentum = max_mom - (max_mom - min_mom) * share
    else
      lr = p.cycle_min_lr / decay(i, p.decay_lr_rate)
      momentum = max_mom * decay(i, p.decay_mom_rate)
    end
    return lr, p.cycle_momentum and momentum or nil
  end
end, {
  help = "One cycle from cycle_min_lr up to cycle_max_lr and back, the momentum the other way " ..
    "round, then a decay. Momentum means the first beta, or SGD's momentum where it has one; " ..
    "the second beta is left alone (DeepSpeed sets it to 0.99, and leaves SGD's momentum alone).",
  { "cycle_min_lr", "number", nil, "rate that the cycle begins and ends with", required = true,
    min = 0 },
  { "cycle_max_lr", "number", nil, "rate in the middle of the cycle", required = true, min = 0 },
  { "decay_lr_rate", "number", 0, "after the cycle the rate is divided by 1 + decay_lr_rate × " ..
    "(steps / decay_step_size)", min = 0 },
  { "cycle_first_step_size", "integer", 2000, "steps up", min = 1 },
  { "cycle_second_step_size", "integer", nil, "steps down; not given: as many as up", min = 0 },
  { "cycle_first_stair_count", "integer", 0, "stairs on the way up; 0 is a smooth slope", min = 0 },
  { "cycle_second_stair_count", "integer", nil, "stairs on the way down; not given: as many as up",
    min = 0 },
  { "decay_step_size", "integer", 0, "steps that count as one in the decay; 0: no decay", min = 0 },
  { "cycle_momentum", "boolean", true, "whether the momentum moves at all" },
  { "cycle_min_mom", "number", 0.8, "momentum in the middle of the cycle", min = 0, below = 1 },
  { "cycle_max_mom", "number", 0.9, "momentum at the ends of the cycle", min = 0, below = 1 },
  { "decay_mom_rate", "number", 0, "after the cycle the momentum is multiplied by 1 + " ..
    "decay_mom_rate × (steps / decay_step_size)" },
})

builtin("LRRangeTest", function(p)
  local size = p.lr_range_test_step_size
  return function(step)
    if step == 0 then return p.lr_range_test_min_lr end
    local interval = step / size
    if p.lr_range_test_staircase then interval = math.floor(interval) end
    return p.lr_range_test_min_lr * (1 + p.lr_range_test_step_rate * interval)
  end
end, {
  help = "Raises the rate without end, to find the largest with which training still works.",
  { "lr_range_test_min_lr", "number", 0.001, "rate of the first step", above = 0 },
  { "lr_range_test_step_size", "integer", 2000, "steps in which the factor grows by " ..
    "lr_range_test_step_rate", min = 1 },
  { "lr_range_test_step_rate", "number", 1, "growth of the factor" },
  { "lr_range_test_staircase", "boolean", false, "grow in stairs instead of evenly" },
})

-- Ours -------------------------------------------------------------------------------------------

local warmup_from_zero = { "warmup_num_steps", "integer", 0, min = 0,
  "steps of the rise: update n (from 0) has lr × (n + 1) / (warmup_num_steps + 1)" }
local min_lr = { "min_lr", "number", nil, min = 0,
  "rate at the end and after it; not given: the group's rate × min_lr_ratio" }
local min_lr_ratio = { "min_lr_ratio", "number", 0, min = 0, max = 1,
  "share of the rate that is left at the end, where min_lr is not given" }

local function lowest(p, lr) return p.min_lr or lr * p.min_lr_ratio end

builtin("cosine", function(p)
  local w, total = p.warmup_num_steps, p.total_num_steps
  return function(step, lr)
    if step < w then return lr * (step + 1) / (w + 1) end
    local low = lowest(p, lr)
    if step >= total then return low end
    return low + 0.5 * (1 + math.cos(math.pi * ((step - w) / (total - w)))) * (lr - low)
  end
end, {
  help = "Rises evenly to the group's rate, then falls along a cosine to min_lr, as nanoGPT does.",
  total_num_steps, warmup_from_zero, min_lr, min_lr_ratio,
})

builtin("step", function(p)
  return function(step, lr) return lr * p.gamma ^ math.floor(step / p.step_size) end
end, {
  help = "Multiplies the rate by gamma every step_size steps.",
  { "step_size", "integer", nil, "steps between two changes", required = true, min = 1 },
  { "gamma", "number", 0.1, "factor", above = 0 },
})

local falls = {
  linear = function(x) return 1 - x end,
  cosine = function(x) return 0.5 * (1 + math.cos(math.pi * x)) end,
  sqrt = function(x) return 1 - math.sqrt(x) end,
}

builtin("WSD", function(p)
  local w, total = p.warmup_num_steps, p.total_num_steps
  local length = p.decay_num_steps or math.max(1, math.floor(total / 10))
  local fall = falls[p.decay_type]
  return function(step, lr)
    if step < w then return lr * (step + 1) / (w + 1) end
    if step <= total - length then return lr end
    local low = lowest(p, lr)
    return low + (lr - low) * fall(math.min(1, (step - (total - length)) / length))
  end
end, {
  help = "Warm-up, stable, decay: rises evenly, stays, falls over the last decay_num_steps.",
  total_num_steps, warmup_from_zero,
  { "decay_num_steps", "integer", nil, "steps of the fall; not given: a tenth of total_num_steps",
    min = 1 },
  { "decay_type", "string", "linear", "shape of the fall: 1 - x, a half cosine, or 1 - sqrt(x)",
    enum = { "linear", "cosine", "sqrt" } },
  min_lr, min_lr_ratio,
})

-- Parameters -------------------------------------------------------------------------------------

-- What is wrong between parameters; each alone has been checked.
local function conflict(name, p, given)
  local total, w = p.total_num_steps, p.warmup_num_steps
  if (name == "cosine" or name == "WSD") and total and w + (p.decay_num_steps or 1) > total then
    return ("warmup_num_steps %d + %s is more than total_num_steps %d"):format(w,
      p.decay_num_steps and ("decay_num_steps %d"):format(p.decay_num_steps) or
      "at least 1 step of decay", total)
  end
  if given.min_lr and given.min_lr_ratio then
    return "min_lr and min_lr_ratio say the same twice; keep one"
  end
  if name == "OneCycle" and p.cycle_min_lr > p.cycle_max_lr then
    return ("cycle_min_lr %s is above cycle_max_lr %s"):format(spec.number_text(p.cycle_min_lr),
      spec.number_text(p.cycle_max_lr))
  end
end

-- Names that users of DeepSpeed take from torch.optim.lr_scheduler, and what to use here.
local elsewhere = {
  StepLR = "step", ExponentialLR = "step", CosineAnnealingLR = "cosine", OneCycleLR = "OneCycle",
  LinearLR = "WarmupLR", ConstantLR = "WarmupLR",
}

--- Checks the parameters of a schedule and fills in the defaults.
-- @tparam table context from `spec.context`; takes the problems
-- @tparam string name
-- @tparam table params
-- @tparam table place { path =, line = } of the params
-- @tparam table type_place the same of the name
-- @treturn table completed parameters
function M.check(context, name, params, place, type_place)
  local entry = registry[name]
  if not entry then
    local near = spec.nearest(name, M.names()) or elsewhere[name]
    spec.report(context, type_place, "%s: unknown schedule %s%s; there are: %s", type_place.path,
      spec.show(name), near and (' (did you mean "%s"?)'):format(near) or "",
      table.concat(M.names(), ", "))
    return {}
  end
  if not entry.fields then return spec.given(params) end
  local before = #context.problems
  local p = spec.check(context, entry.fields, params, place)
  local message = #context.problems == before and conflict(name, p, spec.given(params))
  if message then spec.report(context, place, "%s: %s", place.path, message) end
  return p
end

--- Makes a schedule from its name and parameters; raises at the user's line.
-- @tparam string name
-- @tparam[opt] table params
-- @treturn function `at(step, lr) -> lr [, momentum]`
function M.make(name, params)
  local context = spec.context()
  local p = M.check(context, name, params or {}, { path = "params" }, { path = "type" })
  if #context.problems > 0 then
    return dsffi.raise("%s", table.concat(spec.messages(context, "schedule"), "\n"))
  end
  local at = registry[name].make(p)
  if type(at) ~= "function" then
    return dsffi.raise("schedule '%s': make(params) returned %s, expected function(step, lr)", name,
      type(at))
  end
  jit.off(at, true)
  return at
end

-- The scheduler ----------------------------------------------------------------------------------

local Scheduler = {}
Scheduler.__index = Scheduler

local function rate(self, group)
  local lr, momentum = self.at(self.steps, group.initial_lr)
  if type(lr) ~= "number" or lr - lr ~= 0 then
    return dsffi.raise("schedule '%s' returned %s for step %d, expected a finite number", self.name,
      tostring(lr), self.steps)
  end
  return lr * (group.lr_scale or 1), momentum
end

local function set_momentum(group, momentum)
  if type(momentum) == "table" then
    group.betas = { momentum[1], momentum[2] }
  elseif group.betas then
    group.betas = { momentum, group.betas[2] }
  elseif group.momentum and group.momentum ~= 0 then
    group.momentum = momentum
  end
end

-- Writes the rates of the coming update into the parameter groups.
local function apply(self)
  for _, group in ipairs(self.optimizer.param_groups) do
    group.initial_lr = group.initial_lr or group.lr
    local lr, momentum = rate(self, group)
    group.lr = lr
    if momentum then set_momentum(group, momentum) end
  end
end

--- Goes on to the next update; call it once after each (the engine does so for its own scheduler).
function Scheduler:step()
  self.steps = self.steps + 1
  apply(self)
end

--- The rate of each parameter group for the coming update, as an array.
function Scheduler:get_lr()
  local lrs = {}
  for i, group in ipairs(self.optimizer.param_groups) do lrs[i] = group.lr end
  return lrs
end

Scheduler.get_last_lr = Scheduler.get_lr

--- DeepSpeed's index of the last step: -1 before the first.
function Scheduler:state_dict() return { last_batch_iteration = self.steps - 1 } end

--- Goes to a saved step and sets the rates for it (DeepSpeed leaves them until the next step).
function Scheduler:load_state_dict(state)
  local last = type(state) == "table" and state.last_batch_iteration
  if type(last) ~= "number" or last < -1 or last ~= math.floor(last) then
    return dsffi.raise("load_state_dict: last_batch_iteration is %s, expected an integer from -1",
      tostring(last))
  end
  self.steps = last + 1
  apply(self)
end

--- A scheduler: applies a schedule to an optimizer's parameter groups.
-- The rate of a group is what the schedule says for `group.initial_lr` (its `lr` when first seen),
-- times `group.lr_scale` if there is one.
-- @tparam table optimizer anything with `param_groups`, an array of { lr =, betas =, momentum = }
-- @tparam table|function what { type = name, params = {…} }, or `function(step, lr) -> lr`
-- @treturn table with `step`, `get_lr`, `get_last_lr`, `state_dict`, `load_state_dict`
function M.scheduler(optimizer, what)
  if type(optimizer) ~= "table" or type(optimizer.param_groups) ~= "table" then
    return dsffi.raise("ds.scheduler(optimizer, what): the first argument has no param_groups")
  end
  local name, at
  if type(what) == "function" then
    name, at = "(function)", what
    jit.off(at, true)
  elseif type(what) == "table" and type(what.type) == "string" then
    name, at = what.type, M.make(what.type, what.params)
  else
    return dsffi.raise("ds.scheduler(optimizer, what): expected { type = name, params = {…} } " ..
      "or a function(step, lr), got %s", spec.show(what))
  end
  local self = setmetatable({ optimizer = optimizer, name = name, at = at, steps = 0 }, Scheduler)
  apply(self)
  return self
end

return M
