--- Llama 3 (Dubey et al. 2024): GPT's stack with RMS norms, rotary positions, grouped queries and a
-- gated MLP, no biases.
--
--     local Llama = require "models.llama"
--     local model = Llama { n_layer = 4, n_head = 32, n_kv_head = 8, n_embd = 4096, n_ffn = 14336,
--       vocab_size = 128256 }
--     local loss = model(x, y)       -- x, y: [B x T] token ids
--     local logits = model(x)        -- [B x T x V]
--
-- B: batch, T: positions, C: width, V: vocabulary, H heads of queries, G of keys and values, D wide
-- each.
-- Parameters have the names of Llama in Hugging Face's transformers.

local ds = require "ds"
local nn, F = ds.nn, ds.F

-- ---- each position looks at those before it; H / G heads of queries share one of keys and values

local Attention = nn.module "Attention"

function Attention:init(c)
  local d = c.n_embd / c.n_head
  self.c, self.width = c, d
  self.q_proj = nn.Linear(c.n_embd, c.n_head * d, { bias = false })
  self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * d, { bias = false })
  self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * d, { bias = false })
  self.o_proj = nn.Linear(c.n_head * d, c.n_embd, { bias = false })
end

function Attention:forward(x)
  local c, B, T = self.c, x:size(1), x:size(2)
  local turn = { base = c.rope_theta }
  local q = F.rotary(self.q_proj(x):reshape(B, T, c.n_head, self.width), turn)    -- [B x T x H x D]
  local k = F.rotary(self.k_proj(x):reshape(B, T, c.n_kv_head, self.width), turn) -- [B x T x G x D]
  local v = self.v_proj(x):reshape(B, T, c.n_kv_head, self.width)
  local y = F.scaled_dot_product_attention(q, k, v, { causal = true })
  return self.o_proj(y:reshape(B, T, c.n_head * self.width))
end

-- ---- each position by itself: SwiGLU (Shazeer 2020)

local MLP = nn.module "MLP"

function MLP:init(c)
  self.gate_proj = nn.Linear(c.n_embd, c.n_ffn, { bias = false, activation = "silu" })
  self.up_proj = nn.Linear(c.n_embd, c.n_ffn, { bias = false })
  self.down_proj = nn.Linear(c.n_ffn, c.n_embd, { bias = false })
end

function MLP:forward(x) return self.down_proj(self.gate_proj(x) * self.up_proj(x)) end

-- ---- a block

local Block = nn.module "Block"

function Block:init(c)
  self.input_layernorm = nn.RMSNorm(c.n_embd, { eps = c.norm_eps, inplace = true })
  self.self_attn = Attention(c)
  self.post_attention_layernorm = nn.RMSNorm(c.n_embd, { eps = c.norm_eps, inplace = true })
  self.mlp = MLP(c)
end

--- x + attn(norm(x)), then x + mlp(norm(x)); as in models/gpt the next norm makes the second sum.
-- @tparam Tensor x [B x T x C]
-- @tparam[opt] Tensor delta what the block before left to be added
-- @treturn Tensor x
-- @treturn Tensor delta
function Block:forward(x, delta)
  local h
  if delta then
    x, h = self.input_layernorm(x, delta)
  else
    h = self.input_layernorm(x)
  end
  x, h = self.post_attention_layernorm(x, self.self_attn(h))
  return x, self.mlp(h)
end

-- ---- the model

local Llama = nn.module "Llama"

local defaults = { n_layer = 32, n_head = 32, n_kv_head = 8, n_embd = 4096, n_ffn = 14336,
  vocab_size = 128256, rope_theta = 500000, norm_eps = 1e-5 }

--- @tparam table config what differs from Llama 3 8B: n_layer, n_head, n_kv_head, n_embd, n_ffn,
-- vocab_size, rope_theta, norm_eps
function Llama:init(config)
  local c = {}
  for key, value in pairs(defaults) do c[key] = value end
  for key, value in pairs(config) do
    if defaults[key] == nil then error(("Llama: unknown key '%s'"):format(tostring(key)), 3) end
    c[key] = value
  end
  if c.n_embd % c.n_head ~= 0 or c.n_embd / c.n_head % 2 ~= 0 or c.n_head % c.n_kv_head ~= 0 then
    error(("Llama: n_head %d must divide n_embd %d into an even width, and be a multiple of "
      .. "n_kv_head %d"):format(c.n_head, c.n_embd, c.n_kv_head), 3)
  end
  self.config = c

  self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
  self.layers = nn.list(c.n_layer, function() return Block(c) end)
  self.norm = nn.RMSNorm(c.n_embd, { eps = c.norm_eps, inplace = true })
  self.lm_head = nn.Linear(c.n_embd, c.vocab_size, { bias = false })
  for _, p in ipairs(self:parameters()) do
    if p:dim() > 1 then nn.init.normal_(p, 0.02) end
  end
end

--- The name of a parameter in checkpoints, which is Hugging Face's.
function Llama:hf_name(name) -- luacheck: ignore self
  return name:find "^lm_head" and name or "model." .. name, false
end

--- @tparam Tensor x token ids [B x T]
-- @tparam[opt] Tensor y the tokens to predict [B x T]
-- @treturn Tensor with y the mean loss, else the logits [B x T x V]
function Llama:forward(x, y)
  local sum, delta = self.embed_tokens(x), nil -- [B x T x C]
  for _, block in ipairs(self.layers) do
    sum, delta = block(sum, delta)
  end
  local _, h = self.norm(sum, delta)
  if y then return F.linear_cross_entropy(h, self.lm_head.weight, y) end
  return self.lm_head(h)
end

return Llama
