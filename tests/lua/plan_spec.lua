-- `dsrun plan` against what the same script's ranks count when they train, and its arithmetic
-- against what can be counted by hand.

local host = require "ds.host"
local json = require "ds.json"
local helper = require "tests.lua.helper"

local has = helper.has
local place = helper.place { limit = 120 }
local function sh(command) return place:sh(command) end
teardown(function() place:remove() end)

-- A GPT of several buckets; `ds.json` is written for each case. As a run it prints what the rank
-- counts that has most, in its third step.
place:write("gpt.lua", ([[
package.path = %q .. "/?/init.lua;" .. package.path
local ds = require "ds"
local GPT = require "models.gpt"
local C = require "ds.ffi".C
local opt = ds.cli { "some steps", { "deepspeed_config", "ds.json", "" },
  { "checkpoint", false, "" }, { "steps", 3, "" } }
local model = GPT { n_layer = 4, n_head = 4, n_embd = 64, block_size = 64, vocab_size = 200 }
for _, block in ipairs(opt.checkpoint and model.h or {}) do
  local forward = block.forward
  function block.forward(self, ...)
    return ds.checkpoint(function(...) return forward(self, ...) end, ...)
  end
end
local engine = ds.initialize {
  args = opt, model = model, model_parameters = model:param_groups(0.1) }
local start = ds.memory().peak
local x, y = ds.randint(0, 200, 4, 64):keep(), ds.randint(0, 200, 4, 64):keep()
local before
for _ = 1, opt.steps do
  collectgarbage() collectgarbage()
  C.ds_memory_reset_peak(0)
  before = ds.comm_stats()
  repeat
    local loss = engine(x, y)
    engine:backward(loss)
    loss:item()
  until engine:step()
end
local after, memory = ds.comm_stats(), ds.memory()
local most = ds.all_reduce(ds.tensor({ memory.live, memory.peak, start,
  after.bytes - before.bytes, after.collectives - before.collectives }, "f64"), "max"):tolist()
if ds.rank() == 0 then print(unpack(most)) end]]):format(host.base))

local function configure(settings)
  settings.train_micro_batch_size_per_gpu = 4
  settings.steps_per_print = 0
  settings.optimizer = settings.optimizer or { type = "AdamW", params = { lr = 1e-3 } }
  place:write("ds.json", json.encode(settings))
end

--- What a run counts, and the plan for it.
local function both(ranks, words)
  local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
  local code, out, err = sh(("OMP_NUM_THREADS=1 $D -q %s gpt.lua %s"):format(launch, words or ""))
  assert(code == 0, err)
  local counted, i = {}, 0
  local keys = { "live", "peak", "start", "sent", "collectives" }
  for number in out:gmatch "%d+" do
    i = i + 1
    counted[keys[i]] = tonumber(number)
  end
  code, out, err = sh(("$D plan --num_gpus %d --json gpt.lua %s"):format(ranks, words or ""))
  assert(code == 0, err)
  return counted, json.decode(out)
end

local function configured(p)
  for _, row in ipairs(p.stages) do
    if row.configured then return row end
  end
end

local function kept(row) return row.weights + row.gradients + row.optimizer + row.other end

--- Asserts that `planned` is `counted` up to a share.
local function within(share, planned, counted, what)
  assert(math.abs(planned - counted) <= share * counted,
    ("%s: planned %g, counted %g"):format(what, planned, counted))
end

local function zero(stage)
  return { stage = stage, reduce_bucket_size = 60000, stage3_param_persistence_threshold = 1000 }
end

describe("a plan agrees with what a run counts", function()
  for _, case in ipairs {
    { 1, 0, "fp32" }, { 1, 0, "bf16" }, { 2, 0, "bf16" }, { 2, 1, "fp32" }, { 2, 1, "bf16" },
    { 2, 2, "fp32", 3 }, { 2, 2, "bf16" }, { 2, 3, "fp32" }, { 2, 3, "bf16", 2 },
  } do
    local ranks, stage, dtype, gas = case[1], case[2], case[3], case[4] or 1
    it(("%d ranks, stage %d, %s, accumulation %d"):format(ranks, stage, dtype, gas), function()
      configure { zero_optimization = zero(stage), bf16 = { enabled = dtype == "bf16" },
        gradient_accumulation_steps = gas }
      local counted, p = both(ranks)
      local row = configured(p)
      assert.equal(stage, row.stage)
      within(0.01, kept(row), counted.live, "live")
      within(stage < 2 and 0.01 or 0.06, row.plain.total, counted.peak, "peak")
      assert(row.plain.total >= 0.999 * counted.peak, "more was counted than planned")
      within(0.05, math.max(kept(row), row.start), counted.start, "peak of ds.initialize")
      -- stage 3 is planned to gather twice a micro-batch, also what only forward reads, or what is
      -- whole when backward begins: in so small a model that is something
      within(stage < 3 and 0.02 or 0.12, row.sent, counted.sent, "bytes sent")
      within(stage < 3 and 0 or 0.12, row.collectives, counted.collectives, "collectives")
      assert(row.sent >= 0.98 * counted.sent, "more was sent than planned")
    end)
  end

  it("with each block a ds.checkpoint, which the plan tries by itself", function()
    configure { zero_optimization = zero(1) }
    local counted, p = both(1, "--checkpoint")
    assert.is_true(p.checkpointed_by_script)
    within(0.01, configured(p).checkpointed.total, counted.peak, "peak")
    local _, without = both(1)
    assert.is_false(without.checkpointed_by_script)
    assert.same({ "h.0", "h.1", "h.2", "h.3" }, { unpack(without.blocks) })
    for _, name in ipairs { "plain", "checkpointed" } do
      within(0.01, configured(without)[name].total, configured(p)[name].total, name)
    end
    configure { zero_optimization = zero(1), activation_checkpointing = { enabled = true } }
    counted, p = both(1)
    assert.is_true(p.checkpointed_by_script)
    within(0.01, configured(p).checkpointed.total, counted.peak, "peak, by the config")
    within(0.01, configured(without).checkpointed.total, counted.peak, "and as was tried")
    assert(without.checkpointed.bytes < 0.7 * without.activations.bytes)
    assert(without.checkpointed.backward_flops > 1.3 * without.activations.backward_flops)
  end)

  for _, name in ipairs { "Muon", "Lamb", "SGD" } do
    it("with " .. name, function()
      configure { zero_optimization = zero(1), bf16 = { enabled = name == "Lamb" },
        optimizer = { type = name, params = { lr = 1e-3 } } }
      local counted, p = both(2)
      local row = configured(p)
      within(0.02, kept(row), counted.live, "live")
      within(0.02, row.plain.total, counted.peak, "peak")
    end)
  end
end)

-- ---- by hand

place:write("net.lua", [[
local ds = require "ds"
local nn, F = ds.nn, ds.F
local Net = nn.module "Net"
function Net:init() self.inner, self.out = nn.Linear(64, 256), nn.Linear(256, 10) end
function Net:forward(x)
  local h = self.inner(x)
  local wide = h:unsqueeze(-1):expand(-1, -1, 500) * 2
  return self.out(h + wide:mean(-1))
end
local set = { size = function() return 1000 end,
  get = function(_, i) return ds.randn(64, { device = "cpu" }), i % 10 end }
local config = { train_batch_size = 64, gradient_accumulation_steps = 2,
  optimizer = { type = "SGD", params = { lr = 0.1 } } }
local engine, _, loader = ds.initialize { model = Net(), training_data = set, config = config }
print("ranks", ds.world_size(), "loaded", engine:load_checkpoint("nowhere"))
io.write("evaluated ", engine:evaluate(set), "\n")
io.stdout:write("straight\n")
engine:save_checkpoint("nowhere")
for x, y in loader:forever() do
  local logits = engine(x)
  local loss = F.cross_entropy(logits, y:long())
  local right = logits:argmax(-1):eq(y:long()):any()
  engine:backward(loss)
  print("batch", loss:item(), right:item(), #logits:tolist()[1],
    ds.all_reduce(logits):size(1), ds.all_gather(ds.ones(3)):size(1))
  engine:step()
end]])

--- The plan of a script as a table, and what the script printed.
local function plan(options, script)
  local code, out, err = sh(("$D plan --json %s %s"):format(options, script or "net.lua"))
  assert(code == 0, err)
  return json.decode(out), err
end

describe("dsrun plan", function()
  it("runs a script that reads values, saves, evaluates and prints", function()
    local p, err = plan "--num_gpus 4"
    local batch = "batch\t1\tfalse\t10\t8\t4\n"
    assert.equal("ranks\t4\tloaded\tnil\nevaluated 1\nstraight\n" .. batch:rep(2), err)
    assert.same({ 64, 8, 2 }, { p.train_batch_size, p.train_micro_batch_size_per_gpu,
      p.gradient_accumulation_steps })
    assert.equal(1, (sh "test -e nowhere"))
  end)

  it("counts multiplications of both passes", function()
    local a = plan("").activations
    local forward = 2 * 2 * 32 * (64 * 256 + 256 * 10) -- of two micro-batches of 32
    assert.equal(forward, a.forward_flops)
    assert.equal(2 * forward - 2 * 2 * 32 * 64 * 256, a.backward_flops) -- none to the input
  end)

  it("names the line, the operation and the module of the peak", function()
    local a = plan("").activations
    assert.same({ "mul_scalar", "net.lua:7" }, { a.by_operation[1].operation, a.peak.line })
    assert(a.bytes > 32 * 256 * 500 * 4 and a.bytes < 4 * 32 * 256 * 500 * 4)
  end)

  it("says what fits", function()
    assert.is_false(plan "--memory 1MiB".stages[1].plain.fits)
    local p = plan "--memory 1.5GB"
    assert.equal(1.5e9, p.memory)
    assert.is_true(p.stages[1].plain.fits)
    local _, out = sh "$D plan --memory 1MiB net.lua"
    assert(out:find "\n%* stage 0 .- MiB  no")
  end)

  it("estimates the time of a step from rates", function()
    local p = plan "--num_gpus 2 --flops 1G --bandwidth 8Mbit/s --disk 1MB/s"
    local row = p.stages[2]
    assert.is_true(row.offload)
    local a, t = p.activations, row.plain.seconds
    within(1e-9, t.computing, (a.forward_flops + a.backward_flops) / 1e9, "computing")
    within(1e-9, t.communication, row.sent / 1e6, "communication")
    within(1e-9, t.disk, 2 * row.disk / 1e6, "disk")
    within(1e-9, t.step, t.computing + t.communication + t.disk, "step")
    assert.is_nil(plan("").stages[1].plain.seconds)
  end)

  it("has the GPU's memory where the engine is on one", function()
    local function of(settings)
      configure(settings)
      return plan("--disk 1MB/s", "gpt.lua")
    end
    local keeps = { cpu_checkpointing = true }
    local function state(device) return { stage = 1, offload_optimizer = { device = device,
      nvme_path = "/tmp" } } end
    local plain, disk = of { device = "cuda" }, of { device = "cuda", zero_optimization =
      state "nvme", activation_checkpointing = keeps }
    local memory = of { device = "cuda", zero_optimization = state "cpu" }
    assert.equal(0, configured(disk).buffers) -- they are the host's
    assert.same({ 0, 0 }, { configured(disk).optimizer, configured(disk).host })
    assert.same({ 0, 0 }, { configured(memory).optimizer, configured(memory).disk })
    assert.equal(plain.stages[1].optimizer, configured(disk).disk)
    assert.equal(plain.stages[1].optimizer, configured(memory).host)
    assert.is_nil(configured(memory).plain.seconds)
    assert.is_true(disk.checkpointed_to_host)
    assert.is_true(disk.checkpointed.bytes < plain.checkpointed.bytes)
    assert.equal(plain.checkpointed.bytes, -- without a GPU it is there anyway
      of({ activation_checkpointing = keeps }).checkpointed.bytes)
    local _, out = sh "$D plan gpt.lua"
    assert.falsy(out:find("the host's memory", 1, true))
  end)

  it("is made of one step where the script makes no more", function()
    configure {}
    for _, words in ipairs { "", "--checkpoint" } do
      local p = plan("", "gpt.lua --steps 1 " .. words)
      assert(p.activations.bytes > 0)
      assert.is_nil(p.checkpointed)
    end
  end)

  it("plans for machines of a hostfile", function()
    configure {}
    place:write("hosts", "worker-1 slots=3\nworker-2 slots=3\n")
    local p = plan("--hostfile hosts", "gpt.lua")
    assert.same({ 6, 2 }, { p.ranks, p.machines })
    p = plan("--num_nodes 5 --num_gpus 8", "gpt.lua")
    assert.same({ 40, 5, 160 }, { p.ranks, p.machines, p.train_batch_size })
  end)

  it("plans 4096 ranks within a second", function()
    configure { zero_optimization = zero(1) }
    local best = math.huge
    for _ = 1, 3 do
      local code, _, err, seconds = place:timed "$D plan --num_gpus 8 --num_nodes 512 gpt.lua"
      assert(code == 0, err)
      best = math.min(best, seconds)
    end
    assert(best < 1, ("%g s"):format(best))
  end)

  it("shows it as text", function()
    configure { zero_optimization = zero(2) }
    local code, out, err = sh "$D plan --num_gpus 4 --flops 1T gpt.lua"
    assert(code == 0, err)
    has(out, "\njob          4 ranks on 1 machine; batch 16 = micro 4 × accumulation 1 × ranks 4\n")
    has(out, "\ncheckpointed ")
    has(out, "if each of the blocks h.0 … h.3 were a ds.checkpoint\n")
    assert(out:find "\n%* stage 2 ")
    assert(out:find "\n  stage 3, nvme ")
    for line in out:gmatch "[^\n]+" do assert(#line <= 120, line) end
    local _, help = sh "$D plan --help"
    has(help, "--memory SIZE")
    for line in help:gmatch "[^\n]+" do assert(#line <= 100, line) end
  end)

  it("says why there is no plan", function()
    place:write("none.lua", "local ds = require 'ds' ds.zeros(3)")
    place:write("ends.lua", "os.exit(0)")
    place:write("fails.lua", "os.exit(7)")
    place:write("raises.lua", "error 'no luck'")
    for arguments, expected in pairs {
      ["none.lua"] = { 1, "plan: the script ended without an engine that has an optimizer" },
      ["ends.lua"] = { 1, "plan: the script ended itself before its first step" },
      ["fails.lua"] = { 7, "" },
      ["raises.lua"] = { 1, "raises.lua:1: no luck" },
      [""] = { 2, "plan wants a script" },
      ["--memory much net.lua"] = { 2, "--memory wants a size as 16GiB, not 'much'" },
      ["--bandwidth 3GiB/h net.lua"] = { 2, "--bandwidth wants a size as 10GB/s" },
      ["--timeout 3 net.lua"] = { 2, "--timeout is for a job that runs" },
    } do
      local code, out, err = sh("$D plan " .. arguments)
      assert.same({ expected[1], "" }, { code, out })
      has(err, expected[2])
    end
    local code, _, err = sh "$D --memory 3GiB net.lua"
    assert.equal(2, code)
    has(err, "--memory is for a plan: dsrun plan --memory")
  end)
end)
