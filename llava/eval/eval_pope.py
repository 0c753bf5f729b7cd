"""Score POPE answers: ``python -m llava.eval.eval_pope``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["pope"].main("eval_pope")

if __name__ == "__main__":
    sys.exit(main())
