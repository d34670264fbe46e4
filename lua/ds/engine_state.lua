--- What of an engine goes into a checkpoint, and how it comes back.
--
-- weights/ holds every parameter and buffer of the model, under the names that the model's
-- `hf_name(name)` gives (Hugging Face's, perhaps transposed) or its own. optim/ holds, by
-- parameter, `fp32/NAME` (the master copy, where the weights are of lower precision) and each piece
-- of optimizer state, `exp_avg/NAME`. Everything else is plain data in state.json.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = require "ds.host"
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

local raise, check, run = border.raise, border.check, tensor.run
local slice = tensor.view.slice_flat

local M = {}

--- The name a tensor has in the checkpoint, and whether it lies transposed there.
local function outer_name(engine, name)
  local model = engine.module
  if type(model) == "table" and model.hf_name then return model:hf_name(name) end
  return name, false
end

--- All parameters and buffers, as items of ds.ckpt: { name, tensor, transposed =, parameter = },
-- with `inner`, the name in the model.
local function model_tensors(engine)
  local list = {}
  local function add(name, t, parameter)
    local outer, transposed = outer_name(engine, name)
    list[#list + 1] = { outer, t, transposed = transposed, parameter = parameter, inner = name }
  end
  for _, e in ipairs(engine.named) do add(e.name, e.parameter, e.parameter) end
  if type(engine.module) == "table" and engine.module.named_buffers then
    for _, e in ipairs(engine.module:named_buffers()) do
      add(e.name, e.buffer)
      list[#list].changes = true -- forward() may
    end
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

--- How parameters become whole that are sharded; nil where none are.
local function gathering(engine)
  for _, e in ipairs(engine.named) do
    if e.parameter._unit then
      local hold = require("ds.zero_params").hold
      return function(params, f) return hold(params, nil, f) end
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

--- Which algorithms a GPU's products are made by, so that a resumed run makes them alike: one text,
-- or one for each rank where they differ. nil on the CPU, which has no choice.
local function choices(engine)
  if engine.device ~= "cuda" then return nil end
  local text = border.C.ds_device_choices(border.C.DS_CUDA)
  local texts = together.texts(text ~= nil and ffi.string(text) or "")
  for _, other in ipairs(texts) do
    if other ~= texts[1] then return json.array(texts) end
  end
  return json.array { texts[1] }
end

--- Makes products as the run did that was saved.
local function restore_choices(engine, saved)
  if engine.device ~= "cuda" or not saved then return end
  check(border.C.ds_device_choose(border.C.DS_CUDA, saved[comm.rank() + 1] or saved[1]),
    "load_checkpoint")
end

--- Where the names in weights/ are not those in optim/: { [inner] = { outer, transposed } }.
local function outer_names(engine)
  local names = {}
  for _, e in ipairs(engine.named) do
    local outer, transposed = outer_name(engine, e.name)
    if outer ~= e.name or transposed then names[e.name] = { outer, transposed } end
  end
  return next(names) and names or nil
end

local function plain_state(engine)
  return {
    names = outer_names(engine),
    global_steps = engine.global_steps, micro_steps = engine.micro_steps,
    skipped_steps = engine.skipped_steps,
    global_samples = engine.global_samples, dtype = engine.dtype,
    loss_scaler = engine.precision:state(), rng = random_state(), world_size = comm.world_size(),
    zero_stage = engine.config.zero_optimization.stage,
    loader = engine.training_dataloader and engine.training_dataloader:state() or nil,
    optimizer = engine.optimizer and engine.optimizer:state_dict() or nil,
    scheduler = engine.lr_scheduler and engine.lr_scheduler:state_dict() or nil,
    products = choices(engine),
  }
end

-- ---- a save in the background: the next step() makes room for changes, one that finds all ranks'
-- files on the disk makes a checkpoint of them

local unfinished = {} -- engines with such a save, the oldest first

--- Waits until the checkpoint that is being written in the background is whole; nothing to do where
-- there is none. Every rank calls it. Raises on all ranks if one could not write its part: the last
-- checkpoint is then the one before.
function M.finish_checkpoint(engine)
  local save = engine.saving
  if not save then return end
  engine.saving = nil
  for i, other in ipairs(unfinished) do
    if other == engine then table.remove(unfinished, i) break end
  end
  local s = save:finish()
  if engine.config.checkpoint.writer.show_statistics then
    log.info("saved %s/%s: this rank %.1f MB in %.2f s; the thread took %.2f s of a core, step() "
      .. "was held up for %.3f s and copied %.1f MB", save.dir, save.tag, s.bytes / 1e6, s.seconds,
      s.cpu_seconds, s.held_seconds, s.copied / 1e6)
  end
end

local function finish_all()
  while unfinished[1] do M.finish_checkpoint(unfinished[1]) end
end

--- When the script has ended. After a failure other ranks may be gone.
local function at_end(well)
  if not unfinished[1] then return end
  if well or comm.world_size() == 1 then
    together.meet("the end of the script")
    return finish_all()
  end
  for i, engine in ipairs(unfinished) do
    local save = engine.saving
    log.warning("%s/%s was not finished; the last checkpoint is the one before", save.dir, save.tag)
    save:drop()
    engine.saving, unfinished[i] = nil, nil
  end
end

--- From now on an engine has a save in the background.
local function note_unfinished(engine, save)
  if not M.hooked then host.at_end(at_end) end
  M.hooked = true
  engine.saving = save
  unfinished[#unfinished + 1] = engine
end

--- The setting of ckpt.save(); nil: it is to write before it returns.
local function background_of(writer)
  if not writer.decoupled then return nil end
  return { most = writer.io_buffer_size * (writer.io_buffer_double and 2 or 1) }
end

--- Raises if a load that failed has left weights that are neither the old ones nor the new ones.
function M.need_weights(engine)
  if engine.undefined then
    raise("the engine's weights are undefined, as loading %s failed half-way; load another "
      .. "checkpoint first", engine.undefined)
  end
end

--- Saves everything: weights, optimizer, schedule, random numbers, loader position, counters.
-- Call it on every rank, at a step boundary. With `checkpoint.writer.decoupled` it returns while a
-- thread writes; a later step(), the next save, finish_checkpoint() or the script's end names the
-- checkpoint in `latest`, or raises what went wrong. Until the next step() the weights must not be
-- changed by hand.
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
  M.need_weights(engine)
  if engine.late then engine.late:settle() end
  tag = tag or ("global_step%d"):format(engine.global_steps)
  together.meet(("save_checkpoint(%s)"):format(tostring(tag)))
  finish_all()
  engine.save_dir, engine.client_state = dir, client_state
  local keep = engine.config.checkpoint.keep_last
  if type(client_state) == "function" then client_state = client_state(engine) end
  scope.no_grad(function()
    local save = ckpt.save(dir, tag, {
      weights = model_tensors(engine), gathered = gathering(engine),
      optim = engine.optimizer and optimizer_tensors(engine) or {},
      state = plain_state(engine), client_state = client_state or {},
    }, { keep_last = keep > 0 and keep or nil, save_latest = options.save_latest,
      background = background_of(engine.config.checkpoint.writer) })
    if save ~= true then note_unfinished(engine, save) end
  end)
  return true
end

--- Saves the weights alone, in 16 bits, for other tools: safetensors under the names that the model
-- gives (Hugging Face's), and an index of them. Every rank calls it.
-- @tparam string dir folder; made if need be
-- @tparam[opt="model.safetensors"] string filename files of that name are replaced
-- @tparam[opt] table options { exclude_frozen_parameters = false }
-- @treturn boolean true; false, with a warning, at stage 3 without
-- `stage3_gather_16bit_weights_on_model_save`: nothing is saved then
function M.save_16bit_model(engine, dir, filename, options)
  options = F.options_of("save_16bit_model", options, { exclude_frozen_parameters = true })
  if type(dir) ~= "string" or dir == "" then
    raise("save_16bit_model: expects a folder, got %s", tostring(dir))
  end
  M.need_weights(engine)
  filename = filename or "model.safetensors"
  together.meet(("save_16bit_model(%s)"):format(tostring(filename)))
  local gathered = gathering(engine)
  local zero = engine.config.zero_optimization
  if gathered and comm.world_size() > 1 and zero.stage == 3
    and not zero.stage3_gather_16bit_weights_on_model_save then
    log.warning("save_16bit_model: nothing is saved: at stage 3 it needs "
      .. '"stage3_gather_16bit_weights_on_model_save": true; or dsrun convert CHECKPOINT OUT')
    return false
  end
  local weights = {}
  for _, w in ipairs(model_tensors(engine)) do
    local p = w.parameter
    if p then w.dtype = engine.dtype == "f32" and "bf16" or engine.dtype end
    if not (p and options.exclude_frozen_parameters and not p._flat) then
      weights[#weights + 1] = w
    end
  end
  scope.no_grad(ckpt.write_weights, dir, filename, weights,
    { what = "save_16bit_model", gathered = gathered })
  return true
end

-- ---- loading

--- Names that only one side has: an error, or a warning where that is wanted.
local function compare_names(saved, weights, strict)
  local wanted, problems = {}, {}
  for _, w in ipairs(weights) do
    wanted[w[1]] = true
    if not saved:has("weights", w[1]) then problems[#problems + 1] = "missing " .. w[1] end
  end
  for _, name in ipairs(saved.names.weights) do
    if not wanted[name] then problems[#problems + 1] = "unexpected " .. name end
  end
  if #problems == 0 then return end
  local text = ("load_checkpoint: %s does not fit the model: %s%s"):format(saved.path,
    table.concat(problems, "; ", 1, math.min(#problems, 12)),
    #problems > 12 and ("; and %d more"):format(#problems - 12) or "")
  if strict then raise("%s; { load_module_strict = false } loads the others", text) end
  log.warning("%s; what is missing stays as it is", text)
end

local function check_shape(saved, w)
  local _, shape = saved:info("weights", w[1])
  local want = w[2].shape
  if w.transposed then want = { want[2], want[1] } end
  if border.shape_string(shape) ~= border.shape_string(want) then
    raise("load_checkpoint: %s: %s is %s, the model's is %s", saved.path, w[1],
      border.shape_string(shape), border.shape_string(want))
  end
end

local function check_numel(saved, name, p)
  local _, shape = saved:info("optim", name)
  if tensor.numel_of(shape) ~= p:numel() then
    raise("load_checkpoint: %s: %s has %d elements and should have %d", saved.path, name,
      tensor.numel_of(shape), p:numel())
  end
end

--- What is to be read into which tensors, all of it checked: { part, name, tensor, from =,
-- transposed = } as Saved:fill() takes. Of what is trained this rank reads what it has of the fp32
-- weights, from the fp32 master where there is one.
local function plan_weights(engine, saved, weights, plan)
  for _, w in ipairs(weights) do
    local p, fp32 = w[2], "fp32/" .. w.inner
    if saved:has("weights", w[1]) then
      check_shape(saved, w)
      if p._unit and not p._flat then -- does not train, and each rank has a share
        local unit = p._unit
        if unit.shard then
          plan[#plan + 1] = { "weights", w[1], unit.shard, from = unit.from,
            transposed = w.transposed }
        end
      elseif not p._flat then
        plan[#plan + 1] = { "weights", w[1], p, transposed = w.transposed }
      elseif saved:has("optim", fp32) then
        check_numel(saved, fp32, p)
        engine.zero:each_piece(p, function(piece, from)
          plan[#plan + 1] = { "optim", fp32, piece, from = from }
        end)
      else
        engine.zero:each_piece(p, function(piece, from)
          plan[#plan + 1] = { "weights", w[1], piece, from = from, transposed = w.transposed }
        end)
      end
    end
  end
end

local function plan_vectors(engine, saved, plan)
  each_vector(engine, "each_piece", function(name, t, p, from)
    if name:sub(1, 5) == "fp32/" then return end
    if not saved:has("optim", name) then
      raise("load_checkpoint: %s has no %s; load without the optimizer: " ..
        "{ load_optimizer_states = false }", saved.path, name)
    end
    check_numel(saved, name, p)
    plan[#plan + 1] = { "optim", name, t, from = from }
  end)
end

--- The weights of all ranks, after the fp32 ones and those that do not train were filled in.
local function spread_weights(engine)
  local zero = engine.zero
  for _, s in ipairs(zero and zero.segments or {}) do
    if s.low then
      offload.each(s.p, function(t, first)
        run("copy", zero.device, slice(s.low:view(-1), first, t.shape)._c, t._c)
      end)
    end
  end
  if zero then zero:gather() end
  for _, e in ipairs(engine.named) do -- what is gathered is stale
    if e.parameter._unit then e.parameter._unit.manager:close_all() end
  end
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
  restore_choices(engine, state.products)
  if engine.graph then engine.graph:begin_again() end
  if engine.training_dataloader and state.loader then
    engine.training_dataloader:load_state(state.loader)
  end
end

--- Loads what save_checkpoint() wrote; the next step is the one an uninterrupted run would make.
-- Nothing is changed unless all of it is whole and fits; but an engine that has made no step yet
-- finds out what is damaged while it reads, and then takes no further part until a load succeeds.
-- @tparam string dir
-- @tparam[opt] string|number tag default: what `latest` names
-- @tparam[opt] table options { load_module_only = false, load_optimizer_states = true,
--   load_lr_scheduler_states = true, load_module_strict = true }; not strict: names that only the
--   model or only the checkpoint has are warned about
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
  if engine.late then engine.late:settle() end
  finish_all()
  -- an engine that has made no step has nothing to lose: files are checked while they are read
  local fresh = engine.global_steps == 0 and engine.micro_steps == 0 and not engine.loaded
  local saved = ckpt.load(dir, tag, { check = fresh and "later" or nil })
  engine.save_dir = engine.save_dir or dir
  if not saved then
    log.info("there is no checkpoint in %s yet; starting from the beginning", dir)
    return nil
  end
  local whole, plan = not options.load_module_only, {}
  local with_optimizer = whole and engine.optimizer and options.load_optimizer_states ~= false
  together.all(function()
    local weights = model_tensors(engine)
    compare_names(saved, weights, options.load_module_strict ~= false)
    plan_weights(engine, saved, weights, plan)
    if with_optimizer then
      plan_vectors(engine, saved, plan)
      if saved.state.optimizer then engine.optimizer:check_state_dict(saved.state.optimizer) end
    end
  end)
  if fresh then engine.undefined = saved.path end
  scope.no_grad(saved.fill, saved, plan)
  engine.undefined, engine.loaded = nil, true
  scope.no_grad(spread_weights, engine)
  if whole then restore_state(engine, saved.state, options) end
  engine:zero_grad()
  engine.new_step = true
  local path, client_state = saved.path, saved.client_state
  saved:close()
  log.info("loaded %s: %s", path, not whole and "weights only"
    or ("step %d%s"):format(engine.global_steps, with_optimizer and ""
      or ", without the optimizer's state"))
  return path, client_state
end

return M
