--- The built-in optimizers that are fused kernels over a segment: element-wise ones, and Lamb.
--
-- What changes from step to step is apart: rates(h) gives lr and the bias corrections c1 and c2. On
-- a GPU a kernel may read them from memory instead (optim.lua explains factor and rates).

local border = require "ds.ffi"
local tensor = require "ds.tensor"

local raise, run = border.raise, tensor.run

local rules = {} -- { name, rule }, in the order in which they are registered
local function rule(name, definition) rules[#rules + 1] = { name, definition } end

local function handle(t) return t and t._c or nil end

--- 1 − βᵗ for both betas, or 1.
local function corrected(h)
  if h.bias_correction == false then return h.lr, 1, 1 end
  return h.lr, 1 - h.betas[1] ^ h.step, 1 - h.betas[2] ^ h.step
end

local function plain(h) return h.lr, 1, 1 end

local function adam(decoupled_default)
  return {
    state = { "exp_avg", "exp_avg_sq" },
    defaults = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
      bias_correction = true, adam_w_mode = true },
    rates = corrected,
    fused = function(s, h, gscale, factor, rates)
      local lr, c1, c2 = corrected(h)
      run("adam", s.p.device, s.p._c, s.state.exp_avg._c, s.state.exp_avg_sq._c, handle(s.low),
        s.g._c, lr, h.betas[1], h.betas[2], h.eps, h.weight_decay, c1, c2, gscale,
        (decoupled_default or h.adam_w_mode ~= false) and 1 or 0, handle(factor), handle(rates))
    end,
  }
end
rule("Adam", adam(false))   -- AdamW unless adam_w_mode is false, as in DeepSpeed
rule("AdamW", adam(true))

rule("SGD", {
  state = { "momentum_buffer" },
  defaults = { lr = 1e-3, momentum = 0, dampening = 0, weight_decay = 0, nesterov = false },
  rates = plain,
  fused = function(s, h, gscale, factor, rates)
    if h.nesterov and (h.momentum == 0 or h.dampening ~= 0) then
      raise("SGD: nesterov needs a momentum and no dampening")
    end
    run("sgd", s.p.device, s.p._c, h.momentum ~= 0 and s.state.momentum_buffer._c or nil,
      handle(s.low), s.g._c, h.lr, h.momentum, h.dampening, h.weight_decay,
      h.nesterov and 1 or 0, h.step == 1 and 1 or 0, gscale, handle(factor), handle(rates))
  end,
})

rule("Lion", {
  state = { "exp_avg" },
  defaults = { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 },
  rates = plain,
  fused = function(s, h, gscale, factor, rates)
    run("lion", s.p.device, s.p._c, s.state.exp_avg._c, handle(s.low), s.g._c, h.lr,
      h.betas[1], h.betas[2], h.weight_decay, gscale, handle(factor), handle(rates))
  end,
})

rule("Adagrad", {
  state = { "sum" },
  defaults = { lr = 1e-2, eps = 1e-10, weight_decay = 0, initial_accumulator_value = 0 },
  initial = { sum = "initial_accumulator_value" },
  rates = plain,
  fused = function(s, h, gscale, factor, rates)
    run("adagrad", s.p.device, s.p._c, s.state.sum._c, handle(s.low), s.g._c, h.lr, h.eps,
      h.weight_decay, gscale, handle(factor), handle(rates))
  end,
})

-- DeepSpeed's FusedLamb: each tensor moves by lr · ‖p‖ / ‖update‖ of Adam's update, which has the
-- decay in it; the ratio is kept between the two coefficients.
rule("Lamb", {
  granularity = "tensor", state = { "exp_avg", "exp_avg_sq" },
  defaults = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
    bias_correction = true, max_coeff = 10, min_coeff = 0.01 },
  rates = corrected,
  fused = function(s, h, gscale, factor, rates)
    local lr, c1, c2 = corrected(h)
    run("lamb", s.p.device, s.p._c, s.state.exp_avg._c, s.state.exp_avg_sq._c, handle(s.low),
      s.g._c, lr, h.betas[1], h.betas[2], h.eps, h.weight_decay, c1, c2, h.min_coeff, h.max_coeff,
      gscale, handle(factor), handle(rates))
  end,
})

return rules
