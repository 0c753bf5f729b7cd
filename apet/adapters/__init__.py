"""Model families: where their visual tokens are; and the one patch that shortens them.

A prompt passes these files in this order, from pixels to the first decoded token:

1. `encoder`: an encoder call; `tower` notes what methods ask for, `vision` compresses in front of the projector. What
   was kept rides on the output of the call.
2. `prompt`: the forward of a prompt. *Where are the images* (`layout`, from ids and from what the encoder left), *what
   is kept* (`stages`, with `inputs` for what methods ask for), *how the sequence becomes shorter* (`stages.gather`).
3. `cache`: *what decoding must know*, on the prompt's cache. `size_bias` lets merged tokens count for as many.

`hooks` is how all this hangs on a model, `host` what it knows of transformers, `base` and one page per family what it
knows of models.
"""

from apet.adapters import internvl, llava, llava_onevision, qwen_vl, video_llava
from apet.adapters.base import Adapter, UsualImage, adapter_for, register, registered

__all__ = [
    "Adapter",
    "UsualImage",
    "adapter_for",
    "internvl",
    "llava",
    "llava_onevision",
    "qwen_vl",
    "register",
    "registered",
    "video_llava",
]
