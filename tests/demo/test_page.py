"""The demo in a real browser: load, upload, slide, the answers appear and the pictures change.

Skipped where gradio, playwright or chromium is missing; scripts/test_pages.sh installs the two packages.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium on the path", allow_module_level=True)

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "data/sample/eval/gqa/images"
PROMPT = "Answer the question using a single word or phrase."
WAIT = 120_000  # milliseconds; a busy machine takes seconds for an answer


@pytest.fixture(scope="module")
def address():
    """A running demo on the sample."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "apet", "demo", "--device", "cpu", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert f"http://127.0.0.1:{port}" in line, line
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(address):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1250})
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.asked = asked
        tab.goto(address)
        yield tab
        browser.close()


def answer(page, number: int) -> str:
    return page.locator(f"#answer{number} textarea").input_value()


def source(page, number: int) -> str:
    return page.locator(f"#kept{number} img").first.get_attribute("src")


def until(what, message: str):
    """Wait for something to be true."""
    end = time.monotonic() + WAIT / 1000
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.2)
    pytest.fail(message)


def facts(page, number: int) -> str:
    return page.locator(f"#facts{number}").inner_text()


@pytest.mark.slow
def test_load_upload_slide(page):
    page.locator("#kept1 img").first.wait_for(timeout=WAIT)
    page.locator("#kept2 img").first.wait_for(timeout=WAIT)
    until(lambda: answer(page, 1) and answer(page, 2), "no answer to the first picture")
    assert "64.0 of 576" in facts(page, 1) and "64.0 of 576" in facts(page, 2)
    assert re.search(r"time: \d+ ms", facts(page, 1)) and "times fewer" in facts(page, 1)
    before = source(page, 1), source(page, 2)

    page.locator("#picture button[aria-label='Remove Image'], #picture button[aria-label='Clear']").first.click()
    page.locator("#picture input[type=file]").set_input_files(str(IMAGES / "n000193.jpg"))
    page.locator("#question textarea").fill(f"What shape is the blue object?\n{PROMPT}")
    page.locator("#ask").click()
    until(lambda: page.locator("#kept1 img").count() and source(page, 1) != before[0], "the picture did not change")
    until(
        lambda: page.locator("#kept2 img").count() and source(page, 2) != before[1], "the other picture did not change"
    )
    # The upload alone asks the earlier question.
    until(lambda: answer(page, 1) == "square", "no answer to the second question")
    assert page.locator("#groups1 img").count() and not page.locator("#groups2 img").count()  # random merges nothing
    if "APET_SCREENSHOT" in os.environ:
        time.sleep(10)  # the answers of queued changes
        page.screenshot(path=os.environ["APET_SCREENSHOT"], full_page=True)

    before = source(page, 1)
    number = page.locator("#tokens input[type=number]").first
    number.fill("16")
    number.press("Enter")
    page.locator("#ask").click()
    until(lambda: "16.0 of 576" in facts(page, 1), "the budget did not arrive")
    until(lambda: source(page, 1) != before, "the picture did not follow the budget")


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(page, address):
    assert page.asked and all(url.startswith((address, "data:", "blob:")) for url in page.asked)


@pytest.mark.slow
def test_what_cannot_be_is_a_sentence(page):
    page.locator("#method2 input").click()
    page.get_by_role("option", name="fastv", exact=True).click()
    until(lambda: "cannot average" in facts(page, 2), "no reason for a budget out of reach")
    assert answer(page, 2) == "" and answer(page, 1)


@pytest.mark.slow
def test_it_listens_on_this_machine_only(address):
    port = int(address.rpartition(":")[2])
    assert urllib.request.urlopen(address, timeout=60).status == 200
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [one for one in listening if one.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
