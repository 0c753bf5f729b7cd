"""Score ScienceQA answers: ``python -m llava.eval.eval_science_qa``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["scienceqa"].main("eval_science_qa")

if __name__ == "__main__":
    sys.exit(main())
