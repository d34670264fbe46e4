# When a network fails: as in 6_failures.sh, on both of its sides.

# network WAY HOST
network() {
  train
  in_step 3
  happens
  "$1" "$2"
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  says "worker-$2" 'rank'
}
it "the cable of worker-2 is pulled" network unplug 2
it "the cable of worker-1 is pulled" network unplug 1
it "packets of worker-2 are lost" network lose 2

# at_the_start PATTERN: the cable is pulled when worker-2 has such a process
at_the_start() {
  echo 'os.execute "sleep 30"' >wait.lua
  start --hostfile hosts wait.lua
  until_so 10 sh -c '. "$0/verbs.sh"; left 2 | grep -q -e "$1"' "$here" "$1" ||
    wrong "worker-2 has had no process '$1'"
  happens
  unplug 2
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  says worker-2
}
it "the cable is pulled while daemons start" at_the_start ' orted'
it "the cable is pulled while ranks start" at_the_start 'dsrun --hostfile .*wait.lua'

# Open MPI's daemon notices nothing, as when its system waits for an answer to what it had sent, and
# there is no rank that would end it.
daemon_hangs() {
  train
  in_step 3
  on 2 pkill -STOP -x orted
  happens
  "$@"
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
}
ranks_killed() { signal KILL 2 && signal KILL 3; }
cut_and_killed() { unplug 2 && ranks_killed; }
all_killed() { ranks_killed && kill -9 "$(cat pid)"; }
it "the cable is pulled, and the daemon there hangs" daemon_hangs cut_and_killed
it "ranks are killed, and the daemon there hangs" daemon_hangs ranks_killed
it "dsrun is killed, and a daemon hangs" daemon_hangs all_killed

# What is on its way then keeps TCP's keepalive from being looked at.
talkative() {
  echo 'local s = ("y"):rep(200) while true do print(s) end' >flood.lua
  start --hostfile hosts flood.lua
  until_so 10 test -s out
  happens
  unplug 2
  gone
  rm -f out
  [ "$code" != 0 ] || wrong "ended with code 0"
  says worker-2
}
it "the cable is pulled while ranks print" talkative

apart() {
  train
  in_step 3
  happens
  part 1 2
  gone
  [ "$code" != 0 ] || wrong "ended with code 0"
  says 'rank'
}
it "two workers do not reach each other" apart
