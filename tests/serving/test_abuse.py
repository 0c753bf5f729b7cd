"""A server that is treated badly: 30 requests that nobody should send, and a soak with aborts. Slow.

The soak measures the resident memory of all of the server's processes once its caches are full: three in four of its
pictures never came before, so that a server which kept what it has processed would grow by a picture each time.
"""

import base64
import http.client
import io
import json
import os
import random
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import picture
from engine import ROOT, get, server
from PIL import Image

from apet.eval.server import picture_url
from llava.model.hugging_face import export_checkpoint

pytestmark = pytest.mark.slow

SOAK = int(os.environ.get("APET_SOAK", "2000"))
GROWTH = 100 << 20  # bytes of memory that a server this small may still take after the first tenth of the soak
CACHE_GB = 0.03  # of each of vLLM's two caches of processed pictures
PROCESSED = 3 * 336 * 336 * 4  # bytes of a picture there
GOOD = picture_url(picture(320, 240, 1))
MODEL = "llava-v1.5-sample"


def png(size: tuple[int, int], mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(*urls: str, text: str = "What is this?", **fields) -> dict:
    """A request about some pictures."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
    } | fields


SHORT = GOOD[: len(GOOD) // 2]
# What is asked, and the status that it must get.
ABUSE = {
    "no json": (400, b"{"),
    "an empty body": (400, b""),
    "a list": (400, b"[]"),
    "no messages": (400, {"model": MODEL}),
    "an empty conversation": (400, {"model": MODEL, "messages": []}),
    "another model": (404, chat(GOOD, model="other")),
    "a picture that is none": (400, chat("data:image/png;base64,AAAA")),
    "a picture cut in two": (400, chat(SHORT[: len(SHORT) // 4 * 4])),
    "base64 that is none": (400, chat("data:image/png;base64,%%%")),
    "a text as a picture": (400, chat("data:text/plain;base64,aGVsbG8=")),
    "an empty address": (400, chat("")),
    # vLLM takes a picture that it may not read or cannot fetch for a fault of its own.
    "a file of the server": (500, chat("file:///etc/passwd")),
    "an address inside the server": (500, chat("http://127.0.0.1:1/x.png")),
    "an address of another scheme": (400, chat("gopher://127.0.0.1/x")),
    "one pixel": (200, chat(png((1, 1)))),
    "a line of pixels": (200, chat(png((4000, 1)))),
    "a huge black picture": (200, chat(png((6000, 6000)))),
    "a picture of one colour channel": (200, chat(png((64, 64), "L"))),
    "a picture with transparency": (200, chat(png((64, 64), "RGBA"))),
    "a palette": (200, chat(png((64, 64), "P"))),
    "twenty pictures": (200, chat(*[GOOD] * 20)),
    "more pictures than fit": (400, chat(*[GOOD] * 200)),
    # vLLM takes placeholders beyond the pictures for words.
    "the placeholder as text": (200, chat(GOOD, text="<image> <image> <image>")),
    "the placeholder without a picture": (200, chat(text="<image>")),
    "a prompt that is too long": (400, chat(GOOD, text="word " * 5000)),
    "no tokens to answer": (400, chat(GOOD, max_tokens=0)),
    "more tokens than fit": (400, chat(GOOD, max_tokens=10**9)),
    "a temperature below zero": (400, chat(GOOD, temperature=-1)),
    "arguments of the processor": (
        400,
        chat(GOOD, mm_processor_kwargs={"size": {"height": 7, "width": 7}, "x": [1] * 99}),
    ),
    "bytes that are no text": (400, chat(GOOD, text="\ud800\x00\uffff")),
}


def send(address: str, body: dict | bytes) -> tuple[int, str]:
    """Status and text of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def seed_of(number: int) -> int:
    """The picture of a request of the soak: three in four are new, the others come back."""
    return number if number % 4 else number % 16


def answers(address: str) -> list[str]:
    """What the server says about four pictures."""
    texts = []
    for seed in range(4):
        status, text = send(address, chat(picture_url(picture(300, 200, seed)), max_tokens=12))
        assert status == 200, text
        texts.append(json.loads(text)["choices"][0]["message"]["content"])
    return texts


def abort(address: str, body: dict) -> None:
    """Ask for a stream, and leave after its first line."""
    host = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(host.hostname, host.port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().readline()
    connection.close()


def resident(address: str) -> int:
    """Bytes of memory of the server's processes, those of the group that `engine.start` made."""
    port = f"--port {urllib.parse.urlsplit(address).port}"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if port in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                group = os.getpgid(int(folder.name))
                break
        except (OSError, ValueError):
            continue  # it ended meanwhile
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    checkpoint = export_checkpoint(str(ROOT / "data/sample/model/llava-v1.5-sample"), folder / MODEL)
    with server(folder / "log", "--mm-processor-cache-gb", str(CACHE_GB), MODEL=str(checkpoint), TOKENS="32") as found:
        yield found


def test_thirty_requests_that_nobody_should_send_leave_the_server_as_it_was(address):
    assert len(ABUSE) == 30
    before = answers(address)
    found = {}
    for name, (_, body) in ABUSE.items():
        found[name], text = send(address, body)
        assert "Traceback" not in text, name
        assert get(address, "/health") == (200, ""), name
    assert found == {name: status for name, (status, _) in ABUSE.items()}
    assert answers(address) == before


def test_a_soak_with_aborts_ends_as_it_began(address):
    before, dice, memory, tenth = answers(address), random.Random(1), [], SOAK // 10
    # The caches are full before the first look at the memory, and all that comes after would not fit into GROWTH.
    early, all_of_them = (len({seed_of(number) for number in range(count)}) for count in (tenth, SOAK))
    assert early * PROCESSED > CACHE_GB * (1 << 30) and (all_of_them - early) * PROCESSED > 5 * GROWTH

    def one(number: int) -> None:
        shown = picture_url(picture(200, 150, seed_of(number)))
        body = chat(shown, text=f"{number}: what is this?", max_tokens=dice.randrange(1, 24))
        if number % 5 == 0:
            abort(address, body | {"stream": True})
        else:
            assert send(address, body)[0] == 200
        if number % tenth == tenth - 1:
            memory.append(resident(address))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(SOAK)))
    assert answers(address) == before
    assert max(memory) - min(memory) < GROWTH, memory
