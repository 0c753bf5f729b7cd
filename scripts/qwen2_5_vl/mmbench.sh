#!/usr/bin/env bash
# MMBench dev with Qwen2.5-VL, to the local circular accuracy and the upload file of its server. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl mmbench 20 "$@"
