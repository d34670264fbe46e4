--- JSON: values both ways, lines, and what is refused.

local json = require "ds.json"

local function decode(text)
  local value, message = json.decode(text, "x.json")
  assert(value ~= nil, message)
  return value
end

local function message_of(f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  return message
end

describe("json.decode", function()
  it("gives tables, marked arrays and null", function()
    local v = decode '{"a": [1, [], {}], "b": null, "s": "x\\ny", "t": true, "f": false}'
    assert.same(1, v.a[1])
    assert.is_true(json.is_array(v.a))
    assert.is_true(json.is_array(v.a[2]))
    assert.is_false(json.is_array(v.a[3]))
    assert.equal(json.null, v.b)
    assert.equal("x\ny", v.s)
    assert.is_true(v.t)
    assert.is_false(v.f)
  end)

  it("takes comments and trailing commas, not inside strings", function()
    assert.same({ a = "// no # comment /* */", b = 2 }, decode [[
      # a comment
      { "a": "// no # comment /* */", // another
        /* and "b": 1, */ "b": 2, }
    ]])
  end)

  it("knows the line of every key", function()
    local v, lines = json.decode('{\n"a": 1,\n"o": {\n"b": [2,\n3]}}', "x.json", { lines = true })
    assert.equal(1, lines.root)
    assert.equal(2, lines[v].a)
    assert.equal(4, lines[v.o].b)
    assert.equal(5, lines[v.o.b][2])
  end)

  it("returns nil and file:line for bad text", function()
    for text, expected in pairs {
      ['{"a":1,\n"a":2}'] = 'x.json:2: duplicate key "a"',
      [""] = "x.json:1: the file is empty",
      ["[1,\n\0]"] = "x.json:2: NUL byte at offset 4; this is not a text file",
    } do
      local value, message = json.decode(text, "x.json")
      assert.is_nil(value)
      assert.equal(expected, message)
    end
  end)
end)

describe("json.load", function()
  it("returns nil and a message with the path for what can't be read", function()
    local value, message = json.load "/nowhere/x.json"
    assert.is_nil(value)
    assert.equal("/nowhere/x.json: No such file or directory", message)
    value, message = json.load "/"
    assert.is_nil(value)
    assert.equal("/: Is a directory", message)
  end)

  it("stops at a file without end", function()
    local value, message = json.load "/dev/zero"
    assert.is_nil(value)
    assert.matches("^/dev/zero: more than 256 MiB", message)
  end)
end)

describe("json.encode", function()
  it("sorts keys and indents", function()
    local value = { b = { 1, 2, { x = true } }, a = {}, z = json.array {}, n = json.null }
    assert.equal('{"a":{},"b":[1,2,{"x":true}],"n":null,"z":[]}', json.encode(value))
    assert.equal([[
{
  "a": {},
  "b": [
    1,
    2,
    {
      "x": true
    }
  ],
  "n": null,
  "z": []
}]], json.encode(value, { indent = 2 }))
    assert.equal("[1, 2]", json.encode({ 1, 2 }, { indent = 2 }))
  end)

  it("keeps every number bit for bit", function()
    local numbers = { 0, -0.0, 1, -1, 0.1, 1 / 3, 2 ^ 53, -2 ^ 53, 2 ^ 60, 1e22, 1e300, 5e-324,
      2.2250738585072014e-308, 1.7976931348623157e308, 123456789.125, 3e-4 }
    local seed = 1
    for _ = 1, 500 do
      seed = (seed * 16807) % 2147483647
      numbers[#numbers + 1] = (seed / 2147483647 - 0.5) * 10 ^ (seed % 600 - 300)
    end
    local back = decode(json.encode(numbers))
    for i, x in ipairs(numbers) do
      assert.equal(x, back[i])
      assert.equal(1 / x, 1 / back[i]) -- the sign of zero
    end
    assert.equal("[0.1,100,1e+22,0.0003]", json.encode { 0.1, 100, 1e22, 3e-4 })
  end)

  it("keeps strings, control characters and all", function()
    local text = 'q"\\/\b\f\n\r\t\0\1\127 grüße 日本 😀'
    assert.equal(text, decode(json.encode(text)))
    assert.equal('"\\u0001\\n"', json.encode "\1\n")
  end)

  it("refuses what JSON can't hold, naming the path at the user's line", function()
    local loop = {}
    loop.again = { loop }
    local deep = {}
    for _ = 1, 300 do deep = { deep } end
    for _, case in ipairs {
      { { a = { 0 / 0 } }, "state.a[1]: nan can't be written as JSON" },
      { { a = -math.huge }, "state.a: -inf can't be written as JSON" },
      { { a = print }, "state.a: a function can't be written as JSON" },
      { { a = 5LL }, "state.a: a cdata can't be written as JSON" },
      { { 1, nil, 3 }, "state: an array with holes, or with keys other than 1 to 2" },
      { { [1.5] = 1 }, "state: an array with holes" },
      { { 1, x = 2 }, 'state: mixed keys, both strings ("x") and numbers' },
      { { [true] = 1 }, "state: a key is a boolean" },
      { { s = "\xff" }, "state.s: a string of 1 bytes that is not UTF-8" },
      { { ["\xff"] = 1 }, "a string of 1 bytes that is not UTF-8" },
      { { ["a\0"] = 1 }, "has a NUL byte" },
      { loop, "state.again[1]: contains itself (at state)" },
      { deep, "nested deeper than 256 levels" },
      { json.array { x = 1 }, 'state: marked as an array but has the key "x"' },
    } do
      local message = message_of(json.encode, case[1], { name = "state" })
      assert.is_truthy(message:find(case[2], 1, true), message)
    end
    local here = debug.getinfo(1, "l").currentline + 1
    local message = message_of(function() json.encode { 0 / 0 } end)
    assert.is_truthy(message:find("json_spec.lua:" .. here .. ": value[1]: nan", 1, true), message)
  end)

  it("writes a table twice when it is there twice", function()
    local shared = { 1 }
    assert.equal('{"a":[1],"b":[1]}', json.encode { a = shared, b = shared })
  end)
end)
