-- The engine on a GPU: the same training as on the CPU, without waiting for the device.

local ds = require "ds"
local nn, F = ds.nn, ds.F
local host = require "ds.host"
local helper = require "tests.cuda.helper"
local training = require "tests.cuda.training"
local common = require "tests.lua.helper"

local says, has = common.says, common.has

local Net = nn.module "Net"
function Net:init()
  self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)
  self.scale = nn.Parameter(ds.ones(3, { device = "cpu" }))
  self.shift = ds.full({ 3 }, 0.25, { device = "cpu" }):keep()
end
function Net:forward(x, y)
  local h = self.down(self.up(x):tanh()) * self.scale + self.shift:to(x.dtype)
  return y and (h - y):square():mean() or h
end

local make, batches, train = training.maker(Net), training.batches, training.train
local weights, near = training.weights, training.near

local warm_up = { type = "WarmupLR",
  params = { warmup_num_steps = 6, warmup_type = "linear", warmup_max_lr = 0.05 } }

describe("an engine on a GPU", function()
  for name, case in pairs {
    f32 = { {}, 1e-4 },
    ["f32 with SGD and accumulation"] = { { gradient_accumulation_steps = 2,
      optimizer = { type = "SGD", params = { lr = 0.1, momentum = 0.9 } } }, 1e-4 },
    ["bf16 with a schedule"] = { { bf16 = { enabled = true }, scheduler = warm_up }, 0.03 },
    ["bf16 with accumulation and no clipping"] = { { bf16 = { enabled = true },
      gradient_accumulation_steps = 2, gradient_clipping = 0 }, 0.03 },
    ["fp16 with a fixed scale"] = { { fp16 = { enabled = true, loss_scale = 64 } }, 0.01 },
  } do
    it("trains as on the CPU: " .. name, function()
      local list = batches(6)
      local cpu, cuda = make("cpu", case[1]), make("cuda", case[1])
      near(train(cpu, list), train(cuda, list), case[2], "loss")
      near({ cpu:get_loss(), cpu:get_global_grad_norm() },
        { cuda:get_loss(), cuda:get_global_grad_norm() }, case[2], "loss and norm")
      near(weights(cpu), weights(cuda), case[2], "weights")
      assert.same(cpu:get_lr(), cuda:get_lr())
      assert.equal("cuda", cuda.module.up.weight.device)
      assert.equal("cuda", cuda.module.shift.device)
    end)

    it("never waits in a step: " .. name, function()
      local list = batches(8)
      local engine = make("cuda", case[1])
      train(engine, { list[1], list[2], list[3], list[4] })
      engine:get_loss()
      local before = ds.cuda.counters()
      for i = 5, 8 do
        engine:backward(engine(list[i][1], list[i][2]))
        engine:step()
      end
      local after = ds.cuda.counters()
      assert.equal(0, after.waits - before.waits, "waits")
      assert.equal(0, after.takes - before.takes, "memory taken from the system")
      assert(after.launches > before.launches)
    end)
  end

  it("takes the device from --device, and makes what the model makes there", function()
    local Maker = nn.module "Maker"
    function Maker:init() self.w = nn.Parameter(ds.ones(3)) end
    function Maker:forward(x) return (x * self.w * ds.arange(3):to(x.dtype)):sum() end
    local engine = make("cuda", nil, ds.on("cpu", Maker))
    assert.equal("cuda", engine(ds.ones(3, { device = "cpu" })).device)
    local given = ds.on("cuda", function()
      return ds.initialize { model = Maker(), config = { train_micro_batch_size_per_gpu = 1 } }
    end)
    assert.equal("cuda", given.device)
  end)

  it("knows a skipped step one step later, and counts as the CPU does", function()
    local results, b = {}, batches(4)
    for _, device in ipairs { "cpu", "cuda" } do
      local engine = make(device, { bf16 = { enabled = true }, nan_check = false,
        scheduler = warm_up })
      train(engine, { b[1], b[2], { b[3][1] * math.huge, b[3][2] }, b[3], b[4] })
      results[device] = { engine, weights(engine) }
    end
    local cpu, cuda = results.cpu[1], results.cuda[1]
    assert.equal(1, cuda.skipped_steps)
    assert.equal(cpu.optimizer.steps, cuda.optimizer.steps)
    assert.same(cpu:get_lr(), cuda:get_lr())
    near(results.cpu[2], results.cuda[2], 0.03, "weights")
  end)

  it("says whether a step was applied when it is asked", function()
    local engine, b = make("cuda", { bf16 = { enabled = true }, nan_check = false }), batches(2)
    train(engine, { b[1] })
    assert.is_true(engine:was_step_applied())
    local before = weights(engine)
    train(engine, { { b[1][1] * math.huge, b[1][2] } })
    assert.is_false(engine:was_step_applied())
    assert.equal(1, engine.skipped_steps)
    assert.equal(1, engine.optimizer.steps)
    assert.same(before, weights(engine))
    train(engine, { b[2] })
    assert.is_true(engine:was_step_applied())
  end)

  it("moves fp16's loss scale as on the CPU", function()
    local scales, b = {}, batches(5)
    for _, device in ipairs { "cpu", "cuda" } do
      local engine = make(device, { nan_check = false,
        fp16 = { enabled = true, initial_scale_power = 18, loss_scale_window = 2,
          hysteresis = 1 } })
      local out = {}
      for i = 1, 5 do
        train(engine, { b[i] })
        out[i] = engine:loss_scale()
      end
      out[6] = engine.skipped_steps
      scales[device] = out
    end
    assert.same(scales.cpu, scales.cuda)
    assert(scales.cpu[6] > 0)
  end)

  it("stops where the loss is NaN, a step later, with the weights of before", function()
    local engine, b = make("cuda"), batches(2)
    train(engine, { b[1] })
    local before = weights(engine)
    train(engine, { { b[1][1] * (0 / 0), b[1][2] } })
    engine:backward(engine(b[2][1], b[2][2]))
    says("step 2: the loss is NaN; training stops (nan_check)", engine.step, engine)
    assert.same(before, weights(engine))
    assert.equal(1, engine.optimizer.steps)
  end)

  it("runs optimizers that are rules in Lua", function()
    if not ds.optim.registry.CudaSign then
      ds.optimizer("CudaSign", { state = { "m" }, defaults = { lr = 1e-2 },
        step = function(p, g, s, h)
          s.m:mul_(0.5):add_(g, 0.5)
          p:add_(s.m:sign(), -h.lr)
        end })
    end
    local c, list = { optimizer = { type = "CudaSign" } }, batches(3)
    local cpu, cuda = make("cpu", c), make("cuda", c)
    near(train(cpu, list), train(cuda, list), 1e-4, "loss")
    near(weights(cpu), weights(cuda), 1e-4, "weights")
  end)

  it("says at every steps_per_print what a step came to", function()
    local script = common.temporary()
    common.write(script, [[
      local ds = require "ds"
      local engine = ds.initialize { model = ds.nn.Linear(2, 1), config = { device = "cuda",
        train_micro_batch_size_per_gpu = 1, steps_per_print = 2,
        optimizer = { type = "SGD", params = { lr = 0.5 } } } }
      for i = 1, 4 do
        engine:backward(engine(ds.ones(1, 2)):square():mean())
        engine:step()
        if i == 3 then print "third" end
      end]])
    local file = io.popen(("%s --seed 1 %s 2>&1"):format(host.executable, script))
    local text = file:read "*a"
    file:close()
    os.remove(script)
    has(text, "step=2, skipped=0, lr=[0.5], loss=")
    has(text, "step=4, skipped=0, lr=[0.5], loss=")
    assert(text:find "step=2.*third.*step=4", text)
  end)

  it("trains from a loader, evaluates, and gives numbers", function()
    local results = {}
    for _, device in ipairs { "cpu", "cuda" } do
      ds.seed(4)
      local x, y = ds.randn(22, 5, { device = "cpu" }), ds.randn(22, 3, { device = "cpu" })
      local set = ds.data.tensors(x, y)
      ds.seed(5)
      local engine, _, loader = ds.initialize { model = ds.on("cpu", Net), training_data = set,
        config = { device = device, train_micro_batch_size_per_gpu = 4, steps_per_print = 0,
          gradient_accumulation_steps = 2, optimizer = { type = "AdamW" } } }
      local out = {}
      for i = 1, 4 do out[i] = engine:train_batch(loader) end
      out[5] = engine:evaluate(set, { batch_size = 5 })
      results[device] = out
    end
    near(results.cpu, results.cuda, 1e-4, "losses")
  end)
end)

describe("batches for a GPU", function()
  local function windows()
    local path = common.temporary()
    common.write(path, ("To be, or not to be, that is the question. "):rep(4))
    local set = ds.data.text(path, { length = 7, stride = 5 })
    os.remove(path)
    return set
  end

  local function list_of(loader, n)
    local out = {}
    for i = 1, n do
      local x, y = loader:next()
      out[i] = { x.device, x:to("cpu"):tolist(), y:to("cpu"):tolist() }
    end
    return out
  end

  it("are the CPU's, in any order of asking", function()
    local set = windows()
    local function loader(device)
      return ds.data.loader(set, { batch_size = 3, seed = 2, device = device })
    end
    local cpu, cuda = loader "cpu", loader "cuda"
    local function compare(n)
      local a, b = list_of(cpu, n), list_of(cuda, n)
      for i = 1, n do
        assert.equal("cuda", b[i][1])
        assert.same(a[i][2], b[i][2])
        assert.same(a[i][3], b[i][3])
      end
    end
    compare(cpu:len() + 2) -- into the second epoch
    assert.same(cpu:state(), cuda:state())
    cpu:seek(5)
    cuda:seek(5)
    compare(2)
    local state = cpu:state()
    compare(3)
    cpu:load_state(state)
    cuda:load_state(state)
    compare(2)
    state.seed = 77
    cpu:load_state(state)
    cuda:load_state(state)
    compare(2)
    state = cpu:state()
    state.seed = 78 -- from where both stand, in another order
    cpu:load_state(state)
    cuda:load_state(state)
    compare(1)
    local counts = { {}, {} }
    for k, l in ipairs { cpu, cuda } do
      l:seek(0)
      for b in l:batches() do
        table.insert(counts[k], b.samples)
        table.insert(counts[k], b[1]:to("cpu"):tolist())
      end
    end
    assert.same(counts[1], counts[2])
  end)

  it("are uploaded beside the kernels, without a wait", function()
    local loader = ds.data.loader(windows(), { batch_size = 3, device = "cuda" })
    for _ = 1, 3 do loader:next() end
    local before = ds.cuda.counters()
    for _ = 1, 4 do loader:next() end
    local after = ds.cuda.counters()
    assert.equal(0, after.waits - before.waits)
    assert.equal(8, after.uploads - before.uploads)
  end)

  it("come from get() as they are asked for, so that random numbers keep their order", function()
    local asked = 0
    local set = { size = function() return 6 end, get = function(_, i)
      asked = asked + 1
      return i, { i, -i }
    end }
    local loader = ds.data.loader(set, { batch_size = 2, shuffle = false, device = "cuda" })
    local a, b = loader:next()
    assert.equal(2, asked)
    assert.same({ "cuda", "cuda" }, { a.device, b.device })
    assert.same({ { 1, 2 }, { { 1, -1 }, { 2, -2 } } }, { a:tolist(), b:tolist() })
  end)

  it("that cannot be made fail when they are wanted", function()
    local fail = false
    local set = { size = function() return 6 end, get = function(_, i) return i end,
      _gather = function(_, index, n)
        if fail then error "no more" end
        local t = ds.zeros(n, { device = "cpu" })
        for k = 0, n - 1 do t:data_ptr()[k] = tonumber(index[k]) end
        return t
      end }
    local loader = ds.data.loader(set, { batch_size = 2, shuffle = false, device = "cuda" })
    assert.same({ 0, 1 }, loader:next():tolist())
    fail = true
    assert.same({ 2, 3 }, loader:next():tolist()) -- it was there
    says("no more", loader.next, loader)
    fail = false
    assert.same({ 4, 5 }, loader:next():tolist())
  end)
end)

describe("a CUDA graph", function()
  local on = { cuda_graph = true }
  local function with(more)
    local c = {}
    for key, value in pairs(more) do c[key] = value end
    local plain = {}
    for key, value in pairs(c) do plain[key] = value end
    c.cuda_graph = true
    return plain, c
  end

  for name, more in pairs {
    f32 = {}, bf16 = { bf16 = { enabled = true }, scheduler = warm_up },
    ["f32 with accumulation"] = { gradient_accumulation_steps = 3 },
  } do
    it("gives the bits of training without it: " .. name, function()
      local plain, graph = with(more)
      local list = batches(15)
      local a, b = make("cuda", plain), make("cuda", graph)
      local expected = train(a, list)
      local before = ds.cuda.counters()
      assert.same(expected, train(b, list))
      local after = ds.cuda.counters()
      assert.same(weights(a), weights(b))
      assert.equal(a:get_global_grad_norm(), b:get_global_grad_norm())
      local gas = more.gradient_accumulation_steps or 1
      assert.equal(gas == 1 and 3 or 5, after.captures - before.captures)
      local updates = 15 / gas - 4 -- the first that could be recorded only shows the settings
      assert.equal(2 * (15 - 3 * gas) + updates, after.replays - before.replays)
      b:destroy()
    end)
  end

  it("is recorded anew after a checkpoint was loaded", function()
    local list, results = batches(16), {}
    local first, rest = { unpack(list, 1, 6) }, { unpack(list, 7, 16) }
    for i, c in ipairs { {}, on } do
      local folder, engine = common.temporary(), make("cuda", c)
      train(engine, first)
      engine:save_checkpoint(folder)
      local out = { train(engine, rest) }
      for k, other in ipairs { engine, (make("cuda", c)) } do
        other:load_checkpoint(folder)
        local before = ds.cuda.counters()
        out[k + 1] = train(other, rest)
        assert.same(out[1], out[k + 1])
        assert.equal(i == 1 and 0 or 3, ds.cuda.counters().captures - before.captures)
        other:destroy()
      end
      results[i] = out
      os.execute("rm -r " .. folder)
    end
    assert.same(results[1], results[2])
  end)

  it("leaves evaluation, other shapes and later changes of settings alone", function()
    local list, odd = batches(12), batches(1, 3)[1]
    table.insert(list, 7, odd)
    local results = {}
    for i, c in ipairs { {}, on } do
      local engine, out = make("cuda", c), {}
      for k, b in ipairs(list) do
        out[#out + 1] = train(engine, { b })[1]
        engine:eval()
        out[#out + 1] = engine(b[1], b[2]):item()
        engine:train()
        if k == 6 then engine:set_lr(0.01) end
        if k == 8 then engine.optimizer.param_groups[1].betas[1] = 0.5 end
      end
      results[i] = { out, weights(engine) }
      assert.equal(i == 2, engine.graph ~= nil)
      engine:destroy()
    end
    assert.same(results[1], results[2])
  end)

  it("keeps the losses of all steps apart", function()
    local engine, losses = make("cuda", on), {}
    local list = batches(6)
    for i, b in ipairs(list) do
      losses[i] = engine(b[1], b[2])
      engine:backward(losses[i])
      engine:step()
    end
    local plain = train(make("cuda"), list)
    for i, loss in ipairs(losses) do assert.equal(plain[i], loss:item()) end
    engine:destroy()
  end)

  --- What a model or script does that graphs cannot have; the rest is as ever.
  local function falls_back(what, change, step)
    it("is given up where " .. what, function()
      local results, list = {}, batches(7)
      for i, c in ipairs { {}, on } do
        local engine = make("cuda", c)
        change(engine)
        ds.seed(3)
        local out = {}
        for k, b in ipairs(list) do
          local loss = engine(b[1], b[2])
          out[k] = (step or function(e, l) e:backward(l) return l end)(engine, loss, k):item()
          engine:step()
        end
        assert.is_nil(engine.graph)
        results[i] = { out, weights(engine) }
        engine:destroy()
      end
      assert.same(results[1], results[2])
    end)
  end

  local function wrap(f)
    return function(engine)
      local inner = engine.module
      engine.module = setmetatable({ train = function() end }, { __call = function(_, x, y)
        return f(inner, x, y)
      end })
    end
  end
  falls_back("the model draws random numbers", wrap(function(net, x, y)
    return net(F.dropout(x, 0.5), y)
  end))
  falls_back("the model waits for a value", wrap(function(net, x, y)
    local loss = net(x, y)
    return loss * (loss:detach():item() > 0 and 1 or 2)
  end))
  falls_back("forward gives more than a loss", wrap(function(net, x, y)
    local h = net(x)
    return (h - y):square():mean(), h
  end))
  for _, at in ipairs { 4, 6 } do -- the step of the capture, and one of a replay
    falls_back("backward begins from something else, at step " .. at, function() end,
      function(engine, loss, k)
        local from = k >= at and loss * 2 or loss
        engine:backward(from)
        return from
      end)
  end
end)

describe("a checkpoint", function()
  it("goes on on the same and on another device", function()
    local folder, list = common.temporary(), batches(6)
    local c = { bf16 = { enabled = true }, scheduler = warm_up }
    local whole = make("cuda", c)
    local expected = train(whole, list)
    local first = make("cuda", c)
    train(first, { list[1], list[2], list[3] })
    first:save_checkpoint(folder)
    for _, device in ipairs { "cuda", "cpu" } do
      ds.seed(77)
      local engine = make(device, c)
      engine:load_checkpoint(folder)
      assert.equal(3, engine.global_steps)
      local losses = train(engine, { list[4], list[5], list[6] })
      if device == "cuda" then
        assert.same({ expected[4], expected[5], expected[6] }, losses)
        assert.same(weights(whole), weights(engine))
      else
        near({ expected[4], expected[5], expected[6] }, losses, 0.03, "losses")
        engine:save_checkpoint(folder, "cpu")
        local back = make("cuda", c)
        back:load_checkpoint(folder, "cpu")
        assert.same(weights(engine), weights(back))
      end
    end
    os.execute("rm -r " .. folder)
  end)

  it("that is written in the background is that of its step", function()
    local folder, list = common.temporary(), batches(4)
    local c = { checkpoint = { writer = { type = "fast", decoupled = true } } }
    local engine = make("cuda", c)
    train(engine, { list[1], list[2] })
    local then_ = weights(engine)
    engine:save_checkpoint(folder)
    train(engine, { list[3], list[4] })
    engine:finish_checkpoint()
    local all = make("cuda", c)
    all:load_checkpoint(folder)
    assert.same(then_, weights(all))
    os.execute("rm -r " .. folder)
  end)
end)

describe("ds.cuda", function()
  it("says what there is", function()
    assert.is_true(ds.cuda.is_available())
    assert.equal(1, ds.cuda.device_count())
    assert(#ds.cuda.get_device_name() > 3)
    ds.cuda.synchronize()
    local before = ds.cuda.memory_allocated()
    local t = ds.empty(1000, 1000, { device = "cuda" })
    assert(ds.cuda.memory_allocated() >= before + 4e6)
    ds.cuda.reset_peak_memory_stats()
    assert.equal(ds.cuda.memory_allocated(), ds.cuda.max_memory_allocated())
    assert(ds.cuda.memory_reserved() >= ds.cuda.memory_allocated())
    require("ds.scope").release(t)
    assert.equal(before, ds.cuda.memory_allocated())
    ds.cuda.empty_cache()
    assert(ds.cuda.counters().takes > 0)
    has(ds.cuda.memory_summary(), "live")
  end)

  it("moves tensors and modules", function()
    local t = ds.ones(2, { device = "cpu" })
    assert.equal("cuda", t:cuda().device)
    assert.equal(t, t:cpu())
    local net = ds.on("cpu", Net):cuda()
    assert.equal("cuda", net.shift.device)
    assert.equal("cpu", net:cpu().up.weight.device)
    assert.equal("tensor([1., 1.], device='cuda')", tostring(t:cuda()))
  end)
end)

describe("transfers beside the host", function()
  local ffi = require "ffi"
  local C, check = require("ds.ffi").C, require("ds.ffi").check

  local function event()
    local box = ffi.new("ds_event *[1]")
    check(C.ds_event_make(box, C.DS_CUDA))
    return ffi.gc(box[0], C.ds_event_free)
  end

  local function pinned(n)
    local t = ffi.new("ds_tensor")
    check(C.ds_empty_pinned(t, C.DS_F32, 1, ffi.new("int64_t[1]", n)))
    return ffi.gc(t, C.ds_release)
  end

  it("bring any number of elements there and back", function()
    for _, n in ipairs { 0, 1, 17, 4099 } do
      local there, up, down = ds.zeros(n, { device = "cuda" }), pinned(n), pinned(n)
      local e = event()
      for i = 0, n - 1 do ffi.cast("float *", up.data)[i] = i * 0.5 end
      check(C.ds_upload_later(e, there._c, up))
      check(C.ds_event_follow(e))
      local twice = there * 2
      check(C.ds_download_later(e, down, twice._c))
      check(C.ds_event_wait(e))
      assert.equal(1, C.ds_event_done(e))
      for i = 0, n - 1 do assert.equal(i, ffi.cast("float *", down.data)[i]) end
    end
  end)

  it("keep the memory of both sides until they are over", function()
    local e, host_side, there = event(), pinned(2e6), ds.zeros(2e6, { device = "cuda" })
    local before = ds.cuda.memory_allocated()
    check(C.ds_upload_later(e, there._c, host_side))
    C.ds_release(host_side)
    require("ds.scope").release(there)
    assert.equal(before, ds.cuda.memory_allocated())
    check(C.ds_event_wait(e))
    assert(ds.cuda.memory_allocated() <= before - 8e6)
  end)

  it("beside the kernels hand the device's memory on before they are over", function()
    for _, n in ipairs { 0, 1, 4099 } do
      local e, down, there = event(), pinned(n), ds.full({ n }, 3, { device = "cuda" }) * 2
      check(C.ds_download_beside(e, down, there._c))
      assert.equal(2, C.ds_references(there._c))
      check(C.ds_event_hand_over(e))
      assert.equal(1, C.ds_references(there._c))
      there:zero_() -- after the download
      check(C.ds_event_wait(e))
      for i = 0, n - 1 do assert.equal(6, ffi.cast("float *", down.data)[i]) end
    end
  end)

  it("say what does not fit", function()
    local e, there = event(), ds.zeros(3, { device = "cuda" })
    says("4 f32 and 3 f32; both", function() check(C.ds_download_later(e, pinned(4), there._c)) end)
    says("4 f32 and 3 f32; both", function()
      check(C.ds_download_beside(e, pinned(4), there._c))
    end)
    says("page-locked memory and the event's device only", function()
      check(C.ds_upload_later(e, there._c, ds.zeros(3, { device = "cpu" })._c))
    end)
  end)

  it("of ordinary memory are the same at every size", function()
    for _, n in ipairs { 1, 1048577, 2500003 } do -- below, above one piece and two
      local t = ds.arange(n, { device = "cpu", dtype = "i32" })
      local back = t:to("cuda"):to "cpu"
      assert.is_true(t:eq(back):all():item())
    end
    local many = {}
    for i = 1, 40 do many[i] = ds.full({ 3 }, i, { device = "cpu" }):to "cuda" end
    for i = 1, 40 do assert.equal(i, many[i]:to("cpu"):select(1, 2):item()) end
  end)
end)

describe("what goes wrong on a GPU", function()
  --- What a script prints in a process of its own, with a setting before it.
  local function run(setting, text)
    local script = common.temporary()
    common.write(script, text)
    local file = io.popen(("%s %s %s 2>&1"):format(setting, host.executable, script))
    local out = file:read "*a"
    file:close()
    os.remove(script)
    return (out:gsub(script:gsub("%p", "%%%0"), "script"))
  end

  it("is told late, and at once with DS_SYNC=1", function()
    local text = [[
      local ds = require "ds"
      local w = ds.ones(5, 2, { device = "cuda" })
      local index = ds.tensor({ 1, 7 }, "i64"):to "cuda"
      ds.cuda.synchronize()
      local y = ds.F.embedding(index, w)
      print "after"
      ds.cuda.synchronize()]]
    local late = run("", text)
    has(late, "after\n")
    has(late, "script:7: embedding: index 7 is not in 0 to 4; it was used before this line")
    local at_once = run("DS_SYNC=1", text)
    common.lacks(at_once, "after")
    has(at_once, "script:5: embedding: index 7 is not in 0 to 4")
  end)

  it("is told by the step after, too", function()
    has(run("", [[
      local ds = require "ds"
      local Table = ds.nn.module "Table"
      function Table:init() self.w = ds.nn.Embedding(5, 2) end
      function Table:forward(x) return self.w(x):square():mean() end
      local engine = ds.initialize { model = Table(), config = { device = "cuda",
        train_micro_batch_size_per_gpu = 1, optimizer = { type = "SGD" } } }
      for i = 1, 3 do
        engine:backward(engine(ds.tensor({ i == 1 and 9 or 1 }, "i64")))
        engine:step()
      end
      print "never"]]), "embedding: index 9 is not in 0 to 4")
  end)

  it("says what lives where memory runs out", function()
    if not helper.simulated then return pending "a real GPU has more memory than is filled here" end
    has(run("DS_SIMT_MEMORY=100000000", [[
      local ds = require "ds"
      local kept = ds.ones(1000, 1000, { device = "cuda" }):exp()
      local y = ds.zeros(30, 1000, 1000, { device = "cuda" })]]),
      "script:3: out of memory on the GPU: wanted 114.4 MiB for a tensor f32 [30 x 1000 x 1000]; "
      .. "live 3.8 MiB (exp 3.8 MiB)")
  end)
end)
