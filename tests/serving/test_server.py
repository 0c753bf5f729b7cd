"""`scripts/serve.sh` over HTTP: questions of the sample with and without ApET, two settings in turn, a bad one."""

import json
import urllib.error
import urllib.request

import pytest
import vllm
from checkpoints import picture
from engine import ROOT, get, metric, server, start

import apet
from apet.eval.endpoint import Endpoint
from apet.eval.server import conversation, picture_url
from llava.eval import model_vqa_loader
from llava.eval.program import main
from llava.model.hugging_face import export_checkpoint

SAMPLE = ROOT / "data/sample"
QUESTIONS = 20
IMAGE_TOKENS = 576


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "llava-v1.5-sample"
    return str(export_checkpoint(str(SAMPLE / "model/llava-v1.5-sample"), folder))


def ask(answers, *flags):
    """Texts of the first questions of the sample's GQA file."""
    arguments = ["--question-file", str(SAMPLE / "eval/gqa/llava_gqa_testdev_balanced.jsonl"), "--temperature", "0"]
    arguments += [
        "--image-folder",
        str(SAMPLE / "eval/gqa/images"),
        "--answers-file",
        str(answers),
        "--num_workers",
        "0",
    ]
    assert (
        main(model_vqa_loader.parser(), [*arguments, "--limit", str(QUESTIONS), "--max_new_tokens", "16", *flags]) == 0
    )
    return [json.loads(line)["text"] for line in answers.read_text().splitlines()]


def reference(answers, tokens):
    """The same through the transformers patch."""
    flags = ["--model-path", str(SAMPLE / "model/llava-v1.5-sample"), "--conv-mode", "vicuna_v1", "--batch_size", "10"]
    return ask(answers, *flags, "--device", "cpu", "--dtype", "fp32", "--visual_token_num", str(tokens))


def prompt_tokens(address, *images):
    client = Endpoint(address)
    messages = conversation("What is this?", [picture_url(image) for image in images])
    return client.complete(messages, model=client.model_id(), max_tokens=1, temperature=0).prompt_tokens


def test_answers_over_http_are_those_of_the_patch_and_settings_do_not_mix(checkpoint, tmp_path):
    counts, served, wanted, records = {}, {}, {}, {}
    for tokens in ("none", "64", "32"):
        with server(tmp_path / f"{tokens}.log", MODEL=checkpoint, TOKENS=tokens) as address:
            served[tokens] = ask(tmp_path / f"{tokens}.jsonl", "--server", address, "--concurrency", "4")
            counts[tokens] = prompt_tokens(address, picture(300, 200, 1))
            assert prompt_tokens(address, picture(300, 200, 1)) == counts[tokens]
            # Pruned prompts share their prefix, image included, like whole ones: 16 questions about each picture.
            assert metric(address, "vllm:prefix_cache_hits_total") > 0
            assert metric(address, "vllm:mm_cache_hits_total") > 0
            assert ("apet:" in get(address, "/metrics")[1]) == (tokens != "none")
        records[tokens] = json.loads((tmp_path / f"{tokens}.run.json").read_text())["settings"]
        wanted[tokens] = reference(tmp_path / f"reference-{tokens}.jsonl", IMAGE_TOKENS if tokens == "none" else tokens)
    assert served == wanted
    assert counts["none"] - IMAGE_TOKENS == counts["64"] - 64 == counts["32"] - 32
    assert records["none"]["server"]["compression"] is None
    assert records["64"]["server"]["compression"]["visual_token_num"] == 64
    assert records["64"]["model_id"] == "llava-v1.5-sample" and records["64"]["server"]["dtype"] == "float32"


def test_a_bad_configuration_stops_the_server_with_a_sentence(checkpoint):
    process = start(MODEL=checkpoint, APET='{"visual_token_num": 96, "layer_list": [6], "image_token_list": [32]}')
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "layer_list=[6] is not possible in vLLM" in output and "set visual_token_num or image_token_ratio" in output


def counted(address):
    """Pictures, and their tokens before and after, as the server counts them."""
    names = ("pictures", "picture_tokens_before", "picture_tokens_after")
    return [metric(address, f"apet:{name}_total") for name in names]


def status(address, path, body=None):
    """What the server says to a request without a key."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_server_says_how_it_is_what_it_does_and_what_it_has_done(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("APET_API_KEY", "secret")
    first, second = picture(300, 200, 1), picture(90, 400, 2)
    with server(tmp_path / "log", MODEL=checkpoint, TOKENS="64", VLLM_API_KEY="secret") as address:
        assert get(address, "/health") == (200, "")
        assert Endpoint(address).get("/apet") == {
            "apet": apet.__version__,
            "vllm": vllm.__version__,
            "dtype": "float32",
            "compression": apet.ApetConfig(visual_token_num=64).to_dict(),
            "example": {"picture": [640, 480], "tokens_before": IMAGE_TOKENS, "tokens_after": 64},
        }
        # The guide says which addresses a key guards.
        assert status(address, "/v1/apet") == status(address, "/v1/chat/completions", {}) == 401
        assert status(address, "/invocations", {}) == 400
        pictures = 0
        # What the engine has tried out before is not counted, nor is text; a picture from a cache is.
        for shown in ([], [first], [first], [second, first, second], []):
            pictures += len(shown)
            prompt_tokens(address, *shown)
            assert counted(address) == [pictures, pictures * IMAGE_TOKENS, pictures * 64], shown
