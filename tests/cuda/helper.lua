-- helper.lua - what the specs of the CUDA backend share: the same thing on both devices, compared.
--
-- They run on a GPU, or where there is none on the simulated one of tests/simt (scripts/test says
-- which). On a simulated one time is dear: shapes are small, but odd.

local ffi = require "ffi"
local ds = require "ds"
local tensor = require "ds.tensor"
local assert = require "luassert"

pcall(ffi.cdef, "int setenv(const char *name, const char *value, int overwrite);")
ffi.cdef [[
typedef struct { int64_t plans, products, timed, beside; } helper_products;
extern helper_products ds_cuda_gemm_count;
ssize_t readlink(const char *path, char *to, size_t bytes);
]]

-- Timing would wait where specs count waits, and leave its choices in the user's home.
ffi.C.setenv("DS_TUNE", "0", 0)

local M = {}

--- The program that runs.
function M.program()
  local text = ffi.new "char[4096]"
  return ffi.string(text, ffi.C.readlink("/proc/self/exe", text, 4096))
end

--- Counters of the plugin's products: plans, products, timed, beside.
function M.products()
  local path = os.getenv "DS_CUDA_LIBRARY" or M.program():match "^(.*)/" .. "/libds_cuda.so"
  M.plugin = M.plugin or ffi.load(path)
  return M.plugin.ds_cuda_gemm_count
end

M.simulated = (os.getenv "DS_CUDA_LIBRARY" or ""):find "simt" ~= nil

-- Relative to the largest magnitude: one ulp or so of the storage type, times what sums lose.
local tolerance = { f32 = 1e-5, bf16 = 2 ^ -7, f16 = 2 ^ -10, i64 = 0, i32 = 0, u8 = 0, bool = 0 }
M.tolerance = tolerance

--- A copy of a tensor on a device, with requires_grad as it was.
function M.on(device, t)
  if not tensor.is_tensor(t) then return t end
  local copy = t:detach():to(t.dtype, device)
  if copy == t or device == t.device then copy = t:detach():clone() end
  if t.requires_grad then copy:requires_grad_() end
  return copy
end

local function flat(t)
  local values = t:to("cpu")
  if tensor.floating[t.dtype] then values = values:to "f64" end
  return values:reshape(-1):tolist()
end

--- Raises unless two tensors are equal within `tol` of the largest magnitude (nil: by dtype). NaN
-- equals NaN, infinities themselves.
function M.same(expected, got, what, tol)
  assert(got.device ~= nil, what)
  assert.same(expected.shape, got.shape, what .. ": shape")
  assert.equal(expected.dtype, got.dtype, what .. ": dtype")
  tol = tol or tolerance[expected.dtype]
  local a, b, most = flat(expected), flat(got), 0
  for i = 1, #a do
    if type(a[i]) == "number" and a[i] == a[i] and math.abs(a[i]) < math.huge then
      most = math.max(most, math.abs(a[i]))
    end
  end
  for i = 1, #a do
    local x, y = a[i], b[i]
    local fine = x == y or (x ~= x and y ~= y)
      or type(x) == "number" and math.abs(x - y) <= tol * most
    if not fine then
      error(("%s: element %d of %d is %s, and should be %s (largest %g, tolerance %g)"):format(what,
        i - 1, #a, tostring(y), tostring(x), most, tol), 2)
    end
  end
end

local function pack(...) return { n = select("#", ...), ... } end

--- Runs f(inputs…) on the CPU and on CUDA with the same inputs, compares what it returns and, where
-- inputs require them, the gradients of its first result for a gradient that is the same on both.
-- @tparam string what for messages
-- @tparam function f
-- @tparam table inputs tensors on the CPU, or numbers, tables … that are passed on
-- @tparam[opt] table options tol, grad_tol; gradient = false: only forward
function M.both(what, f, inputs, options)
  options = options or {}
  local results = {}
  local n = inputs.n or #inputs
  for _, device in ipairs { "cpu", "cuda" } do
    local given, wants = {}, false
    for i = 1, n do
      given[i] = M.on(device, inputs[i])
      wants = wants or tensor.is_tensor(given[i]) and given[i].requires_grad
    end
    ds.seed(7)
    local out = pack(f(unpack(given, 1, n)))
    if wants and options.gradient ~= false then
      local y = out[1]
      ds.seed(11)
      local dy = ds.randn(y.shape, { device = "cpu" }):to(y.dtype):to(y.dtype, device)
      y = y:keep()
      for i = 1, out.n do
        if tensor.is_tensor(out[i]) then out[i] = out[i]:detach():clone():keep() end
      end
      y:backward(dy)
    end
    results[device] = { out = out, given = given }
  end
  local cpu, cuda = results.cpu, results.cuda
  for i = 1, cpu.out.n do
    local e, g = cpu.out[i], cuda.out[i]
    if tensor.is_tensor(e) then
      assert.equal("cuda", g.device, what .. ": result " .. i .. " is on the wrong device")
      M.same(e, g, ("%s: result %d"):format(what, i), options.tol)
    elseif type(e) == "number" then
      assert.is_true(math.abs(e - g) <= (options.tol or 1e-5) * math.max(1, math.abs(e)),
        ("%s: result %d is %s on the CPU and %s on cuda"):format(what, i, e, tostring(g)))
    end
  end
  for i = 1, n do
    local e = cpu.given[i]
    if tensor.is_tensor(e) and e.grad then
      M.same(e.grad, cuda.given[i].grad, ("%s: gradient of input %d"):format(what, i),
        options.grad_tol or options.tol)
    end
  end
end

--- Normal numbers on the CPU. @tparam[opt] table options dtype, grad, scale, shift
function M.randn(shape, options)
  options = options or {}
  local t = ds.randn(shape, { device = "cpu" })
  if options.scale then t = t * options.scale end
  if options.shift then t = t + options.shift end
  t = t:to(options.dtype or "f32"):keep()
  if options.grad then t:requires_grad_() end
  return t
end

return M
