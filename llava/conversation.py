"""Prompt templates of the LLaVA checkpoints: a `Conversation` renders its messages into the text a model was tuned on.

`conv_templates` maps a conversation mode (`--conv-mode`) to its template; take `conv_templates[mode].copy()`, append
messages with alternating roles, `None` for the turn the model has to fill, and call `get_prompt()`. The strings are
part of the checkpoints: one changed space moves benchmark scores.
"""

import base64
import dataclasses
import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from io import BytesIO
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.mm_utils import expand2square

_log = logging.getLogger(__name__)

PAD_COLOR = (122, 116, 104)  # CLIP's mean colour
RESIZED_EDGE = 336

# A message is text, None (open turn), "" (renders only the role) or (text, image, mode of `process_image`).
Message = str | tuple[str, Image.Image, str] | None


class SeparatorStyle(Enum):
    """How turns are put together; one `_render_*` function each."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A system text, two roles and the messages so far.

    `messages` holds [role, message] pairs, `offset` counts the preset examples at their start, `sep` and `sep2`
    close the turns of the first and the second role.
    """

    system: str
    roles: list[str] | tuple[str, ...]
    messages: list[list[Any]] | tuple[Any, ...]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """The text for the model.

        Raises:
            AssertionError: the LLAMA_2 style with a first message that is empty or not from `roles[0]`.
            TypeError: an answered turn in the PLAIN style, which has no `sep2` to close it.
        """
        turns = self._turns()
        if self.sep_style is SeparatorStyle.LLAMA_2:
            return self._render_llama_2(turns)
        if self.sep_style is SeparatorStyle.PLAIN:
            return self.system + "".join(text + self._closing(i) for i, (_, text) in enumerate(turns) if text)
        glue, after_role = ("", "") if self.sep_style is SeparatorStyle.MPT else (":", " ")
        prompt = self.system + self.sep
        for index, (role, text) in enumerate(turns):
            prompt += role + glue + (after_role + text + self._closing(index) if text else "")
        return prompt

    def append_message(self, role: str, message: Message) -> None:
        """Add a turn; `None` leaves it open for the model."""
        self.messages.append([role, message])

    def ask(self, text: str) -> str:
        """The prompt with one more turn of the first role, and the second role's left open for the model."""
        self.append_message(self.roles[0], text)
        self.append_message(self.roles[1], None)
        return self.get_prompt()

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """The images of the first role's tuple messages: PIL images, or base64 PNG strings."""
        asked = self.messages[self.offset :: 2]
        return [self.process_image(m[1], m[2], return_pil) for _, m in asked if isinstance(m, tuple)]

    def process_image(
        self,
        image: Image.Image,
        mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """An image as a chat front end shows it.

        Args:
            image: any mode; converted to RGB for "Pad" and for JPEG, which cannot store the others.
            mode: "Pad" to a square, "Resize" to 336 x 336, "Default" or "Crop" to leave the shape alone.
            return_pil: give the image instead of base64 text.
            image_format: file format behind the base64 text.
            max_len: a longer side makes the image shrink until it fits,
            min_len: and until the shorter side has at most this length.

        Raises:
            ValueError: unknown `mode`.
        """
        if mode == "Pad":
            image = expand2square(image.convert("RGB"), PAD_COLOR)
        elif mode == "Resize":
            image = image.resize((RESIZED_EDGE, RESIZED_EDGE))
        elif mode not in ("Default", "Crop"):
            raise ValueError(f"image mode {mode!r} is unknown; use 'Pad', 'Resize', 'Default' or 'Crop'")
        if max(image.size) > max_len:
            image = _shrink(image, max_len, min_len)
        return image if return_pil else _to_base64(image, image_format)

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """[question, answer] pairs for a chat widget; an image becomes an <img> tag in front of its text."""
        pairs: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][1] = message
            else:
                pairs.append([self._with_picture(message) if isinstance(message, tuple) else message, None])
        return pairs

    def copy(self) -> "Conversation":
        """The same conversation with messages of its own; `skip_next` starts as False again."""
        messages = [[role, message] for role, message in self.messages]
        return dataclasses.replace(self, messages=messages, skip_next=False)

    def dict(self) -> dict[str, Any]:
        """The conversation as JSON-ready data; images are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def _turns(self) -> list[tuple[str, str | None]]:
        """(role, text) of every turn; an image in the very first message gets its placeholder."""
        turns = [(role, _text(message)) for role, message in self.messages]
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return turns
        role, text = turns[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *turns[1:]]
        shown = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
        return [shown, (self.roles[1], "Received."), (role, text), *turns[1:]]

    def _closing(self, index: int) -> str:
        """What ends turn `index`."""
        if self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT) or index % 2 == 0:
            return self.sep
        if self.sep2 is None:
            raise TypeError(f"turn {index} is answered, but {self.sep_style.name} templates have no sep2 to close it")
        return self.sep2

    def _render_llama_2(self, turns: list[tuple[str, str | None]]) -> str:
        """`[INST]` blocks; the system text sits inside the first one."""
        if turns and (not turns[0][1] or turns[0][0] != self.roles[0]):
            raise AssertionError(f"the first message must be a text from {self.roles[0]!r}, got {turns[0]!r}")
        prompt = ""
        for index, (_, text) in enumerate(turns):
            if not text:
                continue
            if index % 2:
                prompt += f" {text} {self._closing(index)}"
                continue
            system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if index == 0 and self.system else ""
            prompt += f"{self.sep}[INST] {system}{text} [/INST]"
        # The tokenizer puts BOS in front, so the leading "<s>" goes.
        return prompt.lstrip(self.sep)

    def _with_picture(self, message: tuple[str, Image.Image, str]) -> str:
        """A tuple message as HTML."""
        picture = self.process_image(message[1], "Default", image_format="JPEG")
        tag = f'<img src="data:image/jpeg;base64,{picture}" alt="user upload image" />'
        return tag + message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()


def _text(message: Message) -> str | None:
    """The text of a message, without its image."""
    return message[0] if isinstance(message, tuple) else message


def _shrink(image: Image.Image, max_len: int, min_len: int) -> Image.Image:
    """The image, smaller, with the longer side at most `max_len` and the shorter at most `min_len`."""
    aspect = max(image.size) / min(image.size)
    short = max(1, int(min(max_len / aspect, min_len, min(image.size))))
    long = min(max_len, int(short * aspect))
    return image.resize((long, short) if image.width > image.height else (short, long))


def _to_base64(image: Image.Image, image_format: str) -> str:
    """The encoded image file as text."""
    buffer = BytesIO()
    (image.convert("RGB") if image_format.upper() in ("JPEG", "JPG") else image).save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_CHAT = "A chat between a curious {0} and an artificial intelligence assistant. "
_SYSTEM_USER = (_CHAT + _ASSISTANT).format("user")
_SYSTEM_HUMAN = (_CHAT + _ASSISTANT).format("human")
_SYSTEM_MMTAG = _CHAT.format("user") + (
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_SYSTEM_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SYSTEM_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_SYSTEM_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_PRESET_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_PRESET_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)


def _template(
    system: str, style: SeparatorStyle, roles: tuple[str, str], sep: str, sep2: str | None, version: str = "Unknown"
) -> Conversation:
    """An empty conversation."""
    return Conversation(system, roles, [], 0, sep_style=style, sep=sep, sep2=sep2, version=version)


def _two(system: str, version: str) -> Conversation:
    """Vicuna 1.x: `USER: ... ASSISTANT: ...</s>`."""
    return _template(system, SeparatorStyle.TWO, ("USER", "ASSISTANT"), " ", "</s>", version)


def _single(system: str, version: str = "Unknown") -> Conversation:
    """Vicuna 0: `###Human: ...###Assistant: ...`."""
    return _template(system, SeparatorStyle.SINGLE, ("Human", "Assistant"), "###", None, version)


def _llama_2(system: str, sep: str) -> Conversation:
    """Llama 2 and Mistral instruct: `[INST] ... [/INST]`."""
    return _template(system, SeparatorStyle.LLAMA_2, ("USER", "ASSISTANT"), sep, "</s>", "llama_v2")


def _chatml(system: str) -> Conversation:
    """ChatML; the roles carry the tags."""
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return _template(system, SeparatorStyle.MPT, roles, "<|im_end|>", None, "mpt")


_v0 = _single(_SYSTEM_HUMAN)
_v0.messages = [["Human", _PRESET_QUESTION], ["Assistant", _PRESET_ANSWER]]
_v0.offset = 2
_vicuna_v1 = _two(_SYSTEM_USER, "v1")
_chatml_direct = _chatml("<|im_start|>system\nAnswer the questions.")
_plain = _template("", SeparatorStyle.PLAIN, ("", ""), "\n", None)

conv_templates: dict[str, Conversation] = {
    "default": _v0,
    "v0": _v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": _llama_2(_SYSTEM_LLAMA_2, "<s>"),
    "mistral_instruct": _llama_2("", ""),
    "chatml_direct": _chatml_direct,
    "mistral_direct": _chatml_direct,
    "plain": _plain,
    "v0_plain": _plain,
    "llava_v0": _single(_SYSTEM_HUMAN),
    "v0_mmtag": _single(_SYSTEM_MMTAG, "v0_mmtag"),
    "llava_v1": _two(_SYSTEM_HUMAN, "v1"),
    "v1_mmtag": _two(_SYSTEM_MMTAG, "v1_mmtag"),
    "llava_llama_2": _llama_2(_SYSTEM_LLAVA, "<s>"),
    "mpt": _chatml(_SYSTEM_MPT),
}
default_conversation = _vicuna_v1

# First hit in the lower-cased model name wins.
_MODE_OF_NAME = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)


def infer_conv_mode(model_name: str) -> str:
    """The conversation mode that a model's name suggests."""
    name = model_name.lower()
    return next((mode for part, mode in _MODE_OF_NAME if part in name), "llava_v0")


def resolve_conv_mode(
    model_name: str, requested: str | None = None, warn: Callable[[str], object] = _log.warning
) -> str:
    """The mode asked for, else the one the name suggests; `warn` hears when the two differ."""
    inferred = infer_conv_mode(model_name)
    if requested is None or requested == inferred:
        return inferred
    warn(
        f"[WARNING] the auto inferred conversation mode is {inferred}, "
        f"while `--conv-mode` is {requested}, using {requested}"
    )
    return requested


def plain_conv_mode(model_name: str, conv_mode: str, warn: Callable[[str], object] = _log.warning) -> str:
    """`conv_mode`, with `_mmtag` added for checkpoints that saw only captions ("plain" in the name, not fine-tuned)."""
    if "plain" not in model_name or "finetune" in model_name.lower() or "mmtag" in conv_mode:
        return conv_mode
    switched = conv_mode + "_mmtag"
    warn(f"{model_name} looks like a plain (not fine-tuned) model: conversation mode {conv_mode} becomes {switched}")
    return switched


def new_conversation(conv_mode: str) -> Conversation:
    """A fresh copy of a template.

    Raises:
        ValueError: unknown mode; the message names the known ones and the nearest.
    """
    if conv_mode in conv_templates:
        return conv_templates[conv_mode].copy()
    nearest = difflib.get_close_matches(conv_mode, conv_templates, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"conversation mode {conv_mode!r} is unknown; {hint}Known modes: {', '.join(conv_templates)}")
