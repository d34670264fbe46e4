--- y = cap tanh(x / cap) as an operation: the kernels of softcap.c or softcap.cu, with a gradient.
--
--     local softcap = require("models.custom_kernel.softcap")("cpu")
--     local y = softcap(x, 30)

local ds = require "ds"

local here = debug.getinfo(1, "S").source:match "^@(.*)/" or "."
local files = { cpu = "softcap.so", cuda = "softcap_cuda.so" }

--- @tparam[opt="cpu"] string device
-- @tparam[opt] string folder where the libraries are (default: this one)
-- @treturn function softcap(x, cap) → Tensor
return function(device, folder)
  device = device or "cpu"
  local lib = ds.load_library((folder or here) .. "/" .. files[device], { device = device })

  return ds.Function("softcap", {
    forward = function(ctx, x, cap)
      x = x:contiguous()
      local y = ds.empty_like(x)
      lib.softcap(y, x, cap)
      ctx:save(y, cap)
      return y
    end,
    backward = function(ctx, dy)
      local y, cap = ctx:saved()
      local dx = ds.empty_like(y)
      lib.softcap_backward(dx, dy:contiguous(), y, cap)
      return dx -- cap is a number: no gradient
    end,
  })
end
