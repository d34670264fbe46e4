-- ds.load_library: the example in models/custom_kernel, built by its own command, in training at
-- ZeRO stages; what a library's functions refuse.

local ds = require "ds"
local host = require "ds.host"
local helper = require "tests.lua.helper"

local root = helper.root:sub(1, 1) == "/" and helper.root or host.folder .. "/" .. helper.root
local place, lib

local source = [[
#include "kernels/error.h"
#include "kernels/tensor.h"

int addition(ds_tensor *y, const ds_tensor *x, double a, int n)
{
    if (n < 0)
        return ds_fail(DS_EINVAL, "addition: n is %d", n);
    for (long i = 0; i < x->numel; i++)
        ((float *)y->data)[i] = ((const float *)x->data)[i] + (float)(a * n);
    return n;
}
long long sum_of(const ds_tensor *x) /* may be NULL */
{
    return x ? x->numel : -1;
}
const char *greeting(void) { return "hello"; }
double half(float x) { return x / 2; }
]]
local declarations = [[
int addition(ds_tensor *y, const ds_tensor *x, double a,
  int n); /* y = x + a n; a comment; */
long long sum_of(const ds_tensor *x); // counts
const char *greeting(void);
double half(float x);
]]

local function compile(name, text)
  place:write(name .. ".c", text)
  local code, _, err = place:sh(("cc -shared -fPIC -I'%s' -o %s.so %s.c"):format(
    ds.include_folder(), name, name))
  assert(code == 0, err)
  return place.folder .. "/" .. name .. ".so"
end

describe("ds.load_library", function()
  setup(function()
    place = helper.place()
    lib = ds.load_library(compile("own", source), declarations)
  end)
  teardown(function() place:remove() end)

  it("calls C with tensors and numbers, and gives what it returns", function()
    local x, y = ds.tensor { 1, 2, 3 }, ds.empty(3)
    assert.equal(2, lib.addition(y, x, 0.5, 2))
    assert.same({ 2, 3, 4 }, y:tolist())
    assert.equal(3, lib.sum_of(x))
    assert.equal(-1, lib.sum_of(nil))
    assert.equal("hello", lib.greeting())
    assert.equal(1.5, lib.half(3))
  end)

  it("raises a negative code's message at the line that called", function()
    local message = helper.says("addition: n is -1", lib.addition, ds.empty(1), ds.ones(1), 1, -1)
    helper.lacks(message, "library.lua")
    helper.has(message, "helper.lua") -- whose pcall it was
  end)

  it("refuses wrong arguments before it calls", function()
    local x = ds.ones(2)
    helper.says("addition: expects 4 arguments, (ds_tensor *y, const ds_tensor *x, double a, int n)"
      .. ", and was given 2", lib.addition, x, x)
    helper.says("addition: argument 2 must be a tensor or nil, not a table", lib.addition, x, {}, 1,
      1)
    helper.says("addition: argument 3 must be a number, not string 1", lib.addition, x, x, "1", 1)
    helper.says("addition: argument 3 must be a number, not nil", lib.addition, x, x, nil, 1)
    helper.says("addition: argument 4 must be whole, not number 1.5", lib.addition, x, x, 1, 1.5)
    helper.says("declares no function 'subtraction'", function() return lib.subtraction end)
    helper.says("was loaded for cuda", ds.load_library(place.folder .. "/own.so", declarations,
      { device = "cuda" }).addition, x, x, 1, 1)
  end)

  it("refuses a gradient that would be lost, and released tensors", function()
    local x = ds.ones(2):requires_grad_()
    helper.says("call it in the forward of a ds.Function", lib.addition, ds.empty(2), x, 1, 1)
    ds.no_grad(function() lib.addition(ds.empty(2), x, 1, 1) end)
    local gone
    ds.scope(function() gone = ds.ones(3) end)
    helper.says("was released", lib.sum_of, gone)
  end)

  it("computes nothing on the meta device", function()
    local x = ds.empty(4, { device = "meta" })
    assert.equal(0, lib.addition(x, x, 1, 1))
    helper.says("some tensors are on cpu and some on meta", lib.addition, ds.empty(4), x, 1, 1)
  end)

  it("says what is wrong with a library", function()
    local own = place.folder .. "/own.so"
    helper.says("load_library: there is no " .. place.folder .. "/none.so", ds.load_library,
      place.folder .. "/none.so", declarations)
    helper.says("load_library: expects (path, declarations)", ds.load_library, 3)
    helper.says("has none (const char ds_cdef[])", ds.load_library, own)
    helper.says("has no function nothing", ds.load_library, own, "int nothing(ds_tensor *y);")
    helper.says("declare no function", ds.load_library, own, "struct not_known;")
    helper.says("load_library: the declarations of " .. own, ds.load_library, own, "int ][;")
    helper.says("unknown device 'gpu'", ds.load_library, own, declarations, { device = "gpu" })
    place:write("text.so", "no library")
    helper.says("load_library: ", ds.load_library, place.folder .. "/text.so", declarations)
  end)

  it("refuses a library of other headers, or of none where it takes tensors", function()
    local header = assert(io.open(ds.include_folder() .. "/kernels/headers.h"))
    local number = header:read "*a":match "#define DS_HEADERS (0x%x+)"
    header:close()
    assert.equal(18, #number)
    local text = "unsigned long long ds_headers(void) { return %s; }\n"
      .. "int own_eight(void) { return 8; }\n"
    local function load(name, of)
      return ds.load_library(compile(name, text:format(of)), "int own_eight(void);")
    end
    assert.equal(8, load("same", number).own_eight())
    helper.says("other.so was compiled with the headers of another dsrun: compile it again", load,
      "other", number .. " + 1")
    local plain = compile("plain", "int own_nine(void *y) { return y != 0; }")
    helper.says("plain.so does not say which headers it was compiled with: include "
      .. "kernels/tensor.h", ds.load_library, plain, "int own_nine(ds_tensor *y);")
  end)

  it("takes one in C++ whose other functions are hidden", function()
    if os.execute "command -v c++ >/dev/null" ~= 0 then return pending "there is no c++" end
    place:write("cpp.cc", '#include "kernels/tensor.h"\nextern "C" __attribute__((visibility('
      .. '"default"))) int own_ndim(const ds_tensor *x) { return x->ndim; }\n')
    local code, _, err = place:sh(("c++ -Wall -Wextra -Werror -O2 -fvisibility=hidden -shared "
      .. "-fPIC -I'%s' -o cpp.so cpp.cc"):format(ds.include_folder()))
    assert(code == 0, err)
    local cpp = ds.load_library(place.folder .. "/cpp.so", "int own_ndim(const ds_tensor *x);")
    assert.equal(2, cpp.own_ndim(ds.ones(2, 3)))
  end)

  it("lists what it can, when the library declares itself", function()
    local self = ds.load_library(compile("self", 'const char ds_cdef[] = "int own_seven(void);";\n'
      .. "int own_seven(void) { return 7; }\n"))
    assert.equal(7, self.own_seven())
  end)
end)

describe("models/custom_kernel", function()
  setup(function()
    place = helper.place { limit = 60 }
    local code, out, err = place:sh(("make -s -C '%smodels/custom_kernel' DSRUN=\"$D\" OUT='%s'")
      :format(root, place.folder))
    assert(code == 0, out .. err)
  end)
  teardown(function() place:remove() end)

  local function train(options, arguments)
    local command = "\"$D\" %s '%smodels/custom_kernel/train.lua' --libraries '%s' --steps 60 %s"
    local code, out, err = place:sh(command:format(options, root, place.folder, arguments))
    assert(code == 0, err)
    local first, last = out:match "loss (%S+), then (%S+)"
    assert.is_true(tonumber(last) < 0.6 * tonumber(first), out)
    return out
  end

  it("has the right gradient, and learns", function() train("", "") end)

  it("learns the same on two ranks at stages 0 and 3", function()
    assert.equal(train("--num_gpus 2", "--stage 0"), train("--num_gpus 2", "--stage 3"))
  end)
end)
