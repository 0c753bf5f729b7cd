#!/usr/bin/env bash
# ScienceQA test with LLaVA-1.5, to accuracy and IMG-accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_5 sqa 192 "$@"
