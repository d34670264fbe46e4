--- Writes text with a model that train.lua has trained.
--
--     dsrun models/gpt/sample.lua --load out/gpt --length 500 --temperature 0.8 --top_k 40
--     dsrun --seed 3 models/gpt/sample.lua --prompt "ROMEO:"

local ds = require "ds"
local ckpt = require "ds.ckpt"
local GPT = require "models.gpt"

local opt = ds.cli { "Write text with a trained model.",
  { "load", "out/gpt", "checkpoint folder" },
  { "length", 500, "characters to write" },
  { "temperature", 0.8, "below 1 bolder guesses are rarer; 0: always the likeliest character" },
  { "top_k", 40, "only the k likeliest characters are drawn; 0: all" },
  { "prompt", "\n", "text to begin with" },
}

-- the checkpoint says what the model is, then fills it
local saved = ckpt.load(opt.load, nil, { only = { "state" } })
if not saved then
  error(("no checkpoint in '%s'; dsrun models/gpt/train.lua makes one"):format(opt.load), 0)
end
local vocabulary = ds.data.vocabulary(saved.client_state.characters)
local model = GPT(saved.client_state.model)
saved:close()

local engine = ds.initialize { model = model, config = { train_micro_batch_size_per_gpu = 1 } }
engine:load_checkpoint(opt.load, nil, { load_module_only = true })
engine:eval()

local prompt = vocabulary:encode(opt.prompt)
local text = model:generate(prompt:reshape(1, -1), opt.length, {
  temperature = opt.temperature,
  top_k = opt.top_k > 0 and opt.top_k or nil,
})
print(vocabulary:decode(text))
