--- Trains a character GPT on Shakespeare, in nanoGPT's setting for a CPU: 90 s on two cores.
--
--     dsrun models/gpt/train.lua                         what `make demo` runs
--     dsrun --seed 1 models/gpt/train.lua --steps 500    another beginning, a shorter run
--     dsrun models/gpt/train.lua --resume                goes on from the last checkpoint
--
-- Everything here may be changed without compiling anything; options follow the script's name.

local ds = require "ds"
local GPT = require "models.gpt"

local here = arg[0]:match "^(.*)/" or "."

local opt = ds.cli { "Train a character GPT.",
  { "data", here .. "/shakespeare.txt", "text file" },
  { "save", "out/gpt", "checkpoint folder" },
  { "resume", false, "go on from the last checkpoint there" },
  { "steps", 2000, "optimizer steps" },
  { "n_layer", 4, "blocks" },
  { "n_head", 4, "attention heads" },
  { "n_embd", 128, "width" },
  { "block_size", 64, "characters that the model sees at once" },
  { "dropout", 0, "share of activations dropped in training" },
  { "warmup", 100, "steps until the learning rate is at its highest" },
  { "weight_decay", 0.1, "on matrices" },
  { "save_every", 500, "steps from one checkpoint to the next" },
  { "sample", 500, "characters printed at the end" },
  { "deepspeed_config", here .. "/ds.json", "batch size, optimizer, clipping, precision" },
}

-- ---- data and model

local train, val = ds.data.text(opt.data, { length = opt.block_size }):split(0.9)

local config = { n_layer = opt.n_layer, n_head = opt.n_head, n_embd = opt.n_embd,
  block_size = opt.block_size, vocab_size = train.vocab_size, dropout = opt.dropout }
local model = GPT(config)
print(train)

--- Linear warm-up, then half a cosine down to a tenth of the rate. A pure function of the step.
local function schedule(step, lr)
  if step < opt.warmup then return lr * (step + 1) / (opt.warmup + 1) end
  local done = math.min(1, (step - opt.warmup) / math.max(1, opt.steps - opt.warmup))
  return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
end

local engine, _, loader = ds.initialize {
  args = opt,
  model = model,
  model_parameters = model:param_groups(opt.weight_decay),
  training_data = train,
  lr_scheduler = schedule,
}

-- what sample.lua needs to make the model again
local client_state = { model = config, characters = train.vocabulary.characters }
if opt.resume then engine:load_checkpoint(opt.save) end

-- ---- training

local progress = ds.progress(engine, opt.steps, { per_sample = opt.block_size, unit = "tok" })

while engine.global_steps < opt.steps do
  local x, y = loader:next()
  local loss = engine(x, y)
  engine:backward(loss)
  if engine:step() then
    progress:update()
    if engine.global_steps % opt.save_every == 0 then
      engine:save_checkpoint(opt.save, nil, client_state)
    end
  end
end
progress:finish()
engine:save_checkpoint(opt.save, nil, client_state)

-- ---- what it learnt

local loss = engine:evaluate(val, { batch_size = 64 })
print(("loss over the whole held-out tenth: %.4f"):format(loss))

engine:eval()
local prompt = train:encode "\n":reshape(1, 1)
local text = model:generate(prompt, opt.sample, { temperature = 0.8, top_k = 40 })
print(train:decode(text))
