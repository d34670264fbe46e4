--- Script options, through lua-argparse.
--
--     local opt = ds.cli { "Train a character GPT",            -- an array: --help keeps this order
--       { "lr", 1e-3, "learning rate" },                       -- the default gives the type
--       { "compile", false, "a flag: --compile, --no-compile" },
--       { "dtype", "fp32", "precision", choices = { "fp32", "bf16" } },
--       { "data", nil, "text file", required = true, short = "d" },
--     }
--
-- `-` and `_` are the same in option names: --batch_size and --batch-size both set opt.batch_size.

local argparse = require "argparse"
local dsffi = require "ds.ffi"
local spec = require "ds.spec"

local M = {}

-- "--no-flag", "--no_flag" and "--NO" alike -> "no_flag"; the key in the table of values.
local function key_of(name) return (name:gsub("-", "_")) end

local known = { choices = true, type = true, required = true, short = true }
local types = { number = true, integer = true, string = true, boolean = true }

-- The option that a row of the table describes; raises at the user's line if it describes none.
local function read_row(row, i)
  local name = type(row) == "table" and row[1]
  if type(name) ~= "string" or not name:find "^%a[%w_-]*$" then
    return dsffi.raise("ds.cli: entry %d: expected { name, default, help }, with a name of " ..
      "letters, digits, - and _", i)
  end
  for key in pairs(row) do
    if type(key) == "string" and not known[key] then
      return dsffi.raise("ds.cli: option %s: unknown field '%s' (choices, type, required, short)",
        name, key)
    end
  end
  local default = row[2]
  local kind = row.type or default ~= nil and type(default) or "string"
  if not types[kind] then
    return dsffi.raise("ds.cli: option %s: a %s can't be an option (number, integer, string, " ..
      "boolean)", name, tostring(kind))
  end
  if default ~= nil and type(default) ~= (kind == "integer" and "number" or kind) then
    return dsffi.raise("ds.cli: option %s: the default %s is not a %s", name, spec.show(default),
      kind)
  end
  return { name = name, key = key_of(name), kind = kind, default = default, help = row[3],
    choices = row.choices, required = row.required, short = row.short }
end

-- Text of the command line to a value, or nil and a message.
local function converter(option)
  return function(text)
    local value = text
    if option.kind == "number" or option.kind == "integer" then
      value = tonumber(text)
      if not value or value - value ~= 0 then
        return nil, ("--%s: '%s' is not a number"):format(option.name, text)
      end
      if option.kind == "integer" and value ~= math.floor(value) then
        return nil, ("--%s: '%s' is not an integer"):format(option.name, text)
      end
    end
    if not option.choices then return value end
    local names = {}
    for i, choice in ipairs(option.choices) do
      if value == choice then return value end
      names[i] = tostring(choice)
    end
    return nil, ("--%s: '%s' is not one of %s%s"):format(option.name, text,
      table.concat(names, ", "), option.kind == "string" and spec.did_you_mean(text, names) or "")
  end
end

local function help_text(option)
  local default = option.default
  local text = option.help or ""
  if option.required then return text .. " (required)" end
  if default == nil or option.kind == "boolean" then return text end
  return ("%s (default %s)"):format(text, type(default) == "number" and spec.number_text(default) or
    default)
end

local function add_flag(parser, option)
  local on, off = "--" .. option.name, "--no-" .. option.name
  local short = option.short and "-" .. option.short .. " " or ""
  -- help shows the one that changes something
  parser:flag(short .. on):target(option.key):action("store_true"):hidden(option.default == true)
    :description(help_text(option))
  parser:flag(off):target(option.key):action("store_false"):hidden(option.default ~= true)
    :description("not: " .. help_text(option))
end

local function add(parser, option)
  if option.kind == "boolean" then return add_flag(parser, option) end
  local names = (option.short and "-" .. option.short .. " " or "") .. "--" .. option.name
  local placeholder = "<" .. option.kind .. ">"
  if option.choices then
    local choices = {}
    for i, choice in ipairs(option.choices) do choices[i] = tostring(choice) end
    placeholder = "{" .. table.concat(choices, ",") .. "}"
  end
  parser:option(names):target(option.key):argname(placeholder):convert(converter(option))
    :description(help_text(option))
end

-- Spells option names as they were declared, and ties a negative number to the option before it,
-- which argparse would take for an option.
local function normalise(argv, options)
  local by_key, out = {}, {}
  for _, option in ipairs(options) do
    by_key[option.key] = option
    if option.kind == "boolean" then
      by_key["no_" .. option.key] = { flag = "no-" .. option.name }
    end
  end
  local i = 1
  while i <= #argv do
    local word = argv[i]
    if word == "--" then
      for j = i, #argv do out[#out + 1] = argv[j] end
      break
    end
    local name, rest = word:match "^%-%-([^=]+)(.*)$"
    local option = name and by_key[key_of(name)]
    if option then
      word = "--" .. (option.flag or option.name) .. rest
      local next_word = argv[i + 1]
      local numeric = option.kind == "number" or option.kind == "integer"
      if numeric and rest == "" and next_word and next_word:find "^%-[%d.]" then
        word, i = word .. "=" .. next_word, i + 1
      end
    end
    out[#out + 1] = word
    i = i + 1
  end
  return out
end

local function fail(parser, message)
  io.stderr:write(parser:get_usage(), "\n\nerror: ", message, "\n")
  os.exit(2)
end

local function read_table(description)
  local options, seen = {}, {}
  for i = 2, #description do
    local option = read_row(description[i], i - 1)
    if seen[option.key] then
      return dsffi.raise("ds.cli: option %s is there twice", option.name)
    end
    seen[option.key] = true
    options[#options + 1] = option
  end
  return options
end

--- Reads the script's options. A bad command line ends the program with a message and code 2,
-- --help with code 0.
-- @tparam table description what the script is for, then `{ name, default, help }` each; further
-- fields: `choices` = array of values; `type` = "number", "integer", "string" or "boolean", where
-- the default doesn't say; `required`; `short` = a letter
-- @tparam[opt] table argv the words to read; default: the command line's
-- @treturn table values by name, `-` as `_`; what isn't given and has no default is absent
function M.parse(description, argv)
  if type(description) ~= "table" or type(description[1]) ~= "string" then
    return dsffi.raise("ds.cli: expected { \"what the script does\", { name, default, help }, … }")
  end
  local options = read_table(description)
  argv = argv or rawget(_G, "arg") or {}
  local parser = argparse((argv[0] or "script"):match "[^/]*$", description[1])
  parser.error = fail
  for _, option in ipairs(options) do add(parser, option) end
  local values = parser:parse(normalise(argv, options))
  for _, option in ipairs(options) do
    if values[option.key] == nil then
      if option.required then
        return fail(parser, ("--%s is missing%s"):format(option.name,
          option.help and " (" .. option.help .. ")" or ""))
      end
      values[option.key] = option.default
    end
  end
  return values
end

--- An argparse parser for a command of dsrun's own, as `dsrun inspect`: wrong words end the program
-- with 2.
-- @tparam string name
-- @tparam string description
function M.parser(name, description)
  local parser = argparse("dsrun " .. name, description)
  parser.error = fail
  return parser
end

--- Adds DeepSpeed's options to an argparse parser of the script's own: `--deepspeed`, which changes
-- nothing, and `--deepspeed_config FILE`, which `initialize { args = … }` reads.
-- @tparam table parser from `require "argparse"`
-- @treturn table the parser
function M.add_config_arguments(parser)
  if type(parser) ~= "table" or not parser.option then
    return dsffi.raise("add_config_arguments: expected a parser of require \"argparse\"")
  end
  parser:flag "--deepspeed":description "accepted for DeepSpeed's scripts; changes nothing"
  parser:option "--deepspeed_config":hidden_name "--deepspeed-config":argname "FILE"
    :description "the engine's config, a JSON file"
  return parser
end

return M
