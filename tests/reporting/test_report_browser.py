"""The page in a real browser: it draws, in both themes, says nothing on the console, and its button copies."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image as mpimg
import numpy as np
import pytest
from page_reader import Page

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--window-size=1200,2400",
]
DARK = "--blink-settings=preferredColorScheme=0"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]


def _browse(page: Path, home: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page; return what the browser printed and its console lines."""
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={home}", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, re.findall(r":CONSOLE[:(].*", done.stderr)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_draws_without_a_word_on_the_console(small_run: Path, tmp_path: Path, theme: str) -> None:
    shot = tmp_path / "shot.png"
    flags = [DARK] if theme == "dark" else []
    _, console = _browse(small_run / "report.html", tmp_path / "home", f"--screenshot={shot}", *flags)
    assert console == []
    pixels = (mpimg.imread(shot)[..., :3] * 255).astype(np.uint8)
    assert pixels.shape == (2400, 1200, 3)
    background = float(np.median(pixels))
    assert background > 200 if theme == "light" else background < 60
    colours = len(np.unique(pixels.reshape(-1, 3)[::7], axis=0))
    assert colours > 300  # heat map, marks and anti-aliased text; a page without pictures has fewer
    # warm cells of the heat map are on the page: more red than blue by far
    red, blue = pixels[..., 0].astype(int), pixels[..., 2].astype(int)
    assert ((red - blue) > 90).sum() > 2000


def test_the_button_copies_the_table_and_the_console_is_heard(
    small_run: Path, small_page: Page, tmp_path: Path
) -> None:
    script = """<script>
      Object.defineProperty(navigator, "clipboard", { value: { writeText: async (text) => {
        const copied = document.createElement("pre"); copied.id = "copied"; copied.textContent = text;
        document.body.append(copied);
      } } });
      document.querySelector('button[data-copy="t-ppl"]').click();
      console.error("probe");
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(small_page.text.replace("</body>", script), encoding="utf-8")
    dom, console = _browse(page, tmp_path / "home", "--dump-dom")
    found = re.search(r'<pre id="copied">(.*?)</pre>', dom, re.S)
    assert found
    rows = [line.split("\t") for line in html.unescape(found[1]).splitlines()]
    assert rows == small_page.tables["t-ppl"]
    assert len(console) == 1
    assert "probe" in console[0]
