--- Ranks that work together: who am I, and the collectives on tensors.
--
--     ds.rank()  ds.world_size()  ds.local_rank()  ds.barrier()
--     ds.all_reduce(t, "mean")        in place; "sum" (the default), "mean", "max", "min"
--     ds.broadcast(t, 0)              in place, from a rank
--     ds.all_gather(t)                [world_size x …], in order of rank
--     ds.reduce_scatter(t, "sum")     t's first dimension is cut into world_size parts; this rank's
--
-- Every rank calls the same collectives in the same order. In a job of one rank they cost nothing:
-- the sum over all ranks of a tensor is the tensor. `init.lua` puts these functions on `ds`.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise = border.C, border.check, border.raise
local shape_string = border.shape_string

local M = {}

local reductions = { sum = C.DS_SUM, mean = C.DS_MEAN, max = C.DS_MAX, min = C.DS_MIN }

local group

--- The group of all ranks, for C functions that take one; made when it is first needed.
-- @treturn cdata ds_comm *
function M.world()
  if not group then
    local box = ffi.new("ds_comm *[1]")
    check(C.ds_comm_world(box))
    group = box[0]
  end
  return group
end
local world = M.world

--- This process's number in the job, from 0.
function M.rank() return C.ds_comm_rank(world()) end

--- How many processes the job has.
function M.world_size() return C.ds_comm_size(world()) end

--- This process's number among those on the same host, from 0.
function M.local_rank() return C.ds_comm_local_rank(world()) end

--- Returns when every rank has called it.
function M.barrier() check(C.ds_barrier(world(), nil)) end

local function reduction(op, what)
  local code = reductions[op or "sum"]
  if not code then
    raise("%s: unknown reduction '%s'; there are sum, mean, max, min", what, tostring(op))
  end
  return code
end

--- Calls `f` on a dense tensor with t's values, which then become t's.
local function in_place(t, what, f, ...)
  tensor.need_tensor(t, what, 1)
  if scope.grad and (t._rec or t.requires_grad) then
    raise("%s writes into its tensor, which takes part in the gradient; give it t:detach(), or "
      .. "call it inside ds.no_grad(function() … end)", what)
  end
  if t.device == "meta" or t._c.dense == 1 then
    f(t, ...)
  else
    local dense = tensor.new(t.shape, t.dtype, t.device)
    tensor.run("copy", t.device, dense._c, t._c)
    f(dense, ...)
    tensor.run("copy", t.device, t._c, dense._c)
    scope.release(dense, "by " .. what)
  end
  return t
end

--- A dense tensor with t's values: t itself if it is one.
local function dense_of(t, what)
  tensor.need_tensor(t, what, 1)
  if t.device == "meta" or t._c.dense == 1 then return t end
  local dense = tensor.new(t.shape, t.dtype, t.device)
  tensor.run("copy", t.device, dense._c, t._c)
  return dense
end

local function reduce(t, code)
  check(C.ds_all_reduce(t._c, t._c, code, world(), nil))
end

--- Replaces t on every rank by the sum, mean, maximum or minimum over all ranks.
-- @tparam Tensor t the same shape and dtype on every rank
-- @tparam[opt="sum"] string op
-- @treturn Tensor t
function M.all_reduce(t, op)
  return in_place(t, "all_reduce", reduce, reduction(op, "all_reduce"))
end

local function send(t, root)
  check(C.ds_broadcast(t._c, root, world(), nil))
end

--- Replaces t on every rank by rank `src`'s.
-- @tparam Tensor t
-- @tparam[opt=0] number src
-- @treturn Tensor t
function M.broadcast(t, src)
  src = src or 0
  local size = M.world_size()
  if type(src) ~= "number" or src % 1 ~= 0 or src < 0 or src >= size then
    raise("broadcast: there is no rank %s; the job has %d, counted from 0", tostring(src), size)
  end
  return in_place(t, "broadcast", send, src)
end

--- Every rank's t, one after the other.
-- @tparam Tensor t the same shape and dtype on every rank
-- @treturn Tensor [world_size x …]
function M.all_gather(t)
  local dense = dense_of(t, "all_gather")
  local out = tensor.new({ M.world_size(), unpack(t.shape) }, t.dtype, t.device)
  check(C.ds_all_gather(out._c, dense._c, world(), nil))
  return out
end

--- Reduces over all ranks and gives each its part of the first dimension.
-- @tparam Tensor t its first dimension is a multiple of world_size
-- @tparam[opt="sum"] string op
-- @treturn Tensor [first dimension / world_size x …]
function M.reduce_scatter(t, op)
  local code = reduction(op, "reduce_scatter")
  local dense, size = dense_of(t, "reduce_scatter"), M.world_size()
  local shape = { unpack(t.shape) }
  if #shape == 0 or shape[1] % size ~= 0 then
    raise("reduce_scatter: the first dimension of %s must be a multiple of %d, the number of ranks",
      shape_string(t.shape), size)
  end
  shape[1] = shape[1] / size
  local out = tensor.new(shape, t.dtype, t.device)
  check(C.ds_reduce_scatter(out._c, dense._c, code, world(), nil))
  return out
end

return M
