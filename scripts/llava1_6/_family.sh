# shellcheck shell=bash disable=SC2034
# LLaVA-1.6 (LLaVA-NeXT): checkpoint, prompts and published budgets. Sourced by scripts/_common.sh.
MODEL=${MODEL:-data/model/llava-v1.6-vicuna-7b}
CONV_MODE=${CONV_MODE:-vicuna_v1}
# TOKENS:visual_token_num/image_token_list. visual_token_num is per crop, image_token_list per image; TOKENS is the mean
# over 32 layers for an image of five crops (newline tokens come on top; what was kept is printed after the run).
BUDGETS=(640:192/320 320:96/160 160:48/80)
# The published flags mean the same budgets, but their code cuts only the base crop in the decoder: COMPAT=published
# repeats those numbers.
if [ "${COMPAT:-}" = published ]; then BUDGETS=(640:192/64 320:96/32 160:48/16); fi
BUDGET_LAYER=16
# published TextVQA numbers are without the OCR tokens in the prompt
FAMILY_OCR=0
