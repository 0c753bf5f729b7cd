"""The published name of ``python -m apet.eval.convert mme``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["mme"].main("convert_answer_to_mme")

if __name__ == "__main__":
    sys.exit(main())
