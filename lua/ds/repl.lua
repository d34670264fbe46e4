--- `dsrun repl`: reads Lua line by line and prints what it gives.
-- Works on a pipe as well: then without prompts, and the exit code is 1 if a line failed.

local ffi = require "ffi"
local border = require "ds.ffi"
local host = border.host

local M = {}

local function read(prompt)
  local line = border.C.ds_read_line(prompt)
  return line ~= nil and ffi.string(line) or nil
end

local function compile(text, name)
  return loadstring("return " .. text, name) or loadstring(text, name)
end

--- Whether the compiler wants more: `for i = 1, 3 do`, `1 +`.
local function is_unfinished(text)
  for _, begin in ipairs { "", "return " } do
    local chunk, message = loadstring(begin .. text)
    if not chunk and message:find "'<eof>'$" then return true end
  end
  return false
end

--- One statement or expression, over as many lines as it needs; nil at the end of the input.
local function read_chunk(name)
  local text = read "> "
  if not text then return nil end
  local chunk = compile(text, name)
  while not chunk and is_unfinished(text) do
    local line = read ">> "
    if not line then break end
    text = text .. "\n" .. line
    chunk = compile(text, name)
  end
  if chunk then return chunk end
  local _, message = loadstring(text, name)
  local _, as_value = loadstring("return " .. text, name)
  return false, as_value:find "'<eof>'$" and as_value or message
end

local function show(ok, ...)
  if not ok then
    io.stdout:flush()
    if ... ~= nil then io.stderr:write(tostring((...)), "\n") end
  elseif select("#", ...) > 0 then
    print(...)
  end
  return ok
end

function M.run()
  local talks = border.C.ds_is_terminal() == 1
  if talks then
    print(("dsrun %s: Lua with ds; a name without local is kept, Ctrl-D ends"):format(host.version))
  end
  local count, failed = 0, false
  while true do
    count = count + 1
    local chunk, message = read_chunk("@" .. count)
    if chunk == nil then break end
    local ok
    if chunk then
      ok = show(xpcall(setfenv(chunk, host.prompt), host.handler))
    else
      ok = show(false, message)
    end
    failed = failed or not ok
  end
  if talks then print() end
  os.exit(failed and not talks and 1 or 0)
end

return M
