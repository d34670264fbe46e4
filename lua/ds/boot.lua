--- The rules of a state, set up by the host before any script runs.
-- Called with the table of require "ds.host".

local host = ...

local M = {}

-- Modules: the script's own folder, the library, the models beside it, then the defaults.
local base = host.root:match("^(.*)/[^/]*$")
local script_dir = host.script and host.script ~= "-" and (host.script:match("^(.*)/[^/]*$") or ".") or "."
local function templates(folder) return folder .. "/?.lua;" .. folder .. "/?/init.lua;" end
host.script_dir = script_dir
package.path = templates(script_dir) .. templates(host.root) .. templates(base) .. package.path

M.strict = _G
M.eval = setmetatable({}, { __index = function(_, k)
  if k == "ds" then return require "ds" end
  return _G[k]
end, __newindex = _G })

function M.handler(message)
  if message == nil then return nil end
  return debug.traceback(tostring(message), 2)
end

function M.call(name, argument)
  return require(name).run(argument)
end

return M
