--- Ranks that work together: who am I, and the collectives on tensors.
--
--     ds.rank()  ds.world_size()  ds.local_rank()  ds.local_size()  ds.barrier()
--     ds.all_reduce(t, "mean")        in place; "sum" (the default), "mean", "max", "min"
--     ds.broadcast(t, 0)              in place, from a rank
--     ds.all_gather(t)                [world_size x …], in order of rank
--     ds.reduce_scatter(t, "sum")     t's first dimension is cut into world_size parts; this rank's
--     ds.all_to_all(t)                likewise cut; part i goes to rank i, and its part comes back
--     ds.send(t, 1)  ds.recv(t, 0)    between two ranks; recv writes into t
--     work = ds.irecv(t, 0)           without waiting, as isend; work:wait(), work:done()
--     ds.restart_count()              how often the launcher has started this job before
--
--     g = ds.group(colour, key)       the ranks that name this colour, ordered by key, then rank;
--     g:all_reduce(t)  g:rank() …     all of the above are its methods, with its ranks and size
--     ds.comm_stats()  g:comm_stats() { collectives, bytes } that this rank began and sent so far
--     ds.comm.configure { enabled = true }  ds.comm.log_summary()  how long they take
--
-- Every rank of a group calls the same collectives in the same order (DS_CHECK=comm tells who does
-- not). In a job of one rank they cost nothing: the sum over all ranks of a tensor is the tensor.
-- `init.lua` puts these functions on `ds`; all of them are in `ds.comm`, too.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = require "ds.host"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise = border.C, border.check, border.raise
local shape_string = border.shape_string

local M = {}

--- Some ranks of the job; `_c` is the `ds_comm *` for C functions that take one.
local Group = {}
Group.__index = Group

local reductions = { sum = C.DS_SUM, mean = C.DS_MEAN, max = C.DS_MAX, min = C.DS_MIN }

local all

--- The group of all ranks, made when it is first needed.
-- @treturn Group
local function everyone()
  if not all then
    local box = ffi.new("ds_comm *[1]")
    check(C.ds_comm_world(box))
    all = setmetatable({ _c = box[0], name = "job" }, Group)
  end
  return all
end

--- The group of all ranks, for C functions that take one.
-- @treturn cdata ds_comm *
function M.world() return everyone()._c end

function Group:rank() return C.ds_comm_rank(self._c) end
function Group:world_size() return C.ds_comm_size(self._c) end
function Group:local_rank() return C.ds_comm_local_rank(self._c) end
function Group:local_size() return C.ds_comm_local_size(self._c) end

--- Returns when every rank has called it.
function Group:barrier() check(C.ds_barrier(self._c, nil)) end

local function is_integer(x) return type(x) == "number" and x % 1 == 0 and math.abs(x) < 2^31 end

--- The ranks of this group that name the same colour. Every rank of it calls this.
-- @tparam[opt] number colour from 0; nil: in no group
-- @tparam[opt=0] number key orders the ranks of the new group
-- @treturn Group|nil
function Group:group(colour, key)
  if colour ~= nil and not (is_integer(colour) and colour >= 0) or key and not is_integer(key) then
    raise("group: colour and key are integers, the colour from 0 (nil: in no group), not %s, %s",
      tostring(colour), tostring(key))
  end
  local box = ffi.new("ds_comm *[1]")
  check(C.ds_comm_split(box, self._c, colour or -1, key or 0))
  if box[0] == nil then return nil end
  return setmetatable({ _c = ffi.gc(box[0], C.ds_comm_close), name = "group" }, Group)
end

local function stats_of(c)
  local n = ffi.new("int64_t[2]")
  C.ds_comm_stats(n, n + 1, c)
  return { collectives = tonumber(n[0]), bytes = tonumber(n[1]) }
end

--- What this rank did in this group so far.
-- @treturn table collectives, bytes (sent)
function Group:comm_stats() return stats_of(self._c) end

--- What this rank did in all groups so far.
-- @treturn table collectives, bytes (sent)
function M.comm_stats() return stats_of(nil) end

-- ---- arguments

local function reduction(op, what)
  local code = reductions[op or "sum"]
  if not code then
    raise("%s: unknown reduction '%s'; there are sum, mean, max, min", what, tostring(op))
  end
  return code
end

local function need_rank(group, rank, what)
  local size = group:world_size()
  if not is_integer(rank) or rank < 0 or rank >= size then
    raise("%s: there is no rank %s; the %s has %d, counted from 0", what, tostring(rank),
      group.name, size)
  end
  return rank
end

local function need_writable(t, what)
  tensor.need_tensor(t, what, 1)
  if scope.grad and (t._rec or t.requires_grad) then
    raise("%s writes into its tensor, which takes part in the gradient; give it t:detach(), or "
      .. "call it inside ds.no_grad(function() … end)", what)
  end
end

--- Calls `f` on a dense tensor with t's values, which then become t's.
local function in_place(t, what, f, ...)
  need_writable(t, what)
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

--- Elements of t's first dimension that are one rank's.
local function share_of(group, t, what)
  local size, first = group:world_size(), t.shape[1]
  if not first or first % size ~= 0 then
    raise("%s: the first dimension of %s must be a multiple of %d, the number of ranks", what,
      shape_string(t.shape), size)
  end
  return first / size
end

-- ---- collectives

local function reduce(t, group, code)
  check(C.ds_all_reduce(t._c, t._c, code, group._c, nil))
end

--- Replaces t on every rank by the sum, mean, maximum or minimum over all ranks.
-- @tparam Tensor t the same shape and dtype on every rank
-- @tparam[opt="sum"] string op
-- @treturn Tensor t
function Group:all_reduce(t, op)
  return in_place(t, "all_reduce", reduce, self, reduction(op, "all_reduce"))
end

local function spread(t, group, root)
  check(C.ds_broadcast(t._c, root, group._c, nil))
end

--- Replaces t on every rank by rank `src`'s.
-- @tparam Tensor t
-- @tparam[opt=0] number src
-- @treturn Tensor t
function Group:broadcast(t, src)
  return in_place(t, "broadcast", spread, self, need_rank(self, src or 0, "broadcast"))
end

--- Every rank's t, one after the other.
-- @tparam Tensor t the same shape and dtype on every rank
-- @treturn Tensor [world_size x …]
function Group:all_gather(t)
  local dense = dense_of(t, "all_gather")
  local out = tensor.new({ self:world_size(), unpack(t.shape) }, t.dtype, t.device)
  check(C.ds_all_gather(out._c, dense._c, self._c, nil))
  return out
end

--- Reduces over all ranks and gives each its part of the first dimension.
-- @tparam Tensor t its first dimension is a multiple of world_size
-- @tparam[opt="sum"] string op
-- @treturn Tensor [first dimension / world_size x …]
function Group:reduce_scatter(t, op)
  local code = reduction(op, "reduce_scatter")
  local dense, shape = dense_of(t, "reduce_scatter"), { unpack(t.shape) }
  shape[1] = share_of(self, t, "reduce_scatter")
  local out = tensor.new(shape, t.dtype, t.device)
  check(C.ds_reduce_scatter(out._c, dense._c, code, self._c, nil))
  return out
end

--- Cuts t's first dimension into world_size parts and sends part i to rank i.
-- @tparam Tensor t its first dimension is a multiple of world_size
-- @treturn Tensor of t's shape: the parts that the ranks sent to this one, in order of rank
function Group:all_to_all(t)
  local dense = dense_of(t, "all_to_all")
  share_of(self, t, "all_to_all")
  local out = tensor.new(t.shape, t.dtype, t.device)
  check(C.ds_all_to_all(out._c, dense._c, self._c, nil))
  return out
end

-- ---- between two ranks

--- A message under way. C keeps its memory until it is through.
local Work = {}
Work.__index = Work

--- Returns when the message is through.
function Work:wait()
  host.here()
  check(C.ds_wait(self._c))
end

--- Whether the message is through.
function Work:done() return check(C.ds_test(self._c)) == 1 end

local function begin(group, f, t, peer)
  local work = setmetatable({ _c = ffi.new "ds_work", group = group, tensor = t }, Work)
  check(f(t._c, peer, group._c, work._c))
  return work
end

--- Begins to send t, which must not change until the work is done.
-- @treturn Work
function Group:isend(t, to)
  need_rank(self, to, "send")
  return begin(self, C.ds_send, dense_of(t, "send"), to)
end

--- Begins to receive into t, which must be contiguous.
-- @treturn Work
function Group:irecv(t, from)
  need_rank(self, from, "recv")
  need_writable(t, "recv")
  return begin(self, C.ds_recv, t, from)
end

--- Sends t to one rank, which calls recv.
function Group:send(t, to) self:isend(t, to):wait() end

local function receive(t, group, from)
  check(C.ds_recv(t._c, from, group._c, nil))
end

--- Replaces t, of the same size and dtype, by what one rank sends.
-- @treturn Tensor t
function Group:recv(t, from)
  return in_place(t, "recv", receive, self, need_rank(self, from, "recv"))
end

-- Where this rank may wait for others, its watchdog is told the user's line.
for _, name in ipairs { "barrier", "group", "all_reduce", "broadcast", "all_gather",
  "reduce_scatter", "all_to_all", "send", "recv" } do
  local method = Group[name]
  Group[name] = function(self, ...)
    if C.ds_comm_size(self._c) > 1 then host.here() end
    return method(self, ...)
  end
end

--- How often the launcher has started this job before (`--max_restarts`): 0 in its first life.
-- @treturn number
function M.restart_count() return tonumber(os.getenv "DSRUN_RESTARTS") or 0 end

-- Each method is also a function, of the group of all.
for name, method in pairs(Group) do
  if type(method) == "function" and not M[name] then
    M[name] = function(...) return method(everyone(), ...) end
  end
end

-- Under the names that they have in deepspeed.comm, too.
M.get_rank, M.get_world_size, M.get_local_rank = M.rank, M.world_size, M.local_rank

-- The log of collectives, loaded with its first use.
for _, name in ipairs { "configure", "log_summary" } do
  M[name] = function(...) return require("ds.comms_logger")[name](...) end
end

return M
