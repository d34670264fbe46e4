--- Schedules: DeepSpeed's numbers to the last digit, our own formulas, the scheduler object.

local json = require "ds.json"
local schedule = require "ds.schedule"

local folder = debug.getinfo(1, "S").source:match "^@(.*)/lua/[^/]*$" or "tests"

local function message_of(f, ...)
  local ok, message = pcall(f, ...)
  assert.is_false(ok)
  return message
end

local function adam(...)
  local groups = {}
  for i, lr in ipairs { ... } do groups[i] = { lr = lr, betas = { 0.9, 0.999 } } end
  return { param_groups = groups }
end

describe("DeepSpeed's schedules", function()
  local cases = assert(json.load(folder .. "/golden/schedules.json"))

  for number, case in ipairs(cases) do
    it(("%s, case %d: rates and momenta are DeepSpeed's, bit for bit"):format(case.type, number),
      function()
        local optimizer = adam(1e-3, 2.5e-4)
        local groups = optimizer.param_groups
        local s = schedule.scheduler(optimizer, { type = case.type, params = case.params })
        for n = 1, #case.lr do
          assert.equal(case.lr[n][1], groups[1].lr)
          assert.equal(case.lr[n][2], groups[2].lr)
          assert.equal(case.beta1[n], groups[1].betas[1])
          assert.equal(0.999, groups[1].betas[2]) -- DeepSpeed's OneCycle would write 0.99
          s:step()
        end
      end)
  end

  it("has a case for each of them", function()
    local seen = {}
    for _, case in ipairs(cases) do seen[case.type] = true end
    for _, name in ipairs { "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle",
      "LRRangeTest" } do assert.is_true(seen[name], name) end
  end)

  it("OneCycle moves SGD's momentum too, if it has one", function()
    local groups = { { lr = 1, momentum = 0.9 }, { lr = 1, momentum = 0 } }
    local s = schedule.scheduler({ param_groups = groups }, { type = "OneCycle",
      params = { cycle_min_lr = 0.1, cycle_max_lr = 0.5, cycle_first_step_size = 4 } })
    for _ = 1, 4 do s:step() end
    assert.equal(0.8, groups[1].momentum)
    assert.equal(0, groups[2].momentum)
  end)
end)

describe("our schedules", function()
  it("cosine is nanoGPT's formula", function()
    local at = schedule.make("cosine",
      { warmup_num_steps = 100, total_num_steps = 2000, min_lr = 1e-4 })
    assert.equal(1e-3 / 101, at(0, 1e-3))
    assert.equal(1e-3 * 100 / 101, at(99, 1e-3))
    assert.equal(1e-3, at(100, 1e-3))
    assert.near(5.5e-4, at(1050, 1e-3), 1e-15)
    assert.near(1e-4 + 0.5 * (1 + math.cos(math.pi * 500 / 1900)) * 9e-4, at(600, 1e-3), 1e-18)
    assert.equal(1e-4, at(2000, 1e-3))
    assert.equal(1e-4, at(9999, 1e-3))
    assert.equal(0.1, schedule.make("cosine", { total_num_steps = 5, min_lr_ratio = 0.1 })(5, 1))
    assert.equal(0, schedule.make("cosine", { total_num_steps = 5 })(5, 1))
  end)

  it("step multiplies by gamma every step_size steps", function()
    local at = schedule.make("step", { step_size = 3, gamma = 0.5 })
    local seen = {}
    for n = 0, 7 do seen[n + 1] = at(n, 8) end
    assert.same({ 8, 8, 8, 4, 4, 4, 2, 2 }, seen)
  end)

  it("WSD rises, stays and falls", function()
    for kind, half in pairs { linear = 0.5, cosine = 0.5, sqrt = 1 - math.sqrt(0.5) } do
      local at = schedule.make("WSD", { warmup_num_steps = 3, total_num_steps = 20,
        decay_num_steps = 10, decay_type = kind, min_lr = 0.2 })
      assert.equal(0.25, at(0, 1))
      assert.equal(0.75, at(2, 1))
      assert.equal(1, at(3, 1))
      assert.equal(1, at(10, 1))
      assert.near(0.2 + 0.8 * half, at(15, 1), 1e-15)
      assert.near(0.2, at(20, 1), 1e-15)
      assert.near(0.2, at(99, 1), 1e-15)
    end
  end)
end)

describe("schedule.make", function()
  it("names unknown schedules and parameters, with a suggestion, and all at once", function()
    local m = message_of(schedule.make, "WarmupLr")
    assert.matches('unknown schedule "WarmupLr" %(did you mean "WarmupLR"%?%)', m)
    assert.matches('did you mean "cosine"', message_of(schedule.make, "CosineAnnealingLR"))
    m = message_of(schedule.make, "WarmupDecayLR", { total_steps = 3, warmup_num_steps = 0,
      warmup_type = "exp" })
    assert.matches('unknown key "params.total_steps" %(did you mean "total_num_steps"%?%)', m)
    assert.matches("params.total_num_steps is missing", m)
    assert.matches("params.warmup_num_steps: expected an integer of at least 1, got 0", m)
    assert.matches('params.warmup_type: expected one of "log", "linear", got "exp"', m)
  end)

  it("sees parameters that don't go together", function()
    assert.matches("warmup_num_steps 5 %+ at least 1 step of decay is more than total_num_steps 5",
      message_of(schedule.make, "cosine", { total_num_steps = 5, warmup_num_steps = 5 }))
    assert.matches("warmup_num_steps 5 %+ decay_num_steps 6 is more than total_num_steps 10",
      message_of(schedule.make, "WSD",
        { total_num_steps = 10, warmup_num_steps = 5, decay_num_steps = 6 }))
    assert.matches("min_lr and min_lr_ratio",
      message_of(schedule.make, "cosine", { total_num_steps = 5, min_lr = 0, min_lr_ratio = 0 }))
    assert.matches("cycle_min_lr 2 is above cycle_max_lr 1",
      message_of(schedule.make, "OneCycle", { cycle_min_lr = 2, cycle_max_lr = 1 }))
  end)

  it("takes null and \"auto\" for not given", function()
    local at = schedule.make("WarmupLR", { warmup_max_lr = json.null, warmup_num_steps = "auto" })
    assert.equal(0.5, at(2000, 0.5))
  end)
end)

describe("schedules written in Lua", function()
  it("are used by name, with their params", function()
    local given
    schedule.register("spec half", function(p)
      given = p
      return function(step, lr) return lr * p.factor ^ step end
    end)
    local optimizer = adam(8)
    local s = schedule.scheduler(optimizer,
      { type = "spec half", params = { factor = 0.5, x = "auto" } })
    assert.same({ factor = 0.5 }, given)
    s:step()
    s:step()
    assert.same({ 2 }, s:get_lr())
    assert.matches("schedule 'spec half' is already registered",
      message_of(schedule.register, "spec half", function() end))
  end)

  it("may return a momentum, or betas", function()
    local optimizer = adam(1)
    local s = schedule.scheduler(optimizer, function(step)
      return 1, step == 0 and 0.5 or { 0.1, 0.2 }
    end)
    assert.same({ 0.5, 0.999 }, optimizer.param_groups[1].betas)
    s:step()
    assert.same({ 0.1, 0.2 }, optimizer.param_groups[1].betas)
  end)

  it("are told when they return no rate", function()
    local s = schedule.scheduler(adam(1), function(step) return step < 2 and 1 or 0 / 0 end)
    s:step()
    assert.matches("schedule '%(function%)' returned nan for step 2, expected a finite number",
      message_of(s.step, s))
    assert.matches("returned nil for step 0",
      message_of(schedule.scheduler, adam(1), function() end))
    schedule.register("spec none", function() end)
    assert.matches("make%(params%) returned nil", message_of(schedule.make, "spec none"))
  end)

  it("may replace a built-in one, once", function()
    package.loaded["ds.schedule"] = nil -- a copy of its own: other tests want the built-in one
    local copy = require "ds.schedule"
    package.loaded["ds.schedule"] = schedule
    assert.equal(1, copy.make("WSD", { total_num_steps = 10 })(1, 1))
    copy.register("WSD", function() return function() return 7 end end)
    assert.equal(7, copy.make("WSD")(0, 1))
    assert.matches("already registered", message_of(copy.register, "WSD", print))
  end)
end)

describe("the scheduler", function()
  local half = function(step, lr) return lr * 0.5 ^ step end

  it("starts from each group's rate and scales by lr_scale", function()
    local optimizer = adam(1, 4)
    local s = schedule.scheduler(optimizer, half)
    assert.same({ 1, 4 }, s:get_lr())
    s:step()
    assert.same({ 0.5, 2 }, s:get_lr())
    optimizer.param_groups[2].lr_scale = 3
    s:step()
    assert.same({ 0.25, 3 }, s:get_last_lr())
    assert.equal(4, optimizer.param_groups[2].initial_lr)
  end)

  it("resumes exactly, and sets the rate at once", function()
    local one = schedule.scheduler(adam(1), { type = "cosine", params = { total_num_steps = 9 } })
    for _ = 1, 5 do one:step() end
    assert.same({ last_batch_iteration = 4 }, one:state_dict())
    local two = schedule.scheduler(adam(1), { type = "cosine", params = { total_num_steps = 9 } })
    two:load_state_dict(one:state_dict())
    for _ = 1, 6 do
      assert.same(one:get_lr(), two:get_lr())
      one:step()
      two:step()
    end
    assert.matches("last_batch_iteration is nil", message_of(two.load_state_dict, two, {}))
  end)

  it("refuses other things than optimizers and schedules", function()
    assert.matches("has no param_groups", message_of(schedule.scheduler, {}, half))
    assert.matches("expected { type = name", message_of(schedule.scheduler, adam(1), 5))
  end)
end)
