-- The device itself: memory, transfers, errors that come late.

local ds = require "ds"
local helper = require "tests.cuda.helper"

describe("the cuda device", function()
  it("takes numbers there and back", function()
    local x = ds.full({ 3, 2 }, 2.5, { device = "cuda" })
    assert.equal("cuda", x.device)
    assert.same({ { 2.5, 2.5 }, { 2.5, 2.5 }, { 2.5, 2.5 } }, x:tolist())
    assert.equal(7, ds.full({ 1 }, 7, { device = "cuda" }):item())
    local t = ds.tensor({ { 1, 2 }, { 3, 4 } }):to "cuda"
    assert.same({ { 1, 2 }, { 3, 4 } }, t:to("cpu"):tolist())
  end)

  it("gives the CPU's values", function()
    helper.both("full", function(x) return ds.full({ 2 }, 3, { device = x.device }) end,
      { helper.randn { 2 } })
  end)

  it("refuses f64 by name", function()
    assert.has_error(function() ds.zeros(2, { device = "cuda", dtype = "f64" }) end)
  end)
end)
