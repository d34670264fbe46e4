--- The trained parameters as the optimizer sees them: flat buffers, of which each rank owns parts.
--
-- Every parameter group is one buffer of weights and one of gradients, cut into buckets, each cut
-- into a part a rank (the map is C's, runner/zero.h). At stage 0 every rank updates everything, at
-- stage 1 its own parts: only for those it keeps an fp32 master and the optimizer's state.
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

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice = tensor.view.slice_flat
local min, max = math.min, math.max

local M = {}

local Zero = {}
Zero.__index = Zero

-- Buckets unless the config says how large: about eight, so that reducing one can overlap with what
-- makes the next, none so small that starting the exchange would take longer than the exchange.
local BUCKETS, SMALLEST = 8, 2 ^ 20

local function bucket_numel(total, ranks, wanted)
  if ranks == 1 then return max(1, total) end
  return max(1, min(wanted, max(SMALLEST, math.ceil(total / BUCKETS))))
end

--- Parameters in the order of their creation, group by group, and the map over them.
local function make_map(self, groups, wanted)
  local numel, group_of, total = {}, {}, 0
  for g, group in ipairs(groups) do
    table.sort(group.params, function(a, b) return a._parameter < b._parameter end)
    for _, p in ipairs(group.params) do
      if p._engine then raise("initialize: a parameter belongs to another engine already") end
      self.params[#self.params + 1] = p
      numel[#self.params], group_of[#self.params] = p:numel(), g - 1
      total = total + p:numel()
    end
  end
  local n, whole = #self.params, ffi.new("int32_t[?]", #groups)
  for g, group in ipairs(groups) do
    self.whole[g] = group.rule.granularity ~= "flat"
    whole[g - 1] = self.whole[g] and 1 or 0
  end
  local box = ffi.new("ds_zero *[1]")
  check(C.ds_zero_make(box, n, ffi.new("int64_t[?]", n, numel), ffi.new("int32_t[?]", n, group_of),
    whole, #groups, self.ranks, bucket_numel(total, self.ranks, wanted)), "initialize")
  self.map = ffi.gc(box[0], C.ds_zero_free)
  for i, p in ipairs(self.params) do
    p._flat = { group = group_of[i] + 1, offset = tonumber(C.ds_zero_offset(self.map, i - 1)),
      numel = numel[i] }
  end
end

local function make_buffers(self, count)
  for g = 1, count do
    local n = tonumber(C.ds_zero_group_numel(self.map, g - 1))
    local function buffer(dtype)
      return tensor.zeros(n, { dtype = dtype, device = self.device }):keep()
    end
    self.flat[g] = { weights = buffer(self.dtype), grad = buffer(self.grad_dtype) }
  end
end

--- Moves the parameters into the buffers.
local function move_in(self)
  for _, p in ipairs(self.params) do
    local flat, at = self.flat[p._flat.group], p._flat.offset
    local weight = slice(flat.weights, at, p.shape)
    run("copy", self.device, weight._c, p._c)
    if self.dtype ~= "f32" then
      local values = p:detach():contiguous():view(-1)
      self:each_piece(p, function(piece, from)
        run("copy", self.device, piece._c, slice(values, from, piece.shape)._c)
      end)
    end
    p.requires_grad = false
    tensor.repoint(p, weight)
    p.requires_grad = true
    p._fresh = true
  end
end

--- Points everything that looks at gradients to the buffers of them.
local function lay_gradients(self)
  for _, p in ipairs(self.params) do
    p.grad = slice(self.flat[p._flat.group].grad, p._flat.offset, p.shape):keep()
  end
  for _, s in ipairs(self.segments) do
    s.g = slice(self.flat[s.group].grad, s.from, s.shape):keep()
  end
  for _, b in ipairs(self.buckets) do
    local grad = self.flat[b.group].grad
    b.grad = slice(grad, b.start, { b.numel }):keep()
    b.own = b.to > b.from and slice(grad, b.from, { b.to - b.from }):keep() or nil
  end
end

--- A segment over `n` elements from `from` on, of a group's buffers; `shape` and `name` of a whole
-- tensor.
local function add_segment(self, g, from, n, shape, name)
  local flat = self.flat[g]
  shape = shape or { n }
  local weights = slice(flat.weights, from, shape):keep()
  local s = { group = g, from = from, to = from + n, shape = shape, name = name, p = weights }
  if self.dtype ~= "f32" then
    s.low = weights
    s.p = tensor.zeros(shape, { dtype = "f32", device = self.device }):keep()
  end
  self.segments[#self.segments + 1] = s
end

local function cut(self)
  local box = ffi.new("const ds_zero_bucket *[1]")
  local n = C.ds_zero_buckets(box, self.map)
  for i = 0, n - 1 do
    local b = box[0][i]
    local g, start, numel = b.group + 1, tonumber(b.start), tonumber(b.numel)
    local from, to = tonumber(b.borders[self.rank]), tonumber(b.borders[self.rank + 1])
    self.buckets[i + 1] = { borders = b.borders, group = g, start = start, numel = numel,
      from = start + from, to = start + to, -- this rank's part
      weights = slice(self.flat[g].weights, start, { numel }):keep() }
    if self.stage == 0 then from, to = 0, numel end
    if not self.whole[g] then
      if to > from then add_segment(self, g, start + from, to - from) end
    else
      for k = b.first, b.last do
        local p = self.params[k + 1]
        local at = p._flat.offset - start
        if at >= from and at < to then
          add_segment(self, g, start + at, p:numel(), p.shape, p._name)
        end
      end
    end
  end
end

--- Lays the trained parameters into flat buffers and cuts them.
-- @tparam table groups the optimizer's param_groups
-- @tparam table options dtype, grad_dtype, device, stage, reduce_bucket_size, op
--   ("mean" or "sum"), wire (dtype that gradients travel in, if another than their own)
function M.new(groups, options)
  local self = setmetatable({
    params = {}, flat = {}, buckets = {}, segments = {}, dtype = options.dtype,
    grad_dtype = options.grad_dtype, device = options.device, stage = options.stage, whole = {},
    op = options.op == "sum" and C.DS_SUM or C.DS_MEAN, world = comm.world(),
    wire = options.wire and tensor.codes[options.wire] or -1,
    rank = comm.rank(), ranks = comm.world_size(),
  }, Zero)
  make_map(self, groups, options.reduce_bucket_size)
  make_buffers(self, #groups)
  cut(self)
  lay_gradients(self)
  scope.no_grad(move_in, self)
  return self
end

--- Keeps gradients in another type from now on, those that are there included.
-- @tparam string dtype
function Zero:set_grad_dtype(dtype)
  self.grad_dtype = dtype
  scope.no_grad(function()
    for _, p in ipairs(self.params) do autograd.move_out(p) end
    for _, flat in ipairs(self.flat) do flat.grad = flat.grad:to(dtype):keep() end
    lay_gradients(self)
  end)
end

--- Calls f(piece, from, segment, at) for each stretch of parameter p that this rank's fp32 weights
-- have: `piece` is a slice of them, `from` its first element in p, `at` in the segment.
function Zero:each_piece(p, f)
  local at = p._flat
  local first, last = at.offset, at.offset + at.numel
  for _, s in ipairs(self.segments) do
    local from, to = max(first, s.from), min(last, s.to)
    if s.group == at.group and from < to then
      f(slice(s.p:view(-1), from - s.from, { to - from }), from - first, s, from - s.from)
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
        f(slice(piece, lo - first, { hi - lo }), lo - at.offset, s, offset + lo - first)
      end
    end
  end)
end

--- Gradients of parameters that nothing reached since the last update are zero.
function Zero:complete()
  for _, p in ipairs(self.params) do
    if p._fresh then
      run("fill", self.device, p.grad._c, 0)
      p._fresh = false
    end
  end
end

--- Combines the gradients of all ranks, bucket by bucket.
function Zero:reduce()
  if self.ranks == 1 then return end
  for _, b in ipairs(self.buckets) do
    check(C.ds_reduce_parts(b.grad._c, b.borders, self.op, 1, self.wire, self.world, nil), "step")
    if self.stage == 0 then
      check(C.ds_gather_parts(b.grad._c, b.borders, self.world, nil), "step")
    end
  end
end

--- The updated weights of all ranks to all.
function Zero:gather()
  if self.ranks == 1 or self.stage == 0 then return end
  for _, b in ipairs(self.buckets) do
    check(C.ds_gather_parts(b.weights._c, b.borders, self.world, nil), "step")
  end
end

--- The flat weights of all groups.
function Zero:all_weights()
  local out = {}
  for g, flat in ipairs(self.flat) do out[g] = flat.weights end
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
