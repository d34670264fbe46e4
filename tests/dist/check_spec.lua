-- DS_CHECK=comm: ranks that are about to do different things all get an error that names who, and
-- none of them hangs; afterwards the group works as before.

local ffi = require "ffi"
local ds = require "ds"
local harness = require "harness"
local border = require "ds.ffi"
local comm = require "ds.comm"

local C, check = border.C, border.check
local case, fails = harness.case, harness.fails
local rank, size = ds.rank(), ds.world_size()
local last = size - 1

--- Rank `odd` does one thing, the others another; all fail with this message.
local function differ(odd, text, odd_one, others)
  fails(text, rank == odd and odd_one or others)
  assert(ds.all_reduce(ds.ones(1)):item() == size)
end

case("kinds and sizes", function()
  ds.barrier()
  ds.barrier()
  local text = "rank %d called all_gather of f32 [10], rank 0 all_reduce of f32 [12] (collective 3)"
  differ(last, text:format(last),
    function() ds.all_gather(ds.ones(10)) end,
    function() ds.all_reduce(ds.ones(12)) end)
  differ(last, ("rank %d called barrier, rank 0 group (collective 5)"):format(last),
    function() ds.barrier() end,
    function() ds.group(0) end)
end)

case("the odd one may be rank 0", function()
  if size < 3 then return end
  differ(0, "rank 0 called all_reduce of f32 [5], rank 1 all_reduce of f32 [4]",
    function() ds.all_reduce(ds.ones(5)) end,
    function() ds.all_reduce(ds.ones(4)) end)
end)

case("all differ", function()
  if size < 3 then return end
  fails(("rank 1 called all_reduce of f32 [2], rank 0 all_reduce of f32 [1] (collective %s)")
    :format(tonumber(ds.comm_stats().collectives) + 1),
    function() ds.all_reduce(ds.ones(rank + 1)) end)
  fails(size == 3 and "; 1 more differs" or ("; %d more differ"):format(size - 2),
    function() ds.all_reduce(ds.ones(rank + 1)) end)
end)

case("dtype, reduction, root, borders, scale", function()
  local rows = {
    { "all_reduce of f16 [3], rank 0 all_reduce of f32 [3]",
      function(odd) ds.all_reduce(ds.ones(3, { dtype = odd and "f16" or "f32" })) end },
    { "all_reduce of f32 [3] by max, rank 0 all_reduce of f32 [3] by sum",
      function(odd) ds.all_reduce(ds.ones(3), odd and "max" or "sum") end },
    { "broadcast of f32 [3] from rank 1, rank 0 broadcast of f32 [3] from rank 0",
      function(odd) ds.broadcast(ds.ones(3), odd and 1 or 0) end },
    { "gather_parts of f32 [3] with borders of its own", function(odd)
      local borders = ffi.new("int64_t[?]", size + 1)
      borders[size] = odd and 3 or 2
      check(C.ds_gather_parts(ds.ones(3)._c, borders, comm.world(), nil))
    end },
    { "all_reduce of f32 [1] times 0.5, rank 0 all_reduce of f32 [1] times 1", function(odd)
      local t = ds.ones(1)
      check(C.ds_all_reduce_scaled(t._c, t._c, C.DS_SUM, odd and 0.5 or 1, -1, comm.world(), nil))
    end },
    { "all_reduce of f32 [1] sent as bf16, rank 0 all_reduce of f32 [1] sent as f32", function(odd)
      local t, wire = ds.ones(1), odd and C.DS_BF16 or -1
      check(C.ds_all_reduce_scaled(t._c, t._c, C.DS_SUM, 1, wire, comm.world(), nil))
    end },
  }
  for _, row in ipairs(rows) do
    differ(last, ("rank %d called %s"):format(last, row[1]),
      function() row[2](true) end, function() row[2](false) end)
  end
end)

case("a group of some", function()
  local g = ds.group(rank < 2 and 0 or nil)
  if g then
    fails("rank 1 called barrier, rank 0 all_reduce of f32 [1] (collective 1)", function()
      if g:rank() == 1 then g:barrier() else g:all_reduce(ds.ones(1)) end
    end)
    g:barrier()
  end
end)

case("messages between two are nobody else's", function()
  if rank == 0 then ds.send(ds.ones(3), last) end
  if rank == last then ds.recv(ds.ones(3), 0) end
  ds.barrier()
end)

harness.done()
