--- What a rank finds: who it is, its arguments, and variables whose names begin with DS_TEST_.
-- Writes all to DIR/RANK, byte for byte.
--
--     dsrun --hostfile FILE tests/hosts/whoami.lua DIR ARGUMENT…

local rank = os.getenv "RANK" or "0"
local folder = arg[1]
local out = assert(io.open(("%s/%s"):format(folder, rank), "w"))

local words = { io.open "/proc/sys/kernel/hostname":read "*l" }
for _, name in ipairs { "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "NODE_RANK",
  "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES" } do
  words[#words + 1] = os.getenv(name) or "-"
end
out:write(table.concat(words, " "), "\n", os.getenv "PWD" or "-", "\n")
out:write(os.getenv "OMP_NUM_THREADS" or "-", "\n")
for i = 2, #arg do out:write(("argument %d, %d bytes: "):format(i - 1, #arg[i]), arg[i], "\n") end

local ffi, environment = require "ffi", {}
ffi.cdef "extern char **environ;"
local each = ffi.C.environ
while each[0] ~= nil do
  local entry = ffi.string(each[0])
  if entry:find "^DS_TEST_" then environment[#environment + 1] = entry end
  each = each + 1
end
table.sort(environment)
for _, entry in ipairs(environment) do out:write(("%d bytes: "):format(#entry), entry, "\n") end
out:close()
