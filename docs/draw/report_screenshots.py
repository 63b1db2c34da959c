"""``python docs/draw/report_screenshots.py`` trains two small runs, draws their report, and takes
the screenshots of docs/monitoring.md in a headless Chromium.

A browser's pixels differ from one version to the next. So a test takes the screenshots of shorter
runs, and compares only their sizes with the sizes of the pictures in docs/figures/.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import chdir
from pathlib import Path

from dtron.tools.report import main as report
from train import main as train

FOLDER = Path(__file__).parents[1] / "figures"
LARGEST = 150 * 1024  # bytes of a picture
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

MODEL = {"layers": 2, "embed": 32, "heads": 2, "kv-heads": 2, "head-dim": 16, "mlp": 64}
COMMON = [*(f"--model.{name}={n}" for name, n in MODEL.items()), "--model.vocab=300"]
COMMON += ["--data.seq-len=32", "--batch=8", "--optim.warmup=20", "--device=cpu"]
COMMON += ["--eval-every=25", "--sample-tokens=0"]
RUNS = {
    "dense": ["--optim.lr=5e-3"],
    "experts": [
        *("--optim.lr=1e-2", "--model.moe.experts=4"),
        *("--simulate", "--mesh=dp=2,tp=2", "--zero=3"),
    ],
}

# Scripts that prepare the page for a picture: the numbers under the pointer, and the tables.
POINTER = """
const mark = document.querySelectorAll("svg")[0].querySelectorAll(".mark");
const box = mark[Math.floor(mark.length * 0.6)].getBoundingClientRect();
const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
document.elementFromPoint(x, y).dispatchEvent(
  new PointerEvent("pointermove", {bubbles: true, clientX: x, clientY: y}));
"""
REST = """
for (const part of document.querySelectorAll("section")) {
  if (/^(Curves|Configs)/.test(part.textContent.trim())) part.remove();
}
const all = document.querySelectorAll("details");
all[all.length - 1].open = true;
"""
# Width, height and script of each picture.
SHOTS = {
    "report-curves": (1240, 895, POINTER),
    "report-placements": (1060, 1130, REST),
}


def screenshots(folder: Path, out: Path, steps: int) -> list[Path]:
    """Write the pictures into ``out``, and return their files.

    ``folder``: for the runs.
    ``steps``: of each run."""
    with chdir(folder):
        for name, flags in RUNS.items():
            train([*COMMON, *flags, f"--steps={steps}", f"--run-dir=runs/{name}"])
        report([f"runs/{name}" for name in RUNS])
    page = folder / "runs" / next(iter(RUNS)) / "report.html"
    text, made = page.read_text(), []
    for name, (width, height, script) in SHOTS.items():
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
        made.append(out / f"{name}.png")
        argv = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        argv += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        argv += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={made[-1]}"]
        subprocess.run([*argv, f"file://{page}"], capture_output=True, timeout=120, check=True)
    return made


def size_of(picture: Path) -> tuple[int, int]:
    """Return width and height of a PNG file, from its header."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made_here:
        for file in screenshots(Path(made_here), FOLDER, 300):
            print(file, size_of(file), file.stat().st_size)
