--- What an operation costs besides its arithmetic: chains of operations on tiny tensors, recorded
-- and run backwards. Prints for each chain "name median_us min_us", per operation, forward and
-- backward counted as one operation each.

local ds = require "ds"
local F = ds.F
local seconds = require("ds.ffi").C.ds_seconds

local OPS, ROUNDS = 200, 200

local w = ds.randn(4, 4):requires_grad_()
local b = ds.randn(4):requires_grad_()
local one = ds.ones(4):requires_grad_()

local chains = {
  { "add", function(x) return x + one end },
  { "mul", function(x) return x * one end },
  { "gelu", function(x) return x:gelu() end },
  { "layer_norm", function(x) return F.layer_norm(x, one, b) end },
  { "linear", function(x) return F.linear(x, w, b) end },
  { "reshape", function(x) return x:reshape(2, 8):reshape(4, 4) end, 2 },
}

local function measure(f, per_call)
  local x = ds.randn(4, 4):requires_grad_()
  local times = {}
  for round = 1, ROUNDS do
    local t = seconds()
    ds.scope(function()
      local y = x
      for _ = 1, OPS / (per_call or 1) do y = f(y) end
      y:sum():backward()
    end)
    times[round] = (seconds() - t) * 1e6 / (2 * OPS)
  end
  table.sort(times)
  return times[ROUNDS / 2], times[1]
end

for _, chain in ipairs(chains) do
  print(("%s %.3f %.3f"):format(chain[1], measure(chain[2], chain[3])))
end
