--- Datasets: text, token files, tensors, lists; and the loader that makes batches of them.
--
-- A dataset is any object with `size()` and `get(i)`, i from 1 to size(): get returns a sample's
-- values, as `x, y`. Those here make whole batches in C as well. A sample of a text or of token
-- files is a window: x, `length` tokens, and y, the same shifted by one, as i32 [length]. (Not i64,
-- as PyTorch has it: i32 is half the memory, and embedding and cross_entropy take both.)

local ffi = require "ffi"
local border = require "ds.ffi"
local loader = require "ds.loader"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise = border.C, border.check, border.raise
local shape_string = border.shape_string
local floor = math.floor

local ENOENT = -7 -- DS_ENOENT of kernels/error.h

local M = { loader = loader.loader }

local function whole(x, least)
  return type(x) == "number" and x % 1 == 0 and x >= least and x < 2 ^ 53
end

--- Returns the options, or raises on one that is not in `known` (a string of names).
local function options_of(given, known, what)
  if given == nil then return {} end
  if type(given) ~= "table" then
    raise("%s: options must be a table, not a %s", what, type(given))
  end
  for key in pairs(given) do
    if not (type(key) == "string" and (" " .. known .. " "):find(" " .. key .. " ", 1, true)) then
      raise("%s: unknown option '%s'; there are %s", what, tostring(key), (known:gsub(" ", ", ")))
    end
  end
  return given
end

--- Calls `open(list)` with the paths as they are, from the current folder, and, if a file is
-- missing, from the script's folder; if that fails too, the message is about the first try.
local function open_files(paths, open)
  local message
  for _, folder in ipairs { "", border.host.script_dir and border.host.script_dir .. "/" } do
    local list = {}
    for i, path in ipairs(paths) do list[i] = path:sub(1, 1) == "/" and path or folder .. path end
    local code = open(list)
    if code ~= ENOENT then return check(code) end
    message = message or ffi.string(C.ds_error())
  end
  raise("%s", message)
end

-- ---- characters and their ids

local Vocabulary = {}
Vocabulary.__index = Vocabulary

local function vocabulary_of(c)
  local v = { _c = ffi.gc(c, C.ds_vocab_free), size = tonumber(C.ds_vocab_size(c)) }
  return setmetatable(v, Vocabulary)
end

--- A string of all characters, in order of their ids.
local function characters(v)
  local all = {}
  for id = 1, v.size do all[id] = id - 1 end
  return v:decode(all)
end

--- A vocabulary of the distinct characters of a UTF-8 string, ids by code point from 0; without a
-- string, of the 256 bytes. `v.characters` is a string that makes the same vocabulary again: plain
-- data for a checkpoint (nil for bytes).
-- @tparam[opt] string text
-- @usage local v = ds.data.vocabulary(train.vocabulary.characters)
function M.vocabulary(text)
  if text ~= nil and type(text) ~= "string" then
    raise("vocabulary: expects a string, not a %s", type(text))
  end
  if text == "" then raise("vocabulary: the string has no characters") end
  local box = ffi.new("ds_vocab *[1]")
  check(C.ds_vocab_make(box, text, text and #text or 0))
  local v = vocabulary_of(box[0])
  v.characters = text and characters(v)
  return v
end

--- The ids of a string's characters.
-- @tparam string text
-- @treturn Tensor i32 [number of characters]
function Vocabulary:encode(text)
  if type(text) ~= "string" then raise("encode: expects a string, not a %s", type(text)) end
  local ids, n = ffi.new("int32_t[?]", #text + 1), ffi.new("int64_t[1]")
  check(C.ds_vocab_encode(ids, n, self._c, text, #text))
  local out = tensor.new({ tonumber(n[0]) }, "i32", "cpu")
  ffi.copy(out._c.data, ids, n[0] * 4)
  return out
end

--- The string that ids stand for.
-- @tparam Tensor|table|number ids of any integer dtype and shape, read row by row
-- @treturn string
function Vocabulary:decode(ids)
  if type(ids) == "number" then ids = { ids } end
  if tensor.is_tensor(ids) then
    tensor.need_tensor(ids, "decode", 1)
    if tensor.floating[ids.dtype] then raise("decode: ids are whole numbers, not %s", ids.dtype) end
  elseif type(ids) == "table" then
    ids = tensor.tensor(ids, { dtype = "i32", device = "cpu" })
  else
    raise("decode: expects a tensor or a table of ids, not a %s", type(ids))
  end
  local n = ids:numel()
  local text, bytes = ffi.new("char[?]", 4 * n + 1), ffi.new("int64_t[1]")
  local narrow = tensor.new(ids.shape, "i32", "cpu")
  if n > 0 then tensor.run("copy", ids.device, narrow._c, ids._c) end
  check(C.ds_vocab_decode(text, bytes, self._c, ffi.cast("int32_t *", narrow._c.data), n))
  scope.release(narrow, "by decode")
  return ffi.string(text, bytes[0])
end

function Vocabulary:__tostring()
  return ("vocabulary of %d %s"):format(self.size, self.characters and "characters" or "bytes")
end

-- ---- windows over a stream of tokens

local Windows = {}
Windows.__index = Windows

--- Windows over tokens [start, start + tokens) of a stream.
-- @tparam table s the stream: { c = ds_tokens, name, stride as asked for, the datasets' fields }
local function windows(s, start, tokens, stride)
  local box = ffi.new("ds_windows *[1]")
  check(C.ds_windows_make(box, s.c, start, tokens, s.length, stride, s.vocab_size or 0))
  return setmetatable({
    _c = ffi.gc(box[0], C.ds_windows_release), _stream = s, _start = start,
    _size = tonumber(C.ds_windows_count(box[0])),
    tokens = tokens, length = s.length, stride = stride, prefetch = s.prefetch,
    vocab_size = s.vocab_size, vocabulary = s.vocabulary,
  }, Windows)
end

--- How many windows there are.
function Windows:size() return self._size end

--- Window i.
-- @treturn Tensor x i32 [length]
-- @treturn Tensor y the same shifted by one
function Windows:get(i)
  if not whole(i, 1) or i > self._size then
    raise("get: there is no sample %s; the dataset has %d", tostring(i), self._size)
  end
  local shape, index = { self.length }, ffi.new("int64_t[1]", i - 1)
  local x, y = tensor.new(shape, "i32", "cpu"), tensor.new(shape, "i32", "cpu")
  check(C.ds_windows_gather(x._c, y._c, self._c, index, 1))
  return x, y
end

-- For the loader: a batch of the windows index[0 … n-1], and a thread that gathers ahead.
function Windows:_gather(index, n)
  local shape = { n, self.length }
  local x, y = tensor.new(shape, "i32", "cpu"), tensor.new(shape, "i32", "cpu")
  check(C.ds_windows_gather(x._c, y._c, self._c, index, n))
  return x, y
end

function Windows:_feed(batch_size, depth)
  local box = ffi.new("ds_feed *[1]")
  check(C.ds_feed_open(box, self._c, batch_size, depth))
  return ffi.gc(box[0], C.ds_feed_close)
end

--- Two datasets: the first `fraction` of the tokens, to train on, and the rest, to validate on.
-- Unless `stride` was given, a text's first part has a window at every position, and the second
-- windows that do not overlap, so that an evaluation reads every token once.
-- @tparam number fraction between 0 and 1
-- @usage local train, val = ds.data.text("input.txt", { length = 64 }):split(0.9)
function Windows:split(fraction)
  if type(fraction) ~= "number" or not (fraction > 0 and fraction < 1) then
    raise("split: expects a fraction between 0 and 1, not %s", tostring(fraction))
  end
  local first = floor(self.tokens * fraction)
  local shorter = math.min(first, self.tokens - first)
  if shorter <= self.length then
    raise("split: %s of %d tokens leave a part of %d, and a window of length %d takes %d",
      tostring(fraction), self.tokens, shorter, self.length, self.length + 1)
  end
  return windows(self._stream, self._start, first, self.stride),
    windows(self._stream, self._start + first, self.tokens - first,
      self._stream.stride or self._stream.length)
end

--- As vocabulary:encode and vocabulary:decode, for text.
for _, name in ipairs { "encode", "decode" } do
  Windows[name] = function(self, value)
    if not self.vocabulary then
      raise("%s: token files have no vocabulary; their tokenizer has", name)
    end
    return self.vocabulary[name](self.vocabulary, value)
  end
end

function Windows:__tostring()
  return ("%s: %d windows of %d, one every %d of %d tokens%s"):format(self._stream.name, self._size,
    self.length, self.stride, self.tokens,
    self.vocab_size and (", vocabulary of %d"):format(self.vocab_size) or "")
end

local function check_window(o, what)
  if not whole(o.length, 1) then
    raise("%s: length must be a whole number of at least 1, not %s", what, tostring(o.length))
  end
  if o.stride ~= nil and not whole(o.stride, 1) then
    raise("%s: stride must be a whole number of at least 1, not %s", what, tostring(o.stride))
  end
end

--- A text file as windows of characters or bytes, with `vocab_size`, `vocabulary`, `encode`,
-- `decode` and `split`. Characters are those of UTF-8, numbered by code point.
-- @tparam string path relative to the current folder, or else to the script's
-- @tparam[opt] table options
--   length (64): tokens in a window;
--   level ("char"): or "byte", which takes any file and has a vocabulary of 256;
--   stride: tokens from one window to the next; 1, and `length` for a split's second part
-- @usage local train, val = ds.data.text("input.txt", { length = 64 }):split(0.9)
function M.text(path, options)
  local o = options_of(options, "length level stride", "text")
  if type(path) ~= "string" then raise("text: expects a file's path, not a %s", type(path)) end
  local level = o.level or "char"
  if level ~= "char" and level ~= "byte" then
    raise("text: unknown level '%s'; there are \"char\" and \"byte\"", tostring(level))
  end
  local s = { name = path, length = o.length or 64, stride = o.stride, prefetch = 0 }
  check_window(s, "text")
  local stream, vocab = ffi.new("ds_tokens *[1]"), ffi.new("ds_vocab *[1]")
  open_files({ path }, function(list)
    return C.ds_tokens_text(stream, vocab, list[1], level == "byte" and 1 or 0)
  end)
  s.c = ffi.gc(stream[0], C.ds_tokens_release)
  s.vocabulary = vocabulary_of(vocab[0])
  s.vocab_size = s.vocabulary.size
  s.vocabulary.characters = level == "char" and characters(s.vocabulary) or nil
  return windows(s, 0, tonumber(C.ds_tokens_count(s.c)), s.stride or 1)
end

local widths = { uint16 = 2, int32 = 4, auto = 0 }

--- Token files as windows: memory-mapped, one stream whose windows do not cross the end of a file.
-- Files in llm.c's format (a header of 256 int32, then uint16, or uint32 for its second magic
-- number) tell what they hold; for raw ones say it with dtype. The loader's thread reads the pages.
-- @tparam string|table paths a path, a pattern (`data/train_*.bin`, sorted by name), or a table
-- @tparam table options
--   length: tokens in a window;
--   dtype ("auto"): "uint16" or "int32" for files without a header;
--   stride (length): tokens from one window to the next, so an epoch reads every token once;
--   vocab_size: tokens from it on are an error that names file and position
-- @usage local train = ds.data.tokens("data/train_*.bin", { length = 1024, vocab_size = 50257 })
function M.tokens(paths, options)
  local o = options_of(options, "length dtype stride vocab_size", "tokens")
  if type(paths) == "string" then paths = { paths } end
  if type(paths) ~= "table" or #paths == 0 then
    raise("tokens: expects a path, a pattern or a table of them, not %s",
      type(paths) == "table" and "an empty table" or "a " .. type(paths))
  end
  local width = widths[o.dtype or "auto"]
  if not width then
    raise("tokens: unknown dtype '%s'; there are uint16, int32 and auto", tostring(o.dtype))
  end
  if o.vocab_size ~= nil and not whole(o.vocab_size, 1) then
    raise("tokens: vocab_size must be a whole number of at least 1, not %s", tostring(o.vocab_size))
  end
  local s = { name = tostring(paths[1]), length = o.length, stride = o.stride or o.length,
    prefetch = 4, vocab_size = o.vocab_size }
  check_window(s, "tokens")
  for i, path in ipairs(paths) do
    if type(path) ~= "string" then raise("tokens: path %d is a %s, not a string", i, type(path)) end
  end
  local stream = ffi.new("ds_tokens *[1]")
  open_files(paths, function(list)
    return C.ds_tokens_open(stream, ffi.new("const char *[?]", #list, list), #list, width)
  end)
  s.c = ffi.gc(stream[0], C.ds_tokens_release)
  return windows(s, 0, tonumber(C.ds_tokens_count(s.c)), s.stride)
end

-- ---- tensors and lists

local Tensors = {}
Tensors.__index = Tensors

--- A dataset over the first dimension of tensors of equal length: sample i is row i of each.
-- @usage local train = ds.data.tensors(images, labels)
function M.tensors(...)
  local self = { ... }
  if #self == 0 then raise("tensors: expects at least one tensor") end
  for i, t in ipairs(self) do
    tensor.need_tensor(t, "tensors", i)
    if #t.shape == 0 then
      raise("tensors: tensor %d is a scalar; samples are its first dimension", i)
    end
    if t.shape[1] ~= self[1].shape[1] then
      raise("tensors: tensor 1 is %s and tensor %d %s; the first dimensions must be equal",
        shape_string(self[1].shape), i, shape_string(t.shape))
    end
  end
  return setmetatable(self, Tensors)
end

function Tensors:size() return self[1].shape[1] end

function Tensors:get(i)
  if not whole(i, 1) or i > self:size() then
    raise("get: there is no sample %s; the dataset has %d", tostring(i), self:size())
  end
  local row = {}
  for k, t in ipairs(self) do row[k] = tensor.view.select(t, 1, i) end
  return unpack(row)
end

function Tensors:_gather(index, n)
  local rows, at = {}, tensor.new({ n }, "i64", "cpu")
  ffi.copy(at._c.data, index, n * 8)
  for k, t in ipairs(self) do
    local shape = { n, unpack(t.shape, 2) }
    local on_device = t.device == "cpu" and at or at:to(t.device)
    rows[k] = tensor.new(shape, t.dtype, t.device)
    tensor.run("index_select", t.device, rows[k]._c, t._c, on_device._c, 0)
  end
  scope.release(at, "by the loader")
  return unpack(rows)
end

local List = {}
List.__index = List

--- A dataset over a table of samples: numbers, tensors, tables of numbers, or tables of several
-- such values, as `{ x, y }`. A table whose first entry is a number is one value.
-- @usage local train = ds.data.list { { x1, y1 }, { x2, y2 } }
function M.list(samples)
  if type(samples) ~= "table" or tensor.is_tensor(samples) then
    raise("list: expects a table of samples")
  end
  return setmetatable({ samples = samples }, List)
end

function List:size() return #self.samples end

function List:get(i)
  local sample = self.samples[i]
  if type(sample) == "table" and not tensor.is_tensor(sample) and type(sample[1]) == "table" then
    return unpack(sample)
  end
  return sample
end

return M
