#!/usr/bin/env bash
# TextVQA validation with LLaVA-1.5 (OCR tokens in the prompt), to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_5 textvqa 192 "$@"
