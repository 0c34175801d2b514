"""Whole runs over inputs that come and go. What is listed and read is in test_fragments.py."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import MakeSpec, jpeg, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.errors import ErrorBudgetError, InputError
from capfilt.inputs import list_inputs
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.spec import CurateSpec, Input


def run(spec: CurateSpec) -> Summary:
    return curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))


def test_a_symlink_to_nothing_costs_that_file_alone(make_spec: MakeSpec, tmp_path: Path) -> None:
    for s in range(3):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(10 * s + i) for i in range(10)])
    link = tmp_path / "in" / "broken.parquet"
    link.symlink_to(tmp_path / "blob")
    for shards, skipped in ((3, 0), (0, 3)):
        summary = run(make_spec(max_error_fraction=0.5))
        assert (summary.shards, summary.skipped, list(summary.failures)) == (shards, skipped, [str(link)])
        assert "cannot be read: FileNotFoundError" in summary.failures[str(link)]
    with pytest.raises(ErrorBudgetError, match=r"1 of 1 files are unreadable.*broken\.parquet"):
        run(make_spec(max_error_fraction=0.1))
    write_shard(tmp_path / "blob", [jpeg(100 + i) for i in range(10)])
    assert run(make_spec()).shards == 1
    (tmp_path / "blob").unlink()  # of a committed shard, too
    summary = run(make_spec(max_error_fraction=0.5))
    assert (summary.shards, summary.skipped, list(summary.failures), summary.gone) == (0, 3, [str(link)], 0)


def test_the_nearest_name_is_said_and_a_list_of_urls_is_known(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for named in (tmp_path / "shard", tmp_path / "shrads"):
        with pytest.raises(InputError, match=rf"no such file or directory; did you mean {tmp_path / 'shards'}\?"):
            list_inputs(Input(paths=(str(named),)))
    with pytest.raises(InputError, match="no such file or directory; name one that is there"):
        list_inputs(Input(paths=(str(tmp_path / "elsewhere"),)))
    (tmp_path / "urls.csv.gz").touch()
    with pytest.raises(InputError, match=r"urls.csv.gz: a list of URLs, by its name, .* a spec of `kind: ingest`"):
        list_inputs(Input(paths=(str(tmp_path / "urls.csv.gz"),)))
