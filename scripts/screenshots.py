"""Make the tutorial's pictures of the report and the viewer: screenshots of a run's pages in the system's Chromium.

.venv/bin/python scripts/screenshots.py runs/photos docs/images
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from darseg.report.overview import write_report

QUALITY = 82
WIDTH = 1100  # pixels of a picture


def save(page: Page, path: Path) -> None:
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    height = round(shot.height * WIDTH / shot.width)
    shot.resize((WIDTH, height), Image.Resampling.LANCZOS).save(path, quality=QUALITY)
    print(path, path.stat().st_size // 1024, "KiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "darseg", "view", str(arguments.run), "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as driver,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer,
    ):
        path = next(program for name in ("chromium", "google-chrome") if (program := shutil.which(name)))
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(write_report(arguments.run, Path(folder) / "report.html").as_uri())
        time.sleep(3)  # charts are drawn when they come into view
        save(page, arguments.out / "tutorial_report.jpg")
        page.locator("section", has_text="Class shares").first.evaluate("it => it.scrollIntoView()")
        time.sleep(2)
        save(page, arguments.out / "tutorial_report_shares.jpg")
        assert viewer.stdout is not None
        address = next(word for line in viewer.stdout for word in line.split() if word.startswith("http://"))
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
        page.goto(address)
        time.sleep(12)  # the first prediction loads the network
        save(page, arguments.out / "tutorial_view.jpg")
        viewer.terminate()
        browser.close()


if __name__ == "__main__":
    main()
