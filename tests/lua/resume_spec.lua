-- Going on from a checkpoint: the same losses, digit for digit; signals; what does not fit.

local ds = require "ds"
local helper = require "tests.lua.helper"
local says = helper.says
local host = require("ds.ffi").host
local nn, F = ds.nn, ds.F

local function folder()
  local name = os.tmpname()
  os.remove(name)
  return name
end

local function remove(path) os.execute("rm -rf '" .. path .. "'") end

local Net = nn.module "Net"
function Net:init(width)
  self.embed, self.norm, self.drop = nn.Embedding(256, width), nn.LayerNorm(width), nn.Dropout(0.1)
  self.mlp = nn.Linear(width, width, { activation = "gelu" })
  self.steps_seen = ds.zeros(3) -- a buffer: saved as well
end
function Net:forward(x, y)
  local h = self.drop(self.mlp(self.norm(self.embed(x))))
  return F.linear_cross_entropy(h, self.embed.weight, y)
end

local text = ("the quick brown fox jumps over the lazy dog, and a dog is a dog. "):rep(40)
local text_path = os.tmpname()
do
  local file = assert(io.open(text_path, "w"))
  file:write(text)
  file:close()
end
teardown(function() os.remove(text_path) end)

local function make(changes)
  local config = {
    train_micro_batch_size_per_gpu = 4, gradient_accumulation_steps = 2, steps_per_print = 0,
    optimizer = { type = "AdamW", params = { lr = 0.01, weight_decay = 0.1 } },
    scheduler = {
      type = "WarmupCosineLR", params = { warmup_num_steps = 10, total_num_steps = 100 } } }
  for k, v in pairs(changes or {}) do config[k] = v end
  ds.seed(17)
  return ds.initialize { model = Net(16), config = config,
    training_data = ds.data.text(text_path, { length = 8, level = "byte" }) }
end

local function train(engine, loader, steps)
  local losses = {}
  for _ = 1, steps do
    repeat
      local loss = engine(loader:next())
      losses[#losses + 1] = ("%.17g"):format(loss:item())
      engine:backward(loss)
    until engine:step()
  end
  return losses
end

--- What f(…) logs, a line "level: text" each.
local function logged(f, ...)
  local lines, real = {}, {}
  for level, write in pairs(ds.log) do
    real[level] = write
    ds.log[level] = function(format, ...)
      lines[#lines + 1] = level .. ": " .. format:format(...)
    end
  end
  local ok, message = pcall(f, ...)
  for level, write in pairs(real) do ds.log[level] = write end
  assert(ok, message)
  return table.concat(lines, "\n") .. "\n"
end

describe("resuming", function()
  for name, changes in pairs {
    fp32 = {}, bf16 = { bf16 = { enabled = true } },
    ["bf16 gradients"] = { bf16 = { enabled = true }, gradient_accumulation_steps = 1,
      train_micro_batch_size_per_gpu = 8 },
    fp16 = { fp16 = { enabled = true, initial_scale_power = 24, loss_scale_window = 3 } },
    ["SGD with momentum"] = { optimizer = { type = "SGD", params = { lr = 0.1, momentum = 0.9 } } },
    Lamb = { optimizer = { type = "Lamb", params = { lr = 0.01, weight_decay = 0.1 } } },
    Muon = { optimizer = { type = "Muon", params = { muon_lr = 0.02, adam_lr = 0.005 } } },
    ["Muon, bf16"] = { bf16 = { enabled = true }, optimizer = { type = "Muon",
      params = { muon_lr = 0.02, adam_lr = 0.005, ns_method = "standard" } } },
  } do
    it("gives the losses of an uninterrupted run, " .. name, function()
      local dir = folder()
      local engine, _, loader = make(changes)
      local want = train(engine, loader, 100)
      local first, _, first_loader = make(changes)
      local got = train(first, first_loader, 50)
      first:save_checkpoint(dir, nil, { note = "half", seen = { 1, 2, 3 } })
      local second, _, second_loader, schedule = make(changes)
      ds.randn(7) -- the loaded state replaces whatever was drawn since
      local path, client = second:load_checkpoint(dir)
      assert.equal(dir .. "/global_step50", path)
      assert.same({ note = "half", seen = { 1, 2, 3 } }, client)
      assert.equal(50, second.global_steps)
      assert.equal(engine.micro_steps / 2, second.micro_steps)
      assert.equal(first:loss_scale(), second:loss_scale())
      for _, loss in ipairs(train(second, second_loader, 50)) do got[#got + 1] = loss end
      assert.same(want, got)
      assert.same(engine:get_lr(), schedule:get_lr())
      assert.equal(engine:loss_scale(), second:loss_scale())
      assert.equal(engine.skipped_steps, second.skipped_steps)
      assert(name ~= "fp16" or engine.skipped_steps > second.global_steps / 10)
      remove(dir)
    end)
  end

  it("keeps set_lr, buffers and frozen parameters", function()
    local dir = folder()
    local engine, _, loader = make()
    engine.module.steps_seen:fill_(3)
    train(engine, loader, 3)
    engine:set_lr(0.002)
    train(engine, loader, 2)
    local lr = engine:get_lr()
    engine:save_checkpoint(dir, "mine")
    local other = make()
    other:load_checkpoint(dir, "mine")
    assert.same(lr, other:get_lr())
    assert.same({ 3, 3, 3 }, other.module.steps_seen:tolist())
    remove(dir)
  end)

  it("crosses precisions by way of the fp32 master", function()
    local dir = folder()
    local engine, _, loader = make { bf16 = { enabled = true } }
    train(engine, loader, 3)
    engine:save_checkpoint(dir)
    local fine = make()
    fine:load_checkpoint(dir)
    assert.same(engine.zero.segments[1].p:tolist(), fine.zero.segments[1].p:tolist())
    assert.equal("f32", fine.module.mlp.weight.dtype)
    remove(dir)
  end)

  it("returns nil when there is none yet, and takes what is asked for", function()
    local dir = folder()
    local engine, _, loader = make()
    assert.is_nil((engine:load_checkpoint(dir)))
    train(engine, loader, 2)
    engine:save_checkpoint(dir)
    train(engine, loader, 1)
    engine:save_checkpoint(dir, nil, nil, { save_latest = false })
    local other = make()
    local path = other:load_checkpoint(dir, nil, { load_module_only = true })
    assert.equal(dir .. "/global_step2", path)
    assert.equal(0, other.global_steps)
    assert.equal(0, other.optimizer.steps)
    other:load_checkpoint(dir, "global_step3", { load_optimizer_states = false })
    assert.equal(3, other.global_steps)
    assert.equal(0, other.optimizer.steps)
    remove(dir)
  end)

  it("loads without the optimizer's or the schedule's state, and says what it loaded", function()
    local dir = folder()
    local engine, _, loader = make { bf16 = { enabled = true } }
    train(engine, loader, 4)
    engine:save_checkpoint(dir)
    local function load(options)
      local other = make { bf16 = { enabled = true } }
      local said = logged(other.load_checkpoint, other, dir, nil, options)
      assert.same(helper.weights(engine), helper.weights(other))
      assert.same(engine.zero.segments[1].p:tolist(), other.zero.segments[1].p:tolist())
      return other, said
    end
    local other, said = load { load_optimizer_states = false }
    helper.has(said, "global_step4: step 4, without the optimizer's state")
    assert.equal(0, other.optimizer.segments[1].state.exp_avg:abs():max():item())
    assert.equal(0, other.optimizer.steps)
    assert.same(engine:get_lr(), other:get_lr()) -- the schedule's
    other, said = load { load_lr_scheduler_states = false }
    helper.has(said, "global_step4: step 4\n")
    assert.same(engine.optimizer.segments[1].state.exp_avg:tolist(),
      other.optimizer.segments[1].state.exp_avg:tolist())
    assert.not_same(engine.lr_scheduler:state_dict(), other.lr_scheduler:state_dict())
    other, said = load { load_module_only = true }
    helper.has(said, "global_step4: weights only")
    assert.equal(0, other.global_steps)
    remove(dir)
  end)

  it("names what is missing or unexpected, and passes over it if asked to", function()
    local dir = folder()
    local engine, _, loader = make()
    train(engine, loader, 2)
    engine:save_checkpoint(dir)
    local Other = nn.module "Other"
    function Other:init() -- of Net: without `norm`, and with another head
      self.embed, self.mlp = nn.Embedding(256, 16), nn.Linear(16, 16)
      self.head = nn.Linear(16, 3)
    end
    local other = ds.initialize { model = Other(), config = {
      train_batch_size = 4, steps_per_print = 0, optimizer = { type = "AdamW" } } }
    local before, head = helper.weights(other), other.module.head.weight:tolist()
    local message = says("missing head.weight; missing head.bias; unexpected norm.weight; "
      .. "unexpected norm.bias; unexpected steps_seen", other.load_checkpoint, other, dir)
    helper.has(message, "{ load_module_strict = false } loads the others")
    assert.same(before, helper.weights(other))
    local said = logged(other.load_checkpoint, other, dir, nil,
      { load_module_strict = false, load_module_only = true })
    helper.has(said, "warning: load_checkpoint: " .. dir .. "/global_step2 does not fit the model: "
      .. "missing head.weight")
    assert.same(engine.module.mlp.weight:tolist(), other.module.mlp.weight:tolist())
    assert.same(head, other.module.head.weight:tolist())
    remove(dir)
  end)

  it("checks a checkpoint before it changes what was trained", function()
    local dir = folder()
    local engine, _, loader = make()
    train(engine, loader, 1)
    engine:save_checkpoint(dir)
    train(engine, loader, 1)
    engine:save_checkpoint(dir)
    local path = dir .. "/global_step2/optim/rank-0.safetensors"
    local good = helper.read(path)
    helper.write(path, good:sub(1, -2) .. string.char((good:byte(-1) + 1) % 256))
    local before = helper.weights(engine)
    train(engine, loader, 1)
    local other = helper.weights(engine)
    assert.not_same(before, other)
    local message = says("rank-0.safetensors' is damaged", engine.load_checkpoint, engine, dir)
    helper.has(message, 'load_checkpoint("' .. dir .. '", "global_step1")')
    assert.same(other, helper.weights(engine))
    train(engine, loader, 1)
    -- one that has made no step finds out while it reads, and goes on once a load succeeds
    local fresh, _, fresh_loader = make()
    message = says("rank-0.safetensors' is damaged", fresh.load_checkpoint, fresh, dir)
    helper.has(message, 'load_checkpoint("' .. dir .. '", "global_step1")')
    says("the engine's weights are undefined", train, fresh, fresh_loader, 1)
    says("the engine's weights are undefined", fresh.save_checkpoint, fresh, dir)
    fresh:load_checkpoint(dir, "global_step1")
    train(fresh, fresh_loader, 1)
    assert.same(before, helper.weights(fresh))
    remove(dir)
  end)

  it("says what does not fit, and changes nothing", function()
    local dir = folder()
    local engine, _, loader = make()
    train(engine, loader, 1)
    engine:save_checkpoint(dir)
    ds.seed(1)
    local wide = ds.initialize { model = Net(32), config = {
      train_batch_size = 4, steps_per_print = 0, optimizer = { type = "AdamW" } } }
    local before = wide.module.mlp.weight:tolist()
    says("embed.weight is [256 x 16], the model's is [256 x 32]", wide.load_checkpoint, wide, dir)
    assert.same(before, wide.module.mlp.weight:tolist())
    local lion = make { optimizer = { type = "SGD", params = { lr = 0.1, momentum = 0.9 } } }
    says("load without the optimizer", lion.load_checkpoint, lion, dir)
    says("gradients are not saved", function()
      local loss = engine(loader:next())
      engine:backward(loss)
      engine:save_checkpoint(dir)
    end)
    says("nothing", function() error("nothing") end)
    remove(dir)
  end)
end)

describe("a signal", function()
  local script = os.tmpname()
  do
    local file = assert(io.open(script, "w"))
    file:write [[
local ds = require "ds"
local nn, F = ds.nn, ds.F
ds.seed(3)
local model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
local engine = ds.initialize { model = model, config = { train_batch_size = 2, steps_per_print = 0,
  optimizer = { type = "SGD", params = { lr = 0.01 } } } }
if arg[1] ~= "none" then engine:save_checkpoint(arg[1], "start", { from = "script" }) end
local ready = assert(io.open(arg[2], "w"))
ready:close()
local x = ds.ones(2, 4)
for _ = 1, 1e9 do
  local loss = engine(x):square():mean()
  engine:backward(loss)
  engine:step()
end
]]
    file:close()
  end
  teardown(function() os.remove(script) end)

  local function run(dir, signal)
    local ready = os.tmpname()
    os.remove(ready)
    local command = ([[
      '%s' '%s' '%s' '%s' >/dev/null 2>&1 & p=$!
      for i in $(seq 200); do [ -e '%s' ] && break; sleep 0.05; done
      sleep 0.2; kill -%s $p; wait $p; echo $?]]):format(host.program, script, dir, ready, ready,
        signal)
    local pipe = assert(io.popen(command))
    local code = tonumber(pipe:read "*a")
    pipe:close()
    os.remove(ready)
    return code
  end

  for signal, number in pairs { TERM = 15, USR1 = 10, INT = 2 } do
    it("SIG" .. signal .. " saves where the script saves, and ends with 128 + signal", function()
      local dir = folder()
      assert.equal(128 + number, run(dir, signal))
      local engine = ds.initialize { model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)),
        config = { train_batch_size = 2, optimizer = { type = "SGD" } } }
      local path, client = engine:load_checkpoint(dir)
      assert(engine.global_steps > 0, path)
      assert.same({ from = "script" }, client)
      remove(dir)
    end)
  end
  it("ends a script that saves nothing as well", function()
    assert.equal(143, run("none", "TERM"))
  end)
end)
