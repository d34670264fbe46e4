--- Tensors: creation, views, in-place changes, reading values.
--
-- A Tensor is a small Lua table around a C handle, so users may hang fields on it and the engine
-- may
-- re-point it into a flat buffer while every module keeps the same object:
--
--     _c       cdata ds_tensor (kernels/tensor.h)
--     shape    Lua array of sizes; shared between tensors, never changed
--     dtype    "f32" "bf16" "f16" "f64" "i64" "i32" "u8" "bool"
--     device   "cpu", "cuda", "meta" (a shape without data)
--     requires_grad, grad
--
-- Index rule: numbers you type are positions and 1-based, -1 is the last; numbers inside tensors
-- (ids, labels, results of argmax) are 0-based. The shift between the two is in this file alone.
-- Operations with gradients (arithmetic, views, matmul …) are in ops.lua, which adds them as
-- methods.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"

local C, check, raise = border.C, border.check, border.raise
local shape_string = border.shape_string

local methods = {}
local Tensor = { __index = methods }
local M = { Tensor = Tensor, methods = methods }

-- The operations are loaded when the first of their methods is asked for: a script that only reads
-- a
-- configuration starts faster. Fields that are not there are nil; a number is a mistake worth a
-- message.
local loaded = false
setmetatable(methods, { __index = function(_, key)
  if type(key) == "number" then
    raise("a tensor is not indexed by [%s]; use x:select(1, %s), x:narrow(dim, start, length) or "
      .. "x:item()",
      key, key)
  end
  if not loaded then
    loaded = true
    require "ds.functional"
    return rawget(methods, key)
  end
end })

--- Scripts may hang fields on a tensor; an element is no field.
function Tensor.__newindex(t, key, value)
  if type(key) == "number" then
    raise("a tensor is not assigned by [%s]; use x:select(1, %s):copy_(y) or :fill_(number)", key,
      key)
  end
  rawset(t, key, value)
end

for _, event in ipairs { "__add", "__sub", "__mul", "__div", "__pow", "__unm", "__tostring" } do
  Tensor[event] = function(a, b)
    require(event == "__tostring" and "ds.format" or "ds.functional")
    return Tensor[event](a, b)
  end
end

local handle = ffi.typeof("ds_tensor")
local sizes = ffi.typeof("int64_t[8]")
local order = ffi.typeof("int32_t[8]")
local codes = { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i64 = 4, i32 = 5, u8 = 6, bool = 7 }
local names = { [0] = "f32", "bf16", "f16", "f64", "i64", "i32", "u8", "bool" }
local devices = { cpu = 0, cuda = 1, meta = 2 }
local floating = { f32 = true, bf16 = true, f16 = true, f64 = true }
local element = { f32 = "float *", f64 = "double *", i64 = "int64_t *", i32 = "int32_t *",
  u8 = "uint8_t *", bool = "uint8_t *" }

M.floating = floating
M.codes = codes
M.default_dtype = "f32"
M.default_device = border.host.options and border.host.options.device or "cpu" -- --device NAME

--- PyTorch's and NumPy's words for the dtypes, accepted wherever a dtype is named.
local synonyms = { float = "f32", float32 = "f32", bfloat16 = "bf16", half = "f16", float16 = "f16",
  double = "f64", float64 = "f64", long = "i64", int64 = "i64", int = "i32", int32 = "i32",
  uint8 = "u8", byte = "u8" }

local function dtype_of(name, what)
  local dtype = codes[name] and name or synonyms[name]
  if not dtype then
    raise("%s: unknown dtype '%s'; there are f32 bf16 f16 f64 i64 i32 u8 bool", what,
      tostring(name))
  end
  return dtype
end
M.dtype_of = dtype_of

local function device_of(name, what)
  if not devices[name] then
    raise("%s: unknown device '%s'; there are cpu, cuda and meta", what, tostring(name))
  end
  return name
end

local function is_tensor(x)
  return type(x) == "table" and getmetatable(x) == Tensor
end
M.is_tensor = is_tensor

local function numel_of(shape)
  local n = 1
  for i = 1, #shape do n = n * shape[i] end
  return n
end
M.numel_of = numel_of

-- ---- making handles

--- A Tensor around a filled C handle; its owner is the open scope or the collector.
local function wrap(c, shape, dtype, device)
  local t = { _c = c, shape = shape, dtype = dtype, device = device, requires_grad = false,
    _rec = false, _g = false, _uses = 0, _scope = false, _keep = false, _gone = false }
  setmetatable(t, Tensor)
  scope.adopt(t, numel_of(shape))
  return t
end
M.wrap = wrap

--- Gives memory that is cached for new tensors back to the system. @tparam[opt="cpu"] string device
function M.empty_cache(device)
  C.ds_memory_flush(devices[device or "cpu"])
end

--- Out of memory: collect, give cached blocks back, try once more, then say what lives.
local function try_again(c, shape, dtype, device, rc)
  local message = ffi.string(C.ds_error())
  if rc ~= -2 then raise("%s", message) end -- not DS_ENOMEM
  if message:find "^out of memory:" then message = "out of memory" end -- bytes are said below
  collectgarbage()
  collectgarbage()
  M.empty_cache(device)
  local dims = sizes(unpack(shape))
  if C.ds_empty(c, codes[dtype], devices[device], #shape, dims) == 0 then return end
  raise("%s: wanted %s for a tensor %s %s; %s", message,
    M.bytes_string(numel_of(shape) * tonumber(C.ds_dtype_size(codes[dtype]))), dtype,
    shape_string(shape), M.memory_summary(device))
end

--- A new dense tensor, contents undefined. For the library: arguments are trusted.
-- @tparam table shape kept as it is
local function new(shape, dtype, device)
  local c = handle()
  local n = #shape
  local rc
  if n <= 4 then
    rc = C.ds_empty4(c, codes[dtype], devices[device], n,
      shape[1] or 0, shape[2] or 0, shape[3] or 0, shape[4] or 0)
  else
    rc = C.ds_empty(c, codes[dtype], devices[device], n, sizes(unpack(shape, 1, math.min(n, 8))))
  end
  if rc ~= 0 then try_again(c, shape, dtype, device, rc) end
  return wrap(c, shape, dtype, device)
end
M.new = new

--- The same on the CPU in page-locked memory, through which a GPU's transfers go.
function M.pinned(shape, dtype)
  local c = handle()
  check(C.ds_empty_pinned(c, codes[dtype], #shape, sizes(unpack(shape, 1, #shape))))
  return wrap(c, shape, dtype, "cpu")
end

--- A message for a tensor that is used after its memory went; returns for one of the meta device
-- that has not been released, and for one whose values were in the host's (checkpointing_host.lua).
local function revive(t, what)
  if type(t._gone) == "table" then return t._gone:back() end
  if t.device == "meta" and t._c.storage ~= nil then return end
  if t._unit then return M.gather(what, t) end
  raise("%s: tensor %s was released %s; t:keep() or t:detach() before that makes it survive", what,
    shape_string(t.shape), t._gone or "by backward()")
end
M.revive = revive

--- The same for all tensors of an operation at once; false and nil are passed over. Where
-- parameters are sharded, M.gather (zero_params.lua) makes them usable.
function M.revive_all(what, ...)
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t and type(t._gone) == "table" then t._gone:back() end
  end
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t and t._unit then return M.gather(what, ...) end
    if t and t._c.data == nil then revive(t, what) end
  end
end

--- Argument checks shared by everything that takes a tensor.
local function need_tensor(x, what, position)
  if not is_tensor(x) then
    raise("%s: argument %d must be a tensor, not %s", what, position,
      x == nil and "nil" or type(x) == "table" and "a table"
        or ("%s %s"):format(type(x), tostring(x)))
  end
  if x._c.data == nil then revive(x, what) end
  return x
end
M.need_tensor = need_tensor

--- A dimension as typed (1-based, negative from the end) to 1-based positive.
-- @tparam number ndim how many there are
local function dim_of(dim, ndim, what)
  local d = type(dim) == "number" and (dim < 0 and dim + ndim + 1 or dim) or 0
  if d < 1 or d > ndim or d ~= math.floor(d) then
    raise("%s: dimension %s is not in a tensor of %d dimension%s (1 to %d, or -1 to -%d)", what,
      tostring(dim), ndim, ndim == 1 and "" or "s", ndim, ndim)
  end
  return d
end
M.dim_of = dim_of

--- Sizes given as numbers or as one table, with options last: `f(2, 3, { dtype = "f64" })`.
local function parse(what, ...)
  local n = select("#", ...)
  local last = n > 0 and select(n, ...) or nil
  local options = {}
  if n > 0 and type(last) == "table" and not is_tensor(last)
    and (#last == 0 and next(last) or n > 1) then
    options, n = last, n - 1
  end
  local shape = { ... }
  if n == 1 and type(shape[1]) == "table" then
    local given = shape[1]
    shape = {}
    for i = 1, #given do shape[i] = given[i] end
    n = #given
  end
  for i = n + 1, #shape do shape[i] = nil end
  for i = 1, n do
    local s = shape[i]
    if type(s) ~= "number" or s < 0 or s ~= math.floor(s) or s > 2 ^ 46 then
      local text, hint = tostring(s), ""
      if type(s) == "string" then text = ("'%s'"):format(s) end
      if codes[s] or synonyms[s] then hint = ("; as a dtype: { dtype = '%s' }"):format(s) end
      raise("%s: size %d must be a whole number, not %s%s", what, i, text, hint)
    end
  end
  if n > 8 then raise("%s: a tensor has at most 8 dimensions, not %d", what, n) end
  for key in pairs(options) do
    if key ~= "dtype" and key ~= "device" and key ~= "requires_grad" then
      raise("%s: unknown option '%s'; there are dtype, device, requires_grad", what, tostring(key))
    end
  end
  return shape, dtype_of(options.dtype or M.default_dtype, what),
    device_of(options.device or M.default_device, what), options.requires_grad
end
M.parse = parse

local function ops_of(device)
  local ops = C.ds_ops_of(devices[device])
  if ops == nil then raise("%s", ffi.string(C.ds_error())) end
  return ops
end

-- The meta device's kernels have nothing to do.
local function nothing() return 0 end
local tables = { meta = setmetatable({}, { __index = function() return nothing end }) }

--- The kernels of a device: the ds_ops struct; of meta, a table of functions.
function M.kernels(device)
  local ops = tables[device]
  if not ops then
    ops = ops_of(device)
    tables[device] = ops
  end
  return ops
end
local kernels = M.kernels

--- Calls a kernel on dst's device; raises with `what` before the message.
local function run(what, device, ...)
  local kernel = kernels(device)[what]
  if kernel == nil then raise("%s has no %s kernel", what, device) end
  return check(kernel(...), what)
end
M.run = run

-- ---- creation

local function finished(t, requires_grad)
  if requires_grad then t:requires_grad_() end
  return t
end

--- Contents undefined. `ds.empty(2, 3, { dtype = "bf16" })`
function M.empty(...)
  local shape, dtype, device, grad = parse("empty", ...)
  return finished(new(shape, dtype, device), grad)
end

local function filled(what, value, ...)
  local shape, dtype, device, grad = parse(what, ...)
  local t = new(shape, dtype, device)
  run("fill", device, t._c, value)
  return finished(t, grad)
end

function M.zeros(...) return filled("zeros", 0, ...) end
function M.ones(...) return filled("ones", 1, ...) end

--- `ds.full({ 2, 3 }, 0.5)`
function M.full(shape, value, options)
  if type(value) ~= "number" then raise("full: the value must be a number, not %s", type(value)) end
  return filled("full", value, type(shape) == "table" and shape or { shape }, options or {})
end

--- 0, 1 … n − 1, or start up to and without stop: `ds.arange(n)`, `ds.arange(start, stop[, step])`.
-- The dtype is i64 for whole numbers, else f32.
function M.arange(...)
  local args = { ... }
  local options = type(args[#args]) == "table" and table.remove(args) or {}
  local start, stop, step = args[1], args[2], args[3] or 1
  if stop == nil then start, stop = 0, start end
  for _, v in ipairs { start, stop, step } do
    if type(v) ~= "number" then raise("arange: expects numbers, got %s", type(v)) end
  end
  if #args == 0 or step == 0 then
    raise("arange: expects (stop), (start, stop) or (start, stop, step ~= 0)")
  end
  local whole = start % 1 == 0 and step % 1 == 0
  local t = new({ math.max(0, math.ceil((stop - start) / step)) },
    dtype_of(options.dtype or (whole and "i64" or M.default_dtype), "arange"),
    device_of(options.device or M.default_device, "arange"))
  run("arange", t.device, t._c, start, step)
  return t
end

--- n values from start to stop, both included.
function M.linspace(start, stop, n, options)
  options = options or {}
  local t = new({ n }, dtype_of(options.dtype or M.default_dtype, "linspace"),
    device_of(options.device or M.default_device, "linspace"))
  run("arange", t.device, t._c, start, n > 1 and (stop - start) / (n - 1) or 0)
  return t
end

--- The identity matrix [n x n].
function M.eye(n, options)
  local t = filled("eye", 0, n, n, options or {})
  local c = handle()
  check(C.ds_slice_flat(c, t._c, 0, 1, sizes(n * n)))
  c.shape[0], c.stride[0], c.numel, c.dense = n, n + 1, n, 0
  run("fill", t.device, c, 1)
  C.ds_release(c)
  return t
end

local function flatten(value, depth, shape, out)
  if type(value) ~= "table" then
    if type(value) ~= "number" and type(value) ~= "boolean" then
      raise("tensor: expects numbers in nested tables, got %s", type(value))
    end
    if depth <= #shape then raise("tensor: the nested tables have different depths") end
    out[#out + 1] = value
    return
  end
  if shape.done and depth > #shape then raise("tensor: the nested tables have different depths") end
  if not shape.done then shape[depth] = #value end
  if shape[depth] ~= #value then
    raise("tensor: rows have different lengths: %d and %d", shape[depth], #value)
  end
  for i = 1, #value do flatten(value[i], depth + 1, shape, out) end
  if #value == 0 or type(value[1]) ~= "table" then shape.done = true end
end

--- A tensor of the numbers (or booleans) of nested tables: `ds.tensor({ { 1, 2 }, { 3, 4 } },
-- "i64")`.
-- @tparam number|boolean|table data
-- @tparam[opt="f32"] string|table options a dtype, or { dtype =, device =, requires_grad = }
function M.tensor(data, options)
  if type(options) == "string" then options = { dtype = options } end
  options = options or {}
  if is_tensor(data) then raise("tensor: expects numbers; use t:clone() or t:to(dtype)") end
  local shape, values = {}, {}
  flatten(data, 1, shape, values)
  shape.done = nil
  local boolean = type(values[1]) == "boolean"
  local dtype = dtype_of(options.dtype or (boolean and "bool" or M.default_dtype), "tensor")
  local wide = new(shape, floating[dtype] and "f64" or "i64", "cpu")
  local p = ffi.cast(floating[dtype] and "double *" or "int64_t *", wide._c.data)
  for i = 1, #values do
    local v = values[i]
    if type(v) == "boolean" then v = v and 1 or 0 end
    if not floating[dtype] and (v % 1 ~= 0) then
      raise("tensor: %s is not a whole number, and the dtype is %s", tostring(v), dtype)
    end
    p[i - 1] = v
  end
  local t = wide
  if dtype ~= wide.dtype then
    t = new(shape, dtype, "cpu")
    run("copy", "cpu", t._c, wide._c)
    scope.release(wide)
  end
  local device = device_of(options.device or M.default_device, "tensor")
  if device ~= "cpu" then t = t:to(device) end
  return finished(t, options.requires_grad)
end

--- Runs `f(…)` with another default device: `ds.on("meta", function() return Model(c) end)` builds
-- a
-- model of shapes without memory.
function M.on(device, f, ...)
  local before = M.default_device
  M.default_device = device_of(device, "on")
  local function back(ok, ...)
    M.default_device = before
    if not ok then error((...), 0) end
    return ...
  end
  return back(xpcall(f, border.note, ...))
end

-- ---- random numbers: Philox (seed, offset); every call moves the offset on by what it used

local generator = { seed = 0, offset = 0 }
M.generator = generator

--- Starts the random sequence anew. `dsrun --seed N` does this before the script.
function M.seed(seed)
  if type(seed) ~= "number" or seed % 1 ~= 0 or seed < 0 or seed > 2 ^ 53 then
    raise("seed: expects a whole number from 0 to 2^53, got %s", tostring(seed))
  end
  generator.seed, generator.offset = seed, 0
end

--- Takes `n` numbers from the sequence: seed and offset for a kernel.
function M.draw(n)
  local offset = generator.offset
  generator.offset = offset + math.ceil(n / 4)
  return generator.seed, offset
end

local function random(what, kernel, a, b, ...)
  local shape, dtype, device, grad = parse(what, ...)
  if not floating[dtype] then raise("%s: the dtype must be floating, not %s", what, dtype) end
  local t = new(shape, dtype, device)
  run(kernel, device, t._c, a, b, M.draw(numel_of(shape)))
  return finished(t, grad)
end

--- Uniform in [0, 1).
function M.rand(...) return random("rand", "uniform", 0, 1, ...) end
--- Normal, mean 0 and deviation 1.
function M.randn(...) return random("randn", "normal", 0, 1, ...) end

--- Whole numbers from low to high − 1: `ds.randint(low, high, 2, 3, { dtype = "i32" })`.
function M.randint(low, high, ...)
  local shape, _, device = parse("randint", ...)
  local last = select(select("#", ...), ...)
  local dtype = dtype_of(type(last) == "table" and last.dtype or "i64", "randint")
  if low >= high then raise("randint: low %s must be less than high %s", low, high) end
  local t = new(shape, dtype, device)
  run("randint", device, t._c, low, high, M.draw(numel_of(shape)))
  return t
end

for _, name in ipairs { "empty", "zeros", "ones", "rand", "randn" } do
  --- As the shape, dtype and device of x: `ds.zeros_like(x[, options])`.
  M[name .. "_like"] = function(x, options)
    need_tensor(x, name .. "_like", 1)
    options = options or {}
    return M[name](x.shape, { dtype = options.dtype or x.dtype, device = options.device or x.device,
      requires_grad = options.requires_grad })
  end
end

function M.full_like(x, value, options)
  options = options or {}
  return M.full(x.shape, value,
    { dtype = options.dtype or x.dtype, device = options.device or x.device })
end

-- ---- shape

--- All sizes as a table, or the size at position `dim`.
function methods:size(dim)
  if not is_tensor(self) then raise("use t:size(), not t.size()") end
  if dim == nil then return { unpack(self.shape) } end
  return self.shape[dim_of(dim, #self.shape, "size")]
end

function methods:dim() return #self.shape end
methods.ndim = methods.dim
function methods:numel() return numel_of(self.shape) end
function methods:is_contiguous() return self._c.dense == 1 end
function methods:is_floating_point() return floating[self.dtype] or false end

--- Bytes of an element.
function methods:element_size() return tonumber(C.ds_dtype_size(codes[self.dtype])) end

function methods:stride(dim)
  if dim then return tonumber(self._c.stride[dim_of(dim, #self.shape, "stride") - 1]) end
  local out = {}
  for i = 1, #self.shape do out[i] = tonumber(self._c.stride[i - 1]) end
  return out
end

-- ---- views without gradients, for ops.lua: new handles on x's storage

local function view(c, shape, x)
  local t = wrap(c, shape, x.dtype, x.device)
  if x._unit then M.note_view(t, x) end
  if type(x._gone) == "table" then x._gone:stay() end
  return t
end

local function shape_of(c)
  local shape = {}
  for i = 1, c.ndim do shape[i] = tonumber(c.shape[i - 1]) end
  return shape
end

M.view = {}

function M.view.alias(x)
  local c = handle()
  C.ds_alias(c, x._c)
  return view(c, x.shape, x)
end

--- nil if the strides do not allow it.
function M.view.reshape(x, shape)
  local c = handle()
  if check(C.ds_reshape(c, x._c, #shape, sizes(unpack(shape))), "reshape") == 1 then return nil end
  return view(c, shape, x)
end

function M.view.transpose(x, d0, d1)
  local c = handle()
  check(C.ds_transpose(c, x._c, d0 - 1, d1 - 1), "transpose")
  return view(c, shape_of(c), x)
end

function M.view.permute(x, dims)
  local c, zero_based = handle(), order()
  for i = 1, #dims do zero_based[i - 1] = dims[i] - 1 end
  check(C.ds_permute(c, x._c, zero_based), "permute")
  return view(c, shape_of(c), x)
end

function M.view.narrow(x, dim, start, length)
  local c = handle()
  check(C.ds_narrow(c, x._c, dim - 1, start - 1, length), "narrow")
  return view(c, shape_of(c), x)
end

function M.view.select(x, dim, index)
  local c = handle()
  check(C.ds_select(c, x._c, dim - 1, index - 1), "select")
  return view(c, shape_of(c), x)
end

function M.view.expand(x, shape)
  local c = handle()
  check(C.ds_expand(c, x._c, #shape, sizes(unpack(shape))), "expand")
  return view(c, shape, x)
end

--- n elements from element `offset` (0-based) of a dense tensor, as `shape`.
function M.view.slice_flat(x, offset, shape)
  local c = handle()
  check(C.ds_slice_flat(c, x._c, offset, #shape, sizes(unpack(shape))))
  return view(c, shape, x)
end

--- Borrowed views for the length of one kernel call: cells that are filled anew each time, and cost
-- nothing. `slot` 1 to 8 keeps those of one call apart.
local cells = {}
for i = 1, 8 do cells[i] = handle() end
M.borrow = {}

--- x as a matrix of its rows.
function M.borrow.rows(slot, x)
  local c = cells[slot]
  C.ds_rows(c, x._c)
  return c
end

--- The transpose of that.
function M.borrow.columns(slot, x)
  local c = cells[slot]
  C.ds_columns(c, x._c)
  return c
end

--- The last two dimensions swapped.
function M.borrow.swapped(slot, x)
  local c = cells[slot]
  C.ds_swapped(c, x._c)
  return c
end

--- [B x T x n·width] as [B x T x count x width], `count` heads from 0-based `first` on.
function M.borrow.heads(slot, x, first, count, width)
  local c = cells[slot]
  C.ds_heads(c, x._c, first, count, width)
  return c
end

--- Lets tensor t be what `other` is: same memory, same values from now on. The old memory is
-- dropped.
function M.repoint(t, other)
  local c = handle()
  C.ds_alias(c, other._c)
  ffi.gc(t._c, nil)
  C.ds_release(t._c)
  t._c, t.dtype, t.device, t.shape = ffi.gc(c, C.ds_release), other.dtype, other.device, other.shape
  t._scope = false
end

--- Whether somebody else holds the same storage: then it must not be changed in place.
function M.shared(t)
  return C.ds_references(t._c) > 1
end

-- ---- reading

local function need_values(t, what)
  if t.device == "meta" then
    raise("%s: a tensor on the meta device has a shape and no values", what)
  end
end

--- A number as it was read from memory. Some of the bit patterns of NaN, as nobody computes but
-- memory may hold, LuaJIT would take for other values than numbers.
local function real(v)
  if v ~= v or type(v) ~= "number" then return 0 / 0 end
  return v
end
M.real = real

local function host_copy(t, dtype, what)
  need_values(t, what)
  local wide = new(t.shape, dtype, "cpu")
  run("copy", t.device, wide._c, t._c)
  return wide
end

--- The value of a one-element tensor as a Lua number (or boolean).
function methods:item()
  need_tensor(self, "item", 1)
  if numel_of(self.shape) ~= 1 then
    raise("item: the tensor has %d elements %s, not one", numel_of(self.shape),
      shape_string(self.shape))
  end
  local wide = self
  if self.device ~= "cpu" or not element[self.dtype] then
    wide = host_copy(self, floating[self.dtype] and "f64" or "i64", "item")
  end
  local p = ffi.cast(element[wide.dtype], wide._c.data)
  if floating[wide.dtype] then return real(p[0]) end
  local v = tonumber(p[0])
  if self.dtype == "bool" then return v ~= 0 end
  return v
end

--- All values as nested Lua tables; a number for a scalar.
function methods:tolist()
  need_tensor(self, "tolist", 1)
  if #self.shape == 0 then return self:item() end
  local wide = host_copy(self, floating[self.dtype] and "f64" or "i64", "tolist")
  local p, shape, at = ffi.cast(element[wide.dtype], wide._c.data), self.shape, 0
  local boolean, floats = self.dtype == "bool", floating[self.dtype]
  local function build(dim)
    local out = {}
    for i = 1, shape[dim] do
      if dim == #shape then
        local v
        if floats then v = real(p[at]) else v = tonumber(p[at]) end
        at = at + 1
        if boolean then v = v ~= 0 end
        out[i] = v
      else
        out[i] = build(dim + 1)
      end
    end
    return out
  end
  local out = build(1)
  scope.release(wide)
  return out
end

--- The address of the first element, typed: for code that works on memory through FFI.
-- @treturn cdata float *, int64_t * …; uint16_t * for bf16 and f16
function methods:data_ptr()
  need_tensor(self, "data_ptr", 1)
  need_values(self, "data_ptr")
  if self.device ~= "cpu" then
    raise("data_ptr: the tensor is on %s, where Lua cannot read; t:cpu() first", self.device)
  end
  return ffi.cast(element[self.dtype] or "uint16_t *", self._c.data)
end

-- ---- changing in place: not recorded, so refused on what backward would need

local function may_change(t, what)
  need_tensor(t, what, 1)
  if type(t._gone) == "table" then t._gone:stay() end
  if scope.grad and (t._rec or t.requires_grad) then
    raise("%s: the tensor takes part in the gradient; change it inside ds.no_grad(function() … "
      .. "end), or use the form without '_'", what)
  end
  return t
end
M.may_change = may_change

function methods:fill_(value)
  may_change(self, "fill_")
  if type(value) ~= "number" then raise("fill_: expects a number, got %s", type(value)) end
  run("fill", self.device, self._c, value)
  return self
end

function methods:zero_()
  may_change(self, "zero_")
  run("fill", self.device, self._c, 0)
  return self
end

--- Copies values from src, whose shape broadcasts to this one's; converts the dtype.
function methods:copy_(src)
  may_change(self, "copy_")
  need_tensor(src, "copy_", 2)
  if self.device ~= "meta" then need_values(src, "copy_") end
  local a, b = self.shape, src.shape
  for i = 0, #b - 1 do
    local have = b[#b - i]
    if i >= #a and have ~= 1 or i < #a and have ~= 1 and have ~= a[#a - i] then
      raise("copy_: shape %s does not broadcast to %s", shape_string(b), shape_string(a))
    end
  end
  run("copy", self.device, self._c, src._c)
  return self
end

for name, kernel in pairs { uniform_ = "uniform", normal_ = "normal" } do
  --- `t:uniform_(low, high)`, `t:normal_(mean, std)`
  methods[name] = function(self, a, b)
    may_change(self, name)
    run(kernel, self.device, self._c, a or 0, b or 1, M.draw(numel_of(self.shape)))
    return self
  end
end

-- ---- ownership and gradients

--- Survives scopes and backward(); the collector owns it from now on.
function methods:keep()
  need_tensor(self, "keep", 1)
  self._keep = true
  return scope.keep(self)
end

--- The same values without a history; survives scopes and backward().
function methods:detach()
  need_tensor(self, "detach", 1)
  return scope.keep(M.view.alias(self))
end

--- Asks for a gradient in `t.grad`: for leaves, tensors that no operation made.
function methods:requires_grad_(on)
  if not floating[self.dtype] then
    raise("requires_grad_: only floating tensors have gradients, not %s", self.dtype)
  end
  if self._rec then raise("requires_grad_: the tensor is the result of an operation") end
  self.requires_grad = on ~= false
  return self
end

function methods:is_leaf() return not self._rec end

-- ---- memory in words

local units = { "B", "KiB", "MiB", "GiB", "TiB" }

--- 1610612736 → "1.5 GiB"
function M.bytes_string(bytes)
  local i = 1
  while bytes >= 1024 and i < #units do bytes, i = bytes / 1024, i + 1 end
  return (i == 1 and "%d %s" or "%.1f %s"):format(bytes, units[i])
end

M.tags = {} -- op names by tag, filled by autograd.lua

--- "live 76.2 GiB (matmul 61.0 GiB, …)": the five ops that hold most.
function M.memory_summary(device)
  local bytes = ffi.new("int64_t[512]")
  local n = C.ds_memory_by_tag(devices[device], bytes, 512)
  local list = {}
  for i = 0, n - 1 do
    if bytes[i] > 0 then
      list[#list + 1] = { bytes = tonumber(bytes[i]), name = M.tags[i] or "made by scripts" }
    end
  end
  table.sort(list, function(a, b) return a.bytes > b.bytes end)
  local parts = {}
  for i = 1, math.min(5, #list) do
    parts[i] = ("%s %s"):format(list[i].name, M.bytes_string(list[i].bytes))
  end
  local live = M.bytes_string(tonumber(C.ds_memory_of(devices[device]).live))
  return #parts == 0 and "live " .. live or ("live %s (%s)"):format(live, table.concat(parts, ", "))
end

--- Counters of a device, bytes: live, peak, cached, and of the process: rss, page_faults.
function M.memory(device)
  local m = C.ds_memory_of(devices[device or "cpu"])
  return { live = tonumber(m.live), peak = tonumber(m.peak), cached = tonumber(m.cached),
    takes = tonumber(m.takes), calls = tonumber(m.calls), rss = tonumber(C.ds_memory_rss()),
    page_faults = tonumber(C.ds_page_faults()) }
end

M.names = names
return M
