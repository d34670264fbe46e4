--- The folders that checkpoints lie in: tags, manifests, `latest`, and what a crash leaves behind.
--
-- A save writes everything into dir/.tmp-…, brings it to the disk, and then renames the folder. A
-- tag that exists is swapped with the new folder in one call, so for a moment `latest` still has
-- the hash of the old one, which lies under the temporary name: that is why a load looks there as
-- well. Where a file system can't swap, two renames leave the same picture. Whatever moment a
-- machine stops at, `latest` finds the old checkpoint or the new one.

local ffi = require "ffi"
local border = require "ds.ffi"
local json = require "ds.json"
local files = require "ds.saveload"

local C, check, raise = border.C, border.check, border.raise

local FORMAT = 1

local M = { FORMAT = FORMAT }

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

--- What is wrong with the files of a checkpoint, every byte of which is read.
-- @tparam string folder
-- @tparam table m its manifest
-- @treturn table array of messages
function M.faults(folder, m)
  local faults = {}
  for _, entry in ipairs(m.files) do
    local path = folder .. "/" .. entry.path
    local fault = size_fault(folder, { files = { entry } })
    if not fault then
      local f = files.file(path)
      local ok, hash = pcall(f.hash, f)
      f:close()
      fault = not ok and hash or hash ~= entry.hash
        and ("'%s' is damaged: its hash is %s and should be %s"):format(path, hash, entry.hash)
    end
    if fault then faults[#faults + 1] = fault end
  end
  return faults
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

-- ---- naming a finished folder, and what goes then

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

--- Gives the finished folder its name, and `latest` its content; then what they replaced goes.
-- @tparam string dir
-- @tparam string folder the temporary one
-- @tparam string tag
-- @tparam string hash the manifest's
-- @tparam table later what clean() gave
-- @tparam table options { save_latest, keep_last }
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


--- Raises, for who typed it, unless a folder is there.
function M.need(path)
  if not is_folder(path) then error(("the folder '%s' does not exist"):format(path), 0) end
end

M.check_tag, M.kind, M.is_folder, M.temporary, M.put = check_tag, kind, is_folder, temporary, put
M.manifest_text, M.read_latest, M.find = manifest_text, read_latest, find
M.clean, M.check_room, M.name_it = clean, check_room, name_it

return M
