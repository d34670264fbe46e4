--- `dsrun env`: what this machine and this dsrun offer.

local ffi = require "ffi"
local border = require "ds.ffi"

local C, host = border.C, border.host

local M = {}

local function first_line(path, pattern)
  local file = io.open(path)
  if not file then return nil end
  local found
  for line in file:lines() do
    found = line:match(pattern)
    if found then break end
  end
  file:close()
  return found
end

local function output_of(command, pattern)
  local pipe = io.popen(command .. " 2>/dev/null")
  local text = pipe and pipe:read "*a" or ""
  if pipe then pipe:close() end
  return text:match(pattern)
end

local function cpu()
  local model = first_line("/proc/cpuinfo", "^model name%s*:%s*(.*)")
    or first_line("/proc/cpuinfo", "^CPU part%s*:%s*(.*)") or "unknown"
  return ("%s, %s"):format(model, jit.arch)
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
  local allowed = output_of("env -u OMP_NUM_THREADS nproc", "%d+") or "?" -- nproc reads it too
  return ("%d (of %s processors this process may use; OMP_NUM_THREADS is %s)"):format(
    C.ds_threads(), allowed, os.getenv "OMP_NUM_THREADS" or "not set")
end

local function waiting()
  local policy, spin = os.getenv "OMP_WAIT_POLICY", os.getenv "GOMP_SPINCOUNT"
  if policy then return "OMP_WAIT_POLICY=" .. policy end
  if spin then return "GOMP_SPINCOUNT=" .. spin end
  return "threads spin for some 3 ms, then sleep (libgomp's default)"
end

local function memory()
  local total = first_line("/proc/meminfo", "^MemTotal:%s*(%d+)")
  local free = first_line("/proc/meminfo", "^MemAvailable:%s*(%d+)")
  if not total or not free then return "unknown" end
  return ("%.1f GiB, %.1f available"):format(total / 2 ^ 20, free / 2 ^ 20)
end

local function huge_pages()
  local modes = first_line("/sys/kernel/mm/transparent_hugepage/enabled", ".*")
  local mode = modes and modes:match "%[(.-)%]"
  if not mode then return "none (the kernel does not say)" end
  return mode .. (mode == "never" and " (large tensors cost more page faults)" or "")
end

local function jit_state()
  local on = jit.status()
  return ("%s, compiler %s"):format(jit.version, on and "on" or "off")
end

local function mpi()
  return output_of("mpirun --version", "%(Open MPI%) (%S+)") or "no mpirun found"
end

local function gpu()
  if C.ds_ops_of(1) ~= nil then return "ready" end
  return "none: " .. ffi.string(C.ds_error())
end

local rows = {
  { "dsrun", function() return ("%s (%s)"):format(host.version, host.commit) end },
  { "program", function() return host.program end },
  { "library", function() return host.root end },
  { "compiler", function() return host.compiler end },
  { "LuaJIT", jit_state },
  { "processor", cpu },
  { "CPU kernels", levels },
  { "threads", threads },
  { "waiting", waiting },
  { "memory", memory },
  { "huge pages", huge_pages },
  { "oneDNN", function() return ffi.string(C.ds_dnnl_version()) end },
  { "Open MPI", mpi },
  { "GPU", gpu },
}

function M.show()
  for _, row in ipairs(rows) do print(("%-12s %s"):format(row[1], row[2]())) end
end

return M
