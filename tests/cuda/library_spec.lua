-- A CUDA kernel of the user's own: models/custom_kernel/softcap.cu, built by nvcc, beside the same
-- in operations. Only on a real device: the simulated one takes no machine code.

local ds = require "ds"
local border = require "ds.ffi"
local helper = require "tests.cuda.helper"

local function built()
  local folder = os.tmpname()
  os.remove(folder)
  local here = debug.getinfo(1, "S").source:match "^@(.*)tests/cuda/" or ""
  local command = "mkdir '%s' && make -s -C '%smodels/custom_kernel' DSRUN='%s' OUT='%s' "
    .. "'%s/softcap_cuda.so' >'%s/log' 2>&1"
  command = command:format(folder, here, border.host.executable, folder, folder, folder)
  return os.execute(command) == 0 and folder, folder
end

describe("a library of CUDA kernels", function()
  it("runs in order with the others, with its gradient", function()
    if helper.simulated then return pending "the simulated device takes no machine code" end
    if os.execute "command -v nvcc >/dev/null" ~= 0 then return pending "there is no nvcc" end
    local folder, at = built()
    assert(folder, "softcap.cu cannot be built: see " .. at .. "/log")
    local softcap = require "models.custom_kernel.softcap"("cuda", folder)
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      local x = helper.randn({ 7, 1031 }, { dtype = dtype, scale = 4, grad = true })
      helper.both("softcap " .. dtype, function(t)
        t = t * 1 -- a kernel of dsrun's before it, and one after it
        local y = t.device == "cuda" and softcap(t, 3) or (t:float() / 3):tanh():mul(3):to(dtype)
        return y + 1
      end, { x })
    end
    helper.both("softcap of nothing", function(t)
      return t.device == "cuda" and softcap(t, 3) or t:tanh()
    end, { helper.randn { 0, 3 } })
  end)

  it("refuses what lies on the CPU", function()
    if helper.simulated then return pending "the simulated device takes no machine code" end
    if os.execute "command -v nvcc >/dev/null" ~= 0 then return pending "there is no nvcc" end
    local folder = assert(built())
    local softcap = require "models.custom_kernel.softcap"("cuda", folder)
    assert.has_error(function() softcap(ds.ones(3), 3) end)
  end)
end)
