"""The published name of ``python -m apet.eval.convert sqa``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["sqa"].main("convert_sqa_to_llava")

if __name__ == "__main__":
    sys.exit(main())
