--- `dsrun env`: what this machine and this dsrun offer; the report to paste into a bug.
-- A fact is a line of text, a list of lines, or nil where there is nothing to say. Of several hosts
-- (`dsrun --hostfile FILE env`) facts are compared by ds.env_hosts.

local ffi = require "ffi"
local border = require "ds.ffi"
local json = require "ds.json"

local C, host = border.C, border.host

local M = {}

-- Reading -----------------------------------------------------------------------------------------

local function read(path)
  local file = io.open(path)
  if not file then return nil end
  local text = file:read "*a"
  file:close()
  return text
end

local function first_line(path, pattern)
  for line in (read(path) or ""):gmatch "[^\n]+" do
    local found = line:match(pattern)
    if found then return found end
  end
end

local function output_of(command, pattern)
  local pipe = io.popen("exec 2>/dev/null; " .. command)
  local text = pipe and pipe:read "*a" or ""
  if pipe then pipe:close() end
  return text:match(pattern or ".*")
end

--- "2 x a" and "b" for a, a, b: in the order of their first.
local function counted(items)
  local order, count = {}, {}
  for _, item in ipairs(items) do
    if not count[item] then order[#order + 1] = item end
    count[item] = (count[item] or 0) + 1
  end
  for i, item in ipairs(order) do
    order[i] = count[item] > 1 and ("%d x %s"):format(count[item], item) or item
  end
  return order
end

local function size(bytes)
  if bytes < 2 ^ 20 then return ("%.0f KiB"):format(bytes / 2 ^ 10) end
  if bytes < 2 ^ 30 then return ("%.0f MiB"):format(bytes / 2 ^ 20) end
  return (bytes < 2 ^ 35 and "%.1f GiB" or "%.0f GiB"):format(bytes / 2 ^ 30)
end
M.size = size

-- The program -------------------------------------------------------------------------------------

local function build()
  local text = output_of("'" .. host.executable:gsub("'", "'\\''") .. "' --check-host")
  local binary, library = text:match "binary (%x+)\nlibrary (%x+)"
  return binary and ("binary %s, Lua library %s"):format(binary, library)
end

local function jit_state()
  local on = jit.status()
  return ("%s, compiler %s"):format(jit.version, on and "on" or "off")
end

local function mpi()
  return output_of("mpirun --version", "%(Open MPI%) (%S+)") or "no mpirun found"
end

-- CUDA's libraries: dsrun opens them while it runs, so the first that the loader knows counts.
local library_files
local function cuda_library(name, ask, unit)
  library_files = library_files or output_of([[
    { PATH="$PATH:/sbin:/usr/sbin" ldconfig -p | sed -n 's/.* => //p'
      for d in $(echo "$LD_LIBRARY_PATH" | tr : ' ') "${CUDA_HOME:-/usr/local/cuda}/lib64"; do
        ls "$d"/lib*.so.*
      done; } | grep -E '/lib(cudart|cudnn|nccl)\.so\.']])
  local file = library_files:match("[^\n]*/lib" .. name .. "%.so%.[%d.]+")
  if not file then return nil end
  local version = C.ds_library_version(file, ask)
  if version < 0 then return "cannot be opened: " .. file end
  local major, rest = math.floor(version / unit), version % unit
  if unit == 1000 then return ("%d.%d"):format(major, rest / 10) end
  return ("%d.%d.%d"):format(major, math.floor(rest / 100), rest % 100)
end

local function cuda()
  local compiler = output_of("nvcc --version", "release [%d.]+, V([%d.]+)")
  local runtime = cuda_library("cudart", "cudaRuntimeGetVersion", 1000)
  return runtime and "runtime " .. runtime .. (compiler and ", nvcc " .. compiler or "")
    or compiler and "nvcc " .. compiler or "none found"
end

local function cudnn() return cuda_library("cudnn", "cudnnGetVersion", 10000) or "none found" end

local function nccl() return cuda_library("nccl", "ncclGetVersion", 10000) or "none found" end

local smi
local function nvidia_smi()
  smi = smi or output_of "timeout 10 nvidia-smi"
  return smi
end

local function driver()
  local version, most = nvidia_smi():match "Driver Version:%s*(%S+)%s+CUDA Version:%s*(%S+)"
  return version and ("%s (for CUDA up to %s)"):format(version, most) or "none found"
end

local function gpus()
  if nvidia_smi() == "" then return "none found (no nvidia-smi)" end
  local list = {}
  local text = output_of "timeout 10 nvidia-smi --query-gpu=name,memory.total --format=csv,noheader"
  for name, memory in text:gmatch "([^\n,]+),%s*(%d+) MiB" do
    list[#list + 1] = ("%s, %s"):format(name, size(memory * 2 ^ 20))
  end
  return #list > 0 and counted(list) or "none"
end

--- The device that kernels of this process would run on, or why there is none.
local function backend()
  local text = ffi.new "char[256]"
  if C.ds_device_describe(text, 256, 1) < 0 then return "none: " .. ffi.string(C.ds_error()) end
  return ffi.string(text)
end

-- The machine -------------------------------------------------------------------------------------

local function system()
  return first_line("/etc/os-release", '^PRETTY_NAME="?(.-)"?$') or "unknown"
end

local function kernel()
  return ("%s %s"):format(first_line("/proc/sys/kernel/ostype", ".*") or jit.os,
    first_line("/proc/sys/kernel/osrelease", ".*") or "unknown")
end

local function processor()
  local model = first_line("/proc/cpuinfo", "^model name%s*:%s*(.*)")
    or first_line("/proc/cpuinfo", "^CPU part%s*:%s*(.*)") or "unknown"
  return ("%s, %s"):format(model, jit.arch)
end

local function cores()
  local text = read "/proc/cpuinfo" or ""
  local _, processors = text:gsub("\nprocessor%s*:", "\n")
  processors = processors + (text:find "^processor%s*:" and 1 or 0)
  local sockets, n = {}, 0
  for id in text:gmatch "\nphysical id%s*:%s*(%d+)" do
    if not sockets[id] then n = n + 1 end
    sockets[id] = true
  end
  local per_socket = tonumber(text:match "\ncpu cores%s*:%s*(%d+)")
  local allowed = output_of("env -u OMP_NUM_THREADS nproc", "%d+") or "?" -- nproc reads it too
  if n == 0 or not per_socket then
    return ("%d, of which this process may use %s"):format(processors, allowed)
  end
  return ("%d (sockets: %d, cores of each: %d, threads of a core: %g), of which this process may "
    .. "use %s"):format(processors, n, per_socket, processors / n / per_socket, allowed)
end

local function levels()
  local have, i = {}, 0
  local list = C.ds_cpu_levels()
  while list[i] ~= nil do
    have[#have + 1] = ffi.string(list[i])
    i = i + 1
  end
  local chosen = C.ds_cpu_level()
  chosen = chosen ~= nil and ffi.string(chosen) or "none: " .. ffi.string(C.ds_error())
  return ("%s (this machine has %s; DS_CPU_LEVEL chooses)"):format(chosen, table.concat(have, ", "))
end

local function threads()
  local given = os.getenv "OMP_NUM_THREADS"
  return ("%d (OMP_NUM_THREADS is %s)"):format(C.ds_threads(), given or "not set")
end

local function waiting()
  local policy, spin = os.getenv "OMP_WAIT_POLICY", os.getenv "GOMP_SPINCOUNT"
  if policy then return "OMP_WAIT_POLICY=" .. policy end
  if spin then return "GOMP_SPINCOUNT=" .. spin end
  return "threads spin for some 3 ms, then sleep (libgomp's default)"
end

local function memory()
  local total = first_line("/proc/meminfo", "^MemTotal:%s*(%d+)")
  local limit = first_line("/sys/fs/cgroup/memory.max", "^%d+$")
  if not total then return "unknown" end
  return size(total * 1024) .. (limit and ", limited to " .. size(tonumber(limit)) or "")
end

local function available()
  local free = first_line("/proc/meminfo", "^MemAvailable:%s*(%d+)")
  return free and size(free * 1024) or "unknown"
end

local function shared_memory()
  local total = output_of("df -Pk /dev/shm", "\n%S+%s+(%d+)")
  return total and "/dev/shm " .. size(total * 1024) or "no /dev/shm"
end

local function huge_pages()
  local modes = first_line("/sys/kernel/mm/transparent_hugepage/enabled", ".*")
  local mode = modes and modes:match "%[(.-)%]"
  if not mode then return "none (the kernel does not say)" end
  return mode .. (mode == "never" and " (large tensors cost more page faults)" or "")
end

local function limits()
  local text = read "/proc/self/limits" or ""
  local locked, files = text:match "Max locked memory%s+(%S+)", text:match "Max open files%s+(%S+)"
  if tonumber(locked) then locked = size(tonumber(locked)) end
  return ("locked memory %s, open files %s"):format(locked or "?", files or "?")
end

-- The network -------------------------------------------------------------------------------------

local function addresses()
  local text, list = C.ds_interfaces(), {}
  if text == nil then return nil end
  for line in ffi.string(text):gmatch "[^\n]+" do
    if not line:find "^lo%s" then list[#list + 1] = line end
  end
  C.ds_free(text)
  return #list > 0 and list or "none"
end

--- Interfaces that have an address, and what must be the same on all hosts for messages to arrive.
-- Those of containers and bridges come and go, and no rank uses them.
local function interfaces()
  local seen, list = {}, {}
  local all = addresses()
  for _, line in ipairs(type(all) == "table" and all or {}) do
    local name = line:match "^%S+"
    if not seen[name] and not name:find "^veth" and not name:find "^docker"
      and not name:find "^br%-" and not name:find "^virbr" then
      local speed = first_line("/sys/class/net/" .. name .. "/speed", "^%d+$")
      list[#list + 1] = ("%s MTU %s%s"):format(name,
        first_line("/sys/class/net/" .. name .. "/mtu", ".*") or "?",
        speed and ", " .. speed .. " Mb/s" or "")
    end
    seen[name] = true
  end
  return #list > 0 and list or "none but the loopback"
end

local function infiniband()
  local list = {}
  for name in output_of("ls /sys/class/infiniband"):gmatch "%S+" do
    local rate = first_line("/sys/class/infiniband/" .. name .. "/ports/1/rate", ".*")
    list[#list + 1] = rate or "?"
  end
  return #list > 0 and counted(list) or nil
end

--- Variables that change what runs, as a shell has them that is not a rank.
local function environment()
  local list = {}
  for variable in (read "/proc/self/environ" or ""):gmatch "[^%z]+" do
    local name = variable:match "^[%w_]+" or ""
    if name:find "^DS_" or name:find "^OMP_" or name:find "^NCCL_" or name:find "^UCX_"
      or name:find "^OMPI_MCA_" or name:find "^CUDA_" or name == "DSRUN_LUA"
      or name == "LD_LIBRARY_PATH" or name == "LD_PRELOAD" then
      list[#list + 1] = variable:gsub("[^\32-\126]", "?")
    end
  end
  table.sort(list)
  return #list > 0 and list or "nothing set"
end

-- The report --------------------------------------------------------------------------------------

-- own: differs from host to host, and is no wonder.
M.rows = {
  { "host", function() return first_line("/proc/sys/kernel/hostname", ".*") end, own = true },
  { "dsrun", function() return ("%s (%s)"):format(host.version, host.commit) end },
  { "build", build },
  { "program", function() return host.executable end },
  { "library", function() return host.root end },
  { "compiler", function() return host.compiler end },
  { "LuaJIT", jit_state },
  { "oneDNN", function() return ffi.string(C.ds_dnnl_version()) end },
  { "Open MPI", mpi },
  { "CUDA", cuda },
  { "cuDNN", cudnn },
  { "NCCL", nccl },
  { "driver", driver },
  { "GPUs", gpus },
  { "GPU", backend },
  { "system", system },
  { "kernel", kernel },
  { "processor", processor },
  { "cores", cores },
  { "CPU kernels", levels },
  { "threads", threads },
  { "waiting", waiting },
  { "memory", memory },
  { "available", available, own = true },
  { "shared memory", shared_memory },
  { "huge pages", huge_pages },
  { "limits", limits },
  { "interfaces", interfaces },
  { "addresses", addresses, own = true },
  { "InfiniBand", infiniband },
  { "environment", environment },
}

--- The key of a row in JSON: "cpu_kernels".
function M.key(label) return (label:lower():gsub(" ", "_")) end

--- A fact as lines.
function M.lines(value)
  if type(value) == "table" then return value end
  return { value }
end

--- Prints a fact under its label, one line for each of its lines.
function M.print_row(label, value)
  for _, line in ipairs(M.lines(value)) do
    print(("%-14s %s"):format(label, line ~= "" and line or "(nothing)"))
    label = ""
  end
end

--- The only argument there may be.
-- @treturn boolean whether JSON is wanted; wrong ones end the program with 2
function M.arguments()
  for i = 1, #arg do
    if arg[i] ~= "--json" then
      io.stderr:write(("dsrun: env takes --json and nothing else, but was given '%s' (options of "
        .. "dsrun's own stand before it)\n"):format(arg[i]))
      os.exit(2)
    end
  end
  return #arg > 0
end

function M.show()
  local as_json, facts = M.arguments(), {}
  for _, row in ipairs(M.rows) do
    local value = row[2]()
    if as_json then
      facts[M.key(row[1])] = type(value) == "table" and json.array(value) or value
    else
      M.print_row(row[1], value)
    end
  end
  if as_json then print(json.encode(facts, { indent = 2 })) end
end

return M
