--- `dsrun plan`: what a script would take on each rank of a job, before there is one.
--
-- The script runs as it is, in one process and on the meta device: shapes without values, an
-- allocator that counts. Before it does, begin() takes the place of what would cost something or
-- want values: engines are of one rank and keep everything (what stages and ranks make of that is
-- arithmetic, plan_layout.lua), batches lose their values, checkpoints are neither read nor
-- written. `ds.world_size()` is what the plan is for, and batches are divided by it.
--
-- Two optimizer steps are made, of all engines there are. The first one is measured as the script
-- has it. In the second one each block that the model repeats is a ds.checkpoint; or, where the
-- script calls ds.checkpoint itself, that does nothing: so both are known, with and without. At the
-- second step's end the plan is shown and the script is over.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local autograd = require "ds.autograd"
local config = require "ds.config"
local checkpointing = require "ds.checkpointing"
local comm = require "ds.comm"
local nn = require "ds.nn"
local engine = require "ds.engine"
local loader = require "ds.loader"
local log = require "ds.log"
local flops = require "ds.flops"
local layout = require "ds.plan_layout"
local show = require "ds.plan_show"

local C, is_tensor = border.C, tensor.is_tensor
local Engine = engine.Engine

local M = {}

local META = 2          -- enum ds_device
local MOST_STEPS = 100  -- of one engine, while another has made none: that one makes none at all

local memory = C.ds_memory_of(META)
local job               -- what the command line asks for: ranks, machines, json, memory, …
local engines = {}      -- { engine, layout, … }, in the order of ds.initialize
local blocks = {}       -- that models repeat: { module, name, works }
local names = {}        -- of modules, by module
local checkpoints = 0   -- calls of ds.checkpoint in the first step
local without = false   -- ds.checkpoint does nothing
local recompute = false -- blocks are made again in backward
local runs = {}         -- what was measured: the steps that are over
local now               -- the one that is measured

-- ---- measuring

local function collect()
  collectgarbage()
  collectgarbage()
end

--- Begins a step: from here on, what is live beyond what is live now are activations.
local function open_step()
  collect()
  now = { base = tonumber(memory.live), peak = tonumber(memory.live), done = {}, fresh = true,
    tags = ffi.new("int64_t[512]"), flops = { forward = 0, backward = 0 } }
  C.ds_memory_by_tag(META, now.tags, 512)
  C.ds_memory_reset_peak(META)
end

local function place_of(module) return module and names[module] or nil end

--- Notes which operation is at work where there was never so much live.
local function note_peak(t)
  local r = autograd.running()
  local backward = r and not scope.grad
  local y = backward and r[r.op.outputs[1]]
  now.peak = tonumber(memory.peak)
  now.site = {
    op = backward and r.op.name or tensor.tags[C.ds_memory_of(0).tag], phase = now.phase,
    line = y and y._line or t._line, module = y and y._module or t._module,
  }
  now.at_peak = now.at_peak or ffi.new("int64_t[512]")
  C.ds_memory_by_tag(META, now.at_peak, 512)
end

--- In the place of scope.adopt, which every new tensor passes.
local function watch_tensors()
  local adopt = scope.adopt
  function scope.adopt(t, numel)
    adopt(t, numel)
    if scope.grad or not autograd.running() then
      local line = border.user_frame()
      t._line = line and line:sub(1, -3)
      t._module = place_of(nn.running())
    end
    if now and memory.peak > now.peak then note_peak(t) end
  end
end

--- The meta device's kernels count what they would compute.
local function count_flops()
  local counters = {}
  setmetatable(tensor.kernels "meta", { __index = function(_, name)
    counters[name] = counters[name] or function(...)
      if now then
        local phase = autograd.running() and "backward" or "forward"
        now.flops[phase] = now.flops[phase] + flops.of(name, ...)
      end
      return 0
    end
    return counters[name]
  end })
end

--- What is live at the peak and was not before the step, by operation, the most first.
local function by_operation(run)
  local list = {}
  for tag = 0, run.at_peak and 511 or -1 do
    local bytes = tonumber(run.at_peak[tag] - runs[1].tags[tag])
    if bytes > 0 then
      list[#list + 1] = { op = tensor.tags[tag] or "gradients and others", bytes = bytes }
    end
  end
  table.sort(list, function(a, b)
    if a.bytes ~= b.bytes then return a.bytes > b.bytes end
    return a.op < b.op
  end)
  return list
end

-- ---- the plan

--- A step's figures, as the report has them: beyond what was live before the first one.
local function measured(run)
  return run and { bytes = run.peak - runs[1].base, site = run.site, by_op = by_operation(run),
    forward = run.flops.forward, backward = run.flops.backward }
end

--- Shows the plan, and ends the script.
local function conclude()
  local plain, again = measured(runs[1]), measured(runs[2])
  if checkpoints > 0 and again then plain, again = again, plain end
  local fits = {}
  for _, b in ipairs(blocks) do
    if b.works then fits[#fits + 1] = b.name end
  end
  show.show(job, {
    engines = engines, base = runs[1].base, plain = plain, checkpointed = again,
    by_script = checkpoints > 0, blocks = fits,
    to_host = engines[1].config.activation_checkpointing.cpu_checkpointing,
  })
end

local over = false

--- The end of the script, wherever that is.
-- @tparam[opt] string why there is no plan, if there is none
local function finish(why)
  if over then return end
  over = true
  if #runs > 0 then
    local ok, message = xpcall(conclude, border.note)
    if not ok then error(message, 0) end
    return os.exit(0)
  end
  io.stderr:write(("dsrun: plan: %s; a plan is made of what an optimizer step takes\n"):format(why))
  os.exit(1)
end

local function step_is_over()
  runs[#runs + 1], now = now, nil
  if #runs == 2 then return finish() end
  without = checkpoints > 0
  for _, b in ipairs(blocks) do recompute = recompute or b.works end
  recompute = recompute and not without
  if not (without or recompute) then return finish() end
end

--- An engine has made a step: the step is over when all of them have, or one never does.
local function stepped(self)
  now.done[self] = (now.done[self] or 0) + 1
  local all = true
  for _, e in ipairs(engines) do all = all and now.done[e.engine] ~= nil end
  if all or now.done[self] >= MOST_STEPS then step_is_over() end
end

-- ---- batches

--- A value without its values: tensors, and those in plain tables.
local function on_meta(value)
  if type(value) ~= "table" then return value end
  if is_tensor(value) then return value.device == "meta" and value or value:to "meta" end
  if getmetatable(value) ~= nil then return value end
  local out = {}
  for k, v in pairs(value) do out[k] = on_meta(v) end
  return out
end

local function all_on_meta(n, first, ...)
  if n == 0 then return end
  return on_meta(first), all_on_meta(n - 1, ...)
end

local function strip(...) return all_on_meta(select("#", ...), ...) end

local function strip_loaders()
  local Loader = loader.Loader
  local next_batch = Loader.next
  function Loader:next() return strip(next_batch(self)) end
  for _, name in ipairs { "forever", "epoch", "batches" } do
    local method = Loader[name]
    Loader[name] = function(self)
      local iterator = method(self)
      return function() return strip(iterator()) end
    end
  end
end

-- ---- values that scripts ask for

--- 1 can be divided by, and has a logarithm; false: nothing is the matter.
local function stand_in(t) return t.dtype ~= "bool" and 1 end

local function filled(t, dim)
  if dim > #t.shape then return stand_in(t) end
  local out = {}
  for i = 1, t.shape[dim] do out[i] = filled(t, dim + 1) end
  return out
end

local function give_values()
  local item, tolist = tensor.methods.item, tensor.methods.tolist
  function tensor.methods.item(t)
    if is_tensor(t) and t.device == "meta" and t:numel() == 1 then return stand_in(t) end
    return item(t)
  end
  function tensor.methods.tolist(t)
    if is_tensor(t) and t.device == "meta" then return filled(t, 1) end
    return tolist(t)
  end
end

--- Collectives of the script's own: shapes as on so many ranks.
local function pretend_ranks()
  local ds = require "ds"
  ds.world_size = function() return job.ranks end
  ds.local_size = function() return math.ceil(job.ranks / job.machines) end
  local function same(t) return t end
  for _, name in ipairs { "all_reduce", "broadcast", "recv", "all_to_all" } do comm[name] = same end
  for _, name in ipairs { "barrier", "send" } do comm[name] = function() end end
  function comm.all_gather(t)
    return tensor.new({ job.ranks, unpack(t.shape) }, t.dtype, t.device)
  end
  function comm.reduce_scatter(t)
    local shape = { unpack(t.shape) }
    shape[1] = math.ceil(shape[1] / job.ranks)
    return tensor.new(shape, t.dtype, t.device)
  end
end

-- ---- blocks

--- Finds the modules that stand in a list with others of their class and have modules inside: the
-- outermost ones.
local function find_blocks(model)
  local lists, inner = {}, {}
  for _, e in ipairs(model:named_modules()) do
    names[e.module] = e.name
    local parent = e.name:match "^(.*)%.[^.]*$"
    if parent then inner[parent] = true end
  end
  for _, e in ipairs(model:named_modules()) do
    local list = e.name:match "^(.-)%.?%d+$"
    if list then
      local key = list .. " " .. tostring(getmetatable(e.module))
      lists[key] = lists[key] or {}
      table.insert(lists[key], e)
    end
  end
  local found = {}
  for _, e in ipairs(model:named_modules()) do
    local list = e.name:match "^(.-)%.?%d+$"
    local outermost = true
    for name in pairs(found) do
      outermost = outermost and e.name:sub(1, #name + 1) ~= name .. "."
    end
    if list and outermost and inner[e.name]
      and #lists[list .. " " .. tostring(getmetatable(e.module))] > 1 then
      found[e.name] = true
      blocks[#blocks + 1] = { module = e.module, name = e.name }
    end
  end
end

--- Whether a block can be a ds.checkpoint: it returns tensors and nothing else.
local function note_results(block, ...)
  local n = select("#", ...)
  if block.works == nil then block.works = n > 0 end
  for i = 1, n do block.works = block.works and is_tensor((select(i, ...))) end
  return ...
end

local function wrap_blocks(checkpoint)
  for _, block in ipairs(blocks) do
    local module, forward = block.module, block.module.forward
    if not block.wrapped then
      block.wrapped = true
      function module.forward(self, ...)
        if recompute and block.works then
          return checkpoint(function(...) return forward(self, ...) end, nil, ...)
        end
        return note_results(block, forward(self, ...))
      end
    end
  end
end

-- ---- engines

--- Engines are of one rank, at stage 0, on the meta device; what the config asks for is kept aside.
local function read_configs()
  local load = config.load
  function config.load(source, options)
    local settings = load(source, { world_size = job.ranks,
      optimizers = options and options.optimizers })
    local z, keeps = settings.zero_optimization, settings.activation_checkpointing
    local offload = type(z.offload_optimizer) == "table" and z.offload_optimizer or {}
    local param = type(z.offload_param) == "table" and z.offload_param or {}
    local gpu = (settings.device or job.device) == "cuda"
    local in_host = gpu and offload.device == "cpu"
    settings.asked = { stage = z.stage, offload = offload.device == "nvme" or in_host, gpu = gpu,
      in_host = in_host, buffer_count = offload.buffer_count or 4,
      weights_away = gpu and (param.device == "cpu" or z.cpu_offload_param) }
    keeps.cpu_checkpointing = gpu and keeps.cpu_checkpointing
    if gpu then require("ds.checkpointing_host").devices.meta = true end
    settings.device, z.stage, z.offload_optimizer, z.offload_param = "meta", 0, nil, nil
    z.cpu_offload_param = false
    return settings
  end
end

local function watch_engines(checkpoint)
  local initialize = engine.initialize
  function engine.initialize(options)
    local model = type(options) == "table" and options.model
    if nn.is_module(model) then model:to "meta" end
    collect()
    local before = tonumber(memory.live)
    local out = { initialize(options) }
    local self = out[1]
    if self.optimizer then
      local kept = layout.of(self, job.ranks)
      local alone = layout.of(self, 1)
      engines[#engines + 1] = { engine = self, layout = kept, alone = layout.memory(alone, 0),
        before = before, config = self.config }
      if nn.is_module(model) then
        find_blocks(model)
        wrap_blocks(checkpoint)
      end
    end
    if #runs == 0 then open_step() end
    return unpack(out, 1, 4)
  end
end

local function watch_steps()
  local forward, step, run = Engine.forward, Engine.step, autograd.run
  function Engine:forward(...)
    if #engines > 0 and not over and (not now or now.fresh) then open_step() end
    if now then now.fresh, now.phase = false, "forward" end
    return forward(self, strip(...))
  end
  Engine.__call = Engine.forward
  function autograd.run(...)
    if #engines > 0 and not over and not now then open_step() end
    if now then now.fresh, now.phase = false, "backward" end
    run(...)
    if now then now.phase = "forward" end
  end
  function Engine:step()
    if now then now.phase = "step" end
    local boundary = step(self)
    if now then now.phase = "forward" end
    if boundary then
      self.last_loss = 1
      if now then stepped(self) end
    end
    return boundary
  end
  function Engine.load_checkpoint() return nil end
  function Engine.save_checkpoint() return true end
  function Engine.save_16bit_model() return true end
  function Engine.evaluate() return 1 end
end

--- Everything that is printed goes to standard error: standard output has the plan.
local function redirect()
  job.out = io.stdout
  rawset(io, "stdout", io.stderr)
  io.output(io.stderr)
  function _G.print(...)
    local words = {}
    for i = 1, select("#", ...) do words[i] = tostring((select(i, ...))) end
    io.stderr:write(table.concat(words, "\t"), "\n")
  end
  local exit = os.exit
  function os.exit(code, ...) -- luacheck: ignore
    if not over and (code == nil or code == 0 or code == true) then
      finish "the script ended itself before its first step"
    end
    over = true
    return exit(code, ...)
  end
end

--- Takes the place of what would cost something. Then the script may run.
-- @tparam string text lines of name=value: ranks, machines, and what the command line gave of
--   memory, flops, bandwidth, disk, json
function M.begin(text)
  job = show.read_job(text)
  job.device, tensor.default_device = tensor.default_device, "meta"
  log.info = function() end
  local checkpoint = checkpointing.run
  function checkpointing.run(f, module, ...)
    if #runs == 0 and scope.grad then checkpoints = checkpoints + 1 end
    if without then return f(...) end
    return checkpoint(f, module, ...)
  end
  redirect()
  watch_tensors()
  count_flops()
  strip_loaders()
  give_values()
  pretend_ranks()
  read_configs()
  watch_engines(checkpoint)
  watch_steps()
end

--- The script has come to its end.
function M.finish()
  finish(#engines == 0 and "the script ended without an engine that has an optimizer"
    or "the script ended before engine:step() at the end of an accumulation")
end

return M
