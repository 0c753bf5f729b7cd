"""The decoder's tokenizer and chat format, as the assembled folder's processor writes it.

A prompt is SmolLM2's own: a system turn, a user turn that starts with the picture, and the opened assistant turn. The
tokens around `<image>` are tokenised piece by piece here; special tokens cut the text at the same places, so the ids
are those of the processor (a test holds this).
"""

from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
END = "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFIX = f"<|im_start|>system\n{SYSTEM}{END}\n<|im_start|>user\n"
ROW_MULTIPLE = 64  # the embedding's rows after the picture token is added are a multiple of this

# SmolLM2's template, with the picture in front of the user's text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(pieces: list[str], merges: list[str], special: int) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer and the picture token behind its last id.

    Args:
        pieces: the vocabulary in the order of ids.
        merges: byte-pair merges, `left right`.
        special: how many of the first pieces are special tokens; the second and third are `<|im_start|>`, `<|im_end|>`.
    """
    pairs = [tuple(merge.split(" ")) for merge in merges]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    names = [*pieces[:special], IMAGE_TOKEN]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=pieces[1],
        eos_token=END,
        unk_token=pieces[0],
        pad_token=END,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the same format without merges, one token a byte: for dry runs, which have no wheel at hand."""
    special = ["<|endoftext|>", "<|im_start|>", END]
    return build_tokenizer([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())], [], len(special))


def padded_rows(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of an embedding for this tokenizer."""
    return -(-len(tokenizer) // ROW_MULTIPLE) * ROW_MULTIPLE


class Chat:
    """Ids of the pieces of a prompt.

    Args:
        folder: where the tokenizer was saved.
    """

    def __init__(self, folder: Path):
        self.core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = self.core.token_to_id(END)
        self.ids = lru_cache(maxsize=1 << 16)(self._ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.core.encode(text, add_special_tokens=False).ids)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids in front of the picture."""
        return self.ids(PREFIX)

    def turn(self, text: str) -> tuple[int, ...]:
        """Ids of a question behind the picture, up to the opened answer."""
        return self.ids(f"\n{text}{END}\n<|im_start|>assistant\n")

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of an answer and its end."""
        return (*self.ids(text), self.end)

    def word(self, text: str) -> int:
        """The first id of a word inside a sentence."""
        return self.ids(f" {text}")[0]
