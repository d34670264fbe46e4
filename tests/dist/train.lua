--- Trains a small model on any number of ranks and prints what must not depend on that number.
--
--     dsrun tests/dist/train.lua stage=1 dtype=bf16 gas=3 optimizer=AdamW model=odd steps=20
--
-- Further: save=DIR (after the last step), load=DIR (before the first), resave=DIR (what was
-- loaded, before the first), every=N: save after every N steps, two are kept; writer=1: in the
-- background; pids=DIR: each rank's process in DIR/RANK; batch=24 samples a step on all ranks
-- together, stop_at=N: the last rank sends itself SIGTERM before that step, clip=1, bucket=N
-- elements, small=N: parameters with fewer are not split at stage 3, prefetch=N and reuse=N
-- elements, init=1: built by ds.zero.init, offload=DIR: the optimizer's state on a disk, in blocks
-- of 2048 elements. On a GPU (--device cuda): weights=host: in page-locked memory of the host,
-- weights=plain: in other memory; state=host: the optimizer's. recompute=1: activations.
--
-- Rank 0 prints "step LOSS NORM" for each step, then "samples COUNTS" (how often each was handed to
-- any rank in training), "eval LOSS", and "weights HASH HASH …", one a rank.

local ffi = require "ffi"
local ds = require "ds"
local GPT = require "models.gpt"
local together = require "ds.together"
local nn, F = ds.nn, ds.F

local opt = { stage = 0, dtype = "fp32", gas = 1, optimizer = "AdamW", model = "gpt", steps = 20,
  batch = 24, clip = 1, bucket = 3000, small = 30 }
for _, word in ipairs(arg) do
  local key, value = word:match "^([%w_]+)=(.*)$"
  opt[key] = tonumber(value) or value
end

-- ---- models

--- Tied, frozen and unused parameters, tiny ones, and a buffer.
local Odd = nn.module "Odd"
function Odd:init()
  self.embed = nn.Embedding(32, 24)
  self.frozen = nn.Linear(24, 24)
  for _, p in ipairs(self.frozen:parameters()) do p.requires_grad = false end
  self.unused = nn.Linear(24, 7)
  self.scale = nn.Parameter(ds.ones(1))
  self.shift = nn.Parameter(ds.zeros(3))
  self.up = nn.Linear(24, 50, { bias = false })
  self.down = nn.Linear(50, 24)
  self.norm = nn.LayerNorm(24)
  self.seen = ds.arange(5):keep()
end
function Odd:forward(x, y)
  local h = self.embed(x)
  h = h + self.down(F.silu(self.up(self.frozen(h)))) * self.scale
  h = self.norm(h) + self.shift:sum()
  return F.linear_cross_entropy(h, self.embed.weight, y)
end

-- ---- data: 40 samples, fewer than two global batches, so that epochs end in short ones

local data, handed = {}, {}
function data.size() return 40 end
function data.get(_, i)
  local ids = {}
  for k = 1, 9 do ids[k] = (i * 7 + k * k + i * k) % 32 end
  handed[#handed + 1] = i
  return ds.tensor({ unpack(ids, 1, 8) }, "i64"), ds.tensor({ unpack(ids, 2, 9) }, "i64")
end

-- ---- an optimizer in Lua

ds.optimizer("LuaSGD", {
  granularity = "flat", state = { "m" }, defaults = { lr = 1e-2, momentum = 0.9 },
  step = function(p, g, s, h)
    s.m:mul_(h.momentum):add_(g)
    p:add_(s.m, -h.lr)
  end,
})

local rates = { SGD = 1e-1, LuaSGD = 1e-2, Lamb = 1e-2, Muon = 1e-2 }

ds.seed(7 + ds.rank()) -- rank 0's weights are sent to all
local function build()
  return opt.model == "odd" and Odd()
    or GPT { n_layer = 2, n_head = 2, n_embd = 16, block_size = 8, vocab_size = 32 }
end
local model = opt.init and ds.zero.init(build) or build()
local groups = { { params = {}, weight_decay = 0.1 }, { params = {}, weight_decay = 0 } }
for _, e in ipairs(model:named_parameters()) do
  table.insert(groups[e.parameter:dim() > 1 and 1 or 2].params, e.parameter)
end
if opt.optimizer:find "SGD" then
  for _, g in ipairs(groups) do g.weight_decay = nil end
end

local engine, _, loader = ds.initialize {
  model = model, model_parameters = groups, training_data = data,
  config = {
    train_batch_size = opt.batch, gradient_accumulation_steps = opt.gas,
    gradient_clipping = opt.clip, steps_per_print = 0, seed = 11, replica_check_interval = 5,
    bf16 = { enabled = opt.dtype == "bf16" },
    checkpoint = { keep_last = opt.every and 2 or 0, writer = { decoupled = opt.writer == 1 } },
    fp16 = opt.dtype == "fp16" and { enabled = true, initial_scale_power = 8 } or nil,
    zero_optimization = { stage = opt.stage, reduce_bucket_size = opt.bucket,
      stage3_param_persistence_threshold = opt.small, stage3_prefetch_bucket_size = opt.prefetch,
      stage3_max_reuse_distance = opt.reuse,
      sub_group_size = opt.offload and 2048 or nil,
      offload_param = opt.weights and { device = "cpu", pin_memory = opt.weights == "host" } or nil,
      offload_optimizer = opt.offload and { device = "nvme", nvme_path = opt.offload }
        or opt.state and { device = "cpu" } or nil },
    activation_checkpointing = { enabled = opt.recompute == 1 },
    optimizer = { type = opt.optimizer, params = { lr = rates[opt.optimizer] or 1e-2 } },
    scheduler = { type = "WarmupDecayLR", params = { total_num_steps = 60, warmup_num_steps = 4,
      warmup_max_lr = rates[opt.optimizer] or 1e-2 } },
  },
}
if opt.load then assert(engine:load_checkpoint(opt.load) or opt.every) end
if opt.resave then engine:save_checkpoint(opt.resave) end

if opt.pids then
  local file = assert(io.open(opt.pids .. "/" .. ds.rank(), "w"))
  file:write(io.open("/proc/self/stat"):read "*n", "\n")
  file:close()
end

local function say(...)
  if ds.rank() == 0 then print((...):format(select(2, ...))) end
end

while engine.global_steps < opt.steps do
  if opt.stop_at == engine.global_steps + 1 and ds.rank() == ds.world_size() - 1 then
    ffi.cdef "int raise(int);"
    ffi.C.raise(15)
  end
  engine:train_batch(loader)
  say("step %.9g %.9g", engine:get_loss(), engine:get_global_grad_norm())
  if opt.every and engine.global_steps % opt.every == 0 then
    engine:save_checkpoint(opt.save, nil, { loss = engine:get_loss() })
  end
end
if opt.save then engine:save_checkpoint(opt.save) end

local counts = {}
for i = 1, data.size() do counts[i] = 0 end
for number in table.concat(together.texts(table.concat(handed, " ")), " "):gmatch "%d+" do
  counts[tonumber(number)] = counts[tonumber(number)] + 1
end
say("samples %s", table.concat(counts, " "))
say("eval %.9g", engine:evaluate(data, { batch_size = 3 }))

local hash, C, words = ffi.new("char[17]"), require("ds.ffi").C, {}
for i, e in ipairs(model:named_parameters()) do
  ds.zero.gathered(e.parameter, function()
    local t = e.parameter:detach():contiguous():to "cpu"
    C.ds_hash(hash, t._c.data, t:numel() * t:element_size())
  end)
  words[i] = ffi.string(hash)
end
local all = table.concat(words)
C.ds_hash(hash, all, #all)
say("weights %s", table.concat(together.texts(ffi.string(hash)), " "))
