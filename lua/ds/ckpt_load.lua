--- Loading a checkpoint: opened and checked whole, then read tensor by tensor or all at once.
--
-- Usually every byte is checked against the manifest's hashes before anything is handed out, which
-- reads the files twice, the second time out of the page cache. Where nothing can be lost, by an
-- engine that has made no step, fill() reads them once, and checks them on the way.

local border = require "ds.ffi"
local json = require "ds.json"
local files = require "ds.saveload"
local folders = require "ds.ckpt_folder"
local offload = require "ds.offload"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local comm = require "ds.comm"
local together = require "ds.together"

local C, raise = border.C, border.raise
local is_folder, check_tag = folders.is_folder, folders.check_tag

local M = {}

local Saved = {}
Saved.__index = Saved

--- What to do about a checkpoint that can't be loaded. `broken`: a tag not to advise.
local function advice(dir, broken)
  local whole = {}
  for _, item in ipairs(folders.list(dir)) do
    if not item.fault and item.tag ~= broken then whole[#whole + 1] = item.tag end
  end
  if #whole == 0 then
    return ("; there is no other checkpoint in '%s' that looks whole"):format(dir)
  end
  return ("; these look whole: %s; load one by its name: load_checkpoint(%q, %q)"):format(
    table.concat(whole, ", "), dir, whole[#whole])
end

local function damaged(path, hash, entry)
  raise("load_checkpoint: '%s' is damaged: its hash is %s and should be %s", path, hash, entry.hash)
end

--- Opens a file of the manifest; `whole`: compares all of it.
local function open_checked(folder, entry, whole)
  local path = folder .. "/" .. entry.path
  local f = files.file(path, "load_checkpoint")
  if f.bytes ~= entry.bytes then
    raise("load_checkpoint: '%s' has %d bytes and should have %d", path, f.bytes, entry.bytes)
  end
  local hash = whole and f:hash() or entry.hash
  if hash ~= entry.hash then damaged(path, hash, entry) end
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
-- @tparam table only which parts' tensors; nil: all
-- @tparam string|nil when "never": all bytes have just been checked; "later": fill() checks tensors
-- as it reads them
local function open_all(saved, manifest, only, when)
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
      local f = open_checked(saved.path, entry, not part or not when and i % ranks == rank)
      if part then
        found[entry.path], f.manifest_entry = f:parse(), entry
      end
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
    latest, why = folders.read_latest(dir)
    if not latest and not why then return nil end
    if why then raise("load_checkpoint: %s%s", why, advice(dir)) end
    tag, hash = latest.tag, latest.hash
  end
  tag = check_tag(tag, "load_checkpoint")
  if not is_folder(dir) then raise("load_checkpoint: the folder '%s' does not exist", dir) end
  local folder, manifest = folders.find(dir, tag, hash)
  if not folder then
    raise("load_checkpoint: %s%s%s", manifest, hash and (", and '%s/latest' names it"):format(dir)
      or "", advice(dir))
  end
  return json.encode { folder = folder, tag = tag, manifest = manifest }
end

--- Opens a checkpoint and checks every byte of it; the ranks share that work.
-- @tparam string dir
-- @tparam[opt] string|number tag default: what `latest` names
-- @tparam[opt] table options `only` = { "weights" }: leave the other tensors alone, unread;
-- `check`: "never", if all bytes have just been checked, or "later": fill() does it while it reads
-- @treturn table|nil `path`, `tag`, `manifest`, `state`, `client_state`, `names` = { weights = {…},
--   optim = {…} }, and the methods below; nil if no tag is given and there is no `latest`
function M.load(dir, tag, options)
  local found = together.first(look_up, dir, tag)
  if not found then return nil end
  found = json.decode(found, "the manifest")
  local only
  for _, part in ipairs(options and options.only or {}) do
    only = only or {}
    only[part] = true
  end
  local saved = setmetatable({ dir = dir, path = found.folder, tag = found.tag,
    manifest = found.manifest,
    unchecked = options and options.check == "later",
    names = { weights = {}, optim = {} }, _in = { weights = {}, optim = {} }, _files = {} }, Saved)
  local ok, message = xpcall(together.all, border.note, open_all, saved, found.manifest, only,
    options and options.check)
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

local function lacks(saved, name, first, stop)
  raise("load_checkpoint: '%s' lacks elements %d to %d of '%s'", saved.path, first, stop - 1, name)
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
  if next < stop then lacks(saved, name, next, stop) end
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

--- Fills a tensor, or a vector on a disk, with the elements of a dense one from `from` on.
local function put(t, dense, from)
  local flat = dense:view(-1)
  offload.each(t, function(part, first)
    tensor.run("copy", part.device, part._c,
      tensor.view.slice_flat(flat, from + first, part.shape)._c)
  end, true)
end

--- A matrix's transpose, or a stretch of it, out of the matrix.
local function take_transposed(matrix, t, from)
  local whole = matrix:t()
  if not from then return tensor.run("copy", t.device, t._c, whole._c) end
  local dense = tensor.new(whole.shape, matrix.dtype, "cpu")
  tensor.run("copy", "cpu", dense._c, whole._c)
  put(t, dense, from)
end

--- What is wanted of each file, by file and entry's name: a list of { first, last, want, to = }:
-- elements `first` to `last` - 1 of the entry go to `to` and on in want's tensor. Of a matrix that
-- is to be transposed all are wanted.
local function needs_of(saved, plan)
  local needs = {}
  for _, want in ipairs(plan) do
    local from = not want.transposed and want.from or 0
    local stop, next = from + want[3]:numel(), from
    if want.transposed then stop = tensor.numel_of(select(2, saved:info(want[1], want[2]))) end
    for _, piece in ipairs(pieces_of(saved, want[1], want[2])) do
      local first, last = math.max(from, piece.first), math.min(stop, piece.stop)
      if first == next and first < last then
        next = last
        local of_file = needs[piece.file] or {}
        needs[piece.file] = of_file
        of_file[piece.entry] = of_file[piece.entry] or {}
        table.insert(of_file[piece.entry], { first - piece.first, last - piece.first, want,
          to = first - from })
      end
    end
    if next < stop then lacks(saved, want[2], next, stop) end
  end
  for _, of_file in pairs(needs) do
    for _, list in pairs(of_file) do
      table.sort(list, function(a, b) return a[1] < b[1] end)
    end
  end
  return needs
end

--- Reads a stretch that comes next into its place, by way of another tensor where it has another
-- dtype or lies elsewhere.
local function take(s, need, dtype, shape)
  local want = need[3]
  local t = want[3]
  local n, direct = need[2] - need[1], not want.transposed and not offload.is_stored(t)
    and t.device == "cpu" and t.dtype == dtype and t._c.dense == 1
  if direct then
    return s:read(tensor.view.slice_flat(t:view(-1), need.to, { n }))
  end
  local copy = tensor.new(want.transposed and shape or { n }, dtype, "cpu")
  s:read(copy)
  if want.transposed then return take_transposed(copy, t, want.from) end
  put(n == t:numel() and t or offload.slice(t, need.to, { n }), copy, 0)
end

--- Reads a file once, what is wanted of it into place, and checks it on the way.
local function stream(f, needs)
  local s = files.stream(f.path, "load_checkpoint")
  for _, name in ipairs(f.names) do
    local dtype, shape = f:info(name)
    local entry = f.entries[name].entry
    local size = tonumber(C.ds_dtype_size(tensor.codes[dtype]))
    for _, need in ipairs(needs[name] or {}) do
      s:pass(tonumber(entry.offset) + need[1] * size)
      scope.run(take, s, need, dtype, shape)
    end
  end
  local hash = s:finish()
  if hash ~= f.manifest_entry.hash then damaged(f.path, hash, f.manifest_entry) end
end

--- Which rank reads each file: its number, if at most one needs it, else nil.
local function readers_of(saved, needs)
  local mine, readers, ranks = {}, {}, comm.world_size()
  for i, f in ipairs(saved._files) do mine[i] = needs[f] and "1" or "0" end
  local all = together.texts(table.concat(mine))
  for i in ipairs(saved._files) do
    local n, reader = 0, i % ranks
    for r = 1, ranks do
      if all[r]:sub(i, i) == "1" then n, reader = n + 1, r - 1 end
    end
    readers[i] = n < 2 and reader or nil
  end
  return readers
end

--- Fills what a load has not checked yet: a file that one rank needs is read once, by it, and
-- checked on the way; one that several need is checked by one of them: the page cache has it then.
-- @treturn table the files that several need: [file] = true; they are not read yet
local function fill_unchecked(saved, plan)
  local needs, ranks, rank = needs_of(saved, plan), comm.world_size(), comm.rank()
  local readers = readers_of(saved, needs)
  together.all(function()
    for i, f in ipairs(saved._files) do
      if not readers[i] and i % ranks == rank then
        local hash = f:hash()
        if hash ~= f.manifest_entry.hash then damaged(f.path, hash, f.manifest_entry) end
      end
    end
  end)
  local shared = {}
  together.all(function()
    for i, f in ipairs(saved._files) do
      if not readers[i] then shared[f] = true end
      if readers[i] == rank then stream(f, needs[f] or {}) end
    end
  end)
  saved.unchecked = false
  return shared
end

local function read_transposed(saved, want)
  local dtype, shape = saved:info(want[1], want[2])
  take_transposed(saved:read(want[1], want[2], tensor.new(shape, dtype, "cpu")), want[3], want.from)
end

--- Whether fill_unchecked() has read all of what is wanted.
local function came(saved, want, shared)
  if not shared then return false end
  for _, piece in ipairs(pieces_of(saved, want[1], want[2])) do
    if shared[piece.file] then return false end
  end
  return true
end

--- Fills tensors, or vectors on a disk, each as read() does, in any order. Every rank calls it.
-- With load()'s `check` = "later" the checkpoint is checked meanwhile: after an error the tensors
-- hold anything.
-- @tparam table plan { part, name, tensor, from =, transposed = }…: `transposed`: the tensor is, or
-- has elements of, the transpose of the saved matrix
function Saved:fill(plan)
  local ok, message = xpcall(function()
    local shared = self.unchecked and fill_unchecked(self, plan)
    together.all(function()
      for _, want in ipairs(plan) do
        if not came(self, want, shared) then
          if want.transposed then
            scope.run(read_transposed, self, want)
          else
            offload.each(want[3], function(t, first)
              self:read(want[1], want[2], t, { from = want.from and want.from + first })
            end, true)
          end
        end
      end
    end)
  end, border.note)
  if not ok then error(message .. advice(self.dir, self.tag), 0) end
end

--- Whether there is such a tensor.
function Saved:has(part, name) return self._in[part][name] ~= nil end

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
