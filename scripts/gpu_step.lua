--- Our side of scripts/gpu-check: a process that trains on command, so that sides take turns.
--
--     dsrun scripts/gpu_step.lua MODEL [dtype=bf16] [batch=N] [device=cuda] [graph=1]
--         [checkpoint=1] [init=F] [data=F]
--
-- MODEL is one of those below, as in scripts/gpu_peer.py. Full steps through the engine: forward,
-- backward, clipping, AdamW, on random tokens that stay on the device. init: a file to write the
-- first weights to; data: a file of tokens, "x" [steps x B x T + 1], for `curve`. For each line on
-- standard input one of JSON on standard output:
--
--     warm N     trains N steps                      → loss
--     steps N    trains N steps, waits once at the end → ms a step, and what a step asked of the
--                device: launches, waits, takes; peak and cached bytes, host_ms
--     curve N    trains on the first N batches of the file → losses
--     rest       gives cached memory back            → cached
--     q          ends

local ds = require "ds"
local json = require "ds.json"
local border = require "ds.ffi"

local C, seconds = border.C, border.C.ds_seconds

local function gpt(layers, heads, width, context, vocabulary)
  return { kind = "gpt", context = context, config = { n_layer = layers, n_head = heads,
    n_embd = width, block_size = context, vocab_size = vocabulary, activation = "gelu_tanh" } }
end

local function llama(layers, heads, groups, width, ffn, context, vocabulary)
  return { kind = "llama", context = context, config = { n_layer = layers, n_head = heads,
    n_kv_head = groups, n_embd = width, n_ffn = ffn, vocab_size = vocabulary } }
end

local models = { -- as in scripts/gpu_peer.py
  ["gpt2-124M"] = gpt(12, 12, 768, 1024, 50304),
  ["gpt2-350M"] = gpt(24, 16, 1024, 1024, 50304),
  ["gpt2-1558M"] = gpt(48, 25, 1600, 1024, 50304),
  ["llama-8B-4-layers"] = llama(4, 32, 8, 4096, 14336, 8192, 128256),
  ["tiny"] = gpt(2, 2, 32, 32, 96),
  ["tiny-llama"] = llama(2, 4, 2, 32, 48, 32, 96),
}

local options = { dtype = "bf16", device = "cuda", batch = "1" }
for i = 2, #arg do
  local key, value = arg[i]:match "^(%w+)=(.*)$"
  options[key or ""] = value
end
local model_of = models[arg[1] or ""]
if not model_of or options[""] then
  error("usage: gpu_step.lua MODEL [dtype=bf16] [batch=N] [device=cuda] [graph=1] [checkpoint=1] "
    .. "[init=F] [data=F]", 0)
end

local device, batch = options.device, tonumber(options.batch)
local cuda = device == "cuda" and 1 or 0

ds.seed(1)
local model = ds.on(device, function()
  return require("models." .. model_of.kind)(model_of.config)
end)
if options.init then
  local weights = {}
  for _, e in ipairs(model:named_parameters()) do weights[e.name] = e.parameter:to "cpu" end
  ds.save(weights, options.init)
end

local engine = ds.initialize {
  model = model,
  model_parameters = model:param_groups(0.1),
  config = {
    train_micro_batch_size_per_gpu = batch,
    gradient_clipping = 1.0,
    device = device ~= "cpu" and device or nil,
    cuda_graph = options.graph == "1" or nil,
    bf16 = { enabled = options.dtype == "bf16" },
    activation_checkpointing = options.checkpoint == "1" and { enabled = true } or nil,
    optimizer = { type = "AdamW", params = { lr = 1e-4, betas = { 0.9, 0.95 } } },
    steps_per_print = 0,
  },
}

-- A few batches, never one: weights would learn it by heart, and zeros are faster than data.
local batches = {}
for i = 1, 4 do
  local tokens = ds.randint(0, model_of.config.vocab_size, batch, model_of.context + 1,
    { device = "cpu" })
  batches[i] = {
    tokens:narrow(2, 1, model_of.context):contiguous():to("i32", device):keep(),
    tokens:narrow(2, 2, model_of.context):contiguous():to("i32", device):keep(),
  }
end

local count = 0
local function step()
  count = count + 1
  local pair = batches[count % #batches + 1]
  local loss = engine(pair[1], pair[2])
  engine:backward(loss)
  engine:step()
  return loss
end

local function wait()
  if C.ds_device_synchronize(cuda) < 0 then border.check(-1) end
end

local function train(n)
  local loss
  for _ = 1, n do loss = step() end
  wait()
  return loss:item()
end

--- What the device was asked for since the start.
local function counters()
  local c = C.ds_device_count(cuda)
  return { launches = tonumber(c.launches), waits = tonumber(c.waits), takes = tonumber(c.takes) }
end

local answers = {}

function answers.warm(n) return { loss = train(tonumber(n)) } end

function answers.steps(n)
  n = tonumber(n)
  wait()
  C.ds_memory_reset_peak(cuda)
  local before, start, loss = counters(), seconds(), nil
  for _ = 1, n do loss = step() end
  local after = counters()
  wait()
  local elapsed = seconds() - start
  -- The host alone: a step that it queues while the device is idle.
  local host = math.huge
  for _ = 1, 3 do
    local t = seconds()
    step()
    host = math.min(host, seconds() - t)
    wait()
  end
  local memory = C.ds_memory_of(cuda)
  return { ms = elapsed * 1e3 / n, steps = n, loss = loss:item(), host_ms = host * 1e3,
    launches = (after.launches - before.launches) / n, waits = (after.waits - before.waits) / n,
    takes = (after.takes - before.takes) / n, peak = tonumber(memory.peak),
    cached = tonumber(memory.live + memory.cached),
    scratch = tonumber(C.ds_device_count(cuda).scratch) }
end

function answers.curve(n)
  local data = ds.load(options.data).x -- [steps x B x T + 1]
  local losses, T = json.array {}, data:size(3) - 1
  for i = 1, tonumber(n) do
    local tokens = data:select(1, i)
    local loss = engine(tokens:narrow(2, 1, T):contiguous():to("i32", device),
      tokens:narrow(2, 2, T):contiguous():to("i32", device))
    engine:backward(loss)
    losses[i] = loss:item()
    engine:step()
  end
  return { losses = losses }
end

function answers.rest()
  collectgarbage()
  collectgarbage()
  wait()
  ds.empty_cache(device)
  return { cached = tonumber(C.ds_memory_of(cuda).cached) }
end

local parameters = 0
for _, p in ipairs(model:parameters()) do parameters = parameters + p:numel() end
print(json.encode { ready = true, parameters = parameters })
io.flush()
for line in io.lines() do
  local word, rest = line:match "^(%S+)%s*(.*)"
  if word == "q" then break end
  print(json.encode(answers[word](rest)))
  io.flush()
end
