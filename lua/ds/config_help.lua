--- What the configuration's keys mean, made from the schema: `dsrun --config-help` and CONFIG.md.

local schedule = require "ds.schedule"
local schema = require "ds.config_schema"
local spec = require "ds.spec"

local M = {}

local WIDTH = 100

local function note(field)
  if field.status == "idle" then return "Accepted; nothing to do for it in this version." end
  local other = field[2] ~= "object" and field[3] ~= nil and "Other values are not " or "Not "
  if field.status == "later" then return other .. "in this version yet." end
  if field.status == "never" then return other .. "supported: " .. field.why .. "." end
  local values = {}
  for value in pairs(field.later or {}) do values[#values + 1] = spec.show(value) end
  table.sort(values)
  if #values == 0 then return nil end
  return table.concat(values, " and ") .. (#values > 1 and " are" or " is") ..
    " not in this version yet."
end

local function default_text(field)
  if field.required then return "required" end
  if field[3] == nil then return field[2] == "object" and "{}" or "not given" end
  return spec.show(field[3])
end

local function sentence(text)
  text = text:gsub("^%l", string.upper)
  return (text:find "[.!?]$" or text:find "…$") and text or text .. "."
end

local function wrap(text, indent)
  local lines, line = {}, ""
  for word in text:gmatch "%S+" do
    if line ~= "" and indent + #line + 1 + #word > WIDTH then
      lines[#lines + 1] = line
      line = word
    else
      line = line == "" and word or line .. " " .. word
    end
  end
  lines[#lines + 1] = line
  return (" "):rep(indent) .. table.concat(lines, "\n" .. (" "):rep(indent)) .. "\n"
end

-- Every field with its dotted path, depth first, in the schema's order.
local function each_field(fields, path, visit)
  for _, field in ipairs(fields) do
    local here = path .. field[1]
    visit(here, field)
    if field.fields then each_field(field.fields, here .. ".", visit) end
  end
end

-- The built-in optimizers and schedules as sections: { kind, name, help, fields }.
local function named()
  local list, names = {}, {}
  for name in pairs(schema.optimizers) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    list[#list + 1] = { "optimizer", name, "Parameters of the optimizer " .. name .. ".",
      schema.optimizers[name] }
  end
  for _, name in ipairs(schedule.names()) do
    local fields = schedule.fields(name)
    if fields then list[#list + 1] = { "scheduler", name, fields.help, fields } end
  end
  return list
end

-- Text -------------------------------------------------------------------------------------------

local function short(field, name)
  local mark = field.status == "later" and " [later]" or field.status == "never" and " [no]" or ""
  return ("  %s = %s%s\n"):format(name or field[1], default_text(field), mark) ..
    wrap(sentence(field[4]), 6)
end

local function detail(path, field)
  local out = { path, "\n" }
  out[#out + 1] = wrap(sentence(field[4]), 2)
  local takes = ("Takes %s. Default: %s."):format(spec.expects(field), default_text(field))
  out[#out + 1] = wrap(takes, 2)
  if field.alias then
    out[#out + 1] = wrap("Also written " .. table.concat(field.alias, ", ") .. ".", 2)
  end
  if note(field) then out[#out + 1] = wrap(note(field), 2) end
  for _, inner in ipairs(field.fields or {}) do out[#out + 1] = short(inner) end
  return table.concat(out)
end

local function detail_named(entry)
  local out = { ("%s.type %q\n"):format(entry[1], entry[2]), wrap(entry[3], 2) }
  for _, field in ipairs(entry[4]) do out[#out + 1] = short(field) end
  return table.concat(out)
end

local function overview()
  local out = { "Keys of the JSON config with their defaults. `dsrun --config-help KEY` says more ",
    "about one key,\nor about an optimizer or schedule. [later]: known, but no other value works ",
    "in this version.\n" }
  for _, group in ipairs(schema.groups) do
    out[#out + 1] = "\n" .. group[1] .. "\n"
    for _, field in ipairs(group[2]) do
      out[#out + 1] = short(field)
      if field.fields then
        local names = {}
        for i, inner in ipairs(field.fields) do names[i] = inner[1] end
        out[#out + 1] = wrap("Keys: " .. table.concat(names, ", "), 6)
      end
    end
  end
  local types = { optimizer = {}, scheduler = {} }
  for _, entry in ipairs(named()) do table.insert(types[entry[1]], entry[2]) end
  out[#out + 1] = "\nOptimizers: " .. table.concat(types.optimizer, ", ")
  out[#out + 1] = "\nSchedules: " .. table.concat(types.scheduler, ", ") .. "\n"
  return table.concat(out)
end

-- A key matches by its whole path, or by its last name alone; aliases count.
local function matches(key, path, field)
  if key == path or key == field[1] then return true end
  local parent = path:match "^(.*%.)" or ""
  for _, alias in ipairs(field.alias or {}) do
    if key == alias or key == parent .. alias then return true end
  end
  return false
end

--- Help on all keys, or on one.
-- @tparam[opt] string key a path, a key's own name, an optimizer or a schedule
-- @treturn[1] string
-- @treturn[2] nil
-- @treturn[2] string that it is unknown, with a suggestion
function M.text(key)
  if not key then return overview() end
  local found, names = {}, {}
  each_field(schema.fields, "", function(path, field)
    names[#names + 1] = path
    if matches(key, path, field) then found[#found + 1] = detail(path, field) end
  end)
  for _, entry in ipairs(named()) do
    names[#names + 1] = entry[2]
    if key:lower() == entry[2]:lower() then found[#found + 1] = detail_named(entry) end
    each_field(entry[4], "", function(_, field)
      if key == field[1] or key == entry[1] .. ".params." .. field[1] then
        found[#found + 1] = detail(("%s %s: %s"):format(entry[1], entry[2], field[1]), field)
      end
    end)
  end
  if #found > 0 then return table.concat(found, "\n") end
  local near = spec.did_you_mean(key, names)
  if near == "" then -- perhaps the last name of a path
    local leaves = {}
    for i, name in ipairs(names) do leaves[i] = name:match "[^.]*$" end
    near = spec.did_you_mean(key, leaves)
  end
  return nil, ('unknown config key "%s"%s'):format(key, near)
end

-- Markdown ---------------------------------------------------------------------------------------

local function cell(text) return (text:gsub("|", "\\|"):gsub("\n", " ")) end

local function row(path, field)
  local kind = field.enum and spec.expects(field):gsub("^one of ", "") or field[2]
  local help = sentence(field[4]) .. (note(field) and " *" .. note(field) .. "*" or "")
  if field.alias then help = help .. " Also `" .. table.concat(field.alias, "`, `") .. "`." end
  return ("| `%s` | %s | %s | %s |\n"):format(path, cell(kind), cell(default_text(field)),
    cell(help))
end

local head = "| key | type | default | |\n| --- | --- | --- | --- |\n"

--- All keys as Markdown tables.
function M.markdown()
  local out = { "# Configuration\n\nMade from `config_schema.lua` by `dsrun -e ",
    "'io.write(require(\"ds.config\").markdown())' > lua/ds/CONFIG.md`.\n\n",
    "The config is a JSON file (comments and trailing commas are allowed) or a Lua table. `null` ",
    "and `\"auto\"` mean: not\ngiven. Unknown and duplicate keys are errors.\n" }
  for _, group in ipairs(schema.groups) do
    out[#out + 1] = ("\n## %s\n\n%s"):format(group[1], head)
    each_field(group[2], "", function(path, field) out[#out + 1] = row(path, field) end)
  end
  for _, entry in ipairs(named()) do
    out[#out + 1] = ("\n## %s `%s`\n\n%s\n\n%s"):format(entry[1] == "optimizer" and "Optimizer" or
      "Schedule", entry[2], entry[3], head)
    for _, field in ipairs(entry[4]) do out[#out + 1] = row(field[1], field) end
  end
  return table.concat(out)
end

return M
