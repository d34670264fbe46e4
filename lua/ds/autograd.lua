--- The tape: how an operation is defined, dispatched, recorded, and run backwards.
--
-- `define` turns the description of an operation into the function that users call. All of them
-- pass through the same few steps, generated once per operation so that the JIT sees straight
-- code:
--
--     arguments are tensors and alive    (the one place where a parameter is unwrapped, and
--                                        gathered if it is sharded)
--     infer(inputs, args)                the shape rule: checks, makes outputs; all that meta needs
--     kernel(outputs, inputs, args)      C, unless the device is meta
--     record                             if gradients are on and an input wants one
--
-- A record is a flat table of plain values: the inputs, arguments and outputs under their names,
-- `op`, and `seq`, a number that grows. Outputs point at their record. backward() collects the
-- records reachable from a loss, walks them by falling `seq`, and drops each activation as soon as
-- the record that made it is done: nothing recorded earlier can need it.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local C, check, raise = border.C, border.check, border.raise
local memory = C.ds_memory_of(0)
local release = scope.release

local M = {
  ops = {},    -- by name
  order = {},  -- names in order of definition
}

local Record = {}
Record.__index = Record

local state = { seq = 0 }

-- ---- definition

local function bad_argument(op, position, name, value)
  tensor.need_tensor(value, op.name .. " (" .. name .. ")", position)
end

--- Raises if some of the inputs are on the meta device, for a kernel on another one.
local function without_values(op, ...)
  local other
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t and t.device ~= "meta" then other = t.device end
  end
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t and t.device == "meta" then
      raise("%s: tensors on %s and meta; one on the meta device has a shape and no values",
        op.name, other)
    end
  end
end

--- Raises if some of the inputs are on different devices that both have values; for a kernel of one
-- device the memory of another is no memory. What the meta device has, `infer` judges.
local function mixed_devices(op, ...)
  local device
  for i = 1, select("#", ...) do
    local t = select(i, ...)
    if t and t.device ~= "meta" then
      if device and t.device ~= device then
        raise("%s: tensors on %s and %s", op.name, device, t.device)
      end
      device = t.device
    end
  end
end

--- The kernels of a device once it is known that this op has one there.
local function first_use(op, device)
  local ops = tensor.kernels(device)
  if op.kernel and ops[op.kernel] == nil then raise("%s has no %s kernel", op.name, device) end
  op.tables[device] = ops
  return ops
end

-- DS_CHECK=nan: every output of every operation is looked at, and the first NaN is an error. "comm"
-- is comm_check.c's.
local checks, asked = { nan = false, comm = false }, os.getenv "DS_CHECK" or ""
for word in asked:gmatch "[^,%s]+" do
  if checks[word] == nil then
    raise("DS_CHECK=%s: there is no check '%s'; there are nan, comm", asked, word)
  end
  checks[word] = true
end

local function refuse_nan(op, y)
  if not y or not tensor.floating[y.dtype] or y.device == "meta" then return end
  local bad = tensor.new(y.shape, "bool", y.device)
  local any = tensor.new({ 1 }, "bool", y.device)
  tensor.run("ne", y.device, bad._c, y._c, y._c)
  tensor.run("any", y.device, any._c, tensor.view.reshape(bad, { y:numel() })._c)
  local found = any:item()
  scope.release(bad)
  if found then
    raise("%s: the result %s has a NaN (DS_CHECK=nan)", op.name, border.shape_string(y.shape))
  end
end

local function list(names, format, sep)
  local out = {}
  for i, name in ipairs(names) do out[i] = (format:gsub("@", name)) end
  return table.concat(out, sep or ", ")
end

local function concat(...)
  local out = {}
  for _, names in ipairs { ... } do
    for _, name in ipairs(names) do out[#out + 1] = name end
  end
  return out
end

--- The source of an op's dispatch function.
local function generate(op)
  local lines, closed = {}, {}
  local function put(...) lines[#lines + 1] = (...):format(select(2, ...)) end
  local produced = concat(op.outputs, op.saved)
  put("local op, infer, scope, state, memory, tables, first_use, revive_all, bad, check, "
    .. "Record, setmetatable, refuse_nan, without_values, mixed_devices = ...")
  put("return function(%s)", table.concat(concat(op.inputs, op.args), ", "))
  put("local meta = false")
  for i, name in ipairs(op.inputs) do
    if op.optional[name] then
      put("local c_%s if %s ~= nil then", name, name)
    else
      put("local c_%s do", name)
    end
    put("  c_%s = type(%s) == 'table' and %s._c", name, name, name)
    put("  if not c_%s then bad(op, %d, '%s', %s) end", name, i, name, name)
    put("end")
    closed[i] = ("c_%s.data == nil"):format(name)
    if op.optional[name] then closed[i] = ("c_%s and %s"):format(name, closed[i]) end
  end
  if #closed > 0 then
    put("if %s then revive_all('%s', %s) meta = true end", table.concat(closed, " or "), op.name,
      table.concat(op.inputs, ", "))
  end
  local apart = {}
  for i = 2, #op.inputs do
    local name = op.inputs[i]
    apart[i - 1] = ("c_%s.device ~= c_%s.device"):format(name, op.inputs[1])
    if op.optional[name] then apart[i - 1] = ("c_%s and %s"):format(name, apart[i - 1]) end
  end
  if #apart > 0 then
    put("if %s then mixed_devices(op, %s) end", table.concat(apart, " or "),
      table.concat(op.inputs, ", "))
  end
  put("memory.tag = %d", op.id)
  put("local %s = infer(%s)", table.concat(produced, ", "),
    table.concat(concat(op.inputs, op.args), ", "))
  local y = op.outputs[1]
  if op.kernel then
    put("do")
    put("  if meta and %s.device ~= 'meta' then without_values(op, %s) end", y,
      table.concat(op.inputs, ", "))
    put("  local K = tables[%s.device] or first_use(op, %s.device)", y, y)
    local call = {}
    for _, name in ipairs(op.call or concat(produced, op.inputs, op.args)) do
      local is_input, is_output = false, false
      for _, n in ipairs(op.inputs) do is_input = is_input or n == name end
      for _, n in ipairs(produced) do is_output = is_output or n == name end
      local handle = name .. "._c"
      if op.optional[name] then handle = ("(%s and %s or nil)"):format(name, handle) end
      call[#call + 1] = is_input and "c_" .. name or is_output and handle or name
    end
    put("  local rc = K.%s(%s)", op.kernel, table.concat(call, ", "))
    put("  if rc ~= 0 then check(rc, '%s') end", op.name)
    put("end")
  end
  put("memory.tag = 0")
  if checks.nan then put("refuse_nan(op, %s)", y) end
  if op.backward then
    local wants = {}
    for _, name in ipairs(op.inputs) do
      wants[#wants + 1] = op.optional[name] and ("(%s and %s.requires_grad)"):format(name, name)
        or name .. ".requires_grad"
    end
    put("if scope.grad and (%s) then", table.concat(wants, " or "))
    put("  local seq = state.seq + 1 state.seq = seq")
    put("  local r = setmetatable({ op = op, seq = seq, mark = 0, %s }, Record)",
      list(concat(op.inputs, op.args, produced), "@ = @"))
    for _, name in ipairs(op.outputs) do
      put("  %s._rec = r %s.requires_grad = true", name, name)
    end
    put("end")
  end
  put("return %s", table.concat(op.outputs, ", "))
  put("end")
  return table.concat(lines, "\n")
end

--- Defines an operation and returns the function that dispatches it.
-- @tparam string name
-- @tparam table spec
--   inputs   names of the tensor arguments, "b?" may be nil
--   args     names of the other arguments, which follow
--   outputs  names of what the user gets (default { "y" })
--   saved    names of what else the kernel makes, kept for backward, "slope?" may be nil
--   infer    function(inputs…, args…) → outputs…, saved…: checks shapes and makes the tensors
--   kernel   the kernel's name in ops.def; nil: infer does it all (views)
--   call     the kernel's arguments by name, if not outputs, saved, inputs, args
--   spare    backward reads no output, so its memory may be given to another tensor
--   unread   names of inputs whose values backward does not read: sharded, they stay so
--   partial  with several outputs: backward takes missing gradients as false (default: zeros)
--   backward function(r, d_output…) → one gradient (or nil) per input; r: the record
function M.define(name, spec)
  if M.ops[name] then error(("operation '%s' is already defined"):format(name), 2) end
  local op = { name = name, id = #M.order + 1, args = spec.args or {},
    outputs = spec.outputs or { "y" }, kernel = spec.kernel, call = spec.call,
    backward = spec.backward, partial = spec.partial, spare = spec.spare, optional = {},
    unread = spec.unread, tables = {} }
  local function plain(names)
    local out = {}
    for i, n in ipairs(names or {}) do
      out[i] = n:gsub("%?", "")
      op.optional[out[i]] = n:sub(-1) == "?" or nil
    end
    return out
  end
  op.inputs, op.saved = plain(spec.inputs or { "x" }), plain(spec.saved)
  M.ops[name] = op
  M.order[#M.order + 1] = name
  tensor.tags[op.id] = name
  function op.call_(...) -- the first call makes the function; most scripts use few operations
    local chunk = assert(loadstring(generate(op), "=op " .. name))
    op.call_ = chunk(op, spec.infer, scope, state, memory, op.tables, first_use,
      tensor.revive_all, bad_argument, check, Record, setmetatable, refuse_nan, without_values,
      mixed_devices)
    return op.call_(...)
  end
  return function(a, b, c, d, e, f, g, h, i, j, k)
    return op.call_(a, b, c, d, e, f, g, h, i, j, k)
  end
end

--- Whether nothing reads t's values any more, so that its memory may be given to another tensor:
-- not backward, no view of it, nobody who kept it.
function M.spare(t)
  local r = t._rec
  if r and not r.op.spare or not r and t.requires_grad or t._keep then return false end
  return t._c.dense == 1 and not tensor.shared(t)
end

-- ---- backward

M.owner = nil -- parameters with another `_engine` get no gradient; nil: all do; a set of engines

--- Whether backward should compute a gradient for t.
function M.needs(t)
  if not t or not t.requires_grad then return false end
  local e = t._engine
  return t._rec ~= false or not e or not M.owner or M.owner[e] ~= nil
end
local needs = M.needs

--- The gradient of a leaf; one that is sharded (ZeRO stage 2) gets a buffer for it.
local function gradient_of(t)
  local g = t.grad
  if not g and t._zero then return t._zero:open_gradients(t) end
  return g
end

--- The type in which t's gradient is kept: its buffer's if it has one.
function M.grad_dtype(t)
  if t._rec then return t.dtype end
  return t.grad and t.grad.dtype or t._zero and t._zero.grad_dtype or t.dtype
end

--- The gradient buffer of a leaf that is to be overwritten, for an op that knows its gradient in
-- forward already. One op at a time has it; if another gradient comes first, the lent one
-- moves out.
-- @treturn Tensor|nil a handle on t.grad's memory
function M.claim(t, dtype)
  local g = not t._rec and gradient_of(t)
  if not g or not t._fresh or t._claim then return nil end
  if g.dtype ~= dtype or g._c.dense ~= 1 then return nil end
  t._claim = tensor.view.alias(g)
  return t._claim
end

--- Ends a claim in backward: true if `g` still lies in t.grad, which now counts as written.
function M.claimed(t, g)
  if t._claim ~= g then return false end
  t._claim, t._fresh = nil, false
  return true
end

--- Ends a claim by giving what was written there memory of its own.
local function move_out(t)
  local lent = t._claim
  if not lent then return end
  t._claim = nil
  if lent._c.storage == nil then return end
  local copy = tensor.new(lent.shape, lent.dtype, lent.device)
  tensor.run("copy", lent.device, copy._c, lent._c)
  tensor.repoint(lent, copy)
end

M.move_out = move_out

--- Where a kernel may write the gradient of t directly.
-- For a leaf that is t.grad itself; for anything else (and for leaves that others write as well) a
-- new tensor. Return what you get: accumulating notices that it is there already.
-- @treturn Tensor of t's shape and grad_dtype(t)
-- @treturn number 1: add to it, 0: overwrite it
function M.sink(t)
  if not t._rec then
    local g = gradient_of(t)
    if not g then
      g = tensor.new(t.shape, t.dtype, t.device)
      scope.keep(g)
      g._keep = true
      t.grad = g
      return g, 0
    end
    if g._c.dense == 1 then
      move_out(t)
      local fresh = t._fresh
      t._fresh = false
      return g, fresh and 0 or 1
    end
  end
  return tensor.new(t.shape, t.dtype, t.device), 0
end

--- a += b; the sum is made in f32 and rounded once, also where only one of them is f32.
local function add_into(a, b)
  local sum = a
  if a.dtype ~= b.dtype then
    if a:element_size() < b:element_size() then sum = a:to(b.dtype) else b = b:to(a.dtype) end
  end
  tensor.run("add_scaled", a.device, sum._c, sum._c, b._c, 1)
  if sum ~= a then tensor.run("copy", a.device, a._c, sum._c) end
end

--- Adds gradient g to what t has.
local function accumulate(t, g)
  if not t._rec then
    local have = gradient_of(t)
    if have == g then return end
    move_out(t)
    if not have then
      if g._rec or g._keep or g.dtype ~= t.dtype or tensor.shared(g) or g._c.dense ~= 1 then
        local copy = tensor.new(t.shape, t.dtype, t.device)
        tensor.run("copy", t.device, copy._c, g._c)
        g = copy
      end
      scope.keep(g)
      g._keep = true
      t.grad = g
    elseif t._fresh then
      tensor.run("copy", t.device, have._c, g._c)
    else
      add_into(have, g)
    end
    t._fresh = false
    return
  end
  local have = t._g
  if not have then
    t._g = g
    g._uses = g._uses + 1
  elseif have._uses == 1 and have._c.dense == 1 and not tensor.shared(have)
    and have.dtype == g.dtype then
    add_into(have, g)
  else
    local sum = M.ops.add.call_(have, g)
    have._uses = have._uses - 1
    if have._uses == 0 and not have._keep then release(have) end
    sum._uses = 1
    t._g = sum
  end
end

local function outside(r)
  raise("it reads a tensor with a history, the result of '%s', that is not among its arguments, "
    .. "and so would get no gradient; pass it as one", r.op.name)
end

--- The records that `roots` depend on, placed by seq. Returns the table, its lowest and highest
-- seq, and whether some of them make further records when they run. Parameters with sharded
-- gradients are told how often they are in one. All must be younger than `floor`.
local mark = 0
local function collect(roots, floor)
  mark = mark + 1
  local stack, n = {}, 0
  local placed, low, high, nested = {}, math.huge, 0, false
  for i = 1, #roots do
    local r = roots[i]._rec
    if r and r.mark ~= mark then
      r.mark = mark
      n = n + 1
      stack[n] = r
    end
  end
  while n > 0 do
    local r = stack[n]
    n = n - 1
    local seq = r.seq
    if seq <= floor then outside(r) end
    placed[seq] = r
    if seq < low then low = seq end
    if seq > high then high = seq end
    local inputs = r.op.inputs
    for i = 1, #inputs do
      local t = r[inputs[i]]
      local up = t and t._rec
      if up then
        if up.mark ~= mark then
          up.mark = mark
          n = n + 1
          stack[n] = up
        end
      elseif t and t._zero then
        t._zero:expect(t)
      end
    end
    if r.op.nested then nested = true end
  end
  return placed, low, high, nested
end

--- Releases what lies in the temporary scope and is nobody's gradient.
local function sweep(temporary)
  for i = 1, temporary.n do
    local t = temporary[i]
    temporary[i] = nil
    if t._scope == temporary then
      t._scope = false
      if t._uses == 0 then release(t) end
    end
  end
  temporary.n = 0
end

--- A record is done: its outputs' gradients and activations go, and the record lets go of its
-- tensors.
local function finish(r, retain)
  local op = r.op
  local outputs = op.outputs
  for i = 1, #outputs do
    local y = r[outputs[i]]
    local g = y._g
    if g then
      y._g = false
      g._uses = g._uses - 1
      if g._uses == 0 and not g._keep then release(g) end
    end
    if not retain then
      y._rec = false
      y._done = true
      if not y._keep and tensor.numel_of(y.shape) ~= 1 then release(y) end
    end
  end
  if retain then return end
  for i = 1, #op.saved do
    local t = r[op.saved[i]]
    if t and not t._keep and t._uses == 0 then release(t) end
  end
  for i = 1, #op.inputs do r[op.inputs[i]] = nil end
  for i = 1, #outputs do r[outputs[i]] = nil end
  for i = 1, #op.saved do r[op.saved[i]] = nil end
  r.kept, r.list, r.arguments, r.away = nil, nil, nil, nil
end

local function missing(r, i)
  local y = r[r.op.outputs[i]]
  return tensor.zeros_like(y)
end

--- One record backwards: gradients of its outputs to gradients of its inputs.
local function step(r)
  local op = r.op
  local outputs = op.outputs
  local n = #outputs
  local d1 = r[outputs[1]]._g
  local g1, g2, g3, g4, g5
  if n == 1 then
    if not d1 then return end
    g1, g2, g3, g4, g5 = op.backward(r, op.many and { d1 } or d1)
  else
    local d, any = {}, false
    for i = 1, n do
      d[i] = r[outputs[i]]._g
      any = any or d[i]
    end
    if not any then return end
    if not op.partial then
      for i = 1, n do d[i] = d[i] or missing(r, i) end
    end
    if op.many then
      g1 = op.backward(r, d)
    else
      g1, g2, g3, g4, g5 = op.backward(r, unpack(d, 1, n))
    end
  end
  local inputs = op.inputs
  local count = #inputs
  if op.many then -- inputs in any number: one table of gradients
    for i = 1, count do
      local t = r[inputs[i]]
      if g1[i] and needs(t) then accumulate(t, g1[i]) end
    end
    return
  end
  local t = r[inputs[1]]
  if g1 and needs(t) then accumulate(t, g1) end
  if count < 2 then return end
  t = r[inputs[2]]
  if g2 and needs(t) then accumulate(t, g2) end
  t = r[inputs[3]]
  if g3 and needs(t) then accumulate(t, g3) end
  t = r[inputs[4]]
  if g4 and needs(t) then accumulate(t, g4) end
  t = r[inputs[5]]
  if g5 and needs(t) then accumulate(t, g5) end
end

--- Makes what a record reads usable: parameters that are sharded.
local function revive_inputs(r)
  local op = r.op
  for i = 1, #op.inputs do
    local name = op.inputs[i]
    local t = r[name]
    if t and t._unit and not (op.unread and op.unread[name]) then
      local all = {}
      for k, other in ipairs(op.inputs) do
        local unread = op.unread and op.unread[other]
        all[k] = not unread and r[other] and r[other]._unit and r[other] or false
      end
      return tensor.revive_all("backward of " .. op.name, unpack(all, 1, #op.inputs))
    end
  end
end

M.away = 0 -- how many pieces of memory are in the host's (checkpointing_host.lua)

local function bring(r, names, unread)
  for i = 1, #names do
    local t = r[names[i]]
    if t and type(t._gone) == "table" and not (unread and unread[names[i]]) then t._gone:back() end
  end
end

--- Brings what a record reads back from there.
local function bring_back(r)
  bring(r, r.op.inputs, r.op.unread)
  if not r.op.spare then bring(r, r.op.outputs) end
end

--- Tells parameters with sharded gradients that this record adds nothing more.
local function tell_done(r)
  local inputs = r.op.inputs
  for i = 1, #inputs do
    local t = r[inputs[i]]
    if t and t._zero and not t._rec then t._zero:done(t) end
  end
end

local function walk(placed, low, high, temporary, retain)
  local outer = state.now -- one that makes its forward again, and runs that backwards
  local dense = high - low < 1e6
  local keys
  if not dense then
    keys = {}
    for seq in pairs(placed) do keys[#keys + 1] = seq end
    table.sort(keys)
    low, high = 1, #keys
  end
  for i = high, low, -1 do
    local r = placed[dense and i or keys[i]]
    if r then
      state.now = r
      if M.away > 0 then bring_back(r) end
      revive_inputs(r)
      step(r)
      sweep(temporary)
      tell_done(r)
      finish(r, retain)
    end
  end
  state.now = outer
end

--- Runs backward from several tensors at once.
-- @tparam table roots tensors with a history
-- @tparam table seeds their gradients, tensors of the same shape
-- @tparam[opt] boolean retain keep the records and activations for another backward
-- @tparam[opt] number floor what M.now() said: it is an error to reach a record made before
function M.run(roots, seeds, retain, floor)
  local temporary, grad, before = scope.new(), scope.grad, state.now
  local placed, low, high, nested = collect(roots, floor or 0)
  local outer = scope.enter(temporary)
  scope.grad = false
  if nested and M.owner then
    for engine in pairs(M.owner) do engine.zero.nested = true end
  end
  for i = 1, #roots do accumulate(roots[i], seeds[i]) end
  local ok, message = xpcall(walk, border.note, placed, low, high, temporary, retain)
  scope.enter(outer)
  scope.grad = grad
  if not ok then
    local r = state.now
    state.now = nil
    for _, rec in pairs(placed) do
      for _, name in ipairs(rec.op.outputs) do
        local y = rec[name]
        if y then y._g = false end
      end
    end
    scope.close(temporary, "when backward() failed")
    if r and type(message) == "string" then
      message = message:gsub("^([^\n]*:%d+: )", "%1in backward of " .. r.op.name .. ": ", 1)
      border.host.error = message
    end
    error(message, 0)
  end
  state.now = before
  scope.close(temporary, "by backward()")
end

--- Whether a record runs backwards now.
function M.is_running() return state.now ~= nil end

--- The record that does; nil outside backward.
function M.running() return state.now end

--- Gradients of all that this tensor was made of, added to their `.grad`.
-- Frees every activation it passes; what you want to look at afterwards, `keep()` before.
-- @tparam[opt] Tensor|table gradient of this tensor (default 1 for a one-element tensor), or
-- options
-- @tparam[opt] table options { retain_graph = true }: for a second backward over the same records
function tensor.methods:backward(gradient, options)
  tensor.need_tensor(self, "backward", 1)
  if gradient and not tensor.is_tensor(gradient) then gradient, options = nil, gradient end
  options = options or {}
  if not self._rec then
    if self._done then
      raise("backward: it was already called; use { retain_graph = true } in the first call")
    end
    raise("backward: the tensor does not depend on anything that requires a gradient")
  end
  if not gradient then
    if self:numel() ~= 1 then
      raise("backward: the tensor has %d elements %s, so it needs a gradient; or take :mean() or "
        .. ":sum() first",
        self:numel(), border.shape_string(self.shape))
    end
    gradient = tensor.full(self.shape, 1, { dtype = self.dtype, device = self.device })
  elseif gradient.device ~= self.device then
    raise("backward: tensors on %s and %s", self.device, gradient.device)
  end
  local kept = self._keep
  self._keep = true -- the argument of backward survives
  if self._scope then scope.keep(self) end
  M.run({ self }, { gradient }, options.retain_graph)
  self._keep = kept
end

--- The last place on the tape so far.
function M.now() return state.seq end

--- Gives a record that was not made by `define` its place on the tape.
-- @tparam table r { op, mark = 0, inputs and outputs under the names that op has for them }
-- @treturn table r
function M.place(r)
  state.seq = state.seq + 1
  r.seq = state.seq
  return r
end

M.Record = Record
return M
