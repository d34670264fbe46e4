--- Checkpoints: what is saved comes back, and nothing that is not whole.

local ffi = require "ffi"
local ds = require "ds"
local border = require "ds.ffi"
local ckpt = require "ds.ckpt"
local host = require "ds.host"
local json = require "ds.json"
local disk = require "tests.lua.disk"
local helper = require "tests.lua.helper"

local C = border.C

-- Small files that are fsynced often: in memory where there is a place for that.
local base, dir

local function make_base()
  local name = ffi.new("char[4096]")
  for _, root in ipairs { "/dev/shm", os.getenv "TMPDIR" or "/tmp" } do
    if C.ds_path_kind(root) == C.DS_PATH_FOLDER and C.ds_temporary_name(name, 4096, root) == 0
      and C.ds_folder_make(name) == 0 then
      return ffi.string(name)
    end
  end
  error("no folder for temporary files")
end

local read_file, write_file, says = helper.read, helper.write, helper.says

local function exists(path) return C.ds_path_kind(path) ~= C.DS_PATH_NONE end

--- A checkpoint whose every value says which step it is of.
local function content(step, extra)
  return {
    weights = { { "wte", ds.full({ 3, 4 }, step) },
      { "norm.bias", ds.full({ 5 }, step % 100, { dtype = "bf16" }) } },
    optim = { { "exp_avg/wte", ds.full({ 3, 4 }, -step) } },
    state = { global_steps = step, rng = { seed = 1, offset = step } },
    client_state = extra or { note = "step " .. step },
  }
end

local function save(step, tag, options)
  return ckpt.save(dir, tag or "s" .. step, content(step), options)
end

--- The step of the checkpoint that a load finds; all of it must be of that step.
local function step_found(folder, tag)
  local saved = ckpt.load(folder, tag)
  if not saved then return nil end
  local step = saved.state.global_steps
  local function all(part, name, t, value)
    for _, v in ipairs(saved:read(part, name, t):reshape(-1):tolist()) do assert.equal(value, v) end
  end
  all("weights", "wte", ds.zeros(3, 4), step)
  all("weights", "norm.bias", ds.zeros(5), step % 100) -- bf16 counts to 256
  all("optim", "exp_avg/wte", ds.zeros(3, 4), -step)
  assert.equal(step, saved.state.rng.offset)
  assert.equal("step " .. step, saved.client_state.note)
  saved:close()
  return step
end

local function no_leftovers()
  for _, name in ipairs(disk.names_in(dir)) do assert.is_nil(name:match "^%.", name) end
end

before_each(function()
  base = make_base()
  dir = base .. "/ckpt"
end)

after_each(function() C.ds_remove(base) end)

describe("a checkpoint", function()
  it("brings back tensors, state and client_state", function()
    local data = content(7, { name = "x", list = { 1, 2, { deep = true } }, empty = {},
      pi = math.pi, third = 1 / 3, big = 2 ^ 53, tiny = 5e-324, minus = -0.1,
      text = "tab\t\"quote\" ä€", no = false })
    assert.is_true(ckpt.save(dir, "a", data))
    local saved = ckpt.load(dir)
    assert.equal(dir .. "/a", saved.path)
    assert.equal("a", saved.tag)
    assert.same(data.client_state, saved.client_state)
    assert.same(data.state, saved.state)
    assert.same({ weights = { "wte", "norm.bias" }, optim = { "exp_avg/wte" } }, saved.names)
    assert.same({ "bf16", { 5 } }, { saved:info("weights", "norm.bias") })
    local wide = ds.zeros(5, { dtype = "f64" })
    assert.same({ 7, 7, 7, 7, 7 }, saved:read("weights", "norm.bias", wide):tolist())
    saved:close()
    no_leftovers()
  end)

  it("takes views, every dtype, empty tensors and scalars", function()
    local m = ds.arange(12):reshape(3, 4)
    local weights = { { "t", m:transpose(1, 2) }, { "none", ds.zeros(0, 3) },
      { "one", ds.full({}, 2.5) } }
    for _, dtype in ipairs { "u8", "bool", "i32", "i64", "f64", "f32", "f16", "bf16" } do
      weights[#weights + 1] = { dtype, ds.tensor({ 1, 0, 1 }, dtype) }
    end
    ckpt.save(dir, 1, { weights = weights })
    local saved = ckpt.load(dir)
    for _, item in ipairs(weights) do
      local dtype, shape = saved:info("weights", item[1])
      assert.equal(item[2].dtype, dtype)
      assert.same(item[2].shape, shape)
      local back = saved:read("weights", item[1], ds.empty(shape, { dtype = dtype }))
      assert.same(item[2]:tolist(), back:tolist())
    end
    -- into a view, and a range of elements
    local target = ds.zeros(3, 4, { dtype = "i64" })
    saved:read("weights", "t", target:transpose(1, 2))
    assert.same(m:tolist(), target:tolist())
    assert.same({ 8, 1 }, saved:read("weights", "t", ds.zeros(2), { from = 2 }):tolist())
    says("has 12 elements, not 2 from element 11 on", saved.read, saved, "weights", "t",
      ds.zeros(2), { from = 11 })
    saved:close()
  end)

  it("names both shapes where they differ, and what is missing", function()
    save(1)
    local saved = ckpt.load(dir)
    says(("tensor 'wte' is [3 x 4] in '%s/s1/weights/model-00001-of-00001.safetensors', and "
      .. "[4 x 3] here"):format(dir), saved.read, saved, "weights", "wte", ds.zeros(4, 3))
    says("no tensor 'wte' in optim", saved.read, saved, "optim", "wte", ds.zeros(4, 3))
    saved:close()
  end)

  it("splits weights into shards with an index that other tools read", function()
    local data = content(3)
    for i = 1, 4 do data.weights[#data.weights + 1] = { "w" .. i, ds.full({ 16 }, i) } end
    ckpt.save(dir, "a", data, { max_shard_bytes = 130 })
    local index = json.load(dir .. "/a/weights/model.safetensors.index.json")
    assert.equal(48 + 10 + 4 * 64, index.metadata.total_size)
    assert.equal("model-00001-of-00003.safetensors", index.weight_map.wte)
    assert.equal("model-00002-of-00003.safetensors", index.weight_map.w2)
    assert.equal("model-00003-of-00003.safetensors", index.weight_map.w4)
    local alone = ds.load(dir .. "/a/weights/model-00003-of-00003.safetensors")
    assert.equal(4, alone.w4:tolist()[1])
    local saved = ckpt.load(dir)
    assert.equal(6, #saved.names.weights)
    assert.equal(3, saved:read("weights", "w3", ds.zeros(16)):tolist()[16])
    saved:close()
  end)

  it("can leave the optimizer unread", function()
    save(1)
    write_file(dir .. "/s1/optim/rank-0.safetensors", "broken")
    local saved = ckpt.load(dir, nil, { only = { "weights" } })
    assert.same({ "wte", "norm.bias" }, saved.names.weights)
    assert.same({}, saved.names.optim)
    saved:close()
  end)
end)

describe("tags and latest", function()
  it("gives nil when there is nothing yet", function()
    assert.is_nil(ckpt.load(dir))
    C.ds_folder_make(dir)
    assert.is_nil(ckpt.load(dir))
    says("'" .. dir .. "/a' does not exist", ckpt.load, dir, "a")
    says("does not exist", ckpt.load, dir .. "/b", "a")
  end)

  it("refuses tags that are no name of a folder, saving and loading", function()
    for tag, why in pairs { [""] = "empty", ["../x"] = "dot", ["a/b"] = "'/'", ["a..b"] = "'..'",
      [".x"] = "dot", ["a\nb"] = "control", ["a\0b"] = "control", [("x"):rep(201)] = "200",
      latest = "'latest'", ["\255"] = "UTF-8" } do
      says(why, ckpt.save, dir, tag, content(1))
      says(why, ckpt.load, dir, tag)
    end
    says("it is a table", ckpt.save, dir, {}, content(1))
    assert.is_false(exists(dir))
  end)

  it("takes numbers and odd names", function()
    save(1, 100)
    save(2, "best (val 1.5) ä")
    save(3, 0.5)
    assert.equal(1, step_found(dir, 100))
    assert.equal(1, step_found(dir, "100"))
    assert.equal(2, step_found(dir, "best (val 1.5) ä"))
    assert.equal(3, step_found(dir))
  end)

  it("leaves latest alone when asked, but not pointing at what is gone", function()
    save(1, "a")
    save(2, "b", { save_latest = false })
    assert.equal(1, step_found(dir))
    assert.equal(2, step_found(dir, "b"))
    save(3, "a", { save_latest = false })
    assert.equal(3, step_found(dir))
  end)

  it("replaces a tag, also where two folders can't be swapped", function()
    for i, refuse in ipairs { {}, { exchange = -22 } } do
      save(i)
      disk.record(function() save(i + 5, "s" .. i) end, refuse)
      assert.equal(i + 5, step_found(dir))
      no_leftovers()
    end
  end)

  it("does not touch a folder or file that is no checkpoint", function()
    C.ds_folder_make(dir .. "/mine")
    write_file(dir .. "/mine/notes", "x")
    write_file(dir .. "/file", "x")
    says("/mine' is there and is no checkpoint", save, 1, "mine")
    says("/file' is there and is no checkpoint", save, 1, "file")
    assert.equal("x", read_file(dir .. "/mine/notes"))
    no_leftovers()
  end)

  it("keeps the newest by step, and never removes what is not ours", function()
    C.ds_folder_make(dir .. "/mine")
    for _, step in ipairs { 10, 9, 100, 20 } do save(step, nil, { keep_last = 3 }) end
    assert.same({ "latest", "mine", "s10", "s100", "s20" }, disk.names_in(dir))
    save(5, nil, { keep_last = 1, save_latest = false }) -- the new one and the one of latest
    assert.same({ "latest", "mine", "s20", "s5" }, disk.names_in(dir))
    save(6, nil, { keep_last = 1 })
    assert.same({ "latest", "mine", "s6" }, disk.names_in(dir))
    says("keep_last must be 1 or more", save, 7, nil, { keep_last = 0 })
  end)

  it("lists checkpoints by step with what is wrong with them", function()
    save(10)
    save(9)
    write_file(dir .. "/s9/state.json", "")
    local found = ckpt.list(dir)
    assert.same({ "s9", "s10" }, { found[1].tag, found[2].tag })
    assert.truthy(found[1].fault:find("/s9/state.json' has 0 bytes", 1, true))
    assert.is_nil(found[2].fault)
    assert.same({ 10, 1 }, { found[2].step, found[2].world_size })
  end)
end)

describe("client_state", function()
  it("is refused with the path of what can't be saved", function()
    local cycle = {}
    cycle.me = { cycle }
    local deep = {}
    for _ = 1, 300 do deep = { deep } end
    for path, value in pairs {
      ["client_state.x: nan"] = { x = 0 / 0 }, ["client_state.a.b: inf"] = { a = { b = 1 / 0 } },
      ["client_state.history[3]: a function"] = { history = { 1, 2, print } },
      ["client_state.me[1]: contains itself"] = cycle, ["client_state: mixed keys"] = { 1, a = 2 },
      ["client_state.l: an array with holes"] = { l = { [1] = 1, [3] = 2 } },
      ["client_state: an array with holes"] = { [0] = 1 },
      ["client_state: a key is a boolean"] = { [true] = 1 },
      ["client_state.bytes: a string of 2 bytes that is not UTF-8"] = { bytes = "\255\254" },
      ["client_state.a[1].w: a tensor"] = { a = { { w = ds.zeros(2) } } },
      ["nested deeper"] = { d = deep },
      ["client_state.c: a thread"] = { c = coroutine.create(print) },
    } do
      local message = says("", ckpt.save, dir, "a", content(1, value))
      assert.truthy(message:gsub("%-nan", "nan"):find(path, 1, true), message)
    end
    assert.is_false(exists(dir))
  end)

  it("may be an array or empty, and is not given to the engine's state", function()
    ckpt.save(dir, "a", content(1, { 1, 2 }))
    assert.equal(2, ckpt.load(dir).client_state[2])
    ckpt.save(dir, "a", content(1, {}))
    assert.is_nil(next(ckpt.load(dir).client_state))
  end)
end)

describe("damage", function()
  local function files_of(tag)
    return { "latest", tag .. "/manifest.json", tag .. "/state.json",
      tag .. "/weights/model.safetensors.index.json",
      tag .. "/weights/model-00001-of-00001.safetensors", tag .. "/optim/rank-0.safetensors" }
  end

  --- Loading must be refused, the file named, and the way out told.
  local function refused(name)
    local message = says("", ckpt.load, dir)
    if not message:find(dir .. "/" .. name, 1, true) then
      error(name .. " is not named: " .. message)
    end
    local other = name == "latest" and "s2" or "s1"
    if not message:find(("load_checkpoint(%q, %q)"):format(dir, other), 1, true) then
      error("no advice: " .. message)
    end
  end

  it("of any byte of any file is refused, and the one before still loads", function()
    save(1)
    save(2)
    for _, name in ipairs(files_of "s2") do
      local path = dir .. "/" .. name
      local whole = read_file(path)
      for i = 1, #whole do
        local flipped = bit.bxor(whole:byte(i), i % 2 == 0 and 1 or 32)
        write_file(path, whole:sub(1, i - 1) .. string.char(flipped) .. whole:sub(i + 1))
        refused(name)
      end
      write_file(path, whole)
    end
    assert.equal(1, step_found(dir, "s1"))
    assert.equal(2, step_found(dir))
  end)

  it("by cutting a file off anywhere, or a longer or missing file, is refused", function()
    save(1)
    save(2)
    for _, name in ipairs(files_of "s2") do
      local path = dir .. "/" .. name
      local whole = read_file(path)
      for i = 0, #whole - 1 do
        write_file(path, whole:sub(1, i))
        refused(name)
      end
      write_file(path, whole .. "\n")
      refused(name)
      if name ~= "latest" then
        os.remove(path)
        refused(name)
      end
      write_file(path, whole)
    end
    assert.equal(1, step_found(dir, "s1"))
    assert.equal(2, step_found(dir))
  end)

  it("also of a checkpoint that is asked for by its tag", function()
    save(1)
    save(2)
    local path = dir .. "/s1/manifest.json"
    write_file(path, (read_file(path):gsub('"step": 1', '"step": 3')))
    says("s1/manifest.json' is damaged", ckpt.load, dir, "s1")
  end)

  it("does not stop saving", function()
    save(1)
    write_file(dir .. "/latest", "rubbish")
    save(2)
    assert.equal(2, step_found(dir))
    write_file(dir .. "/s2/manifest.json", "rubbish")
    save(3, "s2")
    assert.equal(3, step_found(dir))
    no_leftovers()
  end)

  it("by a latest that names another folder's files leads nowhere", function()
    save(1)
    C.ds_remove(dir .. "/s1")
    says("/s1' does not exist, and '" .. dir .. "/latest' names it", ckpt.load, dir)
  end)

  it("by a manifest that is whole and makes no sense is refused", function()
    save(1)
    local path = dir .. "/s1/manifest.json"
    local good = read_file(path):match("\n(.*)$")
    for _, case in ipairs {
      { "state%.json", "../../state.json", "its list of files makes no sense" },
      { '"format": 1', '"format": 9', "format 9, of a newer version" },
      { '"tag": "s1"', '"tag": "../s1"', "its tag, step or list of files" } } do
      local body = good:gsub(case[1], case[2])
      local hash = ffi.new("char[17]")
      C.ds_hash(hash, body, #body)
      write_file(path, ('{ "manifest_hash": "%s",\n%s'):format(ffi.string(hash), body))
      says(case[3], ckpt.load, dir, "s1")
    end
  end)
end)

describe("a crash at any moment", function()
  --- Saves step 2 over what is there; every state that the disk may be in afterwards must load as
  -- `before` or 2, only as 2 once the save has returned, and take a further save.
  -- @tparam table options `tag`: load this one; `refuse`: as for disk.record
  local function survives(before, after, options)
    local tag, refuse = options and options.tag, options and options.refuse
    local root = disk.scan(base)
    local log, ok, message = disk.record(after, refuse)
    assert.is_true(ok, message)
    local found, place, real = {}, base .. "/after", dir
    local n = disk.states(root, base, log, function(tree, at)
      C.ds_remove(place)
      disk.write(tree, place)
      dir = place .. "/ckpt"
      local good, step = pcall(step_found, dir, tag)
      if tag and not good then good, step = step:find "does not exist" and at < #log, before end
      if not good or step ~= before and step ~= 2 or at == #log and step ~= 2 then
        error(("after call %d of %d (%s) a load gives %s"):format(at, #log,
          at > 0 and log[at].op or "none", tostring(step)))
      end
      found[step or "none"] = true
      save(3)
      assert.equal(3, step_found(dir))
      no_leftovers()
      dir = real
    end)
    C.ds_remove(place)
    assert.is_true(n > 20)
    assert.is_true(found[before or "none"] and found[2])
  end

  it("of a first save leaves nothing or all", function()
    survives(nil, function() save(2) end)
  end)

  it("leaves the old checkpoint or the new one", function()
    save(1)
    survives(1, function() save(2) end)
  end)

  it("also when a tag is replaced", function()
    save(1, "a")
    survives(1, function() save(2, "a") end)
  end)

  it("also where two folders can't be swapped", function()
    save(1, "a")
    survives(1, function() save(2, "a") end, { refuse = { exchange = -22 } })
  end)

  it("also while old checkpoints are removed", function()
    save(0)
    save(1)
    survives(1, function() save(2, nil, { keep_last = 1 }) end)
  end)

  it("also when latest is left alone", function()
    save(1)
    survives(nil, function() save(2, nil, { save_latest = false }) end, { tag = "s2" })
  end)

  it("also after a failure between the swap of a tag and latest", function()
    save(1, "a")
    local _, ok = disk.record(function() save(9, "a") end, { rename = -5 })
    assert.is_false(ok)
    assert.equal(1, step_found(dir))
    survives(1, function() save(2, "b") end)
  end)
end)

describe("what the system refuses", function()
  for _, call in ipairs { "open", "allocate", "write", "sync", "rename", "mkdir" } do
    it("leaves the old checkpoint when " .. call .. " fails", function()
      save(1)
      local _, ok, message = disk.record(function() save(2) end, { [call] = -28 })
      assert.is_false(ok)
      assert.truthy(message:find(dir, 1, true), message)
      assert.equal(1, step_found(dir))
      save(3)
      assert.equal(3, step_found(dir))
      no_leftovers()
    end)
  end

  --- Runs Lua text in another dsrun, inside a shell line with %s for it.
  local function run(line, text)
    local script = base .. "/script.lua"
    write_file(script, text)
    local pipe = io.popen("(" .. line:format(("%s %s"):format(host.program, script)) .. ") 2>&1")
    local output = pipe:read "*a"
    pipe:close()
    return output
  end

  it("as a full disk: nothing is lost, and the sizes are told", function()
    local mounted = "unshare -m sh -c 'mount -t tmpfs -o size=4m none %s && "
    if run((mounted .. "echo yes'"):format(base), "") ~= "yes\n" then
      return pending "no private mounts here"
    end
    local line = (mounted .. "cat > %s/script.lua && %%s' < %s/script.lua"):format(base, base, base)
    local output = run(line, ([[
      local ds, ckpt, C = require "ds", require "ds.ckpt", require("ds.ffi").C
      local dir = %q
      local function content(n, v)
        return { weights = { { "w", ds.full({ n }, v) } }, client_state = { v = v } }
      end
      local function free()
        local bytes = require("ffi").new("int64_t[1]")
        C.ds_disk_free(bytes, dir)
        return tonumber(bytes[0])
      end
      ckpt.save(dir, "a", content(1000, 1))
      local before = free()
      print(pcall(ckpt.save, dir, "b", content(2 ^ 20, 2))) -- found out beforehand
      print(free() == before)
      require("ds.saveload").bytes = function() return 0 end -- found out while writing
      print(pcall(ckpt.save, dir, "b", content(2 ^ 20, 2)))
      print(free() == before, ckpt.load(dir).client_state.v)
    ]]):format(dir))
    local early, same, late, same_again = output:match("^(.-)\n(.-)\n(.-)\n(.-)\n$")
    assert.truthy(early, output)
    assert.truthy(early:find("disk is full: 'b' needs 5242%d%d%d bytes and %d+ are free"), early)
    assert.equal("true", same)
    assert.truthy(late:find("safetensors': it needs 419%d+ bytes and %d+ are free"), late)
    assert.equal("true\t1", same_again)
  end)

  it("as a read-only folder", function()
    save(1)
    local _, ok, message = disk.record(function() save(2) end, { mkdir = -30, open = -30 })
    assert.is_false(ok)
    assert.truthy(message:find("Read-only file system", 1, true), message)
    assert.equal(1, step_found(dir))
  end)

  it("as kill -9 at any moment, ten times over", function()
    local text = ([[
      local ds, ckpt = require "ds", require "ds.ckpt"
      local found = ckpt.load(%q)
      local step = found and found.state.global_steps or 0
      while true do
        step = step + 1
        ckpt.save(%q, "s" .. step %% 3, { weights = { { "wte", ds.full({ 3, 4 }, step) },
          { "norm.bias", ds.full({ 5 }, step %% 100, { dtype = "bf16" }) } },
          optim = { { "exp_avg/wte", ds.full({ 3, 4 }, -step) } },
          state = { global_steps = step, rng = { offset = step } },
          client_state = { note = "step " .. step } }, { keep_last = 2 })
      end
    ]]):format(dir, dir)
    local last, pause = 0, 0.1 -- seconds
    for i = 1, 10 do
      run(("timeout -s KILL %.3f %%s"):format(pause + i * 0.013), text)
      local step = step_found(dir) or 0
      assert.is_true(step >= last)
      last = step
      if last == 0 then pause = 2 * pause end -- a machine too busy to have saved one by then
    end
    assert.is_true(last > 0)
    save(last + 1, "end", { keep_last = 1 })
    assert.same({ "end", "latest" }, disk.names_in(dir))
  end)
end)

describe("ds.save and ds.load", function()
  local path
  before_each(function() path = base .. "/x.safetensors" end)

  it("bring back a tensor", function()
    assert.is_true(ds.save(ds.tensor { { 1, 2 }, { 3, 4 } }, path))
    assert.same({ { 1, 2 }, { 3, 4 } }, ds.load(path):tolist())
  end)

  it("bring back tables, arrays, plain values, and one tensor in two places as one", function()
    local w = ds.arange(3)
    ds.save({ w = w, list = { w, { n = 1.5, s = "ä", t = true }, {} }, ["a.b"] = ds.ones(2),
      a = { b = ds.zeros(1) }, tensor = "a word", none = json.null }, path)
    local v = ds.load(path)
    assert.same({ 0, 1, 2 }, v.w:tolist())
    assert.equal(v.w, v.list[1])
    assert.same({ n = 1.5, s = "ä", t = true }, v.list[2])
    assert.same({}, v.list[3])
    assert.same({ 1, 1 }, v["a.b"]:tolist())
    assert.same({ 0 }, v.a.b:tolist())
    assert.same({ "a word", json.null }, { v.tensor, v.none })
  end)

  it("load files of other tools as a table of tensors", function()
    local v = ds.load("tests/golden/tensors.safetensors")
    assert.same({ 9007199254740992, -1 }, v.i64:tolist())
    assert.same({ 1, -0.5, 3.140625 }, v.bf16:tolist())
    assert.equal(42, v.scalar:item())
    assert.same({ 0, 1, 2, 3 }, v['näme "with" quotes']:tolist())
    assert.same({ true, false, true }, v.bool:tolist())
  end)

  it("refuse what is not data, with its path, and leave no file", function()
    local cycle = {}
    cycle.x = cycle
    for path_said, value in pairs { ["value.f[2]: a function"] = { f = { 1, print } },
      ["contains itself"] = cycle, ["value has mixed keys"] = { 1, a = 1 },
      ["value.x: nan"] = { x = 0 / 0 }, ["array with holes"] = { [1] = 1, [3] = 1 },
      ["has a key that is a table"] = { [{}] = 1 } } do
      local message = says("", ds.save, value, path)
      assert.truthy(message:gsub("%-nan", "nan"):find(path_said, 1, true), message)
    end
    says("expects ds.save(value, path)", ds.save, path, {})
    says("no such file", ds.load, path)
    assert.same({}, disk.names_in(base))
  end)

  it("replace a file only by a whole one", function()
    ds.save(ds.ones(2), path)
    local _, ok = disk.record(function() ds.save(ds.zeros(2), path) end, { sync = -5 })
    assert.is_false(ok)
    assert.same({ 1, 1 }, ds.load(path):tolist())
    assert.same({ "x.safetensors" }, disk.names_in(base))
  end)
end)
