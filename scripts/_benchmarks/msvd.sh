# shellcheck shell=bash disable=SC2034
# MSVD-QA test, to accuracy. Sourced by scripts/_common.sh.
VIDEO_QA=MSVD_Zero_Shot_QA
VIDEOS=videos
source scripts/_benchmarks/_video_qa.sh
