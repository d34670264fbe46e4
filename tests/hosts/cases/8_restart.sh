# Jobs that start again after a failure: with the same hosts, or with those that are left.

# The losses of a job that nothing happens to.
undisturbed() {
  "$dsrun" "$here/job.lua" steps="$1" 2>/dev/null | grep '^step' >expected
}

# Every step was made, those that were made twice alike.
went_on() {
  awk 'NR == FNR { loss[$2] = $3; next } /^step/ { print $1, $2, loss[$2] }' expected out >all
  grep '^step' out >got
  near "losses" all got 1e-5
  [ "$(cut -d ' ' -f 2 got | sort -un | wc -l)" -eq "$(wc -l <expected)" ] || wrong "steps are missing"
}

again() {
  undisturbed 12
  start --hostfile hosts --max_restarts 2 "$here/job.lua" ranks=ranks steps=12 save="$work/saved" \
    rank=3 at=6 how=kill once=1
  gone 20
  ended 0
  counted 1 '^resumed after step 5, restart 1, 4 ranks$' out
  went_on
  grep -q 'rank 3.*signal 9' err || wrong "the failure is not told"
}
it "--max_restarts goes on from the checkpoint" again

in_vain() {
  start --hostfile hosts --max_restarts 2 "$here/job.lua" ranks=ranks steps=12 save="$work/saved" \
    rank=3 at=6 how=exit
  gone 30
  ended 3
  counted 2 '^resumed after step 5' out
  says 'rank 3' worker-2 'code 3'
}
it "--max_restarts ends with the last failure" in_vain

not_after_a_signal() {
  start --hostfile hosts --max_restarts 2 "$here/job.lua" ranks=ranks steps=1000 pause=0.05 \
    save="$work/saved"
  in_step 3
  happens
  kill -TERM "$(cat pid)"
  gone
  ended 143
  counted 0 '^resumed' out
}
it "--max_restarts does not undo SIGTERM" not_after_a_signal

without_a_host() {
  undisturbed 30
  start --hostfile hosts --max_restarts 3 --elastic --min_elastic_nodes 1 "$here/job.lua" \
    ranks=ranks steps=30 pause=0.1 save="$work/saved"
  in_step 5
  happens
  unplug 2
  gone 40
  ended 0
  grep -q '^resumed after step [0-9]*, restart 1, 2 ranks$' out || wrong "not with two ranks"
  went_on
  grep -q 'worker-2' err || wrong "nobody says which host is left out"
}
it "--elastic goes on without a host that is cut off" without_a_host

too_few() {
  start --hostfile hosts --max_restarts 1 --elastic --min_elastic_nodes 2 "$here/job.lua" \
    ranks=ranks steps=1000 pause=0.1 save="$work/saved"
  in_step 3
  happens
  unplug 2
  gone 40
  [ "$code" != 0 ] || wrong "ended with code 0"
  says worker-2
}
it "--min_elastic_nodes is kept" too_few

comes_back() {
  undisturbed 40
  start --hostfile hosts --max_restarts 5 --elastic --min_elastic_nodes 1 "$here/job.lua" \
    ranks=ranks steps=40 pause=0.2 save="$work/saved"
  in_step 3
  unplug 2
  until_so 30 grep -q 'restart 1, 2 ranks' out || wrong "not without worker-2"
  plug 2
  signal KILL 1
  happens
  gone 40
  ended 0
  grep -q 'restart 2, 4 ranks' out || wrong "not with worker-2 again"
  went_on
}
it "--elastic takes a host back" comes_back
