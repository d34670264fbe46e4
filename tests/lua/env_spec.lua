--- `dsrun env`, of this machine and of many, and what dsrun tells of itself to another one's.

local host = require "ds.host"
local json = require "ds.json"
local helper = require "tests.lua.helper"

local has, lacks = helper.has, helper.lacks
local dsrun = host.executable
local place

local function sh(command) return place:sh(command) end

--- A program that is first on PATH.
local function program(name, text)
  place:write("bin/" .. name, "#!/bin/sh\n" .. text)
  assert.equal(0, (sh("chmod +x bin/" .. name)))
end

setup(function()
  place = helper.place { limit = 60,
    before = 'export PATH="$PWD/bin:$PATH"; unset OMP_NUM_THREADS' }
  sh "mkdir bin"
end)

teardown(function() place:remove() end)

after_each(function() sh "rm -f bin/*" end)

describe("dsrun env", function()
  it("says what there is, a fact a line", function()
    local code, out, err = sh "OMP_NUM_THREADS=3 DS_CPU_LEVEL=v2 $D env"
    assert.same({ 0, "" }, { code, err })
    has(out, ("\ndsrun          %s (%s)\n"):format(host.version, host.commit))
    has(out, "\nthreads        3 (OMP_NUM_THREADS is 3)\n")
    has(out, "\nprogram        " .. dsrun .. "\n")
    has(out, "\n               OMP_NUM_THREADS=3\n")
    for _, label in ipairs { "host", "LuaJIT", "oneDNN", "Open MPI", "CUDA", "GPUs", "system",
      "kernel", "processor", "cores", "CPU kernels", "memory", "shared memory", "limits",
      "interfaces", "addresses" } do
      assert(("\n" .. out):find("\n" .. label .. " +[^ \n]"), "no " .. label .. " in:\n" .. out)
    end
  end)

  it("says the same in JSON", function()
    local _, text = sh "$D env"
    local code, out = sh "$D env --json"
    assert.equal(0, code)
    local facts = json.decode(out)
    assert.equal(text:match "\ncores +([^\n]+)", facts.cores)
    assert.equal(text:match "\nCPU kernels +([^\n]+)", facts.cpu_kernels)
    assert.equal(text:match "\nsystem +([^\n]+)", facts.system)
    assert.equal(text:match "^host +([^\n]+)", facts.host)
  end)

  it("takes no other argument", function()
    for _, given in ipairs { "foo", "--jsom", "--json x", "hosts --json" } do
      local code, out, err = sh("$D env " .. given)
      assert.same({ 2, "" }, { code, out })
      has(err, "env takes --json and nothing else, but was given '")
    end
  end)

  it("counts the GPUs that nvidia-smi knows", function()
    program("nvidia-smi", [[
case "$*" in
  *query*) printf '%s MiB\n' 'NVIDIA H200, 143771' 'NVIDIA A2, 15356' 'NVIDIA H200, 143771';;
  *) echo '| NVIDIA-SMI 550.90.07    Driver Version: 550.90.07    CUDA Version: 12.4     |';;
esac]])
    local _, out = sh "$D env"
    has(out, "\nGPUs           2 x NVIDIA H200, 140 GiB\n               NVIDIA A2, 15.0 GiB\n")
    has(out, "\ndriver         550.90.07 (for CUDA up to 12.4)\n")
    program("nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    _, out = sh "$D env"
    has(out, "\nGPUs           none\n")
    has(out, "\ndriver         none found\n")
  end)

  it("names the build by its files, as --check-host does for a launcher", function()
    place:write("script.lua", "print(1)\n")
    local code, first = sh "$D --check-host script.lua"
    assert.equal(0, code)
    local binary, library, hash =
      first:match "^build [^\n]+\nbinary (%x+)\nlibrary (%x+)\nscript (%x+)\n$"
    assert.equal(32, #binary)
    local _, out = sh "$D env"
    has(out, ("\nbuild          binary %s, Lua library %s\n"):format(binary, library))
    place:write("script.lua", "print(2)\n")
    local _, second = sh "$D --check-host script.lua"
    has(second, ("\nlibrary %s\nscript "):format(library))
    lacks(second, hash)
    assert.equal("", (select(2, sh "$D --check-host missing.lua"):match "\nscript (.-)\n"))
    -- another library beside the same program
    sh(("cp -r '%s' lua2; echo >>lua2/ds/init.lua; rm -rf lua2/ds/out; mkdir lua2/ds/out; "
      .. "touch lua2/ds/out/x lua2/ds/.x"):format(host.root))
    local _, third = sh "DSRUN_LUA=$PWD/lua2 $D --check-host script.lua"
    has(third, "binary " .. binary)
    lacks(third, library)
  end)
end)

describe("env of many hosts", function()
  local answers

  --- What the report says when these facts have been changed on these hosts.
  local function report(changes, arguments)
    local _, out = sh "$D env --json"
    answers = json.array()
    for i, name in ipairs { "a", "b", "c" } do
      local facts = json.decode(out)
      facts.host = name
      for key, value in pairs(changes[name] or {}) do facts[key] = value end
      answers[i] = { host = name, output = json.encode(facts) }
    end
    for i, extra in ipairs(changes) do answers[3 + i] = extra end
    place:write("answers", json.encode(answers))
    return sh([[$D -e 'require("ds.env_hosts").show(io.open("answers"):read "*a")' ]]
      .. (arguments or ""))
  end

  it("shows once what is the same", function()
    local code, out = report { a = { available = "1 GiB" }, b = { addresses = "eth0 10.0.0.2/8" } }
    assert.equal(0, code)
    has(out, "3 hosts: a, b, c\n")
    has(out, "\navailable      a: 1 GiB\n               b: ")
    has(out, "\n               b: eth0 10.0.0.2/8\n")
    has(out, "\nnothing differs\n")
    lacks(out, "!")
    assert.equal(1, select(2, out:gsub("\ndsrun  ", "")))
  end)

  it("marks who differs from the most", function()
    local code, out = report {
      b = { open_mpi = "4.0.0", gpus = { "2 x X", "Y" } }, c = { kernel = "Linux 1" } }
    assert.equal(0, code)
    assert(out:find "\nOpen MPI +[^\n]+\n! b: +4%.0%.0\n", out)
    has(out, "\n! b:           2 x X\n               Y\n")
    has(out, "\n! c:           Linux 1\n")
    has(out, "\ndiffers: Open MPI, GPUs, kernel\n")
    out = select(2, report { b = { kernel = "Linux 1" }, c = { kernel = "Linux 1" } })
    has(out, "\nkernel         Linux 1\n") -- the most, not the first
    has(out, "\n! a:           Linux ")
  end)

  it("names hosts that did not answer, and ends with 1", function()
    local bad = { { host = "d", output = "", why = "no answer within 40 s" },
      { host = "e", output = "usage: dsrun" } }
    local code, out = report(bad)
    assert.equal(1, code)
    has(out, "\nd: no answer within 40 s\n"
      .. "e: its dsrun does not know env --json: install the same build\n")
    has(out, "3 hosts: a, b, c\n")
    has(out, "\nnothing differs\n")
  end)

  it("asks all hosts of a hostfile at once, over ssh", function()
    program("ssh", [[
while [ "$1" != -- ]; do echo "$1" >>ssh.options; shift; done
case $2 in
  worker-1) exec sh -c "$3";;
  worker-2) echo 'welcome to {worker-2}'; OMP_NUM_THREADS=5 exec sh -c "$3";;
  worker-3) echo "$2: Permission denied (publickey)." >&2; exit 255;;
esac]])
    place:write("hosts", "worker-1 slots=2\nworker-2 slots=2\nworker-3 slots=4\n")
    local code, out, err = sh "$D --hostfile hosts --ssh_port 2222 env"
    assert.same({ 1, "" }, { code, err })
    has(out, "2 hosts: worker-1, worker-2\n")
    assert(out:find "\n! worker%-2: +5 %(OMP_NUM_THREADS is 5%)\n", out)
    has(out, "\nworker-3: ssh: worker-3: Permission denied (publickey): set up a key without a "
      .. "password: ssh-copy-id worker-3\n")
    has(out, "\ndiffers: threads, environment\n")
    has(place:read "ssh.options", "\n2222\n")
    code, out = sh "$D --hostfile hosts --exclude worker-3 env --json"
    assert.equal(0, code)
    local all = json.decode(out)
    assert.same({ "threads", "environment" }, { unpack(all.differs) })
    assert.equal("5 (OMP_NUM_THREADS is 5)", all.hosts["worker-2"].threads)
    assert.same({}, all.failed)
    assert.is_nil(all.hosts["worker-3"])
  end)

  it("says what is wrong with the hostfile, or with the words after env", function()
    place:write("hosts", "worker-1 slots=x\n")
    local code, out, err = sh "$D --hostfile hosts env"
    assert.same({ 2, "" }, { code, out })
    has(err, "hosts:1: ")
    place:write("hosts", "localhost slots=1\n")
    code, out, err = sh "$D --hostfile hosts env foo"
    assert.same({ 2, "" }, { code, out })
    has(err, "env takes --json and nothing else, but was given 'foo'")
  end)
end)
