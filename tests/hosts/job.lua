--- A small training job on several hosts, to which something may happen.
--
--     dsrun --hostfile FILE job.lua ranks=DIR steps=20 pause=0.1 save=DIR rank=3 at=5 how=kill
--
-- Each rank writes DIR/RANK: "HOST PID", its process there. Rank 0 prints
-- "step N LOSS" for each of the steps, which are pause seconds apart. Before step `at` the rank
-- does what `how` says; with once=1, before a restart only. With save=DIR every step is saved, and
-- a run goes on from the last one. Further: batch=12 samples a step on all ranks together, gas=1.

local ffi = require "ffi"
local ds = require "ds"
local nn, F = ds.nn, ds.F

local opt = { steps = 20, pause = 0, batch = 12, gas = 1, rank = -1, at = -1, how = "nothing" }
for _, word in ipairs(arg) do
  local key, value = word:match "^([%w_]+)=(.*)$"
  if value ~= "" then opt[key] = tonumber(value) or value end
end

ffi.cdef "int usleep(unsigned); int raise(int);"

local function sleep(seconds)
  for _ = 1, seconds * 100 do ffi.C.usleep(10000) end
end

local function write(path, text)
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
end

if opt.ranks then
  local host = io.open "/proc/sys/kernel/hostname":read "*l"
  local pid = io.open "/proc/self/stat":read "*n"
  write(("%s/%d.new"):format(opt.ranks, ds.rank()), ("%s %d\n"):format(host, pid))
  os.rename(("%s/%d.new"):format(opt.ranks, ds.rank()), ("%s/%d"):format(opt.ranks, ds.rank()))
end

-- ---- a model and data that are the same on any number of ranks

local Net = nn.module "Net"
function Net:init()
  self.up = nn.Linear(6, 32)
  self.down = nn.Linear(32, 1)
end
function Net:forward(x, y) return F.mse_loss(self.down(self.up(x):tanh()), y) end

local data = {}
function data.size() return 60 end
function data.get(_, i)
  local x, y = {}, 0
  for k = 1, 6 do
    x[k] = math.sin(i * k + k * k)
    y = y + x[k] * (k % 3 - 1)
  end
  return ds.tensor(x), ds.tensor { math.sin(y) }
end

ds.seed(3)
local engine, _, loader = ds.initialize {
  model = Net(), training_data = data,
  config = {
    train_batch_size = opt.batch, gradient_accumulation_steps = opt.gas,
    seed = 5, steps_per_print = 0,
    zero_optimization = { stage = 1 },
    optimizer = { type = "AdamW", params = { lr = 2e-2 } },
  },
}

-- ---- what happens

local ways = {
  nothing = function() end,
  raise = function()
    local function deep() error "this rank has a problem" end
    deep()
  end,
  exit = function() os.exit(3) end,
  crash = function() ffi.C.raise(11) end,
  kill = function() ffi.C.raise(9) end,
  stop = function() ffi.C.raise(19) end,
  sleep = function() sleep(100) end,
  leave = function() os.exit(0) end,
}

local restarts = (rawget(ds, "restart_count")
  or function() return tonumber(os.getenv "DSRUN_RESTARTS") or 0 end)()
if opt.save then
  local path = engine:load_checkpoint(opt.save)
  if path and ds.rank() == 0 then
    print(("resumed after step %d, restart %d, %d ranks"):format(engine.global_steps, restarts,
      ds.world_size()))
  end
end

while engine.global_steps < opt.steps do
  local step = engine.global_steps + 1
  if opt.at == step and opt.rank == ds.rank() and not (opt.once and restarts > 0) then
    if opt.ranks then write(opt.ranks .. "/event", opt.how) end
    ways[opt.how]()
  end
  engine:train_batch(loader)
  if ds.rank() == 0 then
    print(("step %d %.9g"):format(step, engine:get_loss()))
    io.stdout:flush()
  end
  if opt.save then engine:save_checkpoint(opt.save) end
  sleep(opt.pause)
end
if ds.rank() == 0 then print "done" end
