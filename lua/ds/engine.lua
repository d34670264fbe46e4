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
-- add", so nothing has to be zeroed.
--
-- Model and batches may be made on the CPU for an engine on a GPU: the engine moves them.

local border = require "ds.ffi"
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
local offload_param = require "ds.offload_param"
local replicas = require "ds.replicas"
local together = require "ds.together"
local config = require "ds.config"
local precision = require "ds.precision"
local engine_settings = require "ds.engine_settings"
local engine_step = require "ds.engine_step"
local engine_late = require "ds.engine_late"
local engine_graph = require "ds.engine_graph"
local data = require "ds.data"
local comm = require "ds.comm"
local checkpointing = require "ds.checkpointing"
local log = require "ds.log"

local C, raise = border.C, border.raise

local Engine = {}

--- Methods; and figures of the last step that are still on their way.
function Engine.__index(self, key)
  local method = Engine[key]
  if method == nil and engine_late.fields[key] then
    local late = rawget(self, "late")
    if late then late:settle() end
    return rawget(self, key)
  end
  return method
end

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
  self.offload = offload.new(self.config, self.device)
  self.zero = zero.new(self.optimizer.param_groups, {
    dtype = self.dtype, grad_dtype = self.precision.grad_dtype,
    device = self.device, stage = c.stage, op = self.config.gradient_allreduce_op,
    wire = short[self.config.communication_data_type], reduce_scatter = c.reduce_scatter,
    contiguous = c.contiguous_gradients, round_robin = c.round_robin_gradients,
    reduce_bucket_size = c.reduce_bucket_size, allgather_bucket_size = c.allgather_bucket_size,
    sub_group_size = c.sub_group_size, small = c.stage3_param_persistence_threshold,
    most_small = c.stage3_model_persistence_threshold, prefetch = c.stage3_prefetch_bucket_size,
    max_live = c.stage3_max_live_parameters, max_reuse = c.stage3_max_reuse_distance,
    store = self.offload, home = offload_param.new(self.config, self.device),
    overlap = c.overlap_comm,
  })
  self.params = self.zero.params
  for _, p in ipairs(self.params) do p._engine = self end
  -- where the parameters were before: the optimizer's vectors would take parts of it, and the rest
  -- could not be given back
  tensor.empty_cache(self.device)
  self.optimizer:bind(self.zero.segments, self.zero.updates or self.offload)
end

--- Casts and moves what does not train, and shards it where weights are.
local function settle(self, buffers)
  local function move(t, dtype)
    if t.dtype == dtype and t.device == self.device then return end
    local grad = t.requires_grad
    t.requires_grad = false
    tensor.repoint(t, t:to(dtype, self.device))
    t.requires_grad = grad
  end
  for _, e in ipairs(self.named) do
    local p = e.parameter
    if not p._engine and p._unit then require("ds.zero_params").unshard(p) end -- by ds.zero.init
    if not p._engine then move(p, self.dtype) end
    if not p._engine and self.zero then self.zero:shard_frozen(p) end
  end
  for _, e in ipairs(buffers) do move(e.buffer, e.buffer.dtype) end
end

--- The same model and seed on all ranks, and then random numbers of each rank's own.
local function join(self, buffers)
  together.meet("ds.initialize")
  replicas.compare(self.named, buffers, self.config)
  replicas.send_out(self.named, buffers)
  local seed = replicas.share_seed(tensor.generator.seed)
  self.seed = self.config.seed or seed
  if comm.world_size() > 1 then tensor.generator.seed = replicas.seed_of(seed, comm.rank()) end
end

--- Raises, with the reason, where the device is not there.
local function check_device(self)
  if self.device ~= "cuda" then return end
  tensor.kernels "cuda"
  local c = self.config
  if c.zero_optimization.cpu_offload then
    raise("initialize: zero_optimization.cpu_offload: on a GPU say "
      .. '"offload_optimizer": {"device": "cpu"}')
  end
end

local run_forward -- below

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
    module = model, config = settings, device = settings.device or tensor.default_device,
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
  local buffers = type(model) == "table" and model.named_buffers and model:named_buffers() or {}
  check_device(self)
  join(self, buffers)
  self.optimizer = make_optimizer(options.optimizer, params, settings)
  if self.optimizer then partition(self) end
  settle(self, buffers)
  tensor.empty_cache("cpu") -- where the parameters were before
  if self.device ~= "cpu" then tensor.empty_cache(self.device) end
  self.lr_scheduler = make_scheduler(options.lr_scheduler, self.optimizer, settings)
  if self.device == "cuda" and self.optimizer then
    self.late = engine_late.new(self)
    self.graph = settings.cuda_graph and engine_graph.new(self, run_forward) or nil
  end
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
    device = self.device,
  })
end

--- For the verbs: `engine.step()` is a common slip.
local function need_engine(self, verb)
  if getmetatable(self) ~= Engine then
    raise("%s: call it with a colon, as engine:%s(…)", verb, verb)
  end
end

-- ---- forward

--- Arguments of the model: floating tensors in its dtype, all tensors on its device.
local function lower(self, ...)
  local n = select("#", ...)
  local out = { ... }
  for i = 1, n do
    local t = out[i]
    if tensor.is_tensor(t) then
      local dtype = tensor.floating[t.dtype] and self.dtype or t.dtype
      if t.dtype ~= dtype or t.device ~= self.device then out[i] = t:to(dtype, self.device) end
    end
  end
  return unpack(out, 1, n)
end

--- The model with arguments of any device; what it makes itself is on the engine's.
local function run_model(self, ...)
  return tensor.on(self.device, self.module, lower(self, ...))
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

local function leave(self, s, outer, before, ok, ...)
  exit(self)
  C.ds_breadcrumb("")
  scope.enter(outer)
  products.loss_seed, checkpointing.to_host = before.seed, before.to_host
  if not ok then
    scope.close(s, "when forward() failed")
    nn.reset_place()
    error((...), 0)
  end
  self.scopes[#self.scopes + 1] = s
  for i = 1, select("#", ...) do protect(self, (select(i, ...)), {}) end
  return ...
end

--- Runs the model in training, recorded for backward.
function run_forward(self, ...)
  local s = scope.new()
  local before = { seed = products.loss_seed, to_host = checkpointing.to_host }
  local outer = scope.enter(s)
  products.loss_seed = self:loss_scale() / self.gas
  if self.device ~= "cpu" and self.config.activation_checkpointing.cpu_checkpointing then
    checkpointing.to_host = true
  end
  C.ds_breadcrumb("engine:forward()")
  enter(self, true)
  return leave(self, s, outer, before, xpcall(run_model, border.note, self, ...))
end

--- Runs the model: `engine(x, y)` is the same. In training its activations are kept for backward
-- and go with it; in evaluation (`engine:eval()`) nothing is recorded.
function Engine:forward(...)
  nn.reset_place()
  if self.undefined then require("ds.engine_state").need_weights(self) end
  if not self.training then
    enter(self, false)
    return leave_evaluation(self, pcall(scope.no_grad, run_model, self, ...))
  end
  if self.new_step then begin_step(self) end
  if not self.optimizer then
    raise("engine: training needs an optimizer; name one in the config")
  end
  local loss = self.graph and self.graph:forward(...)
  if loss then return loss end
  return run_forward(self, ...)
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
  local value = loss.device == "cpu" and loss:item() or nil
  if value and value ~= value and self.config.nan_check then
    raise("step %d: the loss is NaN; training stops (nan_check)", self.global_steps + 1)
  end
  return value
end

local function count_backward(self, value, loss)
  self.backwards = self.backwards + 1
  if value then
    self.loss_sum = self.loss_sum + value
  elseif self.late then
    self.late:add_loss(loss, self.losses == 0)
  else
    return
  end
  self.losses = self.losses + 1
end

--- backward over the graph, for the engines whose parameters get gradients.
local function run_backward(engines, loss, seed, retain)
  for _, e in ipairs(engines) do
    enter(e, true)
    e.zero:begin_backward()
  end
  local ok, message = pcall(tensor.on, loss.device, autograd.run, { loss }, { seed }, retain)
  for _, e in ipairs(engines) do
    exit(e)
    if ok then e.zero:end_backward() else e.zero:drop_gradients() end
  end
  if not ok then error(message, 0) end
end

--- Backward from a loss, which survives it.
local function differentiate(self, loss, gas, options)
  local scale = self:loss_scale() / gas
  local seed = tensor.full(loss.shape, scale, { dtype = loss.dtype, device = loss.device })
  seed._value = scale -- for who would have to ask the device
  local owner, kept = autograd.owner, loss._keep
  autograd.owner = { [self] = true }
  if options.also then autograd.owner[options.also] = true end
  loss._keep = true
  C.ds_breadcrumb("engine:backward()")
  local ok, message = pcall(run_backward, { self, options.also }, loss, seed, options.retain_graph)
  C.ds_breadcrumb("")
  autograd.owner = owner
  loss._keep = kept
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
  local function go(from) differentiate(self, from, gas, options) end
  if self.graph then
    self.graph:backward(loss, next(options) == nil, go)
  else
    go(loss)
  end
  count_backward(self, value, loss)
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
  count_backward(self, check_loss(self, "scale", loss), loss)
  self.scaled = true
  return loss:float() * (self:loss_scale() / self.gas)
end

-- ---- gradients

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

engine_step.extend(Engine, need_engine)

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
  if self.late then self.late:forget() end
  if self.graph then self.graph:drop() end
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
