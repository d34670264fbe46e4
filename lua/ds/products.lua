--- Matrix products and the layers made of them: matmul, linear, mlp, linear_cross_entropy.
--
-- What a layer keeps for backward is what costs memory, so each keeps the least that saves a
-- product: linear its input (and, fused with an activation, that one's slope), mlp its input and
-- the hidden layer before the activation, linear_cross_entropy no logits at all.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local shapes = require "ds.shapes"

local raise, shape_string = border.raise, border.shape_string
local options_of, need_floating, sum_to = shapes.options_of, shapes.need_floating, shapes.sum_to
local need_like, need_targets, fine = shapes.need_like, shapes.need_targets, shapes.fine
local define, needs, sink = autograd.define, autograd.needs, autograd.sink
local new, run, methods, is_tensor = tensor.new, tensor.run, tensor.methods, tensor.is_tensor
local rows, swapped = tensor.borrow.rows, tensor.borrow.swapped

local M = {}

--- The batch dimensions of `shape` and then rows x columns.
local function product_shape(shape, rows_, columns_, n)
  local out = { unpack(shape, 1, n - 2) }
  out[n - 1], out[n] = rows_, columns_
  return out
end

local matmul = define("matmul", {
  inputs = { "a", "b" }, kernel = "matmul", call = { "y", "a", "b", "1", "0" },
  infer = function(a, b)
    need_floating(a, "matmul")
    need_like("matmul", a, b, "the second factor")
    local m, n = #a.shape, #b.shape
    if a.shape[m] ~= b.shape[n - 1] then
      raise("matmul: %s times %s: the inner sizes %d and %d differ", shape_string(a.shape),
        shape_string(b.shape), a.shape[m], b.shape[n - 1])
    end
    local shape, batch = {}, math.max(m, n) - 2
    for i = 1, batch do
      local x, y = a.shape[m - 2 - batch + i] or 1, b.shape[n - 2 - batch + i] or 1
      if x ~= y and x ~= 1 and y ~= 1 then
        raise("matmul: the batches of %s and %s do not broadcast",
          shape_string(a.shape), shape_string(b.shape))
      end
      shape[i] = x == 1 and y or x
    end
    shape[batch + 1], shape[batch + 2] = a.shape[m - 1], b.shape[n]
    return new(shape, a.dtype, a.device)
  end,
  backward = function(r, dy)
    local da, db
    local a, b, n = r.a, r.b, #dy.shape
    if needs(a) then
      da = new(product_shape(dy.shape, a.shape[#a.shape - 1], a.shape[#a.shape], n),
        a.dtype, a.device)
      run("matmul", a.device, da._c, dy._c, swapped(1, b), 1, 0)
      da = sum_to(da, a.shape)
    end
    if needs(b) then
      db = new(product_shape(dy.shape, b.shape[#b.shape - 1], b.shape[#b.shape], n),
        b.dtype, b.device)
      run("matmul", b.device, db._c, swapped(1, a), dy._c, 1, 0)
      db = sum_to(db, b.shape)
    end
    return da, db
  end,
})

--- Matrix product over the last two dimensions, the ones before broadcast; vectors as PyTorch's.
function methods:matmul(other)
  tensor.need_tensor(self, "matmul", 1)
  tensor.need_tensor(other, "matmul", 2)
  local m, n = #self.shape, #other.shape
  if m == 0 or n == 0 then raise("matmul: expects at least one dimension, got %s and %s",
    shape_string(self.shape), shape_string(other.shape)) end
  if m >= 2 and n >= 2 then return matmul(self, other) end
  local a = m == 1 and self:unsqueeze(1) or self
  local b = n == 1 and other:unsqueeze(2) or other
  local y = matmul(a, b)
  if n == 1 then y = y:squeeze(-1) end
  if m == 1 then y = y:squeeze(n == 1 and -1 or -2) end
  return y
end
M.matmul = methods.matmul
methods.mm, methods.bmm = methods.matmul, methods.matmul
--- The inner product of two vectors.
function methods:dot(other) return (self * other):sum() end

-- ---- linear layers. x is dense; w is [N x K], as PyTorch's Linear. The kernels see matrices.

local activations = { [false] = 0, none = 0, gelu = 1, gelu_tanh = 2, relu = 3, silu = 4 }

local function activation_code(what, name)
  local code = activations[name or false]
  if not code then
    raise("%s: unknown activation '%s'; there are gelu, gelu_tanh, relu, silu", what,
      tostring(name))
  end
  return code
end

--- The shape of x wᵀ + b, after checking that there is one.
local function linear_shape(what, x, w, b)
  need_floating(x, what)
  local n = #x.shape
  if #w.shape ~= 2 or n < 1 or x.shape[n] ~= w.shape[2] then
    raise("%s: input %s does not match weight %s (last dimension must be %s)", what,
      shape_string(x.shape), shape_string(w.shape), tostring(w.shape[2]))
  end
  need_like(what, x, w, "the weight")
  need_like(what, x, b, "the bias")
  if b and (#b.shape ~= 1 or b.shape[1] ~= w.shape[1]) then
    raise("%s: bias %s does not match weight %s (must be [%d])", what, shape_string(b.shape),
      shape_string(w.shape), w.shape[1])
  end
  local shape = {}
  for i = 1, n - 1 do shape[i] = x.shape[i] end
  shape[n] = w.shape[1]
  return shape
end

local function linear_run(y, slope, x, w, b, activation)
  run("linear", x.device, rows(1, y), slope and rows(2, slope) or nil, rows(3, x), w._c,
    b and b._c or nil, activation)
end

--- dw and db of y = act(x wᵀ + b), and dh = dy ∘ slope, which goes to `into` (may be dy) or, if
-- slope is nil, is dy: then db comes with dw.
local function weight_gradients(x, w, b, dy, slope, into)
  local dh, dw, db, add_db = slope and into or dy, nil, nil, 0
  if needs(b) then db, add_db = sink(b) end
  local beside = db and not slope and needs(w)
  if slope or db and not beside then
    run("linear_backward_bias", dy.device, slope and rows(1, dh) or nil, db and db._c or nil,
      rows(2, dy), slope and rows(3, slope) or nil, add_db)
  end
  if needs(w) then
    local add
    dw, add = sink(w)
    run("linear_backward_weight", dy.device, dw._c, beside and db._c or nil, rows(1, dh),
      rows(2, x), add, add_db)
  end
  return dw, db, dh
end

--- dx = dh w, of x's shape.
local function input_gradient(shape, w, dh)
  local dx = new(shape, dh.dtype, dh.device)
  run("matmul", dh.device, rows(1, dx), rows(2, dh), w._c, 1, 0)
  return dx
end

local linear = define("linear", {
  inputs = { "x", "w", "b?" }, args = { "activation" }, saved = { "slope?" }, spare = true,
  infer = function(x, w, b, activation)
    local shape = linear_shape("linear", x, w, b)
    local y = new(shape, x.dtype, x.device)
    local slope = activation ~= 0 and scope.grad
      and (x.requires_grad or w.requires_grad or (b and b.requires_grad))
      and new(shape, x.dtype, x.device) or nil
    linear_run(y, slope, x, w, b, activation)
    return y, slope
  end,
  backward = function(r, dy)
    local into = r.slope and new(dy.shape, dy.dtype, dy.device)
    local dw, db, dh = weight_gradients(r.x, r.w, r.b, dy:contiguous(), r.slope, into)
    return needs(r.x) and input_gradient(r.x.shape, r.w, dh) or nil, dw, db
  end,
})

--- y = activation(x wᵀ + b), all of one floating dtype.
-- @tparam Tensor x [… K]
-- @tparam Tensor w [N x K]
-- @tparam Tensor|nil b [N]
-- @tparam[opt] table options { activation = "gelu" | "gelu_tanh" | "relu" | "silu" }: fused
-- @treturn Tensor [… N]
function M.linear(x, w, b, options)
  options = options_of("linear", options, { activation = true })
  local code = activation_code("linear", options.activation)
  if is_tensor(x) and x._c.dense ~= 1 then x = x:contiguous() end
  return linear(x, w, b, code)
end

--- Whether b1's gradient comes with w1's: on cuda the product that makes dh makes it, too, where it
-- knows the activation's slope, but only in dh's dtype.
local function comes_later(r)
  return r.h.device == "cuda" and r.activation == activations.gelu_tanh and needs(r.w1)
    and autograd.grad_dtype(r.b1) ~= r.h.dtype
end

local mlp = define("mlp", {
  inputs = { "x", "w1", "b1?", "w2", "b2?" }, args = { "activation" }, saved = { "h" },
  spare = true,
  infer = function(x, w1, b1, w2, b2, activation)
    local h = new(linear_shape("mlp", x, w1, b1), x.dtype, x.device)
    local a = new(h.shape, x.dtype, x.device)
    run("linear_aux", x.device, rows(1, a), rows(2, h), rows(3, x), w1._c, b1 and b1._c or nil,
      activation)
    local y = new(linear_shape("mlp", a, w2, b2), x.dtype, x.device)
    linear_run(y, nil, a, w2, b2, 0)
    scope.release(a)
    return y, h
  end,
  backward = function(r, dy)
    local h, dh, db1, add = r.h, nil, nil, 0
    dy = dy:contiguous()
    local a = needs(r.w2) and new(h.shape, h.dtype, h.device) or nil
    local later = needs(r.b1) and comes_later(r)
    if needs(r.x) or needs(r.w1) or needs(r.b1) then
      dh = new(h.shape, h.dtype, h.device)
      if needs(r.b1) and not later then db1, add = sink(r.b1) end
      run("linear_backward_act", h.device, rows(1, dh), a and rows(2, a) or nil,
        db1 and db1._c or nil, rows(3, dy), r.w2._c, rows(4, h), r.activation, add)
    elseif a then
      run("activate", h.device, a._c, nil, h._c, r.activation)
    end
    local dw2, db2 = weight_gradients(a, r.w2, r.b2, dy)
    if a then scope.release(a) end
    if not dh then return nil, nil, nil, dw2, db2 end
    local dw1, with_dw1 = weight_gradients(r.x, r.w1, later and r.b1 or nil, dh)
    return needs(r.x) and input_gradient(r.x.shape, r.w1, dh) or nil, dw1, db1 or with_dw1, dw2, db2
  end,
})

--- Two linear layers with an activation between: y = activation(x w1ᵀ + b1) w2ᵀ + b2.
-- As `linear` twice, but keeps for backward only what is before the activation and makes the rest
-- again from that: half the memory for a hundredth of the time.
-- @tparam Tensor x [… K]
-- @tparam Tensor w1 [H x K]
-- @tparam Tensor|nil b1 [H]
-- @tparam Tensor w2 [N x H]
-- @tparam Tensor|nil b2 [N]
-- @tparam table options { activation = "gelu" | "gelu_tanh" | "relu" | "silu" }
-- @treturn Tensor [… N]
function M.mlp(x, w1, b1, w2, b2, options)
  options = options_of("mlp", options, { activation = true })
  local code = activation_code("mlp", options.activation)
  if code == 0 then raise("mlp: expects an activation; there are gelu, gelu_tanh, relu, silu") end
  if is_tensor(x) and x._c.dense ~= 1 then x = x:contiguous() end
  return mlp(x, w1, b1, w2, b2, code)
end

-- ---- the output projection and its loss

-- How many rows of logits exist at a time, in even chunks: up to 64 MB of them, 64 rows or more. On
-- cuda, where every chunk passes over all of the weight's gradient, 512 MB, 4096 rows or more.
local function chunk_rows(n, v, bytes, device)
  local most = math.max(64, math.min(math.floor(64 * 2 ^ 20 / (v * bytes)), 1024))
  local even = 16
  if device == "cuda" then
    most = math.max(4096, math.floor(512 * 2 ^ 20 / (v * bytes)))
    even = 256
  end
  local chunks = math.max(1, math.ceil(n / most))
  return math.min(n, math.ceil(n / chunks / even) * even)
end

-- The gradient of the loss that backward will most likely start from; the engine sets it.
M.loss_seed = 1

-- The gradients are made in forward, chunk by chunk, for a loss gradient of `seed`; backward
-- rescales them if it turns out to be another. A weight whose gradient buffer waits to be
-- overwritten lends it: for GPT-2 that is 154 MB and a pass over them.
local linear_cross_entropy = define("linear_cross_entropy", {
  inputs = { "x", "w", "target" }, args = { "ignore", "seed" },
  outputs = { "loss" }, saved = { "dx?", "dw?" }, unread = { x = true, w = true },
  infer = function(x, w, target, ignore, seed)
    local n, v = x.shape[1], w.shape[1]
    local loss = new({}, fine(x), x.device)
    local want_x, want_w = scope.grad and needs(x), scope.grad and needs(w)
    local dx = want_x and new(x.shape, x.dtype, x.device) or nil
    local dtype = autograd.grad_dtype(w)
    local dw = want_w and (autograd.claim(w, dtype) or new(w.shape, dtype, w.device)) or nil
    local size = x:element_size()
    local rows_ = chunk_rows(n, v, size, x.device)
    local carries = dw and n > rows_ and dtype ~= fine(w)
      and (x.device == "cuda" and "f32" or dtype)
    if carries and (n - rows_) * v * size <= w:numel() * (carries == "f32" and 4 or 2) then
      rows_, carries = n, false -- all logits take less than that
    end
    local scratch = new({ rows_, math.ceil(v / 16) * 16 }, x.dtype, x.device)
    local carry = carries and new(w.shape, carries, w.device) or nil
    run("linear_cross_entropy", x.device, loss._c, dx and dx._c or nil, dw and dw._c or nil,
      scratch._c, carry and carry._c or nil, x._c, w._c, target._c, ignore, seed, 0)
    scope.release(scratch)
    if carry then scope.release(carry) end
    return loss, dx, dw
  end,
  backward = function(r, dloss)
    -- Reading a number from cuda would wait for all that was asked of it.
    local value = dloss._value or dloss.device == "meta" and r.seed
      or dloss.device == "cpu" and dloss:item()
    local dx, dw = r.dx, r.dw
    for _, g in ipairs { dx or dw, dx and dw or nil } do
      if not value then
        run("scale_by", g.device, g._c, g._c, dloss._c, 1 / r.seed)
      elseif value ~= r.seed then
        run("mul_scalar", g.device, g._c, g._c, value / r.seed, 0)
      end
    end
    if dw and autograd.claimed(r.w, dw) then dw = r.w.grad end
    return needs(r.x) and dx or nil, needs(r.w) and dw or nil
  end,
})

--- Mean cross-entropy of the projection x wᵀ, without ever holding all logits.
-- @tparam Tensor x [… K]
-- @tparam Tensor w [V x K], of x's dtype
-- @tparam Tensor target one class from 0 for each row of x, i64, i32 or u8
-- @tparam[opt] table options { ignore_index = −100 }
-- @treturn Tensor [] f32 (f64 for f64)
function M.linear_cross_entropy(x, w, target, options)
  options = options_of("linear_cross_entropy", options, { ignore_index = true })
  tensor.need_tensor(x, "linear_cross_entropy", 1)
  tensor.need_tensor(w, "linear_cross_entropy", 2)
  tensor.need_tensor(target, "linear_cross_entropy", 3)
  need_targets("linear_cross_entropy", x, target)
  need_like("linear_cross_entropy", x, w, "the weight")
  local k = x.shape[#x.shape]
  if #w.shape ~= 2 or w.shape[2] ~= k then
    raise("linear_cross_entropy: input %s does not match weight %s (last dimension must be %s)",
      shape_string(x.shape), shape_string(w.shape), tostring(w.shape[2]))
  end
  return linear_cross_entropy(x:reshape(-1, k):contiguous(), w:contiguous(),
    target:reshape(-1):contiguous(), options.ignore_index or -100, M.loss_seed)
end

return M
