-- An all-reduce of dsrun beside MPI_Allreduce, in turns, on the same memory.
--
--     mpirun -np 2 --bind-to none build/dsrun scripts/bench_allreduce.lua [MB] [rounds]
--
-- Prints, on rank 0, the median time of each and how many times faster dsrun is: the median over
-- the rounds, in which one follows the other.

local ffi = require "ffi"
local ds = require "ds"

local C = require "ds.ffi".C

-- Open MPI's objects behind MPI_COMM_WORLD, MPI_FLOAT, MPI_SUM; MPI_IN_PLACE is 1.
ffi.cdef [[
  int MPI_Allreduce(const void *in, void *out, int count, void *type, void *op, void *comm);
  extern char ompi_mpi_comm_world[], ompi_mpi_float[], ompi_mpi_op_sum[];
]]
local in_place = ffi.cast("const void *", 1)

local numel = math.floor((tonumber(arg[1]) or 50) * 1e6 / 4)
local rounds = tonumber(arg[2]) or 21
local t = ds.zeros(numel)

local function timed(f)
  ds.barrier()
  local begun = C.ds_seconds()
  f()
  ds.barrier()
  return C.ds_seconds() - begun
end

local function ours() ds.all_reduce(t) end

local function theirs()
  local rc = ffi.C.MPI_Allreduce(in_place, t._c.data, numel, ffi.C.ompi_mpi_float,
    ffi.C.ompi_mpi_op_sum, ffi.C.ompi_mpi_comm_world)
  assert(rc == 0, "MPI_Allreduce failed")
end

local function median(list)
  table.sort(list)
  return list[math.ceil(#list / 2)]
end

local mine, mpis, ratios = {}, {}, {}
for i = -1, rounds do
  local a, b = timed(ours), timed(theirs)
  if i > 0 then mine[i], mpis[i], ratios[i] = a, b, b / a end -- the first two warm up
end
if ds.rank() == 0 then
  local text = "%d ranks, %.0f MB of f32: dsrun %.2f ms, MPI_Allreduce %.2f ms, %.1f times faster"
  print(text:format(ds.world_size(), numel * 4 / 1e6, median(mine) * 1e3, median(mpis) * 1e3,
    median(ratios)))
end
