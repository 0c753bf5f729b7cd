# shellcheck shell=bash disable=SC2034
# LLaVA-1.5: checkpoint, prompts and published budgets. Sourced by scripts/_common.sh.
MODEL=${MODEL:-data/model/llava-v1.5-7b}
CONV_MODE=${CONV_MODE:-vicuna_v1}
# TOKENS:visual_token_num/image_token_list: tokens per image, averaged over the 32 layers of the 7B model
BUDGETS=(192:288/96 128:192/64 64:96/32)
BUDGET_LAYER=16
# published TextVQA numbers are with the OCR tokens in the prompt
FAMILY_OCR=1
