--- Gradients that are reduced while backward goes on: at ZeRO stages 2 and 3, where they are whole
-- only until their bucket is reduced, and below that where exchanges overlap with kernels (GPUs).
--
-- The first gradient of a bucket makes a buffer for all of it; when no more can come, the bucket is
-- reduced, this rank's part is added to what it keeps, and the buffer goes. When that is, backward
-- tells: it counts the records that will add to a parameter (expect), and those that are done
-- (done). Buckets are reduced in one fixed order, so that all ranks do the same; a backward reduces
-- each of them, also those that it did not reach, as another rank's may have.
--
-- Where a part of the graph is only known in backward (ds.checkpoint), a bucket may be complete by
-- the count and then get more: it is reduced again, and from then on at the end.
--
-- On GPUs a bucket's reduction is only begun in backward; kernels wait for it at backward's end, or
-- before that if too many gradients are under way. At stages 0 and 1 it is begun by the backward
-- before the update, and this rank's part goes to a buffer of its own, which step() takes: the
-- gradients stay as they are until then, so that they may still change. What changed since (another
-- backward) makes the part stale, and step() reduces the bucket again.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local shared = require "ds.shared"

local C, check, run = border.C, border.check, tensor.run
local slice = tensor.view.slice_flat

local M = {}

local UNDER_WAY = 2 ^ 25 -- elements of buckets whose reduction is not waited for, at most

local methods = {}

--- Has backward tell when a parameter's gradient is complete.
function methods:watch_gradients()
  self.flights, self.under_way = {}, 0
  for _, b in ipairs(self.buckets) do
    b.pending = 0
    for _, p in ipairs(b.params) do
      p._zero, p._pending = self, 0
    end
  end
end

--- Makes the buffer for a bucket's gradients; what is not written is undefined, but for padding.
-- @tparam Tensor p a parameter of it
-- @treturn Tensor p's gradient
function methods:open_gradients(p)
  local b = p._flat.bucket
  if not b.grad then
    b.grad = scope.keep(shared.new({ b.numel }, self.grad_dtype, self.device))
    b.grad._keep = true
    for _, q in ipairs(b.params) do
      local at, n = q._flat.offset - b.start, q._flat.numel
      q.grad, q._fresh = slice(b.grad, at, q.shape):keep(), true
      local rest = (-n) % 16
      if rest > 0 then
        local padding = slice(b.grad, at + n, { rest })
        run("fill", self.device, padding._c, 0)
        scope.release(padding)
      end
    end
  end
  return p.grad
end

local function close_gradients(b)
  for _, p in ipairs(b.params) do
    scope.release(p.grad)
    p.grad, p._fresh = nil, true
  end
  if b.grad then scope.release(b.grad) end
  b.grad = nil
end

--- This rank's part of a reduced bucket's gradients, to what it has.
local function keep_own(self, b, grad)
  local fresh = b.fresh
  b.fresh = false
  if not b.own then return end
  local part = slice(grad, b.from - b.start, b.own.shape)
  if fresh then
    run("copy", self.device, b.own._c, part._c)
  else
    check(tensor.kernels(self.device).add_scaled(b.own._c, b.own._c, part._c, 1), "backward")
  end
  scope.release(part)
end

--- The reduction that was begun first: from here on kernels wait for it.
local function land(self)
  local flight = table.remove(self.flights, 1)
  self.under_way = self.under_way - flight.grad:numel()
  check(C.ds_wait(flight.work), "backward")
  if not flight.into then keep_own(self, flight.bucket, flight.grad) end
  scope.release(flight.grad)
end

--- Begins to reduce a bucket, whose gradients go when that is done.
local function take_off(self, b)
  local into = b.fresh and self.reduce_scatter and b.own or nil
  local flight = { bucket = b, grad = b.grad, into = into, work = ffi.new "ds_work" }
  self:reduce_bucket(b, into, flight.work)
  table.insert(self.flights, flight)
  self.under_way = self.under_way + b.numel
  b.grad = nil -- the flight's
  if into then b.fresh = false end
  close_gradients(b)
  while self.under_way > UNDER_WAY and #self.flights > 1 do land(self) end
end

--- What was not written is zero.
local function complete(self, b)
  for _, p in ipairs(b.params) do
    autograd.move_out(p)
    if p._fresh then
      run("fill", self.device, p.grad._c, 0)
    else
      p._reached = true
    end
  end
end

local function reduce(self, b)
  if self.stage < 2 then
    complete(self, b)
    if b.work then check(C.ds_wait(b.work), "backward") end -- that of an earlier backward
    b.work, b.reduced = ffi.new "ds_work", true
    return self:reduce_bucket(b, b.part, b.work)
  end
  self:open_gradients(b.params[1])
  complete(self, b)
  if self.overlap then return take_off(self, b) end
  self:reduce_bucket(b)
  keep_own(self, b, b.grad)
  close_gradients(b)
end

--- Reduces the buckets that are next and get no more.
local function reduce_ready(self)
  local b = self.buckets[self.next]
  while b and (b.late or b.pending == 0 and (b.expected or not self.nested)) do
    if not b.late then reduce(self, b) end
    self.next = self.next + 1
    b = self.buckets[self.next]
  end
end

-- ---- below stage 2

--- Buffers for what a reduction in backward leaves to this rank, one slice a bucket.
function methods:lay_parts(buffers, own_size)
  local by_bucket
  self.parts, by_bucket = buffers(self, self.grad_dtype, own_size)
  for _, b in ipairs(self.buckets) do
    b.part = by_bucket[b] or tensor.new({ 0 }, self.grad_dtype, self.device):keep()
  end
end

--- p's gradient has changed, or will: what was reduced of it is stale.
function methods.outdate(_, p)
  local b = p._flat.bucket
  if b.reduced then b.reduced = "stale" end
end

--- Puts what backward has reduced of a bucket in its place.
-- @treturn boolean false: it has not, or gradients have changed since
function methods:take_reduced(b)
  local reduced = b.reduced == true
  if b.work then check(C.ds_wait(b.work), "step") end
  b.work, b.reduced = nil, nil
  if reduced and b.own then run("copy", self.device, b.own._c, b.part._c) end
  return reduced
end

--- Kernels wait for what is under way, and nobody takes it.
function methods:forget_reduced()
  for _, b in ipairs(self.early and self.buckets or {}) do
    if b.work then C.ds_wait(b.work) end
    b.work, b.reduced = nil, nil
  end
end

--- Whether the coming backward is the last one before an update.
local function reduces_early(self)
  local engine = self.early and self.params[1] and self.params[1]._engine
  return engine and not engine.unsynced and engine:is_gradient_accumulation_boundary()
end

-- ---- what backward tells

--- A record of this backward will add to p's gradient.
function methods:expect(p)
  local b = p._flat.bucket
  b.pending, b.expected = b.pending + 1, true
  self:outdate(p)
end

--- One of those records is done.
function methods:done(p)
  local b = p._flat.bucket
  b.pending = b.pending - 1
  if b.pending == 0 and self.next then
    if self.next > b.index then b.late = true end
    scope.no_grad(reduce_ready, self)
  end
end

--- Before backward: from here on buckets are reduced as they complete.
function methods:begin_backward()
  if self.stage < 2 and not reduces_early(self) then
    self.next = nil
    return
  end
  self.next, self.nested = 1, false
  for _, b in ipairs(self.buckets) do b.pending, b.expected = 0, false end
end

--- After backward: the rest is reduced.
function methods:end_backward()
  if not self.next then return end
  scope.no_grad(function()
    for i = 1, #self.buckets do
      local b = self.buckets[i]
      if i >= self.next or b.late or self.stage >= 2 and b.grad then reduce(self, b) end
    end
    while #self.flights > 0 do land(self) end
  end)
  self.next = nil
end

--- Forgets the gradients since the last update.
function methods:drop_gradients()
  self.next = nil
  self:forget_reduced()
  if self.stage < 2 then return end
  for _, flight in ipairs(self.flights) do
    C.ds_wait(flight.work)
    scope.release(flight.grad)
  end
  self.flights, self.under_way = {}, 0
  for _, b in ipairs(self.buckets) do
    if b.grad then close_gradients(b) end
    b.fresh = true
  end
  for _, p in ipairs(self.params) do p._reached = nil end
end

--- Gives the class these methods.
function M.extend(class)
  for name, method in pairs(methods) do class[name] = method end
end

return M
