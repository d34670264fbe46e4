--- Trains a small GPT on the ranks there are, for scripts/gpu-check: whether they agree with one.
--
--     dsrun --num_gpus 2 scripts/gpu_ranks.lua [device=cuda] [dtype=fp32] [stage=N] [steps=N]
--
-- The batch is the same on any number of ranks, each of which takes its share. Rank 0 prints one
-- line of JSON: the mean loss of every step.

local ds = require "ds"
local json = require "ds.json"
local GPT = require "models.gpt"

local options = { device = "cuda", dtype = "fp32", stage = "0", steps = "8", batch = "8" }
for i = 1, #arg do
  local key, value = arg[i]:match "^(%w+)=(.*)$"
  options[key or ""] = value
end
local device, batch = options.device, tonumber(options.batch)
local world, rank = ds.world_size(), ds.rank()
local share, context, vocabulary = batch / world, 48, 96

ds.seed(5)
local model = GPT { n_layer = 2, n_head = 2, n_embd = 64, block_size = context,
  vocab_size = vocabulary }
local engine = ds.initialize {
  model = model,
  config = {
    train_micro_batch_size_per_gpu = share,
    gradient_clipping = 1.0,
    device = device ~= "cpu" and device or nil,
    bf16 = { enabled = options.dtype == "bf16" },
    zero_optimization = { stage = tonumber(options.stage), reduce_bucket_size = 20000,
      stage3_param_persistence_threshold = 100 },
    optimizer = { type = "AdamW", params = { lr = 1e-3 } },
    steps_per_print = 0,
  },
}

if rank == 0 then
  io.stderr:write "training\n" -- the one who ends a rank waits for it
end
ds.seed(9)
local losses = json.array {}
for i = 1, tonumber(options.steps) do
  local tokens = ds.randint(0, vocabulary, batch, context + 1, { device = "cpu" })
  local mine = tokens:narrow(1, rank * share + 1, share)
  local loss = engine(mine:narrow(2, 1, context):contiguous(),
    mine:narrow(2, 2, context):contiguous())
  engine:backward(loss)
  engine:step()
  local sum = ds.tensor({ loss:item() }, "f64")
  ds.all_reduce(sum)
  losses[i] = sum:item() / world
end
if rank == 0 then print(json.encode { losses = losses }) end
