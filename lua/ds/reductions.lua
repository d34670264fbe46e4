--- Reductions and order: `x:sum(-1, { keepdim = true })`, `x:max(2)`, `x:sort()`, `x:topk(5)`.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local shapes = require "ds.shapes"

local raise, shape_string = border.raise, border.shape_string
local options_of, need_floating = shapes.options_of, shapes.need_floating
local define = autograd.define
local new, dim_of, floating, run = tensor.new, tensor.dim_of, tensor.floating, tensor.run
local methods, is_tensor, numel_of = tensor.methods, tensor.is_tensor, tensor.numel_of

--- Which dimensions are reduced, the shape with 1 in their place, and the shape without them.
local function reduced(x, dim, what)
  local n = #x.shape
  local set = {}
  if dim == nil then
    for i = 1, n do set[i] = true end
  elseif type(dim) == "table" then
    for _, d in ipairs(dim) do set[dim_of(d, n, what)] = true end
  else
    set[dim_of(dim, n, what)] = true
  end
  local keep, drop = {}, {}
  for i = 1, n do
    keep[i] = set[i] and 1 or x.shape[i]
    if not set[i] then drop[#drop + 1] = x.shape[i] end
  end
  return keep, drop
end

local function summed_dtype(x) return floating[x.dtype] and x.dtype or "i64" end

local sum = define("sum", {
  args = { "shape", "dtype" }, kernel = "sum", call = { "y", "x", "0" },
  infer = function(x, shape, dtype) return new(shape, dtype, x.device) end,
  backward = function(r, dy) return dy:expand(r.x.shape) end,
})

local mean = define("mean", {
  args = { "shape" }, kernel = "mean", call = { "y", "x" },
  infer = function(x, shape)
    need_floating(x, "mean")
    return new(shape, x.dtype, x.device)
  end,
  backward = function(r, dy)
    return (dy * (numel_of(dy.shape) / numel_of(r.x.shape))):expand(r.x.shape)
  end,
})

--- The gradient goes to every element that equals the extreme, in equal parts.
local function extreme(name)
  return define(name, {
    args = { "shape" }, kernel = name, call = { "y", "x" },
    infer = function(x, shape)
      if numel_of(x.shape) == 0 then raise("%s: the tensor is empty", name) end
      return new(shape, x.dtype, x.device)
    end,
    backward = function(r, dy)
      local hit = r.x:eq(r.y):to(dy.dtype)
      local count = sum(hit, r.shape, hit.dtype)
      return hit * (dy / count)
    end,
  })
end

local prod = define("prod", {
  args = { "shape" }, kernel = "prod", call = { "y", "x" },
  infer = function(x, shape) return new(shape, summed_dtype(x), x.device) end,
  backward = function(r, dy) return dy * r.y / r.x end,
})

local function bool_reduction(name)
  return define(name, {
    args = { "shape" }, kernel = name, call = { "y", "x" },
    infer = function(x, shape)
      if x.dtype ~= "bool" then raise("%s: expects bool, got %s", name, x.dtype) end
      return new(shape, "bool", x.device)
    end,
  })
end

local function reduction(name, op, extra)
  --- `x:sum()`, `x:sum(dim)`, `x:sum({ 1, 3 }, { keepdim = true })`
  methods[name] = function(self, dim, options)
    tensor.need_tensor(self, name, 1)
    options = options_of(name, options, { keepdim = true })
    local keep, drop = reduced(self, dim, name)
    local y = op(self, keep, extra and extra(self))
    if options.keepdim or #drop == #keep then return y end
    return y:reshape(drop)
  end
end

reduction("sum", sum, summed_dtype)
reduction("mean", mean)
reduction("prod", prod)
reduction("all", bool_reduction("all"))
reduction("any", bool_reduction("any"))
reduction("amax", extreme("max"))
reduction("amin", extreme("min"))

for _, name in ipairs { "argmax", "argmin" } do
  local op = define(name, {
    args = { "axis", "shape" }, kernel = name, call = { "y", "x", "axis" },
    infer = function(x, _, shape)
      if numel_of(x.shape) == 0 then raise("%s: the tensor is empty", name) end
      return new(shape, "i64", x.device)
    end,
  })
  --- 0-based positions of the extremes along a dimension, or in the flattened tensor.
  methods[name] = function(self, dim, options)
    tensor.need_tensor(self, name, 1)
    options = options_of(name, options, { keepdim = true })
    if dim == nil then self, dim = self:reshape(-1), 1 end
    local keep, drop = reduced(self, dim, name)
    local y = op(self, dim_of(dim, #self.shape, name) - 1, keep)
    return options.keepdim and y or y:reshape(drop)
  end
end

for _, name in ipairs { "max", "min" } do
  --- Without a dimension the extreme; with one, values and 0-based indices along it.
  methods[name] = function(self, dim, options)
    if is_tensor(dim) then return methods[name .. "imum"](self, dim) end
    local values = methods["a" .. name](self, dim, options)
    if dim == nil then return values end
    return values, methods["arg" .. name](self, dim, options)
  end
end

--- Variance; correction 1 (default) divides by n − 1.
function methods:var(dim, options)
  options = options_of("var", options, { keepdim = true, correction = true })
  local centred = self - self:mean(dim, { keepdim = true })
  local squares = (centred * centred):sum(dim, { keepdim = options.keepdim })
  local count = numel_of(self.shape) / numel_of(squares.shape)
  return squares * (1 / (count - (options.correction or 1)))
end
function methods:std(dim, options) return self:var(dim, options):sqrt() end

--- Euclidean norm.
function methods:norm(dim, options) return (self * self):sum(dim, options):sqrt() end

function methods:logsumexp(dim, options)
  options = options_of("logsumexp", options, { keepdim = true })
  local top = scope.grad and self:detach():amax(dim, { keepdim = true }) or
    self:amax(dim, { keepdim = true })
  local y = (self - top):exp():sum(dim, { keepdim = true }):log() + top
  if options.keepdim then return y end
  local _, drop = reduced(self, dim, "logsumexp")
  return y:reshape(drop)
end

local cumsum = define("cumsum", {
  args = { "axis", "reverse" }, kernel = "cumsum",
  infer = function(x) return new(x.shape, summed_dtype(x), x.device) end,
  backward = function(r, dy) return autograd.ops.cumsum.call_(dy, r.axis, 1 - r.reverse) end,
})
function methods:cumsum(dim) return cumsum(self, dim_of(dim, #self.shape, "cumsum") - 1, 0) end

--- Sorted values and their 0-based indices; gradients go back to where the values came from.
local function ordered(name)
  return define(name, {
    args = { "axis", "flag", "shape" }, outputs = { "values", "indices" }, kernel = name,
    partial = true, call = { "values", "indices", "x", "axis", "flag" },
    infer = function(x, _, _, shape)
      return new(shape, x.dtype, x.device), new(shape, "i64", x.device)
    end,
    backward = function(r, dy)
      if not dy then return nil end
      local dx = tensor.zeros_like(r.x)
      run("scatter_add", dx.device, dx._c, r.indices._c, dy._c, r.axis)
      return dx
    end,
  })
end
local sort, topk = ordered("sort"), ordered("topk")

--- `local values, indices = x:sort(dim, { descending = true })`
function methods:sort(dim, options)
  options = options_of("sort", options, { descending = true })
  tensor.need_tensor(self, "sort", 1)
  return sort(self, dim_of(dim or -1, #self.shape, "sort") - 1, options.descending and 1 or 0,
    self.shape)
end
function methods:argsort(dim, options) return (select(2, self:sort(dim, options))) end

--- The k largest (or smallest: { largest = false }) values along a dimension, sorted, and their
-- indices.
function methods:topk(k, dim, options)
  options = options_of("topk", options, { largest = true })
  tensor.need_tensor(self, "topk", 1)
  dim = dim_of(dim or -1, #self.shape, "topk")
  if type(k) ~= "number" or k < 0 or k > self.shape[dim] then
    raise("topk: k = %s, dimension %d of %s has %d", tostring(k), dim, shape_string(self.shape),
      self.shape[dim])
  end
  local shape = { unpack(self.shape) }
  shape[dim] = k
  return topk(self, dim - 1, options.largest == false and 0 or 1, shape)
end
