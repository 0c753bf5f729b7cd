"""Score VQAv2 answers: ``python -m llava.eval.eval_vqav2``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["vqav2"].main("eval_vqav2")

if __name__ == "__main__":
    sys.exit(main())
