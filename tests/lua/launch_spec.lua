--- A job of several ranks as its users meet it: every test starts dsrun with --num_gpus.
-- Scripts print, sleep, raise, crash and are killed; nothing of a job may stay behind.

local helper = require "tests.lua.helper"

-- All that a test starts has MARK in its environment.
local place = helper.place { limit = 60 }
local folder, has, lacks = place.folder, helper.has, helper.lacks
place.before = ("export TMPDIR='%s/tmp' MARK='%s'\nunset OMP_NUM_THREADS"):format(folder, folder)
local function write(...) return place:write(...) end
local function read(name) return place:read(name) end
local function timed(command) return place:timed(command) end
local function sh(command) return place:sh(command) end

local function count(text, piece)
  local n, at = 0, 1
  while true do
    local first, last = text:find(piece, at, true)
    if not first then return n end
    n, at = n + 1, last + 1
  end
end

local function lines(text)
  local all = {}
  for line in text:gmatch "[^\n]+" do all[#all + 1] = line end
  table.sort(all)
  return all
end

--- Asserts that no process of this test's jobs is left, and no file. A folder in /dev/shm has the
-- number of the dsrun that it belongs to.
local function nothing_left()
  local left
  for _ = 1, 40 do
    local pipe = io.popen(([[grep -slz '^MARK=%s$' /proc/[0-9]*/environ; ls '%s/tmp'
      for d in /dev/shm/dsrun-[0-9]*-*; do
        p=${d#*dsrun-}
        [ ! -e "$d" ] || [ -e /proc/${p%%%%-*} ] || grep -qx $d '%s/old' || echo $d
      done]]):format(folder, folder, folder))
    left = pipe:read "*a"
    pipe:close()
    if left == "" then return end
    os.execute "sleep 0.05"
  end
  os.execute("for p in $(grep -slz '^MARK=" .. folder .. "$' /proc/[0-9]*/environ); do "
    .. "kill -9 $(echo $p | tr -dc 0-9); done")
  error("left behind:\n" .. left, 2)
end

-- What every script begins with.
local prelude = [[
local rank, size = tonumber(os.getenv "RANK"), tonumber(os.getenv "WORLD_SIZE")
local ffi = require "ffi"
ffi.cdef "int usleep(unsigned us); int getpid(void); int kill(int pid, int signal);"
local function sleep(seconds) for _ = 1, seconds * 100 do ffi.C.usleep(10000) end end
local function me(signal) ffi.C.kill(ffi.C.getpid(), signal) end
_G.unused = { rank, size, sleep, me }
]]

local function script(name, text) write(name, prelude:gsub("\n", " ") .. text) end

-- What other jobs left in /dev/shm before is not these tests'.
assert(os.execute(("mkdir '%s/tmp'; ls -d /dev/shm/dsrun-* >'%s/old' 2>/dev/null; true"):format(
  folder, folder)) == 0)

teardown(function() place:remove() end)

after_each(function() nothing_left() end)

describe("ranks", function()
  it("know who they are, and get the arguments as they were given", function()
    script("env.lua", [[
      local t = {}
      for _, name in ipairs { "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR",
        "MASTER_PORT" } do t[#t + 1] = os.getenv(name) end
      local given = ("<%s>"):rep(#arg):format(...):gsub("\n", "/")
      print(table.concat(t, " "), #os.getenv "DSRUN_JOB", given)]])
    local code, out, err = sh [[$D --num_gpus 3 --master_port 1234 env.lua a : '\:' '' ' x
y' --num_gpus 9]]
    assert.same({ 0, "" }, { code, err })
    local rest = "127.0.0.1 1234\t32\t<a><:><\\:><>< x/y><--num_gpus><9>\n"
    for r = 0, 2 do has(out, ("%d 3 %d 3 %s"):format(r, r, rest)) end
  end)

  it("share the cores: threads, and patience where there are more ranks than cores", function()
    script("threads.lua", [[print(os.getenv "OMP_NUM_THREADS", os.getenv "OMP_WAIT_POLICY")]])
    local _, cores = sh [[$D -e 'print(require("ds.ffi").C.ds_threads())']]
    cores = tonumber(cores)
    local _, out = sh("$D --num_gpus " .. cores .. " threads.lua")
    assert.equal(("1\tnil\n"):rep(cores), out)
    _, out = sh("$D --num_procs " .. 2 * cores .. " threads.lua")
    assert.equal(("1\tpassive\n"):rep(2 * cores), out)
    _, out = sh "OMP_NUM_THREADS=5 $D --num_gpus 1 threads.lua"
    assert.equal("5\tpassive\n", out)
  end)

  it("are tied to their share of the cores when that is asked for", function()
    local _, all = sh "taskset -cp $$ | sed 's/.*: //'"
    if not all:find "^0[-,]1" then pending "one core here" return end
    script("cores.lua", [[os.execute "taskset -cp $PPID | sed 's/.*: //'"]])
    local _, out = sh "$D --num_gpus 2 --bind_core_list 0-1 cores.lua"
    assert.same({ "0", "1" }, lines(out))
    _, out = sh "$D --num_gpus 1 --bind_core_list 1 cores.lua"
    assert.same({ "1" }, lines(out))
    _, out = sh "$D --num_gpus 2 cores.lua"
    assert.equal(all .. all, out)
    local code, _, err = sh "$D --num_gpus 3 --bind_core_list 0,1 cores.lua"
    assert.equal(2, code)
    has(err, "3 ranks cannot be tied to 2 cores")
  end)

  it("may start another dsrun, which is none of them", function()
    script("outer.lua", [[if rank == 1 then
      os.execute("'" .. require("ds.host").executable .. "' inner.lua") end]])
    script("inner.lua", [[print(rank, size, require("ds").world_size())]])
    assert.same({ 0, "nil\tnil\t1\n", "" }, { sh "$D --num_gpus 2 outer.lua" })
  end)

  it("have rank 0 read what is piped in, all of it and as late as it comes", function()
    script("reads.lua", [[if rank == 0 then print(#io.read "*a") end]])
    local _, out = sh "(sleep 0.5; head -c 300000 /dev/zero) | $D --num_gpus 2 reads.lua"
    assert.equal("300000\n", out)
  end)

  it("may be one", function()
    script("one.lua", "print(rank, size, require('ds').world_size())")
    assert.same({ 0, "0\t1\t1\n", "" }, { sh "$D --num_gpus 1 one.lua" })
  end)

  it("may be started by mpirun", function()
    script("by_mpirun.lua", [[print(rank, size, os.getenv "LOCAL_RANK", os.getenv "LOCAL_SIZE")]])
    local code, out = sh [[mpirun --allow-run-as-root --oversubscribe -np 2 $D by_mpirun.lua]]
    assert.equal(0, code)
    assert.same({ "0\t2\t0\t2", "1\t2\t1\t2" }, lines(out))
    local err
    code, out, err = sh
      [[mpirun --allow-run-as-root --oversubscribe -np 2 $D --num_gpus 2 by_mpirun.lua]]
    assert.same({ 2, "" }, { code, out })
    has(err, "this is one of 2 ranks already")
  end)
end)

describe("output", function()
  it("comes in whole lines, stdout and stderr apart", function()
    script("many.lua", [[
      for i = 1, 3000 do
        io.write(rank, " ", i, " ") io.write(("x"):rep(i % 200), " end\n")
        if i % 3 == 0 then io.stderr:write(rank, " err ", i, "\n") end
      end
      io.write("tail ", rank)]])
    local code, out, err = sh "$D --num_gpus 4 many.lua"
    assert.equal(0, code)
    local seen = {}
    for line in out:gmatch "[^\n]+" do
      local r, i, x = line:match "^(%d) (%d+) (x*) end$"
      if r then
        seen[r] = (seen[r] or 0) + 1
        assert.equal(seen[r], tonumber(i)) -- each rank's in order
        assert.equal(seen[r] % 200, #x)
      else
        assert.truthy(line:match "^tail %d$", line)
      end
    end
    for r = 0, 3 do assert.equal(3000, seen[tostring(r)]) end
    assert.equal(4, count(out, "tail "))
    assert.equal(4000, #lines(err))
    for line in err:gmatch "[^\n]+" do assert.truthy(line:match "^%d err %d+$", line) end
  end)

  it("is tagged by rank, and kept in a file for each, when that is asked for", function()
    script("tags.lua", [[print("out " .. rank) print "" io.stderr:write("err ", rank, "\n")]])
    local code, out, err = sh "$D --num_gpus 2 --tag-output --enable_each_rank_log a/logs tags.lua"
    assert.equal(0, code)
    assert.same({ "[0] ", "[0] out 0", "[1] ", "[1] out 1" }, lines(out))
    assert.same({ "[0] err 0", "[1] err 1" }, lines(err))
    for r = 0, 1 do
      assert.same({ "err " .. r, "out " .. r }, lines(read(("a/logs/rank_%d.log"):format(r))))
    end
    code, out, err = sh "$D --num_gpus 2 --enable_each_rank_log tags.lua/x tags.lua"
    assert.same({ 2, "" }, { code, out })
    has(err, "tags.lua/x")
  end)

  it("goes on where its file is full, and that is said", function()
    script("tags.lua", [[print("out " .. rank)]])
    local code, out, err = sh [[mkdir full; ln -s /dev/full full/rank_1.log
      $D --num_gpus 2 --enable_each_rank_log full tags.lua]]
    assert.same({ 0, { "out 0", "out 1" } }, { code, lines(out) })
    assert.equal("dsrun: rank_1.log ends here: No space left on device\n", err)
    assert.equal("out 0\n", read "full/rank_0.log")
  end)

  it("that nobody reads stops the ranks, not the signals", function()
    script("flood.lua", [[while true do print(("y"):rep(100)) end]])
    local code, _, _, seconds = timed [[mkfifo f; $D --num_gpus 2 flood.lua >f & p=$!
      exec 3<f; sleep 1; kill -TERM $p; sleep 0.2; kill -TERM $p; wait $p]]
    assert.equal(143, code)
    assert.truthy(seconds < 20, seconds)
  end)
end)

describe("the end of a job", function()
  -- how rank 1 ends, the job's exit code, what is said
  for name, case in pairs {
    ["an error"] = { [[error "boom"]], 1, "rank 1: end.lua:1: boom" },
    ["os.exit"] = { [[os.exit(3)]], 3, "dsrun: rank 1 ended with code 3" },
    ["a crash"] = { [[ffi.cast("int *", 0)[0] = 1]], 139,
      "dsrun: rank 1 was killed by signal 11 (Segmentation fault)" },
    ["SIGKILL"] = { [[me(9)]], 137, "dsrun: rank 1 was killed by signal 9 (Killed)" },
  } do
    it("by " .. name .. " of one rank", function()
      script("end.lua", ([[print "before" sleep(0.3)
        if rank == 1 then %s end os.execute "sleep 20"]]):format(case[1]):gsub("\n", " "))
      -- a sanitizer would make an error of its own out of a crash
      local code, out, err, seconds = timed [[
        export ASAN_OPTIONS="$ASAN_OPTIONS:handle_segv=0"
        $D --num_gpus 3 end.lua]]
      assert.equal(case[2], code)
      has(err, case[3])
      assert.equal(1, count(err, "dsrun: rank "))
      lacks(err, "mpirun")
      assert.equal(3, count(out, "before"))
      assert.truthy(seconds < 10, seconds)
    end)
  end

  it("shows one traceback when all ranks fail alike", function()
    script("same.lua", [[
      local function deep() error "the same" end
      deep()]])
    local code, _, err = sh "$D --num_gpus 4 same.lua"
    assert.equal(1, code)
    assert.equal(1, count(err, "the same"))
    assert.equal(1, count(err, "stack traceback"))
    local errors
    code, _, errors = sh "$D --num_gpus 2 -e 'syntax error here'"
    assert.equal(1, code)
    assert.equal(1, count(errors, "'=' expected near"))
  end)

  it("waits for the last rank", function()
    script("late.lua", [[if rank == 1 then sleep(0.5) end print(rank)]])
    assert.same({ 0, "0\n1\n", "" }, { sh "$D --num_gpus 2 late.lua" })
  end)

  it("that cannot begin has one message", function()
    local code, _, err = sh "$D --num_gpus 2 nowhere.lua"
    assert.equal(2, code)
    assert.equal("dsrun: cannot read the script nowhere.lua: No such file or directory\n", err)
    script("x.lua", "")
    code, _, err = sh "PATH=/nowhere /bin/sh -c \"'$D' --num_gpus 2 x.lua\""
    assert.equal(2, code)
    has(err, "there is no mpirun here")
    code, _, err = sh [[mkdir -p fake
      printf '#!/bin/sh\necho "HYDRA build details:"\n' >fake/mpirun
      chmod +x fake/mpirun; PATH=$PWD/fake:$PATH $D --num_gpus 2 x.lua]]
    assert.equal(2, code)
    has(err, "mpirun is not Open MPI's")
    code, _, err = sh [[printf '#!/bin/sh
[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.0" && exit; echo no luck; exit 9\n' >fake/mpirun
      PATH=$PWD/fake:$PATH $D --num_gpus 2 x.lua]]
    assert.equal(9, code)
    has(err, "no luck")
    has(err, "mpirun ended with code 9 before all ranks had started")
  end)
end)

describe("signals", function()
  -- Stands for an engine: looks for a signal at its step boundaries.
  local engine = [[
    local C = require "ds.ffi".C
    C.ds_signal_claim(1)
    io.stderr:write "ready\n"
    while C.ds_signal_pending() == 0 do sleep(0.05) end
    sleep(STEP)
    print("saved " .. rank)
    os.exit(128 + C.ds_signal_pending())]]
  -- Starts the job, waits until its ranks are ready, goes on with the rest.
  local function job(options, ranks, rest)
    return timed(("$D %s & p=$!\nwait_for ready err %d\n%s"):format(options, ranks, rest))
  end

  it("reach all ranks, which save; the code is 128 + the signal", function()
    script("engine.lua", (engine:gsub("STEP", "1.5 * rank")))
    for signal, code in pairs { TERM = 143, INT = 130, USR1 = 138 } do
      local got, out, err = job("--num_gpus 2 engine.lua", 2, "kill -" .. signal .. " $p; wait $p")
      assert.equal(code, got)
      assert.same({ "saved 0", "saved 1" }, lines(out))
      has(err, "ranks save and end at their next step")
      lacks(err, "mpirun")
    end
  end)

  it("end now when they come twice, and after the grace time", function()
    script("stubborn.lua", (engine:gsub("STEP", "20")))
    local code, out, _, seconds = job("--num_gpus 2 stubborn.lua", 2,
      "kill -TERM $p; sleep 0.3; kill -TERM $p; wait $p")
    assert.same({ 143, "" }, { code, out })
    assert.truthy(seconds < 10, seconds)
    code, out, _, seconds = job("--num_gpus 2 --grace 0.5 stubborn.lua", 2, "kill -INT $p; wait $p")
    assert.same({ 130, "" }, { code, out })
    assert.truthy(seconds < 10, seconds)
  end)

  it("end at once where nobody saves", function()
    script("plain.lua", [[io.stderr:write "ready\n" sleep(20)]])
    local code, _, _, seconds = job("--num_gpus 2 plain.lua", 2, "kill -TERM $p; wait $p")
    assert.equal(143, code)
    assert.truthy(seconds < 10, seconds)
  end)

  it("kill all when dsrun is killed", function()
    script("orphans.lua", [[io.stderr:write "ready\n" os.execute "sleep 20"]])
    job("--num_gpus 2 --save_pid orphans.lua", 2, "[ -s tmp/$p.ds ] && echo pid; kill -KILL $p")
    assert.equal("pid\n", read "out")
  end)

  it("kill all when mpirun is killed", function()
    script("orphans.lua", [[io.stderr:write "ready\n" os.execute "sleep 20"]])
    local code = job("--num_gpus 2 orphans.lua", 2, "kill -KILL $(pgrep -P $p mpirun); wait $p")
    assert.truthy(code ~= 0)
  end)

  it("ask where the ranks are: SIGUSR2", function()
    script("where.lua", [[
      local C = require "ds.ffi".C
      io.stderr:write "ready\n"
      local function asked() return io.open "asked" end
      if rank == 0 then
        C.ds_breadcrumb "get(41) of the loader"
        while not asked() do sleep(0.05) end
      else
        local t = 0
        while not asked() do
          local stop = os.clock() + 0.1
          while os.clock() < stop do t = t + math.sin(t) end
        end
      end]])
    local code, _, err = job("--num_gpus 2 where.lua", 2,
      "sleep 0.3; kill -USR2 $p; wait_for 'rank 1: ' err; touch asked; wait $p")
    assert.equal(0, code)
    has(err, "rank 0: ")
    has(err, "in get(41) of the loader")
    assert.truthy(err:find "rank 1: [^\n]*where%.lua:%d", err)
  end)
end)

describe("a rank that hangs", function()
  it("is named, and left alone if it comes back", function()
    script("stopped.lua", [==[
      if rank == 2 then
        require "ds.ffi".C.ds_breadcrumb "get(41) of the loader"
        os.execute [=[(while ! grep -q 'State:.T' /proc/$PPID/status; do sleep 0.05; done
          sleep 4.4; kill -CONT $PPID; touch awake) &]=]
        local function work() return os.clock() end
        while work() < 1.5 do work() end
        me(19)
      end
      while not io.open "awake" do sleep(0.05) end
      print "done"]==])
    -- after 3 s, half the timeout, a silent rank is named
    local code, out, err = sh "$D --num_gpus 3 --timeout 6 stopped.lua"
    assert.same({ 0, "done\ndone\ndone\n" }, { code, out })
    assert.truthy(err:find "rank 2 is silent for %d s, last seen at stopped%.lua:%d", err)
    has(err, "in get(41) of the loader")
  end)

  it("ends the job", function()
    script("frozen.lua", [[sleep(0.2) if rank == 1 then me(19) end sleep(20)]])
    local code, _, err, seconds = timed "$D --num_gpus 2 --timeout 3 frozen.lua"
    assert.equal(124, code)
    has(err, "a rank is frozen or cut off, and the job ends: rank 1 is silent for")
    assert.truthy(seconds < 15, seconds)
  end)

  it("is not the matter when all are stopped", function()
    script("all.lua", [[io.stderr:write "ready\n" sleep(2.5) print "done"]])
    local code, out, err = sh [[$D --num_gpus 2 --timeout 2 all.lua & p=$!
      wait_for ready err 2
      ranks=$(pgrep -P $(pgrep -P $p mpirun))
      kill -STOP $ranks; sleep 3; kill -CONT $ranks; wait $p]]
    assert.same({ 0, "done\ndone\n" }, { code, out })
    lacks(err, "silent")
  end)
end)

describe("a plan", function()
  local json = require "ds.json"
  -- What --dry-run says, in a home of the test's own.
  local function dry(options, before)
    local code, out, err = sh(("%s\nexport HOME=$PWD/home\n$D %s --dry-run --json x.lua a 'b c'")
      :format(before or "", options))
    return code, code == 0 and json.decode(out) or out, err
  end
  local function places(plan)
    local t = {}
    for i, rank in ipairs(plan.ranks) do
      assert.equal(i - 1, rank.rank)
      t[i] = ("%s %d %d"):format(rank.host, rank.slot, rank.local_rank)
    end
    return table.concat(t, "; ")
  end

  setup(function()
    write("x.lua", "error 'a dry run starts nothing'")
    write("hosts", "# two machines\r\nworker-1 slots=2\n\n"
      .. "root@worker-2 slots = 3 max_slots=4 # more\n")
  end)

  it("has a rank a slot, in the hostfile's order, and after filters", function()
    for options, expected in pairs {
      [""] = "worker-1 0 0; worker-1 1 1; root@worker-2 0 0; root@worker-2 1 1; root@worker-2 2 2",
      ["--num_nodes 1"] = "worker-1 0 0; worker-1 1 1",
      ["--num_gpus 1"] = "worker-1 0 0; root@worker-2 0 0",
      ["-i worker-2:2,0@worker-1:1"] = "worker-1 1 0; root@worker-2 0 0; root@worker-2 2 1",
      ["-e worker-2:0-1"] = "worker-1 0 0; worker-1 1 1; root@worker-2 2 0",
      ["--exclude worker-1"] = "root@worker-2 0 0; root@worker-2 1 1; root@worker-2 2 2",
    } do
      local code, plan, err = dry("-H hosts " .. options)
      assert.same({ 0, "" }, { code, err })
      assert.equal(expected, places(plan))
    end
    for options, message in pairs {
      ["-i worker-3"] = "worker-3", ["-i worker-2:7"] = "7", ["-i worker-1 -e worker-2"] = "",
      ["-e worker-1@worker-2"] = "", ["--num_nodes 3"] = "3", ["--num_gpus 3"] = "worker-1",
      ["--num_procs 3"] = "--num_procs wants 3 slots of each host; there is worker-1",
    } do
      local code, _, err = dry("-H hosts " .. options)
      assert.equal(2, code)
      has(err, message)
    end
  end)

  it("has the command and its arguments as they are", function()
    local _, plan = dry "-H hosts --launcher_args '--mca pml ob1 --x \"a b\"' --ssh_port 2222"
    local command = table.concat(plan.command, "\0")
    -- user@host has an alias for Open MPI, which dsrun turns back for ssh
    assert.truthy(command:find "plm_rsh_agent%z[^%z]*dsrun %-%-ssh %-p 2222 %-o BatchMode=yes")
    has(command, "--mca\0pml\0ob1\0--x\0a b\0-np\0005\0")
    has(command, "x.lua\0a\0b c")
    assert.equal("localhost 0 0; localhost 1 1", places(select(2, dry "--num_gpus 2")))
  end)

  it("names this machine's GPUs where they are given", function()
    local _, plan = dry("--num_gpus 2", "export CUDA_VISIBLE_DEVICES=3,5,7")
    assert.equal("localhost 3 0; localhost 5 1", places(plan))
  end)

  it("has the variables of files and of the shell, and says whose each is", function()
    os.execute("mkdir -p '" .. folder .. "/home'")
    write("home/.deepspeed_env", "A=home\nB=home # more\n")
    write(".deepspeed_env", "\nexport B='one two'\n")
    write(".dsrun_env", "C=\"x\\ty\\\"\"\nNCCL_DEBUG=file\n")
    local _, plan = dry("--num_gpus 1",
      "export NCCL_DEBUG=shell NCCL_IB_HCA=mlx5 OTHER=1 LUA_CPATH=';;'")
    local env, from = plan.env, plan.env_from
    assert.same({ "home", "one two", "file", "mlx5", ";;" },
      { env.A, env.B, env.NCCL_DEBUG, env.NCCL_IB_HCA, env.LUA_CPATH })
    assert.is_nil(env.OTHER)
    has(from.A, "home/.deepspeed_env:1")
    has(from.B, ".deepspeed_env:2")
    assert.equal("environment", from.NCCL_IB_HCA)
    assert.equal("dsrun", from.MASTER_ADDR)
    script("env.lua", [[print(os.getenv "A", os.getenv "B", os.getenv "NCCL_DEBUG")]])
    local _, out = sh "HOME=$PWD/home $D --num_gpus 1 env.lua"
    assert.equal("home\tone two\tfile\n", out)
    write("other", "A 1\nRANK=3\n")
    local code, _, err = dry("--num_gpus 1", "export DS_ENV_FILE=other")
    assert.equal(2, code)
    has(err, "other:1:")
    has(err, "other:2:")
    os.execute(("cd '%s' && rm -r home .deepspeed_env .dsrun_env"):format(folder))
  end)

  it("is a table to read without --json", function()
    local code, out = sh "HOME=$PWD $D -H hosts --dry-run x.lua"
    assert.equal(0, code)
    assert.truthy(out:find "rank +host +slot +local rank\n +0 +worker%-1 +0 +0\n")
    has(out, "command\n  mpirun ")
  end)
end)

describe("a restart", function()
  it("follows a failure as often as it may, and knows which it is", function()
    script("life.lua", [[
      local life = require("ds").restart_count()
      print(rank, life)
      require("ds").barrier() -- so that rank 0 has come to it as well
      if life < 2 and rank == 1 then os.exit(5 + life) end]])
    local code, out, err = sh "$D --num_gpus 2 --max_restarts 3 life.lua"
    assert.equal(0, code)
    assert.same({ "0\t0", "0\t1", "0\t2", "1\t0", "1\t1", "1\t2" }, lines(out))
    has(err, "the job ended with code 5; start 2 of 4 follows")
    has(err, "the job ended with code 6; start 3 of 4 follows")
    local last, _, said = sh "$D --num_gpus 2 --max_restarts 1 life.lua"
    assert.equal(6, last)
    assert.equal(1, count(said, "follows"))
  end)

  it("does not follow a signal, and one ends the wait for it", function()
    script("fails.lua", [[io.stderr:write "ready\n" sleep(0.3) os.exit(7)]])
    local code, _, err = sh [[$D --num_gpus 1 --max_restarts 5 fails.lua & p=$!
      until grep -q follows err; do sleep 0.05; done; kill -TERM $p; wait $p]]
    assert.equal(143, code)
    assert.equal(1, count(err, "ready"))
  end)
end)

describe("options", function()
  it("that make no sense are refused", function()
    script("x.lua", "")
    for options, message in pairs {
      ["--num_gpus 0"] = "--num_gpus wants a number from 1 to 4096, not '0'",
      ["--num_gpus two"] = "--num_gpus wants a number",
      ["--num_gpus 2 --num_procs 3"] = "--num_procs 3: another option says 2",
      ["--num_gpus 1.5"] = "--num_gpus wants a whole number, not '1.5'",
      ["--tag_output"] = "--tag_output is for a job of several ranks: add --num_gpus N",
      ["--num_gpus 2 --launcher pdsh"] = "--launcher pdsh: there are openmpi and slurm",
      ["--num_gpus 2 --bind_core_list 3-1"] = "'3-1' is no ascending list of cores",
      ["--num_gpus 2 --timeout -1"] = "--timeout wants a number from 0",
      ["--num_gpus 2 -H nowhere"] = "nowhere",
      ["--num_gpus 2 --no_ssh"] = "--no_ssh is not for dsrun: start it once",
      ["--num_gpus 2 --elastic"] = "--elastic is about starting again: add --max_restarts N",
      ["--num_gpus 2 --json"] = "--json is for --dry-run",
      ["--num_nodes 2"] = "--num_nodes 2: no other machines are known",
    } do
      local code, out, err = sh("$D " .. options .. " x.lua")
      assert.same({ 2, "" }, { code, out })
      has(err, message)
    end
    local code, _, err = sh "$D --num_gpus 2 env"
    assert.equal(2, code)
    has(err, "repl and env are one process")
  end)
end)
