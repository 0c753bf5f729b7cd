"""What a harness is held to: the bundled sample, questions about it, and its answers without a harness."""

import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import apet
from llava.model.hugging_face import export_checkpoint

ROOT = Path(__file__).parents[2]
GQA = ROOT / "data/sample/eval/gqa"


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample model in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("sample") / "hf"
    return Path(export_checkpoint(str(ROOT / "data/sample/model/llava-v1.5-sample"), str(folder), "vicuna_v1"))


@pytest.fixture(scope="session")
def questions() -> list[dict]:
    """Six prompts with the answer and the bytes of the picture."""
    prompt = "{}\nAnswer the question using a single word or phrase."
    return [
        {
            "question": prompt.format(one["question"]),
            "answer": one["answer"],
            "image": (GQA / "images" / f"{one['imageId']}.jpg").read_bytes(),
        }
        for one in list(json.loads((GQA / "testdev_balanced_questions.json").read_text()).values())[:6]
    ]


@pytest.fixture(scope="session")
def ask_at_64(sample):
    """What the sample model answers at 64 tokens: a function of the prompt and the picture's bytes."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(sample, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(sample)

    def ask(question: str, image: bytes) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        inputs = processor(images=[picture], text=text, return_tensors="pt")
        with torch.inference_mode(), apet.compressed(model, tokens=64):
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


@pytest.fixture(scope="session")
def answers_at_64(ask_at_64, questions) -> list[str]:
    """Its answers to `questions`."""
    return [ask_at_64(one["question"], one["image"]) for one in questions]
