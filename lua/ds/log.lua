--- Log lines to stderr, with time and rank; information from rank 0 only.

local border = require "ds.ffi"

local M = {}
local levels = { error = 0, warning = 1, info = 2, debug = 3 } -- enum ds_log_level

for name, level in pairs(levels) do
  --- `log.info("step %d", n)`
  M[name] = function(format, ...)
    border.C.ds_log(level, select("#", ...) > 0 and format:format(...) or format)
  end
end

return M
