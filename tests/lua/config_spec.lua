--- The config: completed, or refused with file, line and a way out.

local config = require "ds.config"
local config_help = require "ds.config_help"

local path = os.tmpname()
local root = require("tests.lua.helper").root

local function write(text)
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
end

local function load(text, options)
  write(text)
  return config.load(path, options)
end

-- The lines of the error, with the file called ds.json.
local function problems(text, options)
  local ok, message = pcall(load, text, options)
  assert.is_false(ok, "was accepted: " .. text)
  local out = {}
  for line in (message .. "\n"):gmatch "(.-)\n" do
    if line:sub(1, #path) == path then line = "ds.json" .. line:sub(#path + 1) end
    out[#out + 1] = line
  end
  return out
end

-- One key in an otherwise good config: the problem without its place, or nil.
local function problem_of(text)
  local ok, message = pcall(load, '{"train_batch_size": 8, ' .. text .. "}")
  return not ok and message:gsub("^[^:]*:%d+: ", "") or nil
end

describe("config", function()
  teardown(function() os.remove(path) end)

  it("fills in every default", function()
    local c = load '{"train_batch_size": 8}'
    assert.equal(1, c.gradient_clipping)
    assert.equal(10, c.steps_per_print)
    assert.equal(0, c.zero_optimization.stage)
    assert.equal(5e8, c.zero_optimization.reduce_bucket_size)
    assert.is_false(c.bf16.enabled)
    assert.is_true(c.bf16.check_grad_overflow)
    assert.equal(16, c.fp16.initial_scale_power)
    assert.equal(0, c.checkpoint.keep_last)
    assert.equal("WARN", c.checkpoint.tag_validation)
    assert.is_true(c.dataloader_shuffle)
    assert.is_true(c.nan_check)
    assert.is_nil(c.optimizer)
    assert.is_nil(c.zero_optimization.offload_optimizer)
  end)

  it("does not share its tables with the source or the schema", function()
    local source = { train_batch_size = 8,
      optimizer = { type = "Adam", params = { betas = { 0.5, 0.6 } } } }
    local plain = { train_batch_size = 8, optimizer = { type = "Adam" } }
    local c = config.load(source)
    c.optimizer.params.betas[1], c.zero_optimization.stage = 0, 3
    assert.same({ 0.5, 0.6 }, source.optimizer.params.betas)
    assert.is_nil(source.zero_optimization)
    assert.equal(0, config.load(source).zero_optimization.stage)
    config.load(plain).optimizer.params.betas[1] = 0
    assert.equal(0.9, config.load(plain).optimizer.params.betas[1])
  end)

  it("lists all problems by line", function()
    assert.same({
      'ds.json:2: how many samples a step takes is not given; add ' ..
        '"train_micro_batch_size_per_gpu" (samples of one forward pass on one rank) or ' ..
        '"train_batch_size" (of one step on all ranks)',
      'ds.json:3: unknown key "train_micro_batch_size" (did you mean ' ..
        '"train_micro_batch_size_per_gpu"?)',
      'ds.json:5: optimizer.params.lr: expected a number of at least 0, got "1e-3" (a string; ' ..
        "drop the quotes)",
      'ds.json:6: unknown key "optimizer.params.beta" (did you mean "betas"?)',
      "ds.json:8: zero_optimization.stage: expected an integer from 0 to 3, got 4",
    }, problems [[// settings
{
  "train_micro_batch_size": 8,
  "optimizer": { "type": "Adam", "params": {
    "lr": "1e-3",
    "beta": [0.9, 0.99] } },
  "zero_optimization": {
    "stage": 4 },
}]])
  end)

  it("points at the user's line and the key's path for a table", function()
    local here = debug.getinfo(1, "l").currentline + 1
    local ok, message = pcall(function() config.load { train_batch_size = 8, sede = 1 } end)
    assert.is_false(ok)
    assert.matches("config_spec.lua:" .. here .. ': config: unknown key "sede" %(did you mean ' ..
      '"seed"%?%)', message)
    ok, message = pcall(config.load, { train_batch_size = 8,
      optimizer = { type = "Adam", params = { lr = -1 } } })
    assert.is_false(ok)
    assert.matches("config: optimizer.params.lr: expected a number of at least 0, got %-1", message)
  end)

  it("refuses files that are no config", function()
    assert.same({ "ds.json:1: expected an object { … }, got [1]" }, problems "[1]")
    assert.same({ 'ds.json:2: duplicate key "train_batch_size"' },
      problems '{"train_batch_size": 1,\n"train_batch_size": 2}')
    assert.same({ "ds.json:1: the file is empty" }, problems "")
    local ok, message = pcall(config.load, "/nowhere/ds.json")
    assert.is_false(ok)
    assert.matches("config: /nowhere/ds.json: No such file or directory", message)
    ok, message = pcall(config.load, 5)
    assert.is_false(ok)
    assert.matches("expected the path of a JSON file or a table, got number", message)
  end)

  it("says what each type and range expects", function()
    for text, expected in pairs {
      ['"gradient_clipping": -1'] = "gradient_clipping: expected a number of at least 0, got -1",
      ['"steps_per_print": 1.5'] = "steps_per_print: expected an integer of at least 0, got 1.5",
      ['"bf16": {"enabled": 1}'] = "bf16.enabled: expected true or false, got 1",
      ['"bf16": true'] = "bf16: expected an object { … }, got true",
      ['"checkpoint": {"tag_validation": "NO"}'] =
        'checkpoint.tag_validation: expected one of "WARN", "IGNORE", "FAIL", got "NO" (a string)',
      ['"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}'] =
        "optimizer.params.betas: expected an array of 2 numbers of at least 0 and below 1, got [0",
      ['"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}'] =
        "optimizer.params.betas[2]: expected a number of at least 0 and below 1, got 1",
      ['"fp16": {"hysteresis": 0}'] = "fp16.hysteresis: expected an integer of at least 1, got 0",
      ['"optimizer": {"params": {}}'] = "optimizer.type is missing",
      ['"stage": 1'] = 'unknown key "stage" (did you mean "zero_optimization.stage"?)',
      ['"lr": 1'] = 'unknown key "lr" (did you mean "optimizer.params.lr"?)',
      ['"xyzzy": 1'] = 'unknown key "xyzzy"',
    } do
      local message = problem_of(text)
      assert.is_truthy(message and message:sub(1, #expected) == expected, tostring(message))
    end
  end)
end)

describe("the batch triple", function()
  local cases = { -- batch, micro, steps, ranks -> batch, micro, steps
    { { 32, 16, 1 }, 2, { 32, 16, 1 } }, { { 32, 8, 2 }, 2, { 32, 8, 2 } },
    { { 32, 8 }, 2, { 32, 8, 2 } }, { { 32, nil, 4 }, 2, { 32, 4, 4 } },
    { { nil, 4, 3 }, 2, { 24, 4, 3 } }, { { 32 }, 2, { 32, 16, 1 } },
    { { nil, 4 }, 2, { 8, 4, 1 } }, { { 12 }, 1, { 12, 12, 1 } },
    { { 33, 17, 2 }, 2, "train_batch_size 33 ≠ micro 17 × accumulation 2 × ranks 2 = 68; drop " ..
      "one of the three and it will be computed" },
    { { 512, 16, 5 }, 8, "train_batch_size 512 ≠ micro 16 × accumulation 5 × ranks 8 = 640; " ..
      "drop one of the three and it will be computed" },
    { { 32, 18, 1 }, 2, "≠ micro 18 × accumulation 1 × ranks 2 = 36" },
    { { 33, 16 }, 2, "train_batch_size 33 is not a multiple of micro 16 × ranks 2 = 32, so " ..
      "gradient_accumulation_steps can't be computed" },
    { { 8, 16 }, 1, "train_batch_size 8 is not a multiple of micro 16 × ranks 1 = 16" },
    { { 33, nil, 2 }, 1, "train_batch_size 33 is not a multiple of accumulation 2 × ranks 1 = " ..
      "2, so train_micro_batch_size_per_gpu can't be computed" },
    { { nil, nil, 2 }, 1, 'add "train_micro_batch_size_per_gpu"' },
    { {}, 1, 'add "train_micro_batch_size_per_gpu"' },
  }
  local names = { "train_batch_size", "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps" }

  it("is completed, or refused with the arithmetic", function()
    for _, case in ipairs(cases) do
      local source = {}
      for i = 1, 3 do source[names[i]] = case[1][i] end
      local ok, result = pcall(config.load, source, { world_size = case[2] })
      if type(case[3]) == "table" then
        assert.is_true(ok, result)
        for i = 1, 3 do assert.equal(case[3][i], result[names[i]]) end
      else
        assert.is_false(ok)
        assert.is_truthy(result:find(case[3], 1, true), result)
      end
    end
  end)

  it("takes \"auto\" and null for not given", function()
    local c = load [[{"train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto",
      "steps_per_print": null}]]
    assert.equal(8, c.train_micro_batch_size_per_gpu)
    assert.equal(10, c.steps_per_print)
  end)

  it("is named by the line of the key that is given", function()
    assert.matches("^ds.json:3: train_batch_size 5 ≠", problems [[{
      "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2,
      "train_batch_size": 5}]][1])
  end)
end)

describe("optimizer and scheduler", function()
  local function optimizer(type, params, options)
    local source = { train_batch_size = 8, optimizer = { type = type, params = params } }
    return config.load(source, options).optimizer
  end

  it("completes DeepSpeed's defaults", function()
    assert.same({ type = "Adam", legacy_fusion = false,
      params = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
        bias_correction = true, adam_w_mode = true } }, optimizer "adam")
    assert.same({ lr = 0.5, betas = { 0.9, 0.99 }, weight_decay = 0 },
      optimizer("LION", { lr = 0.5 }).params)
    assert.same({ lr = 1e-3, momentum = 0.9, dampening = 0, weight_decay = 0, nesterov = true },
      optimizer("sgd", { momentum = 0.9, nesterov = true }).params)
    assert.equal("Adagrad", optimizer("ADAGRAD").type)
    assert.same({ type = "Lamb", legacy_fusion = false,
      params = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0,
        bias_correction = true, max_coeff = 10, min_coeff = 0.01 } }, optimizer "lamb")
    assert.same({ lr = 1e-3, momentum = 0.95, nesterov = true, weight_decay = 0, ns_steps = 5,
      ns_method = "gram", betas = { 0.9, 0.95 }, eps = 1e-10, bias_correction = true,
      muon_lr = 0.02 }, optimizer("MUON", { muon_lr = 0.02 }).params)
    for name, expected in pairs { FusedAdam = "Adam", deepspeedcpuadam = "Adam",
      FUSEDLAMB = "Lamb", DeepSpeedCPUAdagrad = "Adagrad", FusedLion = "Lion" } do
      assert.equal(expected, optimizer(name).type)
    end
    assert.is_nil(optimizer("AdamW", { adam_w_mode = true, torch_adam = true }).params.adam_w_mode)
  end)

  it("refuses what an optimizer doesn't have", function()
    for text, expected in pairs {
      ['"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}'] =
        "optimizer.params.max_grad_norm 1: not supported: use the top-level key gradient_clipping",
      ['"optimizer": {"type": "Adam", "params": {"amsgrad": true}}'] =
        "optimizer.params.amsgrad true: not supported",
      ['"optimizer": {"type": "AdamW", "params": {"adam_w_mode": false}}'] = 'use type "Adam"',
      ['"optimizer": {"type": "SGD", "params": {"nesterov": true}}'] =
        "nesterov needs a momentum above 0",
      ['"optimizer": {"type": "Lion", "params": {"eps": 1}}'] =
        'unknown key "optimizer.params.eps"',
      ['"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1}}'] =
        "optimizer.params.max_grad_norm 1: not supported: use the top-level key gradient_clipping",
      ['"optimizer": {"type": "Lamb", "params": {"min_coeff": 2, "max_coeff": 1}}'] =
        "optimizer.params: min_coeff 2 is above max_coeff 1",
      ['"optimizer": {"type": "Muon", "params": {"ns_method": "svd"}}'] =
        "optimizer.params.ns_method: expected",
      ['"optimizer": {"type": "Muon", "params": {"momentum": 1}}'] =
        "optimizer.params.momentum: expected a number of at least 0 and below 1, got 1",
      ['"optimizer": {"type": "Muon", "params": {"lr_muon": 1}}'] =
        'unknown key "optimizer.params.lr_muon"',
      ['"optimizer": {"type": "AdamM"}'] = 'unknown optimizer "AdamM" (did you mean "Adam"?)',
      ['"optimizer": {"type": "OneBitAdam"}'] =
        'optimizer.type "OneBitAdam": not in this version yet',
      ['"scheduler": {"type": "Warmup"}'] = 'scheduler.type: unknown schedule "Warmup"',
      ['"scheduler": {"type": "WarmupDecayLR"}'] = "scheduler.params.total_num_steps is missing",
    } do
      local message = problem_of(text)
      assert.is_truthy(message and message:find(expected, 1, true), tostring(message))
    end
  end)

  it("knows optimizers that the script registers, by their defaults", function()
    local registry = { SignSGD = { defaults = { lr = 1e-4, momentum = 0.9 } } }
    assert.same({ lr = 1e-4, momentum = 0.5 },
      optimizer("signsgd", { momentum = 0.5 }, { optimizers = registry }).params)
    local ok, message = pcall(optimizer, "SignSGD", { momentun = 0.5 }, { optimizers = registry })
    assert.is_false(ok)
    assert.matches('unknown key "optimizer.params.momentun" %(did you mean "momentum"%?%)', message)
  end)

  it("completes the schedule's parameters", function()
    local c = load [[{"train_batch_size": 8, "scheduler": {"type": "WarmupLR",
      "params": {"warmup_max_lr": "auto"}}}]]
    assert.same({ type = "WarmupLR", params = { warmup_min_lr = 0, warmup_num_steps = 1000,
      warmup_type = "log" } }, c.scheduler)
  end)
end)

describe("DeepSpeed's keys", function()
  -- every key of DeepSpeed's config, section by section
  local keys = {
    [""] = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps " ..
      "managed_gradient_accumulation steps_per_print optimizer scheduler fp16 bf16 bfloat16 " ..
      "gradient_clipping zero_optimization checkpoint wall_clock_breakdown prescale_gradients " ..
      "gradient_predivide_factor gradient_allreduce_op communication_data_type " ..
      "seq_parallel_communication_data_type data_types zero_allow_untested_optimizer " ..
      "zero_force_ds_cpu_optimizer activation_checkpointing tensorboard csv_monitor wandb comet " ..
      "flops_profiler comms_logger timers dump_state memory_breakdown log_level " ..
      "dataloader_drop_last elasticity autotuning data_efficiency curriculum_learning " ..
      "torch_autocast amp aio compile tensor_parallel expert_parallel " ..
      "use_data_before_expert_parallelism sequence_parallel_size data_parallel_size pipeline " ..
      "hybrid_engine compression_training quantize_training weight_quantization eigenvalue " ..
      "progressive_layer_drop sparse_attention sparse_gradients disable_allgather " ..
      "graph_harvesting vocabulary_size nebula datastates_ckpt",
    ["fp16."] = "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis " ..
      "consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads",
    ["bf16."] = "enabled immediate_grad_update check_grad_overflow " ..
      "bf16_master_weights_and_grads bf16_optimizer_states",
    ["zero_optimization."] = "stage contiguous_gradients reduce_scatter reduce_bucket_size " ..
      "allgather_bucket_size allgather_partitions use_multi_rank_bucket_allreduce overlap_comm " ..
      "load_from_fp32_weights elastic_checkpoint offload_param offload_optimizer sub_group_size " ..
      "stage3_prefetch_bucket_size prefetch_bucket_size stage3_param_persistence_threshold " ..
      "param_persistence_threshold stage3_model_persistence_threshold " ..
      "stage3_max_live_parameters stage3_max_reuse_distance " ..
      "stage3_gather_16bit_weights_on_model_save " ..
      "stage3_gather_fp16_weights_on_model_save stage3_module_granularity_threshold " ..
      "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential " ..
      "ignore_unused_parameters legacy_stage1 round_robin_gradients zero_hpz_partition_size " ..
      "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients " ..
      "zeropp_loco_param mics_shard_size mics_hierarchical_params_gather " ..
      "memory_efficient_linear override_module_apply pipeline_loading_checkpoint " ..
      "log_trace_cache_warnings " ..
      "enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module zenflow cpu_offload " ..
      "cpu_offload_param cpu_offload_use_pin_memory",
    ["zero_optimization.offload_param."] = "device nvme_path buffer_count buffer_size " ..
      "max_in_cpu pin_memory",
    ["zero_optimization.offload_optimizer."] = "device nvme_path buffer_count pin_memory " ..
      "pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc",
    ["checkpoint."] = "tag_validation load_universal use_node_local_storage parallel_write " ..
      "checkpoint_serialization writer",
    ["activation_checkpointing."] = "partition_activations cpu_checkpointing " ..
      "contiguous_memory_optimization synchronize_checkpoint_boundary profile number_checkpoints",
    ["flops_profiler."] = "enabled recompute_fwd_factor profile_step module_depth top_modules " ..
      "detailed output_file",
    ["comms_logger."] = "enabled prof_all prof_ops verbose debug",
    ["tensorboard."] = "enabled output_path job_name",
    ["wandb."] = "enabled group team project",
    ["data_types."] = "grad_accum_dtype param_dtype buffer_dtype",
    ["aio."] = "block_size queue_depth intra_op_parallelism thread_count single_submit " ..
      "overlap_events use_gds",
    ["pipeline."] = "stages partition seed_layers activation_checkpoint_interval " ..
      "pipe_partitioned grad_partitioned",
  }

  it("are all known", function()
    for section, names in pairs(keys) do
      for name in names:gmatch "%S+" do
        assert.is_truthy(config_help.text(section .. name), section .. name)
      end
    end
  end)

  it("are refused while this version lacks them, and say so", function()
    for text, expected in pairs {
      ['"flops_profiler": {"enabled": true}'] = "flops_profiler: not in this version yet",
      ['"fp16": {"enabled": true, "fp16_master_weights_and_grads": true}'] =
        "fp16.fp16_master_weights_and_grads true: not supported: small updates would be lost",
      ['"wall_clock_breakdown": true'] = "wall_clock_breakdown true: not in this version yet",
      ['"zero_optimization": {"offload_param": {"device": "nvme"}}'] =
        'zero_optimization.offload_param.device "nvme": not in this version yet (use "cpu"; ',
      ['"aio": {"use_gds": true}'] = "aio.use_gds true: not in this version yet (it comes with",
      ['"zero_optimization": {"zenflow": {}}'] = "zero_optimization.zenflow: not in this version",
      ['"amp": {"enabled": true}'] = "amp: not supported: use bf16",
      ['"curriculum_learning": {"enabled": true, "x": 1}'] = "curriculum_learning: not in this",
      ['"compression_training": {"layer_reduction": {"enabled": true}}'] =
        "compression_training: not in this version yet",
      ['"tensor_parallel": {"autotp_size": 2}'] = "tensor_parallel: not in this version yet",
      ['"compile": {"deepcompile": true}'] = "compile: not in this version yet",
      ['"sparse_attention": {"mode": "fixed"}'] = "sparse_attention: not in this version yet",
      ['"sequence_parallel_size": 2'] = "sequence_parallel_size 2: not in this version yet",
    } do
      local message = problem_of(text)
      assert.is_truthy(message and message:find(expected, 1, true), tostring(message))
    end
  end)

  it("about precision fit together", function()
    for text, expected in pairs {
      ['"fp16": {"enabled": true}, "bf16": {"enabled": true}'] =
        "fp16.enabled and bf16.enabled are both true; choose one",
      ['"fp16": {"enabled": true, "initial_scale_power": 1, "min_loss_scale": 4}'] =
        "fp16: the loss scale begins with 2^1 = 2 (initial_scale_power), below min_loss_scale 4",
      ['"data_types": {"grad_accum_dtype": "bf16"}'] = "data_types.grad_accum_dtype: gradients " ..
        "of fp32 weights can't be kept in bf16; choose \"fp32\"",
      ['"fp16": {"enabled": true}, "data_types": {"grad_accum_dtype": "bf16"}'] =
        "of fp16 weights can't be kept in bf16; choose \"fp16\" or \"fp32\"",
      ['"data_types": {"param_dtype": "bf16"}'] =
        'data_types.param_dtype: "bf16", but weights are fp32; set bf16.enabled',
      ['"fp16": {"enabled": true}, "data_types": {"param_dtype": "fp32"}'] =
        'data_types.param_dtype: "fp32", but weights are fp16; drop fp16.enabled',
      ['"data_types": {"grad_accum_dtype": "fp8"}'] = 'expected one of "fp32", "fp16", "bf16"',
      ['"fp16": {"enabled": true, "loss_scale": true}'] = "fp16.loss_scale: expected a number",
      ['"fp16": {"enabled": true, "initial_scale_power": "x", "min_loss_scale": {}}'] =
        "fp16.initial_scale_power: expected an integer",
    } do
      local message = problem_of(text)
      assert.is_truthy(message and message:find(expected, 1, true), tostring(message))
    end
    for _, text in ipairs {
      '"fp16": {"enabled": true}', '"fp16": {"enabled": true, "loss_scale": 2, "auto_cast": true}',
      '"fp16": {"enabled": true, "initial_scale_power": 1, "min_loss_scale": 4, "loss_scale": 1}',
      '"bf16": {"enabled": true}, "data_types": {"grad_accum_dtype": "bf16"}',
      '"fp16": {"enabled": true}, "data_types": {"grad_accum_dtype": "fp32"}',
      '"data_types": {"param_dtype": "fp32"}',
      '"bf16": {"enabled": true}, "data_types": {"param_dtype": "bf16"}',
      '"data_types": {"grad_accum_dtype": null}', '"data_types": {"grad_accum_dtype": "auto"}',
    } do
      assert.is_nil(problem_of(text), text)
    end
  end)

  it("are accepted where they have no effect", function()
    for _, text in ipairs {
      '"flops_profiler": {"enabled": false, "profile_step": 5}',
      '"comms_logger": {"enabled": false}',
      '"fp16": {"enabled": false, "loss_scale": 0}', '"wall_clock_breakdown": false',
      '"zero_allow_untested_optimizer": true', '"prescale_gradients": true',
      '"zero_optimization": {"stage": 1, "overlap_comm": true, "reduce_bucket_size": 5e8}',
      '"zero_optimization": {"offload_param": {"device": "none"}}', '"zero_optimization": true',
      '"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "cpu_offload": true}',
      '"elasticity": {"enabled": false, "max_train_batch_size": 2000}',
      '"sequence_parallel_size": 1', '"amp": {"enabled": false}',
      '"compression_training": {"layer_reduction": {"enabled": false}}',
      '"tensor_parallel": {"autotp_size": 1}', '"compile": {"deepcompile": false}',
    } do
      assert.is_nil(problem_of(text), text)
    end
    local c = load '{"train_batch_size": 8, "zero_optimization": true}'
    assert.equal(1, c.zero_optimization.stage)
    assert.equal("FAIL", load('{"train_batch_size": 8, "checkpoint": {"tag_validation": "fail"}}')
      .checkpoint.tag_validation)
  end)

  it("may be written under their other names, once", function()
    assert.is_true(load('{"train_batch_size": 8, "bfloat16": {"enabled": true}}').bf16.enabled)
    assert.equal(3, load('{"train_batch_size": 8, "zero_optimization": {"max_live_parameters": 3}}')
      .zero_optimization.stage3_max_live_parameters)
    assert.equal('"bf16" and "bfloat16" mean the same; keep one',
      problem_of '"bf16": {"enabled": true}, "bfloat16": {"enabled": true}')
  end)
end)

describe("config help", function()
  it("lists every key and explains one", function()
    local all = config_help.text()
    for _, name in ipairs { "train_batch_size", "zero_optimization", "nan_check", "WarmupLR" } do
      assert.is_truthy(all:find(name, 1, true), name)
    end
    local one = config_help.text "zero_optimization.stage"
    assert.matches("Takes an integer from 0 to 3. Default: 0.", one)
    assert.equal(one, config_help.text "stage")
    assert.matches("warmup_num_steps = 1000", config_help.text "WarmupLR")
    assert.matches("betas = %[0.9, 0.999%]", config_help.text "adamw")
  end)

  it("suggests what was meant", function()
    local ok, message = config.help "gradient_cliping"
    assert.is_nil(ok)
    assert.equal('unknown config key "gradient_cliping" (did you mean "gradient_clipping"?)',
      message)
    assert.matches('did you mean "stage"', select(2, config.help "stag"))
  end)

  it("no line is wider than 100 columns, and every key has words", function()
    for line in config_help.text():gmatch "[^\n]+" do assert.is_true(#line <= 110, line) end
    for line in config.markdown():gmatch "[^\n]+" do
      if line:find "^| `" then assert.is_nil(line:find "| *|$", line) end
    end
  end)

  it("CONFIG.md is current", function()
    local file = assert(io.open(root .. "lua/ds/CONFIG.md"))
    local text = file:read "*a"
    file:close()
    assert.is_true(text == config.markdown(),
      "run: dsrun -e 'io.write(require(\"ds.config\").markdown())' > lua/ds/CONFIG.md")
  end)
end)
