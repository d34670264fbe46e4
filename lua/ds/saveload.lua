--- Tensors in files: `ds.save`, `ds.load`, and the safetensors files that checkpoints are made of.
--
-- Data only: a file holds tensors under names, and the tables around them as JSON; loading executes
-- nothing. Any safetensors file can be loaded, and other tools can open what is saved here.

local ffi = require "ffi"
local border = require "ds.ffi"
local json = require "ds.json"
local offload = require "ds.offload"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise = border.C, border.check, border.raise
local shape_string = border.shape_string
local codes, names = tensor.codes, tensor.names

local M = {}

-- ---- writing a file of named tensors

local hash_text = ffi.typeof("char[17]")
local file_slot = ffi.typeof("ds_file *[1]")

-- An item is { name, tensor }; the tensor may be a vector on a disk (ds/offload.lua). `transposed`:
-- a matrix that lies transposed in the file; `dtype`: it is converted to this one; `changes`: its
-- values may change while it is written; `load`: of a
-- tensor on the meta device load(first, n) gives the values that are wanted next, n elements from
-- `first` on (0-based, row-major), in the file's dtype.

local function width_of(item)
  return tonumber(C.ds_dtype_size(codes[item.dtype or item[2].dtype]))
end

local function bytes_of(item) return item[2]:numel() * width_of(item) end

--- An item's shape in the file.
local function shape_of(item)
  local shape = item[2].shape
  return item.transposed and { shape[2], shape[1] } or shape
end

--- Bytes that a list of items takes, without the header.
function M.bytes(list)
  local n = 0
  for _, item in ipairs(list) do n = n + bytes_of(item) end
  return n
end

--- Wider dtypes first, else the given order: then every tensor in the file is aligned.
function M.by_width(list)
  local order = {}
  for i, item in ipairs(list) do order[i] = { item = item, width = width_of(item), i = i } end
  table.sort(order, function(a, b)
    if a.width ~= b.width then return a.width > b.width end
    return a.i < b.i
  end)
  for i, o in ipairs(order) do order[i] = o.item end
  return order
end

local function describe(list, what)
  local entries = ffi.new("ds_entry[?]", math.max(1, #list))
  for i, item in ipairs(list) do
    local name, t = item[1], item[2]
    local e = entries[i - 1]
    if not (offload.is_stored(t) or tensor.is_tensor(t) and t._unit) then
      tensor.need_tensor(t, what, i) -- one that is sharded is gathered before it is appended
    end
    if t.device == "meta" and not item.load then
      raise("%s: '%s' is on the meta device and has no data", what, tostring(name))
    end
    if type(name) ~= "string" or name == "" or name:find("%z") then
      raise("%s: %q cannot be a tensor's name", what, tostring(name))
    end
    e.name, e.dtype, e.ndim = name, codes[item.dtype or t.dtype], #t.shape
    for d, size in ipairs(shape_of(item)) do e.shape[d - 1] = size end
  end
  return entries
end

--- A dense tensor on the CPU with an item's values, as they are to lie in the file.
local function copy_of(item)
  local t, copy = item[2], tensor.new(shape_of(item), item.dtype or item[2].dtype, "cpu")
  tensor.run("copy", t.device, copy._c, (item.transposed and t:t() or t)._c)
  return copy
end

-- ---- writing while the caller computes

local Background = {}
Background.__index = Background

--- What writes files on a thread of its own: an option of create(). From start() on tensors are
-- read from where they lie, until release().
-- @treturn table
function M.background()
  local slot = ffi.new("ds_writer *[1]")
  check(C.ds_writer_open(slot))
  return setmetatable({ _w = ffi.gc(slot[0], C.ds_writer_close), held = {} }, Background)
end

--- Begins to write.
function Background:start() check(C.ds_writer_start(self._w), "save_checkpoint") end

--- When it returns, the tensors may be changed: what was not written yet is copied, at most `most`
-- bytes, and for the rest it waited.
function Background:release(most)
  check(C.ds_writer_release(self._w, most), "save_checkpoint")
  self.held = {}
end

--- 1 while it writes, 0 when everything is on the disk, 2 if that failed, which wait() explains.
function Background:state()
  local state = C.ds_writer_state(self._w)
  return state < 0 and 2 or state
end

--- Returns when all is on the disk; raises if that failed.
function Background:wait() check(C.ds_writer_wait(self._w), "save_checkpoint") end

--- What writing took, once it is over, also after close().
-- @treturn table bytes, copied, seconds, cpu_seconds, held_seconds, as ds_writer_stats
function Background:statistics()
  if not self._w then return self.last end
  local s = C.ds_writer_statistics(self._w)
  return { bytes = tonumber(s.bytes), copied = tonumber(s.copied), seconds = s.seconds,
    cpu_seconds = s.cpu_seconds, held_seconds = s.held_seconds }
end

--- Stops what is not done, and drops it.
function Background:close()
  if self._w then
    self.last = self:statistics()
    C.ds_writer_close(ffi.gc(self._w, nil))
  end
  self._w, self.held = nil, {}
end

-- ---- one file

local Writer = {}
Writer.__index = Writer

--- Starts a safetensors file. The caller appends every item of `writer.list`, in that order, and
-- commits.
-- @tparam string path
-- @tparam table list of items
-- @tparam table options `replace`: whether a file of that name is replaced, at once and only by a
-- whole one (else it is an error, and the folder is the caller's to sync); `meta`: array of key,
-- value, key, value…, strings; `what`: the caller, for messages; `background`: what background()
-- gave, which then does the work
-- @treturn table the writer
function M.create(path, list, options)
  local what = options.what or "save"
  list = M.by_width(list)
  local entries, slot = describe(list, what), file_slot()
  local meta = options.meta or {}
  local keys = ffi.new("const char *[?]", #meta + 1) -- zeroed; with a table the rest would not be
  for i, word in ipairs(meta) do keys[i - 1] = word end
  check(C.ds_tensors_create(slot, path, entries, #list, keys, options.replace and 1 or 0), what)
  return setmetatable({ path = path, list = list, what = what, background = options.background,
    _f = ffi.gc(slot[0], C.ds_file_discard) }, Writer)
end

local PIECE = 4 * 2 ^ 20 -- elements that are loaded at a time

local function append_loaded(self, item)
  local n, width = item[2]:numel(), width_of(item)
  for first = 0, n - 1, PIECE do
    local count = math.min(PIECE, n - first)
    scope.no_grad(function()
      local t = item.load(first, count)
      C.ds_file_append(self._f, t._c.data, count * width, 0)
    end)
  end
end

--- Leaves an item to the background; what may change before release(), or is not as it is to lie in
-- the file, is copied.
local function append_later(self, item, direct)
  local t, w, held = item[2], self.background._w, self.background.held
  if not direct or item.changes then
    t = copy_of(item):keep()
  elseif item.transposed then
    held[#held + 1] = t
    return check(C.ds_writer_append_transposed(w, self._f, t._c.data, t.shape[1], t.shape[2],
      width_of(item)))
  end
  held[#held + 1] = t
  check(C.ds_writer_append(w, self._f, t._c.data, bytes_of(item)))
end

--- Appends the next item's elements. What the disk refuses is told by commit().
-- @tparam table item
-- @tparam[opt] boolean moves the tensor's memory may change before commit()
function Writer:append(item, moves)
  local t = item[2]
  if item.load then return append_loaded(self, item) end
  if offload.is_stored(t) then
    return t:each(function(part)
      C.ds_file_append(self._f, part._c.data, part:numel() * width_of(item), 0)
    end)
  end
  local direct = t.device == "cpu" and t._c.dense == 1
    and (not item.dtype or item.dtype == t.dtype)
  if self.background then
    append_later(self, item, direct)
  elseif direct and item.transposed then
    C.ds_file_append_transposed(self._f, t._c.data, t.shape[1], t.shape[2], width_of(item))
  elseif direct then
    C.ds_file_append(self._f, t._c.data, bytes_of(item), moves and 0 or 1)
  else
    local copy = copy_of(item)
    C.ds_file_append(self._f, copy._c.data, bytes_of(item), 0)
    scope.release(copy, "after it was written")
  end
end

--- Brings the file to the disk.
-- @treturn string|function hash of the whole file; in the background a function that gives it when
-- all is written
function Writer:commit()
  local w = self.background and self.background._w
  if w then
    local number = check(C.ds_writer_commit(w, self._f), self.what)
    ffi.gc(self._f, nil) -- it is the background's now
    return function() return ffi.string(C.ds_writer_hash(w, number)) end
  end
  local hash = hash_text()
  check(C.ds_file_commit(ffi.gc(self._f, nil), hash), self.what)
  return ffi.string(hash)
end

--- Gives up: nothing is left of the file.
function Writer:discard() C.ds_file_discard(ffi.gc(self._f, nil)) end

--- Writes a safetensors file, durably.
-- @tparam string path
-- @tparam table list of items
-- @tparam table options as for create()
-- @treturn string hash of the whole file
function M.write(path, list, options)
  local writer = M.create(path, list, options)
  local ok, message = pcall(function()
    for _, item in ipairs(writer.list) do writer:append(item) end
  end)
  if not ok then
    writer:discard()
    error(message, 0)
  end
  return writer:commit()
end

-- ---- reading one

local File = {}
File.__index = File

--- Opens a file for reading; raises if there is none.
-- @treturn table `path`, `bytes` and the methods `hash`, `text`, `parse`, `read`, `info`, `close`
function M.file(path, what)
  local slot = file_slot()
  check(C.ds_file_open(slot, path), what)
  return setmetatable({ path = path, bytes = tonumber(C.ds_file_bytes(slot[0])), what = what,
    _f = ffi.gc(slot[0], C.ds_file_close) }, File)
end

--- Hash of the whole file, as in a manifest.
function File:hash()
  local hash = hash_text()
  check(C.ds_file_hash(self._f, hash), self.what)
  return ffi.string(hash)
end

--- The whole file as a string.
function File:text()
  if self.bytes > 2 ^ 28 then
    raise("'%s' has %d bytes; no text file is so long", self.path, self.bytes)
  end
  local buffer = ffi.new("char[?]", math.max(1, self.bytes))
  check(C.ds_file_read(self._f, buffer, self.bytes, 0), self.what)
  return ffi.string(buffer, self.bytes)
end

--- Reads the header of a safetensors file.
-- @treturn table self, with `names` in the order of the file and `entries` by name
function File:parse()
  local slot = ffi.new("ds_tensors *[1]")
  check(C.ds_tensors_parse(slot, self._f), self.what)
  self._t = ffi.gc(slot[0], C.ds_tensors_free)
  self.names, self.entries = {}, {}
  for i = 1, C.ds_tensors_count(self._t) do
    local e = C.ds_tensors_entry(self._t, i - 1)
    local name, shape = ffi.string(e.name), {}
    for d = 1, e.ndim do shape[d] = tonumber(e.shape[d - 1]) end
    self.names[i] = name
    self.entries[name] = { dtype = names[e.dtype], shape = shape, entry = e }
  end
  return self
end

--- A string of the file's metadata, or nil.
function File:meta(key)
  local text = C.ds_tensors_meta(self._t, key)
  return text ~= nil and ffi.string(text) or nil
end

--- dtype and shape of a tensor.
function File:info(name)
  local e = self.entries[name]
  if not e then raise("%s: '%s' has no tensor '%s'", self.what, self.path, name) end
  return e.dtype, e.shape
end

--- Fills a tensor with the saved one, converting where the dtypes differ.
-- @tparam string name
-- @tparam Tensor t of the same shape
-- @tparam[opt] table options `from`: fill t, of any shape, with the elements from that one on
-- (0-based, row-major)
-- @treturn Tensor t
function File:read(name, t, options)
  local dtype, shape = self:info(name)
  local from = options and options.from
  tensor.need_tensor(t, self.what, 2)
  if not from and shape_string(shape) ~= shape_string(t.shape) then
    raise("%s: tensor '%s' is %s in '%s', and %s here", self.what, name, shape_string(shape),
      self.path, shape_string(t.shape))
  end
  local direct = t.device == "cpu" and t._c.dense == 1 and t.dtype == dtype
  local to = direct and t or tensor.new(t.shape, dtype, "cpu")
  local entry = self.entries[name].entry
  check(C.ds_tensors_read(self._f, entry, to._c.data, from or 0, t:numel()), self.what)
  if not direct then
    tensor.run("copy", t.device, t._c, to._c)
    scope.release(to, "after it was read")
  end
  return t
end

--- Closes the file; nothing can be read any more.
function File:close()
  if self._t then C.ds_tensors_free(ffi.gc(self._t, nil)) end
  if self._f then C.ds_file_close(ffi.gc(self._f, nil)) end
  self._t, self._f, self.entries = nil, nil, {}
end

-- ---- reading one once, from its beginning to its end

local Stream = {}
Stream.__index = Stream

--- Opens a file to be read once, all of it hashed on the way.
-- @treturn table the methods below
function M.stream(path, what)
  local slot = ffi.new("ds_reader *[1]")
  check(C.ds_reader_open(slot, path), what)
  return setmetatable({ at = 0, what = what,
    _s = ffi.gc(slot[0], function(s) C.ds_reader_end(s, nil) end) }, Stream)
end

--- Passes over all bytes before `offset`.
function Stream:pass(offset)
  check(C.ds_reader_read(self._s, nil, offset - self.at), self.what)
  self.at = offset
end

--- Fills a dense tensor on the CPU with the next bytes.
function Stream:read(t)
  local bytes = t:numel() * tonumber(C.ds_dtype_size(codes[t.dtype]))
  check(C.ds_reader_read(self._s, t._c.data, bytes), self.what)
  self.at = self.at + bytes
end

--- Reads the rest and closes the file.
-- @treturn string hash of the whole file
function Stream:finish()
  local hash = hash_text()
  check(C.ds_reader_end(ffi.gc(self._s, nil), hash), self.what)
  return ffi.string(hash)
end

-- ---- ds.save, ds.load: the tables around the tensors are JSON in the file's metadata; in it a
-- tensor is {"tensor": name}, an array {"list": […]}, any other table {"table": {…}}

local VALUE, DEPTH = "ds.value", 100

local function keys_of(t, path)
  local keys, n = {}, 0
  for key in pairs(t) do
    n = n + 1
    if type(key) == "string" then
      keys[#keys + 1] = key
    elseif type(key) ~= "number" then
      raise("save: %s has a key that is a %s; keys are strings, or 1 to n", path, type(key))
    end
  end
  if #keys == 0 and (n > 0 or json.is_array(t)) then
    for i = 1, n do
      if t[i] == nil then
        raise("save: %s is an array with holes, or has keys other than 1 to %d", path, n)
      end
    end
    return nil, n
  end
  if #keys ~= n then raise("save: %s has mixed keys, strings and numbers", path) end
  table.sort(keys)
  return keys, n
end

local function unique(state, name)
  local candidate, n = name, 1
  while state.used[candidate] do
    n = n + 1
    candidate = name .. "#" .. n
  end
  state.used[candidate] = true
  return candidate
end

local function describe_value(state, value, path, name, depth)
  if tensor.is_tensor(value) then
    if not state.names[value] then -- a tensor met twice is saved once, and is one again when loaded
      state.names[value] = unique(state, name == "" and "tensor" or name)
      state.list[#state.list + 1] = { state.names[value], value }
    end
    return '{"tensor":' .. json.encode(state.names[value], { name = path }) .. "}"
  elseif type(value) ~= "table" or value == json.null then
    return json.encode(value, { name = path })
  elseif state.open[value] then
    raise("save: %s contains itself (at %s)", path, state.open[value])
  elseif depth > DEPTH then
    raise("save: %s is nested deeper than %d levels", path, DEPTH)
  end
  state.open[value] = path
  local keys, n = keys_of(value, path)
  local parts = {}
  for i = 1, n do
    local key = keys and keys[i] or i
    local inner = (keys and "%s.%s" or "%s[%s]"):format(path, tostring(key))
    local inner_name = name == "" and tostring(key) or name .. "." .. key
    parts[i] = (keys and json.encode(key, { name = path }) .. ":" or "")
      .. describe_value(state, value[key], inner, inner_name, depth + 1)
  end
  state.open[value] = nil
  return (keys and '{"table":{%s}}' or '{"list":[%s]}'):format(table.concat(parts, ","))
end

--- Saves a tensor, or a table of tensors, tables, numbers, strings and booleans, into one file.
-- The file appears under its name when all of it is on the disk.
-- @tparam Tensor|table value
-- @tparam string path
-- @treturn boolean true
-- @usage ds.save({ weight = w, note = "best so far" }, "best.safetensors")
function M.save(value, path)
  if type(path) ~= "string" or path == "" or type(value) ~= "table" then
    raise("save: expects ds.save(value, path) with a tensor or a table, and a path; got a %s and "
      .. "a %s", type(value), type(path))
  end
  local state = { names = {}, used = {}, list = {}, open = {} }
  local text = describe_value(state, value, "value", "", 1)
  M.write(path, state.list, { replace = true, meta = { "format", "pt", VALUE, text } })
  return true
end

local function rebuild(f, made, value)
  if type(value) ~= "table" or value == json.null then return value end
  local out = {}
  if type(value.tensor) == "string" then
    local name = value.tensor
    if not made[name] then
      local dtype, shape = f:info(name)
      made[name] = f:read(name, tensor.empty(shape, { dtype = dtype }))
    end
    return made[name]
  elseif type(value.list) == "table" then
    for i, item in ipairs(value.list) do out[i] = rebuild(f, made, item) end
    return #out == 0 and json.array(out) or out
  elseif type(value.table) == "table" then
    for key, item in pairs(value.table) do out[key] = rebuild(f, made, item) end
    return out
  end
  raise("load: '%s' is damaged: its metadata '%s' makes no sense", f.path, VALUE)
end

--- Loads what ds.save wrote; a safetensors file from elsewhere becomes a table of tensors by name.
-- @tparam string path
-- @treturn Tensor|table
function M.load(path)
  if type(path) ~= "string" then raise("load: expects a path, got a %s", type(path)) end
  local f = M.file(path, "load"):parse()
  local text, value = f:meta(VALUE), { table = {} }
  if text then
    local message
    value, message = json.decode(text, path)
    if value == nil then raise("load: '%s' is damaged: %s", path, message) end
  else
    for _, name in ipairs(f.names) do value.table[name] = { tensor = name } end
  end
  local out = rebuild(f, {}, value)
  f:close()
  return out
end

return M
