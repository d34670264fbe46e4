--- The end of a step: gradients of all ranks, their norm, the update, what follows from it.
--
-- A step is decided before anything is changed: norm and control word first. On a GPU the norm is
-- decided upon there (engine_late.lua), and what it came to is known one step later.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = require "ds.host"
local log = require "ds.log"
local late = require "ds.engine_late"
local replicas = require "ds.replicas"
local together = require "ds.together"

local C, raise = border.C, border.raise

local M = {}

local Engine = {} -- the methods

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
    if self.graph then self.graph:give_up("gradients are kept in another type from now on") end
    self.zero:set_grad_dtype(self.precision.grad_dtype)
  end
end

--- Whether no parameter has had a gradient since the last update.
local function without_gradients(self)
  for _, p in ipairs(self.params) do
    if not p._fresh then return false end
  end
  return true
end

local control = ffi.new("ds_control")

--- What all ranks must know before they update: the global norm, the mean loss, signals.
-- @treturn number|nil norm of all gradients, unscaled; inf or NaN if one is; nil: it is known later
local function agree(self)
  local figures = self.late
  control.overflow, control.stop, control.save = 0, C.ds_signal_pending(), 0
  control.writing = self.saving and self.saving:state() or 0
  if figures then
    self.losses = self.zero:agree(control, self.losses)
    if not figures.immediate then return nil end
    figures:measure()
    local norm
    self.loss_sum, norm = figures:read()
    if self.loss_sum ~= self.loss_sum and self.losses > 0 and self.config.nan_check then
      raise("step %d: the loss is NaN; training stops (nan_check)", self.global_steps + 1)
    end
    return norm
  end
  local squares
  squares, self.loss_sum, self.losses =
    self.zero:agree(control, self.zero:sum_squares(), self.loss_sum, self.losses)
  return math.sqrt(squares) / self:loss_scale()
end

--- The step is over; its gradients are stale.
local function end_gradients(self)
  for _, p in ipairs(self.params) do p._fresh, p._claim = true, nil end
  self.zero:end_step()
  self.global_steps = self.global_steps + 1
  self.global_samples = self.global_samples + self.config.train_batch_size
  self.backwards, self.scaled, self.new_step = 0, false, true
end

local function finish_step(self, applied, norm)
  end_gradients(self)
  self.applied, self.global_grad_norm = applied, norm
  self.last_loss = self.losses > 0 and self.loss_sum / self.losses or nil
  self.losses, self.loss_sum = 0, 0
  late.print(self, self.global_steps, table.concat(self:get_lr(), ", "))
end

--- The same where the figures come later.
local function finish_later(self)
  end_gradients(self)
  late.clear(self)
  self.losses = 0
end

--- Before the weights change.
local function begin_update(self)
  if self.offload then self.offload.place = ("step %d"):format(self.global_steps + 1) end
  if self.saving then self.saving:release() end
end

--- The update with this norm, if it may be made.
local function apply(self, norm)
  local finite = norm - norm == 0
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
    begin_update(self)
    self.optimizer:step(factor / self:loss_scale())
    self.zero:gather()
    finish_step(self, true, norm)
    if self.lr_scheduler then self.lr_scheduler:step() end
  end
  self.precision:update(self.global_steps, control.overflow ~= 0)
end

--- The norm, and the update with the factor that lies on the device.
local function apply_later(self)
  local late_figures, optimizer = self.late, self.optimizer
  local updates = optimizer.steps
  begin_update(self)
  optimizer:advance()
  if not (self.graph and self.graph:update()) then
    late_figures:measure()
    optimizer:apply(1, late_figures.factor)
  end
  late_figures:send(self.losses, updates)
  self.zero:gather()
  finish_later(self)
  if self.lr_scheduler then self.lr_scheduler:step() end
end

--- Raises unless a step may be made now.
local function check_order(self)
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
end

--- Raises where the config wants a gradient for every parameter.
local function check_reached(self)
  if self.config.zero_optimization.ignore_unused_parameters then return end
  local names = self.zero:unreached()
  if #names > 0 then
    raise("step %d: no gradient has reached %s (zero_optimization.ignore_unused_parameters is "
      .. "false)", self.global_steps + 1, table.concat(names, ", ", 1, math.min(#names, 8)))
  end
end

--- After the update, what is due at this step.
local function follow_up(self, stop)
  local every = self.config.replica_check_interval
  if every > 0 and self.global_steps % every == 0 then
    replicas.check(self.zero:all_weights(), self.global_steps)
  end
  if self.saving and control.writing ~= 1 then self:finish_checkpoint() end
  if stop ~= 0 then self:stop(stop) end
  self.step_ended = C.ds_seconds()
  C.ds_breadcrumb("")
end

--- Once a micro-batch. At the boundary: clips, updates, advances the schedule.
-- @treturn boolean true at the boundary
function Engine:step()
  M.need_engine(self, "step")
  check_order(self)
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
  if self.late then self.late:settle() end
  check_reached(self)
  self.zero:complete()
  self.zero:reduce()
  local norm = agree(self)
  local stop = control.stop
  if norm then apply(self, norm) else apply_later(self) end
  follow_up(self, stop)
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

--- Gives the class of engines these methods.
-- @tparam function need_engine raises where a verb was called without its engine
function M.extend(class, need_engine)
  M.need_engine = need_engine
  for name, method in pairs(Engine) do class[name] = method end
end

return M
