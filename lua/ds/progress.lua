--- A progress line: live on a terminal, plain lines elsewhere.
--
--     local progress = ds.progress(engine, opt.steps)
--     … engine:step() …
--     progress:update()            -- after every optimizer step
--     progress:finish()

local border = require "ds.ffi"
local tensor = require "ds.tensor"
local comm = require "ds.comm"

local C = border.C
local Progress = {}
Progress.__index = Progress

local function duration(seconds)
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return ("%ds"):format(seconds) end
  if seconds < 3600 then return ("%dm%02ds"):format(math.floor(seconds / 60), seconds % 60) end
  return ("%dh%02dm"):format(math.floor(seconds / 3600), math.floor(seconds / 60) % 60)
end

local function rate_string(x)
  if x >= 1e6 then return ("%.2fM"):format(x / 1e6) end
  if x >= 1e3 then return ("%.1fk"):format(x / 1e3) end
  return ("%.0f"):format(x)
end

--- Starts a progress line for an engine.
-- @tparam Engine engine
-- @tparam number total optimizer steps in all
-- @tparam[opt] table options { every = 100 plain lines come every so many steps, per_sample = 1
--   units in a sample, as tokens, unit = "samples" }
local function new(engine, total, options)
  options = options or {}
  local terminal = C.ds_terminal() == 1 and comm.rank() == 0
  return setmetatable({
    engine = engine, total = total, every = options.every or math.max(1, math.floor(total / 20)),
    per_sample = options.per_sample or 1,
    unit = options.unit or (options.per_sample and "tok" or "samples"),
    terminal = terminal, start = C.ds_seconds(), first_step = engine.global_steps, shown = 0,
    width = 0, last_time = C.ds_seconds(), last_step = engine.global_steps,
  }, Progress)
end

function Progress:line()
  local e = self.engine
  local now = C.ds_seconds()
  local done, left = e.global_steps, self.total - e.global_steps
  local span = math.max(1e-9, now - self.last_time)
  local steps = done - self.last_step
  local rate = steps > 0 and steps / span or 0
  local overall = (done - self.first_step) / math.max(1e-9, now - self.start)
  return ("step %d/%d | loss %s | lr %.2e | norm %s | %s %s/s | %s | ETA %s"):format(
    done, self.total,
    e:get_loss() and ("%.4f"):format(e:get_loss()) or "-", self.lr or e:get_lr()[1],
    e:get_global_grad_norm() and ("%.3f"):format(e:get_global_grad_norm()) or "-",
    rate_string(rate * e:train_batch_size() * self.per_sample), self.unit,
    tensor.bytes_string(e.device == "cuda" and tensor.memory("cuda").live
      or tonumber(C.ds_memory_rss())),
    overall > 0 and duration(left / overall) or "-")
end

--- Shows where training is; call it after every optimizer step.
function Progress:update()
  if comm.rank() ~= 0 then return end
  local step, now = self.engine.global_steps, C.ds_seconds()
  if self.terminal then
    if now - self.shown < 0.2 and step < self.total then return end
    local text = self:line()
    io.stderr:write("\r", text, (" "):rep(math.max(0, self.width - #text)))
    io.stderr:flush()
    self.width, self.shown = #text, now
    self.open = true
    if now - self.last_time > 2 then self.last_time, self.last_step = now, step end
  elseif step % self.every == 0 or step == self.total or step == self.first_step + 1 then
    io.stderr:write(self:line(), "\n")
    self.last_time, self.last_step = now, step
  end
end

--- Ends the line and says how long it took.
-- @treturn number seconds
function Progress:finish()
  local seconds = C.ds_seconds() - self.start
  if comm.rank() == 0 then
    if self.open then io.stderr:write("\n") end
    io.stderr:write(("%d steps in %s\n"):format(self.engine.global_steps - self.first_step,
      duration(seconds)))
  end
  return seconds
end

return new
