# A cluster under SLURM: munged and slurmctld on the head, munged and slurmd on worker-1 and worker-2, two
# cores each. Without anything of SLURM's in the system: its unpacked programs lie over /usr, on these
# hosts alone.

if ! command -v srun >/dev/null; then
  for n in head 1 2; do
    overlay="mount -t overlay slurm /usr -o lowerdir=$HOSTS/dsrun/build/slurm/usr:/usr"
    if [ $n = head ]; then $overlay 2>/dev/null; else on $n $overlay 2>/dev/null; fi
  done
fi
if ! command -v srun >/dev/null || ! command -v munged >/dev/null; then
  skip "SLURM" "it is not here (scripts/setup soak brings it), or cannot be laid over /usr"
  return
fi

cluster=$state/slurm
export SLURM_CONF="$cluster/slurm.conf"
program() { command -v "$1" || command -v "$1-wlm"; } # Debian's names have an ending of their own
mkdir -p "$cluster/state"
dd if=/dev/urandom of="$cluster/key" bs=128 count=1 2>/dev/null
chmod 600 "$cluster/key"
cat >"$SLURM_CONF" <<END
ClusterName=world
SlurmctldHost=head(10.77.0.254)
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$cluster/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmix
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
SlurmdTimeout=15
NodeName=worker-[1-2] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=worker-[1-2] Default=YES MaxTime=INFINITE State=UP
END

# A host's munged and its slurmd, whose log is out of the way of what is looked for after a case.
munge='munged --force --key-file="$0/key" --socket=/run/munge.socket --pid-file=/run/munged.pid \
  --log-file=/run/munged.log --seed-file=/run/munged.seed'
sh -c "$munge" "$cluster"
"$(program slurmctld)" -c
for n in 1 2; do
  on $n sh -c "mkdir -p /run/slurmd && $munge" "$cluster"
  on $n "$(program slurmd)" -d "$(program slurmstepd)"
done

registered() { [ "$(scontrol show nodes 2>/dev/null | grep -c 'SlurmdStartTime=2')" = 2 ]; }
until_so 20 registered || echo "SLURM: $(sinfo 2>&1; tail -n 20 "$cluster"/*.log)"
