--- The trained parameters as the optimizer sees them: flat buffers, of which each rank owns parts.
--
-- Every parameter group is laid out as one vector, cut into buckets, each cut into a part a rank
-- (the map is C's, runner/zero.h, and the same at all stages). What a rank keeps whole, and what
-- only of its own parts, is the stage:
--
--     0    everything whole; every rank updates everything
--     1    fp32 master and optimizer state of its own parts, which it updates
--     2    gradients, too: reduced bucket by bucket while backward runs (zero_grads.lua)
--     3    weights, too: gathered where they are used (zero_params.lua)
--
--     reduce()   gradients of all ranks are combined: at a part's owner, or at stage 0 everywhere
--     agree()    the global norm, and what must happen on all ranks at this step
--     gather()   after the optimizer's step: every rank gets the weights that the others updated
--
-- What the optimizer works on is a list of segments, { group, p, g, low, state }: fp32 weights,
-- their gradient, the copy of lower precision (nil where the weights are fp32), its own vectors. A
-- segment is a part of a bucket; for optimizers that need whole tensors one of those, in its shape.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local comm = require "ds.comm"
local offload = require "ds.offload"
local shared = require "ds.shared"
local zero_grads = require "ds.zero_grads"

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice = tensor.view.slice_flat
local min, max, floor, ceil = math.min, math.max, math.floor, math.ceil

local M = {}

local Zero = {}
Zero.__index = Zero
zero_grads.extend(Zero)

-- A bucket is at most so many elements, or one parameter: what is reduced, gathered and, at stage
-- 3, whole at a time. Exchanging as much takes far longer than to start the exchange, which between
-- GPUs takes more.
local BUCKET = 2 ^ 20
local CUDA_BUCKET = 2 ^ 23
M.BUCKET, M.CUDA_BUCKET = BUCKET, CUDA_BUCKET
local ALIGN = 16 -- elements: DS_ZERO_ALIGN of runner/zero.h

-- ---- the map

--- The parameters of a group: small ones first, as backward ends there; each kind by creation.
local function in_order(params, is_small)
  table.sort(params, function(a, b)
    if is_small[a] ~= is_small[b] then return is_small[a] end
    return a._parameter < b._parameter
  end)
end

--- Those with few elements, which stage 3 leaves whole; at every stage, so that all have one map.
local function small_ones(groups, options)
  local found, is_small, left = {}, {}, options.most_small or math.huge
  for _, group in ipairs(groups) do
    for _, p in ipairs(group.params) do found[#found + 1] = p end
  end
  table.sort(found, function(a, b) return a._parameter < b._parameter end)
  for _, p in ipairs(found) do
    local n = p:numel()
    is_small[p] = n < options.small and n <= left
    if is_small[p] then left = left - n end
  end
  return is_small
end

local function make_map(self, groups, options)
  local is_small = small_ones(groups, options)
  local numel, group_of, small, total = {}, {}, {}, 0
  for g, group in ipairs(groups) do
    in_order(group.params, is_small)
    for _, p in ipairs(group.params) do
      if p._engine then raise("initialize: a parameter belongs to another engine already") end
      local i = #self.params + 1
      self.params[i] = p
      numel[i], group_of[i], small[i] = p:numel(), g - 1, is_small[p] and 1 or 0
      total = total + p:numel()
    end
  end
  local n, whole = #self.params, ffi.new("int32_t[?]", #groups)
  for g, group in ipairs(groups) do
    self.whole[g] = group.rule.granularity ~= "flat"
    whole[g - 1] = self.whole[g] and 1 or 0
  end
  local most = self.ranks == 1 and max(1, total)
    or options.contiguous == false and 1
    or min(options.reduce_bucket_size, self.device == "cuda" and CUDA_BUCKET or BUCKET)
  local box = ffi.new("ds_zero *[1]")
  check(C.ds_zero_make(box, n, ffi.new("int64_t[?]", n, numel), ffi.new("int32_t[?]", n, group_of),
    ffi.new("int32_t[?]", n, small), whole, #groups, self.ranks, most,
    options.round_robin and 1 or 0), "initialize")
  self.map = ffi.gc(box[0], C.ds_zero_free)
  for i, p in ipairs(self.params) do
    p._flat = { group = group_of[i] + 1, offset = tonumber(C.ds_zero_offset(self.map, i - 1)),
      numel = numel[i] }
  end
  return is_small
end

--- The buckets, in the order in which backward completes them: that of their first parameters,
-- backwards.
local function make_buckets(self, is_small)
  local box = ffi.new("const ds_zero_bucket *[1]")
  local n = C.ds_zero_buckets(box, self.map)
  for i = 0, n - 1 do
    local c = box[0][i]
    local start, numel = tonumber(c.start), tonumber(c.numel)
    local b = { borders = c.borders, group = c.group + 1, start = start, numel = numel,
      from = start + tonumber(c.borders[self.rank]),
      to = start + tonumber(c.borders[self.rank + 1]),
      params = {}, created = math.huge, small = is_small[self.params[c.first + 1]] }
    for k = c.first, c.last do
      local p = self.params[k + 1]
      b.params[#b.params + 1] = p
      b.created = min(b.created, p._parameter)
      p._flat.bucket = b
    end
    self.buckets[i + 1] = b
  end
  table.sort(self.buckets, function(a, b) return a.created > b.created end)
  for i, b in ipairs(self.buckets) do b.index = i end
end

-- ---- buffers

--- One buffer a group, with room for `size(b)` elements of each of its buckets.
-- @tparam[opt] table home where they lie, if not on the device (offload_param.lua)
-- @treturn table the buffers by group
-- @treturn table by bucket, its slice; nil where it has none
local function buffers(self, dtype, size, home)
  local length, at, by_group, by_bucket = {}, {}, {}, {}
  for _, b in ipairs(self.buckets) do
    at[b] = length[b.group] or 0
    length[b.group] = at[b] + size(b)
  end
  for g, n in pairs(length) do
    by_group[g] = home and home:vector(n, dtype) or shared.zeros({ n }, dtype, self.device):keep()
  end
  for b, from in pairs(at) do
    local n = size(b)
    by_bucket[b] = n > 0 and slice(by_group[b.group], from, { n }):keep() or nil
  end
  return by_group, by_bucket
end

local function whole_size(b) return b.numel end
local function own_size(b) return b.to - b.from end

--- This rank's part of a whole bucket.
local function own_part(b, t)
  return b.to > b.from and slice(t, b.from - b.start, { b.to - b.from }):keep() or nil
end

--- Whether a bucket's weights are sharded.
local function is_sharded(self, b) return (self.stage == 3 or self.home) and not b.small end

local function lay_weights(self)
  local shards, wholes
  self.weights, wholes = buffers(self, self.dtype, function(b)
    return is_sharded(self, b) and 0 or b.numel
  end)
  self.shards, shards = buffers(self, self.dtype, function(b)
    return is_sharded(self, b) and own_size(b) or 0
  end, self.home)
  for _, b in ipairs(self.buckets) do
    b.weights = wholes[b]
    b.own_weights = shards[b] or b.weights and own_part(b, b.weights)
  end
end

--- Points everything that looks at gradients to the buffers of them.
local function lay_gradients(self)
  local by_bucket
  if self.stage >= 2 then
    self.grads, by_bucket = buffers(self, self.grad_dtype, own_size)
    for _, b in ipairs(self.buckets) do b.own, b.fresh = by_bucket[b], true end
  else
    self.grads, by_bucket = buffers(self, self.grad_dtype, whole_size)
    if self.early then self:lay_parts(buffers, own_size) end
    for _, b in ipairs(self.buckets) do
      b.grad = by_bucket[b]
      b.own = b.grad and own_part(b, b.grad)
      for _, p in ipairs(b.params) do
        p.grad = slice(b.grad, p._flat.offset - b.start, p.shape):keep()
      end
    end
  end
  for _, s in ipairs(self.segments) do
    local b = s.bucket
    s.g = (self.stage == 0 and slice(b.grad, s.from - b.start, s.shape)
      or slice(b.own, s.from - b.from, s.shape)):keep()
  end
end

-- ---- segments

--- A segment over `n` elements from `from` on, of a bucket that this rank updates; `shape` and
-- `name` of a whole tensor.
local function add_segment(self, b, from, n, shape, name)
  shape = shape or { n }
  local weights = (self.stage == 0 and slice(b.weights, from - b.start, shape)
    or slice(b.own_weights, from - b.from, shape)):keep()
  local s = { group = b.group, bucket = b, from = from, to = from + n, shape = shape, name = name,
    p = weights, device = self.device }
  if self.dtype ~= "f32" then
    s.low = weights
    s.p = not self.store and tensor.zeros(shape, { dtype = "f32", device = self.device }):keep()
  end
  self.segments[#self.segments + 1] = s
end

local function cut(self, sub_group)
  for _, b in ipairs(self.buckets) do
    local from, to = b.from, b.to
    if self.stage == 0 then from, to = b.start, b.start + b.numel end
    if not self.whole[b.group] then
      local most = self.stage == 3 and max(16, floor(sub_group / 16) * 16) or to - from
      for at = from, to - 1, max(1, most) do add_segment(self, b, at, min(most, to - at)) end
    else
      for _, p in ipairs(b.params) do
        local at = p._flat.offset
        if at >= from and at < to then
          add_segment(self, b, at, p:numel(), p.shape, p._name)
        end
      end
    end
  end
end

-- ---- moving in

--- The fp32 values of a parameter, as they are now, to its master copy.
-- @tparam Tensor values of the parameter's shape
local function copy_master(self, p, values)
  values = values:contiguous():view(-1)
  self:each_piece(p, function(piece, from)
    offload.each(piece, function(t, first)
      run("copy", self.device, t._c, slice(values, from + first, t.shape)._c)
    end, true)
  end)
end

--- Moves the parameters of a bucket to their place in `whole`, and the values to the masters.
local function move_bucket(self, b, whole)
  for _, p in ipairs(b.params) do
    local place = slice(whole, p._flat.offset - b.start, p.shape)
    local function move()
      run("copy", self.device, place._c, p._c)
      -- no p:detach(): until it was collected it would keep the memory that p is about to leave
      if self.dtype ~= "f32" then copy_master(self, p, tensor.view.alias(p)) end
    end
    if p._unit then
      self.hold({ p }, nil, move)
      p._unit.manager:release(p)
    else
      move()
    end
    p.requires_grad = false
    tensor.repoint(p, place)
    p.requires_grad = true
    p._fresh = true
  end
end

--- What of a bucket is gathered at a time, as buckets of their own: all of it; on one rank, whose
-- bucket may be the whole model, so many parameters as a bucket has elsewhere.
local function units_of(self, b)
  if self.ranks > 1 or not b.own_weights then return { b } end
  local units, most, u = {}, self.most_gathered, nil
  for _, p in ipairs(b.params) do
    local at, last = p._flat.offset, p._flat.offset + ceil(p._flat.numel / ALIGN) * ALIGN
    if not u or last - u.start > most then
      u = { params = {}, start = at }
      units[#units + 1] = u
    end
    table.insert(u.params, p)
    u.numel, u.from, u.to = last - u.start, u.start, last
  end
  for _, unit in ipairs(units) do
    unit.borders = ffi.new("int64_t[2]", 0, unit.numel)
    unit.own_weights = slice(b.own_weights, unit.start - b.from, { unit.numel }):keep()
  end
  return units
end

local function shard_bucket(self, b)
  local unit = { numel = b.numel, borders = b.borders, from = b.from - b.start, offsets = {},
    dtype = self.dtype, shard = b.own_weights }
  for i, p in ipairs(b.params) do unit.offsets[i] = p._flat.offset - b.start end
  local whole = tensor.zeros(b.numel, { dtype = self.dtype, device = self.device })
  scope.no_grad(move_bucket, self, b, whole)
  self.sharded:adopt(self.sharded:add(b.params, unit), whole)
end

local function move_in(self)
  for _, b in ipairs(self.buckets) do
    if not is_sharded(self, b) then
      if b.weights then move_bucket(self, b, b.weights) end
    else
      for _, u in ipairs(units_of(self, b)) do scope.no_grad(shard_bucket, self, u) end
    end
  end
end

--- Whether ds.zero.init has sharded some parameter already.
local function any_unit(groups)
  for _, group in ipairs(groups) do
    for _, p in ipairs(group.params) do
      if p._unit then return true end
    end
  end
  return false
end

--- Lays the trained parameters into flat buffers and cuts them.
-- @tparam table groups the optimizer's param_groups
-- @tparam table options dtype, grad_dtype, device, stage; op ("mean" or "sum"), wire (dtype that
--   gradients travel in, if another than their own), reduce_scatter, contiguous, round_robin
--   (booleans); in elements reduce_bucket_size, allgather_bucket_size, sub_group_size, small (a
--   parameter with fewer is never split), most_small (all of those together), prefetch, max_live,
--   max_reuse; store (where the segments' own vectors lie, if not in memory: ds/offload.lua); home
--   (where sharded weights lie, if not on the device: ds/offload_param.lua; then also one rank
--   has some of them whole at a time); overlap: false: on GPUs, too, kernels wait for each exchange
function M.new(groups, options)
  local ranks = comm.world_size()
  local self = setmetatable({
    params = {}, buckets = {}, segments = {}, dtype = options.dtype,
    grad_dtype = options.grad_dtype, device = options.device,
    stage = ranks == 1 and min(1, options.stage) or options.stage, whole = {},
    op = options.op == "sum" and C.DS_SUM or C.DS_MEAN, world = shared.group(options.device),
    wire = options.wire and tensor.codes[options.wire] or -1,
    reduce_scatter = options.reduce_scatter ~= false, hold = function(_, _, f) return f() end,
    allgather_bucket_size = max(16, floor(options.allgather_bucket_size / 16) * 16),
    rank = comm.rank(), ranks = ranks, store = options.store, home = options.home,
    small = options.small, most_gathered = min(options.reduce_bucket_size, CUDA_BUCKET),
  }, Zero)
  self.overlap = ranks > 1 and self.device == "cuda" and options.overlap ~= false
  self.early = self.overlap and self.stage < 2 and (self.reduce_scatter or self.stage == 0)
  if self.stage == 3 or self.home or any_unit(groups) then
    local zero_params = require "ds.zero_params"
    self.sharded = zero_params.new { device = self.device,
      overlap = self.overlap or self.home and options.overlap ~= false,
      home = self.home, prefetch = options.prefetch,
      max_live = options.max_live, max_reuse = options.max_reuse }
    self.hold = zero_params.hold
  end
  make_buckets(self, make_map(self, groups, options))
  lay_weights(self)
  cut(self, options.sub_group_size)
  if self.store then self.store:lay(self.segments, groups) end
  lay_gradients(self)
  scope.no_grad(move_in, self)
  if self.stage >= 2 or self.early then self:watch_gradients() end
  if self.home then self.updates = self.home:updates(self, self.store) end
  return self
end

--- Keeps gradients in another type from now on, those that are there included.
-- @tparam string dtype
function Zero:set_grad_dtype(dtype)
  self.grad_dtype = dtype
  scope.no_grad(function()
    for _, p in ipairs(self.params) do autograd.move_out(p) end
    self:forget_reduced()
    local before = {}
    for i, b in ipairs(self.buckets) do before[i] = self.stage >= 2 and b.own or b.grad end
    local fresh = {}
    for i, b in ipairs(self.buckets) do fresh[i] = b.fresh end
    lay_gradients(self)
    for i, b in ipairs(self.buckets) do
      local now = self.stage >= 2 and b.own or b.grad
      if now then run("copy", self.device, now._c, before[i]._c) end
      b.fresh = fresh[i]
    end
  end)
end

--- Calls f(piece, from, segment, at) for each stretch of parameter p that this rank's fp32 weights
-- have: `piece` is a slice of them, `from` its first element in p, `at` in the segment. It may be
-- on a disk: offload.each.
function Zero:each_piece(p, f)
  if self.home then self.home:settle() end
  local at = p._flat
  local first, last = at.offset, at.offset + at.numel
  for _, s in ipairs(self.segments) do
    local from, to = max(first, s.from), min(last, s.to)
    if s.group == at.group and from < to then
      f(offload.slice(s.p, from - s.from, { to - from }), from - first, s, from - s.from)
    end
  end
end

--- The same for the stretches that this rank saves: every element is one rank's, also at stage 0.
function Zero:each_owned(p, f)
  local at = p._flat
  self:each_piece(p, function(piece, from, s, offset)
    if self.stage > 0 or self.ranks == 1 then
      return f(piece, from, s, offset)
    end
    local first = at.offset + from
    for _, b in ipairs(self.buckets) do
      local lo, hi = max(first, b.from), min(first + piece:numel(), b.to)
      if b.group == at.group and lo < hi then
        f(offload.slice(piece, lo - first, { hi - lo }), lo - at.offset, s, offset + lo - first)
      end
    end
  end)
end

--- Gradients of parameters that nothing reached since the last update are zero.
function Zero:complete()
  if self.stage >= 2 then return end
  for _, p in ipairs(self.params) do
    if p._fresh then
      run("fill", self.device, p.grad._c, 0)
      p._fresh = false
    end
  end
end

--- Names of parameters without a gradient since the last update.
function Zero:unreached()
  local names = {}
  for _, p in ipairs(self.params) do
    local reached = not p._fresh
    if self.stage >= 2 then reached = p._reached end
    if not reached then names[#names + 1] = p._name or ("number %d"):format(p._parameter) end
  end
  return names
end

--- Combines the gradients of a whole bucket.
-- @tparam table b
-- @tparam[opt] Tensor out where this rank's part goes; nil: in place, where it is then valid
-- @tparam[opt] cdata work ds_work; nil: kernels wait for it
function Zero:reduce_bucket(b, out, work)
  local op, wire, world = self.op, self.wire, self.world
  C.ds_comm_about(world, -b.index)
  if out then
    check(C.ds_reduce_part(out._c, b.grad._c, b.borders, op, 1, wire, world, work), "step")
  elseif self.reduce_scatter or self.stage == 0 then
    check(C.ds_reduce_parts(b.grad._c, b.borders, op, 1, wire, world, work), "step")
  else
    check(C.ds_all_reduce_scaled(b.grad._c, b.grad._c, op, 1, wire, world, work), "step")
  end
end

--- Combines the gradients of all ranks, bucket by bucket; at stages 2 and 3 backward did, and where
-- it has begun to below that, this is the rest.
function Zero:reduce()
  if self.ranks == 1 or self.stage >= 2 then return end
  for _, b in ipairs(self.buckets) do
    if not self:take_reduced(b) then self:reduce_bucket(b) end
    if self.stage == 0 then
      check(C.ds_gather_parts(b.grad._c, b.borders, self.world, nil), "step")
    end
  end
end

--- Stretches of a bucket of at most allgather_bucket_size, each { tensor, borders }.
local function stretches(self, b)
  if b.stretches then return b.stretches end
  b.stretches = {}
  for at = 0, b.numel - 1, self.allgather_bucket_size do
    local n = min(self.allgather_bucket_size, b.numel - at)
    local borders = ffi.new("int64_t[?]", self.ranks + 1)
    for r = 0, self.ranks do borders[r] = max(0, min(n, tonumber(b.borders[r]) - at)) end
    table.insert(b.stretches, { slice(b.weights, at, { n }):keep(), borders })
  end
  return b.stretches
end

--- The updated weights of all ranks to all, as far as they are kept whole.
function Zero:gather()
  if self.sharded then self.sharded:close_all() end
  if self.ranks == 1 or self.stage == 0 then return end
  local works = {} -- they follow each other, and kernels wait for all of them
  for _, b in ipairs(self.buckets) do
    for _, s in ipairs(b.weights and stretches(self, b) or {}) do
      local work = self.overlap and ffi.new "ds_work" or nil
      check(C.ds_gather_parts(s[1]._c, s[2], self.world, work), "step")
      works[#works + 1] = work
    end
  end
  for _, work in ipairs(works) do check(C.ds_wait(work), "step") end
end

--- Runs f(…) while these parameters are whole; at stages below 3 they always are. Every rank calls
-- it with the same parameters.
-- @tparam table params
function Zero:gathered(params, f, ...) return self.hold(params, nil, f, ...) end

--- A parameter that does not train, at stage 3: each rank keeps a share of it. What lies in host
-- memory is worth a transfer.
function Zero:shard_frozen(p)
  local least = self.home and max(self.small, self.ranks) or self.ranks
  if (self.stage == 3 or self.home) and p:numel() >= least then self.sharded:shard(p) end
end

--- Values that a script gave a parameter, to its master copy.
function Zero:take_values(p)
  if self.dtype ~= "f32" then scope.no_grad(copy_master, self, p, p:detach()) end
end

--- Leaves the parameters whole, and nothing else; in host memory, if that is where weights were.
function Zero:let_go()
  local why = "by engine:destroy()"
  if self.home then self.home:settle() end
  self:drop_gradients()
  for _, s in ipairs(self.segments) do
    scope.release(s.g, why)
    if s.low then offload.release(s.p, why) end
    for _, t in pairs(s.state or {}) do offload.release(t, why) end
  end
  if self.store then self.store:close() end
  for _, b in ipairs(self.buckets) do
    for _, t in ipairs { b.grad or false, b.own or false, b.part or false } do
      if t then scope.release(t, why) end
    end
  end
  for _, t in pairs(self.grads) do scope.release(t, why) end
  for _, t in pairs(self.parts or {}) do scope.release(t, why) end
  for _, p in ipairs(self.params) do
    p._zero, p._pending, p._reached = nil, nil, nil
    if p.grad then scope.release(p.grad, why) end
  end
  if self.sharded then self.sharded:unshard_all() end
  for _, p in ipairs(self.home and self.params or {}) do
    p.requires_grad = false
    tensor.repoint(p, p:to "cpu")
    p.requires_grad = true
  end
  for _, t in pairs(self.shards) do scope.release(t, why) end
end

--- The step is over: gradients are stale.
function Zero:end_step()
  if self.stage >= 2 then
    for _, b in ipairs(self.buckets) do b.fresh = true end
    for _, p in ipairs(self.params) do p._reached = nil end
  end
  self:forget_reduced()
  if self.sharded then self.sharded:end_step() end
end

--- The flat weights of all groups, as far as they are kept whole.
function Zero:all_weights()
  local out = {}
  for g = 1, #self.whole do out[#out + 1] = self.weights[g] end
  return out
end

local cell, sums = ffi.new("double[1]"), ffi.new("double[8]")

--- Squares of the reduced gradients, of this rank's parts: at every stage the same, so that the
-- norm has the same bits.
function Zero:sum_squares()
  local total = 0
  for _, b in ipairs(self.buckets) do
    if b.own then
      run("sum_squares", self.device, cell, b.own._c)
      total = total + cell[0]
    end
  end
  return total
end

--- Agrees with the other ranks on a control word, and adds up numbers over them.
-- @tparam cdata word ds_control
-- @treturn number… the sums of what was given, at most 8
function Zero:agree(word, ...)
  local n = select("#", ...)
  for i = 1, n do sums[i - 1] = (select(i, ...)) end
  check(C.ds_control_agree(word, sums, n, self.world), "step")
  local out = {}
  for i = 1, n do out[i] = sums[i - 1] end
  return unpack(out, 1, n)
end

return M
