"""Summarise LLaVA-Bench reviews: ``python -m llava.eval.summarize_gpt_review``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["llava_bench"].main("summarize_gpt_review")

if __name__ == "__main__":
    sys.exit(main())
