--- Batches of a dataset, in an order that can be gone on with from anywhere.
--
-- The loader's position is (epoch, offset): how many passes over the data are finished, and how
-- many samples of this one were handed out, over all ranks. Which sample comes where in an epoch
-- follows from the seed and the epoch alone (C.ds_order computes it, nothing is stored), so a
-- position is all that resuming takes, and another number of ranks goes on with what is left.
--
-- A global batch is batch_size × world_size samples of that order; ranks take contiguous slices of
-- it. At the end of an epoch fewer samples may be left:
--
--     drop_last = true     they are left out
--     next, forever        they are shared evenly; where that does not come out, samples from the
--                          epoch's beginning fill up, so that all ranks have equally many
--     epoch, batches       they are shared, and none is repeated: sums over all ranks are exact. A
--                          rank that gets none is handed one sample all the same; `count` says 0
--
-- So every rank gets the same number of batches. `loader.count` is how many samples of the last
-- batch are no repetitions, to weigh means by: sum of loss × count over sum of count, of all ranks.

local ffi = require "ffi"
local border = require "ds.ffi"
local comm = require "ds.comm"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise, note = border.C, border.check, border.raise, border.note
local shape_string = border.shape_string
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local Loader = {}
Loader.__index = Loader
local M = { Loader = Loader }

-- ---- collation: position by position, values of the samples become one tensor

local cell = ffi.new("ds_tensor")

--- Copies tensors of one shape into one [n x …].
local function stack(list, positions, place)
  local first = list[1]
  local shape = { #list, unpack(first.shape) }
  for i, t in ipairs(list) do
    tensor.need_tensor(t, "loader", i)
    local same = t.dtype == first.dtype and t.device == first.device and #t.shape == #first.shape
    for d = 1, #first.shape do same = same and t.shape[d] == first.shape[d] end
    if not same then
      raise("value %d of sample %d is %s %s, of sample %d %s %s: they do not stack; "
        .. "give the loader a collate_fn", place, positions[1], first.dtype,
        shape_string(first.shape), positions[i], t.dtype, shape_string(t.shape))
    end
  end
  local out = tensor.new(shape, first.dtype, first.device)
  for i, t in ipairs(list) do
    check(C.ds_select(cell, out._c, 0, i - 1))
    tensor.run("copy", out.device, cell, t._c)
    C.ds_release(cell)
  end
  return out
end

local function kind_of(value)
  return tensor.is_tensor(value) and "tensor" or type(value)
end

--- The default collation: numbers become f32 [n], booleans bool, tensors are stacked, tables of
-- numbers become f32 tensors and are stacked.
-- @tparam table samples each { n = number of values, … }
-- @tparam table positions their numbers in the dataset, for messages
local function collate(samples, positions)
  local out, width = {}, samples[1].n
  for place = 1, width do
    local list, kind = {}, kind_of(samples[1][place])
    for i, sample in ipairs(samples) do
      local value = sample[place]
      if sample.n ~= width then
        raise("sample %d has %d values, sample %d has %d", positions[1], width, positions[i],
          sample.n)
      end
      if kind_of(value) ~= kind then
        raise("value %d of sample %d is a %s, of sample %d a %s", place, positions[1], kind,
          positions[i], kind_of(value))
      end
      list[i] = kind == "table" and tensor.tensor(value, { device = "cpu" }) or value
    end
    if kind == "number" or kind == "boolean" then
      out[place] = tensor.tensor(list, { device = "cpu" })
    elseif kind == "tensor" or kind == "table" then
      out[place] = stack(list, positions, place)
    else
      raise("value %d of sample %d is a %s; a batch is made of numbers, tensors and tables of "
        .. "numbers, or by a collate_fn", place, positions[1], kind)
    end
    if kind == "table" then
      for _, t in ipairs(list) do scope.release(t, "by the loader") end
    end
  end
  return unpack(out, 1, width)
end

local function pack(...) return { n = select("#", ...), ... } end

--- The samples at 0-based `index[0 … n-1]`, through get(i).
local function get_each(self, index, n)
  local dataset, samples, positions = self.dataset, {}, {}
  local position
  local function failed(message)
    if type(message) ~= "string" then return message end
    return note(("sample %d: %s"):format(position, message))
  end
  for k = 1, n do
    position = tonumber(index[k - 1]) + 1
    if self.world_size > 1 then
      C.ds_breadcrumb(("get(%d) of the loader"):format(position))
    end
    local got = pack(xpcall(dataset.get, failed, dataset, position))
    if not got[1] then error(got[2], 0) end
    if got[2] == nil then raise("sample %d: get(%d) returned nothing", position, position) end
    local sample = { n = got.n - 1 }
    for i = 2, got.n do sample[i - 1] = got[i] end
    samples[k], positions[k] = sample, position
  end
  C.ds_breadcrumb("")
  if not self.collate_fn then return collate(samples, positions) end
  for k, sample in ipairs(samples) do
    if sample.n == 1 then samples[k] = sample[1] end
  end
  return self.collate_fn(samples)
end

-- ---- position

--- Samples of a whole global batch.
local function global_batch(self) return self.batch_size * self.world_size end

--- (epoch, offset) itself, or the next epoch's start if no batch is left in this one.
local function settle(self, epoch, offset)
  local left = self._size - offset
  if left <= 0 or self.drop_last and left < global_batch(self) then return epoch + 1, 0 end
  return epoch, offset
end

--- This rank's share of the global batch that starts at `offset`.
-- @treturn number first place in the epoch's order; places from size on wrap around
-- @treturn number n how many
-- @treturn number count how many of them are no repetitions
local function share(self, offset, exact)
  local ranks, rank = self.world_size, self.rank
  local samples = min(global_batch(self), self._size - offset)
  if exact then
    local first = floor(samples * rank / ranks)
    local n = floor(samples * (rank + 1) / ranks) - first
    return offset + first, max(n, 1), n
  end
  local n = ceil(samples / ranks)
  return offset + rank * n, n, max(0, min(n, samples - rank * n))
end

local function order(self, epoch, first, n)
  check(C.ds_order(self._index, first, n, self._size, self.shuffle and 1 or 0, self.seed, epoch))
  return self._index
end

-- ---- batches

--- Forgets what the thread was asked for.
local function forget_ahead(self)
  if self._feed then
    C.ds_feed_flush(self._feed)
    self._asked = {}
  end
end

--- Asks the thread for batches until `depth` are under way.
local function ask_ahead(self, depth, epoch, offset, exact)
  local asked = self._asked
  local last = asked[#asked]
  if last then epoch, offset = settle(self, last.epoch, last.offset + global_batch(self)) end
  while #asked < depth do
    local first, n = share(self, offset, exact)
    check(C.ds_feed_push(self._feed, order(self, epoch, first, n), n))
    asked[#asked + 1] = { epoch = epoch, offset = offset, exact = exact }
    epoch, offset = settle(self, epoch, offset + global_batch(self))
  end
end

--- The batch at the loader's position from the thread, which is then asked for those that follow.
local function take_ahead(self, n, exact)
  local head = self._asked[1]
  if head and (head.epoch ~= self._epoch or head.offset ~= self._offset or head.exact ~= exact) then
    forget_ahead(self)
  end
  ask_ahead(self, 1, self._epoch, self._offset, exact)
  table.remove(self._asked, 1)
  local shape = { n, self.dataset.length }
  local x, y = tensor.new(shape, "i32", "cpu"), tensor.new(shape, "i32", "cpu")
  check(C.ds_feed_take(x._c, y._c, self._feed))
  local epoch, offset = settle(self, self._epoch, self._offset + global_batch(self))
  ask_ahead(self, self.prefetch, epoch, offset, exact)
  return x, y
end

--- A dataset's own way to make a batch, from a table of positions.
local function own_batch(self, index, n)
  local positions = {}
  for k = 1, n do positions[k] = tonumber(index[k - 1]) + 1 end
  return self.dataset:batch(positions)
end

--- The batch was made: the position moves on. Not before, so that after an error one can try again.
local function advance(self, count, ...)
  if (...) == nil then
    raise("%s returned nothing for a batch",
      self.collate_fn and "collate_fn" or "the dataset's batch()")
  end
  self.count = count
  self._epoch, self._offset = settle(self, self._epoch, self._offset + global_batch(self))
  return ...
end

--- The batch at the position, on the host.
-- @treturn number how many of its samples are no repetitions
-- @return its values
local function make(self, exact)
  local first, n, count = share(self, self._offset, exact)
  if self._feed then return count, take_ahead(self, n, exact) end
  local index = order(self, self._epoch, first, n)
  if self._make == "gather" then return count, self.dataset:_gather(index, n) end
  if self._make == "batch" then return count, own_batch(self, index, n) end
  return count, get_each(self, index, n)
end

local function made(self, count, ...)
  if self._ahead then return advance(self, count, self._ahead:move(...)) end
  return advance(self, count, ...)
end

--- Makes the batch at the position and starts its way to the device. Where that fails, it will fail
-- again when the batch is wanted, and is told then.
local function send_ahead(self, exact)
  local got = pack(pcall(make, self, exact))
  if not got[1] then return forget_ahead(self) end
  self._ahead:put({ epoch = self._epoch, offset = self._offset, exact = exact, count = got[2] },
    { n = got.n - 2, unpack(got, 3, got.n) })
end

local function then_send(self, exact, ...)
  send_ahead(self, exact)
  return ...
end

local function fetch(self, exact)
  local ahead = self._ahead
  if not ahead or not (self._feed or self._make == "gather") then
    return made(self, make(self, exact))
  end
  local place = ahead:take(self._epoch, self._offset, exact)
  if not place then return then_send(self, exact, made(self, make(self, exact))) end
  return then_send(self, exact, advance(self, place.count, unpack(place.batch, 1, place.batch.n)))
end

--- The next batch; after the last of an epoch comes the first of the next, in a new order.
-- @return what the dataset's samples hold, each stacked: x, y
function Loader:next() return fetch(self, false) end

--- `for x, y in loader do`: a loader is no iterator, it has several.
function Loader.__call()
  raise("loader: it is no iterator; one pass is `for x, y in loader:epoch() do`, no end has "
    .. "loader:forever(), one batch is loader:next()")
end

--- Batches without end: `for x, y in loader:forever() do … end`.
function Loader:forever()
  return function() return fetch(self, false) end
end

--- The batches from where the loader stands to the end of that epoch: a whole one, or, after a
-- resume or a `break`, the rest of it. `loader:seek(0)` starts over.
-- @usage for epoch = loader:state().epoch + 1, 10 do for x, y in loader:epoch() do … end end
function Loader:epoch()
  local epoch = self._epoch
  return function()
    if self._epoch == epoch then return fetch(self, true) end
  end
end

--- The same as tables: { n = number of values, samples = as `count`, x, y, … }.
-- @usage for b in loader:batches() do total = total + loss_of(unpack(b)) * b.samples end
function Loader:batches()
  local epoch = self._epoch
  return function()
    if self._epoch ~= epoch then return nil end
    local batch = pack(fetch(self, true))
    batch.samples = self.count
    return batch
  end
end

--- How many batches a whole epoch has.
function Loader:len()
  return (self.drop_last and floor or ceil)(self._size / global_batch(self))
end

--- Samples of a whole epoch, over all ranks.
local function per_epoch(self)
  return self.drop_last and self:len() * global_batch(self) or self._size
end

--- Samples handed out so far, over all ranks and epochs.
function Loader:position() return self._epoch * per_epoch(self) + self._offset end

local function whole(x) return type(x) == "number" and x % 1 == 0 and x >= 0 and x <= 2 ^ 53 end

--- Goes to where `samples` samples have been handed out, over all ranks and epochs.
function Loader:seek(samples)
  if not whole(samples) then
    raise("seek: expects how many samples to pass over, a whole number, not %s", tostring(samples))
  end
  local epoch = floor(samples / per_epoch(self))
  self._epoch, self._offset = settle(self, epoch, samples - epoch * per_epoch(self))
  return self
end

--- The position as plain data, for a checkpoint; the same on every rank.
-- @treturn table { seed, epoch, offset, size, shuffle }
function Loader:state()
  return { seed = self.seed, epoch = self._epoch, offset = self._offset, size = self._size,
    shuffle = self.shuffle }
end

--- Goes on where `state` was taken, with its seed; batch_size and the number of ranks may differ.
function Loader:load_state(state)
  if type(state) ~= "table" then
    raise("load_state: expects the table that loader:state() made, not a %s", type(state))
  end
  for _, key in ipairs { "epoch", "offset", "size" } do
    if not whole(state[key]) then
      raise("load_state: %s must be a whole number, not %s", key, tostring(state[key]))
    end
  end
  if type(state.seed) ~= "number" or state.seed % 1 ~= 0 then
    raise("load_state: seed must be a whole number, not %s", tostring(state.seed))
  end
  if state.size ~= self._size then
    raise("load_state: the dataset has %d samples, the saved position is in one of %d", self._size,
      state.size)
  end
  if state.shuffle ~= self.shuffle then
    raise("load_state: the saved position is of a loader with shuffle = %s, this one has %s",
      tostring(state.shuffle), tostring(self.shuffle))
  end
  if state.offset > state.size then
    raise("load_state: offset %d lies beyond the dataset's %d samples", state.offset, state.size)
  end
  self.seed = state.seed
  self._epoch, self._offset = settle(self, state.epoch, state.offset)
  forget_ahead(self)
  if self._ahead then self._ahead:take() end
  return self
end

function Loader:__tostring()
  local ranks = self.world_size > 1 and (" on each of %d ranks"):format(self.world_size) or ""
  return ("loader: %d samples in %d batches of %d%s"):format(self._size, self:len(),
    self.batch_size, ranks)
end

-- ---- making one

local options_text =
  "batch_size, shuffle, seed, drop_last, rank, world_size, collate_fn, prefetch, device"
local known = {}
for key in options_text:gmatch "[%w_]+" do known[key] = true end

local function check_options(o)
  for _, key in ipairs { "batch_size", "world_size" } do
    if not whole(o[key]) or o[key] < 1 then
      raise("loader: %s must be a whole number of at least 1, not %s", key, tostring(o[key]))
    end
  end
  if not whole(o.rank) or o.rank >= o.world_size then
    raise("loader: rank must be from 0 to %d, not %s", o.world_size - 1, tostring(o.rank))
  end
  if type(o.seed) ~= "number" or o.seed % 1 ~= 0 then
    raise("loader: seed must be a whole number, not %s", tostring(o.seed))
  end
  if o.device ~= nil and o.device ~= "cpu" and o.device ~= "cuda" and o.device ~= "meta" then
    raise("loader: unknown device '%s'; there are cpu and cuda", tostring(o.device))
  end
  for _, key in ipairs { "shuffle", "drop_last" } do
    if type(o[key]) ~= "boolean" then
      raise("loader: %s must be true or false, not %s", key, tostring(o[key]))
    end
  end
  if o.collate_fn ~= nil and type(o.collate_fn) ~= "function" then
    raise("loader: collate_fn must be a function, not a %s", type(o.collate_fn))
  end
end

--- The size of what claims to be a dataset.
local function size_of(dataset)
  if type(dataset) ~= "table" or tensor.is_tensor(dataset) then
    raise("loader: the dataset must be an object with size() and get(i), not a %s%s",
      kind_of(dataset), tensor.is_tensor(dataset) and "; use ds.data.tensors(x, y)" or "")
  end
  for _, name in ipairs { "size", "get" } do
    if type(dataset[name]) ~= "function" then
      raise("loader: the dataset has no method %s()%s", name,
        #dataset > 0 and "; use ds.data.list(t) for a plain list" or "")
    end
  end
  local size = dataset:size()
  if not whole(size) then
    raise("loader: the dataset's size() must return a whole number, not %s", tostring(size))
  end
  if size == 0 then raise("loader: the dataset is empty") end
  return size
end

--- Decides how batches are made: by the thread, by the dataset, or from get(i).
local function choose_way(self, asked)
  local dataset = self.dataset
  local ahead = not self.collate_fn and dataset._feed ~= nil
  self.prefetch = asked or (ahead and dataset.prefetch) or 0
  if not whole(self.prefetch) or self.prefetch > 4096 then
    raise("loader: prefetch must be a number of batches from 0 to 4096, not %s", tostring(asked))
  end
  if self.prefetch > 0 and not ahead then
    raise("loader: prefetch works for text and token files without a collate_fn; leave it out")
  end
  if self.prefetch > 0 then
    self._feed, self._asked = dataset:_feed(self.batch_size, self.prefetch), {}
  elseif not self.collate_fn then
    self._make = dataset._gather and "gather" or dataset.batch and "batch"
  end
end

--- A loader over a dataset: any object with `size()` and `get(i)`, i from 1 to size(). get returns
-- one value or several; each is collated over the batch: numbers to f32 (`ds.tensor({…}, "i64")`
-- keeps whole ones whole), tensors stacked. A dataset with `batch(positions)` makes batches itself.
-- @tparam table dataset
-- @tparam[opt] table options
--   batch_size (1): samples a rank;
--   shuffle (true): a new order in each epoch, from seed (0) and epoch;
--   drop_last (false);
--   rank, world_size (those of the job);
--   collate_fn: list of samples → batch; a sample is what get returned, a table if that is several;
--   prefetch: batches that a thread gathers ahead, 4 for token files and 0 for a text in memory;
--   device (the default one): where batches go; to a GPU they are uploaded while it works
-- @usage local loader = ds.data.loader(train, { batch_size = 12, seed = 1337 })
function M.loader(dataset, options)
  if options ~= nil and type(options) ~= "table" then
    raise("loader: options must be a table, not a %s", type(options))
  end
  local self = { dataset = dataset, count = 0, batch_size = 1, shuffle = true, seed = 0,
    drop_last = false, rank = comm.rank(), world_size = comm.world_size(), _epoch = 0, _offset = 0 }
  for key, value in pairs(options or {}) do
    if not known[key] then
      raise("loader: unknown option '%s'; there are %s", tostring(key), options_text)
    end
    self[key] = value
  end
  check_options(self)
  self._size = size_of(dataset)
  if self.drop_last and self._size < global_batch(self) then
    raise("loader: the dataset has %d samples, fewer than one batch of %d (batch_size %d x %d "
      .. "ranks), and drop_last leaves out what makes no whole batch", self._size,
      global_batch(self), self.batch_size, self.world_size)
  end
  self._index = ffi.new("int64_t[?]", self.batch_size)
  choose_way(self, self.prefetch)
  self.device = self.device or tensor.default_device
  if self.device == "cuda" then self._ahead = require("ds.loader_ahead").new(self.device) end
  return setmetatable(self, Loader)
end

return M
