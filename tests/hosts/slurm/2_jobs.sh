# dsrun under SLURM: started by srun itself, and starting ranks inside an allocation.

command -v srun >/dev/null || return

# under COMMAND…: like start, for what is no dsrun
under() {
  rm -f out err code pid
  now && event=$now
  {
    "$@" >out 2>err </dev/null &
    echo $! >pid
    wait $!
    echo $? >code.new
    mv code.new code
  } 2>/dev/null &
  until [ -s pid ]; do sleep 0.01; done
}

# trained RANKS: and as one process does it
trained() {
  "$dsrun" "$here/job.lua" steps=8 2>/dev/null | grep step >expected
  grep step out >got
  near "losses" expected got 1e-5
  grep -q "ranks $1" err || wrong "not with $1 ranks"
}

by_srun() {
  ranks=$1
  shift
  under srun "$@" "$dsrun" "$here/job.lua" steps=8
  gone 30
  ended 0
  trained "$ranks"
}
it "srun on one node" by_srun 2 -N1 -n2
it "srun on two nodes" by_srun 4 -N2 -n4
it "srun, unequal nodes" by_srun 3 -N2 -n3

by_dsrun() {
  ranks=$1 options=$2
  shift 2
  under salloc -Q "$@" "$dsrun" $options "$here/job.lua" steps=8
  gone 30
  ended 0
  trained "$ranks"
}
it "salloc on one node, dsrun --num_procs" by_dsrun 2 "--num_procs 2" -N1 -n2
it "salloc on two nodes, dsrun takes all of it" by_dsrun 4 "--launcher slurm" -N2 -n4
it "salloc on two nodes, dsrun --num_nodes 1" by_dsrun 2 "--num_nodes 1" -N2 -n4

by_sbatch() {
  printf '#!/bin/sh\nexec %s --launcher slurm %s ranks=ranks steps=8\n' "$dsrun" "$here/job.lua" >batch
  under sbatch -Q -W -N2 -n4 -o out -e err batch
  gone 30
  ended 0
  trained 4
}
it "sbatch on two nodes" by_sbatch

srun_fails() {
  under srun --kill-on-bad-exit=1 -N2 -n4 "$dsrun" "$here/job.lua" ranks=ranks steps=1000 pause=0.05 \
    rank=3 at=4 how="$2"
  until_so 20 happened
  happens
  gone
  [ "$code" != 0 ] || wrong "ended with code 0" # srun's is the highest of all tasks', and it kills them
  grep -q -E "worker-2: task 3: ($1)" err || wrong "srun does not say how rank 3 ended"
}
it "a rank under srun exits with 3" srun_fails 'Exited with exit code 3' exit
it "a rank under srun is killed" srun_fails Killed kill

cancelled() {
  under "$@" "$dsrun" $options "$here/job.lua" ranks=ranks steps=1000 pause=0.05 save="$work/saved"
  in_step 3
  happens
  scancel --me 2>/dev/null || scancel -u root
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  [ -e saved/latest ] || wrong "nothing was saved"
}
options=''
it "scancel of srun: all save and end" cancelled srun -N2 -n4
options='--launcher slurm'
it "scancel of salloc: all save and end" cancelled salloc -Q -N2 -n4

# Steps can be asked for in ways that this daemon does not survive.
controller() {
  scontrol ping >out 2>err
  grep -q 'is UP' out || wrong "it has ended: $(tail -n 3 "$cluster/slurmctld.log")"
}
it "SLURM's controller is there after all of it" controller
