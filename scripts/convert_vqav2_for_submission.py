"""The published name of ``python -m apet.eval.convert vqav2``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["vqav2"].main("convert_vqav2_for_submission")

if __name__ == "__main__":
    sys.exit(main())
