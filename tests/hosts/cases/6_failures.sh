# When something fails, every rank everywhere is gone within 10 s; dsrun's code is the first failing
# rank's, and its last lines say which one, where, and what. Ranks 0 and 1 are on worker-1, 2 and 3 on
# worker-2.

# fails CODE HOW PATTERN…: rank 3 does that in the middle of training
fails() {
  expected=$1 how=$2
  shift 2
  train rank=3 at=4 how="$how"
  until_so 20 happened
  happens
  gone
  ended "$expected"
  says 'rank 3' worker-2 "$@"
}

raises() {
  fails 1 raise
  says 'code 1'
  counted 1 'stack traceback' err
  counted 1 'this rank has a problem' err
  grep -q 'job.lua:[0-9]*: this rank has a problem' err || wrong "no place of the error"
}
it "a rank raises" raises
it "a rank exits with 3" fails 3 exit 'code 3'
it "a rank crashes" fails 139 crash 'signal 11' 'Segmentation fault'
it "a rank is killed" fails 137 kill 'signal 9' 'Killed' 'memory runs out'

# Worker-2 has less memory than the others.
memory_runs_out() {
  sshd_off 2
  on 2 sh -c 'ulimit -v 4000000 && exec "$0" -f "$1"' "$state/sshd" "$state/sshd_config"
  cat >greedy.lua <<'END'
local ds = require "ds"
ds.all_reduce(ds.ones(1))
local much = ds.rank() == 3 and ds.zeros(2 ^ 22, 2 ^ 10) -- 16 GiB
ds.all_reduce(ds.ones(1))
print(much)
END
  start --hostfile hosts greedy.lua
  gone
  ended 1
  says 'rank 3 \(worker-2, slot 1\) ended with code 1'
  grep -q 'rank 3 (worker-2, slot 1): .*greedy.lua:3: out of memory: wanted 16.0 GiB' err ||
    wrong "the error does not say where, and how much"
}
if ! "$dsrun" env | grep -q sanitizers; then
  it "a rank runs out of memory" memory_runs_out
else
  skip "a rank runs out of memory" "sanitizers reserve more than any limit"
fi

all_raise() {
  echo 'error "all of us"' >all.lua
  start --hostfile hosts all.lua
  gone
  ended 1
  counted 1 'all of us' err
  counted 1 'stack traceback' err
  says 'rank [0-3]' 'worker-[12]'
}
it "all ranks raise: one traceback" all_raise

launcher_is_killed() {
  train
  in_step 3
  happens
  kill -9 "$(cat pid)"
  gone
}
it "dsrun is killed" launcher_is_killed

mpirun_is_killed() {
  train
  in_step 3
  happens
  kill -9 $(left head | awk '$4 == "mpirun" { print $2 }')
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  says mpirun
}
it "mpirun is killed" mpirun_is_killed

daemon_is_killed() {
  train
  in_step 3
  happens
  kill -9 $(left 2 | awk '$4 == "orted" { print $2 }')
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  says worker-2
}
it "the remote daemon is killed" daemon_is_killed

# Its listener and its sessions: new connections are refused, and those of the job end.
sshd_is_killed() {
  train
  in_step 3
  happens
  on 2 pkill -9 -x sshd
  if until_so 3 test -e code; then
    gone
    [ "$code" != 0 ] || wrong "ended with code 0"
    says worker-2
  else # it needs no ssh any more
    kill -TERM "$(cat pid)"
    gone 15
  fi
}
it "sshd of a host is killed" sshd_is_killed

stopped() {
  train
  in_step 3
  happens
  signal STOP 2
  gone
  ended 124
  says 'rank 2' 'worker-2' 'silent'
}
it "a rank is stopped" stopped

asleep() {
  start --hostfile hosts --timeout 8 "$here/job.lua" ranks=ranks steps=1000 rank=2 at=4 how=sleep
  until_so 20 happened
  happens
  gone 12
  ended 124
  says 'rank 2' 'worker-2' 'job.lua:[0-9]+' 'ranks 0, 1, 3 wait in'
}
it "a rank sleeps" asleep

asked_to_stop() {
  train save="$work/saved"
  in_step 3
  happens
  kill -TERM "$(cat pid)"
  gone
  ended 143
  [ -e saved/latest ] || wrong "nothing was saved"
}
it "SIGTERM: all save and end" asked_to_stop

logs_on_a_full_disk() {
  mkdir full
  mount -t tmpfs -o size=8k full full
  start --hostfile hosts --enable_each_rank_log full "$here/job.lua" ranks=ranks steps=500
  gone 30
  umount full
  ended 0
  grep -q rank_0.log err || wrong "nobody says that the logs are not whole"
  mv err err.full
  start --hostfile hosts --enable_each_rank_log /proc/logs "$here/job.lua" steps=3
  gone 10
  ended 2
  says /proc/logs
  mount -t tmpfs -o nr_inodes=3 full full # room for two logs
  start --hostfile hosts --enable_each_rank_log full "$here/job.lua" steps=3
  gone 10
  umount full
  ended 2
  says 'full/rank_2.log: No space left'
}
it "logs that cannot be written" logs_on_a_full_disk

# A file system whose server has gone, as that of a network: who calls it waits until he is killed.
dead_folder() {
  cat >dead.lua <<'END'
local ffi = require "ffi"
ffi.cdef "int open(const char *, int); int mount(const char *, const char *, const char *, long, const char *);"
local fd = ffi.C.open("/dev/fuse", 2)
local how = ("fd=%d,rootmode=40000,user_id=0,group_id=0"):format(fd)
assert(fd >= 0 and ffi.C.mount("dead", arg[1], "fuse", 0, how) == 0)
print "mounted"
io.stdout:flush()
io.read()
END
  mkdir dead
  mkfifo until
  "$dsrun" dead.lua dead >dead.out 2>&1 <until &
  exec 4>until
  until_so 10 test -s dead.out
  grep -q mounted dead.out
}

logs_on_a_dead_file_system() {
  dead_folder || wrong "it cannot be made: $(cat dead.out)"
  start --hostfile hosts --enable_each_rank_log dead/logs "$here/job.lua" steps=3
  until_so 20 test -e code
  umount -l dead
  exec 4>&-
  gone 12
  ended 2
  says 'dead/logs, the folder for logs, has not answered for 10 s'
}
if [ -w /dev/fuse ]; then
  it "logs on a file system that does not answer" logs_on_a_dead_file_system
else
  skip "logs on a file system that does not answer" "no /dev/fuse here"
fi
