--- What ranks do as one: meet at the same place, exchange text, succeed or fail together.
--
-- In a job of one rank all of it costs nothing.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local comm = require "ds.comm"

local C, check, raise = border.C, border.check, border.raise

local M = {}

local PLACE = 64 -- bytes of a place's name that are compared
local bytes = { dtype = "u8", device = "cpu" } -- wherever other tensors are

local function gather(out, mine, what)
  check(C.ds_all_gather(out._c, mine._c, comm.world(), nil), what)
end

local function bytes_of(text, size)
  local t = tensor.zeros(size, bytes)
  ffi.copy(t._c.data, text, math.min(#text, size))
  return t
end

--- Every rank's text.
-- @tparam string text
-- @treturn table texts, the first one rank 0's
function M.texts(text)
  local ranks = comm.world_size()
  if ranks == 1 then return { text } end
  return scope.no_grad(function()
    local lengths = tensor.zeros(ranks, { dtype = "i64", device = "cpu" })
    gather(lengths, tensor.tensor({ #text }, { dtype = "i64", device = "cpu" }))
    local numbers, most = lengths:tolist(), 1
    for _, n in ipairs(numbers) do most = math.max(most, n) end
    local all = tensor.zeros(ranks * most, bytes)
    gather(all, bytes_of(text, most))
    local out = {}
    for r = 1, ranks do
      out[r] = ffi.string(ffi.cast("char *", all._c.data) + (r - 1) * most, numbers[r])
    end
    return out
  end)
end

--- "rank 3", "ranks 0, 1".
local function ranks_text(list)
  return (#list == 1 and "rank " or "ranks ") .. table.concat(list, ", ")
end

local function differing(places)
  local at, order = {}, {}
  for i, place in ipairs(places) do
    if not at[place] then
      at[place] = {}
      order[#order + 1] = place
    end
    table.insert(at[place], i - 1)
  end
  local parts = {}
  for i, place in ipairs(order) do
    parts[i] = ("%s in %s"):format(ranks_text(at[place]), place)
  end
  return table.concat(parts, ", ")
end

--- Returns when every rank is at the same place; raises, on all of them, if they are not.
-- @tparam string place as "save_checkpoint(out, 7)"; the first 64 bytes are compared
function M.meet(place)
  local ranks = comm.world_size()
  if ranks == 1 then return end
  local same, places = true, {}
  scope.no_grad(function()
    local all = tensor.zeros(ranks * PLACE, bytes)
    gather(all, bytes_of(place, PLACE), place)
    for r = 0, ranks - 1 do
      local text = ffi.string(ffi.cast("char *", all._c.data) + r * PLACE, PLACE)
      places[r + 1] = text:match "^%Z*"
      same = same and places[r + 1] == places[1]
    end
  end)
  if not same then
    raise("the ranks are at different places: %s; every rank must make the same calls",
      differing(places))
  end
end

--- Runs f(…) on every rank. If it raises on one, all of them raise that message.
-- @treturn any what f returned on this rank, one value
function M.all(f, ...)
  if comm.world_size() == 1 then return (f(...)) end
  local ok, result = xpcall(f, border.note, ...)
  local texts = M.texts(ok and "" or "!" .. tostring(result))
  for r, text in ipairs(texts) do
    if text ~= "" then
      if not ok and r == comm.rank() + 1 then error(result, 0) end
      error(("rank %d: %s"):format(r - 1, text:sub(2)), 0)
    end
  end
  return result
end

--- Runs f(…) on rank 0 alone; its result, a string or nil, is everybody's, as is its error.
function M.first(f, ...)
  if comm.world_size() == 1 then return (f(...)) end
  local text = ""
  if comm.rank() == 0 then
    local ok, result = xpcall(f, border.note, ...)
    text = not ok and "!" .. tostring(result) or result and "=" .. result or "-"
  end
  text = M.texts(text)[1]
  if text:sub(1, 1) == "!" then error(text:sub(2), 0) end
  return text:sub(1, 1) == "=" and text:sub(2) or nil
end

return M
