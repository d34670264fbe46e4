--- `dsrun --hostfile FILE env`: the report of ds.env from all hosts, and what differs.
-- What most hosts have is shown once, and under it, marked with "!", who has something else.

local json = require "ds.json"
local env = require "ds.env"

local M = {}

--- Sorts answers into reports and failures.
-- @treturn table reports { name =, facts = } each
-- @treturn table failures { name =, why = } each
local function read(answers)
  local reports, failures = {}, {}
  for _, answer in ipairs(answers) do
    local ok, facts = pcall(json.decode, answer.output, answer.host)
    if answer.why then
      failures[#failures + 1] = { name = answer.host, why = answer.why }
    elseif not ok or type(facts) ~= "table" then
      failures[#failures + 1] = { name = answer.host,
        why = "its dsrun does not know env --json: install the same build" }
    else
      reports[#reports + 1] = { name = answer.host, facts = facts }
    end
  end
  return reports, failures
end

--- A fact of a host as one string, for comparing.
local function text_of(facts, key)
  local value = facts[key]
  if value == nil then return "" end
  return table.concat(env.lines(value), "\n")
end

--- Hosts by what they say.
-- @treturn table groups { text =, names = {…} } each, the largest first, then by their first host
function M.groups(reports, key)
  local groups, by_text = {}, {}
  for i, report in ipairs(reports) do
    local text = text_of(report.facts, key)
    local group = by_text[text]
    if not group then
      group = { text = text, names = {}, first = i }
      by_text[text] = group
      groups[#groups + 1] = group
    end
    group.names[#group.names + 1] = report.name
  end
  table.sort(groups, function(a, b)
    if #a.names ~= #b.names then return #a.names > #b.names end
    return a.first < b.first
  end)
  return groups
end

local function split(text)
  local lines = {}
  for line in (text .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = line end
  return lines
end

local function print_others(groups)
  for i = 2, #groups do
    local head = "! " .. table.concat(groups[i].names, ", ") .. ":"
    if #head > 14 then
      print(head)
      head = ""
    end
    env.print_row(head, split(groups[i].text))
  end
end

local function print_report(reports, failures)
  local names, differs = {}, {}
  for i, report in ipairs(reports) do names[i] = report.name end
  print(("%d host%s: %s"):format(#names, #names == 1 and "" or "s", table.concat(names, ", ")))
  for _, row in ipairs(env.rows) do
    local label, key = row[1], env.key(row[1])
    if row.own then
      for i, report in ipairs(reports) do
        env.print_row(i == 1 and label or "", ("%s: %s"):format(report.name,
          (text_of(report.facts, key):gsub("\n", ", "))))
      end
    else
      local groups = M.groups(reports, key)
      if groups[1] and (#groups > 1 or groups[1].text ~= "") then
        env.print_row(label, split(groups[1].text))
      end
      print_others(groups)
      if #groups > 1 then differs[#differs + 1] = label end
    end
  end
  for _, failure in ipairs(failures) do print(("%s: %s"):format(failure.name, failure.why)) end
  if #differs > 0 then
    print("differs: " .. table.concat(differs, ", "))
  elseif #reports > 1 then
    print "nothing differs"
  end
end

local function print_json(reports, failures)
  local hosts, failed, differs = {}, {}, json.array()
  for _, report in ipairs(reports) do hosts[report.name] = report.facts end
  for _, failure in ipairs(failures) do failed[failure.name] = failure.why end
  for _, row in ipairs(env.rows) do
    local key = env.key(row[1])
    if not row.own and #M.groups(reports, key) > 1 then differs[#differs + 1] = key end
  end
  print(json.encode({ hosts = hosts, failed = failed, differs = differs }, { indent = 2 }))
end

--- @tparam string text what the hosts answered, as JSON: an array of { host =, output =, why = },
-- the last one where there is no answer
function M.show(text)
  local as_json = env.arguments()
  local reports, failures = read(json.decode(text, "the hosts' answers"))
  if as_json then print_json(reports, failures) else print_report(reports, failures) end
  if #failures > 0 then os.exit(1) end
end

return M
