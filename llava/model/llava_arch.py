"""How images enter a LLaVA prompt: encoding, splicing in place of the -200 ids, and `generate` as LLaVA scripts call it.

The classes add methods to the transformers models; they hold no weights and replace no forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaModel

import apet
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape, unpad_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

_TEXT, _PADDING = -1, -2


class LlavaMetaModel(LlavaModel):
    """The transformers model under the names LLaVA scripts use."""

    @property
    def mm_projector(self) -> torch.nn.Module:
        """The projector."""
        return self.multi_modal_projector

    @property
    def embed_tokens(self) -> torch.nn.Module:
        """Token embeddings."""
        return self.language_model.embed_tokens

    @property
    def layers(self) -> torch.nn.ModuleList:
        """Decoder layers."""
        return self.language_model.layers

    @property
    def norm(self) -> torch.nn.Module:
        """Final norm of the decoder."""
        return self.language_model.norm

    def get_vision_tower(self) -> CLIPVisionTower:
        """The vision tower; its `image_processor` is set by the loader."""
        return CLIPVisionTower(self.vision_tower, getattr(self, "image_processor", None), self.config)


@dataclass(frozen=True)
class Prompt:
    """A spliced batch.

    Attributes:
        inputs_embeds: (B, L, D), zeros in padding.
        attention_mask: (B, L) in the given mask's dtype (bool if none was given), False on padding.
        labels: (B, L) int64, or None.
        visual_items: (B, L) int64 on the CPU: index of the encoded crop for its visual tokens, -1 for text, -2 for
            padding. What `apet`'s patch needs to know about a prompt without ids.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    visual_items: Tensor


@dataclass(frozen=True)
class _ImageFeatures:
    """Features (n, D) that one placeholder stands for, and which encoded crop every row comes from (n,)."""

    features: Tensor
    crops: Tensor


class LlavaMetaForCausalLM:
    """Mix-in for models whose `get_model()` has `embed_tokens` and the vision parts."""

    def get_model(self) -> Any:
        """The model without its head."""
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower:
        """The vision tower."""
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """Projected features (B, tokens, D) of pixels (B, 3, H, W)."""
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate from LLaVA prompts; returns the new tokens only (or what `return_dict_in_generate` asks for).

        Args:
            inputs: (B, L) ids with -200 where an image goes; `input_ids` is accepted too.
            images: (B, 3, H, W), (B, T, 3, H, W), or a list of (T, 3, H, W) or (3, H, W): one per placeholder, in order.
            image_sizes: Original (width, height) per image, needed for anyres checkpoints.
            **kwargs: `attention_mask` (B, L) and everything transformers' `generate` takes. With `pixel_values` the call
                goes to transformers unchanged.

        Raises:
            NotImplementedError: `inputs_embeds` was given.
            ValueError: A placeholder without images.
        """
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("inputs_embeds is not supported; pass ids with -200 placeholders and images")
        inputs = kwargs.pop("input_ids", inputs)
        if kwargs.get("pixel_values") is not None:
            return super().generate(input_ids=inputs, **kwargs)
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if images is None:
            if bool((inputs == IMAGE_TOKEN_INDEX).any()):
                raise ValueError("the prompt has an image placeholder (-200) but images is None; pass images=")
            embeds = self.get_model().embed_tokens(inputs)
            mask = torch.ones_like(inputs) if mask is None else mask
            items = torch.where(mask.bool(), _TEXT, _PADDING).cpu()
        elif self._splicing_is_replaced():
            _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, positions, mask, None, None, images, image_sizes=image_sizes
            )
            items = None
        else:
            prompt = self.splice(inputs, mask, None, images, image_sizes, padding_side="left")
            embeds, mask, items = prompt.inputs_embeds, prompt.attention_mask.long(), prompt.visual_items
        if positions is not None:
            kwargs["position_ids"] = positions
        if items is not None and apet.active_config(self) is not None:
            kwargs["visual_items"] = items
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor] | None,
        image_sizes: Sequence[Sequence[int]] | None = None,
    ) -> tuple:
        """Splice image features into a batch: (None, position_ids, attention_mask, past_key_values, embeds, labels).

        Rows are padded on `config.tokenizer_padding_side` ("right" if absent). The mask is always the real one, also when
        none was given. Without images, or for a single-token step, the ids are returned and no embeddings.

        Raises:
            IndexError: More placeholders than images.
        """
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        side = getattr(self.config, "tokenizer_padding_side", "right")
        prompt = self.splice(input_ids, attention_mask, labels, images, image_sizes, side)
        if position_ids is not None:
            mask = prompt.attention_mask.long()
            position_ids = (mask.cumsum(-1) - 1) * mask
        return None, position_ids, prompt.attention_mask, past_key_values, prompt.inputs_embeds, prompt.labels

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Tensor | Sequence[Tensor],
        image_sizes: Sequence[Sequence[int]] | None,
        padding_side: str,
    ) -> Prompt:
        """Put image features in place of the placeholders, row by row, and pad the rows.

        A row without a placeholder uses up one image without showing it; surplus images are ignored; rows are cut to
        `config.tokenizer_model_max_length` where the config has it.

        Raises:
            IndexError: More placeholders than images.
        """
        features = self._image_features(images, image_sizes)
        rows, next_image = [], 0
        for row in range(input_ids.shape[0]):
            real = slice(None) if attention_mask is None else attention_mask[row].bool()
            ids = input_ids[row][real]
            places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
            used = features[next_image : next_image + len(places)]
            if len(used) < len(places):
                raise IndexError(
                    f"the prompts hold more image placeholders than the {len(features)} images given (row {row}); pass "
                    "one image per placeholder"
                )
            next_image += max(1, len(places))
            rows.append(self._splice_row(ids, None if labels is None else labels[row][real], places, used))
        return _pad_rows(rows, padding_side, attention_mask, labels is not None)

    def _splice_row(
        self, ids: Tensor, labels: Tensor | None, places: list[int], images: Sequence[_ImageFeatures]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (L, D), items (L,) on the CPU and labels (L,) of one row."""
        embed = self.get_model().embed_tokens
        text = embed(torch.where(ids == IMAGE_TOKEN_INDEX, 0, ids))
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels
        embeds, items, targets, start = [], [], [], 0
        for place, image in zip([*places, len(ids)], [*images, None], strict=True):
            embeds.append(text[start:place])
            targets.append(labels[start:place])
            items.append(torch.full((place - start,), _TEXT))
            if image is not None:
                embeds.append(image.features.to(device=text.device, dtype=text.dtype))
                targets.append(torch.full((len(image.features),), IGNORE_INDEX, device=ids.device, dtype=ids.dtype))
                items.append(image.crops)
            start = place + 1
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        return torch.cat(embeds)[:limit], torch.cat(items)[:limit], torch.cat(targets)[:limit]

    def _image_features(
        self, images: Tensor | Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | None
    ) -> list[_ImageFeatures]:
        """Features per placeholder. A 4-D tensor is one crop per image; anything else is merged by the config's type."""
        if isinstance(images, Tensor) and images.dim() == 4:
            encoded = self.encode_images(images)
            return [_ImageFeatures(rows, torch.full((len(rows),), index)) for index, rows in enumerate(encoded)]
        stacks = [image.unsqueeze(0) if image.dim() == 3 else image for image in images]
        encoded = self.encode_images(torch.cat(stacks))
        merged, first = [], 0
        for index, stack in enumerate(stacks):
            crops = encoded[first : first + len(stack)]
            numbers = torch.arange(first, first + len(stack)).repeat_interleave(crops.shape[1])
            merged.append(self._merge_crops(crops, numbers, None if image_sizes is None else image_sizes[index]))
            first += len(stack)
        return merged

    def _merge_crops(self, crops: Tensor, numbers: Tensor, size: Sequence[int] | None) -> _ImageFeatures:
        """One image's crops (T, n, D) as a sequence, by `config.mm_patch_merge_type`.

        Raises:
            ValueError: Unknown merge type.
            NotImplementedError: Tiles of a checkpoint that is not anyres; compression of anyres images.
        """
        kind = getattr(self.config, "mm_patch_merge_type", "flat")
        if kind == "flat":
            return _ImageFeatures(crops.flatten(0, 1), numbers)
        if not kind.startswith("spatial"):
            raise ValueError(f"mm_patch_merge_type={kind!r} is unknown; supported: flat, spatial, spatial_unpad")
        config = apet.active_config(self)
        if config is not None and any(budget is not None for budget in config.stage_budgets):
            raise NotImplementedError("anyres checkpoints cannot be compressed yet; set no token budgets for them")
        newline = self.get_model().image_newline if "unpad" in kind else None
        if len(crops) == 1:
            rows = crops[0] if newline is None else torch.cat([crops[0], newline.to(crops).unsqueeze(0)])
        else:
            rows = torch.cat([crops[0], self._arrange_tiles(crops[1:], newline, size)])
        return _ImageFeatures(rows, torch.full((len(rows),), int(numbers[0])))

    def _arrange_tiles(self, tiles: Tensor, newline: Tensor | None, size: Sequence[int] | None) -> Tensor:
        """Tiles (T, n, D) as rows of the whole picture, unpadded and with a newline per row where there is one."""
        if getattr(self.config, "image_aspect_ratio", None) != "anyres":
            raise NotImplementedError(
                f"several crops per image need image_aspect_ratio='anyres', the config has "
                f"{getattr(self.config, 'image_aspect_ratio', None)!r}"
            )
        if size is None:
            raise ValueError("image_sizes, the original (width, height) of every image, is needed for anyres images")
        tower = self.get_vision_tower()
        side = tower.num_patches_per_side
        wide, high = get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, tower.config.image_size)
        grid = tiles.view(high, wide, side, side, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        if newline is None:
            return grid.flatten(1).transpose(0, 1)
        grid = unpad_image(grid, tuple(size))
        column = newline.to(grid).view(-1, 1, 1).expand(-1, grid.shape[1], 1)
        return torch.cat([grid, column], dim=-1).flatten(1).transpose(0, 1)

    def _splicing_is_replaced(self) -> bool:
        """Whether somebody patched `prepare_inputs_labels_for_multimodal`, as other pruning tools do."""
        current = getattr(self.prepare_inputs_labels_for_multimodal, "__func__", None)
        return current is not LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal


def _pad_rows(rows: list[tuple], side: str, mask: Tensor | None, with_labels: bool) -> Prompt:
    """Stack rows of different length, padded on the "left" or "right"."""
    width = max(len(embeds) for embeds, _, _ in rows)
    first = rows[0][0]
    embeds = first.new_zeros(len(rows), width, first.shape[1])
    items = torch.full((len(rows), width), _PADDING)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=rows[0][2].dtype, device=first.device)
    for index, (row, row_items, row_labels) in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        embeds[index, place], items[index, place], labels[index, place] = row, row_items, row_labels
    attended = (items != _PADDING).to(first.device, torch.bool if mask is None else mask.dtype)
    return Prompt(embeds, attended, labels if with_labels else None, items)
