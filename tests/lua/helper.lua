--- What several specs need: errors and their messages, files, programs started in a folder.

local host = require "ds.host"
local seconds = require("ds.ffi").C.ds_seconds

local M = {}

--- Asserts that f(…) fails with a message that has `text` in it.
-- @treturn string the message
function M.says(text, f, ...)
  local ok, message = pcall(f, ...)
  if ok then error("nothing failed, but this was expected: " .. text, 2) end
  message = tostring(message)
  if not message:find(text, 1, true) then
    error(("'%s' is not in '%s'"):format(text, message), 2)
  end
  return message
end

function M.has(text, piece)
  if not text:find(piece, 1, true) then error(("no '%s' in:\n%s"):format(piece, text), 2) end
end

function M.lacks(text, piece)
  if text:find(piece, 1, true) then error(("'%s' in:\n%s"):format(piece, text), 2) end
end

--- All weights of an engine, as one list of numbers.
function M.weights(engine)
  local out = {}
  for _, e in ipairs(engine.named) do
    for _, v in ipairs(e.parameter:float():reshape(-1):tolist()) do out[#out + 1] = v end
  end
  return out
end

--- A file's text; nil if there is none.
function M.read(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read "*a"
  file:close()
  return text
end

--- The checkout's folder, with a slash at its end; "" where it is this one.
M.root = debug.getinfo(1, "S").source:match "^@(.*)tests/lua/" or ""

function M.write(path, text)
  local file = assert(io.open(path, "wb"))
  file:write(text)
  file:close()
end

--- A name for a temporary file or folder; nothing is there yet.
function M.temporary()
  local name = os.tmpname()
  os.remove(name)
  return name
end

-- ---- a folder in which programs are started

local Place = {}
Place.__index = Place

--- Makes the folder.
-- @tparam[opt] table options `before`: lines of shell before every command; `limit`: seconds that
--   one may take
-- @treturn table `folder`, and the methods below
function M.place(options)
  options = options or {}
  local self = setmetatable({ folder = M.temporary(), limit = options.limit,
    before = options.before or "" }, Place)
  assert(os.execute("mkdir -p '" .. self.folder .. "'") == 0)
  return self
end

function Place:remove() os.execute("rm -rf '" .. self.folder .. "'") end

--- @treturn string its path
function Place:write(name, text)
  local path = self.folder .. "/" .. name
  M.write(path, text)
  return path
end

--- A file's text; "" if there is none.
function Place:read(name) return M.read(self.folder .. "/" .. name) or "" end

-- Machines can be busy: what a test waits for it looks for, up to 20 seconds.
local functions = [[
wait_for() { # TEXT FILE [LINES]: until so many lines (one) have the text
  tries=400
  while [ "$(cat "$2" 2>/dev/null | grep -c -e "$1")" -lt "${3:-1}" ] && [ $tries -gt 0 ]; do
    tries=$((tries - 1))
    sleep 0.05
  done
}]]

--- Runs a shell command in the folder, with nothing on its standard input; "$D" is dsrun, and there
-- is wait_for TEXT FILE [LINES].
-- @treturn number exit code
-- @treturn string standard output
-- @treturn string standard error
-- @treturn number seconds that it took
function Place:timed(command)
  self:write("command.sh", ("D='%s'\n%s\n%s\n%s\n"):format(host.executable, functions,
    self.before, command))
  local limit = self.limit and ("timeout -k 1 %d "):format(self.limit) or ""
  local begun = seconds()
  local status = os.execute(("cd '%s' && %ssh ./command.sh >out 2>err </dev/null"):format(
    self.folder, limit))
  local code = status % 256 == 0 and status / 256 or 128 + status % 128 -- a signal
  return code, self:read "out", self:read "err", seconds() - begun
end

--- As timed(), without the time.
function Place:sh(command)
  local code, out, err = self:timed(command)
  return code, out, err
end

return M
