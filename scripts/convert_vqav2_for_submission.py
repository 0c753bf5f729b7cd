"""The published name of ``python -m apet.eval.convert vqav2``."""

import sys

import _checkout  # noqa: F401

from apet.eval.convert import program

main = program("vqav2", "convert_vqav2_for_submission")

if __name__ == "__main__":
    sys.exit(main())
