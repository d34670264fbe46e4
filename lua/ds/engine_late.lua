--- The figures of a step on a GPU: loss, gradient norm and clip factor stay there, and the host
-- reads them when they have come by themselves.
--
-- A host that waits for a number in every step keeps the GPU waiting for the next one. So the
-- losses of a step are added up on the device; the norm and the factor that gradients are
-- multiplied by (clipping, the loss scale) are computed there; the optimizer's kernels read the
-- factor from there, and change nothing where it is not finite. A download of these four numbers is
-- queued, and the next step() looks at them: by then they have long been there. So what depends on
-- them is known one step late: the progress line, a skipped step, and the end of the training where
-- a figure is NaN. Up to then the step counts as applied; if it was not, the counter of updates and
-- the schedule go back to where they were, before the next update is made. Asking (get_loss(),
-- get_global_grad_norm(), was_step_applied(), skipped_steps) waits, and so does saving.
--
-- `immediate`: where a loss scale moves with each step, where the update is the CPU's (offload),
-- and where an optimizer is a rule in Lua that takes a number, every step waits for its own
-- figures.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = require "ds.host"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local shared = require "ds.shared"
local log = require "ds.log"

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice, real = tensor.view.slice_flat, tensor.real

local M = {}

local Late = {}
Late.__index = Late

-- Places in the report, 0-based.
local LOSS, SQUARES, NORM, FACTOR, FIGURES = 0, 1, 2, 3, 4

--- Page-locked room for a report, and the event that says when it is there.
local function slot()
  local box, c = ffi.new("ds_event *[1]"), ffi.new("ds_tensor")
  check(C.ds_event_make(box, C.DS_CUDA), "initialize")
  check(C.ds_empty_pinned(c, C.DS_F32, 1, ffi.new("int64_t[1]", FIGURES)), "initialize")
  c = ffi.gc(c, C.ds_release)
  return { event = ffi.gc(box[0], C.ds_event_free), host = c,
    values = ffi.cast("float *", c.data) }
end

local function is_fused(optimizer)
  for _, group in ipairs(optimizer.param_groups) do
    if not group.rule.fused then return false end
  end
  return true
end

local waiting = setmetatable({}, { __mode = "k" }) -- those with figures that nobody has looked at

--- For an engine on a GPU that has an optimizer.
function M.new(engine)
  local report = shared.zeros({ FIGURES }, "f32", engine.device):keep()
  local function part(at, n) return slice(report, at, { n or 1 }):keep() end
  if not M.hooked then
    M.hooked = true
    host.at_end(function(well)
      for late in pairs(waiting) do
        if well then late:settle() end
      end
    end)
  end
  return setmetatable({
    engine = engine, device = engine.device, report = report, loss = part(LOSS),
    squares = part(SQUARES), sums = part(LOSS, 2), norm = part(NORM), factor = part(FACTOR),
    slots = { slot(), slot() }, turn = 1, pending = false,
    immediate = engine:dynamic_loss_scale() or engine.offload ~= nil
      or not is_fused(engine.optimizer),
  }, Late)
end

--- Adds the loss of a micro-batch to the step's. @tparam boolean first it is the step's first one
function Late:add_loss(loss, first)
  scope.no_grad(function()
    local value = #loss.shape == 1 and loss or loss:reshape(1)
    if first then return run("copy", self.device, self.loss._c, value._c) end
    if value.dtype ~= "f32" then value = value:to "f32" end
    run("add_scaled", self.device, self.loss._c, self.loss._c, value._c, 1)
  end)
end

--- From the reduced gradients: their norm over all ranks, and the factor.
function Late:measure()
  local engine = self.engine
  local zero, config, started = engine.zero, engine.config, false
  for _, b in ipairs(zero.buckets) do
    if b.own then
      run("square_sum", self.device, self.squares._c, b.own._c, started and 1 or 0)
      started = true
    end
  end
  if not started then run("fill", self.device, self.squares._c, 0) end
  if engine.losses == 0 then run("fill", self.device, self.loss._c, 0) end
  if zero.ranks > 1 then
    check(C.ds_all_reduce(self.sums._c, self.sums._c, C.DS_SUM, zero.world, nil), "step")
  end
  local skip = engine.precision.checks or config.nan_check
  run("clip_factor", self.device, self.factor._c, self.norm._c, self.squares._c,
    config.gradient_clipping, engine:loss_scale(), skip and 1 or 0)
end

--- Has the figures come to the host, as those of the step that ends now.
-- @tparam number losses how many micro-batches of all ranks the loss is the sum of
-- @tparam number updates that the optimizer had made before
function Late:send(losses, updates)
  local engine, s = self.engine, self.slots[self.turn]
  self.turn = 3 - self.turn
  check(C.ds_download_later(s.event, s.host, self.report._c), "step")
  local scheduler = engine.lr_scheduler
  self.pending = { slot = s, step = engine.global_steps + 1, losses = losses,
    lr = table.concat(engine:get_lr(), ", "), skipped = engine.skipped_steps,
    updates = updates,
    scheduler = scheduler and scheduler.state_dict and scheduler:state_dict() }
  waiting[self] = true
end

--- The figures of this step now. @treturn number sum of the losses @treturn number norm
function Late:read()
  local s = self.slots[self.turn]
  check(C.ds_download_later(s.event, s.host, self.report._c), "step")
  check(C.ds_event_wait(s.event), "step")
  return real(s.values[LOSS]), real(s.values[NORM])
end

--- The update was not made: the next one has its number and its rates.
local function undo(engine, p)
  engine.optimizer.steps = p.updates
  if p.scheduler then engine.lr_scheduler:load_state_dict(p.scheduler) end
end

--- What the last step came to, if that is not known yet. Waits if it must; raises what nan_check
-- says.
function Late:settle()
  local p, engine = self.pending, self.engine
  if not p then return end
  self.pending, waiting[self] = false, nil
  check(C.ds_event_wait(p.slot.event), ("step %d"):format(p.step))
  local loss, norm = real(p.slot.values[LOSS]), real(p.slot.values[NORM])
  local finite, checked = norm - norm == 0, engine.config.nan_check
  local overflow = engine.precision:overflows(norm) and true or false
  engine.applied = finite or not (overflow or checked)
  engine.skipped_steps = p.skipped + (overflow and 1 or 0)
  engine.global_grad_norm = norm
  engine.last_loss = p.losses > 0 and loss / p.losses or nil
  if not engine.applied then undo(engine, p) end
  if checked and loss ~= loss and p.losses > 0 then
    raise("step %d: the loss is NaN; training stops (nan_check)", p.step)
  end
  if checked and not finite and not overflow then
    raise("step %d: the gradient norm is %s; training stops (nan_check)", p.step, tostring(norm))
  end
  M.print(engine, p.step, p.lr)
  engine.precision:update(p.step, overflow)
end

--- Nobody asks any more.
function Late:forget() self.pending, waiting[self] = false, nil end

--- The progress line of a step, every steps_per_print steps.
function M.print(engine, step, lr)
  local every = engine.config.steps_per_print
  if not every or every <= 0 or step % every ~= 0 then return end
  log.info("step=%d, skipped=%d, lr=[%s], loss=%s, norm=%.4g", step, engine.skipped_steps, lr,
    engine.last_loss and ("%.4f"):format(engine.last_loss) or "?", engine.global_grad_norm)
end

-- Fields of an engine that are not there while a step's figures are on their way.
M.fields = { last_loss = true, global_grad_norm = true, applied = true, skipped_steps = true }

--- Takes the fields away: reading one asks for the figures.
function M.clear(engine)
  for name in pairs(M.fields) do engine[name] = nil end
end

return M
