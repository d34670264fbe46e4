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

-- Shapes that cuDNN takes, with both of its backward graphs.
if not helper.simulated then
  describe("attention by cuDNN", function()
    for _, fast in ipairs { "0", "1" } do
      it("has the CPU's values, DS_FAST_ATTENTION=" .. fast, function()
        ffi.C.setenv("DS_FAST_ATTENTION", fast, 1)
        local ok, message = pcall(with, "cudnn", function()
          for _, dtype in ipairs { "bf16", "f16" } do
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
          end
        end)
        ffi.C.unsetenv "DS_FAST_ATTENTION"
        if not ok then error(message, 0) end
      end)
    end
  end)
end

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
    with("best", function()
      says("DS_ATTENTION", function() F.scaled_dot_product_attention(x, x, x) end)
    end)
  end)
end)
