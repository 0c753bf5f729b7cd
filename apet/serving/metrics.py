"""Prometheus counters of what was pruned, among those of vLLM's own endpoint (`/metrics`).

A server counts from when it is up (`start`, called by `apet.serving.route`); an engine without a server counts nothing.
Videos, pictures given as embeddings, and pictures that a client only names (`uuid`) are not counted.
"""

from typing import Any

_COUNTED = {
    "pictures": "Pictures in the prompts.",
    "picture_tokens_before": "Tokens of these pictures before compression.",
    "picture_tokens_after": "Tokens of these pictures in the prompts.",
}
_counters: dict[str, Any] = {}


def start() -> None:
    """Begin to count, in this process."""
    from prometheus_client import Counter

    for name, text in _COUNTED.items():
        if name not in _counters:
            _counters[name] = Counter(f"apet:{name}", text)


def count(info: Any, items: Any, placeholders: Any) -> None:
    """Count the pictures of a prompt.

    Args:
        info: Processing info of the model, one of ours.
        items: The prompt's media.
        placeholders: Where they stand in it, by modality.
    """
    if not _counters:
        return
    for number, place in enumerate(placeholders.get("image", ())):
        images = items["image"]
        if not hasattr(images, "get_image_size") or images.get(number) is None:
            continue
        before, _ = info.picture_tokens(*images.get_image_size(number))
        for name, amount in zip(_COUNTED, (1, before, place.get_num_embeds()), strict=True):
            _counters[name].inc(amount)
