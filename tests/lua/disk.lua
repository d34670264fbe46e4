--- What a disk may hold after a crash.
--
-- `record` puts itself at the runner's door to the disk and keeps every call that changes
-- something. `states` plays such a log on a model of a disk, stops after each call, and says what
-- could be found there after the machine lost its power at that moment: of every file what was
-- fsynced, or that and zeros, or all that was written; of every folder the names at its last fsync
-- or at any later moment.

local ffi = require "ffi"
local helper = require "tests.lua.helper"
local C = require("ds.ffi").C

local M = {}

local O_CREAT = 64

-- ---- recording

--- Runs f() and returns the calls it made. Callbacks can't be called from compiled code, so the JIT
-- is off meanwhile.
-- @tparam function f
-- @tparam[opt] table refuse by call: the -errno it gives instead, as { exchange = -22 }
-- @treturn table array of calls
-- @treturn boolean whether f() came to its end
-- @treturn string|nil its error
function M.record(f, refuse)
  local io, log, callbacks = C.ds_io_now(), {}, {}
  local original = ffi.new("ds_io")
  ffi.copy(original, io, ffi.sizeof "ds_io")
  local text = { path = true, from = true, to = true }
  local function hook(op, ...)
    local names, real = { ... }, original[op]
    callbacks[op] = ffi.cast(ffi.typeof(real), function(...)
      local call, args = { op = op }, { ... }
      for i, name in ipairs(names) do
        call[name] = text[name] and ffi.string(args[i]) or args[i]
        if name == "at" or name == "bytes" then call[name] = tonumber(args[i]) end
      end
      if call.data then call.data = ffi.string(call.data, call.bytes) end
      if refuse and refuse[op] then return refuse[op] end
      local rc = real(...)
      call.rc, call.time = rc, C.ds_seconds()
      if rc >= 0 then log[#log + 1] = call end
      return rc
    end)
    io[op] = callbacks[op]
  end
  jit.off()
  jit.flush()
  hook("open", "path", "flags", "mode")
  hook("close", "fd")
  hook("allocate", "fd", "bytes")
  hook("write", "queue", "slot", "fd", "data", "bytes", "at")
  hook("truncate", "fd", "bytes")
  hook("sync", "fd")
  hook("rename", "from", "to")
  hook("exchange", "from", "to")
  hook("mkdir", "path")
  hook("unlink", "path")
  hook("rmdir", "path")
  local ok, message = pcall(f)
  ffi.copy(io, original, ffi.sizeof "ds_io")
  for _, callback in pairs(callbacks) do callback:free() end
  jit.on()
  return log, ok, message
end

-- ---- the model: a folder has `names`, what they are now, and `past`, what they were at which
-- call; a file has `now` and `synced`, its bytes

local function new_folder()
  return { names = {}, past = { { at = 0, names = {} } }, synced_at = 0 }
end

local function names_in(path)
  local slot = ffi.new("char *[1]")
  local bytes = tonumber(C.ds_folder_list(slot, path))
  assert(bytes >= 0, path)
  local text, names = ffi.string(slot[0], bytes), {}
  C.ds_free(slot[0])
  for name in text:gmatch("(%Z+)%z") do names[#names + 1] = name end
  return names
end
M.names_in = names_in

--- The model of a folder as it lies on the disk, all of it durable.
function M.scan(path)
  local folder = new_folder()
  for _, name in ipairs(names_in(path)) do
    local inner = path .. "/" .. name
    if C.ds_path_kind(inner) == C.DS_PATH_FOLDER then
      folder.names[name] = M.scan(inner)
    else
      local data = helper.read(inner)
      folder.names[name] = { now = data, synced = data }
    end
  end
  folder.past[1].names = folder.names
  return folder
end

local function split(base, path)
  assert(path:sub(1, #base) == base, path)
  local parts = {}
  for part in path:sub(#base + 1):gmatch("[^/]+") do parts[#parts + 1] = part end
  return parts
end

--- The folder that a path is in, and its name there.
local function locate(root, base, path)
  local parts, folder = split(base, path), root
  for i = 1, #parts - 1 do folder = assert(folder.names[parts[i]], path) end
  return folder, parts[#parts]
end

--- Names are copied when they change: `past` keeps them.
local function set(folder, name, node, at)
  local names = {}
  for k, v in pairs(folder.names) do names[k] = v end
  names[name] = node
  folder.names = names
  folder.past[#folder.past + 1] = { at = at, names = names }
end

local apply = {}

function apply.open(disk, call, at)
  local folder, name = locate(disk.root, disk.base, call.path)
  local node = disk.root
  if name then node = folder.names[name] end
  if not node and bit.band(call.flags, O_CREAT) ~= 0 then
    node = { now = "", synced = "" }
    set(folder, name, node, at)
  end
  disk.fds[call.rc] = assert(node, call.path)
end

function apply.close(disk, call) disk.fds[call.fd] = nil end

function apply.allocate(disk, call)
  local file = disk.fds[call.fd]
  file.now = file.now .. ("\0"):rep(call.bytes - #file.now)
end

function apply.write(disk, call)
  local file = disk.fds[call.fd]
  local now = file.now .. ("\0"):rep(call.at - #file.now)
  file.now = now:sub(1, call.at) .. call.data .. now:sub(call.at + #call.data + 1)
end

function apply.truncate(disk, call)
  local file = disk.fds[call.fd]
  file.now = file.now:sub(1, call.bytes)
end

function apply.sync(disk, call, at)
  local node = disk.fds[call.fd]
  if node.names then node.synced_at = at else node.synced = node.now end
end

function apply.rename(disk, call, at)
  local from, old = locate(disk.root, disk.base, call.from)
  local to, new = locate(disk.root, disk.base, call.to)
  assert(from == to, "renames stay in one folder")
  local node = from.names[old]
  set(from, old, nil, at)
  from.past[#from.past] = nil -- one step, not two
  set(from, new, node, at)
end

function apply.exchange(disk, call, at)
  local folder, a = locate(disk.root, disk.base, call.from)
  local _, b = locate(disk.root, disk.base, call.to)
  local x, y = folder.names[a], folder.names[b]
  set(folder, a, y, at)
  folder.past[#folder.past] = nil
  set(folder, b, x, at)
end

function apply.mkdir(disk, call, at)
  local folder, name = locate(disk.root, disk.base, call.path)
  set(folder, name, new_folder(), at)
end

function apply.unlink(disk, call, at)
  local folder, name = locate(disk.root, disk.base, call.path)
  set(folder, name, nil, at)
end

apply.rmdir = apply.unlink

-- ---- after a crash

local contents = {
  function(file) return file.now end,
  function(file) return file.synced end,
  function(file) return file.synced .. ("\0"):rep(#file.now - #file.synced) end,
}

--- The tree after a crash as nested tables, strings for files.
-- @tparam function moment for a folder: as of which call its names are found
local function tree_of(folder, moment, content)
  local names, tree = nil, {}
  local at = moment(folder)
  for _, step in ipairs(folder.past) do
    if step.at <= at then names = step.names end
  end
  for name, node in pairs(names) do
    tree[name] = node.names and tree_of(node, moment, content) or content(node)
  end
  return tree
end

local function signature(tree)
  local names, parts = {}, {}
  for name in pairs(tree) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do
    local node = tree[name]
    parts[i] = ("%q"):format(name)
      .. (type(node) == "table" and signature(node) or ("%q"):format(node))
  end
  return "{" .. table.concat(parts, ",") .. "}"
end

--- Calls visit(tree, at) for every distinct state in which a crash could leave the disk, `at` being
-- the first call after which it could.
-- @treturn number how many there were
function M.states(root, base, log, visit)
  local disk = { root = root, base = base, fds = {} }
  local seen, count = {}, 0
  for at = 0, #log do
    local call = log[at]
    if call then apply[call.op](disk, call, at) end
    for moment = 0, at do
      for _, content in ipairs(contents) do
        local tree = tree_of(root, function(folder)
          return math.max(moment, folder.synced_at)
        end, content)
        local key = signature(tree)
        -- states after the last call count once more: that is where the save had returned
        if not seen[key] or at == #log and seen[key] ~= "last" then
          seen[key], count = at == #log and "last" or true, count + 1
          visit(tree, at)
        end
      end
    end
  end
  return count
end

--- Writes a tree as files. Temporaries of this process become those of one that is gone.
function M.write(tree, path)
  assert(C.ds_folder_make(path) == 0)
  for name, node in pairs(tree) do
    name = name:gsub("^(%.tmp%-[^-]*%-)%d+%-", "%12147483647-")
    if type(node) == "table" then
      M.write(node, path .. "/" .. name)
    else
      local f = assert(io.open(path .. "/" .. name, "wb"))
      f:write(node)
      f:close()
    end
  end
end

return M
