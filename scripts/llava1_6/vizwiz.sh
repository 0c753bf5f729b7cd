#!/usr/bin/env bash
# VizWiz test with LLaVA-1.6, to the upload file of its server. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 vizwiz 640 "$@"
