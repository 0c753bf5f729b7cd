#!/usr/bin/env bash
# POPE with LLaVA-1.6, to the three F1 scores and their mean. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 pope 640 "$@"
