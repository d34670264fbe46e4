-- How a job of several ranks ends when one of them does not go on as the others do. The argument
-- says which way; tests/dist/run knows what must come of it.

local ds = require "ds"
local ffi = require "ffi"
local border = require "ds.ffi"
local C, check = border.C, border.check

--- gather_parts of three elements, of which the first `n` are rank 0's.
local function gather(n)
  local borders = ffi.new("int64_t[3]", 0, n, 3)
  check(C.ds_gather_parts(ds.ones(3)._c, borders, require "ds.comm".world(), nil))
end

local ways = {
  raises = function() error "this rank has a problem" end,
  exits = function() os.exit(7) end,
  ends_early = function() end,
  is_killed = function() os.execute "kill -9 $PPID" end,
  calls_another = function() ds.all_gather(ds.ones(5)) end,
  has_other_borders = function() gather(1) end,
  aborts = function()
    C.ds_comm_abort(require "ds.comm".world(), "enough")
    local ok, message = pcall(ds.barrier)
    assert(not ok and message:find("barrier: the job was ended: enough", 1, true), message)
    os.execute "sleep 3"
  end,
  sleeps = function() os.execute "sleep 60" end,
}

--- What rank 0 does meanwhile, if not an all_reduce.
local meanwhile = { has_other_borders = function() gather(2) end }

ds.barrier()
if ds.rank() == 1 then
  ways[arg[1]]()
else
  (meanwhile[arg[1]] or ds.all_reduce)(ds.ones(1000000))
end
