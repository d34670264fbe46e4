--- Batches on their way to a GPU: while it works on one, the next is uploaded from page-locked
-- memory.
--
-- The transfer runs beside the kernels; those that read the batch wait for it on the device, the
-- host never does. Only batches that are made in C come ahead: a script's get() may draw random
-- numbers, and would draw them in another order.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check = border.C, border.check

local M = {}

local Ahead = {}
Ahead.__index = Ahead

local codes = tensor.codes

--- For a loader. @tparam string device
function M.new(device)
  return setmetatable({ device = device, free = {}, next = false }, Ahead)
end

local function event_of(self)
  local e = table.remove(self.free)
  if e then return e end
  local box = ffi.new("ds_event *[1]")
  check(C.ds_event_make(box, C.DS_CUDA), "loader")
  return ffi.gc(box[0], C.ds_event_free)
end

--- A host tensor's copy on the device, that is there when the event has passed.
local function upload(self, t)
  if not tensor.is_tensor(t) or t.device == self.device then return t end
  local pinned, n = ffi.new("ds_tensor"), t:numel()
  check(C.ds_empty_pinned(pinned, codes[t.dtype], 1, ffi.new("int64_t[1]", n)), "loader")
  local flat = t:contiguous()
  ffi.copy(pinned.data, flat._c.data, n * t:element_size())
  local there, e = tensor.new(t.shape, t.dtype, self.device), event_of(self)
  local code = C.ds_upload_later(e, there._c, pinned)
  C.ds_release(pinned) -- the event holds it
  check(code, "loader")
  scope.release(t, "by the loader")
  return there, e
end

--- Starts the uploads of a batch, and remembers it as the one of this place.
-- @tparam table place { epoch, offset, exact, count }, by which take() knows it
-- @tparam table batch { n =, … }, on the CPU
function Ahead:put(place, batch)
  local outer = scope.enter(nil) -- whatever is open now may close before the batch is wanted
  local ok, message = pcall(scope.no_grad, function()
    place.batch, place.events = { n = batch.n }, {}
    for i = 1, batch.n do
      local there, e = upload(self, batch[i])
      place.batch[i] = tensor.is_tensor(there) and scope.keep(there) or there
      place.events[#place.events + 1] = e
    end
  end)
  scope.enter(outer)
  if not ok then error(message, 0) end
  self.next = place
end

--- The batch of this place, if it is the one that was put.
-- @treturn table|nil
function Ahead:take(epoch, offset, exact)
  local place = self.next
  self.next = false
  for _, e in ipairs(self.free) do check(C.ds_event_done(e), "loader") end -- lets memory go
  if not place then return nil end
  for _, e in ipairs(place.events) do
    check(C.ds_event_follow(e), "loader")
    table.insert(self.free, 1, e)
  end
  if place.epoch ~= epoch or place.offset ~= offset or place.exact ~= exact then
    for _, t in ipairs(place.batch) do
      if tensor.is_tensor(t) then scope.release(t, "by the loader") end
    end
    return nil
  end
  return place
end

--- To the device, for a batch that was not put. @return the values
function Ahead:move(...)
  local out = { ... }
  for i = 1, select("#", ...) do
    if tensor.is_tensor(out[i]) then out[i] = out[i]:to(self.device) end
  end
  return unpack(out, 1, select("#", ...))
end

return M
