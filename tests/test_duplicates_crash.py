"""Crash proof of dropping copies: `capfilt run`, killed while it curates, decides anew and commits."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from crash_driver import Driver, Strike, seen
from rich.console import Console
from test_crash import Site, assert_alike, build, table

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.pipelines.curate import curate, in_process
from capfilt.receipts import RECEIPTS
from capfilt.spec import load_spec

SETTINGS = ["duplicates={max_per_url: 3}", "thresholds={web: 0.0, synthetic: 0.0}", "fragment_rows=5"]
STRIKES = [  # the first: fragments that are captioned; then, those of shards that are decided anew
    Strike("driver", "work", 0.2, 0.0, 0.0),
    Strike("driver", "commit", 0.0, 0.005, 0.0),
    Strike("driver", "work", 0.0, 0.0, 0.0),
    Strike("worker", "work", 0.5, 0.02, 0.0),
    Strike("driver", "work", 0.7, 0.05, 0.0),
    Strike("driver", "vacuum", 0.0, 0.01, 0.0),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Site:
    """240 rows in 4 shards, and each of these again under another name."""
    site = build(tmp_path_factory.mktemp("site"), ray_folder, images=240, shards=4)
    for file in sorted((site.folder / "web" / "shards").glob("*.parquet")):
        shutil.copy(file, file.with_stem(f"again-{file.stem}"))
    return site


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_change_nothing(site: Site) -> None:
    fresh, output = site.folder / "fresh", site.folder / "out"
    curate(
        load_spec(site.spec, [f"output={fresh}", *SETTINGS]), execute=in_process, console=Console(file=io.StringIO())
    )
    after = {name: table(fresh, name) for name in DIRECTORIES}
    reasons = [row["reason"] for row in after["annotations"].values()]
    assert reasons.count("duplicate") > 100
    strikes, ghosts = list(STRIKES), list[Driver]()
    for attempt in range(20):
        driver = site.driver(output, f"copies-{attempt}", SETTINGS)
        ghosts.append(driver)
        over = True
        with driver:
            while strikes and driver.await_moment(strikes[0], 9.0):
                strike = strikes.pop(0)
                victim = driver.strike(strike)
                if victim is None:
                    strikes.insert(0, strike)
                    continue
                print(f"attempt {attempt}: {victim} at {strike.moment} {driver.seconds:.1f} s {seen(output)}")
                if victim == "driver":
                    over = False
                    break
            else:
                driver.wait()
        while len(ghosts) > 1:
            ghosts.pop(0).reap()
        if over:
            assert driver.process.returncode == 0, driver.stderr()
            now = {name: table(output, name) for name in DIRECTORIES}
            for name in DIRECTORIES:
                assert_alike(now[name], after[name])
            assert not (output / RECEIPTS).exists()
            assert CuratedDataset.for_reading(str(output), {}).settled
            if not strikes:
                break
            ghosts.pop().reap()
            shutil.rmtree(output)
    for driver in ghosts:
        driver.reap()
    assert not strikes, f"these never hit: {strikes}"
