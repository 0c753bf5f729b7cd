#!/usr/bin/env bash
# Several hosts, each with the checkout, the checkpoint under the same path, and the same settings (MODEL, TOKENS, APET):
#
#   data parallel: every host answers requests, the first one hands them out
#     first host    bash examples/serving/several_hosts.sh data first HOSTS GPUS_PER_HOST FIRST_ADDRESS --api-key KEY
#     host N = 1..  bash examples/serving/several_hosts.sh data N HOSTS GPUS_PER_HOST FIRST_ADDRESS
#   Ray: one model over all hosts (pipeline over hosts, tensor within)
#     first host    bash examples/serving/several_hosts.sh ray first HOSTS GPUS_PER_HOST FIRST_ADDRESS --api-key KEY
#     host N = 1..  bash examples/serving/several_hosts.sh ray N HOSTS GPUS_PER_HOST FIRST_ADDRESS
#
# The first host listens on FIRST_ADDRESS (or HOST, an address of its own) and wants the key (--api-key, or VLLM_API_KEY in
# the environment) from whoever asks under /v1 (vLLM answers /invocations without it: open the port to clients only). More
# flags of vllm serve may follow. RPC_PORT (13345) and RAY_PORT (6379) must be open between the hosts, and to nobody else:
# what vLLM and Ray say to each other there knows no key.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ $# -lt 5 ]; then sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; fi
kind=$1 role=$2 hosts=$3 gpus=$4 first=$5
shift 5
export HOST=${HOST:-$first}
case " $HOST $* " in
    *" 0.0.0.0 "* | *" :: "* | *" [::] "* | *=0.0.0.0\ * | *=::\ *)
        echo "0.0.0.0 and :: listen on every network of this host; name one of its addresses in HOST, such as $first" >&2
        exit 2
        ;;
esac
if [ "$role" = first ] && [ -z "${VLLM_API_KEY:-}" ] && [[ " $* " != *" --api-key"[\ =][!\ -]* ]]; then
    echo "the server is reached from other hosts: give it a key with --api-key KEY, or in VLLM_API_KEY, which ps does" \
        "not show (openssl rand -hex 32 makes one)" >&2
    exit 2
fi

case $kind in
    data)
        share=(--data-parallel-size $((hosts * gpus)) --data-parallel-size-local "$gpus" --data-parallel-address "$first"
            --data-parallel-rpc-port "${RPC_PORT:-13345}")
        if [ "$role" != first ]; then share+=(--headless --data-parallel-start-rank $((role * gpus))); fi
        exec bash scripts/serve.sh "${share[@]}" "$@"
        ;;
    ray)
        . scripts/_vllm.sh
        apet_vllm_env
        export APET_VENV
        "$PYTHON" -c "import ray" || "$PYTHON" -m pip install "ray[default]"
        if [ "$role" != first ]; then exec ray start --block --address "$first:${RAY_PORT:-6379}"; fi
        ray start --head --node-ip-address "$first" --port "${RAY_PORT:-6379}"
        until [ "$(ray status | grep -c node_)" -ge "$hosts" ]; do sleep 2; done
        exec bash scripts/serve.sh --distributed-executor-backend ray --pipeline-parallel-size "$hosts" \
            --tensor-parallel-size "$gpus" "$@"
        ;;
    *) echo "choose data or ray, not $kind" >&2 && exit 2 ;;
esac
