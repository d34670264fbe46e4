--- ZeRO-Offload (Ren et al. 2021): fp32 master weights and the optimizer's vectors in host memory,
-- and the update by the CPU, for an engine on a GPU.
--
-- An update goes by blocks: the gradient of the next block comes to the host while the CPU updates
-- one, and the new weights of the one before go back, all through page-locked memory. Weights that
-- are fp32 themselves have no master: they come and go.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local log = require "ds.log"

local C, check = border.C, border.check
local slice_flat = tensor.view.slice_flat

local M = {}

local Store = {}
Store.__index = Store

M.BLOCK = 2 ^ 22      -- elements of a flat segment that are on their way at a time
local SLOTS = 3      -- one comes, one is updated, one goes

local function event()
  local box = ffi.new("ds_event *[1]")
  check(C.ds_event_make(box, C.DS_CUDA), "offload_optimizer")
  return ffi.gc(box[0], C.ds_event_free)
end

--- A store for the optimizer's vectors, still without any.
function M.new()
  return setmetatable({ blocks = {}, slots = {}, bytes = 0, block = M.BLOCK }, Store)
end

local function vector(self, shape, value)
  local t = tensor.pinned(shape, "f32"):keep()
  tensor.run("fill", "cpu", t._c, value or 0)
  self.bytes = self.bytes + t:numel() * 4
  return t
end

--- Takes over the vectors of segments: masters where there is a copy in low precision, and state.
-- @tparam table segments
-- @tparam table groups the optimizer's: group.rule.state names the vectors
function Store:lay(segments, groups)
  for _, s in ipairs(segments) do
    local group = groups[s.group]
    local rule = group.rule
    if s.low then s.p = vector(self, s.shape) end
    s.state = {}
    for _, name in ipairs(rule.state) do
      local initial = rule.initial and rule.initial[name]
      s.state[name] = vector(self, s.shape, initial and group[initial])
    end
    local n = s.to - s.from
    local most = rule.granularity == "flat" and self.block or math.max(1, n)
    for from = 0, n - 1, most do
      self.blocks[#self.blocks + 1] = { segment = s, from = from, n = math.min(most, n - from) }
    end
  end
  log.info("%s of the optimizer's state in host memory", tensor.bytes_string(self.bytes))
end

--- Page-locked room number `i` for n elements of a dtype in a slot.
local function room(slot, i, n, dtype)
  local have = slot[i]
  if not have or have.dtype ~= dtype or have:numel() < n then
    if have then scope.release(have, "as a larger one was needed") end
    slot[i] = tensor.pinned({ n }, dtype):keep()
  end
  return slot[i]
end

local function slot_of(self, i)
  local k = (i - 1) % SLOTS + 1
  self.slots[k] = self.slots[k] or { down = event(), down_p = event(), up = event() }
  return self.slots[k]
end

--- Has the gradient of block i come, and its weights where they are fp32.
local function fetch(self, i)
  local b, slot = self.blocks[i], slot_of(self, i)
  local s, n = b.segment, b.n
  check(C.ds_event_wait(slot.up)) -- what went from here
  slot.g = slice_flat(room(slot, 1, n, s.g.dtype), 0, { n })
  check(C.ds_download_later(slot.down, slot.g._c, slice_flat(s.g, b.from, { n })._c))
  slot.weights = slice_flat(room(slot, 2, n, (s.low or s.p).dtype), 0, { n })
  if not s.low then
    check(C.ds_download_later(slot.down_p, slot.weights._c, slice_flat(s.p, b.from, { n })._c))
  end
end

--- Updates block i on the host and sends its weights.
local function update_block(self, i, update)
  local b, slot = self.blocks[i], slot_of(self, i)
  local s, n = b.segment, b.n
  local shape = n == s.to - s.from and s.shape or { n }
  check(C.ds_event_wait(slot.down))
  check(C.ds_event_wait(slot.down_p))
  local part = setmetatable({ state = {}, g = slice_flat(slot.g, 0, shape) }, { __index = s })
  local weights = slice_flat(slot.weights, 0, shape)
  part.p = s.low and slice_flat(s.p, b.from, shape) or weights
  part.low = s.low and weights
  for name, t in pairs(s.state) do part.state[name] = slice_flat(t, b.from, shape) end
  update(part)
  local there = slice_flat(s.low or s.p, b.from, { n })
  check(C.ds_upload_later(slot.up, there._c, slot.weights._c))
  check(C.ds_event_follow(slot.up))
end

--- Runs update(segment) for all segments, by blocks that are in host memory.
function Store:stream(update)
  scope.no_grad(function()
    if self.blocks[1] then fetch(self, 1) end
    for i = 1, #self.blocks do
      if self.blocks[i + 1] then fetch(self, i + 1) end
      update_block(self, i, update)
    end
  end)
end

--- The vectors go with their segments, what they travelled through now.
function Store:close()
  for _, slot in ipairs(self.slots) do
    for _, name in ipairs { "down", "down_p", "up" } do C.ds_event_wait(slot[name]) end
    for k = 1, 2 do
      if slot[k] then scope.release(slot[k], "by engine:destroy()") end
    end
  end
  self.slots, self.blocks = {}, {}
end

return M
