--- Checkpoints: folders of safetensors and JSON that are whole or not there.
--
--     dir/latest                     the tag to load, and the hash of its manifest
--     dir/TAG/manifest.json          format, step, world size; size and hash of every other file
--     dir/TAG/state.json             counters, schedule, random numbers …; the user's client_state
--     dir/TAG/weights/…              model-0000i-of-0000n.safetensors and their index, as Hugging
--                                    Face's tools want them
--     dir/TAG/optim/rank-R.safetensors
--                                    what rank R owned of the optimizer: whole vectors, or
--                                    stretches of them as NAME@FIRST
--
-- Every rank calls save and load. Each writes its share of the files, rank 0 the rest; all of them
-- succeed, or all raise what went wrong on one. Any number of ranks may load what another saved.
--
-- A save writes all of this into dir/.tmp-…, brings it to the disk, and then renames the folder.
-- A tag that exists is swapped with the new folder in one call, so for a moment `latest` still has
-- the hash of the old one, which lies under the temporary name: that is why a load looks there as
-- well. Where a file system can't swap, two renames leave the same picture. Whatever moment a
-- machine stops at, `latest` finds the old checkpoint or the new one.
--
-- Loading checks every file against the manifest before it hands anything out.

local ffi = require "ffi"
local border = require "ds.ffi"
local json = require "ds.json"
local files = require "ds.saveload"
local tensor = require "ds.tensor"
local comm = require "ds.comm"
local together = require "ds.together"

local C, check, raise = border.C, border.check, border.raise

local M = {}

local FORMAT = 1
local SHARD = 5e9          -- bytes; as Hugging Face's default
local LOCK_MS = 60 * 1000  -- waiting for another process that saves into the same folder
local SLACK = 2 ^ 20       -- bytes: headers, folders

-- ---- names and folders

--- Why a string is no plain name of a folder; nil if it is one.
local function tag_fault(tag)
  return type(tag) ~= "string" and ("it is a " .. type(tag))
    or tag == "" and "it is empty"
    or #tag > 200 and "it is longer than 200 bytes"
    or tag:find("^%.") and "it begins with a dot"
    or tag:find("/", 1, true) and "it has a '/'"
    or tag:find("..", 1, true) and "it has '..'"
    or tag:find("%c") and "it has control characters"
    or tag == "latest" and "'latest' is a file beside the tags"
    or C.ds_json_utf8(tag, #tag) == 0 and "it is not UTF-8"
    or nil
end

--- A tag as a string; refused if it can't be the name of a folder in the checkpoint folder.
local function check_tag(tag, what)
  if type(tag) == "number" then
    tag = tag % 1 == 0 and math.abs(tag) < 2 ^ 53 and ("%d"):format(tag) or tostring(tag)
  end
  local why = tag_fault(tag)
  if why then
    raise("%s: the tag %q can't name a folder in the checkpoint folder: %s", what, tostring(tag),
      why)
  end
  return tag
end

local function kind(path) return check(C.ds_path_kind(path)) end
local function is_folder(path) return kind(path) == C.DS_PATH_FOLDER end

--- Sorted names in a folder.
local function list(dir)
  local slot = ffi.new("char *[1]")
  local bytes = tonumber(C.ds_folder_list(slot, dir))
  check(bytes)
  local text, names = ffi.string(slot[0], bytes), {}
  C.ds_free(slot[0])
  for name in text:gmatch("(%Z+)%z") do names[#names + 1] = name end
  return names
end

local function temporary(dir)
  local buffer = ffi.new("char[4096]")
  check(C.ds_temporary_name(buffer, 4096, dir))
  return ffi.string(buffer)
end

--- Writes a new file; its folder is still to be synced.
local function put(path, text)
  local hash = ffi.new("char[17]")
  check(C.ds_file_put(path, text, #text, 0, hash))
  return ffi.string(hash)
end

local function get(path, what)
  local f = files.file(path, what)
  local text = f:text()
  f:close()
  return text
end

local function hash_of(text)
  local hash = ffi.new("char[17]")
  C.ds_hash(hash, text, #text)
  return ffi.string(hash)
end

-- ---- the manifest and `latest`

--- The manifest's first line holds the hash of all lines behind it.
local function manifest_text(manifest)
  local body = json.encode(manifest, { indent = 2 }):sub(3) .. "\n"
  return ('{ "manifest_hash": "%s",\n%s'):format(hash_of(body), body)
end

--- A file's path in a manifest: below the checkpoint, plain names only.
local function is_inside(path)
  if type(path) ~= "string" or path:sub(1, 1) == "/" then return false end
  for part in (path .. "/"):gmatch("([^/]*)/") do
    if not part:find("^[%w_%-][%w_%-.]*$") then return false end
  end
  return true
end

--- Why a decoded manifest makes no sense; nil if it does.
local function manifest_fault(m)
  if type(m) ~= "table" or type(m.format) ~= "number" then return "it has no format" end
  if m.format > FORMAT then
    return ("it has format %g, of a newer version; this one reads up to %d"):format(m.format,
      FORMAT)
  end
  if tag_fault(m.tag) or type(m.step) ~= "number" or type(m.files) ~= "table" then
    return "its tag, step or list of files is missing or makes no sense"
  end
  for _, f in ipairs(m.files) do
    if not is_inside(f.path) or type(f.bytes) ~= "number" or type(f.hash) ~= "string" then
      return "its list of files makes no sense"
    end
  end
end

--- Reads and checks the manifest in a folder.
-- @treturn table|nil the manifest, with `hash`: its own; nil and the reason
local function read_manifest(folder)
  local path = folder .. "/manifest.json"
  if kind(path) ~= C.DS_PATH_FILE then return nil, ("'%s' is missing"):format(path) end
  local text = get(path)
  local hash, body = text:match('^{ "manifest_hash": "(%x+)",\n(.*)$')
  if not hash or hash ~= hash_of(body) then
    return nil, ("'%s' is damaged: its text does not match its hash"):format(path)
  end
  local m, message = json.decode(text, path)
  local fault = m == nil and message or manifest_fault(m)
  if fault then return nil, ("'%s': %s"):format(path, fault) end
  m.hash = hash
  return m
end

--- What `latest` says.
-- @treturn table|nil { tag, hash }; nil if there is no such file; nil and the reason if it is bad
local function read_latest(dir)
  local path = dir .. "/latest"
  if kind(path) == C.DS_PATH_NONE then return nil end
  local text = get(path)
  local tag, hash = text:match("^([^\n]+)\n(%x+)\n$")
  if not tag or #hash ~= 16 or hash:find("%u") or tag_fault(tag) then
    return nil, ("'%s' is damaged: it should be a tag and a hash, one a line"):format(path)
  end
  return { tag = tag, hash = hash }
end

--- The folder of a tag, and its manifest. With a hash, the folder that has this manifest: perhaps
-- one that a save was about to replace.
-- @treturn string|nil folder
-- @treturn table|string manifest, or the reason
local function find(dir, tag, hash)
  local folder = dir .. "/" .. tag
  local there = is_folder(folder)
  local why
  if there then
    local m, message = read_manifest(folder)
    if m and (not hash or m.hash == hash) then return folder, m end
    why = message
      or ("'%s/manifest.json' is not the one that '%s/latest' was written for"):format(folder, dir)
  else
    why = ("'%s' does not exist"):format(folder)
  end
  if hash or not there then
    for _, name in ipairs(list(dir)) do
      local other = dir .. "/" .. name
      local m = name:find("^%.tmp%-") and is_folder(other) and read_manifest(other)
      if m and m.tag == tag and (not hash or m.hash == hash) then return other, m end
    end
  end
  return nil, why
end

--- Why files of a checkpoint are not as long as its manifest says; nil if they are.
local function size_fault(folder, m)
  for _, f in ipairs(m.files) do
    local path = folder .. "/" .. f.path
    if kind(path) ~= C.DS_PATH_FILE then return ("'%s' is missing"):format(path) end
    local open = files.file(path)
    local bytes = open.bytes
    open:close()
    if bytes ~= f.bytes then
      return ("'%s' has %d bytes and should have %d"):format(path, bytes, f.bytes)
    end
  end
end

--- All checkpoints in a folder, by step.
-- @treturn table array of { tag, step, world_size, bytes, fault }; `fault`: what is wrong with it,
-- as far as manifest and sizes tell
function M.list(dir)
  local out = {}
  if not is_folder(dir) then return out end
  for _, name in ipairs(list(dir)) do
    local folder = dir .. "/" .. name
    if name:sub(1, 1) ~= "." and is_folder(folder)
      and kind(folder .. "/manifest.json") == C.DS_PATH_FILE then
      local m, fault = read_manifest(folder)
      local item = { tag = name, step = m and m.step or -1, world_size = m and m.world_size,
        bytes = 0, fault = fault or size_fault(folder, m) }
      for _, f in ipairs(m and m.files or {}) do item.bytes = item.bytes + f.bytes end
      out[#out + 1] = item
    end
  end
  table.sort(out, function(a, b)
    if a.step ~= b.step then return a.step < b.step end
    return a.tag < b.tag
  end)
  return out
end

-- ---- saving

--- Weights as files of at most `limit` bytes, in the order given; a larger one is a file by itself.
local function shards_of(weights, limit)
  local shards, bytes = { {} }, 0
  for _, item in ipairs(weights) do
    local n = files.bytes { item }
    if bytes > 0 and bytes + n > limit then
      shards[#shards + 1], bytes = {}, 0
    end
    table.insert(shards[#shards], item)
    bytes = bytes + n
  end
  return shards
end

--- The entry of a written file in the manifest.
local function entry_of(folder, path, hash)
  local f = files.file(folder .. "/" .. path)
  local bytes = f.bytes
  f:close()
  return { path = path, bytes = bytes, hash = hash }
end

local function shard_name(i, n) return ("model-%05d-of-%05d.safetensors"):format(i, n) end

--- Writes this rank's files and brings them to the disk: every so manieth shard of the weights, and
-- what it owns of the optimizer.
-- @treturn table entries for the manifest
local function write_own(folder, shards, optim)
  local written, ranks, rank = {}, comm.world_size(), comm.rank()
  local function write_tensors(path, tensors)
    written[#written + 1] = entry_of(folder, path, files.write(folder .. "/" .. path, tensors,
      { meta = { "format", "pt" }, what = "save_checkpoint" }))
  end
  for i, shard in ipairs(shards) do
    if (i - 1) % ranks == rank then write_tensors("weights/" .. shard_name(i, #shards), shard) end
  end
  check(C.ds_folder_sync(folder .. "/weights"))
  if #optim > 0 then
    write_tensors(("optim/rank-%d.safetensors"):format(rank), optim)
    check(C.ds_folder_sync(folder .. "/optim"))
  end
  return written
end

--- Writes what there is once: index, state and, last, the manifest.
-- @tparam table lists the entries of each rank's files, as JSON
-- @treturn string the manifest's hash
local function write_rest(folder, tag, shards, texts, lists)
  local written, map = {}, {}
  local function note(path, text)
    written[#written + 1] = entry_of(folder, path, put(folder .. "/" .. path, text))
  end
  for _, own in ipairs(lists) do
    for _, entry in ipairs(json.decode(own, "entries")) do
      if kind(folder .. "/" .. entry.path) ~= C.DS_PATH_FILE then
        raise("save_checkpoint: rank 0 does not see '%s/%s', which another rank wrote; the folder "
          .. "must be one that all machines share", folder, entry.path)
      end
      written[#written + 1] = entry
    end
  end
  table.sort(written, function(a, b) -- weights before the optimizer
    local one, other = a.path:match "^%w+", b.path:match "^%w+"
    if one ~= other then return one > other end
    return a.path < b.path
  end)
  local size = 0
  for i, shard in ipairs(shards) do
    size = size + files.bytes(shard)
    for _, item in ipairs(shard) do map[item[1]] = shard_name(i, #shards) end
  end
  note("weights/model.safetensors.index.json",
    json.encode({ metadata = { total_size = size }, weight_map = map }, { indent = 2 }) .. "\n")
  check(C.ds_folder_sync(folder .. "/weights"))
  note("state.json", texts.state)
  local manifest = manifest_text { format = FORMAT, tag = tag, step = texts.step,
    world_size = texts.world_size, files = written }
  put(folder .. "/manifest.json", manifest)
  check(C.ds_folder_sync(folder))
  return manifest:match('"(%x+)",\n')
end

--- Removes what dead runs left behind. A whole checkpoint whose name is free gets it; one that
-- `latest` still means (see the top of this file) stays for now.
-- @treturn table paths to remove once the new checkpoint is named by `latest`
local function clean(dir, locked)
  local latest, later = read_latest(dir), {}
  for _, name in ipairs(list(dir)) do
    local path = dir .. "/" .. name
    local dead = C.ds_temporary_dead(name) == 1
    if name:find("^%.tmp%-") and is_folder(path) and (locked or dead) then
      local m = read_manifest(path)
      if m and kind(dir .. "/" .. m.tag) == C.DS_PATH_NONE and not size_fault(path, m) then
        check(C.ds_rename(path, dir .. "/" .. m.tag))
        check(C.ds_folder_sync(dir))
      elseif m and latest and m.hash == latest.hash and m.tag == latest.tag then
        later[#later + 1] = path
      else
        check(C.ds_remove(path))
      end
    elseif dead and kind(path) == C.DS_PATH_FILE then
      check(C.ds_remove(path))
    end
  end
  return later
end

--- Gives the finished folder its name.
-- @treturn string|nil where the checkpoint lies that had this name before
local function publish(dir, folder, tag)
  local target, displaced = dir .. "/" .. tag, nil
  if is_folder(target) then
    if check(C.ds_exchange(folder, target)) == 1 then
      displaced = folder
    else
      displaced = temporary(dir)
      check(C.ds_rename(target, displaced))
      check(C.ds_rename(folder, target))
    end
  else
    check(C.ds_rename(folder, target))
  end
  check(C.ds_folder_sync(dir))
  return displaced
end

--- Removes a checkpoint that nothing names any more: first its manifest, so that no half is taken
-- for a whole.
local function remove(path)
  C.ds_remove(path .. "/manifest.json")
  return C.ds_remove(path)
end

local function write_latest(dir, tag, hash)
  local new = dir .. "/.tmp-latest" -- one name for all runs: what a dead one left goes
  check(C.ds_remove(new))
  put(new, tag .. "\n" .. hash .. "\n")
  check(C.ds_rename(new, dir .. "/latest"))
  check(C.ds_folder_sync(dir))
end

--- Removes the oldest checkpoints: `n` are left, the new one and the n - 1 of the highest step.
local function keep_last(dir, tag, n)
  local latest = read_latest(dir)
  local old = {}
  for _, item in ipairs(M.list(dir)) do
    if item.tag ~= tag and item.step >= 0 and not (latest and latest.tag == item.tag) then
      old[#old + 1] = item
    end
  end
  local kept = 1 + ((latest and latest.tag ~= tag) and 1 or 0)
  for i = 1, #old - math.max(0, n - kept) do
    local grave = temporary(dir)
    check(C.ds_rename(dir .. "/" .. old[i].tag, grave))
    check(remove(grave))
  end
end

--- Refuses early: before anything is written.
local function check_room(dir, tag, need)
  local target = dir .. "/" .. tag
  local there = kind(target)
  if there ~= C.DS_PATH_NONE and (there ~= C.DS_PATH_FOLDER
    or kind(target .. "/manifest.json") ~= C.DS_PATH_FILE) then
    raise("save_checkpoint: '%s' is there and is no checkpoint; choose another tag, or remove it",
      target)
  end
  local free = ffi.new("int64_t[1]")
  check(C.ds_disk_free(free, dir))
  if need > tonumber(free[0]) then
    raise("save_checkpoint: the disk is full: '%s' needs %d bytes and %d are free in '%s'; "
      .. "nothing was changed", tag, need, tonumber(free[0]), dir)
  end
end

--- Bytes that all ranks together will write.
local function bytes_needed(content, texts)
  local own, total = files.bytes(content.optim), files.bytes(content.weights) + #texts.state + SLACK
  for _, n in ipairs(together.texts(("%d"):format(own))) do total = total + tonumber(n) end
  return total
end

--- Weights in as many files as it takes to give every rank a share.
local function make_shards(weights, options)
  local limit = math.min(options.max_shard_bytes or SHARD,
    math.ceil(files.bytes(weights) / comm.world_size()))
  return shards_of(weights, math.max(1, limit))
end

--- Gives the finished folder its name, and `latest` its content; then what they replaced goes.
local function name_it(dir, folder, tag, hash, later, options)
  local latest = read_latest(dir)
  later[#later + 1] = publish(dir, folder, tag)
  if options.save_latest ~= false or latest and latest.tag == tag then
    write_latest(dir, tag, hash)
    latest = { tag = tag, hash = hash }
  end
  for _, path in ipairs(later) do
    local m = read_manifest(path)
    if not (m and latest and m.hash == latest.hash and m.tag == latest.tag) then
      check(remove(path))
    end
  end
  if options.keep_last then keep_last(dir, tag, options.keep_last) end
end

--- Rank 0 has the folder locked, or could not.
local function save_locked(dir, tag, content, texts, options, locked)
  local later
  local need = bytes_needed(content, texts)
  local folder = together.first(function()
    later = clean(dir, locked)
    check_room(dir, tag, need)
    local path = temporary(dir)
    check(C.ds_folder_make(path .. "/weights"))
    check(C.ds_folder_make(path .. "/optim"))
    return path
  end)
  local shards = make_shards(content.weights, options)
  local ok, message = xpcall(function()
    local own = together.all(write_own, folder, shards, content.optim)
    local lists = together.texts(json.encode(json.array(own)))
    return together.first(write_rest, folder, tag, shards, texts, lists)
  end, border.note)
  if not ok then
    if comm.rank() == 0 then C.ds_remove(folder) end
    error(message, 0)
  end
  together.first(name_it, dir, folder, tag, message, later, options)
end

--- Where in plain data there is a tensor: JSON would take it for a table.
local function tensor_in(value, path, seen)
  if tensor.is_tensor(value) then return path end
  if type(value) ~= "table" or seen[value] then return nil end
  seen[value] = true
  for key, item in pairs(value) do
    local found = tensor_in(item, (type(key) == "number" and "%s[%s]" or "%s.%s"):format(path,
      tostring(key)), seen)
    if found then return found end
  end
end

--- Plain data as JSON, refused with the path of what can't be saved.
local function encode(value, name)
  local found = tensor_in(value, name, {})
  if found then
    raise("%s: a tensor can't be saved there; make it a buffer of the model, or use ds.save", found)
  end
  return json.encode(value, { name = name, indent = 1 })
end

--- Saves a checkpoint as dir/tag. When it returns, all of it is on the disk.
-- @tparam string dir
-- @tparam string|number tag
-- @tparam table content { weights = { { name, tensor }… }, optim = the same, state = plain table,
--   client_state = plain table }; `state.global_steps` and `state.world_size` go into the manifest
-- @tparam[opt] table options `keep_last`: how many to keep; `save_latest` = false: `latest` stays;
--   `max_shard_bytes`
-- @treturn boolean true; raises when it failed, and then nothing is lost
function M.save(dir, tag, content, options)
  options = options or {}
  tag = check_tag(tag, "save_checkpoint")
  if options.keep_last and not (type(options.keep_last) == "number" and options.keep_last >= 1) then
    raise("save_checkpoint: keep_last must be 1 or more, not %s", tostring(options.keep_last))
  end
  local state = content.state or {}
  local texts = { step = state.global_steps or 0, world_size = state.world_size or 1 }
  texts.state = ('{ "format": %d,\n"client_state": %s,\n"state": %s }\n'):format(FORMAT,
    encode(content.client_state or {}, "client_state"), encode(state, "state"))
  content = { weights = content.weights or {}, optim = content.optim or {} }

  local lock = -1
  together.first(function()
    check(C.ds_folder_make(dir))
    lock = C.ds_folder_lock(dir, LOCK_MS)
    if lock < 0 and lock ~= C.DS_FOLDER_NO_LOCK then check(lock, "save_checkpoint") end
  end)
  local ok, message = xpcall(save_locked, border.note, dir, tag, content, texts, options, lock >= 0)
  if lock >= 0 then C.ds_folder_unlock(lock) end
  if not ok then error(message, 0) end
  return true
end

-- ---- loading

local Saved = {}
Saved.__index = Saved

--- What to do about a checkpoint that can't be loaded. `broken`: a tag not to advise.
local function advice(dir, broken)
  local whole = {}
  for _, item in ipairs(M.list(dir)) do
    if not item.fault and item.tag ~= broken then whole[#whole + 1] = item.tag end
  end
  if #whole == 0 then
    return ("; there is no other checkpoint in '%s' that looks whole"):format(dir)
  end
  return ("; these look whole: %s; load one by its name: load_checkpoint(%q, %q)"):format(
    table.concat(whole, ", "), dir, whole[#whole])
end

--- Opens a file of the manifest; `whole`: compares all of it.
local function open_checked(folder, entry, whole)
  local path = folder .. "/" .. entry.path
  local f = files.file(path, "load_checkpoint")
  if f.bytes ~= entry.bytes then
    raise("load_checkpoint: '%s' has %d bytes and should have %d", path, f.bytes, entry.bytes)
  end
  local hash = whole and f:hash() or entry.hash
  if hash ~= entry.hash then
    raise("load_checkpoint: '%s' is damaged: its hash is %s and should be %s", path, hash,
      entry.hash)
  end
  return f
end

local function read_state(saved, f)
  local all, message = json.decode(f:text(), f.path)
  if all == nil or type(all.state) ~= "table" or type(all.client_state) ~= "table" then
    raise("load_checkpoint: '%s' is damaged: %s", f.path, message or "fields are missing")
  end
  saved.state, saved.client_state = all.state, all.client_state
end

--- Notes where a tensor, or a stretch of one, lies.
local function add_piece(saved, part, f, entry)
  local name, first = entry, 0
  if part == "optim" then
    local base, at = entry:match "^(.*)@(%d+)$"
    if base then name, first = base, tonumber(at) end
  end
  local pieces = saved._in[part][name]
  if not pieces then
    pieces = { whole = name == entry }
    saved._in[part][name] = pieces
    table.insert(saved.names[part], name)
  end
  local dtype, shape = f:info(entry)
  pieces[#pieces + 1] = { file = f, entry = entry, first = first, dtype = dtype, shape = shape,
    stop = first + tensor.numel_of(shape) }
end

--- Opens all files and checks this rank's share of them; small ones first, they fail fast.
local function open_all(saved, manifest, only)
  local order, ranks, rank = {}, comm.world_size(), comm.rank()
  for i, entry in ipairs(manifest.files) do order[i] = entry end
  table.sort(order, function(a, b)
    if a.bytes ~= b.bytes then return a.bytes < b.bytes end
    return a.path < b.path
  end)
  local found = {}
  for i, entry in ipairs(order) do
    local part = entry.path:match("^(%w+)/.*%.safetensors$")
    if not (part and only and not only[part]) then
      local f = open_checked(saved.path, entry, not part or i % ranks == rank)
      if part then found[entry.path] = f:parse() end
      if entry.path == "state.json" then read_state(saved, f) end
      if not part then f:close() end
    end
  end
  for _, entry in ipairs(manifest.files) do -- in the manifest's order
    local f, part = found[entry.path], entry.path:match("^(%w+)/")
    for _, name in ipairs(f and f.names or {}) do add_piece(saved, part, f, name) end
    saved._files[#saved._files + 1] = f
  end
  for _, pieces in pairs(saved._in.optim) do
    table.sort(pieces, function(a, b) return a.first < b.first end)
  end
  if not saved.state then raise("load_checkpoint: '%s' has no state.json", saved.path) end
end

--- The checkpoint that is meant. On rank 0.
-- @treturn string|nil its folder, tag and manifest as JSON; nil: no tag is given and there is none
local function look_up(dir, tag)
  local hash, why
  if tag == nil then
    if not is_folder(dir) then return nil end
    local latest
    latest, why = read_latest(dir)
    if not latest and not why then return nil end
    if why then raise("load_checkpoint: %s%s", why, advice(dir)) end
    tag, hash = latest.tag, latest.hash
  end
  tag = check_tag(tag, "load_checkpoint")
  if not is_folder(dir) then raise("load_checkpoint: the folder '%s' does not exist", dir) end
  local folder, manifest = find(dir, tag, hash)
  if not folder then
    raise("load_checkpoint: %s%s%s", manifest, hash and (", and '%s/latest' names it"):format(dir)
      or "", advice(dir))
  end
  return json.encode { folder = folder, tag = tag, manifest = manifest }
end

--- Opens a checkpoint and checks every byte of it; the ranks share that work.
-- @tparam string dir
-- @tparam[opt] string|number tag default: what `latest` names
-- @tparam[opt] table options `only` = { "weights" }: leave the other tensors alone, unread
-- @treturn table|nil `path`, `tag`, `state`, `client_state`, `names` = { weights = {…}, optim =
--   {…} }, and the methods `read`, `info`, `close`; nil if no tag is given and there is no `latest`
function M.load(dir, tag, options)
  local found = together.first(look_up, dir, tag)
  if not found then return nil end
  found = json.decode(found, "the manifest")
  local only
  for _, part in ipairs(options and options.only or {}) do
    only = only or {}
    only[part] = true
  end
  local saved = setmetatable({ path = found.folder, tag = found.tag,
    names = { weights = {}, optim = {} }, _in = { weights = {}, optim = {} }, _files = {} }, Saved)
  local ok, message = xpcall(together.all, border.note, open_all, saved, found.manifest, only)
  if not ok then error(message .. advice(dir, found.tag), 0) end
  return saved
end

local function pieces_of(saved, part, name)
  local pieces = saved._in[part] and saved._in[part][name]
  if not pieces then
    raise("load_checkpoint: '%s' has no tensor '%s' in %s", saved.path, name, tostring(part))
  end
  return pieces
end

--- Fills the flat tensor t with elements `from` and on, out of stretches.
local function read_pieces(saved, name, pieces, t, from)
  local next, stop = from, from + t:numel()
  for _, piece in ipairs(pieces) do
    local last = math.min(stop, piece.stop)
    if piece.first <= next and next < last then
      piece.file:read(piece.entry, tensor.view.slice_flat(t, next - from, { last - next }),
        { from = next - piece.first })
      next = last
    end
  end
  if next < stop then
    raise("load_checkpoint: '%s' lacks elements %d to %d of '%s'", saved.path, next, stop - 1, name)
  end
end

--- Fills a tensor; shape must agree, the dtype is converted.
-- @tparam string part "weights" or "optim"
-- @tparam string name
-- @tparam Tensor t
-- @tparam[opt] table options `from`: fill t, of any shape, with the elements from that one on
-- (0-based, row-major)
-- @treturn Tensor t
function Saved:read(part, name, t, options)
  local pieces = pieces_of(self, part, name)
  if pieces.whole then return pieces[1].file:read(pieces[1].entry, t, options) end
  if t._c.dense == 1 then
    read_pieces(self, name, pieces, t:view(-1), options and options.from or 0)
  else
    local dense = tensor.new({ t:numel() }, t.dtype, t.device)
    read_pieces(self, name, pieces, dense, options and options.from or 0)
    tensor.run("copy", t.device, t._c, dense:view(unpack(t.shape))._c)
  end
  return t
end

--- dtype and shape of a saved tensor; of one in stretches, { how many elements }.
function Saved:info(part, name)
  local pieces = pieces_of(self, part, name)
  if pieces.whole then return pieces[1].dtype, pieces[1].shape end
  return pieces[1].dtype, { pieces[#pieces].stop }
end

function Saved:close()
  for _, f in ipairs(self._files) do f:close() end
  self._in, self._files = { weights = {}, optim = {} }, {}
end

return M
