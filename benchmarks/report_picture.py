"""README's picture: the upper part of a run's page, as a browser shows it.

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
CHARTS = 4  # in two rows
MOST_BYTES = 200_000


def take_picture(page: Path, output: Path) -> None:
    """Write a page down to its fourth chart as PNG."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        size = {"width": WIDTH, "height": WIDTH}
        shown = browser.new_page(viewport=size, device_scale_factor=SCALE, color_scheme="light")
        shown.goto(page.resolve().as_uri())
        last = shown.locator(".chart").nth(CHARTS - 1).bounding_box()
        height = last["y"] + last["height"] + 12  # the page's padding
        shown.screenshot(path=output, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
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
