--- The engine's settings and figures that scripts read, and the learning rate, which they may set.

local raise = require "ds.ffi".raise

local M = {}

local methods = {}

--- Learning rates of the coming update, one a parameter group.
function methods:get_lr()
  local out = {}
  for i, group in ipairs(self.optimizer.param_groups) do out[i] = group.lr end
  return out
end

--- Sets the learning rate: of all groups, or of each by a table. Under a schedule it scales the
-- base rate, so that the coming update has this rate and the schedule's shape goes on. It is saved.
function methods:set_lr(lr)
  for i, group in ipairs(self.optimizer.param_groups) do
    local want = type(lr) == "table" and lr[i] or lr
    if type(want) ~= "number" or want < 0 or want - want ~= 0 then
      raise("set_lr: expects a number from 0, or one for each of %d groups, got %s",
        #self.optimizer.param_groups, tostring(want))
    end
    if self.lr_scheduler and group.lr and group.lr > 0 then
      group.lr_scale = (group.lr_scale or 1) * want / group.lr
    elseif self.lr_scheduler then
      group.initial_lr = want
    end
    group.lr = want
  end
end

--- Momentum, or betas, of each group.
function methods:get_mom()
  local out = {}
  for i, group in ipairs(self.optimizer.param_groups) do
    out[i] = group.betas or group.momentum or 0
  end
  return out
end

--- Norm of all gradients before clipping at the last update; nil before the first.
function methods:get_global_grad_norm() return self.global_grad_norm end

--- Mean loss of the last step's micro-batches, over all ranks; nil before the first.
function methods:get_loss() return self.last_loss end

--- Whether the last step() changed the weights.
function methods:was_step_applied() return self.applied end

function methods:train_batch_size() return self.config.train_batch_size end
function methods:train_micro_batch_size_per_gpu()
  return self.config.train_micro_batch_size_per_gpu
end
function methods:gradient_accumulation_steps() return self.gas end
function methods:zero_optimization_stage() return self.config.zero_optimization.stage end
function methods:gradient_clipping() return self.config.gradient_clipping end

--- Gives the class of engines these methods.
function M.extend(class)
  for name, method in pairs(methods) do class[name] = method end
end

return M
