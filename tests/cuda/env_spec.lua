-- `dsrun env` on a machine with a GPU, and where its library is not what it should be.

local host = require "ds.host"

local function row(settings)
  local pipe = io.popen(("%s '%s' env 2>&1"):format(settings, host.executable))
  local text = pipe:read "*a"
  pipe:close()
  return text:match "\nGPU%s+([^\n]+)"
end

describe("dsrun env", function()
  it("describes the device", function()
    local text = assert(row "")
    assert(text:match ", %d+ GiB, %d+ processors, compute capability %d+%.%d", text)
  end)

  it("says why there is none", function()
    assert(row "DS_CUDA_LIBRARY=/none.so":find "^none: this build has no CUDA backend")
    local broken = assert(row "DS_CUDA_LIBRARY=/etc/passwd")
    assert(broken:find "^none: the CUDA backend cannot be opened: ", broken)
  end)
end)
