"""The page in a browser at the width of a desk and of a phone: `pytest -m browser`, where Chromium is installed.

The page has no script, so it is loaded into a frame of another that measures it; a frame may be as narrow as a phone,
a window of Chromium may not.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import WINNING, open_rows, traffic_rows, write_run

from medusa_ray import report

pytestmark = pytest.mark.browser

# What the frame's document says of itself: its width, what of it sticks out, texts that overlap, pictures without a
# size, and what it has loaded.
MEASURE = """
<script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument, found = {};
  const box = element => element.getBoundingClientRect();
  const width = page.documentElement.clientWidth;
  found.width = width;
  found.scrolls = page.documentElement.scrollWidth;
  found.outside = [...page.querySelectorAll("body *")].filter(
    element => !element.closest(".scroll, svg") && box(element).right > width + 1
  ).map(element => element.outerHTML.slice(0, 80));
  found.overlaps = [];
  for (const svg of page.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, box(text)]);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 0.3 * Math.min(a.height, b.height)) found.overlaps.push([one, other]);
    }));
  }
  found.pictures = [...page.querySelectorAll("svg")].map(svg => Math.min(box(svg).width, box(svg).height));
  found.loaded = page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.innerHTML = "<pre>" + JSON.stringify(found).replaceAll("<", "&lt;") + "</pre>";
});
</script>
"""


def chromium() -> str:
    found = [
        path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
    ]
    assert found, "no Chromium on this machine; on Debian: apt-get install chromium"
    return found[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"), traffic_rows(WINNING, 12) + open_rows())
    report.run(str(folder))
    return folder / "report/report.html"


def measured(page: Path, width: int, folder: Path) -> dict[str, Any]:
    harness = folder / "harness.html"
    content = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{content}"></iframe>'
    harness.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}{MEASURE}</body>', encoding="utf-8"
    )
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        "--dump-dom",
    ]
    done = subprocess.run([chromium(), *words, harness.as_uri()], capture_output=True, text=True, timeout=120)
    said = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert said, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(said[1]))
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overlaps_is_missing_sticks_out_or_is_fetched(page: Path, width: int, tmp_path: Path) -> None:
    found = measured(page, width, tmp_path)
    assert abs(found["width"] - width) <= 20  # a scroll bar
    assert found["scrolls"] <= found["width"]
    assert found["outside"] == []
    assert found["overlaps"] == []
    assert len(found["pictures"]) == 20
    assert min(found["pictures"]) > 40
    assert found["loaded"] == []
