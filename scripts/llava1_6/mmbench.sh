#!/usr/bin/env bash
# MMBench dev with LLaVA-1.6, to the local circular accuracy and the upload file of its server. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 mmbench 640 "$@"
