--- The optimizer's vectors elsewhere than beside the weights: the fp32 master, where weights are of
-- lower precision, and the rule's state. They are on a disk; or, for an engine on a GPU, in the
-- host's memory. Updates are the CPU's, block by block; for a GPU gradients and weights of a block
-- cross the border (offload_host.lua) while others are updated.
--
-- On a disk each rank has one file. A segment's vectors lie in it block by block, those of a block
-- beside each other: flat segments in blocks of at most sub_group_size elements (and a million), a
-- segment that is a whole tensor as one. An update streams all blocks through memory in order:
-- while one is updated, the next ones are read and those before are written.
--
--     [p₁ | exp_avg₁ | exp_avg_sq₁] [p₂ | exp_avg₂ | exp_avg_sq₂] …
--
-- What has no place in memory is a Stored vector: it stands where a tensor would in segment.p and
-- segment.state, knows dtype, shape and numel(), and gives its elements out in stretches. `slice`
-- and `each` take tensors as well, so that code need not ask which it has.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local log = require "ds.log"

local C, check, raise = border.C, border.check, border.raise
local slice_flat = tensor.view.slice_flat
local min, max, floor, ceil = math.min, math.max, math.floor, math.ceil

local M = {}

local PAGE = 4096 / 4   -- elements: what a disk moves without the page cache begins and ends there
local BLOCK = 2 ^ 20    -- elements of each vector in a block of a flat segment, at most
local STRETCH = 2 ^ 20  -- elements that `each` hands out at a time, at most

local MASTER = {} -- stands for segment.p among the names of state

local function pages(n) return ceil(n / PAGE) * PAGE end

--- A tensor of n fp32 elements, a multiple of PAGE, that begins at a multiple of 4096 bytes.
local function aligned(n)
  local room = tensor.new({ n + PAGE - 1 }, "f32", "cpu")
  local address = tonumber(ffi.cast("intptr_t", room._c.data))
  local t = slice_flat(room, (-address % 4096) / 4, { n })
  scope.release(room, "as its aligned part is what counts")
  return t
end

-- ---- a vector on the disk

local Stored = {}
Stored.__index = Stored

--- Elements from `from` on of vector `k` of a segment that has been cut into blocks.
local function stored(store, blocks, k, from, shape)
  return setmetatable({ store = store, blocks = blocks, k = k, from = from, shape = shape,
    dtype = "f32", device = "cpu" }, Stored)
end

function Stored:numel() return tensor.numel_of(self.shape) end

--- The same elements in another shape; -1 stands for all.
function Stored:view(...)
  local shape = { ... }
  if shape[1] == -1 then shape = { self:numel() } end
  return stored(self.store, self.blocks, self.k, self.from, shape)
end

--- The vector in stretches { block, a, b, first }: elements a to b of what the block has of it,
-- which are those from `first` on.
local function stretches(self)
  local from, to, list = self.from, self.from + self:numel(), {}
  for _, block in ipairs(self.blocks) do
    local a, stop = max(from, block.from) - block.from, min(to, block.to) - block.from
    while a < stop do
      local b = min(stop, (floor(a / STRETCH) + 1) * STRETCH)
      list[#list + 1] = { block = block, a = a, b = b, first = block.from + a - from }
      a = b
    end
  end
  return list
end

--- Begins to bring a stretch into memory, in whole pages; not where f will overwrite all of them.
local function open_stretch(store, s, k, slot, writes)
  local low, high = floor(s.a / PAGE) * PAGE, pages(s.b)
  s.buffer, s.low = aligned(high - low), low
  s.at = s.block.offset + (k * s.block.stride + low) * 4
  store:check(C.ds_offload_wait(store.file, slot))
  if not writes or low < s.a or s.b < high then
    store:check(C.ds_offload_read(store.file, slot, s.buffer._c, s.at))
  end
end

--- While one stretch is with f, the next is read and the one before is written, by turns in two
-- slots.
local function visit(self, f, writes)
  local store, list = self.store, stretches(self)
  local function give(t, at, s) f(slice_flat(t, at, { s.b - s.a }), s.first) end
  local function open(i)
    if list[i] and not list[i].block.resident then
      open_stretch(store, list[i], self.k, store.slots + i % 2, writes)
    end
  end
  open(1)
  for i, s in ipairs(list) do
    open(i + 1)
    if s.block.resident then
      scope.no_grad(give, s.block.resident, self.k * s.block.stride + s.a, s)
    else
      local slot = store.slots + i % 2
      store:check(C.ds_offload_wait(store.file, slot))
      scope.no_grad(give, s.buffer, s.a - s.low, s)
      if writes then store:check(C.ds_offload_write(store.file, slot, s.buffer._c, s.at)) end
      scope.release(s.buffer, "when its stretch was done with") -- a write holds what it needs
    end
  end
end

--- Calls f(t, first) for stretches of the vector, in order: t has its elements from `first` on
-- (0-based), for the length of the call. `writes`: what f leaves in t is kept.
function Stored:each(f, writes)
  local store = self.store
  store:alive()
  local ok, message = xpcall(visit, border.note, self, f, writes)
  for slot = store.slots, store.slots + 1 do
    local code = store.file and C.ds_offload_wait(store.file, slot) or 0
    if ok then store:check(code) end
  end
  if not ok then error(message, 0) end
end

--- n elements from element `offset` (0-based) on, as `shape`: of a dense tensor, or a vector on the
-- disk.
function M.slice(t, offset, shape)
  if getmetatable(t) ~= Stored then return slice_flat(t:view(-1), offset, shape) end
  return stored(t.store, t.blocks, t.k, t.from + offset, shape)
end

--- Calls f(t, first) for a tensor as a whole (first = 0), for a vector on the disk by stretches.
-- @tparam Tensor|Stored t
-- @tparam function f
-- @tparam[opt] boolean writes f changes its tensor
function M.each(t, f, writes)
  if getmetatable(t) ~= Stored then return f(t, 0) end
  t:each(f, writes)
end

--- Drops a tensor's memory, as scope.release; a vector on the disk goes with its store.
function M.release(t, why)
  if getmetatable(t) ~= Stored then scope.release(t, why) end
end

--- Whether it is a vector on the disk.
function M.is_stored(t) return getmetatable(t) == Stored end

-- ---- the file

local Store = {}
Store.__index = Store

--- What `offload_optimizer` and `aio` of a config ask for.
-- @tparam table config the engine's
-- @tparam string device the engine's
-- @treturn Store|nil where the optimizer's vectors lie, still without a file; nil: beside the
--   weights
function M.new(config, device)
  local wanted = config.zero_optimization.offload_optimizer
  if not wanted or wanted.device == "none" then return nil end
  if device == "cpu" and wanted.device == "cpu" then
    log.info("offload_optimizer.device \"cpu\": that is where the optimizer's state is anyway")
    return nil
  end
  local count = wanted.buffer_count
  local aio = config.aio
  local host = device == "cuda" and require "ds.offload_host"
  local self = setmetatable({
    border = host and host.new(), path = wanted.nvme_path, ratio = wanted.ratio, slots = count,
    block = max(PAGE, min(BLOCK, floor(config.zero_optimization.sub_group_size / PAGE) * PAGE)),
    -- a block is updated and, unless each is waited for, one is written; the others read ahead
    ahead = wanted.pipeline_read and max(min(1, count - 1), count - (wanted.pipeline_write and 2
      or 1)) or 0,
    write_behind = wanted.pipeline_write,
    aio = ffi.new("ds_aio", aio.block_size, aio.queue_depth, aio.intra_op_parallelism,
      aio.single_submit and 1 or 0, aio.overlap_events and 1 or 0),
    blocks = {}, elements = 0, bytes = 0, most_buffers = 0, place = "initialize",
  }, Store)
  if wanted.device == "cpu" then self.in_memory, self.block = true, host.BLOCK end
  return self
end

--- Raises what went wrong with a transfer, from then on: what is on the disk can't be told.
function Store:check(code)
  if code >= 0 then return end
  local ok, message = pcall(check, code, self.place .. ": the optimizer's state")
  self.broken = not ok and message
  error(message, 0)
end

--- Raises where there is nothing to be had any more.
function Store:alive()
  if self.broken then
    raise("the optimizer's state was lost (%s); make a new engine, and load the last checkpoint",
      self.broken)
  end
end

--- Cuts a segment's vectors into blocks, of which a share of `ratio` has its place in the file.
local function cut(self, s, vectors, whole)
  local n, blocks = s.to - s.from, {}
  local most = whole and max(1, n) or self.block
  for from = 0, n - 1, most do
    local to = min(n, from + most)
    local block = { segment = s, vectors = vectors, from = from, to = to,
      stride = pages(to - from), offset = self.bytes }
    self.elements = self.elements + block.stride * #vectors
    blocks[#blocks + 1], self.blocks[#self.blocks + 1] = block, block
    if self.in_memory then
      block.resident = true
    elseif self.bytes / 4 < self.ratio * self.elements then
      self.bytes = self.bytes + block.stride * #vectors * 4
    else
      local host = { dtype = "f32", device = "cpu" }
      block.resident = tensor.zeros(block.stride * #vectors, host):keep()
    end
  end
  return blocks
end

--- Puts vector `name` of a segment, or of a part of one, in its place.
local function put(s, name, vector)
  if name == MASTER then s.p = vector else s.state[name] = vector end
end

--- Where state begins with another number than 0.
local function fill(segments, groups)
  for _, s in ipairs(segments) do
    local group = groups[s.group]
    for name, setting in pairs(group.rule.initial or {}) do
      local value = group[setting]
      if value ~= 0 then M.each(s.state[name], function(t) t:fill_(value) end, true) end
    end
  end
end

local function in_host(shape)
  return tensor.zeros(shape, { dtype = "f32", device = "cpu" }):keep()
end

--- The file, for what was cut.
local function open(self)
  local slot = ffi.new("ds_offload *[1]")
  check(C.ds_offload_open(slot, self.path, self.bytes, self.slots + 2, self.aio),
    "offload_optimizer.nvme_path")
  self.file = ffi.gc(slot[0], C.ds_offload_close)
  local c = self:counters()
  log.info("%s of the optimizer's state in '%s' (%s%s)", tensor.bytes_string(self.bytes),
    self.path, c.ringed and "io_uring" or c.threads .. " threads",
    c.direct and ", O_DIRECT" or "")
end

--- Takes over the vectors of segments that have no p yet (where there is a copy in low precision)
-- and no state: makes the file, and leaves Stored vectors in their place; in memory, tensors.
-- @tparam table segments
-- @tparam table groups the optimizer's: group.rule.state names the vectors
function Store:lay(segments, groups)
  for _, s in ipairs(segments) do
    local rule = groups[s.group].rule
    local vectors = { unpack(rule.state) }
    if s.low then table.insert(vectors, 1, MASTER) end
    local blocks = cut(self, s, vectors, rule.granularity ~= "flat")
    s.state = {}
    for i, name in ipairs(vectors) do
      put(s, name, self.in_memory and in_host(s.shape) or stored(self, blocks, i - 1, 0, s.shape))
    end
  end
  self.file_blocks = {}
  for _, block in ipairs(self.blocks) do
    if not block.resident then self.file_blocks[#self.file_blocks + 1] = block end
  end
  if self.in_memory then
    log.info("%s of the optimizer's state in host memory", tensor.bytes_string(self.elements * 4))
  end
  if self.bytes > 0 then open(self) end
  fill(segments, groups)
end

-- ---- an update

--- A block as a segment of its own.
-- @tparam table block
-- @tparam Tensor buffer where the vectors are that have no place in memory; nil: they have
-- @tparam[opt] Tensor g its gradient, and its weights, where they are not the segment's own
-- @tparam[opt] Tensor weights
local function part_of(block, buffer, g, weights)
  local s, from, n = block.segment, block.from, block.to - block.from
  local shape = n == s.to - s.from and s.shape or { n }
  local part = setmetatable({ state = {} }, { __index = s })
  part.g = g and slice_flat(g, 0, shape) or slice_flat(s.g, from, shape)
  weights = weights and slice_flat(weights, 0, shape) or slice_flat(s.low or s.p, from, shape)
  if s.low then part.low = weights else part.p = weights end
  for i, name in ipairs(block.vectors) do
    put(part, name, buffer and slice_flat(buffer, (i - 1) * block.stride, shape)
      or slice_flat(name == MASTER and s.p or s.state[name], from, shape))
  end
  return part
end

--- Updates block number i, whose vectors are in memory now.
local function update_block(self, i, buffer, update)
  local across, block = self.border, self.blocks[i]
  if not across then return scope.no_grad(function() update(part_of(block, buffer)) end) end
  if self.blocks[i + 1] then across:fetch(i + 1, self.blocks[i + 1]) end
  scope.no_grad(function() update(part_of(block, buffer, across:take(i))) end)
  across:send(i, block)
end

--- Waits until the slot is free, and lets go of its buffer.
local function free(self, slot)
  self:check(C.ds_offload_wait(self.file, slot))
  if self.buffers[slot] then
    scope.release(self.buffers[slot], "when its block was on the disk")
    self.buffers[slot] = nil
  end
end

local function fetch(self, i)
  local block, slot = self.file_blocks[i], (i - 1) % self.slots
  free(self, slot)
  local buffer = aligned(block.stride * #block.vectors)
  self.buffers[slot] = buffer
  local n = 0
  for _ in pairs(self.buffers) do n = n + 1 end
  self.most_buffers = max(self.most_buffers, n)
  self:check(C.ds_offload_read(self.file, slot, buffer._c, block.offset))
end

local function stream(self, update)
  local read, reached = 0, 0 -- of file_blocks: how many were begun to be read, and were needed
  if self.border and self.blocks[1] then self.border:fetch(1, self.blocks[1]) end
  for i, block in ipairs(self.blocks) do
    if block.resident then
      update_block(self, i, not self.in_memory and block.resident, update)
    else
      while read < min(#self.file_blocks, reached + 1 + self.ahead) do
        read = read + 1
        fetch(self, read)
      end
      local slot = reached % self.slots
      reached = reached + 1
      self:check(C.ds_offload_wait(self.file, slot))
      update_block(self, i, self.buffers[slot], update)
      self:check(C.ds_offload_write(self.file, slot, self.buffers[slot]._c, block.offset))
      if not self.write_behind then free(self, slot) end
    end
  end
  for slot = 0, self.file and self.slots - 1 or -1 do free(self, slot) end
  if self.border then self.border:finish() end
end

--- Runs update(segment) for all segments, in parts that are in the host's memory for the length of
-- the call: of flat segments their blocks, else whole ones. When it returns, all is in the file,
-- and weights are on their way to where they belong. After an error in between vectors on a disk
-- are good for nothing, and every later use says so.
function Store:stream(update)
  self:alive()
  self.buffers = {}
  local ok, message = xpcall(tensor.on, border.note, "cpu", stream, self, update)
  if ok then return end
  for slot = 0, self.file and self.slots - 1 or -1 do C.ds_offload_wait(self.file, slot) end
  if self.border then self.border:drain() end
  self.broken = self.broken or not self.in_memory and message
  error(message, 0)
end

--- What was moved so far.
-- @treturn table requests `reads` and `writes`, `bytes_read`, `bytes_written`; `submits`: calls to
-- the system that started requests; `refills`: times that requests were started while others were
-- under way; `most_under_way`, `threads`; `ringed`: by io_uring; `direct`: past the page cache;
-- `most_buffers`: blocks in memory at a time
function Store:counters()
  local c, out = ffi.new "ds_offload_counters", { most_buffers = self.most_buffers }
  if self.file then C.ds_offload_count(c, self.file) end
  for _, name in ipairs { "reads", "writes", "bytes_read", "bytes_written", "submits", "refills",
    "most_under_way", "threads" } do
    out[name] = tonumber(c[name])
  end
  out.ringed, out.direct = c.ringed == 1, c.direct == 1
  return out
end

--- Gives the disk back, and what transfers went through; the vectors are gone.
function Store:close()
  if self.border then self.border:close() end
  if self.file then C.ds_offload_close(ffi.gc(self.file, nil)) end
  self.file, self.broken = nil, "the engine was destroyed"
end

return M
