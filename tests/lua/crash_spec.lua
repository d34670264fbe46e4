-- Ranks that are killed while they save, and what the disk may hold when all machines stop at once:
-- there is always a checkpoint that loads, and training goes on from it. DS_SOAK=1 kills 200 times.

local ds = require "ds"
local ckpt = require "ds.ckpt"
local host = require "ds.host"
local disk = require "tests.lua.disk"
local helper = require "tests.lua.helper"

local kills = os.getenv "DS_SOAK" == "1" and 200 or 10
local script = host.base .. "/tests/dist/train.lua"
local place = helper.place { limit = 60, before = "export OMP_NUM_THREADS=1" }
local folder = place.folder
teardown(function() place:remove() end)

--- The losses in what train.lua printed.
local function losses_in(text)
  local out = {}
  for loss in text:gmatch "\nstep (%S+) " do out[#out + 1] = loss end
  return out
end

describe("kill -9 of a rank at a random moment", function()
  for _, case in ipairs { { "fp32", 0, 1 }, { "bf16", 3, 0 } } do
    local words = ("'%s' model=odd dtype=%s stage=%d writer=%d"):format(script, unpack(case))
    it(("leaves a checkpoint that loads, and the loss goes on: %s, stage %d, in the background: %d")
      :format(unpack(case)),
      function()
        local dir = folder .. "/" .. case[1]
        os.execute(("mkdir -p '%s/pids'"):format(folder))
        math.randomseed(os.time())
        local last, seen = 0, {}
        for life = 1, kills / 2 do
          local victim, pause = math.random(0, 1), math.random() * 0.25
          local code, out = place:sh(([[
            rm -f log pids/*
            $D --num_gpus 2 %s steps=100000 every=1 save='%s' load='%s' pids=pids >log 2>err.log &
            wait_for "^step" log 2
            sleep %.3f
            kill -9 $(cat pids/%d)
            wait; cat log]]):format(words, dir, dir, pause, victim))
          assert.equal(0, code, place:read "log" .. place:read "err.log")
          local saved = assert(ckpt.load(dir), "no checkpoint")
          local step = saved.state.global_steps
          assert.is_true(step >= last, ("life %d: step %d after step %d"):format(life, step, last))
          for i, loss in ipairs(losses_in("\n" .. out)) do seen[last + i] = loss end
          last = step
          saved:close()
        end
        -- every life goes on where the checkpoint of the one before was: the losses are those of a
        -- run that nobody disturbed
        local code, out, err = place:sh(("$D --num_gpus 2 %s steps=%d"):format(words, last))
        assert.equal(0, code, err)
        local want = losses_in("\n" .. out)
        for i = 1, last do assert.equal(want[i], seen[i], "step " .. i) end
      end)
  end
end)

describe("a crash of all machines at any moment of a save by two ranks", function()
  local text = [[
    local ds, ckpt = require "ds", require "ds.ckpt"
    local disk = require "tests.lua.disk"
    local dir, step, rank = arg[1], tonumber(arg[2]), ds.rank()
    local content = { weights = { { "a", ds.full({ 40 }, step) }, { "b", ds.full({ 30 }, step) } },
      optim = { { "m/a@" .. rank * 20, ds.full({ 20 }, step) } },
      state = { global_steps = step, world_size = 2 } }
    local log, ok, message = disk.record(function() ckpt.save(dir, "s" .. step, content) end)
    assert(ok, message)
    local file = assert(io.open(dir .. "/../log-" .. rank, "wb"))
    file:write "return {\n"
    for _, call in ipairs(log) do
      file:write "{"
      for key, value in pairs(call) do
        if type(value) == "number" then file:write(("%s=%.17g,"):format(key, value)) end
        if type(value) == "string" then file:write(("%s=%q,"):format(key, value)) end
      end
      file:write "},\n"
    end
    file:write "}\n"
    file:close()]]

  --- The calls of both ranks in the order in which they were made; descriptors are told apart.
  local function logs()
    local all = {}
    for rank = 0, 1 do
      for _, call in ipairs(dofile(("%s/log-%d"):format(folder, rank))) do
        if call.fd then call.fd = call.fd + rank * 10000 end
        if call.op == "open" then call.rc = call.rc + rank * 10000 end
        all[#all + 1] = call
      end
    end
    table.sort(all, function(a, b) return a.time < b.time end)
    return all
  end

  it("leaves the old checkpoint or the new one", function()
    local path, base = place:write("save.lua", text), folder .. "/disk"
    os.execute(("mkdir '%s'"):format(base))
    local function save(step)
      local code, _, err = place:sh(("$D --num_gpus 2 '%s' '%s/ckpt' %d"):format(path, base, step))
      assert.equal(0, code, err)
    end
    save(1)
    os.execute(("rm '%s'/disk/log-*"):format(folder))
    local root = disk.scan(base)
    save(2)
    os.execute(("mv '%s'/disk/log-* '%s'"):format(folder, folder))
    local found, log = {}, logs()
    local after = folder .. "/after"
    disk.states(root, base, log, function(tree, at)
      os.execute(("rm -rf '%s'"):format(after))
      disk.write(tree, after)
      local good, saved = pcall(ckpt.load, after .. "/ckpt")
      if not good then error(("after call %d of %d: %s"):format(at, #log, saved)) end
      local step = saved.state.global_steps
      assert.same({ step, step }, saved:read("optim", "m/a", ds.zeros(40), { from = 0 })
        :index_select(1, ds.tensor({ 0, 39 }, "i64")):tolist())
      assert.equal(step, saved:read("weights", "b", ds.zeros(30)):tolist()[30])
      assert.is_true(at < #log or step == 2)
      found[step] = true
      saved:close()
    end)
    assert.same({ true, true }, found)
  end)
end)
