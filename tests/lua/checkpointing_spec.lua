-- Forwards that backward makes again: the same gradients, with less memory.

local ffi = require "ffi"
local ds = require "ds"
local GPT = require "models.gpt"
local says = require("tests.lua.helper").says
local nn, F = ds.nn, ds.F

describe("ds.checkpoint", function()
  it("gives the same gradients and dropout masks", function()
    local w = ds.randn(8, 8):requires_grad_()
    local function f(x) return F.dropout(x:matmul(w):relu(), 0.5) end
    local function run(wrapped)
      ds.seed(3)
      local x = ds.randn(4, 8):requires_grad_()
      local y = wrapped and ds.checkpoint(f, x) or f(x)
      local z = F.dropout(y, 0.5)
      local loss = (z * z):sum()
      w.grad = nil
      loss:backward()
      return loss:item(), w.grad:tolist(), x.grad:tolist()
    end
    local a, b = { run(false) }, { run(true) }
    assert.same(a, b)
  end)

  it("works on modules and inside each other", function()
    local m = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    local x = ds.randn(3, 4):requires_grad_()
    local function grads(f)
      m:zero_grad()
      x.grad = nil
      f(x):sum():backward()
      return { m[1].weight.grad:tolist(), m[3].bias.grad:tolist(), x.grad:tolist() }
    end
    local want = grads(m)
    assert.same(want, grads(function(t) return ds.checkpoint(m, t) end))
    assert.same(want, grads(function(t)
      return ds.checkpoint(function(u) return ds.checkpoint(m, u * 1) end, t)
    end))
  end)

  it("passes nil, numbers, integers and its arguments themselves through", function()
    local w, seen = ds.tensor({ { 1, -2, 3 }, { 0, 4, 1 }, { 2, 2, -5 } }):requires_grad_(), {}
    local function f(x, a, b, ids, c)
      seen[#seen + 1] = { a == nil, b, ids.dtype, c == nil }
      local y = x:matmul(w)
      return nil, y, y, x, ids + 1, b, w, nil
    end
    local function run(call)
      w.grad = nil
      local x = ds.tensor({ { 1, 2, 3 } }):requires_grad_()
      local out = { n = 8, call(f, x * 1, nil, 7, ds.tensor({ 4, 5 }, "i64"), nil) }
      assert.is_nil(out[1])
      assert.is_nil(out[8])
      assert.equal(7, out[6])
      assert.same({ 5, 6 }, out[5]:tolist())
      assert.is_false(out[5].requires_grad);
      (out[2] * 2 + out[3] * 3):sum():backward({ retain_graph = true });
      (out[4]:sum() * 10 + (out[7] * out[7]):sum()):backward()
      return { w.grad:tolist(), x.grad:tolist() }
    end
    local want = run(function(g, ...) return g(...) end)
    assert.same(want, run(ds.checkpoint))
    assert.same({ true, 7, "i64", true }, seen[#seen])
    assert.is_false(w._rec)
  end)

  it("runs f once in forward and once in each backward, and not at all where nothing is recorded",
    function()
      local calls = 0
      local function f(x)
        calls = calls + 1
        return x * x
      end
      local x = ds.tensor({ 3 }):requires_grad_()
      local y = ds.checkpoint(f, x):sum()
      assert.equal(1, calls)
      y:backward { retain_graph = true }
      y:backward()
      assert.equal(3, calls)
      assert.equal(12, x.grad:item())
      assert.is_false(ds.no_grad(function() return ds.checkpoint(f, x) end).requires_grad)
      assert.equal(4, calls)
    end)

  it("keeps its arguments from what works in place", function()
    local norm = nn.LayerNorm(4, { inplace = true })
    local function f(x, delta)
      local sum, h = norm(x, delta)
      return sum + h
    end
    local x0 = ds.randn(2, 4):requires_grad_()
    local function run(call)
      norm:zero_grad()
      x0.grad = nil
      call(f, x0 * 1, x0 + 1):square():sum():backward() -- what a sum gives may be overwritten
      return { x0.grad:tolist(), norm.weight.grad:tolist() }
    end
    assert.same(run(function(g, ...) return g(...) end), run(ds.checkpoint))
  end)

  it("says what would get no gradient", function()
    local x = ds.ones(3):requires_grad_()
    local y = x * 2
    local z = ds.checkpoint(function(a) return a * y end, ds.ones(3):requires_grad_())
    says("in backward of checkpoint: it reads a tensor with a history, the result of "
      .. "'mul_scalar', that is not among its arguments", function() z:sum():backward() end)
    says("argument 2 is a table with tensors that have a history",
      ds.checkpoint, function(a) return a end, x, { { part = x * 2 } })
    says("result 1 of f is a table", ds.checkpoint, function(a) return { a * 2 } end, x)
    local plain = { ds.ones(3), 5, leaf = x } -- no history: they are the same in backward
    ds.checkpoint(function(a, t) return a * t[1] * t.leaf end, x * 1, plain):sum():backward()
    assert.same({ 2, 2, 2 }, x.grad:tolist())
  end)

  it("says when f does something else in backward, and restores the random numbers", function()
    local turn = 0
    local function f(x)
      turn = turn + 1
      if turn == 2 then return F.dropout(x, 0.5):sum() end
      if turn == 4 then error "not again" end
      return F.dropout(x, 0.5)
    end
    local x = ds.randn(3):requires_grad_()
    for _, text in ipairs { "f gave [3] as result 1 in forward and gives [] now", "not again" } do
      local y = ds.checkpoint(f, x):sum()
      local generator = require("ds.tensor").generator
      local offset = generator.offset
      says(text, function() y:backward() end)
      assert.equal(offset, generator.offset)
    end
    says("expects a function or module and its arguments, not a table", ds.checkpoint, {}, x)
    says("expects a function or module and its arguments, not nil", ds.checkpoint)
  end)
end)

-- ---- the config

describe("activation_checkpointing", function()
  local C = require("ds.ffi").C
  local model = { n_layer = 4, n_head = 2, n_embd = 32, block_size = 64, vocab_size = 32,
    dropout = 0.1 }

  local function make(keys, changes, given)
    ds.seed(5)
    local c = { train_micro_batch_size_per_gpu = 8, gradient_accumulation_steps = 2,
      steps_per_print = 0, optimizer = { type = "AdamW", params = { lr = 1e-2 } },
      activation_checkpointing = keys }
    for key, value in pairs(changes or {}) do c[key] = value end
    return (ds.initialize { model = given or GPT(model), config = c })
  end

  --- Losses and norms of two steps and a hash of the weights after them, and the bytes that a
  -- forward and backward needed at most beyond what was there.
  local function train(engine)
    local numbers, most = {}, 0
    local x, y = ds.randint(0, 32, { 8, 64 }), ds.randint(0, 32, { 8, 64 })
    for _ = 1, 4 do
      collectgarbage()
      C.ds_memory_reset_peak(0)
      local before = ds.memory().live
      local loss = engine(x, y)
      numbers[#numbers + 1] = loss:item()
      engine:backward(loss)
      most = math.max(most, ds.memory().peak - before)
      if engine:step() then numbers[#numbers + 1] = engine:get_global_grad_norm() end
    end
    local hash, weights = ffi.new "char[17]", engine.zero:all_weights()[1]
    C.ds_hash(hash, weights._c.data, weights:numel() * weights:element_size())
    numbers[#numbers + 1] = ffi.string(hash)
    engine:destroy()
    return numbers, most
  end

  it("gives the same steps to the last bit, with less memory the more is recomputed", function()
    local on = { enabled = true }
    for _, precision in ipairs { {}, { bf16 = on }, { fp16 = on } } do
      local want, plain = train(make(nil, precision))
      local one, some = train(make({ enabled = true, number_checkpoints = 2 }, precision))
      local two, least = train(make({ enabled = true }, precision))
      assert.same(want, one)
      assert.same(want, two)
      assert.is_true(some < 0.8 * plain, some / plain)
      assert.is_true(least < 0.6 * plain, least / plain)
    end
  end)

  it("gives the same gradients where the loss is made inside", function()
    local Model = nn.module "Model"
    function Model:init() self.fc, self.head = nn.Linear(8, 24), nn.Linear(24, 9) end
    function Model:forward(x, y)
      local function loss(h) return F.linear_cross_entropy(h, self.head.weight, y) end
      local h = self.fc(x):tanh()
      if self.wrapped then return ds.checkpoint(loss, h) end
      return loss(h)
    end
    local results = {}
    for i, wrapped in ipairs { false, true } do
      ds.seed(4)
      local engine = make(nil, { gradient_accumulation_steps = 3, bf16 = { enabled = true } },
        Model())
      engine.module.wrapped = wrapped
      for _ = 1, 3 do
        engine:backward(engine(ds.randn(4, 8), ds.randint(0, 9, { 4 })))
        engine:step()
      end
      results[i] = { engine:get_global_grad_norm(), engine.module.head.weight:tolist() }
    end
    assert.same(results[1], results[2])
  end)

  it("is off unless enabled, ends with its engine, and leaves evaluation alone", function()
    local gpt = GPT(model)
    local engine = make({ number_checkpoints = 2, cpu_checkpointing = true }, nil, gpt)
    assert.is_nil(rawget(gpt.h[1], "forward"))
    engine:destroy()
    engine = make({ enabled = true, number_checkpoints = 3 }, nil, gpt)
    assert.is_nil(rawget(gpt.h[4], "forward"))
    local x = ds.randint(0, 32, { 2, 8 })
    local got = engine:eval()(x):tolist()
    engine:destroy()
    assert.is_nil(rawget(gpt.h[1], "forward"))
    assert.same(gpt:eval()(x):tolist(), got)
  end)

  it("finds lists of one class, wherever they are, each module once", function()
    local Model = nn.module "Model"
    function Model:init()
      self.parts = { left = nn.list(3, function() return nn.Linear(4, 4) end) }
      self.right = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
      self.again = { self.right[1], self.right[2] }
      self.mixed = { nn.Linear(4, 4), nn.LayerNorm(4) }
      self.one = { nn.Linear(4, 4) }
    end
    local m = Model()
    local wrapped = ds.checkpointing.wrap(m)
    assert.equal(5, #wrapped)
    assert.is_nil(rawget(m.mixed[1], "forward"))
    assert.is_nil(rawget(m.one[1], "forward"))
    ds.checkpointing.unwrap(wrapped)
    assert.is_nil(rawget(m.right[1], "forward"))
    assert.equal(2, #ds.checkpointing.wrap(m, 1))
  end)

  it("refuses a model without blocks, and what ranks of one copy would need", function()
    says("the model has no list of modules of one class", make, { enabled = true }, nil,
      nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    says("activation_checkpointing.partition_activations true: not in this version yet (it is for",
      make, { partition_activations = true })
    says("number_checkpoints: expected an integer of at least 1", make, { number_checkpoints = 0 })
  end)

  it("has DeepSpeed's names", function()
    assert.is_false(ds.checkpointing.is_configured())
    ds.checkpointing.configure { num_checkpoints = 4, contiguous_checkpointing = true,
      checkpoint_in_cpu = true, synchronize = true }
    assert.is_true(ds.checkpointing.is_configured())
    says("partition_activations true: not in this version", ds.checkpointing.configure,
      { partition_activations = true })
    says('unknown key "checkpoints"', ds.checkpointing.configure, { checkpoints = 4 })
    assert.equal(ds.checkpoint, ds.checkpointing.checkpoint)
  end)
end)
