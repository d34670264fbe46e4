--- `dsrun inspect DIR [--tag TAG] [--json]`: which checkpoints a folder has, and one of them in
-- full, every byte of it checked. Ends with 1 if that one is not whole.

local border = require "ds.ffi"
local cli = require "ds.cli"
local json = require "ds.json"
local ckpt = require "ds.ckpt"
local folders = require "ds.ckpt_folder"
local tensor = require "ds.tensor"
local size = tensor.bytes_string

local C = border.C

local M = {}

--- All tensors of an open checkpoint.
-- @treturn table array of { part, name, dtype, shape, bytes }
local function tensors_of(saved)
  local out = {}
  for _, part in ipairs { "weights", "optim" } do
    for _, name in ipairs(saved.names[part]) do
      local dtype, shape = saved:info(part, name)
      out[#out + 1] = { part = part, name = name, dtype = dtype, shape = json.array(shape),
        bytes = tensor.numel_of(shape) * tonumber(C.ds_dtype_size(tensor.codes[dtype])) }
    end
  end
  return out
end

--- Everything about one checkpoint.
-- @treturn table its fields are those of the JSON; without tensors and state if it is not whole
local function describe(dir, tag)
  local folder, m = folders.find(dir, tag)
  if not folder then return { tag = tag, faults = json.array { m } } end
  local out = { tag = tag, path = folder, step = m.step, world_size = m.world_size,
    files = json.array(m.files), faults = json.array(folders.faults(folder, m)) }
  if #out.faults > 0 then return out end
  local saved = ckpt.load(dir, tag, { check = "never" })
  local state = saved.state
  out.dtype, out.zero_stage = state.dtype, state.zero_stage
  out.optimizer = state.optimizer and state.optimizer.name
  out.client_state, out.tensors = saved.client_state, json.array(tensors_of(saved))
  saved:close()
  return out
end

local function ranks_string(n)
  return n and ("%d rank%s"):format(n, n == 1 and "" or "s") or ""
end

local function print_list(dir, list, latest)
  print(("%s: %d checkpoint%s"):format(dir, #list, #list == 1 and "" or "s"))
  for _, item in ipairs(list) do
    print(("%s %-24s step %-9d %-11s %9s%s"):format(item.tag == latest and "*" or " ", item.tag,
      item.step, ranks_string(item.world_size), size(item.bytes),
      item.fault and "  " .. item.fault or item.tag == latest and "  latest" or ""))
  end
end

--- Tensors as lines: of a parameter's vectors in the optimizer ("exp_avg/NAME"), one for all.
local function lines_of(tensors)
  local lines, of = {}, {}
  for _, t in ipairs(tensors) do
    local vector, name = t.name:match "^([%w_]+)/(.*)$"
    local line = t.part == "optim" and vector and of[name]
    if line then
      line.bytes = line.bytes + t.bytes
      table.insert(line.vectors, vector)
    else
      line = { part = t.part, name = t.name, dtype = t.dtype, shape = t.shape, bytes = t.bytes,
        vectors = {} }
      if t.part == "optim" and vector then
        line.name, line.vectors, of[name] = name, { vector }, line
      end
      lines[#lines + 1] = line
    end
  end
  return lines
end

local function print_one(c)
  print("\n" .. c.tag)
  if #c.faults > 0 then
    for _, fault in ipairs(c.faults) do print("  not whole: " .. fault) end
    return
  end
  local bytes = 0
  for _, f in ipairs(c.files) do bytes = bytes + f.bytes end
  for _, row in ipairs { { "step", c.step }, { "ranks", c.world_size },
    { "ZeRO stage", c.zero_stage }, { "dtype", c.dtype }, { "optimizer", c.optimizer },
    { "files", ("%d, %s: every byte matches its hash"):format(#c.files, size(bytes)) } } do
    if row[2] then print(("  %-11s %s"):format(row[1], row[2])) end
  end
  for _, f in ipairs(c.files) do
    print(("  %s  %12.0f  %s"):format(f.hash, f.bytes, f.path))
  end
  for _, t in ipairs(lines_of(c.tensors)) do
    local line = ("  %-8s %-52s %-5s %-16s %10s  %s"):format(t.part, t.name, t.dtype,
      border.shape_string(t.shape), size(t.bytes), table.concat(t.vectors, " "))
    print((line:gsub(" +$", "")))
  end
end

function M.run()
  local parser = cli.parser("inspect", "Shows the checkpoints in a folder, and one of them in "
    .. "full; reads and checks every byte of it.")
  parser:argument("folder", "folder of checkpoints")
  parser:option("--tag", "the one to show; default: what `latest` names")
  parser:flag("--json", "as JSON")
  local opt = parser:parse(_G.arg)
  folders.need(opt.folder)
  local list, latest, why = ckpt.list(opt.folder), folders.read_latest(opt.folder)
  latest = latest and latest.tag
  local tag = opt.tag and folders.check_tag(opt.tag, "inspect") or latest
  if not tag then
    error(why or ("'%s' has no checkpoint that `latest` names%s"):format(opt.folder,
      #list > 0 and "; choose one with --tag" or ""), 0)
  end
  local shown = describe(opt.folder, tag)
  if opt.json then
    for _, item in ipairs(list) do item.latest = item.tag == latest end
    print(json.encode({ folder = opt.folder, checkpoints = json.array(list), shown = shown },
      { indent = 2 }))
  else
    print_list(opt.folder, list, latest)
    print_one(shown)
  end
  if #shown.faults > 0 then os.exit(1) end
end

return M
