--- Elementwise operations: shape rules and gradients, and the tensor methods made of them.
--
-- Those of one input come from the list in kernels/ops.def; the others stand here, each as
-- `define(name, { inputs, args, infer, kernel, backward })` (autograd.lua explains the fields).
-- In `backward`, r is the record: inputs, arguments and outputs under their names.

local border = require "ds.ffi"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local shapes = require "ds.shapes"

local raise, shape_string = border.raise, border.shape_string
local define, needs = autograd.define, autograd.needs
local new, floating, run = tensor.new, tensor.floating, tensor.run
local methods, is_tensor = tensor.methods, tensor.is_tensor
local need_floating, need_bool = shapes.need_floating, shapes.need_bool
local same_dtype = shapes.same_dtype
local common_dtype = shapes.common_dtype
local equal_shapes, broadcast = shapes.equal_shapes, shapes.broadcast
local sum_to, as = shapes.sum_to, shapes.as

local M = {}

-- ---- elementwise, one input

for _, entry in ipairs(border.host.unary) do
  local name, saved = entry.name, entry.saved
  local backward
  if saved then
    local kernel = name .. "_backward"
    backward = function(r, dy)
      local dx = as(r.x)
      run(kernel, dx.device, dx._c, dy._c, r[saved]._c)
      return dx
    end
  end
  methods[name] = define(name, {
    kernel = name,
    infer = function(x)
      if not floating[x.dtype] and not (entry.integer and x.dtype ~= "bool") then
        need_floating(x, name)
      end
      return as(x)
    end,
    backward = backward,
  })
end

-- ---- elementwise, two inputs

local function binary_infer(name, dtype)
  return function(a, b)
    same_dtype(name, a, b)
    return new(broadcast(a.shape, b.shape, name), dtype or a.dtype, a.device)
  end
end

local function scalar_infer(dtype)
  return function(x) return new(x.shape, dtype or x.dtype, x.device) end
end

local gradients = {
  add = function(r, dy) return sum_to(dy, r.a.shape), sum_to(dy, r.b.shape) end,
  sub = function(r, dy)
    return sum_to(dy, r.a.shape), needs(r.b) and sum_to(-dy, r.b.shape)
  end,
  mul = function(r, dy)
    return needs(r.a) and sum_to(dy * r.b, r.a.shape), needs(r.b) and sum_to(dy * r.a, r.b.shape)
  end,
  div = function(r, dy)
    local da = dy / r.b
    return sum_to(da, r.a.shape), needs(r.b) and sum_to(-(da * r.y), r.b.shape)
  end,
  pow = function(r, dy)
    return needs(r.a) and sum_to(dy * r.b * r.a:pow(r.b - 1), r.a.shape),
      needs(r.b) and sum_to(dy * r.y * r.a:clamp(1e-38):log(), r.b.shape)
  end,
  maximum = function(r, dy)
    local first = r.a:ge(r.b):to(dy.dtype)
    return sum_to(dy * first, r.a.shape), needs(r.b) and sum_to(dy * (1 - first), r.b.shape)
  end,
  minimum = function(r, dy)
    local first = r.a:le(r.b):to(dy.dtype)
    return sum_to(dy * first, r.a.shape), needs(r.b) and sum_to(dy * (1 - first), r.b.shape)
  end,
}

-- x∘s, or s∘x where flip is 1
local scalar_gradients = {
  add = function(_, dy) return dy end,
  sub = function(r, dy) return r.flip == 1 and -dy or dy end,
  mul = function(r, dy) return dy * r.s end,
  div = function(r, dy)
    if r.flip == 0 then return dy / r.s end
    return -(dy * r.y / r.x)
  end,
  pow = function(r, dy)
    if r.flip == 0 then return dy * (r.x:pow(r.s - 1) * r.s) end
    return dy * r.y * math.log(r.s)
  end,
  maximum = function(r, dy) return dy * r.x:ge(r.s):to(dy.dtype) end,
  minimum = function(r, dy) return dy * r.x:le(r.s):to(dy.dtype) end,
}

--- The method for tensor∘tensor, tensor∘number and number∘tensor; `x:add(y, alpha)` is x + alpha y.
local function two_ways(name, dtype, backward, scalar_backward)
  local both = define(name, {
    inputs = { "a", "b" }, infer = binary_infer(name, dtype), kernel = name, backward = backward })
  local one = define(name .. "_scalar", {
    inputs = { "x" }, args = { "s", "flip" }, infer = scalar_infer(dtype),
    kernel = name .. "_scalar", backward = scalar_backward })
  local function with_number(x, s, flip)
    if not is_tensor(x) then tensor.need_tensor(x, name, 1) end
    if not floating[x.dtype] and (s % 1 ~= 0 or name == "div" or x.dtype == "bool") and
      (s % 1 ~= 0 or not dtype) then
      x = x:to(tensor.default_dtype)
    end
    return one(x, s, flip)
  end
  local function method(a, b, alpha)
    if alpha then
      if name ~= "add" and name ~= "sub" then raise("%s: only add and sub take a factor", name) end
      b = b * alpha
    end
    if type(b) == "number" then return with_number(a, b, 0) end
    if type(a) == "number" then return with_number(b, a, 1) end
    if is_tensor(a) and is_tensor(b) then
      if a.dtype ~= b.dtype then
        local wide = common_dtype(a.dtype, b.dtype)
        a, b = a:to(wide), b:to(wide)
      end
      if a.dtype == "bool" and not dtype then -- truth: both for a product, either for a sum
        if name ~= "mul" and name ~= "add" then raise("%s: not for bool; use x:float()", name) end
        return methods[name == "mul" and "logical_and" or "logical_or"](a, b)
      end
      if name == "div" and not floating[a.dtype] then
        a, b = a:to(tensor.default_dtype), b:to(tensor.default_dtype)
      end
    end
    return both(a, b)
  end
  methods[name] = method
  return method
end

for _, name in ipairs(border.host.binary) do
  two_ways(name, nil, gradients[name], scalar_gradients[name])
end
for _, name in ipairs(border.host.compare) do
  two_ways(name, "bool")
end

local meta = tensor.Tensor
meta.__add, meta.__sub, meta.__mul = methods.add, methods.sub, methods.mul
meta.__div, meta.__pow, meta.__unm = methods.div, methods.pow, methods.neg

--- In place: `x:add_(y[, alpha])`, `x:mul_(y)` …; y a tensor that broadcasts to x, or a number.
for _, name in ipairs(border.host.binary) do
  methods[name .. "_"] = function(x, y, alpha)
    tensor.may_change(x, name .. "_")
    local c = x._c
    if type(y) == "number" then
      run(name .. "_scalar", x.device, c, c, y * (alpha or 1), 0)
      return x
    end
    tensor.need_tensor(y, name .. "_", 2)
    shapes.same_device(name .. "_", x, y)
    if #y.shape > #x.shape or
      not equal_shapes(broadcast(x.shape, y.shape, name .. "_"), x.shape) then
      raise("%s_: shape %s does not broadcast to %s", name, shape_string(y.shape),
        shape_string(x.shape))
    end
    if y.dtype ~= x.dtype then y = y:to(x.dtype) end
    if alpha and (name == "add" or name == "sub") then
      run("add_scaled", x.device, c, c, y._c, name == "add" and alpha or -alpha)
    elseif alpha then
      raise("%s_: only add_ and sub_ take a factor", name)
    else
      run(name, x.device, c, c, y._c)
    end
    return x
  end
end

for _, entry in ipairs(border.host.unary) do
  local name = entry.name
  methods[name .. "_"] = function(x)
    tensor.may_change(x, name .. "_")
    need_floating(x, name .. "_")
    run(name, x.device, x._c, x._c)
    return x
  end
end

local clamp = define("clamp", {
  args = { "low", "high" }, kernel = "clamp", infer = as,
  backward = function(r, dy)
    local dx = as(r.x)
    run("clamp_backward", dx.device, dx._c, dy._c, r.x._c, r.low, r.high)
    return dx
  end,
})
--- Values below `low` become low, above `high` high; either may be nil.
function methods:clamp(low, high) return clamp(self, low or -math.huge, high or math.huge) end

local where = define("where", {
  inputs = { "condition", "a", "b" }, kernel = "where",
  infer = function(condition, a, b)
    need_bool(condition, "where")
    same_dtype("where", a, b)
    return new(broadcast(broadcast(a.shape, b.shape, "where"), condition.shape, "where"),
      a.dtype, a.device)
  end,
  backward = function(r, dy)
    local zero = tensor.zeros_like(dy)
    return nil, needs(r.a) and sum_to(M.where(r.condition, dy, zero), r.a.shape),
      needs(r.b) and sum_to(M.where(r.condition, zero, dy), r.b.shape)
  end,
})
--- a where condition (bool), else b; tensors that broadcast, or numbers: `ds.where(x:gt(0), x, 0)`.
function M.where(condition, a, b)
  local like = is_tensor(a) and a or is_tensor(b) and b
  local options = { dtype = like and like.dtype or tensor.default_dtype, device = condition.device }
  if type(a) == "number" then a = tensor.full({}, a, options) end
  if type(b) == "number" then b = tensor.full({}, b, options) end
  local common = common_dtype(a.dtype, b.dtype)
  return where(condition, a:to(common), b:to(common))
end

methods.masked_fill = define("masked_fill", {
  inputs = { "x", "mask" }, args = { "value" }, kernel = "masked_fill",
  infer = function(x, mask, value)
    need_bool(mask, "masked_fill")
    if type(value) ~= "number" then raise("masked_fill: expects a number, got %s", type(value)) end
    if not equal_shapes(broadcast(x.shape, mask.shape, "masked_fill"), x.shape) then
      raise("masked_fill: mask %s does not broadcast to %s", shape_string(mask.shape),
        shape_string(x.shape))
    end
    return as(x)
  end,
  backward = function(r, dy) return dy:masked_fill(r.mask, 0) end,
})

for _, name in ipairs { "logical_and", "logical_or" } do
  methods[name] = define(name, {
    inputs = { "a", "b" }, kernel = name,
    infer = function(a, b)
      need_bool(a, name)
      need_bool(b, name)
      return new(broadcast(a.shape, b.shape, name), "bool", a.device)
    end,
  })
end
methods.logical_not = define("logical_not", {
  kernel = "logical_not", infer = function(x)
    need_bool(x, "logical_not")
    return as(x)
  end,
})
methods.isfinite = define("isfinite", {
  kernel = "isfinite", infer = function(x)
    need_floating(x, "isfinite")
    return new(x.shape, "bool", x.device)
  end,
})
--- bool: where the value is NaN.
function methods:isnan() return self:ne(self) end

-- ---- dtype, device, copies

local cast = define("to", {
  args = { "dtype", "device" }, kernel = "copy", call = { "y", "x" },
  infer = function(x, dtype, device) return new(x.shape, dtype, device) end,
  backward = function(r, dy) return dy:to(r.x.dtype, r.x.device) end,
})
--- Another dtype or device: `x:to("bf16")`, `x:to("meta")`; x itself if it is so already. What is
-- on the meta device stays there: it has no values to take elsewhere.
function methods:to(target, device)
  if tensor.codes[target] == nil and (target == "cpu" or target == "cuda" or target == "meta") then
    target, device = self.dtype, target
  end
  local dtype = tensor.dtype_of(target, "to")
  if self.device == "meta" or not device then device = self.device end
  if dtype == self.dtype and device == self.device then return self end
  if device ~= self.device and device == "meta" then return new(self.shape, dtype, "meta") end
  return cast(self, dtype, device)
end
--- On a GPU, or back; the tensor itself if it is there.
function methods:cuda() return self:to "cuda" end
function methods:cpu() return self:to "cpu" end

for method, dtype in pairs { float = "f32", double = "f64", bfloat16 = "bf16", half = "f16",
  long = "i64", int = "i32", bool = "bool" } do
  methods[method] = function(self) return self:to(dtype) end
end

methods.clone = define("clone", {
  kernel = "copy", call = { "y", "x" }, infer = as,
  backward = function(_, dy) return dy end,
})

--- The same values in row-major order; x itself if it is so already.
function methods:contiguous()
  if self._c.dense == 1 then return self end
  return methods.clone(self)
end

return M
