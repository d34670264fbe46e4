--- GPT-2 (Radford et al. 2019): a stack of blocks, each attention and an MLP around a residual sum.
--
--     local GPT = require "models.gpt"
--     local model = GPT { n_layer = 4, n_head = 4, n_embd = 128, block_size = 64, vocab_size = 65 }
--     local loss = model(x, y)       -- x, y: [B x T] token ids
--     local logits = model(x)        -- [B x T x V]
--
-- Reads from top to bottom. B: batch, T: positions, C: width, V: vocabulary. Parameters have the
-- names of GPT-2 in Hugging Face's transformers.

local ds = require "ds"
local nn, F = ds.nn, ds.F

-- ---- each position looks at those before it

local Attention = nn.module "Attention"

function Attention:init(c)
  self.options = { n_head = c.n_head, causal = true, dropout = c.dropout }
  self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, { bias = c.bias }) -- query, key and value at once
  self.c_proj = nn.Linear(c.n_embd, c.n_embd, { bias = c.bias })
  self.drop = nn.Dropout(c.dropout)
end

function Attention:forward(x)
  self.options.training = self.training
  local qkv = self.c_attn(x)                     -- [B x T x 3C]
  local y = F.attention(qkv, self.options)       -- [B x T x C], the heads side by side
  return self.drop(self.c_proj(y))
end

-- ---- each position by itself

local MLP = nn.module "MLP"

function MLP:init(c)
  self.options = { activation = c.activation }
  self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, { bias = c.bias })
  self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, { bias = c.bias })
  self.drop = nn.Dropout(c.dropout)
end

function MLP:forward(x)
  local up, down = self.c_fc, self.c_proj
  return self.drop(F.mlp(x, up.weight, up.bias, down.weight, down.bias, self.options))
end

-- ---- a block

local Block = nn.module "Block"

function Block:init(c)
  self.ln_1 = nn.LayerNorm(c.n_embd, { bias = c.bias, inplace = true })
  self.attn = Attention(c)
  self.ln_2 = nn.LayerNorm(c.n_embd, { bias = c.bias, inplace = true })
  self.mlp = MLP(c)
end

--- x + attn(ln_1(x)), then x + mlp(ln_2(x)). The second sum is left to the norm that comes next,
-- which adds and normalises in one pass over memory: `sum, normed = norm(x, delta)`. Its `inplace`
-- lets the sum have delta's memory.
-- @tparam Tensor x [B x T x C]
-- @tparam[opt] Tensor delta what the block before left to be added
-- @treturn Tensor x
-- @treturn Tensor delta
function Block:forward(x, delta)
  local h
  if delta then
    x, h = self.ln_1(x, delta)
  else
    h = self.ln_1(x)
  end
  x, h = self.ln_2(x, self.attn(h))
  return x, self.mlp(h)
end

-- ---- the model

local GPT = nn.module "GPT"

local defaults = { n_layer = 12, n_head = 12, n_embd = 768, block_size = 1024, vocab_size = 50257,
  dropout = 0, bias = true, activation = "gelu" }

--- @tparam table config n_layer, n_head, n_embd, block_size, vocab_size, dropout = 0, bias = true,
-- activation = "gelu" ("gelu_tanh", as GPT-2 was trained with, costs a GPU less)
function GPT:init(config)
  local c = {}
  for key, value in pairs(defaults) do c[key] = value end
  for key, value in pairs(config) do
    if defaults[key] == nil then error(("GPT: unknown key '%s'"):format(tostring(key)), 3) end
    c[key] = value
  end
  if c.n_embd % c.n_head ~= 0 then
    error(("GPT: n_embd %d is no multiple of n_head %d"):format(c.n_embd, c.n_head), 3)
  end
  self.config = c

  self.wte = nn.Embedding(c.vocab_size, c.n_embd)
  self.wpe = nn.Embedding(c.block_size, c.n_embd)
  self.drop = nn.Dropout(c.dropout)
  self.h = nn.list(c.n_layer, function() return Block(c) end)
  self.ln_f = nn.LayerNorm(c.n_embd, { bias = c.bias, inplace = true })
  self:init_weights()
end

--- Normal with 0.02; what ends in the residual sum less, so that its variance stays with depth.
function GPT:init_weights()
  local residual = 0.02 / math.sqrt(2 * self.config.n_layer)
  for _, entry in ipairs(self:named_parameters()) do
    local name, p = entry.name, entry.parameter
    if p:dim() > 1 then
      nn.init.normal_(p, name:find "c_proj" and residual or 0.02)
    elseif name:find "bias" then
      nn.init.zeros_(p)
    end
  end
end

-- Hugging Face's GPT-2 has these transposed, [in x out] (its Conv1D).
local transposed = { ["attn.c_attn.weight"] = true, ["attn.c_proj.weight"] = true,
  ["mlp.c_fc.weight"] = true, ["mlp.c_proj.weight"] = true }

--- The name of a parameter in checkpoints, which is Hugging Face's.
-- @treturn string
-- @treturn boolean whether it is transposed there
function GPT:hf_name(name) -- luacheck: ignore self
  return "transformer." .. name, transposed[name:match "^h%.%d+%.(.*)"] or false
end

--- @tparam Tensor x token ids [B x T]
-- @tparam[opt] Tensor y the tokens to predict [B x T]
-- @treturn Tensor with y the mean loss, else the logits [B x T x V]
function GPT:forward(x, y)
  local c, T = self.config, x:size(2)
  if T > c.block_size then
    error(("GPT: %d positions, the model has %d (block_size)"):format(T, c.block_size), 2)
  end
  local sum = self.drop(self.wte(x) + self.wpe(ds.arange(T, { device = x.device }))) -- [B x T x C]
  local delta
  for _, block in ipairs(self.h) do
    sum, delta = block(sum, delta)
  end
  local _, h = self.ln_f(sum, delta) -- [B x T x C]

  -- the output projection is the embedding, transposed
  if y then return F.linear_cross_entropy(h, self.wte.weight, y) end
  return F.linear(h, self.wte.weight)
end

--- Adds n tokens to each row of x, one after the other, drawn from what the model predicts.
-- @tparam Tensor x token ids [B x T]
-- @tparam number n
-- @tparam[opt] table options { temperature = 1, top_k = nil }; temperature 0: always the likeliest
-- @treturn Tensor [B x T + n]
function GPT:generate(x, n, options)
  options = options or {}
  local temperature, k = options.temperature or 1, options.top_k
  if x:size(2) == 0 then error("generate: there is no token to begin with", 2) end
  if n < 0 or temperature < 0 or k and k < 1 then
    error(("generate: n %s, temperature %s, top_k %s: n and the temperature are at least 0, top_k "
      .. "at least 1"):format(n, temperature, tostring(k)), 2)
  end
  local block_size = self.config.block_size
  x = x:to(self.wte.weight.device)
  for _ = 1, n do
    x = ds.no_grad(function()
      local T = x:size(2)
      local first = math.max(1, T - block_size + 1)
      local context = x:narrow(2, first, T - first + 1):contiguous()
      local logits = self(context):select(2, -1):float() -- [B x V] of the last position
      if k and k < logits:size(2) then
        local least = logits:topk(k, -1):narrow(2, k, 1)
        logits = logits:masked_fill(logits:lt(least), -math.huge)
      end
      if temperature > 0 then
        -- the largest of logits + Gumbel noise is a sample of their softmax (Gumbel 1954)
        logits = logits / temperature - (-ds.rand_like(logits):log()):log()
      end
      return ds.cat({ x, logits:argmax(-1, { keepdim = true }) }, 2)
    end)
  end
  return x
end

return GPT
