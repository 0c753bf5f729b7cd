# shellcheck shell=bash disable=SC2034
# Video-LLaVA: checkpoint, prompts and published budget. Sourced by scripts/_common.sh.
MODEL=${MODEL:-data/model/Video-LLaVA-7B-hf}
CONV_MODE=${CONV_MODE:-llava_v1}
VISION_BUDGET=VIDEO_TOKEN_NUM LLM_BUDGET=IMAGE_TOKEN_LIST ALL_TOKENS=
# TOKENS:video_token_num/image_token_list: patch tokens of 8 frames, 22 merged and 10 basis tokens each; none in the decoder
BUDGETS=(256:22/)
BUDGET_LAYER=16
