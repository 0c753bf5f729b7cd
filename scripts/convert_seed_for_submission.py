"""The published name of ``python -m apet.eval.convert seed``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import CONVERTERS

main = CONVERTERS["seed"].main("convert_seed_for_submission")

if __name__ == "__main__":
    sys.exit(main())
