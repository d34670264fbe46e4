# What is found before anything starts; hosts without dsrun.

# refused SECONDS WORD…: a job that does not begin; all that must be said, by lines of the file wanted
refused() {
  limit=$1
  shift
  start "$@" "$here/job.lua" ranks=ranks
  gone "$limit"
  [ "$code" != 0 ] && [ "$code" != none ] || wrong "it ended with code $code"
  [ -z "$(ls ranks)" ] || wrong "ranks ran"
  while read -r pattern; do
    grep -q -E -e "$pattern" err || wrong "it does not say '$pattern'"
  done <wanted
}

hosts_that_do_not_answer() {
  sshd_off 2
  sshd_mute 3
  hostfile pool worker-1:1 worker-2:1 worker-3:1 off:1 nowhere:1
  printf '%s\n' worker-2 worker-3 off nowhere >wanted
  refused 13 --hostfile pool
  grep -E 'worker-1' err && wrong "worker-1 is blamed"
}
it "hosts that do not answer are all named" hosts_that_do_not_answer

unchecked() {
  sshd_off 2
  echo worker-2 >wanted
  refused 10 --hostfile hosts --no_ssh_check
  says '^dsrun: worker-2: ssh: .*Connection refused.*try ssh worker-2'
  counted 0 '^dsrun: worker-1' err
}
it "--no_ssh_check: the host that mpirun fails at is named" unchecked

port() {
  sshd_on 2 -p 2222
  sshd_on 1 -p 2222
  runs 0 --hostfile hosts --ssh_port 2222 "$here/job.lua" steps=1
}
it "--ssh_port" port

without_dsrun() {
  hostfile pool worker-1:1 worker-3:1
  bare 3
  printf '%s\n' worker-3 push >wanted
  refused 12 --hostfile pool
}
it "a host without dsrun is named" without_dsrun

another_build() {
  on 3 sh -c 'cp "$1" /tmp/other && echo >>/tmp/other && mount --bind /tmp/other "$1"' sh "$dsrun"
  hostfile pool worker-1:1 worker-3:1
  echo worker-3 >wanted
  refused 12 --hostfile pool
  on 3 umount "$dsrun"
  cp "$here/job.lua" script.lua
  on 3 sh -c 'echo "-- other" | cat script.lua - >/tmp/script && mount --bind /tmp/script script.lua'
  printf '%s\n' worker-3 script.lua >wanted
  start --hostfile pool script.lua ranks=ranks
  gone 12
  [ "$code" != 0 ] && [ -z "$(ls ranks)" ] || wrong "another script was run"
  says worker-3 script.lua
  on 3 umount "$HOSTS/work/script.lua"
}
it "a host with another dsrun or another script is named" another_build

pushed() {
  hostfile pool worker-1:1 worker-3:2
  mkdir project
  cp "$here/job.lua" project/job.lua
  echo 'return { steps = 4 }' >project/settings.lua
  sed -i 's/^local nn, F = .*/&\nassert(require "settings".steps == 4)/' project/job.lua
  bare 3
  on 3 sh -c 'mount -t tmpfs world "$HOSTS/work"' # no shared file system
  (
    cd project || exit
    runs 0 --hostfile ../pool --push job.lua steps=4
    [ "$(grep -c '^step' out)" -eq 4 ] || wrong "not all steps"
    runs 0 --hostfile ../pool --push job.lua steps=5
    printf '%s' "$mistakes" >../mistakes
    cp out err ..
  )
  mistakes=$mistakes$(cat mistakes)
  on 3 sh -c 'umount -l "$HOSTS/work"'
}
it "--push to a host without dsrun, its libraries, and the shared folder" pushed
