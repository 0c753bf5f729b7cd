"""The published name of ``python -m apet.eval.convert mmbench``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["mmbench"].main("convert_mmbench_for_submission")

if __name__ == "__main__":
    sys.exit(main())
