"""docs/tutorial.md does what it says: its files are written, its commands run in order, its outputs compared."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from capfilt.truth import read_toyweb

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PORTS = ("8000", "8123")
"""As the page has them; a test takes what is free."""

_BLOCK = re.compile(
    r"^(?:<!-- by hand: (?P<hand>\w+) -->\n)?```(?P<kind>\w+)(?: title=\"(?P<file>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of the page.

    Attributes:
        kind: `sh` is run, `text` is what the `sh` before it printed; others are files.
        file: to write it to.
        hand: what a person does with it.
    """

    kind: str
    text: str
    file: str | None = None
    hand: str | None = None


def blocks() -> list[Block]:
    """Of the page, in order."""
    found = _BLOCK.finditer(TUTORIAL.read_text())
    return [Block(block["kind"], block["text"], block["file"], block["hand"]) for block in found]


class Shell:
    """A bash that blocks are run in, one after the other."""

    def __init__(self, folder: Path) -> None:
        bin_ = Path(sys.executable).parent
        self.env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "COLUMNS": "100"}
        self._bash = subprocess.Popen(
            ["bash"], cwd=folder, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, text: str) -> str:
        """What it prints; standard error goes where the test's own goes.

        Raises:
            AssertionError: a line of it fails.
        """
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        lines = "".join(f"{line}\n[ $? = 0 ] || echo FAILED\n" for line in text.splitlines())
        self._bash.stdin.write(f"{lines}echo '[done]'\n")
        self._bash.stdin.flush()
        printed = "".join(iter(self._bash.stdout.readline, "[done]\n"))
        assert "FAILED" not in printed, printed
        return printed

    def close(self) -> None:
        """End it, and what it left running."""
        self._bash.communicate("kill $(jobs -p) 2> /dev/null\n", timeout=30)


def masked(output: str) -> list[str]:
    """Lines without what differs from one machine and run to another: times, speeds, sizes, names; in an order."""
    output = re.sub(r"\d{8}T\d{12}-[0-9a-f]{8}", "RUN", output)
    output = re.sub(r"/\S*/tutorial/", "HERE/", output)
    output = re.sub(r"(caption|score|decide) [0-9a-f]{16}", r"\1 FINGERPRINT", output)
    output = re.sub(r"[\d,.]+(/s| s\b| bytes| MiB)", r"#\1", output)
    output = re.sub(r"(stages, summed over workers:|the models were busy|mean loss).*", r"\1", output)
    output = re.sub(r"#token=\S+", "#token", output)
    output = re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1", output)
    output = re.sub(r"[━┏┓┡┩└┘╇┳┴─]+", "", output)
    return sorted(filter(None, (" ".join(line.split()) for line in output.splitlines())))


def agree(shown: str, printed: str) -> bool:
    """Whether two masked lines say the same. Scores are rounded differently by other processors, and so may a
    decision be: counts may differ by 2%, or by two; what has a fraction by 2%, or by 0.02."""
    number = r"\d[\d,]*(?:\.\d+)?"
    if re.sub(number, "0", shown) != re.sub(number, "0", printed):
        return False
    for one, other in zip(re.findall(number, shown), re.findall(number, printed), strict=True):
        value = float(one.replace(",", ""))
        least = 0.02 if "." in one or "." in other else 2
        if abs(value - float(other.replace(",", ""))) > max(least, 0.02 * abs(value)):
            return False
    return True


def _free_ports() -> dict[str, str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = {named: str(own.getsockname()[1]) for named, own in zip(PORTS, sockets, strict=True)}
    for own in sockets:
        own.close()
    return ports


def mark(command: str, shell: Shell, folder: Path) -> str:
    """Mark texts as a person would who knows the toy web: of 100 rows, the same ones in every run.

    Returns:
        What the command printed.
    """
    truth = read_toyweb(str(folder / "toyweb" / "web"))
    index = [*shlex.split(command), "--index", str(folder / "view.duckdb")]
    with subprocess.Popen(index, cwd=folder, env=shell.env, stdout=subprocess.PIPE, text=True) as view:
        assert view.stdout is not None
        printed = view.stdout.readline()
        try:
            address, _, token = printed.split()[-1].partition("/#token=")

            def ask(method: str, path: str, body: Any = None) -> Any:
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)) as connection:
                    connection.request(method, f"/api/{path}", body and json.dumps(body), headers)
                    answer = connection.getresponse()
                    assert answer.status == 200, answer.read()
                    return json.loads(answer.read())

            deadline = time.monotonic() + 60
            while not ask("GET", "state")["index"]["done"]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            for row in ask("GET", "rows?sort=random&url=/000000&limit=100")["rows"]:
                for number, text in enumerate(row["texts"]):
                    true = truth.is_true(row["provenance"]["image_sha256"] or "", text["text"] or "")
                    if row["markable"] and text["text"] and true is not None:
                        ask(
                            "POST",
                            "marks",
                            {"id": row["id"], "text": number, "true": true, "search": {"sort": "random"}},
                        )
        finally:
            view.send_signal(signal.SIGINT)
        assert view.wait(30) == 0
    return printed


def follow(folder: Path) -> Iterator[tuple[Block, str]]:
    """Do what the page says in `folder`/tutorial; yields each output that it shows, and what was printed."""
    (folder / "capfilt").symlink_to(ROOT)
    here = folder / "tutorial"
    here.mkdir()
    ports = _free_ports()
    shell = Shell(here)
    try:
        printed = version = ""
        for block in blocks():
            text = re.sub("|".join(PORTS), lambda port: ports[port[0]], block.text)
            if block.kind == "text":
                yield block, printed
            elif block.file:
                (here / block.file).write_text(text)
            elif block.hand == "mark":
                printed = mark(text, shell, here)
            elif block.hand == "version":
                printed = shell.run(re.sub(r"\d+$", version, text.rstrip()))
            elif block.hand is None:
                printed = shell.run(text)
                if status := re.search(r"versions annotations (\d+)", printed):
                    version = status[1]
    finally:
        shell.close()


def test_the_page_is_read_as_it_is_meant() -> None:
    found = blocks()
    assert {block.kind for block in found} == {"sh", "text", "yaml", "python"}
    assert all((block.file is not None) == (block.kind in ("yaml", "python")) for block in found)
    assert [block.hand for block in found if block.hand] == ["install", "mark", "version"]
    assert all(before.kind == "sh" for before, block in pairwise(found) if block.kind == "text")
    assert TUTORIAL.read_text().count("```") == 2 * len(found), "a block that the test does not see"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("│ 546  │ kept (91.0%) │", "│ 545 │ kept (90.8%) │", True),  # another processor's rounding
        ("│ 546  │ kept (91.0%) │", "│ 500 │ kept (83.3%) │", False),
        ("│ 546  │ kept (91.0%) │", "│ 546 │ dropped (91.0%) │", False),
        ("fetched 600 URLs in 3.2 s, 186.0/s", "fetched 600 URLs in 12.8 s, 46.8/s", True),
        ("fetched 600 URLs in 3.2 s, 186.0/s", "fetched 300 URLs in 3.2 s, 186.0/s", False),
        ("report: /home/you/tutorial/report.html", "report: /tmp/x/tutorial/report.html", True),
        ("report: /home/you/tutorial/report.html", "report: /tmp/x/tutorial/report.json", False),
    ],
)
def test_outputs_are_the_same_but_for_times_places_and_roundings(shown: str, printed: str, same: bool) -> None:
    assert agree(*masked(shown), *masked(printed)) is same


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    for block, printed in follow(tmp_path):
        shown, real = masked(block.text), masked(printed)
        assert len(shown) == len(real), f"the page shows\n{block.text}\nand this was printed\n{printed}"
        for line, own in zip(shown, real, strict=True):
            assert agree(line, own), f"the page shows\n{line}\nand this was printed\n{own}"
