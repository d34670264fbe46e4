-- Which of cuBLASLt's algorithms makes a product: timed once, kept in a file and in checkpoints.

local ffi = require "ffi"

local ds = require "ds"
local border = require "ds.ffi"
local helper = require "tests.cuda.helper"

--- Runs a script in a process of its own. DS_TUNE= is as if it was not set, which the helper is
-- against.
-- @treturn number exit code; @treturn string what it prints
local function process(environment, text)
  local script, out = os.tmpname(), os.tmpname()
  local f = io.open(script, "w")
  f:write(text)
  f:close()
  local code = os.execute(("env -u XDG_CACHE_HOME %s %s %s >%s"):format(environment,
    helper.program(), script, out))
  f = io.open(out)
  local said = f:read "*a"
  f:close()
  os.remove(script)
  os.remove(out)
  return code, said
end

local function contents(path)
  local f = io.open(path)
  local text = f and f:read "*a"
  if f then f:close() end
  return text
end

local function write(path, text)
  local f = io.open(path, "w")
  f:write(text)
  f:close()
end

-- y += a b, and how many candidates were timed, what is to be kept, and the sum.
local adds = [[
local ds = require "ds"
local helper = require "tests.cuda.helper"
local border = require "ds.ffi"
local a, b = ds.ones(33, 24, { device = "cuda" }), ds.ones(24, 7, { device = "cuda" })
local y = ds.ones(33, 7, { device = "cuda" })
require("ds.tensor").run("matmul", "cuda", y._c, a._c, b._c, 1, 1)
local text = border.C.ds_device_choices(1)
print(tonumber(helper.products().timed), y:to("cpu"):tolist()[33][7])
io.write(require("ffi").string(text))
]]

describe("which algorithm makes a product", function()
  local folder

  before_each(function()
    folder = os.tmpname()
    os.remove(folder)
    os.execute("mkdir " .. folder)
  end)
  after_each(function() os.execute("chmod -R u+w " .. folder .. "; rm -r " .. folder) end)

  --- The key's line as another choice of candidate.
  local function other(line)
    return (line:gsub("%d+\n", function(n) return (tonumber(n) == 0 and 1 or 0) .. "\n" end))
  end

  it("is timed once, and kept in a file", function()
    local file = folder .. "/products"
    local code, said = process("DS_TUNE=" .. file, adds)
    assert.equal(0, code, said)
    -- added once, however often it was timed
    local timed, line = said:match "^(%d+)\t25\n(.*)$"
    assert.is_true(tonumber(timed) >= 2)
    assert.equal(line, contents(file))
    assert.matches("|7 33 24 ", line, 1, true)
    if helper.simulated then assert.matches(" 1\n$", line) end
    code, said = process("DS_TUNE=" .. file, adds)
    assert.equal(0, code)
    assert.equal("0\t25\n" .. line, said)
    assert.equal(line, contents(file))
    -- the first line of a key counts; what is damaged, or of another version, does not
    local version = line:gsub("|%d+|", "|1|")
    write(file, "nonsense\n" .. ("x"):rep(5000) .. "\n" .. version .. other(line) .. line
      .. line:sub(1, 40))
    code, said = process("DS_TUNE=" .. file, adds)
    assert.equal(0, code)
    assert.equal("0\t25\n" .. other(line), said)
  end)

  it("is kept in the user's cache, if not told otherwise", function()
    for _, case in ipairs { { "DS_TUNE= XDG_CACHE_HOME=%s/c HOME=/nowhere", "/c/dsrun/products" },
      { "DS_TUNE= HOME=%s", "/.cache/dsrun/products" },
      { "HOME=%s DS_TUNE=1", "/.cache/dsrun/products" },
      { "DS_TUNE= HOME=%s XDG_CACHE_HOME=c", "/.cache/dsrun/products" } } do
      os.remove(folder .. case[2])
      local code, said = process(case[1]:format(folder), adds)
      assert.equal(0, code, said)
      assert.not_matches("^0\t", said)
      assert.equal(said:match "\n(.*)$", contents(folder .. case[2]))
    end
  end)

  it("is the first candidate, untimed, where no file can be written", function()
    local function untimed(environment)
      local code, said = process(environment, adds)
      assert.equal(0, code, said)
      assert.matches("^0\t25\n.* 0\n$", said)
    end
    untimed("DS_TUNE=0 HOME=" .. folder)
    assert.is_nil(contents(folder .. "/.cache/dsrun/products"))
    untimed("DS_TUNE=" .. folder)
    untimed "-u HOME DS_TUNE="
    untimed "DS_TUNE= HOME=/proc/nowhere"
    untimed "DS_TUNE=/dev/full"
  end)

  -- Three steps from a checkpoint, or two that make one; what the products were made by.
  local trains = [[
local ds = require "ds"
local border = require "ds.ffi"
local helper = require "tests.cuda.helper"
local folder, loads, graph = %q, %s, %s
ds.seed(5)
local engine = ds.initialize { model = ds.on("cpu", function() return ds.nn.Linear(16, 8) end),
  config = { train_micro_batch_size_per_gpu = 8, steps_per_print = 0, device = "cuda",
    cuda_graph = graph, optimizer = { type = "SGD", params = { lr = 0.1 } } } }
local x = ds.randn({ 8, 16 }, { device = "cpu" }):keep()
local function step()
  local loss = engine(x):square():mean()
  engine:backward(loss)
  engine:step()
  return loss:item()
end
local function chosen() return require("ffi").string(border.C.ds_device_choices(1)) end
if loads then
  step()
  io.write(chosen(), "--\n")
  engine:load_checkpoint(folder)
  local plans = tonumber(helper.products().plans)
  step()
  io.write(chosen(), "--\n", tonumber(helper.products().plans) - plans, "\n")
else
  step()
  engine:save_checkpoint(folder, "it")
  io.write(chosen())
end
]]

  it("goes with a checkpoint, before all that is chosen elsewhere", function()
    local file, save = folder .. "/products", folder .. "/save"
    local code, made = process("DS_TUNE=" .. file, trains:format(save, "false", "false"))
    assert.equal(0, code, made)
    local keys = select(2, made:gsub("\n", ""))
    assert.is_true(keys >= 2)
    if helper.simulated then assert.not_matches(" 0\n", made) end
    assert.equal(made, contents(file))
    local state = contents(save .. "/it/state.json")
    assert.matches("\"products\"", state, 1, true)
    -- the other choices, in the file or because nothing is timed, are those before it is loaded
    write(folder .. "/other", other(made))
    for i, tune in ipairs { folder .. "/other", "0" } do
      local said
      code, said = process("DS_TUNE=" .. tune, trains:format(save, "true", "false"))
      assert.equal(0, code, said)
      local before, after, plans = said:match "^(.-)%-%-\n(.-)%-%-\n(%d+)\n"
      if i == 1 or helper.simulated then
        assert.equal(other(made), before)
        assert.equal(keys, tonumber(plans)) -- all of them anew
      end
      assert.equal(made, after)
    end
    -- nothing changes where the choices are the same
    local _, said = process("DS_TUNE=" .. file, trains:format(save, "true", "false"))
    assert.equal(made .. "--\n" .. made .. "--\n0\n", said)
  end)

  it("is not in a checkpoint of the CPU", function()
    local engine = ds.initialize { model = ds.nn.Linear(4, 2), config = { device = "cpu",
      train_micro_batch_size_per_gpu = 1, steps_per_print = 0 } }
    engine:save_checkpoint(folder, "it")
    assert.not_matches("products", contents(folder .. "/it/state.json"), 1, true)
  end)

  it("of another GPU or version is no choice here", function()
    local function choose(text) return border.C.ds_device_choose(1, text) end
    local a, b = ds.ones(5, 40, { device = "cuda" }), ds.ones(40, 9, { device = "cuda" })
    a:matmul(b)
    local text = ffi.string(border.C.ds_device_choices(1))
    local line = text:match "[^\n]*|9 5 40 [^\n]*\n"
    local before = tonumber(helper.products().plans)
    assert.equal(0, choose(text))
    assert.equal(0, choose(other(line):gsub("|%d+|", "|1|")))
    assert.equal(0, choose("x" .. other(line)))
    assert.equal(0, choose(other(line):gsub(" %d+\n", "\n")))
    assert.equal(0, choose "")
    a:matmul(b)
    assert.equal(before, tonumber(helper.products().plans))
    assert.equal(1, choose(other(line)))
    a:matmul(b)
    assert.equal(before + 1, tonumber(helper.products().plans))
    text = ffi.string(border.C.ds_device_choices(1))
    assert.equal(other(line), text:match "[^\n]*|9 5 40 [^\n]*\n")
  end)
end)
