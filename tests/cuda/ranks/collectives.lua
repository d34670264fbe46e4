-- Every collective on GPUs against the same one on CPUs, which tests/dist checks; run by all ranks.

local ffi = require "ffi"
local ds = require "ds"
local harness = require "tests.dist.harness"
local helper = require "tests.cuda.helper"
local border = require "ds.ffi"
local comm = require "ds.comm"
local tensor = require "ds.tensor"

local C, check = border.C, border.check
local case, fails, uneven = harness.case, harness.fails, harness.uneven
local rank, size = ds.rank(), ds.world_size()
local exact = os.getenv "DS_NCCL_EXACT" == "1"

local dtypes = { "f32", "bf16", "f16", "f64", "i64", "i32", "u8", "bool" }
local sizes = { 0, 1, 3, 17, 4099 }

local function values(n, dtype)
  if tensor.floating[dtype] then return ds.randn(n, { dtype = dtype, device = "cpu" }) end
  local x = ds.randint(0, 50, { n }, { dtype = "i64", device = "cpu" })
  return dtype == "bool" and x:gt(25) or x:to(dtype)
end

local function cuda(t) return t:to(t.dtype, "cuda") end

--- Sums of bf16 and f16 are rounded at every rank; to the bit where they are made in order.
local function tolerance(dtype, op)
  if exact and dtype ~= "f64" then return op == "mean" and dtype == "f32" and 1e-7 or 0 end
  if dtype == "f64" then return 1e-14 end
  return helper.tolerance[dtype] * (tensor.floating[dtype] and 2 or 1)
end

local function same(want, got, what, tol)
  assert(got.device == "cuda", what)
  helper.same(want, got, what, tol)
end

local function each(f)
  for _, dtype in ipairs(dtypes) do
    for _, n in ipairs(sizes) do f(dtype, n, (" of %s [%d]"):format(dtype, n)) end
  end
end

local ops = { "sum", "mean", "max", "min" }
local function has(dtype, op)
  if dtype == "f64" and (op == "max" or op == "min") then return false end
  return tensor.floating[dtype] or (op ~= "mean" and not (dtype == "bool" and op == "sum"))
end

ds.seed(100 + rank)

case("all_reduce, reduce_scatter", function()
  each(function(dtype, n, text)
    for _, op in ipairs(ops) do
      if has(dtype, op) then
        local x = values(n, dtype)
        same(ds.all_reduce(x:clone(), op), ds.all_reduce(cuda(x), op), "all_reduce " .. op .. text,
          tolerance(dtype, op))
        local all = values(n * size, dtype)
        same(ds.reduce_scatter(all, op), ds.reduce_scatter(cuda(all), op),
          "reduce_scatter " .. op .. text, tolerance(dtype, op))
      end
    end
  end)
end)

case("all_gather, broadcast, all_to_all", function()
  each(function(dtype, n, text)
    local x, all = values(n, dtype), values(n * size, dtype)
    same(ds.all_gather(x), ds.all_gather(cuda(x)), "all_gather" .. text)
    same(ds.all_to_all(all), ds.all_to_all(cuda(all)), "all_to_all" .. text)
    for root = 0, size - 1, math.max(1, size - 1) do
      same(ds.broadcast(x:clone(), root), ds.broadcast(cuda(x), root), "broadcast" .. text)
    end
  end)
end)

case("NaN wins", function()
  local x = ds.full({ 5 }, rank == size - 1 and 0 / 0 or 1, { device = "cpu" })
  for _, op in ipairs(ops) do
    for _, v in ipairs(ds.all_reduce(cuda(x), op):tolist()) do assert(v ~= v, op) end
  end
end)

-- ---- parts

--- With something before and after the parts.
local function even(n)
  local borders, width = ffi.new("int64_t[?]", size + 1), math.floor(n / (size + 1))
  for r = 0, size do borders[r] = math.floor(width / 2) + r * width end
  return borders
end

local function own(borders) return tonumber(borders[rank]), tonumber(borders[rank + 1]) end

local function reduce_parts(x, borders, op, scale, wire)
  local t = x:clone()
  check(C.ds_reduce_parts(t._c, borders, op, scale, wire, comm.world(), nil))
  return t
end

local function on_cuda(f, x, ...)
  local t = cuda(x)
  check(f(t, ...))
  return t
end

local function part(t, borders)
  local from, to = own(borders)
  return t:to("cpu"):narrow(1, from + 1, to - from)
end

local codes = { f32 = C.DS_F32, bf16 = C.DS_BF16, f16 = C.DS_F16 }

local function compare_parts(dtype, n, borders, op, scale, wire, tol, text)
  local x, world = values(n, dtype), comm.world()
  local want = reduce_parts(x, borders, op, scale, wire)
  local t = on_cuda(function(t)
    return C.ds_reduce_parts(t._c, borders, op, scale, wire, world, nil)
  end, x)
  helper.same(part(want, borders), part(t, borders), "reduce_parts" .. text, tol)
  local from, to = own(borders)
  if to > from then -- into a tensor of its own
    local given, out = cuda(x), tensor.new({ to - from }, dtype, "cuda")
    check(C.ds_reduce_part(out._c, given._c, borders, op, scale, wire, world, nil))
    helper.same(part(want, borders), out, "reduce_part" .. text, tol)
    helper.same(x, given, "what reduce_part was given" .. text, 0)
  else
    local given, out = cuda(x), tensor.new({ 0 }, dtype, "cuda")
    check(C.ds_reduce_part(out._c, given._c, borders, op, scale, wire, world, nil))
  end
end

case("parts, even and uneven", function()
  each(function(dtype, n, text)
    for _, make in ipairs { uneven, even } do
      local borders = make(n)
      if has(dtype, "sum") then
        compare_parts(dtype, n, borders, C.DS_SUM, 1, -1, tolerance(dtype, "sum"), text)
      end
      local x = values(n, dtype)
      local want = x:clone()
      check(C.ds_gather_parts(want._c, borders, comm.world(), nil))
      same(want, on_cuda(function(t)
        return C.ds_gather_parts(t._c, borders, comm.world(), nil)
      end, x), "gather_parts" .. text)
    end
  end)
end)

case("a scale, and a narrower type on the wire", function()
  for _, scale in ipairs { 0.25, 0.3 } do
    for _, op in ipairs { C.DS_SUM, C.DS_MEAN } do
      for _, pair in ipairs { { "f32" }, { "bf16" }, { "f16" }, { "f32", "bf16" }, { "f32", "f16" },
        { "bf16", "f16" } } do
        local dtype, wire = pair[1], pair[2] and codes[pair[2]] or -1
        local text = (" %s as %s, %g"):format(dtype, pair[2] or "it is", scale)
        local tol = math.max(helper.tolerance[dtype], not exact and pair[2]
          and helper.tolerance[pair[2]] or 0) * 2
        for _, n in ipairs { 17, 1000 } do
          local x, world = values(n, dtype), comm.world()
          local want = x:clone()
          check(C.ds_all_reduce_scaled(want._c, want._c, op, scale, wire, world, nil))
          same(want, on_cuda(function(t)
            return C.ds_all_reduce_scaled(t._c, t._c, op, scale, wire, world, nil)
          end, x), "all_reduce" .. text, tol)
          compare_parts(dtype, n, uneven(n), op, scale, wire, tol, text)
          compare_parts(dtype, n, even(n), op, scale, wire, tol, text)
        end
      end
    end
  end
end)

-- ---- order

case("kernels wait from wait() on, and the host does not", function()
  local work = ffi.new "ds_work"
  local t = ds.full({ 1000 }, rank + 1, { device = "cuda" })
  local copy = tensor.new({ 1000 }, "f32", "cuda")
  local waits = C.ds_device_count(C.DS_CUDA).waits
  check(C.ds_all_reduce(copy._c, t._c, C.DS_SUM, comm.world(), work))
  assert(work.done == 0 and work.code == 0)
  check(C.ds_wait(work))
  assert(work.done == 1)
  assert(C.ds_device_count(C.DS_CUDA).waits == waits, "the host waited")
  assert(copy:tolist()[1000] == size * (size + 1) / 2)
  check(C.ds_wait(work)) -- again is harmless
  check(C.ds_all_reduce(copy._c, t._c, C.DS_SUM, comm.world(), work))
  while check(C.ds_test(work)) == 0 do end
  assert(copy:tolist()[1] == size * (size + 1) / 2)
end)

case("what is under way stays, whoever forgets it", function()
  local works, outs = {}, {}
  ds.scope(function()
    for i = 1, 8 do
      local t = ds.full({ 3000 }, rank + i, { device = "cuda" })
      works[i], outs[i] = ffi.new "ds_work", tensor.new({ 3000 }, "f32", "cuda"):keep()
      check(C.ds_all_reduce(outs[i]._c, t._c, C.DS_SUM, comm.world(), works[i]))
    end
  end) -- the inputs' memory is free now, were it not held
  for _ = 1, 8 do ds.full({ 3000 }, -1000, { device = "cuda" }) end
  for i = 8, 1, -1 do
    check(C.ds_wait(works[i]))
    assert(outs[i]:tolist()[1] == size * (size - 1) / 2 + size * i, i)
  end
end)

case("counters", function()
  local t = ds.full({ 12 * 1024 }, 1, { device = "cuda" })
  local before = ds.comm_stats()
  ds.all_reduce(t)
  local after = ds.comm_stats()
  assert(after.collectives - before.collectives == 1)
  local whole = 4 * 12 * 1024
  assert(after.bytes - before.bytes == (exact and size - 1 or 2 * (size - 1) / size) * whole)
end)

case("the log of collectives has times of the device", function()
  ds.comm.configure { enabled = true }
  local t = ds.full({ 100 }, 1, { device = "cuda" })
  for _ = 1, 3 do ds.all_reduce(t) end
  local log = ds.comm.log_summary { return_dict = true }
  ds.comm.configure { enabled = false }
  assert(log.summary.all_reduce[400].count == 3)
end)

-- ---- groups, messages

case("groups", function()
  local g = ds.group(rank % 2, -rank) -- even and odd, the highest first
  local members = g:world_size()
  local all = g:all_gather(ds.full({ 2 }, rank, { device = "cuda" })):tolist()
  for i, row in ipairs(all) do assert(row[1] == rank % 2 + 2 * (members - i)) end
  local want = 0
  for r = rank % 2, size - 1, 2 do want = want + r + 1 end
  assert(g:all_reduce(ds.full({ 33 }, rank + 1, { device = "cuda" })):tolist()[33] == want)
  local alone = ds.group(rank)
  assert(alone:all_reduce(ds.full({ 3 }, rank, { device = "cuda" })):tolist()[2] == rank)
  ds.all_reduce(ds.full({ 3 }, rank, { device = "cuda" })) -- the job's is still there
end)

case("send and recv", function()
  for _, n in ipairs(sizes) do
    if rank == 0 then
      for r = 1, size - 1 do ds.send(ds.full({ n }, r, { device = "cuda" }), r) end
    else
      local got = ds.recv(ds.full({ n }, -1, { device = "cuda" }), 0):tolist()
      for i = 1, n do assert(got[i] == rank) end
    end
  end
end)

case("everyone sends to everyone at once", function()
  local works, into = {}, {}
  for r = 0, size - 1 do
    if r ~= rank then
      into[r] = tensor.new({ 100007 }, "f32", "cuda")
      works[#works + 1] = ds.irecv(into[r], r)
      works[#works + 1] = ds.isend(ds.full({ 100007 }, rank, { device = "cuda" }), r)
    end
  end
  ds.barrier()
  ds.all_reduce(ds.full({ 3 }, rank, { device = "cuda" }))
  for _, work in ipairs(works) do work:wait() end
  for r, t in pairs(into) do assert(t:tolist()[100007] == r) end
end)

case("what is refused", function()
  fails("one dtype and one device", function()
    check(C.ds_all_reduce(ds.zeros(3, { device = "cpu" })._c, ds.zeros(3, { device = "cuda" })._c,
      C.DS_SUM, comm.world(), nil))
  end)
  fails("elements in and", function()
    local borders = ffi.new("int64_t[?]", size + 1)
    for r = 1, size do borders[r] = r end
    check(C.ds_reduce_part(ds.zeros(3, { device = "cuda" })._c,
      ds.zeros(size, { device = "cuda" })._c, borders, C.DS_SUM, 1, -1, comm.world(), nil))
  end)
end)

harness.done()
