--- What `dsrun plan` reads from its command line and prints: a plan as a table (JSON) and as text.

local json = require "ds.json"
local nn = require "ds.nn"
local tensor = require "ds.tensor"
local layout = require "ds.plan_layout"

local bytes_string = tensor.bytes_string

local M = {}

-- ---- the command line

local powers = { [""] = 0, k = 1, K = 1, M = 2, G = 3, T = 4, P = 5 }

-- What may follow a number and its prefix, in bytes or operations; before "/s" where it is a rate.
local units = {
  memory = { [""] = 1, B = 1 },
  flops = { [""] = 1, FLOP = 1, flop = 1, FLOPS = 1, flops = 1 },
  bandwidth = { [""] = 1, B = 1, b = 1 / 8, bit = 1 / 8 },
}
units.disk = units.bandwidth

local example = { memory = "16GiB", flops = "200G", bandwidth = "10GB/s", disk = "2GB/s" }

--- "16GiB" → 17179869184; "10Gbit/s" → 1.25e9. Memory's prefixes are powers of 1024 without a
-- unit, as "16G".
local function read_size(name, text)
  local number, prefix, binary, unit = text:match "^%s*([%d.]+)%s*([kKMGTP]?)(i?)(.-)%s*$"
  local scale = unit and units[name][name == "memory" and unit or unit:gsub("/s$", "")]
  number = tonumber(number)
  if not number or number <= 0 or not scale or binary == "i" and prefix == "" then
    io.stderr:write(("dsrun: --%s wants a size as %s, not '%s'\n"):format(name, example[name],
      text))
    os.exit(2)
  end
  local base = (binary == "i" or name == "memory" and unit == "") and 1024 or 1000
  return number * base ^ powers[prefix] * scale
end

local function first_number(path, pattern)
  local file = io.open(path)
  local text = file and file:read "*a" or ""
  if file then file:close() end
  return tonumber(text:match(pattern))
end

--- Bytes that this machine, or the group that this process is confined to, has.
local function machine_memory()
  local total = first_number("/proc/meminfo", "MemTotal:%s*(%d+)")
  local limit = first_number("/sys/fs/cgroup/memory.max", "^(%d+)")
  return math.min(total and total * 1024 or math.huge, limit or math.huge)
end

--- What the command line asks for.
-- @tparam string text lines of name=value
-- @treturn table ranks, machines, json, memory (bytes a rank); flops, bandwidth, disk (a second and
--   rank; nil if not given); machine: this machine's bytes, where memory is a share of them
function M.read_job(text)
  local job = {}
  for name, value in text:gmatch "([^\n=]+)=([^\n]*)" do
    job[name] = units[name] and read_size(name, value) or tonumber(value)
  end
  if not job.memory then
    job.machine = machine_memory()
    job.memory = job.machine / math.ceil(job.ranks / job.machines)
  end
  return job
end

-- ---- the plan as a table

--- What all engines take at a stage, added up.
local function sum_of_engines(plan, stage, offload)
  local sum = { stage = stage, offload = offload, weights = 0, gradients = 0, optimizer = 0,
    buffers = 0, disk = 0, host = 0, away = 0, sent = 0, collectives = 0, start = 0 }
  local alone, until_now = 0, 0
  for _, e in ipairs(plan.engines) do
    local m, wire = layout.memory(e.layout, stage, offload), layout.wire(e.layout, stage)
    sum.start = math.max(sum.start, e.before - alone + until_now + m.start)
    for _, key in ipairs { "weights", "gradients", "optimizer", "buffers", "disk", "host",
      "away" } do
      sum[key] = sum[key] + m[key]
    end
    until_now = until_now + m.weights + m.gradients + m.optimizer
    alone = alone + e.alone.weights + e.alone.gradients + e.alone.optimizer
    sum.sent, sum.collectives = sum.sent + wire.bytes, sum.collectives + wire.collectives
  end
  return sum, plan.base - alone
end

--- Seconds of a step, as far as rates are given.
local function times(job, row, run)
  local t = {
    computing = job.flops and (run.forward + run.backward) / job.flops,
    communication = job.bandwidth and row.sent / job.bandwidth,
    disk = row.disk > 0 and job.disk and 2 * row.disk / job.disk or nil,
  }
  t.step = t.computing and (t.computing + (t.communication or 0) + (t.disk or 0))
  return next(t) and t or nil
end

local function row_of(job, plan, stage, offload)
  local row, other = sum_of_engines(plan, stage, offload)
  row.other = other
  local kept = row.weights + row.gradients + row.optimizer + row.buffers + other
  local asked = plan.engines[1].config.asked
  row.configured = asked.stage == stage and asked.offload == offload
  for name, run in pairs { plain = plan.plain, checkpointed = plan.checkpointed } do
    local total = math.max(kept + run.bytes, row.start)
    row[name] = { total = total, fits = total <= job.memory, seconds = times(job, row, run) }
  end
  return row
end

local function activations_of(run)
  if not run then return nil end
  local by_operation = json.array()
  for i, entry in ipairs(run.by_op) do
    by_operation[i] = { operation = entry.op, bytes = entry.bytes }
  end
  return { bytes = run.bytes, peak = run.site, by_operation = by_operation,
    forward_flops = run.forward, backward_flops = run.backward }
end

--- The plan as plain data, in bytes, seconds and operations, all of one rank.
-- @tparam table job of read_job
-- @tparam table plan what plan.lua measured: engines, base, plain, checkpointed (may be nil),
--   by_script, blocks
function M.table_of(job, plan)
  local stages, parameters, tensors, optimizers = json.array(), 0, 0, {}
  for _, e in ipairs(plan.engines) do
    parameters, tensors = parameters + e.layout.numel, tensors + e.layout.tensors
    optimizers[#optimizers + 1] = e.layout.optimizer
  end
  for stage = 0, 3 do
    for _, offload in ipairs { false, true } do
      stages[#stages + 1] = row_of(job, plan, stage, offload)
    end
  end
  local first = plan.engines[1]
  local config = first.config
  return {
    ranks = job.ranks, machines = job.machines, memory = job.memory,
    parameters = parameters, tensors = tensors, engines = #plan.engines,
    dtype = first.layout.dtype, optimizer = table.concat(optimizers, ", "),
    train_batch_size = config.train_batch_size,
    train_micro_batch_size_per_gpu = config.train_micro_batch_size_per_gpu,
    gradient_accumulation_steps = config.gradient_accumulation_steps,
    activations = activations_of(plan.plain),
    checkpointed = activations_of(plan.checkpointed),
    checkpointed_by_script = plan.by_script, checkpointed_to_host = plan.to_host,
    blocks = json.array(plan.blocks),
    stages = stages,
  }
end

-- ---- as text

local function count(n, what) return ("%d %s%s"):format(n, what, n == 1 and "" or "s") end

--- 1.23e12 → "1.23 T"
local function amount(x)
  local prefixes, i = { "", "k", "M", "G", "T", "P" }, 1
  while x >= 1000 and i < #prefixes do x, i = x / 1000, i + 1 end
  return ("%.3g %s"):format(x, prefixes[i])
end

local function time_string(seconds)
  if seconds < 1 then return ("%.3g ms"):format(seconds * 1e3) end
  if seconds < 120 then return ("%.3g s"):format(seconds) end
  return ("%.0f min"):format(seconds / 60)
end

local function site_string(site)
  if not site then return "nowhere" end
  local parts = { site.op or "an operation without a name" }
  if site.phase then parts[1] = parts[1] .. ", in " .. site.phase end
  if site.line then parts[#parts + 1] = site.line end
  return table.concat(parts, ", at ") .. (site.module and " (" .. site.module .. ")" or "")
end

local function operations_string(list)
  local parts = {}
  for i = 1, math.min(4, #list) do
    parts[i] = ("%s %s"):format(list[i].operation, bytes_string(list[i].bytes))
  end
  return table.concat(parts, ", ")
end

local function blocks_string(blocks)
  if #blocks == 1 then return blocks[1] end
  return ("%s … %s"):format(blocks[1], blocks[#blocks])
end

local function put(out, label, ...)
  out:write(("%-13s%s\n"):format(label, (...):format(select(2, ...))))
end

local function print_activations(out, p, a, label, what)
  put(out, label, "%s at the peak%s", bytes_string(a.bytes), what)
  put(out, "", "there: %s", site_string(a.peak))
  if #a.by_operation > 0 then put(out, "", "made by %s", operations_string(a.by_operation)) end
  if p.activations ~= a and p.activations then
    put(out, "", "for %sFLOP more a step", amount(a.forward_flops + a.backward_flops
      - p.activations.forward_flops - p.activations.backward_flops))
  end
end

local function print_head(out, job, p)
  put(out, "model", "%s parameters in %s, %s; %s", nn.count_string(p.parameters),
    count(p.tensors, "tensor"), p.dtype, p.optimizer)
  put(out, "job", "%s on %s; batch %d = micro %d × accumulation %d × ranks %d",
    count(p.ranks, "rank"), count(p.machines, "machine"), p.train_batch_size,
    p.train_micro_batch_size_per_gpu, p.gradient_accumulation_steps, p.ranks)
  local a = p.activations
  put(out, "step", "%sFLOP a rank: forward %s, backward %s",
    amount(a.forward_flops + a.backward_flops), amount(a.forward_flops), amount(a.backward_flops))
  put(out, "memory", "%s a rank%s", bytes_string(p.memory), job.machine
    and (": %s of this machine's %s"):format(p.memory == job.machine and "all" or "its share",
      bytes_string(job.machine)) or "")
  print_activations(out, p, a, "activations", not p.checkpointed_by_script and ""
    or p.checkpointed and ", if ds.checkpoint kept everything"
    or ", with the script's ds.checkpoint")
  if p.checkpointed then
    local what = p.checkpointed_by_script and ", as the script has it"
      or (", if each of the blocks %s were a ds.checkpoint"):format(blocks_string(p.blocks))
    print_activations(out, p, p.checkpointed, "checkpointed", what
      .. (p.checkpointed_to_host and ", its input in the host's memory" or ""))
  end
end

--- Rows of cells in columns: the first one to the left, the others to the right.
local function print_columns(out, rows)
  local widths = {}
  for _, cells in ipairs(rows) do
    for i, cell in ipairs(cells) do widths[i] = math.max(widths[i] or 0, #cell) end
  end
  for _, cells in ipairs(rows) do
    local line = {}
    for i, cell in ipairs(cells) do
      local pad = (" "):rep(widths[i] - #cell)
      line[i] = i == 1 and cell .. pad or pad .. cell
    end
    out:write(table.concat(line, "   "), "\n")
  end
end

local function name_of(row)
  return ("%sstage %d%s"):format(row.configured and "* " or "  ", row.stage,
    row.offload and (row.host > 0 and ", cpu" or ", nvme") or "")
end

local function total_string(t)
  return ("%s %s"):format(bytes_string(t.total), t.fits and "yes" or " no")
end

local function print_memory(out, p)
  local rows = { { "  of a rank", "weights", "gradients", "optimizer", "buffers", "total fits" } }
  if p.checkpointed then table.insert(rows[1], "checkpointed fits") end
  for _, row in ipairs(p.stages) do
    local cells = { name_of(row) }
    for i, key in ipairs { "weights", "gradients", "optimizer", "buffers" } do
      cells[i + 1] = row[key] > 0 and bytes_string(row[key]) or "-"
    end
    cells[6] = total_string(row.plain)
    cells[7] = row.checkpointed and total_string(row.checkpointed) or nil
    rows[#rows + 1] = cells
  end
  print_columns(out, rows)
end

--- At a stage, what goes over the wire, and the time of a step where rates were given.
local function print_wire(out, p)
  local head, keys = { "  a step", "collectives", "sent" }, {}
  for _, key in ipairs { "computing", "communication", "disk", "step" } do
    local last = p.stages[#p.stages].plain.seconds
    if last and last[key] then
      keys[#keys + 1], head[#head + 1] = key, key == "communication" and "wire" or key
    end
  end
  if p.checkpointed and #keys > 0 then head[#head + 1] = "checkpointed" end
  local rows = { head }
  for _, row in ipairs(p.stages) do
    local t = row.plain.seconds
    if not row.offload or t and t.disk then
      local cells = { name_of(row), ("%d"):format(row.collectives), bytes_string(row.sent) }
      for _, key in ipairs(keys) do cells[#cells + 1] = t[key] and time_string(t[key]) or "-" end
      local again = row.checkpointed and row.checkpointed.seconds
      if again and again.step then cells[#cells + 1] = time_string(again.step) end
      rows[#rows + 1] = cells
    end
  end
  print_columns(out, rows)
end

--- Prints a plan on job.out.
function M.show(job, plan)
  local p, out = M.table_of(job, plan), job.out
  if job.json then
    out:write(json.encode(p, { indent = 2 }), "\n")
    return
  end
  print_head(out, job, p)
  out:write "\n"
  print_memory(out, p)
  local other = p.stages[1].other
  out:write(("total: with activations%s; %s\n"):format(
    other >= 2 ^ 20 and (" and %s of other tensors"):format(bytes_string(other)) or "",
    "* is what the config asks for"))
  local away = p.stages[#p.stages].away
  if away > 0 then
    out:write(("stage 3: %s of weights are in host memory (offload_param)\n"):format(
      bytes_string(away)))
  end
  out:write "\n"
  print_wire(out, p)
end

return M
