-- scripts/find-cuda: where CUDA's parts are found, in folders made to look like those of a
-- toolkit, of the system and of Python's wheels.

local helper = require "tests.lua.helper"

local place, lines

local function file(path)
  assert(os.execute(("cd '%s' && mkdir -p '%s' && : > '%s' && chmod +x '%s'"):format(place.folder,
    path:match "^(.*)/", path, path)) == 0)
end

--- Runs it with only `settings`, and programs from the folder bin; %s in them is the folder.
local function find(settings)
  local root = place.folder
  local script = helper.root .. "scripts/find-cuda"
  if script:sub(1, 1) ~= "/" then script = require("ds.host").folder .. "/" .. script end
  local command = "cd '%s' && env -i SYSROOT='%s/none' PATH='%s/bin:/usr/bin:/bin' %s '%s' 2>&1"
  local pipe = io.popen(command:format(root, root, root, settings:gsub("%%s", root), script))
  lines = {}
  for line in pipe:lines() do
    local name, value = line:match "^(%S+) := (.*)$"
    if value and value:sub(1, #root) == root then value = value:sub(#root + 2) end
    lines[name or #lines + 1] = value or line
  end
  pipe:close()
  return lines
end

local function toolkit(at)
  file(at .. "/bin/nvcc")
  file(at .. "/include/cublasLt.h")
  file(at .. "/lib64/libcublasLt.so.13")
  file(at .. "/lib64/libcublasLt.so")
end

local function library(at, name, header)
  file(("%s/include/%s"):format(at, header))
  file(("%s/lib/lib%s.so.9"):format(at, name))
end

describe("find-cuda", function()
  before_each(function()
    place = helper.place()
    -- python3 says where its packages are
    file "bin/python3"
    place:write("bin/python3", "#!/bin/sh\necho " .. place.folder .. "/site/nvidia\n")
  end)
  after_each(function() place:remove() end)

  it("finds a toolkit by CUDA_HOME, and all that lies in it", function()
    toolkit "kit"
    library("kit", "cudnn", "cudnn.h")
    library("kit", "nccl", "nccl.h")
    assert.same({ NVCC = "kit/bin/nvcc", CUDA_INCLUDE = "kit/include", CUDA_LIB = "kit/lib64",
      CUBLASLT = "kit/lib64/libcublasLt.so", CUDNN_INCLUDE = "kit/include", CUDNN_LIB = "kit/lib",
      NCCL_INCLUDE = "kit/include", NCCL_LIB = "kit/lib" }, find "CUDA_HOME=%s/kit")
  end)

  it("finds the toolkit of an nvcc on the path, through its links", function()
    toolkit "kit"
    os.execute(("ln -s ../kit/bin/nvcc '%s/bin/nvcc'"):format(place.folder))
    find ""
    assert.equal("kit/bin/nvcc", lines.NVCC)
    assert.equal("kit/lib64", lines.CUDA_LIB)
    assert.is_nil(lines.CUDNN_LIB)
  end)

  it("takes CUDNN_HOME and NCCL_HOME before what lies in the toolkit", function()
    toolkit "kit"
    library("kit", "cudnn", "cudnn.h")
    library("own dnn", "cudnn", "cudnn.h")
    library("dnn", "cudnn", "cudnn.h")
    library("nccl", "nccl", "nccl.h")
    find "CUDA_HOME=%s/kit CUDNN_HOME=%s/dnn NCCL_HOME=%s/nccl"
    assert.equal("dnn/include", lines.CUDNN_INCLUDE)
    assert.equal("nccl/lib", lines.NCCL_LIB)
  end)

  it("finds Python's wheels where there is no nvcc", function()
    file "site/nvidia/cu13/include/cublasLt.h"
    file "site/nvidia/cu13/lib/libcublasLt.so.13"
    library("site/nvidia/cudnn", "cudnn", "cudnn.h")
    library("site/nvidia/nccl", "nccl", "nccl.h")
    assert.same({ CUDA_INCLUDE = "site/nvidia/cu13/include", CUDA_LIB = "site/nvidia/cu13/lib",
      CUBLASLT = "site/nvidia/cu13/lib/libcublasLt.so.13",
      CUDNN_INCLUDE = "site/nvidia/cudnn/include", CUDNN_LIB = "site/nvidia/cudnn/lib",
      NCCL_INCLUDE = "site/nvidia/nccl/include", NCCL_LIB = "site/nvidia/nccl/lib" }, find "")
  end)

  it("finds wheels beside a toolkit that lacks them, and nvcc among wheels", function()
    toolkit "kit"
    library("site/nvidia/cudnn", "cudnn", "cudnn.h")
    find "CUDA_HOME=%s/kit"
    assert.equal("kit/lib64", lines.CUDA_LIB)
    assert.equal("site/nvidia/cudnn/lib", lines.CUDNN_LIB)
    file "site/nvidia/cu13/bin/nvcc"
    assert.equal("site/nvidia/cu13/bin/nvcc", find("").NVCC)
  end)

  it("says nothing of a library without its header", function()
    file "site/nvidia/nccl/lib/libnccl.so.2"
    assert.same({}, find "")
  end)

  it("leaves out, and says so, what lies below a folder with a space in its name", function()
    toolkit "kit"
    library("my dnn", "cudnn", "cudnn.h")
    find "CUDA_HOME=%s/kit CUDNN_HOME='%s/my dnn'"
    assert.is_nil(lines.CUDNN_INCLUDE)
    helper.has(lines[1], "make takes no spaces")
  end)
end)
