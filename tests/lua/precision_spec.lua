-- fp16 with its loss scale, and the types that gradients are kept in, through the engine.

local ds = require "ds"
local helper = require "tests.lua.helper"
local says, weights = helper.says, helper.weights
local nn, F = ds.nn, ds.F
local close = ds.testing.assert_close

--- A net whose loss is small, and infinite when asked for.
local Net = nn.module "Net"
function Net:init() self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2) end
function Net:forward(x, y)
  local loss = F.mse_loss(self.b(self.a(x):tanh()):float(), y:float()) * 2 ^ -10
  return self.explode and loss * math.huge or loss
end

local function make(fp16, changes)
  local c = { train_micro_batch_size_per_gpu = 4, gradient_clipping = 0, steps_per_print = 0,
    optimizer = { type = "SGD", params = { lr = 100 } } }
  if fp16 then
    c.fp16 = { enabled = true }
    for k, v in pairs(fp16) do c.fp16[k] = v end
  end
  for k, v in pairs(changes or {}) do c[k] = v end
  ds.seed(1)
  return ds.initialize { model = Net(), config = c }
end

local function batch(i)
  ds.seed(100 + i)
  return ds.randn(4, 3), ds.randn(4, 2)
end

--- The fp32 weights.
local function master(engine) return engine.zero.segments[1].p end

--- One optimizer step whose micro-batch `bad` (nil: none) has an infinite loss.
local function step(engine, i, bad)
  local micro = 0
  repeat
    micro = micro + 1
    engine.module.explode = micro == bad
    engine:backward(engine(batch(i)))
  until engine:step()
end

--- Steps as in "x.x": x overflows.
local function follow(engine, steps, first, micro)
  local scales = {}
  for i = 1, #steps do
    local before, overflow = weights(engine), steps:sub(i, i) == "x"
    step(engine, (first or 0) + i, overflow and (micro or 1) or nil)
    scales[i] = engine:loss_scale()
    assert.equal(not overflow, engine:was_step_applied())
    if overflow then assert.same(before, weights(engine))
    else assert.not_same(before, weights(engine)) end
  end
  return scales
end

local notes = "xxx.x.....x."
local plain = { 8, 4, 2, 2, 1, 1, 1, 1, 1, 2, 2, 2 }
local consecutive = { 8, 4, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4 }
for i = 1, 12 do plain[i], consecutive[i] = plain[i] * 2 ^ 13, consecutive[i] * 2 ^ 13 end

describe("the loss scale of fp16", function()
  it("follows DeepSpeed's, skipping steps and their schedule", function()
    local warmup = { scheduler = { type = "WarmupLR", params = { warmup_num_steps = 10,
      warmup_type = "linear", warmup_max_lr = 100, warmup_min_lr = 10 } } }
    local engine, _, _, schedule = make({ loss_scale_window = 4 }, warmup)
    assert.equal(65536, engine:loss_scale())
    assert.same(plain, follow(engine, notes))
    assert.equal(12, engine.global_steps)
    assert.equal(5, engine.skipped_steps)
    assert.equal(48, engine.global_samples)
    local fresh = make({}, warmup)
    follow(fresh, ".......") -- as many as were not skipped
    assert.equal(fresh:get_lr()[1], schedule:get_lr()[1])
  end)
  it("with consecutive hysteresis, too", function()
    assert.same(consecutive,
      follow(make { loss_scale_window = 4, consecutive_hysteresis = true }, notes))
  end)
  it("sees an overflow in any micro-batch", function()
    for micro = 1, 3 do
      local engine = make({ loss_scale_window = 4 }, { gradient_accumulation_steps = 3 })
      assert.same(plain, follow(engine, notes, 0, micro))
      assert.equal(36, engine.micro_steps)
    end
  end)
  it("goes on from a checkpoint", function()
    for half = 1, #notes - 1, 3 do
      local dir = os.tmpname()
      os.remove(dir)
      local settings = { loss_scale_window = 4 }
      local whole, first = make(settings), make(settings)
      follow(whole, notes)
      follow(first, notes:sub(1, half))
      first:save_checkpoint(dir)
      local second = make(settings)
      second:load_checkpoint(dir)
      assert.equal(plain[half], second:loss_scale())
      local rest = follow(second, notes:sub(half + 1), half)
      for i, scale in ipairs(rest) do assert.equal(plain[half + i], scale) end
      assert.same(weights(whole), weights(second))
      assert.equal(5, second.skipped_steps)
      -- a scale of one's own is not replaced by the saved one
      local fixed = make { loss_scale = 32 }
      fixed:load_checkpoint(dir)
      assert.equal(32, fixed:loss_scale())
      local fine = make()
      fine:load_checkpoint(dir)
      assert.equal(1, fine:loss_scale())
      os.execute("rm -r '" .. dir .. "'")
    end
  end)
  it("begins anew where the checkpoint has none", function()
    local dir = os.tmpname()
    os.remove(dir)
    local fine = make()
    follow(fine, "..")
    fine:save_checkpoint(dir)
    local half = make()
    half:load_checkpoint(dir)
    local engine = make { initial_scale_power = 5 }
    engine:load_checkpoint(dir)
    assert.equal(32, engine:loss_scale())
    assert.equal(2, engine.global_steps)
    os.execute("rm -r '" .. dir .. "'")
  end)
  it("ends training at its minimum, with the step and what to do", function()
    local engine = make { initial_scale_power = 2, min_loss_scale = 2, hysteresis = 1 }
    assert.same({ 2, 2 }, follow(engine, "x."))
    local before = weights(engine)
    says("step 3 skipped: a gradient is not finite, and the loss scale 2 is the smallest allowed "
      .. "(fp16.min_loss_scale); lower the learning rate", step, engine, 3, 1)
    assert.same(before, weights(engine))
    assert.equal(3, engine.global_steps)
    assert.equal(2, engine.skipped_steps)
  end)
  it("stays where it is fixed, and skips the same", function()
    local engine = make { loss_scale = 128 }
    assert.same({ 128, 128, 128, 128, 128, 128 }, follow(engine, "xxx.x."))
    assert.equal(4, engine.skipped_steps)
  end)
  it("that fits changes no bit of the weights, not even when it grows", function()
    -- Powers of two only move the exponent; the scale that divides is the one that multiplied.
    local fixed = make { loss_scale = 1024 }
    local growing = make { initial_scale_power = 8, loss_scale_window = 1 }
    for i = 1, 6 do
      step(fixed, i)
      step(growing, i)
      assert.same(weights(fixed), weights(growing))
      assert.equal(fixed:get_global_grad_norm(), growing:get_global_grad_norm())
    end
    assert.equal(2 ^ 13, growing:loss_scale())
  end)
  it("falls from a value too large until training goes on", function()
    local engine = make { initial_scale_power = 40, hysteresis = 1 }
    for i = 1, 40 do step(engine, i) end
    assert(engine.skipped_steps > 5 and engine.skipped_steps < 35, engine.skipped_steps)
    assert.is_true(engine:was_step_applied())
    assert.equal(2 ^ (40 - engine.skipped_steps), engine:loss_scale())
  end)
  it("clips what is unscaled", function()
    local free, clipped = make { loss_scale = 64 },
      make({ loss_scale = 64 }, { gradient_clipping = 1e-5 })
    local before = weights(free)
    step(free, 1)
    step(clipped, 1)
    local norm = free:get_global_grad_norm()
    assert(norm > 1e-4 and norm < 1e-2, norm)
    close(ds.tensor(clipped:get_global_grad_norm()), ds.tensor(norm))
    local start, a, c = master(make()):tolist(), master(free):tolist(), master(clipped):tolist()
    for i = 1, #start do
      assert.is_near((a[i] - start[i]) * 1e-5 / norm, c[i] - start[i], 5e-7)
    end
    assert.not_same(before, weights(free))
  end)
  it("must be the same for engines that share a backward", function()
    local one, other = make { loss_scale = 8 }, make { loss_scale = 16 }
    local x, y = batch(1)
    says("loss scales 8 and 16", function() one:backward(one(x, y), { also = other }) end)
    local same = make { loss_scale = 8 }
    one:backward(one(x, y), { also = same })
  end)
end)

describe("fp16", function()
  it("keeps fp16 weights beside an fp32 master, and takes inputs of any type", function()
    local engine = make { loss_scale = 16 }
    assert.equal("f16", engine.module.a.weight.dtype)
    step(engine, 1)
    local x, y = batch(1)
    local loss = engine(x:to "f64", y)
    assert.is_true(loss:item() > 0)
    local fine, rounded = master(engine), engine.zero.segments[1].low
    assert.equal("f32", fine.dtype)
    assert.same(fine:to("f16"):tolist(), rounded:tolist())
    assert.not_same(fine:tolist(), rounded:tolist())
  end)
  it("trains with every optimizer, near fp32", function()
    for name, lr in pairs { AdamW = 0.01, Adam = 0.01, SGD = 100, Lion = 0.003, Adagrad = 0.05 } do
      local settings = { optimizer = { type = name, params = { lr = lr } } }
      local fine, half = make(nil, settings), make({}, settings)
      local first, last = 0, 0
      for i = 1, 60 do
        local x, y = batch(i % 4)
        local a, b = fine(x, y), half(x, y)
        assert.is_near(a:item(), b:item(), 0.02 * a:item() + 1e-6, name .. ", step " .. i)
        if i <= 4 then first = first + a:item() elseif i > 56 then last = last + b:item() end
        fine:backward(a)
        half:backward(b)
        fine:step()
        half:step()
      end
      assert.equal(0, half.skipped_steps)
      assert(last < first, name)
    end
  end)
  it("says what it is", function()
    local engine = make { initial_scale_power = 4, hysteresis = 3 }
    assert.is_true(engine:fp16_enabled())
    assert.is_false(engine:bfloat16_enabled())
    assert.is_true(engine:dynamic_loss_scale())
    assert.equal(16, engine:initial_dynamic_scale())
    assert.same({ init_scale = 16, scale_window = 1000, delayed_shift = 3, min_scale = 1,
      consecutive_hysteresis = false }, engine:dynamic_loss_scale_args())
    local fixed, fine = make { loss_scale = 8 }, make()
    assert.is_false(fixed:dynamic_loss_scale())
    assert.is_nil(fixed:dynamic_loss_scale_args())
    assert.equal(8, fixed:loss_scale())
    assert.is_false(fine:fp16_enabled())
    assert.is_false(fine:dynamic_loss_scale())
    assert.equal(1, fine:loss_scale())
    assert.same({ "f16", "f16" }, { engine:get_data_types() })
    assert.same({ "f32", "f32" }, { fine:get_data_types() })
  end)
end)

-- ---- gradients

--- Every kind of layer once; 1200 rows make the fused loss work in several chunks.
local Tower = nn.module "Tower"
function Tower:init(tied)
  self.embed, self.norm, self.rms = nn.Embedding(40, 32), nn.LayerNorm(32), nn.RMSNorm(32)
  self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)
  self.gate, self.drop = nn.Linear(32, 32, { activation = "gelu" }), nn.Dropout(0.1)
  self.square = nn.Parameter(ds.randn(32, 32) * 0.2)
  self.head = tied and self.embed or nn.Linear(32, 40, { bias = false })
end
function Tower:forward(x, y)
  local h = self.norm(self.embed(x))
  h = self.drop(F.attention(self.qkv(h), { n_head = 4, causal = true }))
  local up, down = self.up, self.down
  h = self.rms(F.mlp(h, up.weight, up.bias, down.weight, down.bias, { activation = "gelu" }))
  h = self.gate(h):matmul(self.square)
  return F.linear_cross_entropy(h, self.head.weight, y)
end

local function tower(changes, tied)
  local c = { train_micro_batch_size_per_gpu = 12, steps_per_print = 0,
    optimizer = { type = "AdamW", params = { lr = 0.003 } } }
  for k, v in pairs(changes or {}) do c[k] = v end
  ds.seed(5)
  return ds.initialize { model = Tower(tied), config = c }
end

local function tokens(i)
  ds.seed(50 + i)
  return ds.randint(0, 40, 12, 100), ds.randint(0, 40, 12, 100)
end

local half = { bf16 = { bf16 = { enabled = true } },
  f16 = { fp16 = { enabled = true, loss_scale = 256 } } }

local function with(settings, more)
  local out = {}
  for k, v in pairs(settings) do out[k] = v end
  for k, v in pairs(more) do out[k] = v end
  return out
end

local function grad_dtype(changes)
  local engine = tower(changes)
  local dtype = engine.module.up.weight.grad.dtype
  assert.equal(dtype, (select(2, engine:get_data_types())))
  return dtype
end

describe("gradients", function()
  it("are kept in the weights' type where one micro-batch makes a step, else in fp32", function()
    local four = { gradient_accumulation_steps = 4 }
    assert.equal("f32", grad_dtype())
    assert.equal("f32", grad_dtype(four))
    for dtype, settings in pairs(half) do
      local name = dtype == "f16" and "fp16" or dtype
      assert.equal(dtype, grad_dtype(settings))
      assert.equal("f32", grad_dtype(with(settings, four)))
      local wide = { data_types = { grad_accum_dtype = "fp32" } }
      assert.equal("f32", grad_dtype(with(settings, wide)))
      assert.equal(dtype, grad_dtype(with(settings,
        { gradient_accumulation_steps = 4, data_types = { grad_accum_dtype = name } })))
    end
  end)
  it("cost two bytes a parameter less", function()
    local bytes = {}
    for i, accum in ipairs { "fp32", "bf16" } do
      collectgarbage()
      local before = ds.memory().live
      local engine = ds.initialize { model = nn.Linear(512, 512, { bias = false }), config = {
        train_batch_size = 1, bf16 = { enabled = true }, optimizer = { type = "SGD" },
        data_types = { grad_accum_dtype = accum } } }
      collectgarbage()
      bytes[i] = ds.memory().live - before
      engine:destroy()
    end
    assert.equal(2 * 512 * 512, bytes[1] - bytes[2])
  end)
  it("are what fp32 ones round to, whichever operation makes them", function()
    for dtype, settings in pairs(half) do
      local wide = tower(with(settings, { data_types = { grad_accum_dtype = "fp32" } }))
      local low = tower(settings)
      for _, engine in ipairs { wide, low } do
        local x, y = tokens(1)
        engine:backward(engine(x, y))
      end
      for i, e in ipairs(wide.named) do
        local want, got = e.parameter.grad, low.named[i].parameter.grad
        assert.equal("f32", want.dtype)
        assert.equal(dtype, got.dtype)
        assert(want:abs():max():item() > 0, e.name)
        assert.same(want:to(dtype):tolist(), got:tolist(), e.name)
      end
    end
  end)
  it("add up where a weight is used twice, and over micro-batches", function()
    for dtype, settings in pairs(half) do
      local name = dtype == "f16" and "fp16" or "bf16"
      local wide = tower(with(settings, { gradient_accumulation_steps = 3 }), true)
      local low = tower(with(settings, { gradient_accumulation_steps = 3,
        data_types = { grad_accum_dtype = name } }), true)
      for _, engine in ipairs { wide, low } do
        for i = 1, 2 do
          local x, y = tokens(i)
          engine:backward(engine(x, y))
          engine:step()
        end
      end
      for i, e in ipairs(wide.named) do
        local want, got = e.parameter.grad, low.named[i].parameter.grad
        assert.equal("f32", want.dtype)
        close(got:float(), want, { rtol = 0.02, atol = 0.004 * want:abs():max():item() })
      end
    end
  end)
  it("add up in fp32 where boundaries are set by hand", function()
    for dtype, settings in pairs(half) do
      local wide = tower(with(settings, { data_types = { grad_accum_dtype = "fp32" } }), true)
      -- the first call: before a forward, and between one and its backward, which has made a
      -- gradient already
      for _, late in ipairs { false, true } do
        local hand = tower(settings, true)
        for i = 1, 3 do
          for _, engine in ipairs { wide, hand } do
            local x, y = tokens(i)
            if not late then engine:set_gradient_accumulation_boundary(i == 3) end
            local loss = engine(x, y)
            engine:set_gradient_accumulation_boundary(i == 3)
            engine:backward(loss)
            if i < 3 then assert.is_false(engine:step()) end
          end
        end
        assert.same({ dtype, "f32" }, { hand:get_data_types() })
        for i, e in ipairs(wide.named) do
          local want, got = e.parameter.grad, hand.named[i].parameter.grad
          assert.equal("f32", got.dtype)
          if late then close(got, want, { rtol = 0.02, atol = 0.004 * want:abs():max():item() })
          else assert.same(want:tolist(), got:tolist(), e.name) end
        end
        assert.is_true(hand:step())
        wide:zero_grad()
      end
    end
  end)
  it("stay in the type that the config names, also by hand", function()
    local named = tower(with(half.bf16, { data_types = { grad_accum_dtype = "bf16" } }))
    named:set_gradient_accumulation_boundary(true)
    assert.same({ "bf16", "bf16" }, { named:get_data_types() })
    assert.equal("bf16", named.module.up.weight.grad.dtype)
  end)
  it("follow fp32 ones of fp32 weights", function()
    for dtype, settings in pairs(half) do
      for gas = 1, 4, 3 do
        local fine = tower({ gradient_accumulation_steps = gas })
        local low = tower(with(settings, { gradient_accumulation_steps = gas }))
        for _, engine in ipairs { fine, low } do
          local x, y = tokens(1)
          engine:backward(engine(x, y))
        end
        for i, e in ipairs(fine.named) do
          local want = e.parameter.grad
          local got = low.named[i].parameter.grad:float() / low:loss_scale()
          local bound = (dtype == "f16" and 0.02 or 0.15) * want:norm():item()
          assert((got - want):norm():item() < bound,
            ("%s of %s, accumulation %d"):format(e.name, dtype, gas))
        end
      end
    end
  end)
  it("train every kind of layer in low precision as in fp32", function()
    local curves = {}
    local kinds = { f32 = {}, bf16 = half.bf16, f16 = { fp16 = { enabled = true } } }
    for name, settings in pairs(kinds) do
      local engine = tower(settings, true)
      curves[name] = {}
      for i = 1, 40 do
        local x = tokens(1)
        local loss = engine(x, x) -- every token its own answer: quickly learnt
        curves[name][i] = loss:item()
        engine:backward(loss)
        engine:step()
      end
      assert(engine.skipped_steps <= 4, engine.skipped_steps)
      assert(curves[name][40] < 0.7 * curves[name][1], name)
    end
    for i = 1, 40 do
      assert.is_near(curves.f32[i], curves.bf16[i], 0.1 * curves.f32[i], "bf16, step " .. i)
    end
  end)
  it("reach optimizers written in Lua in fp32", function()
    ds.optimizer("SeesFp32", { defaults = { lr = 0.5 }, step = function(p, g, _, h)
      assert(p.dtype == "f32" and g.dtype == "f32")
      p:add_(g, -h.lr)
    end })
    local settings = { optimizer = { type = "SeesFp32", params = { lr = 100 } } }
    local engine, plain_sgd = make({ loss_scale = 64 }, settings), make { loss_scale = 64 }
    step(engine, 1)
    step(plain_sgd, 1)
    close(ds.tensor(weights(engine)), ds.tensor(weights(plain_sgd)), { rtol = 1e-3 })
  end)
end)
