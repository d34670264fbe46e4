--- nn: modules, parameters, layers.
--
-- A module is a Lua table with a class; parameters and children are plain fields, recognised by
-- type, lists of modules are plain arrays. Using one parameter in two places is tying. Nothing is
-- registered.
--
--     local Block = nn.module "Block"
--     function Block:init(width) self.fc = nn.Linear(width, width) end
--     function Block:forward(x) return x + self.fc(x):relu() end
--     local block = Block(128)          -- init
--     local y = block(x)                -- forward

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local F = require "ds.functional"

local raise, shape_string = border.raise, border.shape_string
local options_of = F.options_of

local M = { init = {} }

-- ---- parameters

local created = 0

--- A tensor that trains. Its creation number orders parameters the same way on every rank.
-- @tparam Tensor t floating; becomes the parameter itself
-- @tparam[opt] table options { requires_grad = false }: frozen
function M.Parameter(t, options)
  tensor.need_tensor(t, "Parameter", 1)
  if not tensor.floating[t.dtype] then
    raise("Parameter: expects a floating tensor, got %s", t.dtype)
  end
  if t._rec then t = t:detach() end
  created = created + 1
  scope.keep(t)
  t._keep = true
  t._parameter = created
  t.requires_grad = not (options and options.requires_grad == false)
  if M.on_parameter then M.on_parameter(t) end
  return t
end

-- Called with every new parameter; ds.zero.init sets it.
M.on_parameter = nil

local function is_parameter(t) return t._parameter ~= nil end

-- ---- modules

local Module = {}
M.Module = Module

-- The modules that are running, outermost first: so an error can say where in the model it is.
local running, depth = {}, 0

local function leave(at, ...)
  depth = at
  return ...
end

local function call(self, ...)
  local at = depth
  depth = at + 1
  running[depth] = self
  return leave(at, self:forward(...))
end

local classes = setmetatable({}, { __mode = "k" })

local function is_module(m)
  return type(m) == "table" and classes[getmetatable(m) or false] == true
end
M.is_module = is_module

--- A new class of modules; `parent` is another to inherit methods from.
-- @treturn table call it to make an instance: runs :init(…)
function M.module(name, parent)
  if type(name) ~= "string" then raise("module: expects a name, got %s", type(name)) end
  local class = { _name = name }
  local instance = {
    __index = class, __call = call, __tostring = function(m) return m:describe() end }
  classes[instance] = true
  return setmetatable(class, {
    __index = parent or Module,
    __call = function(_, ...)
      local m = setmetatable({ training = true }, instance)
      m:init(...)
      return m
    end,
  })
end

function Module.init() end

function Module:forward()
  raise("%s has no forward method", self._name)
end

--- Children and parameters in an order that does not depend on pairs(): numbers, then names.
local function sorted_keys(t)
  local keys = {}
  for k, v in pairs(t) do
    if type(v) == "table" and
      (type(k) == "number" or type(k) == "string" and k:sub(1, 1) ~= "_") then
      keys[#keys + 1] = k
    end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) then return a < b end
    return type(a) == "number"
  end)
  return keys
end

-- Lists count from 0 in names, as PyTorch's and Hugging Face's do.
local function child_name(prefix, key)
  local part = type(key) == "number" and ("%d"):format(key - 1) or key
  return prefix == "" and part or prefix .. "." .. part
end

--- Calls visit(value, name) for every parameter, tensor field and module below t, each once.
local function walk(t, prefix, visit, seen)
  if seen[t] then return end
  seen[t] = true
  for _, key in ipairs(sorted_keys(t)) do
    local v = t[key]
    local name = child_name(prefix, key)
    if v._c then
      visit(v, name)
    elseif is_module(v) then
      visit(v, name)
      walk(v, name, visit, seen)
    elseif getmetatable(v) == nil then -- a plain list or table of modules
      walk(v, name, visit, seen)
    end
  end
end

--- { { name =, parameter = }, … } in order of creation; a tied parameter once, under its first
-- name.
function Module:named_parameters()
  local out, seen = {}, {}
  walk(self, "", function(v, name)
    if v._c and is_parameter(v) and not seen[v] then
      seen[v] = true
      out[#out + 1] = { name = name, parameter = v }
      -- the optimizer tells heads by name: the longest, as the whole model calls it
      if not v._name or #name > #v._name then v._name = name end
    end
  end, {})
  table.sort(out, function(a, b) return a.parameter._parameter < b.parameter._parameter end)
  return out
end

--- The parameters, in order of creation.
function Module:parameters()
  local out = {}
  for i, entry in ipairs(self:named_parameters()) do out[i] = entry.parameter end
  return out
end

--- { { name =, buffer = }, … }: tensors in fields that are no parameters (running statistics,
-- tables).
function Module:named_buffers()
  local out, seen = {}, {}
  walk(self, "", function(v, name)
    if v._c and not is_parameter(v) and not seen[v] and not v._rec then
      seen[v] = true
      out[#out + 1] = { name = name, buffer = v }
    end
  end, {})
  table.sort(out, function(a, b) return a.name < b.name end)
  return out
end

--- { { name =, module = }, … } below this one.
function Module:named_modules()
  local out = {}
  walk(self, "", function(v, name)
    if not v._c then out[#out + 1] = { name = name, module = v } end
  end, {})
  return out
end

--- Tensors by name, sharing memory with the model: parameters and buffers.
function Module:state_dict()
  local out = {}
  for _, e in ipairs(self:named_parameters()) do out[e.name] = e.parameter end
  for _, e in ipairs(self:named_buffers()) do out[e.name] = e.buffer end
  return out
end

--- Copies values in by name. Missing, unexpected and misshapen names are one error that lists them
-- all.
-- @tparam table dict tensors by name
-- @tparam[opt] table options { strict = true }
function Module:load_state_dict(dict, options)
  options = options_of("load_state_dict", options, { strict = true })
  local mine, problems = self:state_dict(), {}
  local names = {}
  for name in pairs(mine) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    local given = dict[name]
    if not given then
      if options.strict ~= false then problems[#problems + 1] = "missing " .. name end
    elseif shape_string(given.shape) ~= shape_string(mine[name].shape) then
      problems[#problems + 1] = ("%s is %s, the model's is %s"):format(name,
        shape_string(given.shape), shape_string(mine[name].shape))
    end
  end
  if options.strict ~= false then
    local extra = {}
    for name in pairs(dict) do
      if not mine[name] then extra[#extra + 1] = "unexpected " .. tostring(name) end
    end
    table.sort(extra)
    for _, e in ipairs(extra) do problems[#problems + 1] = e end
  end
  if #problems > 0 then raise("load_state_dict: %s", table.concat(problems, "; ")) end
  scope.no_grad(function()
    for _, name in ipairs(names) do
      if dict[name] then mine[name]:copy_(dict[name]) end
    end
  end)
  return self
end

local function each(self, f)
  f(self)
  for _, e in ipairs(self:named_modules()) do f(e.module) end
  return self
end

--- Calls f(module) for this module and all below.
function Module:apply(f) return each(self, f) end

--- Training mode: dropout drops.
function Module:train(on)
  return each(self, function(m) m.training = on ~= false end)
end
function Module:eval() return self:train(false) end

--- Freezes or unfreezes all parameters.
function Module:requires_grad_(on)
  for _, p in ipairs(self:parameters()) do p.requires_grad = on ~= false end
  return self
end

--- Drops the gradients.
function Module:zero_grad()
  for _, p in ipairs(self:parameters()) do
    if p._engine then p._fresh = true else p.grad = nil end
  end
  return self
end

--- Moves parameters and buffers to a dtype (floating ones) or device.
function Module:to(target)
  local is_device = target == "cpu" or target == "cuda" or target == "meta"
  for _, t in pairs(self:state_dict()) do
    if is_device or tensor.floating[t.dtype] then
      local grad = t.requires_grad
      t.requires_grad = false
      tensor.repoint(t, t:to(target))
      t.requires_grad = grad
    end
  end
  return self
end

function Module:cuda() return self:to "cuda" end
function Module:cpu() return self:to "cpu" end

--- How many numbers train below here.
function Module:num_parameters()
  local n = 0
  for _, p in ipairs(self:parameters()) do n = n + p:numel() end
  return n
end

--- Parameter groups for ds.initialize: weight decay on matrices only, as GPT-2 was trained.
-- @treturn table { { params = {…}, weight_decay = x }, { params = {…}, weight_decay = 0 } }
function Module:param_groups(weight_decay)
  local matrices, vectors = {}, {}
  for _, p in ipairs(self:parameters()) do
    local group = p:dim() >= 2 and matrices or vectors
    group[#group + 1] = p
  end
  return {
    { params = matrices, weight_decay = weight_decay }, { params = vectors, weight_decay = 0 } }
end

-- ---- printing

function M.count_string(n)
  if n >= 1e9 then return ("%.2fB"):format(n / 1e9) end
  if n >= 1e6 then return ("%.2fM"):format(n / 1e6) end
  if n >= 1e4 then return ("%.1fk"):format(n / 1e3) end
  return ("%d"):format(n)
end

--- What stands in the parentheses when the module is printed; classes override it.
function Module.extra() return "" end

function Module:describe(indent)
  indent = indent or ""
  local lines = {}
  local function children(t, prefix)
    for _, key in ipairs(sorted_keys(t)) do
      local v = t[key]
      local name = child_name(prefix, key)
      if is_module(v) then
        lines[#lines + 1] = ("%s  (%s): %s"):format(indent, name, v:describe(indent .. "  "))
      elseif not v._c and getmetatable(v) == nil then
        children(v, name)
      end
    end
  end
  children(self, "")
  local head = ("%s(%s)"):format(self._name, self:extra())
  local n = self:num_parameters()
  if n > 0 then head = ("%s  # %s parameters"):format(head, M.count_string(n)) end
  if #lines == 0 then return head end
  return ("%s {\n%s\n%s}"):format(head, table.concat(lines, "\n"), indent)
end

--- For error messages: " (in blocks.3.mlp)".
function border.place()
  local parts = {}
  -- upwards as long as each is below the one before: a failed call may lie there yet
  for i = depth, 2, -1 do
    local name
    for _, e in ipairs(running[i - 1]:named_modules()) do
      if e.module == running[i] then name = e.name end
    end
    if not name then break end
    table.insert(parts, 1, name)
  end
  return #parts > 0 and (" (in %s)"):format(table.concat(parts, ".")) or nil
end

--- Whether a module runs now.
function M.is_running() return depth > 0 end

--- The innermost one that does; nil: none.
function M.running() return running[depth] end

--- Forgets which modules run; the engine calls it before a forward, the last one may have failed.
function M.reset_place() depth = 0 end

-- ---- initialisers: in place, return the tensor

local function initialiser(name, f)
  M.init[name] = function(t, ...)
    tensor.need_tensor(t, "init." .. name, 1)
    local a, b = ...
    scope.no_grad(function() f(t, a, b) end)
    return t
  end
end

--- Sizes of input and output of a weight [out x in x …].
local function fans(t)
  local receptive = 1
  for i = 3, #t.shape do receptive = receptive * t.shape[i] end
  if #t.shape < 2 then
    raise("init: a weight needs two dimensions for its fan, got %s", shape_string(t.shape))
  end
  return t.shape[2] * receptive, t.shape[1] * receptive
end

initialiser("zeros_", function(t) t:zero_() end)
initialiser("ones_", function(t) t:fill_(1) end)
initialiser("constant_", function(t, value) t:fill_(value) end)
--- normal_(t, std[, mean])
initialiser("normal_", function(t, std, mean) t:normal_(mean or 0, std or 1) end)
initialiser("uniform_", function(t, low, high) t:uniform_(low or 0, high or 1) end)
--- Glorot & Bengio 2010, eq. 16
initialiser("xavier_uniform_", function(t, gain)
  local fan_in, fan_out = fans(t)
  local a = (gain or 1) * math.sqrt(6 / (fan_in + fan_out))
  t:uniform_(-a, a)
end)
initialiser("xavier_normal_", function(t, gain)
  local fan_in, fan_out = fans(t)
  t:normal_(0, (gain or 1) * math.sqrt(2 / (fan_in + fan_out)))
end)
--- He et al. 2015, section 2.2, for ReLU (a: the negative slope)
initialiser("kaiming_uniform_", function(t, a)
  local bound = math.sqrt(6 / ((1 + (a or 0) ^ 2) * (fans(t))))
  t:uniform_(-bound, bound)
end)
initialiser("kaiming_normal_", function(t, a)
  t:normal_(0, math.sqrt(2 / ((1 + (a or 0) ^ 2) * (fans(t)))))
end)

-- ---- containers

--- `nn.list(n, function(i) return Block(i) end)`: a plain array of n modules.
function M.list(n, make)
  if type(n) ~= "number" or type(make) ~= "function" then
    raise("list: expects (n, function(i))")
  end
  local out = {}
  for i = 1, n do out[i] = make(i) end
  return out
end

local function size(what, name, v)
  if type(v) ~= "number" or v < 1 or v % 1 ~= 0 then
    raise("%s: %s must be a whole number above 0, not %s", what, name, tostring(v))
  end
  return v
end

--- Modules (or functions) behind each other: `nn.Sequential(a, b)`.
M.Sequential = M.module "Sequential"
function M.Sequential:init(...)
  for i = 1, select("#", ...) do
    local m = select(i, ...)
    if not is_module(m) and type(m) ~= "function" then
      raise("Sequential: argument %d is a %s", i, type(m))
    end
    self[i] = m
  end
end
function M.Sequential:forward(x)
  for i = 1, #self do x = self[i](x) end
  return x
end

-- ---- layers

--- y = x wᵀ + b; weight [out x in]. `nn.Linear(in, out, { bias = true, activation = "gelu" })`
M.Linear = M.module "Linear"
function M.Linear:init(inputs, outputs, options)
  options = options_of("Linear", options, { bias = true, activation = true })
  size("Linear", "the input width", inputs)
  size("Linear", "the output width", outputs)
  local bound = 1 / math.sqrt(inputs)
  self.weight = M.Parameter(M.init.uniform_(tensor.empty(outputs, inputs), -bound, bound))
  if options.bias ~= false then
    self.bias = M.Parameter(M.init.uniform_(tensor.empty(outputs), -bound, bound))
  end
  self.fused = options.activation and { activation = options.activation } or nil
end
function M.Linear:forward(x) return F.linear(x, self.weight, self.bias, self.fused) end
function M.Linear:extra()
  local w = self.weight.shape
  return ("%d, %d%s%s"):format(w[2], w[1], self.bias and "" or ", no bias",
    self.fused and ", " .. self.fused.activation or "")
end

--- Rows by 0-based index. `nn.Embedding(rows, width)`
M.Embedding = M.module "Embedding"
function M.Embedding:init(n, width)
  size("Embedding", "the number of rows", n)
  size("Embedding", "the width", width)
  self.weight = M.Parameter(M.init.normal_(tensor.empty(n, width), 1))
  self.weight._embedding = true -- optimizers for matrices leave it out
end
function M.Embedding:forward(index) return F.embedding(index, self.weight) end
function M.Embedding:extra()
  return ("%d, %d"):format(self.weight.shape[1], self.weight.shape[2])
end

local function norm_layer(name, f, default_eps, with_bias)
  local class = M.module(name)
  M[name] = class
  function class:init(width, options)
    options = options_of(name, options, { bias = true, eps = true, inplace = true })
    size(name, "the width", width)
    self.eps = options.eps or default_eps
    self.options = { inplace = options.inplace }
    self.weight = M.Parameter(tensor.ones(width))
    if with_bias and options.bias ~= false then self.bias = M.Parameter(tensor.zeros(width)) end
  end
  --- `norm(x)`, or `sum, y = norm(x, delta)`: normalises x + delta, fused, and returns that sum
  -- too. With { inplace = true } the sum may take delta's memory, and delta is gone.
  function class:forward(x, delta)
    return F[f](x, self.weight, self.bias, self.eps, delta, self.options)
  end
  function class:extra() return ("%d, eps = %g"):format(self.weight.shape[1], self.eps) end
end
norm_layer("LayerNorm", "layer_norm", 1e-5, true)
norm_layer("RMSNorm", "rms_norm", 1e-6, false)

--- Drops with probability p while training.
M.Dropout = M.module "Dropout"
function M.Dropout:init(p)
  if type(p) ~= "number" or p < 0 or p > 1 then
    raise("Dropout: p must be between 0 and 1, not %s", tostring(p))
  end
  self.p = p
end
function M.Dropout:forward(x)
  if not self.training or self.p == 0 then return x end
  return F.dropout(x, self.p)
end
function M.Dropout:extra() return ("p = %g"):format(self.p) end

for name, f in pairs { ReLU = "relu", SiLU = "silu", Tanh = "tanh", Sigmoid = "sigmoid" } do
  M[name] = M.module(name)
  M[name].forward = function(_, x) return tensor.methods[f](x) end
end
--- `nn.GELU { approximate = "tanh" }`
M.GELU = M.module "GELU"
function M.GELU:init(options) self.options = options_of("GELU", options, { approximate = true }) end
function M.GELU:forward(x) return F.gelu(x, self.options) end

--- Self-attention of [B x T x C] with n_head heads; grouped-query with n_kv_head.
-- `nn.MultiheadAttention(width, n_head, { n_kv_head, bias = true, dropout = 0, causal = false })`
M.MultiheadAttention = M.module "MultiheadAttention"
function M.MultiheadAttention:init(width, n_head, options)
  options = options_of("MultiheadAttention", options,
    { n_kv_head = true, bias = true, dropout = true, causal = true })
  size("MultiheadAttention", "the width", width)
  size("MultiheadAttention", "the number of heads", n_head)
  if width % n_head ~= 0 then
    raise("MultiheadAttention: width %d is no multiple of %d heads", width, n_head)
  end
  self.n_head, self.n_kv_head = n_head, options.n_kv_head or n_head
  if n_head % self.n_kv_head ~= 0 then
    raise("MultiheadAttention: %d heads are no multiple of %d key heads", n_head, self.n_kv_head)
  end
  local d = width / n_head
  self.qkv = M.Linear(width, (n_head + 2 * self.n_kv_head) * d, { bias = options.bias })
  self.proj = M.Linear(width, width, { bias = options.bias })
  self.causal, self.dropout = options.causal or false, options.dropout or 0
end
function M.MultiheadAttention:forward(x)
  return self.proj(F.attention(self.qkv(x), { n_head = self.n_head, n_kv_head = self.n_kv_head,
    causal = self.causal, dropout = self.dropout, training = self.training })) -- [B x T x C]
end
function M.MultiheadAttention:extra()
  return ("%d heads%s"):format(self.n_head, self.causal and ", causal" or "")
end

return M
