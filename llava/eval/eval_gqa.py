"""Score GQA predictions: ``python -m llava.eval.eval_gqa``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["gqa"].main("eval_gqa")

if __name__ == "__main__":
    sys.exit(main())
