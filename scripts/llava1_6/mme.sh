#!/usr/bin/env bash
# MME with LLaVA-1.6, to the perception and cognition scores. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_6 mme 640 "$@"
