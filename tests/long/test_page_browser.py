"""The run page in a real browser, at the widths of a desktop and of a phone."""

import contextlib
import json
import math
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import browser

from tracking.__main__ import main
from tracking.live import Server
from tracking.metrics_file import MetricsFile
from tracking.page import contents
from tracking.run import open_runs
from tracking.run_directory import RunDirectory

HOSTILE = "</script ><img src=x onerror='window.broken=1'><script>window.broken=1</script><!--"
STEPS = 60
CHARTS = ["Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput", "MFU"]
WIDTHS = pytest.mark.parametrize("width", [1280, 390])


def write_run(path: Path, seed: int, steps: int = STEPS) -> Path:
    """A run with all that the page draws, a value that is not finite, and texts that try to become markup."""
    directory = RunDirectory(path)
    directory.write_config(yaml.safe_dump({"train": {"steps": STEPS}, "optimizer": {"lr": seed, "name": HOSTILE}}))
    file = MetricsFile(directory.metrics)
    file.log(0, {"tokens": 0, "perf/peak": HOSTILE, "perf/peak_tflops": 1.0, "perf/compile_s": 2.5})
    write_steps(file, 1, steps, seed)
    file.close()
    directory.write_samples(steps, [("prompt", HOSTILE)])
    return path


def write_steps(file: MetricsFile, first: int, last: int, seed: int) -> None:
    draw = random.Random(seed)
    for step in range(first, last + 1):
        parts = {f"perf/{name}_ms": draw.uniform(1, 9) for name in ("device", "data_wait", "host")}
        losses = {
            "train/loss": 2 + 3 / step + draw.random(),
            "train/grad_norm": math.inf if step == 7 else draw.random(),
        }
        rates = {
            "train/lr": 1e-3 * step / STEPS,
            "perf/tokens_per_s": draw.uniform(9e3, 2e4),
            "perf/mfu": draw.random(),
        }
        file.log(step, {"tokens": 64 * step, **losses, **rates, **parts, "train/param_norm": draw.random()})
        if step % 10 == 0:
            file.log(step, {"tokens": 64 * step, "eval/loss": 2 + 3 / step, "eval/bits_per_byte": 3 / step})


@pytest.fixture(scope="module")
def chromium():
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Addresses of the page of one run and of that of two."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [str(write_run(folder / name, seed)) for seed, name in enumerate(["first", "<i>second"], 1)]
    assert main([*runs, "--out", str(folder / "two.html")]) == main([runs[0], "--out", str(folder / "one.html")]) == 0
    return {name: (folder / f"{name}.html").as_uri() for name in ("one", "two")}


def open_page(chromium, address: str, width: int, dark: bool = False) -> None:
    chromium.open(address, width, dark=dark, phone=width < 600)
    assert chromium.evaluate("typeof data") == "object"


def box(chromium, title: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of a chart's drawing, which is scrolled into view."""
    place = (
        "(() => {const svg = document.querySelector(`[data-chart='%s'] svg`); svg.scrollIntoView({block: 'center'});"
    )
    place += "const r = svg.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]})()"
    return tuple(chromium.evaluate(place % title))


def drawing(chromium, title: str = "") -> str:
    """What is drawn in one chart, or in all that are open."""
    chosen = f"[data-chart='{title}'] svg" if title else ".chart svg"
    return chromium.evaluate(f"[...document.querySelectorAll(`{chosen}`)].map(svg => svg.innerHTML).join('')")


def reading(chromium, title: str) -> str:
    return chromium.evaluate(f"document.querySelector(`[data-chart='{title}'] .reading`).innerText").replace("\n", " ")


def click(chromium, selector: str) -> None:
    chromium.evaluate(f"document.querySelector(`{selector}`).click()")
    chromium.frames()


def clean(chromium) -> None:
    """Nothing was complained of, no text became markup, and no place in a drawing is not a number."""
    assert chromium.complaints() == []
    assert chromium.evaluate("window.broken") is None
    assert chromium.evaluate("document.scripts.length") == 2
    assert chromium.evaluate("document.querySelectorAll('img, i').length") == 0
    assert not re.search(r"NaN|Infinity|undefined", drawing(chromium))


@WIDTHS
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["one", "two"])
def test_everything_is_drawn(chromium, pages, name, width, dark):
    open_page(chromium, pages[name], width, dark)
    assert chromium.addresses() == [pages[name]]
    shares = ["Shares of a step"] if name == "one" else ["Shares of a step: first", "Shares of a step: <i>second"]
    titles = chromium.evaluate("[...document.querySelectorAll('.chart')].map(node => node.dataset.chart)")
    assert titles == [*CHARTS, *shares, "train/param_norm"]
    runs, parts = (1, 3) if name == "one" else (2, 3)
    for title in CHARTS:
        lines = runs * 2 if title == "Loss" else runs
        assert len(re.findall(r'class="line', drawing(chromium, title))) == lines
    for title in shares:
        assert len(re.findall(r'class="area', drawing(chromium, title))) == parts
    assert len(re.findall(r'class="odd', drawing(chromium, "Gradient norm"))) == runs  # the value that is not finite
    assert chromium.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the window"
    heights = chromium.evaluate("[...document.querySelectorAll('.tools button')].map(node => node.offsetHeight)")
    assert min(heights) >= (36 if width < 600 else 30), "too small to hit"
    shown = chromium.evaluate("document.body.innerText")
    assert shown.count(f"prompt{HOSTILE}") == runs
    assert f"MFU is relative to {HOSTILE}" in shown
    if name == "two":
        assert "<i>second" in shown
        rows = chromium.evaluate(
            "[...document.querySelectorAll('.words tbody tr')].map(row => row.innerText.split('\\t'))"
        )
        assert rows[0] == ["optimizer.lr", "1", "2"]
    clean(chromium)


# Luminance of the ground, the least contrast of texts with it, the least of lines; by the formulas of WCAG 2.
CONTRAST = """(() => {
  const brush = document.createElement('canvas').getContext('2d'), style = getComputedStyle(document.body);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    brush.fillStyle = color;
    brush.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (name) => {
    const probe = document.createElement('span');
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const pair = [luminance(getComputedStyle(probe).color), luminance(style.backgroundColor)].sort((a, b) => b - a);
    probe.remove();
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const lines = [...Array(8).keys()].map((i) => contrast(`c${i}`));
  return [luminance(style.backgroundColor), Math.min(contrast('ink'), contrast('soft')), Math.min(...lines)];
})()"""


@WIDTHS
@pytest.mark.parametrize("dark", [False, True])
def test_texts_can_be_read(chromium, pages, width, dark):
    """Contrast of the texts with the ground (WCAG AA: 4.5), of the lines (3), in both themes, by the switch as well."""
    open_page(chromium, pages["two"], width, dark)
    for expected in (dark, not dark):
        ground, text, lines = chromium.evaluate(CONTRAST)
        assert (ground < 0.1) == expected
        assert text >= 4.5
        assert lines >= 3
        chromium.evaluate(
            "[...document.querySelectorAll('.tools button')].find(one => one.innerText === 'Dark').click()"
        )
        chromium.frames()


@WIDTHS
def test_hovering_reads_all_runs_at_a_step(chromium, pages, width):
    open_page(chromium, pages["two"], width)
    assert reading(chromium, "Loss").startswith("last ")
    left, top, wide, _ = box(chromium, "Loss")
    chromium.mouse("mouseMoved", left + wide / 2, top + 40)
    chromium.frames()
    step = int(re.match(r"step (\d+)", reading(chromium, "Loss"))[1])
    assert 20 <= step <= 40
    for title, key in (("Loss", "train/loss"), ("Throughput", "perf/tokens_per_s"), ("MFU", "perf/mfu")):
        assert f"step {step} " in reading(chromium, title)
        for run in range(2):
            value = chromium.evaluate(f"data.runs[{run}].series['{key}'].value[{step - 1}]")
            texts = re.findall(r" (\d[\d.]*)([k%]?)", reading(chromium, title))
            values = [float(text) * {"k": 1000, "%": 0.01, "": 1}[unit] for text, unit in texts]
            assert any(found == pytest.approx(value, rel=2e-3) for found in values)
    assert f"at {step // 10 * 10}" in reading(chromium, "Bits per byte") or step % 10 == 0
    assert 'class="cursor"' in drawing(chromium, "MFU")
    chromium.mouse("mouseMoved", 1, 1)
    chromium.frames()
    assert reading(chromium, "Loss").startswith("last ")
    clean(chromium)


@WIDTHS
def test_dragging_zooms_all_charts_and_reset_shows_all(chromium, pages, width):
    open_page(chromium, pages["two"], width)
    before, titles = drawing(chromium), [*CHARTS, "Shares of a step: first"]
    each = {title: drawing(chromium, title) for title in titles}
    left, top, wide, high = box(chromium, "Learning rate")
    chromium.drag((left + wide * 0.3, top + high / 2), (left + wide * 0.7, top + high / 2 + 3), finger=width < 600)
    for title in titles:
        assert drawing(chromium, title) != each[title]
    first, last = chromium.evaluate("[view.from, view.to]")
    inside = (wide * 0.3 - 52) / (wide - 64) * STEPS, (wide * 0.7 - 52) / (wide - 64) * STEPS
    assert (first, last) == pytest.approx(inside, abs=1.5)
    lines = chromium.evaluate(
        "[...document.querySelectorAll(`[data-chart='Loss'] text`)].map(node => node.textContent)"
    )
    assert str(round(first / 10 + 0.5) * 10) in lines
    assert "0" not in lines[-4:]
    assert chromium.evaluate("reset.disabled") is False
    click(chromium, "#reset")
    chromium.evaluate("cursor(null)")
    chromium.frames()
    assert drawing(chromium) == before
    assert chromium.evaluate("reset.disabled") is True
    clean(chromium)


@WIDTHS
def test_switches_change_the_drawing_and_back(chromium, pages, width):
    open_page(chromium, pages["two"], width)
    for selector, title in (
        ("[data-chart='Loss'] button", "Loss"),
        ("[data-chart='Gradient norm'] button", "Gradient norm"),
        (".tools button", "Learning rate"),
        (".run input", "Throughput"),
    ):
        before = drawing(chromium, title)
        click(chromium, selector)
        changed = drawing(chromium, title)
        assert changed != before
        assert not re.search(r"NaN|Infinity|undefined", changed)
        click(chromium, selector)
        assert drawing(chromium, title) == before
    before = drawing(chromium, "Loss")
    slide = "(() => {const slider = document.getElementById('smoothing'); slider.value = %s; "
    slide += "slider.dispatchEvent(new Event('input'))})()"
    chromium.evaluate(slide % 0.9)
    paths = re.findall(r'class="line[^"]*"[^>]* d="([^"]*)"', drawing(chromium, "Loss"))
    assert len(paths) == 8
    heights = lambda path: [float(y) for y in re.findall(r",([\d.]+)", path)]
    rough = lambda path: sum(abs(a - b) for a, b in zip(heights(path), heights(path)[1:], strict=False))
    assert rough(paths[4]) < 0.5 * rough(paths[0])
    chromium.evaluate(slide % 0)
    assert drawing(chromium, "Loss") == before
    click(chromium, "#others summary")
    assert 'class="line' in drawing(chromium, "train/param_norm")
    clean(chromium)


def test_the_keyboard_reads_zooms_and_resets(chromium, pages):
    open_page(chromium, pages["two"], 1280)
    order = "(() => {const one = document.activeElement, chart = one.closest('[data-chart]'); "
    order += "return `${chart?.dataset.chart} ${one.tagName.toLowerCase()}`})()"
    seen = []
    for _ in range(30):
        chromium.key("Tab")
        seen.append(chromium.evaluate(order))
        if seen[-1] == "Loss svg":
            break
    assert seen[-2:] == ["Loss button", "Loss svg"]
    assert chromium.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    before = drawing(chromium, "MFU")
    chromium.key("ArrowRight")
    chromium.key("ArrowRight")
    assert reading(chromium, "MFU").startswith("step 2 ")
    said = chromium.evaluate("document.getElementById('said').textContent")
    assert said.startswith("Loss, step 2: train, first ")
    assert "train, <i>second " in said
    chromium.key("End")
    chromium.key("ArrowLeft")
    assert reading(chromium, "MFU").startswith(f"step {STEPS - 1} ")
    chromium.key("+")
    assert chromium.evaluate("view.to - view.from") == pytest.approx(STEPS / 2, abs=1)
    assert drawing(chromium, "MFU") != before
    chromium.key("-")
    chromium.key("+")
    chromium.key("Escape")
    assert chromium.evaluate("[view.from, view.to]") == chromium.evaluate("extent()")
    clean(chromium)


@WIDTHS
def test_a_live_page_follows_the_run(chromium, tmp_path, width):
    path = write_run(tmp_path / "run", 3, steps=20)
    with served(path) as server:
        chromium.open(server.url, width, phone=width < 600)
        before = drawing(chromium, "Loss")
        file = MetricsFile(path / "metrics.jsonl")
        write_steps(file, 21, 45, 4)
        _same(chromium, path, 45)
        assert drawing(chromium, "Loss") != before
        file.resume(30)  # another life of the run goes on from there
        write_steps(file, 31, 34, 5)
        file.close()
        _same(chromium, path, 34)
        clean(chromium)
    chromium.wait("state.textContent === 'no longer served'", seconds=20)
    with served(write_run(tmp_path / "other", 6), port=server.server_address[1]):  # its data must not mix with ours
        chromium.wait("typeof data === 'object' && data.title === 'other'", seconds=20)
        assert chromium.evaluate("data.runs.length") == 1
        _same(chromium, tmp_path / "other", STEPS)


@contextlib.contextmanager
def served(path: Path, port: int = 0) -> Iterator[Server]:
    with Server(open_runs([path]), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _same(chromium, path: Path, last: int) -> None:
    """Waits until the page knows the step, and compares its data with what a new page would have."""
    chromium.wait(f"data.runs[0].last === {last}", seconds=20)
    plain = "JSON.stringify(data.runs[0].series, (_, v) => typeof v === 'number' && !isFinite(v) ? String(v) : v)"
    assert json.loads(chromium.evaluate(plain)) == contents(open_runs([path]))["runs"][0]["series"]
