-- What checkpoints keep of a GPU's memory, in the host's: the same bits, less memory, and nobody
-- waits.

local ds = require "ds"
local tensor = require "ds.tensor"
local away = require "ds.checkpointing_host"
local autograd = require "ds.autograd"
local host = require "ds.host"
local common = require "tests.lua.helper"
local simulated = require("tests.cuda.helper").simulated
local nn, F = ds.nn, ds.F

local place = common.place { limit = 120 }
local least = away.LEAST
setup(function() away.LEAST = 1 end)
teardown(function()
  away.LEAST = least
  place:remove()
end)

local WIDTH, ROWS, BLOCKS = 16, 6, 6
local OTHERS = BLOCKS * 4 + 3 + 3 -- uploads of train(): parameters and three batches
local INPUT = 512 -- bytes that a block's input [6 x 16] takes in f32: a multiple of 256

local Block = nn.module "AwayBlock"
function Block:init() self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH) end
function Block:forward(x, scale, mask)
  local h = F.dropout(self.down(self.up(x):gelu()), 0.2) * (scale or 1)
  if mask then h = h * mask end
  return x + h
end

--- The model, whose blocks are called by `each(block, x, i)` where it is given.
local function model_of(each)
  local Net = nn.module "AwayNet"
  function Net:init()
    self.h = nn.list(BLOCKS, function() return Block() end)
    self.scale, self.out = nn.Parameter(ds.ones(WIDTH)), nn.Linear(WIDTH, 3)
  end
  function Net:forward(x)
    x = x * self.scale
    local state = {}
    for i, block in ipairs(self.h) do
      if each then x = each(block, x, i, state) else x = block(x, i) end
      if self.seen then self.seen[i] = ds.cuda.memory_allocated() end
    end
    return self.out(x):float():square():mean()
  end
  return ds.on("cpu", function()
    ds.seed(3)
    return Net()
  end)
end

local function engine_of(model, recompute, more)
  local c = { device = "cuda", train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
    activation_checkpointing = recompute,
    optimizer = { type = "AdamW", params = { lr = 0.01 } } }
  for key, value in pairs(more or {}) do c[key] = value end
  local engine = ds.initialize { model = model, config = c }
  ds.seed(4)
  return engine
end

local function inputs(n)
  local list = {}
  for i = 1, n do list[i] = ds.randn(ROWS, WIDTH, { device = "cpu" }):keep() end
  return list
end

local beside = { enabled = true }
local in_host = { enabled = true, cpu_checkpointing = true }

--- Losses and weights after three steps (as many micro-batches as they take).
local function train(recompute, each, more, step)
  local engine = engine_of(model_of(each), recompute, more)
  local losses = {}
  for _, x in ipairs(inputs(3 * (more and more.gradient_accumulation_steps or 1))) do
    local loss = engine(x)
    if step then step(engine, loss, x) end
    engine:backward(loss)
    engine:step()
    losses[#losses + 1] = loss:item()
  end
  for _, p in ipairs(engine.module:parameters()) do
    losses[#losses + 1] = p:float():cpu():reshape(-1):tolist()
  end
  engine:destroy()
  return losses
end

--- Asserts that training is the same with inputs in the host's memory, and that they were there.
local function same(each, more, step, fewer)
  local want = train(beside, each, more, step)
  local before = ds.cuda.counters()
  local got = train(in_host, each, more, step)
  local after = ds.cuda.counters()
  assert.same(want, got)
  local moved = after.uploads - before.uploads - OTHERS
  assert(moved >= (fewer or 3 * (BLOCKS - 1)), moved)
  assert.equal(0, autograd.away)
end

describe("inputs of blocks that wait in host memory", function()
  it("give the same bits: plain", function() same() end)
  it("bf16 and accumulation", function()
    same(nil, { bf16 = { enabled = true }, gradient_accumulation_steps = 2 })
  end)
  it("an optimizer's state in host memory", function()
    same(nil, { zero_optimization = { stage = 1, offload_optimizer = { device = "cpu" } } })
  end)
  it("the first blocks only", function()
    local want = train(beside)
    assert.same(want, train({ enabled = true, number_checkpoints = 3, cpu_checkpointing = true }))
  end)

  it("what all blocks share, which stays", function()
    local function each(block, x, i, state)
      state.mask = state.mask or ds.rand(ROWS, WIDTH, { device = "cuda" })
      return block(x, i, state.mask)
    end
    same(each)
    local engine = engine_of(model_of(each), in_host)
    local before = ds.cuda.counters()
    engine:backward(engine(inputs(1)[1]))
    local after = ds.cuda.counters()
    engine:destroy()
    assert.equal(BLOCKS - 1, after.uploads - before.uploads - 1) -- and the batch
    assert.equal(BLOCKS + 1, after.downloads - before.downloads) -- it began to leave once
  end)

  it("one block ahead", function()
    local uploads = {}
    local engine = engine_of(model_of(function(block, x, i)
      return ds.checkpoint(function(t)
        uploads[i] = ds.cuda.counters().uploads
        return block(t, i)
      end, x)
    end), { cpu_checkpointing = true })
    local loss = engine(inputs(1)[1])
    local before = ds.cuda.counters().uploads
    engine:backward(loss)
    for i, n in ipairs(uploads) do uploads[i] = n - before end
    assert.same({ 5, 5, 4, 3, 2, 1 }, uploads) -- the last block's input has not left
    engine:destroy()
  end)

  it("views, with what they are views of", function()
    same(function(block, x, i) return block(x:view(2, 3, WIDTH), i):view(ROWS, WIDTH) end)
    same(function(_, x, i)
      return ds.checkpoint(function(a) return (a * i):tanh() end, x:t()):t()
    end)
  end)

  it("parts of one tensor, and a part of one that lives", function()
    same(function(_, x, i)
      local a, b = x:narrow(2, 1, 8), x:narrow(2, 9, 8)
      local c, d = ds.checkpoint(function(p, q) return p * q * (i / 8), p + q end, a, b)
      return ds.cat({ c, d }, 2)
    end)
    same(function(block, x, i)
      local y = block(x:narrow(1, 1, 4), i)
      return ds.cat({ y, x:narrow(1, 5, 2) }, 1)
    end, nil, nil, 0)
  end)

  it("checkpoints inside each other, nil, and results that are arguments", function()
    same(function(block, x, i)
      local y, same_x, none = ds.checkpoint(function(a, missing)
        assert(missing == nil)
        local b = ds.checkpoint(function(t) return t:tanh() end, a * 2)
        return ds.checkpoint(function(t) return block(t * 1, i) end, b), a, nil
      end, x, nil)
      assert(none == nil)
      return y * 0.5 + same_x
    end, nil, nil, BLOCKS)
  end)

  it("those that are used again: soon, late, by views and by values", function()
    same(function(block, x, i, state)
      local y = block(x, i) + x:gelu() -- while it leaves
      if i == 1 then state.first = x end
      if i == 5 then y = y + state.first * 0.25 end -- when it is away
      if i == 6 then
        assert.equal(ROWS * WIDTH, #state.second:reshape(-1):tolist())
        common.lacks(tostring(state.second), "released")
      end
      if i == 2 then state.second = x end
      return y
    end)
  end)

  it("those that are changed in place while they leave", function()
    for _, change in ipairs {
      function(t) t:mul_(0.5) end, function(t) t:view(-1):narrow(1, 1, 5):fill_(7) end,
    } do
      same(function(_, x, i)
        local part = ds.full({ ROWS, WIDTH }, i, { device = "cuda" })
        local y = ds.checkpoint(function(a, b) return (a * b):tanh() end, x, part)
        ds.no_grad(change, part)
        return y
      end)
    end
  end)

  it("several forwards before their backwards, other backwards, evaluation between", function()
    local function step(engine, _, x)
      local other = engine(x * 0.5)
      engine:eval()
      engine(x)
      engine:train()
      engine:backward(other, { retain_graph = true })
      engine:backward(other)
    end
    same(nil, nil, step)
    local function dropped(engine, _, x) engine(x) end -- nobody goes back from there
    same(nil, nil, dropped)
  end)
end)

describe("memory of checkpoints in host memory", function()
  it("is free while they wait", function()
    local peaks, grown = {}, {}
    for i, recompute in ipairs { beside, in_host } do
      local engine = engine_of(model_of(), recompute)
      local x = inputs(1)[1]
      engine.module.seen = {}
      for _ = 1, 2 do
        collectgarbage()
        collectgarbage()
        local base = ds.cuda.memory_allocated()
        ds.cuda.reset_peak_memory_stats()
        engine:backward(engine(x))
        engine:step()
        peaks[i] = ds.cuda.max_memory_allocated() - base
      end
      grown[i] = engine.module.seen[BLOCKS] - engine.module.seen[2]
      engine:destroy()
    end
    assert.is_near((BLOCKS - 2) * INPUT, grown[1], 1.5 * INPUT) -- pieces of memory differ a little
    assert.is_near(0, grown[2], 1.5 * INPUT)
    assert(peaks[2] <= peaks[1] - 2 * INPUT, ("%d of %d bytes"):format(peaks[2], peaks[1]))
  end)

  it("waits for nobody, moves each input once, and takes the same room in every step", function()
    local engine = engine_of(model_of(), in_host)
    local list, rooms = inputs(6), {}
    for i, x in ipairs(list) do
      local before = ds.cuda.counters()
      engine:backward(engine(x))
      engine:step()
      local after = ds.cuda.counters()
      if i > 2 then
        assert.equal(0, after.waits - before.waits)
        assert.equal(0, after.takes - before.takes)
        assert.equal(BLOCKS - 1 + 1, after.uploads - before.uploads) -- the batch
        assert.equal(BLOCKS + 1, after.downloads - before.downloads) -- the last one, and figures
      end
      rooms[i] = away.room()
    end
    assert.equal(BLOCKS * INPUT, rooms[1])
    assert.equal(rooms[1], rooms[6])
    engine:destroy()
    assert.equal(0, away.room())
  end)

  it("comes back where a forward is dropped, or fails", function()
    local fails
    local engine = engine_of(model_of(function(block, x, i)
      if i == fails then error "no" end
      return block(x, i)
    end), in_host)
    local x, live, rooms = inputs(1)[1], {}, {}
    for i = 1, 6 do
      engine(x) -- its scope ends with the next step
      fails = 5
      common.says("no", engine, x)
      fails = nil
      engine:backward(engine(x))
      engine:step()
      collectgarbage()
      collectgarbage()
      live[i], rooms[i] = ds.cuda.memory_allocated(), away.room()
    end
    assert.is_near(live[2], live[6], 4 * INPUT) -- pieces of memory differ a little
    assert.equal(rooms[2], rooms[6])
    engine:destroy()
    assert.equal(0, autograd.away)
    assert.equal(0, away.room())
  end)

  it("stays on the GPU where the system has no page-locked memory left", function()
    local pinned, want = tensor.pinned, train(beside)
    away.flush()
    local before = ds.cuda.counters().uploads
    tensor.pinned = function() error "no more" end
    local ok, got = pcall(train, in_host)
    tensor.pinned = pinned
    assert.is_true(ok, got)
    assert.same(want, got)
    assert.equal(OTHERS, ds.cuda.counters().uploads - before)
  end)

  it("leaves small tensors, kept ones and parameters where they are", function()
    away.LEAST = INPUT + 1
    local before = ds.cuda.counters()
    train(in_host)
    away.LEAST = 1
    local small = ds.cuda.counters()
    assert.equal(OTHERS, small.uploads - before.uploads)
    same(function(block, x, i) return block(x:keep(), i) end, nil, nil, 0)
    assert.equal(2 * OTHERS, ds.cuda.counters().uploads - small.uploads)
  end)
end)

describe("checkpoints by hand", function()
  it("go to the host with DeepSpeed's configure()", function()
    local w = ds.randn(WIDTH, WIDTH, { device = "cuda" }):requires_grad_()
    local function run()
      ds.seed(8)
      w.grad = nil
      local x = ds.randn(ROWS, WIDTH, { device = "cuda" })
      for _ = 1, 4 do
        x = ds.checkpoint(function(t) return F.dropout(t:matmul(w), 0.5):tanh() end, x)
      end
      x:sum():backward()
      return w.grad:tolist()
    end
    local want, before = run(), ds.cuda.counters().uploads
    ds.checkpointing.configure { checkpoint_in_cpu = true }
    local got = run()
    ds.checkpointing.configure { checkpoint_in_cpu = false }
    assert.same(want, got)
    assert.equal(3, ds.cuda.counters().uploads - before)
    assert.same(want, run())
    assert.equal(3, ds.cuda.counters().uploads - before)
  end)

  it("stay where they are without a GPU", function()
    ds.checkpointing.configure { checkpoint_in_cpu = true }
    local x = ds.randn(ROWS, WIDTH, { device = "cpu" }):requires_grad_()
    local y = ds.checkpoint(function(t) return t * 2 end, x * 1)
    ds.checkpoint(function(t) return t * 2 end, y):sum():backward()
    ds.checkpointing.configure { checkpoint_in_cpu = false }
    assert.equal(4, x.grad:mean():item())
  end)
end)

it("cuda_graph is given up for it, with one line", function()
  local script = common.temporary()
  common.write(script, [[
    local ds = require "ds"
    local model = ds.on("cpu", ds.nn.Sequential, ds.nn.Linear(4, 4), ds.nn.Linear(4, 4))
    local engine = ds.initialize { model = model, config = { device = "cuda", cuda_graph = true,
      train_micro_batch_size_per_gpu = 1, steps_per_print = 0, optimizer = { type = "SGD" },
      activation_checkpointing = { enabled = true, cpu_checkpointing = true } } }
    assert(engine.graph == nil)
    engine:backward(engine(ds.ones(2, 4)):mean())
    engine:step()
    engine:destroy()
    engine = ds.initialize { model = model, config = { device = "cuda", cuda_graph = true,
      train_micro_batch_size_per_gpu = 1, steps_per_print = 0, optimizer = { type = "SGD" } } }
    for i = 1, 6 do
      if i == 3 then ds.checkpointing.configure { checkpoint_in_cpu = true } end
      assert((engine.graph == nil) == (i > 3))
      engine:backward(engine(ds.ones(2, 4)):mean())
      engine:step()
    end ]])
  local file = io.popen(("%s %s 2>&1"):format(host.executable, script))
  local text = file:read "*a"
  file:close()
  os.remove(script)
  local line = "cuda_graph: what checkpoints keep leaves for the host's memory and comes back; "
    .. "training goes on without it"
  common.has(text, line)
  assert.equal(2, select(2, text:gsub(line:gsub("%p", "%%%0"), "")))
end)

describe("ranks whose checkpoints are in host memory", function()
  local function run(ranks, words, settings)
    local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
    local code, out, err = place:sh(("OMP_NUM_THREADS=1 DS_SHARE_GPU=1 DS_SIMT_DEVICES=4 %s $D %s "
      .. "--device cuda '%s/tests/cuda/ranks/train.lua' %s"):format(settings or "", launch,
        host.base, words))
    assert(code == 0, ("%s %s: code %d\n%s%s"):format(words, settings or "", code, out, err))
    return (out:gsub("early.*", ""))
  end

  it("wait for kernels, and kernels for them", function()
    if not simulated then return pending "a real GPU is late by itself" end
    local want = run(1, "stage=0")
    for _, late in ipairs { "kernels", "copies" } do
      assert.equal(want, run(1, "away=1 checkpoint=1", "DS_SIMT_LATE=" .. late), late)
      assert.equal(want, run(1, "away=1", "DS_SIMT_LATE=" .. late), late)
    end
  end)

  it("train as without, at ZeRO stages 2 and 3", function()
    if os.execute "command -v mpirun >/dev/null" ~= 0 then return pending "no mpirun here" end
    local want = run(2, "stage=0 dtype=bf16")
    for stage = 2, 3 do
      assert.equal(want, run(2, ("stage=%d dtype=bf16 away=1"):format(stage)))
    end
  end)
end)
