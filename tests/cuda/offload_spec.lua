-- The optimizer's state away from the GPU: in the host's memory, and on a disk. The CPU updates;
-- what crosses the border comes and goes in blocks.

local ds = require "ds"
local nn = ds.nn
local host = require "ds.host"
local training = require "tests.cuda.training"
local helper = require "tests.cuda.helper"
local common = require "tests.lua.helper"
local host_store = require "ds.offload_host"

local has, says = common.has, common.says
local batches, train = training.batches, training.train
local weights, near = training.weights, training.near

local place = common.place { limit = 120 }
local disk = place.folder .. "/nvme"
assert(os.execute("mkdir " .. disk) == 0)
teardown(function() place:remove() end)
after_each(function() assert.equal("", (select(2, place:sh "ls -A nvme"))) end)

-- Some blocks of 1024 elements, the last one not full.
local Net = nn.module "OffloadNet"
function Net:init()
  self.up, self.down = nn.Linear(31, 67), nn.Linear(67, 3)
  self.scale = nn.Parameter(ds.ones(3, { device = "cpu" }))
end
function Net:forward(x, y)
  return (self.down(self.up(x):tanh()) * self.scale - y):float():square():mean()
end
local make = training.maker(Net)

ds.optimizer("OffloadSGD", { state = { "m" }, defaults = { lr = 1e-2 },
  step = function(p, g, s, h)
    s.m:mul_(0.5):add_(g, 0.5)
    p:add_(s.m + ds.zeros(p:numel()), -h.lr)
  end })

--- A config with state in the host's memory ("cpu"), or on the disk ("nvme").
local function away(device, more, offload)
  local c = { zero_optimization = { stage = 1, sub_group_size = 1024,
    offload_optimizer = { device = device, nvme_path = disk } } }
  for key, value in pairs(more or {}) do c[key] = value end
  for key, value in pairs(offload or {}) do c.zero_optimization.offload_optimizer[key] = value end
  return c
end

local function list_of(n) return batches(n, 4, 31) end

describe("an optimizer's state in host memory", function()
  for name, case in pairs {
    f32 = { {}, 1e-4 }, bf16 = { { bf16 = { enabled = true } }, 0.03 },
    Lamb = { { optimizer = { type = "Lamb", params = { lr = 0.02 } } }, 1e-4 },
  } do
    it("gives the same training: " .. name, function()
      local list = list_of(5)
      local plain, engine = make("cuda", case[1]), make("cuda", away("cpu", case[1]))
      near(train(plain, list), train(engine, list), case[2], "loss")
      near(weights(plain), weights(engine), case[2], "weights")
      engine:destroy()
    end)
  end

  it("comes in blocks, several at a time", function()
    local list, c = list_of(4), away("cpu", { bf16 = { enabled = true } })
    local whole = make("cuda", c)
    local expected, block = train(whole, list), host_store.BLOCK
    host_store.BLOCK = 160
    local small = make("cuda", c)
    host_store.BLOCK = block
    assert(#small.offload.blocks > 4)
    assert.same(expected, train(small, list))
    assert.same(weights(whole), weights(small))
  end)

  it("is saved, and loaded where it is not away", function()
    local folder, list = common.temporary(), list_of(5)
    local c = { bf16 = { enabled = true } }
    local engine = make("cuda", away("cpu", c))
    train(engine, { list[1], list[2], list[3] })
    engine:save_checkpoint(folder)
    local expected = train(engine, { list[4], list[5] })
    local again, plain = make("cuda", away("cpu", c)), make("cuda", c)
    again:load_checkpoint(folder)
    plain:load_checkpoint(folder)
    assert.same(expected, train(again, { list[4], list[5] }))
    near(expected, train(plain, { list[4], list[5] }), 0.03, "losses")
    os.execute("rm -r " .. folder)
  end)

  it("is not on the GPU", function()
    local Wide = nn.module "Wide"
    function Wide:init() self.w = nn.Parameter(ds.zeros(1e6, { device = "cpu" })) end
    function Wide:forward(x) return (self.w * x):sum() end
    local function bytes(c)
      collectgarbage()
      collectgarbage()
      local before = ds.cuda.memory_allocated()
      local engine = make("cuda", c, ds.on("cpu", Wide))
      local out = ds.cuda.memory_allocated() - before
      engine:destroy()
      return out
    end
    local c = { bf16 = { enabled = true } }
    for _, device in ipairs { "cpu", "nvme" } do -- fp32 weights and two vectors
      assert.is_near(12e6, bytes(c) - bytes(away(device, c)), 1e5)
    end
  end)
end)

describe("an optimizer's state on a disk, for a GPU,", function()
  for name, case in pairs {
    f32 = { {} }, bf16 = { { bf16 = { enabled = true } } },
    ["bf16 with accumulation"] = { { bf16 = { enabled = true }, gradient_accumulation_steps = 2 } },
    ["a loss scale that moves"] = { { fp16 = { enabled = true, initial_scale_power = 4 } } },
    Lamb = { { optimizer = { type = "Lamb", params = { lr = 0.02 } } } },
    Muon = { { bf16 = { enabled = true }, optimizer = { type = "Muon", params = { lr = 0.02 } } } },
    ["a rule in Lua"] = { { optimizer = { type = "OffloadSGD" } } },
    ["state that begins with a number"] = { { optimizer = { type = "Adagrad", params = {
      lr = 1e-2, initial_accumulator_value = 0.5 } } } },
    ["half of it in memory"] = { { bf16 = { enabled = true } }, { ratio = 0.5 } },
    ["one buffer"] = { {}, { buffer_count = 1, pipeline_write = false } },
  } do
    it("gives the bits of host memory: " .. name, function()
      local list = list_of(6)
      local memory, engine = make("cuda", away("cpu", case[1])),
        make("cuda", away("nvme", case[1], case[2]))
      assert.same(train(memory, list), train(engine, list))
      assert.same(weights(memory), weights(engine))
      assert.equal(memory:get_global_grad_norm(), engine:get_global_grad_norm())
      local c = engine.offload:counters()
      assert(c.bytes_read > 0 and c.bytes_written > 0)
      engine:destroy()
      memory:destroy()
    end)
  end

  it("never waits for all of the GPU in a step", function()
    local list = list_of(4)
    local engine = make("cuda", away("nvme", { bf16 = { enabled = true } }))
    train(engine, { list[1], list[2] })
    local before = ds.cuda.counters()
    for i = 3, 4 do
      engine:backward(engine(list[i][1], list[i][2]))
      engine:step()
    end
    local after = ds.cuda.counters()
    assert.equal(0, after.waits - before.waits)
    engine:destroy()
  end)

  it("is saved as from memory, and loaded everywhere", function()
    local list, c, saved = list_of(5), { bf16 = { enabled = true } }, {}
    local first, rest = { list[1], list[2], list[3] }, { list[4], list[5] }
    local function folder(name) return place.folder .. "/saved-" .. name end
    for _, device in ipairs { "cpu", "nvme" } do
      ds.seed(21)
      local engine = make("cuda", away(device, c))
      train(engine, first)
      engine:save_checkpoint(folder(device))
      saved[device] = { train(engine, rest), weights(engine) }
      engine:destroy()
    end
    assert.same(saved.cpu, saved.nvme)
    local code, out = place:sh "diff -r saved-cpu saved-nvme"
    assert.equal(0, code, out)
    for name, case in pairs { -- from the GPU's disk to there, and back
      ["a disk"] = { "cuda", "nvme" }, memory = { "cuda", "cpu" }, GPU = { "cuda", "none", 0.03 },
      ["a disk without a GPU"] = { "cpu", "nvme", 0.03 },
      ["no GPU"] = { "cpu", "none", 0.03 },
    } do
      local there = make(case[1], away(case[2], c))
      there:load_checkpoint(folder "nvme")
      local losses = train(there, rest)
      there:save_checkpoint(folder(name:gsub(" ", "_")))
      local back = make("cuda", away("nvme", c))
      back:load_checkpoint(folder(name:gsub(" ", "_")))
      if case[3] then
        near(saved.nvme[1], losses, case[3], name)
      else
        assert.same(saved.nvme, { losses, weights(there) }, name)
      end
      assert.same(weights(there), weights(back), name)
      for _, p in ipairs { "up", "down" } do
        local a, b = there.module[p].weight, back.module[p].weight
        for _, vector in ipairs { "fp32", "exp_avg", "exp_avg_sq" } do
          assert.same(ds.zero.get_full(a, vector):tolist(), ds.zero.get_full(b, vector):tolist())
        end
      end
      there:destroy()
      back:destroy()
    end
  end)

  it("is given and taken as whole vectors", function()
    local engine = make("cuda", away("nvme", { bf16 = { enabled = true } }))
    local p = engine.module.up.weight
    ds.zero.set_full(p, ds.full(p.shape, 0.5, { device = "cuda" }))
    ds.zero.set_full(p, ds.full(p.shape, 3, { device = "cuda" }), "exp_avg")
    assert.equal(0.5, ds.zero.get_full(p):mean():item())
    assert.equal(0.5, p:float():mean():item())
    assert.equal(3, ds.zero.get_full(p, "exp_avg"):mean():item())
    assert.equal(0, ds.zero.get_full(p, "exp_avg_sq"):mean():item())
    engine:destroy()
    says("the engine was destroyed", engine.optimizer.step, engine.optimizer)
  end)

  it("says what is wrong with the folder", function()
    has(says("offload_optimizer.nvme_path: cannot keep state in '" .. disk .. "/none", make, "cuda",
      away("nvme", nil, { nvme_path = disk .. "/none" })), "no such file or folder")
    local gone, list = place.folder .. "/gone", list_of(2)
    assert(os.execute("mkdir " .. gone) == 0)
    local engine = make("cuda", away("nvme", nil, { nvme_path = gone }))
    train(engine, { list[1] })
    assert(os.execute("rmdir " .. gone) == 0) -- the file has no name in it
    train(engine, { list[2] })
    engine:destroy()
  end)

  it("is lost with a disk that fails, and the last checkpoint is not", function()
    place:write("failing.lua", [[
      local ffi, ds = require "ffi", require "ds"
      ffi.cdef [=[
        typedef struct { unsigned long now, most; } limit;
        int getrlimit(int, limit *); int setrlimit(int, const limit *); ]=]
      local FSIZE, limit = 1, ffi.new "limit"
      ffi.C.getrlimit(FSIZE, limit)
      local function make()
        return ds.initialize { model = ds.on("cpu", ds.nn.Linear, 64, 64), config = {
          device = "cuda", train_batch_size = 1, steps_per_print = 0, seed = 5,
          optimizer = { type = "AdamW" }, zero_optimization = { sub_group_size = 1024,
            offload_optimizer = { device = "nvme", nvme_path = "nvme" } } } }
      end
      local x = ds.ones(1, 64, { device = "cpu" }):keep()
      local function step(engine)
        engine:backward((engine(x) * engine(x)):mean())
        engine:step()
        return ds.zero.get_full(engine.module.weight):sum():item()
      end
      local engine = make()
      step(engine)
      engine:save_checkpoint "saved"
      local want = step(engine)
      ffi.C.setrlimit(FSIZE, ffi.new("limit", 8192, limit.most))
      for i = 1, 2 do print(select(2, pcall(step, engine))) end
      ffi.C.setrlimit(FSIZE, limit)
      engine:destroy()
      engine = make()
      engine:load_checkpoint "saved"
      print(step(engine) == want) ]])
    local code, out, err = place:sh "$D failing.lua"
    assert.equal(0, code, out .. err)
    assert.truthy(out:find("step 3: the optimizer's state: cannot write '[^\n]*nvme/[^\n]*': File "
      .. "too large"), out)
    has(out, "the optimizer's state was lost (")
    assert.truthy(out:find "true\n$", out)
  end)
end)

--- What tests/cuda/ranks/train.lua prints.
local function run(ranks, words, settings)
  local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
  local code, out, err = place:sh(("OMP_NUM_THREADS=1 DS_SHARE_GPU=1 DS_SIMT_DEVICES=4 %s $D %s "
    .. "--device cuda '%s/tests/cuda/ranks/train.lua' %s"):format(settings or "", launch, host.base,
      words))
  assert(code == 0, ("%s %s: code %d\n%s%s"):format(words, settings or "", code, out, err))
  return (out:gsub("early.*", ""))
end

describe("blocks that cross the border", function()
  it("wait for kernels, and kernels for them", function()
    if not helper.simulated then return pending "a real GPU is late by itself" end
    for _, dtype in ipairs { "fp32", "bf16" } do
      local want = run(1, ("dtype=%s offload=cpu"):format(dtype)) -- many blocks
      for words, late in pairs { ["offload=cpu"] = "kernels", ["offload=cpu "] = "copies",
        ["offload=" .. disk] = "copies" } do
        words = ("dtype=%s %s"):format(dtype, words)
        assert.equal(want, run(1, words, "DS_SIMT_LATE=" .. late), words .. ", " .. late)
      end
    end
  end)

  it("are each rank's own", function()
    if os.execute "command -v mpirun >/dev/null" ~= 0 then return pending "no mpirun here" end
    local want = run(2, "stage=1 dtype=bf16 offload=cpu")
    for stage = 2, 3 do
      assert.equal(want, run(2, ("stage=%d dtype=bf16 offload=%s"):format(stage, disk)))
    end
  end)
end)
