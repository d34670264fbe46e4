-- Embedding, its gradient (sorted tokens, runs within tiles and across them), rotary positions.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local F, run = ds.F, tensor.run
local randn, both = helper.randn, helper.both

--- n indices below `bound`, some of them frequent. @tparam number often share of index 3
local function indices(n, bound, often, dtype)
  local t, state = {}, 12345
  for i = 1, n do
    state = (state * 1103515245 + 12345) % 2147483648
    local r = math.floor(state / 65536)
    t[i] = r % 1000 < (often or 0) * 1000 and 3 % bound or r % bound
  end
  return ds.tensor(t, { dtype = dtype or "i64", device = "cpu" }):keep()
end

describe("embedding on cuda", function()
  it("gives rows and their gradients, by any index", function()
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      for _, case in ipairs { { 7, 8, 5 }, { 300, 24, 200, "i32" }, { 65, 33, 130, "u8" },
        { 5, 1032, 3 }, { 1, 16, 129 } } do
        local v, c, n, index = unpack(case)
        both(("%s [%d x %d] by %d"):format(dtype, v, c, n), function(w, at)
          return F.embedding(at, w)
        end, { randn({ v, c }, { dtype = dtype, grad = true }), indices(n, v, 0, index) },
          { grad_tol = dtype == "f32" and 1e-5 or 2 ^ -7 })
      end
    end
  end)

  it("adds up runs of any length", function()
    for _, often in ipairs { 0.1, 0.5, 1 } do
      for _, n in ipairs { 63, 64, 65, 500, 4500 } do
        both(("%g of %d"):format(often, n), function(dy, at)
          local dw = ds.empty({ 40, 8 }, { device = dy.device })
          run("embedding_backward", dy.device, dw._c, dy._c, at._c, 0)
          local twice = dw:clone()
          run("embedding_backward", dy.device, twice._c, dy._c, at._c, 1)
          return dw, twice
        end, { randn { n, 8 }, indices(n, 40, often) }, { tol = 2e-5 })
      end
    end
  end)

  it("tells tokens apart that differ in high bits only", function()
    local at = ds.tensor({ 464, 66000, 464, 66000, 3, 464, 66000 },
      { dtype = "i32", device = "cpu" })
    both("high bits", function(dy, index)
      local dw = ds.empty({ 66001, 4 }, { device = dy.device })
      run("embedding_backward", dy.device, dw._c, dy._c, index._c, 0)
      return dw
    end, { randn { 7, 4 }, at:keep() })
  end)

  it("takes a gradient of another dtype, and any strides", function()
    for _, c in ipairs { 16, 7 } do
      both("strides " .. c, function(base, at, w)
        local device = base.device
        local dy = tensor.view.narrow(base, 3, 2, c)
        local dw = ds.empty({ c, 9 }, { dtype = "bf16", device = device })
        local across = tensor.view.transpose(dw, 1, 2)
        run("fill", device, dw._c, 0)
        run("embedding_backward", device, across._c, dy._c, at._c, 1)
        local y = ds.empty({ 4, 3, 20 }, { dtype = "f16", device = device })
        run("fill", device, y._c, 0)
        run("embedding", device, tensor.view.narrow(y, 3, 3, c)._c,
          tensor.view.narrow(w, 2, 2, c)._c, tensor.view.transpose(at, 1, 2)._c)
        return dw, y
      end, { randn({ 3, 4, 20 }, { dtype = "f16" }), indices(12, 9):reshape(3, 4):keep(),
        randn({ 9, 20 }, { dtype = "f16" }) })
    end
  end)

  it("clears rows without tokens, also where there are none at all", function()
    both("no tokens", function(dy, at)
      local dw = ds.full({ 70, 8 }, 5, { device = dy.device })
      run("embedding_backward", dy.device, dw._c, dy._c, at._c, 1)
      local kept = dw:clone()
      run("embedding_backward", dy.device, dw._c, dy._c, at._c, 0)
      return kept, dw
    end, { randn { 0, 8 }, indices(0, 70) })
  end)

  it("gives the same bits every time", function()
    local dy, at = helper.on("cuda", randn { 300, 8 }), helper.on("cuda", indices(300, 20, 0.3))
    local first
    for i = 1, 3 do
      local dw = ds.full({ 20, 8 }, i, { device = "cuda" })
      run("embedding_backward", "cuda", dw._c, dy._c, at._c, 0)
      first = first or dw:tolist()
      assert.same(first, dw:tolist())
    end
  end)

  it("tells of indices that are out of range, and goes on", function()
    for _, bad in ipairs { -1, 20, 2 ^ 40 } do
      for _, name in ipairs { "embedding", "embedding_backward" } do
        local w = helper.on("cuda", randn { 20, 8 })
        local at = helper.on("cuda", ds.tensor({ 1, bad, 2 }, { dtype = "i64", device = "cpu" }))
        local y = helper.on("cuda", randn { 3, 8 })
        local ok, why = pcall(function()
          if name == "embedding" then
            run(name, "cuda", y._c, w._c, at._c)
          else
            run(name, "cuda", w._c, y._c, at._c, 0)
          end
          return w:tolist()
        end)
        assert.is_false(ok)
        assert.truthy(tostring(why):find(("%s: index %.0f is not in 0 to 19"):format(name, bad), 1,
          true), tostring(why))
        assert.equal(20, #w:tolist()) -- the device goes on
      end
    end
  end)

  it("refuses what does not fit, by name", function()
    local w = ds.full({ 4, 8 }, 1, { device = "cuda" })
    local y = ds.full({ 3, 8 }, 1, { device = "cuda" })
    local at = helper.on("cuda", indices(4, 4))
    assert.has_error(function() run("embedding", "cuda", y._c, w._c, at._c) end)
    assert.has_error(function() run("embedding", "cuda", w._c, w._c, w._c) end)
    assert.has_error(function() run("embedding_backward", "cuda", w._c, y._c, at._c, 0) end)
  end)
end)

describe("rotary on cuda", function()
  it("turns pairs, there and back", function()
    for _, dtype in ipairs { "f32", "bf16", "f16" } do
      for _, shape in ipairs { { 1, 1, 1, 2 }, { 2, 5, 3, 16 }, { 3, 17, 2, 6 },
        { 1, 40, 4, 64 } } do
        for _, options in ipairs { {}, { offset = 1000, interleaved = true }, { base = 500 } } do
          both(("rotary %s [%s]"):format(dtype, table.concat(shape, " x ")), function(x)
            return F.rotary(x, options)
          end, { randn(shape, { dtype = dtype, grad = true }) },
            { tol = helper.tolerance[dtype] * 2 })
        end
      end
    end
  end)

  it("takes any strides, in place too, and nothing", function()
    for _, mode in ipairs { 0, 1 } do
      both("part of q, k and v", function(qkv)
        for i = 0, 1 do
          local q = tensor.view.narrow(qkv, 4, 1 + 16 * i, 16)
          run("rotary", qkv.device, q._c, q._c, 3, 10000, mode, i)
        end
        local odd = tensor.view.narrow(qkv, 4, 34, 8)
        run("rotary", qkv.device, odd._c, odd._c, 3, 10000, mode, 0)
        local across = tensor.view.transpose(qkv, 2, 4)
        run("rotary", qkv.device, across._c, across._c, -2, 10000, mode, 0)
        return qkv
      end, { randn { 2, 6, 3, 48 } }, { tol = 2e-5 })
    end
    both("nothing", function(x) return F.rotary(x) end, { randn { 2, 0, 3, 4 } })
  end)
end)
