--- What an engine does with whole batches: a step from a loader, the loss over a data set.

local scope = require "ds.scope"
local tensor = require "ds.tensor"
local data = require "ds.data"
local comm = require "ds.comm"
local together = require "ds.together"
local F = require "ds.functional"

local raise = require "ds.ffi".raise

local M = {}

--- One optimizer step: as many micro-batches as it takes from a loader.
-- @treturn number the mean loss
function M.train_batch(engine, loader)
  loader = loader or engine.training_dataloader
  if not loader then
    raise("train_batch: there is no loader; pass one, or training_data to ds.initialize")
  end
  repeat
    local loss = engine:forward(loader:next())
    engine:backward(loss)
  until engine:step()
  return engine.last_loss
end

--- The loss that the model gives a batch, whose tensors are released.
local function loss_of_batch(engine, batch)
  local loss = engine:forward(unpack(batch, 1, batch.n))
  if not tensor.is_tensor(loss) or loss:numel() ~= 1 then
    raise("evaluate: the model must return the loss of a batch, one element")
  end
  for i = 1, batch.n do
    if tensor.is_tensor(batch[i]) then
      scope.release(batch[i], "when evaluate() was done with it")
    end
  end
  return loss:item()
end

--- Where weights are gathered as the model runs, every rank runs it as often as the others: who has
-- fewer batches repeats the first sample for the rest.
local function run_along(engine, dataset, options, batches)
  if not (engine.zero and engine.zero.sharded) then return end
  local most = batches
  for _, n in ipairs(together.texts(("%d"):format(batches))) do most = math.max(most, n) end
  local first = data.loader(dataset, { batch_size = 1, shuffle = false, drop_last = false,
    collate_fn = options.collate_fn, rank = 0, world_size = 1, device = engine.device })
  for _ = batches + 1, most do
    loss_of_batch(engine, first:batches()())
  end
end

--- The mean loss over exactly all samples of a data set. The model returns the mean loss of a
-- batch.
-- @tparam table dataset size() and get(i)
-- @tparam[opt] table options { batch_size, collate_fn }
function M.evaluate(engine, dataset, options)
  options = F.options_of("evaluate", options, { batch_size = true, collate_fn = true })
  local loader = data.loader(dataset, {
    batch_size = options.batch_size or engine.config.train_micro_batch_size_per_gpu,
    shuffle = false, drop_last = false, collate_fn = options.collate_fn,
    rank = comm.rank(), world_size = comm.world_size(), device = engine.device,
  })
  together.meet("engine:evaluate()")
  local training, total, samples, batches = engine.training, 0, 0, 0
  engine:eval()
  local ok, message = pcall(function()
    for batch in loader:batches() do
      total = total + loss_of_batch(engine, batch) * batch.samples
      samples, batches = samples + batch.samples, batches + 1
    end
    run_along(engine, dataset, options, batches)
  end)
  engine:train(training)
  if not ok then error(message, 0) end
  local sums = scope.no_grad(function()
    local sum = tensor.tensor({ total, samples }, { dtype = "f64", device = "cpu" })
    return comm.all_reduce(sum):tolist()
  end)
  return sums[1] / sums[2]
end

return M
