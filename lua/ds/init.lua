--- ds: everything a script needs, `local ds = require "ds"`.
--
-- ds.nn, ds.F, ds.optim, ds.data … are loaded when they are first used, so that starting is quick.

local border = require "ds.ffi"
local scope = require "ds.scope"
local tensor = require "ds.tensor"

local M = {}

-- Loaded with the first use of a name.
local modules = {
  nn = "ds.nn", F = "ds.functional", optim = "ds.optim", data = "ds.data", zero = "ds.zero_full",
  testing = "ds.testing", json = "ds.json", log = "ds.log", config = "ds.config",
  comm = "ds.comm", checkpointing = "ds.checkpointing", cuda = "ds.cuda",
}
local functions = {
  initialize = { "ds.engine", "initialize" }, schedule = { "ds.schedule", "register" },
  scheduler = { "ds.schedule", "scheduler" }, optimizer = { "ds.optim", "register" },
  cli = { "ds.cli", "parse" }, add_config_arguments = { "ds.cli", "add_config_arguments" },
  Function = { "ds.custom", "Function" }, checkpoint = { "ds.checkpointing", "checkpoint" },
  where = { "ds.ops", "where" }, cat = { "ds.views", "cat" }, stack = { "ds.views", "stack" },
  load_library = { "ds.library", "load_library" },
  include_folder = { "ds.library", "include_folder" },
  save = { "ds.saveload", "save" }, load = { "ds.saveload", "load" },
}

for _, name in ipairs {
  "rank", "world_size", "local_rank", "local_size", "barrier", "all_reduce", "broadcast",
  "all_gather", "reduce_scatter", "all_to_all", "send", "recv", "isend", "irecv", "group",
  "comm_stats", "restart_count",
} do
  functions[name] = { "ds.comm", name }
end

for _, name in ipairs {
  "empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "linspace", "eye",
  "tensor", "seed", "memory", "empty_cache", "on", "is_tensor",
  "empty_like", "zeros_like", "ones_like", "rand_like", "randn_like", "full_like",
} do
  M[name] = tensor[name]
end

M.no_grad, M.scope = scope.no_grad, scope.run
M.version = border.host.version

setmetatable(M, { __index = function(t, key)
  local value
  if modules[key] then
    value = require(modules[key])
  elseif functions[key] then
    value = require(functions[key][1])[functions[key][2]]
  elseif key == "progress" then
    value = require "ds.progress"
  else
    border.raise("ds.%s does not exist", tostring(key))
  end
  rawset(t, key, value)
  return value
end })

if border.host.options and border.host.options.seed then tensor.seed(border.host.options.seed) end

return M
