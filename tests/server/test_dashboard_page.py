"""The dashboard in a real Chromium, driven over WebDriver's HTTP; skipped where the machine has none."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moeserve import offline
from moeserve.eplb import cli
from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts
from tests.online.fakes import Engine, skewed
from tests.server.test_prometheus import measure

pytestmark = pytest.mark.browser
READY = "document.getElementById('map-text')?.textContent"
SOLVED = "document.getElementById('what-if-text').textContent"

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Browser:
    """One window of a Chromium."""

    def __init__(self, driver_url: str, profile: Path) -> None:
        options = {
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            "binary": shutil.which("chromium"),
            "perfLoggingPrefs": {"enableNetwork": True},
        }
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._web = httpx.Client(timeout=60)
        body = {"capabilities": {"alwaysMatch": capabilities}}
        session = self._web.post(f"{driver_url}/session", json=body).json()["value"]
        self._url = f"{driver_url}/session/{session['sessionId']}"
        self._addresses: set[str] = set()

    def _send(self, path: str, **body: Any) -> Any:
        answer = self._web.post(f"{self._url}/{path}", json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{answer['error']}: {answer['message']}")
        return answer

    def open(self, url: str) -> None:
        self._send("url", url=url)

    def run(self, script: str, *values: Any) -> Any:
        """What the body of a function returns in the page."""
        return self._send("execute/sync", script=script, args=list(values))

    def wait(self, condition: str, seconds: float = 10.0) -> Any:
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
            time.sleep(0.05)
        return value

    def text(self, name: str) -> str:
        found: str = self.run("return document.getElementById(arguments[0]).textContent", name)
        return found

    def show(self, width: int, height: int, dark: bool = False) -> None:
        """Size and colour scheme of the page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def hide(self, hidden: bool) -> None:
        """As a tab that somebody leaves or comes back to."""
        self.run(
            "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))",
            hidden,
        )

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._send("goog/cdp/execute", cmd=command, params=parameters)

    def complaints(self) -> list[str]:
        """What the console has had of errors and warnings since the last call, and what the page says went wrong."""
        entries = self._send("se/log", type="browser")
        told = [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]
        failure = self.run(
            "const f = document.getElementById('failure'); return f && !f.hidden && f.textContent"
        )
        return [*told, *([failure] if failure else [])]

    def addresses(self) -> set[str]:
        """All that the page has asked for."""
        for entry in self._send("se/log", type="performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._addresses.add(message["params"]["request"]["url"])
        # Chromium's own first tab is not ours
        return {url for url in self._addresses if not url.startswith(("chrome:", "data:"))}

    def close(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            self._web.delete(self._url)
        self._web.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: apt-get install chromium chromium-driver)")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                break
        else:
            raise AssertionError("chromedriver did not start")
        window = Browser(f"http://127.0.0.1:{found.group(1)}", tmp_path_factory.mktemp("profile"))
        yield window
        window.close()
    finally:
        driver.terminate()
        driver.wait(10)


class Recorded:
    """`moeserve dashboard FILE` in a process of its own."""

    def __init__(self, file: Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "moeserve", "dashboard", str(file), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://[\d.]+:(\d+)/dashboard", self.process.stdout.readline())
        assert found, "it did not say where it is"
        self.url, self.port = found.group(0), int(found.group(1))

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """58 layers of 256 experts at EP 32 on four nodes: eight windows, every fourth of prefill."""
    traffic = Traffic.make(58, 256)
    counts = traffic.counts(traffic.mixes("steady", 8), 20_000)
    windows = tuple(
        Window("prefill" if i % 4 == 3 else "decode", 50 * i, 50, 2500, f"2026-11-20T12:00:{i:02d}Z")
        for i in range(8)
    )
    file = tmp_path_factory.mktemp("large") / "stats.json"
    head = {"model": "large", "top_k": 8, "ep_size": 32, "ranks_per_node": 8}
    write_stats(file, ExpertLoad(counts, tuple(range(3, 61)), windows, **head))  # type: ignore[arg-type]
    return file


@pytest.fixture(scope="module")
def recorded(browser: Browser, large: Path) -> Iterator[Recorded]:
    shown = Recorded(large)
    yield shown
    if shown.process.poll() is None:
        shown.end()


def test_first_frame_of_a_large_model(browser: Browser, recorded: Recorded) -> None:
    browser.show(1280, 900)
    begun = time.monotonic()
    browser.open(recorded.url)
    browser.wait(READY)
    seconds = time.monotonic() - begun
    print(f"58 layers x 256 experts, EP 32: load map after {seconds:.2f} s")
    assert seconds < 2
    browser.wait(SOLVED)
    assert re.match(
        r"In decode the busiest rank carries 1\.\d\dx its fair share; about", browser.text("verdict")
    )
    assert browser.text("contact-text") == "recorded file"


def test_no_overflow_at_any_width(browser: Browser, recorded: Recorded) -> None:
    for width, dark in ((1280, False), (800, True), (400, False)):
        browser.show(width, 900, dark)
        browser.open(recorded.url)
        browser.wait(SOLVED)
        assert browser.run("return document.documentElement.scrollWidth") == width


def test_layers_columns_windows_and_tables(browser: Browser, recorded: Recorded) -> None:
    browser.show(1280, 900)
    browser.open(recorded.url)
    browser.wait(SOLVED)
    canvas = "const c = document.getElementById('map'), b = c.getBoundingClientRect();"
    browser.run(
        f"{canvas} c.dispatchEvent(new MouseEvent('click', {{clientX: b.left + 300, clientY: b.top + 60}}))"
    )
    browser.wait("document.getElementById('layer-title').textContent === 'Layer 10'")
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        browser.run(f"{canvas} c.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
    assert re.match(r"Layer 11, rank 1: \d\.\d\dx the fair share of a rank", browser.text("map-text"))
    browser.wait("document.getElementById('layer-title').textContent === 'Layer 11'")
    browser.run("document.querySelector('#columns [data-value=expert]').click()")
    browser.wait("document.getElementById('map-text').textContent.includes('expert')")
    browser.run(
        "const w = document.getElementById('window'); w.value = 2; w.dispatchEvent(new Event('input'));"
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )
    browser.wait("document.getElementById('window-text').textContent.startsWith('3 of 6')")
    rows = browser.wait("[...document.querySelectorAll('tbody')].map((body) => body.rows.length)")
    assert rows == [58, 6, 256, 0, 5]
    browser.run("document.querySelector('#phases [data-value=prefill]').click()")
    browser.wait("document.getElementById('verdict').textContent.startsWith('In prefill')")
    browser.wait("document.getElementById('window-text').textContent.startsWith('all 2')")


def test_what_if_and_its_command(
    browser: Browser, recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line that the page offers gives the imbalance that the page promises."""
    browser.open(recorded.url)
    browser.wait(SOLVED)
    browser.run(
        "document.getElementById('ep-size').value = 16; document.getElementById('extra').value = 2;"
        "document.getElementById('extra').dispatchEvent(new Event('change', {bubbles: true}))"
    )
    browser.wait(f"{SOLVED}.startsWith('16 ranks with 18 slots each (32 redundant)')")
    promised = re.findall(r"(\d\.\d\d)x on", browser.text("what-if-text"))[0]
    download = browser.run("return document.getElementById('download').href")
    (tmp_path / "stats.json").write_bytes(httpx.get(download).content)
    words = shlex.split(browser.text("command").splitlines()[0])
    assert words[:2] == ["eplb-offline", "stats.json"]
    words[1], words[-1] = str(tmp_path / "stats.json"), str(tmp_path / words[-1])
    capsys.readouterr()
    assert cli.main([*words[1:], "--report", "json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    ours = next(line for line in lines if line["placement"].startswith("ours") and line["split"] == "shares")
    assert f"{ours['held_out']['mean']:.2f}" == promised


SHOWN = ("verdict", "window-text", "map-text", "history-text", "layer-sentence", "ranks-text", "slots-text")


def shown(browser: Browser, url: str) -> list[list[str]]:
    """What the panels say of several choices, but for how long the solver took."""
    browser.open(url)
    browser.wait(SOLVED)
    said = []
    for action in (
        "0",
        "document.querySelector('#columns [data-value=slot]').click()",
        "const w = document.getElementById('window'); w.value = 1; w.dispatchEvent(new Event('input'))",
        "const l = document.getElementById('layer'); l.value = 40; l.dispatchEvent(new Event('change'))",
        "document.querySelector('#phases [data-value=prefill]').click()",
    ):
        browser.run(action)
        time.sleep(0.6)
        browser.wait(f"{SOLVED} && !document.querySelector('.busy')")
        words = browser.run("return arguments[0].map((id) => document.getElementById(id).textContent)", SHOWN)
        said.append([*words, browser.text("what-if-text").partition("; solved in")[0]])
    return said


@pytest.mark.slow
def test_the_page_in_a_file_says_the_same(browser: Browser, recorded: Recorded, tmp_path: Path) -> None:
    """Its script works out what the server's Python does; it opens from the disk and asks nobody."""
    browser.show(1280, 900)
    said = shown(browser, recorded.url)
    assert len(set(map(tuple, said))) == len(said)  # each choice changed something
    answer = httpx.get(f"{recorded.url}/api/page.html", timeout=60)
    assert answer.headers["content-disposition"] == 'attachment; filename="expert-balance.html"'
    page = tmp_path / "page.html"
    page.write_bytes(answer.content)
    asked = browser.addresses()
    assert shown(browser, page.as_uri()) == said
    assert browser.addresses() - asked == {page.as_uri()} and not browser.complaints()
    assert browser.text("contact-text") == "written to a file"
    stats = browser.run("return document.getElementById('download').href")
    script = "const done = arguments[0]; return fetch(arguments[0]).then((a) => a.text(), (e) => 'refused')"
    assert stats.startswith("blob:") and browser.run(script, "https://example.org") == "refused"
    browser.complaints()
    for width, dark in ((1280, True), (400, False)):
        browser.show(width, 900, dark)
        browser.wait(f"document.documentElement.scrollWidth === {width}")


@pytest.mark.slow
def test_contact_is_lost_and_found(browser: Browser, recorded: Recorded, large: Path) -> None:
    browser.open(recorded.url)
    browser.wait("document.getElementById('contact-text').textContent === 'recorded file'")
    assert not browser.complaints()
    assert recorded.end() in (0, -signal.SIGTERM)
    browser.wait("document.getElementById('contact').className.includes('lost')")
    again = Recorded(large, recorded.port)
    browser.wait("document.getElementById('contact-text').textContent === 'recorded file'")
    again.end()
    browser.complaints()  # of the refused connections meanwhile
    own = (f"http://127.0.0.1:{recorded.port}/", "file:")
    foreign = {url for url in browser.addresses() if not url.startswith(own)}
    assert not foreign


@pytest.mark.slow
def test_a_running_server(browser: Browser, start_server: Callable[..., Any]) -> None:
    """Empty at first; then what is counted comes by itself, unless nobody looks."""
    placement, topology = Placement.identity(2, 4, 4), Topology.of(2, 4)
    balance = ExpertBalance(placement, topology, layers=(1, 2), model="toy/model", top_k=2, expert_groups=1)
    server = start_server(balance=balance, metrics_compat="none")

    def count(rank: int, row: list[int], step: int) -> None:
        data = np.array([[[0] * 4] * 2, [row] * 2], "<u4").tobytes()
        message = ExpertCounts(rank, step, 5, 1.0, (0, sum(row) // 2), data)
        server.call(lambda: server.frontend.handle(rank, message))

    browser.open(f"{server.url}/dashboard")
    browser.wait("!document.getElementById('waiting').hidden")
    assert f"curl {server.url}/v1/completions" in browser.text("try")
    count(0, [3, 1, 0, 0], 5)
    count(1, [3, 1, 0, 0], 5)
    browser.wait(READY)
    browser.wait("document.getElementById('verdict').textContent.startsWith('In decode')")
    status = server.web.get("/eplb/status").json()["imbalance"]["decode"]
    recent = (
        "[...document.querySelectorAll('#numbers div')].find((d) => d.textContent.startsWith('Last 30 s'))"
    )
    recent = browser.run(f"return {recent}.textContent")
    assert f"{status['mean']:.2f}x" in recent and status["mean"] == 2.0
    count(0, [0, 0, 0, 8], 10)
    browser.wait("document.getElementById('window-text').textContent.startsWith('all 2')")
    browser.hide(True)
    count(0, [0, 0, 0, 8], 15)
    time.sleep(2.2)  # a page that looks would have it within two seconds
    assert browser.text("window-text").startswith("all 2")
    browser.hide(False)
    browser.wait("document.getElementById('window-text').textContent.startsWith('all 3')")
    assert not browser.complaints()


@pytest.mark.slow
def test_the_report_of_eplb_offline_is_the_page(browser: Browser, large: Path, tmp_path: Path) -> None:
    """From the placement that stands to a solved one: bytes by rank, and what would change in a layer."""
    placement, page = tmp_path / "placement.json", tmp_path / "page.html"
    assert offline.main([str(large), "--redundant", "32", "-o", str(placement), "--quiet"]) == 0
    given = ["report", str(large), "--placement", str(placement), "--expert-bytes", "1000"]
    assert offline.main([*given, "--report", f"html={page}"]) == 0
    browser.show(1280, 900)
    browser.complaints()  # of the tests before
    browser.open(page.as_uri())
    browser.wait(SOLVED)
    assert browser.text("rebalances-text").startswith("Nothing was moved: 1 step from the placement")
    assert browser.run("return document.querySelectorAll('#matrix .cell').length") == 32 * 32
    assert re.match(r"Since generation 0: slot \d+ on rank 0: .* more", browser.text("changes"))
    assert browser.run("return document.querySelectorAll('#ranks .before').length") == 33  # and its key
    assert not browser.complaints()


@pytest.mark.slow
def test_what_the_balancer_did(browser: Browser, start_server: Callable[..., Any], tmp_path: Path) -> None:
    """Rebalances of a running server: a line in time, a row in the table, bytes, ghosts of before, shares."""
    engine = Engine(windows=4, min_gain=0.02)
    for i in range(24):
        measure(engine, skewed(7 * (i // 6), seed=i))
    done = engine.balance.status()["rebalances"]
    applied = [one for one in done if one["result"] == "applied"]
    server = start_server(balance=engine.balance, metrics_compat="none")
    browser.show(1280, 900)
    browser.open(f"{server.url}/dashboard")
    browser.wait(SOLVED)
    rows = browser.run(
        "return [...document.querySelectorAll('#rebalances tbody tr')].map((r) => r.className)"
    )
    assert rows == [one["result"] for one in done] and len(applied) > 1
    assert browser.text("rebalances-text").startswith(
        f"The balancer watches. {len(applied)} rebalances applied"
    )
    first = browser.run("return document.querySelector('#rebalances tr.applied').textContent")
    newest, carried = applied[0], [one for one in applied if one["bytes"]]  # others changed shares alone
    assert len(carried) > 1
    assert f"{newest['before']:.2f}x \u2192 {newest['predicted']:.2f}x promised" in first
    total = sum(map(sum, carried[0]["rank_bytes"]))
    assert browser.text("bytes-text").startswith(f"{total / 1024:.1f} KiB in all")
    changed = browser.run("return document.querySelectorAll('#slots .changed').length")
    detail = server.web.get("/dashboard/api/layer?layer=0").json()
    pairs = zip(detail["slot_to_expert"], detail["previous"]["slot_to_expert"], strict=True)
    assert changed == sum(now != before for now, before in pairs)
    browser.run("document.querySelectorAll('#rebalances button')[1].click()")
    assert browser.text("bytes-title").endswith(f"generation {carried[1]['generation']}")
    assert browser.run("return document.querySelectorAll('#ranks .before').length") == 5
    assert browser.run("return document.querySelectorAll('.share').length") > 0
    assert browser.text("history-note").startswith("Of what the ranks were really given")
    assert "carried" in browser.text("verdict") and "As it was" in browser.text("numbers")
    page = tmp_path / "page.html"
    page.write_bytes(server.web.get("/dashboard/api/page.html").content)
    said = [browser.text(name) for name in (*SHOWN, "history-note", "changes", "rebalances-text")]
    lines = browser.run("return document.querySelectorAll('#history svg .event').length")
    assert lines >= 1  # a second's windows come to one point of the axis
    browser.open(page.as_uri())
    browser.wait(SOLVED)
    assert [browser.text(name) for name in (*SHOWN, "history-note", "changes", "rebalances-text")] == said
    browser.run("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    for width in (1280, 800, 400):
        browser.show(width, 900)
        browser.wait(f"document.documentElement.scrollWidth === {width}")
    assert not browser.complaints()


def test_words_and_colours() -> None:
    """The functions without a document, in node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    words = Path(__file__).parents[2] / "stats/dashboard/static/words.js"
    program = """
        import(`data:text/javascript,${encodeURIComponent(process.argv[1])}`).then((w) => console.log(JSON.stringify([
            [0, 0.1, 0.25, 0.5, 1, 2, 4, 9].map(w.scale), w.colour(4, false), w.colour(1, true), w.axisTicks(1, 2, 5),
            w.verdictSentence({state: "balanced", phase: "decode", mean: 1.004}),
            w.windowName({start_step: 10, steps: 5}, 0), w.windowName({steps: 1, start_time: null}, 2), w.ago(200),
        ])))"""
    run = subprocess.run([node, "-e", program, words.read_text()], capture_output=True, text=True, timeout=20)
    scale, hottest, fair, ticks, sentence, window, unknown, ago = json.loads(run.stdout)
    assert scale == [-1, -1, -1, -0.5, 0, 0.5, 1, 1]
    assert hottest == [178, 24, 43] and fair == [40, 46, 56]
    assert np.allclose(ticks, [1, 1.2, 1.4, 1.6, 1.8, 2])
    assert sentence == "Balanced, nothing to gain: in decode the busiest rank carries 1.00x its fair share."
    assert (window, unknown, ago) == ("steps 10 to 14", "window 3", "3 min ago")
