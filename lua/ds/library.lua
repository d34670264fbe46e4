--- Kernels of the user's own, in C or CUDA, out of a shared library: `ds.load_library`.
--
-- What the library declares becomes Lua functions that check their arguments first: tensors are
-- alive and whole (at ZeRO stage 3, too) and on the library's device, numbers are numbers; a
-- negative code becomes ds_error()'s message at the user's line. They record nothing: a gradient
-- comes from the ds.Function that calls them.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, raise = border.C, border.raise

local M = {}

-- ---- declarations

--- What a parameter takes: "tensor" (written), "input" (a const one), "integer", "number", or
-- "pointer", which is LuaJIT's to check.
local function kind_of(parameter)
  local _, stars = parameter:gsub("%*", "")
  if stars > 0 or parameter:find "%[" then
    if stars > 1 or not parameter:find "%f[%w_]ds_tensor%f[^%w_]" then return "pointer" end
    return parameter:find "%f[%w_]const%f[^%w_]" and "input" or "tensor"
  end
  return (parameter:find "%f[%w_]double%f[^%w_]" or parameter:find "%f[%w_]float%f[^%w_]")
    and "number" or "integer"
end

--- The functions that a C text declares, in order.
-- @treturn table of { name =, result =, kinds = {…}, parameters = "(…)" }
local function functions_of(text)
  local out = {}
  local plain = text:gsub("/%*.-%*/", " "):gsub("//[^\n]*", " "):gsub("%b{}", " ")
  for statement in plain:gmatch "([^;]+);" do
    local result, name, parameters = statement:match "^%s*(.-)([%a_][%w_]*)%s*(%b())%s*$"
    if name and not result:find "^typedef" and result:find "%S" then
      local f = { name = name, kinds = {}, parameters = parameters:gsub("%s+", " "),
        result = result:gsub("extern%s", ""):match "^%s*(.-)%s*$" }
      local inner = parameters:sub(2, -2)
      if inner:find "%S" and inner:match "^%s*void%s*$" == nil then
        for parameter in inner:gmatch "[^,]+" do f.kinds[#f.kinds + 1] = kind_of(parameter) end
      end
      out[#out + 1] = f
    end
  end
  return out
end

-- ---- calls

local sync = os.getenv "DS_SYNC"
sync = sync and sync ~= "" and sync ~= "0"

local function must_be(f, i, wanted, value)
  raise("%s: argument %d must be %s, not %s; it takes %s", f.name, i, wanted,
    value == nil and "nil" or type(value) == "table" and "a table"
      or ("%s %s"):format(type(value), tostring(value)), f.parameters)
end

--- The handle of a tensor that may be given. Nil is NULL.
local function handle_of(f, i, t)
  if t == nil then return nil end
  if not tensor.is_tensor(t) then must_be(f, i, "a tensor or nil", t) end
  if f.kinds[i] == "input" and t.requires_grad and scope.grad then
    raise("%s: argument %d wants a gradient, and functions of a library have none: call it in the "
      .. "forward of a ds.Function, or inside ds.no_grad", f.name, i)
  end
  local wanted = f.library.device
  if t.device ~= "meta" and wanted ~= "any" and t.device ~= wanted then
    raise("%s: argument %d is on %s, and %s was loaded for %s (load_library's option `device`)",
      f.name, i, t.device, f.library.path, wanted)
  end
  return t._c
end

local function plain_of(f, i, value)
  local kind = f.kinds[i]
  if kind == "pointer" or type(value) == "cdata" then return value end
  if type(value) == "boolean" and kind == "integer" then return value end
  if type(value) ~= "number" then must_be(f, i, "a number", value) end
  if kind == "integer" and value ~= math.floor(value) then must_be(f, i, "whole", value) end
  return value
end

--- What a C function returned, as Lua has it: no 64-bit integers, no C strings.
local function result_of(f, value)
  if f.result == "int" then return border.check(value, f.name) end
  if f.result == "const char *" or f.result == "const char*" then
    return value ~= nil and ffi.string(value) or nil
  end
  return type(value) == "cdata" and tonumber(value) or value
end

local function call(f, ...)
  local n, given, tensors, meta = #f.kinds, { ... }, {}, false
  if select("#", ...) ~= n then
    raise("%s: expects %d arguments, %s, and was given %d", f.name, n, f.parameters,
      select("#", ...))
  end
  for i = 1, n do
    local kind, value = f.kinds[i], given[i]
    if kind == "tensor" or kind == "input" then
      given[i] = handle_of(f, i, value)
      if value ~= nil then
        tensors[#tensors + 1] = value
        meta = meta or value.device == "meta"
      end
    else
      given[i] = plain_of(f, i, value)
    end
  end
  if meta then -- shapes without values: there is nothing to compute
    for _, t in ipairs(tensors) do
      if t.device ~= "meta" then
        raise("%s: some tensors are on %s and some on meta", f.name, t.device)
      end
    end
    return f.result == "int" and 0 or nil
  end
  tensor.revive_all(f.name, unpack(tensors))
  local value = result_of(f, f.call(unpack(given, 1, n)))
  if sync and f.library.device ~= "cpu" then
    border.check(C.ds_device_synchronize(1), f.name)
  end
  return value
end

-- ---- loading

--- A library of other headers is not called: tensors would lie elsewhere, arguments would be
-- others. One that knows nothing of tensors needs none.
local function check_headers(path, clib, declarations)
  local same = border.same_headers(clib)
  if same == false then
    raise("load_library: %s was compiled with the headers of another dsrun: compile it again, with "
      .. "those in ds.include_folder()", path)
  end
  if same == nil and declarations:find "%f[%w_]ds_%w" then
    raise("load_library: %s does not say which headers it was compiled with: include "
      .. "kernels/tensor.h or runner/ds.h of ds.include_folder(), and compile it again", path)
  end
end

local Library = {}
function Library.__index(library, name)
  raise("%s declares no function '%s'", rawget(library, "path"), tostring(name))
end

local devices = { cpu = true, cuda = true, any = true }

--- Opens a shared library and makes functions of what is declared.
-- @tparam string path of the library
-- @tparam[opt] string declarations C prototypes, as "int scale(ds_tensor *y, const ds_tensor *x,
--   double a);". A negative int is an error, whose message is what ds_fail() was given. Without
--   them the library has them itself: `const char ds_cdef[] = "…";`
-- @tparam[opt] table options device: "cpu", "cuda", or "any", where functions look for themselves;
--   where their tensors must be (default: "cpu")
-- @treturn table functions by name
-- @usage local lib = ds.load_library("./scale.so", "int scale(ds_tensor *y, const ds_tensor *x);")
function M.load_library(path, declarations, options)
  if type(declarations) == "table" and options == nil then
    declarations, options = nil, declarations
  end
  local device = (options or {}).device or "cpu"
  if type(path) ~= "string" or declarations ~= nil and type(declarations) ~= "string" then
    raise("load_library: expects (path, declarations), as ds.load_library(\"./scale.so\", "
      .. "\"int scale(ds_tensor *y, const ds_tensor *x);\")")
  end
  if not devices[device] then
    raise("load_library: unknown device '%s'; there are cpu, cuda, any", tostring(device))
  end
  local ok, clib = pcall(border.open_library, path)
  if not ok then raise("load_library: %s", clib) end
  declarations = declarations or border.declarations_of(clib)
  if not declarations then
    raise("load_library: no declarations were given, and %s has none (const char ds_cdef[])", path)
  end
  local fine, problem = pcall(border.declare, declarations)
  if not fine then raise("load_library: the declarations of %s: %s", path, problem) end
  check_headers(path, clib, declarations)
  local library = { path = path, device = device }
  local out, count = { path = path }, 0
  for _, f in ipairs(functions_of(declarations)) do
    local found, symbol = pcall(function() return clib[f.name] end)
    if not found then
      raise("load_library: %s has no function %s (in C++ and CUDA it is to be extern \"C\")", path,
        f.name)
    end
    f.library, f.call = library, symbol
    out[f.name] = function(...) return call(f, ...) end
    count = count + 1
  end
  if count == 0 then
    raise("load_library: the declarations of %s declare no function", path)
  end
  return setmetatable(out, Library)
end

--- The folder of the headers that a library's source includes: `-I` for its compiler. They are
-- kernels/tensor.h, error.h, dtype.h, philox.h, and runner/ds.h. A library carries their number,
-- and is refused by a dsrun whose headers declare something else.
-- @treturn string
function M.include_folder()
  local root = border.host.root
  for _, folder in ipairs { root .. "/..", root .. "/../../../include/dsrun" } do
    local file = io.open(folder .. "/kernels/tensor.h")
    if file then
      file:close()
      return folder
    end
  end
  return raise("include_folder: there are no headers beside %s", root)
end

return M
