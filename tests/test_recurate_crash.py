"""Crash proof of restarts midway: `capfilt run` with new thresholds, another filter or withdrawn rows, killed."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import pytest
from crash_driver import Driver, Strike, seen
from rich.console import Console
from test_crash import SEED, Rows, Site, assert_alike, build, plain_ids, table

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.pipelines.curate import curate, in_process
from capfilt.plan import Stage
from capfilt.receipts import RECEIPTS
from capfilt.spec import load_spec

CHANGES = {
    Stage.WITHDRAW: ["withdrawn={urls: [FOLDER/withdrawn.txt], keys: [FOLDER/withdrawn.txt]}"],
    Stage.DECIDE: ["thresholds={web: 0.497, synthetic: 0.5}", "keep=all-above-threshold"],
    Stage.SCORE: ['filters.0.first_token="[CLS]"'],
}
STRIKES = [
    *(Strike("driver", "start", share, 0.0, 0.0) for share in (0.5, 0.95)),
    *(Strike("driver", "work", share, delay, 0.0) for share, delay in ((0.0, 0.0), (0.3, 0.05), (0.8, 0.02))),
    Strike("worker", "work", 0.2, 0.0, 0.0),
    Strike("driver", "commit", 0.0, 0.003, 0.0),
    Strike("worker", "work", 0.0, 0.0, 0.0),
    Strike("driver", "vacuum", 0.0, 0.01, 0.0),
]
STARTUP_SECONDS = 9.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path) -> Site:
    """800 rows in 8 shards, curated once into `base`, in files of few rows."""
    site = build(tmp_path_factory.mktemp("site"), ray_folder, images=800, shards=8)
    in_one_go(site, site.folder / "base", ["fragment_rows=5"])
    rows = [row for (_, number), row in table(site.folder / "base", "annotations").items() if number % 9 == 4]
    (site.folder / "withdrawn.txt").write_text("".join(f"{row['url'] or row['key']}\n" for row in rows))
    return site


def changes(site: Site, stage: Stage) -> list[str]:
    return [change.replace("FOLDER", str(site.folder)) for change in CHANGES[stage]]


def in_one_go(site: Site, output: Path, overrides: list[str]) -> None:
    spec = load_spec(site.spec, [f"output={output}", *overrides])
    curate(spec, execute=in_process, console=Console(file=io.StringIO()))


def whole(output: Path) -> dict[str, Rows]:
    return {name: table(output, name) for name in DIRECTORIES}


def of_shard(rows: Rows, shard: str) -> Rows:
    return {identity: row for identity, row in rows.items() if identity[0] == shard}


def check_between(output: Path, before: dict[str, Rows], after: dict[str, Rows]) -> None:
    """Between a death and the next start: every shard is as it was, or as it is to be."""
    CuratedDataset.for_writing(str(output), {})  # as the next start does: brings pairs to where annotations are
    now = whole(output)
    shards = {shard for shard, _ in before["annotations"]}
    for shard in shards:
        (fingerprint,) = {row["decide_fingerprint"] for row in of_shard(now["annotations"], shard).values()}
        old = {row["decide_fingerprint"] for row in of_shard(before["annotations"], shard).values()}
        expected = before if fingerprint in old else after
        for name in DIRECTORIES:
            assert_alike(of_shard(now[name], shard), of_shard(expected[name], shard))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [Stage.WITHDRAW, Stage.DECIDE, Stage.SCORE])
def test_kills_change_nothing(site: Site, stage: Stage) -> None:
    fresh, output = site.folder / f"{stage}-fresh", site.folder / f"{stage}"
    in_one_go(site, fresh, changes(site, stage))
    before, after = whole(site.folder / "base"), whole(fresh)
    changed = sum(row != before["annotations"][identity] for identity, row in after["annotations"].items())
    assert changed == len(before["annotations"])  # their fingerprints at the least
    assert before["pairs"] != after["pairs"]
    shutil.copytree(site.folder / "base", output)
    strikes = list(STRIKES)
    random.Random(SEED).shuffle(strikes)
    hits: list[Strike] = []
    ghosts: list[Driver] = []
    for attempt in range(40):
        driver = site.driver(output, f"{stage}-{attempt}", changes(site, stage))
        ghosts.append(driver)
        over = True
        with driver:
            while strikes and driver.await_moment(strikes[0], STARTUP_SECONDS):
                strike = strikes.pop(0)
                victim = driver.strike(strike)
                if victim is None:
                    strikes.append(strike)
                    continue
                hits.append(strike)
                print(f"{stage} attempt {attempt}: {victim} at {strike.moment} {driver.seconds:.1f} s {seen(output)}")
                if victim == "driver":
                    over = False
                    break
            else:
                driver.wait()
        while len(ghosts) > 1:
            ghosts.pop(0).reap()
        if over:
            assert driver.process.returncode == 0, driver.stderr()
            assert_done(site, output, after)
            if not strikes:
                break
            ghosts.pop().reap()
            shutil.rmtree(output)  # the strikes that are left hit nothing any more here
            shutil.copytree(site.folder / "base", output)
        else:
            check_between(output, before, after)
    for driver in ghosts:
        driver.reap()
    print(f"{stage}: {len(hits)} kills in {attempt + 1} starts")
    assert not strikes, f"these never hit: {strikes}"


def assert_done(site: Site, output: Path, after: dict[str, Rows]) -> None:
    """As from scratch; and once older versions are given up, no reader sees more."""
    now = whole(output)
    for name in DIRECTORIES:
        assert_alike(now[name], after[name])
    assert not (output / RECEIPTS).exists()
    CuratedDataset.for_writing(str(output), {}).vacuum(0)
    for name in ("annotations", "pairs"):
        assert plain_ids(output / name) == sorted(after[name])
    assert len(now["annotations"]) == len(site.images)
