--- Keeps the ranks' copies of a model the same: compared and sent out at the start, and checked
-- every so many steps if the config asks for it.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local json = require "ds.json"
local comm = require "ds.comm"
local together = require "ds.together"

local C, raise = border.C, border.raise

local M = {}

--- The order of keys in memory differs between processes, in JSON it does not.
local function describe(named, buffers, settings)
  local lines = {}
  local function add(kind, name, t)
    lines[#lines + 1] = ("%s '%s' %s %s%s"):format(kind, name, t.dtype,
      border.shape_string(t.shape), t.requires_grad and "" or ", frozen")
  end
  for _, e in ipairs(named) do add("parameter", e.name, e.parameter) end
  for _, e in ipairs(buffers) do add("buffer", e.name, e.buffer) end
  lines[#lines + 1] = "config " .. json.encode(settings, { name = "config" })
  return table.concat(lines, "\n")
end

local function first_difference(a, b)
  local next_a, next_b = a:gmatch "[^\n]+", b:gmatch "[^\n]+"
  while true do
    local x, y = next_a(), next_b()
    if x ~= y then return x or "nothing more", y or "nothing more" end
    if not x then return "the same", "the same" end
  end
end

--- Raises, on every rank, unless all have the same parameters in the same order and one config.
-- @tparam table named { name, parameter } of the model
-- @tparam table buffers { name, buffer }
-- @tparam table settings the completed config
function M.compare(named, buffers, settings)
  if comm.world_size() == 1 then return end
  local texts = together.texts(describe(named, buffers, settings))
  for r = 2, #texts do
    if texts[r] ~= texts[1] then
      local here, there = first_difference(texts[1], texts[r])
      raise("initialize: the ranks differ: rank 0 has %s; rank %d has %s", here, r - 1, there)
    end
  end
end

local function send(t)
  if t._c.dense == 1 then return comm.broadcast(t, 0) end
  local dense = comm.broadcast(t:contiguous(), 0)
  tensor.run("copy", t.device, t._c, dense._c)
end

--- Gives every rank the parameters and buffers of rank 0.
function M.send_out(named, buffers)
  if comm.world_size() == 1 then return end
  scope.no_grad(function()
    for _, e in ipairs(named) do
      if not e.parameter._unit then send(e.parameter) end -- else ds.zero.init has
    end
    for _, e in ipairs(buffers) do send(e.buffer) end
  end)
end

--- One seed for the job, rank 0's; from it a sequence of random numbers for each rank.
-- @tparam number seed
-- @treturn number rank 0's
function M.share_seed(seed)
  return tonumber(together.texts(("%.17g"):format(seed))[1])
end

--- The seed of this rank's random numbers (dropout, say): another one on every rank, so that ranks
-- do not drop the same elements of their batches.
function M.seed_of(seed, rank)
  return (seed + rank * 0x9E3779B97) % 2 ^ 53
end

--- Raises, on every rank, if their weights differ.
-- @tparam table tensors flat buffers
-- @tparam number step for the message
function M.check(tensors, step)
  if comm.world_size() == 1 then return end
  local hashes, buffer = {}, ffi.new("char[17]")
  for i, t in ipairs(tensors) do
    local host = t.device == "cpu" and t or t:to("cpu")
    C.ds_hash(buffer, host._c.data, host:numel() * host:element_size())
    hashes[i] = ffi.string(buffer)
  end
  local texts, bad = together.texts(table.concat(hashes, " ")), {}
  for r = 2, #texts do
    if texts[r] ~= texts[1] then bad[#bad + 1] = r - 1 end
  end
  if #bad > 0 then
    raise("step %d: the weights of rank %s are not those of rank 0; something changed them outside "
      .. "engine:step(), or a rank's memory is faulty", step, table.concat(bad, ", "))
  end
end

return M
