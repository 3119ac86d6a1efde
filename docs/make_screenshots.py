"""Pictures for the documents: `python docs/make_screenshots.py .demo docs`.

Asks the demo's index its first question, in Chromium (Debian's package) and in a terminal.
"""

import html
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import gradindex
from gradindex.demo.questions import QUERIES
from search.serve import listening
from search.serve.guard import host_names

WIDTH, HEIGHT = 1240, 1250
COLUMNS = 104
_COLORS = {"44;97;1": "p", "43;30;1": "n", "1;94": "plus", "1;33": "minus"}  # of the rendering


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path, out: Path) -> None:
    """Search the demo's index in FOLDER and write pictures to OUT."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise click.ClickException("there is no Chromium: on Debian, apt-get install chromium.")
    out.mkdir(exist_ok=True)
    address = _serve(folder / "index")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT},
                                    color_scheme=scheme)
            page.goto(address)
            for name, text in zip(("prompt", "completion"), QUERIES[0], strict=True):
                page.fill(f"#{name}", text)
            page.wait_for_selector(".scored label")
            page.click("button.go")
            page.wait_for_selector("main[data-state=done]", timeout=600_000)
            page.locator(".to-map").first.click()
            page.wait_for_selector(".map")
            page.mouse.move(0, 0)
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.screenshot(path=out / f"page-{scheme}.png")
        page = browser.new_page(viewport={"width": 940, "height": 400}, device_scale_factor=1.5)
        page.set_content(_terminal(folder))
        page.locator("pre").screenshot(path=out / "terminal.png")
        browser.close()


def _serve(index: Path) -> str:
    listener = listening.listen("127.0.0.1", None)
    port = listener.getsockname()[1]
    hosts = host_names("127.0.0.1", port)
    running = listening.make_server(gradindex.open(index), hosts, None)
    threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return f"http://127.0.0.1:{port}/"


def _terminal(folder: Path) -> str:
    """What `gradindex search` writes to a terminal, as HTML."""
    prompt, completion = QUERIES[0]
    command = ["gradindex", "search", f"{folder.name}/index", "-p", prompt, "-c", completion,
               "-k", "3"]
    mine, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    running = subprocess.Popen([sys.executable, "-m", *command], stdout=its, cwd=folder.parent,
                               stderr=subprocess.DEVNULL, env=environment)
    os.close(its)
    shown = b""
    while True:
        try:
            shown += os.read(mine, 65536)
        except OSError:  # the other end is closed
            break
    running.wait()
    quoted = " ".join(f'"{one}"' if " " in one else one for one in command)
    text = html.escape(f"$ {quoted}\n\n{shown.decode()}".replace("\r\n", "\n"), quote=False)
    text = re.sub(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0m",
                  lambda found: f'<b class="{_COLORS[found[1]]}">{found[2]}</b>', text,
                  flags=re.DOTALL)
    return ("<style>pre { font: 14px/1.35 'DejaVu Sans Mono', monospace; background: #14161a; "
            "color: #e4e6ea; padding: 18px 22px; width: max-content; margin: 0 } .p { background: "
            "#1f55b5; color: #fff } .n { background: #b98a1d; color: #111 } "
            ".plus { color: #7db1ff } "
            ".minus { color: #e8b84a }</style>"
            f"<pre>{text.rstrip()}</pre>")


if __name__ == "__main__":
    main()
