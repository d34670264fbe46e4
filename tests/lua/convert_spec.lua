--- `dsrun inspect`, `dsrun convert`, engine:save_16bit_model(): what a checkpoint is, and its
-- weights for other tools.

local ds = require "ds"
local json = require "ds.json"
local GPT = require "models.gpt"
local helper = require "tests.lua.helper"

local has, lacks = helper.has, helper.lacks
local place = helper.place { limit = 60 }
local folder = place.folder
teardown(function() place:remove() end)

--- A GPT after two steps: its checkpoint names have a prefix, its matrices lie transposed.
local function trained(config)
  ds.seed(5)
  config.train_batch_size, config.steps_per_print = 2, 0
  config.optimizer = { type = "AdamW", params = { lr = 0.01 } }
  local engine = ds.initialize { config = config,
    model = GPT { n_layer = 1, n_head = 2, n_embd = 24, block_size = 8, vocab_size = 40 } }
  for _ = 1, 2 do
    local x = ds.randint(0, 40, 2, 8)
    engine:backward(engine(x, x))
    engine:step()
  end
  return engine
end

--- A parameter's fp32 master as a tensor.
local function master(engine, name)
  for _, e in ipairs(engine.named) do
    if e.name == name then
      local found
      engine.zero:each_piece(e.parameter, function(piece) found = piece end)
      return found:view(unpack(e.parameter.shape))
    end
  end
end

local engine = trained { bf16 = { enabled = true } }
engine:save_checkpoint(folder .. "/ckpt", nil, { note = "two steps" })
engine:save_checkpoint(folder .. "/ckpt", "other", nil, { save_latest = false })

local proj, wte = "transformer.h.0.mlp.c_proj.weight", "transformer.wte.weight"

describe("dsrun convert", function()
  local function convert(words)
    local code, out, err = place:sh("$D convert " .. words)
    assert(code == 0, err)
    return ds.load(folder .. "/" .. words:match "(%S+)$" .. "/model.safetensors"), out, err
  end

  it("takes the fp32 masters, under the names and in the places of the weights", function()
    local weights, out = convert "ckpt --to fp32 full"
    has(out, "full: ")
    assert.same(master(engine, "h.0.mlp.c_proj.weight"):t():tolist(), weights[proj]:tolist())
    assert.same(master(engine, "wte.weight"):tolist(), weights[wte]:tolist())
    assert.same(master(engine, "ln_f.weight"):tolist(), weights["transformer.ln_f.weight"]:tolist())
    local index, count = json.load(folder .. "/full/model.safetensors.index.json"), 0
    for name in pairs(weights) do
      assert.equal("model.safetensors", index.weight_map[name])
      count = count + 1
    end
    assert.equal(#engine.named, count)
  end)

  it("rounds to 16 bits, and says what fp16 can't hold", function()
    local weights = convert "ckpt --tag other --to bf16 half"
    assert.equal("bf16", weights[proj].dtype)
    assert.same(engine.module.h[1].mlp.c_proj.weight:t():tolist(), weights[proj]:tolist())
    local other = trained {}
    ds.no_grad(function() other.module.ln_f.bias:fill_(1e6) end)
    other:save_checkpoint(folder .. "/large")
    local sixteen, _, err = convert "large --to fp16 sixteen"
    assert.equal("f16", sixteen[wte].dtype)
    assert.equal(math.huge, sixteen["transformer.ln_f.bias"]:tolist()[1])
    has(err, "transformer.ln_f.bias has values beyond 65504")
    lacks(err, "wte")
  end)

  it("says what is wrong", function()
    for words, text in pairs {
      ["none out"] = "the folder 'none' does not exist", ["ckpt"] = "missing argument 'out'",
      ["ckpt out --to fp8"] = "must be one of", ["ckpt out --tag none"] = "/none' does not exist",
      ["ckpt /proc/none"] = "cannot make the folder '/proc/none'" } do
      local code, _, err = place:sh("$D convert " .. words)
      assert.is_true(code == 1 or code == 2)
      has(err, text)
    end
  end)
end)

describe("dsrun inspect", function()
  it("lists what there is, and shows one in full", function()
    local code, out = place:sh "$D inspect ckpt"
    assert.equal(0, code)
    has(out, "ckpt: 2 checkpoints")
    has(out, "every byte matches its hash")
    assert.truthy(out:find("%* global_step2 +step 2 .* latest"), out)
    assert.truthy(out:find("dtype +bf16"), out)
    assert.truthy(out:find(proj .. " +bf16 +%[96 x 24%]"), out)
    assert.truthy(out:find("optim +h%.0%.mlp%.c_proj%.weight +f32 +%[24 x 96%] +27.0 KiB  "
      .. "fp32 exp_avg exp_avg_sq\n"), out)
  end)

  it("gives JSON", function()
    local code, out = place:sh "$D inspect ckpt --tag other --json"
    assert.equal(0, code)
    local all = json.decode(out, "inspect")
    assert.equal(2, #all.checkpoints)
    assert.same({ "other", 2, 1, 0, "bf16", "AdamW" }, { all.shown.tag, all.shown.step,
      all.shown.world_size, all.shown.zero_stage, all.shown.dtype, all.shown.optimizer })
    assert.equal(4 * #engine.named, #all.shown.tensors) -- weights, fp32, exp_avg, exp_avg_sq
    assert.same({}, all.shown.faults)
  end)

  it("ends with 1 and names each file that is damaged", function()
    local copy = folder .. "/broken"
    os.execute(("cp -r '%s/ckpt' '%s'"):format(folder, copy))
    local path = copy .. "/global_step2/optim/rank-0.safetensors"
    local text = helper.read(path)
    helper.write(path, text:sub(1, -2) .. string.char((text:byte(-1) + 1) % 256))
    helper.write(copy .. "/global_step2/state.json", "{}")
    local code, out = place:sh "$D inspect broken"
    assert.equal(1, code)
    has(out, "rank-0.safetensors' is damaged: its hash is")
    has(out, "state.json' has 2 bytes and should have")
    assert.equal(0, (place:sh "$D inspect broken --tag other"))
    local none, _, err = place:sh "$D inspect full"
    assert.equal(1, none)
    has(err, "no checkpoint that `latest` names")
    none, _, err = place:sh "$D inspect nowhere"
    assert.equal(1, none)
    has(err, "the folder 'nowhere' does not exist")
  end)
end)

describe("save_16bit_model", function()
  it("saves the weights as they are in 16 bits, alone, with an index", function()
    assert.is_true(engine:save_16bit_model(folder .. "/plain"))
    local weights = ds.load(folder .. "/plain/model.safetensors")
    assert.equal("bf16", weights[proj].dtype)
    assert.same(engine.module.h[1].mlp.c_proj.weight:t():tolist(), weights[proj]:tolist())
    local index = json.load(folder .. "/plain/model.safetensors.index.json")
    assert.equal("model.safetensors", index.weight_map[wte])
  end)

  it("gathers what is sharded at stage 3 if the config allows it, else saves nothing", function()
    local script = place:write("three.lua", [[
      local ds = require "ds"
      local model = ds.nn.Linear(32, 16)
      local engine = ds.initialize { model = model, config = { train_batch_size = ds.world_size(),
        bf16 = { enabled = true }, optimizer = { type = "SGD" }, zero_optimization = { stage = 3,
        stage3_param_persistence_threshold = 0,
        stage3_gather_16bit_weights_on_model_save = arg[1] == "yes" } } }
      local saved = engine:save_16bit_model("three-" .. arg[1])
      local sum = ds.zero.get_full(model.weight):to("bf16"):float():sum():item()
      if ds.rank() == 0 then print(saved, sum) end]])
    local code, out, err = place:sh(("OMP_NUM_THREADS=1 $D --num_gpus 2 '%s' yes"):format(script))
    assert.equal(0, code, err)
    local weight = ds.load(folder .. "/three-yes/model.safetensors").weight
    assert.equal("bf16", weight.dtype)
    assert.equal(("true\t%s\n"):format(weight:float():sum():item()), out)
    code, out, err = place:sh(("OMP_NUM_THREADS=1 $D --num_gpus 2 '%s' no"):format(script))
    assert.equal(0, code)
    has(out, "false")
    has(err, "save_16bit_model: nothing is saved")
    assert.is_nil(helper.read(folder .. "/three-no/model.safetensors"))
  end)

  it("rounds fp32 weights to bf16, and can leave out what is frozen", function()
    ds.seed(6)
    local model = GPT { n_layer = 1, n_head = 2, n_embd = 24, block_size = 8, vocab_size = 40 }
    model.wte.weight.requires_grad = false
    local other = ds.initialize { model = model, config = { train_batch_size = 1,
      optimizer = { type = "SGD" } } }
    other:save_16bit_model(folder .. "/frozen", "w.safetensors",
      { exclude_frozen_parameters = true })
    local weights = ds.load(folder .. "/frozen/w.safetensors")
    assert.is_nil(weights[wte])
    assert.same(model.h[1].mlp.c_proj.weight:to("bf16"):t():tolist(), weights[proj]:tolist())
    helper.says("can't name the weights", other.save_16bit_model, other, folder, "../x.safetensors")
    helper.says("can't name the weights", other.save_16bit_model, other, folder, "model.bin")
    helper.says("expects a folder", other.save_16bit_model, other)
  end)
end)
