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
local together = require "ds.together"
local replicas = require "ds.replicas"
local json = require "ds.json"
local offload = require "ds.offload"
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

--- Calls f(name, tensor, key, parameter, from) for each stretch of the optimizer's vectors: the
-- fp32 master ("fp32/NAME", where weights are of lower precision) and its state ("exp_avg/NAME").
-- They may be on a disk: offload.each.
-- @tparam string which "each_owned": what this rank saves; "each_piece": what it holds
local function each_vector(engine, which, f)
  local zero = engine.zero
  for _, e in ipairs(engine.named) do
    local p = e.parameter
    if p._flat then
      zero[which](zero, p, function(piece, from, segment, at)
        local shape = piece.shape
        local function give(key, flat)
          f(key .. "/" .. e.name, offload.slice(flat, at, shape), p, from)
        end
        if segment.low then give("fp32", segment.p) end
        for _, key in ipairs(engine.optimizer.param_groups[segment.group].rule.state) do
          give(key, segment.state[key])
        end
      end)
    end
  end
end

--- { name, tensor } of what this rank saves; a stretch that is not all of it is named NAME@FIRST.
local function optimizer_tensors(engine)
  local list = {}
  each_vector(engine, "each_owned", function(name, t, p, from)
    local whole = t:numel() == p:numel()
    list[#list + 1] = { whole and name or ("%s@%d"):format(name, from),
      whole and t:view(unpack(p.shape)) or t }
  end)
  return list
end

--- Where each rank's random numbers are.
local function random_state()
  local generator, rng = tensor.generator, { seeds = json.array {}, offsets = json.array {} }
  local texts = together.texts(("%.17g %.17g"):format(generator.seed, generator.offset))
  for i, text in ipairs(texts) do
    local seed, offset = text:match "^(%S+) (%S+)$"
    rng.seeds[i], rng.offsets[i] = tonumber(seed), tonumber(offset)
  end
  return rng
end

local function plain_state(engine)
  return {
    global_steps = engine.global_steps, micro_steps = engine.micro_steps,
    skipped_steps = engine.skipped_steps,
    global_samples = engine.global_samples, dtype = engine.dtype,
    loss_scaler = engine.precision:state(), rng = random_state(), world_size = comm.world_size(),
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
  tag = tag or ("global_step%d"):format(engine.global_steps)
  together.meet(("save_checkpoint(%s)"):format(tostring(tag)))
  engine.save_dir, engine.client_state = dir, client_state
  local keep = engine.config.checkpoint.keep_last
  if type(client_state) == "function" then client_state = client_state(engine) end
  scope.no_grad(function()
    local weights = {}
    for i, w in ipairs(model_tensors(engine)) do
      weights[i] = { w.name, w.transposed and w.own:t():contiguous() or w.own:contiguous() }
    end
    ckpt.save(dir, tag, {
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

--- A whole saved weight, in fp32 if it is trained; straight into `target` where that can be.
local function read_whole(engine, saved, w, fp32, target)
  if fp32 then return saved:read("optim", fp32, target) end
  local t = target
  if w.transposed then
    t = tensor.new({ w.own.shape[2], w.own.shape[1] }, target.dtype, "cpu")
  elseif target._c.dense ~= 1 then
    t = tensor.new(w.own.shape, target.dtype, "cpu")
  end
  saved:read("weights", w.name, t)
  if t ~= target then
    run("copy", engine.device, target._c, (w.transposed and t:t() or t)._c)
  end
  return target
end

--- Reads one tensor into place; where there is an fp32 master, into what this rank has of it too.
local function read_weight(engine, saved, w, fp32)
  local p = w.own
  if not p._flat or p.dtype == "f32" then return read_whole(engine, saved, w, fp32, p) end
  local master
  engine.zero:each_piece(p, function(piece)
    if piece:numel() == p:numel() and not offload.is_stored(piece) then
      master = piece:view(unpack(p.shape))
    end
  end)
  local values = master or tensor.new(p.shape, "f32", engine.device)
  read_whole(engine, saved, w, fp32, values)
  run("copy", p.device, p._c, values._c)
  if master then return end
  engine.zero:each_piece(p, function(piece, from)
    offload.each(piece, function(t, first)
      run("copy", p.device, t._c, slice(values:view(-1), from + first, t.shape)._c)
    end, true)
  end)
  scope.release(values, "after it was loaded")
end

local function check_vectors(engine, saved, has)
  each_vector(engine, "each_piece", function(name, _, p)
    if name:sub(1, 5) == "fp32/" then return end
    if not has[name] then
      raise("load_checkpoint: %s has no %s; load without the optimizer: " ..
        "{ load_optimizer_states = false }", saved.path, name)
    end
    local _, shape = saved:info("optim", name)
    if tensor.numel_of(shape) ~= p:numel() then
      raise("load_checkpoint: %s: %s has %d elements and should have %d", saved.path, name,
        tensor.numel_of(shape), p:numel())
    end
  end)
end

--- Where each rank's random numbers go on; ranks that were not there when it was saved begin after
-- all the others.
local function restore_random(rng)
  local generator, place, furthest = tensor.generator, comm.rank() + 1, 0
  for _, offset in ipairs(rng.offsets) do furthest = math.max(furthest, offset) end
  generator.seed = rng.seeds[place] or replicas.seed_of(rng.seeds[1], comm.rank())
  generator.offset = rng.offsets[place] or furthest
end

local function restore_state(engine, state, options)
  engine.global_steps, engine.micro_steps = state.global_steps, state.micro_steps
  engine.skipped_steps, engine.global_samples = state.skipped_steps, state.global_samples
  if options.load_optimizer_states ~= false and engine.optimizer and state.optimizer then
    engine.optimizer:load_state_dict(state.optimizer)
    engine.precision:load_state(state.loss_scaler)
  end
  if options.load_lr_scheduler_states ~= false and engine.lr_scheduler and state.scheduler then
    engine.lr_scheduler:load_state_dict(state.scheduler)
  end
  restore_random(state.rng)
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
  together.meet(("load_checkpoint(%s)"):format(tag == nil and "" or tostring(tag)))
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
  local with_optimizer = whole and engine.optimizer and options.load_optimizer_states ~= false
  if with_optimizer then check_vectors(engine, saved, has) end
  local function read_all()
    local inner = {}
    for _, e in ipairs(engine.named) do inner[e.parameter] = e.name end
    for _, w in ipairs(weights) do
      local fp32 = inner[w.own] and "fp32/" .. inner[w.own]
      if present[w.name] then
        read_weight(engine, saved, w, fp32 and has[fp32] and w.own._flat and fp32 or nil)
      end
    end
    if with_optimizer then
      each_vector(engine, "each_piece", function(name, t, _, from)
        if name:sub(1, 5) == "fp32/" then return end
        offload.each(t, function(part, first)
          saved:read("optim", name, part, { from = from + first })
        end, true)
      end)
    end
  end
  together.all(scope.no_grad, read_all)
  if whole then restore_state(engine, saved.state, options) end
  engine:zero_grad()
  engine.new_step = true
  local path, client_state = saved.path, saved.client_state
  saved:close()
  log.info("loaded %s: step %d", path, engine.global_steps)
  return path, client_state
end

return M
