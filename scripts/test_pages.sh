#!/usr/bin/env bash
# Tests what is looked at in a browser, in an environment of its own (.venv/pages, made on first use): the demo in a
# headless Chromium (Debian: apt-get install chromium), the documentation site, the notebook.
#
#   bash scripts/test_pages.sh [pytest arguments]
#
# APET_VENV names another environment, or "none" for the active one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_env.sh
# Gradio does not allow the Pillow of constraints.txt yet.
export APET_PINS=${APET_PINS:-pillow<13}
apet_test_apart pages tests/demo tests/docs tests/test_examples.py "$@"
