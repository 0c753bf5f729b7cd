"""What scripts/serve.sh and examples/serving pass on to `vllm serve`, seen by a command of that name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve(tmp_path):
    """`serve(script, *flags, **environment)` gives the words vLLM would get, and VLLM_PLUGINS; None if it got none."""
    seen = tmp_path / "seen.json"
    command = tmp_path / "vllm"
    command.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ.get('VLLM_PLUGINS')], open({str(seen)!r}, 'w'))\n"
    )
    command.chmod(0o755)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/config.json").write_text('{"model_type": "llava"}')

    def run(script, *flags, **environment):
        settings = {"APET_VENV": "none", "PYTHON": sys.executable, "MODEL": str(tmp_path / "served"), **environment}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["bash", str(ROOT / script), *flags], env=path | settings, capture_output=True, text=True, timeout=120
        )
        words, plugins = json.loads(seen.read_text()) if seen.exists() else (None, None)
        return done, words, plugins

    return run


def flag(words, name):
    return words[words.index(name) + 1]


def test_the_server_gets_settings_name_and_further_flags(serve, tmp_path):
    done, words, plugins = serve("scripts/serve.sh", "--dtype", "float32", PORT="8123")
    assert done.returncode == 0 and plugins == "apet"
    assert words[:2] == ["serve", str(tmp_path / "served")] and words[-2:] == ["--dtype", "float32"]
    assert json.loads(flag(words, "--additional-config")) == {"apet": {"visual_token_num": 64}}
    assert [flag(words, name) for name in ("--served-model-name", "--host", "--port")] == [
        "served",
        "127.0.0.1",
        "8123",
    ]


def test_tokens_none_serves_the_model_as_it_is(serve):
    _, words, _ = serve("scripts/serve.sh", TOKENS="none")
    assert "--additional-config" not in words


def test_all_settings_can_be_given(serve):
    _, words, _ = serve("scripts/serve.sh", APET='{"image_token_ratio": 0.2}', TOKENS="none")
    assert json.loads(flag(words, "--additional-config")) == {"apet": {"image_token_ratio": 0.2}}


@pytest.mark.parametrize("mode", ["data", "tensor", "pipeline"])
def test_several_gpus(serve, mode):
    _, words, _ = serve("examples/serving/several_gpus.sh", mode, "4", "--port", "9")
    assert flag(words, f"--{mode}-parallel-size") == "4" and words[-2:] == ["--port", "9"]


def test_several_hosts(serve):
    script, key = "examples/serving/several_hosts.sh", ("--api-key", "k")
    _, first, _ = serve(script, "data", "first", "2", "8", "10.0.0.1", *key)
    _, second, _ = serve(script, "data", "1", "2", "8", "10.0.0.1")
    for words in (first, second):
        sizes = [flag(words, f"--data-parallel-{name}") for name in ("size", "size-local", "address")]
        assert sizes == ["16", "8", "10.0.0.1"] and flag(words, "--host") == "10.0.0.1"
    assert flag(first, "--api-key") == "k"
    assert "--headless" not in first
    assert "--headless" in second and flag(second, "--data-parallel-start-rank") == "8"


HOSTS = ("examples/serving/several_hosts.sh", "data", "first", "2", "8", "10.0.0.1")


@pytest.mark.parametrize(
    "words", [(), ("--api-key",), ("--api-key", "--port", "9"), ("--api-key-file", "x")], ids=" ".join
)
def test_several_hosts_want_a_key(serve, words):
    done, passed, _ = serve(*HOSTS, *words)
    assert done.returncode == 2 and passed is None and "--api-key KEY" in done.stderr


@pytest.mark.parametrize(
    ("words", "environment"), [(("--api-key=k",), {}), (("--port", "9"), {"VLLM_API_KEY": "k"})], ids=str
)
def test_several_hosts_take_a_key_in_any_way_vllm_does(serve, words, environment):
    _, passed, _ = serve(*HOSTS, *words, **environment)
    assert flag(passed, "--host") == "10.0.0.1" and passed[-len(words) :] == list(words)


@pytest.mark.parametrize(
    ("words", "environment"),
    [((), {"HOST": "0.0.0.0"}), ((), {"HOST": "::"}), (("--host", "0.0.0.0"), {}), (("--host=::",), {})],
    ids=str,
)
def test_several_hosts_listen_on_a_named_address_only(serve, words, environment):
    done, passed, _ = serve(*HOSTS, "--api-key", "k", *words, **environment)
    assert done.returncode == 2 and passed is None and "every network" in done.stderr


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("several_gpus", ["both", "2"]),
        ("several_gpus", []),
        ("several_hosts", ["data"]),
        ("several_hosts", ["mpi", "1", "2", "3", "a"]),
    ],
)
def test_wrong_words_are_explained(serve, script, flags):
    done, words, _ = serve(f"examples/serving/{script}.sh", *flags)
    assert done.returncode != 0 and words is None and ("data" in done.stderr)
