-- The engine through its three verbs: accumulation, clipping, precision, schedules, errors, memory.

local ds = require "ds"
local helper = require "tests.lua.helper"
local says, weights = helper.says, helper.weights
local nn, F = ds.nn, ds.F
local close = ds.testing.assert_close

local Net = nn.module "Net"
function Net:init(width)
  self.a, self.b = nn.Linear(3, width or 8), nn.Linear(width or 8, 2)
end
function Net:forward(x, y)
  local out = self.b(self.a(x):tanh())
  return y and F.mse_loss(out:float(), y:float()) or out
end

local function config(changes)
  local c = { train_micro_batch_size_per_gpu = 4, gradient_clipping = 0, steps_per_print = 0,
    optimizer = { type = "AdamW", params = { lr = 0.01 } } }
  for k, v in pairs(changes or {}) do c[k] = v end
  return c
end

local function make(changes, options)
  ds.seed(1)
  options = options or {}
  options.model, options.config = options.model or Net(), config(changes)
  return ds.initialize(options)
end

local function batches(n, size)
  ds.seed(99)
  local out = {}
  for i = 1, n do out[i] = { ds.randn(size or 4, 3), ds.randn(size or 4, 2) } end
  return out
end

local function train(engine, list)
  local losses = {}
  for _, b in ipairs(list) do
    local loss = engine(b[1], b[2])
    losses[#losses + 1] = loss:item()
    engine:backward(loss)
    engine:step()
  end
  return losses
end

describe("the three verbs", function()
  it("train", function()
    local engine = make()
    local b = batches(1)[1]
    local losses = train(engine, { b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b })
    assert(losses[20] < 0.8 * losses[1])
    assert.equal(20, engine.global_steps)
    assert.equal(80, engine.global_samples)
    assert.is_true(engine:was_step_applied())
    assert(engine:get_global_grad_norm() > 0)
  end)
  it("accumulate to what one large batch gives", function()
    local small = make { gradient_accumulation_steps = 4 }
    local large = make { train_micro_batch_size_per_gpu = 16 }
    assert.equal(16, small:train_batch_size())
    local parts = batches(4)
    local x, y = {}, {}
    for i, b in ipairs(parts) do x[i], y[i] = b[1], b[2] end
    local steps = {}
    for _, b in ipairs(parts) do
      assert.equal(#steps == 3, small:is_gradient_accumulation_boundary())
      local loss = small(b[1], b[2])
      close(small:backward(loss), loss:detach() / 4)
      steps[#steps + 1] = small:step()
    end
    assert.same({ false, false, false, true }, steps)
    local loss = large(ds.cat(x), ds.cat(y))
    large:backward(loss)
    large:step()
    close(ds.tensor(weights(small)), ds.tensor(weights(large)), { rtol = 1e-5, atol = 1e-6 })
    close(ds.tensor(small:get_global_grad_norm()), ds.tensor(large:get_global_grad_norm()),
      { rtol = 1e-5 })
    close(ds.tensor(small:get_loss()), loss, { rtol = 1e-5 })
  end)
  it("accumulate several forwards before one backward, and several backwards", function()
    local one, two = make(), make()
    local b = batches(2)
    local l1, l2 = one(b[1][1], b[1][2]), one(b[2][1], b[2][2])
    one:backward(l1 + l2)
    one:step()
    local m1 = two(b[1][1], b[1][2])
    two:backward(m1)
    local m2 = two(b[2][1], b[2][2])
    two:backward(m2)
    two:step()
    close(ds.tensor(weights(one)), ds.tensor(weights(two)), { rtol = 1e-5, atol = 1e-7 })
  end)
  it("clip by the global norm", function()
    local free, clipped = make { optimizer = { type = "SGD", params = { lr = 1 } } },
      make { optimizer = { type = "SGD", params = { lr = 1 } }, gradient_clipping = 0.01 }
    local before = weights(free)
    local b = batches(1)
    train(free, b)
    train(clipped, b)
    local norm = free:get_global_grad_norm()
    assert(norm > 0.1)
    close(ds.tensor(clipped:get_global_grad_norm()), ds.tensor(norm))
    local a, c = weights(free), weights(clipped)
    for i = 1, #before do
      assert(math.abs((a[i] - before[i]) * 0.01 / norm - (c[i] - before[i])) < 1e-6)
    end
  end)
  it("go on from engine:scale(loss), as from engine:backward(loss)", function()
    for _, more in ipairs { {}, { fp16 = { enabled = true, loss_scale = 64 } } } do
      more.gradient_accumulation_steps = 2
      local mine, theirs = make(more), make(more)
      for _, b in ipairs(batches(4)) do
        mine:scale(mine(b[1], b[2])):backward()
        theirs:backward(theirs(b[1], b[2]))
        assert.equal(theirs:step(), mine:step())
        assert.equal(theirs:get_loss(), mine:get_loss())
      end
      assert.equal(2, mine.global_steps)
      assert.same(weights(theirs), weights(mine))
    end
    local engine, b = make(), batches(1)[1]
    says("scale: expects the loss, got nil", engine.scale, engine)
    engine:scale(engine(b[1], b[2]))
    says("not the :backward() of what it gave", engine.step, engine)
  end)
  it("in no_sync() are added up, and stepped after it", function()
    local once, twice = make(), make { gradient_accumulation_steps = 2 }
    local list = batches(2)
    local given = twice:no_sync(function(b)
      says("it can't be nested", twice.no_sync, twice, print)
      local loss = twice(b[1], b[2])
      twice:backward(loss)
      says("step: not inside no_sync()", twice.step, twice)
      return loss:item()
    end, list[1])
    assert.equal(given, once(list[1][1], list[1][2]):item())
    assert.is_false(twice:step())
    twice:backward(twice(list[2][1], list[2][2]))
    assert.is_true(twice:step())
    says("oops", twice.no_sync, twice, function() error "oops" end)
    twice:no_sync(function() end) -- and is off again after the error
  end)
  it("refuse the wrong order", function()
    local engine = make()
    says("backward() has not been called", engine.step, engine)
    local b = batches(1)[1]
    local loss = engine(b[1], b[2])
    says("backward() has not been called", engine.step, engine)
    engine:backward(loss)
    says("already called", engine.backward, engine, loss)
    engine:step()
    says("backward() has not been called", engine.step, engine)
    engine:eval()
    says("evaluation mode", engine.backward, engine, loss)
    says("must have one element, not [4 x 2]", function()
      engine:train()
      engine:backward(engine(b[1]))
    end)
  end)
  it("leave the engine usable after an error in forward", function()
    local engine = make()
    says("linear: input [4 x 5] does not match weight [8 x 3]", engine, ds.ones(4, 5))
    says("(in a)", engine, ds.ones(4, 5))
    local b = batches(1)
    assert.equal(1, #train(engine, b))
  end)
end)

describe("bf16", function()
  it("keeps an fp32 master: small updates add up", function()
    local engine = make {
      bf16 = { enabled = true }, optimizer = { type = "SGD", params = { lr = 1e-4 } } }
    assert.equal("bf16", engine.module.a.weight.dtype)
    assert.equal("f32", engine.zero.segments[1].p.dtype)
    local before = engine.module.a.weight:float():tolist()
    local b = batches(1)[1]
    local list = {}
    for i = 1, 400 do list[i] = b end
    train(engine, list)
    assert.not_same(before, engine.module.a.weight:float():tolist())
  end)
  it("follows fp32", function()
    local list = batches(40)
    local fine, coarse = train(make(), list), train(make { bf16 = { enabled = true } }, list)
    for i = 1, 40 do assert(math.abs(fine[i] - coarse[i]) < 0.05 * math.max(1, fine[i])) end
  end)
  it("skips a step whose gradient is not finite, and the schedule with it", function()
    local engine, _, _, schedule = make {
      bf16 = { enabled = true }, nan_check = false,
      scheduler = {
        type = "WarmupLR",
        params = { warmup_num_steps = 10, warmup_type = "linear", warmup_max_lr = 0.1 },
      },
    }
    local b = batches(1)[1]
    train(engine, { b, b, b })
    local lr, w = schedule:get_lr()[1], weights(engine)
    local loss = engine(b[1] * math.huge, b[2])
    engine:backward(loss)
    assert.is_true(engine:step())
    assert.is_false(engine:was_step_applied())
    assert.equal(1, engine.skipped_steps)
    assert.equal(4, engine.global_steps)
    assert.equal(lr, schedule:get_lr()[1])
    assert.same(w, weights(engine))
    train(engine, { b })
    assert.is_true(engine:was_step_applied())
    assert.not_equal(lr, schedule:get_lr()[1])
  end)
end)

describe("a loss that is NaN", function()
  it("stops training with the step named, before anything is changed", function()
    local engine = make()
    local b = batches(1)[1]
    train(engine, { b })
    local before = weights(engine)
    local loss = engine(b[1] * (0 / 0), b[2])
    says("step 2: the loss is NaN; training stops (nan_check)", engine.backward, engine, loss)
    assert.same(before, weights(engine))
  end)
end)

describe("parameters", function()
  it("that are frozen stay, unused ones only decay, tied ones train once", function()
    local model = Net()
    model.unused = nn.Linear(2, 2)
    model.a.bias.requires_grad = false
    local bias, unused = model.a.bias:tolist(), model.unused.weight:tolist()
    local engine = make({ optimizer = { type = "SGD", params = { lr = 0.1 } } }, { model = model })
    train(engine, batches(3))
    assert.same(bias, model.a.bias:tolist())
    assert.same(unused, model.unused.weight:tolist())
  end)
  it("in groups have settings of their own", function()
    local model = Net()
    local engine, optimizer = make({ optimizer = { type = "SGD", params = { lr = 0.1 } } }, {
      model = model,
      model_parameters = {
        { params = model.a:parameters(), lr = 0 }, { params = model.b:parameters() } },
    })
    local a, b = model.a.weight:tolist(), model.b.weight:tolist()
    train(engine, batches(2))
    assert.same(a, model.a.weight:tolist())
    assert.not_same(b, model.b.weight:tolist())
    assert.same({ 0, 0.1 }, engine:get_lr())
    assert.equal(2, #optimizer.param_groups)
  end)
  it("of another engine get no gradient unless asked", function()
    local generator = make()
    local critic_net = nn.Linear(2, 1)
    local critic = ds.initialize { model = critic_net, config = config() }
    local x = batches(1)[1][1]
    local fake = generator(x)
    local score = critic(fake)
    generator:backward(score:mean())
    assert.is_true(critic_net.weight._fresh)
    generator:step()
    fake = generator(x)
    score = critic(fake)
    generator:backward(score:mean(), { also = critic })
    assert.is_false(critic_net.weight._fresh)
    generator:step()
    critic:step()
    assert.equal(2, generator.global_steps)
  end)
end)

describe("learning rates", function()
  it("follow the schedule of the config", function()
    local engine, _, _, schedule = make { scheduler = { type = "WarmupLR",
      params = { warmup_num_steps = 4, warmup_type = "linear", warmup_max_lr = 0.4 } } }
    local seen = {}
    for _, b in ipairs(batches(6)) do
      seen[#seen + 1] = engine:get_lr()[1]
      train(engine, { b })
    end
    close(ds.tensor(seen), ds.tensor { 0, 0, 0.1, 0.2, 0.3, 0.4 })
    assert.equal(schedule, engine.lr_scheduler)
  end)
  it("follow a function, and set_lr scales its base", function()
    local engine = make({}, { lr_scheduler = function(step, lr) return lr * 0.5 ^ step end })
    train(engine, batches(2))
    close(ds.tensor(engine:get_lr()), ds.tensor { 0.0025 })
    engine:set_lr(0.01)
    assert.same({ 0.01 }, engine:get_lr())
    train(engine, batches(1))
    close(ds.tensor(engine:get_lr()), ds.tensor { 0.005 })
  end)
  it("without a schedule stay what set_lr says", function()
    local engine = make()
    engine:set_lr(0.25)
    train(engine, batches(2))
    assert.same({ 0.25 }, engine:get_lr())
  end)
end)

describe("optimizers in Lua", function()
  it("work by name from the config, over blocks", function()
    ds.optimizer("SignSGD", {
      state = { "m" }, defaults = { lr = 1e-3, momentum = 0.9 },
      step = function(p, g, s, h)
        s.m:mul_(h.momentum):add_(g, 1 - h.momentum)
        p:add_(s.m:sign(), -h.lr)
      end,
    })
    local engine = make { optimizer = { type = "SignSGD", params = { lr = 0.01 } } }
    local before = ds.tensor(weights(engine))
    train(engine, batches(1))
    local moved = (ds.tensor(weights(engine)) - before):abs()
    close(moved:max(), ds.tensor(0.01), { rtol = 1e-3 })
    local b = batches(1)[1]
    local list = {}
    for i = 1, 30 do list[i] = b end
    local losses = train(engine, list)
    assert(losses[30] < losses[1])
  end)
end)

describe("whole batches and evaluation", function()
  local set = { size = function() return 10 end, get = function(_, i)
    return ds.full({ 3 }, i / 10), ds.full({ 2 }, (i % 3) / 3)
  end }
  it("train_batch takes as many micro-batches as a step needs", function()
    local engine, _, loader = make({ gradient_accumulation_steps = 2 }, { training_data = set })
    local loss = engine:train_batch(loader)
    assert.equal(1, engine.global_steps)
    assert.equal(2, engine.micro_steps)
    assert(loss > 0)
  end)
  it("evaluate is the mean over exactly all samples, and leaves the mode", function()
    local engine = make()
    local model, total = engine.module, 0
    for i = 1, 10 do
      local x, y = set:get(i)
      total = total + ds.no_grad(function() return model(x:unsqueeze(1), y:unsqueeze(1)):item() end)
    end
    close(ds.tensor(engine:evaluate(set)), ds.tensor(total / 10), { rtol = 1e-5 })
    assert.is_true(engine.training)
    assert.is_true(model.training)
  end)
end)

describe("memory", function()
  it("is flat over many steps, faults no pages, and comes back", function()
    local engine = make({}, { model = Net(256) })
    local list = batches(50, 256)
    train(engine, list)
    local peak, faults = ds.memory().peak, ds.memory().page_faults
    local takes = ds.memory().takes
    for _ = 1, 6 do train(engine, list) end
    assert(ds.memory().peak <= peak * 1.02, "the peak grew")
    assert.equal(takes, ds.memory().takes)
    assert(ds.memory().page_faults - faults < 10 * 300)
  end)
  it("keeps what forward returned until the next step", function()
    local engine = make()
    local b = batches(2)
    local out = engine(b[1][1])
    local loss = F.mse_loss(out, b[1][2])
    engine:backward(loss)
    assert.same({ 4, 2 }, out:size())
    assert(out:sum():item() ~= nil)
    engine:step()
    assert(out:sum():item() ~= nil)
    engine(b[2][1])
    says("was released when the engine's next step began", function() return out + 1 end)
  end)
end)

describe("a GPU that is not there", function()
  it("is said before anything is moved, with the reason", function()
    local script = helper.temporary()
    helper.write(script, [[
      local ds = require "ds"
      print(ds.cuda.is_available())
      ds.initialize { model = ds.nn.Linear(2, 1), config = { train_micro_batch_size_per_gpu = 1,
        device = "cuda" } }]])
    local file = io.popen("DS_CUDA_LIBRARY=/nowhere.so "
      .. require("ds.host").executable .. " " .. script .. " 2>&1")
    local out = file:read "*a"
    file:close()
    os.remove(script)
    helper.has(out, "false\tthis build has no CUDA backend (there is no /nowhere.so)")
    helper.has(out, ":3: this build has no CUDA backend (there is no /nowhere.so); use")
  end)
end)

describe("initialize", function()
  it("says what is wrong", function()
    says("model is missing", ds.initialize, { config = config() })
    says("unknown option 'modle'", ds.initialize, { modle = Net() })
    says("no config", ds.initialize, { model = Net() })
    says("the model has no parameters", ds.initialize,
      { model = function() end, config = config() })
    says("belongs to another engine", function()
      local m = Net()
      ds.initialize { model = m, config = config() }
      ds.initialize { model = m, config = config() }
    end)
    says("unknown setting 'learning_rate'", ds.optim.AdamW, Net():parameters(),
      { learning_rate = 1 })
  end)
  it("tells the verbs called without an engine, and a model that returns nothing", function()
    local engine = make()
    for _, verb in ipairs { "backward", "step", "evaluate", "train_batch", "save_checkpoint",
      "load_checkpoint" } do
      says(verb .. ": call it with a colon, as engine:" .. verb, function() engine[verb]() end)
    end
    says("does the model's forward() return it?", function() engine:backward(nil) end)
  end)
end)
