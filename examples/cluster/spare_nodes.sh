#!/bin/bash
# Train on some nodes while spare nodes wait. A spare node takes the place of a node that is lost.
#
#   STORE=head:20000 examples/cluster/spare_nodes.sh store
#   STORE=head:20000 NODES=2 RANKS_PER_NODE=8 examples/cluster/spare_nodes.sh --mesh dp=2,tp=8 \
#       --run-dir /shared/runs/a --save-every 500 --memory-copies-every 10
#
# The first command runs on a machine that stays, such as a login node. It needs no GPU. There the
# nodes find each other. The second command runs on every node: the first NODES of them train, and
# the others wait. NODES=1:4 trains on as many as there are, from one to four; leave dp out of the
# mesh then. The run directory is on a shared file system. LOCAL_ADDR is the address of a node, if its
# host name does not lead to it from other nodes.
set -euo pipefail

cd "$(dirname "$0")/../.."
if [ "${1:-}" = store ]; then
    exec python -c "
import signal, sys
from torch.distributed import TCPStore
host, port = sys.argv[1].rsplit(':', 1)
store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
print('the store of', sys.argv[1], 'is there', flush=True)
signal.pause()" "$STORE"
fi

# By default torchrun keeps the address of the ranks that met first, and a new node never gets it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$NODES" --nproc-per-node "${RANKS_PER_NODE:-1}" --max-restarts 100 \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-dtron}" --rdzv-endpoint "$STORE" \
    --rdzv-conf is_host=0,keep_alive_interval=2,join_timeout=86400 \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} train.py --resume auto "$@"
