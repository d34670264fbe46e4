--- A kernel of one's own in training: a small network whose outputs pass through softcap. First its
-- gradient is checked against finite differences, then it learns.
--
--     make -C models/custom_kernel && dsrun models/custom_kernel/train.lua
--     dsrun --num_gpus 2 models/custom_kernel/train.lua --stage 3
--     make -C models/custom_kernel softcap_cuda.so
--     dsrun models/custom_kernel/train.lua --device cuda

local ds = require "ds"
local nn, F = ds.nn, ds.F

local opt = ds.cli { "Train with a kernel out of a shared library.",
  { "libraries", "", "folder of softcap.so and softcap_cuda.so (default: beside this script)" },
  { "device", "cpu", "cpu or cuda" },
  { "steps", 200, "optimizer steps" },
  { "stage", 0, "ZeRO stage" },
}

local softcap = require "models.custom_kernel.softcap"(opt.device,
  opt.libraries ~= "" and opt.libraries or nil)

if opt.device == "cpu" then -- finite differences want f64, which GPUs' kernels do not take
  ds.testing.gradcheck(function(x) return softcap(x, 2) end, { ds.randn(3, 5) * 4 })
end

local Net = nn.module "Net"
function Net:init()
  self.up, self.down = nn.Linear(2, 64), nn.Linear(64, 2)
end
function Net:forward(x, y)
  return F.cross_entropy(softcap(self.down(self.up(x):tanh()), 10), y)
end

local engine = ds.initialize {
  model = Net(),
  config = {
    train_micro_batch_size_per_gpu = 64,
    optimizer = { type = "AdamW", params = { lr = 1e-2 } },
    zero_optimization = { stage = opt.stage, stage3_param_persistence_threshold = 0 },
    device = opt.device ~= "cpu" and opt.device or nil,
    steps_per_print = 0,
  },
}

-- which points are within the unit circle's radius
local x = ds.randn(64, 2, { device = "cpu" })
local y = (x * x):sum(-1):lt(1):to("i64"):keep()
local first, last
for _ = 1, opt.steps do
  local loss = engine(x, y)
  engine:backward(loss)
  engine:step()
  last = loss:item()
  first = first or last
end
if ds.rank() == 0 then print(("loss %.4f, then %.4f"):format(first, last)) end
