#!/usr/bin/env bash
# MME with Qwen2.5-VL, to the perception and cognition scores. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl mme 20 "$@"
