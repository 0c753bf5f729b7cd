"""The published name of ``python -m apet.eval.convert vizwiz``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["vizwiz"].main("convert_vizwiz_for_submission")

if __name__ == "__main__":
    sys.exit(main())
