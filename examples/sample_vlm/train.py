"""Train the sample model, then export it.

    python -m examples.sample_vlm.train --size small                       # two CPU cores, 90 minutes
    python -m examples.sample_vlm.train --size full --device cuda          # one GPU, under 25 minutes
    python -m examples.sample_vlm.train --size full --device cuda --session_minutes 8   # a slice; repeat to continue

The schedule runs on training time, not on steps: a plan has so many minutes, and phases, learning rate and auxiliary
loss are functions of the fraction spent. A slow or busy machine therefore sees fewer samples, but still ends with a
decayed learning rate and with the phase that matters most: full 336-pixel pictures (576 image tokens), no auxiliary
loss, ordinary prompts. Killed at any time, the same command continues from the last checkpoint.

The matrices of the layers are trained with Muon, everything else with AdamW.

On a CPU shared with other work set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait for a core that somebody
else uses made training five times slower.
"""

import argparse
import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from examples.sample_vlm.data import Batch, Order, loader
from examples.sample_vlm.export import export, new_model
from examples.sample_vlm.model import SIZES, SampleVlm


@dataclass(frozen=True)
class Phase:
    """Up to the fraction `until` of the time: window side in pixels, pictures per batch, questions per picture."""

    until: float
    side: int
    pictures: int
    per_picture: int


@dataclass(frozen=True)
class Plan:
    """A training run.

    `seeing_until` is when the auxiliary loss ends and `flat_until` when the learning rate begins to fall. Until the
    former, every `seeing_every`-th batch is `seeing_pictures` small pictures for the tower alone (0: none): they cost a
    fifth of pictures with questions, and the tower is what needs most of them. `compiled` layers pay on long runs.
    """

    minutes: float
    learning_rate: float
    phases: tuple[Phase, ...]
    workers: int
    seeing_until: float = 0.72
    flat_until: float = 0.55
    warm_up: float = 0.015
    seeing_every: int = 0
    seeing_pictures: int = 48
    compiled: bool = False


PLANS = {
    "small": Plan(
        minutes=90,
        learning_rate=1.5e-3,
        phases=(Phase(0.1, 112, 64, 0), Phase(0.58, 112, 20, 8), Phase(0.7, 224, 8, 8), Phase(1.0, 336, 5, 8)),
        workers=1,
        seeing_until=0.86,
        seeing_every=2,
        seeing_pictures=64,
        compiled=True,
    ),
    "full": Plan(
        minutes=23,
        learning_rate=6e-4,
        phases=(Phase(0.08, 112, 512, 0), Phase(0.55, 112, 256, 8), Phase(0.78, 224, 96, 8), Phase(1.0, 336, 48, 8)),
        workers=14,
    ),
    "mini": Plan(
        minutes=0.1,
        learning_rate=1e-3,
        phases=(Phase(0.3, 56, 4, 0), Phase(0.6, 56, 4, 2), Phase(0.8, 112, 2, 2), Phase(1.0, 336, 1, 2)),
        workers=0,
    ),
}


class Clock:
    """Time spent in training over all sessions, as a fraction of the plan; or steps, when a number of them is given."""

    def __init__(self, minutes: float, max_steps: int | None, spent: float = 0.0):
        self.seconds, self.max_steps = minutes * 60, max_steps
        self.spent, self.started = spent, time.monotonic()

    def elapsed(self) -> float:
        """Seconds trained so far."""
        return self.spent + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """0 at the start, 1 or more when the run is over."""
        return step / self.max_steps if self.max_steps else self.elapsed() / self.seconds


class Trainer:
    """Model, optimiser, clock and log of one run in one folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.plan = args, PLANS[args.plan or args.size]
        self.folder = args.out / args.size
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.model = new_model(SIZES[args.size]).to(args.device)
        on_gpu = args.device.startswith("cuda")
        compiled = self.plan.compiled if args.compile is None else args.compile
        self.model.speed_up("sdpa" if on_gpu else "eager", compiled)
        self.optimizers = _optimizers(self.model, fused=on_gpu)
        self.step, self.log, spent = 0, [], 0.0
        if self.checkpoint.exists() and not args.restart:
            spent = self.load()
        self.ordered = self.step
        self.clock = Clock(args.minutes or self.plan.minutes, args.max_steps, spent)

    @property
    def checkpoint(self) -> Path:
        """Where the run's state lies."""
        return self.folder / "last.pt"

    def phase(self, progress: float) -> tuple[Phase, float]:
        """The phase at this progress, and how far training is into it."""
        start = 0.0
        for phase in self.plan.phases:
            if progress < phase.until:
                return phase, progress - start
            start = phase.until
        return phase, progress - start

    def next_order(self) -> Order | None:
        """What the data workers should make next; None when the time is up."""
        progress = self.clock.progress(self.ordered if self.clock.max_steps else self.step)
        session_over = self.args.session_minutes and (
            self.clock.elapsed() - self.clock.spent > self.args.session_minutes * 60
        )
        if progress >= 1 or session_over:
            return None
        phase, _ = self.phase(progress)
        self.ordered += 1
        every = self.plan.seeing_every if progress < self.plan.seeing_until else 0
        if every and self.ordered % every == 0:
            return Order(self.ordered, self.plan.phases[0].side, self.plan.seeing_pictures, 0)
        return Order(self.ordered, phase.side, phase.pictures, phase.per_picture)

    def run(self) -> None:
        """Train until the plan (or this session) is over; saves on the way and at the end."""
        saved = time.monotonic()
        bar = tqdm(total=1000, desc=self.args.size, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        workers = self.plan.workers if self.args.workers is None else self.args.workers
        for batch in loader(self.args.seed, workers, self.next_order):
            losses = self.train_step(batch.to(self.args.device))
            self.record(losses, batch, bar)
            if time.monotonic() - saved > self.args.save_seconds:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimiser step; returns detached losses."""
        progress = self.clock.progress(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(progress)
        with self.autocast():
            patches, picture = self.model.see(batch.pixels, batch.origins)
            losses = {}
            if batch.questions.numel():
                losses["answer"] = self.model.answer_loss(patches, batch.questions, batch.labels)
            if progress < self.plan.seeing_until or not losses:
                losses["seeing"], hit = self.model.seeing_loss(patches, picture, batch.targets)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {name: loss.detach() for name, loss in losses.items()}
        return values | ({"patches seen": hit} if "seeing" in losses else {})

    def learning_rate(self, progress: float) -> float:
        """Short warm-up at the start of each phase, flat, then linear to a fiftieth."""
        _, into = self.phase(progress)
        warm = min(1.0, 0.1 + into / self.plan.warm_up)
        fall = max(0.0, progress - self.plan.flat_until) / (1 - self.plan.flat_until)
        return self.plan.learning_rate * warm * max(0.02, 1 - fall)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where asked for; weights and optimiser stay fp32."""
        kind = self.args.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.args.bf16)

    def record(self, losses: dict[str, torch.Tensor], batch: Batch, bar: tqdm) -> None:
        """Keep the losses of some steps and show them."""
        if self.step % 10 > 1:  # two steps in ten: one of each kind where two kinds alternate
            return
        values = {name: round(float(value), 4) for name, value in losses.items()}
        progress = self.clock.progress(self.step)
        entry = {"step": self.step, "progress": round(progress, 5), "side": batch.pixels.shape[-1], **values}
        self.log.append(entry | {"seconds": round(self.clock.elapsed(), 1)})
        bar.n = min(1000, int(progress * 1000))
        bar.set_postfix(step=self.step, side=entry["side"], **values)

    def save(self) -> None:
        """Checkpoint, log and loss curve; the checkpoint is replaced in one move, so a kill leaves the old one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "size": asdict(self.model.size),
            "step": self.step,
            "spent": self.clock.elapsed(),
            "log": self.log,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)
        (self.folder / "log.json").write_text(json.dumps(self.log))
        draw_curve(self.log, self.folder / "loss.png")

    def load(self) -> float:
        """Continue from the checkpoint; returns the seconds already spent."""
        state = torch.load(self.checkpoint, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.log = state["step"], state["log"]
        print(f"continuing {self.checkpoint} at step {self.step}, {state['spent'] / 60:.1f} minutes spent")
        return state["spent"]


def draw_curve(log: list[dict], path: Path) -> None:
    """Smoothed losses over training time; bands in the background tell the size of the pictures asked about."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    for name in ("answer", "seeing"):
        points = [(entry["seconds"] / 60, entry[name]) for entry in log if name in entry]
        if points:
            minutes, values = zip(*points, strict=True)
            axis.plot(minutes, _smooth(values), label=f"{name} loss")
    asked = [entry for entry in log if "answer" in entry]
    for side in sorted({entry["side"] for entry in asked}):
        inside = [entry["seconds"] / 60 for entry in asked if entry["side"] == side]
        axis.axvspan(inside[0], inside[-1], alpha=0.06 * (side / 112), color="gray", lw=0)
        axis.text(inside[0], 1.0, f" {side} px", transform=axis.get_xaxis_transform(), va="bottom", fontsize=8)
    axis.set(xlabel="minutes of training", ylabel="cross-entropy", ylim=(0, None))
    if axis.lines:
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: tuple[float, ...], span: int = 15) -> list[float]:
    """Running mean over the last `span` values."""
    return [sum(values[max(0, i - span + 1) : i + 1]) / min(span, i + 1) for i in range(len(values))]


def _optimizers(model: SampleVlm, fused: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers and projector; AdamW for heads, and undecayed for embeddings and vectors."""
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"training needs PyTorch 2.9 or newer (torch.optim.Muon); this is {torch.__version__}")
    inner, heads, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("layers." in name or name.startswith("projector.")):
            inner.append(parameter)
        elif parameter.ndim >= 2 and "embed" not in name:
            heads.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": heads, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return [
        # Scaled to AdamW's update size, so that one learning rate fits both.
        torch.optim.Muon(inner, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=fused),
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--plan", choices=sorted(PLANS), help="another size's schedule (miniature runs)")
    parser.add_argument("--out", type=Path, default=Path("runs/sample_vlm"), help="checkpoints, log and curve")
    parser.add_argument("--export", type=Path, default=Path("data/sample/model"), help="where the finished model goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--workers", type=int, help="data processes; default: the plan's")
    parser.add_argument("--minutes", type=float, help="training time in all; default: the plan's")
    parser.add_argument("--session_minutes", type=float, help="stop (and save) after this long; repeat to continue")
    parser.add_argument("--max_steps", type=int, help="run the schedule on steps instead of time")
    parser.add_argument("--save_seconds", type=float, default=180)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the layers; default: the plan's choice"
    )
    parser.add_argument("--restart", action="store_true", help="ignore an existing checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train and, when the plan is finished, export."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    trainer.run()
    if trainer.clock.progress(trainer.step) >= 1:
        export(trainer.model.cpu(), args.export, trained=True)
        print(f"exported to {args.export}")
    else:
        print(f"stopped at {trainer.clock.progress(trainer.step):.0%}; run the same command to continue")


if __name__ == "__main__":
    main()
