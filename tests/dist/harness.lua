--- Cases that every rank of a job runs. One that fails on any rank ends the job; the last line of
-- rank 0 counts those that passed, for tests/dist/run.

local ffi = require "ffi"
local ds = require "ds"

local M = { passed = 0, fails = require("tests.lua.helper").says }

function M.case(name, f)
  local ok, message = xpcall(f, debug.traceback)
  if not ok then
    error(("'%s' failed on rank %d of %d: %s"):format(name, ds.rank(), ds.world_size(), message), 0)
  end
  M.passed = M.passed + 1
end

--- All ranks came here.
function M.done()
  ds.barrier()
  if ds.rank() == 0 then print(("%d passed, 0 failed, 0 skipped"):format(M.passed)) end
end

--- Raises unless x and y are of one shape and dtype and equal, NaN to NaN.
function M.same(x, y, what)
  local shapes = table.concat(x.shape, "x") .. " " .. table.concat(y.shape, "x")
  assert(x.dtype == y.dtype and table.concat(x.shape, "x") == table.concat(y.shape, "x"),
    what .. ": " .. shapes)
  if x:numel() == 0 then return end
  local wrong = x:ne(y)
  if wrong:any():item() then
    local a, b = x:reshape(-1):tolist(), y:reshape(-1):tolist()
    for i = 1, #a do
      if a[i] ~= b[i] and (a[i] == a[i] or b[i] == b[i]) then
        error(("%s: element %d of %d is %.9g, not %.9g"):format(what, i, #a, tonumber(a[i]),
          tonumber(b[i])), 2)
      end
    end
  end
end

--- Borders of a buffer of n for all ranks: empty, short and long parts.
function M.uneven(n)
  local size = ds.world_size()
  local borders = ffi.new("int64_t[?]", size + 1)
  for r = 1, size do
    local last = tonumber(borders[r - 1])
    borders[r] = r == size and n or r % 2 == 1 and last or math.min(n, last + math.floor(n * 0.6))
  end
  return borders
end

return M
