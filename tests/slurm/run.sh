#!/usr/bin/env bash
# A real SLURM on this machine: four virtual nodes, launch/slurm.py's job on four tasks, preempted twice, and losses
# held against an undisturbed run's. What is cancelled has to stay so, and a task of an array starts again alone.
#
# sudo tests/slurm/run.sh [PYTHON]     a Debian or Ubuntu that may be changed: it installs slurm-wlm and munge, writes
#                                      their configuration and starts their daemons. Ends what it has started. A
#                                      machine that has a SLURM already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
conf=/etc/slurm/slurm.conf written="# Written by MaxLM's tests/slurm/run.sh, which may write it again."
if [ -e "$conf" ] && ! grep -qxF "$written" "$conf"; then
  echo "this machine has a SLURM of its own ($conf), which this test would take apart; run it on another machine" >&2
  exit 1
fi
root=$PWD python=${1:-$PWD/.venv/bin/python}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
base=$(mktemp -d /tmp/maxlm-slurm.XXXXXX)
daemons=()

finish() {
  code=$?
  scancel --user=root 2> /dev/null || true
  for pid in "${daemons[@]}"; do kill "$pid" 2> /dev/null || true; done
  if [ "$code" -ne 0 ]; then tail -n 40 "$base"/*.log "$base"/*/logs/*.log 2> /dev/null || true; fi
  exit "$code"
}
trap finish EXIT

# --- the scheduler
command -v slurmctld > /dev/null && command -v munged > /dev/null || {
  apt-get update -q
  apt-get install -q -y slurm-wlm munge
}
[ -s /etc/munge/munge.key ] || mungekey --create
mkdir -p /run/munge && chown munge /run/munge
if ! munge -n > /dev/null 2>&1; then
  setpriv --reuid=munge --regid=munge --clear-groups munged --foreground > "$base/munged.log" 2>&1 &
  daemons+=($!)
fi
host=$(hostname -s)
# JAX finds the coordinator by the name of the job's first node.
for node in n1 n2 n3 n4; do grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >> /etc/hosts; done
mkdir -p "$base/state" /etc/slurm
cat > "$conf" << END
$written
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool-%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=20
MpiDefault=none
SchedulerParameters=sched_interval=5
MinJobAge=600
NodeName=n[1-4] NodeHostname=$host Port=[17001-17004] CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
slurmctld -D > "$base/slurmctld.log" 2>&1 &
daemons+=($!)
for node in n1 n2 n3 n4; do
  slurmd -D -N "$node" > "$base/slurmd-$node.log" 2>&1 &
  daemons+=($!)
done
for turn in {1..60}; do
  if [ "$(sinfo -h -t idle -o %D 2> /dev/null || true)" = 4 ]; then break; fi
  sleep 1
done
[ "$(sinfo -h -t idle -o %D)" = 4 ]

# --- the run
export PYTHONPATH=$root JAX_PLATFORMS=cpu
config=$base/config.py
"$python" - "$base" << 'END'
import sys
from pathlib import Path

from maxlm.configfile import source
from tests.tiny import tiny_config, write_corpus

base = Path(sys.argv[1])
leaves = {"train__steps": 60, "parallel__fsdp": 4, "checkpoint__every_steps": 10}
config = tiny_config(write_corpus(base / "corpus"), train__compilation_cache=str(base / "xla"), **leaves)
(base / "config.py").write_text(source(config))
END

start() { # NAME [FLAG ...]: hands the job in and prints its number
  "$python" -m launch.slurm --nodes=4 --tasks_per_node=1 --time=1:00:00 --folder="$base/shared $1" \
    --config="$config" --workdir="$base/$1" --name="$1" --commit="$(git rev-parse HEAD)" --python="$python" \
    --env=JAX_PLATFORMS=cpu --env="XLA_FLAGS=--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
    --grace_seconds=60 --no-check "${@:2}" | sed -n 's/^job \([0-9]*\);.*/\1/p'
}
steps() { if [ -e "$base/$1/metrics.jsonl" ]; then grep -c '"loss"' "$base/$1/metrics.jsonl" || true; else echo 0; fi; }
until_step() { # NAME STEP
  for turn in {1..600}; do
    if [ "$(steps "$1")" -ge "$2" ]; then return; fi
    sleep 0.5
  done
  echo "$1 did not get to step $2" && exit 1
}
until_done() { # JOB NAME
  for turn in {1..900}; do
    if [ -e "$base/$2/report.json" ]; then return; fi
    case $(squeue -h -j "$1" -o %T 2> /dev/null) in FAILED* | CANCELLED* | NODE_FAIL*) break ;; esac
    sleep 1
  done
  if [ ! -e "$base/$2/report.json" ]; then echo "$2 did not finish" && exit 1; fi
}

job=$(start whole)
until_done "$job" whole
for turn in {1..60}; do if [ -z "$(squeue -h)" ]; then break; fi; sleep 1; done

job=$(start disturbed)
until_step disturbed 11
scancel --signal=TERM "$job"
for turn in {1..120}; do if grep -qs "back into the queue" "$base/shared disturbed/logs/"*; then break; fi; sleep 0.5; done
grep -q "saved at step" "$base/shared disturbed/logs/"*
until_step disturbed 25
scontrol requeue "$job"
until_done "$job" disturbed
[ "$(scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')" -ge 2 ]

# --- what is cancelled, and one task of an array; in place of training they wait
cat > "$base/waits" << END
#!/bin/bash
trap 'exit 75' TERM
while [ ! -e "$base/fail-\$SLURM_ARRAY_TASK_ID" ]; do sleep 0.1; done
exit 3
END
chmod +x "$base/waits"
shown() { scontrol show job --oneliner "$1" | sed -n "s/.*$2=\([A-Z0-9]*\).*/\1/p"; }
until_shown() { # JOB FIELD VALUE
  for turn in {1..90}; do
    if [ "$(shown "$1" "$2")" = "$3" ]; then return; fi
    sleep 1
  done
  echo "$2 of job $1 is $(shown "$1" "$2"), not $3" && exit 1
}
job=$(start cancelled --nodes=1 --python="$base/waits")
until_shown "$job" JobState RUNNING
sleep 5
scancel "$job"
until_shown "$job" JobState CANCELLED
sleep 10
[ "$(shown "$job" JobState) $(shown "$job" Restarts)" = "CANCELLED 0" ]
job=$(start array --nodes=1 --python="$base/waits" --array=0-1 --workdir="$base/array-{array}")
for task in 0 1; do until_shown "${job}_$task" JobState RUNNING; done
sleep 5
touch "$base/fail-1"
until_shown "${job}_1" Restarts 1
[ "$(shown "${job}_0" JobState) $(shown "${job}_0" Restarts)" = "RUNNING 0" ]
scancel "$job"
until_shown "${job}_0" JobState CANCELLED

"$python" - "$base" << 'END'
import sys
from pathlib import Path

from maxlm.train.metrics import read_metrics

whole, disturbed = ([(r["step"], r["batch"], r["loss"]) for r in read_metrics(Path(sys.argv[1]) / name, "step")]
                    for name in ("whole", "disturbed"))
assert len(whole) == 60 and whole == disturbed, "the disturbed run has other losses"
print(f"60 steps, {len(whole)} losses equal to the last bit, after a signal and a requeue")
END
echo "1 passed, 0 failed"
