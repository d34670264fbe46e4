--- The engine's configuration: DeepSpeed's JSON keys, from a file or a Lua table.
--
-- `load` gives a plain table in which every key has its value or its default, or raises one error
-- with all that is wrong, line by line:
--
--     ds.json:3: unknown key "gradient_cliping" (did you mean "gradient_clipping"?)
--     ds.json:9: optimizer.params.lr: expected a number of at least 0, got "1e-3" (a string; …)
--
-- Nothing is ignored silently: a key of DeepSpeed that this version doesn't have is an error that
-- says so, unless its value has no effect. The keys stand in config_schema.lua.

local dsffi = require "ds.ffi"
local json = require "ds.json"
local schedule = require "ds.schedule"
local schema = require "ds.config_schema"
local spec = require "ds.spec"

local M = {}

-- Where else a key might belong: "stage" -> "zero_optimization.stage"; nil if not unique.
local function elsewhere(key)
  local found
  local function walk(fields, path)
    for _, field in ipairs(fields) do
      local here = path .. field[1]
      if field[1] == key then
        if found then return true end
        found = here
      end
      if field.fields and walk(field.fields, here .. ".") then return true end
    end
  end
  if walk(schema.fields, "") then return nil end
  if not found and (key == "lr" or key == "betas" or key == "weight_decay" or key == "eps") then
    return "optimizer.params." .. key
  end
  return found
end

-- Batches -----------------------------------------------------------------------------------------

local BATCH, MICRO = "train_batch_size", "train_micro_batch_size_per_gpu"
local STEPS = "gradient_accumulation_steps"

-- what / by, or a message with the arithmetic.
local function divide(what, what_name, by, by_text, wanted)
  local quotient = what / by
  if quotient >= 1 and quotient == math.floor(quotient) then return quotient end
  return nil, ("%s %d is not a multiple of %s, so %s can't be computed"):format(what_name, what,
    by_text, wanted)
end

--- Completes train_batch_size = micro batch × accumulation × ranks from what is given.
-- @treturn[1] table the three, under their keys
-- @treturn[2] nil
-- @treturn[2] string what doesn't fit
function M.complete_batch(given, ranks)
  local batch, micro, steps = given[BATCH], given[MICRO], given[STEPS]
  local message
  if batch and micro and steps then
    local product = micro * steps * ranks
    if batch ~= product then
      return nil, ("%s %d ≠ micro %d × accumulation %d × ranks %d = %d; drop one of the three " ..
        "and it will be computed"):format(BATCH, batch, micro, steps, ranks, product)
    end
  elseif batch and micro then
    steps, message = divide(batch, BATCH, micro * ranks,
      ("micro %d × ranks %d = %d"):format(micro, ranks, micro * ranks), STEPS)
  elseif batch then
    steps = steps or 1
    micro, message = divide(batch, BATCH, steps * ranks,
      ("accumulation %d × ranks %d = %d"):format(steps, ranks, steps * ranks), MICRO)
  elseif micro then
    steps = steps or 1
    batch = micro * steps * ranks
  else
    message = ('how many samples a step takes is not given; add "%s" (samples of one forward ' ..
      'pass on one rank) or "%s" (of one step on all ranks)'):format(MICRO, BATCH)
  end
  if message then return nil, message end
  return { [BATCH] = batch, [MICRO] = micro, [STEPS] = steps }
end

local function check_batch(context, config, source, root, ranks)
  for _, problem in ipairs(context.problems) do
    if problem.path == BATCH or problem.path == MICRO or problem.path == STEPS then return end
  end
  local batch, message = M.complete_batch(config, ranks)
  if not batch then
    local key = config[BATCH] and BATCH or config[STEPS] and STEPS
    return spec.report(context, key and spec.inside(context, root, source, key) or root, "%s",
      message)
  end
  for key, value in pairs(batch) do config[key] = value end
end

-- Optimizer and schedule --------------------------------------------------------------------------

local function lower_keys(t)
  local out = {}
  for key in pairs(t) do out[key:lower()] = key end
  return out
end

local by_lower = lower_keys(schema.optimizers)
local later = {}
for _, name in ipairs(schema.optimizers_later) do later[name:lower()] = name end

-- Optimizers that a script has registered: name -> { defaults = {…} }.
local function registered(options)
  if options.optimizers then return options.optimizers end
  local ok, optim = pcall(require, "ds.optim")
  return ok and optim.registry or {}
end

local function names_of(registry)
  local names, seen = {}, {}
  for _, set in ipairs { schema.optimizers, registry } do
    for name in pairs(set) do
      local key = name:lower()
      if not seen[key] then names[#names + 1] = name end
      seen[key] = true
    end
  end
  table.sort(names)
  return names
end

-- Fields of an optimizer written in Lua: its defaults say the names and the types.
local function fields_of(entry)
  if type(entry) ~= "table" or type(entry.defaults) ~= "table" then return nil end
  local names, fields = {}, {}
  local defaults, optional = entry.settings or entry.defaults, entry.optional or {}
  for name in pairs(defaults) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do
    local default = defaults[name]
    local kind = type(default)
    if kind == "table" then kind = #default > 0 and "array" or "any" end
    if kind ~= "number" and kind ~= "boolean" and kind ~= "string" and kind ~= "array" then
      kind = "any"
    end
    fields[i] = { name, kind, default, "a parameter of this optimizer" }
  end
  names = {}
  for name in pairs(optional) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    fields[#fields + 1] = { name, optional[name], nil, "a parameter of this optimizer" }
  end
  for _, name in ipairs { "lr", "weight_decay" } do
    if defaults[name] == nil then
      fields[#fields + 1] = { name, "number", nil, "a parameter of every optimizer", min = 0 }
    end
  end
  return fields
end

local function check_optimizer(context, optimizer, source, root, options)
  local place = spec.inside(context, root, source, "optimizer")
  local given = source.optimizer
  local type_place = spec.inside(context, place, given, "type")
  local registry = registered(options)
  local name = optimizer.type
  local known = registry[name] and name or lower_keys(registry)[name:lower()]
  local builtin = by_lower[name:lower()] or
    not known and by_lower[schema.optimizer_synonym(name):lower()]
  local fields
  if builtin then
    optimizer.type, fields = builtin, schema.optimizers[builtin]
  elseif known then
    optimizer.type, fields = known, fields_of(registry[known])
  elseif later[name:lower()] then
    return spec.report(context, type_place, "%s %s: not in this version yet (there are: %s)",
      type_place.path, spec.show(name), table.concat(names_of(registry), ", "))
  else
    local names = names_of(registry)
    return spec.report(context, type_place, "%s: unknown optimizer %s%s; there are: %s, and " ..
      "what the script registers with ds.optimizer", type_place.path, spec.show(name),
      spec.did_you_mean(name, names), table.concat(names, ", "))
  end
  local params = optimizer.params or {}
  local params_place = spec.inside(context, place, given, "params")
  if not fields then
    optimizer.params = spec.given(params)
    return
  end
  local before = #context.problems
  optimizer.params = spec.check(context, fields, optimizer.params and given.params or {},
    params_place)
  for _, field in ipairs(fields) do -- what has no effect is not handed to the optimizer
    if field.status then optimizer.params[field[1]] = nil end
  end
  local conflict = #context.problems == before and schema.optimizer_conflicts[builtin]
  local message = conflict and conflict(optimizer.params)
  if message then spec.report(context, params_place, "%s: %s", params_place.path, message) end
end

local function check_scheduler(context, scheduler, source, root)
  local place = spec.inside(context, root, source, "scheduler")
  local given = source.scheduler
  local params = scheduler.params and given.params or {}
  scheduler.params = schedule.check(context, scheduler.type, params,
    spec.inside(context, place, given, "params"), spec.inside(context, place, given, "type"))
end

-- Loading -----------------------------------------------------------------------------------------

local function read(source)
  if type(source) == "table" then return source, nil, "config" end
  if type(source) ~= "string" then
    return dsffi.raise("config: expected the path of a JSON file or a table, got %s", type(source))
  end
  local t, lines = json.load(source, { lines = true })
  if t == nil then
    if lines:sub(#source + 1):find "^:%d+:" then error(lines, 0) end -- names the line itself
    return dsffi.raise("config: %s", lines) -- no such file: what counts is who asked for it
  end
  if type(t) ~= "table" or t == json.null or json.is_array(t) then
    error(("%s:%d: expected an object { … }, got %s"):format(source, lines.root, spec.show(t)), 0)
  end
  return t, lines, source
end

-- Precision ---------------------------------------------------------------------------------------

-- What is wrong between the keys of fp16, bf16 and data_types. What is wrong with one of them
-- alone is known already, and then it may be missing here.
local function check_precision(context, config, source, root)
  local fp16 = config.fp16 or {}
  local bf16, types = config.bf16 or {}, config.data_types or {}
  local place = spec.inside(context, root, source, "fp16")
  if fp16.enabled and bf16.enabled then
    return spec.report(context, place, "fp16.enabled and bf16.enabled are both true; choose one")
  end
  local power, least = fp16.initial_scale_power, fp16.min_loss_scale
  if fp16.enabled and fp16.loss_scale == 0 and power and least and 2 ^ power < least then
    spec.report(context, place, "fp16: the loss scale begins with 2^%d = %s " ..
      "(initial_scale_power), below min_loss_scale %s", power, spec.show(2 ^ power),
      spec.show(least))
  end
  local weights = fp16.enabled and "fp16" or bf16.enabled and "bf16" or "fp32"
  local grads, params = types.grad_accum_dtype, types.param_dtype
  place = spec.inside(context, root, source, "data_types")
  if params and params ~= weights then
    spec.report(context, spec.inside(context, place, source.data_types, "param_dtype"),
      'data_types.param_dtype: "%s", but weights are %s; %s', params, weights,
      params == "fp32" and ("drop %s.enabled"):format(weights) or ("set %s.enabled"):format(params))
  end
  if grads and grads ~= "fp32" and grads ~= weights then
    spec.report(context, spec.inside(context, place, source.data_types, "grad_accum_dtype"),
      "data_types.grad_accum_dtype: gradients of %s weights can't be kept in %s; choose %s",
      weights, grads, weights == "fp32" and '"fp32"' or ('"%s" or "fp32"'):format(weights))
  end
end

-- Memory on a disk needs a folder.
local function check_offload(context, config, source, root)
  local wanted = (config.zero_optimization or {}).offload_optimizer
  if not wanted or wanted.device ~= "nvme" or wanted.nvme_path then return end
  local place = spec.inside(context, root, source, "zero_optimization")
  local given = source.zero_optimization
  spec.report(context, spec.inside(context, place, given, "offload_optimizer"),
    'zero_optimization.offload_optimizer: device "nvme" needs nvme_path, a folder on the disk')
end

local function check(context, source, root, options)
  local config = spec.check(context, schema.fields, source, root)
  check_batch(context, config, source, root, options.world_size or 1)
  if config.optimizer and config.optimizer.type then
    check_optimizer(context, config.optimizer, source, root, options)
  end
  if config.scheduler and config.scheduler.type then
    check_scheduler(context, config.scheduler, source, root)
  end
  check_precision(context, config, source, root)
  check_offload(context, config, source, root)
  return config
end

--- Reads, checks and completes a configuration.
-- Raises one error that lists everything wrong; for a table it points at the user's line, and
-- places are given as "config: optimizer.params.lr: …".
-- @tparam string|table source path of a JSON file, or a table
-- @tparam[opt] table options `world_size` = data-parallel ranks (1); `optimizers` = registered ones
-- by name (default: those of ds.optim)
-- @treturn table a new plain table; the source is not changed
function M.load(source, options)
  local t, lines, name = read(source)
  local context = spec.context(lines, elsewhere)
  local config = check(context, t, { path = "", line = lines and lines.root }, options or {})
  if #context.problems > 0 then
    local text = table.concat(spec.messages(context, name), "\n")
    if lines then error(text, 0) end
    return dsffi.raise("%s", text)
  end
  return config
end

--- Prints what the keys mean: all of them, or one in detail ("zero_optimization.stage", "stage",
-- "AdamW", "WarmupLR").
-- @tparam[opt] string key
-- @treturn[1] boolean true
-- @treturn[2] nil
-- @treturn[2] string that there is no such key, with a suggestion
function M.help(key)
  local text, message = require("ds.config_help").text(key)
  if not text then return nil, message end
  io.stdout:write(text)
  return true
end

--- What `dsrun --config-help [KEY]` runs.
function M.run(key)
  local ok, message = M.help(key)
  if ok then return end
  io.stderr:write("dsrun: ", message, "\n")
  os.exit(2)
end

--- The same as Markdown: what lua/ds/CONFIG.md holds.
function M.markdown() return require("ds.config_help").markdown() end

return M
