"""Only `apet/adapters/host.py` knows the insides of transformers, and a host it does not know is refused.

The first half reads every module of `apet` and `llava` with `ast`; the second renames arguments of a tiny host.
"""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from test_layers import MODULES
from tiny import MIXED_ROWS, batch, images, left_pad, prompt, tiny_llava
from transformers import Cache, DynamicCache

import apet
from apet.adapters import host

ROOT = Path(__file__).parents[1]
SEAM = "apet.adapters.host"

# Arguments, attributes, functions and modules of a host that are no documented interface.
INSIDES = frozenset(
    """
    past_key_values mm_encoder_outputs position_embeddings output_hidden_states hidden_states pooler_output
    image_hidden_states create_causal_mask ALL_ATTENTION_FUNCTIONS ALL_MASK_ATTENTION_FUNCTIONS eager_attention_forward
    _attn_implementation _compile_all_devices is_compileable max_cache_len cumulative_length get_seq_length
    get_mask_sizes is_sliding rotary_emb self_attn input_layernorm layer_norm1 layer_idx class_embedding
    pack_image_features image_size_to_num_patches full_attention pixel_values_images
    """.split()
)
MODULES_INSIDE = ("transformers.masking_utils", "transformers.modeling_utils", "transformers.cache_utils")

# Where a name is part of an interface that others document, or is ours.
ALLOWED = {
    ("apet.adapters.cache", "transformers.cache_utils"): "CacheLayerMixin and StaticLayer are to be built upon",
    ("apet.adapters.cache", "is_compileable"): "part of CacheLayerMixin",
    ("apet.adapters.cache", "is_sliding"): "part of CacheLayerMixin",
    ("apet.adapters.cache", "get_mask_sizes"): "part of CacheLayerMixin",
    ("apet.adapters.cache", "get_seq_length"): "part of CacheLayerMixin",
    ("apet.adapters.cache", "max_cache_len"): "documented argument of StaticLayer",
    ("apet.serving.host", "inspect.signature"): "the seam to vLLM, another host",
    ("llava.model.llava_arch", "past_key_values"): "LLaVA's prepare_inputs_labels_for_multimodal has it by this name",
}


def names_of(source: str) -> set[str]:
    """Identifiers, attributes, arguments and strings in code, docstrings left out."""
    found: set[str] = set()
    tree = ast.parse(source)
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    doc = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, described) and ast.get_docstring(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.keyword(arg=str(name)) | ast.alias(name=name):
                found.add(name)
            case ast.Constant(value=str(name)) if id(node) not in doc:
                found.add(name)
            case ast.ImportFrom(module=str(name)):
                found.add(name)
    return found


def inside(source: str) -> set[str]:
    """Names of a host's insides in a source, modules included; `inspect.signature` of anything counts."""
    names = names_of(source)
    found = names & INSIDES | {module for module in MODULES_INSIDE if module in names}
    if "signature" in names and "inspect" in names:
        found.add("inspect.signature")
    return found


@pytest.mark.parametrize(("module", "package", "path"), MODULES, ids=[module for module, _, _ in MODULES])
def test_insides_stand_in_the_seam_alone(module, package, path):
    if module == SEAM:
        return
    found = inside(path.read_text(encoding="utf-8"))
    assert sorted(name for name in found if (module, name) not in ALLOWED) == []


def test_every_exception_is_needed():
    paths = {module: path for module, _, path in MODULES}
    for module, name in ALLOWED:
        assert name in inside(paths[module].read_text(encoding="utf-8")), f"{module} no longer needs {name}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(kwargs):\n    return kwargs.get('past_key_values')", {"past_key_values"}),
        ("model(x, past_key_values=None)", {"past_key_values"}),
        ("cache.layers[0].cumulative_length", {"cumulative_length"}),
        ("from transformers.masking_utils import x", {"transformers.masking_utils"}),
        ("import inspect\ninspect.signature(model.forward)", {"inspect.signature"}),
        ('"""About past_key_values."""\nx = 1', set()),
    ],
)  # fmt: skip
def test_the_check_itself(source, found):
    assert inside(source) == found


def test_the_range_is_the_one_that_pip_gets():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    found = re.search(r"^transformers(.*)$", requirements, re.MULTILINE)
    assert found and found[1] == host.TESTED


# A host that renames something

VISION = apet.ApetConfig(visual_token_num=12, basis_token_num=3)
BOTH = apet.ApetConfig(visual_token_num=12, layer_list=[2], image_token_list=[5], basis_token_num=3)


def rename(monkeypatch, cls: type, old: str, new: str) -> None:
    """Give an argument of a class's forward another name, as a release of transformers would."""
    original = cls.forward
    signature = host.inspect.signature(original)
    parameters = [
        parameter.replace(name=new) if parameter.name == old else parameter
        for parameter in signature.parameters.values()
    ]

    @functools.wraps(original)
    def renamed(self, *args, **kwargs):
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return original(self, *args, **kwargs)

    renamed.__signature__ = signature.replace(parameters=parameters)
    monkeypatch.setattr(cls, "forward", renamed)


def state_of(model) -> dict:
    """Everything of a model that a patch could leave behind: attributes of every module, and hooks."""
    return {
        name: (sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


CASES = [
    ("base", host.cache_argument()),
    ("base", "input_ids"),
    ("base", "inputs_embeds"),
    ("base", "attention_mask"),
    ("base", "position_ids"),
    ("text", host.cache_argument()),
    ("text", "inputs_embeds"),
    ("text", "attention_mask"),
    ("text", "position_ids"),
    ("layer", host.cache_argument()),
    ("layer", "hidden_states"),
    ("layer", "attention_mask"),
    ("layer", "position_embeddings"),
    ("layer", "position_ids"),
]


@pytest.mark.host
@pytest.mark.parametrize("config", [VISION, BOTH], ids=["vision", "both"])
@pytest.mark.parametrize(("part", "argument"), CASES, ids=[f"{part}-{argument}" for part, argument in CASES])
def test_a_renamed_argument_is_refused_and_the_model_untouched(monkeypatch, config, part, argument):
    model = tiny_llava()
    text = model.model.language_model
    parts = {"base": model.model, "text": text, "layer": text.layers[0]}
    rename(monkeypatch, type(parts[part]), argument, "renamed")
    before = state_of(model)
    with pytest.raises(host.UnknownHostError, match=rf"transformers [\d.]+ is not a host.*{argument}.*{host.TESTED}"):
        apet.apply_patch(model, config)
    assert state_of(model) == before
    assert apet.active_config(model) is None


@pytest.mark.host
@pytest.mark.parametrize("name", ["input_layernorm", "self_attn"])
def test_a_decoder_layer_of_another_build_is_refused(name):
    model = tiny_llava()
    layer = model.model.language_model.layers[0]
    layer.add_module("renamed", layer._modules.pop(name))
    with pytest.raises(host.UnknownHostError, match=name):
        apet.apply_patch(model, BOTH)


@pytest.mark.host
@pytest.mark.parametrize("config", [VISION, BOTH], ids=["vision", "both"])
def test_a_filled_cache_that_the_hooks_did_not_see_raises(monkeypatch, config):
    """As if a release had renamed the cache behind the patch's back."""
    model = apet.apply_patch(tiny_llava(), config)
    inputs = left_pad([prompt(9, (3,))]) | {"pixel_values": images(1)}
    with torch.inference_mode():
        first = model(**inputs)
        monkeypatch.setattr(host, "_CACHE_NAMES", ("renamed",))
        monkeypatch.setattr(host, "cache_argument", lambda: "renamed")
        cache = getattr(first, "cache", None) or first.past_key_values
        given = {"cache" if hasattr(first, "cache") else "past_key_values": cache}
        with pytest.raises(host.UnknownHostError, match="filled cache"):
            model(input_ids=torch.tensor([[5]]), **given)


@pytest.mark.host
def test_layers_that_do_not_get_the_cache_raise(monkeypatch):
    model = apet.apply_patch(tiny_llava(), BOTH)
    text = type(model.model.language_model)
    forward = text.forward

    def without(self, *args, **kwargs):
        return forward(self, *args, **{name: value for name, value in kwargs.items() if not isinstance(value, Cache)})

    monkeypatch.setattr(text, "forward", without)
    with pytest.raises(host.UnknownHostError, match="do not get"), torch.inference_mode():
        model(**batch(MIXED_ROWS[:1]), **host.with_cache(DynamicCache()), use_cache=False)
