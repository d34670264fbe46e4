--- ZeRO stage 3: parameters of which each rank keeps a share, whole only while they are used.
--
-- A unit is what one collective gathers: the parameters of a bucket, or one parameter. It is
-- *resident* while its whole values are in memory, and *open* while its parameters' handles point
-- to them. A closed parameter's handle has a shape and no data: that is what the dispatch of an
-- operation, or backward before it runs a record, stops at, and then use() opens what that
-- operation needs. It closes what that does not need, so a touch of any other parameter comes by
-- here again, and the sequence of units is all there is to know of the order.
--
-- That sequence is recorded over a step. While the next one follows it, units are fetched ahead
-- (prefetch_bucket_size) and a closed one stays resident if it is used again soon enough
-- (max_reuse_distance); both as far as max_live_parameters allows. A step that leaves the sequence
-- goes on without either, and is the record for the next. On GPUs what is fetched ahead comes while
-- kernels run; those that are called after it is opened wait for it.
--
-- A rank's share may lie in host memory (offload_param.lua). A fetch has two parts then: the share
-- is lifted to the device, and when it is there the ranks exchange. The exchange follows kernels,
-- and they would have to wait for the share first. So of what is fetched ahead, the exchange begins
-- when the order has moved on by one: in the meantime it was lifted beside the kernels.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local nn = require "ds.nn"
local comm = require "ds.comm"
local shared = require "ds.shared"

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice = tensor.view.slice_flat

local M = {}

local Params = {}
Params.__index = Params

local PREFETCH = 5e7 -- elements fetched ahead on GPUs, if the config does not say

--- The sharded parameters of an engine, or of models that no engine has yet.
-- @tparam table options device; prefetch, max_live, max_reuse: elements; overlap: what is fetched
--   ahead is not waited for; home: where shares lie, if not on the device (offload_param.lua)
function M.new(options)
  return setmetatable({
    units = {}, open = {}, clock = 0, live = 0, inside = 0, device = options.device,
    prefetch = options.prefetch or options.overlap and PREFETCH or 0, overlap = options.overlap,
    ample = options.home and options.overlap and not options.prefetch, largest = 0,
    max_live = options.max_live or math.huge, home = options.home,
    max_reuse = options.max_reuse or 0, record = {}, at = 1, world = shared.group(options.device),
    ranks = comm.world_size(),
    stats = { gathers = 0, prefetched = 0, under_way = 0, reused = 0, most_live = 0 },
  }, Params)
end

-- ---- units

--- Adds a unit; its parameters are whole until adopt().
-- @tparam table params
-- @tparam table unit numel, borders (cdata [ranks + 1]), from (this rank's first element),
--   offsets (of the parameters), dtype, shard (this rank's part; nil if it has none)
function Params:add(params, unit)
  unit.params, unit.views, unit.manager = params, setmetatable({}, { __mode = "k" }), self
  unit.used, unit.held, unit.index = 0, 0, #self.units + 1
  unit.size = tonumber(C.ds_dtype_size(tensor.codes[unit.dtype]))
  self.units[unit.index] = unit
  for _, p in ipairs(params) do p._unit = unit end
  if self.ample then -- one is lifted while another one is exchanged
    self.prefetch = math.max(self.prefetch, self.largest + math.max(self.largest, unit.numel))
  end
  self.largest = math.max(self.largest, unit.numel)
  return unit
end

--- Notes a view of a sharded parameter: it is closed and opened with it.
function tensor.note_view(view, x)
  view._unit = x._unit
  x._unit.views[view] = true
end

local function new_whole(self, unit)
  local whole = shared.new({ unit.numel }, unit.dtype, self.device)
  scope.keep(whole)
  whole._keep = true
  unit.whole = whole
  self.live = self.live + unit.numel
  self.stats.most_live = math.max(self.stats.most_live, self.live)
  return whole
end

local function own_part(unit)
  return slice(unit.whole, unit.from, unit.shard.shape)
end

--- Begins to bring this rank's part of it to the device.
local function lift(self, unit)
  if not unit.shard then return end
  if not self.home then return run("copy", self.device, own_part(unit)._c, unit.shard._c) end
  unit.event = self.home:upload(own_part(unit), unit.shard)
end

--- Kernels that are called from now on find this rank's part.
local function land(self, unit)
  if unit.event then self.home:arrive(unit.event) end
  unit.event, unit.lifted = nil, nil
end

--- Brings the parts of all ranks together, after that.
local function exchange(self, unit, ahead)
  land(self, unit)
  C.ds_comm_about(self.world, unit.index)
  local work = ahead and self.overlap and ffi.new "ds_work" or nil
  if work then self.stats.under_way = self.stats.under_way + 1 end
  check(C.ds_gather_parts(unit.whole._c, unit.borders, self.world, work), "gather parameters")
  unit.work = work
end

--- Its values are there, for kernels that are called from now on.
local function arrive(self, unit)
  if unit.lifted then exchange(self, unit) end
  local work = unit.work
  unit.work = nil
  if work then check(C.ds_wait(work), "gather parameters") end
end

--- Makes a closed unit resident.
-- @tparam[opt] boolean ahead it is not needed yet: arrive() comes before its use
local function fetch(self, unit, ahead)
  new_whole(self, unit)
  lift(self, unit)
  self.stats.gathers = self.stats.gathers + 1
  if ahead and self.home and self.overlap then
    unit.lifted = self.at -- from here on in the order
  else
    exchange(self, unit, ahead)
  end
end

local function drop(self, unit)
  if unit.lifted then land(self, unit) end -- nobody wants it: there is no exchange
  arrive(self, unit)
  scope.release(unit.whole)
  unit.whole = nil
  self.live = self.live - unit.numel
end

--- Points the parameters, and views of them, to the unit's whole values.
local function point(unit)
  local whole = unit.whole._c
  for i, p in ipairs(unit.params) do
    check(C.ds_revive(p._c, whole, unit.offsets[i] * unit.size))
  end
  for view in pairs(unit.views) do
    if view._at and view._c.data == nil then check(C.ds_revive(view._c, whole, view._at)) end
    view._at = nil
  end
  unit.is_open = true
end

local function unpoint(unit)
  local base = ffi.cast("char *", unit.whole._c.data)
  for _, p in ipairs(unit.params) do C.ds_release(p._c) end
  for view in pairs(unit.views) do
    if view._c.data ~= nil then
      view._at = ffi.cast("char *", view._c.data) - base
      C.ds_release(view._c)
    end
  end
  unit.is_open = false
end

--- This rank's share, from the whole values; of another rank's values if `root` is given.
local function write_back(self, unit, root)
  if root then check(C.ds_broadcast(unit.whole._c, root, self.world, nil), "parameters") end
  if unit.shard then run("copy", self.device, unit.shard._c, own_part(unit)._c) end
end

--- How many elements other units have that come before this one is used again; nil: it is not.
local function distance(self, unit)
  local trace = self.trace
  local positions = trace and self.following and trace.of[unit.index]
  if not positions then return nil end
  for _, k in ipairs(positions) do
    if k >= self.at then return trace.sum[k - 1] - trace.sum[self.at - 1] end
  end
end

local function close(self, unit)
  if self.root then scope.no_grad(write_back, self, unit, self.root) end
  unpoint(unit)
  local d = distance(self, unit)
  if d and d <= self.max_reuse and self.live <= self.max_live then return end
  drop(self, unit)
end

--- Closes the open units that were last used before `moment` and are not held.
local function close_older(self, moment)
  local open, n = self.open, 0
  for i = 1, #open do
    local unit = open[i]
    open[i] = nil
    if unit.used >= moment or unit.held > 0 then
      n = n + 1
      open[n] = unit
    else
      close(self, unit)
    end
  end
end

-- ---- the order of a step

--- What a record says: by unit where it comes, and how many elements have come up to each place.
local function make_trace(self, record)
  local trace = { order = record, of = {}, sum = { [0] = 0 } }
  for k, index in ipairs(record) do
    trace.of[index] = trace.of[index] or {}
    table.insert(trace.of[index], k)
    trace.sum[k] = trace.sum[k - 1] + self.units[index].numel
  end
  return trace
end

--- Resident units that are not open go.
local function drop_closed(self)
  for _, unit in ipairs(self.units) do
    if unit.whole and not unit.is_open then drop(self, unit) end
  end
end

local function follow(self, unit)
  local record = self.record
  record[#record + 1] = unit.index
  if not self.following then return end
  if self.trace.order[self.at] == unit.index then
    self.at = self.at + 1
  else
    self.following = false
    drop_closed(self)
  end
end

local function fetch_ahead(self)
  local order, left, k = self.trace.order, self.prefetch, self.at
  while order[k] do
    local unit = self.units[order[k]]
    left = left - unit.numel
    if left < 0 then return end
    if not unit.whole then
      if self.live + unit.numel > self.max_live then return end
      fetch(self, unit, true)
      self.stats.prefetched = self.stats.prefetched + 1
    elseif unit.lifted and unit.lifted < self.at and self.ranks > 1 then
      exchange(self, unit, true)
    end
    k = k + 1
  end
end

--- Opens what an operation needs.
-- @tparam table units all of those that its inputs are in
-- @tparam[opt] boolean more perhaps not all: a function that takes several tensors looks at one
--   after the other
local function open_units(self, units, more)
  self.clock = self.clock + 1
  for _, unit in ipairs(units) do unit.used = self.clock end
  close_older(self, self.more and self.clock - 1 or self.clock)
  self.more = more
  for _, unit in ipairs(units) do
    if not unit.is_open then
      if self.recording then follow(self, unit) end
      if unit.whole then
        arrive(self, unit)
        self.stats.reused = self.stats.reused + 1
      else
        fetch(self, unit)
      end
      point(unit)
      self.open[#self.open + 1] = unit
    end
  end
  if self.recording and self.following and self.prefetch > 0 then fetch_ahead(self) end
end

--- Whether every rank can be expected to come here: where a model runs.
local function may_gather(self)
  return self.inside > 0 or self.root or nn.is_running() or autograd.is_running()
end

--- Makes the closed parameters among tensors usable, or raises for what was released for good.
-- @tparam string what operation, for messages
function tensor.gather(what, ...)
  local managers = {}
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t then
      local unit = t._unit
      if unit then
        local self = unit.manager
        if not managers[self] then
          managers[self] = {}
          managers[#managers + 1] = self
        end
        table.insert(managers[self], unit)
      elseif t._c.data == nil then
        tensor.revive(t, what)
      end
    end
  end
  for _, self in ipairs(managers) do
    if not may_gather(self) then
      raise("%s: the parameter is sharded (ZeRO stage 3) and whole only while the model runs; "
        .. "ds.zero.gathered(parameters, f), called on every rank, has it whole inside f", what)
    end
    scope.no_grad(open_units, self, managers[self], select("#", ...) == 1)
  end
end

--- The record is over: it is the order to follow from now on.
local function end_record(self)
  local same = self.trace and #self.record == #self.trace.order and self.at > #self.record
  if not same then self.trace = make_trace(self, self.record) end
  self.record, self.at, self.following = {}, 1, true
end

--- Another order than that of steps, to come back from with the same call.
local function change_order(self)
  local other = self.other or { record = {}, at = 1 }
  self.other = { record = self.record, at = self.at, trace = self.trace,
    following = self.following }
  self.record, self.at, self.trace = other.record, other.at, other.trace
  self.following = other.following
end

--- Before and after a model runs.
-- @tparam boolean training whether it is part of a step, whose order is recorded; evaluation has an
-- order of its own where shares lie in host memory
function Params:enter(training)
  self.inside = self.inside + 1
  if self.inside == 1 and not training and self.home then
    self.evaluating = true
    change_order(self)
  end
  self.recording = training or self.evaluating
end

function Params:leave()
  self.inside = self.inside - 1
  if self.inside > 0 then return end
  close_older(self, math.huge) -- what comes next may use none of it
  self.recording = false
  if self.evaluating then
    self.evaluating = false
    drop_closed(self)
    end_record(self)
    change_order(self)
  end
end

--- The weights are about to change, or did: all that is gathered is stale.
function Params:close_all()
  self.clock = self.clock + 2
  close_older(self, self.clock)
  drop_closed(self)
end

--- After a step: its order is the one to follow.
function Params:end_step()
  self.following = false
  self:close_all()
  end_record(self)
end

--- Takes a unit whose parameters point into `whole`: this rank's part goes to the shard.
-- @tparam Tensor whole all of its values, of the unit's dtype; released
function Params:adopt(unit, whole)
  unit.whole = whole
  self.live = self.live + unit.numel
  write_back(self, unit)
  unpoint(unit)
  drop(self, unit)
end

--- Memory for a rank's share of something.
function Params:share(n, dtype)
  return self.home and self.home:vector(n, dtype) or tensor.new({ n }, dtype, self.device):keep()
end

--- A unit of one parameter, cut evenly.
-- @tparam[opt] number root whose values are taken; nil: they are the same on all ranks
function Params:shard(p, root)
  scope.no_grad(function()
    local ranks, rank, n = comm.world_size(), comm.rank(), p:numel()
    local borders = ffi.new("int64_t[?]", ranks + 1)
    for r = 0, ranks do borders[r] = math.floor(n * r / ranks) end
    local from, to = tonumber(borders[rank]), tonumber(borders[rank + 1])
    if root then check(C.ds_broadcast(p._c, root, comm.world(), nil), "parameters") end
    local unit = self:add({ p }, { numel = n, borders = borders, from = from, offsets = { 0 },
      dtype = p.dtype, shard = to > from and self:share(to - from, p.dtype) or nil })
    self:adopt(unit, tensor.view.alias(p))
  end)
end

--- Makes parameters of this manager whole, and no concern of it any more.
-- @tparam Tensor p
function Params:release(p)
  local unit = p._unit
  for i, other in ipairs(unit.params) do
    if other == p then
      table.remove(unit.params, i)
      table.remove(unit.offsets, i)
      break
    end
  end
  p._unit = nil
  if #unit.params == 0 then
    for i, other in ipairs(self.open) do
      if other == unit then table.remove(self.open, i) end
    end
    if unit.whole then drop(self, unit) end
    if unit.shard then scope.release(unit.shard) end
    unit.shard = nil
  end
end

-- ---- whole parameters, on every rank at once

local function each_unit(params, f)
  local seen = {}
  for _, p in ipairs(params) do
    local unit = p._unit
    if unit and not seen[unit] then
      seen[unit] = true
      f(unit.manager, unit)
    end
  end
end

--- Runs f(…) while the given parameters are whole on every rank, and nobody closes them.
-- @tparam table params
-- @tparam[opt] number root the rank whose values they all have afterwards; nil: as they were
function M.hold(params, root, f, ...)
  each_unit(params, function(self, unit)
    unit.held = unit.held + 1
    scope.no_grad(open_units, self, { unit })
  end)
  local function done(ok, ...)
    each_unit(params, function(self, unit)
      if ok and root then scope.no_grad(write_back, self, unit, root) end
      unit.held = unit.held - 1
    end)
    if not ok then error((...), 0) end
    return ...
  end
  return done(xpcall(f, border.note, ...))
end

--- A parameter's values, whole, in memory of their own: in host memory where shares are.
local function whole_values(self, unit, p)
  if self.home and self.ranks == 1 then -- where they lie is good for that
    self.home:settle()
    for i, other in ipairs(unit.params) do
      if other == p then return slice(unit.shard, unit.offsets[i], p.shape):keep() end
    end
  end
  return M.hold({ p }, nil, function()
    return scope.no_grad(function()
      return self.home and p:detach():to "cpu" or p:detach():clone()
    end):keep()
  end)
end

--- Gives a sharded parameter memory of its own, whole; it is sharded no more. Every rank calls it.
function M.unshard(p)
  local grad, unit = p.requires_grad, p._unit
  local whole = whole_values(unit.manager, unit, p)
  unit.manager:release(p)
  p.requires_grad = false
  tensor.repoint(p, whole)
  p.requires_grad = grad
end

--- The same for all parameters of this manager.
function Params:unshard_all()
  for _, unit in ipairs(self.units) do
    while unit.params[1] do M.unshard(unit.params[1]) end
  end
end

return M
