"""A small curated dataset of two versions, served as `capfilt view` serves it, for tests."""

from __future__ import annotations

import http.client
import io
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import jpeg, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Input, LocalCheckpoint, Thresholds
from capfilt.view.explorer import Explorer
from capfilt.view.server import Server

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">",
    "invoice \u202egpj.exe\u202c end \u200b\u2066zero\u2069",
    "long " * 2000,
    "'; DROP TABLE rows; --",
    'שלום עולם "quoted" & <b>bold</b> 100% _under\\score',
    "Ärger über GROSSE Straßen",
)


def make_spec(folder: Path, **fields: Any) -> CurateSpec:
    """Curates `folder/in` into `folder/out` with the stubs."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for name, text in (("config.json", "{}"), ("model.safetensors", "weights"), ("vocab.txt", "[PAD]")):
        (checkpoint / name).write_text(text)
    card = {"checkpoint": LocalCheckpoint(path=str(checkpoint)), "image_size": 16, "batch_size": 8}
    defaults: dict[str, Any] = {
        "kind": "curate",
        "input": Input(paths=(str(folder / "in"),)),
        "output": str(folder / "out"),
        "captioners": (CaptionerCard(role="captioner", name="stub-captioner", **card),),
        "filters": tuple(FilterCard(role="filter", name=f"stub-filter-{n}", **card) for n in range(2)),
        "fragment_rows": 16,
        "max_error_fraction": 0.5,
    }
    return CurateSpec(**{**defaults, **fields})


def run(spec: CurateSpec) -> None:
    """Curate in this process."""
    curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))


def make_dataset(folder: Path, **fields: Any) -> CurateSpec:
    """A dataset whose version 1 is of two shards of 40 rows, hostile texts and unusable images among them; the newest
    has other thresholds and a third shard. Returns the newest's spec."""
    for number in range(2):
        images: list[bytes | None] = [jpeg(100 * number + n) for n in range(40)]
        texts: list[str | None] = [f"text {n} of the {'blue' if n % 3 else 'red'} house {number}" for n in range(40)]
        images[10], images[11], texts[12] = None, b"<html><body>404</body></html>", None
        if not number:
            texts[: len(HOSTILE)] = HOSTILE
        write_shard(folder / "in" / f"{number}.parquet", images, texts, row_group=20)
    run(make_spec(folder, thresholds=Thresholds(web=0.4, synthetic=0.4), **fields))
    write_shard(folder / "in" / "2.parquet", [jpeg(300 + n) for n in range(5)])
    newest = make_spec(folder, thresholds=Thresholds(web=0.6, synthetic=0.6), **fields)
    run(newest)
    return newest


@dataclass
class Served:
    """A server that answers, and who asks it."""

    explorer: Explorer
    server: Server

    def raw(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None, *, token: bool = True
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send a request as it is; its path is not made any better."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            own = {"Authorization": f"Bearer {self.server.token}"} if token else {}
            connection.request(method, path, body, {**own, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of an answer that is good."""
        status, _, body = self.raw("GET", f"/api/{path}?{urllib.parse.urlencode(query)}")
        assert status == 200, body
        return json.loads(body)

    def post(self, **mark: Any) -> tuple[int, Any]:
        """Send a mark."""
        headers = {"Content-Type": "application/json"}
        status, _, body = self.raw("POST", "/api/marks", headers, json.dumps(mark))
        return status, json.loads(body)

    def rows(self, **query: Any) -> list[dict[str, Any]]:
        """All rows that a search finds, page by page."""
        found, more = [], True
        while more:
            page = self.get("rows", **{"limit": 100, **query, "offset": len(found)})
            found, more = found + page["rows"], page["more"]
        return found


@contextmanager
def serving(output: str, marks: Path, index: Path, **fields: Any) -> Iterator[Served]:
    """Serve a dataset whose index is whole."""
    defaults = {"options": {}, "version": None, "against": None}
    explorer = Explorer(output, **{**defaults, **fields}, marks=str(marks), index=str(index))
    try:
        explorer.index.build()
        explorer.index.wait()
        server = Server(explorer)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield Served(explorer, server)
        finally:
            server.stop()
            thread.join()
    finally:
        explorer.close()
