#!/usr/bin/env bash
# ScienceQA test with LLaVA-1.6, to accuracy and IMG-accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 sqa 640 "$@"
