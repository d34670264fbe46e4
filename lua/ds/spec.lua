--- Checks a table of settings against a list of fields: types, ranges, defaults, unknown keys.
-- Used for the JSON config (config.lua), for the parameters of schedules (schedule.lua) and for the
-- suggestions of script options (cli.lua).
--
-- A field is `{ name, type, default, help, … }`:
--
-- * type: "integer" "number" "boolean" "string" "array" "object" "any"
-- * `min` `max` `above` `below`: bounds, the last two exclusive; `enum`: the values allowed
-- * `length`, `each`: of an array, its length and the field that describes one element
-- * `fields`: of an object; without it the object is open (anything goes). `optional`: an object
--   that stays absent when not given, instead of being filled with defaults
-- * `required`; `alias` = list of further names; `convert(value)` runs before the check,
--   `check(value)` after it and returns a message when the value won't do
-- * `status`: nil (works), "idle" (accepted and checked, nothing to do here), "later" (known, not
--   in this version) or "never"; the last two accept only values without effect: the default, those
--   in `off`, and objects that nothing inside switches on (`on(value)` says so; otherwise an
--   `enabled` that is true, anywhere). `strict`: the object as such has an effect. `why` goes into
--   the message. `later` = { value = why }: single values that are not in this version
--
-- JSON's null and the string "auto" mean "not given", everywhere.

local json = require "ds.json"

local M = {}

-- Suggestions ------------------------------------------------------------------------------------

-- Damerau-Levenshtein distance (optimal string alignment): insert, delete, replace, swap two.
local function distance(a, b)
  local rows = { [0] = {} }
  for j = 0, #b do rows[0][j] = j end
  for i = 1, #a do
    rows[i] = { [0] = i }
    for j = 1, #b do
      local same = a:byte(i) == b:byte(j)
      local best = math.min(rows[i - 1][j] + 1, rows[i][j - 1] + 1,
        rows[i - 1][j - 1] + (same and 0 or 1))
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        best = math.min(best, rows[i - 2][j - 2] + 1)
      end
      rows[i][j] = best
    end
  end
  return rows[#a][#b]
end

local function plain(name) return (name:lower():gsub("[-_]", "")) end

--- The name in a list that was most likely meant.
-- @tparam string name what was written
-- @tparam table candidates array of names
-- @treturn string|nil nothing when none is near
function M.nearest(name, candidates)
  local best, best_score
  local key = plain(name)
  for _, candidate in ipairs(candidates) do
    local other = plain(candidate)
    local score = distance(key, other)
    -- a name left unfinished is nearer than its missing letters say
    if #key >= 3 and other:sub(1, #key) == key then score = math.min(score, 1.5) end
    if score <= math.max(1.5, #key / 3) and (not best or score < best_score) then
      best, best_score = candidate, score
    end
  end
  return best
end

--- " (did you mean "x"?)" or nothing, to append to a message.
function M.did_you_mean(name, candidates)
  local near = M.nearest(tostring(name), candidates)
  return near and (' (did you mean "%s"?)'):format(near) or ""
end

-- Values and fields in words ---------------------------------------------------------------------

--- A number as it would be typed: 1e-3 as 0.001, 5e8 as 500000000.
function M.number_text(x)
  if x == math.floor(x) and math.abs(x) < 1e15 then return ("%.0f"):format(x) end
  return ("%.14g"):format(x)
end

--- A value as messages and help show it.
function M.show(value)
  local kind = type(value)
  if value == json.null or value == nil then return "null" end
  if kind == "number" then return M.number_text(value) end
  if kind == "string" then return '"' .. value .. '"' end
  if kind ~= "table" then return tostring(value) end
  local parts = {}
  for i, item in ipairs(value) do parts[i] = M.show(item) end
  if #parts > 0 or json.is_array(value) then return "[" .. table.concat(parts, ", ") .. "]" end
  return next(value) == nil and "{}" or "{…}"
end

local nouns = {
  integer = "an integer", number = "a number", boolean = "true or false", string = "a string",
  array = "an array", object = "an object { … }", any = "a value",
}

local function bounds(field)
  local parts = {}
  if field.min and field.max then
    return (" from %s to %s"):format(M.number_text(field.min), M.number_text(field.max))
  end
  if field.min then parts[#parts + 1] = " of at least " .. M.number_text(field.min) end
  if field.above then parts[#parts + 1] = " above " .. M.number_text(field.above) end
  if field.max then parts[#parts + 1] = " of at most " .. M.number_text(field.max) end
  if field.below then parts[#parts + 1] = " below " .. M.number_text(field.below) end
  return table.concat(parts, " and")
end

--- What a field takes: "an integer of at least 1", "one of "log", "linear"".
function M.expects(field)
  if field.enum then
    local parts = {}
    for i, value in ipairs(field.enum) do parts[i] = M.show(value) end
    return #parts > 1 and "one of " .. table.concat(parts, ", ") or parts[1]
  end
  if field[2] == "array" and field.each then
    local each = field.each
    local what = (each[2] == "any" and "values" or each[2] .. "s") .. bounds(each)
    return ("an array of %s%s"):format(field.length and field.length .. " " or "", what)
  end
  return nouns[field[2]] .. bounds(field)
end

local function describe(value)
  local kind = type(value)
  local shown = M.show(value)
  if kind == "string" then
    return tonumber(value) and shown .. " (a string; drop the quotes)" or shown .. " (a string)"
  end
  return shown
end

-- Checking ---------------------------------------------------------------------------------------

--- A collector of problems.
-- @tparam[opt] table lines what `json.decode` returned with `lines`
-- @tparam[opt] function elsewhere `elsewhere(key)` names the right place of a key that is unknown
-- where it stands
function M.context(lines, elsewhere)
  return { lines = lines, elsewhere = elsewhere, problems = {} }
end

--- Adds a problem. `place` is { path =, line = } of what is wrong.
function M.report(context, place, format, ...)
  local problems = context.problems
  local text = select("#", ...) > 0 and format:format(...) or format
  problems[#problems + 1] = { line = place.line, path = place.path, text = text, n = #problems }
end

--- The place of a key inside a table that stands at `parent`.
function M.inside(context, parent, t, key)
  local at = context.lines and context.lines[t]
  local path = type(key) == "number" and ("%s[%d]"):format(parent.path, key)
    or (parent.path == "" and "" or parent.path .. ".") .. tostring(key)
  return { path = path, line = at and at[key] or parent.line }
end

local function is_given(value)
  return value ~= nil and value ~= json.null and value ~= "auto"
end

--- A copy of a table without what is "not given".
function M.given(t)
  local out = {}
  for key, value in pairs(t) do
    if is_given(value) then out[key] = value end
  end
  return out
end

local is_type = {
  integer = function(v)
    return type(v) == "number" and v == math.floor(v) and math.abs(v) <= 2 ^ 53
  end,
  number = function(v) return type(v) == "number" and v - v == 0 end,
  boolean = function(v) return type(v) == "boolean" end,
  string = function(v) return type(v) == "string" end,
  array = function(v)
    return type(v) == "table" and (json.is_array(v) or #v > 0 or next(v) == nil)
  end,
  object = function(v) return type(v) == "table" and not json.is_array(v) and #v == 0 end,
  any = function() return true end,
}

local function in_range(field, v)
  if field.enum then
    for _, allowed in ipairs(field.enum) do
      if v == allowed then return true end
    end
    return false
  end
  return (not field.min or v >= field.min) and (not field.max or v <= field.max)
    and (not field.above or v > field.above) and (not field.below or v < field.below)
end

-- Does anything inside switch it on? `enabled` is how DeepSpeed's sections say so.
local function switched_on(v)
  if type(v) ~= "table" then return false end
  for key, value in pairs(v) do
    if key == "enabled" and value == true or switched_on(value) then return true end
  end
  return false
end

local function without_effect(field, v)
  if field[3] ~= nil and v == field[3] then return true end
  for _, value in ipairs(field.off or {}) do
    if v == value then return true end
  end
  return field[2] == "object" and not field.strict and not (field.on or switched_on)(v)
end

--- "pipeline: not in this version yet (it comes …)".
local function refuse(context, place, field, value)
  local what = place.path
  if type(value) ~= "table" then what = ("%s %s"):format(what, M.show(value)) end
  if field.status == "never" then
    M.report(context, place, "%s: not supported: %s", what, field.why)
  else
    M.report(context, place, "%s: not in this version yet%s", what,
      field.why and " (" .. field.why .. ")" or "")
  end
end

local function copy(value)
  if type(value) ~= "table" then return value end
  local out = {}
  for k, v in pairs(value) do out[k] = copy(v) end
  return out
end

local check_value

local function check_array(context, field, value, place)
  if field.length and #value ~= field.length then
    return M.report(context, place, "%s: expected %s, got %s", place.path, M.expects(field),
      describe(value))
  end
  local out = {}
  for i = 1, #value do
    out[i] = field.each and check_value(context, field.each, value[i],
      M.inside(context, place, value, i)) or copy(value[i])
  end
  return out
end

function check_value(context, field, value, place)
  if field.convert then value = field.convert(value) end
  local kind = field[2]
  if not is_type[kind](value) or kind ~= "object" and not in_range(field, value) then
    return M.report(context, place, "%s: expected %s, got %s", place.path, M.expects(field),
      describe(value))
  end
  if (field.status == "later" or field.status == "never") and not without_effect(field, value) then
    return refuse(context, place, field, value)
  end
  local later = field.later and field.later[value]
  if later then
    return M.report(context, place, "%s %s: not in this version yet (%s)", place.path,
      M.show(value), later)
  end
  local message = field.check and field.check(value)
  if message then return M.report(context, place, "%s: %s", place.path, message) end
  if kind == "array" then return check_array(context, field, value, place) end
  if kind == "object" and field.fields then
    return M.check(context, field.fields, value, place)
  end
  return copy(value)
end

-- All names of a section, and which field each means.
local function index(fields)
  local names, by_name = {}, {}
  for _, field in ipairs(fields) do
    names[#names + 1] = field[1]
    by_name[field[1]] = field
    for _, alias in ipairs(field.alias or {}) do by_name[alias] = field end
  end
  return names, by_name
end

local function report_unknown(context, t, place, names, by_name)
  local unknown = {}
  for key in pairs(t) do
    if not by_name[key] then unknown[#unknown + 1] = key end
  end
  table.sort(unknown, function(a, b) return tostring(a) < tostring(b) end)
  for _, key in ipairs(unknown) do
    local at = M.inside(context, place, t, key)
    local hint = M.did_you_mean(key, names)
    local other = hint == "" and context.elsewhere and context.elsewhere(key)
    if other then hint = (' (did you mean "%s"?)'):format(other) end
    M.report(context, at, 'unknown key "%s"%s', at.path, hint)
  end
end

-- The value given for a field under its name or an alias, and the key that was used.
local function find(context, t, place, field)
  local used
  for _, key in ipairs { field[1], unpack(field.alias or {}) } do
    if is_given(t[key]) then
      if used then
        M.report(context, M.inside(context, place, t, key),
          '"%s" and "%s" mean the same; keep one', used, key)
      end
      used = used or key
    end
  end
  return used
end

--- Checks a table and fills in what is missing.
-- @tparam table context from `M.context`
-- @tparam table fields list of fields
-- @tparam table t the table
-- @tparam table place { path =, line = } of t
-- @treturn table a new, completed table; problems are in the context
function M.check(context, fields, t, place)
  local out = {}
  local names, by_name = index(fields)
  report_unknown(context, t, place, names, by_name)
  for _, field in ipairs(fields) do
    local key = find(context, t, place, field)
    if key then
      out[field[1]] = check_value(context, field, t[key], M.inside(context, place, t, key))
    elseif field.required then
      M.report(context, place, "%s%s is missing (%s: %s)", place.path == "" and "" or
        place.path .. ".", field[1], M.expects(field), field[4])
    elseif field[2] == "object" and field.fields and not field.optional then
      out[field[1]] = M.defaults(field.fields)
    else
      out[field[1]] = copy(field[3])
    end
  end
  return out
end

--- The defaults of a list of fields.
function M.defaults(fields)
  local out = {}
  for _, field in ipairs(fields) do
    if field[2] == "object" and field.fields and not field.optional then
      out[field[1]] = M.defaults(field.fields)
    else
      out[field[1]] = copy(field[3])
    end
  end
  return out
end

--- The problems as lines of text, in the order of the file (or of the paths).
-- @tparam table context
-- @tparam string name the file's name, or what messages call the table
function M.messages(context, name)
  local problems = context.problems
  table.sort(problems, function(a, b)
    if a.line ~= b.line then return (a.line or 0) < (b.line or 0) end
    return a.n < b.n
  end)
  local out = {}
  for i, problem in ipairs(problems) do
    out[i] = ("%s%s: %s"):format(name, problem.line and ":" .. problem.line or "", problem.text)
  end
  return out
end

return M
