#!/usr/bin/env bash
# POPE with Qwen2.5-VL, to the three F1 scores and their mean. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl pope 20 "$@"
