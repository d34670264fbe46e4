# What tests do to the hosts of a world: a library for sh, to be read on the head. N: a host's number.
#
#   on N COMMAND…          runs it there, in the shared folder, beside sshd
#   at_launch COMMAND…     runs it on the head, in the folder where it is called, where it does not see
#                          the processes of hosts (as it does on the head otherwise)
#   unplug N · plug N      pulls the cable, and plugs it in
#   lose N · keep N        loses every packet without a word, and no longer
#   part A B · meet A B    the two do not reach each other; all else does
#   sshd_off N             nothing listens there
#   sshd_mute N            something listens, and never says a word
#   sshd_on N [WORDS…]     sshd as it was, or with further options, as -p 2222
#   bare N · dress N       without the checkout, and without a library that dsrun needs if that can
#                          be hidden; and with them again
#   left [N…]              processes left on these hosts, or on all and the head: "worker-1: PID NAME …"
#   left_files [N…]        files in shared memory and /tmp there
#   heal                   all networks and sshds as they were, and no process or file left
#
# A host's processes have numbers of their own there.

state=${HOSTS:?this works in a world only: tests/hosts/world 2}/.world

all_hosts() {
  for file in "$state"/up-*; do echo "${file##*-}"; done
}

on() {
  read -r pid <"$state/pid-$1"
  shift
  nsenter -t "$pid" -m -n -u -i -p sh -c 'cd "$HOSTS/work" && exec "$@"' sh "$@"
}

# Instead of this shell; the command is a child of it, and its end that of both.
at_launch() {
  read -r pid <"$state/pid-launcher"
  exec nsenter -t "$pid" -m -p sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
}

# ---- the network

unplug() { ip link set "to-$1" down; }
plug() { ip link set "to-$1" up; }
lose() { bridge link set dev "to-$1" state 0; }
keep() { bridge link set dev "to-$1" state 3; }
part() { for n in "$@"; do bridge link set dev "to-$n" isolated on; done; }
meet() { for n in "$@"; do bridge link set dev "to-$n" isolated off; done; }

# ---- sshd

sshd_off() {
  on "$1" sh -c 'kill -9 $(cat /run/sshd.pid) 2>/dev/null'
  on "$1" sh -c 'while kill -0 $(cat /run/sshd.pid) 2>/dev/null; do sleep 0.01; done'
}

sshd_mute() {
  on "$1" sh -c 'kill -STOP $(cat /run/sshd.pid)'
}

sshd_on() {
  n=$1
  shift
  sshd_off "$n"
  on "$n" "$state/sshd" -f "$state/sshd_config" "$@"
}

# ---- a host without dsrun

bare() {
  on "$1" sh -c '
    mount -t tmpfs world "$HOSTS/dsrun"
    library=$(ldconfig -p | sed -n "s/.*libluajit-5.1.so.2 .*=> //p" | sed q)
    [ -n "$library" ] || exit 0
    folder=${library%/*}
    mkdir -p /run/hidden && mount -t tmpfs world /run/hidden && mkdir /run/hidden/up /run/hidden/work
    mount -t overlay hidden "$folder" \
      -o "lowerdir=$folder,upperdir=/run/hidden/up,workdir=/run/hidden/work" 2>/dev/null &&
      rm -f "$folder"/libluajit-5.1.so.2*'
}

dress() {
  on "$1" sh -c '
    [ ! -e "$HOSTS/dsrun/Makefile" ] || exit 0
    umount -l "$HOSTS/dsrun"
    ! grep -q "^hidden " /proc/mounts || umount -l "$(sed -n "s/^hidden \([^ ]*\) .*/\1/p" /proc/mounts)"
    umount -l /run/hidden 2>/dev/null'
}

# ---- what is left

# Every process of a host counts, but its first, SLURM's daemons, and sshd, whose connection may have been
# cut. On the head, those of a job.
left() {
  [ $# -gt 0 ] || set -- $(all_hosts) head
  spaces=
  for n in "$@"; do
    case $n in
      head)
        read -r pid <"$state/pid-launcher"
        spaces="$spaces head $(stat -L -c %i /proc/self/ns/pid) head $(stat -L -c %i "/proc/$pid/ns/pid")"
        ;;
      *) read -r pid <"$state/pid-$n" && spaces="$spaces $n $(stat -L -c %i "/proc/$pid/ns/pid")" ;;
    esac
  done
  ps -e -o pidns=,pid=,stat=,comm=,args= | awk -v spaces="$spaces" '
    BEGIN { n = split(spaces, word, " "); for (i = 1; i < n; i += 2) name[word[i + 1]] = word[i] }
    !($1 in name) || $3 ~ /^Z/ { next }
    { host = name[$1] == "head" ? "head" : "worker-" name[$1]; args = $0
      sub(/^ *[^ ]+ +[^ ]+ +[^ ]+ +[^ ]+ +/, "", args) }
    host == "head" && $4 !~ /^(dsrun|mpirun|orted|orterun|prte|prterun|prted|ssh)$/ { next }
    $4 ~ /^(sshd|munged|slurmd|slurmd-wlm)$/ || args ~ /tests\/hosts\/world --host/ || args == "sleep 2147483647" { next }
    { print host ": " $2 " " $3 " " substr(args, 1, 120) }'
}

left_files() {
  [ $# -gt 0 ] || set -- $(all_hosts) head
  for n in "$@"; do
    case $n in
      head) ls -d /dev/shm/* /tmp/* 2>/dev/null | sed 's/^/head: /' ;;
      *) on "$n" sh -c 'ls -d /dev/shm/* /tmp/* 2>/dev/null' | sed "s/^/worker-$n: /" ;;
    esac
  done
}

heal() {
  for n in $(all_hosts); do
    plug "$n"
    keep "$n" 2>/dev/null # a cable that was just plugged in
    meet "$n"
    dress "$n"
  done
  kill -9 $(left | awk '{ print $2 }') 2>/dev/null
  rm -rf /dev/shm/* /tmp/*
  for n in $(all_hosts); do
    on "$n" sh -c 'rm -rf /dev/shm/* /tmp/*'
    sshd_on "$n"
  done
}
