-- The log of collectives on several ranks: what an engine's step is made of, who waited for whom.

local ds = require "ds"
local harness = require "harness"

local case, fails = harness.case, harness.fails
local rank, size = ds.rank(), ds.world_size()
local F = ds.F

local function logged(options)
  options = options or {}
  options.return_dict = true
  return ds.comm.log_summary(options)
end

case("an engine's config switches it on", function()
  local model = ds.nn.Linear(64, 32, { bias = false })
  local engine = ds.initialize {
    model = function(x) return F.mse_loss(model(x), ds.zeros(4, 32)) end,
    model_parameters = model:parameters(),
    config = { train_micro_batch_size_per_gpu = 4, steps_per_print = 0,
      optimizer = { type = "SGD" }, zero_optimization = { stage = 1 },
      comms_logger = { enabled = true, prof_all = false, debug = true,
        prof_ops = { "reduce_scatter", "all_gather" } } },
  }
  for _ = 1, 3 do
    engine:backward(engine(ds.ones(4, 64)))
    engine:step()
  end
  ds.comm.configure { enabled = false }
  local all, bytes = logged().summary, 64 * 32 * 4
  local function of_step(op) return all[op .. " | [Caller Func: engine:step()]"] end
  assert(of_step "reduce_scatter"[bytes].count == 3)
  assert(of_step "all_gather"[bytes / size].count == 3)
  assert(of_step "all_gather"[64].count == 3) -- the ranks meet
  assert(not of_step "broadcast" and not all["broadcast | [Caller Func: script]"])
end)

case("bandwidths follow from times", function()
  ds.comm.configure { enabled = true, prof_all = true, debug = false }
  local t = ds.zeros(1000)
  ds.all_reduce(t)
  ds.broadcast(t)
  ds.comm.configure { enabled = false }
  local all = logged().summary
  local sum, spread = all.all_reduce[4000], all.broadcast[4000]
  local function near(a, b) return math.abs(a / b - 1) < 1e-6 end
  assert(near(sum.tput_avg_gbps, 2 * 4000 * 8 / sum.avg_latency_ms / 1e6))
  assert(near(sum.busbw_avg_gbps, sum.tput_avg_gbps * (size - 1) / size))
  assert(near(spread.tput_avg_gbps, 4000 * 8 / spread.avg_latency_ms / 1e6))
  assert(spread.busbw_avg_gbps == spread.tput_avg_gbps)
end)

case("a rank that is late makes the others wait", function()
  ds.barrier()
  ds.comm.configure { enabled = true, prof_all = false, prof_ops = { "all_reduce" } }
  local t = ds.zeros(3)
  local seconds = require("ds.ffi").C.ds_seconds
  for _ = 1, 5 do
    if rank == size - 1 then
      local till = seconds() + 0.05
      while seconds() < till do end
    end
    ds.all_reduce(t)
  end
  ds.comm.configure { enabled = false }
  local both = logged { show_straggler = true }
  local line, late = both.summary.all_reduce[12], both.straggler_analysis.all_reduce[12]
  assert(late.count == 5)
  local difference = line.total_latency_ms - late.total_comm_lat_ms - late.total_straggler_ms
  assert(math.abs(difference) < 1e-6, difference)
  if rank == size - 1 then
    assert(late.total_straggler_ms < 125, late.total_straggler_ms)
  else
    assert(late.total_straggler_ms > 125, late.total_straggler_ms)
  end
  assert(logged().summary.all_reduce[12].count == 5) -- and not those of the summary
end)

case("stragglers need the same calls everywhere", function()
  ds.comm.configure { enabled = rank == 0, prof_ops = { "broadcast" } }
  ds.broadcast(ds.zeros(5))
  ds.comm.configure { enabled = false }
  fails("rank 1 has logged other collectives than rank 0", logged, { show_straggler = true })
end)

case("groups are lines of their own", function()
  if size == 2 then return end
  local pair = ds.group(rank < 2 and 0 or 1)
  ds.comm.configure { enabled = true, prof_all = false, prof_ops = { "all_gather" } }
  pair:all_gather(ds.zeros(7))
  ds.comm.configure { enabled = false }
  local label = ("all_gather | %d ranks"):format(pair:world_size())
  assert(logged().summary[label][28].count == 1)
end)

harness.done()
