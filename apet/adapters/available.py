"""Which of the inputs that methods ask for a family has, known before a model is touched."""

from collections.abc import Sequence

from apet.adapters import host
from apet.adapters.base import Adapter

_IN_TOWER = ("cls_attention", "vision_keys")
_IN_LAYER = ("attention_row", "text_attention", "keys", "text_keys")


def unavailable(adapter: Adapter, name: str, layers: Sequence[int]) -> str | None:
    """Why a family cannot provide an input of these layers; None if it can.

    Args:
        adapter: The family.
        name: Key of `apet.methods.context.INPUTS`.
        layers: Of the tower as `attentions[layer]` counts them; of the decoder 0 is the layer about to run.
    """
    if name == "clip_relevance":
        return "CLIP's text tower is no part of the model"
    if name in _IN_TOWER:
        if not adapter.class_token_towers:
            return adapter.no_class_token
        depth = min(len(host.tower_layers(tower)) for tower in adapter.class_token_towers)
        return None if all(-depth <= layer < depth for layer in layers) else f"the vision tower has {depth} layers"
    if name == "vision_features" and adapter.row_projector is None:
        return "its tokens are not the tower's one by one"
    if name in _IN_LAYER and any(layer not in (-1, 0) for layer in layers):
        return "only the layer about to run (0) and the one before it (-1) are watched"
    return None
