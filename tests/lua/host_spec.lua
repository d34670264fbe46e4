--- The program as its users meet it: options, errors, exit codes, signals. Every test starts dsrun.

local host = require "ds.host"
local helper = require "tests.lua.helper"

local place = helper.place()
local folder, has = place.folder, helper.has
local function write(...) return place:write(...) end
local function read(name) return place:read(name) end
local function sh(command) return place:sh(command) end

assert(os.execute("mkdir '" .. folder .. "/lib'") == 0)

teardown(function() place:remove() end)

describe("the command line", function()
  it("prints help made from the table of options", function()
    local code, out = sh "$D --help"
    assert.equal(0, code)
    has(out, "usage: dsrun")
    has(out, "-e, --eval CODE")
    has(out, "--hostfile FILE")
    for line in out:gmatch "[^\n]+" do assert(#line <= 100, line) end
  end)

  it("prints its version", function()
    local code, out = sh "$D --version"
    assert.equal(0, code)
    has(out, "dsrun " .. host.version)
  end)

  it("without anything to run shows the usage and ends with 2", function()
    local code, out, err = sh "$D"
    assert.same({ 2, "" }, { code, out })
    has(err, "usage: dsrun")
  end)

  it("suggests no option for what is like none", function()
    local code, _, err = sh "$D --xyzzy x.lua"
    assert.equal(2, code)
    has(err, "unknown option --xyzzy")
    assert.is_nil(err:find("did you mean", 1, true))
  end)

  it("takes - and _ for the same, and values with = or a blank", function()
    write("seed.lua", "print(require('ds.host').options.seed)")
    for _, option in ipairs { "--seed 7 --log-level error", "--seed=7 --log_level=error",
      "--seed 7 -q" } do
      local code, out = sh("$D " .. option .. " seed.lua")
      assert.same({ 0, "7\n" }, { code, out })
    end
  end)

  it("refuses what makes no sense", function()
    for arguments, message in pairs {
      ["--seed x y.lua"] = "--seed wants a whole number",
      ["--seed"] = "--seed wants a value",
      ["--log_level loud y.lua"] = "log level 'loud' is none of debug",
      ["--device tpu y.lua"] = "--device wants cpu or cuda, not 'tpu'",
      ["--quiet=3 y.lua"] = "--quiet takes no value",
      ["--module x"] = "--module is not for dsrun",
      ["--sede 3 x.lua"] = "unknown option --sede (did you mean --seed?)",
      ["--config-help optimzer"] = 'unknown config key "optimzer" (did you mean "optimizer"?)',
    } do
      local code, _, err = sh("$D " .. arguments)
      assert.equal(2, code, arguments)
      has(err, message)
    end
  end)

  it("--config-help explains a key", function()
    local code, out = sh "$D --config-help gradient_clipping"
    assert.equal(0, code)
    has(out, "gradient_clipping")
  end)

  it("--device says where tensors are made, and what this build has not", function()
    assert.same({ 0, "cpu\n", "" }, { sh "$D --device cpu -e 'print(ds.zeros(2).device)'" })
    local code, _, err = sh "DS_CUDA_LIBRARY=/nowhere.so $D --device cuda -e 'ds.zeros(2)'"
    assert.equal(1, code)
    has(err, "-e:1: this build has no CUDA backend (there is no /nowhere.so); use device \"cpu\"")
  end)

  it("DS_CHECK takes only the checks that there are", function()
    local code, _, err = sh "DS_CHECK=nan $D -e 'ds.tensor{-1}:log()'"
    assert.equal(1, code)
    has(err, "-e:1: log: the result [1] has a NaN (DS_CHECK=nan)")
    code, _, err = sh "DS_CHECK=nam $D -e 'ds.ones(2):log()'"
    assert.equal(1, code)
    has(err, "there is no check 'nam'; there are nan, comm")
    code, _, err = sh "DS_CHECK=comm $D -e 'ds.tensor{-1}:log()'"
    assert.same({ 0, "" }, { code, err })
    code, _, err = sh "DS_CHECK=comm,nan $D -e 'ds.tensor{-1}:log()'"
    assert.equal(1, code)
    has(err, "log: the result [1] has a NaN")
  end)

  it("leaves options after the script to the script", function()
    write("args.lua", "print(arg[0], #arg, arg[1], arg[2], ...)")
    local code, out = sh "$D args.lua --seed 3"
    assert.same({ 0, "args.lua\t2\t--seed\t3\t--seed\t3\n" }, { code, out })
  end)

  it("has its options for several ranks in README.md as they are", function()
    local _, help = sh "$D --help"
    local first, last = help:find("several ranks, on this machine", 1, true),
      help:find("\n\nDeepSpeed's, without effect", 1, true)
    has(helper.read(helper.root .. "README.md"), "```text\n" .. help:sub(first, last) .. "```\n")
  end)

  it("knows the launcher's options", function()
    write("x.lua", "print 'never'")
    for option, message in pairs {
      ["--num_nodes 2"] = "no other machines are known",
      ["--num-nodes=2"] = "no other machines are known",
      ["-H nowhere"] = "nowhere",
      ["--include=a:0"] = "a",
      ["-e worker-2:0"] = "worker-2",
    } do
      local code, out, err = sh("$D " .. option .. " x.lua")
      assert.same({ 2, "" }, { code, out })
      has(err, message)
    end
  end)

  it("says why DeepSpeed's other options do nothing", function()
    write("empty.lua", "")
    local code, _, err = sh "$D --no_python empty.lua"
    assert.equal(0, code)
    has(err, "--no_python changes nothing here")
    code, _, err = sh "$D --quiet --no_python empty.lua"
    assert.same({ 0, "" }, { code, err })
  end)

  it("tells about the machine", function()
    local code, out = sh "$D env"
    assert.equal(0, code)
    for _, row in ipairs { "CPU kernels", "threads", "oneDNN", "LuaJIT", "memory", "GPU" } do
      has(out, row)
    end
  end)
end)

describe("a script", function()
  it("may come from -e, several times, in order", function()
    local code, out = sh [[$D -e '_G.a = 1' -e 'print(a + 1)' --eval='print "x"']]
    assert.same({ 0, "2\nx\n" }, { code, out })
  end)

  it("runs after -e", function()
    write("after.lua", "print(steps)")
    local code, out = sh "$D -e '_G.steps = 5' after.lua"
    assert.same({ 0, "5\n" }, { code, out })
  end)

  it("finds ds by itself in -e", function()
    local code, out = sh "$D -e 'print(ds.zeros(2, 3):numel())'"
    assert.same({ 0, "6\n" }, { code, out })
  end)

  it("may come from standard input, where lines keep their numbers after #!", function()
    local code, out, err = sh [[printf '#!/usr/bin/dsrun\nprint(...)\nerror "here"\n' | $D - a b]]
    assert.same({ 1, "a\tb\n" }, { code, out })
    has(err, "stdin:3: here")
  end)

  it("skips a first line with #!", function()
    write("shebang.lua", "#!/usr/bin/env dsrun\nerror 'two'")
    local code, _, err = sh "$D shebang.lua"
    assert.equal(1, code)
    has(err, "shebang.lua:2: two")
  end)

  it("that is not there ends with 2", function()
    local code, _, err = sh "$D nowhere.lua"
    assert.equal(2, code)
    has(err, "cannot read the script nowhere.lua: No such file or directory")
    code, _, err = sh "$D lib"
    assert.equal(2, code)
    has(err, "cannot read the script lib: it is a folder")
  end)

  it("finds modules beside itself and ds and models from anywhere", function()
    write("lib/helper.lua", "return { name = ... }")
    write("lib/main.lua", "print(require('helper').name, require('ds').version, "
      .. "package.searchpath('models.gpt', package.path) ~= nil)")
    local code, out = sh "cd / && $D $OLDPWD/lib/main.lua"
    assert.same({ 0, "helper\t" .. host.version .. "\ttrue\n" }, { code, out })
  end)

  it("finds the library by DSRUN_LUA", function()
    local set = ("DSRUN_LUA='%s' "):format(host.root)
    assert.same({ 0, host.version .. "\n", "" }, { sh(set .. "$D -e 'print(ds.version)'") })
    local code, _, err = sh "DSRUN_LUA=/nowhere $D -e ''"
    assert.equal(2, code)
    has(err, "DSRUN_LUA is /nowhere, but there is no ds/boot.lua in it")
    assert.equal(0, sh "DSRUN_LUA= $D -e ''")
  end)

  it("writes every line at once", function()
    local code, out = sh [[$D -e 'print "first" os.execute "wc -l <out" print "second"']]
    assert.equal(0, code)
    assert.equal("first\n1\nsecond\n", out)
  end)

  it("fails when its output cannot be written", function()
    local code, _, err = sh "$D -e 'print(1)' >/dev/full"
    assert.equal(1, code)
    has(err, "could not write all of the standard output: No space left on device")
  end)

  it("does not print into the first file it opens when it has no standard output", function()
    local code = sh [[$D -e 'local f = io.open("first", "w") f:write "mine" print "not here"
      f:close()' >&- 2>&-]]
    assert.same({ 0, "mine" }, { code, read "first" })
  end)
end)

describe("exit codes", function()
  for code, text in pairs {
    [0] = "os.exit()",
    [3] = "os.exit(3)",
    [1] = "os.exit(false)",
    [7] = "pcall(os.exit, 7)",
    [9] = "coroutine.wrap(function() pcall(function() os.exit(9) end) end)()",
    [5] = "xpcall(error, function() os.exit(5) end)",
  } do
    it(("%d: %s"):format(code, text), function()
      local got, out, err = sh(("$D -e '%s print \"not reached\"'"):format(text))
      assert.same({ code, "", "" }, { got, out, err })
    end)
  end

  it("os.exit in -e keeps the script from running", function()
    write("never.lua", "print 'never'")
    assert.same({ 0, "", "" }, { sh "$D -e 'os.exit(0)' never.lua" })
  end)

  it("os.exit runs the finalizers, and one of them may not exit again", function()
    local code, out = sh [[$D -e '
      local p = newproxy(true)
      getmetatable(p).__gc = function() print "closed" os.exit(4) end
      _G.keep = p
      os.exit(3)']]
    assert.same({ 3, "closed\n" }, { code, out })
  end)

  it("a nil error is a failure without a word: busted ends so", function()
    assert.same({ 1, "", "" }, { sh "$D -e 'error()'" })
  end)
end)

describe("an error", function()
  it("shows the user's line and one traceback", function()
    write("lib/fails.lua",
      "local M = {}\nfunction M.go(x)\n  local y = x.z\n  return y\nend\nreturn M")
    write("calls.lua", "package.path = 'lib/?.lua;' .. package.path\nlocal function run()\n"
      .. "  require('fails').go(nil)\nend\nrun()\n")
    local code, _, err = sh "$D calls.lua"
    assert.equal(1, code)
    assert.equal("lib/fails.lua:3: attempt to index local 'x' (a nil value)\nstack traceback:\n"
      .. "\tlib/fails.lua:3: in function 'go'\n\tcalls.lua:3: in function 'run'\n"
      .. "\tcalls.lua:5: in main chunk\n", err)
  end)

  it("in the library names the user's line, and DS_TRACE=1 shows all frames", function()
    write("wrong.lua", "local ds = require 'ds'\n\nlocal t = ds.zeros(2, 3)\nt:narrow(1, 5, 9)\n")
    local code, _, err = sh "$D wrong.lua"
    assert.equal(1, code)
    assert.equal("wrong.lua:4: ", err:sub(1, 13))
    assert.is_nil(err:find(host.root, 1, true))
    local _, _, long = sh "DS_TRACE=1 $D wrong.lua"
    has(long, host.root:sub(-8) .. "/ds/")
  end)

  it("of endless recursion names a line, or says what it is", function()
    write("deep.lua", "local function f()\n  return 1 + f()\nend\nf()\n")
    local code, _, err = sh "$D -e 'jit.off()' deep.lua"
    assert.equal(1, code)
    assert(err == "stack overflow: does a function call itself without end?\n"
      or err:find "^deep.lua:%d: stack overflow\n$", err)
  end)

  it("in an operation shows no generated code", function()
    write("shapes.lua", "local ds = require 'ds'\nprint(ds.ones(2) + ds.ones(3))\n")
    local code, _, err = sh "$D shapes.lua"
    assert.equal(1, code)
    assert.equal("shapes.lua:2: add: shapes [2] and [3] do not broadcast (size 2 against 3)\n"
      .. "stack traceback:\n\tshapes.lua:2: in main chunk\n", err)
  end)

  it("in the syntax names file and line", function()
    write("syntax.lua", "local x = 1\nlocal = 2\n")
    write("loads.lua", "require 'syntax'")
    local code, _, err = sh "$D syntax.lua"
    assert.equal(1, code)
    has(err, "syntax.lua:2: ")
    code, _, err = sh "$D loads.lua"
    assert.equal(1, code)
    assert.equal("syntax.lua:2: ", err:sub(1, 14))
  end)

  it("may be a table with __tostring", function()
    local _, _, err = sh [[$D -e '
      error(setmetatable({}, { __tostring = function() return "mine" end }))']]
    has(err, "-e:2: mine")
    _, _, err = sh "$D -e 'error { 1 }'"
    has(err, "-e:1: error object is a table value")
  end)
end)

describe("globals", function()
  local function fails(text, piece)
    write("globals.lua", text)
    local code, _, err = sh "$D globals.lua"
    assert.equal(1, code)
    has(err, piece)
  end

  it("that nobody declared are errors, with name and line", function()
    fails("local a = 1\nprint(conut)", "globals.lua:2: undeclared global 'conut'")
    fails("\n\ncount = 1", "globals.lua:3: assignment to undeclared global 'count'")
    fails("function helper() end", "globals.lua:1: assignment to undeclared global 'helper'")
    fails("print(ds)", [[local ds = require "ds"]])
    local _, _, err = sh "$D -e 'x = 1'"
    has(err, "-e:1: assignment to undeclared global 'x'")
  end)

  it("in modules of the script's folder too", function()
    write("mine.lua", "\nreturn undefined_thing")
    fails("require 'mine'", "mine.lua:2: undeclared global 'undefined_thing'")
  end)

  it("are declared by _G.name = value", function()
    write("globals.lua",
      "_G.count = 1\ncount = count + 1\nprint(count, _G.other)\nprint = print")
    assert.same({ 0, "2\tnil\n", "" }, { sh "$D globals.lua" })
  end)

  it("are free in libraries from elsewhere", function()
    assert(os.execute("mkdir -p '" .. folder .. "/elsewhere'") == 0)
    write("elsewhere/sloppy.lua", "made = undefined_thing\nmade = 3\nreturn true")
    write("globals.lua", "require 'sloppy'\nprint(made)")
    assert.same({ 0, "3\n", "" }, { sh "LUA_PATH='./elsewhere/?.lua;;' $D globals.lua" })
  end)
end)

describe("other programs in Lua", function()
  it("run, as busted does, with its exit code", function()
    write("two_spec.lua",
      "it('a', function() lua_global = 1 end)\nit('b', function() error('no') end)")
    local code, out = sh "$D $(command -v busted) -o plainTerminal two_spec.lua"
    assert.equal(1, code)
    has(out, "1 success / 0 failures / 1 error / 0 pending")
    code = sh "$D $(command -v busted) -o plainTerminal --filter=a two_spec.lua"
    assert.equal(0, code)
  end)
end)

describe("the repl", function()
  it("works on a pipe", function()
    write("lines", "x = 20\nx + 1, nil\nfor i = 1, 2 do\nprint(i)\nend\nds.ones(2):sum():item()\n")
    local code, out, err = sh "$D repl <lines"
    assert.same({ 0, "21\tnil\n1\n2\n2\n", "" }, { code, out, err })
  end)

  it("waits for the rest of an expression", function()
    assert.same({ 0, "3\n", "" }, { sh [[printf '1 +\n2\n' | $D repl]] })
    local code, _, err = sh [[printf '1 +\n' | $D repl]]
    assert.equal(1, code)
    has(err, "1:1: unexpected symbol near '<eof>'")
  end)

  it("goes on after an error and fails in the end", function()
    local code, out, err = sh [[
      printf 'nothing\n1 +\n' | $D repl; echo $?
      printf 'error()\n7\n' | $D repl]]
    assert.equal(1, code)
    assert.equal("1\n7\n", out)
    has(err, "1:1: undeclared global 'nothing'")
  end)
end)

describe("signals", function()
  -- Starts a script in the background that prints "ready" when it is; then runs the commands with
  -- $P, and prints the exit code.
  local function with_script(text, commands)
    write("runs.lua", text)
    return sh(([[
      rm -f ready
      $D runs.lua >ready & P=$!
      wait_for ready ready
      %s
      wait $P
      echo $?]]):format(commands))
  end
  local busy = "print 'ready'\nlocal n = 0\nwhile true do\n  n = n + 1\nend\n"
  local claims = [[
    local C = require "ds.ffi".C
    C.ds_signal_claim(1)
    print "ready"
    while C.ds_signal_pending() == 0 do end
    print(C.ds_signal_pending())
    os.exit(128 + C.ds_signal_pending())]]

  for name, number in pairs { INT = 2, TERM = 15, USR1 = 10 } do
    it(name .. " ends a script without an engine at once", function()
      local _, out = with_script(busy, "kill -" .. name .. " $P")
      assert.equal(128 + number .. "\n", out)
    end)

    it(name .. " is left to an engine", function()
      local _, out = with_script(claims, "kill -" .. name .. " $P")
      assert.equal(128 + number .. "\n", out)
      assert.equal(("ready\n%d\n"):format(number), read "ready")
    end)
  end

  it("a second one ends at once what an engine does not", function()
    local stuck = [[require "ds.ffi".C.ds_signal_claim(1) print "ready" while true do end]]
    local _, out, err = with_script(stuck,
      "kill -INT $P; sleep 0.2; kill -0 $P && kill -TERM $P")
    assert.equal("143\n", out)
    assert.equal("dsrun: stopping at the end of this step; once more: at once\n", err)
  end)

  it("end at once again when the engine is gone", function()
    local gone = [[local C = require "ds.ffi".C C.ds_signal_claim(1) C.ds_signal_claim(0)
      print "ready" while true do end]]
    local _, out = with_script(gone, "kill -INT $P")
    assert.equal("130\n", out)
  end)

  it("USR2 tells where compiled code is", function()
    local text = "print 'ready'\nlocal function f(x)\n  return x + 1\nend\nlocal n = 0\n"
      .. "while true do\n  n = f(n)\nend\n"
    local _, _, err = with_script(text,
      "sleep 0.2; kill -USR2 $P; wait_for dsrun: err; kill -TERM $P")
    assert(err:find "dsrun: at runs.lua:[37]", err)
  end)

  it("USR2 tells the loop that calls nothing, and what is being done", function()
    local text = [[require "ds.ffi".C.ds_breadcrumb("waiting for the end")]] .. "\n" .. busy
    local _, _, err = with_script(text,
      "sleep 0.2; kill -USR2 $P; wait_for dsrun: err; kill -TERM $P")
    has(err, "in a compiled loop without calls (compiled last: runs.lua:4); in waiting for the end")
  end)

  it("USR2 says when the script is in C", function()
    local _, _, err = with_script("print 'ready'\nos.execute 'sleep 2'",
      "kill -USR2 $P; wait_for dsrun: err")
    has(err, "Lua did not answer within 500 ms: in C code")
  end)
end)

describe("several ranks", function()
  it("need a launcher that MPI knows of", function()
    local code, out, err = sh "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 timeout 10 $D x.lua"
    assert.same({ 2, "" }, { code, out })
    has(err, "says that 2 ranks were started (OMPI_COMM_WORLD_SIZE")
    has(err, "but MPI knows of 1; with srun: --mpi=pmix")
  end)

  it("run under mpirun itself", function()
    if sh "command -v mpirun" ~= 0 then return pending "no mpirun here" end
    local code, out = sh [[
      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
      timeout 60 mpirun --oversubscribe -np 2 $D \
        -e 'local ds = require "ds"; print(ds.rank() .. ":" .. ds.world_size())']]
    assert.equal(0, code)
    has(out, "0:2")
    has(out, "1:2")
  end)

  it("one rank under mpirun has all cores", function()
    if sh "command -v mpirun" ~= 0 then return pending "no mpirun here" end
    local _, alone = sh "$D -e 'print(require(\"ds.ffi\").C.ds_threads())'"
    local _, out = sh [[
      export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
      timeout 60 mpirun -np 1 $D -e 'print(require("ds.ffi").C.ds_threads())']]
    assert.equal(alone, out)
  end)
end)

describe("threads", function()
  it("are as many as OMP_NUM_THREADS says, or the processors allowed", function()
    local _, out = sh "OMP_NUM_THREADS=3 $D -e 'print(require(\"ds.ffi\").C.ds_threads())'"
    assert.equal("3\n", out)
    if sh "command -v taskset" ~= 0 then return end
    _, out = sh "taskset -c 0 $D -e 'print(require(\"ds.ffi\").C.ds_threads())'"
    assert.equal("1\n", out)
  end)
end)
