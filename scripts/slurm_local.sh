#!/usr/bin/env bash
# A real SLURM on this machine, for trying batch files without a cluster: two nodes that are one.
# All as root, jobs too; in a container, say.
#
#   scripts/slurm_local.sh install           Debian and Ubuntu packages
#   scripts/slurm_local.sh up                start munged, slurmctld and the nodes' slurmd
#   eval "$(scripts/slurm_local.sh env)"     lets sbatch, squeue, scontrol and scancel find it
#   scripts/slurm_local.sh status | down
#
# Jobs find MASTER_ADDR=127.0.0.1 and GLOO_SOCKET_IFNAME=lo set, because the nodes n1, n2, ... have
# no addresses of their own. `down` ends the daemons that `up` started, and nothing else.
#
# Settings: SLURM_LOCAL (where its files are), SLURM_LOCAL_NODES, SLURM_LOCAL_CPUS and
# SLURM_LOCAL_GPUS of each node (pretended: they are counted, not there), SLURM_LOCAL_PORT.
set -euo pipefail

home=${SLURM_LOCAL:-${TMPDIR:-/tmp}/slurm-local}
nodes=${SLURM_LOCAL_NODES:-2}
cpus=${SLURM_LOCAL_CPUS:-4}
gpus=${SLURM_LOCAL_GPUS:-8}
port=${SLURM_LOCAL_PORT:-17817}
export SLURM_CONF=$home/slurm.conf
export USER=${USER:-$(id -un)}

install() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge
}

# Without systemd and control groups: processes are tracked by their parents.
configure() {
  mkdir -p "$home"/{state,log,run,gpu}
  chmod 700 "$home" "$home/run" "$home/log"
  local i host version
  host=$(hostname -s)
  cat > "$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
# A requeued job waits for its old credential to expire: 2 minutes by default, 5 seconds at least.
AuthInfo=socket=$home/run/munge.socket,cred_expire=5
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
SlurmdSpoolDir=$home/spool-%n
StateSaveLocation=$home/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
ReturnToService=2
MinJobAge=3600
# More processors may be promised than there are.
SlurmdParameters=config_overrides
CONF
  for ((i = 1; i <= nodes; i++)); do
    mkdir -p "$home/spool-n$i"
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus" \
      "RealMemory=1024 Gres=gpu:$gpus State=UNKNOWN"
  done >> "$SLURM_CONF"
  cat >> "$SLURM_CONF" <<CONF
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP
CONF
  for ((i = 0; i < gpus; i++)); do : > "$home/gpu/$i"; done
  printf 'AutoDetect=off\nName=gpu File=%s/gpu/[0-%d]\n' "$home" $((gpus - 1)) > "$home/gres.conf"
  # A plugin must be named even where nothing of it is used; "disabled" came with 23.02.
  version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  if [[ $(printf '23.02\n%s\n' "$version" | sort -V | head -n 1) == 23.02 ]]; then
    echo 'CgroupPlugin=disabled' > "$home/cgroup.conf"
  else
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$home/cgroup.conf"
  fi
}

up() {
  if running; then
    echo "it is up already; end it with: $0 down" >&2
    exit 1
  fi
  configure
  [[ -s $home/munge.key ]] || head -c 128 /dev/urandom > "$home/munge.key"
  chmod 400 "$home/munge.key"
  munged --force --key-file="$home/munge.key" --socket="$home/run/munge.socket" \
    --pid-file="$home/run/munged.pid" --log-file="$home/log/munged.log" \
    --seed-file="$home/run/munged.seed"
  slurmctld -c -f "$SLURM_CONF"
  local i
  for ((i = 1; i <= nodes; i++)); do slurmd -N "n$i" -f "$SLURM_CONF"; done
  for ((i = 0; i < 120; i++)); do
    if [[ $(sinfo --noheader --Node --partition=low --states=idle | wc -l) -eq $nodes ]]; then
      return
    fi
    sleep 0.25
  done
  echo "the nodes are not idle after 30 s; see $home/log" >&2
  exit 1
}

# Whether a file names a daemon of ours: a number alone may by now belong to somebody else.
alive() {
  local pid
  [[ -s $1 ]] && pid=$(< "$1") && [[ $(cat "/proc/$pid/comm" 2> /dev/null) =~ ^(munged|slurmctld|slurmd)$ ]]
}

running() {
  local file
  for file in "$home"/run/*.pid; do
    if alive "$file"; then return 0; fi
  done
  return 1
}

down() {
  local file i
  if alive "$home/run/slurmctld.pid"; then
    scancel --user="$USER"
    for ((i = 0; i < 120; i++)); do
      [[ -n $(squeue --noheader) ]] || break
      sleep 0.25
    done
  fi
  for file in "$home"/run/slurmd-*.pid "$home"/run/slurmctld.pid "$home"/run/munged.pid; do
    if alive "$file"; then
      kill "$(< "$file")"
      while alive "$file"; do sleep 0.1; done
    fi
    rm -f "$file"
  done
}

case ${1:-} in
  install) install ;;
  up) up ;;
  down) down ;;
  status) sinfo --Node --long && squeue ;;
  env)
    echo "export SLURM_CONF=$SLURM_CONF MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo"
    ;;
  *)
    sed -n '2,17s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
