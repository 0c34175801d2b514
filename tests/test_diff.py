"""Two versions compared, row by row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from test_recurate import other_filter, run, spoil
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.dataset import CuratedDataset
from capfilt.diff import Change, Diff, diff
from capfilt.errors import DatasetError
from capfilt.spec import CurateSpec, Thresholds, Withdrawn


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    for s in range(3):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(60)]
        images[3] = None
        write_shard(tmp_path / "in" / f"{s}.parquet", images)
    return make_spec(keep="all-above-threshold")


def compare(spec: CurateSpec, before: int, after: int | None = None) -> tuple[Diff, list[dict[str, Any]]]:
    parts: list[pa.Table] = []
    found = diff(CuratedDataset.for_reading(spec.output, {}), before, after, parts.append)
    return found, [row for part in parts for row in part.to_pylist()]


def slowly(spec: CurateSpec, before: int, after: int) -> list[tuple[Any, ...]]:
    """What changed, from the whole tables."""
    dataset = CuratedDataset.for_reading(spec.output, {})
    sides = []
    for version in (before, after):
        rows = dataset.annotations(version).to_table().to_pylist()
        sides.append({(row["shard"], row["row"]): row for row in rows})
    changed = []
    for place in sorted(sides[0].keys() | sides[1].keys()):
        own = [side.get(place) for side in sides]
        outcomes = [row["reason"] or "kept" if row else "absent" for row in own]
        texts = [[text["text"] for text in row["texts"] if text["kept"]] if row else [] for row in own]
        images = [row["image_sha256"] if row else None for row in own]
        if outcomes == ["kept", "kept"]:
            kind = "image" if images[0] != images[1] else "text" if texts[0] != texts[1] else None
        else:
            kind = {"kept": "gained"}.get(outcomes[1]) or {"kept": "lost"}.get(outcomes[0])
            kind = kind or ("outcome" if outcomes[0] != outcomes[1] else None)
        if kind:
            changed.append((*place, kind, *outcomes, *texts))
    return changed


def test_every_change_of_every_kind_is_found(spec: CurateSpec, tmp_path: Path) -> None:
    first = run(spec).versions["annotations"]
    write_shard(tmp_path / "in" / "1.parquet", [jpeg(1000 + i) for i in range(70)])
    write_shard(tmp_path / "in" / "9.parquet", [b"<html>", None, *(jpeg(900 + i) for i in range(18))])
    (tmp_path / "gone.txt").write_text("http://example.org/0/7.jpg\nhttp://example.org/0/3.jpg")
    changed = other_filter(spec).model_copy(update={"withdrawn": Withdrawn(urls=(str(tmp_path / "gone.txt"),))})
    second = run(changed).versions["annotations"]
    for before, after in ((first, second), (second, first), (0, first)):
        found, rows = compare(spec, before, after)
        columns = ("shard", "row", "change", "before", "after", "texts_before", "texts_after")
        assert [tuple(row[name] for name in columns) for row in rows] == slowly(spec, before, after)
        assert found.changes == Counter(Change(row["change"]) for row in rows)
        assert found.outcomes == Counter((r["before"], r["after"]) for r in rows if r["before"] != r["after"])
    found, rows = compare(spec, first)
    assert found.changes.keys() == set(Change)
    assert found.outcomes["no_image", "withdrawn"] == 1
    assert found.shards == {"before": 3, "after": 4, "changed": 4}
    withdrawn = next(row for row in rows if row["after"] == "withdrawn" and row["row"] == 7)
    assert withdrawn["url"] == "http://example.org/0/7.jpg"


def test_shards_of_the_same_files_are_not_read(spec: CurateSpec, tmp_path: Path) -> None:
    first = run(spec).versions["annotations"]
    write_shard(tmp_path / "in" / "1.parquet", [jpeg(5000)])
    run(spec)
    for path in Path(spec.output, "annotations").glob("shard=0*/*.parquet"):
        spoil(path)
    found, rows = compare(spec, first)
    assert found.shards == {"before": 3, "after": 3, "changed": 1}
    assert {row["shard"][:2] for row in rows} == {"1-"}
    assert compare(spec, first, first) == (Diff(first, first, {"before": 3, "after": 3, "changed": 0}), [])


def test_a_version_that_vacuum_took_is_named(spec: CurateSpec) -> None:
    first = run(spec).versions["annotations"]
    run(spec.model_copy(update={"thresholds": Thresholds(web=0.9, synthetic=0.9)}))
    CuratedDataset.for_writing(spec.output, {}).vacuum(0)
    with pytest.raises(DatasetError, match=rf"version {first} can no longer be read: vacuum"):
        compare(spec, first)
    with pytest.raises(DatasetError, match="no version 99 to read"):
        compare(spec, 99)


def test_on_the_command_line(spec: CurateSpec, tmp_path: Path) -> None:
    first = run(spec).versions["annotations"]
    run(spec.model_copy(update={"thresholds": Thresholds(web=0.9, synthetic=0.1)}))
    found, rows = compare(spec, first)
    said = CliRunner().invoke(app, ["diff", spec.output, str(first), "--rows", str(tmp_path / "rows.parquet")])
    assert said.exit_code == 0, said.output
    for change, count in found.changes.items():
        assert f"{count} " in said.output, change
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    told = json.loads(CliRunner().invoke(app, ["diff", spec.output, str(first), "--json"]).output)
    assert told == found.as_json()
    assert told["rows"]["lost"] == found.changes[Change.LOST] > 0
    kept = sum(row["status"] == "kept" for row in read(spec.output))
    before = CuratedDataset.for_reading(spec.output, {}).pairs(first).to_table().num_rows
    assert kept - before == found.changes[Change.GAINED] - found.changes[Change.LOST]
    same = CliRunner().invoke(app, ["diff", spec.output, str(found.after), str(found.after)])
    assert "no row changed" in same.output


def test_without_versions_the_run_before_is_compared_with(spec: CurateSpec) -> None:
    runner = CliRunner()
    run(spec)
    refused = runner.invoke(app, ["diff", spec.output])
    assert isinstance(refused.exception, DatasetError)
    assert "name a version: V1" in str(refused.exception)
    before = CuratedDataset.for_reading(spec.output, {}).versions()["annotations"]
    run(spec.model_copy(update={"thresholds": Thresholds(web=0.999, synthetic=0.999)}))
    said = runner.invoke(app, ["diff", spec.output])
    assert said.exit_code == 0, said.output
    assert said.output.startswith(f"version {before} -> ")


def test_it_loads_neither_torch_nor_ray(spec: CurateSpec) -> None:
    first = run(spec).versions["annotations"]
    code = (
        "import sys; from typer.testing import CliRunner; from capfilt.cli import app;"
        f"done = CliRunner().invoke(app, ['diff', {spec.output!r}, '{first}']); assert not done.exit_code, done.output;"
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
