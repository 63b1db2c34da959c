#!/bin/bash
# Train on several hosts by ssh, without a scheduler:
#
#   HOSTS="a b" RANKS_PER_NODE=8 examples/cluster/ssh.sh --mesh dp=2,tp=8 --run-dir /shared/runs/a
#
# Each host has the checkout at the same path, with its virtual environment in .venv, and the run
# directory on a shared file system. Ctrl-C ends the run on all hosts, as the end of this script
# does: the ranks finish their step and save. The same command continues from the newest checkpoint.
set -uo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
read -ra hosts <<<"$HOSTS"

# On each host torchrun runs until it ends, or until its input, the connection, is closed.
on_host='exec 3<&0
torchrun "$@" </dev/null &
run=$!
{ cat <&3 >/dev/null; kill -TERM $run; } 2>/dev/null &
watch=$!
wait $run
status=$?
kill $watch 2>/dev/null
exit $status'

pipe=$(mktemp -u)
mkfifo "$pipe"
exec 3<>"$pipe" 4<"$pipe"
rm "$pipe"
pids=()
for i in "${!hosts[@]}"; do
    flags=(--nnodes "${#hosts[@]}" --node-rank "$i" --nproc-per-node "${RANKS_PER_NODE:-1}"
        --master-addr "${hosts[0]}" --master-port "${PORT:-20000}" --max-restarts 3
        train.py --resume auto "$@")
    printf -v command ' %q' bash -c "$on_host" torchrun "${flags[@]}"
    ${SSH:-ssh} "${hosts[$i]}" "cd $(printf %q "$root") && . .venv/bin/activate &&$command" \
        <&4 3>&- 4<&- &
    pids+=($!)
done
trap 'exec 3>&-' INT TERM HUP # closes the input of all hosts

status=0
for pid in "${pids[@]}"; do
    while true; do # a signal ends one wait, and not the run
        wait "$pid"
        code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    [ "$code" -eq 0 ] || status=$code
done
exit "$status"
