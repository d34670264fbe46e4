--- The border to C: the declarations, and how a C code becomes an error at the user's line.
-- The only file that says `ffi.cdef`; the text comes from the headers themselves, through the host,
-- and from libraries that a script loads.

local ffi = require "ffi"
local host = require "ds.host"

ffi.cdef(host.cdef)
ffi.cdef [[ // of a library of the user's own
extern const char ds_cdef[];
unsigned long long ds_headers(void);]]

local C = ffi.C
local M = { C = C, host = host }

local library = "@" .. host.root .. "/ds/"

-- ---- libraries of the user's own (library.lua)

local opened = {} -- never closed: what they queued on a device may still run

--- Opens a shared library for ffi. Raises with the loader's words.
-- @tparam string path relative to the working directory
function M.open_library(path)
  local file = io.open(path, "rb")
  if not file then error(("there is no %s"):format(path), 0) end
  file:close()
  opened[#opened + 1] = ffi.load(path:find "/" and path or "./" .. path)
  return opened[#opened]
end

--- Declares what a C text says; the same twice is fine. Raises with LuaJIT's words.
function M.declare(text) ffi.cdef(text) end

--- What a library says of itself in `const char ds_cdef[]`. @treturn string|nil
function M.declarations_of(clib)
  local there, text = pcall(function() return clib.ds_cdef end)
  return there and ffi.string(text) or nil
end

--- Whether a library was compiled with this program's headers (kernels/headers.h). @treturn
-- boolean|nil nil: it does not say
function M.same_headers(clib)
  local there, number = pcall(function() return clib.ds_headers() end)
  if there then return number == C.ds_headers() end
end

--- Adds to an error message where in a model it happened; nn sets it.
-- @treturn string|nil as " (in blocks.3.mlp)"
function M.place() return nil end

--- The first frame outside the library: what the user wrote.
-- Frames of the library and of C are passed over; tail calls leave none.
-- @treturn string|nil "file:line: "
function M.user_frame()
  for level = 2, 60 do
    local info = debug.getinfo(level, "Sl")
    if not info then return nil end
    if info.currentline > 0 and info.source:sub(1, #library) ~= library
      and info.source:sub(1, 1) ~= "=" then
      local name = info.source:sub(1, 1) == "@" and info.source:sub(2) or info.short_src
      return ("%s:%d: "):format(name, info.currentline)
    end
  end
end

--- Raises at the user's line: "file:line: message (in module)".
function M.raise(format, ...)
  local message = select("#", ...) > 0 and format:format(...) or format
  error((M.user_frame() or "") .. message .. (M.place() or ""), 0)
end

--- Raises ds_error() at the user's line if `code` is negative, else returns it.
-- @tparam number code what a C function returned
-- @tparam[opt] string what put before the message, as "layer_norm"
function M.check(code, what)
  if code >= 0 then return code end
  local message = ffi.string(C.ds_error())
  local named = not what or message:sub(1, #what + 1) == what .. ":" -- kernels name themselves
  return M.raise("%s%s", named and "" or what .. ": ", message)
end

--- A message handler for xpcall where the error is raised again further out: keeps the traceback of
-- the place where it happened, which the host prints if nobody catches it.
function M.note(message)
  if host.error ~= message then
    host.error, host.traceback = message, debug.traceback("", 2)
  end
  return message
end

--- "[8 x 1024 x 512]"; a scalar is "[]".
function M.shape_string(shape)
  return "[" .. table.concat(shape, " x ") .. "]"
end

return M
