-- Registered memory comes and goes: with an engine, with the cache, and where there is none left.

local ds = require "ds"
local tensor = require "ds.tensor"
local nn = ds.nn

local function registered() return ds.cuda.counters().registered end

--- Bytes of a tensor for which there is room only where registered memory (8 MiB) is given back.
local function much()
  return tonumber(os.getenv "DS_SIMT_MEMORY") - ds.cuda.counters().scratch - 6 * 2 ^ 20
end

local function use_engine()
  local model = ds.on("cuda", function() return nn.Linear(33, 7) end)
  local engine = ds.initialize { model = model, config = { train_micro_batch_size_per_gpu = 1,
    steps_per_print = 0, device = "cuda", optimizer = { type = "AdamW", params = { lr = 1e-2 } },
    zero_optimization = { stage = 1 } } }
  engine:backward(engine(ds.ones(2, 33, { device = "cuda" })):float():square():mean())
  engine:step()
  assert(registered() > 0 and ds.cuda.memory_reserved() >= registered())
  engine:destroy()
end

local function forget()
  ds.on("cpu", function() nn.Linear(1, 1)(ds.ones(1, 1)) end) -- the model that ran last is kept
  jit.flush()
  for _ = 1, 3 do collectgarbage() end
end

for _, way in ipairs { "asked", "needed" } do
  coroutine.wrap(ds.scope)(use_engine) -- whose stack nobody looks at afterwards
  forget()
  assert(registered() > 0, "it is kept for the next engine")
  if way == "asked" then
    ds.cuda.empty_cache()
  else
    tensor.new({ math.floor(much() / 4) }, "f32", "cuda")
  end
  assert(registered() == 0, way)
end
ds.all_reduce(ds.ones(3, { device = "cuda" }))
if ds.rank() == 0 then print "well" end
