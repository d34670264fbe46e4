-- Ranks with GPUs: collectives and messages against the CPU's, training at every ZeRO stage against
-- one rank, how such jobs end. Every case starts several ranks, which share the GPU if there is one
-- only. What they run is in tests/cuda/ranks.

local host = require "ds.host"
local helper = require "tests.lua.helper"
local simulated = require("tests.cuda.helper").simulated

local place = helper.place { limit = 120 }
teardown(function() place:remove() end)

local there = os.execute "command -v mpirun >/dev/null" == 0
local function case(name, f)
  it(name, function()
    if not there then return pending "no mpirun here" end
    f()
  end)
end

--- Runs a script on several ranks. Returns as place:sh(), and the seconds.
local function run(ranks, words, settings, options)
  return place:timed(("OMP_NUM_THREADS=1 DS_SHARE_GPU=1 DS_SIMT_DEVICES=4 %s $D --num_gpus %d " ..
    "--device cuda %s '%s/tests/cuda/ranks/'%s"):format(settings or "", ranks, options or "",
    host.base, words))
end

local function good(ranks, words, settings)
  local code, out, err = run(ranks, words, settings)
  assert(code == 0, ("%d ranks, %s %s: code %d\n%s%s"):format(ranks, words, settings or "", code,
    out, err))
  return out
end

--- What the simulated NCCL was asked for on a rank: how often each call was made, also by
-- communicator ("2 AllReduce"), and those with memory that is not registered ("2 AllReduce plain").
local function calls(log, rank)
  local counts = {}
  local function count(name) counts[name] = (counts[name] or 0) + 1 end
  for line in (place:read(log .. "." .. rank)):gmatch "[^\n]+" do
    local name, comm, in_, out, grouped =
      line:match "^(%a+) .*comm=(%d+) .*in=(%S+) out=(%S+) group=(%d)$"
    count(grouped == "1" and "grouped " .. name or name)
    count(comm .. " " .. name)
    if in_ == "0" or out == "0" then count(comm .. " " .. name .. " plain") end
  end
  os.remove(place.folder .. "/" .. log .. "." .. rank)
  return counts
end

describe("collectives of ranks with GPUs", function()
  for _, ranks in ipairs { 2, 3 } do
    case(("are the CPU's: %d ranks"):format(ranks), function()
      helper.has(good(ranks, "collectives.lua"), " passed, 0 failed")
    end)
  end

  case("are the CPU's to the bit where that is asked for: 4 ranks", function()
    helper.has(good(4, "collectives.lua", "DS_NCCL_EXACT=1"), " passed, 0 failed")
  end)
end)

-- ---- training

--- Losses, norms and the sum of the weights as numbers; what was done while kernels ran.
local function train(ranks, words, settings)
  local out, numbers = good(ranks, "train.lua " .. words, settings), {}
  local result, done = out:match "^(.-)early ([^\n]+)"
  for number in result:gmatch "%S+" do numbers[#numbers + 1] = tonumber(number) end
  local early, flying, ahead = done:match "^(%d+) flying (%d+) prefetched (%d+)"
  local registered, exchanges = out:match "registered (%d+) exchanges (%d+)"
  return numbers, tonumber(early), tonumber(flying), tonumber(ahead), tonumber(registered),
    tonumber(exchanges), result
end

local function near(want, got, tolerance, what)
  assert.equal(#want, #got, what)
  for i = 1, #want do
    assert(math.abs(got[i] - want[i]) <= tolerance * math.abs(want[i]),
      ("%s: value %d is %.9g and should be %.9g"):format(what, i, got[i], want[i]))
  end
end

describe("training of ranks with GPUs", function()
  case("is one rank's at every stage, and exchanges while kernels run", function()
    local alone = train(1, "stage=0")
    assert.equal(9, #alone)
    for stage = 0, 3 do
      local got, early, flying, ahead = train(2, "stage=" .. stage)
      near(alone, got, 1e-5, "stage " .. stage)
      assert.is_true(early > 0)
      assert.equal(stage >= 2, flying > 1)
      assert.equal(stage == 3, ahead > 0)
    end
    local got, early = train(2, "stage=1 overlap=0")
    near(alone, got, 1e-5, "without overlap")
    assert.equal(0, early)
    near(alone, (train(4, "stage=2")), 1e-5, "4 ranks, stage 2")
  end)

  case("reduces again what changed after it was reduced", function()
    for words, stages in pairs { ["gas=2 checkpoint=1"] = { 1, 2 }, ["twice=1"] = { 1, 2 },
      ["plain=1"] = { 0, 1 } } do
      local alone = train(1, words)
      for _, stage in ipairs(stages) do
        -- where a reduction is late it could not miss what came after it
        near(alone, (train(2, ("stage=%d %s"):format(stage, words), "DS_SIMT_LATE=kernels")), 1e-5,
          ("%s, stage %d"):format(words, stage))
      end
    end
  end)

  case("in bf16, and with gradients that travel in another type", function()
    for words, stage in pairs { ["dtype=bf16"] = 3, ["wire=fp16"] = 2 } do
      near(train(1, words), (train(2, ("stage=%d %s"):format(stage, words))), 1e-2, words)
    end
  end)
end)

if simulated then
  describe("NCCL", function()
    case("begins when kernels called before are done", function()
      local alone = train(1, "stage=0")
      for stage = 1, 3 do
        near(alone, (train(2, "stage=" .. stage, "DS_SIMT_LATE=kernels")), 1e-5, "stage " .. stage)
      end
    end)

    case("has one call for even parts, and a group of them for others", function()
      good(2, "train.lua stage=1", "DS_SIMT_NCCL_LOG=log")
      for rank = 0, 1 do
        local n = calls("log", rank)
        assert.is_true(n.ReduceScatter > 0 and n.AllGather > 0)
        assert.is_true(n["grouped Reduce"] > 0 and n["grouped Broadcast"] > 0)
        assert.is_nil(n.Reduce)
        assert.equal(2, n.CommInitRank) -- the engine's, and for what the script sums up
        assert.equal(2, n.CommFinalize)
        assert.is_nil(n.CommAbort)
      end
    end)

    local buckets = { "AllReduce", "ReduceScatter", "Reduce", "AllGather", "Broadcast" }

    case("exchanges buckets in registered memory at every stage, and nothing else", function()
      for _, words in ipairs { "stage=0", "stage=1", "stage=2", "stage=3",
        "stage=3 dtype=bf16 gas=2", "stage=2 wire=fp16 overlap=0" } do
        local _, _, _, _, registered, exchanges =
          train(2, words .. " steps=2", "DS_SIMT_NCCL_LOG=log")
        assert.is_true(registered > 0 and exchanges > 0, words)
        for rank = 0, 1 do
          local n = calls("log", rank)
          for _, name in ipairs(buckets) do
            assert.is_nil(n["2 " .. name .. " plain"], words .. ": " .. name)
            -- the other communicator has the model as it is made, and the script's sums
            assert.equal(n["1 " .. name], n["1 " .. name .. " plain"])
          end
          assert.is_nil(n["1 ReduceScatter"] or n["1 AllGather"] or n["1 Reduce"], words)
          assert.is_true(n["2 Reduce"] > 0 and n["2 Broadcast"] > 0, words)
          assert.is_true(n["2 ReduceScatter"] > 0 and n["2 AllGather"] > 0, words)
          assert.equal(n.CommRegister, n.CommDeregister)
        end
      end
    end)

    case("that registers no memory, on one rank or on all, changes no result", function()
      local _, _, _, _, _, _, want = train(2, "stage=2 steps=2")
      for _, settings in ipairs { "DS_NCCL_REGISTER=0", "DS_SIMT_NCCL_REFUSE='MemAlloc 1'",
        "DS_SIMT_NCCL_REFUSE='CommRegister 0'", "DS_SIMT_NCCL_REFUSE=handle" } do
        local _, _, _, _, registered, exchanges, got =
          train(2, "stage=2 steps=2", settings .. " DS_SIMT_NCCL_LOG=log")
        assert.equal(want, got, settings)
        assert.equal(0, registered)
        assert.equal(0, exchanges)
        local n = calls("log", 0)
        assert.equal(n.CommRegister, n.CommDeregister)
        assert.is_true(n["1 AllGather"] > 0) -- of all ranks' group
      end
    end)

    case("gives registered memory back when it is asked to, or there is no other", function()
      helper.has(good(2, "shared.lua", "DS_SIMT_MEMORY=200000000"), "well")
    end)

    case("that is missing is named", function()
      local code, _, err = run(2, "collectives.lua", "DS_NCCL_LIBRARY=/nowhere/libnccl.so")
      assert.equal(1, code)
      helper.has(err, "several ranks on GPUs need NCCL: /nowhere/libnccl.so")
      helper.has(err, "DS_NCCL_LIBRARY names its file")
    end)

    case("that notices an error ends the job, also of ranks that wait", function()
      local code, out, err, seconds = run(2, "ends.lua breaks", "DS_SIMT_NCCL_FAIL=broken")
      assert.equal(1, code)
      assert.equal("", out)
      helper.has(err, "rank 0: ")
      helper.has(err, "the job was ended: NCCL: remote process exited")
      assert.is_true(seconds < 20)
    end)
  end)
end

describe("a job of ranks with GPUs", function()
  case("names the rank that others' GPUs wait for, and ends after the timeout", function()
    local code, out, err, seconds = run(2, "ends.lua stays", "DS_SIMT_LATE=all", "--timeout 4")
    assert.equal(124, code)
    assert.equal("", out)
    helper.has(err, "no progress for 4 s (--timeout): rank 1")
    helper.has(err, "rank 0 waits in all_reduce #2, last seen at")
    assert.is_true(seconds < 40)
  end)

  case("ends with a rank that is killed", function()
    local code, out, _, seconds = run(2, "ends.lua is_killed")
    assert.equal(137, code)
    assert.equal("", out)
    assert.is_true(seconds < 20)
  end)

  case("ends with a rank that ends it", function()
    local code, _, err = run(2, "ends.lua aborts")
    assert.equal(1, code)
    helper.has(err, "as expected")
  end)
end)
