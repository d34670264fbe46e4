--- What of an engine goes into a checkpoint, and how it comes back.
--
-- weights/ holds every parameter and buffer of the model, under the names that the model's
-- `hf_name(name)` gives (Hugging Face's, perhaps transposed) or its own. optim/ holds, by
-- parameter, `fp32/NAME` (the master copy, where the weights are of lower precision) and each piece
-- of optimizer state, `exp_avg/NAME`. Everything else is plain data in state.json.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local ckpt = require "ds.ckpt"
local log = require "ds.log"
local comm = require "ds.comm"
local F = require "ds.functional"

local raise, run, slice = border.raise, tensor.run, tensor.view.slice_flat

local M = {}

--- The name a tensor has in the checkpoint, and whether it lies transposed there.
local function outer_name(engine, name)
  local model = engine.module
  if type(model) == "table" and model.hf_name then return model:hf_name(name) end
  return name, false
end

--- { name, tensor, own } of all parameters and buffers; `own` is the tensor in the model.
local function model_tensors(engine)
  local list = {}
  local function add(name, t)
    local outer, transposed = outer_name(engine, name)
    list[#list + 1] = { name = outer, own = t, transposed = transposed }
  end
  for _, e in ipairs(engine.named) do add(e.name, e.parameter) end
  if type(engine.module) == "table" and engine.module.named_buffers then
    for _, e in ipairs(engine.module:named_buffers()) do add(e.name, e.buffer) end
  end
  return list
end

--- { name, tensor } of the optimizer's vectors, cut by parameter.
local function optimizer_tensors(engine)
  local list = {}
  for _, e in ipairs(engine.named) do
    local p = e.parameter
    local at = p._flat
    if at then
      local flat, segment = engine.flat[at.group], engine.optimizer.segments[at.group]
      if flat.master ~= flat.weights then
        list[#list + 1] = { "fp32/" .. e.name, slice(flat.master, at.offset, p.shape) }
      end
      for _, key in ipairs(engine.optimizer.rule.state) do
        list[#list + 1] = { key .. "/" .. e.name, slice(segment.state[key], at.offset, p.shape) }
      end
    end
  end
  return list
end

local function plain_state(engine)
  local generator = tensor.generator
  return {
    global_steps = engine.global_steps, micro_steps = engine.micro_steps,
    skipped_steps = engine.skipped_steps,
    global_samples = engine.global_samples, loss_scale = engine.loss_scale, dtype = engine.dtype,
    rng = { seed = generator.seed, offset = generator.offset }, world_size = comm.world_size(),
    zero_stage = engine.config.zero_optimization.stage,
    loader = engine.training_dataloader and engine.training_dataloader:state() or nil,
    optimizer = engine.optimizer and engine.optimizer:state_dict() or nil,
    scheduler = engine.lr_scheduler and engine.lr_scheduler:state_dict() or nil,
  }
end

--- Saves everything: weights, optimizer, schedule, random numbers, loader position, counters.
-- Call it on every rank, at a step boundary.
-- @tparam string dir folder of checkpoints
-- @tparam[opt] string|number tag folder of this one; default "global_stepN"
-- @tparam[opt] table|function client_state plain data of yours, or a function that returns it
-- @tparam[opt] table options { save_latest = true }
-- @treturn boolean true
function M.save_checkpoint(engine, dir, tag, client_state, options)
  options = F.options_of("save_checkpoint", options, { save_latest = true })
  if type(dir) ~= "string" or dir == "" then
    raise("save_checkpoint: expects a folder, got %s", tostring(dir))
  end
  if engine.backwards > 0 or
    engine.micro_steps % engine.gas ~= 0 and engine.forced_boundary == nil then
    raise("save_checkpoint: micro-batch %d of %d: gradients are not saved; " ..
      "save when step() returned true",
      engine.micro_steps % engine.gas + (engine.backwards > 0 and 1 or 0), engine.gas)
  end
  engine.save_dir, engine.client_state = dir, client_state
  local keep = engine.config.checkpoint.keep_last
  if type(client_state) == "function" then client_state = client_state(engine) end
  scope.no_grad(function()
    local weights = {}
    for i, w in ipairs(model_tensors(engine)) do
      weights[i] = { w.name, w.transposed and w.own:t():contiguous() or w.own:contiguous() }
    end
    ckpt.save(dir, tag or ("global_step%d"):format(engine.global_steps), {
      weights = weights, optim = engine.optimizer and optimizer_tensors(engine) or {},
      state = plain_state(engine), client_state = client_state or {},
    }, { keep_last = keep > 0 and keep or nil, save_latest = options.save_latest })
  end)
  return true
end

--- Names that one side has and the other has not, as one message.
local function compare_names(have, want, what, path)
  local present, wanted, problems = {}, {}, {}
  for _, name in ipairs(have) do present[name] = true end
  for _, name in ipairs(want) do
    wanted[name] = true
    if not present[name] then problems[#problems + 1] = "missing " .. name end
  end
  for _, name in ipairs(have) do
    if not wanted[name] then problems[#problems + 1] = "unexpected " .. name end
  end
  if #problems > 0 then
    local shown = table.concat(problems, "; ", 1, math.min(#problems, 12))
    raise("load_checkpoint: %s does not fit the %s: %s%s", path, what, shown,
      #problems > 12 and ("; and %d more"):format(#problems - 12) or "")
  end
end

local function same_shape(saved, w, path)
  local _, shape = saved:info("weights", w.name)
  local want = w.transposed and { w.own.shape[2], w.own.shape[1] } or w.own.shape
  if border.shape_string(shape) ~= border.shape_string(want) then
    raise("load_checkpoint: %s: %s is %s, the model's is %s", path, w.name,
      border.shape_string(shape), border.shape_string(want))
  end
end

--- Reads one tensor into place; trained parameters by way of their fp32 master.
local function read_weight(engine, saved, w, fp32)
  local p, at = w.own, w.own._flat
  local target = at and slice(engine.flat[at.group].master, at.offset, p.shape) or p
  if fp32 then
    saved:read("optim", fp32, target)
  elseif w.transposed then
    local t = tensor.new({ p.shape[2], p.shape[1] }, target.dtype, "cpu")
    saved:read("weights", w.name, t)
    run("copy", p.device, target._c, t:t()._c)
  elseif target._c.dense == 1 then
    saved:read("weights", w.name, target)
  else
    local t = tensor.new(p.shape, target.dtype, "cpu")
    saved:read("weights", w.name, t)
    run("copy", p.device, target._c, t._c)
  end
  if target ~= p then run("copy", p.device, p._c, target._c) end
end

local function restore_state(engine, state, options)
  engine.global_steps, engine.micro_steps = state.global_steps, state.micro_steps
  engine.skipped_steps, engine.global_samples = state.skipped_steps, state.global_samples
  if options.load_optimizer_states ~= false and engine.optimizer and state.optimizer then
    engine.optimizer:load_state_dict(state.optimizer)
  end
  if options.load_lr_scheduler_states ~= false and engine.lr_scheduler and state.scheduler then
    engine.lr_scheduler:load_state_dict(state.scheduler)
  end
  tensor.generator.seed, tensor.generator.offset = state.rng.seed, state.rng.offset
  if engine.training_dataloader and state.loader then
    engine.training_dataloader:load_state(state.loader)
  end
end

--- Loads what save_checkpoint() wrote; the next step is the one an uninterrupted run would make.
-- Nothing is changed unless all of it is whole and fits.
-- @tparam string dir
-- @tparam[opt] string|number tag default: what `latest` names
-- @tparam[opt] table options { load_module_only = false, load_optimizer_states = true,
--   load_lr_scheduler_states = true, load_module_strict = true }
-- @treturn string|nil the checkpoint's path; nil if there is none yet
-- @treturn table|nil the client_state
function M.load_checkpoint(engine, dir, tag, options)
  options = F.options_of("load_checkpoint", options, {
    load_module_only = true, load_optimizer_states = true, load_lr_scheduler_states = true,
    load_module_strict = true })
  if type(dir) ~= "string" or dir == "" then
    raise("load_checkpoint: expects a folder, got %s", tostring(dir))
  end
  local saved = ckpt.load(dir, tag)
  engine.save_dir = engine.save_dir or dir
  if not saved then
    log.info("there is no checkpoint in %s yet; starting from the beginning", dir)
    return nil
  end
  local weights, names, present = model_tensors(engine), {}, {}
  for i, w in ipairs(weights) do names[i] = w.name end
  if options.load_module_strict ~= false then
    compare_names(saved.names.weights, names, "model", saved.path)
  end
  for _, name in ipairs(saved.names.weights) do present[name] = true end
  for _, w in ipairs(weights) do
    if present[w.name] then same_shape(saved, w, saved.path) end
  end
  local whole = not options.load_module_only
  local has = {}
  for _, name in ipairs(saved.names.optim) do has[name] = true end
  local vectors = {}
  if whole and engine.optimizer and options.load_optimizer_states ~= false then
    vectors = optimizer_tensors(engine)
    for _, v in ipairs(vectors) do
      if not has[v[1]] and v[1]:sub(1, 5) ~= "fp32/" then
        raise("load_checkpoint: %s has no %s; load without the optimizer: " ..
          "{ load_optimizer_states = false }",
          saved.path, v[1])
      end
    end
  end
  scope.no_grad(function()
    local inner = {}
    for _, e in ipairs(engine.named) do inner[e.parameter] = e.name end
    for _, w in ipairs(weights) do
      local fp32 = inner[w.own] and "fp32/" .. inner[w.own]
      if present[w.name] then
        read_weight(engine, saved, w, fp32 and has[fp32] and w.own._flat and fp32 or nil)
      end
    end
    for _, v in ipairs(vectors) do
      if has[v[1]] and v[1]:sub(1, 5) ~= "fp32/" then saved:read("optim", v[1], v[2]) end
    end
  end)
  if whole then restore_state(engine, saved.state, options) end
  engine:zero_grad()
  engine.new_step = true
  local path, client_state = saved.path, saved.client_state
  saved:close()
  log.info("loaded %s: step %d", path, engine.global_steps)
  return path, client_state
end

return M
