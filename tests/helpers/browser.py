"""Opens a page in a headless browser, with the pointer over one mark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
HOVER = """
const mark = document.querySelectorAll(".mark")[WHICH];
mark.scrollIntoView({block: "center"});
const box = mark.getBoundingClientRect();
const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
const at = document.elementFromPoint(x, y);
at.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: x, clientY: y}));
document.body.dataset.hovered = tip.hidden ? "nothing" : tip.textContent;
"""


def in_browser(file: Path, text: str, which: int) -> tuple[str, str]:
    """Open a page, with the pointer over one mark. Return the page afterwards, and the messages of
    the browser's console."""
    script = HOVER.replace("WHICH", str(which))
    file.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    argv = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    argv += ["--window-size=1240,900", f"--user-data-dir={file.parent / 'profile'}"]
    argv += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", f"file://{file}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)
