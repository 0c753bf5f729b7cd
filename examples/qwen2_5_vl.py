"""Qwen2.5-VL, where a share is natural: ``python -m examples.qwen2_5_vl CHECKPOINT PICTURE``."""

import sys

import transformers
from PIL import Image

import apet


def main(checkpoint: str, picture: str) -> None:
    """Describe a picture with a fifth of its tokens."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture).convert("RGB")], text=text, return_tensors="pt")
    apet.compress_model(model, ratio=0.2)
    ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64, do_sample=False)
    print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    kept = apet.last_result(model)
    print(f"{kept.layer_averaged_tokens[0]:.1f} of {sum(kept.tokens_in[0])} visual tokens per layer")


if __name__ == "__main__":
    main(*sys.argv[1:])
