#!/usr/bin/env bash
#SBATCH --job-name=vlscale-finetune
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Fine-tune, with ranks, signals and requeueing as in pretrain.sh; from the root of the clone:
#
#   sbatch --gpus-per-node 4 --ntasks-per-node 4 slurm/finetune.sh vqa --from runs/cb_vila_base --data vqa.yaml
#
# Everything after the script's name goes to `vlscale finetune`.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder: the clone is where sbatch was called.
[[ -r slurm/common.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -r slurm/common.sh ]]; then
    echo "$PWD has no slurm/common.sh: call this from the root of the clone" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh

submit_unless_in_job "$(ranks_per_node)" slurm/finetune.sh "$@"
run_ranks finetune --resume auto "$@"
