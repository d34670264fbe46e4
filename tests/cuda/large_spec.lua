-- Tensors of more than 2^31 elements: what a kernel makes of the last rows of one is what it makes
-- of those rows alone. With DS_TEST_LARGE=1 on a GPU of 80 GiB or more; else with small ones.

local ds = require "ds"
local tensor = require "ds.tensor"
local helper = require "tests.cuda.helper"
local F = ds.F

local large = os.getenv "DS_TEST_LARGE" == "1" and not helper.simulated
local W = large and 2048 or 40
local R = large and 2 ^ 20 + 37 or 41 -- R W is beyond 2^31

local function free()
  collectgarbage()
  collectgarbage()
  ds.empty_cache "cuda"
end

--- The last n rows, as a tensor of their own.
local function tail(t, n) return t:narrow(1, t:size(1) - n + 1, n):clone():keep() end

local function random(rows, width, dtype)
  local x = ds.empty(rows, width, { dtype = dtype or "bf16", device = "cuda" }):keep()
  tensor.run("uniform", "cuda", x._c, -1, 1, 5, 0)
  return x
end

--- f of all rows ends with f of the last rows.
local function by_rows(name, f, x, ...)
  local more = { ... }
  local all = ds.no_grad(function() return tail(f(x, unpack(more)), 3) end)
  local last = {}
  for i, t in ipairs(more) do
    last[i] = tensor.is_tensor(t) and t:size(1) == x:size(1) and tail(t, 3) or t
  end
  local few = ds.no_grad(function() return f(tail(x, 3), unpack(last)):clone() end)
  helper.same(few:to "cpu", all:to "cpu", name, 2 ^ -7) -- sums may go in another order
end

describe("more than 2^31 elements", function()
  after_each(free)

  it("are random as on the CPU", function()
    local x = random(R, W, "f32")
    local last = ds.empty(3, W)
    tensor.run("uniform", "cpu", last._c, -1, 1, 5, (R - 3) * W / 4)
    helper.same(last, tail(x, 3):to "cpu", "uniform", 0)
  end)

  it("pass elementwise kernels and copies", function()
    local x = random(R, W)
    by_rows("gelu", function(t) return t:gelu() end, x)
    free()
    by_rows("add", function(t, u) return t + u end, x, x)
    free()
    by_rows("mul", function(t) return t * 3 end, x)
    free()
    by_rows("to f32", function(t) return t:float() end, x)
    free()
    local y = x:t():contiguous() -- [W x R]
    helper.same(tail(x, 3):t():contiguous():to "cpu", y:narrow(2, R - 2, 3):contiguous():to "cpu",
      "transposed", 0)
  end)

  it("are counted and summed", function()
    local n = large and 2 ^ 32 + 5 or 1005
    local ones = ds.ones(n, { dtype = "u8", device = "cuda" })
    assert.equal(n, ones:sum():item())
    ones = nil -- luacheck: ignore
    free()
    local x = ds.full({ R, W }, 0.5, { dtype = "bf16", device = "cuda" })
    assert.equal(0.5, x:mean():item())
    by_rows("sum of rows", function(t) return t:sum(-1) end, x)
    free()
    local columns = x:sum(1):float():to("cpu"):tolist()
    for _, i in ipairs { 1, W } do
      assert.is_true(math.abs(columns[i] - R / 2) <= R / 2 ^ 8, tostring(columns[i]))
    end
  end)

  it("pass kernels of rows", function()
    local x = random(R, W)
    by_rows("softmax", function(t) return t:softmax(-1) end, x)
    free()
    local w = ds.ones(W, { dtype = "bf16", device = "cuda" })
    by_rows("rms_norm", function(t) return F.rms_norm(t, w, nil, 1e-6) end, x)
    free()
    local target = ds.randint(0, W, R, { device = "cpu" }):to("i64", "cuda")
    by_rows("cross_entropy", function(t, y)
      return F.cross_entropy(t, y, { reduction = "none" })
    end, x, target)
  end)

  it("are indexed to their end", function()
    local x = random(R, W)
    local index = ds.tensor({ R - 1, 0, R - 2 }, "i64"):to("i64", "cuda")
    local rows = x:index_select(1, index):to "cpu"
    local looked = F.embedding(index, x):to "cpu"
    local last = tail(x, 2):to "cpu"
    for _, got in ipairs { rows, looked } do
      helper.same(last:select(1, 2), got:select(1, 1), "the last row", 0)
      helper.same(last:select(1, 1), got:select(1, 3), "the last row but one", 0)
    end
  end)

  it("are multiplied, as input and as result", function()
    local x = random(R, W)
    local w = random(W, 8)
    by_rows("matmul of many rows", function(t) return t:matmul(w) end, x)
    free()
    local thin, wide = random(R, 8), random(8, W)
    by_rows("matmul to many rows", function(t) return t:matmul(wide) end, thin)
  end)

  it("attend", function()
    local B, T, H, D = 3, 20, 2, 16
    if large then B, T, H, D = 520, 1024, 32, 128 end
    local function heads() return random(B * T, H * D):reshape(B, T, H, D) end
    local q, k, v = heads(), heads(), heads()
    local options = { causal = true }
    local all = ds.no_grad(function()
      return F.scaled_dot_product_attention(q, k, v, options):narrow(1, B, 1):clone():keep()
    end)
    local last = ds.no_grad(function()
      return F.scaled_dot_product_attention(tail(q, 1), tail(k, 1), tail(v, 1), options):clone()
    end)
    helper.same(last:to "cpu", all:to "cpu", "attention", 2 ^ -8)
  end)

  it("are updated by AdamW", function()
    local n = R * W
    local function vector(dtype, value)
      return ds.full({ n }, value, { dtype = dtype, device = "cuda" })
    end
    local p, m, v, low, g = vector("f32", 1), vector("f32", 0), vector("f32", 0), vector("bf16", 1),
      vector("bf16", 0.5)
    local function update(...)
      local c = {}
      for i, t in ipairs { ... } do c[i] = t._c end
      tensor.run("adam", "cuda", c[1], c[2], c[3], c[4], c[5], 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.01,
        1, 1, nil, nil)
    end
    local few = { tail(p, 5), tail(m, 5), tail(v, 5), tail(low, 5), tail(g, 5) }
    update(p, m, v, low, g)
    update(unpack(few))
    for i, t in ipairs { p, m, v, low } do
      helper.same(few[i]:to "cpu", tail(t, 5):to "cpu", "vector " .. i, 0)
    end
    assert.is_true(few[1]:to("cpu"):tolist()[5] < 1)
  end)
end)
