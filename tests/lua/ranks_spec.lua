-- Training on several ranks: as one process does it, whatever the stage; checkpoints between
-- numbers of ranks; calls that not every rank makes. Every case starts dsrun, most of them with
-- tests/dist/train.lua.
--
-- A pairwise cover of the settings, at all stages; DS_SOAK=1 runs all of them.

local ffi = require "ffi"
local ds = require "ds"
local tensor = require "ds.tensor"
local ckpt = require "ds.ckpt"
local host = require "ds.host"
local helper = require "tests.lua.helper"

local script = host.base .. "/tests/dist/train.lua"
local soak = os.getenv "DS_SOAK" == "1"

local place = helper.place { limit = 180 }
local folder, read = place.folder, helper.read
local function write(...) return place:write(...) end
teardown(function() place:remove() end)

--- Runs Lua on several ranks.
-- @tparam[opt] string settings more of the environment, "NAME=value …"
-- @treturn number exit code
-- @treturn string what it printed
-- @treturn string its standard error
local function run(ranks, what, settings)
  local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
  return place:sh(("OMP_NUM_THREADS=1 %s $D %s %s"):format(settings or "", launch, what))
end

--- What tests/dist/train.lua prints.
local function train(ranks, words)
  local code, out, err = run(ranks, ("'%s' %s"):format(script, words))
  assert(code == 0, ("%d ranks, %s: code %d\n%s"):format(ranks, words, code, err))
  local result = { losses = {}, norms = {}, weights = {}, text = out }
  for loss, norm in out:gmatch "step (%S+) (%S+)" do
    table.insert(result.losses, tonumber(loss))
    table.insert(result.norms, tonumber(norm))
  end
  result.samples, result.eval = out:match "samples ([^\n]+)", tonumber(out:match "eval (%S+)")
  for hash in out:match("weights ([^\n]+)"):gmatch "%S+" do table.insert(result.weights, hash) end
  return result
end

local done = {}
local function once(ranks, words)
  local key = ranks .. " " .. words
  done[key] = done[key] or train(ranks, words)
  return done[key]
end

local function near(want, got, tolerance, what)
  assert.equal(#want, #got, what)
  for i = 1, #want do
    assert(math.abs(got[i] - want[i]) <= tolerance * math.abs(want[i]),
      ("%s: value %d is %.9g and should be %.9g"):format(what, i, got[i], want[i]))
  end
end

-- ---- the settings

local fine = { fp32 = 1e-5, bf16 = 2e-2, fp16 = 2e-2 }

local cases = {}
if soak then
  for _, ranks in ipairs { 2, 4 } do
    for _, model in ipairs { "gpt", "odd" } do
      for _, dtype in ipairs { "fp32", "bf16", "fp16" } do
        for _, gas in ipairs { 1, 3 } do
          for _, optimizer in ipairs { "SGD", "AdamW", "Lamb", "Muon", "LuaSGD" } do
            cases[#cases + 1] = { ranks, model, dtype, gas, optimizer }
          end
        end
      end
    end
  end
else
  cases = {
    { 2, "gpt", "fp32", 1, "AdamW" }, { 4, "odd", "fp32", 3, "AdamW" },
    { 2, "odd", "bf16", 1, "AdamW" }, { 4, "gpt", "fp16", 3, "AdamW" },
    { 2, "gpt", "bf16", 3, "SGD" }, { 4, "odd", "fp32", 1, "SGD" },
    { 2, "odd", "fp16", 3, "Lamb" }, { 4, "gpt", "fp32", 1, "Lamb" },
    { 4, "gpt", "bf16", 1, "Muon" }, { 2, "odd", "fp32", 3, "Muon" },
    { 2, "gpt", "fp32", 3, "LuaSGD" }, { 4, "odd", "bf16", 3, "LuaSGD" },
    { 2, "odd", "fp16", 1, "SGD" },
  }
end

describe("training on several ranks", function()
  for _, case in ipairs(cases) do
    local ranks, model, dtype, gas, optimizer = unpack(case)
    it(("%d ranks, %s, %s, accumulation %d, %s"):format(unpack(case)), function()
      local words = ("model=%s dtype=%s gas=%d optimizer=%s"):format(model, dtype, gas, optimizer)
      local alone = once(1, words)
      local zero = train(ranks, words .. " stage=0")
      local tolerance = math.max(fine[dtype], optimizer == "Muon" and 1e-4 or 0)
      near(alone.losses, zero.losses, tolerance, "stage 0 against one rank, loss")
      near({ alone.eval }, { zero.eval }, tolerance, "evaluation")
      assert.equal(alone.samples, zero.samples)
      assert.equal(ranks, #zero.weights)
      for _, hash in ipairs(zero.weights) do assert.equal(zero.weights[1], hash) end
      assert.is_true(zero.losses[20] < zero.losses[1])
      for stage = 1, 3 do
        local other, what = train(ranks, words .. " stage=" .. stage), "stage " .. stage
        if stage == 1 or gas == 1 then -- to the last bit
          assert.same(zero.losses, other.losses, what)
          assert.same(zero.norms, other.norms, what)
          assert.same(zero.weights, other.weights, what)
        else -- gradients are added in another order
          local wide = dtype ~= "fp32" and fine[dtype] or optimizer == "Muon" and 1e-4 or 1e-6
          near(zero.losses, other.losses, wide, what .. " against stage 0, loss")
          near({ zero.eval }, { other.eval }, wide, what .. " against stage 0, evaluation")
          assert.equal(ranks, #other.weights)
          for _, hash in ipairs(other.weights) do assert.equal(other.weights[1], hash) end
        end
        assert.equal(zero.samples, other.samples)
      end
    end)
  end
end)

--- All tensors of a checkpoint as text, by name.
local function tensors_of(dir)
  local saved, all = ckpt.load(dir), {}
  for part, names in pairs(saved.names) do
    for _, name in ipairs(names) do
      local dtype, shape = saved:info(part, name)
      local t = saved:read(part, name, ds.empty({ tensor.numel_of(shape) }, { dtype = dtype }),
        { from = 0 })
      all[part .. " " .. name] = ffi.string(t._c.data, t:numel() * t:element_size())
    end
  end
  saved:close()
  return all
end

describe("a checkpoint", function()
  local moves = soak and {} or {
    { 2, 1, 2, 1, "fp32", "AdamW" }, { 2, 2, 1, 0, "bf16", "AdamW" },
    { 1, 0, 4, 3, "bf16", "AdamW" }, { 4, 0, 2, 2, "fp32", "Lamb" },
    { 4, 3, 2, 0, "fp16", "AdamW" }, { 2, 3, 4, 1, "fp32", "Muon" },
    { 2, 3, 2, 3, "fp32", "AdamW" }, { 4, 2, 2, 3, "bf16", "Muon" },
  }
  if soak then -- dtypes and optimizers take turns
    local dtypes, optimizers = { "fp32", "bf16", "fp16" }, { "AdamW", "Lamb", "Muon" }
    for _, n in ipairs { 1, 2, 4 } do
      for from_stage = 0, 3 do
        for _, m in ipairs { 1, 2, 4 } do
          for to_stage = 0, 3 do
            local i = #moves
            moves[i + 1] = { n, from_stage, m, to_stage, dtypes[i % 3 + 1],
              optimizers[math.floor(i / 3) % 3 + 1] }
          end
        end
      end
    end
  end
  for _, move in ipairs(moves) do
    local n, from_stage, m, to_stage, dtype, optimizer = unpack(move)
    local name = "of %d ranks at stage %d goes on with %d at stage %d, %s, %s"
    it(name:format(unpack(move)), function()
      local words = ("model=odd dtype=%s optimizer=%s "):format(dtype, optimizer)
      local dir = ("%s/ckpt"):format(folder)
      os.execute("rm -rf '" .. dir .. "'")
      local whole = once(n, words .. "steps=12 stage=" .. from_stage)
      train(n, words .. ("steps=6 stage=%d save=%s"):format(from_stage, dir))
      os.execute("rm -rf '" .. dir .. "2'")
      local rest = train(m, words .. ("steps=12 stage=%d load=%s resave=%s2"):format(to_stage, dir,
        dir))
      assert.same(tensors_of(dir), tensors_of(dir .. "2"))
      local want = {}
      for i = 7, 12 do want[i - 6] = whole.losses[i] end
      if n == m then
        assert.same(want, rest.losses)
        assert.same(whole.weights, rest.weights)
      else
        near(want, rest.losses, math.max(fine[dtype], optimizer == "Muon" and 1e-4 or 0), "losses")
      end
    end)
  end

  it("that one rank can't read is refused on all of them, by the file's name", function()
    local dir = folder .. "/broken"
    train(2, "steps=2 stage=1 save=" .. dir)
    local path = dir .. "/global_step2/optim/rank-1.safetensors"
    local text = read(path)
    local file = assert(io.open(path, "r+"))
    file:seek("set", #text - 3)
    file:write "x"
    file:close()
    local code, _, err = run(2, ("'%s' steps=3 stage=1 load=%s"):format(script, dir))
    assert.equal(1, code)
    assert.truthy(err:find("optim/rank-1.safetensors' is damaged", 1, true), err)
  end)
end)

describe("calls that not every rank makes", function()
  local head = [[
    local ds = require "ds"
    local w = ds.nn.Parameter(ds.ones(4))
    local engine = ds.initialize { model = function(x) return (x * w):sum() end,
      model_parameters = { w }, config = { train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
        optimizer = { type = "SGD", params = { lr = 0.1 } } } }
    local function step() engine:backward(engine(ds.ones(4))) engine:step() end
    step()
  ]]
  for name, case in pairs {
    ["a save on rank 0 alone, the others train on"] = {
      'if ds.rank() == 0 then engine:save_checkpoint("x") end step()',
      "rank 0 in save_checkpoint(global_step1), rank 1 in engine:step() number 2" },
    ["a save on rank 0 alone, at the end"] = {
      'if ds.rank() == 0 then engine:save_checkpoint("x") end',
      "save_checkpoint(global_step1): all_gather: rank 1 has ended, and rank 0 waits for it" },
    ["tags that differ"] = { 'engine:save_checkpoint("x", "t" .. ds.rank())',
      "rank 0 in save_checkpoint(t0), rank 1 in save_checkpoint(t1)" },
    ["another model on one rank"] = { [[
      local p = ds.nn.Parameter(ds.ones(4 + ds.rank()))
      ds.initialize { model = function() return p:sum() end, model_parameters = { p },
        config = { train_micro_batch_size_per_gpu = 1,
        optimizer = { type = "SGD", params = { lr = 0.1 } } } }
      ]], "rank 0 has parameter 'param.0' f32 [4]; rank 1 has parameter 'param.0' f32 [5]" },
    ["weights that one rank changed"] = { [[
      engine.config.replica_check_interval = 1
      if ds.rank() == 1 then ds.no_grad(function() w:add_(1) end) end
      step()
      ]], "the weights of rank 1 are not those of rank 0" },
  } do
    it(name, function()
      local code, _, err = run(2, write("script.lua", head .. case[1]))
      assert.equal(1, code, err)
      assert.truthy(err:find(case[2], 1, true), err)
    end)
  end
end)

-- Each element of a gradient goes to its owner from all other ranks, and from there (or its weight,
-- from stage 1 on) to all others: 2 (N - 1) / N of them a rank; at stage 3 weights go to all others
-- in forward and in backward, which makes it 3 (N - 1) / N. What else a step sends is a word to
-- agree on where it is and one on what comes of it. What stays is weights and gradients, and of the
-- optimizer's vectors, three with low-precision weights, two without; of all, what is not sharded
-- whole, and else a share.
describe("a step", function()
  local text = [[
    local ds = require "ds"
    local sanitized = require "ds.host".compiler:find "sanitizers"
    local steps, ranks = 20, ds.world_size()
    local function live()
      jit.flush() -- compiled code keeps what it was compiled for
      collectgarbage() collectgarbage()
      return ds.memory().live
    end
    local function case(dtype, stage)
      local nothing = live()
      local layers = ds.nn.list(30, function() return ds.nn.Linear(64, 64, { bias = false }) end)
      local model = ds.nn.Sequential(unpack(layers))
      local engine = ds.initialize { model = model, config = {
        train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
        bf16 = { enabled = dtype == "bf16" }, optimizer = { type = "AdamW" },
        zero_optimization = { stage = stage, reduce_bucket_size = 4096,
          stage3_param_persistence_threshold = 0 } } }
      local elements = 0 -- all sizes are multiples of 16: nothing is padding
      for _, p in ipairs(model:parameters()) do elements = elements + p:numel() end
      local low = dtype == "bf16"
      local function share(from) return stage >= from and 1 / ranks or 1 end
      local wanted = (low and 2 or 4) * (share(3) + share(2)) + (low and 12 or 8) * share(1)
      local kept = (live() - nothing) / elements
      assert(kept >= wanted and kept < 1.1 * wanted,
        ("%s, stage %d: %g bytes a parameter"):format(dtype, stage, kept))
      local x = ds.randn(8, 64):keep()
      local function train(n)
        for _ = 1, n do
          engine:backward(engine(x):float():square():mean())
          engine:step()
        end
        return ds.comm_stats(), ds.memory().page_faults
      end
      local before, faults_before = train(100)
      local after, faults = train(steps)
      local bytes = ds.all_reduce(ds.tensor({ after.bytes - before.bytes }, "i64")):item()
      local passes = stage == 3 and 3 or 2
      local gradients = passes * (ranks - 1) * elements * (low and 2 or 4)
      local more = (tonumber(bytes) / steps - gradients) / (ranks * (ranks - 1))
      -- what forward used last is still there when backward begins
      local least = stage == 3 and -elements / 30 * (low and 2 or 4) / ranks or 0
      assert(more >= least and more <= 256,
        ("%s, stage %d: %g bytes more a pair of ranks"):format(dtype, stage, more))
      local calls, buckets = (after.collectives - before.collectives) / steps, 30
      assert(#engine.zero.buckets == buckets)
      local fewer = passes * buckets + 2 - calls
      assert(fewer == (stage == 3 and 1 or 0),
        ("%s, stage %d: %g calls"):format(dtype, stage, calls))
      local each = (faults - faults_before) / steps
      assert(sanitized or each <= 10, ("%s, stage %d: %g page faults"):format(dtype, stage, each))
      engine:destroy()
    end
    for _, dtype in ipairs { "fp32", "bf16" } do
      for stage = 0, 3 do case(dtype, stage) end
    end
    ds.barrier()
    if ds.rank() == 0 then print "as it should be" end]]
  for _, ranks in ipairs { 2, 4 } do
    it(("keeps and sends what it must, and faults no pages: %d ranks"):format(ranks), function()
      local code, out, err = run(ranks, write("counters.lua", text))
      assert.equal(0, code, err)
      assert.equal("as it should be\n", out)
    end)
  end
end)

it("DS_CHECK=comm has nothing to say about training", function()
  local words = "stage=1 gas=3 steps=4"
  local code, out, err = run(2, ("'%s' %s"):format(script, words), "DS_CHECK=comm")
  assert.equal(0, code, err)
  assert.equal(once(2, words).text, out)
end)

it("an overflow on one rank is skipped by all, which lower their loss scale alike", function()
  local code, out, err = run(2, write("overflow.lua", [[
    local ds = require "ds"
    local w = ds.nn.Parameter(ds.ones(4))
    local engine = ds.initialize { model = function(x) return (x * w):sum():float() end,
      model_parameters = { w }, config = { train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
        fp16 = { enabled = true, initial_scale_power = 5, loss_scale_window = 4 },
        zero_optimization = { stage = 1 }, optimizer = { type = "SGD", params = { lr = 0.1 } } } }
    local scales, steps = {}, "xxx.x.....x."
    for i = 1, #steps do
      local loss = engine(ds.ones(4))
      local mine = i % 2 == ds.rank() -- in turns
      engine:backward(mine and steps:sub(i, i) == "x" and loss * math.huge or loss)
      engine:step()
      scales[i] = engine:loss_scale()
    end
    local text = table.concat(scales, " ") .. ", " .. engine.skipped_steps .. " skipped"
    for _, other in ipairs(require("ds.together").texts(text)) do assert(other == text, other) end
    if ds.rank() == 0 then print(text) end]]))
  assert.equal(0, code, err)
  assert.equal("32 16 8 8 4 4 4 4 4 8 8 8, 5 skipped\n", out)
end)

it("a signal to one rank saves on all of them, at the same step, and ends the job", function()
  local dir = folder .. "/stopped"
  local code = run(2, ("'%s' steps=3 save=%s"):format(script, dir))
  assert.equal(0, code)
  local stopped, out = run(2, ("'%s' steps=20 load=%s stop_at=6"):format(script, dir))
  assert.equal(128 + 15, stopped)
  assert.is_nil(out:find("eval", 1, true))
  local after = train(2, "steps=8 load=" .. dir)
  assert.equal(2, #after.losses) -- 7 and 8
end)
