--- Views, joining and indexing: what moves elements and computes nothing.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local custom = require "ds.custom"
local shapes = require "ds.shapes"

local raise, shape_string = border.raise, border.shape_string
local define = autograd.define
local new, dim_of, run, view = tensor.new, tensor.dim_of, tensor.run, tensor.view
local methods, is_tensor, numel_of = tensor.methods, tensor.is_tensor, tensor.numel_of
local need_index, need_bool, same_dtype = shapes.need_index, shapes.need_bool, shapes.same_dtype
local equal_shapes, sum_to, as = shapes.equal_shapes, shapes.sum_to, shapes.as

local M = {}

-- ---- views

local reshape_view = define("reshape", {
  args = { "shape" }, infer = function(x, shape) return view.reshape(x, shape) end,
  backward = function(r, dy) return dy:reshape(r.x.shape) end,
})

local function target_shape(x, what, ...)
  local shape = type((...)) == "table" and { unpack((...)) } or { ... }
  local open, n = nil, 1
  for i = 1, #shape do
    local s = shape[i]
    if type(s) ~= "number" or s % 1 ~= 0 or s < -1 then
      raise("%s: size %d must be a whole number or -1, not %s", what, i, tostring(s))
    end
    if s == -1 then
      if open then raise("%s: only one size can be -1", what) end
      open = i
    else
      n = n * s
    end
  end
  local have = numel_of(x.shape)
  if open then
    if n == 0 or have % n ~= 0 then
      raise("%s: %s has %d elements, which %s does not divide", what, shape_string(x.shape), have,
        shape_string(shape))
    end
    shape[open] = have / n
  elseif n ~= have then
    raise("%s: %s has %d elements and does not fit %s with %d", what, shape_string(x.shape), have,
      shape_string(shape), n)
  end
  return shape
end

--- The same elements in another shape; -1 once for "the rest". A view if the strides allow it.
function methods:reshape(...)
  tensor.need_tensor(self, "reshape", 1)
  local shape = target_shape(self, "reshape", ...)
  if self._c.dense == 1 then return reshape_view(self, shape) end
  local test = view.reshape(self, shape)
  if not test then return reshape_view(methods.clone(self), shape) end
  scope.release(test)
  return reshape_view(self, shape)
end

--- reshape that never copies: an error where the strides do not allow it.
function methods:view(...)
  tensor.need_tensor(self, "view", 1)
  local shape = target_shape(self, "view", ...)
  if self._c.dense ~= 1 then
    local test = view.reshape(self, shape)
    if not test then
      raise("view: %s with these strides cannot be seen as %s without a copy; use x:reshape(…)",
        shape_string(self.shape), shape_string(shape))
    end
    scope.release(test)
  end
  return reshape_view(self, shape)
end

local transpose = define("transpose", {
  args = { "d0", "d1" }, infer = function(x, d0, d1) return view.transpose(x, d0, d1) end,
  backward = function(r, dy) return dy:transpose(r.d0, r.d1) end,
})
--- Swaps two dimensions.
function methods:transpose(d0, d1)
  tensor.need_tensor(self, "transpose", 1)
  local n = #self.shape
  return transpose(self, dim_of(d0, n, "transpose"), dim_of(d1, n, "transpose"))
end

--- The transpose of a matrix.
function methods:t()
  if #self.shape ~= 2 then
    raise("t: expects a matrix, got %s; use x:transpose(d0, d1)", shape_string(self.shape))
  end
  return transpose(self, 1, 2)
end

local permute = define("permute", {
  args = { "dims" }, infer = function(x, dims) return view.permute(x, dims) end,
  backward = function(r, dy)
    local back = {}
    for i, d in ipairs(r.dims) do back[d] = i end
    return dy:permute(back)
  end,
})
--- Dimensions in a new order: `x:permute(1, 3, 2, 4)`.
function methods:permute(...)
  local dims = type((...)) == "table" and { unpack((...)) } or { ... }
  if #dims ~= #self.shape then
    raise("permute: %d dimensions named for %s", #dims, shape_string(self.shape))
  end
  for i = 1, #dims do dims[i] = dim_of(dims[i], #dims, "permute") end
  return permute(self, dims)
end

--- A gradient of x's shape that is dy in one part and zero elsewhere.
local function padded(x, dy, part)
  local dx = tensor.zeros(x.shape, { dtype = x.dtype, device = x.device })
  local where_to = part(dx)
  run("copy", x.device, where_to._c, dy._c)
  return dx
end

local narrow = define("narrow", {
  args = { "dim", "start", "length" },
  infer = function(x, dim, start, length) return view.narrow(x, dim, start, length) end,
  backward = function(r, dy)
    return padded(r.x, dy, function(dx) return view.narrow(dx, r.dim, r.start, r.length) end)
  end,
})
--- `length` positions of a dimension from position `start` (1-based; negative from the end).
function methods:narrow(dim, start, length)
  tensor.need_tensor(self, "narrow", 1)
  dim = dim_of(dim, #self.shape, "narrow")
  local size = self.shape[dim]
  if type(start) ~= "number" or type(length) ~= "number" then
    raise("narrow: expects (dim, start, length), got (%s, %s, %s)", dim, tostring(start),
      tostring(length))
  end
  if start < 0 then start = start + size + 1 end
  if start < 1 or length < 0 or start + length - 1 > size then
    raise("narrow: positions %d to %d are not in dimension %d of %s", start, start + length - 1,
      dim, shape_string(self.shape))
  end
  return narrow(self, dim, start, length)
end

local select_ = define("select", {
  args = { "dim", "index" }, infer = function(x, dim, index) return view.select(x, dim, index) end,
  backward = function(r, dy)
    return padded(r.x, dy, function(dx) return view.select(dx, r.dim, r.index) end)
  end,
})
--- One position of a dimension, which goes: `x:select(1, 3)` is the third row.
function methods:select(dim, index)
  tensor.need_tensor(self, "select", 1)
  dim = dim_of(dim, #self.shape, "select")
  local size = self.shape[dim]
  if type(index) == "number" and index < 0 then index = index + size + 1 end
  if type(index) ~= "number" or index < 1 or index > size or index % 1 ~= 0 then
    raise("select: position %s is not in dimension %d of %s", tostring(index), dim,
      shape_string(self.shape))
  end
  return select_(self, dim, index)
end

local expand = define("expand", {
  args = { "shape" }, infer = function(x, shape) return view.expand(x, shape) end,
  backward = function(r, dy) return sum_to(dy, r.x.shape) end,
})
--- Repeats dimensions of size 1 without copying; -1 keeps a size.
function methods:expand(...)
  tensor.need_tensor(self, "expand", 1)
  local shape = type((...)) == "table" and { unpack((...)) } or { ... }
  local lead = #shape - #self.shape
  for i = 1, #shape do
    local have = i > lead and self.shape[i - lead] or 1
    if shape[i] == -1 then shape[i] = have end
    if lead < 0 or (have ~= shape[i] and have ~= 1) then
      raise("expand: %s cannot become %s", shape_string(self.shape), shape_string(shape))
    end
  end
  if lead < 0 then
    raise("expand: %s cannot become %s", shape_string(self.shape), shape_string(shape))
  end
  return expand(self, shape)
end
function methods:expand_as(other) return self:expand(other.shape) end

--- Adds a dimension of size 1 at position `dim`.
function methods:unsqueeze(dim)
  local n = #self.shape + 1
  local d = dim_of(dim, n, "unsqueeze")
  local shape = { unpack(self.shape) }
  table.insert(shape, d, 1)
  return self:reshape(shape)
end

--- Drops dimension `dim` if its size is 1, or all such.
function methods:squeeze(dim)
  local d = dim and dim_of(dim, #self.shape, "squeeze")
  local shape = {}
  for i, s in ipairs(self.shape) do
    if s ~= 1 or (d and d ~= i) then shape[#shape + 1] = s end
  end
  return self:reshape(shape)
end

--- Dimensions `first` to `last` as one.
function methods:flatten(first, last)
  local n = #self.shape
  if n == 0 then return self:reshape(1) end
  local a, b = dim_of(first or 1, n, "flatten"), dim_of(last or -1, n, "flatten")
  local shape = {}
  for i = 1, n do
    if i > a and i <= b then
      shape[#shape] = shape[#shape] * self.shape[i]
    else
      shape[#shape + 1] = self.shape[i]
    end
  end
  return self:reshape(shape)
end

--- Parts of `size` positions along a dimension (the last may be shorter), or of the sizes listed.
function methods:split(size, dim)
  tensor.need_tensor(self, "split", 1)
  dim = dim_of(dim or 1, #self.shape, "split")
  local total, parts, start = self.shape[dim], {}, 1
  local given = size
  if type(size) == "number" then
    if size < 1 then raise("split: the size must be at least 1, not %s", size) end
    given = {}
    for i = 1, math.ceil(total / size) do given[i] = math.min(size, total - (i - 1) * size) end
  end
  local sum = 0
  for _, s in ipairs(given) do sum = sum + s end
  if sum ~= total then
    raise("split: sizes sum to %d, dimension %d of %s has %d", sum, dim,
      shape_string(self.shape), total)
  end
  for i, s in ipairs(given) do
    parts[i] = narrow(self, dim, start, s)
    start = start + s
  end
  return unpack(parts)
end

--- n parts along a dimension, as equal as can be: `local q, k, v = x:chunk(3, -1)`.
function methods:chunk(n, dim)
  tensor.need_tensor(self, "chunk", 1)
  dim = dim_of(dim or 1, #self.shape, "chunk")
  if type(n) ~= "number" or n < 1 then
    raise("chunk: expects the number of parts, got %s", tostring(n))
  end
  return self:split(math.max(1, math.ceil(self.shape[dim] / n)), dim)
end

--- Tensors behind each other along a dimension: `ds.cat({ a, b }, dim)`.
local concatenate = custom.variadic("cat", {
  forward = function(list, dim)
    local first = list[1]
    local shape = { unpack(first.shape) }
    for i = 2, #list do
      local t = list[i]
      same_dtype("cat", first, t)
      for d = 1, math.max(#shape, #t.shape) do
        if d ~= dim and shape[d] ~= t.shape[d] then
          raise("cat: tensor %d is %s, the first is %s; only dimension %d may differ", i,
            shape_string(t.shape), shape_string(first.shape), dim)
        end
      end
      shape[dim] = shape[dim] + t.shape[dim]
    end
    local y = new(shape, first.dtype, first.device)
    local at = 1
    for i = 1, #list do
      local part = view.narrow(y, dim, at, list[i].shape[dim])
      run("copy", y.device, part._c, list[i]._c)
      scope.release(part)
      at = at + list[i].shape[dim]
    end
    return y
  end,
  backward = function(r, dy)
    local grads, at = {}, 1
    for i = 1, #r.list do
      local n = r.list[i].shape[r.dim]
      grads[i] = dy:narrow(r.dim, at, n)
      at = at + n
    end
    return grads
  end,
})
function M.cat(list, dim)
  if type(list) ~= "table" or is_tensor(list) or #list == 0 then
    raise("cat: expects a table of tensors")
  end
  local first = tensor.need_tensor(list[1], "cat", 1)
  local dtype = first.dtype
  for i = 2, #list do
    dtype = shapes.common_dtype(dtype, tensor.need_tensor(list[i], "cat", i).dtype)
  end
  local same = {}
  for i, t in ipairs(list) do same[i] = t:to(dtype) end
  return concatenate(same, dim_of(dim or 1, #first.shape, "cat"))
end

--- Tensors of one shape along a new dimension.
function M.stack(list, dim)
  if type(list) ~= "table" or is_tensor(list) or #list == 0 then
    raise("stack: expects a table of tensors")
  end
  local first = tensor.need_tensor(list[1], "stack", 1)
  local parts = {}
  for i, t in ipairs(list) do
    tensor.need_tensor(t, "stack", i)
    if not equal_shapes(t.shape, first.shape) then
      raise("stack: tensor %d is %s, the first is %s", i, shape_string(t.shape),
        shape_string(first.shape))
    end
    parts[i] = t:unsqueeze(dim or 1)
  end
  return M.cat(parts, dim or 1)
end

-- ---- indexing

local function same_but(what, a, b, dim)
  for d = 1, math.max(#a.shape, #b.shape) do
    if #a.shape ~= #b.shape or (d ~= dim and b.shape[d] > a.shape[d]) then
      raise("%s: index %s does not fit %s along dimension %d", what, shape_string(b.shape),
        shape_string(a.shape), dim)
    end
  end
end

local gather = define("gather", {
  inputs = { "x", "index" }, args = { "axis" }, kernel = "gather",
  infer = function(x, index, axis)
    need_index(index, "gather")
    same_but("gather", x, index, axis + 1)
    return new(index.shape, x.dtype, x.device)
  end,
  backward = function(r, dy)
    local dx = tensor.zeros_like(r.x)
    run("scatter_add", dx.device, dx._c, r.index._c, dy._c, r.axis)
    return dx
  end,
})
--- y[i][j] = x[i][index[i][j]] for dim 2; index: 0-based, i64 or i32.
function methods:gather(dim, index)
  return gather(self, index, dim_of(dim, #self.shape, "gather") - 1)
end

for _, name in ipairs { "scatter_add", "scatter" } do
  --- In place: x at the index's positions is added to, or becomes, src.
  methods[name .. "_"] = function(self, dim, index, src)
    tensor.may_change(self, name .. "_")
    tensor.need_tensor(index, name .. "_", 2)
    tensor.need_tensor(src, name .. "_", 3)
    need_index(index, name .. "_")
    same_dtype(name .. "_", self, src)
    shapes.same_device(name .. "_", self, index)
    local d = dim_of(dim, #self.shape, name .. "_")
    same_but(name .. "_", src, index)
    same_but(name .. "_", self, index, d)
    run(name, self.device, self._c, index._c, src._c, d - 1)
    return self
  end
end

local index_select = define("index_select", {
  inputs = { "x", "index" }, args = { "axis" }, kernel = "index_select",
  infer = function(x, index, axis)
    need_index(index, "index_select")
    if #index.shape ~= 1 then
      raise("index_select: the index must have 1 dimension, not %d", #index.shape)
    end
    local shape = { unpack(x.shape) }
    shape[axis + 1] = index.shape[1]
    return new(shape, x.dtype, x.device)
  end,
  backward = function(r, dy)
    local dx = tensor.zeros_like(r.x)
    run("index_add", dx.device, dx._c, r.index._c, dy._c, r.axis)
    return dx
  end,
})
--- The listed positions of a dimension; index: 0-based numbers in a 1-d tensor.
function methods:index_select(dim, index)
  return index_select(self, index, dim_of(dim, #self.shape, "index_select") - 1)
end

local masked_select = define("masked_select", {
  inputs = { "x", "mask" }, args = { "count" }, kernel = "masked_select",
  call = { "y", "x", "mask" },
  infer = function(x, _, count) return new({ count }, x.dtype, x.device) end,
  backward = function(r, dy)
    local dx = tensor.zeros_like(r.x)
    run("masked_scatter", dx.device, dx._c, r.mask._c, dy._c)
    return dx
  end,
})
local count_cell = require("ffi").new("int64_t[1]")
--- The elements where mask (bool, x's shape) is true, as one dimension.
function methods:masked_select(mask)
  tensor.need_tensor(self, "masked_select", 1)
  tensor.need_tensor(mask, "masked_select", 2)
  need_bool(mask, "masked_select")
  shapes.same_device("masked_select", self, mask)
  if self.device == "meta" then
    raise("masked_select: the size depends on values, which meta has not")
  end
  if not equal_shapes(self.shape, mask.shape) then
    raise("masked_select: mask %s is not of shape %s", shape_string(mask.shape),
      shape_string(self.shape))
  end
  run("mask_count", self.device, count_cell, mask._c)
  return masked_select(self, mask, tonumber(count_cell[0]))
end

--- [… x classes] i64 of 0 and 1 from indices.
local one_hot = define("one_hot", {
  args = { "classes" }, kernel = "one_hot", call = { "y", "x" },
  infer = function(x, classes)
    need_index(x, "one_hot")
    local shape = { unpack(x.shape) }
    shape[#shape + 1] = classes
    return new(shape, "i64", x.device)
  end,
})
function methods:one_hot(classes)
  if type(classes) ~= "number" then
    raise("one_hot: expects the number of classes, got %s", type(classes))
  end
  return one_hot(self, classes)
end

local triangle = define("triangle", {
  args = { "diagonal", "upper" }, kernel = "triangle",
  infer = function(x)
    if #x.shape < 2 then raise("tril, triu: expects a matrix, got %s", shape_string(x.shape)) end
    return as(x)
  end,
  backward = function(r, dy) return M.triangle(dy, r.diagonal, r.upper) end,
})
M.triangle = triangle
--- The lower triangle of the last two dimensions; the rest is 0.
function methods:tril(diagonal) return triangle(self, diagonal or 0, 0) end
--- The upper triangle of the last two dimensions; the rest is 0.
function methods:triu(diagonal) return triangle(self, diagonal or 0, 1) end

return M
