"""Score TextVQA answers: ``python -m llava.eval.eval_textvqa``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["textvqa"].main("eval_textvqa")

if __name__ == "__main__":
    sys.exit(main())
