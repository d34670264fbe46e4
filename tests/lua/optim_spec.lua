-- Optimizers of whole tensors: what rules are given, how groups are shared out, Lamb and Muon in
-- training. Their numbers against PyTorch are in golden_spec.lua.

local ds = require "ds"
local says = require("tests.lua.helper").says
local GPT = require "models.gpt"
local nn, F = ds.nn, ds.F
-- the sanitizer's own memory grows, and its pages count as ours
local sanitized = require("ds.host").compiler:find "sanitizers"
local close = ds.testing.assert_close

local root = debug.getinfo(1, "S").source:match "^@(.*)tests/lua/" or ""

local function shape_string(t) return table.concat(t.shape, "x") end

local seen -- what the rules below were given: shapes and dtypes

local function note(p, g, s)
  seen[#seen + 1] = ("%s %s %s %s"):format(shape_string(p), shape_string(g), shape_string(s.m),
    p.dtype == g.dtype and p.dtype or p.dtype .. "/" .. g.dtype)
end

local function normalised(p, g, s, h)
  note(p, g, s)
  s.m:mul_(h.momentum):add_(g, 1 / g:norm():item())
  p:add_(s.m, -h.lr)
end

ds.optimizer("NormSGD", { granularity = "tensor", state = { "m" },
  defaults = { lr = 0.1, momentum = 0 }, step = normalised })
ds.optimizer("MatrixSGD", { granularity = "matrix", state = { "m" },
  defaults = { lr = 0.1, momentum = 0 }, fallback = "SGD", step = normalised })

local Net = nn.module "Net"
function Net:init()
  self.wte = nn.Embedding(7, 6)
  self.embed_pos = nn.Parameter(ds.zeros(1, 6))
  self.fc = nn.Linear(6, 5)
  self.cube = nn.Parameter(ds.randn(5, 2, 3) * 0.3) -- as a convolution's weight
  self.lm_head = nn.Linear(6, 7, { bias = false })
end
function Net:forward(x, y)
  local h = self.fc(self.wte(x) + self.embed_pos):tanh()
  return F.cross_entropy(self.lm_head(h:matmul(self.cube:reshape(5, 6))), y)
end

local function make(type, params, changes, model, model_parameters)
  local config = { train_micro_batch_size_per_gpu = 8, steps_per_print = 0,
    optimizer = { type = type, params = params } }
  for k, v in pairs(changes or {}) do config[k] = v end
  ds.seed(5)
  return ds.initialize { model = model or Net(), config = config,
    model_parameters = model_parameters }
end

local function batch()
  ds.seed(3)
  return ds.randint(0, 7, 8), ds.randint(0, 7, 8)
end

local function train(engine, steps)
  local x, y = batch()
  local losses = {}
  for i = 1, steps do
    local loss = engine(x, y)
    losses[i] = loss:item()
    engine:backward(loss)
    engine:step()
  end
  return losses
end

before_each(function() seen = {} end)

describe("a rule of granularity tensor", function()
  it("works alone, in f32 and bf16", function()
    for _, dtype in ipairs { "f32", "bf16" } do
      seen = {}
      local w = nn.Parameter(ds.ones(2, 3, { dtype = dtype }))
      local b = nn.Parameter(ds.ones(4, { dtype = dtype }))
      w.grad, b.grad = ds.full({ 2, 3 }, 2, { dtype = dtype }), ds.full({ 4 }, 3, { dtype = dtype })
      local optimizer = ds.optim.NormSGD({ w, b }, { lr = 0.5, momentum = 0.5 })
      optimizer:step()
      optimizer:step(0.25) -- a direction does not depend on the scale
      assert.same({ "2x3 2x3 2x3 f32", "4 4 4 f32", "2x3 2x3 2x3 f32", "4 4 4 f32" }, seen)
      local tolerance = { rtol = dtype == "f32" and 1e-6 or 1e-2 }
      close(w:detach():float(), ds.full({ 2, 3 }, 1 - 0.5 * 2.5 / math.sqrt(6)), tolerance)
      close(b:detach():float(), ds.full({ 4 }, 1 - 0.5 * 2.5 / 2), tolerance)
    end
  end)

  for _, bf16 in ipairs { false, true } do
    it("sees fp32 tensors in the engine, " .. (bf16 and "bf16" or "fp32"), function()
      local engine = make("NormSGD", { lr = 0.05 }, { bf16 = { enabled = bf16 } })
      local before = {}
      for i, e in ipairs(engine.named) do before[i] = e.parameter:float():clone() end
      train(engine, 1)
      table.sort(seen) -- which comes first is the engine's choice
      assert.same({ "1x6 1x6 1x6 f32", "5 5 5 f32", "5x2x3 5x2x3 5x2x3 f32", "5x6 5x6 5x6 f32",
        "7x6 7x6 7x6 f32", "7x6 7x6 7x6 f32" }, seen)
      for i, e in ipairs(engine.named) do -- each moved by lr, whatever its size
        local moved = (e.parameter:float() - before[i]):norm():item()
        assert.is_near(0.05, moved, bf16 and 4e-3 or 1e-6, e.name)
      end
      local losses = train(engine, 40)
      assert(losses[40] < 0.7 * losses[1])
    end)
  end

  it("is given gradients scaled and clipped, as a flat one", function()
    for _, granularity in ipairs { "tensor", "flat" } do
      ds.optimizer("Plain" .. granularity, { granularity = granularity,
        step = function(p, g, _, h) p:add_(g, -h.lr) end })
    end
    for _, bf16 in ipairs { false, true } do
      local changes = { gradient_clipping = 0.1, bf16 = { enabled = bf16 } }
      local want = train(make("SGD", { lr = 0.5 }, changes), 10)
      for _, type in ipairs { "Plaintensor", "Plainflat" } do
        local losses = train(make(type, { lr = 0.5 }, changes), 10)
        for i = 1, 10 do assert.is_near(want[i], losses[i], bf16 and 1e-2 or 1e-5) end
      end
      assert(want[10] < want[1])
    end
  end)
end)

describe("a rule of granularity matrix", function()
  it("sees matrices; what is none, embeddings and heads go to the fallback", function()
    for _, bf16 in ipairs { false, true } do
      seen = {}
      local engine, optimizer = make("MatrixSGD", { lr = 0.05, momentum = 0.5 },
        { bf16 = { enabled = bf16 } })
      assert.equal(2, #optimizer.param_groups)
      assert.equal("SGD", optimizer.param_groups[2].rule.name)
      assert.equal(0.5, optimizer.param_groups[2].momentum)
      assert.equal(4, #optimizer.param_groups[2].params)
      local losses = train(engine, 60)
      assert.equal("5x6 5x6 5x6 f32", seen[1])
      assert.equal("5x6 5x6 5x6 f32", seen[2]) -- 5x2x3
      assert.equal(2 * 60, #seen)
      assert(losses[60] < 0.7 * losses[1])
    end
  end)

  it("works alone", function()
    local w, b = nn.Parameter(ds.ones(2, 2, 2)), nn.Parameter(ds.ones(3))
    w.grad, b.grad = ds.full({ 2, 2, 2 }, 4), ds.full({ 3 }, 2)
    ds.optim.MatrixSGD({ w, b }, { matrixsgd_lr = 1, lr = 0.1 }):step(0.5)
    assert.same({ "2x4 2x4 2x4 f32" }, seen)
    close(w:detach(), ds.full({ 2, 2, 2 }, 1 - 1 / math.sqrt(8)))
    close(b:detach(), ds.full({ 3 }, 0.9))
  end)

  it("follows what a group says, then what the parameter says", function()
    local function takers(groups)
      local optimizer = ds.optim.MatrixSGD(groups)
      local out = {}
      for _, g in ipairs(optimizer.param_groups) do
        for _, p in ipairs(g.params) do out[p] = g.rule.name end
      end
      return out
    end
    local net = Net()
    local names = takers(net:parameters())
    assert.equal("SGD", names[net.wte.weight])
    assert.equal("SGD", names[net.embed_pos])
    assert.equal("SGD", names[net.lm_head.weight])
    assert.equal("SGD", names[net.fc.bias])
    assert.equal("MatrixSGD", names[net.fc.weight])
    net.fc.weight.use_matrixsgd, net.wte.weight.use_matrixsgd = false, true
    names = takers(net:parameters())
    assert.equal("SGD", names[net.fc.weight])
    assert.equal("MatrixSGD", names[net.wte.weight])
    names = takers {
      { params = { net.fc.weight, net.lm_head.weight }, use_matrixsgd = true },
      { params = { net.cube, net.wte.weight, net.fc.bias }, use_matrixsgd = false } }
    assert.equal("MatrixSGD", names[net.fc.weight])
    assert.equal("MatrixSGD", names[net.lm_head.weight])
    assert.equal("SGD", names[net.cube])
    assert.equal("SGD", names[net.wte.weight])
    says("use_matrixsgd = true, but parameter fc.bias [5] is no matrix", ds.optim.MatrixSGD,
      { { params = { net.fc.bias }, use_matrixsgd = true } })
    -- a head handed over by itself is still known by the name that the model gives it
    net.lm_head:parameters()
    assert.equal("SGD", takers(net:parameters())[net.lm_head.weight])
  end)

  it("has rates of its own for both parts, which a schedule moves", function()
    local engine = make("Muon", { lr = 7, muon_lr = 0.02, adam_lr = 0.003 },
      { scheduler = { type = "WarmupLR", params = { warmup_num_steps = 4 } } })
    train(engine, 6)
    assert.same({ 0.02, 0.003 }, engine:get_lr())
  end)

  it("has them in the config by name, and the fallback's settings", function()
    local params = { matrixsgd_lr = 0.5, sgd_lr = 0.25, dampening = 0.1 }
    local engine, optimizer = make("matrixsgd", params)
    assert.same({ 0.5, 0.25 }, engine:get_lr())
    assert.equal(0.1, optimizer.param_groups[2].dampening)
    assert.is_nil(optimizer.param_groups[1].dampening)
    local fc, cube = engine.module.fc, engine.module.cube
    local groups = ds.optim.MatrixSGD({ { params = { cube }, lr = 3 },
      { params = { fc.weight, fc.bias } } }, params).param_groups
    assert.same({ 3, 0.5, 0.25 }, { groups[1].lr, groups[2].lr, groups[3].lr })
    says('unknown key "optimizer.params.use_lr"', make, "MatrixSGD", { use_lr = 1 })
  end)

  it("is refused where it makes no sense", function()
    local step = function() end
    says('granularity is "flat", "tensor" or "matrix", not row', ds.optimizer, "Bad1",
      { granularity = "row", step = step })
    says("fallback 'Nadam' is no optimizer of flat or tensor", ds.optimizer, "Bad2",
      { granularity = "matrix", fallback = "Nadam", step = step })
    says("fallback 'Muon' is no optimizer of flat or tensor", ds.optimizer, "Bad3",
      { granularity = "matrix", fallback = "Muon", step = step })
    says("fallback AdamW has no setting 'momentum'", ds.optimizer, "Bad4",
      { granularity = "matrix", fallback = { "AdamW", momentum = 0 }, step = step })
    says('only granularity "matrix" has a fallback', ds.optimizer, "Bad5",
      { fallback = "SGD", step = step })
    says("unknown setting 'moment'; there are adam_lr,", ds.optim.Muon, Net():parameters(),
      { moment = 1 })
    says("use_muon must be a boolean, not 1", ds.optim.Muon,
      { { params = Net():parameters(), use_muon = 1 } })
    says('ns_method is "gram" or "standard", not "fast"', function()
      local w = nn.Parameter(ds.ones(2, 2))
      w.grad = ds.ones(2, 2)
      ds.optim.Muon({ w }, { ns_method = "fast" }):step()
    end)
  end)
end)

describe("Muon", function()
  -- Singular values from 1 down to 1e-3: x = u s vᵀ with Householder's matrices for u and v.
  local function ill_conditioned(rows, cols)
    local function mirror(n)
      local v = ds.randn(n, 1, { dtype = "f64" })
      return ds.eye(n, { dtype = "f64" }) - v:matmul(v:t()) * (2 / (v * v):sum():item())
    end
    local n, s = math.min(rows, cols), {}
    for i = 1, n do s[i] = 10 ^ (-3 * (i - 1) / math.max(1, n - 1)) end
    local u, v = mirror(rows):narrow(2, 1, n), mirror(cols):narrow(2, 1, n)
    return (u * ds.tensor(s, "f64")):matmul(v:t()), u, v
  end

  it("brings all singular values near 1, both ways and in every shape", function()
    ds.seed(8)
    for _, shape in ipairs { { 8, 40 }, { 40, 8 }, { 12, 12 }, { 10, 14 }, { 1, 9 }, { 9, 1 } } do
      local g, u, v = ill_conditioned(shape[1], shape[2])
      local moved = {}
      for _, method in ipairs { "gram", "standard" } do
        for _, dtype in ipairs { "f64", "f32" } do
          local w = nn.Parameter(ds.zeros(shape[1], shape[2], { dtype = dtype }))
          w.grad = g:to(dtype)
          ds.optim.Muon({ w }, { lr = 1, ns_method = method }):step()
          moved[method .. dtype] = -w:detach():to "f64"
        end
      end
      local scale = math.sqrt(math.max(1, shape[1] / shape[2]))
      local inner = u:t():matmul(moved.gramf32):matmul(v) / scale -- about diagonal
      local n = math.min(shape[1], shape[2])
      for i = 1, n do
        local s = inner:select(1, i):select(1, i):item()
        assert(s > (i <= n / 2 and 0.65 or 0.2) and s < 1.25,
          ("%d x %d, value %d: %g"):format(shape[1], shape[2], i, s))
      end
      close(moved.gramf64, moved.standardf64, { rtol = 1e-9, atol = 1e-9 })
      close(moved.gramf32, moved.gramf64, { rtol = 0, atol = 1e-3 })
      close(moved.standardf32, moved.standardf64, { rtol = 0, atol = 0.1 })
    end
  end)

  it("leaves empty parameters alone", function()
    local w = nn.Parameter(ds.zeros(0, 4))
    w.grad = ds.zeros(0, 4)
    for _, type in ipairs { "Muon", "Lamb", "NormSGD" } do ds.optim[type]({ w }):step() end
    assert.same({ 0, 4 }, w:size())
  end)

  it("does nothing to a matrix without a gradient but decay it", function()
    local w = nn.Parameter(ds.ones(3, 5))
    w.grad = ds.zeros(3, 5)
    ds.optim.Muon({ w }, { lr = 0.1, weight_decay = 0.5 }):step()
    close(w:detach(), ds.full({ 3, 5 }, 0.95))
  end)
end)

describe("Lamb", function()
  it("is the same in the engine as alone", function()
    local engine = make("Lamb", { lr = 0.05, weight_decay = 0.1 })
    ds.seed(5)
    local net = Net()
    local alone = ds.optim.new("fusedlamb", net:parameters(), { lr = 0.05, weight_decay = 0.1 })
    local x, y = batch()
    local losses = train(engine, 10)
    for i = 1, 10 do
      local loss = net(x, y)
      assert.is_near(losses[i], loss:item(), 1e-6)
      loss:backward()
      alone:step()
      alone:zero_grad()
    end
  end)
end)

describe("in training", function()
  for _, setting in ipairs {
    { "Lamb", { lr = 0.05, weight_decay = 0.01 } },
    { "Muon", { muon_lr = 0.02, adam_lr = 0.01, weight_decay = 0.01 } },
    { "Muon", { muon_lr = 0.02, adam_lr = 0.01, ns_method = "standard" } },
  } do
    for _, bf16 in ipairs { false, true } do
      it(("%s teaches a GPT%s%s"):format(setting[1], setting[2].ns_method and " (standard)" or "",
        bf16 and ", bf16" or ""), function()
        ds.seed(1)
        local data = ds.data.text(root .. "models/gpt/shakespeare.txt", { length = 32 })
        local engine, _, loader = ds.initialize {
          model = GPT { n_layer = 1, n_head = 2, n_embd = 32, block_size = 32,
            vocab_size = data.vocab_size },
          training_data = data,
          config = { train_micro_batch_size_per_gpu = 8, steps_per_print = 0,
            gradient_clipping = 1, bf16 = { enabled = bf16 },
            optimizer = { type = setting[1], params = setting[2] } },
        }
        local first, last
        for _ = 1, 30 do
          last = engine:train_batch(loader)
          first = first or last
        end
        assert(first > 4 and last < 3.4, ("%g to %g"):format(first, last))
        engine:destroy()
      end)
    end
  end

  it("memory is flat over many steps, and no pages are faulted", function()
    for _, type in ipairs { "Lamb", "Muon", "MatrixSGD" } do
      local wide = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 64))
      local engine = make(type, {}, {}, wide)
      local x = ds.randn(8, 64)
      local function steps(n)
        for _ = 1, n do
          engine:backward(engine(x):square():mean())
          engine:step()
        end
      end
      steps(20)
      local before = ds.memory()
      steps(100)
      local after = ds.memory()
      assert.equal(before.takes, after.takes, type)
      assert(after.peak <= before.peak * 1.02, type)
      if not sanitized then assert(after.page_faults - before.page_faults < 500, type) end
      engine:destroy()
    end
  end)
end)

describe("a checkpoint", function()
  it("names what each part keeps", function()
    local folder = os.tmpname()
    os.remove(folder)
    local engine = make("Muon", {}, { bf16 = { enabled = true } })
    train(engine, 2)
    engine:save_checkpoint(folder, "one")
    local names = {}
    for name in pairs(ds.load(folder .. "/one/optim/rank-0.safetensors")) do
      names[#names + 1] = name
    end
    table.sort(names)
    local want = { "momentum_buffer/cube", "momentum_buffer/fc.weight" }
    for _, name in ipairs { "embed_pos", "fc.bias", "lm_head.weight", "wte.weight" } do
      want[#want + 1], want[#want + 2] = "exp_avg/" .. name, "exp_avg_sq/" .. name
    end
    for _, e in ipairs(engine.named) do want[#want + 1] = "fp32/" .. e.name end
    table.sort(want)
    assert.same(want, names)
    os.execute("rm -rf '" .. folder .. "'")
  end)
end)
