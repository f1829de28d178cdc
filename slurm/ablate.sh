#!/usr/bin/env bash
#SBATCH --job-name=vlscale-ablate
#SBATCH --output=slurm/logs/%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Ablations as a job array, one task per row and seed, each on one node; from the root of the clone:
#
#   VLSCALE_GPUS_PER_NODE=4 bash slurm/ablate.sh cb_vila_tiny --rows cb_vila_table4
#   sbatch --array 1-15%4 --gpus-per-node 4 slurm/ablate.sh cb_vila_tiny --rows cb_vila_table4
#
# Everything after the script's name goes to `vlscale ablate`; with --list that prints the tasks. They share the folder
# and its table, which is whole when the last of them is done. Without an array, one job runs all.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder: the clone is where sbatch was called.
[[ -r slurm/common.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -r slurm/common.sh ]]; then
    echo "$PWD has no slurm/common.sh: call this from the root of the clone" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh

if [[ -z ${SLURM_JOB_ID:-} && -z ${VLSCALE_ARRAY:-} ]]; then
    runs=$("$VLSCALE" ablate "$@" --list)
    VLSCALE_ARRAY=1-$(wc -l <<<"$runs")
fi
submit_unless_in_job 1 slurm/ablate.sh "$@"
run_here ablate "$@" ${SLURM_ARRAY_TASK_ID:+--task "$SLURM_ARRAY_TASK_ID"}
