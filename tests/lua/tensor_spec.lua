-- Tensors as a script sees them: making, viewing, changing, reading; and what mistakes say.

local ds = require "ds"

-- Called from here, so that this file is the user's.
local function says(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, "no error was raised")
  assert(message:find(pattern, 1, true), ("expected '%s' in '%s'"):format(pattern, message))
  assert(message:find("tensor_spec.lua:%d+: "),
    "the message does not name the user's line: " .. message)
end

describe("creation", function()
  it("takes sizes as numbers or a table, options last", function()
    assert.same({ 2, 3 }, ds.zeros(2, 3):size())
    assert.same({ 2, 3 }, ds.zeros({ 2, 3 }, { dtype = "f64" }):size())
    assert.equal("f64", ds.zeros({ 2, 3 }, { dtype = "f64" }).dtype)
    assert.equal(1, ds.ones():item())
    assert.same({ {}, {} }, ds.zeros(2, 0):tolist())
    assert.same({ 0, 1, 2 }, ds.arange(3):tolist())
    assert.same({ 1, 1.5, 2 }, ds.arange(1, 2.5, 0.5):tolist())
    assert.same({ 0, 0.5, 1 }, ds.linspace(0, 1, 3):tolist())
    assert.same({ { 1, 0 }, { 0, 1 } }, ds.eye(2):tolist())
    assert.same({ 7, 7 }, ds.full({ 2 }, 7):tolist())
  end)
  it("keeps every dtype's values", function()
    for _, dtype in ipairs { "f32", "bf16", "f16", "f64", "i64", "i32", "u8" } do
      assert.same({ { 1, 2 }, { 3, 4 } }, ds.tensor({ { 1, 2 }, { 3, 4 } }, dtype):tolist())
    end
    assert.same({ true, false }, ds.tensor({ true, false }):tolist())
    assert.equal(2 ^ 53 - 1, ds.tensor(2 ^ 53 - 1, "i64"):item())
    assert.equal("bf16", ds.zeros(1, { dtype = "bfloat16" }).dtype)
  end)
  it("says how large what does not fit is", function()
    local file = io.open "/proc/sys/vm/overcommit_memory"
    local always = file and file:read "*n" == 1 -- this system promises memory that it has not
    if file then file:close() end
    if always then return pending "memory is never refused here" end
    says("out of memory: wanted 36.4 TiB for a tensor f32 [10000000000000]; live ", ds.empty, 1e13)
  end)
  it("repeats random numbers from a seed", function()
    ds.seed(42)
    local a, b = ds.randn(5):tolist(), ds.rand(5):tolist()
    ds.seed(42)
    assert.same(a, ds.randn(5):tolist())
    assert.same(b, ds.rand(5):tolist())
    assert.not_same(b, ds.rand(5):tolist())
    local n = ds.randint(3, 6, 1000)
    assert.equal(3, n:min():item())
    assert.equal(5, n:max():item())
    local z = ds.randn(20000)
    assert(math.abs(z:mean():item()) < 0.03 and math.abs(z:std():item() - 1) < 0.03)
  end)
  it("says what is wrong", function()
    says("size 2 must be a whole number, not 2.5", ds.zeros, 3, 2.5)
    says("size 2 must be a whole number, not 'i64'; as a dtype: { dtype = 'i64' }", ds.zeros, 2,
      "i64")
    says("a tensor is not assigned by [1]; use x:select(1, 1):copy_(y)",
      function() ds.zeros(2)[1] = 5 end)
    says("unknown option 'dtyp'", ds.zeros, 3, { dtyp = "f32" })
    says("unknown dtype 'f31'", ds.zeros, 3, { dtype = "f31" })
    says("rows have different lengths: 2 and 1", ds.tensor, { { 1, 2 }, { 3 } })
    says("different depths", ds.tensor, { { 1, 2 }, 3 })
    says("0.5 is not a whole number", ds.tensor, { 0.5 }, "i64")
    says("ds.zeroes does not exist", function() return ds.zeroes end)
    says("at most 8 dimensions", ds.zeros, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    says("more than", ds.zeros, 2 ^ 40, 2 ^ 40)
  end)
end)

describe("the meta device", function()
  local function live() return ds.memory("meta").live end
  it("counts what tensors would take, and takes nothing", function()
    local before, rss = live(), ds.memory().rss
    local x = ds.empty(2 ^ 20, 2 ^ 10, { device = "meta" })
    assert.equal(2 ^ 32 + 192, live() - before) -- the allocator's distance between large pieces
    local view = x:narrow(1, 1, 10)
    ds.scope(function() return (view:t() + 1) end)
    assert.equal("meta", x:to("cpu").device)
    x, view = nil, nil -- luacheck: ignore
    collectgarbage()
    collectgarbage()
    assert.equal(before, live())
    assert(ds.memory().rss - rss < 2 ^ 24)
  end)
  it("has the peak of the same work on the CPU, backward included", function()
    local function work(device)
      return ds.on(device, function()
        local w = ds.randn(64, 64, { requires_grad = true })
        require("ds.ffi").C.ds_memory_reset_peak(device == "meta" and 2 or 0)
        local before = ds.memory(device).live
        ds.scope(function()
          local x = ds.randn(512, 64)
          for _ = 1, 4 do x = x:matmul(w):gelu() + x end
          x:to("bf16"):float():square():mean():backward()
        end)
        return { ds.memory(device).live - before, ds.memory(device).peak - before }
      end)
    end
    local real, counted = work "cpu", work "meta"
    assert(real[2] > 2 ^ 20)
    for i = 1, 2 do assert(math.abs(real[i] - counted[i]) < 4096, real[i] .. " " .. counted[i]) end
  end)
  it("says what was released, and that there are no values", function()
    local kept
    ds.scope(function() kept = { ds.empty(3, 2, { device = "meta" }) } end)
    says("tensor [3 x 2] was released at the end of its scope", function() return kept[1] + 1 end)
    local x, m = ds.zeros(2), ds.zeros(2, { device = "meta" })
    says("item: a tensor on the meta device has a shape and no values",
      function() return m:sum():item() end)
    says("copy_: a tensor on the meta device", x.copy_, x, m)
    says("data_ptr: a tensor on the meta device", m.data_ptr, m)
    says("tensors on cpu and meta", x.add_, x, m)
    says("where: tensors on cpu and meta", ds.where, m:gt(0), x, x)
    says("tensors on cpu and meta", ds.F.embedding, ds.zeros(2, { device = "meta", dtype = "i64" }),
      ds.zeros(2, 3))
    m:copy_(x)
  end)
end)

describe("views", function()
  local x = ds.arange(24):reshape(2, 3, 4)
  it("share memory", function()
    local y = ds.zeros(2, 3)
    y:select(1, 2):fill_(5)
    y:narrow(2, 1, 1):fill_(1)
    assert.same({ { 1, 0, 0 }, { 1, 5, 5 } }, y:tolist())
    assert.same({ { 1, 1 }, { 0, 5 }, { 0, 5 } }, y:t():tolist())
  end)
  it("have the shapes and values of PyTorch's", function()
    assert.same({ 12, 13, 14, 15 }, x:select(1, 2):select(1, 1):tolist())
    assert.same({ { 4, 16 }, { 5, 17 }, { 6, 18 }, { 7, 19 } }, x:select(2, 2):t():tolist())
    assert.same({ 4, 2, 3 }, x:permute(3, 1, 2):size())
    assert.equal(23, x:permute(3, 1, 2):contiguous():reshape(-1):select(1, -1):item())
    assert.same({ 3, 4, 2 }, x:transpose(1, 3):transpose(1, 2):size())
    assert.same({ 2, 12 }, x:flatten(2):size())
    assert.same({ 1, 2, 3, 4 }, x:unsqueeze(1):size())
    assert.same({ 2, 3, 4 }, x:unsqueeze(-1):squeeze():size())
    assert.same({ 2, 3, 4, 5 }, x:unsqueeze(-1):expand(2, 3, 4, 5):size())
    local a, b, c = x:chunk(3, 2)
    assert.same({ 2, 1, 4 }, a:size())
    assert.same(x:tolist(), ds.cat({ a, b, c }, 2):tolist())
    local p, q = x:split({ 1, 3 }, 3)
    assert.same({ 2, 3, 1 }, p:size())
    assert.same({ 2, 3, 3 }, q:size())
    assert.same({ 2, 2, 3, 4 }, ds.stack({ x, x }, 2):size() and ds.stack({ x, x }, 1):size())
    assert.same({ 6, 4 }, x:transpose(2, 3):transpose(2, 3):view(6, 4):size())
    assert.same({ 8, 3 }, x:transpose(2, 3):reshape(8, 3):size())
  end)
  it("survive the tensor they are views of", function()
    local v
    do
      local base = ds.ones(1000)
      v = base:narrow(1, 5, 2)
    end
    collectgarbage()
    collectgarbage()
    assert.same({ 1, 1 }, v:tolist())
  end)
  it("says what is wrong", function()
    says("positions 3 to 5 are not in dimension 2 of [2 x 3 x 4]", x.narrow, x, 2, 3, 3)
    says("position 4 is not in dimension 2", x.select, x, 2, 4)
    says("position 0 is not in dimension 2", x.select, x, 2, 0)
    says("dimension 4 is not in a tensor of 3 dimensions", x.size, x, 4)
    says("24 elements and does not fit [5 x 5]", x.reshape, x, 5, 5)
    says("which [7 x -1] does not divide", x.reshape, x, 7, -1)
    says("use x:reshape", function() return x:transpose(1, 3):view(24) end)
    says("[2 x 3 x 4] cannot become [2 x 3 x 5]", x.expand, x, 2, 3, 5)
    says("use x:select(1, 2)", function() return x[2] end)
    says("do not broadcast (size 3 against 4)", function() return ds.ones(2, 3) + ds.ones(2, 4) end)
    says("inner sizes 3 and 4 differ", function() return ds.ones(2, 3):matmul(ds.ones(4, 2)) end)
    says("argument 2 must be a tensor, not a table", function() return ds.ones(2, 3):matmul {} end)
    says("index 5 is out of range", function()
      return ds.ones(3, 2):index_select(1, ds.tensor({ 5 }, "i64"))
    end)
  end)
end)

describe("changing in place", function()
  it("adds, multiplies, copies", function()
    local x = ds.ones(2, 2)
    assert.same({ -1, -1 }, ds.ones(2):sub_(ds.ones(2), 2):tolist())
    assert.same({ 0, 0 }, ds.ones(2):sub_(ds.ones(2)):tolist()) -- and not by the factor before
    x:add_(1):mul_(ds.tensor { 2, 3 }):add_(ds.ones(2, 2), -0.5)
    assert.same({ { 3.5, 5.5 }, { 3.5, 5.5 } }, x:tolist())
    x:copy_(ds.tensor({ 1, 2 }, "i64"))
    assert.same({ { 1, 2 }, { 1, 2 } }, x:tolist())
    x:zero_()
    assert.equal(0, x:sum():item())
    local index, source = ds.tensor({ 0, 2, 0 }, "i64"), ds.tensor { 1, 4, 2 }
    assert.same({ 3, 0, 4 }, ds.zeros(3):scatter_add_(1, index, source):tolist())
  end)
  it("is refused where a gradient needs the values", function()
    local w = ds.ones(2, { requires_grad = true })
    says("takes part in the gradient", w.add_, w, 1)
    ds.no_grad(function() w:add_(1) end)
    assert.same({ 2, 2 }, w:tolist())
    local x = ds.ones(2)
    says("does not broadcast", x.copy_, x, ds.ones(3))
  end)
end)

describe("memory", function()
  it("is given back by a scope", function()
    collectgarbage()
    collectgarbage()
    local before = ds.memory().live
    local kept = ds.scope(function()
      local x = ds.zeros(1000, 1000)
      for _ = 1, 50 do x = x + 1 end
      return x:narrow(1, 1, 1)
    end)
    assert.equal(50, kept:select(2, 1):item())
    assert(ds.memory().live - before < 9e6)
  end)
  it("of a released tensor says who released it and the way out", function()
    local lost
    ds.scope(function() lost = ds.zeros(4, 5) end)
    says("[4 x 5] was released at the end of its scope; t:keep() or t:detach()",
      function() return lost + 1 end)
    local kept
    ds.scope(function() kept = ds.zeros(4, 5):keep() end)
    assert.equal(0, kept:sum():item())
  end)
  it("is collected in time without a scope", function()
    local peak = ds.memory().peak
    for _ = 1, 1500 do ds.empty(256, 1024) end -- 1 MB each
    assert(ds.memory().peak - math.max(peak, 0) < 700e6, "the collector was not called")
  end)
  it("keeps one-element tensors anywhere", function()
    local losses = {}
    ds.scope(function()
      for i = 1, 3 do losses[i] = ds.full({ 4 }, i):sum() end
    end)
    assert.equal(12, losses[3]:item())
  end)
end)
