-- Modules: naming, tying, printing, modes, state; layers against their formulas.

local ds = require "ds"
local says = require("tests.lua.helper").says
local nn, F = ds.nn, ds.F
local close = ds.testing.assert_close

local Net = nn.module "Net"
function Net:init()
  self.embed = nn.Embedding(10, 4)
  self.blocks = nn.list(2, function() return nn.Sequential(nn.Linear(4, 4), nn.ReLU()) end)
  self.head = nn.Linear(4, 10, { bias = false })
  self.head.weight = self.embed.weight -- tied
end
function Net:forward(ids)
  local x = self.embed(ids)
  for _, b in ipairs(self.blocks) do x = b(x) end
  return self.head(x)
end

describe("a module", function()
  local net = Net()
  it("lists parameters in order of creation, tied ones once", function()
    local names = {}
    for i, e in ipairs(net:named_parameters()) do names[i] = e.name end
    assert.same({
      "embed.weight", "blocks.0.0.weight", "blocks.0.0.bias", "blocks.1.0.weight",
      "blocks.1.0.bias",
    }, names)
    assert.equal(40 + 2 * 20, net:num_parameters())
  end)
  it("prints its tree with counts", function()
    local text = tostring(net)
    assert(text:find("^Net%(%)  # 80 parameters {"), text)
    assert(text:find("(blocks.1): Sequential()  # 20 parameters", 1, true), text)
    assert(text:find("Linear(4, 4)", 1, true), text)
  end)
  it("adds gradients of tied uses", function()
    net:zero_grad()
    F.cross_entropy(net(ds.tensor({ 1, 2 }, "i64")), ds.tensor({ 3, 4 }, "i64")):backward()
    local rows = net.embed.weight.grad:abs():sum(2):tolist()
    for i = 1, 10 do assert(rows[i] > 0, "row " .. i .. " got no gradient from the head") end
  end)
  it("switches modes below it", function()
    local m = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.9)))
    m:eval()
    assert.same({ 1, 1, 1 }, m(ds.ones(3)):tolist())
    m:train()
    assert(m(ds.ones(1000)):eq(0):sum():item() > 500)
  end)
  it("loads what it saved, and names what does not fit", function()
    local other = Net()
    other:load_state_dict(net:state_dict())
    local ids = ds.tensor({ 1, 2, 3 }, "i64")
    assert.same(net(ids):tolist(), other(ids):tolist())
    local dict = net:state_dict()
    dict["blocks.0.0.bias"], dict.extra = nil, ds.ones(1)
    dict["embed.weight"] = ds.ones(3, 4)
    says("missing blocks.0.0.bias; embed.weight is [3 x 4], the model's is [10 x 4]; " ..
      "unexpected extra; unexpected head.weight",
      function()
        dict["head.weight"] = ds.ones(1)
        other:load_state_dict(dict)
      end)
  end)
  it("says where in the model an error was", function()
    says("linear: input [2 x 5] does not match weight [4 x 4] (last dimension must be 4) " ..
      "(in blocks.0.0)", function()
      local m = Net()
      m.forward = function(self, x) return self.blocks[1](x) end
      m(ds.ones(2, 5))
    end)
  end)
  it("changes dtype as a whole", function()
    local m = nn.Linear(2, 3):to("bf16")
    assert.equal("bf16", m.weight.dtype)
    assert.equal("bf16", m(ds.ones(1, 2, { dtype = "bf16" })).dtype)
    assert.is_true(m.weight.requires_grad)
    says("the weight is bf16 but the input is f32", m, ds.ones(1, 2))
  end)
  it("groups parameters for weight decay", function()
    local groups = net:param_groups(0.1)
    assert.equal(3, #groups[1].params)
    assert.equal(2, #groups[2].params)
    assert.equal(0, groups[2].weight_decay)
  end)
end)

describe("layers", function()
  it("MultiheadAttention equals its formula", function()
    ds.seed(1)
    local m = nn.MultiheadAttention(8, 2, { causal = true })
    local x = ds.randn(2, 5, 8)
    local q, k, v = m.qkv(x):chunk(3, -1)
    local function heads(t) return t:reshape(2, 5, 2, 4):transpose(2, 3) end
    local scores = heads(q):matmul(heads(k):transpose(3, 4)) / 2
    scores = scores:masked_fill(ds.ones(5, 5):triu(1):ne(0), -math.huge)
    local y = scores:softmax(-1):matmul(heads(v)):transpose(2, 3):reshape(2, 5, 8)
    close(m(x), m.proj(y), { rtol = 1e-4, atol = 1e-5 })
  end)
  describe("LayerNorm with inplace", function()
    local function outcome(inplace, f)
      ds.seed(5)
      local x, d = ds.randn(3, 6), ds.randn(3, 6)
      x.requires_grad, d.requires_grad = true, true
      local ln = nn.LayerNorm(6, { inplace = inplace })
      local delta = f(d)
      local sum, y = ln(x, delta)
      local bytes = sum:clone()
      ;(sum * y):sum():backward()
      return { sum = bytes, dx = x.grad, dd = d.grad }, delta
    end
    local function same(f)
      local a, b = outcome(false, f), outcome(true, f)
      for key in pairs(a) do assert.is_true(a[key]:eq(b[key]):all():item(), key) end
    end
    local w = ds.randn(6, 6)

    it("gives what it gives without", function()
      same(function(d) return ds.F.linear(d, w) end)
      same(function(d) return d:tanh() end)           -- tanh's backward reads what it made
      same(function(d) return d end)                  -- a leaf
      same(function(d) return ds.F.linear(d, w):reshape(3, 6) end)
    end)

    it("takes the memory of a delta that nobody needs, and says so", function()
      ds.scope(function()
        local delta = ds.F.linear(ds.randn(3, 6), w)
        local sum = nn.LayerNorm(6, { inplace = true })(ds.randn(3, 6), delta)
        says("layer_norm { inplace = true }", function() return delta + 1 end)
        assert.equal(18, sum:numel())
      end)
    end)
  end)

  it("LayerNorm adds its second input first", function()
    local ln = nn.LayerNorm(6)
    local x, d = ds.randn(3, 6), ds.randn(3, 6)
    local sum, y = ln(x, d)
    close(sum, x + d)
    close(y, ln(x + d), { rtol = 1e-5, atol = 1e-6 })
  end)
  it("initialises with the scale it should", function()
    ds.seed(2)
    local w = nn.Linear(100, 50).weight
    assert(w:abs():max():item() <= 0.1)
    assert(math.abs(nn.init.kaiming_normal_(ds.empty(500, 200)):std():item() - 0.1) < 0.003)
    assert(math.abs(nn.init.normal_(ds.empty(1000, 100), 0.02):std():item() - 0.02) < 0.001)
  end)
  it("refuses nonsense", function()
    says("the input width must be a whole number above 0, not -1", nn.Linear, -1, 2)
    says("unknown option 'biases'; there are activation, bias", nn.Linear, 1, 2, { biases = false })
    says("10 is no multiple of 3 heads", nn.MultiheadAttention, 10, 3)
    says("Empty has no forward method", function()
      local Empty = nn.module "Empty"
      Empty()(1)
    end)
    says("index 12 is out of range", nn.Embedding(10, 2), ds.tensor({ 12 }, "i64"))
  end)
end)
