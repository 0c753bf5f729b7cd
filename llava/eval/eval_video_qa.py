"""Score answers about videos: ``python -m llava.eval.eval_video_qa``, an entry of `apet.eval.scorers`."""

import sys

from apet.eval.scorers import SCORERS

main = SCORERS["video_qa"].main("eval_video_qa")

if __name__ == "__main__":
    sys.exit(main())
