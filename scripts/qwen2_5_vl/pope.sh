#!/usr/bin/env bash
exec bash "$(dirname "$0")/../_apet.sh" eval qwen2_5_vl pope "$@"
