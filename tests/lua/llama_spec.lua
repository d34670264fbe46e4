--- models/llama against the same in elementary operations, and what a model of its kind must do.

local ds = require "ds"
local helper = require "tests.lua.helper"
local Llama = require "models.llama"

local config = { n_layer = 2, n_head = 6, n_kv_head = 2, n_embd = 24, n_ffn = 40, vocab_size = 17,
  rope_theta = 100 }

--- Llama from the paper's formulas: no fused operation, one head after the other.
local function plain(model, x)
  local c = model.config
  local B, T, d = x:size(1), x:size(2), c.n_embd / c.n_head
  local function norm(h, m)
    return h * ((h * h):mean(-1, { keepdim = true }) + m.eps):rsqrt() * m.weight
  end
  local function linear(h, m) return h:matmul(m.weight:t()) end
  -- (a, b) -> (a cos - b sin, b cos + a sin), the halves of a head's width, by the position's angle
  local position = ds.arange(T):to("f64"):reshape(T, 1)
  local rate = (ds.arange(d / 2):to("f64") * (-2 / d * math.log(c.rope_theta))):exp()
  local angle = position * rate:reshape(1, d / 2)
  local function turn(h)
    local a, b = h:narrow(3, 1, d / 2), h:narrow(3, d / 2 + 1, d / 2)
    return ds.cat({ a * angle:cos() - b * angle:sin(), b * angle:cos() + a * angle:sin() }, 3)
  end
  local hidden = ds.ones(T, T, { dtype = "f64" }):triu(1) * -1e30
  local h = model.embed_tokens(x)
  for _, block in ipairs(model.layers) do
    local n = norm(h, block.input_layernorm)
    local at = block.self_attn
    local q, k, v = linear(n, at.q_proj), linear(n, at.k_proj), linear(n, at.v_proj)
    local heads = {}
    for i = 0, c.n_head - 1 do
      local of = math.floor(i / (c.n_head / c.n_kv_head)) * d + 1
      local s = turn(q:narrow(3, i * d + 1, d)):matmul(turn(k:narrow(3, of, d)):transpose(2, 3))
      heads[i + 1] = (s / math.sqrt(d) + hidden):softmax(-1):matmul(v:narrow(3, of, d))
    end
    h = h + linear(ds.cat(heads, 3), at.o_proj)
    n = norm(h, block.post_attention_layernorm)
    local gate = linear(n, block.mlp.gate_proj)
    h = h + linear(gate * gate:sigmoid() * linear(n, block.mlp.up_proj), block.mlp.down_proj)
  end
  return linear(norm(h, model.norm), model.lm_head):reshape(B, T, c.vocab_size)
end

describe("models/llama", function()
  local model, x, y

  before_each(function()
    ds.seed(3)
    model = Llama(config):to "f64"
    for _, p in ipairs(model:parameters()) do -- large enough that every part matters
      if p:dim() > 1 then ds.no_grad(function() p:mul_(10) end) end
    end
    x, y = ds.randint(0, 17, 2, 5):keep(), ds.randint(0, 17, 2, 5):keep()
  end)

  it("computes what the formulas say, and their gradients", function()
    ds.testing.assert_close(model(x), plain(model, x), { rtol = 1e-9, atol = 1e-9 })
    model(x, y):backward()
    local fused = {}
    for i, p in ipairs(model:parameters()) do
      fused[i] = p.grad:clone():keep()
      p.grad = nil
    end
    ds.F.cross_entropy(plain(model, x), y):backward()
    for i, p in ipairs(model:parameters()) do
      ds.testing.assert_close(p.grad, fused[i], { rtol = 1e-7, atol = 1e-9 })
    end
  end)

  it("sees no later token", function()
    local before = model(x):narrow(2, 1, 3):clone():keep()
    local changed = x:clone()
    changed:narrow(2, 4, 2):fill_(1)
    ds.testing.assert_close(model(changed):narrow(2, 1, 3), before)
  end)

  it("has Hugging Face's names and shapes", function()
    local shapes = {}
    for _, e in ipairs(model:named_parameters()) do
      shapes[(model:hf_name(e.name))] = e.parameter:size()
    end
    assert.same({ 8, 24 }, shapes["model.layers.1.self_attn.k_proj.weight"])
    assert.same({ 40, 24 }, shapes["model.layers.0.mlp.gate_proj.weight"])
    assert.same({ 24 }, shapes["model.norm.weight"])
    assert.same({ 17, 24 }, shapes["lm_head.weight"])
  end)

  it("refuses sizes that do not go together", function()
    helper.says("Llama: unknown key 'heads'", Llama, { heads = 3 })
    helper.says("must divide n_embd", Llama, { n_embd = 24, n_head = 5, n_kv_head = 5 })
    helper.says("multiple of n_kv_head 4", Llama, { n_embd = 24, n_head = 6, n_kv_head = 4 })
  end)
end)
