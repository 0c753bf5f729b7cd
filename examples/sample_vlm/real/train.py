"""Train the projector and the decoder's LoRA on generated pictures; the tower and the decoder stay as they are.

    python -m examples.sample_vlm.real train --base runs/real/base --out runs/real/run --minutes 8
    python -m examples.sample_vlm.real train --base tiny --out runs/dry --minutes 0.2      # dry run: no wheel, seconds

The schedule runs on training time: phases and learning rates are functions of the share of `--minutes` that is spent,
on a CPU as on a GPU. First the projector alone learns to put every patch near the words of what it shows; then
projector and LoRA learn to answer, on windows of 168 pixels (144 tokens) and at last on 336 pixels (576 tokens).

Killed at any time, the same command goes on from the last state. `--out` holds `state.pt` (all of it),
`trained.safetensors` (fp16, what git holds; a run that has only this goes on from it with fresh optimiser moments) and
`log.jsonl`.
"""

import argparse
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from examples.sample_vlm.real.base import load_base, write_tiny_base
from examples.sample_vlm.real.batches import Order, loader
from examples.sample_vlm.real.model import RealVlm
from examples.sample_vlm.scenes import CANVAS


@dataclass(frozen=True)
class Phase:
    """Up to the share `until` of the time: picture side, and whether questions are asked."""

    until: float
    side: int
    asks: bool = True


PHASES = (Phase(0.08, CANVAS, asks=False), Phase(0.4, 168), Phase(1.0, CANVAS))
ALONE_RATE, PROJECTOR_RATE, LORA_RATE = 2e-3, 5e-4, 8e-4
WARM_STEPS = 100
FLAT_UNTIL = 0.6  # of the time; then the rates fall to a fiftieth
WORDS_UNTIL = 0.4  # the words' loss fades out until here
SAVE_SECONDS, PRINT_SECONDS = 60, 10
EXAM_SEED = 1


@dataclass(frozen=True)
class Sizes:
    """What fits a device: pictures per batch while only looking, at 168 and at 336 pixels; tokens for questions."""

    looked_at: int
    small: int
    full: int
    region: int = 344
    answers: int = 96

    def pictures(self, phase: Phase) -> int:
        """Pictures per batch of a phase."""
        return self.looked_at if not phase.asks else self.small if phase.side < CANVAS else self.full


SIZES = {"cuda": Sizes(64, 64, 32), "cpu": Sizes(6, 2, 1), "tiny": Sizes(4, 2, 2, region=500, answers=120)}


class Trainer:
    """Model, optimiser, clock and log of one run in one folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, args.out
        self.out.mkdir(parents=True, exist_ok=True)
        base_folder = self._base_folder()
        self.device = torch.device(args.device)
        self.sizes = SIZES["tiny" if args.base == "tiny" else self.device.type]
        torch.manual_seed(args.seed)
        base = load_base(base_folder, getattr(torch, args.dtype), args.random_weights)
        self.chat_folder = base_folder / "tokenizer"
        self.model = RealVlm(base).to(self.device)
        if args.compile:
            for layer in self.model.decoder.layers:
                layer.compile(dynamic=False)
        projector = list(self.model.projector.parameters())
        own = {id(p) for p in projector}
        lora = [p for p in self.model.trained().values() if id(p) not in own]
        self.optimizer = torch.optim.AdamW(
            [{"params": projector}, {"params": lora}], betas=(0.9, 0.98), weight_decay=0.01, fused=args.device != "cpu"
        )
        self.step = self.ordered = self.phase_step = 0
        self.counts, self.sums = defaultdict(float), defaultdict(float)
        self.spent, self.started, self.stop = self.load(), time.monotonic(), False
        signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _base_folder(self) -> Path:
        if self.args.base != "tiny":
            return Path(self.args.base)
        write_tiny_base(self.out / "tiny_base")
        return self.out / "tiny_base"

    def _ask_to_stop(self, number, frame) -> None:
        self.stop = True

    def elapsed(self) -> float:
        """Seconds trained, over all sessions."""
        return self.spent + time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the plan that is done."""
        return self.elapsed() / (self.args.minutes * 60)

    def phase(self, progress: float) -> Phase:
        """The phase at this progress."""
        return next((phase for phase in PHASES if progress < phase.until), PHASES[-1])

    def next_order(self) -> Order | None:
        """What the data workers make next; None when the plan, or this session, is over."""
        over = self.args.session_minutes and self.elapsed() - self.spent > self.args.session_minutes * 60
        if self.stop or over or self.progress() >= 1:
            return None
        phase, self.ordered = self.phase(self.progress()), self.ordered + 1
        asks = (self.sizes.region, self.sizes.answers) if phase.asks else (0, 0)
        return Order(self.ordered, phase.side, self.sizes.pictures(phase), *asks)

    def run(self) -> None:
        """Train until the plan or this session is over; saves on the way and at the end."""
        exam = list(self.exam(self.args.exam_pictures // 4))
        printed = saved = time.monotonic()
        last = None
        for order, batch in self._batches(self.next_order, self.args.seed):
            if self.stop:
                break
            kind = (order.side, order.region > 0)
            self.phase_step = self.phase_step + 1 if kind == last else 1
            last = kind
            self.train_step(order, batch)
            now = time.monotonic()
            if now - printed > PRINT_SECONDS:
                self.report(order, now - printed)
                printed = now
            if now - saved > SAVE_SECONDS:
                self.save()
                if order.region:
                    self.grade(exam, "exam")
                saved = time.monotonic()
        self.save()
        if self.progress() >= 1:
            self.grade(self.exam(self.args.exam_pictures), "final")

    def _batches(self, next_order, seed: int) -> Iterable[tuple[Order, dict]]:
        workers = self.args.workers
        for order, batch in loader(seed, self.chat_folder, workers, next_order, pin=self.device.type == "cuda"):
            yield (
                order,
                {n: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for n, v in batch.items()},
            )

    def exam(self, pictures: int) -> Iterable[tuple[Order, dict]]:
        """Batches of held-out pictures, the same in every session."""
        size = self.sizes.full
        orders = iter(
            Order(i, CANVAS, size, self.sizes.region, self.sizes.answers, "test") for i in range(-(-pictures // size))
        )
        return self._batches(lambda: next(orders, None), EXAM_SEED)

    def train_step(self, order: Order, batch: dict) -> None:
        """One optimiser step."""
        progress = self.progress()
        if not bool(self.counts["pictures"]):
            self.model.measure(self.model.see(batch["pixels"], batch["origins"]))
        self.set_rates(progress, order.region > 0)
        features = self.model.see(batch["pixels"], batch["origins"])
        losses, words = {}, max(0.0, 1 - progress / WORDS_UNTIL) if order.region else 1.0
        if order.region:
            losses["answer"] = self.model.answer_loss(features, batch, self.args.compile)
        if words:
            losses["words"], hit = self.model.word_loss(features, batch["shown"])
            self.sums["patches"] += hit.detach()
        (losses.get("answer", 0.0) + words * losses.get("words", 0.0)).backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.counts["pictures"] += order.pictures
        self.counts["questions"] += sum(len(row) for row in batch.get("types", ()))
        for name, loss in losses.items():
            self.sums[name] += loss.detach()
        self.sums["steps"] += 1
        self.sums["pictures"] += order.pictures

    def set_rates(self, progress: float, asks: bool) -> None:
        """Rates of projector and LoRA: a warm-up in each phase, flat, then linear to a fiftieth."""
        warm = min(1.0, self.phase_step / WARM_STEPS)
        fall = max(0.02, 1 - max(0.0, progress - FLAT_UNTIL) / (1 - FLAT_UNTIL))
        rates = (PROJECTOR_RATE, LORA_RATE) if asks else (ALONE_RATE, 0.0)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm * fall

    def report(self, order: Order, seconds: float) -> None:
        """Print and log the mean losses and the pace since the last report."""
        sums = {name: float(value) for name, value in self.sums.items()}
        self.sums.clear()
        steps = sums.pop("steps")
        entry = {"step": self.step, "seconds": round(self.elapsed(), 1), "side": order.side}
        entry["pictures_per_second"] = round(sums.pop("pictures") / seconds, 1)
        if self.device.type == "cuda":
            entry["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        self.log(entry | {name: round(value / steps, 4) for name, value in sums.items()})

    def grade(self, exam: Iterable[tuple[Order, dict]], name: str) -> dict:
        """Print and log the share of held-out questions answered exactly, per type and over all."""
        right, asked = defaultdict(int), defaultdict(int)
        for _, batch in exam:
            wrong = (~self.model.right(batch) & (batch["weights"] > 0)).float()
            count = max(len(row) for row in batch["types"])
            per_turn = torch.zeros(len(wrong), count, device=wrong.device).scatter_add_(1, batch["of"], wrong).tolist()
            for row, mistakes in zip(batch["types"], per_turn, strict=True):
                for kind, wrongs in zip(row, mistakes, strict=False):
                    for key in (kind, "all"):
                        right[key] += wrongs == 0
                        asked[key] += 1
        scores = {key: round(right[key] / asked[key], 4) for key in sorted(asked)}
        entry = {name: scores, "questions": dict(asked), "step": self.step, "seconds": round(self.elapsed(), 1)}
        self.log(entry | {"seen": dict(self.counts)})
        return scores

    def log(self, entry: dict) -> None:
        """One line for people and for `log.jsonl`."""
        line = json.dumps(entry)
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write both files; each replaces the old one in one move."""
        trained = {name: p.detach() for name, p in self.model.trained().items()}
        trained |= {f"projector.{n}": b for n, b in self.model.projector.named_buffers()}
        notes = {"step": self.step, "ordered": self.ordered, "seconds": self.elapsed(), **self.counts}
        state = {"trained": trained, "optimizer": self.optimizer.state_dict(), **notes}
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")
        half = {name: value.half().contiguous().cpu() for name, value in trained.items()}
        save_file(half, self.out / "trained.tmp", metadata={name: str(value) for name, value in notes.items()})
        os.replace(self.out / "trained.tmp", self.out / "trained.safetensors")

    def load(self) -> float:
        """Go on from what the folder holds; returns the seconds already spent."""
        full, small = self.out / "state.pt", self.out / "trained.safetensors"
        if full.exists():
            state = torch.load(full, map_location=self.device, weights_only=True)
            trained, notes = state.pop("trained"), state
            self.optimizer.load_state_dict(notes.pop("optimizer"))
        elif small.exists():
            trained, notes = read_trained(small)
        else:
            return 0.0
        load_trained(self.model, trained)
        self.step, self.ordered = int(notes["step"]), int(notes["ordered"])
        self.counts.update({name: float(notes[name]) for name in ("pictures", "questions")})
        print(f"goes on from {full if full.exists() else small}: step {self.step}, {notes['seconds']} seconds spent")
        return float(notes["seconds"])


def read_trained(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the notes of a `trained.safetensors`."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def load_trained(model: RealVlm, trained: dict[str, torch.Tensor]) -> None:
    """Put trained tensors of any dtype into the model; refuses a set that is not exactly this model's."""
    own = model.trained() | {f"projector.{n}": b for n, b in model.projector.named_buffers()}
    if own.keys() != trained.keys():
        raise SystemExit(f"trained parts do not fit this model: {sorted(own.keys() ^ trained.keys())[:4]} ...")
    with torch.no_grad():
        for name, value in trained.items():
            own[name].copy_(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `train`, and of `evaluate`, which is a run without time."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--base", default="runs/real/base", help="folder written by `base`; `tiny`: a dry run")
    parser.add_argument("--out", type=Path, default=Path("runs/real/run"), help="state, trained parts and log")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--workers", type=int, default=14 if on_gpu else 0, help="processes that draw pictures")
    parser.add_argument("--exam_pictures", type=int, default=384 if on_gpu else 32, help="held-out pictures at the end")
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    parser.add_argument("--random_weights", action="store_true", help="rehearse: draw the frozen weights at random")
    parser.add_argument("--seed", type=int, default=0)


def evaluate(args: argparse.Namespace) -> None:
    """Held-out accuracy of the trained parts in `--out`, as a table."""
    trainer = Trainer(argparse.Namespace(**vars(args), minutes=0, session_minutes=None))
    if not trainer.step:
        raise SystemExit(f"{args.out} holds no trained parts to evaluate")
    scores = trainer.grade(trainer.exam(args.exam_pictures), "evaluation")
    print("\n".join(f"{name:<16}{score:>8.1%}" for name, score in scores.items()))


def main(args: argparse.Namespace) -> None:
    """Train as the command line says."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    trainer = Trainer(args)
    count = sum(p.numel() for p in trainer.model.trained().values())
    print(f"{count / 1e6:.2f} M trained parameters on {trainer.device}, {args.dtype}", flush=True)
    trainer.run()
