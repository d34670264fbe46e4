--- Operations, optimizers and printing against PyTorch's results, which tests/golden/*.py made.

local ds = require "ds"
local json = require "ds.json"

local nn, F = ds.nn, ds.F
local golden = (debug.getinfo(1, "S").source:match "^@(.*)tests/lua/" or "") .. "tests/golden/"

local function load_golden(name) return assert(json.load(golden .. name)) end

local special = { inf = math.huge, ["-inf"] = -math.huge, nan = 0 / 0 }

--- A tensor from a golden entry; floating ones in the dtype under test.
local function tensor_of(entry, floating)
  local data = {}
  for i, v in ipairs(entry.data) do data[i] = special[v] or v end
  local dtype = entry.dtype == "float" and floating or entry.dtype
  return ds.tensor(data, dtype):reshape { unpack(entry.shape) }
end

local function flat(t)
  return t:detach():to(t:is_floating_point() and "f64" or "i64"):reshape(-1):tolist()
end

local function close(what, have, entry, tolerance)
  assert.are.same({ unpack(entry.shape) }, have:size(), what .. ": shape")
  local values, scale = flat(have), 1
  for _, v in ipairs(entry.data) do scale = math.max(scale, math.abs(special[v] or v)) end
  if entry.dtype ~= "float" then
    assert.are.equal(entry.dtype, have.dtype, what .. ": dtype")
    scale, tolerance = 1, 0
  end
  for i, v in ipairs(entry.data) do
    local want, got = special[v] or v, values[i]
    local near = want == got or math.abs(want - got) <= tolerance * scale
    if not near then -- NaN is near nothing
      error(("%s, element %d: %.9g, PyTorch has %.9g"):format(what, i - 1, got, want), 2)
    end
  end
end

--- Whether all inputs can be stored in this dtype, so that the results can be compared.
local function holds(case, dtype)
  for _, input in ipairs(case.inputs) do
    if input.dtype == "float" then
      local wanted, have = flat(tensor_of(input, "f64")), flat(tensor_of(input, dtype))
      for i, v in ipairs(wanted) do
        if v ~= have[i] and v == v then return false end
      end
    end
  end
  return true
end

local function check(case, dtype, tolerance)
  local names, inputs = {}, {}
  for i, input in ipairs(case.inputs) do
    names[i], inputs[i] = input.name, tensor_of(input, dtype)
    if case.grads and input.dtype == "float" then inputs[i]:requires_grad_() end
  end
  local source = ("local ds, nn, F%s = ...; return %s"):format(
    #names > 0 and ", " .. table.concat(names, ", ") or "", case.lua)
  local outputs = { assert(loadstring(source))(ds, nn, F, unpack(inputs)) }
  for i, expected in ipairs(case.outputs) do
    close("output " .. i, outputs[i], expected, tolerance)
  end
  if not case.grads then return end

  local loss
  for i, seed in ipairs(case.seeds) do
    if seed then
      local term = (outputs[i] * tensor_of(seed, dtype)):sum()
      loss = loss and loss + term or term
    end
  end
  loss:backward()
  for i, name in ipairs(names) do
    local expected = case.grads[name]
    if expected then
      local grad = inputs[i].grad or ds.zeros_like(inputs[i]:detach())
      close("gradient of " .. name, grad, expected, tolerance)
    end
  end
end

describe("operations as PyTorch's", function()
  for _, case in ipairs(load_golden "ops.json") do
    -- bf16 keeps 8 bits, and some expressions round several times
    for _, kind in ipairs { { "f64", 1e-7 }, { "f32", 2e-5 }, { "bf16", 0.03 } } do
      local dtype, tolerance = kind[1], kind[2]
      if holds(case, dtype) then
        it(("%s, %s"):format(case.name, dtype), function() check(case, dtype, tolerance) end)
      end
    end
  end
end)

describe("optimizers as PyTorch's", function()
  -- A bf16 iteration rounds by 0.4 %, and orthogonal matrices have elements of about 1.
  local function tolerance_of(run)
    return run.params.ns_method == "standard" and 0.01 or 4e-6
  end

  local function replay(data, run, changes)
    local weights, shown = {}, 0
    for i, shape in ipairs(data.shapes) do
      weights[i] = nn.Parameter(tensor_of({ dtype = "f32", shape = shape, data = data.start[i] }))
    end
    local settings = {}
    for key, value in pairs(run.params) do settings[key] = value end
    for key, value in pairs(changes or {}) do settings[key] = value end
    local optimizer = ds.optim[run.type](weights, settings)
    for step, gradients in ipairs(data.gradients) do
      for i, w in ipairs(weights) do
        w.grad = tensor_of { dtype = "f32", shape = data.shapes[i], data = gradients[i] }
      end
      optimizer:step()
      if step == data.steps[shown + 1] then
        shown = shown + 1
        for i, w in ipairs(weights) do
          local expected = { dtype = "float", shape = data.shapes[i], data = run.weights[shown][i] }
          close(("step %d, weight %d"):format(step, i), w, expected, tolerance_of(run))
        end
      end
    end
    assert.equal(#data.steps, shown)
  end

  for _, name in ipairs { "optim.json", "optim_whole.json" } do
    local data = load_golden(name)
    for _, run in ipairs(data.runs) do
      it(run.type .. " " .. json.encode(run.params), function() replay(data, run) end)
    end
  end
end)

describe("tostring as PyTorch's", function()
  local dtypes = { float64 = "f64", bfloat16 = "bf16", float16 = "f16", int32 = "i32",
    uint8 = "u8" }
  for _, case in ipairs(load_golden "prints.json") do
    it(case.name, function()
      local expected = case.text:gsub("torch%.(%w+)", dtypes)
      assert.are.equal(expected, tostring(tensor_of(case)))
    end)
  end
end)
