"""Write the pages that follow from the code: ``python scripts/make_docs.py [--check]``.

docs/methods.md and docs/families.md follow from the registries, docs/options.md from the fields of the configuration
and of the methods, data/README.md from the tables of data files and of data sets, docs/sample_runs.md from the runs in
data/runs/sample.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import _checkout  # noqa: F401

from apet import families
from apet.config import ApetConfig, attribute_texts
from apet.eval.data_check import DATA, layout_table
from apet.eval.hub import SOURCES, Source
from apet.methods import get_method, method_names
from apet.report.output import markdown, notes
from apet.report.rows import columns_of, rows_of
from apet.report.runs import find_runs
from apet.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]

_METHODS = """# Compression methods

Written by `python scripts/make_docs.py` from the registry in `apet/methods/`; do not edit by hand.

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
`cls_attention`, `vision_keys` and `vision_states` need a tower with a class token (CLIP, DINOv2) whose patches become
tokens one by one (LLaVA-1.5, LLaVA-NeXT, Video-LLaVA), `vision_features` any tower in front of a LLaVA projector, and
`clip_relevance` CLIP's text tower, which no checkpoint holds. A method that asks for what its model does not have is
refused with the reason. On images of several crops (anyres) a method that reads text chooses from all crops together,
with the budget of a crop times the crops.

## Options and budgets

Options are the fields of the method's class with their defaults. The budgets are what `Method.plan` makes of 192, 128
and 64 tokens averaged over the layers of a model with 576 visual tokens and 32 layers: tokens that leave the vision
stage, then `layer: tokens` for each decoder stage.
"""


def methods_page() -> str:
    """docs/methods.md."""
    methods = [get_method(name) for name in method_names()]
    lines = [_METHODS, "| method | paper | idea | needs | stages | features |", "|---|---|---|---|---|---|"]
    lines += [_row(method) for method in methods]
    lines += [_NEEDS, "| method | options | 192 | 128 | 64 |", "|---|---|---|---|---|"]
    lines += [_budget_row(method) for method in methods]
    return "\n".join(lines) + "\n"


def _row(method) -> str:
    paper = method.paper or "baseline"
    if method.arxiv:
        paper += f", [{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
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


_OPTIONS = """# Compression settings

Written by `python scripts/make_docs.py` from the fields of `apet.ApetConfig` and of the methods; do not edit by hand.

The same names are fields of `apet.ApetConfig`, of its JSON form (`--additional-config` of a vLLM server), and of the
programs: the common ones have a flag, all others and the options of the method are given as
`--apet name=value,name=value`. Values are numbers, words, true, false or none; lists are literals such as '[8, 16]'.

| field | in the programs | type | default | meaning |
|---|---|---|---|---|
"""

_METHOD_OPTIONS = """
## Options of the methods

`--method apet_plus:quota=0`, `--apet quota=0` and `ApetConfig(method_options={"quota": 0})` are the same. Methods that
are not listed have none. `--apet size_bias=true` and `--apet position_mode=keep` are the fields above,
which every method has.

| method | option | default | meaning |
|---|---|---|---|
"""


def options_page() -> str:
    """docs/options.md."""
    texts = attribute_texts(ApetConfig)
    lines = []
    for field in dataclasses.fields(ApetConfig):
        spelled = f"`--{field.name}`" if field.metadata.get("flag") else f"`--apet {field.name}=`"
        if field.name == "method_options":
            spelled = "see below"
        default = "none set" if field.default is dataclasses.MISSING else f"`{_value(field.default)}`"
        lines.append(_table_line(f"`{field.name}`", spelled, _type_name(field.type), default, texts[field.name]))
    methods = [get_method(name) for name in method_names()]
    options = [
        _table_line(f"`{one.name}`", f"`{option.name}`", f"`{_value(option.default)}`", text)
        for one in methods
        for option, text in _described(one)
    ]
    return _OPTIONS + "".join(lines) + _METHOD_OPTIONS + "".join(options)


def _described(method) -> list[tuple[dataclasses.Field, str]]:
    texts = attribute_texts(type(method))
    return [(field, texts[field.name]) for field in dataclasses.fields(method)]


def _type_name(annotation) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return f"`{name.replace('typing.', '').replace('collections.abc.', '')}`"


def _table_line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


_CHECKPOINTS = (
    ("`llava-v1.5-7b`", "liuhaotian/llava-v1.5-7b", "`scripts/llava1_5`"),
    ("`llava-v1.6-vicuna-7b`", "liuhaotian/llava-v1.6-vicuna-7b", "`scripts/llava1_6`"),
    ("`Qwen2.5-VL-7B-Instruct`", "Qwen/Qwen2.5-VL-7B-Instruct", "`scripts/qwen2_5_vl`"),
    ("`Video-LLaVA-7B-hf`", "LanguageBind/Video-LLaVA-7B-hf", "`scripts/video_llava`"),
    ("`clip-vit-large-patch14-336`", "openai/clip-vit-large-patch14-336", "vision tower of LLaVA-1.5"),
)


_HUB = """### From the Hugging Face hub

`apet eval llava1_5 gqa --dataset` writes the files of a benchmark of images first, from the usual data set below.
`--dataset ORG/NAME` takes another one with the same columns, `--dataset FOLDER` parquet files whose names and folders
are those of the hub (`<configuration>/<split>-*.parquet`). It needs `pip install 'apet[hub]'`. Rows are streamed: other
columns are not downloaded, no second copy is kept. A missing column, or a row that cannot be, is an error that names
it. Files that are there are replaced; leave the flag out to go on with a run.

The columns are those that the cards of the data sets and the tasks of lmms-eval name; `types`, `semantic` and `groups`
of GQA are those of its official question file. The data sets themselves were not downloaded here; the tests read
parquet files of the same form. Questions are written as in the published files, but ids of POPE, ScienceQA and VizWiz
count the rows, and the OCR tokens of TextVQA are those of the data set. There is none for videos: no public data set is
known that holds the videos in its rows.
"""


_DATA = """# Data: what goes where

Written by `python scripts/make_docs.py`; do not edit by hand. Nothing below `data/eval` and `data/model` is in git.
`data/sample` is: a
small checkpoint and small benchmarks in the same layout (`apet eval llava1_5 gqa --model
data/sample/model/llava-v1.5-sample --data data/sample/eval --layer_list '[6]'`).

`apet check-data` says what is there and what is missing, by benchmark, and exits with 0 if all is
complete; `--benchmarks gqa,pope` restricts it, `--data` names another folder, `--model` a checkpoint to look at too,
and `--any_size` accepts files of another size than the published ones, as those of the sample are.

## Benchmarks: `data/eval`

`apet eval` and the scripts take another folder from `--data` or the variable `DATA`, and write answers and scores below
it, or below `--out` or `OUT`.

{scripted}
- GQA: the official `eval.py` needs files that were never published for this split. The scorer in this repository needs
  only the answers above; if `gqa/eval.py` is there, its numbers are printed too. The same goes for MME and
  `MME/eval_tool/calculation.py`.
- MME: images and ground truth may lie directly in `<category>/`, or in `<category>/images` and
  `<category>/questions_answers_YN`; `MME_Benchmark_release_version` may hold a further folder `MME_Benchmark`.
- POPE: `llava_pope_test.jsonl` belongs to the label files of August 2023 (2,910 random questions); newer ones work too.
- ScienceQA: an image is `images/test/<question id>/image.png`.
- MSVD-QA, MSRVTT-QA, TGIF-QA, ActivityNet-QA: a video is `<video_name>` with the extension .mp4, .avi, .mov or .mkv;
  for ActivityNet-QA `v_<video_name>`. Answers are joined by `question_id` where `test_a.json` has it, else by place.
- VizWiz, VQAv2: their answers are with the evaluation servers; the scripts write the file to upload. MMBench is scored
  here and has an upload file as well.

Without scripts, but known to the programs (`--benchmark`):

{others}
{about_hub}
{hub}
## Checkpoints: `data/model`

{checkpoints}
Other checkpoints of these families: `apet eval ... --model <folder or hub id>`. A vision tower that is not beside its
checkpoint is taken from the hub.
"""


def data_page() -> str:
    """data/README.md."""
    scripted = layout_table([entry for entry in DATA if entry.script])
    others = layout_table([entry for entry in DATA if not entry.script])
    columns = ("benchmark", "usual data set", "configuration", "split", "columns")
    hub = markdown_table(columns, [row for name, source in SOURCES.items() for row in _source_rows(name, source)])
    checkpoints = markdown_table(("folder", "checkpoint on the hub", "what for"), _CHECKPOINTS)
    return _DATA.format(scripted=scripted, others=others, about_hub=_HUB, hub=hub, checkpoints=checkpoints)


RUNS = ROOT / "data/runs/sample"
_RUNS = """# Runs on the sample

Written by `python scripts/make_docs.py` from the runs in `data/runs/sample`; do not edit by hand. There
lie the score and the record of every run, and the table of the command that made them; the answers are left out.

```bash
python -m apet.compare --model-path data/sample/model/llava-v1.5-sample \\
  --data data/sample/eval --benchmarks gqa --limit 200 \\
  --methods apet,apet_plus,divprune,random --tokens 192,64 --seeds 3 \\
  --batch_size 32 --max_new_tokens 16 --timed 0 --no_png --out data/runs/sample
```

"""


def runs_page() -> str:
    """docs/sample_runs.md."""
    runs = find_runs([str(RUNS)])
    rows, headings = rows_of(runs), columns_of(runs)
    settings, environment = runs[0].record["settings"], runs[0].record["environment"]
    libraries = ", ".join(f"{name} {environment['libraries'][name]}" for name in ("torch", "transformers"))
    conditions = (
        f"Device {environment['device']}, {environment['threads']} threads, {settings['dtype']}, batch "
        f"{environment['batch_size']}, {libraries}, Python {environment['python']}. Other work ran "
        "on the machine: questions/s say nothing here.\n\n"
    )
    said = "".join(f"NOTE: {note}\n\n" for note in notes(runs, headings))
    compared = (RUNS / "table.md").read_text(encoding="utf-8")
    return (
        f"{_RUNS}{conditions}## Every run: `apet report data/runs/sample`\n\n{markdown(rows, headings)}\n{said}"
        f"## The methods against each other: `table.md` of the command\n\n{compared}"
    )


def _source_rows(name: str, source: Source) -> list[tuple[str, ...]]:
    return [
        (name, source.dataset, part.config, part.split, ", ".join(f"`{column}`" for column in part.columns))
        for part in source.parts
    ]


PAGES: Mapping[str, Callable[[], str]] = {
    "docs/methods.md": methods_page,
    "docs/options.md": options_page,
    "docs/families.md": families.page,
    "docs/sample_runs.md": runs_page,
    "data/README.md": data_page,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` say which are not current."""
    flags = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    flags.add_argument("--check", action="store_true", help="fail if a page is not current, write nothing")
    check = flags.parse_args(argv).check
    old = 0
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        old += 1
        if check:
            print(f"{name} is not current; run python scripts/make_docs.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return int(check and old > 0)


if __name__ == "__main__":
    sys.exit(main())
