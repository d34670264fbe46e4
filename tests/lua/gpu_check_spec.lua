-- scripts/gpu-check without a GPU: rows are measured and written as they end, one that fails does
-- not keep the next from running.

local ds = require "ds"
local host = require "ds.host"
local helper = require "tests.lua.helper"

local root = helper.root:sub(1, 1) == "/" and helper.root or host.folder .. "/" .. helper.root
local place

local function check(settings, words)
  return place:sh(("OUT=\"$PWD/found\" %s '%sscripts/gpu-check' %s"):format(settings, root, words))
end

local function rows()
  local by_name = {}
  for _, row in ipairs(ds.json.decode(place:read "found/results.json").rows) do
    by_name[row.row] = row
  end
  return by_name
end

describe("gpu-check", function()
  if os.execute "python3 -c '' 2>/dev/null" ~= 0 then
    return pending "there is no python3"
  end
  setup(function() place = helper.place { limit = 100 } end)
  teardown(function() place:remove() end)

  it("measures kernels, and writes what it found", function()
    local code, out, err = check("GPU_CHECK_SIMULATE=cpu DSRUN=\"$D\"", "kernels")
    assert(code == 0, out .. err)
    local row = rows().kernels
    assert.equal("ok", row.status)
    assert.equal("cpu", row.device)
    assert(#row.values > 20)
    for _, kernel in ipairs(row.values) do
      assert((kernel.GB_s or kernel.TFLOP_s) > 0, kernel.name)
    end
    helper.has(place:read "found/results.md", "| kernels | ok |")
    helper.has(place:read "found/log.txt", "gpu_kernels.lua device=cpu")
  end)

  it("goes on after a row that fails, and keeps the rows of before", function()
    local code = check("GPU_CHECK_SIMULATE=cpu DSRUN=/bin/false", "killed_rank resume memcheck")
    assert.equal(1, code)
    local all = rows()
    assert.equal("failed", all.killed_rank.status)
    assert.equal("failed", all.resume.status)
    assert.equal("ok", all.kernels.status)
    assert(all.memcheck.status ~= "ok")
  end)

  -- A folder of sources and a compiler that only look like them.
  it("compiles llm.c where its sources are given, and sets its figures beside ours", function()
    place:sh "mkdir -p llm/llmc cuda/include cuda/lib64 cuda/bin"
    place:write("llm/train_gpt2.cu", "")
    place:write("llm/llmc/cuda_utils.cuh", "advise(p, bytes, cudaCpuDeviceId);\n")
    place:write("cuda/include/cublasLt.h", "")
    place:write("cuda/lib64/libcublasLt.so", "")
    place:write("cuda/bin/nvcc", [[#!/bin/sh
[ "$1" != --version ] || exec echo "Cuda compilation tools, release 13.0, V13.0.1"
grep -qF 'bytes, cudaMemLocation{cudaMemLocationTypeHost, 0});' llmc/cuda_utils.cuh || exit 1
cat >train <<'END'
#!/bin/sh
[ $(od -An -tu4 -N4 tokens.bin) = 20240520 ] || exit 1
for ms in 99.00 90.00 80.00 70.00 65.54 66.00; do
  echo "step    1/8 | loss 10.9 (+nanz)| norm 1.0 (+nanz)| lr 1e-04 | $ms ms | 1.0% bf16 MFU | 9"
done
END
chmod +x train
]])
    place:sh "chmod +x cuda/bin/nvcc"
    local settings = "GPU_CHECK_SIMULATE=cpu DSRUN=\"$D\" CUDA_HOME=$PWD/cuda LLMC=$PWD/%s"
    local code, out, err = check(settings:format "llm", "llm_c_124M")
    assert(code == 0, out .. err)
    helper.has(out, "times as fast as llm.c")
    helper.has(out, "llm.c: 999939 tokens/s (its own attention: no cudnn-frontend/include; GELU ")
    place:write("llm/llmc/cuda_utils.cuh", "of another version\n")
    code, out = check(settings:format "llm", "llm_c_124M")
    assert.equal(1, code)
    helper.has(out, "llm.c does not compile: ")
    code, out = check(settings:format "none", "llm_c_124M")
    assert.equal(0, code)
    assert.equal("skipped", rows().llm_c_124M.status)
    helper.has(out, "no sources of llm.c: LLMC=folder names a checkout")
  end)

  it("leaves out what its stage has no time for", function()
    assert.equal(0, (check("GPU_CHECK_SIMULATE=cpu DSRUN=\"$D\"", "--limit 1 resume")))
    assert.equal("skipped", rows().resume.status)
  end)

  it("names its rows, and refuses others", function()
    local _, out = check("", "--list")
    for _, stage in ipairs { "tests", "small", "large", "nccl", "llmc" } do
      helper.has("\n" .. out, "\n" .. stage .. ": ")
    end
    local code, _, err = check("", "no_such_row")
    assert.equal(2, code)
    helper.has(err, "no no_such_row; there are ")
  end)
end)
