--- ds.cuda: the GPU of this process, under PyTorch's names.

local ffi = require "ffi"
local border = require "ds.ffi"
local tensor = require "ds.tensor"

local C, check = border.C, border.check
local CUDA = 1 -- its number among devices

local M = {}

--- Whether there is a GPU, and this build can use it. @treturn boolean @treturn string|nil why not
function M.is_available()
  if C.ds_ops_of(CUDA) ~= nil then return true end
  return false, ffi.string(C.ds_error())
end

--- How many GPUs this process uses: one, if there is one. A rank has its own.
function M.device_count() return M.is_available() and 1 or 0 end

--- "NVIDIA H200, 140 GiB, …". Raises where there is none.
function M.get_device_name()
  local text = ffi.new("char[512]")
  check(C.ds_device_describe(text, 512, CUDA))
  return ffi.string(text)
end
M.device_name = M.get_device_name

--- Waits for all that was asked of the GPU; raises what went wrong there.
function M.synchronize() check(C.ds_device_synchronize(CUDA)) end

local function memory() return C.ds_memory_of(CUDA) end

--- Bytes in tensors, now and at most so far; and those that are kept for new ones as well.
function M.memory_allocated() return tonumber(memory().live) end
function M.max_memory_allocated() return tonumber(memory().peak) end
function M.memory_reserved() return tonumber(memory().live + memory().cached) end

--- From now on max_memory_allocated() counts anew.
function M.reset_peak_memory_stats() C.ds_memory_reset_peak(CUDA) end

--- Gives memory that no tensor has back to the system.
function M.empty_cache() tensor.empty_cache "cuda" end

--- What lives, by the operation that made it: "live 1.5 GiB (matmul 1.0 GiB, …)".
function M.memory_summary() return tensor.memory_summary "cuda" end

--- What the GPU was asked for since the start: launches, waits and event_waits of the host, takes
-- and gives of memory, uploads, downloads, scratch (bytes), captures and replays of graphs;
-- registered (bytes) with NCCL, and exchanges, collectives in such memory.
function M.counters()
  local c, out = C.ds_device_count(CUDA), {}
  for _, name in ipairs { "launches", "waits", "event_waits", "takes", "gives", "uploads",
    "downloads", "scratch", "captures", "replays", "registered", "exchanges" } do
    out[name] = tonumber(c[name])
  end
  return out
end

return M
