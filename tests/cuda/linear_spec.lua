-- Products and the layers made of them, against the CPU's.

local ffi = require "ffi"

local ds = require "ds"
local F = require "ds.functional"
local border = require "ds.ffi"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"

local both, randn, run = helper.both, helper.randn, tensor.run

local function waits() return tonumber(border.C.ds_device_count(1).waits) end

-- Sums of a few hundred products: bf16 rounds twice where a CPU without it rounds once.
local loose = { f32 = 2e-5, bf16 = 2 ^ -6, f16 = 2 ^ -9 }
local dtypes = { "f32", "bf16", "f16" }

describe("matmul on cuda", function()
  it("multiplies matrices of any size", function()
    for i, s in ipairs { { 1, 1, 1 }, { 3, 5, 7 }, { 17, 1, 31 }, { 1, 40, 1 }, { 64, 33, 8 },
      { 0, 3, 2 }, { 2, 3, 0 }, { 2, 0, 3 }, { 127, 16, 48 } } do
      local dtype = dtypes[i % 3 + 1]
      both(("matmul %dx%dx%d %s"):format(s[1], s[2], s[3], dtype),
        function(a, b) return a:matmul(b) end,
        { randn({ s[1], s[2] }, { dtype = dtype, grad = true }),
          randn({ s[2], s[3] }, { dtype = dtype, grad = true }) }, { tol = loose[dtype] })
    end
  end)

  it("takes views where they lie, or copies them", function()
    for _, dtype in ipairs(dtypes) do
      local a, b = randn({ 13, 24 }, { dtype = dtype }), randn({ 24, 19 }, { dtype = dtype })
      local views = {
        transposed = { a:t(), b:t(), function(x, y) return x:t():matmul(y:t()) end },
        gaps = { randn({ 13, 29 }, { dtype = dtype }), b,
          function(x, y) return x:narrow(2, 2, 24):matmul(y) end },
        odd = { randn({ 13, 8, 3 }, { dtype = dtype }), randn({ 8, 5 }, { dtype = dtype }),
          function(x, y) return x:select(3, 2):matmul(y) end },
        repeated = { randn({ 1, 24 }, { dtype = dtype }), randn({ 24, 1 }, { dtype = dtype }),
          function(x, y) return x:expand(7, 24):matmul(y:expand(24, 9)) end },
        sloping = { randn({ 13, 24, 2 }, { dtype = dtype }),
          randn({ 24, 19, 3 }, { dtype = dtype }),
          function(x, y) return x:select(3, 1):matmul(y:select(3, 3)) end },
      }
      for name, v in pairs(views) do
        local x, y = v[1]:contiguous(), v[2]:contiguous()
        both(name .. " " .. dtype, v[3], { x, y }, { tol = loose[dtype] })
      end
    end
  end)

  it("has batches, some repeated, some in several dimensions", function()
    for i, s in ipairs { { { 4, 5, 6 }, { 4, 6, 3 } }, { { 4, 5, 6 }, { 6, 3 } },
      { { 5, 6 }, { 3, 6, 2 } }, { { 2, 1, 5, 6 }, { 3, 6, 2 } },
      { { 2, 3, 5, 6 }, { 2, 1, 6, 4 } },
      { { 0, 5, 6 }, { 6, 3 } }, { { 2, 3, 2, 4, 5 }, { 2, 1, 2, 5, 3 } } } do
      local dtype = dtypes[i % 3 + 1]
      both("batch " .. i, function(a, b) return a:matmul(b) end,
        { randn(s[1], { dtype = dtype }), randn(s[2], { dtype = dtype }) }, { tol = loose[dtype] })
    end
    both("heads", function(a, b) -- as attention by hand does it
      return a:transpose(2, 3):matmul(b:permute(1, 3, 4, 2))
    end, { randn({ 2, 7, 3, 8 }, { grad = true }), randn({ 2, 7, 3, 8 }, { grad = true }) },
      { tol = 2e-5 })
  end)

  -- y = alpha a b + beta y with y as `view` of a larger tensor says
  local function accumulated(view, dtype, y_dtype, alpha, beta)
    return function(y, a, b)
      run("matmul", a.device, view(y)._c, a._c, b._c, alpha, beta)
      return y
    end, { randn({ 11, 12, 2 }, { dtype = y_dtype }), randn({ 5, 20 }, { dtype = dtype }),
      randn({ 20, 6 }, { dtype = dtype }) }, { tol = loose[y_dtype] }
  end

  it("adds to what is there, wherever it lies, in f32 if wanted", function()
    local views = {
      rows = function(y) return y:reshape(22, 12):narrow(1, 3, 5):narrow(2, 1, 6) end,
      columns = function(y) return y:reshape(22, 12):narrow(1, 5, 6):narrow(2, 7, 5):t() end,
      sloping = function(y) return y:select(3, 2):narrow(1, 2, 5):narrow(2, 4, 6) end,
    }
    for name, view in pairs(views) do
      for _, dtype in ipairs(dtypes) do
        both(name .. dtype, accumulated(view, dtype, dtype, 0.5, 0))
        both(name .. dtype .. " added", accumulated(view, dtype, dtype, 1, 1))
        both(name .. dtype .. " in f32", accumulated(view, dtype, "f32", 1, 0.25))
      end
      both(name .. " of nothing", accumulated(view, "f32", "f32", 0, 0.25))
    end
  end)

  it("does not read what it overwrites", function()
    local a, b = randn { 3, 4 }, randn { 4, 5 }
    both("over NaN", function(x, y)
      local out = ds.full({ 3, 5 }, 0 / 0, { device = x.device })
      run("matmul", x.device, out._c, x._c, y._c, 1, 0)
      return out
    end, { a, b })
    both("times 0", function(x, y)
      local out = ds.full({ 3, 5 }, 0 / 0, { device = x.device })
      run("matmul", x.device, out._c, x._c, y._c, 0, 0)
      return out
    end, { a, b })
  end)

  it("refuses what does not fit", function()
    local on = function(...) return ds.zeros({ ... }, { device = "cuda" }) end
    local message = select(2, pcall(run, "matmul", "cuda", on(2, 3)._c, on(2, 4)._c, on(5, 3)._c,
      1, 0))
    assert.matches("cannot make %[2 x 3%] of %[2 x 4%] and %[5 x 3%]", message)
  end)

  it("makes a plan once for each kind of product", function()
    local a, b = helper.on("cuda", randn { 23, 9 }), helper.on("cuda", randn { 9, 14 })
    local count = helper.products()
    a:matmul(b)
    local made, products = tonumber(count.plans), tonumber(count.products)
    for _ = 1, 5 do a:matmul(b) end
    assert.equal(made, tonumber(count.plans))
    assert.equal(products + 5, tonumber(count.products))
    b:t():matmul(a:t())
    assert.equal(made + 1, tonumber(count.plans))
    a:matmul(b)
    assert.equal(made + 1, tonumber(count.plans))
    local c, before = a:matmul(b), waits()
    a:matmul(b)
    assert.equal(before, waits())
    assert.same(c:tolist(), a:matmul(b):tolist())
  end)
end)

describe("linear on cuda", function()
  local activations = { "none", "gelu", "gelu_tanh", "relu", "silu" }

  it("gives the CPU's values and gradients", function()
    for i, s in ipairs { { 5, 7, 3 }, { 16, 8, 24 }, { 33, 19, 40 }, { 1, 1, 1 }, { 70, 12, 264 },
      { 9, 33, 300 } } do
      for k, name in ipairs(activations) do
        local dtype = name == "relu" and "f32" or dtypes[(i + k) % 3 + 1] -- its slope jumps at 0
        both(("linear %s %s %d"):format(name, dtype, i), function(x, w, b)
          return F.linear(x, w, b, { activation = name })
        end, { randn({ s[1], s[2] }, { dtype = dtype, grad = true }),
          randn({ s[3], s[2] }, { dtype = dtype, grad = true, scale = 0.3 }),
          randn({ s[3] }, { dtype = dtype, grad = true }) }, { tol = loose[dtype] })
      end
    end
  end)

  it("has no bias, no rows, or leading dimensions", function()
    local linear = F.linear
    both("no bias", function(x, w) return linear(x, w, nil, { activation = "gelu" }) end,
      { randn({ 2, 3, 8 }, { grad = true }), randn({ 5, 8 }, { grad = true }) }, { tol = 2e-5 })
    for _, name in ipairs(activations) do
      both("no rows " .. name, function(x, w, b) return linear(x, w, b, { activation = name }) end,
        { randn({ 0, 8 }, { grad = true }), randn({ 5, 8 }, { grad = true }),
          randn({ 5 }, { grad = true }) })
    end
  end)

  it("adds a bias that cuBLASLt cannot", function()
    for _, dtype in ipairs(dtypes) do
      for code = 0, 4 do
        both("bias " .. dtype .. code, function(x, w, b, b2)
          local y = ds.zeros({ 4, 9 }, { dtype = dtype, device = x.device })
          run("linear", x.device, y:narrow(2, 2, 6)._c, nil, x._c, w._c, b:narrow(1, 2, 6)._c, code)
          local z = ds.zeros({ 4, 6 }, { dtype = dtype, device = x.device })
          run("linear", x.device, z._c, nil, x._c, w._c, b2._c, code)
          return y, z
        end, { randn({ 4, 16 }, { dtype = dtype }), randn({ 6, 16 }, { dtype = dtype }),
          randn({ 7 }, { dtype = dtype }), randn { 6 } }, { tol = loose[dtype] })
      end
    end
  end)

  it("keeps limits: infinities, NaN, zeros of both signs", function()
    local points = { 0, -0.0, 1e-30, 0.5, -0.5, 3, -3, 6, -6, 12, -12, 30, -30, 1e4, -1e4,
      math.huge, -math.huge, 0 / 0 }
    for _, dtype in ipairs(dtypes) do
      for code = 1, 4 do
        for i, value in ipairs(points) do -- one by one: the tolerance is the largest one's
          both(("act %d of %g in %s"):format(code, value, dtype), function(h)
            local y, slope = ds.empty({ 9 }, { dtype = dtype, device = h.device }),
              ds.empty({ 9 }, { dtype = dtype, device = h.device })
            run("activate", h.device, y._c, slope._c, h._c, code)
            return y, i < #points and slope or nil
          end, { ds.full({ 9 }, value, { device = "cpu" }):to(dtype) }, { tol = loose[dtype] })
        end
      end
    end
  end)

  it("activates any number of elements from any address", function()
    for i, n in ipairs { 0, 1, 7, 255, 1024, 4099, 8195 } do
      for offset = 0, 1 do
        local dtype = dtypes[(i + offset) % 3 + 1]
        both(("activate %d from %d %s"):format(n, offset, dtype), function(h)
          local y = ds.full({ n + 2 }, 5, { dtype = dtype, device = h.device })
          local slope = ds.full({ n + 2 }, 5, { dtype = dtype, device = h.device })
          run("activate", h.device, y:narrow(1, 1 + offset, n)._c,
            slope:narrow(1, 1 + offset, n)._c, h:narrow(1, 1 + offset, n)._c, 1 + i % 4)
          return y, slope
        end, { randn({ n + 1 }, { dtype = dtype, scale = 2 }) })
      end
    end
  end)

  it("sums columns, of any shape", function()
    for i, s in ipairs { { 1, 1 }, { 0, 5 }, { 3, 7 }, { 65, 256 }, { 130, 300 }, { 1000, 3 },
      { 40, 1032 }, { 200, 8 } } do
      local dtype = dtypes[i % 3 + 1]
      local d, slope = randn({ s[1], s[2] + 1 }, { dtype = dtype }),
        randn({ s[1], s[2] }, { dtype = dtype })
      for _, db_dtype in ipairs { "f32", dtype } do
        for add = 0, 1 do
          both(("columns %dx%d %s %s %d"):format(s[1], s[2], dtype, db_dtype, add),
            function(dy, factor, db, sums)
              local dh = ds.zeros(factor.shape, { dtype = dtype, device = dy.device })
              run("linear_backward_bias", dy.device, dh._c, db._c, dy:narrow(2, 2, s[2])._c,
                factor._c, add)
              run("linear_backward_bias", dy.device, nil, sums._c, factor._c, nil, add)
              run("linear_backward_bias", dy.device, factor._c, nil, factor._c, factor._c, 0)
              return db, sums, dh, factor
            end, { d, slope, randn({ s[2] }, { dtype = db_dtype }),
              randn({ s[2] }, { dtype = db_dtype }) },
            { tol = db_dtype == "f32" and dtype == "f32" and 2e-5 or loose[dtype] })
        end
      end
    end
  end)

  it("runs two layers with an activation between", function()
    for i, s in ipairs { { 5, 7, 12, 3 }, { 24, 16, 40, 16 }, { 66, 8, 272, 9 }, { 0, 8, 8, 8 } } do
      for k = 2, #activations do
        local dtype = activations[k] == "relu" and "f32" or dtypes[(i + k) % 3 + 1]
        both(("mlp %s %s %d"):format(activations[k], dtype, i), function(x, w1, b1, w2, b2)
          return F.mlp(x, w1, b1, w2, b2, { activation = activations[k] })
        end, { randn({ s[1], s[2] }, { dtype = dtype, grad = true }),
          randn({ s[3], s[2] }, { dtype = dtype, grad = true, scale = 0.3 }),
          randn({ s[3] }, { dtype = dtype, grad = true }),
          randn({ s[4], s[3] }, { dtype = dtype, grad = true, scale = 0.3 }),
          randn({ s[4] }, { dtype = dtype, grad = k % 2 == 0 }) }, { tol = loose[dtype] })
      end
    end
    both("frozen", function(x, w1, w2)
      return F.mlp(x, w1, nil, w2, nil, { activation = "gelu_tanh" })
    end, { randn { 6, 8 }, randn { 16, 8 }, randn({ 8, 16 }, { grad = true }) }, { tol = 2e-5 })
  end)

  it("keeps what was before the tanh form of GELU", function()
    for i, s in ipairs { { 4, 8, 16 }, { 5, 8, 13 }, { 3, 0, 8 } } do
      for _, dtype in ipairs(dtypes) do
        both("aux " .. dtype .. i, function(x, w, b)
          local out = {}
          for k = 1, 4 do
            out[k] = ds.empty({ s[1], s[3] }, { dtype = dtype, device = x.device })
          end
          run("linear_aux", x.device, out[1]._c, out[2]._c, x._c, w._c, b._c, 2)
          run("linear_aux", x.device, out[3]._c, out[4]._c, x._c, w._c, nil, 2)
          return unpack(out)
        end, { randn({ s[1], s[2] }, { dtype = dtype }), randn({ s[3], s[2] }, { dtype = dtype }),
          randn({ s[3] }, { dtype = dtype }) }, { tol = loose[dtype] })
      end
    end
  end)

  it("gives the same bits every time", function()
    local dy, h = helper.on("cuda", randn({ 333, 72 }, { dtype = "bf16" })),
      helper.on("cuda", randn({ 333, 40 }, { dtype = "bf16" }))
    local w = helper.on("cuda", randn({ 72, 40 }, { dtype = "bf16" }))
    local function once()
      local dh, db = ds.empty({ 333, 40 }, { dtype = "bf16", device = "cuda" }),
        ds.empty({ 40 }, { device = "cuda" })
      run("linear_backward_act", "cuda", dh._c, nil, db._c, dy._c, w._c, h._c, 1, 0)
      return { dh:tolist(), db:tolist() }
    end
    assert.same(once(), once())
  end)

  it("refuses what does not fit", function()
    local on = function(...) return ds.zeros({ ... }, { device = "cuda" }) end
    local function refused(pattern, ...)
      assert.matches(pattern, select(2, pcall(run, ...)))
    end
    refused("linear wants x", "linear", "cuda", on(2, 3)._c, nil, on(2, 4)._c, on(3, 5)._c, nil, 0)
    refused("no activation 7", "linear", "cuda", on(2, 3)._c, nil, on(2, 5)._c, on(3, 5)._c, nil, 7)
    refused("no activation 0", "activate", "cuda", on(2)._c, nil, on(2)._c, 0)
    refused("db dense with 3", "linear_backward_bias", "cuda", nil, on(4)._c, on(2, 3)._c, nil, 0)
    refused("dy %[2 x N%]", "linear_backward_act", "cuda", on(2, 3)._c, nil, nil, on(2, 4)._c,
      on(5, 3)._c, on(2, 3)._c, 1, 0)
  end)
end)

describe("linear_cross_entropy on cuda", function()
  local lce = F.linear_cross_entropy

  local function targets(n, v, ignored)
    local t = {}
    for i = 1, n do t[i] = i % 5 == ignored and -100 or (i * 7919) % v end
    return ds.tensor(t, { dtype = "i64", device = "cpu" })
  end

  it("gives the CPU's loss and gradients", function()
    for i, s in ipairs { { 6, 8, 50 }, { 17, 24, 65 }, { 40, 7, 333 }, { 1, 1, 1 },
      { 3, 16, 4100 } } do
      for _, dtype in ipairs(dtypes) do
        both(("loss %s %d"):format(dtype, i), function(x, w, t) return lce(x, w, t) end,
          { randn({ s[1], s[2] }, { dtype = dtype, grad = true }),
            randn({ s[3], s[2] }, { dtype = dtype, grad = true }),
            targets(s[1], s[3], i % 2 == 0 and 1 or 9) }, { tol = loose[dtype] })
      end
    end
  end)

  it("holds a long row in shared memory or reads it again", function()
    for _, v in ipairs { 27000, 29001 } do
      both("classes " .. v, function(x, w, t) return lce(x, w, t) end,
        { randn({ 3, 2 }, { grad = true }), randn({ v, 2 }, { grad = true }), targets(3, v) },
        { tol = 2e-5 })
    end
  end)

  -- The kernel itself, with chunks of `rows`.
  local function by_chunks(dtype, dw_dtype, n, k, v, rows, add)
    return function(x, w, t, dw)
      local loss = ds.empty({ 1 }, { device = x.device }):reshape({})
      local dx = ds.empty({ n, k }, { dtype = dtype, device = x.device })
      local scratch = ds.full({ rows, math.ceil(v / 16) * 16 }, 0 / 0,
        { dtype = dtype, device = x.device })
      local carry = ds.empty({ v, k }, { device = x.device,
        dtype = x.device == "cuda" and "f32" or dw_dtype })
      run("linear_cross_entropy", x.device, loss._c, dx._c, dw._c, scratch._c, carry._c, x._c, w._c,
        t._c, -100, 0.5, add)
      return loss, dx, dw
    end, { randn({ n, k }, { dtype = dtype }), randn({ v, k }, { dtype = dtype }), targets(n, v, 2),
      randn({ v, k }, { dtype = dw_dtype, scale = 0.01 }) }
  end

  it("sums the weight's gradient over chunks in f32", function()
    for _, dtype in ipairs(dtypes) do
      for add = 0, 1 do
        for _, dw_dtype in ipairs { dtype, "f32" } do
          local f, inputs = by_chunks(dtype, dw_dtype, 37, 9, 43, 16, add)
          both(("chunks %s %s %d"):format(dtype, dw_dtype, add), f, inputs, { tol = loose[dtype] })
          f, inputs = by_chunks(dtype, dw_dtype, 12, 8, 32, 16, add)
          both(("one chunk %s %s %d"):format(dtype, dw_dtype, add), f, inputs,
            { tol = loose[dtype] })
        end
      end
      for add = 0, 1 do
        local f, inputs = by_chunks(dtype, dtype, 0, 8, 32, 16, add)
        both("no rows " .. dtype .. add, f, inputs)
      end
    end
  end)

  it("counts nothing where all rows are ignored", function()
    both("ignored", function(x, w, t) return lce(x, w, t) end,
      { randn({ 4, 8 }, { grad = true }), randn({ 20, 8 }, { grad = true }),
        ds.full({ 4 }, -100, { dtype = "i64", device = "cpu" }) })
  end)

  it("takes logits without bounds", function()
    both("large", function(x, w, t) return lce(x, w, t) end,
      { randn({ 5, 8 }, { grad = true, scale = 300 }), randn({ 70, 8 }, { grad = true }),
        targets(5, 70) }, { tol = 2e-5 })
    local x, w = randn { 2, 4 }, randn { 40, 4 }
    both("infinite", function(a, b, t)
      local h = ds.full({ 2, 4 }, 1, { device = a.device }) -- logits of 4 and of -inf
      local v = ds.where(b:ge(-10), ds.ones(40, 4, { device = b.device }), b)
      v:narrow(1, 3, 20):fill_(-math.huge)
      return lce(h, v, t)
    end, { x, w, ds.tensor({ 1, 39 }, { dtype = "i64", device = "cpu" }) })
  end)

  it("waits for nothing", function()
    local x, w = helper.on("cuda", randn({ 6, 8 }, { grad = true })),
      helper.on("cuda", randn({ 50, 8 }, { grad = true }))
    local t = helper.on("cuda", targets(6, 50))
    local before = waits()
    lce(x, w, t):backward()
    assert.equal(before, waits())
    local half = ds.full({}, 0.5, { device = "cuda" })
    local whole = w.grad:to("cpu"):tolist()
    w.grad = nil
    lce(x, w, t):backward(half)
    assert.is_true(math.abs(w.grad:to("cpu"):tolist()[1][1] - whole[1][1] / 2) < 1e-7)
    half._value = 0.5 -- what the engine knows of its own gradient
    w.grad = nil
    before = waits()
    lce(x, w, t):backward(half)
    assert.equal(before, waits())
    assert.is_true(math.abs(w.grad:to("cpu"):tolist()[1][1] - whole[1][1] / 2) < 1e-7)
  end)

  it("tells of a target that is no class", function()
    local x, w = ds.ones(3, 4, { device = "cuda" }), ds.ones(10, 4, { device = "cuda" })
    lce(x, w, helper.on("cuda", ds.tensor({ 1, 10, 2 }, { dtype = "i64" })))
    local ok, message = pcall(border.C.ds_device_synchronize, 1)
    assert.is_true(ok)
    assert.is_true(message < 0)
    assert.matches("linear_cross_entropy: index 10 is not in 0 to 9",
      ffi.string(border.C.ds_error()))
  end)
end)

describe("scale_by on cuda", function()
  it("multiplies by a number of the device", function()
    for i, n in ipairs { 0, 1, 9, 1030 } do
      for offset = 0, 1 do
        local dtype = dtypes[(i + offset) % 3 + 1]
        both("scale " .. n .. dtype, function(x, factor)
          local y = x:narrow(1, 1 + offset, n)
          run("scale_by", x.device, y._c, y._c, factor._c, 0.25)
          return x
        end, { randn({ n + 1 }, { dtype = dtype }), ds.full({}, 3, { device = "cpu" }) })
      end
    end
  end)
end)
