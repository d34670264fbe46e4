# The hosts themselves, without dsrun: that they are apart, and what mpirun does there.

hosts_are_apart() {
  for n in 1 2 3; do
    [ "$(ssh worker-$n hostname)" = worker-$n ] || wrong "no ssh to worker-$n"
    on $n sh -c "touch /tmp/file-$n /dev/shm/file-$n ~/file-$n"
  done
  [ "$(ssh -p 22 10.77.0.2 hostname)" = worker-2 ] || wrong "no ssh to an address"
  [ "$(ssh fd77::2 hostname)" = worker-2 ] || wrong "no ssh to an IPv6 address"
  for n in 1 2 3; do
    found=$(on $n sh -c 'cd /tmp && ls; cd /dev/shm && ls; cd ~ && ls' | tr '\n' ' ')
    [ "$found" = "file-$n file-$n file-$n " ] || wrong "worker-$n has $found"
    on $n sh -c "rm /tmp/file-$n /dev/shm/file-$n ~/file-$n"
  done
  on 2 sh -c 'echo shared >shared'
  [ "$(on 1 cat shared)" = shared ] || wrong "no folder is shared"
  on 1 touch "$HOSTS/dsrun/x" 2>/dev/null && wrong "the checkout can be written"
  on 1 sh -c 'sleep 77 & echo $! >pid'
  left | grep -q '^worker-1: .*sleep 77' || wrong "a process left on worker-1 is not seen"
  [ -z "$(left 2 3 head)" ] || wrong "and seen elsewhere"
  on 2 kill "$(cat pid)" 2>/dev/null && wrong "worker-2 sees processes of worker-1"
  on 1 kill "$(cat pid)"
}
it "hosts are apart" hosts_are_apart

reaches() {
  [ "$(on "$1" ssh -o ConnectTimeout=1 "$2" hostname 2>/dev/null)" = "$2" ]
}

networks_break() {
  for way in unplug lose; do
    $way 2
    reaches 1 worker-2 && wrong "$way: worker-1 still reaches worker-2"
    reaches 1 head || wrong "$way of worker-2: worker-1 does not reach the head"
    heal
    reaches 1 worker-2 || wrong "$way cannot be undone"
  done
  part 1 2
  reaches 1 worker-2 && wrong "parted hosts reach each other"
  reaches 1 head && reaches 2 worker-3 || wrong "parted hosts reach nobody"
  meet 1 2
  reaches 1 worker-2 || wrong "they do not meet again"
  sshd_off 3
  reaches 1 worker-3 && wrong "an sshd that is off answers"
  sshd_on 3 -p 2222
  [ "$(ssh -p 2222 worker-3 hostname)" = worker-3 ] || wrong "no sshd on another port"
}
it "networks break, and heal" networks_break

mpirun_works() {
  mpirun --host worker-1:2,worker-2:2 hostname >out 2>err
  [ "$(sort out | uniq -c | tr -s ' \n' '  ')" = " 2 worker-1 2 worker-2 " ] || wrong "not 2 × 2"
}
it "mpirun starts processes on them" mpirun_works

# What dsrun's own watching is compared with.
mpirun_notices() {
  keepalive="--mca oob_tcp_keepalive_time 2 --mca oob_tcp_keepalive_intvl 1
    --mca oob_tcp_keepalive_probes 3"
  mpirun $keepalive --host worker-1:2,worker-2:2 sleep 60 >out 2>err &
  until_so 10 sh -c '. "$0/verbs.sh"; [ "$(left 1 2 | grep -c "sleep 60")" -eq 4 ]' "$here" ||
    wrong "it does not start"
  sleep 1 # what is on its way then keeps keepalive from being looked at, for a quarter of an hour
  happens
  unplug 2
  wait $!
  echo $? >code
  gone
  ended 205
}
it "mpirun notices a cable that is pulled" mpirun_notices
