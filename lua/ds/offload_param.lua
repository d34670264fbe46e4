--- Weights in host memory, for an engine on a GPU (ZeRO-Infinity, Rajbhandari et al. 2021): what
-- stage 3 keeps of them on each rank lies there, and comes to the device as part of gathering them.
--
-- Transfers run beside the kernels, by way of page-locked memory. zero_params.lua says when weights
-- go up. Where the optimizer's state is on the device, an update goes by blocks: the device makes
-- the new weights of one while those of the one before go down (fp32 weights, which have no master,
-- come up first). Where it is in host memory, too (offload_host.lua), the CPU writes them in their
-- place.
--
-- On the device everything is in order: kernels follow what came up, what goes down follows
-- kernels, and what comes up next follows both. It is the CPU that must settle() before it touches
-- weights.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local log = require "ds.log"

local C, check, raise, run = border.C, border.check, border.raise, tensor.run
local slice_flat = tensor.view.slice_flat

local M = {}

local Home = {}
Home.__index = Home

M.BLOCK = 2 ^ 22 -- elements of a flat segment that are on the device at a time, twice

--- What a config asks for.
-- @tparam table config the engine's
-- @tparam string device the engine's
-- @treturn Home|nil nil: weights are where kernels run
function M.new(config, device)
  local zero = config.zero_optimization
  local wanted, key = zero.offload_param, "offload_param.device \"cpu\""
  if zero.cpu_offload_param and (not wanted or wanted.device == "none") then
    wanted, key = { device = "cpu", pin_memory = true }, "cpu_offload_param"
  end
  if not wanted or wanted.device == "none" then return nil end
  if device ~= "cuda" then
    log.info("%s: that is where the weights are anyway", key)
    return nil
  end
  if zero.stage ~= 3 then
    raise("initialize: zero_optimization.%s: only stage 3 keeps weights elsewhere than where "
      .. "kernels use them; say \"stage\": 3", key)
  end
  return setmetatable({ device = device, pinned = wanted.pin_memory ~= false, bytes = 0,
    events = {}, free = {}, busy = false }, Home)
end

--- A vector of page-locked memory. Raises with a way out where the system locks no more.
local function locked(n, dtype)
  local ok, t = pcall(tensor.pinned, { n }, dtype)
  if ok then return t end
  raise("offload_param: there are no %s of page-locked memory (%s); \"pin_memory\": false takes "
    .. "other memory", tensor.bytes_string(n * tonumber(C.ds_dtype_size(tensor.codes[dtype]))), t)
end

--- A vector of host memory, zero at first.
function Home:vector(n, dtype)
  local t = self.pinned and locked(n, dtype) or tensor.new({ n }, dtype, "cpu")
  run("fill", "cpu", t:keep()._c, 0)
  self.bytes = self.bytes + n * t:element_size()
  return t
end

-- ---- transfers

--- An event whose last transfer is over.
local function take_event(self)
  local e = self.free[1]
  if e and check(C.ds_event_done(e), "offload_param") == 1 then
    return table.remove(self.free, 1)
  end
  local box = ffi.new("ds_event *[1]")
  check(C.ds_event_make(box, C.DS_CUDA), "offload_param")
  e = ffi.gc(box[0], C.ds_event_free)
  self.events[#self.events + 1] = e
  return e
end

--- Begins to bring `from`, in host memory, to the device. @treturn cdata|nil what arrive() wants
function Home:upload(to, from)
  if not self.pinned then
    run("copy", self.device, to._c, from._c) -- among the kernels; `from` is free when it returns
    return nil
  end
  local e = take_event(self)
  self.busy = true
  check(C.ds_upload_later(e, to._c, from._c), "offload_param")
  return e
end

--- Begins to send `from`, on the device, to host memory when the kernels so far are done.
function Home:download(to, from)
  if not self.pinned then return run("copy", self.device, to._c, from._c) and nil end
  local e = take_event(self)
  self.busy = true
  check(C.ds_download_beside(e, to._c, from._c), "offload_param")
  return e
end

--- Kernels that are called from now on follow a transfer, and what it had of the device's memory is
-- good for others.
function Home:arrive(e)
  if not e then return end
  check(C.ds_event_hand_over(e), "offload_param")
  table.insert(self.free, e)
end

--- Waits until nothing is under way: then the CPU may read and write what is in host memory.
function Home:settle()
  if not self.busy then return end
  for _, e in ipairs(self.events) do check(C.ds_event_wait(e), "offload_param") end
  self.busy = false
end

-- ---- the update

local Update = {}
Update.__index = Update

--- What the optimizer goes through its segments by, of which some have weights in host memory.
-- @tparam table zero segments, sharded
-- @tparam[opt] table store where the optimizer's vectors lie, if that is not the device
-- @treturn table with stream(update), as a store has it
function Home:updates(zero, store)
  local update = setmetatable({ home = self, zero = zero, store = store, blocks = {} }, Update)
  for _, s in ipairs(zero.segments) do
    local n = s.to - s.from
    local away = (s.low or s.p).device ~= self.device
    local flat = away and not zero.whole[s.group]
    local most = flat and M.BLOCK or math.max(1, n)
    for from = 0, n - 1, most do
      table.insert(update.blocks, { segment = s, from = from, n = math.min(most, n - from),
        away = away, shape = flat and { math.min(most, n - from) } or s.shape })
    end
  end
  return update
end

--- Begins to bring the weights of a block where they are fp32, and so what the update reads.
-- @treturn table|nil { t, event }
local function bring(self, b)
  if not b or not b.away or b.segment.low then return nil end
  local t = scope.keep(tensor.new({ b.n }, "f32", self.home.device))
  return { t, self.home:upload(t, slice_flat(b.segment.p, b.from, { b.n })) }
end

--- Updates a block on the device. Weights in low precision are made of their master once more,
-- whether that has changed or not: a factor that is not finite changes nothing.
-- @treturn table|nil what goes to host memory: { t, event }
local function update_block(self, b, came, update)
  local s, home = b.segment, self.home
  if not b.away then return update(s) end
  local part = setmetatable({ low = false, state = {} }, { __index = s })
  part.g = slice_flat(s.g, b.from, b.shape)
  for name, t in pairs(s.state) do part.state[name] = slice_flat(t, b.from, b.shape) end
  if came then home:arrive(came[2]) end
  part.p = slice_flat(came and came[1] or s.p, came and 0 or b.from, b.shape)
  update(part)
  local new = came and came[1]
  if not new then
    new = scope.keep(tensor.new({ b.n }, s.low.dtype, home.device))
    run("copy", home.device, new._c, slice_flat(part.p, 0, { b.n })._c)
  end
  return { new, home:download(slice_flat(s.low or s.p, b.from, { b.n }), new) }
end

--- Kernels follow what goes to host memory, and may have its place.
local function let_go(self, going)
  if not going then return end
  self.home:arrive(going[2])
  scope.release(going[1])
end

--- Runs update(segment) for all segments, in parts whose vectors are where the update is made.
function Update:stream(update)
  self.zero.sharded:close_all() -- what is gathered will be stale: its memory is for the blocks
  if self.store then
    self.home:settle()
    return self.store:stream(update)
  end
  local coming, going = bring(self, self.blocks[1]), nil
  for i, b in ipairs(self.blocks) do
    local came, gone = coming, going
    coming = bring(self, self.blocks[i + 1])
    going = scope.no_grad(update_block, self, b, came, update)
    let_go(self, gone)
  end
  let_go(self, going)
end

return M
