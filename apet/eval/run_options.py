"""How an evaluation run is carried out: files, chunks, batches, workers, resume."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes an answer.

    Attributes:
        question_file: Questions.
        answers_file: Where the answers go; its folder is made.
        image_folder: Folder that image paths are relative to.
        num_chunks: Number of shards.
        chunk_idx: Which shard this is.
        batch_size: Questions per batch, or "auto" for the most that fit (`apet.eval.batches.BatchSize`).
        num_workers: Worker processes that open and prepare images; 0 prepares in this process.
        resume: Continue a partial answers file of the same settings.
        overwrite: Replace an answers file as soon as there is a first new answer.
        inputs: Further files the run reads, which no output may be.
        limit: Only the first so many questions of the file; None for all.
        on_error: "stop" at an image that cannot be read, or "skip" it and list it in the run record.
    """

    question_file: str
    answers_file: str
    image_folder: str = ""
    num_chunks: int = 1
    chunk_idx: int = 0
    batch_size: int | str = 1
    num_workers: int = 0
    resume: bool = False
    limit: int | None = None
    on_error: str = "stop"
    overwrite: bool = False
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_chunks < 1 or not 0 <= self.chunk_idx < self.num_chunks:
            raise ValueError(
                f"--chunk-idx {self.chunk_idx} with --num-chunks {self.num_chunks}: chunks are numbered "
                f"0..{max(self.num_chunks - 1, 0)}"
            )
        if self.batch_size != "auto" and (isinstance(self.batch_size, str) or self.batch_size < 1):
            raise ValueError(f"--batch_size {self.batch_size} must be at least 1, or auto")
        if self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers} must not be negative")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be at least 1")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"--on_error {self.on_error!r} must be stop or skip")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume continues the answers that are there, --overwrite replaces them; give one of them"
            )
