"""The thermometer's page in a real browser: what the participant sees is what was sent."""

import json
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from messages import RUN, message
from rtfmri.feedback.outputs import open_output

pytest.importorskip("websockets", reason="websockets is not installed (rtfmri[web])")

from browser import CHROMIUM, Browser
from rtfmri.feedback.outputs.websocket import WebSocketOutput

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

BLUE, GREY, FRAME, WHITE = (86, 180, 233), (110, 110, 110), (58, 58, 58), (255, 255, 255)
WIDTH, HEIGHT = 1280, 800
TUBE_PX = 0.72 * HEIGHT


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(WIDTH, HEIGHT) as browser:
        yield browser


@contextmanager
def shown(browser: Browser, port: int = 0) -> Iterator[WebSocketOutput]:
    with closing(open_output(f"ws://127.0.0.1:{port}")) as output:
        assert isinstance(output, WebSocketOutput)
        output.begin(RUN)
        if not port:
            browser.open(f"http://127.0.0.1:{output.address.port}/")
        browser.wait_for("!document.body.classList.contains('lost')")
        yield output


def rectangle(browser: Browser, name: str) -> dict[str, float]:
    script = f"JSON.stringify(document.getElementById('{name}').getBoundingClientRect())"
    return dict(json.loads(browser.evaluate(script)))


def settle(browser: Browser, state: str) -> None:
    """Wait until the page is in a state, and nothing moves any longer."""
    browser.wait_for(f"(document.body.className || 'nothing') === '{state}'")
    browser.wait_for("document.getAnimations().length === 0")


def picture(browser: Browser, folder: Path) -> np.ndarray:
    file = folder / "seen.png"
    browser.screenshot(file)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def n_of(seen: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((seen == colour).all(axis=-1).sum())


def test_the_bars_height_is_the_feedback(browser: Browser, tmp_path: Path) -> None:
    with shown(browser) as output:
        for index, value in enumerate((0.25, 0.7, 1.0, 0.0, 0.333, 1.7, -3.0)):
            output.send(message(index, feedback=value))
            settled = min(1.0, max(0.0, value))
            browser.wait_for(
                "document.getElementById('bar').style.transform === "
                f"`scaleY(${{{settled}}})` && document.body.className === 'fed'"
            )
            settle(browser, "fed")
            bar, tube = rectangle(browser, "bar"), rectangle(browser, "tube")
            # what a browser rounds lengths to: 1/64 of a pixel
            assert bar["height"] == pytest.approx(settled * tube["height"], abs=1 / 64)
            assert bar["bottom"] == pytest.approx(tube["bottom"], abs=1 / 64)
            seen = picture(browser, tmp_path)
            column = (seen[:, int(tube["x"]) + 5] == BLUE).all(axis=-1)
            assert column.sum() == pytest.approx(settled * TUBE_PX, abs=1)  # without its edge
            assert (seen[0, 0] == 0).all()


def test_without_a_value_the_cross_is_alone(browser: Browser, tmp_path: Path) -> None:
    with shown(browser) as output:
        settle(browser, "nothing")
        before = picture(browser, tmp_path)
        output.send(message(1, feedback=0.5))
        settle(browser, "fed")
        output.send(message(2, feedback=math.nan))
        settle(browser, "nothing")
        for seen in (before, picture(browser, tmp_path)):
            assert n_of(seen, WHITE) > 100
            rows, columns = np.nonzero(seen.any(axis=-1))
            assert np.ptp(rows) <= 0.04 * HEIGHT
            assert np.ptp(columns) <= 0.04 * HEIGHT
            assert abs(rows.mean() - HEIGHT / 2) < 1
            assert abs(columns.mean() - WIDTH / 2) < 1


@pytest.mark.parametrize(
    "trouble", [{"missing": True}, {"quality": {"usable": False, "problems": [], "fd_mm": 3.0}}]
)
def test_a_volume_that_is_no_good_leaves_the_bar_in_grey(
    browser: Browser, tmp_path: Path, trouble: dict[str, object]
) -> None:
    with shown(browser) as output:
        output.send(message(1, feedback=0.5))
        settle(browser, "fed")
        blue = n_of(picture(browser, tmp_path), BLUE)
        output.send(message(2, feedback=math.nan, **trouble))
        settle(browser, "unsure")
        seen = picture(browser, tmp_path)
        assert n_of(seen, BLUE) == 0
        assert n_of(seen, GREY) == blue > 0
        output.send(message(3, feedback=0.5))
        settle(browser, "fed")
        assert n_of(picture(browser, tmp_path), BLUE) == blue


def test_a_lost_connection_is_a_thin_frame_until_it_is_back(
    browser: Browser, tmp_path: Path
) -> None:
    with shown(browser) as output:
        port = output.address.port
        output.send(message(1, feedback=0.5))
        settle(browser, "fed")
        assert n_of(picture(browser, tmp_path), FRAME) == 0
    browser.wait_for("document.body.classList.contains('lost')")
    settle(browser, "lost unsure")
    seen = picture(browser, tmp_path)
    assert n_of(seen, FRAME) == 2 * 2 * (WIDTH + HEIGHT - 4)
    assert n_of(seen, GREY) > 0
    with shown(browser, port) as output:
        output.send(message(0, feedback=0.2))
        settle(browser, "fed")
        assert n_of(picture(browser, tmp_path), FRAME) == 0


def test_there_is_no_text_and_nothing_from_elsewhere(browser: Browser) -> None:
    browser.complaints.clear()
    with shown(browser) as output:
        output.send(message(1, feedback=0.5))
        settle(browser, "fed")
        assert browser.evaluate("document.body.innerText.trim()") == ""
        home = f"http://127.0.0.1:{output.address.port}/"
        assert browser.requests[0] == home
        assert all(url.startswith(home) for url in browser.requests)
        # the policy holds: nothing is run, or fetched, that is not the page's own
        browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=//a.example>')")
        browser.wait_for(
            "!document.querySelector('img') || document.querySelector('img').complete"
        )
    refused = [text for text in browser.complaints if "Content Security Policy" in text]
    others = [text for text in browser.complaints if text not in refused]
    assert len(refused) == 1
    assert not [text for text in others if "favicon" not in text and "404" not in text]


def test_key_f_fills_the_screen(browser: Browser) -> None:
    with shown(browser):
        assert not browser.evaluate("!!document.fullscreenElement")
        browser.press("f")
        browser.wait_for("!!document.fullscreenElement")
        browser.press("f")
        browser.wait_for("!document.fullscreenElement")
