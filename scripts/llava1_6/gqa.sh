#!/usr/bin/env bash
# GQA test-dev balanced with LLaVA-1.6, to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 gqa 640 "$@"
