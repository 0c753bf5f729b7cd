#!/usr/bin/env bash
exec bash "$(dirname "$0")/../_apet.sh" eval video_llava msrvtt "$@"
