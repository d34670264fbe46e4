# Who runs where, and what ranks find there.

# placed EXPECTED WORD…: "host rank size local_rank local_size node_rank visible" of each rank, in order
placed() {
  printf '%s\n' "$1" >expected
  shift
  rm -f ranks/*
  runs 0 "$@" "$here/whoami.lua" ranks
  for file in $(ls ranks | sort -n); do
    sed -n '1s/ [^ ]* [^ ]* \([^ ]*\)$/ \1/p' "ranks/$file"
  done >got
  same "placements by $*" expected got
}

unequal_slots() {
  hostfile pool worker-2:1 worker-1:3 worker-3:1
  placed "worker-2 0 5 0 1 0 0
worker-1 1 5 0 3 1 0,1,2
worker-1 2 5 1 3 1 0,1,2
worker-1 3 5 2 3 1 0,1,2
worker-3 4 5 0 1 2 0" --hostfile pool
}
it "ranks follow the hostfile, with unequal slots" unequal_slots

filters() {
  hostfile pool worker-1:4 worker-2:4 worker-3:2
  placed "worker-2 0 3 0 2 0 1,3
worker-2 1 3 1 2 0 1,3
worker-3 2 3 0 1 1 1" -H pool --include worker-3:1@worker-2:1,3
  placed "worker-1 0 3 0 2 0 0,3
worker-1 1 3 1 2 0 0,3
worker-3 2 3 0 1 1 0" -H pool --exclude worker-1:1-2@worker-2@worker-3:1
  placed "worker-1 0 2 0 1 0 0
worker-2 1 2 0 1 1 0" -H pool --num_nodes 2 --num_gpus 1
}
it "include, exclude, num_nodes and num_gpus choose" filters

one_host() {
  placed "worker-2 0 2 0 2 0 0,1
worker-2 1 2 1 2 0 0,1" --hostfile hosts --include worker-2
  printf 'root@10.77.0.3 slots=1\n[fd77::1] slots = 1 # by address\r\n' >pool
  placed "worker-3 0 2 0 1 0 0
worker-1 1 2 0 1 1 0" --hostfile pool
}
it "a single host, and hosts by address" one_host

the_head() {
  hostfile pool worker-1:1 head:1
  placed "worker-1 0 2 0 1 0 0
head 1 2 0 1 1 0" --hostfile pool
}
it "the launching machine may be one of them" the_head

# Each rank's line 1 ends MASTER_ADDR MASTER_PORT VISIBLE; 2: the folder, 3: threads.
surroundings() {
  mkdir "a folder"
  cd "a folder" || return
  cp ../hosts . && mkdir ranks
  runs 0 --hostfile hosts "$here/whoami.lua" ranks
  cut -d ' ' -f 7,8 ranks/* | cut -d : -f 2 | sed -n '1~3p' | sort -u >masters
  [ "$(wc -l <masters)" -eq 1 ] && ! grep -q -e '^127\.' -e - masters ||
    wrong "MASTER_ADDR and MASTER_PORT: $(cat masters)"
  for rank in 0 1 2 3; do
    [ "$(sed -n 2p ranks/$rank)" = "$work/a folder" ] || wrong "rank $rank: $(sed -n 2p ranks/$rank)"
    threads=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))
    [ "$(sed -n 3p ranks/$rank)" = $threads ] || wrong "rank $rank: $(sed -n 3p ranks/$rank) threads"
  done
  runs 0 --hostfile hosts --master_addr worker-3 --master_port 1234 "$here/whoami.lua" ranks
  [ "$(grep -l ' worker-3 1234 ' ranks/* | wc -l)" -eq 4 ] || wrong "--master_addr, --master_port"
  cp out err ..
}
it "the folder, the threads, the master's address are right" surroundings

# What --dry-run says is what happens, and it does nothing.
dry_run() {
  hostfile pool worker-2:2 worker-1:3
  runs 0 --hostfile pool --exclude worker-1:1 --dry-run --json "$here/whoami.lua" ranks
  [ -z "$(ls ranks)" ] || wrong "it ran something"
  cat >read.lua <<'END'
local json = require "ds.json"
for _, r in ipairs(json.decode(io.open "out":read "*a").ranks) do
  print(("%s %d %d %d"):format(r.host, r.rank, r.local_rank, r.slot))
end
END
  "$dsrun" read.lua >got 2>err
  printf 'worker-2 0 0 0\nworker-2 1 1 1\nworker-1 2 0 0\nworker-1 3 1 2\n' >expected
  same "ranks" expected got
  runs 0 --hostfile pool --exclude worker-1:1 --dry-run "$here/whoami.lua" ranks
  counted 2 '^ *[0-9]  worker-1 ' out
}
it "--dry-run tells it beforehand" dry_run

# As Docker's bridge: who connects to that address reaches himself.
same_address() {
  for n in 1 2 head; do
    add='ip link add docker0 type veth peer name docker1 && ip link set docker1 up &&
      ip address add 172.17.0.1/16 dev docker0 && ip link set docker0 up'
    if [ $n = head ]; then sh -c "$add"; else on $n sh -c "$add"; fi
  done
  runs 0 --hostfile hosts "$here/job.lua" steps=2
  [ "$(grep -c '^step' out)" -eq 2 ] || wrong "it did not train"
  for n in 1 2 head; do
    if [ $n = head ]; then ip link del docker0; else on $n ip link del docker0; fi
  done
}
it "an address that every host has" same_address

# What most hosts have stands there once; who has something else, or gives no answer, is named.
surveyed() {
  runs 0 --hostfile hosts env
  grep -q '^2 hosts: worker-1, worker-2$' out || wrong "not of two hosts"
  counted 1 '^nothing differs$' out
  counted 0 '^!' out
  on 2 sh -c 'cp "$1" /tmp/other && echo >>/tmp/other && mount --bind /tmp/other "$1"' sh "$dsrun"
  runs 0 --hostfile hosts env
  on 2 umount "$dsrun"
  counted 1 '^! ' out
  counted 1 '^! worker-2:  *binary ' out
  counted 1 '^differs: build$' out
  sshd_off 2
  runs 1 --hostfile hosts env
  counted 1 '^worker-2: ssh: .*Connection refused' out
  counted 1 '^worker-2' out
}
it "env of several hosts marks what differs" surveyed
