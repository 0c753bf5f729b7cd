#!/usr/bin/env bash
# Tries the newest transformers there is, bound or no bound, and says whether ApET runs on it and what breaks.
#
#   bash scripts/canary.sh
#
# Exit status 0: the bound in requirements.txt and apet/adapters/host.py can be raised (CONTRIBUTING.md says how).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
. scripts/_canary.sh
apet_env test || exit
canary canary.log bash scripts/hosts.sh "transformers"
