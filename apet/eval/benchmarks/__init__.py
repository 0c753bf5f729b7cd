"""One file per benchmark; importing this package registers them all (standard library only, nothing heavy)."""

from apet.eval.benchmarks import (  # noqa: F401
    gqa,
    llava_bench,
    mmbench,
    mme,
    mmvet,
    pope,
    scienceqa,
    seed,
    textvqa,
    video_qa,
    vizwiz,
    vqav2,
)
from apet.eval.benchmarks.base import (
    Benchmark,
    Question,
    Score,
    available_benchmarks,
    get_benchmark,
    register,
    scored_benchmarks,
)

__all__ = [
    "Benchmark",
    "Question",
    "Score",
    "available_benchmarks",
    "get_benchmark",
    "register",
    "scored_benchmarks",
]
