"""LLaVA-1.5, LLaVA-NeXT or any image model of the README: ``python -m examples.llava CHECKPOINT PICTURE QUESTION``."""

import sys

import transformers
from PIL import Image

import apet


def main(checkpoint: str, picture: str, question: str) -> None:
    """Ask with and without compression."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=text, return_tensors="pt")

    def answer() -> str:
        ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=32, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print("without:", answer())
    with apet.compressed(model, tokens=64):
        print(model.apet)
        print("with:", answer())


if __name__ == "__main__":
    main(*sys.argv[1:])
