--- What checkpoints keep for backward, in the host's memory instead of the GPU's:
-- `activation_checkpointing.cpu_checkpointing`.
--
-- After a checkpointed forward its arguments leave: they are downloaded beside the kernels of the
-- next block. When that one's forward was asked for, too, kernels wait for the download, which is
-- over by then, and the memory is anybody's. In backward a block's arguments come back while the
-- block after it runs, one block ahead. The host waits for none of it: events order transfers and
-- kernels, and memory is handed on in the order in which the device gets there.
--
-- What leaves is a piece of memory with all tensors that lie in it (an argument and what it is a
-- view of). Such a tensor has a shape and no data, as a sharded parameter; `_gone` is the piece.
-- Whoever uses it finds that (tensor.revive, backward's inputs), and it comes back: so a tensor may
-- be used by anybody at any time. It stays where it is if somebody else holds its memory (a view
-- that is not known here, keep()), if it is used again before the next block is over (as what all
-- blocks share), or is small.
--
-- On the meta device (`dsrun plan`) the same is done to tensors without values.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local log = require "ds.log"

local C, check = border.C, border.check
local is_tensor = tensor.is_tensor

local M = {}

M.LEAST = 2 ^ 16 -- bytes: less is not worth a transfer

M.devices = { cuda = true } -- whose tensors leave; `dsrun plan` has those of the meta device do so

local WHAT = "checkpoint"

-- Tensors that were used again soon, and leave no more.
local stays = setmetatable({}, { __mode = "k" })

-- ---- events: a transfer takes one whose own has passed, so that nobody waits

local events = { first = 1, last = 0 } -- in the order of their transfers

local function event_of()
  local e = events[events.first]
  if e and check(C.ds_event_done(e), WHAT) == 1 then
    events[events.first], events.first = nil, events.first + 1
    return e
  end
  local box = ffi.new("ds_event *[1]")
  check(C.ds_event_make(box, C.DS_CUDA), WHAT)
  return ffi.gc(box[0], C.ds_event_free)
end

--- What follows the event was asked for.
local function event_back(e)
  events.last = events.last + 1
  events[events.last] = e
end

-- ---- page-locked memory: all its users are in the stream of transfers, so it goes from one to the
-- next at once

local idle, idle_bytes = {}, 0 -- by size
local taken = 0                -- bytes, idle ones as well

--- Sizes by steps of an eighth, so that batches of other lengths can use the same memory.
local function rounded(bytes)
  local step = 2 ^ math.max(9, math.floor(math.log(bytes) / math.log(2)) - 3)
  return math.ceil(bytes / step) * step
end

--- Gives what waits here to all that use page-locked memory.
function M.flush()
  for i = events.first, events.last do C.ds_event_done(events[i]) end -- lets memory go
  for size, list in pairs(idle) do
    for _, t in ipairs(list) do scope.release(t) end -- the events of transfers hold it
    idle[size] = nil
  end
  taken, idle_bytes = taken - idle_bytes, 0
end

--- Bytes of page-locked memory that checkpoints have now.
function M.room() return taken end

--- Room in host memory; nil: the system lets us lock no more.
local function room_for(bytes)
  local size = rounded(bytes)
  local list = idle[size]
  if list and #list > 0 then
    idle_bytes = idle_bytes - size
    return table.remove(list)
  end
  if idle_bytes >= size then M.flush() end
  local ok, t = pcall(tensor.pinned, { size }, "u8")
  if ok then
    taken = taken + size
    return scope.keep(t)
  end
  if not M.told then
    log.info("cpu_checkpointing: the system lets this process lock no more memory; what does not "
      .. "fit stays on the GPU")
  end
  M.told = true
  return nil
end

local function give_room(t)
  local size = t:numel()
  idle[size] = idle[size] or {}
  table.insert(idle[size], t)
  idle_bytes = idle_bytes + size
end

-- ---- a piece of memory

-- state: "leaving" (its tensors still have it), "away", "coming" (they do not have it yet), "here"
local Piece = {}
Piece.__index = Piece

local function address(c) return tonumber(ffi.cast("intptr_t", c.data)) end

--- Starts a transfer between the device and the part of its room that a piece takes.
-- @tparam boolean up to the device
-- @tparam cdata there its memory there
-- @treturn number as all of C's
local function move(self, up, there)
  local part = ffi.new("ds_tensor")
  check(C.ds_slice_flat(part, self.room._c, 0, 1, ffi.new("int64_t[1]", self.bytes)), WHAT)
  self.event = event_of()
  local code = up and C.ds_upload_later(self.event, there, part)
    or not up and C.ds_download_beside(self.event, part, there)
  C.ds_release(part)
  return code
end

--- Bytes of a piece of memory up to the last one that its tensors have.
local function bytes_of(tensors)
  local most = 0
  for _, t in ipairs(tensors) do most = math.max(most, tonumber(C.ds_reach(t._c))) end
  return most
end

--- The memory of tensors that share it, from now on on its way.
-- @treturn Piece|nil nil: there is no room for it
local function depart(tensors)
  local first, bytes = tensors[1], bytes_of(tensors)
  local whole = ffi.new("ds_tensor")
  check(C.ds_whole(whole, first._c, bytes), WHAT)
  local self = setmetatable({ tensors = tensors, at = {}, left = #tensors, state = "leaving",
    device = first.device, bytes = bytes, storage = first._c.storage }, Piece)
  for i, t in ipairs(tensors) do self.at[i] = address(t._c) - address(whole) end
  self.room = self.device == "cuda" and room_for(self.bytes)
  local code = self.room and move(self, false, whole) or 0
  C.ds_release(whole)
  check(code, WHAT)
  if self.device == "cuda" and not self.room then return nil end
  for _, t in ipairs(tensors) do t._gone = self end
  return self
end

--- It does not leave.
function Piece:stay()
  if self.state ~= "leaving" then return end
  self.state = "here"
  for _, t in ipairs(self.tensors) do
    if t._gone == self then t._gone = false end
    stays[t] = true
  end
  if self.event then
    check(C.ds_event_hand_over(self.event), WHAT)
    event_back(self.event)
    give_room(self.room)
    self.event, self.room = nil, nil
  end
end

--- Whether its tensors, and nobody else, still have the memory.
local function untouched(self)
  local t = self.tensors[1]
  if C.ds_references(t._c) ~= #self.tensors + (self.event and 1 or 0) then return false end
  for _, other in ipairs(self.tensors) do
    if other._gone ~= self or other._keep or other._c.storage ~= self.storage then return false end
  end
  return true
end

--- The memory goes, unless something has happened to it since it began to leave.
local function leave(self)
  if self.state ~= "leaving" then return end
  if not untouched(self) then return self:stay() end
  if self.event then
    check(C.ds_event_hand_over(self.event), WHAT)
    event_back(self.event)
    self.event = nil
  end
  for _, t in ipairs(self.tensors) do C.ds_release(t._c) end
  self.state = "away"
  autograd.away = autograd.away + 1
end

--- Begins to bring it back, after the kernels that were asked for so far.
local function come(self)
  if self.state ~= "away" then return end
  self.whole = scope.keep(tensor.new({ self.bytes }, "u8", self.device))
  if self.room then
    check(move(self, true, self.whole._c), WHAT)
    give_room(self.room)
    self.room = nil
  end
  self.state = "coming"
end

local function close(self)
  if self.state == "away" or self.state == "coming" then autograd.away = autograd.away - 1 end
  if self.event then event_back(self.event) end
  if self.room then give_room(self.room) end
  if self.whole then scope.release(self.whole) end
  self.state, self.event, self.room, self.whole = "here", nil, nil, nil
end

--- Has it here for the kernels that are asked for from now on.
function Piece:back()
  if self.state == "leaving" then return self:stay() end
  come(self)
  if self.state ~= "coming" then return end
  if self.event then check(C.ds_event_hand_over(self.event), WHAT) end
  for i, t in ipairs(self.tensors) do
    if t._gone == self then
      check(C.ds_revive(t._c, self.whole._c, self.at[i]))
      t._gone = false
      if scope.grad and not autograd.is_running() then stays[t] = true end
    end
  end
  close(self)
end

--- One of its tensors was released.
function Piece:drop()
  self.left = self.left - 1
  if self.left == 0 then close(self) end
end

-- ---- what checkpoints do

--- Arguments, each with what it is a view of, by the memory that they lie in.
local function pieces_of(args)
  local list, by_storage = {}, {}
  local function add(t)
    local key = tonumber(ffi.cast("intptr_t", t._c.storage))
    local group = by_storage[key]
    if not group then
      group = {}
      by_storage[key], list[#list + 1] = group, group
    end
    if group[t] then return end
    group[t], group[#group + 1] = true, t
    local r = t._rec
    local base = r and not r.op.kernel and #r.op.inputs == 1 and r[r.op.inputs[1]]
    if is_tensor(base) and base._c.storage == t._c.storage then add(base) end
  end
  for i = 1, args.n do
    local t = args[i]
    if is_tensor(t) and M.devices[t.device] and t._c.storage ~= nil then add(t) end
  end
  return list
end

local function may_leave(group)
  if C.ds_references(group[1]._c) ~= #group or bytes_of(group) < math.max(1, M.LEAST) then
    return false
  end
  for _, t in ipairs(group) do
    if t._keep or t._gone or t._parameter or t._unit or stays[t] then return false end
  end
  return true
end

local pending                                    -- those of the last checkpoint, which are leaving
local last = setmetatable({}, { __mode = "v" })  -- [1]: the youngest that are away

--- After a checkpointed forward: its arguments begin to leave, those of the one before have left.
-- @tparam table args { n =, … }
-- @treturn table|nil what back() takes
function M.depart(args)
  local groups, pieces = pieces_of(args), {}
  for _, group in ipairs(groups) do
    for _, t in ipairs(group) do
      if t._gone then t._gone:stay() end -- an argument again
    end
  end
  M.settle()
  for _, group in ipairs(groups) do
    local piece = may_leave(group) and depart(group)
    if piece then pieces[#pieces + 1] = piece end
  end
  if #pieces == 0 then return nil end
  pending = { pieces = pieces, before = setmetatable({ last[1] }, { __mode = "v" }) }
  last[1] = pending
  return pending
end

--- Those of the last checkpoint have left.
function M.settle()
  local all = pending
  pending = nil
  for _, piece in ipairs(all and all.pieces or {}) do leave(piece) end
end

local function is_away(set)
  for _, piece in ipairs(set.pieces) do
    if piece.state == "away" then return true end
  end
  return false
end

--- Before a checkpoint is made again: its arguments are here, and those of the one before, which
-- backward comes to next, are on their way.
-- @tparam table set what depart() gave
function M.back(set)
  for _, piece in ipairs(set.pieces) do piece:back() end
  if pending == set then pending = nil end
  local before = set.before[1]
  while before and not is_away(before) do before = before.before[1] end
  last[1] = before
  for _, piece in ipairs(before and before.pieces or {}) do come(piece) end
end

return M
