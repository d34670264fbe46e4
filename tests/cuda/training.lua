-- training.lua - what specs that train share: engines of one seed, the same batches, what came of
-- it.

local ds = require "ds"
local assert = require "luassert"

local M = {}

--- A function(device, config, model) that makes an engine on a device, from the same seed.
-- @tparam Module class of the model, where none is given
function M.maker(class)
  return function(device, config, model)
    local c = { train_micro_batch_size_per_gpu = 4, steps_per_print = 0, gradient_clipping = 0.5,
      device = device, optimizer = { type = "AdamW", params = { lr = 0.05, weight_decay = 0.1 } } }
    for key, value in pairs(config or {}) do c[key] = value end
    return ds.initialize { model = model or ds.on("cpu", function()
      ds.seed(5)
      return class()
    end), config = c }
  end
end

--- Batches on the CPU: { x [rows x width], y [rows x 3] }…
function M.batches(n, rows, width)
  ds.seed(9)
  local out = {}
  for i = 1, n do
    out[i] = { ds.randn(rows or 4, width or 5, { device = "cpu" }):keep(),
      ds.randn(rows or 4, 3, { device = "cpu" }):keep() }
  end
  return out
end

--- Trains on a list of batches. @treturn table the losses
function M.train(engine, list)
  local losses = {}
  for i, b in ipairs(list) do
    losses[i] = engine(b[1], b[2])
    engine:backward(losses[i])
    engine:step()
  end
  for i, loss in ipairs(losses) do losses[i] = loss:item() end
  return losses
end

function M.weights(engine)
  local out = {}
  for _, e in ipairs(engine.named) do
    out[#out + 1] = e.parameter:to("f32"):to("cpu"):reshape(-1):tolist()
  end
  return out
end

function M.near(expected, got, tolerance, what)
  assert.equal(#expected, #got, what)
  for i, e in ipairs(expected) do
    if type(e) == "table" then
      M.near(e, got[i], tolerance, what)
    else
      assert.is_near(e, got[i], tolerance * math.max(1, math.abs(e)), what)
    end
  end
end

return M
