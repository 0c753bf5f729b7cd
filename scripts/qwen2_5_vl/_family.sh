# shellcheck shell=bash disable=SC2034
# Qwen2.5-VL: checkpoint and published budgets. Sourced by scripts/_common.sh. MODEL may also be a Qwen2-VL or Qwen3-VL.
MODEL=${MODEL:-data/model/Qwen2.5-VL-7B-Instruct}
# not used: the checkpoint has a chat template
CONV_MODE=${CONV_MODE:-vicuna_v1}
VISION_BUDGET=IMAGE_TOKEN_RATIO LLM_BUDGET=IMAGE_TOKEN_RATIO_LIST ALL_TOKENS=1.0
# TOKENS:image_token_ratio/image_token_ratio_list: percent of the tokens, averaged over the 28 layers of the 7B model. The
# published flags say 20; the published code ignored the one for the layer, so that its numbers are those of 30.
BUDGETS=(20:0.300/0.333 30:0.300/)
BUDGET_LAYER=14
FAMILY_OCR=1
