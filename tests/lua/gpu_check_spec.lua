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

  it("leaves out what its stage has no time for", function()
    assert.equal(0, (check("GPU_CHECK_SIMULATE=cpu DSRUN=\"$D\"", "--limit 1 resume")))
    assert.equal("skipped", rows().resume.status)
  end)

  it("names its rows, and refuses others", function()
    local _, out = check("", "--list")
    for _, stage in ipairs { "tests", "small", "large", "nccl" } do
      helper.has("\n" .. out, "\n" .. stage .. ": ")
    end
    local code, _, err = check("", "no_such_row")
    assert.equal(2, code)
    helper.has(err, "no no_such_row; there are ")
  end)
end)
