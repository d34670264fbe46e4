-- Every kernel of ops.def has a CUDA kernel: in the table of the library that is loaded, and among
-- the symbols of the one that nvcc built.

local border = require "ds.ffi"
local tensor = require "ds.tensor"

--- Kernels that there are not, by name, each with the reason. To stay empty.
local missing = {}

--- Names of all slots of ds_ops that a backend fills.
local function slots()
  local out, list = {}, border.host
  for _, op in ipairs(list.unary) do
    out[#out + 1] = op.name
    if op.saved then out[#out + 1] = op.name .. "_backward" end
  end
  for _, names in ipairs { list.binary, list.compare } do
    for _, name in ipairs(names) do
      out[#out + 1] = name
      out[#out + 1] = name .. "_scalar"
    end
  end
  for _, name in ipairs(list.kernels) do out[#out + 1] = name end
  return out
end

--- Fails with the names that has(name) and the list above do not agree on.
local function compare(where, has)
  local lacking, needless = {}, {}
  for _, name in ipairs(slots()) do
    local there = has(name)
    if not there and not missing[name] then lacking[#lacking + 1] = name end
    if there and missing[name] then needless[#needless + 1] = name end
  end
  assert(#lacking == 0, where .. " has no " .. table.concat(lacking, ", "))
  assert(#needless == 0, where .. " has what is listed as missing: "
    .. table.concat(needless, ", "))
end

describe("the kernels of cuda", function()
  it("are as many as ops.def lists", function()
    local kernels = tensor.kernels "cuda"
    assert(#slots() > 120)
    compare("the table", function(name) return kernels[name] ~= nil end)
  end)

  it("are in what nvcc built", function()
    local library = border.host.executable:match "^(.*)/" .. "/libds_cuda.so"
    local pipe = io.popen("nm -D --defined-only '" .. library .. "' 2>/dev/null")
    local symbols = {}
    for line in pipe:lines() do symbols[line:match "%S+$" or ""] = true end
    pipe:close()
    if not next(symbols) then return pending("there is no " .. library .. ", or no nm") end
    compare(library, function(name) return symbols["ds_cuda_" .. name] end)
  end)
end)
