#!/usr/bin/env bash
#SBATCH --job-name=vlscale-eval
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append
#
# Evaluate a run, with ranks as in pretrain.sh; from the root of the clone:
#
#   sbatch --gpus-per-node 4 --ntasks-per-node 4 slurm/eval.sh retrieval --from runs/cb_vila_base
#
# Everything after the script's name goes to `vlscale eval`. Grounding and objectives run on one rank.
set -euo pipefail

# Slurm runs a copy of this script from its spool folder: the clone is where sbatch was called.
[[ -r slurm/common.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}"
if [[ ! -r slurm/common.sh ]]; then
    echo "$PWD has no slurm/common.sh: call this from the root of the clone" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source slurm/common.sh

case ${1:-} in
    grounding | objectives) RANKS=1 ;;
esac
submit_unless_in_job "${RANKS:-$(ranks_per_node)}" slurm/eval.sh "$@"
run_ranks eval "$@"
