--- The rules of a Lua state, set up by the host before any script runs: what may be global, where
-- modules are found, how an error is shown.
-- Called with the table that `require "ds.host"` gives.

local host = ...

local M = {}

local G = _G
local library = host.root .. "/ds/"
local base = host.root:match "^(.*)/[^/]*$" -- the folder of lua/ and models/
local verbose = os.getenv "DS_TRACE" == "1"

-- ---- strict globals

--- An environment for the user's own chunks. It looks through to _G, but a global has to be there
-- before it is read or written by its bare name: `_G.name = value` makes one. Libraries that a
-- script loads from elsewhere keep plain Lua's rules.
-- @tparam[opt] function missing `missing(name)` may give a value for a name that is not there
-- @tparam[opt] boolean assign a bare assignment makes a global
local function environment(missing, assign)
  return setmetatable({}, {
    __index = function(_, name)
      local value = G[name]
      if value == nil and missing then value = missing(name) end
      if value == nil then
        local hint = name == "ds" and 'local ds = require "ds"'
          or ("local %s = …; _G.%s reads it unchecked"):format(name, name)
        error(("undeclared global '%s' (%s)"):format(tostring(name), hint), 2)
      end
      return value
    end,
    __newindex = function(_, name, value)
      if not assign and rawget(G, name) == nil then
        error(("assignment to undeclared global '%s' (local %s = …, or _G.%s = … where a global is "
          .. "meant)"):format(name, name, name), 2)
      end
      G[name] = value
    end,
  })
end

local function library_itself(name)
  if name == "ds" then return require "ds" end
end

M.strict = environment()
M.eval = environment(library_itself)
M.prompt = environment(library_itself, true)

-- ---- modules: the script's folder, the library, models beside it, then Lua's own places

local function templates(folder)
  return folder .. "/?.lua;" .. folder .. "/?/init.lua;"
end

local function absolute(folder)
  if folder:sub(1, 1) == "/" then return folder end
  folder = folder:gsub("^%./+", "")
  return (folder == "." or folder == "") and host.folder or host.folder .. "/" .. folder
end

--- A path as the user would write it here.
local function shorten(path)
  local folder = host.folder .. "/"
  return path:sub(1, #folder) == folder and path:sub(#folder + 1) or path
end

host.base = base
host.script_dir = absolute(host.script and host.script ~= "-" and host.script:match "^(.*)/" or ".")

local own = templates(host.script_dir) .. templates(base)
package.path = templates(host.script_dir) .. templates(host.root) .. templates(base) .. package.path

--- Loads a module that is the user's: with strict globals, named as the user would write its path.
local function load_own(path)
  local file = assert(io.open(path, "rb"))
  local text = file:read "*a"
  file:close()
  local chunk, message = loadstring((text:gsub("^#[^\n]*", "")), "@" .. shorten(path))
  if not chunk then error(message, 0) end
  return setfenv(chunk, M.strict)
end

--- Takes the place of Lua's searcher for Lua files.
package.loaders[2] = function(name)
  local path, tried = package.searchpath(name, package.path)
  if not path then return tried end
  if path:sub(1, #library) ~= library and path == package.searchpath(name, own) then
    return load_own(path)
  end
  local chunk, message = loadfile(path)
  if not chunk then error(message, 0) end
  return chunk
end

-- ---- errors

--- Whether a chunk's name, perhaps cut at its beginning ("...src/lua/ds/nn.lua"), is the library's.
local function is_library(name)
  return name:sub(1, #library) == library or name:find "^%.%.%..*/ds/[%w_]+%.lua$" ~= nil
end

local function user_place()
  for level = 2, 100 do
    local info = debug.getinfo(level, "Sl")
    if not info then return nil end
    if info.currentline > 0 and not is_library(info.source:sub(2)) then
      return ("%s:%d: "):format(info.source:gsub("^[@=]", ""), info.currentline)
    end
  end
end

--- A traceback without the frames of C and of the library, which say nothing to a user.
local function trim(text)
  if verbose then return text end
  local lines = {}
  for line in text:gmatch "[^\n]+" do
    local file = line:match "^\t(.-):%d+: in "
    local generated = file and file:find "^op [%w_]+$" -- an operation's dispatch
    if not line:find "^\t%[[Cb]" and not generated and not (file and is_library(file)) then
      lines[#lines + 1] = (line:gsub("<" .. library:gsub("%p", "%%%0"), "<ds/"))
    end
  end
  return #lines > 1 and table.concat(lines, "\n") or ""
end

--- The traceback of where it is called, as the host prints it. For those who catch an error and
-- raise it again further out: `host.error, host.traceback = message, host.trace(2)`.
-- @tparam[opt=1] number level 1: where trace is called
function host.trace(level)
  return trim(debug.traceback("", (level or 1) + 1))
end

--- The message handler of everything the host runs: a message with a user's line first, and the
-- traceback.
function M.handler(message)
  if message == nil then return nil end
  local text = message
  if type(message) ~= "string" and type(message) ~= "number" then
    local mt = getmetatable(message)
    text = type(mt) == "table" and mt.__tostring and tostring(message)
      or ("error object is a %s value (raise a string)"):format(type(message))
  end
  local place = tostring(text):match "^([^\n]-):%d+: "
  if not place then
    text = (user_place() or "") .. text
  elseif is_library(place) then
    text = (user_place() or "") .. text:gsub("^.-/ds/", "ds/", 1)
  end
  local trace
  if host.traceback and rawequal(host.error, message) then
    trace = trim(host.traceback)
  else
    trace = host.trace(2)
  end
  trace = trace:gsub("^\n", "")
  return trace == "" and text or text .. "\n" .. trace
end

-- ---- for the host

local endings = {}

--- Has f(well) called when the script has ended, also by os.exit; `well`: with code 0, or because a
-- signal asked for it. The last one given comes first. An error in it is the script's.
function host.at_end(f) endings[#endings + 1] = f end

function M.finish(well)
  while #endings > 0 do table.remove(endings)(well) end
end

function M.call(module, name, argument)
  return require(module)[name](argument)
end

--- Tells the host which loops are being compiled, for SIGUSR2.
function M.watch()
  local funcinfo = require "jit.util".funcinfo
  jit.attach(function(what, _, func, pc, parent)
    if what ~= "start" or parent then return end
    local info = funcinfo(func, pc)
    if info.currentline and not is_library(info.source:sub(2)) then
      host.compiling(("%s:%d"):format(info.source:sub(2), info.currentline))
    end
  end, "trace")
end

host.handler, host.prompt = M.handler, M.prompt -- for the repl

if host.options.seed then math.randomseed(host.options.seed) end

return M
