#!/usr/bin/env bash
exec bash "$(dirname "$0")/../_apet.sh" eval llava1_5 mmbench "$@"
