#!/usr/bin/env bash
# MSRVTT-QA test with Video-LLaVA, to accuracy by text or by a judge. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark video_llava msrvtt 256 "$@"
