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

  it("is refused where the program is of another build", function()
    local file = os.getenv "DS_CUDA_LIBRARY"
    if not file then return pending "the plugin's place is not known" end
    local ffi = require "ffi"
    ffi.cdef "const void *ds_cuda_backend(uint64_t abi, int local_rank, int local_size);"
    assert.is_true(ffi.load(file).ds_cuda_backend(1, 0, 1) == nil)
    assert.truthy(ffi.string(require("ds.ffi").C.ds_error()):find("of another build", 1, true))
  end)

  it("refuses f64 by name", function()
    assert.has_error(function() ds.zeros(2, { device = "cuda", dtype = "f64" }) end)
  end)
end)
