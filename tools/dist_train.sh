#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [OPTIONS]      (PYTHON=.venv/bin/python to name the interpreter)
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 CONFIG GPUS [OPTIONS]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..:${PYTHONPATH:-}"
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  --nproc_per_node="${2}" "$here/train.py" "$1" --launcher pytorch "${@:3}"
