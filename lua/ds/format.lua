--- How tensors print: as PyTorch does, so that numbers can be compared at a glance.
-- Four digits after the point, scientific where the range asks for it, long tensors summarised.

local tensor = require "ds.tensor"

local EDGE, LIMIT, WIDTH, DIGITS = 3, 1000, 80, 4

--- The numbers that will be shown, flat, for choosing a common format.
local function shown(list, dims, summary, out)
  if type(list) ~= "table" then
    out[#out + 1] = list
    return out
  end
  local n = #list
  if summary and n > 2 * EDGE then
    for i = 1, EDGE do shown(list[i], dims, summary, out) end
    for i = n - EDGE + 1, n do shown(list[i], dims, summary, out) end
  else
    for i = 1, n do shown(list[i], dims, summary, out) end
  end
  return out
end

local function special(v)
  if v ~= v then return "nan" end
  if v == math.huge then return "inf" end
  if v == -math.huge then return "-inf" end
end

local function scientific(v) return ("%.4e"):format(v) end

--- A function number → padded text for floating values.
local function float_format(values)
  local low, high, whole, any = math.huge, 0, true, false
  for _, v in ipairs(values) do
    if not special(v) and v ~= 0 then
      local a = math.abs(v)
      low, high, any = math.min(low, a), math.max(high, a), true
      whole = whole and v == math.ceil(v)
    end
  end
  local text
  if not any then
    text = function(v) return ("%.0f."):format(v) end
  elseif whole then
    text = (high / low > 1000 or high > 1e8) and scientific or
      function(v) return ("%.0f."):format(v) end
  elseif high / low > 1000 or high > 1e8 or low < 1e-4 then
    text = scientific
  else
    text = function(v) return ("%." .. DIGITS .. "f"):format(v) end
  end
  return function(v) return special(v) or text(v) end
end

--- The text of a value of t, padded. The width is that of the finite values other than 0, as in
-- PyTorch.
local function formatter(t, values)
  local text
  local real = tensor.floating[t.dtype]
  if t.dtype == "bool" then
    text = function(v) return v and "True" or "False" end
  elseif real then
    text = float_format(values)
  else
    text = function(v) return ("%d"):format(v) end
  end
  local width = 0
  for _, v in ipairs(values) do
    if not real or v ~= 0 and v - v == 0 then width = math.max(width, #text(v)) end
  end
  return function(v)
    local s = text(v)
    return (" "):rep(width - #s) .. s
  end, width
end

local function vector(list, text, width, indent, summary)
  local cells, n = {}, #list
  if summary and n > 2 * EDGE then
    for i = 1, EDGE do cells[#cells + 1] = text(list[i]) end
    cells[#cells + 1] = " ..."
    for i = n - EDGE + 1, n do cells[#cells + 1] = text(list[i]) end
  else
    for i = 1, n do cells[i] = text(list[i]) end
  end
  local per_line = math.max(1, math.floor((WIDTH - indent) / (width + 2)))
  local lines = {}
  for i = 1, #cells, per_line do
    lines[#lines + 1] = table.concat(cells, ", ", i, math.min(i + per_line - 1, #cells))
  end
  return "[" .. table.concat(lines, ",\n" .. (" "):rep(indent + 1)) .. "]"
end

local function nested(list, dims, text, width, indent, summary)
  if dims == 0 then return text(list) end
  if dims == 1 then return vector(list, text, width, indent, summary) end
  local parts, n = {}, #list
  local function add(i)
    parts[#parts + 1] = nested(list[i], dims - 1, text, width, indent + 1, summary)
  end
  if summary and n > 2 * EDGE then
    for i = 1, EDGE do add(i) end
    parts[#parts + 1] = "..."
    for i = n - EDGE + 1, n do add(i) end
  else
    for i = 1, n do add(i) end
  end
  return "[" .. table.concat(parts, "," .. ("\n"):rep(dims - 1) .. (" "):rep(indent + 1)) .. "]"
end

--- Only the edges of long dimensions, so that printing a huge tensor reads little of it.
local function edges(t)
  for d, n in ipairs(t.shape) do
    if n > 2 * EDGE + 1 then
      local head, tail = t:narrow(d, 1, EDGE + 1), t:narrow(d, n - EDGE + 1, EDGE)
      t = require("ds.views").cat({ head, tail }, d)
    end
  end
  return t
end

local default = { f32 = true, i64 = true, bool = true }

local function describe(t)
  local extra = {}
  if t.device ~= "cpu" then extra[#extra + 1] = ("device='%s'"):format(t.device) end
  local shape = "(" .. table.concat(t.shape, ", ") .. (#t.shape == 1 and "," or "") .. ")"
  if t.device ~= "meta" and t._c.data == nil then
    return ("tensor(released %s, size=%s)"):format(t._gone or "", shape)
  end
  if not default[t.dtype] then extra[#extra + 1] = "dtype=" .. t.dtype end
  if t._rec then
    extra[#extra + 1] = ("grad_fn=<%s>"):format(t._rec.op.name)
  elseif t.requires_grad then
    extra[#extra + 1] = "requires_grad=True"
  end
  local tail = #extra > 0 and ", " .. table.concat(extra, ", ") or ""
  local numel = t:numel()
  if t.device == "meta" then return ("tensor(..., size=%s%s)"):format(shape, tail) end
  if numel == 0 then
    if #t.shape ~= 1 then tail = (", size=%s%s"):format(shape, tail) end
    return "tensor([]" .. tail .. ")"
  end
  local summary = numel > LIMIT
  local list = (summary and edges(t) or t):tolist()
  local text, width = formatter(t, shown(list, #t.shape, summary, {}))
  return "tensor(" .. nested(list, #t.shape, text, width, 7, summary) .. tail .. ")"
end

tensor.Tensor.__tostring = function(t)
  return require("ds.scope").no_grad(describe, t)
end
