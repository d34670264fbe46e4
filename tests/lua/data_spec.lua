--- Datasets, and the loader: every sample once an epoch, exact resume, shares of ranks.

local ds = require "ds"
local fails = require("tests.lua.helper").says
local ffi = require "ffi"

local folder

local function file(name, content)
  local path = folder .. "/" .. name
  local f = assert(io.open(path, "wb"))
  f:write(content)
  f:close()
  return path
end

--- The bytes of numbers as a C type.
local function bytes(ctype, numbers)
  local a = ffi.new(ctype .. "[?]", #numbers, numbers)
  return ffi.string(a, ffi.sizeof(a))
end

local function range(first, last)
  local t = {}
  for i = first, last do t[#t + 1] = i end
  return t
end

--- A file in llm.c's format.
local function shard(name, tokens)
  local head = ffi.new("int32_t[256]", 20240520, 1, #tokens)
  return file(name, ffi.string(head, 1024) .. bytes("uint16_t", tokens))
end

--- A dataset of n samples that are their own numbers, and counts calls.
local function counting(n)
  local d = { calls = 0 }
  function d.size() return n end
  function d:get(i)
    self.calls = self.calls + 1
    return i, { i, -i }
  end
  return d
end

--- The first value of every sample of a batch.
local function heads(batch)
  local t = batch:tolist()
  for i, row in ipairs(t) do t[i] = type(row) == "table" and row[1] or row end
  return t
end

local function sorted(t)
  local copy = { unpack(t) }
  table.sort(copy)
  return copy
end

local function extend(list, more)
  for _, v in ipairs(more) do list[#list + 1] = v end
  return list
end

setup(function()
  folder = os.tmpname()
  os.remove(folder)
  os.execute("mkdir " .. folder)
end)

teardown(function() os.execute("rm -r " .. folder) end)

describe("text", function()
  it("becomes windows of characters", function()
    local text = ds.data.text(file("a.txt", "hello wörld"), { length = 4 })
    assert.equal(9, text.vocab_size) -- space d e h l o r w ö
    assert.equal(7, text:size())     -- characters, not bytes: 11 - 4
    assert.equal("o wö", text:decode((text:get(5))))
    assert.equal(text.vocab_size - 1, text:encode("ö"):item())
    assert.is_truthy(tostring(text):find("7 windows of 4", 1, true))
  end)

  it("splits by position: overlapping windows to train on, others to validate", function()
    local all = ds.data.text(file("b.txt", ("abcdefghij"):rep(10)), { length = 5 })
    local train, val = all:split(0.7)
    assert.equal(70 - 5, train:size())
    assert.equal(5, val:size()) -- a sixth would take 31 tokens
    assert.equal(10, val.vocab_size)
    local x, y = train:get(2)
    assert.equal("bcdef", train:decode(x))
    assert.equal("cdefg", train:decode(y))
    assert.equal("i32", x.dtype)
    x, y = val:get(2)
    assert.equal("fghij", val:decode(x))
    assert.equal("ghija", val:decode(y))
    fails("there is no sample 6; the dataset has 5", val.get, val, 6)
    fails("there is no sample 0", val.get, val, 0)
    local first, second = train:split(0.5) -- a part splits again
    assert.equal(35, first.tokens)
    assert.equal("fghij", second:decode((second:get(1))))
    local strided = ds.data.text(folder .. "/b.txt", { length = 5, stride = 2 })
    assert.equal(48, strided:size())
    local _, part = strided:split(0.5)
    assert.equal(2, part.stride)
  end)

  it("encodes and decodes", function()
    local text = ds.data.text(file("c.txt", "héllo"), { length = 2 })
    local ids = text:encode("ohé")
    assert.same({ 2, 0, 3 }, ids:tolist()) -- h l o é
    assert.equal("ohé", text:decode(ids))
    assert.equal("oh", text:decode { 2, 0 })
    assert.equal("é", text:decode(3))
    assert.equal("hlhl", text:decode(ds.tensor({ { 0, 1 }, { 0, 1 } }, "i64")))
    assert.same({ 0 }, text:encode(""):size())
    assert.equal("", text:decode {})
    fails('"x" (U+0078) at byte 2 is none of the vocabulary\'s 4 characters',
      text.encode, text, "hx")
    fails("id 4 at position 1 is outside the vocabulary of 4", text.decode, text, { 4 })
    fails("decode: ids are whole numbers, not f32", text.decode, text, ds.ones(2))
    fails("encode: expects a string, not a number", text.encode, text, 5)
    local again = ds.data.vocabulary(text.vocabulary.characters)
    assert.equal("hloé", again.characters)
    assert.same(ids:tolist(), again:encode("ohé"):tolist())
    fails("has no characters", ds.data.vocabulary, "")
  end)

  it("takes any bytes at level byte", function()
    local raw = ds.data.text(file("d.bin", "a\0\255b"), { length = 2, level = "byte" })
    assert.equal(256, raw.vocab_size)
    assert.same({ 97, 0 }, (raw:get(1)):tolist())
    assert.equal("\0\255", raw:decode { 0, 255 })
    fails("byte 3 (0xff) is not UTF-8; level = \"byte\" takes any file",
      ds.data.text, folder .. "/d.bin")
  end)

  it("refuses what it cannot use", function()
    local path = file("short.txt", "abc")
    fails("short.txt: no window of length 3 fits: it takes 4 tokens, and the longest run has 3",
      ds.data.text, path, { length = 3 })
    fails("split: 0.4 of 3 tokens leave a part of 1, and a window of length 1 takes 2",
      function() ds.data.text(path, { length = 1 }):split(0.4) end)
    fails("cannot open " .. folder .. "/none.txt", ds.data.text, folder .. "/none.txt")
    fails("text: unknown option 'lenght'; there are length, level, stride",
      ds.data.text, path, { lenght = 3 })
    fails("unknown level 'word'", ds.data.text, path, { level = "word" })
    fails("length must be a whole number of at least 1, not 0", ds.data.text, path, { length = 0 })
    fails("stride must be a whole number of at least 1, not 1.5",
      ds.data.text, path, { length = 1, stride = 1.5 })
    fails("text: expects a file's path, not a nil", ds.data.text)
    local text = ds.data.text(path, { length = 1 })
    for _, bad in ipairs { 0, 1, "half" } do fails("between 0 and 1", text.split, text, bad) end
  end)
end)

describe("token files", function()
  it("are one stream of windows that do not cross files", function()
    shard("t_1.bin", range(0, 9))
    shard("t_2.bin", range(100, 106))
    local tokens = ds.data.tokens(folder .. "/t_*.bin", { length = 3 })
    assert.equal(3 + 2, tokens:size()) -- every token once: stride is length
    assert.same({ 6, 7, 8 }, (tokens:get(3)):tolist())
    assert.same({ 100, 101, 102 }, (tokens:get(4)):tolist())
    assert.same({ 104, 105, 106 }, (select(2, tokens:get(5))):tolist())
    local reversed = ds.data.tokens({ folder .. "/t_2.bin", folder .. "/t_1.bin" },
      { length = 3, stride = 1 })
    assert.equal(4 + 7, reversed:size())
    assert.same({ 100, 101, 102 }, (reversed:get(1)):tolist())
    local train, val = tokens:split(0.5)
    assert.equal(8, train.tokens)
    assert.same({ 100, 101, 102 }, (val:get(1)):tolist()) -- 8, 9 are too few for a window
    fails("token files have no vocabulary", tokens.decode, tokens, { 1 })
  end)

  it("may be raw, with a dtype", function()
    local path = file("raw16.bin", bytes("uint16_t", { 1, 2, 65535, 4 }))
    local tokens = ds.data.tokens(path, { length = 3, dtype = "uint16" })
    assert.same({ 1, 2, 65535 }, (tokens:get(1)):tolist())
    path = file("raw32.bin", bytes("int32_t", { 1, 70000, 3 }))
    tokens = ds.data.tokens(path, { length = 2, dtype = "int32" })
    assert.same({ 1, 70000 }, (tokens:get(1)):tolist())
    fails("for raw tokens say dtype", ds.data.tokens, path, { length = 2 })
    fails("unknown dtype 'int8'", ds.data.tokens, path, { length = 2, dtype = "int8" })
  end)

  it("are refused by name when they are wrong", function()
    fails("odd.bin: 3 bytes are no whole number of 2-byte tokens", ds.data.tokens,
      file("odd.bin", "abc"), { length = 1, dtype = "uint16" })
    local head = ffi.string(ffi.new("int32_t[256]", 20240520, 1, 5), 1024)
    fails("cut.bin: its header counts 5 tokens, which is 1034 bytes with the header; the file has "
      .. "1028", ds.data.tokens, file("cut.bin", head .. "abcd"), { length = 1 })
    head = ffi.string(ffi.new("int32_t[256]", 20240520, 3, 2), 1024)
    fails("version.bin: token file of version 3, not 1", ds.data.tokens,
      file("version.bin", head .. "abcd"), { length = 1 })
    fails("no file matches", ds.data.tokens, folder .. "/nothing*.bin", { length = 1 })
    fails("tokens: length must be a whole number of at least 1, not nil",
      ds.data.tokens, folder .. "/t_1.bin", {})
    fails("empty table", ds.data.tokens, {}, { length = 1 })
    fails("path 2 is a number", ds.data.tokens, { "a", 5 }, { length = 1 })
  end)

  it("name a token outside the vocabulary, in every way of reading", function()
    local path = shard("vocab.bin", { 1, 2, 3, 999, 5 })
    local tokens = ds.data.tokens(path, { length = 1, vocab_size = 10 })
    tokens:get(1)
    fails("vocab.bin: token 999 at position 4 is outside the vocabulary of 10",
      tokens.get, tokens, 3)
    for _, prefetch in ipairs { 0, 3 } do
      local loader = ds.data.loader(tokens, { shuffle = false, prefetch = prefetch })
      loader:next()
      loader:next()
      fails("token 999 at position 4", loader.next, loader)
      fails("token 999 at position 4", loader.next, loader) -- no batch was given out: it stays
    end
  end)
end)

describe("tensors and lists", function()
  it("are datasets over the first dimension", function()
    local x, y = ds.tensor { { 1, 2 }, { 3, 4 }, { 5, 6 } }, ds.tensor({ 7, 8, 9 }, "i64")
    local d = ds.data.tensors(x, y)
    assert.equal(3, d:size())
    local a, b = d:get(2)
    assert.same({ 3, 4 }, a:tolist())
    assert.equal(8, b:item())
    local loader = ds.data.loader(d, { batch_size = 2, shuffle = false })
    a, b = loader:next()
    assert.same({ { 1, 2 }, { 3, 4 } }, a:tolist())
    assert.same({ 7, 8 }, b:tolist())
    assert.equal("i64", b.dtype)
    a = loader:next()
    assert.same({ { 5, 6 } }, a:tolist())
    fails("tensor 1 is [3 x 2] and tensor 2 [2]; the first dimensions must be equal",
      ds.data.tensors, x, ds.ones(2))
    fails("tensor 1 is a scalar", ds.data.tensors, ds.tensor(1))
    fails("at least one tensor", ds.data.tensors)
  end)

  it("collate like any other", function()
    local d = ds.data.list { { ds.ones(2), { 1, 2 } }, { ds.zeros(2), { 3, 4 } } }
    fails("one pass is `for x, y in loader:epoch() do`", ds.data.loader(d, { batch_size = 2 }))
    local x, y = ds.data.loader(d, { batch_size = 2, shuffle = false }):next()
    assert.same({ { 1, 1 }, { 0, 0 } }, x:tolist())
    assert.same({ { 1, 2 }, { 3, 4 } }, y:tolist())
    x = ds.data.loader(ds.data.list { 5, 6, 7 }, { batch_size = 3, shuffle = false }):next()
    assert.same({ 5, 6, 7 }, x:tolist())
  end)
end)

describe("collation", function()
  local function batch_of(...)
    local samples = { ... }
    return ds.data.loader({ size = function() return #samples end,
      get = function(_, i) return unpack(samples[i], 1, samples[i].n or #samples[i]) end },
      { batch_size = #samples, shuffle = false }):next()
  end

  it("stacks numbers, booleans, tensors, and tables, place by place", function()
    local a, b, c, d, e = batch_of(
      { 1, true, ds.tensor({ 1, 2 }, "i64"), { { 1 }, { 2 } }, ds.tensor(5) },
      { 2.5, false, ds.tensor({ 3, 4 }, "i64"), { { 3 }, { 4 } }, ds.tensor(6) })
    assert.same({ 1, 2.5 }, a:tolist())
    assert.equal("f32", a.dtype)
    assert.same({ true, false }, b:tolist())
    assert.equal("i64", c.dtype)
    assert.same({ { 1, 2 }, { 3, 4 } }, c:tolist())
    assert.equal("f32", d.dtype)
    assert.same({ 2, 2, 1 }, d:size())
    assert.same({ 5, 6 }, e:tolist())
  end)

  it("says which samples do not fit", function()
    fails("value 1 of sample 1 is f32 [2], of sample 2 f32 [3]: they do not stack; give the loader "
      .. "a collate_fn", batch_of, { ds.ones(2) }, { ds.ones(3) })
    fails("value 2 of sample 1 is f32 [2], of sample 3 i64 [2]", batch_of,
      { 1, ds.ones(2) }, { 1, ds.ones(2) }, { 1, ds.tensor({ 1, 2 }, "i64") })
    fails("value 1 of sample 1 is f32 [2], of sample 2 f32 [1]", batch_of, { { 1, 2 } }, { { 1 } })
    fails("value 1 of sample 1 is a number, of sample 2 a tensor", batch_of, { 1 }, { ds.ones(1) })
    fails("sample 1 has 2 values, sample 2 has 1", batch_of, { 1, 2 }, { 1 })
    fails("value 1 of sample 1 is a string", batch_of, { "a" }, { "b" })
    fails("get(1) returned nothing", batch_of, {}, { 1 })
    fails("value 2 of sample 1 is a nil", batch_of, { 1, nil, n = 2 }, { 1, 2 })
  end)

  it("is the user's with collate_fn", function()
    local got
    local options = { batch_size = 2, shuffle = false, collate_fn = function(list)
      got = list
      return #list, "anything"
    end }
    local n, word = ds.data.loader(counting(3), options):next()
    assert.equal(2, n)
    assert.equal("anything", word)
    assert.same({ { 1, { 1, -1 }, n = 2 }, { 2, { 2, -2 }, n = 2 } }, got)
    ds.data.loader(ds.data.list { 4, 5 }, options):next()
    assert.same({ 4, 5 }, got)
    local text = ds.data.text(file("e.txt", "abcdefgh"), { length = 2 })
    ds.data.loader(text, options):next() -- of a text as well
    assert.equal("bc", text:decode(got[2][1]))
    options.collate_fn = function() end
    fails("collate_fn returned nothing", function() ds.data.loader(text, options):next() end)
  end)

  it("names the sample whose get fails, and can try again", function()
    local d, broken = counting(5), true
    local get = d.get
    function d:get(i)
      if i == 4 and broken then error("no such image") end
      return get(self, i)
    end
    local loader = ds.data.loader(d, { batch_size = 3, shuffle = false })
    loader:next()
    local ok, message = pcall(loader.next, loader)
    assert.is_false(ok)
    assert.is_truthy(message:find("^sample 4: .*data_spec.lua:%d+: no such image"))
    broken = false
    assert.same({ 4, 5 }, (loader:next()):tolist())
    local oops = {}
    function d.get() error(oops) end
    ok, message = pcall(loader.next, loader)
    assert.is_false(ok)
    assert.equal(oops, message)
  end)

  it("is left out where a dataset makes its own batches", function()
    local d = counting(4)
    function d.batch(_, positions) return ds.tensor(positions, "i64"), "more" end
    local x, word = ds.data.loader(d, { batch_size = 3, shuffle = false }):next()
    assert.same({ 1, 2, 3 }, x:tolist())
    assert.equal("more", word)
    assert.equal(0, d.calls)
  end)
end)

describe("the loader", function()
  it("hands out every sample once an epoch, in a new order each time", function()
    local loader = ds.data.loader(counting(50), { batch_size = 8, seed = 3 })
    assert.equal(7, loader:len())
    local epochs = {}
    for e = 1, 3 do
      epochs[e] = {}
      local sizes = {}
      for a, b in loader:epoch() do
        extend(epochs[e], a:tolist())
        sizes[#sizes + 1] = a:size(1)
        assert.same({ a:size(1), 2 }, b:size())
      end
      assert.same({ 8, 8, 8, 8, 8, 8, 2 }, sizes)
      assert.same(range(1, 50), sorted(epochs[e]))
    end
    assert.is_not.same(epochs[1], epochs[2])
    assert.is_not.same(epochs[2], epochs[3])
    assert.is_not.same(range(1, 50), epochs[1])
    local same = ds.data.loader(counting(50), { batch_size = 50, seed = 3 })
    assert.same(epochs[1], heads(same:next()))
    local other = ds.data.loader(counting(50), { batch_size = 50, seed = 4 })
    assert.is_not.same(epochs[1], heads(other:next()))
    local negative = ds.data.loader(counting(50), { batch_size = 50, seed = -1 })
    assert.same(range(1, 50), sorted(heads(negative:next())))
  end)

  it("wraps with next and forever, with and without the last batch", function()
    local sizes = {}
    for a in ds.data.loader(counting(5), { batch_size = 2 }):forever() do
      sizes[#sizes + 1] = a:size(1)
      if #sizes == 6 then break end
    end
    assert.same({ 2, 2, 1, 2, 2, 1 }, sizes)
    local loader = ds.data.loader(counting(5),
      { batch_size = 2, drop_last = true, shuffle = false })
    assert.equal(2, loader:len())
    local seen = {}
    for _ = 1, 4 do extend(seen, heads(loader:next())) end
    assert.same({ 1, 2, 3, 4, 1, 2, 3, 4 }, seen)
    local small = ds.data.loader(counting(3), { batch_size = 8, shuffle = false })
    assert.same({ 1, 2, 3 }, heads(small:next()))
    assert.same({ 1, 2, 3 }, heads(small:next()))
  end)

  it("goes on with a broken epoch, and seeks", function()
    local loader = ds.data.loader(counting(10), { batch_size = 3, shuffle = false })
    for a in loader:epoch() do
      if heads(a)[1] == 4 then break end
    end
    assert.equal(6, loader:position())
    local rest = {}
    for a in loader:epoch() do extend(rest, heads(a)) end
    assert.same({ 7, 8, 9, 10 }, rest)
    assert.equal(10, loader:position())
    assert.equal(1, loader:state().epoch)
    assert.same({ 5, 6, 7 }, heads(loader:seek(24):next()))
    assert.same({ 1, 2, 3 }, heads(loader:seek(0):next()))
    local dropping = ds.data.loader(counting(10),
      { batch_size = 3, shuffle = false, drop_last = true })
    assert.same({ 4, 5, 6 }, heads(dropping:seek(9 + 3):next()))
    fails("seek: expects how many samples", loader.seek, loader, -1)
    fails("seek: expects how many samples", loader.seek, loader, 0.5)
  end)

  it("gives batches as tables with their sample counts", function()
    local total = 0
    for batch in ds.data.loader(counting(5), { batch_size = 2, shuffle = false }):batches() do
      assert.equal(2, batch.n)
      assert.equal(batch.samples, batch[1]:size(1))
      total = total + batch.samples
    end
    assert.equal(5, total)
  end)

  it("refuses what it cannot do", function()
    local d = counting(5)
    local loader = ds.data.loader
    fails("unknown option 'batchsize'; there are batch_size, shuffle, seed",
      loader, d, { batchsize = 2 })
    fails("batch_size must be a whole number of at least 1, not 0", loader, d, { batch_size = 0 })
    fails("rank must be from 0 to 1, not 2", loader, d, { rank = 2, world_size = 2 })
    fails("seed must be a whole number, not x", loader, d, { seed = "x" })
    fails("shuffle must be true or false, not 1", loader, d, { shuffle = 1 })
    fails("collate_fn must be a function, not a boolean", loader, d, { collate_fn = true })
    fails("prefetch works for text and token files", loader, d, { prefetch = 2 })
    fails("options must be a table, not a number", loader, d, 5)
    fails("the dataset is empty", loader, counting(0))
    fails("the dataset has 5 samples, fewer than one batch of 8 (batch_size 4 x 2 ranks), and "
      .. "drop_last", loader, d, { batch_size = 4, world_size = 2, drop_last = true })
    fails("use ds.data.tensors(x, y)", loader, ds.ones(3))
    fails("an object with size() and get(i), not a number", loader, 3)
    fails("the dataset has no method size(); use ds.data.list(t) for a plain list",
      loader, { 1, 2, 3 })
    fails("the dataset has no method get()", loader, { size = function() return 3 end })
    fails("size() must return a whole number, not nil",
      loader, { size = function() end, get = d.get })
  end)

  it("can be printed", function()
    assert.equal("loader: 5 samples in 2 batches of 2 on each of 2 ranks",
      tostring(ds.data.loader(counting(5), { batch_size = 2, world_size = 2 })))
  end)
end)

describe("ranks", function()
  local function loaders(n, ranks, options)
    local list = {}
    for rank = 0, ranks - 1 do
      local o = { rank = rank, world_size = ranks }
      for k, v in pairs(options) do o[k] = v end
      list[rank + 1] = ds.data.loader(counting(n), o)
    end
    return list
  end

  it("take contiguous slices of the batches that one rank would have", function()
    local one = ds.data.loader(counting(48), { batch_size = 12, seed = 9 })
    local three = loaders(48, 3, { batch_size = 4, seed = 9 })
    for _ = 1, 9 do
      local expected, got = heads(one:next()), {}
      for _, loader in ipairs(three) do extend(got, heads(loader:next())) end
      assert.same(expected, got)
    end
  end)

  it("share an epoch's last batch exactly, with as many batches each", function()
    for n = 1, 26 do
      for ranks = 1, 4 do
        local seen, batches = {}, {}
        for r, loader in ipairs(loaders(n, ranks, { batch_size = 2, seed = n })) do
          batches[r] = 0
          for a in loader:epoch() do
            batches[r] = batches[r] + 1
            local list = heads(a)
            assert.is_true(#list >= 1)
            assert.is_true(loader.count == #list or loader.count == 0 and #list == 1)
            for i = 1, loader.count do seen[#seen + 1] = list[i] end
          end
          assert.equal(loader:len(), batches[r])
          assert.equal(batches[1], batches[r])
        end
        assert.same(range(1, n), sorted(seen))
      end
    end
  end)

  it("are filled up evenly in training", function()
    local three = loaders(10, 3, { batch_size = 2, shuffle = false })
    local first, second, counts = {}, {}, {}
    for r, loader in ipairs(three) do
      first[r] = heads(loader:next())
      second[r] = heads(loader:next())
      counts[r] = loader.count
      assert.same({ 1, 2 }, r == 1 and heads(loader:next()) or { 1, 2 })
    end
    assert.same({ { 1, 2 }, { 3, 4 }, { 5, 6 } }, first)
    assert.same({ { 7, 8 }, { 9, 10 }, { 1, 2 } }, second)
    assert.same({ 2, 2, 0 }, counts)
  end)

  it("go on with exactly the samples not yet seen when there are more or fewer of them", function()
    for _, drop_last in ipairs { true, false } do
      for batches = 1, 4 do
        local seen = {}
        local state
        local options = { batch_size = 4, seed = 5, drop_last = drop_last }
        for _, loader in ipairs(loaders(60, 3, options)) do
          for _ = 1, batches do extend(seen, heads(loader:next())) end
          state = loader:state()
        end
        for _, loader in ipairs(loaders(60, 2, { batch_size = 3, drop_last = drop_last })) do
          loader:load_state(state)
          for a in loader:epoch() do extend(seen, heads(a)) end
        end
        assert.same(range(1, 60), sorted(seen))
      end
    end
  end)
end)

describe("resuming", function()
  --- The next n batches as strings.
  local function take(loader, n)
    local list = {}
    for i = 1, n do
      local x, y = loader:next()
      list[i] = table.concat(heads(x), ",") .. "|" .. table.concat(heads(y), ",")
    end
    return list
  end

  local makers = {
    ["a Lua dataset"] = function() return counting(23) end,
    ["tensors"] = function()
      return ds.data.tensors(ds.arange(23), ds.arange(23))
    end,
    ["a text"] = function()
      return ds.data.text(file("r.txt", "abcdefghijklmnopqrstuvwxyz"), { length = 3 })
    end,
    ["token files"] = function()
      shard("r1.bin", range(0, 40))
      shard("r2.bin", range(100, 130))
      return ds.data.tokens({ folder .. "/r1.bin", folder .. "/r2.bin" }, { length = 3 })
    end,
  }

  for _, name in ipairs { "a Lua dataset", "tensors", "a text", "token files" } do
    it("from every position is bit for bit the uninterrupted run: " .. name, function()
      local dataset = makers[name]()
      local native = dataset._feed ~= nil
      for _, prefetch in ipairs(native and { 0, 1, 3 } or { 0 }) do
        for _, drop_last in ipairs { false, true } do
          local function make(seed)
            return ds.data.loader(dataset, { batch_size = 4, seed = seed, drop_last = drop_last,
              rank = 1, world_size = 2, prefetch = prefetch })
          end
          local whole = make(11)
          local states, all = {}, {}
          for i = 1, 14 do
            states[i] = whole:state()
            all[i] = take(whole, 1)[1]
          end
          local again = make(99) -- the seed comes with the state
          for i = 14, 1, -1 do
            local fresh = i % 5 == 0 and make(7) or again
            fresh:load_state(states[i])
            local n = math.min(4, 15 - i)
            assert.same({ unpack(all, i, i + n - 1) }, take(fresh, n))
          end
          for i = 1, 14 do -- the same by counting samples
            local position = again:load_state(states[i]):position()
            again:seek(0)
            assert.same({ all[1] }, take(again, 1))
            assert.same({ all[i] }, take(again:seek(position), 1))
          end
        end
      end
    end)
  end

  it("keeps its state plain", function()
    local loader = ds.data.loader(counting(10), { batch_size = 4, seed = 2 })
    loader:next()
    assert.same({ seed = 2, epoch = 0, offset = 4, size = 10, shuffle = true }, loader:state())
    loader:next()
    loader:next()
    assert.same({ seed = 2, epoch = 1, offset = 0, size = 10, shuffle = true }, loader:state())
  end)

  it("refuses a state of something else", function()
    local loader = ds.data.loader(counting(10), { batch_size = 4, seed = 2 })
    local function with(key, value)
      local s = loader:state()
      s[key] = value
      return s
    end
    fails("the dataset has 10 samples, the saved position is in one of 11",
      loader.load_state, loader, with("size", 11))
    fails("epoch must be a whole number, not -1", loader.load_state, loader, with("epoch", -1))
    fails("offset 11 lies beyond the dataset's 10 samples",
      loader.load_state, loader, with("offset", 11))
    fails("seed must be a whole number, not 1.5", loader.load_state, loader, with("seed", 1.5))
    fails("a loader with shuffle = false, this one has true",
      loader.load_state, loader, with("shuffle", false))
    fails("expects the table that loader:state() made, not a nil", loader.load_state, loader)
  end)

  it("changes between next and epoch with the thread on", function()
    local text = makers["a text"]()
    local function run(prefetch)
      local loader = ds.data.loader(text,
        { batch_size = 2, seed = 1, prefetch = prefetch, world_size = 3, rank = 2 })
      local got = take(loader, 2)
      for x in loader:epoch() do extend(got, { text:decode(x), loader.count }) end
      extend(got, take(loader, 5))
      return got
    end
    assert.same(run(0), run(4))
  end)
end)

describe("paths", function()
  it("are looked for from the current folder, then from the script's", function()
    file("beside.txt", "abcabc")
    shard("beside.bin", range(0, 9))
    local script = file("beside.lua", [[
      local ds = require "ds"
      io.write(ds.data.text("beside.txt", { length = 2 }):size(), " ",
        ds.data.tokens("besi*.bin", { length = 2 }):size(), "\n")
      print(pcall(ds.data.text, "nowhere.txt"))
    ]])
    local host = require "ds.host"
    local program = host.program:find("^/") and host.program or host.folder .. "/" .. host.program
    local pipe = io.popen(("cd / && %s %s"):format(program, script))
    assert.equal("4 4", pipe:read())
    assert.is_truthy(pipe:read():find("beside.lua:%d+: cannot open nowhere.txt"))
    pipe:close()
  end)
end)

describe("memory", function()
  it("does not grow with the batches", function()
    local text = ds.data.text(file("m.txt", ("abcdefghij"):rep(1000)), { length = 64 })
    for _, prefetch in ipairs { 0, 4 } do
      local loader = ds.data.loader(text, { batch_size = 32, prefetch = prefetch })
      local function live()
        collectgarbage()
        collectgarbage()
        return ds.memory().live
      end
      loader:next()
      local before = live()
      for _ = 1, 200 do loader:next() end
      assert.is_true(live() - before < 64 * 32 * 4 * 4)
    end
  end)
end)
