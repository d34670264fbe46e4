# Training on several hosts is as one process does it on the same global batch.

demo() {
  cat >ds.json <<'END'
{ "train_batch_size": 12, "gradient_clipping": 1.0, "steps_per_print": 0,
  "optimizer": { "type": "AdamW", "params": { "lr": 1e-2 } } }
END
  set -- "$HOSTS/dsrun/models/gpt/train.lua" --deepspeed_config ds.json --steps 12 --warmup 2 \
    --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --sample 3
  "$dsrun" --seed 1 "$@" --save alone >alone.out 2>&1 || wrong "it does not run alone"
  runs 0 --seed 1 --hostfile hosts "$@" --save together
  for file in alone.out out; do
    cat $file err | sed -n 's/^step \([0-9]*\).12 | loss \([^ ]*\) | lr \([^ ]*\) | norm \([^ ]*\).*/\1 \2 \3 \4/p
      s/^loss over the whole held-out tenth: /0 0 0 /p' | sort -n | uniq >$file.steps
  done
  near "steps" alone.out.steps out.steps 3e-4
  runs 0 "$HOSTS/dsrun/models/gpt/sample.lua" --help
}
it "the demo on 2 hosts of 2 slots is as one process" demo

other_shapes() {
  hostfile pool worker-2:1 worker-3:3 worker-1:2
  "$dsrun" "$here/job.lua" steps=8 gas=2 2>/dev/null | grep step >expected
  runs 0 --hostfile pool "$here/job.lua" steps=8 gas=2
  grep step out >got
  near "losses" expected got 1e-5
  runs 0 --hostfile pool "$HOSTS/dsrun/tests/dist/train.lua" stage=1 steps=4 model=odd
  [ "$(sed -n 's/^weights //p' out | tr ' ' '\n' | uniq -c | tr -s ' ' | cut -d ' ' -f 2)" = 6 ] ||
    wrong "six ranks have not the same weights"
}
it "six ranks on three hosts, ZeRO, accumulation" other_shapes

output() {
  cat >say.lua <<'END'
local rank = os.getenv "RANK"
for i = 1, 2000 do
  io.write(rank, " ", i, " ") io.write(("x"):rep(i % 90), " end\n")
  if i % 10 == 0 then io.stderr:write(rank, " err ", i, "\n") end
end
END
  runs 0 --hostfile hosts --tag-output --enable_each_rank_log logs say.lua
  [ "$(wc -l <out)" -eq 8000 ] || wrong "$(wc -l <out) lines of 8000"
  bad=$(grep -v -E '^\[([0-3])\] \1 [0-9]+ x* end$' out | head -n 3)
  [ -z "$bad" ] || wrong "torn lines: $bad"
  [ "$(grep -c -E '^\[([0-3])\] \1 err [0-9]+0$' err)" -eq 800 ] || wrong "lines of stderr are missing"
  for rank in 0 1 2 3; do
    [ "$(cat logs/*rank*"$rank".log | wc -l)" -eq 2200 ] || wrong "the log of rank $rank is not whole"
  done
}
it "output comes in whole lines, tagged, and into a log for each" output

# More of it than a pipe holds, and later than the ranks are there.
input() {
  echo 'if os.getenv "RANK" == "0" then print(#io.read "*a") end' >read.lua
  { sleep 2; seq 100000; } | "$dsrun" --hostfile hosts read.lua >out 2>err
  [ "$(cat out)" = "$(seq 100000 | wc -c)" ] || wrong "rank 0 reads other than $(seq 100000 | wc -c) bytes"
}
it "standard input goes to rank 0" input
