--- Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of a matrix, brought
-- near the closest matrix with orthogonal rows, is the update.
--
-- Five steps of a quintic Newton-Schulz iteration do that by products alone: X ← p(XXᵀ) X with
-- p(R) = a + bR + cR², which drives all singular values into about 0.7 to 1.2. Two ways to go:
--
--   "standard"  as it stands, in bf16: 4n²m + 2n³ multiplications a step for X [n x m], n ≤ m
--   "gram"      XXᵀ is all that p needs, so only R [n x n] is iterated, R ← p(R) R p(R), and what
--               X is to be multiplied by; X itself is read twice. Cheaper from m = 1.5 n on, and in
--               f32: the same numbers on every processor. DeepSpeed's default, too, which does it
--               in f16 with a restart where the processor multiplies f16, and in f32 elsewhere.
--
-- Both in f64 for f64 weights. PyTorch's Muon is "standard". The update is scaled by
-- sqrt(max(1, rows / cols)) as theirs, where a convolution's weight counts as the matrix it is
-- flattened to (DeepSpeed takes its last two dimensions there).
--
-- With several ranks: at ZeRO stage 0 each of them updates all weights, so all do all of this work;
-- at stage 1 every matrix is one rank's.

local ffi = require "ffi"
local border = require "ds.ffi"
local tensor = require "ds.tensor"

local raise, run, new = border.raise, tensor.run, tensor.new
local swapped = tensor.borrow.swapped

local A, B, C = 3.4445, -4.7750, 2.0315

--- alpha a b + beta y into a new matrix, where y is given.
local function product(a, b, alpha, y, beta)
  local out = new({ a.shape[1], b.shape[2] }, a.dtype, a.device)
  if y then run("copy", a.device, out._c, y._c) end
  run("matmul", a.device, out._c, a._c, b._c, alpha, y and beta or 0)
  return out
end

--- x xᵀ
local function gram_of(x)
  local out = new({ x.shape[1], x.shape[1] }, x.dtype, x.device)
  run("matmul", x.device, out._c, x._c, swapped(1, x), 1, 0)
  return out
end

local function standard(x, steps)
  for _ = 1, steps do
    local r = gram_of(x)
    x = product(product(r, r, C, r, B), x, 1, x, A)
  end
  return x
end

local function by_gram(x, steps)
  local r, q = gram_of(x)
  local like = { dtype = r.dtype, device = r.device }
  for i = 1, steps do
    local z = product(r, r, C, r, B)                    -- p(r) = z + A
    q = q and product(z, q, 1, q, A) or z + tensor.eye(z.shape[1], like) * A
    if i < steps then
      local half = product(z, r, 1, r, A)
      r = product(z, half, 1, half, A)
    end
  end
  return q and product(q, x, 1) or x
end

local cell = ffi.new("double[1]")

--- A matrix with the singular vectors of x [rows x cols] and singular values near 1.
local function orthogonalised(x, steps, method)
  local rows, cols = x.shape[1], x.shape[2]
  local n, m = math.min(rows, cols), math.max(rows, cols)
  run("sum_squares", x.device, cell, x._c)
  local dtype = x.dtype == "f64" and "f64" or method == "standard" and "bf16" or "f32"
  local unit = x * (1 / (math.sqrt(cell[0]) + 1e-7))
  local y = new({ n, m }, dtype, x.device)
  run("copy", x.device, y._c, rows > cols and swapped(1, unit) or unit._c)
  y = (method == "gram" and m >= 1.5 * n and by_gram or standard)(y, steps)
  return rows > cols and y:t() or y
end

local methods = { gram = true, standard = true }

return {
  granularity = "matrix", state = { "momentum_buffer" },
  defaults = { lr = 1e-3, momentum = 0.95, nesterov = true, weight_decay = 0, ns_steps = 5,
    ns_method = "gram" },
  fallback = { "Adam", betas = { 0.9, 0.95 }, eps = 1e-10 }, -- DeepSpeed's
  step = function(p, g, s, h)
    if not methods[h.ns_method] then
      raise("Muon: ns_method is \"gram\" or \"standard\", not \"%s\"", tostring(h.ns_method))
    end
    local update = s.momentum_buffer:mul_(h.momentum):add_(g, 1 - h.momentum)
    if h.nesterov then update = (g * (1 - h.momentum)):add_(update, h.momentum) end
    update = orthogonalised(update, h.ns_steps, h.ns_method)
    local scale = math.sqrt(math.max(1, p.shape[1] / p.shape[2]))
    p:mul_(1 - h.lr * h.weight_decay):add_(update, -h.lr * scale)
  end,
}
