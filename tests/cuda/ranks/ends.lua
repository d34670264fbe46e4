-- How a job of ranks with GPUs ends when one of them does not go on as the others do. The argument
-- says which way; nccl_spec.lua knows what must come of it.

local ds = require "ds"
local border = require "ds.ffi"

local function numbers() return ds.full({ 1000 }, 1, { device = "cuda" }) end

local ways = {
  --- It lives, and does not come: the other waits for its GPU.
  stays = function()
    ds.cuda.synchronize() -- its part of the first one is done
    os.execute "sleep 60"
  end,
  is_killed = function() os.execute "kill -9 $PPID" end,
  --- What NCCL notices by itself; this rank lives on.
  breaks = function()
    io.open(os.getenv "DS_SIMT_NCCL_FAIL", "w"):close()
    os.execute "sleep 30"
  end,
  aborts = function()
    border.C.ds_comm_abort(require "ds.comm".world(), "enough")
    local ok, message = pcall(ds.all_reduce, numbers())
    assert(not ok and message:find("all_reduce: the job was ended: enough", 1, true), message)
    error "as expected"
  end,
}

ds.all_reduce(numbers())
if ds.rank() == 1 then
  ways[arg[1]]()
else
  print(ds.all_reduce(numbers()):tolist()[1]) -- here it waits
end
