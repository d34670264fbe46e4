-- The optimizer's state on a disk: the same training to the last bit, the same checkpoints; what
-- each setting changes, by counters; less memory; and what is said when the disk is not what it
-- should be.

local ffi = require "ffi"
local ds = require "ds"
local host = require "ds.host"
local helper = require "tests.lua.helper"

local nn, has, says = ds.nn, helper.has, helper.says
local sanitized = host.compiler:find "sanitizers"

ffi.cdef "int setenv(const char *name, const char *value, int); int unsetenv(const char *name);"

local place = helper.place { limit = 180 }
local disk = place.folder .. "/nvme"
assert(os.execute("mkdir " .. disk) == 0)
teardown(function() place:remove() end)

local function files() return select(2, place:sh "ls -A nvme") end
after_each(function() assert.equal("", files()) end) -- nothing is ever left behind

-- ---- the same training

local script = host.base .. "/tests/dist/train.lua"

--- What tests/dist/train.lua prints: losses, norms and a hash of the weights.
local function train(ranks, words, settings)
  local launch = ranks > 1 and ("--num_gpus %d"):format(ranks) or ""
  local code, out, err = place:sh(("OMP_NUM_THREADS=1 %s $D %s '%s' %s"):format(settings or "",
    launch, script, words))
  assert(code == 0, ("%d ranks, %s: code %d\n%s"):format(ranks, words, code, err))
  return out, err
end

describe("training with state on a disk is the same to the last bit", function()
  for _, case in ipairs {
    { 1, 0, "odd", "fp32", "AdamW", "" }, { 2, 1, "odd", "bf16", "AdamW", "DS_IO=plain" },
    { 2, 0, "gpt", "fp32", "Lamb", "DS_IO=direct" }, { 1, 1, "odd", "bf16", "Lamb", "" },
    { 1, 0, "gpt", "bf16", "Muon", "" }, { 2, 1, "odd", "fp32", "Muon", "" },
    { 2, 1, "gpt", "fp32", "LuaSGD", "" }, { 1, 0, "odd", "fp16", "LuaSGD", "DS_IO=plain" },
    { 1, 0, "odd", "fp16", "Adagrad", "" }, { 2, 2, "odd", "bf16", "AdamW", "" },
    { 2, 3, "odd", "fp32", "AdamW", "" }, { 2, 3, "gpt", "bf16", "Muon", "" },
    { 2, 2, "odd", "fp32", "Lamb", "" },
  } do
    local ranks, stage, model, dtype, optimizer, settings = unpack(case)
    it(("%d ranks, stage %d, %s, %s, %s %s"):format(unpack(case)), function()
      local words = ("stage=%d model=%s dtype=%s optimizer=%s steps=6 gas=2 small=0"):format(stage,
        model, dtype, optimizer)
      local out, err = train(ranks, words .. " offload=" .. disk, settings)
      assert.equal(train(ranks, words), out)
      has(err, ("of the optimizer's state in '%s' ("):format(disk))
      assert.equal(settings == "DS_IO=plain", not err:find "O_DIRECT")
    end)
  end
end)

describe("a checkpoint", function()
  for _, case in ipairs { { "bf16", "AdamW" }, { "fp32", "Muon" } } do
    local dtype, optimizer = unpack(case)
    it(("of state on a disk is that of memory, and loads there: %s, %s"):format(dtype, optimizer),
      function()
        local words = ("model=odd dtype=%s optimizer=%s"):format(dtype, optimizer)
        place:sh "rm -rf memory disk"
        local first = words .. " steps=3 stage=1 save="
        train(2, first .. "memory")
        train(2, first .. "disk offload=" .. disk)
        local code, out = place:sh "diff -r memory disk"
        assert.equal(0, code, out)
        local on = words .. " steps=6 load="
        local want = train(1, on .. "memory")
        assert.equal(want, (train(1, on .. "memory offload=" .. disk)))
        assert.equal(train(2, on .. "memory stage=1"),
          (train(2, on .. "disk stage=2 offload=" .. disk)))
      end)
  end

  it("of a vector that is longer than what is in memory at a time", function()
    local function run(path, offload)
      ds.seed(4)
      local engine = ds.initialize { model = nn.Embedding(3000, 1001), config = {
        train_batch_size = 1, steps_per_print = 0, bf16 = { enabled = true },
        optimizer = { type = "Lamb" }, -- whole tensors, of three stretches
        zero_optimization = { offload_optimizer = offload } } }
      local rows = ds.arange(3000)
      local function step()
        engine:backward((engine(rows):float() * engine(rows):float()):mean())
        engine:step()
      end
      step()
      engine:save_checkpoint(path, "a")
      step()
      local p = engine.module.weight
      local after = { ds.zero.get_full(p), ds.zero.get_full(p, "exp_avg") }
      assert(engine:load_checkpoint(path, "a")) -- over what has changed
      step()
      assert.is_true(after[1]:eq(ds.zero.get_full(p)):all():item())
      assert.is_true(after[2]:eq(ds.zero.get_full(p, "exp_avg")):all():item())
      ds.zero.set_full(p, ds.ones(3000, 1001):mul_(0.5), "exp_avg_sq")
      assert.equal(0.5, ds.zero.get_full(p, "exp_avg_sq"):mean():item())
      engine:destroy()
      return after
    end
    local memory = run(place.folder .. "/long")
    for _, ratio in ipairs { 1, 0 } do
      local stored = run(place.folder .. "/long" .. ratio, { device = "nvme", nvme_path = disk,
        ratio = ratio })
      for i = 1, 2 do assert.is_true(memory[i]:eq(stored[i]):all():item()) end
    end
    assert.equal(0, (place:sh "diff -r long long1"))
    place:sh "rm -rf long*"
  end)
end)

-- ---- settings

--- An engine over 2^18 weights in fp32, so that AdamW has 2^20 bytes of each of two vectors, in
-- four blocks; a request has 2^16 bytes. Settings are laid over that.
local function make(changes)
  local c = { train_batch_size = 1, steps_per_print = 0, seed = 3,
    optimizer = changes.optimizer or { type = "AdamW", params = { lr = 1e-2 } },
    aio = { block_size = 2 ^ 16 }, zero_optimization = { sub_group_size = 2 ^ 16 } }
  for key, value in pairs(changes.aio or {}) do c.aio[key] = value end
  local wanted = { device = "nvme", nvme_path = disk }
  for key, value in pairs(changes.offload or {}) do wanted[key] = value end
  c.zero_optimization.offload_optimizer = wanted
  c.zero_optimization.sub_group_size = changes.sub_group_size or 2 ^ 16
  ds.seed(1)
  return ds.initialize { model = nn.Linear(512, 512, { bias = false }), config = c }
end

local x = ds.arange(512):reshape(1, 512):to("f32"):mul_(1e-3):keep()

local function step(engine)
  engine:backward((engine(x) * engine(x)):mean())
  engine:step()
end

--- What two steps count, and the weights after them.
local function counted(changes, mode)
  if mode then ffi.C.setenv("DS_IO", mode, 1) end
  local engine = make(changes)
  if mode then ffi.C.unsetenv "DS_IO" end
  step(engine)
  step(engine)
  local weights = engine.module.weight:detach():clone()
  local counters = engine.offload and engine.offload:counters()
  engine:destroy()
  return counters, weights
end

describe("settings", function()
  local usual, want = counted {}

  --- Counters with settings that change no result.
  local function with(changes, mode)
    local c, weights = counted(changes, mode)
    assert.is_true(want:eq(weights):all():item())
    return c
  end

  it("as they are without any", function()
    assert.equal(2 * 2 ^ 21, usual.bytes_read) -- two steps
    assert.equal(2 * 2 ^ 21, usual.bytes_written)
    assert.equal(64, usual.reads)
    assert.equal(4, usual.most_buffers)
  end)

  it("aio.block_size: bytes of a request", function()
    local c = with { aio = { block_size = 2 ^ 15 } }
    assert.equal(128, c.reads)
    assert.equal(128, c.writes)
    assert.equal(usual.bytes_read, c.bytes_read)
    says("aio.block_size: 5000 is no multiple of 4096", make, { aio = { block_size = 5000 } })
  end)

  it("aio.queue_depth: requests under way", function()
    local c = with { aio = { queue_depth = 1 } }
    assert.equal(1, c.most_under_way)
    if c.ringed then assert.equal(5, with({ aio = { queue_depth = 5 } }).most_under_way) end
    c = with({ aio = { queue_depth = 6 } }, "plain")
    assert.is_false(c.ringed)
    assert.equal(6, c.threads) -- each waits for its request
    assert.is_true(c.most_under_way <= 6)
  end)

  it("aio.intra_op_parallelism, or thread_count: threads", function()
    if usual.ringed then assert.equal(1, usual.threads) end
    if usual.ringed then assert.equal(3, with({ aio = { intra_op_parallelism = 3 } }).threads) end
    assert.equal(2, with({ aio = { thread_count = 2, queue_depth = 1 } }, "plain").threads)
  end)

  it("aio.single_submit: a call to the system for each request", function()
    if not usual.ringed then return pending "no io_uring here" end
    local c = with { aio = { single_submit = true } }
    assert.equal(c.reads + c.writes, c.submits)
    assert.is_true(usual.submits < c.submits)
  end)

  it("aio.overlap_events: requests start while others are under way", function()
    if not usual.ringed then return pending "no io_uring here" end
    assert.equal(0, with({ aio = { overlap_events = false, queue_depth = 4 } }).refills)
    assert.is_true(with({ aio = { queue_depth = 4 } }).refills > 0)
  end)

  it("buffer_count, pipeline_read and pipeline_write: blocks in memory at a time", function()
    local function buffers(offload) return with({ offload = offload }).most_buffers end
    assert.equal(1, buffers { buffer_count = 1 })
    assert.equal(3, buffers { buffer_count = 3 })
    assert.equal(4, buffers { pipeline_write = false }) -- three are read ahead
    assert.equal(4, buffers { pipeline_read = false }) -- three are being written
    assert.equal(1, buffers { pipeline_read = false, pipeline_write = false })
  end)

  it("sub_group_size: elements of a block", function()
    local c = with { sub_group_size = 2 ^ 17 } -- two blocks of 2^20 bytes
    assert.equal(2, c.most_buffers)
    assert.equal(usual.bytes_read, c.bytes_read)
    assert.equal(4, with({ sub_group_size = 10 }).most_buffers) -- at least what a disk moves
  end)

  it("ratio: the share on the disk", function()
    local c = with { offload = { ratio = 0.5 } }
    assert.equal(usual.bytes_read / 2, c.bytes_read)
    assert.equal(0, with({ offload = { ratio = 0 } }).bytes_read)
  end)

  it("state that begins with another number than 0", function()
    local function weights(offload)
      local _, w = counted { offload = offload, optimizer = { type = "Adagrad", params = {
        lr = 1e-2, initial_accumulator_value = 0.5 } } }
      return w
    end
    local memory = weights { device = "none" }
    for _, ratio in ipairs { 1, 0.5, 0 } do
      assert.is_true(memory:eq(weights { ratio = ratio }):all():item())
    end
  end)

  it("an optimizer without state", function()
    ds.optimizer("Plain", { defaults = { lr = 0.1 }, step = function(p, g, s, h)
      assert(next(s) == nil)
      p:add_(g, -h.lr)
    end })
    local c = counted { optimizer = { type = "Plain" } }
    assert.equal(0, c.reads)
  end)

  it("device \"cpu\" is the memory where it is anyway", function()
    local engine = make { offload = { device = "cpu" } }
    assert.is_nil(engine.offload)
    step(engine)
    step(engine)
    assert.is_true(want:eq(engine.module.weight):all():item())
    engine:destroy()
  end)

  it("an engine that is destroyed gives the disk back", function()
    local function open() -- files of this process there
      local pipe = io.popen "ls -l /proc/$PPID/fd | grep -c nvme"
      local n = pipe:read "*n"
      pipe:close()
      return n
    end
    local before, engine = open(), make {}
    assert.equal(before + 1, open())
    engine:destroy()
    assert.equal(before, open())
    says("the engine was destroyed", engine.optimizer.step, engine.optimizer)
  end)
end)

-- ---- less memory

local large = [[
  local ds = require "ds"
  local wanted = arg[1] == "disk" and { device = "nvme", nvme_path = "nvme" } or nil
  local engine = ds.initialize { model = ds.nn.Linear(4096, 4096, { bias = false }), config = {
    train_batch_size = 1, bf16 = { enabled = true }, steps_per_print = 0,
    optimizer = { type = "AdamW" },
    zero_optimization = { sub_group_size = 2 ^ 18, offload_optimizer = wanted } } }
  local x = ds.ones(1, 4096):keep()
  for _ = 1, 2 do
    engine:backward(engine(x):float():mean())
    engine:step()
  end
  engine:save_checkpoint "large"
  assert(engine:load_checkpoint "large")
  print "trained"
]]

describe("in less memory than the state needs", function()
  it("as a limit of the process", function()
    if sanitized then return pending "the sanitizer takes more" end
    place:write("large.lua", large)
    local line = "ulimit -d 245760 && OMP_NUM_THREADS=1 $D large.lua "
    local code, _, err = place:sh(line .. "memory")
    assert.equal(1, code)
    has(err, "out of memory")
    local out
    code, out, err = place:sh(line .. "disk")
    assert.equal("trained\n", out, err)
    assert.equal(0, code)
    place:sh "rm -rf large"
  end)

  it("as a cgroup", function()
    if sanitized then return pending "the sanitizer takes more" end
    place:write("large.lua", large)
    local line = [[
      for group in /sys/fs/cgroup/memory/ds$$ /sys/fs/cgroup/ds$$; do
        mkdir $group 2>/dev/null || continue
        echo 230686720 2>/dev/null >$group/memory.limit_in_bytes ||
          echo 230686720 2>/dev/null >$group/memory.max || { rmdir $group; continue; }
        sh -c "echo \$\$ >$group/cgroup.procs && OMP_NUM_THREADS=1 exec '$D' large.lua %s"
        code=$?
        rmdir $group
        exit $code
      done
      exit 99]]
    local code = place:sh(line:format "memory")
    if code == 99 then return pending "no cgroups here" end
    assert.equal(137, code)
    local out, err
    code, out, err = place:sh(line:format "disk")
    assert.equal("trained\n", out, err)
    assert.equal(0, code)
    place:sh "rm -rf large"
  end)
end)

-- ---- disks that are not what they should be

describe("a folder", function()
  it("must be named", function()
    says('config: zero_optimization.offload_optimizer: device "nvme" needs nvme_path',
      ds.initialize, { model = nn.Linear(2, 2), config = { train_batch_size = 1,
        optimizer = { type = "AdamW" },
        zero_optimization = { offload_optimizer = { device = "nvme" } } } })
  end)

  it("must be there, and one to write in", function()
    local function refused(path, why)
      has(says("offload_optimizer.nvme_path: cannot keep state in '" .. path, make,
        { offload = { nvme_path = path } }), why)
    end
    refused(disk .. "/none", "no such file or folder")
    refused("/dev/null", "it is no folder")
    refused("/proc/self", "")
  end)

  it("may go while training runs", function()
    local gone = place.folder .. "/gone"
    assert(os.execute("mkdir " .. gone) == 0)
    local engine = make { offload = { nvme_path = gone } }
    step(engine)
    assert(os.execute("rmdir " .. gone) == 0) -- the file has no name in it
    step(engine)
    engine:destroy()
  end)

  it("is empty after a kill", function()
    place:write("kill.lua", [[
      local ds = require "ds"
      local engine = ds.initialize { model = ds.nn.Linear(512, 512), config = {
        train_batch_size = 1, steps_per_print = 0, optimizer = { type = "AdamW" },
        zero_optimization = { offload_optimizer = { device = "nvme", nvme_path = "nvme" } } } }
      local x = ds.ones(1, 512):keep()
      while true do
        engine:backward(engine(x):mean())
        engine:step()
        print "step"
        io.flush()
      end]])
    place:sh "$D kill.lua >steps & job=$!; wait_for step steps 3; kill -9 $job; wait $job"
  end)
end)

describe("a disk that is full", function()
  it("at the start, by its size", function()
    local mount = "mount -t tmpfs -o size=1m none nvme"
    if place:sh(("unshare -m sh -c '%s'"):format(mount)) ~= 0 then
      return pending "no private mounts here"
    end
    local code, _, err = place:sh(("unshare -m sh -c '%s && \"$0\" kill.lua' \"$D\""):format(mount))
    assert.equal(1, code)
    assert.truthy(err:find(
      "the disk is full: 2105344 bytes are wanted in 'nvme' and 1048576 are free"), err)
  end)

  it("at the start, by a limit on files", function()
    local code, _, err = place:sh "ulimit -f 512 && $D kill.lua"
    assert.equal(1, code)
    has(err, "cannot take room in 'nvme': File too large")
  end)
end)

describe("a disk that fails while training runs", function()
  -- four steps and a checkpoint at the second; before the third the disk fails
  local failing = [[
    local ffi, ds = require "ffi", require "ds"
    ffi.cdef [=[
      typedef struct { unsigned long now, most; } limit;
      int getrlimit(int, limit *); int setrlimit(int, const limit *); ]=]
    local FSIZE, limit, how, last = 1, ffi.new "limit", arg[1], tonumber(arg[2])
    ffi.C.getrlimit(FSIZE, limit)
    local engine = ds.initialize { model = ds.nn.Linear(512, 512), config = {
      train_batch_size = 1, steps_per_print = 0, seed = 5, optimizer = { type = "AdamW" },
      zero_optimization = { offload_optimizer = { device = "nvme", nvme_path = "nvme" } } } }
    local x = ds.ones(1, 512):keep()
    engine:load_checkpoint "saved"
    local function step()
      engine:backward((engine(x) * engine(x)):mean())
      engine:step()
    end
    while engine.global_steps < last do
      if engine.global_steps == 2 and how == "write" then
        ffi.C.setrlimit(FSIZE, ffi.new("limit", 2 ^ 20, limit.most))
      elseif engine.global_steps == 2 and how == "read" then
        os.execute "for f in /proc/$PPID/fd/*; do readlink $f | grep -q nvme && : >$f; done"
      end
      local ok, message = pcall(step)
      if not ok then
        print(message)
        print(select(2, pcall(step)))
        ffi.C.setrlimit(FSIZE, limit)
        engine:zero_grad()
        print(select(2, pcall(engine.save_checkpoint, engine, "saved")))
        os.exit(9)
      end
      if how ~= "none" and engine.global_steps == 2 then engine:save_checkpoint "saved" end
    end
    print(engine.module.weight:detach():sum():item()) ]]

  for _, how in ipairs { "write", "read" } do
    local why = how == "write" and "cannot write '[^\n]*nvme/%.tmp%-[^\n]*': File too large"
      or "cannot read '[^\n]*nvme/%.tmp%-[^\n]*': it has become shorter"
    it(("names file and step, and leaves the last checkpoint: %s"):format(how), function()
      place:write("failing.lua", failing)
      place:sh "rm -rf saved"
      local _, want = place:sh "$D failing.lua none 4"
      local code, out, err = place:sh("$D failing.lua " .. how .. " 4")
      assert.equal(9, code, out .. err)
      assert.truthy(out:find("step 3: the optimizer's state: " .. why), out)
      local _, again = out:gsub("the optimizer's state was lost %(", "")
      assert.equal(2, again, out) -- another step, and a checkpoint
      has(out, "make a new engine, and load the last checkpoint")
      code, out = place:sh "$D failing.lua none 4"
      assert.equal(0, code)
      assert.equal(want, out)
    end)
  end
end)
