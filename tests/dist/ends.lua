-- How a job of several ranks ends when one of them does not go on as the others do. The argument
-- says which way; tests/dist/run knows what must come of it.

local ds = require "ds"
local C = require "ds.ffi".C

local ways = {
  raises = function() error "this rank has a problem" end,
  exits = function() os.exit(7) end,
  ends_early = function() end,
  is_killed = function() os.execute "kill -9 $PPID" end,
  calls_another = function() ds.all_gather(ds.ones(5)) end,
  aborts = function()
    C.ds_comm_abort(require "ds.comm".world(), "enough")
    local ok, message = pcall(ds.barrier)
    assert(not ok and message:find("barrier: the job was ended: enough", 1, true), message)
    os.execute "sleep 3"
  end,
  sleeps = function() os.execute "sleep 60" end,
}

ds.barrier()
if ds.rank() == 1 then ways[arg[1]]() else ds.all_reduce(ds.ones(1000000)) end
