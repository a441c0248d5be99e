"""Records `dsv4c generate --chat` in a real terminal: python docs/record.py [FOLDER].

Writes chat.svg, the last screen, and chat-animated.svg, all of them, into FOLDER (docs). What runs is the
program itself, compiling included, in tmux; the model is tiny and random, so its answers are words of this
project in no order. Needs tmux.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dsv4c.config import load_config
from dsv4c.models.encoding.marks import ASSISTANT, BEGIN, DSML, END, REMINDER, TASKS, THINK, THOUGHT, USER
from dsv4c.models.synth import synthesize

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 80, 24
WIDTH, HEIGHT = 8.4, 18.0  # of a letter, in pixels
EVERY = 0.05  # seconds between two looks at the screen
STILL = 4.0  # seconds that the last one stays
VOCABULARY = 3584
SPECIAL = (BEGIN, END, "<｜▁pad▁｜>", USER, ASSISTANT, THINK, THOUGHT, DSML, REMINDER, *TASKS.values())

_CONSOLE = Console()

Screen = tuple[str, ...]


def write_tokenizer(folder: Path) -> None:
    """Bytes, and the words that pages and code use most."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
    pages = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dsv4c/**/*.py"))
    text = " ".join(page.read_text() for page in pages)
    words = Counter(re.findall(r"(?<= )[a-z]{2,}[,.]?(?= )", text))
    room = VOCABULARY - len(SPECIAL) - len(letters)
    spelled = [f"Ġ{word}" for word, _ in words.most_common(room)]
    spelled += [f"Ġ{number}" for number in range(room - len(spelled))]
    scores = [(token, 0.0) for token in SPECIAL] + [(letter, -20.0) for letter in letters]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, "special": token not in (THINK, THOUGHT), **flags}
        for i, token in enumerate(SPECIAL)
    ]
    model = {"type": "Unigram", "unk_id": 2, "vocab": scores + [(word, -10.0) for word in spelled]}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level}
    made = json.dumps({**tokenizer, "model": model}, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(made, encoding="utf-8")


class Terminal:
    """A terminal of tmux, what is on it, and when that came."""

    def __init__(self, folder: Path) -> None:
        self._server = ["tmux", "-S", str(folder / "tmux")]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, "PS1": "$ "}
        environment = [part for name, value in given.items() for part in ("-e", f"{name}={value}")]
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        command = ["-f", "/dev/null", "new-session", "-d", *size, "-c", str(folder), *environment]
        command += ["bash", "--norc", "--noprofile"]
        subprocess.run([*self._server, *command], check=True)
        self._begin = time.monotonic()
        self.screens: list[tuple[float, Screen]] = []

    def type(self, text: str) -> None:
        for i in range(0, len(text), 3):
            subprocess.run([*self._server, "send-keys", "-l", "--", text[i : i + 3]], check=True)
            self.look()
        self.press("Enter")

    def press(self, key: str) -> None:
        subprocess.run([*self._server, "send-keys", key], check=True)

    def watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(EVERY)

    def wait(self, text: str, times: int = 1) -> None:
        """Until `text` is there so often."""
        for _ in range(int(60 / EVERY)):
            if "".join(Text.from_ansi(line).plain for line in self.look()).count(text) >= times:
                return
            time.sleep(EVERY)
        raise SystemExit(f"{text!r} did not come:\n" + "\n".join(self.screens[-1][1]))

    def look(self) -> Screen:
        taken = subprocess.run(
            [*self._server, "capture-pane", "-p", "-e"], capture_output=True, text=True, check=True
        )
        screen = tuple(taken.stdout.split("\n")[:ROWS])
        if not self.screens or self.screens[-1][1] != screen:
            self.screens.append((time.monotonic() - self._begin, screen))
        return screen

    def close(self) -> None:
        subprocess.run([*self._server, "kill-server"], check=True)


def record() -> list[tuple[float, Screen]]:
    """A conversation of two turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = replace(load_config("tiny"), vocab_size=VOCABULARY)
        write_tokenizer(synthesize(config, folder / "weights", 1))
        terminal = Terminal(folder)
        terminal.wait("$")
        terminal.type("dsv4c generate weights --chat --seed 3 --max-new-tokens 48 --cache plans")
        terminal.wait("leaves")
        terminal.watch(0.5)
        terminal.type("Why is the sky blue?")
        terminal.wait("launches per token")
        terminal.watch(1.5)
        terminal.type("And at night?")
        terminal.wait("launches per token", 2)
        terminal.watch(1.0)
        terminal.close()
        return terminal.screens


# Pictures ---------------------------------------------------------------------------------------------------


def drawn(row: int, line: str) -> str:
    """A line of the screen as an SVG text, in the colors that the program gave it."""
    text = Text.from_ansi(line)
    spans = []
    for first, piece in _pieces(text):
        style = text.get_style_at_offset(_CONSOLE, first)
        color = style.color.get_truecolor().hex if style.color is not None else "#d8dee9"
        look = f' fill="{color}"' + (' opacity=".55"' if style.dim else "")
        look += ' font-weight="bold"' if style.bold else ""
        at, length = 12 + first * WIDTH, len(piece) * WIDTH
        spans.append(f'<tspan x="{at:.1f}" textLength="{length:.1f}"{look}>{html.escape(piece)}</tspan>')
    return f'<text y="{44 + row * HEIGHT:.0f}">{"".join(spans)}'


def _pieces(text: Text) -> list[tuple[int, str]]:
    """Runs of one style, without the blanks around them."""
    edges = sorted({0, len(text.plain), *(e for span in text.spans for e in (span.start, span.end))})
    runs = [(a, text.plain[a:b]) for a, b in pairwise(edges)]
    return [(a + len(run) - len(run.lstrip()), run.strip()) for a, run in runs if run.strip()]


def svg(body: str) -> str:
    width, height = COLUMNS * WIDTH + 24, ROWS * HEIGHT + 48
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="16" r="5" fill="{color}"/>'
        for i, color in enumerate(("#bf616a", "#ebcb8b", "#a3be8c"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace" '
        f'font-size="14" xml:space="preserve">\n'
        f'<rect width="100%" height="100%" rx="8" fill="#242933"/>{dots}\n{body}</svg>\n'
    )


def still(screen: Screen) -> str:
    return svg("".join(drawn(row, line) + "</text>\n" for row, line in enumerate(screen) if line.strip()))


def animated(screens: list[tuple[float, Screen]]) -> str:
    """Every line for as long as it stands; then from the start."""
    end = screens[-1][0] + STILL
    times = [at for at, _ in screens] + [end]
    lines = []
    for row in range(ROWS):
        since = 0
        for i in range(1, len(screens) + 1):
            before = screens[i - 1][1][row]
            if i < len(screens) and screens[i][1][row] == before:
                continue
            if before.strip():
                stands = f'begin="all.begin+{times[since]:.2f}s" end="all.begin+{times[i]:.2f}s"'
                shown = f'<set attributeName="visibility" to="visible" {stands}/></text>\n'
                lines.append(drawn(row, before).replace("<text ", '<text visibility="hidden" ', 1) + shown)
            since = i
    clock = f'<animate id="all" attributeName="x" begin="0s;all.end" dur="{end:.2f}s"/>'
    return svg(f'<rect width="0" height="0">{clock}</rect>\n{"".join(lines)}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    folder = parser.parse_args().folder
    screens = record()
    for name, text in (("chat", still(screens[-1][1])), ("chat-animated", animated(screens))):
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
        print(f"{folder / name}.svg: {len(text) / 1000:.0f} kB, {len(screens)} screens")


if __name__ == "__main__":
    main()
