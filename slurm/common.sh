# shellcheck shell=bash
# What the job scripts share; sourced from the root of the clone. `submit_unless_in_job` makes a job of a plain
# `bash slurm/….sh`; `run_ranks` and `run_here` run a command of vlscale in the job and requeue it where it saved.

# The command from PATH, else that of the clone's environment.
if command -v vlscale >/dev/null; then
    VLSCALE=$(command -v vlscale)
elif [[ -x .venv/bin/vlscale ]]; then
    VLSCALE=$PWD/.venv/bin/vlscale
else
    echo "no vlscale in PATH and no .venv here ($PWD): run 'make install' on a machine that shares this folder" >&2
    exit 2
fi
export VLSCALE

# Ranks, where a command wants another number than the job has.
RANKS=""
# What runs in the background, its exit code, and the signal that Slurm warned with.
running=""
code=0
warned=""
interrupted=""

# submit_unless_in_job RANKS SCRIPT [ARGUMENT …]: outside a job, submit with flags made of VLSCALE_* and end.
submit_unless_in_job() {
    [[ -z ${SLURM_JOB_ID:-} ]] || return 0
    local flags=(--ntasks-per-node "$1") pair name flag
    shift
    local known=(NODES=--nodes GPUS_PER_NODE=--gpus-per-node CPUS_PER_RANK=--cpus-per-task TIME=--time
        PARTITION=--partition ACCOUNT=--account QOS=--qos ARRAY=--array SIGNAL=--signal)
    for pair in "${known[@]}"; do
        name=VLSCALE_${pair%%=*} flag=${pair#*=}
        [[ -z ${!name:-} ]] || flags+=("$flag=${!name}")
    done
    exec sbatch "${flags[@]}" "$@"
}

# Ranks per node where a plain call submits: as asked, else one per GPU ("4" or "h100:4"), else one.
ranks_per_node() {
    local gpus=${VLSCALE_GPUS_PER_NODE:-1}
    echo "${VLSCALE_RANKS_PER_NODE:-${gpus##*:}}"
}

# run_ranks COMMAND [ARGUMENT …]: one rank per task of the job, else per GPU of its nodes, else per node. Each rank
# writes to a file of its own, on its own node: what goes through srun is lost when the step is ended.
run_ranks() {
    local layout=()
    if [[ -n ${RANKS:-} ]]; then
        layout=(--nodes 1 --ntasks "$RANKS" --ntasks-per-node "$RANKS")
    elif [[ -z ${SLURM_NTASKS:-} ]]; then
        local per_node=${SLURM_GPUS_ON_NODE:-1}
        # Without tasks asked for, the job may hold fewer cores than ranks.
        layout=(--overcommit --ntasks-per-node "$per_node" --ntasks $((per_node * SLURM_JOB_NUM_NODES)))
        export SLURM_NTASKS=$((per_node * SLURM_JOB_NUM_NODES))
    fi
    # srun stopped taking --cpus-per-task over from sbatch in Slurm 22.05.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    meet
    local logs=${VLSCALE_LOGS:-slurm/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID} log
    mkdir -p "$logs"
    report "${RANKS:-$SLURM_NTASKS} ranks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT" "$@"
    echo "logs of the ranks: $logs/<host>-rank<number>.out"

    trap 'warn USR1' USR1
    trap 'warn TERM' TERM
    srun "${layout[@]}" --kill-on-bad-exit=1 --open-mode=append --output="$logs/%N-rank%t.out" "$VLSCALE" "$@" &
    running=$!
    await
    for log in "$logs"/*-rank0.out; do  # of every node that rank 0 has lived on; none where srun started nothing
        [[ ! -r $log ]] || { echo "$log ends with:" && tail -n 20 "$log"; }
    done
    leave
}

# run_here COMMAND [ARGUMENT …]: in the batch script itself, on the job's first node; for a command that starts ranks.
run_here() {
    report "one node, $SLURMD_NODENAME" "$@"
    trap 'warn USR1' USR1
    trap 'warn TERM' TERM
    "$VLSCALE" "$@" &
    running=$!
    await
    leave
}

# Rank 0 runs on the first node, this one. Where node names don't resolve, set MASTER_ADDR before sbatch.
meet() {
    [[ -n ${MASTER_ADDR:-} ]] || MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    if [[ -n ${MASTER_PORT:-} ]] && is_taken "$MASTER_PORT"; then
        echo "MASTER_PORT=$MASTER_PORT: somebody listens there on $(hostname): choose another, or leave it unset" >&2
        exit 2
    fi
    # Jobs that share a node have different numbers, tasks of an array as well; below what Linux gives to callers. From
    # a port that is taken the way is far, so as not to meet the next job's.
    local number=$SLURM_JOB_ID
    while [[ -z ${MASTER_PORT:-} ]] && is_taken $((12000 + number % 20000)); do
        number=$((number + 1009))
    done
    MASTER_PORT=${MASTER_PORT:-$((12000 + number % 20000))}
    export MASTER_ADDR MASTER_PORT
}

is_taken() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# warn SIGNAL: Slurm warned this script; of SIGTERM it tells the ranks itself.
warn() {
    interrupted=1 warned=$1
    [[ $1 != USR1 || -z $running ]] || kill -USR1 "$running" 2>/dev/null || true
}

# Wait for what runs and keep its exit code; a signal interrupts `wait` alone.
await() {
    local again=1
    while [[ -n $again ]]; do
        interrupted="" code=0
        wait "$running" || code=$?
        again=$interrupted
    done
}

# End the job; requeue it where the run saved and says so (85), or was warned and ended by a signal on the way.
leave() {
    if [[ $code != 85 && ! ($warned == USR1 && $code -gt 128) ]]; then
        exit "$code"
    fi
    local lives=${SLURM_RESTART_COUNT:-0}
    if ((lives >= ${VLSCALE_MAX_REQUEUES:-100})); then
        echo "not requeued: that was done $lives times already (VLSCALE_MAX_REQUEUES)" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "requeued; the next life goes on from the newest checkpoint"
    else
        echo "this job can't be requeued: submit it again, it goes on from the newest checkpoint" >&2
    fi
    exit 85
}

# report WHERE COMMAND [ARGUMENT …]: what runs, with what.
report() {
    local where=$1
    shift
    echo "job $SLURM_JOB_ID${SLURM_RESTART_COUNT:+, requeued $SLURM_RESTART_COUNT times}: $where"
    echo "command: vlscale $*"
    echo "vlscale: $VLSCALE, commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    "$(dirname "$VLSCALE")/python" - <<'PYTHON' || echo "versions: unknown"
import platform
from importlib.metadata import version
names = ("vlscale", "torch", "deepspeed", "transformers", "timm")
print("versions:", f"Python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in names))
PYTHON
    echo "GPUs of this node: $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort |
        uniq -c | tr -s ' ' | paste -sd ';' || true)"
}
