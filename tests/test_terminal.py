"""What strangers wrote is shown and not obeyed, and secrets are not shown."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec
from rich.console import Console
from rich.table import Table

from capfilt.printing import print_runs
from capfilt.records import RunRecord
from capfilt.redaction import redacted
from capfilt.terminal import counted, escaped, say, show, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("Grüße, 東京\u3000に\xa0", "Grüße, 東京\u3000に\xa0"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # turns what follows
        ("a\u2028b\u200bc", r"a\u2028b\u200bc"),
        ("not UTF-8: \udcff", r"not UTF-8: \udcff"),
        ("[red]no markup[/]", "[red]no markup[/]"),
    ],
)
def test_escaped(text: str, line: str) -> None:
    assert escaped(text) == line
    for terminal in (True, False):
        out = io.StringIO()
        say(text.replace("\n", ""), Console(file=out, force_terminal=terminal, width=200))
        assert out.getvalue() == line.replace(r"\n", "") + "\n"
    cells = io.StringIO()
    table = Table(box=None, show_header=False, padding=0)
    table.add_row(shown(text))
    Console(file=cells, width=200).print(table)
    assert cells.getvalue().rstrip() == line.rstrip()


def test_no_line_end_in_a_name_begins_a_line_of_ours() -> None:
    out = io.StringIO()
    say("capfilt: /in/a\ncapfilt: all is well.parquet: no such file", Console(file=out))
    assert out.getvalue().splitlines() == ["capfilt: /in/a", "    capfilt: all is well.parquet: no such file"]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("ftp://user:pa55@host/a", "ftp://user:***@host/a"),
        ("see https://:pa55@host and s3://bucket/a:b@c", "see https://:***@host and s3://bucket/a:b@c"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        (
            "https://host/a?v=1&X-Amz-Signature=abc&sig=d%3D&n=2",
            "https://host/a?v=1&X-Amz-Signature=***&sig=***&n=2",
        ),
        ({"a": ["http://u:p@h"], "n": 3, "none": None}, {"a": ["http://u:***@h"], "n": 3, "none": None}),
        (("k wJalrXUtnFEMI0123 here",), ["k *** here"]),
        ("/9a0bJalrXUtnFEMI, minioadmin", "***, ***"),
        ("https://ghp_token@host/a and http://user@host", "https://***@host/a and http://***@host"),
    ],
)
def test_redacted(text: Any, safe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI0123")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "/9a0bJalrXUtnFEMI")  # base64 begins so at times
    monkeypatch.setenv("MINIO_ROOT_PASSWORD", "minioadmin")
    monkeypatch.setenv("SHORT_TOKEN", "here")  # a word
    monkeypatch.setenv("TOKEN_FILE", "/var/run/secrets/token")  # a place
    assert redacted(text) == safe
    assert redacted("/var/run/secrets/token") == "/var/run/secrets/token"


def test_a_message_is_printed_without_secrets() -> None:
    out = io.StringIO()
    say("capfilt: ftp://user:pa55@host: no such file", Console(file=out))
    assert out.getvalue() == "capfilt: ftp://user:***@host: no such file\n"


@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_hostile_file_name_is_shown_and_not_obeyed(make_spec: MakeSpec, tmp_path: Path, command: str) -> None:
    """In an error on standard error, by `check`, which reads it; as `plan` prints nothing of it, nothing is there."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "\x1b[2J\x1b]0;owned\x07\ncapfilt: all is well \udcff.parquet").write_bytes(b"no Parquet")
    spec = tmp_path / "run.yaml"
    spec.write_text(make_spec().model_dump_json())
    done = subprocess.run([sys.executable, "-m", "capfilt", command, str(spec)], capture_output=True, timeout=60)
    assert not any(byte in done.stdout + done.stderr for byte in (b"\x1b", b"\x07"))
    if command == "check":
        assert done.returncode == 1
        lines = done.stderr.decode().splitlines()
        assert rf"{folder}/\x1b[2J\x1b]0;owned\x07" in lines[0]
        assert lines[1].startswith(r"    capfilt: all is well \udcff.parquet: not readable as Parquet")


def test_counted() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2400)] == ["0 shards", "1 shard", "2,400 shards"]


def test_runs_are_listed_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "20261128T035348188741-d9e21930"
    seconds = {"gpu_held": 0.0, "cpu_held": 12.0}
    done = RunRecord(name, "2026-11-28", "2026-11-28", "done", seconds=3661.0, shards=1, rows=1_000_000, errors=7)
    on_gpu = replace(done, device_seconds={**seconds, "gpu_held": 90_000.0}, details={"versions": {"annotations": 41}})
    for record, words in (
        (replace(done, device_seconds=seconds), ["done", "1:01:01", "1", "1,000,000", "273.1", "7", "12"]),
        (on_gpu, ["41", "done", "1:01:01", "1", "1,000,000", "273.1", "7", "90,000", "12"]),
    ):
        print_runs([record])
        printed = capsys.readouterr().out
        assert ("GPU s" in printed) is (record is on_gpu)
        assert [*printed.splitlines()[3].replace("│", " ").split()] == [name, *words]
    print_runs([])
    assert capsys.readouterr().out == "no run is on record\n"


def test_a_title_stands_in_one_line_above_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("n", title="run 20261128T035348188741-d9e21930", title_justify="left")
    table.add_row("1")
    show(table)
    assert capsys.readouterr().out.splitlines()[0] == "run 20261128T035348188741-d9e21930"
