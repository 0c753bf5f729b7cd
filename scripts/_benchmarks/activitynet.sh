# shellcheck shell=bash disable=SC2034
# ActivityNet-QA test, to accuracy. Sourced by scripts/_common.sh.
VIDEO_QA=Activitynet_Zero_Shot_QA
VIDEOS=all_test
source scripts/_benchmarks/_video_qa.sh
