--- What crosses the border where the CPU updates the weights of an engine on a GPU (ZeRO-Offload,
-- Ren et al. 2021): gradients come, new weights go, block by block, through page-locked memory.
--
-- While the CPU updates a block, the gradient of the next one comes and the weights of the one
-- before go. Weights that are fp32 themselves have no master: they come, too. The host waits for a
-- block's gradient, and for a slot's weights of three blocks ago; kernels wait for all weights.
-- Weights that lie in host memory (offload_param.lua) do not travel: they are updated there.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check = border.C, border.check
local slice_flat = tensor.view.slice_flat

local M = {}

local Border = {}
Border.__index = Border

M.BLOCK = 2 ^ 22     -- elements of a flat segment that are on their way at a time
local SLOTS = 3      -- one comes, one is updated, one goes
local EVENTS = { "down", "down_p", "up" }

local function event()
  local box = ffi.new("ds_event *[1]")
  check(C.ds_event_make(box, C.DS_CUDA), "offload_optimizer")
  return ffi.gc(box[0], C.ds_event_free)
end

function M.new() return setmetatable({ slots = {} }, Border) end

--- Page-locked room number `i` for n elements of a dtype in a slot.
local function room(slot, i, n, dtype)
  local have = slot[i]
  if not have or have.dtype ~= dtype or have:numel() < n then
    if have then scope.release(have, "as a larger one was needed") end
    slot[i] = tensor.pinned({ n }, dtype):keep()
  end
  return slice_flat(slot[i], 0, { n })
end

local function slot_of(self, i)
  local k = (i - 1) % SLOTS + 1
  if not self.slots[k] then
    self.slots[k] = {}
    for _, name in ipairs(EVENTS) do self.slots[k][name] = event() end
  end
  return self.slots[k]
end

--- Has the gradient of block number i come, and its weights where they are fp32.
-- @tparam number i
-- @tparam table block { segment, from, to }
function Border:fetch(i, block)
  local slot, s = slot_of(self, i), block.segment
  local from, n = block.from, block.to - block.from
  check(C.ds_event_wait(slot.up)) -- what went from here
  slot.g = room(slot, 1, n, s.g.dtype)
  check(C.ds_download_later(slot.down, slot.g._c, slice_flat(s.g, from, { n })._c))
  local home = s.low or s.p
  slot.here = home.device == "cpu"
  if slot.here then
    slot.weights = slice_flat(home, from, { n })
    return
  end
  slot.weights = room(slot, 2, n, home.dtype)
  if not s.low then
    check(C.ds_download_later(slot.down_p, slot.weights._c, slice_flat(s.p, from, { n })._c))
  end
end

--- Waits for what fetch() asked for.
-- @treturn Tensor the gradient, and room for the weights, with their values where they are fp32
-- @treturn Tensor
function Border:take(i)
  local slot = slot_of(self, i)
  check(C.ds_event_wait(slot.down))
  check(C.ds_event_wait(slot.down_p))
  return slot.g, slot.weights
end

--- Sends the weights of a block.
function Border:send(i, block)
  local slot, s = slot_of(self, i), block.segment
  if slot.here then return end
  local there = slice_flat(s.low or s.p, block.from, { block.to - block.from })
  check(C.ds_upload_later(slot.up, there._c, slot.weights._c))
end

--- All was sent: kernels wait for it. Where the host has waited for a slot there is nothing to do.
function Border:finish()
  for _, slot in ipairs(self.slots) do check(C.ds_event_follow(slot.up)) end
end

--- Waits for what is on its way, however it ends.
function Border:drain()
  for _, slot in ipairs(self.slots) do
    for _, name in ipairs(EVENTS) do C.ds_event_wait(slot[name]) end
  end
end

function Border:close()
  self:drain()
  for _, slot in ipairs(self.slots) do
    for k = 1, 2 do
      if slot[k] then scope.release(slot[k], "by engine:destroy()") end
    end
  end
  self.slots = {}
end

return M
