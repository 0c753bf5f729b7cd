"""The published name of ``python -m apet.eval.convert mmvet``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["mmvet"].main("convert_mmvet_for_eval")

if __name__ == "__main__":
    sys.exit(main())
