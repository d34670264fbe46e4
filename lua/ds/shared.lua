--- What ranks exchange: the group in which they do, and memory for it.
--
-- Between GPUs that is memory in which they read and write in each other's place, and a group that
-- has nothing else (runner/comm_nccl_share.c says why); where there is none, the group of all ranks
-- and memory like any. All ranks ask for the same, in the same order: so it lies at the same place
-- on each.

local ffi = require "ffi"
local border = require "ds.ffi"
local tensor = require "ds.tensor"
local comm = require "ds.comm"

local C, check = border.C, border.check
local CUDA = C.DS_CUDA

local M = {}

local there = false -- such memory

--- The group for what is exchanged. Every rank calls it.
-- @tparam string device
-- @treturn cdata ds_comm *
function M.group(device)
  if device ~= "cuda" or comm.world_size() == 1 then return comm.world() end
  local box = ffi.new("ds_comm *[1]")
  check(C.ds_comm_shared(box), "initialize")
  there = box[0] ~= nil
  return there and box[0] or comm.world()
end

--- An undefined tensor for that group's collectives; M.group() comes first.
function M.new(shape, dtype, device)
  if not there or device ~= "cuda" then return tensor.new(shape, dtype, device) end
  local before = C.ds_memory_set(CUDA, C.DS_MEMORY_SHARED)
  local ok, t = pcall(tensor.new, shape, dtype, device)
  C.ds_memory_set(CUDA, before)
  if not ok then error(t, 0) end
  return t
end

--- The same, of zeros.
function M.zeros(shape, dtype, device)
  local t = M.new(shape, dtype, device)
  tensor.run("fill", device, t._c, 0)
  return t
end

return M
