-- Weights in host memory: the same training to the last bit as with weights on the GPU, with less
-- memory there; checkpoints to and from other settings; what waits, and what is refused.
--
-- Here on one rank; cases with several, or where transfers are as late as they may be, run
-- tests/dist/train.lua in processes of their own.

local ds = require "ds"
local nn, F = ds.nn, ds.F
local host = require "ds.host"
local offload_param = require "ds.offload_param"
local checkpointing_host = require "ds.checkpointing_host"
local simulated = require("tests.cuda.helper").simulated
local common = require "tests.lua.helper"

local says, has = common.says, common.has
local place = common.place { limit = 120 }
teardown(function() place:remove() end)

-- ---- one rank, in this process

-- A tied weight, a frozen one, views, blocks, parameters above and below the threshold.
local Net = nn.module "Net"
function Net:init()
  self.embed = nn.Embedding(13, 11)
  self.h = nn.list(2, function() return nn.Linear(11, 11) end)
  self.up, self.down = nn.Linear(11, 37), nn.Linear(37, 11)
  self.frozen = nn.Parameter(ds.arange(121):reshape(11, 11):to "f32" * 1e-3)
  self.frozen.requires_grad = false
  self.norm = nn.LayerNorm(11)
end
function Net:forward(x, y)
  local h = self.embed(x)
  for _, layer in ipairs(self.h) do h = layer(h) end
  h = h + self.down(self.up(h):tanh())
  h = self.norm(h + h:matmul(self.frozen:t()))
  local first = self.up.weight:narrow(1, 1, 11)
  return F.linear_cross_entropy(h + h:matmul(first), self.embed.weight, y)
end

local function make(zero, more, model)
  local c = { train_micro_batch_size_per_gpu = 3, steps_per_print = 0, device = "cuda",
    gradient_clipping = 0.5,
    optimizer = { type = "AdamW", params = { lr = 0.02, weight_decay = 0.1 } },
    zero_optimization = { stage = 3, stage3_param_persistence_threshold = 20,
      reduce_bucket_size = 150, stage3_prefetch_bucket_size = 500 } }
  for key, value in pairs(zero or {}) do c.zero_optimization[key] = value end
  for key, value in pairs(more or {}) do c[key] = value end
  ds.seed(5)
  return ds.initialize { model = model or ds.on("cpu", Net), config = c }
end

--- [3 x 5] of 13 tokens, on the CPU.
local function tokens(k)
  local ids = {}
  for row = 1, 3 do
    ids[row] = {}
    for i = 1, 5 do ids[row][i] = (k * (5 * row + i)) % 13 end
  end
  return ds.on("cpu", ds.tensor, ids, "i64"):keep()
end

local batches = {}
for i = 1, 6 do batches[i] = { tokens(i + 2), tokens(i + 3) } end

local away = { offload_param = { device = "cpu" } }

--- Losses and norms of some steps. @tparam[opt=1] number first batch
local function train(engine, n, first)
  local out = {}
  for i = first or 1, (first or 1) + n - 1 do
    local loss
    repeat
      loss = engine(batches[i][1], batches[i][2])
      engine:backward(loss)
    until engine:step()
    out[#out + 1] = ("%.9g %.9g"):format(loss:item(), engine:get_global_grad_norm())
  end
  return out
end

local function whole(engine, name)
  local out = {}
  for _, e in ipairs(engine.named) do
    if e.parameter._flat then
      out[e.name] = ds.zero.get_full(e.parameter, name):to("cpu"):reshape(-1):tolist()
    end
  end
  return out
end

describe("weights in host memory", function()
  local least = checkpointing_host.LEAST
  setup(function() checkpointing_host.LEAST = 1 end)
  teardown(function() checkpointing_host.LEAST = least end)
  if not ds.optim.registry.AwaySign then
    ds.optimizer("AwaySign", { state = { "m" }, defaults = { lr = 1e-2 },
      step = function(p, g, s, h)
        s.m:mul_(0.5):add_(g, 0.5)
        p:add_(s.m:sign(), -h.lr)
      end })
  end
  local half = { bf16 = { enabled = true } }
  local state = { offload_param = { device = "cpu" }, offload_optimizer = { device = "cpu" } }
  for name, case in pairs {
    f32 = { {}, away },
    bf16 = { half, away },
    ["bf16, accumulated"] = { { bf16 = half.bf16, gradient_accumulation_steps = 2 }, away },
    ["fp16 with a scale that moves"] = { { nan_check = false,
      fp16 = { enabled = true, initial_scale_power = 18, loss_scale_window = 1,
        hysteresis = 1 } }, away },
    ["memory that is not page-locked"] = { half, { offload_param = { device = "cpu",
      pin_memory = false } } },
    ["by the old name"] = { {}, { cpu_offload_param = true } },
    ["activations made again"] = { { activation_checkpointing = { enabled = true } }, away },
    ["activations' inputs there, too"] = { { activation_checkpointing = { enabled = true,
      cpu_checkpointing = true } }, away },
    ["state on a disk"] = { half, { offload_param = { device = "cpu" },
      offload_optimizer = { device = "nvme", nvme_path = place.folder } },
      { offload_optimizer = { device = "cpu" } } },
    ["without overlap"] = { {}, { offload_param = away.offload_param, overlap_comm = false } },
    ["Lamb in bf16"] = { { bf16 = half.bf16, optimizer = { type = "Lamb" } }, away },
    Lamb = { { optimizer = { type = "Lamb" } }, away },
    ["a rule in Lua"] = { { optimizer = { type = "AwaySign" } }, away },
    ["state there, too"] = { {}, state, { offload_optimizer = { device = "cpu" } } },
    ["state there, too, bf16"] = { half, state, { offload_optimizer = { device = "cpu" } } },
  } do
    it("gives the bits of training with weights on the GPU: " .. name, function()
      local plain, other = make(case[3], case[1]), make(case[2], case[1])
      assert.equal("cpu", other.zero.shards[1].device)
      assert.same(train(plain, 4), train(other, 4))
      assert.same(whole(plain), whole(other))
      assert.equal(plain.skipped_steps, other.skipped_steps)
      assert.is_true(#other.zero.sharded.units > 3)
      other:destroy()
    end)
  end

  it("are updated by blocks", function()
    for _, more in ipairs { {}, half } do
      local want = make(nil, more)
      local expected, block = train(want, 3), offload_param.BLOCK
      offload_param.BLOCK = 64
      local engine = make(away, more)
      offload_param.BLOCK = block
      assert.is_true(#engine.zero.updates.blocks > 15)
      assert.same(expected, train(engine, 3))
      assert.same(whole(want), whole(engine))
    end
  end)

  it("stay as they are where a step is skipped", function()
    for _, more in ipairs { { nan_check = false, bf16 = { enabled = true } },
      { nan_check = false, fp16 = { enabled = true, loss_scale = 2 ^ 40 } } } do
      local engine = make(away, more)
      local before = whole(engine)
      local loss = engine(batches[1][1], batches[1][2])
      engine:backward(more.bf16 and loss * math.huge or loss)
      engine:step()
      assert.is_false(engine:was_step_applied())
      assert.same(before, whole(engine))
      local y = ds.no_grad(function() return engine:eval()(batches[1][1], batches[1][2]):item() end)
      assert.equal(y, y) -- what was sent to host memory is no NaN either
    end
  end)

  it("wait for nothing in a step, and come ahead of their use", function()
    for _, more in ipairs { {}, half } do
      local engine = make(away, more)
      train(engine, 3)
      local before, ahead = ds.cuda.counters(), engine.zero.sharded.stats.prefetched
      for i = 4, 6 do
        engine:backward(engine(batches[i][1], batches[i][2]))
        engine:step()
      end
      local after = ds.cuda.counters()
      assert.equal(0, after.waits - before.waits)
      assert.equal(0, after.takes - before.takes)
      if simulated then assert.equal(0, after.event_waits - before.event_waits) end
      assert.is_true(engine.zero.sharded.stats.prefetched - ahead >= 6)
    end
  end)

  it("are evaluated, ahead of their use from the second batch on", function()
    local plain, engine = make(), make(away)
    train(plain, 2)
    train(engine, 2)
    plain:eval()
    engine:eval()
    local stats = engine.zero.sharded.stats
    for i = 1, 2 do
      local ahead = stats.prefetched
      assert.equal(plain(batches[i][1], batches[i][2]):item(),
        engine(batches[i][1], batches[i][2]):item())
      assert.equal(i == 2, stats.prefetched > ahead)
    end
    plain:train()
    engine:train()
    assert.same(train(plain, 2, 3), train(engine, 2, 3))
  end)

  it("are whole where a script asks, and what it sets is kept", function()
    for _, more in ipairs { {}, half } do
      local plain, engine, got = make(nil, more), make(away, more), {}
      for i, e in ipairs { plain, engine } do
        train(e, 1)
        local p = e.module.up.weight
        ds.zero.gathered(p, function() ds.no_grad(function() p:mul_(2) end) end,
          { modifier_rank = 0 })
        ds.zero.set_full(e.module.down.weight, ds.full({ 11, 37 }, 0.25))
        ds.zero.set_full(p, ds.full({ 37, 11 }, 0.5), "exp_avg")
        got[i] = { whole(e), whole(e, "exp_avg"), train(e, 2, 2), whole(e) }
      end
      assert.same(got[1], got[2])
      assert.equal(0.25, got[2][1]["down.weight"][7])
    end
    says("the parameter is sharded (ZeRO stage 3) and whole only while the model runs", function()
      return make(away).module.up.weight * 2
    end)
  end)

  it("are left whole in host memory when the engine goes", function()
    local plain, engine = make(), make(away)
    train(plain, 2)
    train(engine, 2)
    local want = whole(plain)
    engine:destroy()
    for name, values in pairs(want) do
      for _, e in ipairs(engine.named) do
        if e.name == name then
          assert.equal("cpu", e.parameter.device)
          assert.same(values, e.parameter:reshape(-1):tolist())
        end
      end
    end
    local loss = ds.on("cuda", function()
      return engine.module:to "cuda"(batches[1][1]:to "cuda", batches[1][2]:to "cuda"):item()
    end)
    assert.equal(plain:eval()(batches[1][1], batches[1][2]):item(), loss)
  end)

  it("take no memory of the GPU but for those in use", function()
    local Deep = nn.module "Deep"
    function Deep:init()
      self.h = nn.list(16, function() return nn.Linear(64, 64, { bias = false }) end)
    end
    function Deep:forward(x)
      for _, layer in ipairs(self.h) do x = layer(x):tanh() end
      return x:float():square():mean()
    end
    local x = ds.on("cpu", ds.randn, 2, 64)
    local all = 16 * 4096 -- elements
    local function cost(zero, more)
      zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size = 5000, 5000
      collectgarbage()
      collectgarbage()
      local before = ds.cuda.memory_allocated()
      local engine = make(zero, more, ds.on("cpu", Deep))
      local kept, peak = ds.cuda.memory_allocated() - before, 0
      for _ = 1, 3 do
        collectgarbage()
        ds.cuda.reset_peak_memory_stats()
        engine:backward(engine(x))
        peak = math.max(peak, ds.cuda.max_memory_allocated() - before)
        engine:step()
      end
      local most = engine.zero.sharded and engine.zero.sharded.stats.most_live
      engine:destroy()
      return kept, peak, most
    end
    for width, more in pairs { [4] = {}, [2] = half } do
      local kept, peak = cost({}, more)
      local less_kept, less_peak, most = cost({ offload_param = { device = "cpu" } }, more)
      assert.is_near(all * width, kept - less_kept, 4096)
      assert.is_true(most <= 3 * 4096)
      assert.is_true(peak - less_peak >= (all - 3 * 4096) * width - 4096)
    end
  end)

  for _, more in ipairs { {}, half } do
    it("are saved as others, and come back from all: " .. (more.bf16 and "bf16" or "f32"),
      function()
        local folder = place.folder .. (more.bf16 and "/half" or "/full")
        local settings = { {}, away, state, { stage = 0 }, { stage = 1 } }
        local first = {}
        for i, zero in ipairs { {}, away } do
          local engine = make(zero, more)
          train(engine, 2)
          engine:save_checkpoint(folder .. i)
          engine:save_16bit_model(folder .. i)
          first[i] = { train(engine, 2, 3), whole(engine) }
          engine:destroy()
        end
        assert.equal(0, (place:sh(("diff -r %s1 %s2"):format(folder, folder))))
        assert.same(first[1], first[2])
        for i, zero in ipairs(settings) do
          local engine = make(zero, more)
          train(engine, 1) -- what is there is overwritten, and what is on its way
          assert(engine:load_checkpoint(folder .. 2))
          local got = train(engine, 2, 3)
          if i ~= 3 then -- there the CPU adds up
            assert.same(first[1], { got, whole(engine) })
          end
          engine:destroy()
        end
      end)
  end

  it("go on without CUDA graphs, and say so", function()
    local script = place:write("graph.lua", [[
      local ds = require "ds"
      local engine = ds.initialize { model = ds.nn.Linear(20, 10), config = { device = "cuda",
        train_micro_batch_size_per_gpu = 1, cuda_graph = true, optimizer = { type = "SGD" },
        zero_optimization = { stage = 3, offload_param = { device = "cpu" } } } }
      engine:backward(engine(ds.ones(1, 20)):square():mean())
      engine:step()]])
    local code, _, err = place:sh("$D " .. script)
    assert.equal(0, code, err)
    has(err, "cuda_graph: parameters are sharded; training goes on without it")
  end)

  it("that cannot be page-locked are said to be so, with a way out", function()
    local tensor = require "ds.tensor"
    local pinned = tensor.pinned
    tensor.pinned = function() error("there is none", 0) end
    local ok, message = pcall(make, away)
    tensor.pinned = pinned
    assert.is_false(ok)
    has(message, "offload_param: there are no 5.0 KiB of page-locked memory (there is none); "
      .. '"pin_memory": false takes other memory')
    assert.equal("cpu", make({ offload_param = { device = "cpu", pin_memory = false } })
      .zero.shards[1].device)
  end)

  it("are for stage 3, and on a CPU where they are anyway", function()
    says('initialize: zero_optimization.offload_param.device "cpu": only stage 3 keeps weights '
      .. 'elsewhere than where kernels use them; say "stage": 3', make,
      { stage = 2, offload_param = { device = "cpu" } })
    local engine = make(away, { device = "cpu" })
    assert.is_nil(engine.zero.home)
    assert.equal(1, engine.zero.stage)
  end)

  it("are counted by dsrun plan", function()
    local script = place:write("deep.lua", [[
      local ds = require "ds"
      local nn = ds.nn
      local Deep = nn.module "Deep"
      function Deep:init()
        self.h = nn.list(24, function() return nn.Linear(64, 64, { bias = false }) end)
      end
      function Deep:forward(x)
        for _, layer in ipairs(self.h) do x = layer(x):tanh() end
        return x:float():square():mean()
      end
      local opt = ds.cli { "", { "deepspeed_config", "away.json", "" } }
      local engine = ds.initialize { args = opt, model = ds.on("cpu", Deep) }
      local x = ds.randn(2, 64, { device = "cpu" })
      for _ = 1, 3 do
        collectgarbage()
        if ds.cuda.is_available() then ds.cuda.reset_peak_memory_stats() end
        engine:backward(engine(x))
        engine:step()
      end
      if ds.rank() == 0 then print(ds.cuda.max_memory_allocated()) end]])
    for _, case in ipairs { { 1, false }, { 1, true }, { 2, true } } do
      place:write("away.json", ([[{ "train_micro_batch_size_per_gpu": 2, "steps_per_print": 0,
        "device": "cuda", "optimizer": { "type": "AdamW" }, "bf16": { "enabled": %s },
        "zero_optimization": { "stage": 3, "offload_param": { "device": "cpu" },
          "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 100,
          "stage3_prefetch_bucket_size": 9000 } }]]):format(tostring(case[2])))
      local code, out, err = place:sh(("OMP_NUM_THREADS=1 DS_SHARE_GPU=1 $D --num_gpus %d %s")
        :format(case[1], script))
      assert.equal(0, code, err)
      local counted = tonumber(out:match "%d+")
      code, out, err = place:sh(("$D plan --json --num_gpus %d %s"):format(case[1], script))
      assert.equal(0, code, err)
      local plan = require("ds.json").decode(out)
      local row = plan.stages[7]
      assert.is_true(row.configured and row.stage == 3)
      assert.equal(24 * 4096 * (case[2] and 2 or 4) / case[1], row.away)
      assert.is_near(1, row.plain.total / counted, 0.1)
    end
  end)
end)

-- ---- several ranks, and transfers that come as late as they may

-- Prints what the CPU reads and writes of weights between steps.
local looks = place:write("looks.lua", [[
  local ds = require "ds"
  local nn = ds.nn
  local Two = nn.module "Two"
  function Two:init() self.a, self.b = nn.Linear(19, 23), nn.Linear(23, 19) end
  function Two:forward(x) return self.b(self.a(x):tanh()):float():square():mean() end
  local bf16, zero = arg[1] == "bf16", { stage = 3, stage3_param_persistence_threshold = 0 }
  if arg[2] then zero.offload_param = { device = "cpu" } end
  if arg[2] == "both" then zero.offload_optimizer = { device = "cpu" } end
  ds.seed(3)
  local engine = ds.initialize { model = ds.on("cpu", Two), config = { device = "cuda",
    train_micro_batch_size_per_gpu = 2, steps_per_print = 0, bf16 = { enabled = bf16 },
    optimizer = { type = "SGD", params = { lr = 0.5 } }, zero_optimization = zero } }
  local x, p = ds.randn(2, 19, { device = "cpu" }), engine.module.a.weight
  for i = 1, 4 do
    engine:backward(engine(x))
    engine:step()
    local now = ds.zero.get_full(p)
    print(("%.9g"):format(now:float():square():sum():item()))
    if i == 2 then engine:save_checkpoint("looks") end
    if i == 3 then ds.zero.set_full(p, now * 2) engine:load_checkpoint("looks") end
    engine:eval()
    print(engine(x):item())
    engine:train()
  end]])

describe("weights in host memory", function()
  it("are read and written when nothing is under way", function()
    for _, dtype in ipairs { "fp32", "bf16" } do
      local function printed(words, late)
        local code, out, err = place:sh(("DS_SIMT_LATE=%s $D -q %s %s %s"):format(late, looks,
          dtype, words))
        assert.equal(0, code, err)
        return out
      end
      local want = printed("", "")
      for _, late in ipairs(simulated and { "copies", "kernels" } or { "" }) do
        assert.equal(want, printed("away", late))
        assert.equal(want, printed("both", late))
      end
    end
  end)
end)

local there = os.execute "command -v mpirun >/dev/null" == 0

--- What tests/dist/train.lua prints.
local function run(ranks, words, settings)
  local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
  local code, out, err = place:sh(("OMP_NUM_THREADS=1 DS_SHARE_GPU=1 DS_SIMT_DEVICES=4 %s $D -q "
    .. "%s --device cuda '%s/tests/dist/train.lua' stage=3 steps=3 %s"):format(settings or "",
    launch, host.base, words))
  assert(code == 0, ("%d ranks, %s: code %d\n%s"):format(ranks, words, code, err))
  return out
end

describe("weights in host memory of several ranks", function()
  for _, case in ipairs {
    { 1, "model=odd dtype=bf16 gas=2" }, { 2, "model=odd small=0 state=host" },
    { 2, "model=odd dtype=bf16 optimizer=Muon init=1 reuse=500" },
    { 3, "model=odd dtype=fp16 optimizer=Lamb prefetch=2000" },
  } do
    local ranks, words = unpack(case)
    it(("give the same bits: %d, %s"):format(ranks, words), function()
      if not there then return pending "no mpirun here" end
      local want = run(ranks, words)
      assert.equal(want, run(ranks, words .. " weights=host"))
      if not simulated then return end
      for _, late in ipairs { "kernels", "copies" } do
        assert.equal(want, run(ranks, words .. " weights=host", "DS_SIMT_LATE=" .. late))
      end
    end)
  end

  it("come up and are exchanged while kernels run", function()
    if not there then return pending "no mpirun here" end
    local script = place:write("ahead.lua", [[
      local ds = require "ds"
      local nn = ds.nn
      local model = ds.on("cpu", ds.zero.init, function()
        return nn.Sequential(nn.Linear(65, 65), nn.Linear(65, 65), nn.Linear(65, 65),
          nn.Linear(65, 65))
      end)
      assert(model:parameters()[1]._unit)
      local before = ds.cuda.memory_allocated()
      local engine = ds.initialize { model = model, config = {
        train_micro_batch_size_per_gpu = 1, steps_per_print = 0, optimizer = { type = "SGD" },
        zero_optimization = { stage = 3, reduce_bucket_size = 4400,
          stage3_param_persistence_threshold = 70, offload_param = { device = "cpu" } } } }
      assert(before == 0)
      local stats = engine.zero.sharded.stats
      for i = 1, 3 do
        if i == 3 then stats.gathers, stats.prefetched, stats.under_way = 0, 0, 0 end
        engine:backward(engine(ds.ones(1, 65)):square():mean())
        engine:step()
      end
      if ds.rank() == 0 then print(stats.gathers, stats.prefetched, stats.under_way) end]])
    local code, out, err = place:sh(("DS_SHARE_GPU=1 $D -q --num_gpus 2 --device cuda %s")
      :format(script))
    assert.equal(0, code, err)
    -- four units, there and back, of which the last stays; the first comes when it is wanted, and
    -- the second one's exchange does, as its share has only just begun to come
    assert.equal("7\t6\t5\n", out)
  end)

  it("are saved as others, and come back on any number of ranks", function()
    if not there then return pending "no mpirun here" end
    local words = "model=odd dtype=bf16 "
    run(2, words .. "save=plain")
    run(2, words .. "weights=host save=away")
    assert.equal(0, (place:sh "diff -r plain away"))
    for ranks = 1, 2 do
      assert.equal(run(ranks, words .. "steps=5 load=plain"),
        run(ranks, words .. "steps=5 weights=host load=away"))
    end
  end)
end)
