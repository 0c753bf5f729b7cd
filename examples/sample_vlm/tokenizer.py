"""The sample's sentencepiece tokenizer: LLaMA's kind (BPE, byte fallback, dummy prefix, single digits), but tiny.

The merges are derived from the texts the model will meet instead of from corpus statistics: every fixed phrase of the
questions becomes one token, so that a prompt costs a handful of tokens on a laptop, and every prefix of a phrase is a
piece, which is what BPE needs to build it. All merges start at a space or at a sentence's capital letter followed by a
lower-case one; upper-case words ("CAT") therefore always fall into single letters, and a word never seen before can be
spelled. Everything else (other languages, other conversation templates) falls back to characters and bytes.
"""

import json
import re
import string
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as pb

from examples.sample_vlm.questions import vocabulary_texts

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_SPACE = "\u2581"
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6  # sentencepiece's piece types


def pieces() -> list[str]:
    """The normal pieces in order: merged ones (earlier merges first), then single characters."""
    prefixes: dict[str, None] = {}
    for text in [" " + SYSTEM, *vocabulary_texts()]:
        for prefix in _prefixes(text.replace(" ", _SPACE)):
            prefixes[prefix] = None
    for ending in (_SPACE + "USER:", _SPACE + "ASSISTANT:"):
        # Built from the colon backwards: no part of these all-capital words is then a piece of its own.
        for start in range(len(ending) - 2, -1, -1):
            prefixes[ending[start:]] = None
    ordered = sorted(prefixes, key=len)
    return ordered + [_SPACE, *string.printable[:95].replace(" ", "")]


def _prefixes(text: str) -> list[str]:
    """All prefixes (two or more characters) of the phrase's words, and of the phrase at its word ends."""
    ends = [m.start() for m in re.finditer(_SPACE, text)] + [len(text)]
    parts = re.findall(f"{_SPACE}?[^{_SPACE}]*", text)
    found = [part[:n] for part in parts for n in range(2, len(part) + 1)]
    return found + [text[:end] for end in ends if end >= 2]


def build(folder: str | Path) -> None:
    """Write tokenizer.model, tokenizer_config.json and special_tokens_map.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_proto().SerializeToString(deterministic=True))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def model_proto() -> pb.ModelProto:
    """The sentencepiece model: unk 0, bos 1, eos 2, 256 bytes, then the pieces with falling scores."""
    proto = pb.ModelProto()
    for piece, kind in (("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_BYTE)
    for rank, piece in enumerate(pieces()):
        proto.pieces.add(piece=piece, score=-float(rank), type=_NORMAL)
    trainer = proto.trainer_spec
    trainer.model_type = 2  # BPE
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.split_by_whitespace = False
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto
