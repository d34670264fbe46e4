--- Script options: values, types, names, and what a bad command line is told.

local argparse = require "argparse"
local cli = require "ds.cli"
local host = require "ds.host"

local description = { "Train a character GPT",
  { "lr", 1e-3, "learning rate" },
  { "steps", 2000, "optimizer steps", type = "integer" },
  { "compile", false, "compile it" },
  { "shuffle", true, "shuffle the data" },
  { "dtype", "fp32", "precision", choices = { "fp32", "bf16" } },
  { "n-layer", 4, "layers", choices = { 4, 6 } },
  { "data", nil, "text file", short = "d" },
  { "deepspeed_config", "ds.json", "engine config" },
}

local function parse(...) return cli.parse(description, { ... }) end

-- Runs a script with options; what it prints on both streams, and its exit code.
local script = os.tmpname()
local function run(text, options)
  local file = assert(io.open(script, "w"))
  file:write(text)
  file:close()
  local pipe = io.popen(("%s %s %s 2>&1; echo code=$?"):format(host.program, script, options or ""))
  local output = pipe:read "*a"
  pipe:close()
  return output:match "^(.*)code=(%d+)\n$"
end

local whole = [[
local opt = require("ds.cli").parse { "Train a character GPT",
  { "zeta", 2000, "optimizer steps", type = "integer" },
  { "batch_size", 8, "samples" }, { "alpha", false, "a flag" }, { "shuffle", true, "shuffle it" },
  { "dtype", "fp32", "precision", choices = { "fp32", "bf16" } },
  { "data", nil, "text file", required = true },
  { "deepspeed_config", "ds.json", "engine config" } }
print(opt.data, opt.zeta)
]]

describe("ds.cli", function()
  teardown(function() os.remove(script) end)

  it("fills in defaults with their types", function()
    assert.same({ lr = 1e-3, steps = 2000, compile = false, shuffle = true, dtype = "fp32",
      n_layer = 4, deepspeed_config = "ds.json" }, parse())
  end)

  it("reads values, = or not, and the last one counts", function()
    local opt = parse("--lr", "3e-4", "--steps=5", "--dtype", "bf16", "-d", "x.txt", "--steps", "7",
      "--n-layer", "6")
    assert.equal(3e-4, opt.lr)
    assert.equal(7, opt.steps)
    assert.equal("bf16", opt.dtype)
    assert.equal("x.txt", opt.data)
    assert.equal(6, opt.n_layer)
  end)

  it("has a --no- form of every flag", function()
    assert.is_true(parse("--compile").compile)
    assert.is_false(parse("--no-shuffle").shuffle)
    assert.is_false(parse("--no_shuffle").shuffle)
    assert.is_true(parse("--no-shuffle", "--shuffle").shuffle)
  end)

  it("takes - for _ in names and leaves values alone", function()
    local opt = parse("--deepspeed-config", "a-b_c.json", "--n_layer", "6")
    assert.equal("a-b_c.json", opt.deepspeed_config)
    assert.equal(6, opt.n_layer)
  end)

  it("takes negative numbers", function()
    assert.equal(-3e-4, parse("--lr", "-3e-4").lr)
    assert.equal(-0.5, parse("--lr", "-.5").lr)
    assert.equal(-1, parse("--lr=-1").lr)
  end)

  it("says what is wrong and ends with 2", function()
    for options, expected in pairs {
      ["--data x --batch_size abc"] = "--batch_size: 'abc' is not a number",
      ["--data x --batch_size nan"] = "--batch_size: 'nan' is not a number",
      ["--data x --zeta 2.5"] = "--zeta: '2.5' is not an integer",
      ["--data x --dtype fp23"] = "--dtype: 'fp23' is not one of fp32, bf16 (did you mean \"fp32\"",
      ["--data x --bath_size 3"] = "unknown option '--bath_size'\nDid you mean '--batch_size'?",
      ["--data x y"] = "too many arguments",
      ["--data"] = "option '--data' requires an argument",
      [""] = "--data is missing (text file)",
    } do
      local output, code = run(whole, options)
      assert.is_truthy(output:find(expected, 1, true), options .. ": " .. output)
      assert.equal("2", code)
    end
  end)

  it("runs the script with the command line's options", function()
    local output, code = run(whole, "--data x.txt --zeta 3")
    assert.equal("x.txt\t3\n", output)
    assert.equal("0", code)
  end)

  it("prints help in the order of the table and ends with 0", function()
    local output, code = run(whole, "--help")
    assert.equal("0", code)
    assert.matches("Train a character GPT", output)
    local last = 0
    for _, name in ipairs { "--zeta <integer>", "--batch_size <number>", "--alpha", "--no-shuffle",
      "--dtype {fp32,bf16}", "--data <string>", "--deepspeed_config" } do
      local at = output:find("\n *" .. name:gsub("%-", "%%-"), last + 1)
      assert.is_truthy(at, name .. " in\n" .. output)
      last = at
    end
    assert.matches("optimizer steps %(default 2000%)", output)
    assert.matches("text file %(required%)", output)
  end)

  it("refuses tables that describe no options, at the user's line", function()
    for expected, bad in pairs {
      ["entry 1: expected { name, default, help }"] = { "x", "lr" },
      ["option lr: unknown field 'choises'"] = { "x", { "lr", 1, "rate", choises = {} } },
      ["option f: a function can't be an option"] = { "x", { "f", print } },
      ["option n: the default \"1\" is not a number"] = { "x", { "n", "1", type = "number" } },
      ["option a_b is there twice"] = { "x", { "a-b", 1 }, { "a_b", 1 } },
      ['expected { "what the script does"'] = { { "lr", 1 } },
    } do
      local ok, message = pcall(cli.parse, bad, {})
      assert.is_false(ok)
      assert.is_truthy(message:find(expected, 1, true), message)
      assert.matches("cli_spec.lua:%d+: ", message)
    end
  end)
end)

describe("ds.add_config_arguments", function()
  it("adds DeepSpeed's options to an argparse parser", function()
    for _, name in ipairs { "--deepspeed_config", "--deepspeed-config" } do
      local parser = argparse "train"
      parser:option "--lr":convert(tonumber)
      assert.equal(parser, cli.add_config_arguments(parser))
      assert.same({ lr = 0.1, deepspeed = true, deepspeed_config = "ds.json" },
        parser:parse { "--deepspeed", name, "ds.json", "--lr", "0.1" })
    end
    assert.is_false(pcall(cli.add_config_arguments, {}))
  end)
end)
