#!/usr/bin/env bash
# GQA test-dev balanced with Qwen2.5-VL, to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl gqa 20 "$@"
