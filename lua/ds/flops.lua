--- Arithmetic of kernels: how many floating-point operations a call is, by the shapes of what it is
-- given. A multiplication and the addition that goes with it are two. What only passes over memory
-- (elementwise, norms, the optimizer) counts as none, as is usual: it takes no time beside these.

local M = {}

local function size(t, from_end) return tonumber(t.shape[t.ndim - 1 - from_end]) end
local function numel(t) return tonumber(t.numel) end

--- Products of a row of q with a row of k that attention makes: q [B, T, H, D], k [B, S, G, D].
local function pairs_of(q, k, causal)
  local B, T, H, S = size(q, 3), size(q, 2), size(q, 1), size(k, 2)
  if causal == 0 then return B * H * T * S end
  local hidden = T * (T - 1) / 2 -- row t sees s ≤ t + S − T
  if S < T then hidden = T * S - S * (S + 1) / 2 end
  return B * H * (T * S - hidden)
end

-- By kernel, with its arguments as kernels/ops.def has them.
local kernels = {
  matmul = function(y, a) return 2 * numel(y) * size(a, 0) end,
  linear = function(y, _, x) return 2 * numel(y) * size(x, 0) end,
  linear_aux = function(y, _, x) return 2 * numel(y) * size(x, 0) end,
  linear_backward_act = function(dh, _, _, dy) return 2 * numel(dh) * size(dy, 0) end,
  linear_backward_weight = function(dw, _, dy) return 2 * numel(dw) * size(dy, 1) end,
  attention = function(_, _, q, k, _, _, causal)
    return 4 * size(q, 0) * pairs_of(q, k, causal)
  end,
  -- q kᵀ once more, and the four products with the gradients
  attention_backward = function(_, _, _, _, _, _, q, k, _, _, causal)
    return 10 * size(q, 0) * pairs_of(q, k, causal)
  end,
  linear_cross_entropy = function(_, dx, dw, _, _, x, w)
    return 2 * numel(x) * size(w, 1) * (1 + (dx and 1 or 0) + (dw and 1 or 0))
  end,
}

--- Operations of one call of a kernel.
-- @tparam string kernel as in kernels/ops.def
-- @param ... what it is called with: cdata ds_tensor, numbers, nil
-- @treturn number
function M.of(kernel, ...)
  local f = kernels[kernel]
  return f and f(...) or 0
end

return M
