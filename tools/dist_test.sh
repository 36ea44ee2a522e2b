#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS]
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 CONFIG CHECKPOINT GPUS [OPTIONS]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..:${PYTHONPATH:-}"
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
  --nproc_per_node="${3}" "$here/test.py" "$1" "$2" --launcher pytorch "${@:4}"
