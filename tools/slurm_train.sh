#!/usr/bin/env bash
# GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [OPTIONS]
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 PARTITION JOB_NAME CONFIG [OPTIONS]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
gpus=${GPUS:-4}
per_node=${GPUS_PER_NODE:-$gpus}
export PYTHONPATH="$here/..:${PYTHONPATH:-}"
exec srun -p "$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" \
  --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} python -u "$here/train.py" "$3" --launcher slurm "${@:4}"
