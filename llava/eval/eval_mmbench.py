"""Score MMBench answers: ``python -m llava.eval.eval_mmbench``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["mmbench"].main("eval_mmbench")

if __name__ == "__main__":
    sys.exit(main())
