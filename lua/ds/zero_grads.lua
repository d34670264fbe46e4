--- ZeRO stages 2 and 3: gradients that are whole only until their bucket is reduced.
--
-- The first gradient of a bucket makes a buffer for all of it; when no more can come, the bucket is
-- reduced, this rank's part is added to what it keeps, and the buffer goes. When that is, backward
-- tells: it counts the records that will add to a parameter (expect), and those that are done
-- (done). Buckets are reduced in one fixed order, so that all ranks do the same; a backward reduces
-- each of them, also those that it did not reach, as another rank's may have.
--
-- Where a part of the graph is only known in backward (ds.checkpoint), a bucket may be complete by
-- the count and then get more: it is reduced again, and from then on at the end.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"

local check, run = border.check, tensor.run
local slice = tensor.view.slice_flat

local M = {}

local methods = {}

--- Tells the parameters that their gradients are made by the bucket.
function methods:shard_gradients()
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
    b.grad = scope.keep(tensor.new({ b.numel }, self.grad_dtype, self.device))
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
  scope.release(b.grad)
  b.grad = nil
end

--- This rank's part of a reduced bucket, to what it has.
local function keep_own(self, b)
  if not b.own then return end
  local part = slice(b.grad, b.from - b.start, b.own.shape)
  if b.fresh then
    run("copy", self.device, b.own._c, part._c)
  else
    check(tensor.kernels(self.device).add_scaled(b.own._c, b.own._c, part._c, 1), "backward")
  end
  scope.release(part)
end

local function reduce(self, b)
  self:open_gradients(b.params[1])
  for _, p in ipairs(b.params) do
    autograd.move_out(p)
    if p._fresh then
      run("fill", self.device, p.grad._c, 0)
    else
      p._reached = true
    end
  end
  self:reduce_bucket(b)
  keep_own(self, b)
  b.fresh = false
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

--- A record of this backward will add to p's gradient.
function methods.expect(_, p)
  local b = p._flat.bucket
  b.pending, b.expected = b.pending + 1, true
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
  if self.stage < 2 then return end
  self.next, self.nested = 1, false
  for _, b in ipairs(self.buckets) do b.pending, b.expected = 0, false end
end

--- After backward: the rest is reduced.
function methods:end_backward()
  if self.stage < 2 then return end
  scope.no_grad(function()
    for i = 1, #self.buckets do
      local b = self.buckets[i]
      if i >= self.next or b.late or b.grad then reduce(self, b) end
    end
  end)
  self.next = nil
end

--- Forgets the gradients since the last update.
function methods:drop_gradients()
  self.next = nil
  if self.stage < 2 then return end
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
