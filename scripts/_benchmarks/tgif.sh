# shellcheck shell=bash disable=SC2034
# TGIF-QA test, to accuracy. Sourced by scripts/_common.sh.
VIDEO_QA=TGIF_Zero_Shot_QA
VIDEOS=mp4
source scripts/_benchmarks/_video_qa.sh
