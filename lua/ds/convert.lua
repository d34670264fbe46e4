--- `dsrun convert DIR --to fp32|bf16|fp16 OUT [--tag TAG]`: the weights of a checkpoint as plain
-- safetensors with an index, which other tools open. What was trained comes from the fp32 master
-- copy, unless the weights have the wanted dtype already. No more than one tensor is in memory at a
-- time.

local cli = require "ds.cli"
local log = require "ds.log"
local ckpt = require "ds.ckpt"
local folders = require "ds.ckpt_folder"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local size = require("ds.env").size
local files = require "ds.saveload"

local M = {}

local dtypes = { fp32 = "f32", bf16 = "bf16", fp16 = "f16" }
local LARGEST = 65504 -- of fp16

--- The fp32 master copy of each weight that has one: { [name in weights/] = { name in optim/,
-- whether it lies transposed in weights/ } }.
local function masters_of(saved)
  local out, names = {}, saved.state.names or {}
  for _, key in ipairs(saved.names.optim) do
    local inner = key:match "^fp32/(.*)"
    if inner then
      local outer = names[inner] or { inner, false }
      out[outer[1]] = { key, outer[2] }
    end
  end
  return out
end

--- Values beyond what fp16 can hold become infinite: that is told once a tensor.
local function warn_infinite(name, t, told)
  if told[name] or t:float():abs():max():item() <= LARGEST then return end
  told[name] = true
  log.warning("convert: %s has values beyond %d, the largest of fp16: they become infinite; --to "
    .. "bf16 keeps them", name, LARGEST)
end

--- An item for ckpt.write_weights() that reads its values when they are wanted.
local function item_of(saved, name, to, master, told)
  local dtype, shape = saved:info("weights", name)
  local target = tensor.floating[dtype] and to or dtype
  local meta = tensor.empty(shape, { dtype = target, device = "meta" })
  local part, source = "weights", name
  if target ~= dtype and master then part, source = "optim", master[1] end
  local transposed = part == "optim" and master[2]
  local from_dtype = saved:info(part, source)
  local whole
  return { name, meta, load = function(first, n)
    local t
    if transposed then -- one stretch after the other, of what is read once
      if first == 0 then
        whole = tensor.new(shape, from_dtype, "cpu"):keep()
        saved:fill { { part, source, whole, transposed = true } }
      end
      t = tensor.view.slice_flat(whole:view(-1), first, { n })
    else
      t = saved:read(part, source, tensor.new({ n }, from_dtype, "cpu"), { from = first })
    end
    if target == "f16" then warn_infinite(name, t, told) end
    if transposed and first + n == meta:numel() then -- t keeps the memory while it needs it
      scope.release(whole, "after it was converted")
    end
    return t:to(target)
  end }
end

function M.run()
  local parser = cli.parser("convert", "Writes the weights of a checkpoint as plain safetensors "
    .. "with an index, under the names that Hugging Face's tools want.")
  parser:argument("folder", "folder of checkpoints")
  parser:argument("out", "folder to write to")
  parser:option("--to", "dtype of the weights", "fp32"):choices { "fp32", "bf16", "fp16" }
  parser:option("--tag", "which checkpoint; default: what `latest` names")
  local opt = parser:parse(_G.arg)
  folders.need(opt.folder)
  local saved = ckpt.load(opt.folder, opt.tag)
  if not saved then
    error(("'%s' has no checkpoint that `latest` names; choose one with --tag"):format(
      opt.folder), 0)
  end
  local masters, weights, told, rounded = masters_of(saved), {}, {}, 0
  for _, name in ipairs(saved.names.weights) do
    local dtype = saved:info("weights", name)
    if opt.to == "fp32" and tensor.floating[dtype] and dtype ~= "f32" and not masters[name] then
      rounded = rounded + 1
    end
    weights[#weights + 1] = item_of(saved, name, dtypes[opt.to], masters[name], told)
  end
  if rounded > 0 then
    log.info("convert: of %d of %d tensors there is no fp32 copy, as they are not trained: they "
      .. "are what they were rounded to", rounded, #weights)
  end
  ckpt.write_weights(opt.out, "model.safetensors", weights, { what = "convert" })
  print(("%s -> %s: %d tensors, %s, %s"):format(saved.path, opt.out, #weights, opt.to,
    size(files.bytes(weights))))
  saved:close()
end

return M
