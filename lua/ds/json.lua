--- JSON: text to Lua values and back.
--
-- * An object is a plain table with string keys, an array a table that `json.is_array` knows:
--   `json.array { 1, 2 }`, or whatever `decode` made from `[…]`. A table with the keys 1…n is
--   written as an array without being marked; an empty one is an object unless marked.
-- * `null` is `json.null`, a value of its own, because a field that is nil does not exist.
-- * Numbers survive both ways, bit for bit. Integers that a double can't hold, NaN and infinities
--   are refused.
-- * Reading also takes comments and trailing commas (runner/json.c does it, on jansson).

local ffi = require "ffi"
local dsffi = require "ds.ffi"

local C = dsffi.C
local M = {}

--- JSON's null.
M.null = setmetatable({}, {
  __tostring = function() return "json.null" end,
  __newindex = function() error("json.null can't be changed", 2) end,
})

local array_mt = { __name = "json.array" }

--- Marks a table as an array (needed only for an empty one).
-- @tparam[opt] table t
-- @treturn table t itself
function M.array(t) return setmetatable(t or {}, array_mt) end

--- Is this a table that `decode` or `json.array` marked as an array?
function M.is_array(t) return getmetatable(t) == array_mt end

-- Reading ----------------------------------------------------------------------------------------

local NULL, FALSE, TRUE = C.DS_JSON_NULL, C.DS_JSON_FALSE, C.DS_JSON_TRUE
local NUMBER, STRING, ARRAY = C.DS_JSON_NUMBER, C.DS_JSON_STRING, C.DS_JSON_ARRAY

-- The value of node i, and the index of the node behind it. `lines` may be nil.
local function build(nodes, i, lines)
  local node = nodes[i]
  local kind = node.type
  if kind == NUMBER then return node.number, i + 1 end
  if kind == STRING then return ffi.string(node.text, node.size), i + 1 end
  if kind == NULL then return M.null, i + 1 end
  if kind == TRUE or kind == FALSE then return kind == TRUE, i + 1 end
  local t, at = {}, {}
  local size = tonumber(node.size)
  i = i + 1
  for position = 1, size do
    local child = nodes[i]
    local key = kind == ARRAY and position or ffi.string(child.key)
    at[key] = child.key_line
    t[key], i = build(nodes, i, lines)
  end
  if kind == ARRAY then M.array(t) end
  if lines then lines[t] = at end
  return t, i
end

--- Reads JSON text.
-- @tparam string text
-- @tparam string name what messages call it, a file's path mostly
-- @tparam[opt] table options `lines = true`: also return where everything stands
-- @treturn any the value; nil and "name:line: what is wrong" when the text is bad
-- @treturn table|nil with `lines`: `lines[t][key]` is the line of that key (or array element) of
-- table t, `lines.root` the line where the document's value begins
function M.decode(text, name, options)
  local doc = ffi.gc(ffi.new("ds_json"), C.ds_json_free)
  if C.ds_json_parse(doc, text, #text, name or "json") < 0 then
    return nil, ffi.string(C.ds_error())
  end
  local lines = options and options.lines and { root = doc.nodes[0].line } or nil
  local value = build(doc.nodes, 0, lines)
  C.ds_json_free(doc)
  return value, lines
end

local LIMIT = 256 * 2 ^ 20 -- bytes: far beyond any config or manifest, well within memory

--- Reads a JSON file.
-- @tparam string path
-- @tparam[opt] table options as for `decode`
-- @treturn any as `decode`; nil and a message that begins with the path when it can't be read
function M.load(path, options)
  local file, message = io.open(path, "rb")
  if not file then return nil, message end
  local parts, bytes = {}, 0
  while true do
    local part, why = file:read(2 ^ 20)
    if not part and why then
      file:close()
      return nil, path .. ": " .. why:gsub("^[^:]*: ", "")
    end
    if not part then break end
    parts[#parts + 1] = part
    bytes = bytes + #part
    if bytes > LIMIT then
      file:close()
      return nil, ("%s: more than %d MiB; this is no config or manifest"):format(path,
        LIMIT / 2 ^ 20)
    end
  end
  file:close()
  return M.decode(table.concat(parts), path, options)
end

-- Writing ----------------------------------------------------------------------------------------

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

local function refuse(path, format, ...)
  return dsffi.raise("%s: %s", path, format:format(...))
end

local function encode_string(s, path)
  if C.ds_json_utf8(s, #s) == 0 then
    return refuse(path, "a string of %d bytes that is not UTF-8 (binary data can't be in JSON)", #s)
  end
  return '"' .. s:gsub('[%c"\\]', function(c)
    return escapes[c] or (c ~= "\127" and ("\\u%04x"):format(c:byte())) or nil
  end) .. '"'
end

-- The shortest form that reads back as the same double.
local function encode_number(x, path)
  if x ~= x or x == math.huge or x == -math.huge then
    return refuse(path, "%s can't be written as JSON", tostring(x))
  end
  if x == 0 and 1 / x < 0 then return "-0.0" end -- "-0" would read back as the integer 0
  if x == math.floor(x) and math.abs(x) <= 2 ^ 53 then return ("%.0f"):format(x) end
  for digits = 15, 16 do
    local text = ("%%.%dg"):format(digits):format(x)
    if tonumber(text) == x then return text end
  end
  return ("%.17g"):format(x)
end

local function step_into(path, key)
  if type(key) == "number" then return ("%s[%d]"):format(path, key) end
  return path == "" and key or path .. "." .. key
end

-- Sorted string keys of an object, or nil and n for an array of n.
local function shape_of(t, path)
  local keys, n, last = {}, 0, 0
  for key in pairs(t) do
    if type(key) == "string" then
      keys[#keys + 1] = key
    elseif type(key) == "number" then
      n, last = n + 1, math.max(last, key)
      if key < 1 or key ~= math.floor(key) then last = math.huge end
    else
      return refuse(path, "a key is a %s; keys are strings, or 1 to n", type(key))
    end
  end
  if n > 0 and #keys > 0 then
    return refuse(path, "mixed keys, both strings (%q) and numbers; JSON has objects or arrays",
      keys[1])
  end
  if n ~= last then
    return refuse(path, "an array with holes, or with keys other than 1 to %d", n)
  end
  if #keys > 0 and M.is_array(t) then
    return refuse(path, "marked as an array but has the key %q", keys[1])
  end
  if n > 0 or M.is_array(t) then return nil, n end
  table.sort(keys)
  return keys
end

local encode_value

local function encode_items(out, t, keys, n, state, path)
  local deeper = state.indent and state.margin .. state.indent
  local flat = not keys
  for i = 1, keys and #keys or n do
    local item = keys and t[keys[i]] or t[i]
    if type(item) == "table" and item ~= M.null then flat = false end
  end
  -- arrays of plain values stay on one line
  local open = (flat or not deeper) and "" or "\n" .. deeper
  local between = deeper and (flat and ", " or ",\n" .. deeper) or ","
  local outer = state.margin
  state.margin = deeper
  for i = 1, keys and #keys or n do
    local key = keys and keys[i] or i
    out[#out + 1] = i == 1 and open or between
    if keys then
      if key:find("\0", 1, true) then refuse(path, "the key %q has a NUL byte", key) end
      out[#out + 1] = encode_string(key, path) .. (deeper and ": " or ":")
    end
    encode_value(out, t[key], state, step_into(path, key))
  end
  state.margin = outer
  if not flat and deeper then out[#out + 1] = "\n" .. outer end
end

function encode_value(out, value, state, path)
  local kind = type(value)
  if value == M.null then
    out[#out + 1] = "null"
  elseif kind == "string" then
    out[#out + 1] = encode_string(value, path)
  elseif kind == "number" then
    out[#out + 1] = encode_number(value, path)
  elseif kind == "boolean" then
    out[#out + 1] = tostring(value)
  elseif kind ~= "table" then
    return refuse(path, "a %s can't be written as JSON", kind)
  elseif state.open[value] then
    return refuse(path, "contains itself (at %s)", state.open[value])
  elseif state.depth >= C.DS_JSON_DEPTH then
    return refuse(path, "nested deeper than %d levels", C.DS_JSON_DEPTH)
  else
    local keys, n = shape_of(value, path)
    if keys and #keys == 0 or n == 0 then
      out[#out + 1] = keys and "{}" or "[]"
      return
    end
    state.open[value], state.depth = path, state.depth + 1
    out[#out + 1] = keys and "{" or "["
    encode_items(out, value, keys, n, state, path)
    out[#out + 1] = keys and "}" or "]"
    state.open[value], state.depth = nil, state.depth - 1
  end
end

--- Writes a value as JSON text; keys are sorted, so equal values give equal bytes.
-- Raises at the user's line, with the path of what can't be written.
-- @tparam any value
-- @tparam[opt] table options `indent` = spaces a level (none: one line); `name`: what messages call
-- the value, as "client_state"
-- @treturn string
function M.encode(value, options)
  local out = {}
  local indent = options and options.indent and (" "):rep(options.indent)
  local state = { indent = indent, margin = "", open = {}, depth = 0 }
  encode_value(out, value, state, options and options.name or "value")
  return table.concat(out)
end

return M
