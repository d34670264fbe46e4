-- Trains a small model and prints "LOSS NORM" a step, and "weights SUM" at the end: the same on any
-- number of ranks and at any stage, as all have the same batch.
--
--     dsrun --num_gpus 2 --device cuda tests/cuda/ranks/train.lua stage=2 [device=cpu] [overlap=0]
--       [gas=2] [twice=1: two backwards a step] [plain=1: and one of the script's own]
--       [checkpoint=1] [dtype=bf16] [wire=fp16] [away=1: what checkpoints keep in host memory]
--       [offload=cpu, or a folder: the optimizer's state there]

local ds = require "ds"
local tensor = require "ds.tensor"
local nn = ds.nn

local opt = { stage = 0, overlap = 1, gas = 1, device = "cuda", steps = 4, dtype = "fp32" }
for _, word in ipairs(arg) do
  local key, value = word:match "^([%w_]+)=(.*)$"
  opt[key] = tonumber(value) or value
end

local Deep = nn.module "Deep"
function Deep:init()
  self.h = nn.list(6, function() return nn.Linear(17, 17) end)
  self.unused = nn.Linear(17, 5)
end
function Deep:forward(x)
  for _, layer in ipairs(self.h) do x = layer(x):tanh() end
  return x:float():square():mean()
end

local function on_device(t) return t:to(t.dtype, opt.device):keep() end

local model, x
ds.on("cpu", function()
  ds.seed(1)
  model = Deep()
  x = ds.randn(4, 17)
end)
if opt.away then require("ds.checkpointing_host").LEAST = 1 end
if opt.offload then require("ds.offload_host").BLOCK = 100 end
for _, p in ipairs(model:parameters()) do
  p.requires_grad = false
  tensor.repoint(p, p:to(p.dtype, opt.device))
  p.requires_grad = true
end
x = on_device(x)

local engine = ds.initialize { model = model, config = {
  train_micro_batch_size_per_gpu = 1, gradient_accumulation_steps = opt.gas, steps_per_print = 0,
  device = opt.device, bf16 = { enabled = opt.dtype == "bf16" }, gradient_clipping = 1,
  communication_data_type = opt.wire,
  activation_checkpointing = (opt.checkpoint or opt.away) and { enabled = true,
    number_checkpoints = opt.checkpoint and 3, cpu_checkpointing = opt.away == 1 } or nil,
  optimizer = { type = "AdamW", params = { lr = 1e-2 } },
  zero_optimization = { stage = opt.stage, overlap_comm = opt.overlap == 1,
    reduce_bucket_size = 700, allgather_bucket_size = 300,
    stage3_param_persistence_threshold = 20, stage3_prefetch_bucket_size = 1000,
    sub_group_size = opt.offload and 1024,
    offload_optimizer = opt.offload and { device = opt.offload == "cpu" and "cpu" or "nvme",
      nvme_path = opt.offload } },
} }
local zero = engine.zero

-- What is said at the end: how often something was begun while kernels ran.
local early, flying = 0, 0
local reduce_bucket = zero.reduce_bucket
function zero:reduce_bucket(b, out, work)
  if work and self.next then early = early + 1 end
  if self.flights then flying = math.max(flying, #self.flights) end
  return reduce_bucket(self, b, out, work)
end

local function backward(scale)
  local loss = engine(x * scale)
  engine:backward(loss)
  if opt.plain then (model(x * x) * 30):backward() end
  return loss
end

for _ = 1, opt.steps do
  local loss
  for micro = 1, opt.gas do
    loss = backward(micro)
    if opt.twice then loss = backward(2) end
    engine:step()
  end
  if ds.rank() == 0 then
    print(("%.7g %.7g"):format(loss:item(), engine:get_global_grad_norm()))
  end
end

local sum = 0
for _, p in ipairs(model:parameters()) do
  local whole = ds.zero.get_full(p)
  for _, v in ipairs(whole:to("f32", "cpu"):view(-1):tolist()) do sum = sum + math.abs(v) end
end
if ds.rank() == 0 then
  print(("weights %.7g"):format(sum))
  local stats = zero.sharded and zero.sharded.stats or {}
  print(("early %d flying %d prefetched %d"):format(early, flying, stats.prefetched or 0))
  local c = ds.cuda.counters()
  print(("registered %d exchanges %d"):format(c.registered, c.exchanges))
end
engine:destroy()
