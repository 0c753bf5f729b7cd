"""The published name of ``python -m apet.eval.convert gqa``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["gqa"].main("convert_gqa_for_eval")

if __name__ == "__main__":
    sys.exit(main())
