-- The tape as a script sees it: what backward computes, frees and refuses; Functions.

local ds = require "ds"
local says = require("tests.lua.helper").says
local nn = ds.nn

describe("backward", function()
  it("adds to .grad", function()
    local w = ds.tensor({ 2, 3 }, { requires_grad = true });
    (w * w):sum():backward()
    assert.same({ 4, 6 }, w.grad:tolist());
    (w * 10):sum():backward()
    assert.same({ 14, 16 }, w.grad:tolist())
  end)
  it("takes a gradient for more than one element", function()
    local w = ds.ones(2, { requires_grad = true })
    says("needs a gradient", function() (w * 2):backward() end);
    (w * 2):backward(ds.tensor { 1, 5 })
    assert.same({ 2, 10 }, w.grad:tolist())
  end)
  it("handles a tensor that is used many times", function()
    local w = ds.tensor({ 3 }, { requires_grad = true })
    local y = w * 2
    local z = y + y * y + y
    z:sum():backward() -- 2y + y² with y = 2w: 4 + 8w
    assert.same({ 28 }, w.grad:tolist())
  end)
  it("is refused a second time, unless the graph is retained", function()
    local w = ds.ones(2, { requires_grad = true })
    local loss = (w * w):sum()
    loss:backward { retain_graph = true }
    loss:backward()
    assert.same({ 4, 4 }, w.grad:tolist())
    says("already called", loss.backward, loss)
    says("does not depend on anything", function() ds.ones(1):sum():backward() end)
  end)
  it("frees activations, and keeps what was kept", function()
    local w = ds.ones(100, 100, { requires_grad = true })
    local a = w * 2
    local b = (a * a):keep()
    local loss = b:sum()
    loss:backward()
    assert.equal(40000, loss:item())
    assert.equal(4, b:select(1, 1):select(1, 1):item())
    says("was released by backward()", function() return a + 1 end)
  end)
  it("stops at detach and no_grad", function()
    local w = ds.tensor({ 2 }, { requires_grad = true })
    local a = w * 3
    local loss = (a:detach() * w):sum()
    loss:backward()
    assert.same({ 6 }, w.grad:tolist())
    local y = ds.no_grad(function() return w * 3 end)
    assert.is_false(y.requires_grad)
  end)
  it("restores the state of affairs after an error inside no_grad", function()
    pcall(ds.no_grad, function() error("x") end)
    local w = ds.ones(1, { requires_grad = true })
    assert.is_true((w * 2).requires_grad)
  end)
  it("does not grow with repetition", function()
    local w = ds.ones(64, 64, { requires_grad = true })
    local function once()
      local loss = (w:matmul(w):relu() * 0.5):sum()
      loss:backward()
      w.grad = nil
    end
    for _ = 1, 20 do once() end
    collectgarbage()
    collectgarbage()
    local before = ds.memory().live
    for _ = 1, 200 do once() end
    collectgarbage()
    collectgarbage()
    assert(ds.memory().live - before < 1e5)
  end)
end)

describe("Function", function()
  local sign_ste = ds.Function("sign_ste", {
    forward = function(ctx, x) ctx:save(x) return x:sign() end,
    backward = function(ctx, dy)
      local x = ctx:saved()
      return dy * (x:ge(-1) * x:le(1))
    end,
  })
  it("has the gradient it was given", function()
    local x = ds.tensor({ -2, -0.5, 0.5, 2 }, { requires_grad = true })
    local y = sign_ste(x)
    assert.same({ -1, -1, 1, 1 }, y:tolist());
    (y * 3):sum():backward()
    assert.same({ 0, 3, 3, 0 }, x.grad:tolist())
  end)
  it("takes several inputs and other arguments, returns several outputs", function()
    local f = ds.Function("mix", {
      forward = function(ctx, a, k, b) ctx:save(a, b, k) return a * b, a + b * k end,
      backward = function(ctx, dp, dq)
        local a, b, k = ctx:saved()
        return dp * b + dq, nil, dp * a + dq * k
      end,
    })
    ds.testing.gradcheck(function(a, b) return f(a, 3, b) end, { ds.randn(3), ds.randn(3) })
  end)
  it("is held to the shapes of its inputs", function()
    local f = ds.Function("bad", {
      forward = function(_, x) return x * 2 end,
      backward = function(_, dy) return dy:sum() end,
    })
    says("backward returned [] for argument 1 of shape [3]", function()
      f(ds.ones(3, { requires_grad = true })):sum():backward()
    end)
  end)
end)

describe("gradcheck", function()
  it("takes modules, in f64 meanwhile", function()
    local m = nn.Sequential(nn.Linear(3, 4, { activation = "silu" }), nn.LayerNorm(4))
    assert.is_true(ds.testing.gradcheck(m, { ds.randn(2, 3) }))
    assert.equal("f32", m[1].weight.dtype)
    assert.is_true(m[1].weight.requires_grad)
  end)
  it("finds a wrong gradient", function()
    local wrong = ds.Function("wrong", {
      forward = function(_, x) return x * x end,
      backward = function(_, dy) return dy end,
    })
    says("backward gives", ds.testing.gradcheck, wrong, { ds.randn(3) })
  end)
end)

describe("DS_CHECK=nan", function()
  it("names the operation and the line that made the first NaN", function()
    local command = ([[DS_CHECK=nan '%s' -e 'local x = require("ds").tensor { 1, -1 }
      print((x * 2):sqrt())' 2>&1]]):format(require("ds.ffi").host.program)
    local pipe = assert(io.popen(command))
    local text = pipe:read "*a"
    pipe:close()
    assert(text:find(":2: sqrt: the result [2] has a NaN", 1, true), text)
  end)
end)
