# shellcheck shell=bash disable=SC2034
# MSRVTT-QA test, to accuracy. Sourced by scripts/_common.sh.
VIDEO_QA=MSRVTT_Zero_Shot_QA
VIDEOS=videos/all
source scripts/_benchmarks/_video_qa.sh
