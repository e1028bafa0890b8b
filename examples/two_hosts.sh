#!/usr/bin/env bash
# A training of two nodes on one machine: each host has a network of its own, and all they share is a switch and the disk.
#
#   bash examples/two_hosts.sh --hf-checkpoint DIR --prompt-data FILE --run-dir DIR [more flags of pretrain_gft.py]
#
#   host 1   10.77.0.1   torchrun, node 0: MASTER_ADDR
#   host 2   10.77.0.2   torchrun, node 1
#   host 3   10.77.0.3   WORKER, a shell command, if there is one: a server that generates, on port 30000
#
#   GFT_SGLANG_API_KEY=... GFT_SGLANG_ADMIN_KEY=... bash examples/two_hosts.sh ... \
#       --rollout-engine sglang --sglang-urls http://10.77.0.3:30000
#   with WORKER="python tools/sglang_worker.py --model DIR --device cpu --host 10.77.0.3"
#
# RANKS is the number of ranks on a host (1); with 2, --tensor-model-parallel-size 2 keeps tensor parallelism inside the
# hosts and replicates across them. What an address is wrong for, or a name that only one host can resolve, or a
# listener on loopback, shows here before it shows on a cluster. On real nodes slurm_multinode.sbatch does the same.
#
# Needs Linux, iproute2 and util-linux, and root or user namespaces; exit status 77 where they are not to be had. Hosts
# and processes live in namespaces that the kernel takes down with this script, however it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
RANKS=${RANKS:-1}
PYTHON=${PYTHON:-python}

if [ "${1:-}" != --inside ]; then
    isolate=(unshare --net --pid --fork --kill-child --mount-proc)
    [ "$(id -u)" = 0 ] || isolate+=(--user --map-root-user)
    # A switch is the first thing that needs more than a namespace.
    if ! reason=$("${isolate[@]}" ip link add switch type bridge 2>&1); then
        echo "error: this machine gives no network namespaces (${reason}); needed are iproute2, util-linux, and root or" \
            "kernel.unprivileged_userns_clone=1" >&2
        exit 77
    fi
    exec "${isolate[@]}" bash examples/two_hosts.sh --inside "$@"
fi
shift
trap 'exit 130' INT TERM # the first process of a namespace ignores what it has no trap for

ip link add switch type bridge
ip link set switch up
declare -A holder

make_host() { # number
    unshare --net sleep infinity &
    local process=$!
    until [ "$(readlink /proc/$process/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
    holder[$1]=$process
    ip link add "port$1" type veth peer name eth0 netns "$process"
    ip link set "port$1" master switch up
    on "$1" ip addr add "10.77.0.$1/24" dev eth0
    on "$1" ip link set eth0 up
    on "$1" ip link set lo up
}

on() { # number command...
    nsenter --target "${holder[$1]}" --net -- "${@:2}"
}

for host in 1 2 3; do
    make_host "$host"
done

export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ -n "${WORKER:-}" ]; then
    on 3 bash -c "$WORKER" &
    until on 1 bash -c ': < /dev/tcp/10.77.0.3/30000' 2>/dev/null; do
        kill -0 $! # it has ended, and so does this script
        sleep 0.5
    done
fi
nodes=()
for node in 0 1; do
    on $((node + 1)) "$PYTHON" -m torch.distributed.run --nnodes 2 --node-rank "$node" --nproc-per-node "$RANKS" \
        --master-addr 10.77.0.1 --master-port 29500 --local-addr "10.77.0.$((node + 1))" \
        examples/pretrain_gft.py "$@" &
    nodes+=($!)
done
# Whoever fails first ends it: the other node would wait for it until its time-out.
wait -n "${nodes[@]}"
wait "${nodes[@]}"
for host in 1 2 3; do
    awk -v host="$host" '/eth0/ {print "host " host ": received " $2 " bytes, sent " $10}' "/proc/${holder[$host]}/net/dev"
done
