# shellcheck shell=bash disable=SC2034
# MMBench-CN dev: MMBench with questions and instruction in Chinese. Sourced by scripts/_common.sh.
MM_LANG=cn
SPLIT=${SPLIT:-mmbench_dev_cn_20231003}
source scripts/_benchmarks/mmbench.sh
