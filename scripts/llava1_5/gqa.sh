#!/usr/bin/env bash
# GQA test-dev balanced with LLaVA-1.5, to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_5 gqa 64 "$@"
