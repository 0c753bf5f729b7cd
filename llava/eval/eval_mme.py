"""Score MME tables: ``python -m llava.eval.eval_mme``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["mme"].main("eval_mme")

if __name__ == "__main__":
    sys.exit(main())
