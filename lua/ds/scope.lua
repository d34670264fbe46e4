--- Who frees a tensor: the scope it was made in, or the collector.
--
-- The collector sees a handle of some bytes and not the megabytes behind it, so it cannot be relied
-- on. While a scope is open, every new tensor is put on its list and released when it closes.
-- Outside any scope a tensor has a finalizer, and C counts such bytes, so that the collector is
-- called in time. One-element tensors always belong to the collector: `losses[#losses + 1] = loss`
-- works anywhere.

local ffi = require "ffi"
local border = require "ds.ffi"

local C = border.C
local memory = C.ds_memory_of(0)

local M = {
  current = nil, -- the innermost open scope
  grad = true,   -- operations are recorded for backward
}

local MB = 2 ^ 20

-- How much may be live outside scopes on a device before the collector is called.
local loose = {}
for code, device in ipairs { "cpu", "cuda", "meta" } do
  loose[device] = { memory = C.ds_memory_of(code - 1), limit = 256 * MB }
end

--- A scope that is not open yet.
function M.new()
  return { n = 0 }
end

--- Makes `s` the innermost scope (nil: none) and returns the one before.
function M.enter(s)
  local outer = M.current
  M.current = s
  memory.scoped = s and 1 or 0
  return outer
end

--- Gives a new handle its owner.
-- @tparam Tensor t
-- @tparam number numel
function M.adopt(t, numel)
  local s = M.current
  if s and numel ~= 1 then
    local n = s.n + 1
    s.n = n
    s[n] = t
    t._scope = s
    return
  end
  ffi.gc(t._c, C.ds_release)
  local l = loose[t.device]
  if l.memory.loose > l.limit then
    collectgarbage()
    l.limit = tonumber(l.memory.loose) * 1.4 + 256 * MB
  end
end

--- Moves a tensor out of its scope: from now on the collector owns it.
function M.keep(t)
  if t._scope then
    t._scope = false
    ffi.gc(t._c, C.ds_release)
  end
  return t
end

--- Drops a tensor's memory now; touching it later is an error that says `why`.
function M.release(t, why)
  local c = t._c
  if c.storage ~= nil then
    C.ds_release(c)
    t._gone = why
  elseif type(t._gone) == "table" then -- its values are in host memory (checkpointing_host.lua)
    local piece = t._gone
    t._gone = why
    piece:drop()
  end
end

--- Releases all that still belongs to the scope; it may be used again.
function M.close(s, why)
  for i = 1, s.n do
    local t = s[i]
    s[i] = nil
    if t._scope == s then
      t._scope = false
      M.release(t, why)
    end
  end
  s.n = 0
end

--- Hands tensors (also inside tables) over from scope `s` to the scope around it, or the collector.
function M.hand_over(s, outer, value, seen)
  if type(value) ~= "table" then return end
  if value._c then
    if value._scope == s then
      if outer then
        outer.n = outer.n + 1
        outer[outer.n] = value
        value._scope = outer
      else
        M.keep(value)
      end
    end
    return
  end
  seen = seen or {}
  if seen[value] then return end
  seen[value] = true
  for _, v in pairs(value) do M.hand_over(s, outer, v, seen) end
end

local function finish(s, outer, grad, ok, ...)
  M.enter(outer)
  M.grad = grad
  if ok then
    for i = 1, select("#", ...) do M.hand_over(s, outer, (select(i, ...))) end
  end
  M.close(s, "at the end of its scope")
  if not ok then error((...), 0) end
  return ...
end


--- Runs `f(...)` in a scope of its own; what it returns survives, all else is released.
-- @usage local norm = ds.scope(function() return (w * w):sum():sqrt() end)
function M.run(f, ...)
  local s, grad = M.new(), M.grad
  local outer = M.enter(s)
  return finish(s, outer, grad, xpcall(f, border.note, ...))
end

--- The same without recording for backward.
function M.no_grad(f, ...)
  local s, grad = M.new(), M.grad
  local outer = M.enter(s)
  M.grad = false
  return finish(s, outer, grad, xpcall(f, border.note, ...))
end

return M
