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
-- ckpt_folder.lua tells how a folder becomes a checkpoint, whatever moment a machine stops at.
--
-- ckpt_load.lua reads it.

local border = require "ds.ffi"
local json = require "ds.json"
local files = require "ds.saveload"
local folders = require "ds.ckpt_folder"
local offload = require "ds.offload"
local tensor = require "ds.tensor"
local comm = require "ds.comm"
local together = require "ds.together"

local C, check, raise = border.C, border.check, border.raise
local kind, check_tag = folders.kind, folders.check_tag

local M = { list = folders.list, load = require("ds.ckpt_load").load }

local SHARD = 5e9          -- bytes; as Hugging Face's default
local LOCK_MS = 60 * 1000  -- waiting for another process that saves into the same folder
local SLACK = 2 ^ 20       -- bytes: headers, folders
local TOGETHER = 4 * 2 ^ 20 -- bytes of weights that are gathered at a time

-- ---- weights: files that several ranks write

--- Weights as lists of at most `limit` bytes, in the order given; a larger one is a list by itself.
local function split(weights, limit)
  local lists, bytes = { {} }, 0
  for _, item in ipairs(weights) do
    local n = files.bytes { item }
    if bytes > 0 and bytes + n > limit then
      lists[#lists + 1], bytes = {}, 0
    end
    table.insert(lists[#lists], item)
    bytes = bytes + n
  end
  return lists
end

--- Weights as files of at most `limit` bytes, each in the order in which it is written.
local function shards_of(weights, limit)
  local shards = split(weights, limit)
  for i, shard in ipairs(shards) do shards[i] = files.by_width(shard) end
  return shards
end

--- The same, in as many files as it takes to give every rank a share.
local function make_shards(weights, limit)
  limit = math.min(limit or SHARD, math.ceil(files.bytes(weights) / comm.world_size()))
  return shards_of(weights, math.max(1, limit))
end

--- The parts of shards `first` to `last` that are gathered at a time, one of each shard in turn, so
-- that all of their files grow. The same on every rank.
local function runs_of(shards, first, last)
  local parts, runs, more = {}, {}
  for i = first, last do parts[i] = split(shards[i], TOGETHER) end
  local k = 0
  repeat
    k, more = k + 1, false
    for i = first, last do
      if parts[i][k] then
        runs[#runs + 1], more = { shard = i, items = parts[i][k] }, true
      end
    end
  until not more
  return runs
end

local function parameters_of(items)
  local out = {}
  for _, item in ipairs(items) do out[#out + 1] = item.parameter end
  return out
end

local function just_call(_, f) return f() end

--- Writes weights into files, every so manieth this rank's; every rank calls it. No rank needs more
-- than a few parameters whole at a time.
-- @tparam table shards what make_shards() gave
-- @tparam function create create(i, shard) starts the file of a shard that is this rank's
-- @tparam function done done(i, writer) brings it to the disk
-- @tparam[opt] function gathered gathered(parameters, f) calls f() while they are whole; every rank
-- calls it alike
local function write_shards(shards, create, done, gathered)
  local moves = gathered ~= nil -- what was gathered goes again
  gathered = gathered or just_call
  local ranks, rank = comm.world_size(), comm.rank()
  for first = 1, #shards, ranks do
    local mine, last = first + rank, math.min(first + ranks - 1, #shards)
    local writer = together.all(function() return shards[mine] and create(mine, shards[mine]) end)
    local ok, message = true, nil
    for _, run in ipairs(runs_of(shards, first, last)) do
      gathered(parameters_of(run.items), function()
        if run.shard ~= mine or not ok then return end
        ok, message = xpcall(function()
          for _, item in ipairs(run.items) do writer:append(item, moves) end
        end, border.note)
      end)
    end
    together.all(function()
      if not ok then
        writer:discard()
        error(message, 0)
      end
      return writer and done(mine, writer)
    end)
  end
end

--- The index beside weights: which tensor lies in which file, as Hugging Face's tools want it.
local function index_text(shards, name)
  local size, map = 0, {}
  for i, shard in ipairs(shards) do
    size = size + files.bytes(shard)
    for _, item in ipairs(shard) do map[item[1]] = name(i, #shards) end
  end
  return json.encode({ metadata = { total_size = size }, weight_map = map }, { indent = 2 }) .. "\n"
end

local function shard_name(i, n) return ("model-%05d-of-%05d.safetensors"):format(i, n) end

--- Writes weights as other tools want them: `name`, or from 5 GB on NAME-00001-of-00002.safetensors
-- and so on, and their index. Every rank calls it. Files of those names are replaced, each at once.
-- @tparam string dir made if need be
-- @tparam string name of the file, as "model.safetensors"
-- @tparam table weights items as in M.save()
-- @tparam table options `what`: the caller, for messages; `gathered` as in M.save();
-- `max_shard_bytes`
function M.write_weights(dir, name, weights, options)
  local stem = name:match "^(.+)%.safetensors$"
  if not stem or name:find("/", 1, true) then
    raise("%s: %q can't name the weights; a name without a folder that ends in .safetensors can",
      options.what, name)
  end
  local shards = shards_of(weights, options.max_shard_bytes or SHARD)
  local function file_name(i, n)
    return n == 1 and name or ("%s-%05d-of-%05d.safetensors"):format(stem, i, n)
  end
  together.first(function() check(C.ds_folder_make(dir), options.what) end)
  write_shards(shards, function(i, shard)
    return files.create(dir .. "/" .. file_name(i, #shards), shard, { meta = { "format", "pt" },
      what = options.what, replace = true })
  end, function(_, writer) writer:commit() end, options.gathered)
  together.first(function()
    local text = index_text(shards, file_name)
    check(C.ds_file_put(dir .. "/" .. name .. ".index.json", text, #text, 1, nil), options.what)
  end)
end

-- ---- saving

--- The entry of a written file in the manifest.
local function entry_of(folder, path, hash)
  local f = files.file(folder .. "/" .. path)
  local bytes = f.bytes
  f:close()
  return { path = path, bytes = bytes, hash = hash }
end

--- Whether some are vectors on a disk, which the next update overwrites there.
local function on_disk(items)
  for _, item in ipairs(items) do
    if offload.is_stored(item[2]) then return true end
  end
  return false
end

--- Writes this rank's files and brings them to the disk, or begins to.
local function write_own(save, content)
  local folder = save.folder
  local function create(path, list, background)
    return files.create(folder .. "/" .. path, list, { meta = { "format", "pt" },
      what = "save_checkpoint", background = background })
  end
  local function done(path, writer)
    save.own[#save.own + 1] = { path = path, hash = writer:commit() }
  end
  local function weight_path(i) return "weights/" .. shard_name(i, #save.shards) end
  -- what is gathered goes as soon as it is written
  local later = not content.gathered and save.background or nil
  write_shards(save.shards,
    function(i, shard) return create(weight_path(i), shard, later) end,
    function(i, writer) done(weight_path(i), writer) end, content.gathered)
  together.all(function()
    if #content.optim == 0 then return end
    local path = ("optim/rank-%d.safetensors"):format(comm.rank())
    local writer = create(path, content.optim, not on_disk(content.optim) and save.background)
    for _, item in ipairs(writer.list) do writer:append(item) end
    done(path, writer)
  end)
end

--- Entries of this rank's files, which are on the disk now, as JSON.
local function own_entries(save)
  local entries = json.array {}
  for i, own in ipairs(save.own) do
    local hash = type(own.hash) == "function" and own.hash() or own.hash
    entries[i] = entry_of(save.folder, own.path, hash)
  end
  check(C.ds_folder_sync(save.folder .. "/weights"))
  check(C.ds_folder_sync(save.folder .. "/optim"))
  return json.encode(entries)
end

--- Writes what there is once: index, state and, last, the manifest.
-- @tparam table save
-- @tparam table lists the entries of each rank's files, as JSON
-- @treturn string the manifest's hash
local function write_rest(save, lists)
  local folder, written = save.folder, {}
  local function note(path, text)
    written[#written + 1] = entry_of(folder, path, folders.put(folder .. "/" .. path, text))
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
  note("weights/model.safetensors.index.json", index_text(save.shards, shard_name))
  check(C.ds_folder_sync(folder .. "/weights"))
  note("state.json", save.state_text)
  local manifest = folders.manifest_text { format = folders.FORMAT, tag = save.tag,
    step = save.step, world_size = save.world_size, files = written }
  folders.put(folder .. "/manifest.json", manifest)
  check(C.ds_folder_sync(folder))
  return manifest:match('"(%x+)",\n')
end

--- Bytes that all ranks together will write.
local function bytes_needed(content, state)
  local total = files.bytes(content.weights) + #state + SLACK
  for _, n in ipairs(together.texts(("%d"):format(files.bytes(content.optim)))) do
    total = total + tonumber(n)
  end
  return total
end

--- On rank 0: what is there is cleaned up, and a temporary folder made.
local function make_folder(save, need)
  local dir = save.dir
  check(C.ds_folder_make(dir))
  save.lock = C.ds_folder_lock(dir, LOCK_MS)
  if save.lock ~= C.DS_FOLDER_NO_LOCK then check(save.lock, "save_checkpoint") end
  save.later = folders.clean(dir, save.lock >= 0)
  folders.check_room(dir, save.tag, need)
  local path = folders.temporary(dir)
  check(C.ds_folder_make(path .. "/weights"))
  check(C.ds_folder_make(path .. "/optim"))
  return path
end

--- The end of a save, good or bad. Once the folder was to get its name, its temporary one may be
-- that of the checkpoint which `latest` means.
local function let_go(save, failed)
  if save.background then save.background:close() end
  if failed and save.folder and not save.named and comm.rank() == 0 then
    C.ds_remove(save.folder)
  end
  if save.lock >= 0 then C.ds_folder_unlock(save.lock) end
  save.lock = -1
end

--- Calls f(…) for a save that is given up if that raises.
local function attempt(save, f, ...)
  local ok, message = xpcall(f, border.note, ...)
  if ok then return end
  let_go(save, true)
  error(message, 0)
end

local function begin(save, content)
  local need = bytes_needed(content, save.state_text)
  save.folder = together.first(make_folder, save, need)
  save.shards = make_shards(content.weights, save.options.max_shard_bytes)
  write_own(save, content)
  if save.background then together.all(save.background.start, save.background) end
end

--- All files of all ranks are written: they become a checkpoint.
local function complete(save)
  local lists = together.texts(together.all(own_entries, save))
  local hash = together.first(write_rest, save, lists)
  save.named = true
  together.first(folders.name_it, save.dir, save.folder, save.tag, hash, save.later, save.options)
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

-- ---- a save in the background

local Save = {}
Save.__index = Save

--- What this rank's part has come to: 1 it is being written, 0 it is on the disk, 2 it failed.
function Save:state() return self.background:state() end

--- Before anything that is saved changes: what is not written yet is copied, or waited for.
function Save:release() self.background:release(self.options.background.most) end

--- Waits for all ranks' parts and makes a checkpoint of them. Every rank calls it; raises on all of
-- them if one could not write, and the last checkpoint is the one before.
-- @treturn table what the background has to tell: bytes, seconds …
function Save:finish()
  attempt(self, together.all, self.background.wait, self.background)
  local statistics = self.background:statistics()
  attempt(self, complete, self)
  let_go(self)
  return statistics
end

--- Gives it up, on this rank alone: what was written stays under its temporary name, until the next
-- save.
function Save:drop()
  self.named = true
  let_go(self, true)
end

--- Saves a checkpoint as dir/tag. When it returns, all of it is on the disk.
-- @tparam string dir
-- @tparam string|number tag
-- @tparam table content
--   weights       { { name, tensor, transposed =, parameter = }… }: `transposed`: it lies so in the
--                 file; `parameter`: what is to be gathered for it
--   optim         { { name, tensor }… }: what this rank saves of the optimizer
--   state         plain table; its global_steps and world_size go into the manifest
--   client_state  plain table
--   gathered      gathered(parameters, f) calls f() while they are whole; nil: they are
-- @tparam[opt] table options `keep_last`: how many to keep; `save_latest` = false: `latest` stays;
--   `max_shard_bytes`; `background` = { most = bytes that release() may copy }: it returns a Save
--   while a thread writes, whose finish() every rank calls
-- @treturn boolean|Save true; raises when it failed, and then nothing is lost
function M.save(dir, tag, content, options)
  options = options or {}
  tag = check_tag(tag, "save_checkpoint")
  if options.keep_last and not (type(options.keep_last) == "number" and options.keep_last >= 1) then
    raise("save_checkpoint: keep_last must be 1 or more, not %s", tostring(options.keep_last))
  end
  local state = content.state or {}
  local save = setmetatable({ dir = dir, tag = tag, options = options, lock = -1, own = {},
    background = options.background and files.background() or nil,
    step = state.global_steps or 0, world_size = state.world_size or 1,
    state_text = ('{ "format": %d,\n"client_state": %s,\n"state": %s }\n'):format(
      folders.FORMAT, encode(content.client_state or {}, "client_state"),
      encode(state, "state")) }, Save)
  content = { weights = content.weights or {}, optim = content.optim or {},
    gathered = content.gathered }
  attempt(save, begin, save, content)
  if save.background then return save end
  attempt(save, complete, save)
  let_go(save)
  return true
end

return M
