--- Precision: in what types an engine keeps weights and gradients, and by what it scales the loss.
--
-- Weights and activations are f32, bf16 or f16. Gradients have the weights' type where one
-- micro-batch makes a step, as nothing is then added up that rounding could lose, and f32
-- otherwise; data_types.grad_accum_dtype decides by hand. The optimizer's master copy is f32
-- always. A gradient as it lies in `p.grad` is multiplied by the loss scale, which is 1 but for
-- fp16.

local ffi = require "ffi"
local border = require "ds.ffi"
local log = require "ds.log"

local C, check, raise = border.C, border.check, border.raise

local M = {}

local Precision = {}
Precision.__index = Precision

local dtypes = { fp32 = "f32", fp16 = "f16", bf16 = "bf16" }

local function make_scaler(fp16)
  local s = ffi.new("ds_scaler")
  if fp16.enabled and fp16.loss_scale == 0 then
    check(C.ds_scaler_dynamic(s, fp16.initial_scale_power, fp16.min_loss_scale,
      fp16.loss_scale_window, fp16.hysteresis, fp16.consecutive_hysteresis and 1 or 0),
      "initialize")
  else
    check(C.ds_scaler_static(s, fp16.enabled and fp16.loss_scale or 1), "initialize")
  end
  return s
end

--- The precision that a checked config asks for.
-- @tparam table settings what config.load gave
-- @treturn Precision dtype of weights and activations, grad_dtype, scaler
function M.new(settings)
  local fp16, bf16 = settings.fp16, settings.bf16
  local dtype = fp16.enabled and "f16" or bf16.enabled and "bf16" or "f32"
  local given = dtypes[settings.data_types.grad_accum_dtype]
  local grad = given or settings.gradient_accumulation_steps == 1 and dtype or "f32"
  return setmetatable({
    dtype = dtype, grad_dtype = grad, grad_given = given, scaler = make_scaler(fp16), fp16 = fp16,
    checks = fp16.enabled or bf16.enabled and bf16.check_grad_overflow,
  }, Precision)
end

--- What the loss is multiplied by, and the gradients are to be divided by.
function Precision:scale() return self.scaler.cur_scale end

--- Whether a step with this gradient norm is to be skipped.
function Precision:overflows(norm) return self.checks and norm - norm ~= 0 end

--- From now on it is not known how many micro-batches make a step.
-- @treturn boolean whether the type of gradients changes with that
function Precision:add_up()
  if self.grad_given or self.grad_dtype == "f32" then return false end
  self.grad_dtype = "f32"
  return true
end

--- Whether one backward may add to the gradients of two engines: raises where their scales differ.
function Precision:share(other)
  if self:scale() ~= other:scale() then
    raise("backward: { also = … } with loss scales %g and %g: a gradient can have one only; give "
      .. "both engines bf16, or the same fixed fp16.loss_scale", self:scale(), other:scale())
  end
end

--- Once a step, after its gradients were used or dropped: the scale of the next one.
-- Raises where the scale cannot fall any further.
-- @tparam number step the number of the step that is done, for messages
-- @tparam boolean overflow it was skipped
function Precision:update(step, overflow)
  local s = self.scaler
  local scale = s.cur_scale
  local code = C.ds_scaler_update(s, overflow and 1 or 0)
  if not overflow then return end
  local what = ("step %d skipped: a gradient is not finite"):format(step)
  if code < 0 then check(code, ("step %d skipped"):format(step)) end
  if s.cur_scale ~= scale then
    log.warning("%s; the loss scale falls from %g to %g", what, scale, s.cur_scale)
  elseif self.fp16.enabled then
    log.warning("%s; the loss scale stays %g%s", what, scale,
      s.dynamic ~= 0 and (" (hysteresis %d)"):format(tonumber(s.cur_hysteresis)) or "")
  else
    log.warning("%s", what)
  end
end

--- What a checkpoint keeps; nil where the scale never changes.
function Precision:state()
  local s = self.scaler
  if s.dynamic == 0 then return nil end
  return { cur_scale = s.cur_scale, cur_iter = tonumber(s.cur_iter),
    last_overflow_iter = tonumber(s.last_overflow_iter),
    cur_hysteresis = tonumber(s.cur_hysteresis) }
end

--- Takes what state() gave; nil (a run without a scale that changes) leaves the scale as it is.
function Precision:load_state(state)
  if state == nil or self.scaler.dynamic == 0 then return end
  for _, key in ipairs { "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis" } do
    if type(state[key]) ~= "number" then
      raise("load_checkpoint: the state of the loss scale has no number %s", key)
    end
  end
  check(C.ds_scaler_restore(self.scaler, state.cur_scale, state.cur_iter,
    state.last_overflow_iter, state.cur_hysteresis), "load_checkpoint")
end

-- ---- the engine's methods

local getters = {}

--- What the loss is multiplied by now: 1 unless fp16 is on.
function getters:loss_scale() return self.precision:scale() end
function getters:fp16_enabled() return self.precision.fp16.enabled end
function getters:bfloat16_enabled() return self.precision.dtype == "bf16" end
--- Whether the loss scale changes by itself.
function getters:dynamic_loss_scale() return self.precision.scaler.dynamic ~= 0 end
--- What the dynamic loss scale begins with.
function getters:initial_dynamic_scale() return 2 ^ self.precision.fp16.initial_scale_power end
--- The settings of the dynamic loss scale, under DeepSpeed's names; nil without one.
function getters:dynamic_loss_scale_args()
  if not self:dynamic_loss_scale() then return nil end
  local f = self.precision.fp16
  return { init_scale = 2 ^ f.initial_scale_power, scale_window = f.loss_scale_window,
    delayed_shift = f.hysteresis, consecutive_hysteresis = f.consecutive_hysteresis,
    min_scale = f.min_loss_scale }
end
--- Types of the weights and of the gradients, as "bf16", "f32".
function getters:get_data_types() return self.precision.dtype, self.precision.grad_dtype end

--- Gives the class of engines these methods.
function M.extend(class)
  for name, method in pairs(getters) do class[name] = method end
end

return M
