-- Every collective, dtype, reduction and size, against what each rank works out for itself: sums in
-- the order of the ranks, in f32, rounded once. So shared memory and messages give the same bits.

local ffi = require "ffi"
local ds = require "ds"
local harness = require "harness"
local border = require "ds.ffi"
local comm = require "ds.comm"

local C, check = border.C, border.check
local case, same, fails = harness.case, harness.same, harness.fails
local uneven = harness.uneven
local rank, size = ds.rank(), ds.world_size()

local floats = { f32 = true, bf16 = true, f16 = true, f64 = true }
local dtypes = { "f32", "bf16", "f16", "f64", "i64", "i32", "u8", "bool" }
local ops = { "sum", "mean", "max", "min" }
local codes = { f32 = C.DS_F32, bf16 = C.DS_BF16, f16 = C.DS_F16 }
local sizes = { 0, 1, 3, 17, 300007 } -- the last: several chunks
local shares = { 0, 1, 3, 17, 70001 } -- a rank's, where there is one for each

local function has(dtype, op)
  return floats[dtype] or (op ~= "mean" and not (dtype == "bool" and op == "sum"))
end

--- What rank r has: `n` numbers that any other rank can make as well.
local cache = {}
local function values(r, n, dtype)
  local key = r .. " " .. n .. " " .. dtype
  if cache[key] then return cache[key] end
  ds.seed(1000 + r)
  local x
  if floats[dtype] then
    x = ds.randn(n, { dtype = dtype })
  elseif dtype == "bool" then
    x = ds.rand(n):gt(0.5)
  else
    x = ds.randint(0, 50, { n }, { dtype = dtype })
  end
  cache[key] = x
  return x
end

local joins = {
  max = function(a, b) return a:maximum(b) end,
  min = function(a, b) return a:minimum(b) end,
}

--- The reduction of all ranks' values, wide until the end.
local function reduced(n, dtype, op, scale)
  local wide = (dtype == "bf16" or dtype == "f16") and "f32" or dtype == "bool" and "u8" or dtype
  local y = values(0, n, dtype):to(wide)
  for r = 1, size - 1 do
    local x = values(r, n, dtype):to(wide)
    y = joins[op] and joins[op](y, x) or y + x
  end
  if op == "mean" then y = y / size end
  if scale then y = y * scale end
  return y:to(dtype)
end

local function each(lengths, f)
  for _, dtype in ipairs(dtypes) do
    for _, n in ipairs(lengths) do
      cache = {}
      f(dtype, n)
    end
  end
end

case("all_reduce", function()
  each(sizes, function(dtype, n)
    for _, op in ipairs(ops) do
      if has(dtype, op) then
        local t = values(rank, n, dtype):clone()
        ds.all_reduce(t, op)
        same(t, reduced(n, dtype, op), ("all_reduce %s of %s [%d]"):format(op, dtype, n))
      end
    end
  end)
end)

case("reduce_scatter", function()
  each(shares, function(dtype, n)
    for _, op in ipairs(ops) do
      if has(dtype, op) then
        local got = ds.reduce_scatter(values(rank, n * size, dtype), op)
        local want = n == 0 and got or reduced(n * size, dtype, op):narrow(1, rank * n + 1, n)
        same(got, want, ("reduce_scatter %s of %s [%d]"):format(op, dtype, n))
      end
    end
  end)
end)

case("all_gather, broadcast, all_to_all", function()
  each(shares, function(dtype, n)
    local all, text = ds.all_gather(values(rank, n, dtype)), (" of %s [%d]"):format(dtype, n)
    for r = 0, size - 1 do
      same(all:select(1, r + 1), values(r, n, dtype), "all_gather" .. text)
    end
    for root = 0, size - 1, math.max(1, size - 1) do
      local t = values(rank, n, dtype):clone()
      ds.broadcast(t, root)
      same(t, values(root, n, dtype), "broadcast" .. text)
    end
    local got = ds.all_to_all(values(rank, n * size, dtype))
    for r = 0, n > 0 and size - 1 or -1 do
      same(got:narrow(1, r * n + 1, n), values(r, n * size, dtype):narrow(1, rank * n + 1, n),
        "all_to_all" .. text)
    end
  end)
end)

case("tensors with gaps", function()
  local t = ds.full({ 4, 3 }, rank)
  ds.all_reduce(t:select(2, 2), "max")
  same(t:select(2, 2):contiguous(), ds.full({ 4 }, size - 1), "column")
  same(t:select(2, 1):contiguous(), ds.full({ 4 }, rank), "its neighbour")
end)

case("NaN wins", function()
  local t = ds.full({ 5 }, rank == size - 1 and 0 / 0 or 1)
  for _, op in ipairs(ops) do
    local x = ds.all_reduce(t:clone(), op):tolist()
    for i = 1, 5 do assert(x[i] ~= x[i], op) end
  end
end)

-- ---- parts

local function equal_parts(n)
  local borders = ffi.new("int64_t[?]", size + 1)
  for r = 1, size do borders[r] = math.floor(n * r / size) end
  return borders
end

local function part(t, borders, r)
  local from, to = tonumber(borders[r]), tonumber(borders[r + 1])
  return to > from and t:narrow(1, from + 1, to - from) or ds.empty(0, { dtype = t.dtype })
end

local function one_of_parts(dtype, n, make_borders)
  local borders, world = make_borders(n), comm.world()
  local t = values(rank, n, dtype):clone()
  check(C.ds_reduce_parts(t._c, borders, C.DS_SUM, 1, -1, world, nil))
  local want = reduced(n, dtype, "sum")
  local text = (" of %s [%d]"):format(dtype, n)
  local given, out = values(rank, n, dtype), part(t, borders, rank):clone()
  local before = given:clone()
  check(C.ds_reduce_part(out._c, given._c, borders, C.DS_SUM, 1, -1, world, nil))
  same(out, part(want, borders, rank), "reduce_part" .. text)
  same(given, before, "what reduce_part was given" .. text)
  same(part(t, borders, rank), part(want, borders, rank), "reduce_parts" .. text)
  check(C.ds_gather_parts(t._c, borders, world, nil))
  same(t, want, "gather_parts" .. text)
end

case("parts, even and uneven", function()
  each(sizes, function(dtype, n)
    if has(dtype, "sum") then
      one_of_parts(dtype, n, equal_parts)
      one_of_parts(dtype, n, uneven)
    end
  end)
end)

case("what is outside the borders stays", function()
  local t, borders = ds.full({ 10 }, rank + 1), ffi.new("int64_t[?]", size + 1)
  for r = 0, size do borders[r] = 3 + r end
  check(C.ds_gather_parts(t._c, borders, comm.world(), nil))
  local got = t:tolist()
  for i = 1, 10 do
    local inside = i > 3 and i <= 3 + size
    assert(got[i] == (inside and i - 3 or rank + 1), i)
  end
end)

case("a scale, before it is rounded", function()
  for _, dtype in ipairs { "f32", "bf16", "f16" } do
    for _, n in ipairs(sizes) do
      local t, world = values(rank, n, dtype):clone(), comm.world()
      check(C.ds_all_reduce_scaled(t._c, t._c, C.DS_SUM, 0.25, -1, world, nil))
      same(t, reduced(n, dtype, "sum", 0.25), "scaled " .. dtype)
    end
  end
end)

case("a narrower type on the wire", function()
  for _, pair in ipairs { { "f32", "bf16" }, { "f32", "f16" }, { "bf16", "f16" } } do
    local dtype, wire = pair[1], pair[2]
    for _, n in ipairs(sizes) do
      local t, world = values(rank, n, dtype):clone(), comm.world()
      local want = values(0, n, dtype):to(wire):to "f32"
      for r = 1, size - 1 do want = want + values(r, n, dtype):to(wire):to "f32" end
      check(C.ds_all_reduce_scaled(t._c, t._c, C.DS_SUM, 1, codes[wire], world, nil))
      if size > 1 then same(t, want:to(dtype), dtype .. " as " .. wire) end
    end
  end
  local t = values(rank, 17, "bf16"):clone() -- a wider one changes nothing
  check(C.ds_all_reduce_scaled(t._c, t._c, C.DS_SUM, 1, C.DS_F32, comm.world(), nil))
  same(t, reduced(17, "bf16", "sum"), "bf16 as f32")
end)

-- ---- counters, groups, messages

case("counters", function()
  local before, t = ds.comm_stats(), ds.zeros(12 * 1024)
  ds.all_reduce(t)
  local after = ds.comm_stats()
  assert(after.collectives - before.collectives == 1)
  assert(after.bytes - before.bytes == 2 * (size - 1) / size * 4 * 12 * 1024)
end)

case("a rank that comes late", function()
  for late = 0, size - 1 do
    local until_then = C.ds_seconds() + 0.05
    while rank == late and C.ds_seconds() < until_then do end
    ds.barrier()
  end
end)

case("groups", function()
  local g = ds.group(rank % 2, -rank) -- even and odd, the highest first
  local members = math.ceil((size - rank % 2) / 2)
  assert(g:world_size() == members and g:rank() == members - 1 - math.floor(rank / 2))
  assert(g:local_size() == members and g:local_rank() == g:rank())
  local all = g:all_gather(ds.full({ 2 }, rank, { dtype = "i64" })):tolist()
  for i, row in ipairs(all) do assert(row[1] == rank % 2 + 2 * (members - i)) end
  local sum = g:all_reduce(ds.full({ 100000 }, rank + 1))
  local want = 0
  for r = rank % 2, size - 1, 2 do want = want + r + 1 end
  same(sum, ds.full({ 100000 }, want), "sum of a group")
  assert(g:comm_stats().collectives == 2)
  local half = g:group(g:rank() % 2, 0) -- of a group
  half:barrier()
  local none = ds.group(rank == 0 and 0 or nil)
  assert((none ~= nil) == (rank == 0))
  if none then none:all_reduce(ds.ones(3)) end
  fails("there is no rank " .. members .. "; the group has " .. members, g.broadcast, g, sum,
    members)
  for _ = 1, 20 do ds.group(0):barrier() end
  collectgarbage()
end)

case("send and recv", function()
  for _, n in ipairs(sizes) do
    if rank == 0 then
      for r = 1, size - 1 do ds.send(values(r, n, "f32"), r) end
    else
      same(ds.recv(ds.empty(n), 0), values(rank, n, "f32"), "recv")
    end
  end
end)

case("everyone sends to everyone at once", function()
  local n, works, into = 300007, {}, {}
  for r = 0, size - 1 do
    if r ~= rank then
      into[r] = ds.empty(n)
      works[#works + 1] = ds.irecv(into[r], r)
      works[#works + 1] = ds.isend(values(rank, n, "f32"), r)
    end
  end
  ds.barrier() -- messages go on while ranks are elsewhere
  while #works > 0 and not works[#works]:done() do end
  for _, work in ipairs(works) do work:wait() end
  for r, t in pairs(into) do same(t, values(r, n, "f32"), "irecv") end
end)

case("a message stays until it is through", function()
  if size == 1 then return end
  local next_rank, last = (rank + 1) % size, (rank - 1) % size
  local t = ds.empty(200000)
  local work = ds.irecv(t, last)
  ds.scope(function() ds.isend(ds.full({ 200000 }, rank), next_rank) end)
  collectgarbage()
  work:wait()
  same(t, ds.full({ 200000 }, last), "after its sender forgot it")
end)

case("a message of another size", function()
  if size == 1 then return end
  if rank == 0 then
    ds.send(ds.zeros(2), 1)
  elseif rank == 1 then
    fails("recv: rank 0 sent 8 bytes, and rank 1 expects 12", ds.recv, ds.zeros(3), 0)
  end
end)

harness.done()
