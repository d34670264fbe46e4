--- Every key of the JSON config: type, default, range, what it does, and whether it works here.
--
-- A field is `{ name, type, default, help, … }` as ds/spec.lua describes; the checks, the defaults,
-- `dsrun --config-help` and CONFIG.md are all made from this table. Names and defaults are
-- DeepSpeed's; where its documentation and its code disagree, the documented default stands.

local GPUS = "it comes with GPUs"

-- Keys of sections that exist in full but can't be switched on yet.
local function enabled(what)
  return { "enabled", "boolean", false, "switches " .. what .. " on" }
end

local function switch(name, help, why)
  return { name, "boolean", false, help, status = "later", why = why }
end

-- Accepted and checked, but there is nothing for it to do in this version.
local function idle(name, kind, default, help, more)
  local field = { name, kind, default, help, status = "idle" }
  for key, value in pairs(more or {}) do field[key] = value end
  return field
end

local M = {}

-- Optimizers --------------------------------------------------------------------------------------

local function lr(default) return { "lr", "number", default, "learning rate", min = 0 } end

local function weight_decay(how)
  return { "weight_decay", "number", 0, "weight decay, " .. how, min = 0 }
end

local function betas(second)
  return { "betas", "array", { 0.9, second }, "decay of the running averages", length = 2,
    each = { "beta", "number", min = 0, below = 1 } }
end

-- Arguments of PyTorch's classes that choose an implementation; they change no result.
local function torch_fields(fields)
  for _, name in ipairs { "foreach", "fused", "capturable", "differentiable", "set_grad_none" } do
    fields[#fields + 1] = idle(name, "boolean", nil, "PyTorch's choice of implementation")
  end
  fields[#fields + 1] = { "maximize", "boolean", false, "ascend instead of descend",
    status = "never", why = "negate the loss" }
  fields[#fields + 1] = { "max_grad_norm", "number", 0, "no setting of the optimizer",
    status = "never", why = "use the top-level key gradient_clipping" }
  return fields
end

local function adam(more)
  local fields = {
    lr(1e-3), betas(0.999),
    { "eps", "number", 1e-8, "added to the denominator", min = 0 },
    weight_decay("decoupled from the gradient (AdamW) unless adam_w_mode is false"),
    { "bias_correction", "boolean", true, "correct the averages' bias towards 0 in early steps" },
    { "amsgrad", "boolean", false, "keep the largest second moment", status = "never",
      why = "DeepSpeed's Adam has no AMSGrad either" },
    idle("torch_adam", "boolean", false, "which of DeepSpeed's implementations; there is one here"),
    { "fp32_optimizer_states", "boolean", true, "keep the averages in fp32", status = "later" },
  }
  fields[#fields + 1] = more
  return torch_fields(fields)
end

--- Parameters of the optimizers; `help` says what each is.
M.optimizers = {
  Adam = adam { "adam_w_mode", "boolean", true, "decouple the weight decay (AdamW); false adds " ..
    "it to the gradient (plain Adam with L2)" },
  AdamW = adam { "adam_w_mode", "boolean", true, "always true", status = "idle",
    check = function(v)
      return v == false and 'type "AdamW" decouples the weight decay; use type "Adam" for ' ..
        "adam_w_mode false" or nil
    end },
  SGD = torch_fields {
    lr(1e-3),
    { "momentum", "number", 0, "share of the last update that is kept", min = 0 },
    { "dampening", "number", 0, "share of the gradient that momentum leaves out" },
    weight_decay("added to the gradient"),
    { "nesterov", "boolean", false, "look ahead along the momentum" },
  },
  Lion = torch_fields { lr(1e-3), betas(0.99), weight_decay("decoupled from the gradient") },
  Adagrad = torch_fields {
    lr(1e-2),
    { "eps", "number", 1e-10, "added to the denominator", min = 0 },
    weight_decay("added to the gradient"),
    { "lr_decay", "number", 0, "decay of the learning rate", status = "later",
      why = "use a scheduler" },
    { "initial_accumulator_value", "number", 0, "where the sum of squares begins", min = 0 },
  },
  Lamb = torch_fields {
    lr(1e-3), betas(0.999),
    { "eps", "number", 1e-8, "added to the denominator", min = 0 },
    weight_decay("part of the update whose norm counts"),
    { "bias_correction", "boolean", true, "correct the averages' bias towards 0 in early steps" },
    { "max_coeff", "number", 10, "most that a tensor's ratio ‖weights‖ / ‖update‖ may be",
      min = 0 },
    { "min_coeff", "number", 0.01, "least that it may be", min = 0 },
    { "eps_inside_sqrt", "boolean", false, "add eps under the root", status = "never",
      why = "eps is added to the root" },
    { "amsgrad", "boolean", false, "keep the largest second moment", status = "never",
      why = "DeepSpeed's Lamb has no AMSGrad either" },
  },
  Muon = torch_fields {
    lr(1e-3),
    { "muon_lr", "number", nil, "learning rate of the matrices, instead of lr", min = 0 },
    { "adam_lr", "number", nil, "learning rate of embeddings, output head and what is no " ..
      "matrix, instead of lr", min = 0 },
    { "momentum", "number", 0.95, "share of the last momentum that is kept", min = 0, below = 1 },
    { "nesterov", "boolean", true, "look ahead along the momentum" },
    weight_decay("decoupled from the gradient"),
    { "ns_steps", "integer", 5, "steps of the Newton-Schulz iteration", min = 1, max = 99 },
    { "ns_method", "string", "gram", "how it is done: gram in f32, fewer multiplications for " ..
      "oblong matrices; standard in bf16", enum = { "gram", "standard" } },
    { "betas", "array", { 0.9, 0.95 }, "decay of Adam's averages", length = 2,
      each = { "beta", "number", min = 0, below = 1 } },
    { "eps", "number", 1e-10, "added to Adam's denominator", min = 0 },
    { "bias_correction", "boolean", true, "correct the bias of Adam's averages towards 0" },
  },
}

-- Names of DeepSpeed's classes, in lower case, that its users know these by.
local synonyms = {
  fusedadam = "Adam", cpuadam = "Adam", deepspeedcpuadam = "Adam", fusedlamb = "Lamb",
  fusedlion = "Lion", deepspeedcpulion = "Lion", deepspeedcpuadagrad = "Adagrad",
  muonwithauxadam = "Muon",
}

--- The name that another name of an optimizer stands for; others as they are.
function M.optimizer_synonym(name)
  return synonyms[tostring(name):lower()] or name
end

--- What is wrong between parameters of one optimizer.
M.optimizer_conflicts = {
  SGD = function(p)
    if p.nesterov and not (p.momentum > 0 and p.dampening == 0) then
      return "nesterov needs a momentum above 0 and dampening 0"
    end
  end,
  Lamb = function(p)
    if p.min_coeff > p.max_coeff then
      return ("min_coeff %g is above max_coeff %g"):format(p.min_coeff, p.max_coeff)
    end
  end,
}

--- Optimizers of DeepSpeed that this version knows by name only.
M.optimizers_later = {
  "OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD",
}

-- ZeRO --------------------------------------------------------------------------------------------

local function offload(name, help, fields)
  if not fields.pin then
    table.insert(fields, idle("pin_memory", "boolean", true, "page-locked memory"))
  end
  return { name, "object", nil, help, fields = fields, optional = true }
end

-- stage3_x, also written x
local function stage3(name, kind, default, help, more)
  local field = { "stage3_" .. name, kind, default, help .. " (stage 3)", alias = { name } }
  for key, value in pairs(more or {}) do field[key] = value end
  return field
end

local function idle3(name, kind, default, help, more)
  local field = stage3(name, kind, default, help, more)
  field.status = "idle"
  return field
end

local positive = { min = 1 }
local count = { min = 0 }

local zero_fields = {
  { "stage", "integer", 0, "what is split over the ranks: 0 nothing, 1 the optimizer's state, 2 " ..
    "also the gradients, 3 also the weights. On one rank all are the same.", min = 0, max = 3 },
  { "contiguous_gradients", "boolean", true, "reduce the gradients of several parameters at " ..
    "once; false: each by itself" },
  { "reduce_scatter", "boolean", true, "stages 1 to 3: reduce a gradient at its owner " ..
    "only; false: everywhere, with twice the bytes" },
  { "reduce_bucket_size", "integer", 5e8, "most elements reduced at a time; never more than a " ..
    "million, or one parameter", min = 1 },
  idle("use_multi_rank_bucket_allreduce", "boolean", true, "one bucket for several owners"),
  idle("allgather_partitions", "boolean", true, "all-gather instead of broadcasts"),
  { "allgather_bucket_size", "integer", 5e8, "most elements of updated weights gathered at a " ..
    "time; never more than a bucket", min = 1 },
  { "overlap_comm", "boolean", true, "on GPUs, reduce and gather while kernels run; it changes " ..
    "nothing on CPUs, where both want the same cores. A script that changes gradients itself " ..
    "before step(), at stages 0 and 1, sets it to false." },
  idle("compute_grad_norm", "boolean", true, "the norm is always known here"),
  idle("load_from_fp32_weights", "boolean", true, "resume from the fp32 weights; always so here"),
  idle("elastic_checkpoint", "boolean", false, "resume on another number of ranks; always " ..
    "possible here"),
  offload("offload_param", "at stage 3, keeps the weights off the GPU; on one rank, too", {
    { "device", "string", "none", "where to keep them: \"cpu\" is the host's memory, from which " ..
      "a rank's share comes to the GPU when it is gathered, and to which the update sends it; " ..
      "ahead of its use as far as stage3_prefetch_bucket_size allows (not given: 5e7, or two " ..
      "exchanges). Without a GPU it is there anyway", enum = { "none", "cpu", "nvme" },
      later = { nvme = 'use "cpu"; offload_optimizer can be on a disk' } },
    { "pin_memory", "boolean", true, "page-locked memory, from which weights come while kernels " ..
      "run; false: other memory, which the CPU copies for each transfer" },
    idle("nvme_path", "string", nil, "folder on the disk"),
    idle("buffer_count", "integer", 5, "buffers for a disk", positive),
    idle("buffer_size", "integer", 1e8, "elements of such a buffer", positive),
    idle("max_in_cpu", "integer", 1e9, "elements that are not on the disk", count),
    pin = true,
  }),
  offload("offload_optimizer", "keeps the optimizer's state, and fp32 master weights, elsewhere " ..
    "than beside the weights; at any stage", {
    { "device", "string", "none", "where to: \"nvme\" is a disk, from which state is streamed " ..
      "through each update; \"cpu\" is the host's memory, where it is anyway without a GPU. " ..
      "Both have the same results. For an engine on a GPU the CPU updates: gradients come and " ..
      "weights go block by block, and the host waits for each step's norm and each block's " ..
      "gradient",
      enum = { "none", "cpu", "nvme" } },
    { "nvme_path", "string", nil, "folder on the disk, which must exist: each rank takes room " ..
      "there for its state, in a file that has no name and goes with the process" },
    { "buffer_count", "integer", 4, "blocks of state in memory at a time: of sub_group_size " ..
      "elements, or whole tensors for optimizers that need those, as Lamb and Muon. From 3 on " ..
      "reading, updating and writing go on at once.", min = 1, max = 1024 },
    { "pipeline_read", "boolean", true, "read blocks ahead while others are updated " ..
      "(DeepSpeed's default is false)" },
    { "pipeline_write", "boolean", true, "go on while blocks are written (DeepSpeed's default " ..
      "is false)" },
    idle("fast_init", "boolean", false, "faster start; here it always is"),
    { "ratio", "number", 1, "share of the blocks that is on the disk; the others stay in memory",
      min = 0, max = 1 },
    idle("super_offload", "boolean", false, "SuperOffload"),
    idle("cpuadam_cores_perc", "number", 0.8, "share of the cores", { above = 0, max = 1 }),
  }),
  { "zenflow", "object", nil, "ZenFlow", status = "later", strict = true },
  { "sub_group_size", "integer", 1e9, "most elements updated at a time, at stage 3 and where " ..
    "state is on a disk; there a million, if that is less", min = 1 },
  stage3("prefetch_bucket_size", "integer", nil, "elements gathered ahead of their use. " ..
    "Default: none on CPUs, where nothing runs beside it", count),
  stage3("param_persistence_threshold", "integer", 1e5, "parameters with fewer elements are " ..
    "never split", count),
  stage3("model_persistence_threshold", "number", nil, "most elements that are never split", count),
  stage3("max_live_parameters", "number", 1e9, "most elements that are kept, or gathered " ..
    "ahead", count),
  stage3("max_reuse_distance", "number", nil, "keep a parameter that is used again before " ..
    "so many elements of others. Default: none on CPUs, where gathering is cheap", count),
  { "stage3_gather_16bit_weights_on_model_save", "boolean", false, "save_16bit_model() works at " ..
    "stage 3 too; checkpoints hold whole weights anyway",
    alias = { "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save" } },
  idle3("module_granularity_threshold", "integer", 0, "modules below it are fetched whole", count),
  idle3("use_all_reduce_for_fetch_params", "boolean", false, "fetch by all-reduce"),
  idle3("allgather_sequential", "boolean", false, "fetch one parameter after another"),
  { "ignore_unused_parameters", "boolean", true, "a parameter without a gradient is no error" },
  { "legacy_stage1", "boolean", false, "an old stage 1", status = "never",
    why = "DeepSpeed has removed it" },
  { "round_robin_gradients", "boolean", false, "optimizers that need whole tensors: give " ..
    "buckets to the ranks in turn, instead of an even share of neighbours to each" },
  idle("parameter_alignment", "boolean", false, "align parameters; here they always are"),
  { "zero_hpz_partition_size", "integer", 1, "ranks of a host that share a second copy",
    status = "later", min = 1 },
  switch("zero_quantized_weights", "gather weights as int8"),
  switch("zero_quantized_nontrainable_weights", "the same for frozen weights"),
  switch("zero_quantized_gradients", "reduce gradients as int4"),
  { "zeropp_loco_param", "object", nil, "error feedback of ZeRO++", status = "later",
    strict = true },
  { "mics_shard_size", "integer", -1, "ranks that share one copy (MiCS); -1 is off",
    status = "later" },
  switch("mics_hierarchical_params_gather", "gather in two levels (MiCS)"),
  idle("memory_efficient_linear", "boolean", true, "recompute instead of keeping (stage 3)"),
  idle("override_module_apply", "boolean", true, "a hook into PyTorch"),
  idle("pipeline_loading_checkpoint", "boolean", false, "load layer by layer"),
  idle("log_trace_cache_warnings", "boolean", false, "log when the order of modules changes"),
  idle("enable_sanity_checks", "boolean", false, "further checks"),
  idle("save_muon_momentum_buffer_in_memory", "boolean", false, "keep Muon's momentum in memory"),
  idle("leaf_module", "object", nil, "modules that are fetched whole (stage 3)"),
  idle("cpu_offload", "boolean", false, "old name of offload_optimizer's device \"cpu\"; on a " ..
    "GPU it is refused"),
  { "cpu_offload_param", "boolean", false, "old name of offload_param's device \"cpu\"",
    alias = { "cpu_offload_params" } },
  idle("cpu_offload_use_pin_memory", "boolean", false, "old name of pin_memory"),
}

local fp16_fields = {
  { "enabled", "boolean", false, "weights and activations in fp16 with a loss scale, and fp32 " ..
    "master weights in the optimizer; a step whose gradients hold inf or NaN is skipped" },
  idle("auto_cast", "boolean", false, "cast the model's floating inputs to fp16; here they " ..
    "always are"),
  { "loss_scale", "number", 0, "a fixed loss scale; 0: dynamic", min = 0 },
  { "initial_scale_power", "integer", 16, "the dynamic scale begins with 2 to this power", min = 0,
    max = 126 },
  { "loss_scale_window", "integer", 1000, "steps without overflow before the scale doubles",
    min = 1 },
  { "hysteresis", "integer", 2, "overflows until the scale halves, which it then does at each " ..
    "until it has doubled again; 1 forgives none (DeepSpeed takes 0 and then never halves)",
    min = 1 },
  { "consecutive_hysteresis", "boolean", false, "a step without overflow restores the hysteresis" },
  { "min_loss_scale", "number", 1, "the scale never falls below it: an overflow there ends " ..
    "training", above = 0 },
  { "fp16_master_weights_and_grads", "boolean", false, "master weights and gradients in fp16",
    status = "never", why = "small updates would be lost; master weights are fp32, and " ..
      "data_types.grad_accum_dtype says what gradients are" },
}

local bf16_fields = {
  { "enabled", "boolean", false, "weights, activations and gradients in bf16, with fp32 master " ..
    "weights in the optimizer" },
  idle("immediate_grad_update", "boolean", false, "add up gradients during backward"),
  { "check_grad_overflow", "boolean", true, "a step whose gradients hold inf or NaN is skipped" },
  switch("bf16_master_weights_and_grads", "master weights and gradients in bf16"),
  switch("bf16_optimizer_states", "the optimizer's state in bf16"),
}

local dtype = { "fp32", "fp16", "bf16" }

local function monitor(name, fields)
  return { name, "object", nil, "metrics for " .. name, status = "later",
    why = "the script can log what it likes", fields = fields }
end

local function text(name, default) return { name, "string", default, "as it says" } end

-- A section that is known by its name: off it may hold anything, on it is refused.
local function section(name, help, on)
  return { name, "object", nil, help, status = "later", optional = true, on = on }
end

-- The keys, in the order of the help --------------------------------------------------------------

M.groups = {
  { "Batches", {
    { "train_batch_size", "integer", nil, "samples of one optimizer step on all ranks together: " ..
      "micro batch × accumulation × ranks. Give two of the three (or one); the rest is computed.",
      min = 1 },
    { "train_micro_batch_size_per_gpu", "integer", nil, "samples of one forward pass on one rank",
      min = 1 },
    { "gradient_accumulation_steps", "integer", nil, "forward passes that make up one optimizer " ..
      "step; 1 if it can't be computed from the other two", min = 1 },
    { "managed_gradient_accumulation", "boolean", true, "the engine counts the forward passes",
      status = "later" },
    { "dataloader_drop_last", "boolean", false, "leave out the last batch of an epoch when it " ..
      "is short; otherwise it is used as it is" },
    { "dataloader_shuffle", "boolean", true, "a new order in each epoch, from the seed" },
  } },
  { "Training", {
    { "optimizer", "object", nil, "the optimizer, unless initialize{…} is given one",
      optional = true, fields = {
        { "type", "string", nil, "Adam, AdamW, SGD, Lion, Adagrad, Lamb, Muon (in any case; " ..
          "DeepSpeed's classes as FusedAdam are the same), or a name from ds.optimizer. Adam " ..
          "decouples the weight decay, as in DeepSpeed, unless adam_w_mode is false.",
          required = true },
        { "params", "object", nil, "its parameters: lr, weight_decay, …", optional = true },
        idle("legacy_fusion", "boolean", false, "an old kernel"),
      } },
    { "scheduler", "object", nil, "the learning-rate schedule, unless initialize{…} is given " ..
      "one; it moves on once per optimizer step", optional = true, fields = {
        { "type", "string", nil, "a schedule's name", required = true },
        { "params", "object", nil, "its parameters", optional = true },
      } },
    { "gradient_clipping", "number", 1, "largest global L2 norm of the gradients; 0 does not " ..
      "clip. On by default, as in DeepSpeed.", min = 0 },
    { "seed", "integer", nil, "seed of weights, dropout and data order; not given: that of --seed",
      min = 0 },
    { "device", "string", nil, "where the model lives, and where batches are moved to; not " ..
      "given: what --device says, or the CPU", enum = { "cpu", "cuda" } },
    { "cuda_graph", "boolean", false, "after some steps record forward and backward of a " ..
      "micro-batch as a CUDA graph, and launch that from then on: for models of many small " ..
      "kernels, with batches of one shape and no random numbers; what else a forward does, it " ..
      "does no more" },
    { "nan_check", "boolean", true, "stop with the step's number when the loss is NaN; on a GPU " ..
      "that is known one step later, and nothing was changed" },
    { "steps_per_print", "integer", 10, "optimizer steps between two progress lines; 0: none",
      min = 0 },
  } },
  { "Precision", {
    { "bf16", "object", nil, "bfloat16 training", fields = bf16_fields, alias = { "bfloat16" } },
    { "fp16", "object", nil, "half-precision training", fields = fp16_fields },
    { "data_types", "object", nil, "further types", fields = {
      { "grad_accum_dtype", "string", nil, "type that gradients are kept and added up in: that " ..
        "of the weights or fp32. Not given: that of the weights where one micro-batch makes a " ..
        "step (two bytes a parameter less), fp32 where several are added up, also by boundaries " ..
        "set by hand. Several backwards in one micro-batch add up in the weights' type: then " ..
        "say fp32.", enum = dtype },
      { "param_dtype", "string", nil, "type of the weights: the one that bf16.enabled and " ..
        "fp16.enabled say, which decide; another is an error", enum = dtype },
      { "buffer_dtype", "string", nil, "type of buffers", enum = dtype, status = "later" },
    } },
    section("torch_autocast", "PyTorch's automatic casts"),
    { "amp", "object", nil, "NVIDIA's apex", status = "never", why = "use bf16", optional = true },
  } },
  { "ZeRO", {
    { "zero_optimization", "object", nil, "how state is split over the ranks; true means stage 1",
      fields = zero_fields, convert = function(v)
        if type(v) == "boolean" then return { stage = v and 1 or 0 } end
        return v
      end },
    idle("zero_allow_untested_optimizer", "boolean", false, "every optimizer is allowed here"),
    idle("zero_force_ds_cpu_optimizer", "boolean", true, "which implementation; there is one"),
  } },
  { "Checkpoints", {
    { "checkpoint", "object", nil, "what save_checkpoint and load_checkpoint do", fields = {
      { "keep_last", "integer", 0, "how many checkpoints of a folder are kept, the newest; 0: all",
        min = 0 },
      idle("tag_validation", "string", "WARN", "what to do when ranks disagree about the tag", {
        enum = { "WARN", "IGNORE", "FAIL" },
        convert = function(v) return type(v) == "string" and v:upper() or v end }),
      idle("load_universal", "boolean", false, "load on another number of ranks; always " ..
        "possible here"),
      switch("use_node_local_storage", "each host saves to a disk of its own",
        "all hosts save to a folder that they share"),
      idle("checkpoint_serialization", "boolean", true, "how PyTorch writes files"),
      idle("parallel_write", "object", nil, "parallel writing", { fields = {
        idle("pipeline_stage", "boolean", false, "by pipeline stages"),
      } }),
      { "writer", "object", nil, "how files are written", fields = {
        { "type", "string", "fast", "one kind of writer, past the page cache where the disk " ..
          "allows it", enum = { "fast", "python", "mock" },
          later = { mock = "it writes nothing" } },
        { "decoupled", "boolean", false, "save_checkpoint() returns at once: a thread writes " ..
          "during the next forward and backward" },
        { "io_buffer_size", "integer", 64 * 2 ^ 20, "bytes of what is not written yet that " ..
          "step() copies rather than wait for, with decoupled", min = 0 },
        { "io_buffer_double", "boolean", true, "twice as many" },
        { "show_statistics", "boolean", false, "log what each save in the background took" },
        idle("data_parallel", "string", nil, "which ranks write; always all of them", {
          enum = { "replica", "socket", "machine" } }),
        idle("io_multiplier", "number", 1, "buffers for each file", count),
      } },
    } },
    section("nebula", "Azure's checkpoint service"),
    { "datastates_ckpt", "object", nil, "DataStates checkpoints", status = "later",
      strict = true },
  } },
  { "Communication", {
    idle("prescale_gradients", "boolean", false, "divide before the sum over the ranks; sums " ..
      "are made in fp32 here, which cannot overflow"),
    idle("gradient_predivide_factor", "number", 1, "by how much of it", { above = 0 }),
    { "gradient_allreduce_op", "string", "mean", "how ranks' gradients are combined",
      enum = { "mean", "sum" } },
    { "replica_check_interval", "integer", 0, "optimizer steps between two comparisons of the " ..
      "ranks' weights, which must not differ by a bit; 0: none", min = 0 },
    { "communication_data_type", "string", nil, "type in which gradients travel; not given: the " ..
      "gradients' own. They are summed in fp32 all the same.", enum = dtype },
    idle("seq_parallel_communication_data_type", "string", "fp32", "the same for sequence " ..
      "parallelism", { enum = dtype }),
    switch("sparse_gradients", "send embedding gradients as index and value"),
    idle("disable_allgather", "boolean", false, "unused in DeepSpeed too"),
  } },
  { "Logs and measurements", {
    { "log_level", "string", nil, "lowest level that is logged", status = "later",
      enum = { "debug", "info", "warning", "error", "critical" }, off = { "info" } },
    switch("wall_clock_breakdown", "print the time of forward, backward and step"),
    switch("memory_breakdown", "print the memory of each phase"),
    switch("dump_state", "print the engine's state at the start"),
    idle("timers", "object", nil, "timers", { fields = {
      idle("throughput", "object", nil, "samples per second", { fields = {
        idle("enabled", "boolean", true, "measure it"),
        idle("synchronized", "boolean", true, "wait for the device first"),
      } }),
    } }),
    { "flops_profiler", "object", nil, "counts operations of each module", status = "later",
      fields = {
        enabled "the profiler",
        { "recompute_fwd_factor", "number", 0, "share of forward that is recomputed", min = 0 },
        { "profile_step", "integer", 1, "step to profile", min = 1 },
        { "module_depth", "integer", -1, "depth to print; -1: all", min = -1 },
        { "top_modules", "integer", 1, "modules to print per depth", min = 1 },
        { "detailed", "boolean", true, "print every module" },
        { "output_file", "string", nil, "file to write to" },
      } },
    { "comms_logger", "object", nil, "measures every collective, for ds.comm.log_summary(). " ..
      "{\"enabled\": false} leaves it off (DeepSpeed switches it on).", fields = {
        enabled "the logger",
        { "prof_all", "boolean", true, "all collectives" },
        { "prof_ops", "array", {}, "with prof_all false: only these, as \"all_reduce\"",
          each = { "name", "string", check = function(name)
            return require("ds.comms_logger").check_name(name)
          end } },
        { "verbose", "boolean", false, "print a line for each, on rank 0" },
        { "debug", "boolean", false, "tell them apart by what the program is doing, as " ..
          "engine:step()" },
      } },
    monitor("tensorboard", { enabled "it", text("output_path", ""),
      text("job_name", "DeepSpeedJobName") }),
    monitor("csv_monitor", { enabled "it", text("output_path", ""),
      text("job_name", "DeepSpeedJobName") }),
    monitor("wandb", { enabled "it", text "group", text "team", text("project", "deepspeed") }),
    monitor("comet", { enabled "it",
      { "samples_log_interval", "integer", 100, "samples between two entries", min = 1 },
      text "project", text "workspace", text "api_key", text "experiment_name",
      text "experiment_key", { "online", "boolean", nil, "send at once" }, text "mode" }),
  } },
  { "Memory", {
    { "activation_checkpointing", "object", nil, "recompute activations in backward instead of " ..
      "keeping them. DeepSpeed's keys are settings of ds.checkpoint(f, …), which a model calls " ..
      "itself; `enabled` needs nothing of the model.", fields = {
        { "enabled", "boolean", false, "recompute the model's blocks: the modules of its lists " ..
          "of two or more of one class, as nn.list makes" },
        { "number_checkpoints", "integer", nil, "with `enabled`: so many blocks of each list, " ..
          "the first. Not given: all", min = 1 },
        switch("partition_activations", "split what is kept over the ranks", "it is for ranks " ..
          "that compute on the same inputs, of one model in parts"),
        { "cpu_checkpointing", "boolean", false, "on a GPU, what a checkpoint keeps, its " ..
          "inputs, waits in the host's memory, page-locked: it goes and comes back, one " ..
          "checkpoint ahead, beside the kernels, and the host waits for none of it. Not " ..
          "together with cuda_graph, which is given up with a line. Without a GPU it is there " ..
          "anyway." },
        idle("contiguous_memory_optimization", "boolean", false, "keep it in one buffer; freed " ..
          "blocks are used again by size here, so nothing is scattered"),
        idle("synchronize_checkpoint_boundary", "boolean", false, "wait for the device at each; " ..
          "CPUs run nothing ahead"),
        switch("profile", "print the time of each"),
      } },
    { "aio", "object", nil, "reading and writing state on disks (offload_optimizer)", fields = {
      { "block_size", "integer", 1048576, "bytes of a request, a multiple of 4096", min = 4096,
        max = 2 ^ 30, check = function(v)
          if v % 4096 ~= 0 then return ("%d is no multiple of 4096"):format(v) end
        end },
      { "queue_depth", "integer", 8, "requests that a thread has under way", min = 1, max = 4096 },
      { "intra_op_parallelism", "integer", 1, "threads that read and write. Where the system " ..
        "has no io_uring, there is one for each request that would be under way, at most 16, " ..
        "unless more are asked for.", min = 1, max = 1024, alias = { "thread_count" } },
      { "single_submit", "boolean", false, "a call to the system for each request, instead of " ..
        "one for all that may start" },
      { "overlap_events", "boolean", true, "start requests as soon as others end; false: when " ..
        "all that a thread has under way have ended" },
      switch("use_gds", "read from disks straight into the GPU", GPUS),
    } },
    idle("disable_python_gc", "boolean", false, "there is no Python here"),
  } },
  { "Parallelism", {
    { "data_parallel_size", "integer", nil, "ranks that see different data", status = "later",
      why = "all ranks see different data", off = { 1 }, min = 1 },
    { "sequence_parallel_size", "integer", nil, "ranks that share a sequence", status = "later",
      off = { 1 }, min = 1 },
    section("tensor_parallel", "splits matrices over ranks",
      function(v) return v.autotp_size ~= nil and v.autotp_size ~= 0 and v.autotp_size ~= 1 end),
    { "expert_parallel", "object", nil, "splits experts over ranks", status = "later",
      optional = true },
    switch("use_data_before_expert_parallelism", "order of the ranks"),
    { "pipeline", "object", nil, "settings of a pipeline model; there is none without one",
      fields = {
        { "stages", "integer", nil, "stages", status = "later", off = { 1 }, min = 1 },
        idle("partition", "string", "best", "how layers are split"),
        idle("seed_layers", "boolean", false, "a seed for each layer"),
        idle("activation_checkpoint_interval", "integer", 0, "layers between two checkpoints",
          count),
        idle("pipe_partitioned", "boolean", true, "split activations on the wire"),
        idle("grad_partitioned", "boolean", true, "split their gradients"),
      } },
  } },
  { "Other features of DeepSpeed", {
    section("elasticity", "batch sizes that many numbers of ranks divide"),
    section("autotuning", "search for the fastest settings"),
    section("data_efficiency", "curriculum and data sampling"),
    section("curriculum_learning", "short sequences first"),
    section("progressive_layer_drop", "leave layers out at random"),
    section("hybrid_engine", "train and generate in turn"),
    section("compression_training", "quantise and prune while training"),
    section("quantize_training", "quantise while training"),
    section("weight_quantization", "quantise the weights"),
    section("eigenvalue", "curvature for quantisation"),
    { "sparse_attention", "object", nil, "block-sparse attention", status = "later",
      strict = true },
    section("compile", "DeepCompile", function(v) return v.deepcompile == true end),
    switch("graph_harvesting", "CUDA graphs"),
    idle("vocabulary_size", "integer", nil, "warns when it is no multiple of 8", positive),
  } },
}

--- All top-level fields, in one list.
M.fields = {}
for _, group in ipairs(M.groups) do
  for _, field in ipairs(group[2]) do M.fields[#M.fields + 1] = field end
end

return M
