#!/usr/bin/env bash
# TextVQA validation with Qwen2.5-VL (OCR tokens in the prompt), to accuracy. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark qwen2_5_vl textvqa 20 "$@"
