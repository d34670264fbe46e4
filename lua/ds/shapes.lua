--- Shape rules that many operations share: each checks, and says what was expected.

local border = require "ds.ffi"
local tensor = require "ds.tensor"

local raise, shape_string = border.raise, border.shape_string
local new, floating, run, view = tensor.new, tensor.floating, tensor.run, tensor.view

local M = {}

--- Raises unless x is floating.
function M.need_floating(x, what)
  if not floating[x.dtype] then
    raise("%s: expects a floating tensor, got %s %s; use x:float()", what, x.dtype,
      shape_string(x.shape))
  end
end

--- Indices are i64, i32 or u8.
function M.need_index(x, what)
  if x.dtype ~= "i64" and x.dtype ~= "i32" and x.dtype ~= "u8" then
    raise("%s: indices must be i64 or i32, not %s", what, x.dtype)
  end
end

--- Same device.
function M.same_device(what, a, b)
  if a.device ~= b.device then raise("%s: tensors on %s and %s", what, a.device, b.device) end
end

--- Same dtype and device.
function M.same_dtype(what, a, b)
  if a.dtype ~= b.dtype then
    raise("%s: dtypes %s and %s differ; use t:to(\"%s\")", what, a.dtype, b.dtype, a.dtype)
  end
  M.same_device(what, a, b)
end

--- A parameter (`name` in messages; nil is fine) has the dtype and device of the input x.
function M.need_like(what, x, t, name)
  if t and x.dtype ~= t.dtype then
    raise("%s: %s is %s but the input is %s; use t:to(\"%s\")", what, name, t.dtype, x.dtype,
      x.dtype)
  end
  if t and x.device ~= t.device then
    raise("%s: %s is on %s but the input on %s", what, name, t.device, x.device)
  end
end

--- One class index for each row of x [… V].
function M.need_targets(what, x, target)
  M.need_floating(x, what)
  M.same_device(what, x, target)
  if floating[target.dtype] or target.dtype == "bool" then
    raise("%s: targets must be class indices, i64 or i32, not %s", what, target.dtype)
  end
  if #x.shape < 1
    or tensor.numel_of(x.shape) / math.max(1, x.shape[#x.shape]) ~= tensor.numel_of(target.shape)
  then
    raise("%s: %s %s and targets %s: one target for each row is expected",
      what, what == "cross_entropy" and "logits" or "input",
      shape_string(x.shape), shape_string(target.shape))
  end
end

--- The dtype that losses and statistics of x have: f32, f64 for f64.
function M.fine(x) return x.dtype == "f64" and "f64" or "f32" end

local rank = { bool = 1, u8 = 2, i32 = 3, i64 = 4, bf16 = 5, f16 = 5, f32 = 6, f64 = 7 }

--- The dtype that holds both, as PyTorch promotes: the wider one; f32 for bf16 with f16.
function M.common_dtype(a, b)
  if a == b then return a end
  local x, y = rank[a], rank[b]
  if x == y then return "f32" end
  return x > y and a or b
end

--- Whether two shapes are the same.
function M.equal_shapes(a, b)
  if a == b then return true end
  if #a ~= #b then return false end
  for i = 1, #a do
    if a[i] ~= b[i] then return false end
  end
  return true
end

--- The shape that a and b broadcast to (NumPy's rule).
function M.broadcast(a, b, what)
  if M.equal_shapes(a, b) then return a end
  local n = math.max(#a, #b)
  local out = {}
  for i = 0, n - 1 do
    local x, y = a[#a - i] or 1, b[#b - i] or 1
    if x ~= y and x ~= 1 and y ~= 1 then
      raise("%s: shapes %s and %s do not broadcast (size %d against %d)", what, shape_string(a),
        shape_string(b), x, y)
    end
    out[n - i] = x == 1 and y or x
  end
  return out
end

--- A new tensor like x.
function M.as(x) return new(x.shape, x.dtype, x.device) end

--- dy summed down to the shape that was broadcast.
function M.sum_to(dy, shape)
  if M.equal_shapes(dy.shape, shape) then return dy end
  local lead, reduced = #dy.shape - #shape, {}
  for i = 1, #dy.shape do reduced[i] = i > lead and shape[i - lead] or 1 end
  local out = new(reduced, dy.dtype, dy.device)
  run("sum", dy.device, out._c, dy._c, 0)
  return lead > 0 and view.reshape(out, shape) or out
end

--- Raises unless x is a bool mask.
function M.need_bool(x, what)
  if x.dtype ~= "bool" then
    raise("%s: the mask must be bool, not %s; compare first: x:ne(0)", what, x.dtype)
  end
end

--- Options given as a table, with unknown keys refused.
function M.options_of(what, options, known)
  if options == nil then return {} end
  if type(options) ~= "table" or tensor.is_tensor(options) then
    raise("%s: options must be a table, as { %s = … }", what, next(known))
  end
  for key in pairs(options) do
    if not known[key] then
      local list = {}
      for k in pairs(known) do list[#list + 1] = k end
      table.sort(list)
      raise("%s: unknown option '%s'; there are %s", what, tostring(key), table.concat(list, ", "))
    end
  end
  return options
end

return M
