"""Write docs/methods.md from the registry: ``python scripts/make_methods_doc.py [--check]``."""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from any folder, installed or not

from apet.methods import get_method, method_names

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"

_HEAD = """# Compression methods

Written by `python scripts/make_methods_doc.py` from the registry in `apet/methods/`; do not edit by hand.

Every method runs in the same frame: the vision stage (`vision`), stages between decoder layers (`llm`), or both, and
returns exactly the number of tokens it is asked for. None needs materialised attention: an attention row that a method
reads is recomputed from queries and keys. All are implemented from their papers' formulas; each file's docstring states
where it deviates. `features` is where the vision stage takes its tokens: in front of the projector (pre) or behind it
(post).
"""

_NEEDS = """
What the needs mean (shapes in `apet/methods/context.py`), with the layers they are read from: layers of the vision
tower count from its end or start (-2, 5), those of the decoder from the stage (0: the layer about to run, -1: the one
before). Text is the prompt behind the image. What comes from the decoder, text included, every family has;
`cls_attention`, `vision_keys` and `vision_states` need a CLIP tower whose patches become tokens one by one
(LLaVA-1.5, LLaVA-NeXT, Video-LLaVA), `vision_features` any tower in front of a LLaVA projector, and `clip_relevance`
CLIP's text tower, which no checkpoint holds. A method that asks for what its model does not have is refused with the
reason. On images of several crops (anyres) a method that reads text chooses from all crops together, with the budget of
a crop times the crops.

## Options and budgets

Options are the fields of the method's class with their defaults. The budgets are what `Method.plan` makes of 192, 128
and 64 tokens averaged over the layers of a model with 576 visual tokens and 32 layers: tokens that leave the vision
stage, then `layer: tokens` for each decoder stage.
"""


def page() -> str:
    """The page as Markdown."""
    methods = [get_method(name) for name in method_names()]
    lines = [_HEAD, "| method | paper | idea | needs | stages | features |", "|---|---|---|---|---|---|"]
    lines += [_row(method) for method in methods]
    lines += [_NEEDS, "| method | options | 192 | 128 | 64 |", "|---|---|---|---|---|"]
    lines += [_budget_row(method) for method in methods]
    return "\n".join(lines) + "\n"


def _row(method) -> str:
    paper = (
        f"{method.paper}, [{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
        if method.arxiv
        else method.paper or "baseline"
    )
    needs = [
        name + (f" ({', '.join(map(str, layers))})" if layers else "")
        for stage in method.stages
        for name, layers in method.needs(stage).items()
    ]
    where = method.features.partition("_")[0] if "vision" in method.stages else ""
    cells = (f"`{method.name}`", paper, method.idea, ", ".join(dict.fromkeys(needs)), ", ".join(method.stages), where)
    return f"| {' | '.join(cells)} |"


def _budget_row(method) -> str:
    options = ", ".join(f"`{field.name}={_value(field.default)}`" for field in dataclasses.fields(method))
    cells = (f"`{method.name}`", options, *(_budget(method, average) for average in (192, 128, 64)))
    return f"| {' | '.join(cells)} |"


def _value(default) -> str:
    if isinstance(default, tuple):
        return f"({', '.join(map(_value, default))})"
    return f"{default:.4g}" if isinstance(default, float) else repr(default)


def _budget(method, average: int) -> str:
    plan = method.plan(average, 576, 32)
    stages = [str(plan["visual_token_num"])] if "visual_token_num" in plan else []
    pairs = zip(plan.get("layer_list", ()), plan.get("image_token_list", ()), strict=True)
    return ", ".join(stages + [f"{layer}: {count}" for layer, count in pairs]) or "all"


def main() -> int:
    """Write the page, or with ``--check`` say whether it is current."""
    flags = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    flags.add_argument("--check", action="store_true", help="fail if the page is not current, write nothing")
    text = page()
    if not flags.parse_args().check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not current; run python scripts/make_methods_doc.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
