# shellcheck shell=bash
# Shared preamble of the job scripts: finds vlscale and tells the ranks where to meet. Sourced, from the folder of
# the clone that the job was submitted from.

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

# Rank 0 runs on the first node. Where node names don't resolve, set MASTER_ADDR before sbatch.
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
# The same port for every task of a job, a different one for the next job on the same node.
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT

# srun stopped taking --cpus-per-task over from sbatch in Slurm 22.05.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
