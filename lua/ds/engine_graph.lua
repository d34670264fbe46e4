--- CUDA graphs: forward and backward of a micro-batch, and the update, are recorded once each, and
-- launched as one from then on.
--
-- A step of a small model is hundreds of kernels of a few microseconds, and the host is slower than
-- the GPU. `"cuda_graph": true` has the engine record them: after two steps as usual, one that
-- takes its memory from a set of its own (so that nobody else gets what the graph will use), and in
-- the next the capture. Batches are copied to fixed places; what forward gives is a copy of the
-- loss. Of the step norm, clipping and optimizer are recorded; rates and bias corrections, which
-- change, are uploaded before. While a schedule moves other settings, as momentum, steps are made
-- as ever.
--
-- There is a graph for each state of the gradients (the first micro-batch of a step overwrites
-- them, others add). Whatever does not fit is done as without graphs: a batch of another shape, a
-- backward from something else than the loss. What cannot work at all ends the graphs with one line
-- that says why. From then on, and wherever a replayed forward has to be made again, the model runs
-- on the batch that was kept.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local comm = require "ds.comm"
local log = require "ds.log"

local C, check, run = border.C, border.check, tensor.run
local CUDA = C.DS_CUDA

local M = {}

local Graph = {}
Graph.__index = Graph

local WARM = 2 -- steps before the one that takes memory from the set
local AWAY = "what checkpoints keep leaves for the host's memory and comes back"

-- ---- memory of its own

local taken = {}

local function take_set()
  for set = 1, C.DS_MEMORY_SETS - 1 do
    if not taken[set] then
      taken[set] = true
      return set
    end
  end
end

--- Calls f(…) with memory from the set; no error leaves it. @return as pcall
function Graph:inside(f, ...)
  local before = C.ds_memory_set(CUDA, self.set)
  return (function(...)
    C.ds_memory_set(CUDA, before)
    return ...
  end)(pcall(f, ...))
end

--- Records what f(…) asks of the GPU.
-- @treturn cdata|nil the graph, nil: it could not be
-- @return why not, or what f returned
function Graph:record(f, ...)
  check(C.ds_graph_begin(CUDA), "cuda_graph")
  local offset = tensor.generator.offset
  local ok, result = self:inside(f, ...)
  local box = ffi.new("ds_graph *[1]")
  if ok and tensor.generator.offset ~= offset then
    ok, result = false, "the model draws random numbers, which would be the same in every step"
  end
  if not ok then
    tensor.generator.offset = offset
    C.ds_graph_end(nil, CUDA)
    return nil, tostring(result):gsub("\n.*", "")
  end
  if C.ds_graph_end(box, CUDA) < 0 then return nil, ffi.string(C.ds_error()) end
  return ffi.gc(box[0], C.ds_graph_free), result
end

-- ---- the state of the gradients

--- Which parameters' gradients are overwritten, and which are added to.
local function state_of(params)
  local flags = {}
  for i, p in ipairs(params) do flags[i] = p._fresh and "1" or "0" end
  return table.concat(flags)
end

local function set_state(params, state)
  for i, p in ipairs(params) do p._fresh, p._claim = state:byte(i) == 49, nil end
end

-- ---- batches

--- Whether a batch is like the one that was recorded.
function Graph:fits(n, args)
  local fixed = self.fixed
  if not fixed then return true end
  if fixed.n ~= n then return false end
  for i = 1, n do
    local a, b = args[i], fixed[i]
    if tensor.is_tensor(b) then
      if not tensor.is_tensor(a) or #a.shape ~= #b.shape or a.dtype ~= self.given[i] then
        return false
      end
      for d, size in ipairs(b.shape) do
        if a.shape[d] ~= size then return false end
      end
    elseif a ~= b then
      return false
    end
  end
  return true
end

--- Copies a batch to its fixed place.
function Graph:place(n, args)
  if not self.fixed then
    self.fixed, self.given = { n = n }, {}
    for i = 1, n do
      local t = args[i]
      self.fixed[i] = t
      if tensor.is_tensor(t) then
        self.given[i] = t.dtype
        local dtype = tensor.floating[t.dtype] and self.engine.dtype or t.dtype
        self.fixed[i] = scope.keep(tensor.new(t.shape, dtype, "cuda"))
        self.fixed[i]._keep = true
      end
    end
  end
  for i = 1, n do
    if tensor.is_tensor(args[i]) then run("copy", "cuda", self.fixed[i]._c, args[i]._c) end
  end
end

-- ---- forward

--- The model on the batch in its fixed place, as without graphs. @treturn Tensor the loss
function Graph:again()
  local grad = scope.grad
  scope.grad = true
  local ok, loss = pcall(self.run_forward, self.engine, unpack(self.fixed, 1, self.fixed.n))
  scope.grad = grad
  if not ok then error(loss, 0) end
  return loss
end

--- What forward gives: the loss of this micro-batch, as a result of all that was recorded. If a
-- script makes something else of it and goes backward from there, backward runs without graphs.
function Graph:copy_of(variant)
  local loss = scope.no_grad(function() return variant.loss:detach():clone() end)
  local op = { name = "cuda_graph", inputs = {}, outputs = { "y" }, saved = {}, args = {} }
  op.backward = function(_, dy)
    local base = self.open and self.open.base or self:again()
    self:give_up("backward began from something else than the loss that forward returned")
    autograd.run({ base }, { dy })
  end
  loss._rec = autograd.place(setmetatable({ op = op, mark = 0, y = loss }, autograd.Record))
  loss.requires_grad = true
  return loss
end

local function check_loss(loss, ...)
  if select("#", ...) > 0 or not tensor.is_tensor(loss) or loss:numel() ~= 1 or not loss._rec then
    border.raise("forward returns something else than the loss alone")
  end
  return loss
end

--- Records a forward for this state of the gradients.
function Graph:capture(state)
  local variant = { state = state }
  local graph, loss = self:record(function()
    return check_loss(self.run_forward(self.engine, unpack(self.fixed, 1, self.fixed.n)))
  end)
  if not graph then
    set_state(self.engine.params, state)
    return self:give_up(loss)
  end
  variant.forward, variant.loss = graph, loss:keep()
  return variant
end

--- The forward of a micro-batch. @treturn Tensor|nil the loss; nil: run the model as without graphs
function Graph:forward(...)
  local n, args, engine = select("#", ...), { ... }, self.engine
  self.open = nil
  if require("ds.checkpointing").to_host then return self:give_up(AWAY) end -- by configure()
  local steps = engine.global_steps - self.began
  if steps < WARM then return nil end
  if steps == WARM then return self:warm_forward(...) end
  if not self:fits(n, args) then
    if not self.told then
      log.info("cuda_graph: a batch differs from those before in shape, dtype or other arguments; "
        .. "such ones run without it")
    end
    self.told = true
    return nil
  end
  self:place(n, args)
  local state = state_of(engine.params)
  local variant, base = self.variants[state], nil
  if not variant then
    variant = self:capture(state)
    if not variant then return nil end
    base = variant.loss
  end
  check(C.ds_graph_run(variant.forward), "forward")
  self.open = { variant = variant, base = base, loss = self:copy_of(variant) }
  return self.open.loss
end

--- The step before the capture: everything as ever, but for where memory comes from.
function Graph:warm_forward(...)
  if not self.emptied then
    self.emptied = true
    tensor.empty_cache "cuda" -- what the steps before had goes to the set
  end
  local results = { self:inside(self.run_forward, self.engine, ...) }
  if not results[1] then error(results[2], 0) end
  if #results ~= 2 or not tensor.is_tensor(results[2]) then
    return self:give_up("forward returns something else than the loss alone")
  end
  self.open = { warm = true, loss = results[2] }
  return results[2]
end

-- ---- backward

--- The backward of a micro-batch.
-- @tparam Tensor loss
-- @tparam boolean plain backward has no options
-- @tparam function differentiate function(loss): backward as without graphs
function Graph:backward(loss, plain, differentiate)
  local open = self.open
  self.open = nil
  if not open or open.loss ~= loss then
    self.open = open -- for the record of the loss, which this one may depend on
    return differentiate(loss)
  end
  if open.warm then
    local ok, message = self:inside(differentiate, loss)
    if not ok then error(message, 0) end
    return
  end
  local engine, variant = self.engine, open.variant
  loss._rec, loss._done = false, true
  if not plain or state_of(engine.params) ~= variant.state then
    return differentiate(open.base or self:again())
  end
  if open.base and not self:capture_backward(variant, differentiate) then
    return differentiate(self:again())
  end
  check(C.ds_graph_run(variant.backward), "backward")
  for _, p in ipairs(variant.reached) do p._fresh = false end
end

--- Records the backward that follows a recorded forward. @treturn boolean whether that went well
function Graph:capture_backward(variant, differentiate)
  local params = self.engine.params
  local graph, why = self:record(differentiate, variant.loss)
  if not graph then
    set_state(params, variant.state)
    self:give_up(why)
    return false
  end
  variant.backward, variant.reached = graph, {}
  for _, p in ipairs(params) do
    if not p._fresh then table.insert(variant.reached, p) end
  end
  self.variants[variant.state] = variant
  return true
end

-- ---- the update

--- The settings that a recorded update has in it, as text.
local function settings_text(optimizer)
  local parts = {}
  for _, group in ipairs(optimizer.param_groups) do
    for key in pairs(group.rule.defaults) do
      local v = group[key]
      if key ~= "lr" then
        parts[#parts + 1] = type(v) == "table" and table.concat(v, ",") or tostring(v)
      end
    end
  end
  return table.concat(parts, " ")
end

--- Room for the rates of all groups, on the device and twice in page-locked memory.
local function rates_of(optimizer)
  local n = #optimizer.param_groups
  local there = tensor.new({ 3 * n }, "f64", "cuda"):keep()
  local r = { there = there, turn = 1, slots = {} }
  for g = 1, n do r[g] = tensor.view.slice_flat(there, 3 * (g - 1), { 3 }):keep() end
  for i = 1, 2 do
    local box = ffi.new("ds_event *[1]")
    check(C.ds_event_make(box, CUDA), "cuda_graph")
    local host = scope.keep(tensor.pinned({ 3 * n }, "f64"))
    r.slots[i] = { event = ffi.gc(box[0], C.ds_event_free), host = host,
      values = ffi.cast("double *", host._c.data) }
  end
  return r
end

--- Sends the coming update's rates.
local function send_rates(r, optimizer)
  local slot = r.slots[r.turn]
  r.turn = 3 - r.turn
  check(C.ds_event_wait(slot.event), "step") -- of two steps ago
  for g, group in ipairs(optimizer.param_groups) do
    local at = 3 * (g - 1)
    slot.values[at], slot.values[at + 1], slot.values[at + 2] = group.rule.rates(group)
  end
  check(C.ds_upload_later(slot.event, r.there._c, slot.host._c), "step")
  check(C.ds_event_follow(slot.event), "step")
end

--- The norm, the clip factor and the optimizer's kernels, for the update that it has counted.
-- @treturn boolean false: they are to be launched as without graphs
function Graph:update()
  local engine = self.engine
  local optimizer, late = engine.optimizer, engine.late
  if engine.global_steps - self.began <= WARM or optimizer.steps < 3 or engine.losses == 0 then
    return false
  end
  local settings = settings_text(optimizer)
  local steady = settings == self.settings
  self.settings = settings
  if not steady then
    if self.step then C.ds_graph_free(ffi.gc(self.step, nil)) end
    self.step = nil
    return false
  end
  self.rates = self.rates or rates_of(optimizer)
  if not self.step then
    local graph, why = self:record(function()
      late:measure()
      optimizer:apply(1, late.factor, self.rates)
    end)
    if not graph then
      self:give_up(why)
      return false
    end
    self.step = graph
  end
  send_rates(self.rates, optimizer)
  check(C.ds_graph_run(self.step), "step")
  return true
end

-- ---- the end

--- Gives the graphs and their memory back.
function Graph:drop()
  for _, v in pairs(self.variants) do
    for _, name in ipairs { "forward", "backward" } do
      C.ds_graph_free(ffi.gc(v[name], nil))
    end
    scope.release(v.loss, "with its CUDA graph")
  end
  if self.step then C.ds_graph_free(ffi.gc(self.step, nil)) end
  self.variants, self.open, self.step = {}, nil, nil
  if self.set then
    C.ds_memory_flush_set(CUDA, self.set)
    taken[self.set] = nil
  end
  self.set = 0
end

--- After a checkpoint was loaded: what was recorded goes, with the algorithms in it, and the first
-- steps are made as in the beginning.
function Graph:begin_again()
  self:drop()
  self.set = take_set()
  self.began, self.emptied, self.settings = self.engine.global_steps, nil, nil
end

--- From now on everything runs as without graphs. The batch is kept, for what may be made again.
function Graph:give_up(why)
  log.info("cuda_graph: %s; training goes on without it", why)
  self:drop()
  self.engine.graph = nil
end

--- For an engine on a GPU.
-- @tparam Engine engine
-- @tparam function run_forward function(engine, …): forward as without graphs
-- @treturn table|nil nil, with a line that says why, where there can be no graphs
function M.new(engine, run_forward)
  local why = comm.world_size() > 1 and "several ranks meet in a step"
    or engine:dynamic_loss_scale() and "the loss scale changes while it trains"
    or engine.zero.sharded and "parameters are sharded"
    or engine.config.activation_checkpointing.cpu_checkpointing and AWAY
  local set = not why and take_set()
  if not why and not set then why = "so many engines have one already" end
  if why then
    log.info("cuda_graph: %s; training goes on without it", why)
    return nil
  end
  return setmetatable({ engine = engine, run_forward = run_forward, began = engine.global_steps,
    variants = {}, set = set, open = nil }, Graph)
end

return M
