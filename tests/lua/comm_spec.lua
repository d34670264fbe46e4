--- The collectives of a job of one rank, and what they refuse.

local ds = require "ds"
local fails = require("tests.lua.helper").says

describe("one rank", function()
  it("knows its place", function()
    assert.equal(0, ds.rank())
    assert.equal(1, ds.world_size())
    assert.equal(0, ds.local_rank())
    ds.barrier()
  end)

  it("reduces to the tensor itself", function()
    for _, op in ipairs { "sum", "mean", "max", "min" } do
      local t = ds.tensor { { 1, -2 }, { 3, 4 } }
      assert.equal(t, ds.all_reduce(t, op))
      assert.same({ { 1, -2 }, { 3, 4 } }, t:tolist())
    end
    assert.same({ 5 }, ds.all_reduce(ds.tensor({ 5 }, "i64")):tolist()) -- sum, when nothing is said
    assert.same({ 5 }, ds.broadcast(ds.tensor { 5 }):tolist())
    assert.same({ 5 }, ds.broadcast(ds.tensor { 5 }, 0):tolist())
  end)

  it("takes tensors with gaps", function()
    local t = ds.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    local column = t:select(2, 2)
    assert.is_false(column:is_contiguous())
    assert.equal(column, ds.all_reduce(column, "sum"))
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, t:tolist())
    assert.same({ { 2, 5 } }, ds.all_gather(column):tolist())
    assert.same({ 2, 5 }, ds.reduce_scatter(column):tolist())
  end)

  it("gathers with a leading dimension of ranks, into new memory", function()
    local t = ds.tensor { { 1, 2 } }
    local all = ds.all_gather(t)
    assert.same({ 1, 1, 2 }, all:size())
    t:zero_()
    assert.same({ { { 1, 2 } } }, all:tolist())
    assert.same({ 1 }, ds.all_gather(ds.tensor(7)):size())
    local part = ds.reduce_scatter(all, "mean")
    assert.same({ 1, 1, 2 }, part:size())
  end)

  it("is a group, and can be one more", function()
    assert.equal(1, ds.local_size())
    local g = ds.group(3, 7)
    assert.same({ 0, 1, 0, 1 }, { g:rank(), g:world_size(), g:local_rank(), g:local_size() })
    assert.same({ 5 }, g:all_reduce(ds.tensor { 5 }, "mean"):tolist())
    assert.same({ 1, 2 }, g:all_to_all(ds.tensor { 1, 2 }):tolist())
    g:barrier()
    assert.same({ collectives = 3, bytes = 0 }, g:comm_stats())
    assert.is_nil(ds.group())
    local before = ds.comm_stats().collectives
    ds.barrier()
    assert.equal(before + 1, ds.comm_stats().collectives)
    fails("group: colour and key are integers", ds.group, -1)
    fails("group: colour and key are integers", ds.group, 0, "first")
  end)

  it("has nobody to talk to", function()
    local t = ds.tensor { 1, 2 }
    fails("send: rank 0 is this one", ds.send, t, 0)
    fails("recv: rank 0 is this one", ds.recv, t, 0)
    fails("send: there is no rank 1; the job has 1", ds.isend, t, 1)
    fails("recv: there is no rank nil", ds.irecv, t)
  end)

  it("refuses what makes no sense", function()
    local t = ds.tensor { 1, 2 }
    fails("all_reduce: unknown reduction 'avg'; there are sum, mean, max, min",
      ds.all_reduce, t, "avg")
    fails("reduce_scatter: unknown reduction", ds.reduce_scatter, t, "product")
    fails("there is no rank 1; the job has 1, counted from 0", ds.broadcast, t, 1)
    fails("there is no rank -1", ds.broadcast, t, -1)
    fails("there is no rank 0.5", ds.broadcast, t, 0.5)
    fails("a mean of i64 is no i64", ds.all_reduce, ds.tensor({ 1 }, "i64"), "mean")
    fails("all_reduce: argument 1 must be a tensor, not number 3", ds.all_reduce, 3)
    fails("all_gather: argument 1 must be a tensor, not a table", ds.all_gather, { 1 })
    fails("meta device", ds.all_reduce, ds.empty(2, { device = "meta" }))
    fails("reduce_scatter: the first dimension of []", ds.reduce_scatter, ds.tensor(1))
    fails("all_to_all: the first dimension of []", ds.all_to_all, ds.tensor(1))
  end)

  it("does not write into what backward needs", function()
    local w = ds.ones(3, { requires_grad = true })
    fails("takes part in the gradient; give it t:detach()", ds.all_reduce, w)
    ds.all_reduce(w:detach())
    ds.no_grad(function() ds.broadcast(w) end)
  end)

  it("has them in ds.comm as well", function()
    assert.same({ 5 }, ds.comm.all_reduce(ds.tensor { 5 }):tolist())
    assert.same({ 0, 1, 0 },
      { ds.comm.get_rank(), ds.comm.get_world_size(), ds.comm.get_local_rank() })
  end)

  it("names the user's line", function()
    local ok, message = pcall(function() ds.all_reduce(ds.ones(1), "x") end)
    assert.is_false(ok)
    assert.is_truthy(message:find("comm_spec.lua:%d+: all_reduce"))
  end)
end)

describe("the log of collectives", function()
  -- what one rank does takes no time to speak of, but is logged like that of many
  local t = ds.zeros(256)
  local function logged() return ds.comm.log_summary({ return_dict = true }).summary end
  after_each(function()
    ds.comm.configure { enabled = false, prof_all = true, prof_ops = {}, debug = false }
  end)

  it("is off until it is asked for", function()
    ds.all_reduce(t)
    fails("nothing was logged; switch the log on", ds.comm.log_summary)
    ds.comm.configure { enabled = true }
    assert.same({}, logged())
  end)

  it("counts by operation and message size", function()
    ds.comm.configure { enabled = true }
    for _ = 1, 20 do ds.all_reduce(t) end
    ds.all_reduce(ds.zeros(2, 3))
    ds.all_gather(t)
    ds.comm.configure { enabled = false }
    ds.all_reduce(t)
    local all = logged()
    local line = all.all_reduce[1024]
    assert.equal(20, line.count)
    assert.equal("1 KB", line.msg_size_str)
    assert.equal(1, all.all_reduce[24].count)
    assert.equal(1, all.all_gather[1024].count)
    assert.is_true(line.total_latency_ms > 0 and line.avg_latency_ms <= line.total_latency_ms)
    assert.is_true(line.tput_avg_gbps > 0)
    assert.equal(0, line.busbw_avg_gbps) -- nothing travels
  end)

  it("takes some operations only, by DeepSpeed's names too", function()
    ds.comm.configure { enabled = true, prof_all = false,
      prof_ops = { "all_to_all_single", "barrier" } }
    ds.broadcast(t)
    ds.all_to_all(t)
    ds.barrier()
    ds.barrier()
    local all = logged()
    assert.is_nil(all.broadcast)
    assert.equal(1, all.all_to_all[1024].count)
    assert.equal(2, all.barrier[0].count)
  end)

  it("says who asked, with debug", function()
    ds.comm.configure { enabled = true, debug = true }
    ds.broadcast(t)
    assert.equal(1, logged()["broadcast | [Caller Func: script]"][1024].count)
  end)

  it("prints DeepSpeed's columns, and with verbose a line for each", function()
    local pipe = assert(io.popen(([['%s' -e '
      ds.comm.configure { enabled = true, verbose = true }
      for _ = 1, 3 do ds.all_reduce(ds.zeros(600)) end
      ds.broadcast(ds.zeros(10, { dtype = "bf16" }))
      ds.comm.log_summary()' 2>&1]]):format(require("ds.ffi").host.program)))
    local text = pipe:read "*a"
    pipe:close()
    local lines = {}
    for line in text:gmatch "[^\n]+" do
      if not line:find "info" then lines[#lines + 1] = line:gsub("%s+", " "):gsub(" $", "") end
    end
    assert.equal("Comm. Op Message Size Count Total Latency(ms) Avg Latency(ms) tput_avg (Gbps) "
      .. "busbw_avg (Gbps)", lines[1])
    assert.equal("all_reduce", lines[2])
    assert.truthy(lines[3]:find "^ 2%.34 KB 3 [%d.]+ [%d.]+ [%d.]+ 0%.00$")
    assert.equal("broadcast", lines[4])
    assert.truthy(lines[5]:find "^ 20 B 1 [%d.]+ ")
    local _, count = text:gsub("info: comm op: all_reduce | time %(ms%): [%d.]+ | msg size: 2400 B "
      .. "| algbw %(Gbps%): [%d.]+ | busbw %(Gbps%): 0%.00\n", "")
    assert.equal(3, count)
  end)

  it("refuses what makes no sense", function()
    fails('no collective "all_reduc" (did you mean "all_reduce"?)',
      ds.comm.configure, { prof_ops = { "all_reduc" } })
    fails("unknown option 'enable'", ds.comm.configure, { enable = true })
    fails("verbose is a boolean, not 1", ds.comm.configure, { verbose = 1 })
    fails("expects a table", ds.comm.configure, true)
    fails("log_summary", ds.comm.log_summary, { stragglers = true })
  end)
end)
