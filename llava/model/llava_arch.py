"""How images enter a LLaVA prompt: encoding, splicing in place of the -200 ids, and `generate` as scripts call it.

The classes add methods to the transformers models; they hold no weights and replace no forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaModel, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import apet
from apet.adapters.layout import PADDING, to_device
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape, unpad_image
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.splicing import arrange


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
class TowerOutput:
    """Images that a vision tower has seen already, for `generate(images=...)` in place of their pixels.

    Attributes:
        features: (B, tokens, hidden), what the tower returned; one crop per image.
    """

    features: Tensor


@dataclass(frozen=True)
class Prompt:
    """A spliced batch.

    Attributes:
        inputs_embeds: (B, L, D), zeros in padding.
        attention_mask: (B, L) in the given mask's dtype (bool if none was given), False on padding.
        labels: (B, L) int64, or None.
        visual_items: (B, L) int64 on the CPU: index of the image for its visual tokens, -1 for text, -2 for padding.
            What `apet`'s patch needs to know about a prompt without ids.
        visual_encoding: What a patched model left of encoding the images; None on a model that is not.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    visual_items: Tensor
    visual_encoding: Any = None


class LlavaMetaForCausalLM:
    """Mix-in for models whose `get_model()` has `embed_tokens` and the vision parts."""

    def get_model(self) -> Any:
        """The model without its head."""
        return self.model

    def get_vision_tower(self) -> CLIPVisionTower:
        """The vision tower."""
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor | TowerOutput) -> Tensor:
        """Projected features (B, tokens, D) of pixels (B, 3, H, W) of any floating dtype, or of a tower's output."""
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        features = images.features if isinstance(images, TowerOutput) else tower(images.to(tower.dtype))
        weight = next(projector.parameters(), features)
        return projector(features.to(weight.dtype))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | TowerOutput | None = None,
        image_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate from LLaVA prompts; returns the new tokens only (or what `return_dict_in_generate` asks for).

        Args:
            inputs: (B, L) ids with -200 where an image goes; `input_ids` is accepted too.
            images: (B, 3, H, W), (B, T, 3, H, W), or a list of (T, 3, H, W) or (3, H, W): one per placeholder. Or
                what the vision tower gave for (B, 3, H, W) before.
            image_sizes: Original (width, height) per image, needed for anyres checkpoints.
            **kwargs: `attention_mask` (B, L), padding on either side, and everything transformers' `generate` takes.
                `use_cache=False` changes nothing: transformers continues from embeddings with a cache only. With
                `pixel_values` the call goes to transformers unchanged.

        Raises:
            NotImplementedError: `inputs_embeds` was given.
            ValueError: No ids, a placeholder without images, or images of another shape.
            IndexError: More placeholders than images.
        """
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("inputs_embeds is not supported; pass ids with -200 placeholders and images")
        inputs = kwargs.pop("input_ids", inputs)
        if kwargs.get("pixel_values") is not None:
            return super().generate(input_ids=inputs, **kwargs)
        if inputs is None:
            raise ValueError("generate needs the ids of a prompt; pass inputs (B, L)")
        if images is None and bool((inputs == IMAGE_TOKEN_INDEX).any()):
            raise ValueError("the prompt has an image placeholder (-200) but images is None; pass images=")
        inputs, mask = inputs.to(self.device), kwargs.pop("attention_mask", None)
        mask = None if mask is None else mask.to(self.device)
        positions = kwargs.pop("position_ids", None)
        if images is not None and self._splicing_is_replaced():
            _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, positions, mask, None, None, images, image_sizes=image_sizes
            )
            if positions is not None:
                kwargs["position_ids"] = positions
        else:
            # Positions given for the ids do not fit the spliced rows: they follow from the mask.
            prompt = self.splice(inputs, mask, None, [] if images is None else images, image_sizes, padding_side="left")
            embeds, mask = prompt.inputs_embeds, prompt.attention_mask.long()
            if apet.active_config(self) is not None:
                kwargs["visual_items"] = prompt.visual_items
                kwargs["visual_encoding"] = prompt.visual_encoding
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **_own_penalty(kwargs))

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

        Rows are padded on `config.tokenizer_padding_side` ("right" if absent). The mask is always the real one, also
        when none was given. Without images, or for a single-token step, the ids are returned and no embeddings.

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
        # Read in front of the encoder: nothing is queued yet that the host would have to wait for.
        ids = input_ids.cpu().numpy()
        real = np.ones_like(ids, dtype=bool) if attention_mask is None else attention_mask.bool().cpu().numpy()
        features, encoding = self._image_features(images, image_sizes)
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        source, items = arrange(ids, real, [len(one) for one in features], limit, padding_side)
        attended = to_device(items != PADDING, input_ids.device)
        return Prompt(
            self._rows(input_ids, features, source),
            attended.to(torch.bool if attention_mask is None else attention_mask.dtype, copy=True),
            None if labels is None else _spliced_labels(labels, source),
            torch.from_numpy(items),
            encoding,
        )

    def _rows(self, input_ids: Tensor, features: Sequence[Tensor], source: np.ndarray) -> Tensor:
        """Embeddings (B, L, D) of what `source` (B, L) names, as `arrange` does."""
        is_text = (source >= 0) & (source < input_ids.numel())
        text = self.get_model().embed_tokens(_take([input_ids.flatten()], source[is_text]))
        row = np.where(source < 0, -1, source - input_ids.numel() + len(text))
        row[is_text] = np.arange(len(text))
        shown = (one.to(device=text.device, dtype=text.dtype) for one in features)
        return _take([text, *shown, text.new_zeros(1, text.shape[1])], row)

    def _image_features(
        self, images: Tensor | Sequence[Tensor] | TowerOutput, image_sizes: Sequence[Sequence[int]] | None
    ) -> tuple[Sequence[Tensor], Any]:
        """Features (n_i, D) per placeholder, and what a patched model left of encoding them.

        A 4-D tensor is one crop per image; other crops are merged.
        """
        if isinstance(images, TowerOutput) or (isinstance(images, Tensor) and images.dim() == 4):
            with apet.expecting_images(self) as encoding:
                return self.encode_images(images), encoding
        stacks = _crop_stacks(images)
        if not stacks:
            return [], None
        if image_sizes is not None and len(image_sizes) < len(stacks):
            raise ValueError(f"image_sizes has {len(image_sizes)} entries for {len(stacks)} images; give one per image")
        sizes = [None if image_sizes is None else image_sizes[index] for index in range(len(stacks))]
        newline = self._newline()
        with apet.expecting_images(self, self._layouts([len(stack) for stack in stacks], sizes)) as encoding:
            encoded = self.encode_images(torch.cat(stacks))
        crops = encoded.split([len(stack) for stack in stacks])
        return [self._merge_crops(one, newline, size) for one, size in zip(crops, sizes, strict=True)], encoding

    def _layouts(self, crops: Sequence[int], sizes: Sequence[Sequence[int] | None]) -> list[apet.ImageLayout]:
        """How the features of every image's crops become its tokens, for a patched model.

        Read off by merging the features' own numbers, with -1 for a newline: no rule is written twice.
        """
        if apet.active_config(self) is None:
            return []
        tower = self.get_vision_tower()
        rows = tower.num_patches + (tower.select_feature == "cls_patch")
        newline = None if self._newline() is None else torch.tensor([-1.0], dtype=torch.float64)
        layouts = []
        for count, size in zip(crops, sizes, strict=True):
            numbers = torch.arange(count * rows, dtype=torch.float64).view(count, rows, 1)
            merged = self._merge_crops(numbers, newline, size)
            layouts.append(apet.ImageLayout(count, rows, merged.flatten().long().numpy()))
        return layouts

    def _newline(self) -> Tensor | None:
        """The newline embedding (D,), None where the config's merge type has none."""
        unpad = "unpad" in (getattr(self.config, "mm_patch_merge_type", None) or "flat")
        return self.get_model().image_newline if unpad else None

    def _merge_crops(self, crops: Tensor, newline: Tensor | None, size: Sequence[int] | None) -> Tensor:
        """One image's crops (T, n, D) as a sequence (n', D), by `config.mm_patch_merge_type`.

        Raises:
            ValueError: Unknown merge type, or no size for several crops.
            NotImplementedError: Tiles of a checkpoint that is not anyres.
        """
        kind = getattr(self.config, "mm_patch_merge_type", None) or "flat"
        if kind == "flat":
            return crops.flatten(0, 1)
        if not kind.startswith("spatial"):
            raise ValueError(f"mm_patch_merge_type={kind!r} is unknown; supported: flat, spatial, spatial_unpad")
        if len(crops) == 1:
            return crops[0] if newline is None else torch.cat([crops[0], newline.to(crops).unsqueeze(0)])
        return torch.cat([crops[0], self._arrange_tiles(crops[1:], newline, size)])

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
        return current is not _OWN_SPLICING


# Tools replace the method on an object or on the class itself; this is what it is compared with.
_OWN_SPLICING = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal


def _own_penalty(options: dict[str, Any]) -> dict[str, Any]:
    """`repetition_penalty` as a processor that sees the new tokens.

    Transformers (5.23) takes the prompt's padding for part of them, so that padded rows would be penalised too late.
    """
    penalty = options.pop("repetition_penalty", None)
    if penalty in (None, 1.0):
        return options
    processors = [RepetitionPenaltyLogitsProcessor(penalty), *(options.pop("logits_processor", None) or ())]
    return options | {"logits_processor": LogitsProcessorList(processors)}


def _crop_stacks(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Crops (T, 3, H, W) of every image.

    Raises:
        ValueError: Images of another shape.
    """
    stacks = [image.unsqueeze(0) if image.dim() == 3 else image for image in images]
    if any(stack.dim() != 4 for stack in stacks):
        shapes = list(images.shape) if isinstance(images, Tensor) else [list(image.shape) for image in images]
        raise ValueError(
            f"images must be (B, 3, H, W), (B, T, 3, H, W), or a list of (T, 3, H, W) or (3, H, W); got {shapes}"
        )
    return stacks


def _spliced_labels(labels: Tensor, source: np.ndarray) -> Tensor:
    """Labels (B, L) of a spliced batch: those of its text, the ignored one for images and padding."""
    ignored = labels.new_full((1,), IGNORE_INDEX)
    return _take([labels.flatten(), ignored], np.where(source < labels.numel(), source, -1))


def _take(parts: Sequence[Tensor], index: np.ndarray) -> Tensor:
    """Rows of the parts (n_i, ...) one after the other, at `index` of any shape; -1 is the last row."""
    table = torch.cat(list(parts))
    flat = to_device(np.where(index < 0, len(table) - 1, index).ravel(), table.device)
    return table.index_select(0, flat).view(*index.shape, *table.shape[1:])
