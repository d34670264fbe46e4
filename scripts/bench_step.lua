--- Our side of `make bench`: a process that trains on command, so that sides take turns.
--
--     dsrun scripts/bench_step.lua nano|char|gpt2 fp32|bf16 [folder=F] [batch=N] [stage=N]
--         [bucket=N] [offload=F] [writer=1] [commands=F]
--
-- Full steps through the engine: forward, backward, clipping, AdamW; batch: samples a rank;
-- bucket: elements; offload: the folder that keeps AdamW's state. For each line on standard input
-- (rank 0's), or of the named pipe `commands`, one on standard output:
--
--     SECONDS   trains that long, at least one step; on several ranks, so many steps
--               → median_ms min_ms steps loss
--     steps N   trains N steps                        → the same
--     memory    → peak_kB now_kB import_kB faults     (peak since the last `reset`)
--     count     gives cached memory back              → parameters, then for each rank
--                                                       live_bytes now_kB import_kB
--     reset     starts a new peak                     → ok
--     stream    reads all state from the disk and writes it back: an update without arithmetic
--                                                     → ms bytes
--     save      writes a checkpoint                   → ms
--     load      reads it                              → ms
--     around    3 steps; with writer=1, a save in the background and 2 steps
--               → median_ms of the 3, ms of the save and of each of the 2, its thread's CPU seconds
--     q         ends

local ds = require "ds"
local together = require "ds.together"
local seconds = require("ds.ffi").C.ds_seconds

--- A line of /proc/self/status, in kB.
local function status(key)
  local file = assert(io.open "/proc/self/status")
  local value = file:read("*a"):match(key .. ":%s*(%d+)")
  file:close()
  return tonumber(value)
end

local import_kB = status "VmRSS"
local GPT = require "models.gpt"

local configs = { -- as in scripts/peer_gpt.py
  nano = { n_layer = 4, n_head = 4, n_embd = 128, block_size = 64, vocab_size = 65, batch = 12 },
  char = { n_layer = 6, n_head = 6, n_embd = 384, block_size = 256, vocab_size = 65, batch = 16 },
  gpt2 = { n_layer = 12, n_head = 12, n_embd = 768, block_size = 256, vocab_size = 50257,
    batch = 4 },
}

local config, dtype, options = configs[arg[1]], arg[2], {}
for i = 3, #arg do
  local key, value = arg[i]:match "^(%w+)=(.*)$"
  options[key or ""] = value
end
if not config or (dtype ~= "fp32" and dtype ~= "bf16") or options[""] then
  error("usage: bench_step.lua nano|char|gpt2 fp32|bf16 [folder=F] [batch=N] [stage=N] [bucket=N] "
    .. "[offload=F]", 0)
end

local folder, batch = options.folder, tonumber(options.batch) or config.batch
config.batch = nil
local model = GPT(config)
local engine = ds.initialize {
  model = model,
  model_parameters = model:param_groups(0.1),
  config = {
    train_micro_batch_size_per_gpu = batch,
    gradient_clipping = 1.0,
    bf16 = { enabled = dtype == "bf16" },
    zero_optimization = { stage = tonumber(options.stage) or 0,
      reduce_bucket_size = tonumber(options.bucket),
      offload_optimizer = options.offload and { device = "nvme", nvme_path = options.offload } },
    checkpoint = { keep_last = 1, writer = { decoupled = options.writer == "1" } },
    optimizer = { type = "AdamW", params = { lr = 1e-3, betas = { 0.9, 0.95 } } },
  },
}

local x = ds.randint(0, config.vocab_size, batch, config.block_size):keep()
local y = ds.randint(0, config.vocab_size, batch, config.block_size):keep()

local function step()
  local loss = engine(x, y)
  engine:backward(loss)
  engine:step()
  return loss
end

local function train(duration, steps)
  local times, start = {}, seconds()
  local loss
  while #times < steps or seconds() - start < duration do
    local t = seconds()
    loss = step()
    times[#times + 1] = (seconds() - t) * 1e3
  end
  table.sort(times)
  local median = times[math.floor(#times / 2) + 1]
  return ("%.4f %.4f %d %.4f"):format(median, times[1], #times, loss:item())
end

--- Milliseconds that f() takes.
local function timed(f)
  local t = seconds()
  f()
  return ("%.3f"):format((seconds() - t) * 1e3)
end

local answers = {
  steps = function(n) return train(0, tonumber(n)) end,
  memory = function()
    local faults = ds.memory().page_faults
    return ("%d %d %d %d"):format(status "VmHWM", status "VmRSS", import_kB, faults)
  end,
  count = function()
    collectgarbage()
    collectgarbage()
    ds.empty_cache()
    local mine = ("%d %d %d"):format(ds.memory().live, status "VmRSS", import_kB)
    local numel = 0
    for _, p in ipairs(model:parameters()) do numel = numel + p:numel() end
    return numel .. " " .. table.concat(together.texts(mine), " ")
  end,
  reset = function()
    local file = assert(io.open("/proc/self/clear_refs", "w"))
    file:write "5"
    file:close()
    return "ok"
  end,
  stream = function()
    local before = engine.offload:counters()
    local ms = timed(function() engine.offload:stream(function() end) end)
    local after = engine.offload:counters()
    return ("%s %d"):format(ms, after.bytes_read + after.bytes_written - before.bytes_read
      - before.bytes_written)
  end,
  save = function()
    return timed(function() engine:save_checkpoint(folder, "bench") end)
  end,
  around = function()
    local plain = { tonumber(timed(step)), tonumber(timed(step)), tonumber(timed(step)) }
    table.sort(plain)
    local saved = timed(function() engine:save_checkpoint(folder, "bench") end)
    local background = engine.saving.background
    local one, two = timed(step), timed(step)
    engine:finish_checkpoint()
    local cpu = background:statistics().cpu_seconds
    return ("%.3f %s %s %s %.3f"):format(plain[2], saved, one, two, cpu)
  end,
  load = function()
    return timed(function() assert(engine:load_checkpoint(folder, "bench")) end)
  end,
}

local commands = ds.rank() == 0 and (options.commands and assert(io.open(options.commands))
  or io.stdin)

--- The next line that rank 0 reads, on every rank.
local function next_line()
  local line = commands and (commands:read() or "q") or ""
  return together.texts(line)[1]
end

for line in next_line do
  local word, rest = line:match "^(%S+)%s*(.*)"
  if word == "q" then break end
  local answer = answers[word]
  -- by time, ranks would make different numbers of steps
  local text = answer and answer(rest) or ds.world_size() == 1 and train(tonumber(word), 1)
    or train(0, tonumber(word))
  if ds.rank() == 0 then print(text) end
  io.flush()
end
