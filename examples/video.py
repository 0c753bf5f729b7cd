"""Video-LLaVA, where a budget is a frame's: ``python -m examples.video CHECKPOINT VIDEO QUESTION``."""

import sys

import numpy as np
import transformers

import apet
from apet.eval.videos import read_clip


def main(checkpoint: str, video: str, question: str, tokens: int = 22) -> None:
    """Ask about eight frames of a video, at so many tokens per frame on average."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    frames = np.stack([np.asarray(frame) for frame in read_clip(video, 8).frames])
    inputs = processor(text=f"USER: <video>\n{question} ASSISTANT:", videos=[frames], return_tensors="pt")
    print(apet.compress_model(model, tokens=tokens).apet)
    ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64, do_sample=False)
    print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
