#!/usr/bin/env bash
# ScienceQA test with Qwen2.5-VL, to accuracy and IMG-accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl sqa 20 "$@"
