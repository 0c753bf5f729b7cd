"""ApET as models of VLMEvalKit.

    from apet.harness.vlmeval import register
    register("llava-1.5-7b-apet-64", "llava-hf/llava-1.5-7b-hf", tokens=64, method="apet")

puts a model under a name that VLMEvalKit's ``--model`` takes (docs/vlmevalkit.md). It asks any vision-language
model of transformers by its chat template.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

from apet.harness.compressed import Compressed

try:
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    raise ImportError(
        f"{error}: VLMEvalKit is not installed or has changed; "
        "pip install ms-vlmeval, or clone its repository and pip install -e it"
    ) from error


class Chat(BaseModel):
    """A model of transformers that is asked by its chat template, one message at a time.

    Args:
        pretrained: Checkpoint folder or hub id, in the Hugging Face layout.
        max_new_tokens: Length of an answer at most; decoding is greedy.
        loading: Arguments of `from_pretrained`.
    """

    INSTALL_REQ = False  # nothing beyond VLMEvalKit's own requirements
    INTERLEAVE = True  # pictures and texts in any order

    def __init__(self, *, pretrained: str, max_new_tokens: int = 512, **loading: Any) -> None:
        super().__init__()
        loading = {"dtype": "auto", "device_map": "auto", **loading}
        self.model = AutoModelForImageTextToText.from_pretrained(pretrained, **loading).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to a message.

        Args:
            message: Parts in order, {"type": "text", "value": text} or {"type": "image", "value": path or URL}.
            dataset: Name of the benchmark; prompts do not depend on it.

        Raises:
            ValueError: A part of another type.
        """
        strange = [part["type"] for part in message if part["type"] not in ("image", "text")]
        if strange:
            raise ValueError(f"a message of type {strange[0]!r} cannot be asked; known types: image, text")
        content = [
            {"type": "text", "text": part["value"]} if part["type"] == "text" else {"type": "image"}
            for part in message
        ]  # fmt: skip
        pictures = [load_image(part["value"]) for part in message if part["type"] == "image"]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=pictures or None, text=[text], return_tensors="pt")
        ids = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype), max_new_tokens=self.max_new_tokens, do_sample=False
        )
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Apet(Compressed, Chat):
    """`Chat` with the budget of `apet.compress_model` among its arguments."""


def register(name: str, pretrained: str, **arguments: Any) -> None:
    """Make a model known to VLMEvalKit.

    Args:
        name: What VLMEvalKit's ``--model`` takes.
        pretrained: Checkpoint folder or hub id, in the Hugging Face layout.
        arguments: A budget (`tokens`, `ratio`, `speedup` or `target_flops`, none for the uncompressed model), `method`,
            and those of `Chat`.

    Raises:
        ValueError: VLMEvalKit has a model of that name.
    """
    if name in supported_VLM:
        raise ValueError(f"VLMEvalKit has a model {name!r}; choose another name")
    supported_VLM[name] = partial(Apet, pretrained=pretrained, **arguments)
