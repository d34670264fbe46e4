--- The built-in optimizers that are fused kernels over a segment: element-wise ones, and Lamb.

local border = require "ds.ffi"
local tensor = require "ds.tensor"

local raise, run = border.raise, tensor.run

local rules = {} -- { name, rule }, in the order in which they are registered
local function rule(name, definition) rules[#rules + 1] = { name, definition } end

local function handle(t) return t and t._c or nil end

local function adam(decoupled_default)
  return {
    state = { "exp_avg", "exp_avg_sq" },
    defaults = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
      bias_correction = true, adam_w_mode = true },
    fused = function(s, h, gscale, factor)
      local b1, b2 = h.betas[1], h.betas[2]
      local c1, c2 = 1, 1
      if h.bias_correction ~= false then c1, c2 = 1 - b1 ^ h.step, 1 - b2 ^ h.step end
      run("adam", s.p.device, s.p._c, s.state.exp_avg._c, s.state.exp_avg_sq._c, handle(s.low),
        s.g._c, h.lr, b1, b2, h.eps, h.weight_decay, c1, c2, gscale,
        (decoupled_default or h.adam_w_mode ~= false) and 1 or 0, handle(factor), nil)
    end,
  }
end
rule("Adam", adam(false))   -- AdamW unless adam_w_mode is false, as in DeepSpeed
rule("AdamW", adam(true))

rule("SGD", {
  state = { "momentum_buffer" },
  defaults = { lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false },
  fused = function(s, h, gscale, factor)
    if h.nesterov and (h.momentum == 0 or h.dampening ~= 0) then
      raise("SGD: nesterov needs a momentum and no dampening")
    end
    run("sgd", s.p.device, s.p._c, h.momentum ~= 0 and s.state.momentum_buffer._c or nil,
      handle(s.low), s.g._c, h.lr, h.momentum, h.dampening, h.weight_decay,
      h.nesterov and 1 or 0, h.step == 1 and 1 or 0, gscale, handle(factor), nil)
  end,
})

rule("Lion", {
  state = { "exp_avg" },
  defaults = { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 },
  fused = function(s, h, gscale, factor)
    run("lion", s.p.device, s.p._c, s.state.exp_avg._c, handle(s.low), s.g._c, h.lr,
      h.betas[1], h.betas[2], h.weight_decay, gscale, handle(factor), nil)
  end,
})

rule("Adagrad", {
  state = { "sum" },
  defaults = { lr = 1e-2, eps = 1e-10, weight_decay = 0, initial_accumulator_value = 0 },
  initial = { sum = "initial_accumulator_value" },
  fused = function(s, h, gscale, factor)
    run("adagrad", s.p.device, s.p._c, s.state.sum._c, handle(s.low), s.g._c, h.lr, h.eps,
      h.weight_decay, gscale, handle(factor), nil)
  end,
})

-- DeepSpeed's FusedLamb: each tensor moves by lr · ‖p‖ / ‖update‖ of Adam's update, which has the
-- decay in it; the ratio is kept between the two coefficients.
rule("Lamb", {
  granularity = "tensor", state = { "exp_avg", "exp_avg_sq" },
  defaults = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
    bias_correction = true, max_coeff = 10, min_coeff = 0.01 },
  fused = function(s, h, gscale, factor)
    local b1, b2 = h.betas[1], h.betas[2]
    local c1, c2 = 1, 1
    if h.bias_correction then c1, c2 = 1 - b1 ^ h.step, 1 - b2 ^ h.step end
    run("lamb", s.p.device, s.p._c, s.state.exp_avg._c, s.state.exp_avg_sq._c, handle(s.low),
      s.g._c, h.lr, b1, b2, h.eps, h.weight_decay, c1, c2, h.min_coeff, h.max_coeff, gscale,
      handle(factor), nil)
  end,
})

return rules
