--- The log of collectives: `comms_logger` in the config, ds.comm.configure, ds.comm.log_summary.
--
-- C measures (runner/comm_log.c), here it is summed up and printed, in DeepSpeed's columns. Message
-- size is what a rank gives. tput counts the bytes of all ranks' shares, those of an all_reduce
-- twice; busbw what a link must carry at the least: 2(n−1)/n of an all_reduce's bytes, (n−1)/n of
-- what is gathered or scattered. Averages leave out the slowest and the fastest tenth.

local ffi = require "ffi"
local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"
local spec = require "ds.spec"

local C, check, raise = border.C, border.check, border.raise

local M = {}

-- What DeepSpeed's users may call them.
local synonyms = {
  all_gather_into_tensor = "all_gather", allgather = "all_gather", allgather_fn = "all_gather",
  reduce_scatter_tensor = "reduce_scatter", reduce_scatter_fn = "reduce_scatter",
  all_to_all_single = "all_to_all", isend = "send", irecv = "recv", allreduce = "all_reduce",
}

local names = {
  "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send", "recv",
  "barrier",
}
local is_name = {}
for _, name in ipairs(names) do is_name[name] = true end

--- What is wrong with a name of prof_ops; nil: nothing.
function M.check_name(name)
  if is_name[synonyms[name] or name] then return nil end
  return ("there is no collective \"%s\"%s; there are %s"):format(tostring(name),
    spec.did_you_mean(tostring(name), names), table.concat(names, ", "))
end

-- ---- settings

local current = { enabled = false, prof_all = true, prof_ops = {}, verbose = false, debug = false }

local function apply(settings)
  local ops = {}
  for i, name in ipairs(settings.prof_ops) do ops[i] = synonyms[name] or name end
  local list = not settings.enabled and "" or settings.prof_all and "all" or table.concat(ops, " ")
  check(C.ds_comm_log(list, settings.verbose and 1 or 0, settings.debug and 1 or 0),
    "comm.configure")
end

--- Changes the settings that are given; every rank does the same.
-- @tparam table options enabled (collectives are logged from here on; what was logged stays),
--   prof_all (all of them, the default) or else prof_ops (a list of names), verbose (a line each),
--   debug (told apart by what the program was doing)
function M.configure(options)
  if type(options) ~= "table" then
    raise("comm.configure: expects a table, as { enabled = true }, got %s", type(options))
  end
  local settings = {}
  for key, value in pairs(current) do settings[key] = value end
  for key, value in pairs(options) do
    if current[key] == nil then
      raise("comm.configure: unknown option '%s'; there are enabled, prof_all, prof_ops, verbose, "
        .. "debug", tostring(key))
    end
    if type(value) ~= type(current[key]) then
      raise("comm.configure: %s is a %s, not %s", key, type(current[key]), tostring(value))
    end
    settings[key] = value
  end
  for _, name in ipairs(settings.prof_ops) do
    local message = M.check_name(name)
    if message then raise("comm.configure: prof_ops: %s", message) end
  end
  apply(settings)
  current = settings
end

-- ---- summing up

--- The mean without the highest and the lowest tenth.
local function trimmed_mean(values)
  table.sort(values)
  local n, sum = #values, 0
  local k = math.floor(n * 0.1 + 0.5)
  for i = k + 1, n - k do sum = sum + values[i] end
  return sum / (n - 2 * k)
end

local function size_text(bytes)
  local units, i = { "B", "KB", "MB", "GB", "TB" }, 1
  while bytes >= 1024 and i < #units do bytes, i = bytes / 1024, i + 1 end
  return ("%g %s"):format(math.floor(bytes * 100 + 0.5) / 100, units[i])
end

--- What is logged so far, by name, then size.
local function entries(world)
  local out, e = {}, ffi.new "ds_comm_entry"
  for i = 0, C.ds_comm_logged(e, -1) - 1 do
    C.ds_comm_logged(e, i)
    local caller, name = ffi.string(e.caller), ffi.string(e.name)
    local label = name
    if caller ~= "" then label = ("%s | [Caller Func: %s]"):format(label, caller) end
    if e.ranks ~= world then label = ("%s | %d ranks"):format(label, e.ranks) end
    local ms = {}
    for k = 1, tonumber(e.count) do ms[k] = e.ms[k - 1] end
    if #ms > 0 then
      out[#out + 1] = { index = i, label = label, message = e.message, ms = ms,
        everyone = e.ranks == world and name ~= "send" and name ~= "recv" }
    end
  end
  table.sort(out, function(a, b)
    if a.label ~= b.label then return a.label < b.label end
    if a.message ~= b.message then return a.message < b.message end
    return a.index < b.index
  end)
  return out
end

local rates = ffi.new("double[2]")

local function summed_up(e)
  local tput, busbw, latency, total = {}, {}, {}, 0
  for k, ms in ipairs(e.ms) do
    check(C.ds_comm_bandwidth(rates, rates + 1, e.index, ms), "comm.log_summary")
    tput[k], busbw[k], latency[k], total = rates[0], rates[1], ms, total + ms
  end
  return { count = #e.ms, total_latency_ms = total, avg_latency_ms = trimmed_mean(latency),
    tput_avg_gbps = trimmed_mean(tput), busbw_avg_gbps = trimmed_mean(busbw),
    msg_size_bytes = e.message, msg_size_str = size_text(e.message) }
end

--- Raises unless all ranks have logged the same calls.
local function need_same_calls(list)
  local lines = {}
  for i, e in ipairs(list) do lines[i] = ("%s %.15g %d"):format(e.label, e.message, #e.ms) end
  local texts = require("ds.together").texts(table.concat(lines, "\n"))
  for r, text in ipairs(texts) do
    if text ~= texts[1] then
      raise("comm.log_summary: rank %d has logged other collectives than rank 0, so how long they "
        .. "waited for each other cannot be told; switch the log on and off on every rank at the "
        .. "same place", r - 1)
    end
  end
end

--- How long each call took the rank that was there last, and this rank beyond that.
local function straggled(e)
  return scope.no_grad(function()
    local own = tensor.tensor(e.ms, { dtype = "f64", device = "cpu" })
    local least = require("ds.comm").all_reduce(own:clone(), "min"):tolist()
    local over, total, extra = {}, 0, 0
    for k, ms in ipairs(e.ms) do
      over[k] = ms - least[k]
      total, extra = total + least[k], extra + over[k]
    end
    return { count = #e.ms, total_comm_lat_ms = total, total_straggler_ms = extra,
      avg_comm_lat_ms = trimmed_mean(least), avg_straggler_ms = trimmed_mean(over),
      msg_size_bytes = e.message, msg_size_str = size_text(e.message) }
  end)
end

local function stragglers(list)
  local shared, out = {}, {}
  for _, e in ipairs(list) do
    if e.everyone then shared[#shared + 1] = e end
  end
  apply { enabled = false, prof_ops = {} } -- what follows is not the script's
  local ok, message = pcall(function()
    need_same_calls(shared)
    for _, e in ipairs(shared) do out[e] = straggled(e) end
  end)
  apply(current)
  if not ok then error(message, 0) end
  return out
end

-- ---- printing

local columns = {
  summary = { "Message Size", "Count", "Total Latency(ms)", "Avg Latency(ms)", "tput_avg (Gbps)",
    "busbw_avg (Gbps)", keys = { "msg_size_str", "count", "total_latency_ms", "avg_latency_ms",
      "tput_avg_gbps", "busbw_avg_gbps" } },
  stragglers = { "Message Size", "Count", "Total comm lat(ms)", "Total straggler(ms)",
    "Avg comm lat(ms)", "Avg straggler(ms)", keys = { "msg_size_str", "count", "total_comm_lat_ms",
      "total_straggler_ms", "avg_comm_lat_ms", "avg_straggler_ms" } },
}

local formats = { msg_size_str = "%-20s", count = "%-20d", tput_avg_gbps = "%-20.2f",
  busbw_avg_gbps = "%-20.2f" }

local function line(first, cells)
  return ((("%-20s"):format(first) .. table.concat(cells)):gsub("%s+$", ""))
end

local function add_table(lines, layout, list, numbers)
  local cells = {}
  for i, title in ipairs(layout) do cells[i] = ("%-20s"):format(title) end
  lines[#lines + 1] = line("Comm. Op", cells)
  local label
  for _, e in ipairs(list) do
    if numbers[e] then
      if e.label ~= label then lines[#lines + 1] = e.label end
      label = e.label
      for i, key in ipairs(layout.keys) do
        cells[i] = (formats[key] or "%-20.3f"):format(numbers[e][key])
      end
      lines[#lines + 1] = line("", cells)
    end
  end
end

--- By label, then by message size.
local function by_size(list, numbers)
  local out = {}
  for _, e in ipairs(list) do
    if numbers[e] then
      out[e.label] = out[e.label] or {}
      out[e.label][e.message] = numbers[e]
    end
  end
  return out
end

--- Prints, on rank 0, what its collectives came to: times and bandwidths by operation and message
-- size.
-- @tparam[opt] table options
--   show_straggler  also how long each rank waited for slower ones: Σ(t − the least of all ranks);
--                   every rank must then call this at the same place
--   return_dict     return the numbers, of this rank, and print nothing
-- @treturn table|nil { summary = { [operation] = { [bytes] = { count =, total_latency_ms =, … } }
--   }, straggler_analysis = the same shape or nil, metadata = { world_size =, rank = } }
function M.log_summary(options)
  options = require("ds.functional").options_of("comm.log_summary", options,
    { show_straggler = true, return_dict = true })
  local comm = require "ds.comm"
  local world, rank = comm.world_size(), comm.rank()
  local list, summary = entries(world), {}
  if #list == 0 and not current.enabled then
    raise("comm.log_summary: nothing was logged; switch the log on with comms_logger.enabled in "
      .. "the config, or ds.comm.configure { enabled = true }")
  end
  for _, e in ipairs(list) do summary[e] = summed_up(e) end
  local late = options.show_straggler and stragglers(list) or nil
  if options.return_dict then
    return { summary = by_size(list, summary), straggler_analysis = late and by_size(list, late),
      metadata = { world_size = world, rank = rank } }
  end
  if rank ~= 0 then return end
  local lines = {}
  add_table(lines, columns.summary, list, summary)
  if late then
    lines[#lines + 1] = "\nBreakdown with straggler effect"
    add_table(lines, columns.stragglers, list, late)
  end
  print(table.concat(lines, "\n"))
end

return M
