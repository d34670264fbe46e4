--- The engine: mixed precision, gradients, clipping, the optimizer and the schedule behind three
-- verbs.
--
--     local loss = engine(x, y)     -- forward
--     engine:backward(loss)         -- gradients, averaged over the micro-batches of a step
--     engine:step()                 -- at the boundary: clip, update, next learning rate; true
--                                      there
--
-- Parameters are re-pointed into flat buffers, one a parameter group: weights and gradients in the
-- types that precision.lua chooses, the master copy in fp32. A gradient is written by the kernel
-- that makes it straight into the flat buffer; `_fresh` on a parameter means "overwrite, do not
-- add", so nothing has to be zeroed. A step is decided before anything is changed: norm and control
-- word first.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = require "ds.host"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local F = require "ds.functional"
local products = require "ds.products"
local nn = require "ds.nn"
local optim = require "ds.optim"
local schedule = require "ds.schedule"
local zero = require "ds.zero"
local offload = require "ds.offload"
local replicas = require "ds.replicas"
local together = require "ds.together"
local config = require "ds.config"
local precision = require "ds.precision"
local engine_settings = require "ds.engine_settings"
local data = require "ds.data"
local comm = require "ds.comm"
local checkpointing = require "ds.checkpointing"
local log = require "ds.log"

local C, raise = border.C, border.raise

local Engine = {}
Engine.__index = Engine
precision.extend(Engine)
engine_settings.extend(Engine)
local M = { Engine = Engine }

-- ---- making an engine

local function number_of(params)
  local n = 0
  for _, p in ipairs(params) do n = n + p:numel() end
  return n
end

--- All parameters with names: of the model, or of `model_parameters` if the model has no list of
-- its own.
local function named_parameters(model, given)
  if type(model) == "table" and model.named_parameters then return model:named_parameters() end
  local out = {}
  local function add(list)
    for _, p in ipairs(list) do
      if p.params then
        add(p.params)
      else
        out[#out + 1] = { name = ("param.%d"):format(#out), parameter = p }
      end
    end
  end
  add(given or {})
  return out
end

local function make_optimizer(given, params, settings)
  if type(given) == "function" then given = given(params) end
  if given == nil then
    local spec = settings.optimizer
    if not spec then return nil end
    given = optim.new(spec.type, params, spec.params)
  elseif type(given) == "string" then
    given = optim.new(given, params)
  end
  if type(given) ~= "table" or getmetatable(given) ~= optim.Optimizer then
    raise("initialize: optimizer must come from ds.optim, "
      .. "as ds.optim.AdamW(model:parameters(), { lr = 1e-3 })")
  end
  return given
end

local function make_scheduler(given, optimizer, settings)
  if given == nil then
    given = settings.scheduler
    if not given or not given.type then return nil end
  end
  if type(given) == "string" then given = { type = given } end
  if type(given) == "table" and given.step and given.load_state_dict then return given end
  if not optimizer then raise("initialize: a schedule needs an optimizer") end
  return schedule.scheduler(optimizer, given)
end

local short = { fp32 = "f32", fp16 = "f16", bf16 = "bf16" } -- DeepSpeed's names of dtypes

--- The partitioned optimizer: flat buffers, and what this rank updates of them.
local function partition(self)
  local c = self.config.zero_optimization
  self.offload = offload.new(self.config)
  self.zero = zero.new(self.optimizer.param_groups, {
    dtype = self.dtype, grad_dtype = self.precision.grad_dtype,
    device = self.device, stage = c.stage, op = self.config.gradient_allreduce_op,
    wire = short[self.config.communication_data_type], reduce_scatter = c.reduce_scatter,
    contiguous = c.contiguous_gradients, round_robin = c.round_robin_gradients,
    reduce_bucket_size = c.reduce_bucket_size, allgather_bucket_size = c.allgather_bucket_size,
    sub_group_size = c.sub_group_size, small = c.stage3_param_persistence_threshold,
    most_small = c.stage3_model_persistence_threshold, prefetch = c.stage3_prefetch_bucket_size,
    max_live = c.stage3_max_live_parameters, max_reuse = c.stage3_max_reuse_distance,
    store = self.offload, overlap = c.overlap_comm,
  })
  self.params = self.zero.params
  for _, p in ipairs(self.params) do p._engine = self end
  -- where the parameters were before: the optimizer's vectors would take parts of it, and the rest
  -- could not be given back
  tensor.empty_cache(self.device)
  self.optimizer:bind(self.zero.segments, self.offload)
end

--- Casts what does not train, and shards it where weights are.
local function settle(self)
  for _, e in ipairs(self.named) do
    local p = e.parameter
    if not p._engine and p._unit then require("ds.zero_params").unshard(p) end -- by ds.zero.init
    if not p._engine and p.dtype ~= self.dtype then
      local grad = p.requires_grad
      p.requires_grad = false
      tensor.repoint(p, p:to(self.dtype))
      p.requires_grad = grad
    end
    if not p._engine and self.zero then self.zero:shard_frozen(p) end
  end
end

--- The same model and seed on all ranks, and then random numbers of each rank's own.
local function join(self)
  together.meet("ds.initialize")
  local model = self.module
  local buffers = type(model) == "table" and model.named_buffers and model:named_buffers() or {}
  replicas.compare(self.named, buffers, self.config)
  replicas.send_out(self.named, buffers)
  local seed = replicas.share_seed(tensor.generator.seed)
  self.seed = self.config.seed or seed
  if comm.world_size() > 1 then tensor.generator.seed = replicas.seed_of(seed, comm.rank()) end
end

local known = {
  args = true, model = true, model_parameters = true, training_data = true, lr_scheduler = true,
  optimizer = true, config = true, collate_fn = true, distributed_port = true,
  dist_init_required = true, config_params = true, mpu = true,
}

--- Sets up everything around a model:
-- `local engine, optimizer, loader, schedule = ds.initialize { … }`.
-- @tparam table options
--   model             a module, or any callable with `model_parameters`
--   args              script options; `args.deepspeed_config` names the JSON config
--   config            the config as a path or a table, instead of that
--   model_parameters  parameters or groups { params = {…}, lr =, weight_decay = … };
--                     default: the model's
--   optimizer         one from ds.optim, or function(parameters) → optimizer; default: the config's
--   lr_scheduler      { type =, params = }, a name, function(step, lr), or a scheduler;
--                     default: the config's
--   training_data     a data set: size() and get(i); gives the loader
--   collate_fn        function(samples) → the batch
-- @treturn Engine, optimizer, loader (or nil), scheduler (or nil)
function M.initialize(options)
  if type(options) ~= "table" then
    raise("initialize: expects a table: ds.initialize { model = …, config = … }")
  end
  for key in pairs(options) do
    if not known[key] then
      local names = {}
      for k in pairs(known) do names[#names + 1] = k end
      table.sort(names)
      raise("initialize: unknown option '%s'; there are %s",
        tostring(key), table.concat(names, ", "))
    end
  end
  local model = options.model
  if model == nil then raise("initialize: model is missing") end
  local from_args = type(options.args) == "table" and options.args.deepspeed_config or nil
  local given = options.config or options.config_params
  if given and from_args and given ~= from_args then
    raise("initialize: the config is given twice, "
      .. "as config and as args.deepspeed_config (%s); drop one", from_args)
  end
  local source = given or from_args
  if source == nil then
    raise("initialize: no config; "
      .. "pass config = { … }, config = \"ds.json\", or args with deepspeed_config")
  end
  local settings = config.load(source, { world_size = comm.world_size() })
  if settings.comms_logger.enabled then comm.configure(settings.comms_logger) end
  local types = precision.new(settings)
  local self = setmetatable({
    module = model, config = settings, device = settings.device or "cpu",
    precision = types, dtype = types.dtype,
    global_steps = 0, micro_steps = 0, skipped_steps = 0, global_samples = 0,
    training = true, gas = settings.gradient_accumulation_steps,
    scopes = {}, returned = {}, backwards = 0,
    losses = 0, loss_sum = 0, applied = false,
    named = named_parameters(model, options.model_parameters),
  }, Engine)
  if #self.named == 0 then
    raise("initialize: the model has no parameters; nn.Parameter(tensor) makes one, "
      .. "or pass model_parameters")
  end
  local params = options.model_parameters
  if not params then
    params = {}
    for i, e in ipairs(self.named) do params[i] = e.parameter end
  end
  join(self)
  self.optimizer = make_optimizer(options.optimizer, params, settings)
  if self.optimizer then partition(self) end
  settle(self)
  tensor.empty_cache(self.device) -- where the parameters were before
  self.lr_scheduler = make_scheduler(options.lr_scheduler, self.optimizer, settings)
  local recompute = settings.activation_checkpointing
  if recompute.enabled then
    self.blocks = checkpointing.wrap(model, recompute.number_checkpoints)
  end
  if options.training_data then
    self.training_dataloader =
      self:deepspeed_io(options.training_data, { collate_fn = options.collate_fn })
  end
  C.ds_signal_claim(1)
  local all = {}
  for i, e in ipairs(self.named) do all[i] = e.parameter end
  log.info("%s parameters, %s, %s, batch %d = micro %d × accumulation %d × ranks %d",
    nn.count_string(number_of(self.optimizer and self.params or all)), self.dtype,
    self.optimizer and self.optimizer.name or "no optimizer", settings.train_batch_size,
    settings.train_micro_batch_size_per_gpu, self.gas, comm.world_size())
  return self, self.optimizer, self.training_dataloader, self.lr_scheduler
end

--- A loader over a data set, with the engine's batch size and rank.
-- @tparam table dataset size() and get(i)
-- @tparam[opt] table options batch_size, shuffle, drop_last, collate_fn
function Engine:deepspeed_io(dataset, options)
  options = options or {}
  local c = self.config
  return data.loader(dataset, {
    batch_size = options.batch_size or c.train_micro_batch_size_per_gpu,
    seed = self.seed,
    shuffle = options.shuffle == nil and c.dataloader_shuffle or options.shuffle or false,
    drop_last = options.drop_last == nil and c.dataloader_drop_last or options.drop_last or false,
    collate_fn = options.collate_fn, rank = comm.rank(), world_size = comm.world_size(),
  })
end

--- For the verbs: `engine.step()` is a common slip.
local function need_engine(self, verb)
  if getmetatable(self) ~= Engine then
    raise("%s: call it with a colon, as engine:%s(…)", verb, verb)
  end
end

-- ---- forward

local function lower(self, ...)
  local n = select("#", ...)
  local out = { ... }
  for i = 1, n do
    local t = out[i]
    if tensor.is_tensor(t) and tensor.floating[t.dtype] and t.dtype ~= self.dtype then
      out[i] = t:to(self.dtype)
    end
  end
  return unpack(out, 1, n)
end

--- What forward returns lives until the next step begins.
local function protect(self, value, seen)
  if type(value) ~= "table" or seen[value] then return end
  seen[value] = true
  if value._c then
    if not value._keep then
      value._keep = "returned"
      self.returned[#self.returned + 1] = value
    end
    return
  end
  if nn.is_module(value) then return end
  for _, v in pairs(value) do protect(self, v, seen) end
end

--- Drops what earlier forwards of the last step left.
local function begin_step(self)
  for i, t in ipairs(self.returned) do
    self.returned[i] = nil
    if t._keep == "returned" then t._keep = false end -- and not by the script's own t:keep()
  end
  for i, s in ipairs(self.scopes) do
    self.scopes[i] = nil
    scope.close(s, "when the engine's next step began")
  end
  self.new_step = false
end

--- Around what runs the model: sharded parameters are gathered in it.
local function enter(self, training)
  if self.zero and self.zero.sharded then self.zero.sharded:enter(training) end
end

local function exit(self)
  if self.zero and self.zero.sharded then self.zero.sharded:leave() end
end

local function leave_evaluation(self, ok, ...)
  exit(self)
  if not ok then error((...), 0) end
  return ...
end

local function leave(self, s, outer, seed, ok, ...)
  exit(self)
  C.ds_breadcrumb("")
  scope.enter(outer)
  products.loss_seed = seed
  if not ok then
    scope.close(s, "when forward() failed")
    nn.reset_place()
    error((...), 0)
  end
  self.scopes[#self.scopes + 1] = s
  for i = 1, select("#", ...) do protect(self, (select(i, ...)), {}) end
  return ...
end

--- Runs the model: `engine(x, y)` is the same. In training its activations are kept for backward
-- and go with it; in evaluation (`engine:eval()`) nothing is recorded.
function Engine:forward(...)
  nn.reset_place()
  if self.undefined then require("ds.engine_state").need_weights(self) end
  if not self.training then
    enter(self, false)
    return leave_evaluation(self, pcall(scope.no_grad, self.module, lower(self, ...)))
  end
  if self.new_step then begin_step(self) end
  if not self.optimizer then
    raise("engine: training needs an optimizer; name one in the config")
  end
  local s, seed = scope.new(), products.loss_seed
  local outer = scope.enter(s)
  products.loss_seed = self:loss_scale() / self.gas
  C.ds_breadcrumb("engine:forward()")
  enter(self, true)
  return leave(self, s, outer, seed, xpcall(self.module, border.note, lower(self, ...)))
end
Engine.__call = Engine.forward

-- ---- backward

--- Raises unless backward can begin from this loss.
-- @treturn number|nil its value, where that costs nothing
local function check_loss(self, verb, loss)
  if loss == nil then
    raise("%s: expects the loss, got nil; does the model's forward() return it?", verb)
  end
  tensor.need_tensor(loss, verb, 1)
  if loss:numel() ~= 1 then
    raise("%s: the loss must have one element, not %s; take :mean() first", verb,
      border.shape_string(loss.shape))
  end
  if not self.training then
    raise("%s: the engine is in evaluation mode; call engine:train() first", verb)
  end
  if not loss._rec then
    if loss._done then
      raise("%s: backward was already called for this loss; use { retain_graph = true } there",
        verb)
    end
    raise("%s: the loss does not depend on anything that requires a gradient", verb)
  end
  local value = self.device == "cpu" and loss:item() or nil
  if value and value ~= value and self.config.nan_check then
    raise("step %d: the loss is NaN; training stops (nan_check)", self.global_steps + 1)
  end
  return value
end

local function count_backward(self, value)
  self.backwards = self.backwards + 1
  if value then
    self.losses = self.losses + 1
    self.loss_sum = self.loss_sum + value
  end
end

--- backward over the graph, for the engines whose parameters get gradients.
local function run_backward(engines, loss, seed, retain)
  for _, e in ipairs(engines) do
    enter(e, true)
    e.zero:begin_backward()
  end
  local ok, message = pcall(autograd.run, { loss }, { seed }, retain)
  for _, e in ipairs(engines) do
    exit(e)
    if ok then e.zero:end_backward() else e.zero:drop_gradients() end
  end
  if not ok then error(message, 0) end
end

--- Adds the gradients of loss / (accumulation steps) to the parameters' gradients.
-- Frees what was reachable from the loss. Several forwards before one backward, and several
-- backwards a step, are fine.
-- @tparam Tensor loss one element
-- @tparam[opt] table options { retain_graph = false, also = another engine whose parameters get
--   gradients as well, scale_wrt_gas = true }
-- @treturn Tensor the loss divided by the accumulation steps
function Engine:backward(loss, options)
  need_engine(self, "backward")
  options = F.options_of("backward", options, {
    retain_graph = true, also = true, scale_wrt_gas = true,
  })
  local value = check_loss(self, "backward", loss)
  if options.also and not options.also.zero then
    raise("backward: { also = … }: that engine has no optimizer, so nothing of it trains")
  end
  if options.also then self.precision:share(options.also.precision) end
  local gas = options.scale_wrt_gas == false and 1 or self.gas
  local seed = tensor.full(loss.shape, self:loss_scale() / gas,
    { dtype = loss.dtype, device = loss.device })
  local owner = autograd.owner
  autograd.owner = { [self] = true }
  if options.also then autograd.owner[options.also] = true end
  local kept = loss._keep
  loss._keep = true
  C.ds_breadcrumb("engine:backward()")
  local ok, message = pcall(run_backward, { self, options.also }, loss, seed, options.retain_graph)
  C.ds_breadcrumb("")
  autograd.owner = owner
  loss._keep = kept
  if not ok then error(message, 0) end
  count_backward(self, value)
  if options.also then options.also.backwards = options.also.backwards + 1 end
  return gas == 1 and loss or scope.no_grad(function() return loss / gas end)
end

--- What a script's own backward begins from, once a micro-batch: loss × loss scale / accumulation
-- steps. engine:backward(loss) is for most; this one leaves the call, and what else gets
-- gradients, to the script.
-- @usage engine:scale(loss):backward()
-- @tparam Tensor loss one element
-- @treturn Tensor
function Engine:scale(loss)
  need_engine(self, "scale")
  count_backward(self, check_loss(self, "scale", loss))
  self.scaled = true
  return loss:float() * (self:loss_scale() / self.gas)
end

--- Whether no parameter has had a gradient since the last update.
local function without_gradients(self)
  for _, p in ipairs(self.params) do
    if not p._fresh then return false end
  end
  return true
end

-- ---- step

--- Whether the coming step() is the one that updates.
function Engine:is_gradient_accumulation_boundary()
  if self.forced_boundary ~= nil then return self.forced_boundary end
  return (self.micro_steps + 1) % self.gas == 0
end

--- Decides the boundary by hand, on every rank alike; nil: by counting again. From the first call
-- on gradients are kept in fp32, unless data_types.grad_accum_dtype says otherwise: how many
-- micro-batches make a step is not known any more.
function Engine:set_gradient_accumulation_boundary(on)
  self.forced_boundary = on
  if on ~= nil and self.zero and self.precision:add_up() then
    self.zero:set_grad_dtype(self.precision.grad_dtype)
  end
end

local control = ffi.new("ds_control")

--- What all ranks must know before they update: the global norm, the mean loss, signals.
-- @treturn number norm of all gradients, unscaled; inf or NaN if one is
local function agree(self)
  control.overflow, control.stop, control.save = 0, C.ds_signal_pending(), 0
  control.writing = self.saving and self.saving:state() or 0
  local squares
  squares, self.loss_sum, self.losses =
    self.zero:agree(control, self.zero:sum_squares(), self.loss_sum, self.losses)
  return math.sqrt(squares) / self:loss_scale()
end

local function finish_step(self, applied, norm)
  for _, p in ipairs(self.params) do p._fresh, p._claim = true, nil end
  self.zero:end_step()
  self.applied = applied
  self.global_steps = self.global_steps + 1
  self.global_samples = self.global_samples + self.config.train_batch_size
  self.global_grad_norm = norm
  self.backwards, self.scaled, self.new_step = 0, false, true
  self.last_loss = self.losses > 0 and self.loss_sum / self.losses or nil
  self.losses, self.loss_sum = 0, 0
  local every = self.config.steps_per_print
  if every and every > 0 and self.global_steps % every == 0 then
    log.info("step=%d, skipped=%d, lr=[%s], loss=%s, norm=%.4g",
      self.global_steps, self.skipped_steps, table.concat(self:get_lr(), ", "),
      self.last_loss and ("%.4f"):format(self.last_loss) or "?", norm)
  end
end

--- Once a micro-batch. At the boundary: clips, updates, advances the schedule.
-- @treturn boolean true at the boundary
function Engine:step()
  need_engine(self, "step")
  if not self.optimizer then raise("step: the engine has no optimizer") end
  if not self.training then
    raise("step: the engine is in evaluation mode; call engine:train() first")
  end
  if self.backwards == 0 then
    raise("step: backward() has not been called since the last step; "
      .. "the order is engine(…), engine:backward(loss), engine:step()")
  end
  if self.scaled and without_gradients(self) then
    raise("step: engine:scale(loss) was called, and not the :backward() of what it gave")
  end
  if self.unsynced then raise("step: not inside no_sync(); call it after that") end
  if self.scaled then -- the script's own backward: nobody has reduced yet
    self.zero:begin_backward()
    self.zero:end_backward()
  end
  local boundary = self:is_gradient_accumulation_boundary()
  self.micro_steps = self.micro_steps + 1
  if not boundary then
    self.backwards, self.scaled = 0, false
    return false
  end
  local place = ("engine:step() number %d"):format(self.global_steps + 1)
  if self.step_ended then -- what this rank did by itself: launchers name ranks that are slower
    C.ds_side_step(self.global_steps + 1, C.ds_seconds() - self.step_ended)
  end
  C.ds_breadcrumb(place)
  host.here()
  together.meet(place)
  if not self.config.zero_optimization.ignore_unused_parameters then
    local names = self.zero:unreached()
    if #names > 0 then
      raise("step %d: no gradient has reached %s (zero_optimization.ignore_unused_parameters is "
        .. "false)", self.global_steps + 1, table.concat(names, ", ", 1, math.min(#names, 8)))
    end
  end
  self.zero:complete()
  self.zero:reduce()
  local norm = agree(self)
  local finite, stop = norm - norm == 0, control.stop
  control.overflow = self.precision:overflows(norm) and 1 or 0
  if control.overflow ~= 0 then
    self.skipped_steps = self.skipped_steps + 1
    finish_step(self, false, norm)
  else
    if not finite and self.config.nan_check then
      raise("step %d: the gradient norm is %s; training stops (nan_check)",
        self.global_steps + 1, tostring(norm))
    end
    local clip = self.config.gradient_clipping
    local factor = clip > 0 and norm + 1e-6 > clip and clip / (norm + 1e-6) or 1
    if self.offload then self.offload.place = ("step %d"):format(self.global_steps + 1) end
    if self.saving then self.saving:release() end
    self.optimizer:step(factor / self:loss_scale())
    self.zero:gather()
    finish_step(self, true, norm)
    if self.lr_scheduler then self.lr_scheduler:step() end
  end
  self.precision:update(self.global_steps, control.overflow ~= 0)
  local every = self.config.replica_check_interval
  if every > 0 and self.global_steps % every == 0 then
    replicas.check(self.zero:all_weights(), self.global_steps)
  end
  if self.saving and control.writing ~= 1 then self:finish_checkpoint() end
  if stop ~= 0 then self:stop(stop) end
  self.step_ended = C.ds_seconds()
  C.ds_breadcrumb("")
  return true
end

--- Runs f(…), in which gradients are only added up on this rank, as they are anyway before the
-- boundary's step; no step() may be called in it.
-- @usage engine:no_sync(function() engine:backward(engine(x, y)) end)
-- @return what f returns
function Engine:no_sync(f, ...)
  if self.unsynced then raise("no_sync: it is already on; it can't be nested") end
  if self.zero and self.zero.stage >= 2 then
    raise("no_sync: at ZeRO stage %d every backward reduces its gradients, as no rank has room for "
      .. "all of them; take stage 1", self.zero.stage)
  end
  self.unsynced = true
  return (function(ok, ...)
    self.unsynced = false
    if not ok then error((...), 0) end
    return ...
  end)(xpcall(f, border.note, ...))
end

--- A signal asked to stop: save where checkpoints go, if the script saves any, and end.
function Engine:stop(signal)
  if self.save_dir then
    self:save_checkpoint(self.save_dir, nil, self.client_state)
    self:finish_checkpoint()
    log.info("stopped by signal %d; saved %s/global_step%d",
      signal, self.save_dir, self.global_steps)
  else
    log.info("stopped by signal %d after step %d; "
      .. "nothing was saved, the script has saved no checkpoint yet", signal, self.global_steps)
  end
  os.exit(128 + signal)
end

--- Forgets the gradients of the step so far.
function Engine:zero_grad()
  for _, p in ipairs(self.params or {}) do p._fresh = true end
  if self.zero then self.zero:drop_gradients() end
  self.backwards = 0
end

-- ---- modes

--- Evaluation mode: dropout off, nothing recorded.
function Engine:eval()
  self.training = false
  if self.module.eval then self.module:eval() end
  return self
end

--- Training mode; `train(false)` is eval().
function Engine:train(on)
  if on == false then return self:eval() end
  self.training = true
  if self.module.train then self.module:train() end
  return self
end

-- Loaded with their first use.
for name, file in pairs {
  save_checkpoint = "ds.engine_state", finish_checkpoint = "ds.engine_state",
  load_checkpoint = "ds.engine_state", save_16bit_model = "ds.engine_state",
  train_batch = "ds.engine_batches", evaluate = "ds.engine_batches",
} do
  Engine[name] = function(self, ...)
    need_engine(self, name)
    return require(file)[name](self, ...)
  end
end

--- Lets go of the model: its parameters keep their values and belong to no engine.
function Engine:destroy()
  if self.destroyed then return end
  self.destroyed = true
  if self.saving then self:finish_checkpoint() end
  begin_step(self)
  if self.zero then self.zero:let_go() end
  checkpointing.unwrap(self.blocks or {})
  for _, p in ipairs(self.params or {}) do
    p.grad, p._engine, p._flat = nil, nil, nil
  end
  C.ds_signal_claim(0)
end

function Engine:__tostring()
  return ("engine: %s, step %d, %s"):format(self.dtype, self.global_steps, tostring(self.optimizer))
end

return M
