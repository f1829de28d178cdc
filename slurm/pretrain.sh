#!/usr/bin/env bash
#SBATCH --job-name=vlscale-pretrain
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Pre-train with one rank per task; from the root of the clone:
#
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 slurm/pretrain.sh cb_vila_base --data captions.jsonl
#
# Everything after the script's name goes to `vlscale pretrain`. A requeued job goes on from its newest complete
# checkpoint; `--resume auto` starts anew where there is none.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder: the clone is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
if [[ ! -r slurm/common.sh ]]; then
    echo "$PWD has no slurm/common.sh: call sbatch from the root of the clone" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh

echo "job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
srun --kill-on-bad-exit=1 "$VLSCALE" pretrain --resume auto "$@"
