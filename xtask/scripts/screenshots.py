"""Pictures of reports at the width of a phone, in both color schemes, by a headless Chromium.

    python screenshots.py [--chromium /usr/bin/chromium] --out pictures report.html ...

Needs the package `playwright`. Fails if a page is wider than the screen, so that only tables and figures scroll
sideways, or if a page asks for anything that is not in its file.
"""

import argparse
import pathlib
import sys

from playwright.sync_api import sync_playwright

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("reports", nargs="+", type=pathlib.Path)
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--chromium", default="/usr/bin/chromium")
parser.add_argument("--width", type=int, default=390)
arguments = parser.parse_args()
arguments.out.mkdir(parents=True, exist_ok=True)
faults = []
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
    for scheme in ["light", "dark"]:
        screen = {"width": arguments.width, "height": 844}
        page = browser.new_context(viewport=screen, color_scheme=scheme).new_page()
        page.on("request", lambda r: r.url.startswith("file:") or faults.append(f"asks for {r.url}"))
        for report in arguments.reports:
            page.goto(report.resolve().as_uri())
            found = page.evaluate("document.documentElement.scrollWidth")
            if found > arguments.width:
                faults.append(f"{report}: {found} wide in {scheme}")
            name = "-".join(report.with_suffix("").parts[-2:])
            path = arguments.out / f"{name}-{scheme}.png"
            page.screenshot(path=path, full_page=True)
            print(path)
    browser.close()
sys.exit("\n".join(faults) if faults else 0)
