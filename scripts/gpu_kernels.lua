--- What share of the GPU's memory bandwidth, or arithmetic, single kernels reach, for gpu-check.
--
--     dsrun scripts/gpu_kernels.lua [device=cuda] [rows=N]
--
-- Prints a line of JSON a kernel: { name, ms, GB_s } or { name, ms, TFLOP_s }. Bytes are the fewest
-- possible: each input read once, each output written once; tensors are several times the cache.

local ds = require "ds"
local json = require "ds.json"
local border = require "ds.ffi"
local tensor = require "ds.tensor"

local C, seconds = border.C, border.C.ds_seconds

local options = { device = "cuda", rows = "262144" }
for i = 1, #arg do
  local key, value = arg[i]:match "^(%w+)=(.*)$"
  options[key or ""] = value
end
local device, R = options.device, tonumber(options.rows)
local small = R < 4096 -- a try without a GPU
local W = 768          -- GPT-2's width

local size = { f32 = 4, bf16 = 2, i64 = 8 }

local function random(dtype, ...)
  local t = ds.randn({ ... }, { device = device })
  return t:to(dtype):keep()
end
local function empty(dtype, ...)
  return ds.empty({ ... }, { dtype = dtype, device = device }):keep()
end
local function handle(t) return t and t._c end

--- A kernel's call; tensors become handles, false is NULL.
local function call(name, ...)
  local given, n = { ... }, select("#", ...)
  for i = 1, n do
    if tensor.is_tensor(given[i]) then given[i] = handle(given[i]) end
    if given[i] == false then given[i] = nil end
  end
  return function() tensor.run(name, device, unpack(given, 1, n)) end
end

--- Fewest bytes: of all the tensors given.
local function bytes(...)
  local sum = 0
  for _, t in ipairs { ... } do sum = sum + t:numel() * size[t.dtype] end
  return sum
end

local function wait()
  if C.ds_device_synchronize(device == "cuda" and 1 or 0) < 0 then border.check(-1) end
end

--- Milliseconds of one call, the least of three rounds.
local function time(f)
  f()
  wait()
  local start = seconds()
  f()
  wait()
  local n = math.max(2, math.min(200, math.floor((small and 0.01 or 0.1) / (seconds() - start))))
  local least = math.huge
  for _ = 1, 3 do
    start = seconds()
    for _ = 1, n do f() end
    wait()
    least = math.min(least, (seconds() - start) / n)
  end
  return least * 1e3
end

local cases = {}
--- make() → call, amount of bytes or operations.
local function case(name, unit, make)
  cases[#cases + 1] = { name = name, unit = unit, make = make }
end

case("copy, bf16", "GB_s", function()
  local x, y = random("bf16", R, W), empty("bf16", R, W)
  return call("copy", y, x), bytes(x, y)
end)
case("add, bf16", "GB_s", function()
  local a, b, y = random("bf16", R, W), random("bf16", R, W), empty("bf16", R, W)
  return call("add", y, a, b), bytes(a, b, y)
end)
case("gelu_tanh backward, bf16", "GB_s", function()
  local dy, x, dx = random("bf16", R, W), random("bf16", R, W), empty("bf16", R, W)
  return call("gelu_tanh_backward", dx, dy, x), bytes(dy, x, dx)
end)
case("sum of columns, bf16", "GB_s", function()
  local x, y = random("bf16", R, W), empty("bf16", 1, W)
  return call("sum", y, x, 0), bytes(x, y)
end)
case("sum of all, f32", "GB_s", function()
  local x, y = random("f32", R, W), empty("f32", 1, 1)
  return call("sum", y, x, 0), bytes(x, y)
end)
for _, width in ipairs { W, 4096 } do
  local rows = math.floor(R * W / width)
  for _, layer in ipairs { true, false } do
    local name = layer and "LayerNorm" or "RMSNorm"
    case(("%s with its sum, bf16, %d wide"):format(name, width), "GB_s", function()
      local x, delta, w = random("bf16", rows, width), random("bf16", rows, width),
        random("bf16", width)
      local y, sum = empty("bf16", rows, width), empty("bf16", rows, width)
      local mean, rstd = layer and empty("f32", rows) or false, empty("f32", rows)
      return call("norm", y, sum, mean, rstd, x, delta, w, layer and random("bf16", width), 1e-5),
        bytes(x, delta, y, sum)
    end)
    case(("%s backward with the residual, bf16, %d wide"):format(name, width), "GB_s", function()
      local dy, x, dsum = random("bf16", rows, width), random("bf16", rows, width),
        random("bf16", rows, width)
      local dx, dw, db = empty("bf16", rows, width), empty("f32", width), empty("f32", width)
      local mean = layer and ds.zeros(rows, { device = device }):keep() or false
      local rstd = ds.ones(rows, { device = device }):keep()
      return call("norm_backward", dx, dw, layer and db, dy, x, random("bf16", width), mean, rstd,
        dsum, 0), bytes(dy, x, dsum, dx)
    end)
  end
end
case("softmax, bf16, 4096 wide", "GB_s", function()
  local x, y = random("bf16", R / 4, 4096), empty("bf16", R / 4, 4096)
  return call("softmax", y, x, 1), bytes(x, y)
end)
local vocabulary = small and 1024 or 50304
local function losses()
  local n = R / 16
  local logits = random("bf16", n, vocabulary)
  local target = ds.randint(0, vocabulary, n, { device = "cpu" }):to("i64", device):keep()
  return logits, target, empty("f32"), empty("f32", n)
end
case("cross-entropy, bf16", "GB_s", function()
  local logits, target, loss, lse = losses()
  return call("cross_entropy", loss, lse, logits, target, -100, 0, 1), bytes(logits)
end)
case("cross-entropy backward, bf16", "GB_s", function()
  local logits, target, loss, lse = losses()
  call("cross_entropy", loss, lse, logits, target, -100, 0, 1)()
  local d, one = empty("bf16", logits:size(1), vocabulary), ds.ones({}, { device = device }):keep()
  return call("cross_entropy_backward", d, one, logits, target, lse, -100, 0, 1), bytes(logits, d)
end)
case("embedding backward, bf16", "GB_s", function()
  local dy, dw = random("bf16", R / 4, W), empty("f32", vocabulary, W)
  local index = ds.randint(0, vocabulary, R / 4, { device = "cpu" }):to("i64", device):keep()
  return call("embedding_backward", dw, dy, index, 0), bytes(dy, dw)
end)
case("AdamW, bf16 weights, f32 master and state", "GB_s", function()
  local n = R * W
  local p, m, v = random("f32", n), random("f32", n), ds.ones(n, { device = device }):keep()
  local low, g = empty("bf16", n), random("bf16", n)
  return call("adam", p, m, v, low, g, 1e-4, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 1, 1, nil, nil),
    bytes(p, p, m, m, v, v, low, g) -- the states are read and written
end)
case("sum of squares, bf16", "GB_s", function()
  local x, y = random("bf16", R * W), empty("f32", 1)
  return call("square_sum", y, x, 0), bytes(x)
end)
case("matmul, bf16", "TFLOP_s", function()
  local n = small and 128 or 8192
  local a, b, y = random("bf16", n, n), random("bf16", n, n), empty("bf16", n, n)
  return call("matmul", y, a, b, 1, 0), 2 * n ^ 3
end)
for _, d in ipairs { 64, 128 } do
  local B, T, H = small and 1 or 16, small and 64 or 1024, math.floor(W / d)
  local function tensors()
    local list = {}
    for i = 1, 5 do list[i] = random("bf16", B, T, H, d) end
    return list, empty("f32", B, H, T)
  end
  local flops = 4 * B * H * T * T * d / 2 -- causal
  case(("attention, causal, bf16, heads %d wide"):format(d), "TFLOP_s", function()
    local t, lse = tensors()
    return call("attention", t[1], lse, t[2], t[3], t[4], false, 1, d ^ -0.5, 0, 0, 0), flops
  end)
  case(("attention backward, heads %d wide"):format(d), "TFLOP_s", function()
    local t, lse = tensors()
    local g = tensors()
    call("attention", t[1], lse, t[2], t[3], t[4], false, 1, d ^ -0.5, 0, 0, 0)()
    return call("attention_backward", g[1], g[2], g[3], t[5], t[1], lse, t[2], t[3], t[4], false, 1,
      d ^ -0.5, 0, 0, 0), 2.5 * flops
  end)
end

for _, c in ipairs(cases) do
  local row = { name = c.name }
  local ok, problem = pcall(function()
    local f, amount = c.make()
    row.ms = time(f)
    row[c.unit] = amount / row.ms * (c.unit == "GB_s" and 1e-6 or 1e-9)
  end)
  if not ok then row.error = tostring(problem) end
  print(json.encode(row))
  io.flush()
  collectgarbage()
  collectgarbage()
  ds.empty_cache(device)
end
