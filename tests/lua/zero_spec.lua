-- ZeRO stages 2 and 3 beyond what ranks_spec.lua trains: every config key by what it changes,
-- models sharded from the start, whole parameters in scripts, parameters of all kinds, what is
-- refused.
-- Every case runs a script on several ranks.

local helper = require "tests.lua.helper"

local place = helper.place { limit = 120 }
teardown(function() place:remove() end)

--- Runs a script on `ranks` ranks; what it prints on rank 0.
local function run(ranks, text)
  local path = place:write("script.lua", text)
  return place:sh(("OMP_NUM_THREADS=1 $D --num_gpus %d '%s'"):format(ranks, path))
end

local function good(ranks, text)
  local code, out, err = run(ranks, text)
  assert(code == 0, ("code %d\n%s%s"):format(code, out, err))
  return out
end

-- A model of ten layers, an engine over it with these keys of zero_optimization, and steps.
local head = [[
local ds = require "ds"
local nn, F = ds.nn, ds.F
local function say(...) if ds.rank() == 0 then print(...) end end
ds.seed(1)
local function layers(n, width)
  return nn.list(n or 10, function() return nn.Linear(width or 64, width or 64) end)
end
local Deep = nn.module "Deep"
function Deep:init(n, width) self.h = layers(n, width) end
function Deep:forward(x)
  for _, layer in ipairs(self.h) do x = layer(x):tanh() end
  return x:float():square():mean()
end
local function make(keys, more, model)
  local config = { train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
    optimizer = { type = "AdamW", params = { lr = 1e-2 } },
    zero_optimization = { stage = 3, stage3_param_persistence_threshold = 100,
      reduce_bucket_size = 5000 } }
  for key, value in pairs(keys or {}) do config.zero_optimization[key] = value end
  for key, value in pairs(more or {}) do config[key] = value end
  return ds.initialize { model = model or Deep(), config = config }
end
local x = ds.randn(4, 64):keep()
local function train(engine, n, input)
  local loss
  for _ = 1, n do
    loss = engine(input or x)
    engine:backward(loss)
    engine:step()
  end
  return loss:item()
end
-- collectives and bytes of a step after a few
local function cost(engine)
  train(engine, 3)
  local a = ds.comm_stats()
  train(engine, 10)
  local b = ds.comm_stats()
  return (b.collectives - a.collectives) / 10, (b.bytes - a.bytes) / 10
end
]]

describe("zero_optimization", function()
  -- the model: ten weights of 4096 elements, ten biases of 64
  it("keys change what is sent, how often and what stays, and no result", function()
    local out = good(2, head .. [[
      local expected
      local function show(name, keys, more)
        local engine = make(keys, more)
        local calls, bytes = cost(engine)
        local stats = engine.zero.sharded and engine.zero.sharded.stats or {}
        local loss = train(engine, 1)
        expected = expected or loss
        -- parts of buckets decide which squares are added first
        assert(math.abs(loss - expected) < 1e-6 * expected, name)
        say(name, calls, bytes, stats.most_live or 0, stats.prefetched or 0, #engine.zero.segments,
          #engine.zero.buckets)
        engine:destroy()
      end
      local function new(name, keys, more) ds.seed(1) show(name, keys, more) end
      new("plain")
      new("prefetch", { stage3_prefetch_bucket_size = 9000 })
      new("reuse", { stage3_max_reuse_distance = 1e9 })
      new("live", { stage3_max_reuse_distance = 1e9, stage3_max_live_parameters = 13000 })
      new("small", { stage3_param_persistence_threshold = 1e5 })
      new("most_small", { stage3_param_persistence_threshold = 1e5,
        stage3_model_persistence_threshold = 9000 })
      new("sub_group", { sub_group_size = 1024 })
      new("bucket", { reduce_bucket_size = 9000 })
      new("contiguous", { contiguous_gradients = false })
      new("two", { stage = 2 })
      new("allgather", { stage = 2, allgather_bucket_size = 1024 })
      new("all_reduce", { stage = 2, reduce_scatter = false })
    ]])
    local got = {}
    for line in out:gmatch "[^\n]+" do
      local name, calls, bytes, live, ahead, segments, buckets =
        line:match "^(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)$"
      got[name] = { calls = tonumber(calls), bytes = tonumber(bytes), live = tonumber(live),
        ahead = tonumber(ahead), segments = tonumber(segments), buckets = tonumber(buckets) }
    end
    local plain = got.plain
    assert.equal(11, plain.buckets)           -- a weight each, and one of all biases
    assert.equal(4096, plain.live)            -- one at a time
    assert.is_true(got.prefetch.ahead > 0 and plain.ahead == 0)
    assert.equal(plain.bytes, got.prefetch.bytes)
    assert.is_true(got.prefetch.live > plain.live)
    assert.is_true(got.reuse.calls <= plain.calls - 7) -- none is gathered twice a step
    assert.is_true(got.reuse.live >= 10 * 4096)
    assert.is_true(got.live.live < got.reuse.live and got.live.calls > got.reuse.calls)
    assert.equal(0, got.small.live)
    assert.is_true(got.most_small.live > 0 and got.most_small.calls < plain.calls)
    assert.equal(2 * plain.segments - 1, got.sub_group.segments) -- halves of 2048, the biases whole
    assert.is_true(got.bucket.buckets < plain.buckets and got.bucket.calls < plain.calls)
    assert.equal(20, got.contiguous.buckets)
    assert.equal(got.two.calls + 3 * 10, got.allgather.calls) -- four pieces instead of one
    assert.equal(got.two.bytes, got.allgather.bytes)
    assert.is_true(got.all_reduce.bytes > 1.45 * got.two.bytes)
  end)

  it("data_types.grad_accum_dtype: every stage adds up in that type, and near what fp32 gives",
    function()
      local out = good(2, head .. [[
        local codes = { fp32 = "f32", bf16 = "bf16", fp16 = "f16" }
        for _, name in ipairs { "bf16", "fp16" } do
          local fine
          for _, accum in ipairs { "fp32", name } do
            local first
            for stage = 0, 3 do
              ds.seed(1)
              local engine = make({ stage = stage }, { gradient_accumulation_steps = 3,
                bf16 = { enabled = name == "bf16" }, gradient_clipping = 0,
                fp16 = { enabled = name == "fp16", loss_scale = 64 },
                data_types = { grad_accum_dtype = accum, param_dtype = name } })
              local weights, grads = engine:get_data_types()
              assert(weights == codes[name] and grads == codes[accum])
              for _, g in pairs(engine.zero.grads) do assert(g.dtype == codes[accum]) end
              for i = 1, 3 do
                engine:backward(engine((x * (i / 4) + ds.rank() / 8):keep()))
                if i < 3 then engine:step() end
              end
              local got = ds.zero.get_full(engine.module.h[2].weight, "grad")
              local function far(a, b) return (a - b):norm():item() / b:norm():item() end
              fine, first = fine or got, first or got -- fp32, and stage 0's of this type
              local bound = accum == "fp32" and 1e-5 or 0.02
              assert(far(got, first) < bound and far(got, fine) < bound,
                ("%s, %s, stage %d: %g %g"):format(name, accum, stage, far(got, first),
                  far(got, fine)))
              say(("%s %s %d"):format(name, accum, stage))
              engine:destroy()
            end
          end
        end]])
      assert.equal(16, select(2, out:gsub("\n", "")))
    end)

  it("round_robin_gradients gives buckets of whole tensors to the ranks in turn", function()
    assert.equal("01010101010\n", good(2, head .. [[
      local engine = make({ stage = 2, round_robin_gradients = true },
        { optimizer = { type = "Lamb" } })
      train(engine, 1)
      local all = {}
      table.sort(engine.zero.buckets, function(a, b) return a.start > b.start end)
      for i, b in ipairs(engine.zero.buckets) do
        all[i] = b.borders[1] == b.numel and 0 or 1
      end
      say(table.concat(all))
    ]]))
  end)

  it("ignore_unused_parameters = false names who gets no gradient", function()
    for stage = 1, 3, 2 do
      local code, _, err = run(2, head .. ([[
        local Model = nn.module "Model"
        function Model:init() self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64) end
        function Model:forward(x) return self.used(x):sum() end
        train(make({ stage = %d, ignore_unused_parameters = false }, nil, Model()), 1)
      ]]):format(stage))
      assert.equal(1, code)
      assert.truthy(err:find("step 1: no gradient has reached idle.", 1, true), err)
    end
  end)
end)

describe("ds.zero", function()
  it("init makes the same model with a share of the memory", function()
    assert.equal("same\n", good(2, head .. [[
      ds.seed(5 + ds.rank())
      local plain = make(nil, nil, Deep(12, 256))
      ds.seed(5 + ds.rank())
      collectgarbage() collectgarbage()
      local before = ds.memory().live
      local model = ds.zero.init(function()
        local m = Deep(12, 256)
        for _, layer in ipairs(m.h) do nn.init.normal_(layer.bias, 0.01) end
        ds.no_grad(function() m.h[1].weight:mul_(2) m.h[1].weight:mul_(0.5) end)
        return m
      end)
      local bytes = 12 * 256 * 257 * 4
      assert(ds.memory().live - before < 0.6 * bytes, ds.memory().live - before)
      local sharded = make(nil, nil, model)
      for i, layer in ipairs(plain.module.h) do
        local a = ds.zero.get_full(layer.weight):tolist()
        local b = ds.zero.get_full(model.h[i].weight):tolist()
        for r = 1, 256, 17 do assert(a[r][3] == b[r][3]) end
      end
      local input = ds.randn(4, 256)
      assert(train(sharded, 5, input) > 0)
      say "same"
    ]]))
  end)

  it("init before another dtype, and models that are used before ds.initialize", function()
    assert.equal("ok\n", good(2, head .. [[
      local model = ds.zero.init(function() return Deep(3, 128) end)
      model.h[2]:requires_grad_(false)
      local input = ds.randn(2, 128):keep()
      local first = ds.no_grad(function() return model(input) end):item()
      local engine = make(nil, { bf16 = { enabled = true } }, model)
      engine:eval()
      assert(math.abs(engine(input):item() - first) < 0.02 * math.abs(first))
      engine:train()
      local a = train(engine, 1, input)
      assert(train(engine, 20, input) < a)
      say "ok"
    ]]))
  end)

  it("gathered has parameters whole, and keeps changes of one rank on all", function()
    for stage = 0, 3 do
      assert.equal("ok\n", good(2, head .. ([[
        local engine = make({ stage = %d }, { bf16 = { enabled = true } })
        train(engine, 2)
        local w = engine.module.h[4].weight
        ds.zero.gathered(w, function()
          ds.no_grad(function() w:fill_(ds.rank() + 0.25) end)
        end, { modifier_rank = 1 })
        local all = ds.zero.gathered({ w }, function() return w:float():sum():item() end)
        assert(all == 1.25 * 4096, all)
        assert(ds.zero.get_full(w):sum():item() == 1.25 * 4096)
        train(engine, 1)
        assert(math.abs(ds.zero.get_full(w):mean():item() - 1.25) < 0.02)
        say "ok"
      ]]):format(stage)))
    end
  end)

  it("get_full and set_full reach masters, gradients and the optimizer's state", function()
    local want
    for stage = 0, 3 do
      local out = good(2, head .. ([[
        local engine = make({ stage = %d }, { fp16 = { enabled = true, initial_scale_power = 8 } })
        local w = engine.module.h[2].weight
        local mine = ds.randn(4, 64, { dtype = "f16" }):mul_(ds.rank() + 1):keep()
        engine:backward(engine(mine))
        local g = ds.zero.get_full(w, "grad")
        assert(g.dtype == "f32" and g:size(1) == 64)
        say(("%%.5g"):format(g:abs():mean():item()))
        engine:step()
        assert(ds.zero.get_full(w, "grad") == nil)
        local m = ds.zero.get_full(w, "exp_avg")
        assert((m - g * 0.1 ):abs():max():item() < 1e-3 * g:abs():max():item())
        ds.zero.set_full(w, ds.ones(64, 64) * 0.5)
        ds.zero.set_full(w, ds.ones(64, 64) * 2, "exp_avg")
        assert(ds.zero.get_full(w):min():item() == 0.5)
        assert(ds.zero.get_full(w, "exp_avg"):max():item() == 2)
        assert(ds.zero.gathered(w, function() return w:float():max():item() end) == 0.5)
        local ok, message = pcall(ds.zero.get_full, w, "exp")
        assert(not ok and message:find "there are fp32, grad, exp_avg, exp_avg_sq", message)
        ok, message = pcall(ds.zero.set_full, w, ds.ones(3))
        assert(not ok and message:find("the values are [3], the parameter is [64 x 64]", 1, true))
      ]]):format(stage))
      want = want or out
      assert.equal(want, out)
    end
  end)

  it("refuses a sharded parameter where not every rank need come, and says what to do", function()
    local code, _, err = run(2, head .. [[
      local engine = make()
      if ds.rank() == 1 then print(engine.module.h[1].weight:sum():item()) end
    ]])
    assert.equal(1, code)
    assert.truthy(err:find("script.lua:%d+: sum.*the parameter is sharded %(ZeRO stage 3%) and "
      .. "whole only while the model runs; ds.zero.gathered"), err)
  end)

  it("ranks that use different parameters fail instead of mixing them", function()
    local code, _, err = run(2, head .. [[
      local Model = nn.module "Model"
      function Model:init() self.h = layers(4) end
      function Model:forward(x) return self.h[1 + ds.rank()](x):sum() end
      train(make({ stage3_param_persistence_threshold = 0 }, nil, Model()), 1)
    ]])
    assert.equal(1, code)
    assert.truthy(err:find "gather", err)
  end)
end)

describe("stage 3 trains", function()
  local function as_stage_0(ranks, text)
    local out = good(ranks, head .. ([[
      local results = {}
      for i, stage in ipairs { 0, 2, 3 } do
        ds.seed(1)
        results[i] = (function() %s end)()
      end
      assert(results[1] == results[2], results[1] .. " " .. results[2])
      assert(results[1] == results[3], results[1] .. " " .. results[3])
      say "same"
    ]]):format(text))
    assert.equal("same\n", out)
  end

  it("tied and frozen parameters, views of parameters, and branches that change", function()
    as_stage_0(2, [[
      local Model = nn.module "Model"
      function Model:init()
        self.h, self.frozen = layers(6), nn.Linear(64, 64)
        self.frozen:requires_grad_(false)
        self.tied, self.turn = self.h[2].weight, 0
        self.cut = nn.Parameter(ds.randn(100, 64))
      end
      function Model:forward(x)
        self.turn = self.turn + 1
        x = self.frozen(self.h[1](x)):tanh()
        x = x:matmul(self.tied:t()) + self.h[2](x)
        x = self.h[3 + self.turn % 3](x):tanh()
        x = x:matmul(self.cut:narrow(1, 5, 64)):matmul(self.cut:narrow(1, 30, 64):t())
        return (x:matmul(self.tied) * 0.01):square():mean() + self.cut:sum() * 1e-3
      end
      local model = Model()
      local engine = make({ stage = stage }, nil, model)
      local loss = train(engine, 7)
      if stage == 3 then assert(model.frozen.weight._c.data == nil) end
      engine:destroy()
      assert(model.h[1].weight:sum():item() and model.frozen.weight:sum():item())
      return loss]])
  end)

  it("with ds.checkpoint, ds.Function and parts in lists", function()
    as_stage_0(2, [[
      local scale = ds.Function("scale" .. stage, {
        forward = function(ctx, x, w) ctx:save(x, w) return x * w end,
        backward = function(ctx, dy)
          local x, w = ctx:saved()
          return dy * w, (dy * x):sum(1)
        end,
      })
      local Model = nn.module "Model"
      function Model:init()
        self.h, self.w = layers(6), nn.Parameter(ds.ones(64) * 1.1)
        self.parts = { nn.Parameter(ds.randn(32, 64)), nn.Parameter(ds.randn(32, 64)) }
      end
      function Model:forward(x)
        for i = 1, 5, 2 do
          x = ds.checkpoint(function(y) return self.h[i + 1](self.h[i](y):tanh()):tanh() end, x)
        end
        x = scale(x, self.w)
        return x:matmul(ds.cat(self.parts, 1)):float():square():mean()
      end
      local engine = make({ stage = stage, stage3_param_persistence_threshold = 0 }, nil, Model())
      local loss = train(engine, 5)
      engine:destroy()
      return loss]])
  end)

  it("with activation_checkpointing as without, and reduces buckets as their blocks are done",
    function()
      as_stage_0(2, [[
        local Block = nn.module "Block"
        function Block:init() self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64) end
        function Block:forward(x, gate)
          return x + F.dropout(self.b(self.a(x):gelu()), 0.2, { training = self.training }), gate
        end
        local Model = nn.module "Model"
        function Model:init() self.h = nn.list(5, function() return Block() end) end
        function Model:forward(x)
          local gate
          for _, block in ipairs(self.h) do x, gate = block(x, gate) end
          return x:float():square():mean()
        end
        local last
        for i, enabled in ipairs { false, true } do
          ds.seed(1)
          local engine = make({ stage = stage, stage3_param_persistence_threshold = 0,
            reduce_bucket_size = 9000 }, { activation_checkpointing = { enabled = enabled },
            bf16 = { enabled = true }, gradient_accumulation_steps = 2 }, Model())
          local loss = train(engine, 6)
          assert(not last or loss == last)
          last = loss
          for _, b in ipairs(engine.zero.buckets) do assert(not b.late) end
          engine:destroy()
        end
        return last]])
    end)

  it("two engines, several losses a step, and a script's own backward", function()
    as_stage_0(2, [[
      local a, b = make({ stage = stage }), make({ stage = stage }, nil, Deep(3))
      local last
      for i = 1, 4 do
        local la, lb = a(x), b(x)
        a:backward(la) b:backward(lb)
        a:step() b:step()
        local one, two = a(x), a(x * 0.5)
        if i % 2 == 0 then
          a:scale(one + two):backward()
        else
          a:backward(one + two)
        end
        a:step()
        last = one:item() + lb:item()
      end
      a:destroy() b:destroy()
      return last]])
  end)

  it("more ranks than elements, and parameters of no use", function()
    as_stage_0(4, [[
      local Model = nn.module "Model"
      function Model:init()
        self.one, self.three = nn.Parameter(ds.ones(1)), nn.Parameter(ds.ones(3))
        self.none, self.unused = nn.Parameter(ds.zeros(0, 4)), nn.Linear(5, 5)
      end
      function Model:forward(x) return (x:sum(2):mean() * self.one * self.three:sum() - 1):square()
        :sum() end
      local engine = make({ stage = stage, stage3_param_persistence_threshold = 0 }, nil, Model())
      local loss = train(engine, 5)
      engine:destroy()
      return loss]])
  end)

  it("evaluates sets that give ranks different numbers of batches", function()
    local want
    for _, ranks in ipairs { 2, 4 } do
      local out = good(ranks, head .. [[
        local set = { size = function() return 5 end,
          get = function(_, i) return ds.ones(64) * i end }
        local engine = make()
        say(("%.5f"):format(engine:evaluate(set, { batch_size = 1 })))
      ]])
      want = want or out
      assert.equal(want, out)
    end
  end)

  it("skips an overflow, stops at no_sync, and drops gradients", function()
    assert.equal("ok\n", good(2, head .. [[
      local engine = make(nil,
        { fp16 = { enabled = true, initial_scale_power = 8, hysteresis = 1 } })
      local w = engine.module.h[1].weight
      local before = ds.zero.get_full(w)
      engine:backward(engine(x) * (ds.rank() == 1 and 1e30 or 1))
      engine:step()
      assert(not engine:was_step_applied() and engine:loss_scale() == 128)
      assert((ds.zero.get_full(w) - before):abs():max():item() == 0)
      engine:backward(engine(x))
      engine:zero_grad()
      assert(ds.zero.get_full(w, "grad") == nil)
      train(engine, 1)
      assert(engine:was_step_applied())
      local ok, message = pcall(engine.no_sync, engine, function() end)
      assert(not ok and message:find "stage 3 every backward reduces its gradients", message)
      say "ok"
    ]]))
  end)
end)
