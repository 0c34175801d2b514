"""Completion, by the protocol that shells speak, and in the shells themselves."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.completion import mend_bash_words

CAPFILT = """#!{python}
import sys
sys.argv[0] = "capfilt"
from capfilt.cli import main
main()
"""
LOADED = """
import atexit, sys
atexit.register(lambda: print(sorted({'torch', 'ray', 'deltalake', 'duckdb', 'fsspec'} & set(sys.modules))))
sys.argv = ["capfilt"]
from capfilt.cli import main
main()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a spec, a card, data and a dataset; `capfilt` is on its PATH, in bin/."""
    program = tmp_path / "bin" / "capfilt"
    program.parent.mkdir()
    program.write_text(CAPFILT.format(python=sys.executable))
    program.chmod(0o755)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "mine.yaml").write_text(
        "kind: curate\ninput: {paths: ../data/*.parquet}\noutput: ../runs/mine\ncaptioners: [card.yaml]\n"
        "filters: [{role: filter, model: clip, name: f}]\n"
    )
    (tmp_path / "pipelines" / "out.yaml").write_text("kind: export\ndataset: ../runs/mine\noutput: ../out\n")
    (tmp_path / "pipelines" / "card.yaml").write_text("role: captioner\nname: c\n")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"picture": [b"x"], "alt": ["y"]}), tmp_path / "data" / "0.parquet")
    for table, versions in (("annotations", (0, 1, 12)), ("pairs", (0, 7))):
        log = tmp_path / "runs" / "mine" / table / "_delta_log"
        log.mkdir(parents=True)
        for version in versions:
            (log / f"{version:020d}.json").write_text("{}")
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": root, "HOME": str(place), **more}


def complete(line: str, shell: str = "fish") -> list[str]:
    """What a shell is answered for a line that ends where the cursor is."""
    asked = {
        "_CAPFILT_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = CliRunner().invoke(app, [], prog_name="capfilt", env=asked)
    assert done.exit_code == 0, done.output
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


SET = "capfilt run pipelines/mine.yaml --set "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("capfilt re", ["report"]),
        ("capfilt job st", ["status", "stop"]),
        ("capfilt run pipelines/", ["pipelines/mine.yaml", "pipelines/out.yaml"]),  # no card
        ("capfilt run pip", ["pipelines/mine.yaml", "pipelines/out.yaml"]),
        ("capfilt status ru", ["runs/mine"]),
        ("capfilt status pipelines/m", ["pipelines/mine.yaml"]),
        ("capfilt report runs/mine --version ", ["12", "1", "0"]),
        ("capfilt report pipelines/mine.yaml --against 1", ["12", "1"]),
        ("capfilt report pipelines/mine.yaml --against ru", ["runs/mine"]),
        ("capfilt view pipelines/mine.yaml --against ", ["12", "1", "0"]),
        ("capfilt diff runs/mine 1", ["12", "1"]),
        (f"{SET}decision=", ["decision=mean", "decision=vote"]),
        (f"{SET}captioners.0.dt", [f"captioners.0.dtype={value}" for value in ("", "float32", "bfloat16")]),
        (f"{SET}filters.0.un", [f"filters.0.unit={value}" for value in ("", "cosine", "probability")]),  # of a clip
        (f"{SET}fragment_rows=", ["fragment_rows=1000"]),
        (f"{SET}input.columns.image=p", ["input.columns.image=picture"]),
        (f"{SET}seed=1 --set thresholds.", ["thresholds.web=", "thresholds.synthetic="]),
        ("capfilt run pipelines/out.yaml --set format=w", ["format=webdataset"]),
        ("capfilt run pipelines/out.yaml --set version=", ["version=7", "version=0"]),
    ],
)
def test_values_that_are_known_are_offered(
    place: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str]
) -> None:
    monkeypatch.chdir(place)
    assert complete(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "capfilt report nowhere --version ",
        "capfilt report s3://bucket/mine --version ",
        "capfilt run nowhere.yaml --set a",
        "capfilt run broken.yaml --set a",
        f"{SET}no.such.field=",
        "capfilt run odd.yaml --set input.columns.image=",
        "capfilt run odder.yaml --set input.columns.image=",
        "capfilt run pipelines/mine.yaml --set input.columns.url=h",
        "capfilt run nowhere/",
        "capfilt run deep.yaml --set a",
        "capfilt report deep.yaml --version ",
        "capfilt report nul.yaml --version ",
    ],
)
def test_what_is_not_known_is_silence(place: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(place)
    Path("broken.yaml").write_text("kind: [")
    Path("deep.yaml").write_text("kind: " + "[" * 5000)
    Path("nul.yaml").write_text('output: "a\\0b"\n')
    Path("odd.yaml").write_text("kind: curate\ninput: data\n")
    Path("odder.yaml").write_text("kind: curate\ninput: {paths: 7}\ncaptioners: 7\nfilters: [7]\n")
    assert "".join(complete(line)) == ""


HOSTILE = (
    *(
        "\\$(touch X)",
        "$(touch X)",
        "`touch X`",
        "\\`touch X\\`",
        "a;touch X",
        "a'$(touch X)'",
        'a"$(touch X)"',
        "${X}",
    ),
    *(
        "a b",
        "a\nb",
        "a\x1b[2J",
        "a\tb",
        "a\\",
        "a(b)",
        "a[1]",
        "a{b,c}",
        "a*",
        "a?",
        "a!b",
        "a#",
        "a^b",
        "a|b",
        "a&b",
        "a<b",
    ),
    "a\u202eb",
)


@pytest.fixture
def hostile(place: Path) -> Path:
    """`place`, with columns and datasets of names that are more than a word to a shell; `plain` is among them."""
    columns = {name: [b""] for name in (*HOSTILE, "plain")}
    pq.write_table(pa.table(columns), place / "data" / "0.parquet")
    for name in (*HOSTILE, "plain"):
        (place / "all" / f"ds{name}" / "annotations" / "_delta_log").mkdir(parents=True)
    (place / "all" / "--install-completion" / "annotations" / "_delta_log").mkdir(parents=True)
    return place


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_only_plain_names_are_offered(hostile: Path, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.chdir(hostile)
    forms = {"zsh": """_arguments '*: :(("{}"))'""", "powershell": "{}::: "}
    for line, value in (
        (f"{SET}input.columns.image=", "input.columns.image=plain"),
        ("capfilt status all/ds", "all/dsplain"),
    ):
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_WORD_TO_COMPLETE", words[-1])
        (answer,) = complete(line, shell)
        answer = answer.replace(':"a curated dataset"', "").replace(":::a curated dataset", "::: ")
        assert answer == forms.get(shell, "{}").format(value)
    assert "".join(complete("capfilt status all/ds$", "fish")) == ""
    monkeypatch.chdir(hostile / "all")
    assert complete("capfilt status ") == ["dsplain"]  # and no option


def test_completion_loads_nothing_heavy(place: Path) -> None:
    asked = {"_CAPFILT_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for line in ("capfilt report runs/mine --version ", f"{SET}input.columns.image="):
        done = subprocess.run(
            [sys.executable, "-c", LOADED],
            cwd=place,
            env=environment(place, **asked, _TYPER_COMPLETE_ARGS=line),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert len(done.stdout.splitlines()) > 1
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "mended", "before"),
    [
        (["--set", "a", "=", "b"], ["--set", "b"], "a="),
        (["--set", "a", "="], ["--set", ""], "a="),
        (["--set", "a", "=", "b", ""], ["--set", "a=b", ""], ""),
        (["--set", "a", "=", "b", "--set", "c"], ["--set", "a=b", "--set", "c"], ""),
        (["--set", "=", "a", "=", "b"], ["--set", "b"], "a="),
        (["--version", "=", "1"], ["--version", "1"], ""),
        (["--version", "="], ["--version", ""], ""),
        (["s3", ":", "//b/c"], ["//b/c"], "s3:"),
        (["s3", ":"], [""], "s3:"),
        (["s3", ":", "//b/c", "--version", ""], ["s3://b/c", "--version", ""], ""),
        ([""], [""], ""),
    ],
)
def test_words_that_bash_took_apart_are_joined(words: list[str], mended: list[str], before: str) -> None:
    asked = {
        "_CAPFILT_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(["capfilt", *words, "after"]),
        "COMP_CWORD": str(len(words)),
    }
    mend_bash_words(asked)
    assert asked["COMP_WORDS"].split("\n") == ["capfilt", *mended]
    assert asked["COMP_CWORD"] == str(len(mended))
    assert asked["_CAPFILT_COMPLETE_BEFORE"] == before


def in_bash(place: Path, line: str) -> list[str]:
    """What bash would offer, by the script that is shown: its own words, by its own rules of where one begins."""
    breaks = "\"'><=;|&(:"
    words = [""]
    for character in line:  # as readline's COMP_WORDBREAKS has it
        if character == " ":
            words.append("")
        elif character in breaks:
            words[-1:] = [*filter(None, words[-1:]), character, ""]
        else:
            words[-1] += character
    if words[-1] == "" and line[-1] in breaks:
        words.pop()  # the mark itself is the word at the cursor
    script = (
        f"source <(capfilt --show-completion)\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
        f"COMP_CWORD={len(words) - 1}\n"
        'complete -p capfilt >&2\n_capfilt_completion capfilt\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc"],
        input=script,
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.strip() == "complete -o default -F _capfilt_completion capfilt"
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("capfilt report runs/mine --version=1", ["12", "1"]),
        (f"{SET}decision=", ["mean", "vote"]),
        (f"{SET}seed=1 --set decision=v", ["vote"]),
    ],
)
def test_in_bash(place: Path, line: str, expected: list[str]) -> None:
    assert in_bash(place, line) == expected


def test_it_is_installed_in_bash(place: Path) -> None:
    script = "capfilt --install-completion; exit $?"  # of one command alone bash would make itself that command
    subprocess.run(["bash", "--norc", "-c", script], env=environment(place), timeout=60, check=True)
    done = subprocess.run(
        ["bash", "-ic", "complete -p capfilt"], env=environment(place), capture_output=True, timeout=60, check=True
    )
    assert b"_capfilt_completion capfilt" in done.stdout


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish on this machine")
@pytest.mark.parametrize(("line", "expected"), [("capfilt repo", ["report"]), (f"{SET}decision=v", ["decision=vote"])])
def test_in_fish(place: Path, line: str, expected: list[str]) -> None:
    script = f"capfilt --show-completion | source; complete --do-complete {shlex.quote(line)}"
    done = subprocess.run(
        ["fish", "-c", script],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == expected


ZSH = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z 'PS1=; autoload -Uz compinit; compinit -u; source <(capfilt --show-completion)'
zpty -w z 'shown() {{ print -r -- "line<$BUFFER>" }}; zle -N shown; bindkey "^O" shown; print rea""dy'
wait_for() {{
    for i in {{1..300}}; do zpty -r -t z part && answer+=$part; [[ $answer == *${{~1}}* ]] && return; sleep 0.1; done
}}
wait_for ready
zpty -n -w z {line}
wait_for 'line<capfilt*>'
print -r -- $answer
zpty -d z
"""


def in_zsh(place: Path, line: str) -> str:
    """What a terminal of zsh's own shows where a person types a line and presses Tab."""
    typed = shlex.quote(f"{line}\t\x0f")  # Tab, then the key that prints the line
    done = subprocess.run(
        ["zsh", "-f"],
        input=ZSH.format(line=typed),
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh on this machine")
def test_in_zsh(place: Path) -> None:
    shown = in_zsh(place, f"{SET}decision=v")
    assert f"line<{SET}decision=vote >" in shown, shown


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh on this machine")
@pytest.mark.parametrize(
    ("line", "completed"),
    [(f"{SET}input.columns.image=", "plain "), ("capfilt status all/ds", "plain")],
    ids=["column", "dataset"],
)
def test_zsh_runs_no_name(hostile: Path, line: str, completed: str) -> None:
    shown = in_zsh(hostile, line)
    assert f"line<{line}{completed}" in shown, shown
    assert not list(hostile.rglob("X"))
