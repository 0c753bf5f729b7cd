#!/usr/bin/env bash
# TextVQA validation with LLaVA-1.6 (no OCR tokens in the prompt), to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 textvqa 640 "$@"
