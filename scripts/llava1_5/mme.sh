#!/usr/bin/env bash
# MME with LLaVA-1.5, to the perception and cognition scores. Settings: scripts/_common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../_common.sh"
run_benchmark llava1_5 mme 192 "$@"
