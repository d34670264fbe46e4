--- What the state of training takes on a rank of any number of them, at any ZeRO stage, and what
-- goes over the wire in a step: from the lists of parameters alone.
--
-- Buckets are cut as zero.lua cuts them, by the same C function. Parts are not: of a bucket of n
-- elements the largest part has n / ranks, rounded up to the 16 elements that a part is a multiple
-- of, so that thousands of ranks take no longer than two.

local ffi = require "ffi"
local border = require "ds.ffi"
local tensor = require "ds.tensor"
local zero = require "ds.zero"

local C, check = border.C, border.check
local ceil, min, max = math.ceil, math.min, math.max

local M = {}

local ALIGN = 16        -- elements: DS_ZERO_ALIGN of runner/zero.h
local CONTROL = 64 + 13 * 8 -- bytes to each other rank: where all meet, and the control word
local OFFLOAD_BLOCK = 2 ^ 20 -- elements of an offloaded vector that are in memory at a time
local UPDATE_BLOCK = 2 ^ 22 -- elements of weights in host memory that an update has on the device
local PREFETCH = 5e7 -- elements that stage 3 gathers ahead on a GPU

local function bytes_of(dtype) return tonumber(C.ds_dtype_size(tensor.codes[dtype])) end

-- ---- an engine's parameters

--- The buckets, each { group, numel, small }, from the parameters in the order that zero.lua gave
-- them.
local function buckets_of(groups, most)
  local count = 0
  for _, group in ipairs(groups) do count = count + #group.params end
  local numel, group_of = ffi.new("int64_t[?]", count), ffi.new("int32_t[?]", count)
  local small, whole = ffi.new("int32_t[?]", count), ffi.new("int32_t[?]", #groups)
  local i = 0
  for g, group in ipairs(groups) do
    whole[g - 1] = group.rule.granularity ~= "flat" and 1 or 0
    for _, p in ipairs(group.params) do
      numel[i], group_of[i] = p:numel(), g - 1
      small[i] = p._flat.bucket.small and 1 or 0
      i = i + 1
    end
  end
  local box, list = ffi.new("ds_zero *[1]"), ffi.new("const ds_zero_bucket *[1]")
  check(C.ds_zero_make(box, count, numel, group_of, small, whole, #groups, 1, most, 0), "plan")
  local out = {}
  for k = 0, C.ds_zero_buckets(list, box[0]) - 1 do
    local b = list[0][k]
    out[k + 1] = { group = b.group + 1, numel = tonumber(b.numel), small = small[b.first] == 1 }
  end
  C.ds_zero_free(box[0])
  return out
end

--- What of an engine a plan needs.
-- @tparam Engine engine of one rank, at stage 0; its config's `asked` is what plan.lua kept aside
-- @tparam number ranks that the plan is for
-- @treturn table
function M.of(engine, ranks)
  local config, groups = engine.config, engine.optimizer.param_groups
  local z = config.zero_optimization
  local asked = config.asked
  local most = z.contiguous_gradients == false and 1
    or min(z.reduce_bucket_size, asked.gpu and zero.CUDA_BUCKET or zero.BUCKET)
  local total, tensors = 0, 0
  local layout = { groups = {}, ranks = ranks, gas = engine.gas, dtype = engine.dtype,
    weight = bytes_of(engine.dtype), grad = bytes_of(engine.zero.grad_dtype),
    wire = engine.zero.wire >= 0 and tonumber(C.ds_dtype_size(engine.zero.wire))
      or bytes_of(engine.zero.grad_dtype),
    scatter = z.reduce_scatter ~= false, most_gathered = z.allgather_bucket_size,
    round_robin = z.round_robin_gradients, buffer_count = asked.buffer_count,
    gpu = asked.gpu, in_host = asked.in_host, away = asked.weights_away,
    prefetch = z.stage3_prefetch_bucket_size, most_live = z.stage3_max_live_parameters }
  for g, group in ipairs(groups) do
    local sizes, largest = {}, 0
    for i, p in ipairs(group.params) do
      sizes[i] = ceil(p:numel() / ALIGN) * ALIGN
      total, tensors, largest = total + p:numel(), tensors + 1, max(largest, sizes[i])
    end
    layout.groups[g] = { sizes = sizes, largest = largest,
      whole = group.rule.granularity ~= "flat",
      vectors = #group.rule.state + (engine.dtype == "f32" and 0 or 1) }
  end
  layout.numel, layout.tensors = total, tensors
  layout.optimizer = engine.optimizer.name
  layout.buckets = buckets_of(groups, ranks == 1 and not layout.away and max(1, total) or most)
  return layout
end

-- ---- parts

--- Whether the tensors fit into so many ranks, in order, with at most `most` elements each.
local function fits(sizes, ranks, most)
  local used, n = 0, 1
  for _, size in ipairs(sizes) do
    if size > most then return false end
    if used + size > most then
      n, used = n + 1, 0
      if n > ranks then return false end
    end
    used = used + size
  end
  return true
end

--- The largest share of whole tensors, as zero.c balances them.
local function largest_share(sizes, ranks)
  local high = 0
  for _, size in ipairs(sizes) do high = high + size end
  local low = math.floor(high / ranks)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if fits(sizes, ranks, middle) then high = middle else low = middle + 1 end
  end
  return high
end

--- The largest share where each bucket is one rank's, in turn.
local function in_turn(layout, g)
  local shares, most = {}, 0
  for i, b in ipairs(layout.buckets) do
    if b.group == g then
      local rank = (i - 1) % layout.ranks
      shares[rank] = (shares[rank] or 0) + b.numel
      most = max(most, shares[rank])
    end
  end
  return most
end

--- Elements of a group that the rank with most of them updates, and those of them that stage 3
-- has whole anyway.
local function share_of(layout, g)
  local group, all, split = layout.groups[g], 0, 0
  for _, b in ipairs(layout.buckets) do
    if b.group == g then
      local part = ceil(b.numel / ALIGN / layout.ranks) * ALIGN
      all = all + part
      if not b.small then split = split + part end
    end
  end
  if not group.whole then return all, split end
  local share = layout.round_robin and in_turn(layout, g)
    or largest_share(group.sizes, layout.ranks)
  local sharded = 0
  for _, b in ipairs(layout.buckets) do
    if b.group == g and not b.small then sharded = sharded + b.numel end
  end
  return share, min(share, sharded)
end

--- The two largest of the buckets that `take` takes together, in elements, and the largest: that
-- of an output projection stays while others come and go.
local function two_largest(layout, take)
  local first, second = 0, 0
  for _, b in ipairs(layout.buckets) do
    if take(b) then
      if b.numel > first then
        first, second = b.numel, first
      elseif b.numel > second then
        second = b.numel
      end
    end
  end
  return first + second, first
end

-- ---- memory

local function any() return true end
local function is_sharded(b) return not b.small end

--- Elements of a layout: of all buckets, and of those that stage 3 shards.
local function totals(layout)
  local all, sharded = 0, 0
  for _, b in ipairs(layout.buckets) do
    all = all + b.numel
    if not b.small then sharded = sharded + b.numel end
  end
  return all, sharded
end

--- Bytes of the optimizer's vectors (the fp32 master among them) on the rank that has most, and
-- of those that stay in memory when they lie on a disk.
local function optimizer_bytes(layout, stage)
  local bytes, staged, masters = 0, 0, 0
  for g, group in ipairs(layout.groups) do
    local n = 0
    if stage == 0 then
      for _, size in ipairs(group.sizes) do n = n + size end
    else
      n = share_of(layout, g)
    end
    local block = group.whole and group.largest or OFFLOAD_BLOCK
    bytes = bytes + n * 4 * group.vectors
    masters = masters + (layout.dtype == "f32" and 0 or n * 4)
    staged = max(staged, min(n, block * layout.buffer_count) * 4 * group.vectors)
  end
  return bytes, staged, masters
end

--- Takes the weights that stage 3 shards off the device: what is left there is what is gathered, or
-- on its way (by the default: the two exchanges to come); or blocks of an update, if that is there.
local function take_away(layout, out, small, split, offload)
  local two = two_largest(layout, is_sharded)
  local ahead = min(layout.prefetch or max(PREFETCH, two), split.whole)
  out.weights, out.away = small * layout.weight, split.own * layout.weight
  local gathered = min(two + ahead, max(two, layout.most_live or math.huge), split.whole)
  local updated = offload and 0 or min(split.own, 2 * UPDATE_BLOCK)
  out.buffers = out.buffers + max(gathered, updated) * layout.weight
end

--- Bytes that a rank keeps and needs in between.
-- @tparam table layout of M.of
-- @tparam number stage 0 to 3
-- @tparam[opt] boolean offload the optimizer's vectors lie on a disk, or in a GPU's host
-- @treturn table weights, gradients, optimizer, buffers (what is whole for a moment, or on its way
--   from the disk), disk, host, away (weights that are in a GPU's host); and start: what
--   ds.initialize needs beside the weights as the script made them, before it can drop those. For
--   an engine on a GPU all but disk, host and away is there
function M.memory(layout, stage, offload)
  local away = stage == 3 and layout.away
  if layout.ranks == 1 then stage = 0 end
  local all, sharded = totals(layout)
  local out = { weights = all * layout.weight, gradients = all * layout.grad, buffers = 0,
    disk = 0, host = 0, away = 0 }
  local moving = 0
  if stage >= 1 then
    local share, split = 0, 0
    for g = 1, #layout.groups do
      local a, b = share_of(layout, g)
      share, split = share + a, split + b
    end
    if stage >= 2 then
      out.gradients = share * layout.grad
      out.buffers = two_largest(layout, any) * layout.grad
    end
    if stage == 3 then
      out.weights = (all - sharded + split) * layout.weight
      local two, one = two_largest(layout, is_sharded)
      out.buffers, moving = out.buffers + (away and 0 or two * layout.weight), one * layout.weight
      if away then
        take_away(layout, out, all - sharded, { whole = sharded, own = split }, offload)
      end
    end
  elseif away then
    take_away(layout, out, all - sharded, { whole = sharded, own = sharded }, offload)
    moving = select(2, two_largest(layout, is_sharded)) * layout.weight
  end
  local bytes, staged, masters = optimizer_bytes(layout, stage)
  out.optimizer = bytes
  if offload then
    out.optimizer = 0
    if not layout.gpu then out.buffers = out.buffers + staged end
    out[layout.in_host and "host" or "disk"] = bytes
  end
  out.start = out.weights + out.gradients + (offload and 0 or masters) + moving
  return out
end

-- ---- the wire

--- What a rank sends in a step, and in how many collectives. Stage 3 may gather less: parameters
-- that only forward reads, or that are still whole when backward begins.
-- @treturn table bytes, collectives
function M.wire(layout, stage)
  local ranks, gas = layout.ranks, layout.gas
  if ranks == 1 then return { bytes = 0, collectives = 0 } end
  local out = { bytes = CONTROL * (ranks - 1), collectives = 2 }
  local function add(elements, bytes, times)
    out.bytes = out.bytes + elements * bytes * times * (ranks - 1) / ranks
    out.collectives = out.collectives + times
  end
  for _, b in ipairs(layout.buckets) do
    local whole = stage == 3 and not b.small and 0 or 1
    add(b.numel, layout.wire * (stage > 0 and not layout.scatter and 2 or 1),
      stage >= 2 and gas or 1)
    if stage == 0 then
      add(b.numel, layout.grad, 1)
    elseif whole == 1 then
      local pieces = ceil(b.numel / max(ALIGN, layout.most_gathered))
      add(b.numel / pieces, layout.weight, pieces)
    else
      add(b.numel, layout.weight, 2 * gas)
    end
  end
  return out
end

return M
