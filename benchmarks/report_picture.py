"""README's picture: the first curves of a run's page, as a browser shows them.

    python run_llama.py --option pretrain
    python benchmarks/report_picture.py checkpoints/report.html

Needs Chromium and `pip install playwright`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

WIDTH, SCALE = 1000, 1.5  # CSS pixels, and the picture's pixels in each
CHARTS, MARGIN = 4, 12  # charts in two rows, CSS pixels around them
MOST_BYTES = 200_000


def take_picture(page: Path, output: Path) -> None:
    """Write the first charts of a page as PNG."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        size = {"width": WIDTH, "height": WIDTH}
        shown = browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme="light")
        shown.goto(page.resolve().as_uri())
        charts = shown.locator(".chart")
        first, last = charts.first.bounding_box(), charts.nth(CHARTS - 1).bounding_box()
        top, bottom = first["y"] - MARGIN, last["y"] + last["height"] + MARGIN
        clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top}
        shown.screenshot(path=output, clip=clip)
        browser.close()


def main() -> None:
    """Take the picture, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, help="report.html of a run that has ended")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("report.png"))
    args = parser.parse_args()
    take_picture(args.page, args.output)
    size = args.output.stat().st_size
    print(f"{args.output}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"a README's picture should have at most {MOST_BYTES:,}")


if __name__ == "__main__":
    main()
