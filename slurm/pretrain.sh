#!/usr/bin/env bash
#SBATCH --job-name=vlscale-pretrain
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Pre-train with one rank per task, else per GPU of the nodes, else per node; from the root of the clone:
#
#   sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 slurm/pretrain.sh cb_vila_base --data corpus.yaml
#   VLSCALE_NODES=2 VLSCALE_GPUS_PER_NODE=4 bash slurm/pretrain.sh cb_vila_base --data corpus.yaml
#
# Everything after the script's name goes to `vlscale pretrain`. Two minutes before its time is up the run saves and
# requeues itself; its next life goes on from the newest complete checkpoint.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder: the clone is where sbatch was called.
[[ -r slurm/common.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -r slurm/common.sh ]]; then
    echo "$PWD has no slurm/common.sh: call this from the root of the clone" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh

submit_unless_in_job "$(ranks_per_node)" slurm/pretrain.sh "$@"
run_ranks pretrain --resume auto "$@"
