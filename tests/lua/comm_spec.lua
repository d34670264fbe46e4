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

  it("names the user's line", function()
    local ok, message = pcall(function() ds.all_reduce(ds.ones(1), "x") end)
    assert.is_false(ok)
    assert.is_truthy(message:find("comm_spec.lua:%d+: all_reduce"))
  end)
end)
