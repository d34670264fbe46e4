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

local function implementations()
  local list = { "fma", "own" }
  if not helper.simulated then list[3] = false end -- what is chosen where nobody asks
  return list
end

local causal = { causal = true }

for _, choice in ipairs(implementations()) do
  describe("attention on cuda by " .. (choice or "default"), function()
    local function each(name, f)
      it(name, function() with(choice, f) end)
    end

    each("has the CPU's values and gradients at odd sizes", function()
      check("small", 2, 7, 7, 3, 3, 5, "f32")
      check("one", 1, 1, 1, 1, 1, 1, "f32")
      check("beyond a tile", 1, 67, 129, 2, 2, 33, "f32")
      check("wide", 1, 35, 37, 1, 1, 130, "f32")
      check("widest", 1, 5, 40, 1, 1, 256, "f32", causal)
      check("head of 100", 1, 70, 66, 1, 1, 100, "f32", causal)
    end)

    each("hides what comes later", function()
      for _, dtype in ipairs { "f32", "bf16" } do
        check("square", 1, 65, 65, 2, 2, 16, dtype, causal)
        check("more keys", 1, 3, 70, 2, 2, 8, dtype, causal)
        check("more rows: the first see nothing", 1, 70, 4, 2, 2, 8, dtype, causal)
      end
    end)

    each("shares keys among heads", function()
      for _, dtype in ipairs { "f32", "f16" } do
        check("four to one", 2, 9, 66, 4, 1, 16, dtype, causal)
        check("two to one", 1, 70, 9, 4, 2, 12, dtype)
      end
    end)

    each("takes bf16 and f16 in any width", function()
      for _, dtype in ipairs { "bf16", "f16" } do
        check("64", 1, 70, 130, 2, 1, 64, dtype)
        check("64 causal", 1, 130, 130, 2, 2, 64, dtype, causal)
        check("128", 1, 65, 129, 1, 1, 128, dtype, causal)
        check("40", 1, 17, 30, 2, 2, 40, dtype, causal)
        check("33", 1, 9, 30, 2, 2, 33, dtype, causal)
        check("160", 1, 9, 30, 1, 1, 160, dtype)
      end
    end)

    each("adds masks", function()
      for _, dtype in ipairs { "f32", "bf16" } do
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
      end
    end)

    each("drops the weights that the CPU drops", function()
      for _, dtype in ipairs { "f32", "bf16" } do
        check("dropout", 2, 9, 67, 2, 1, 8, dtype, { dropout = 0.3 })
        check("dropout, causal", 1, 66, 66, 2, 2, 16, dtype, { dropout = 0.6, causal = true })
      end
    end)

    each("follows strides", function()
      local function heads_first(x) return x:transpose(2, 3) end
      for _, dtype in ipairs { "f32", "bf16" } do
        check("[B, H, T, D] seen as [B, T, H, D]", 2, 9, 9, 2, 2, 8, dtype,
          { views = heads_first, causal = true,
            shape = { { 2, 2, 9, 8 }, { 2, 2, 9, 8 }, { 2, 2, 9, 8 } } })
        local wide = { 2, 9, 2, 13 }
        check("rows that begin anywhere", 2, 9, 9, 2, 2, 8, dtype,
          { views = function(x) return x:narrow(4, 2, 8) end, shape = { wide, wide, wide } })
      end
    end)

    each("reads the packed projection", function()
      for _, dtype in ipairs { "f32", "bf16" } do
        for _, form in ipairs { { 3, 3, 8 }, { 4, 2, 64 }, { 2, 1, 5 } } do
          local h, g, d = form[1], form[2], form[3]
          ds.seed(3)
          local qkv = helper.randn({ 2, 67, (h + 2 * g) * d }, { dtype = dtype, grad = true })
          helper.both("packed " .. dtype, function(x)
            return F.attention(x, { n_head = h, n_kv_head = g, causal = true, dropout = 0.1 })
          end, { qkv }, { tol = tolerance[dtype] })
        end
      end
    end)

    each("takes any scale", function()
      check("negative", 1, 9, 9, 1, 1, 8, "f32", { scale = -0.4 })
      check("nothing", 1, 9, 9, 1, 1, 16, "bf16", { scale = 0 })
      check("sharp", 1, 9, 70, 1, 1, 16, "bf16", { scale = 30 })
    end)

    each("takes sizes of 0", function()
      for _, dtype in ipairs { "f32", "bf16" } do
        check("no batch", 0, 3, 3, 2, 2, 8, dtype)
        check("no queries", 1, 0, 3, 2, 2, 8, dtype)
        check("no keys", 1, 3, 0, 2, 2, 8, dtype)
        check("nothing", 1, 0, 0, 2, 2, 8, dtype)
      end
    end)

    each("has the same bits every time", function()
      local function once(dtype)
        ds.seed(9)
        local qkv = helper.randn({ 2, 70, 3 * 2 * 64 }, { dtype = dtype })
        qkv = helper.on("cuda", qkv):requires_grad_()
        local y = F.attention(qkv, { n_head = 2, causal = true })
        y:backward(helper.on("cuda", helper.randn(y.shape, { dtype = dtype })))
        return y:detach():to "cpu", qkv.grad:to "cpu"
      end
      for _, dtype in ipairs { "f32", "bf16" } do
        local y, d = once(dtype)
        local y2, d2 = once(dtype)
        helper.same(y, y2, "y", 0)
        helper.same(d, d2, "gradient", 0)
      end
    end)

    each("keeps NaN to the rows that have it", function()
      local q, k = ds.zeros { 1, 4, 1, 16 }, ds.ones { 1, 4, 1, 16 }
      q:narrow(2, 3, 1):fill_(0 / 0)
      for _, dtype in ipairs { "f32", "bf16" } do
        local a, b = q:to(dtype):to(dtype, "cuda"), k:to(dtype):to(dtype, "cuda")
        local y = F.scaled_dot_product_attention(a, b, b, { causal = true }):to("cpu"):to "f32"
        for t = 1, 4 do
          local value = y:narrow(2, t, 1):reshape(-1):tolist()[1]
          if t ~= 3 then assert.equal(1, value) else assert.is_true(value ~= value) end
        end
      end
    end)
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
