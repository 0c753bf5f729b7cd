#!/usr/bin/env bash
# Runs ApET's command line in the root of this checkout, installed or not: bash scripts/_apet.sh eval llava1_5 gqa
#
#   PYTHON   interpreter (default: .venv/bin/python if there is one, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHON PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m apet "$@"
