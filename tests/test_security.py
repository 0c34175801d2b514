"""What SECURITY.md says of the code, and of what a run leaves behind."""

from __future__ import annotations

import ast
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.errors import ErrorBudgetError
from capfilt.pipelines.curate import curate, in_process

PACKAGE = Path(__file__).parent.parent / "capfilt"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAWHOEVERREADSTHIS",
    "AWS_SECRET_ACCESS_KEY": "hunter2-secret-access-key",
    "AWS_SESSION_TOKEN": "hunter2-session-token",
    "HF_TOKEN": "hunter2-hub-token",
    "RAY_AUTH_TOKEN": "hunter2-ray-token",
}


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE), ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


def test_nothing_executes_input() -> None:
    for path, name, call in calls():
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}, path
        assert name not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}, path
        assert keywords(call).get("shell", "False") == "False", path
        assert keywords(call).get("trust_remote_code", "False") == "False", path
        if name == "torch.load":
            assert keywords(call)["weights_only"] == "True", path
        if name in ("np.load", "numpy.load"):
            assert keywords(call).get("allow_pickle", "False") == "False", path


def test_pickles_come_from_ray_alone() -> None:
    """Blocks and configurations that the run itself gave Ray; a file may have been swapped."""
    loads = [(path, ast.unparse(call.args[0])) for path, name, call in calls() if name.startswith("pickle.load")]
    assert loads
    for path, source in loads:
        assert path.parts[0] == "pipelines", path
        assert re.fullmatch(r"pickled|error|config\['task'\]", source), (path, source)


def left_behind(output: Path) -> str:
    """Everything in the files of an output, tables decoded."""
    texts = []
    for path in output.rglob("*"):
        if path.is_file():
            texts.append(path.name)
            texts.append(path.read_bytes().decode("latin-1"))
            if path.suffix == ".parquet":
                texts.append(repr(pq.read_table(path, partitioning=None).to_pylist()))
    return "\n".join(texts)


@pytest.mark.parametrize("broken", [False, True], ids=["done", "failed"])
def test_secrets_of_the_environment_stay_there(
    broken: bool,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    images: list[bytes | None] = [jpeg(i) for i in range(20)]
    write_shard(tmp_path / "in" / "0.parquet", [b"junk"] * 20 if broken else images)
    shown, summaries = io.StringIO(), []
    options: dict[str, Any] = {"load": load_hash, "execute": in_process, "report": summaries.append}
    try:
        curate(make_spec(), console=Console(file=shown), **options)
    except ErrorBudgetError as error:
        assert broken
        shown.write(str(error))
    text = "\n".join([left_behind(tmp_path / "out"), shown.getvalue(), *map(repr, summaries), *capfd.readouterr()])
    assert json.dumps(make_spec().model_dump(mode="json")["sampling"]["top_p"]) in text  # the record is looked at
    for name, value in SECRETS.items():
        assert value not in text, name


def test_urls_are_not_fetched(make_spec: MakeSpec, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.jpg"
        columns = {"url": [url] * 4, "caption": [url] * 4, "jpg": [jpeg(0), None, b"", url.encode()]}
        (tmp_path / "in").mkdir()
        pq.write_table(pa.table(columns), tmp_path / "in" / "0.parquet")
        spec = make_spec(max_error_fraction=1.0)
        curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
        with pytest.raises(BlockingIOError):  # no one is waiting
            server.accept()
    assert [row["url"] for row in read(spec.output)] == [url] * 4


def test_the_files_that_security_md_names_are_there() -> None:
    root = PACKAGE.parent
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (root / "SECURITY.md").read_text())
    assert named
    for name in named:
        assert (PACKAGE / name).exists() or (root / name).exists(), name
