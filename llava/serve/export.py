"""Write a LLaVA-1.5 checkpoint for serving engines: ``python -m llava.serve.export --model-path M --out FOLDER``.

The folder holds the Hugging Face layout with a chat template, so that an OpenAI-compatible server gives the prompts
and the pixels of the programs below `llava.eval`.
"""

import argparse
import sys

from apet.eval.scoring_cli import Parser, run
from llava.model.hugging_face import export_checkpoint


def parser() -> Parser:
    """The program's flags."""
    flags = Parser(prog="python -m llava.serve.export", description=__doc__.partition(":")[0], allow_abbrev=False)
    flags.add_argument("--model-path", type=str, required=True, help="checkpoint folder or hub id, either layout")
    flags.add_argument("--out", type=str, required=True, help="new folder")
    flags.add_argument("--conv-mode", type=str, default="vicuna_v1", help="prompts the chat template reproduces")
    return flags


def export(args: argparse.Namespace) -> None:
    """Write the folder and say where it is."""
    print(f"{export_checkpoint(args.model_path, args.out, args.conv_mode)}: Hugging Face layout of {args.model_path}")


if __name__ == "__main__":
    sys.exit(run(parser(), export))
