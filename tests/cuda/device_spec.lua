-- The device itself: memory, transfers, errors that come late.

local ds = require "ds"
local host = require "ds.host"
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

-- Where the device is simulated, in a build with sanitizers.
if helper.simulated and host.compiler:find "sanitizers" then
  describe("the address sanitizer", function()
    local place = require("tests.lua.helper").place { limit = 60 }
    teardown(function() place:remove() end)

    --- Sets `bytes` from the beginning of a tensor of 100 on, in a program: its code, what it says.
    local function write(bytes, after)
      place:write("past.c", [[
#include <string.h>
#include "kernels/tensor.h"
static void *at;
void keep(const ds_tensor *x) { at = x->data; }
void put(int n) { memset(at, 0, n); }
]])
      place:write("past.lua", ([[local ds = require "ds"
        local lib = ds.load_library("./past.so", "void keep(const ds_tensor *x); void put(int n);",
          { device = "cuda" })
        ds.scope(function()
          local x = ds.empty(100, { device = "cuda", dtype = "u8" })
          lib.keep(x)
          %s lib.put(%d)
        end)]]):format(after and "end) ds.scope(function()" or "", bytes))
      local code, _, err = place:sh(("cc -O0 -shared -fPIC -I'%s' -o past.so past.c && $D past.lua")
        :format(ds.include_folder()))
      return code, err
    end

    it("lets nobody beyond a tensor, nor into one that is gone", function()
      assert.equal(0, (write(100)))
      for _, case in ipairs { { 101 }, { 1, true } } do
        local code, err = write(unpack(case))
        assert.is_true(code ~= 0)
        assert.truthy(err:find("use-after-poison", 1, true), err)
      end
    end)
  end)
end
