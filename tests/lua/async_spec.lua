--- Checkpoints that a thread writes while training goes on: they hold what was when they were asked
-- for, and are named when they are whole.

local ffi = require "ffi"
local ds = require "ds"
local ckpt = require "ds.ckpt"
local host = require "ds.host"
local json = require "ds.json"
local helper = require "tests.lua.helper"
local nn = ds.nn
local has, says = helper.has, helper.says

ffi.cdef "int tcdrain(int fd);" -- fails on whatever is no terminal: a disk that refuses

local io_now = require("ds.ffi").C.ds_io_now()
local place = helper.place { limit = 60, before = "export OMP_NUM_THREADS=1" }
local folder = place.folder
teardown(function() place:remove() end)

local Net = nn.module "Net"
function Net:init(width)
  self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
  self.norm, self.frozen = nn.LayerNorm(width), nn.Linear(width, width)
  for _, p in ipairs(self.frozen:parameters()) do p.requires_grad = false end
  self.calls = ds.zeros(3) -- a buffer that forward changes
end
function Net:forward(x)
  ds.no_grad(function() self.calls:add_(1) end)
  return self.frozen(self.norm(self.down(self.up(x):relu()))):float():square():mean()
end
function Net:hf_name(name) -- luacheck: ignore self
  return "net." .. name, name == "up.weight"
end

local function make(changes, writer, width)
  local config = { train_micro_batch_size_per_gpu = 2, gradient_accumulation_steps = 2,
    steps_per_print = 0, optimizer = { type = "AdamW", params = { lr = 0.01 } },
    checkpoint = { writer = writer } }
  for key, value in pairs(changes) do config[key] = value end
  ds.seed(3)
  local engine = ds.initialize { model = Net(width or 256), config = config }
  local x = ds.randn(2, width or 256):keep()
  return engine, function()
    repeat engine:backward(engine(x)) until engine:step()
  end
end

--- Path and hash of each file.
local function hashes(path)
  local out = {}
  for _, f in ipairs(json.load(path .. "/manifest.json").files) do out[f.path] = f.hash end
  return out
end

describe("a save in the background", function()
  for name, changes in pairs {
    fp32 = {}, bf16 = { bf16 = { enabled = true } },
    ["fp16, Lamb"] = { fp16 = { enabled = true }, optimizer = { type = "Lamb" } },
  } do
    for how, writer in pairs {
      ["what is left is copied"] = { decoupled = true },
      ["what is left is waited for"] = { decoupled = true, io_buffer_size = 0 },
    } do
      it("holds what a save at once does: " .. name .. ", " .. how, function()
        local now, later = folder .. "/now", folder .. "/later"
        os.execute(("rm -rf '%s' '%s'"):format(now, later))
        for dir, w in pairs { [now] = {}, [later] = writer } do
          local engine, step = make(changes, w, 768) -- 60 MB: unfinished at the next step
          step()
          engine:save_checkpoint(dir, "a", { n = 1 })
          for _ = 1, 2 do step() end
          engine:save_checkpoint(dir, "b")
          step()
          engine:finish_checkpoint()
          engine:destroy()
        end
        assert.same(hashes(now .. "/a"), hashes(later .. "/a"))
        assert.same(hashes(now .. "/b"), hashes(later .. "/b"))
      end)
    end
  end

  it("holds the same on two ranks, at every stage", function()
    local script = host.base .. "/tests/dist/train.lua"
    for stage = 0, 3 do
      for writer = 0, 1 do
        local dir = ("ranks-%d-%d"):format(stage, writer)
        local code, _, err = place:sh(("$D --num_gpus 2 '%s' model=odd dtype=bf16 stage=%d "
          .. "writer=%d steps=6 every=2 save='%s/%s'"):format(script, stage, writer, folder, dir))
        assert.equal(0, code, err)
      end
      for _, tag in ipairs { "global_step4", "global_step6" } do
        assert.same(hashes(("%s/ranks-%d-0/%s"):format(folder, stage, tag)),
          hashes(("%s/ranks-%d-1/%s"):format(folder, stage, tag)))
      end
    end
  end)

  it("is named by latest at a later step, or when it is waited for", function()
    local dir = folder .. "/named"
    local engine, step = make({}, { decoupled = true })
    step()
    engine:save_checkpoint(dir)
    assert.is_nil(helper.read(dir .. "/latest"))
    for _ = 1, 1000 do
      step()
      if helper.read(dir .. "/latest") then break end
    end
    assert.equal("global_step1", ckpt.load(dir).tag)
    local n = engine.global_steps
    engine:save_checkpoint(dir)
    engine:finish_checkpoint()
    assert.equal(n, ckpt.load(dir).state.global_steps)
    engine:save_checkpoint(dir, "again")
    engine:save_checkpoint(dir, "once more") -- finishes the one before
    assert.equal("again", ckpt.load(dir).tag)
    assert.equal(dir .. "/once more", (engine:load_checkpoint(dir))) -- and so does a load
    engine:destroy()
  end)

  it("keeps the last whole one, and no more than asked for", function()
    local dir = folder .. "/kept"
    local engine, step = make({ checkpoint = { keep_last = 2, writer = { decoupled = true } } })
    for i = 1, 5 do
      step()
      engine:save_checkpoint(dir)
      local tags = {}
      for _, item in ipairs(ckpt.list(dir)) do tags[#tags + 1] = item.tag end
      assert.equal(math.min(2, i - 1), #tags)
      if i > 1 then assert.equal("global_step" .. i - 1, ckpt.load(dir).tag) end
    end
    engine:destroy()
    assert.equal("global_step5", ckpt.load(dir).tag)
  end)

  it("that fails says so at a later step, by the file's name; the one before is there", function()
    local dir = folder .. "/failed"
    local engine, step = make({}, { decoupled = true })
    step()
    engine:save_checkpoint(dir)
    engine:finish_checkpoint()
    local close = io_now.close
    io_now.close = ffi.cast("int (*)(int)", ffi.C.tcdrain)
    local ok, message = pcall(function()
      engine:save_checkpoint(dir, "bad")
      for _ = 1, 1000 do step() end
    end)
    io_now.close = close
    assert.is_false(ok)
    has(message, "cannot write '" .. dir .. "/.tmp-")
    has(message, "Operation not permitted")
    assert.equal("global_step1", ckpt.load(dir).tag)
    step()
    engine:save_checkpoint(dir, "good")
    engine:finish_checkpoint()
    assert.equal("good", ckpt.load(dir).tag)
    assert.equal(2, #ckpt.list(dir))
    engine:destroy()
  end)

  it("refuses what cannot be saved at once", function()
    local engine, step = make({}, { decoupled = true })
    step()
    says("a function", engine.save_checkpoint, engine, folder .. "/x", nil, { f = print })
    says("/proc/x'", engine.save_checkpoint, engine, "/proc/x")
    step()
    engine:destroy()
  end)

  it("logs what it took, if asked to", function()
    local engine, step = make({}, { decoupled = true, show_statistics = true })
    step()
    engine:save_checkpoint(folder .. "/logged")
    local text
    local info = ds.log.info
    ds.log.info = function(format, ...) text = format:format(...) end
    engine:finish_checkpoint()
    ds.log.info = info
    has(text, "/logged/global_step1: this rank ")
    engine:destroy()
  end)
end)

describe("the end of a script", function()
  local head = [[
    local ds = require "ds"
    local w = ds.nn.Parameter(ds.ones(4))
    local engine = ds.initialize { model = function(x) return (x * w):sum() end,
      model_parameters = { w }, config = { train_micro_batch_size_per_gpu = 1, steps_per_print = 0,
        checkpoint = { writer = { decoupled = true } },
        optimizer = { type = "SGD", params = { lr = 0.1 } } } }
    local function step() engine:backward(engine(ds.ones(4))) engine:step() end
    step()
    engine:save_checkpoint "first"
    engine:finish_checkpoint()
    engine:save_checkpoint("first", "second")
  ]]

  local function run(ranks, text)
    place:write("script.lua", head .. text)
    os.execute(("rm -rf '%s/first'"):format(folder))
    local code, _, err = place:sh(("$D %s script.lua"):format(
      ranks > 1 and "--num_gpus " .. ranks or ""))
    local saved = ckpt.load(folder .. "/first")
    saved:close()
    return code, saved.tag, err
  end

  for _, ranks in ipairs { 1, 2 } do
    it("finishes what is being written: ranks: " .. ranks, function()
      for _, ending in ipairs { "", "os.exit(0)", "collectgarbage() os.exit(true)" } do
        local code, tag, err = run(ranks, ending)
        assert(code == 0 and tag == "second", err)
      end
    end)
  end

  it("also after an error, where no other rank is needed", function()
    local code, tag, err = run(1, "error 'enough'")
    assert.same({ 1, "second" }, { code, tag })
    has(err, "enough")
    code, tag, err = run(2, "if ds.rank() == 1 then error 'enough' end step()")
    assert.same({ 1, "global_step1" }, { code, tag })
    has(err, "enough")
  end)

  it("is an error if it cannot", function()
    local code, tag, err = run(2, [[
      ds.barrier()
      engine:finish_checkpoint()
      local ffi = require "ffi"
      ffi.cdef "int tcdrain(int fd);"
      if ds.rank() == 1 then
        require("ds.ffi").C.ds_io_now().close = ffi.cast("int (*)(int)", ffi.C.tcdrain)
      end
      engine:save_checkpoint("first", "third")]])
    assert.same({ 1, "second" }, { code, tag })
    has(err, "cannot write '")
  end)
end)
