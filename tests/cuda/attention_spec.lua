-- Attention: each implementation against the CPU's, forward and backward. DS_ATTENTION chooses one:
-- "fma" and "own" (tensor cores where they can) everywhere, "cudnn" on a GPU.

local ds = require "ds"
local ffi = require "ffi"
local helper = require "tests.cuda.helper"

ffi.cdef "int setenv(const char *, const char *, int); int unsetenv(const char *);"

local F = ds.F
local tolerance = { f32 = 2e-5, bf16 = 2 ^ -6, f16 = 2 ^ -9 }

local function with(choice, f)
  if choice then ffi.C.setenv("DS_ATTENTION", choice, 1) else ffi.C.unsetenv "DS_ATTENTION" end
  local ok, message = pcall(f)
  ffi.C.unsetenv "DS_ATTENTION"
  if not ok then error(message, 0) end
end

-- Compares F.scaled_dot_product_attention for q [b, t, h, d] and k, v [b, s, g, d].
-- options: those of F, and views: q, k, v → what is passed on; shape: of the inputs, when not these
local function check(what, b, t, s, h, g, d, dtype, options)
  options = options or {}
  ds.seed(5)
  local function make(n, heads, i)
    local shape = options.shape and options.shape[i] or { b, n, heads, d }
    return helper.randn(shape, { dtype = dtype, grad = true })
  end
  local q, k, v = make(t, h, 1), make(s, g, 2), make(s, g, 3)
  helper.both(("%s, %s"):format(what, dtype), function(a, c, e, mask)
    if options.views then a, c, e = options.views(a), options.views(c), options.views(e) end
    return F.scaled_dot_product_attention(a, c, e, {
      mask = mask, causal = options.causal, scale = options.scale, dropout = options.dropout })
  end, { q, k, v, options.mask, n = 4 }, { tol = tolerance[dtype] })
end

-- y and the gradient of packed causal self-attention, on the CPU; backward: which implementation.
local function once(dtype, t, device, backward)
  ds.seed(9)
  local qkv = helper.randn({ 2, t, 3 * 2 * 64 }, { dtype = dtype })
  local dy = helper.randn({ 2, t, 2 * 64 }, { dtype = dtype })
  local x = helper.on(device or "cuda", qkv):requires_grad_()
  local y = F.attention(x, { n_head = 2, causal = true })
  if backward then ffi.C.setenv("DS_ATTENTION", backward, 1) end
  y:backward(helper.on(device or "cuda", dy))
  return y:detach():to("cpu"), x.grad:to "cpu"
end

-- What each is tested with; f32 is "fma" in all of them.
local implementations = {
  { "fma", "f32", "bf16" },
  { "own", "bf16", "f16" },
  not helper.simulated and { false, "bf16", "f16" } or nil, -- what is taken where nobody asks
}

local causal = { causal = true }

for _, implementation in ipairs(implementations) do
  local choice = implementation[1]
  local dtypes = { unpack(implementation, 2) }

  describe("attention on cuda by " .. (choice or "default"), function()
    local function each(name, f)
      it(name, function() with(choice, function()
        for _, dtype in ipairs(dtypes) do f(dtype) end
      end) end)
    end

    each("has the CPU's values and gradients at odd sizes", function(dtype)
      check("small", 2, 7, 7, 3, 3, 5, dtype)
      check("one", 1, 1, 1, 1, 1, 1, dtype)
      check("beyond a tile", 1, 67, 129, 2, 2, 33, dtype)
      check("head of 64", 1, 70, 130, 2, 1, 64, dtype)
      check("head of 128", 1, 65, 129, 1, 1, 128, dtype, causal)
      check("head of 40", 1, 17, 30, 2, 2, 40, dtype, causal)
      check("head of 100", 1, 70, 66, 1, 1, 100, dtype, causal)
      check("head of 130", 1, 35, 37, 1, 1, 130, dtype)
      check("head of 256", 1, 5, 40, 1, 1, 256, dtype, causal)
    end)

    each("hides what comes later", function(dtype)
      check("square", 1, 130, 130, 1, 1, 64, dtype, causal)
      check("more keys", 1, 3, 70, 2, 2, 8, dtype, causal)
      check("more rows: the first see nothing", 1, 70, 4, 2, 2, 8, dtype, causal)
    end)

    each("shares keys among heads", function(dtype)
      check("four to one", 2, 9, 66, 4, 1, 16, dtype, causal)
      check("two to one", 1, 70, 9, 4, 2, 12, dtype)
    end)

    each("adds masks", function(dtype)
      local seen = (helper.randn { 2, 1, 9, 11 }):gt(-0.5):keep()
      check("bool, broadcast over heads", 2, 9, 11, 2, 2, 8, dtype, { mask = seen })
      local own = helper.randn({ 3, 5, 67 }, { dtype = dtype })
      check("float, broadcast over the batch", 2, 5, 67, 3, 3, 8, dtype,
        { mask = own, causal = true })
      local keys = (helper.randn { 66 }):gt(0):reshape(1, 1, 1, 66):expand(2, 1, 70, 66):keep()
      check("bool, expanded over queries", 2, 70, 66, 2, 1, 16, dtype, { mask = keys })
      local hidden = ds.full({ 6, 4 }, -math.huge):keep()
      hidden:narrow(1, 1, 3):fill_(0.5)
      check("-inf for whole rows", 1, 6, 4, 1, 1, 8, dtype, { mask = hidden })
    end)

    each("drops the weights that the CPU drops", function(dtype)
      check("dropout", 2, 9, 67, 2, 1, 8, dtype, { dropout = 0.3 })
      check("dropout, causal", 1, 68, 68, 2, 2, 72, dtype, { dropout = 0.6, causal = true })
    end)

    each("follows strides", function(dtype)
      local function heads_first(x) return x:transpose(2, 3) end
      check("[B, H, T, D] seen as [B, T, H, D]", 2, 9, 9, 2, 2, 8, dtype,
        { views = heads_first, causal = true,
          shape = { { 2, 2, 9, 8 }, { 2, 2, 9, 8 }, { 2, 2, 9, 8 } } })
      local wide = { 2, 9, 2, 13 }
      check("rows that begin anywhere", 2, 9, 9, 2, 2, 8, dtype,
        { views = function(x) return x:narrow(4, 2, 8) end, shape = { wide, wide, wide } })
    end)

    each("reads the packed projection", function(dtype)
      for _, form in ipairs { { 3, 3, 8 }, { 4, 2, 64 }, { 2, 1, 5 } } do
        local h, g, d = form[1], form[2], form[3]
        ds.seed(3)
        local qkv = helper.randn({ 2, 67, (h + 2 * g) * d }, { dtype = dtype, grad = true })
        helper.both("packed " .. dtype, function(x)
          return F.attention(x, { n_head = h, n_kv_head = g, causal = true, dropout = 0.1 })
        end, { qkv }, { tol = tolerance[dtype] })
      end
    end)

    each("takes any scale", function(dtype)
      check("negative", 1, 9, 9, 1, 1, 8, dtype, { scale = -0.4 })
      check("nothing", 1, 9, 9, 1, 1, 16, dtype, { scale = 0 })
      check("sharp", 1, 9, 70, 1, 1, 16, dtype, { scale = 30 })
    end)

    each("takes sizes of 0", function(dtype)
      check("no batch", 0, 3, 3, 2, 2, 8, dtype)
      check("no queries", 1, 0, 3, 2, 2, 8, dtype)
      check("no keys", 1, 3, 0, 2, 2, 8, dtype)
      check("nothing", 1, 0, 0, 2, 2, 8, dtype)
    end)

    each("has the same bits every time", function(dtype)
      local y, d = once(dtype, 70)
      local y2, d2 = once(dtype, 70)
      helper.same(y, y2, "y", 0)
      helper.same(d, d2, "gradient", 0)
    end)

    each("keeps NaN to the rows that have it", function(dtype)
      local q, k = ds.zeros { 1, 4, 1, 16 }, ds.ones { 1, 4, 1, 16 }
      q:narrow(2, 3, 1):fill_(0 / 0)
      local a, b = q:to(dtype):to(dtype, "cuda"), k:to(dtype):to(dtype, "cuda")
      local y = F.scaled_dot_product_attention(a, b, b, { causal = true }):to("cpu"):to "f32"
      for t = 1, 4 do
        local value = y:narrow(2, t, 1):reshape(-1):tolist()[1]
        if t ~= 3 then assert.equal(1, value) else assert.is_true(value ~= value) end
      end
    end)
  end)
end

describe("attention of a few queries to many keys", function()
  for _, dtype in ipairs { "f32", "bf16", "f16" } do
    it("has the CPU's values, " .. dtype, function() with("own", function()
      check("one query", 1, 1, 700, 2, 2, 64, dtype, causal)
      check("one for each of 8 heads", 1, 1, 261, 8, 1, 40, dtype, causal)
      check("of 16 heads", 1, 1, 130, 16, 1, 12, dtype)
      check("three, the first see less", 2, 3, 387, 4, 2, 24, dtype, causal)
      check("wide", 1, 2, 300, 2, 2, 256, dtype, causal)
      check("narrow", 1, 5, 513, 2, 2, 3, dtype)
      check("more than keys", 1, 6, 2, 2, 1, 8, dtype, causal)
      local seen = (helper.randn { 2, 1, 1, 400 }):gt(0):keep()
      seen:narrow(1, 2, 1):fill_(0)
      seen:narrow(4, 100, 200):fill_(0)
      check("parts where nothing is seen", 2, 2, 400, 2, 1, 16, dtype, { mask = seen })
      check("float masks, dropout", 1, 2, 300, 4, 2, 16, dtype,
        { mask = helper.randn { 4, 2, 300 }, dropout = 0.3, causal = true })
    end) end)
  end

  it("has the same bits every time", function() with("own", function()
    ds.seed(4)
    local q = ds.randn({ 2, 1, 4, 16 }, { device = "cuda" })
    local k = ds.randn({ 2, 300, 2, 16 }, { device = "cuda" })
    local y = F.scaled_dot_product_attention(q, k, k):tolist()
    assert.same(y, F.scaled_dot_product_attention(q, k, k):tolist())
  end) end)
end)

describe("attention's implementations", function()
  it("are not the same", function()
    -- Tensor cores round the weights, multiply-add does not.
    local a, b
    with("fma", function() a = once("bf16", 40):tolist() end)
    with("own", function() b = once("bf16", 40):tolist() end)
    assert.not_same(a, b)
  end)

  it("take each other's lse", function()
    local choices = { "fma", "own" }
    if not helper.simulated then choices[3] = "cudnn" end
    local _, expected = once("bf16", 40, "cpu")
    for _, forward in ipairs(choices) do
      for _, backward in ipairs(choices) do
        local d
        with(forward, function() d = select(2, once("bf16", 40, "cuda", backward)) end)
        helper.same(expected, d, forward .. ", then " .. backward, tolerance.bf16)
      end
    end
  end)
end)

-- Shapes that cuDNN takes, with both of its backward graphs. On a simulated GPU the graphs are done
-- by plain loops, and all that surrounds them is what runs on a real one.
describe("attention by cuDNN", function()
  local function each(name, f)
    for _, fast in ipairs { "0", "1" } do
      it(("%s, DS_FAST_ATTENTION=%s"):format(name, fast), function()
        ffi.C.setenv("DS_FAST_ATTENTION", fast, 1)
        local ok, message = pcall(with, "cudnn", function()
          for _, dtype in ipairs { "bf16", "f16" } do f(dtype) end
        end)
        ffi.C.unsetenv "DS_FAST_ATTENTION"
        if not ok then error(message, 0) end
      end)
    end
  end

  each("has the CPU's values", function(dtype)
    check("square", 2, 96, 96, 3, 3, 64, dtype, causal)
    check("odd", 1, 77, 77, 2, 2, 128, dtype, causal)
    check("grouped", 2, 64, 64, 4, 2, 64, dtype, causal)
    check("all seen", 1, 50, 130, 2, 2, 40, dtype)
    check("more queries", 1, 130, 33, 4, 1, 64, dtype)
    check("wide", 1, 40, 40, 2, 2, 256, dtype, causal)
    ds.seed(3)
    local qkv = helper.randn({ 2, 100, 3 * 4 * 64 }, { dtype = dtype, grad = true })
    helper.both("packed " .. dtype, function(x)
      return F.attention(x, { n_head = 4, causal = true })
    end, { qkv }, { tol = tolerance[dtype] })
  end)

  each("hides what comes later, with as many queries as keys or not", function(dtype)
    check("more keys", 2, 33, 100, 2, 1, 40, dtype, causal)
    check("many more keys", 1, 64, 192, 2, 2, 64, dtype, causal)
    check("more rows: the first see nothing", 2, 83, 45, 4, 2, 40, dtype, causal)
  end)

  -- Masks [b h t s] of which those of `size` 1 are the same for all.
  local function bool(size, least)
    ds.seed(21)
    return helper.randn(size):gt(least or 0):keep()
  end
  local function float(size, dtype)
    ds.seed(22)
    return helper.randn(size, { dtype = dtype })
  end

  each("hides by bool, whatever the mask is the same for", function(dtype)
    for _, size in ipairs { { 2, 1, 1, 96 }, { 1, 1, 40, 96 }, { 2, 3, 40, 96 }, { 1, 3, 1, 96 },
      { 2, 1, 40, 1 }, { 40, 96 } } do
      check("mask " .. table.concat(size, " "), 2, 40, 96, 3, 3, 16, dtype, { mask = bool(size) })
    end
    check("odd keys", 2, 35, 77, 4, 2, 40, dtype, { mask = bool { 2, 4, 35, 77 } })
    check("beyond a step", 1, 32, 521, 1, 1, 8, dtype, { mask = bool { 1, 1, 1, 521 } })
    local view = bool({ 2, 1, 41, 99 }):narrow(3, 2, 40):narrow(4, 3, 96)
    check("rows that begin anywhere", 2, 40, 96, 2, 2, 8, dtype, { mask = view })
    check("transposed", 1, 40, 96, 2, 2, 8, dtype,
      { mask = bool({ 1, 2, 96, 40 }):transpose(3, 4) })
    check("expanded", 2, 40, 96, 2, 2, 8, dtype,
      { mask = bool({ 2, 1, 1, 96 }):expand(2, 2, 40, 96) })
  end)

  each("adds masks of any dtype", function(dtype)
    for _, mask in ipairs { "f32", "bf16", "f16" } do
      check(mask .. " for each head", 2, 40, 72, 2, 2, 16, dtype,
        { mask = float({ 2, 40, 72 }, mask) })
      check(mask .. ", odd, causal", 2, 45, 45, 2, 1, 16, dtype,
        { mask = float({ 2, 1, 45, 45 }, mask), causal = true })
    end
    -- Finer than bf16: a mask of f32 is not rounded.
    local fine = ds.zeros({ 1, 96 }):add(200.0):keep()
    fine:narrow(2, 40, 1):fill_(200.75)
    check("f32 between two numbers of bf16", 1, 40, 96, 1, 1, 8, dtype, { mask = fine })
  end)

  each("joins masks and causality", function(dtype)
    for _, size in ipairs { { 2, 1, 1, 0 }, { 1, 3, 0, 0 }, { 1, 1, 0, 0 } } do
      for _, n in ipairs { { 50, 50 }, { 64, 64 }, { 33, 90 }, { 90, 50 } } do
        local t, s = n[1], n[2]
        local m = { size[1], size[2], size[3] == 0 and t or 1, s }
        local what = ("mask %s, %d queries, %d keys"):format(table.concat(m, " "), t, s)
        check(what, 2, t, s, 3, 1, 16, dtype, { mask = bool(m), causal = true })
      end
    end
  end)

  each("gives 0 where a row sees nothing", function(dtype)
    local rows = bool({ 2, 2, 40, 96 }, -0.5)
    rows:narrow(3, 5, 7):fill_(0)
    rows:narrow(1, 2, 1):narrow(2, 1, 1):fill_(0) -- a whole head
    check("bool", 2, 40, 96, 2, 2, 16, dtype, { mask = rows })
    local first = bool({ 2, 1, 1, 50 }, -0.5)
    first:narrow(4, 1, 9):fill_(0)
    check("the first keys, causal", 2, 50, 50, 2, 2, 16, dtype, { mask = first, causal = true })
    check("the first keys, causal, more of them", 2, 42, 50, 2, 2, 16, dtype,
      { mask = first, causal = true })
    check("the first keys, causal, fewer", 2, 61, 50, 2, 2, 16, dtype,
      { mask = first, causal = true })
    local last = bool({ 1, 1, 1, 600 }, -0.5)
    last:narrow(4, 1, 590):fill_(0)
    check("all but the last keys", 1, 33, 600, 2, 2, 8, dtype, { mask = last })
    for _, hidden in ipairs { -math.huge, -3.3e38 } do
      local mask = float({ 2, 1, 40, 72 }, hidden == -math.huge and dtype or "f32")
      mask:narrow(3, 4, 30):fill_(hidden)
      mask:narrow(3, 39, 2):narrow(4, 1, 70):fill_(hidden)
      check("floats of " .. hidden, 2, 40, 72, 2, 2, 16, dtype, { mask = mask })
    end
  end)

  each("writes lse that others read", function(dtype)
    local mask = bool({ 2, 1, 45, 45 }, -0.5)
    mask:narrow(3, 3, 20):fill_(0)
    for _, s in ipairs { 45, 38 } do
      ds.seed(5)
      local q = helper.randn({ 2, 45, 2, 16 }, { dtype = dtype, grad = true })
      local kv = helper.randn({ 2, s, 2, 16 }, { dtype = dtype, grad = true })
      for _, order in ipairs { { "cudnn", "own" }, { "own", "cudnn" } } do
        local got = {}
        for i, device in ipairs { "cpu", "cuda" } do
          local a, b = helper.on(device, q), helper.on(device, kv)
          ffi.C.setenv("DS_ATTENTION", order[1], 1)
          local y = F.scaled_dot_product_attention(a, b, b,
            { causal = true, mask = helper.on(device, mask:narrow(4, 1, s)) })
          ffi.C.setenv("DS_ATTENTION", order[2], 1)
          y:sum():backward()
          got[i] = { a.grad, b.grad }
        end
        for i = 1, 2 do
          helper.same(got[1][i], got[2][i], ("%s, then %s, %d keys: %d"):format(order[1], order[2],
            s, i), tolerance[dtype])
        end
      end
    end
  end)
end)

describe("attention on cuda", function()
  it("says what it cannot do", function()
    local function says(text, f)
      local ok, message = pcall(f)
      assert.is_false(ok)
      assert.truthy(tostring(message):find(text, 1, true), message)
    end
    local q = ds.zeros({ 1, 2, 1, 300 }, { device = "cuda" })
    says("must be 1 to 256 wide on cuda", function() F.scaled_dot_product_attention(q, q, q) end)
    local x = ds.zeros({ 1, 2, 1, 8 }, { device = "cuda" })
    with("cudnn", function()
      says("DS_ATTENTION=cudnn", function() F.scaled_dot_product_attention(x, x, x) end)
    end)
    local function refuses(why, t, s, options)
      with("cudnn", function()
        local a = ds.randn({ 1, t, 1, 16 }, { device = "cuda" }):to("bf16"):requires_grad_()
        local b = ds.randn({ 1, s, 1, 16 }, { device = "cuda" }):to("bf16"):requires_grad_()
        says(why, function()
          F.scaled_dot_product_attention(a, b, b, options):sum():backward()
        end)
      end)
    end
    refuses("too few rows", 31, 40)
    refuses("too few rows", 50, 20, causal)
    refuses("dropout", 40, 40, { dropout = 0.5 })
    local beyond = "would not hide what is beyond"
    refuses(beyond, 64, 64)
    refuses(beyond, 40, 192)
    refuses(beyond, 40, 128)
    refuses(beyond, 40, 128, causal)
    refuses(beyond, 40, 64, { causal = true, mask = ds.ones({ 1, 64 }, { device = "cuda" }) })
    with("best", function()
      says("DS_ATTENTION", function() F.scaled_dot_product_attention(x, x, x) end)
    end)
  end)
end)
