"""The `compress` command and what it stands on: shapes, turns, fits, the floor, memory."""

import json
import sys

import pytest
import torch

from apet import measure
from apet.bench import __main__ as program
from apet.bench import compress
from apet.bench.memory import peak_bytes
from apet.bench.output import markdown, table
from apet.bench.shapes import AS_PUBLISHED, Shape, parse_methods
from apet.methods import method_names

CPU = torch.device("cpu")


def bench(capsys, *words: str) -> tuple[str, dict]:
    """What people see, and the last line."""
    assert program.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(lines[:-1]), json.loads(lines[-1])


def test_table_json_line_and_files(tmp_path, capsys):
    files = {flag: tmp_path / flag.strip("-") for flag in ("--json", "--markdown")}
    words = [str(word) for pair in files.items() for word in pair]
    text, result = bench(
        capsys, "compress", "--shapes", "1x64x32:16,2x36x16:12", "--repeats", "2", "--warmup", "1",
        "--scaling", "64,128,256", "--scaling-block", "1x16:16", *words,
    )  # fmt: skip
    assert json.loads(files["--json"].read_text()) == result
    assert files["--markdown"].read_text().strip() == text.strip()
    assert [shape["shape"] for shape in result["shapes"]] == ["1x64x32:16", "2x36x16:12"]
    calls = result["shapes"][0]["calls"]
    assert {"apet", "random", AS_PUBLISHED, "similarity product", "read of the tokens"} == set(calls)
    assert calls[AS_PUBLISHED]["as_published_over_this"]["median"] == 1
    assert len(result["scaling"]["points"]) == 3
    assert result["environment"]["torch"] == torch.__version__


def test_every_method_that_selects_can_be_timed(capsys):
    _, result = bench(
        capsys, "compress", "--shapes", "2x64x32:16", "--methods", "all", "--repeats", "1", "--warmup", "1"
    )
    assert set(method_names()) - set(result["shapes"][0]["calls"]) == {"none"}
    assert set(parse_methods("all")) == set(method_names()) - {"none"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "--shapes", "576:96"], "BxNxD:K"),
        (["compress", "--shapes", "1x10x4:10"], "fewer than its 10 tokens"),
        (["compress", "--methods", "apt"], "Did you mean"),
        (["compress", "--methods", "none"], "keeps every token"),
        (["compress", "--scaling", "100,200"], "three or more"),
        (["compress", "--scaling_block", "1024", "--scaling"], "BxD:K"),
        (["compress", "--repeats", "0"], "at least 1"),
        (["compress", "--device", "cudda"], "not a device"),
        (["comprss"], "unknown command"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, capsys):
    assert program.main(words) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_usage_names_every_command(capsys):
    assert program.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {command} " in usage for command in program.COMMANDS)


@pytest.mark.parametrize("command", program.COMMANDS)
def test_every_command_has_what_it_must_have(command):
    module = program.module_of(command)
    assert callable(module.run)
    program.parser(command)
    assert module.__doc__.splitlines()[0].endswith(".")


def test_calls_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "_SHORTEST_MS", 0.0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.time_in_turns(calls, CPU, repeats=3, warmup=1)
    assert order == list("abbaabba")
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_a_limit_of_time_leaves_three_rounds():
    calls = {"one": lambda: None, "two": lambda: None}
    assert [len(spent) for spent in measure.time_in_turns(calls, "cpu", repeats=5, seconds=0).values()] == [3, 3]
    assert [len(spent) for spent in measure.time_in_turns(calls, "cpu", repeats=5, seconds=60).values()] == [5, 5]


def test_ratio_is_taken_round_by_round():
    assert measure.ratio([10, 20, 30], [5, 10, 15]) == (2, 2, 2, 2, 2, 3)


def test_fit_recovers_the_exponent():
    sizes = [1000, 2000, 4000, 8000]
    assert measure.fit_growth(sizes, [3 * size for size in sizes]) == pytest.approx((1, 1))
    assert measure.fit_growth(sizes, [size**2 for size in sizes]).exponent == pytest.approx(2)


def test_floor_reads_all_and_multiplies_donors_with_receivers():
    tokens = torch.randn(2, 10, 4, dtype=torch.float16)
    read, product = (call() for call in compress.floor_calls(tokens, 3).values())
    torch.testing.assert_close(read, tokens.sum(-1))
    assert product.shape == (2, 7, 3)
    assert product.dtype == torch.float32


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_the_broadcast():
    shape = Shape(1, 600, 256, 100)
    # One float32 temporary of the broadcast; resident sets are known to a page.
    assert peak_bytes(shape, AS_PUBLISHED, CPU, torch.float32) > 4 * 500 * 90 * 256


def test_table_refuses_uneven_rows():
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table("x", ["a", "b"], [[1]])


def test_markdown():
    text = markdown([table("x", ["a", "b"], [["y", 1.5], [None, 1234.4]])], {"torch": "2", "GPU": None})
    assert text == "torch 2\n\n**x**\n\n| a | b     |\n| - | ----- |\n| y | 1.5   |\n|   | 1,234 |\n"
