"""Whole runs with models other than BLIP, alone and beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import ChatServer
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import HashCaptioner
from tiny_models import write_blip2, write_clip, write_llava, write_siglip

from capfilt.models.checkpoints import quiet
from capfilt.models.dual import DualFilter
from capfilt.models.generator import GeneratorCaptioner
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.pipelines.job import load_models
from capfilt.plan import Stage
from capfilt.spec import (
    CurateSpec,
    DualCard,
    EndpointCard,
    FilterCard,
    GeneratorCard,
    LocalCheckpoint,
    Sampling,
    SamplingOverride,
)
from capfilt.spec.kinds import DualThresholds
from capfilt.text import clean

SAMPLING = Sampling(candidates=2, min_tokens=2, max_tokens=6)


def run(spec: CurateSpec, load: Any = load_models, execute: Any = in_process) -> Summary:
    return curate(spec, load=load, execute=execute, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Cards by name."""
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        paths = {
            "blip2": write_blip2(folder / "blip2"),
            "llava": write_llava(folder / "llava"),
            "clip": write_clip(folder / "clip"),
            "siglip": write_siglip(folder / "siglip"),
            "blip": write_tiny_pair(folder / "blip")[1],
        }
    at = {name: LocalCheckpoint(path=str(path)) for name, path in paths.items()}
    own: dict[str, Any] = {"role": "captioner", "model": "transformers", "batch_size": 5}
    judge: dict[str, Any] = {"role": "filter", "thresholds": DualThresholds(web=0.05, synthetic=0.05), "batch_size": 5}
    longer = SamplingOverride(max_tokens=9)
    return {
        "blip2": GeneratorCard(name="blip2", checkpoint=at["blip2"], prompt="a picture of", **own),
        "llava": GeneratorCard(
            name="llava", checkpoint=at["llava"], prompt="describe", chat=True, sampling=longer, **own
        ),
        "clip": DualCard(name="clip", model="clip", checkpoint=at["clip"], **judge),
        "siglip": DualCard(name="siglip", model="siglip", checkpoint=at["siglip"], unit="probability", **judge),
        "blip": FilterCard(role="filter", name="blip", checkpoint=at["blip"], image_size=32, batch_size=5),
    }


@pytest.fixture
def web(tmp_path: Path) -> list[bytes | None]:
    """17 rows, of which one has a broken image and one none."""
    images: list[bytes | None] = [jpeg(n, 24 + 8 * (n % 3)) for n in range(17)]
    images[3], images[11] = b"\xff\xd8\xff garbage", None
    write_shard(tmp_path / "in" / "0.parquet", images, [f"a red dog {n}" for n in range(17)])
    return images


def texts(output: str) -> list[list[dict[str, Any]]]:
    return [row["texts"] for row in read(output)]


def test_a_run_does_what_its_models_do(make_spec: MakeSpec, web: list[bytes | None], models: dict[str, Any]) -> None:
    """Two captioners and three filters of five kinds, in one actor."""
    from capfilt.images import decode
    from capfilt.spec import Images

    spec = make_spec(
        captioners=(models["blip2"], models["llava"]),
        filters=(models["blip"], models["clip"], models["siglip"]),
        decision="vote",
        sampling=SAMPLING,
        fragment_rows=7,
        report=True,
    )
    summary = run(spec)
    assert (summary.counts.rows, summary.counts.errors) == (17, 1)
    assert (summary.report, summary.report_error) == ("report.html", None)
    captioners = [
        GeneratorCaptioner(models[name], models[name].sampled(SAMPLING), "cpu") for name in ("blip2", "llava")
    ]
    clip = DualFilter(models["clip"], "cpu")
    lengths: dict[str, set[int]] = {"blip2": set(), "llava": set()}
    for row, image in zip(read(spec.output), web, strict=True):
        if row["status"] == "error" or image is None:
            continue
        rgb, sha256 = decode(image, Images()).rgb, row["image_sha256"]
        expected = [c.caption([c.prepare(rgb, sha256)], [sha256])[0] for c in captioners]
        assert [text["text"] for text in row["texts"][1:]] == [text for own in expected for text in own]
        judged = clip.score([clip.prepare(rgb, sha256)], [[clean(text["text"]) for text in row["texts"]]])[0]
        for text, (score, cosine) in zip(row["texts"], judged, strict=True):
            if not clean(text["text"]):  # marks alone
                assert (text["scores"], text["reason"]) == ([], "empty_text")
                continue
            assert [one["filter"] for one in text["scores"]] == ["blip", "clip", "siglip"]
            assert text["scores"][1]["itm"] == pytest.approx(score, abs=1e-5)
            assert text["scores"][1]["itc"] == pytest.approx(cosine, abs=1e-5)
            ayes = (text["scores"][0]["itm"] >= 0.5) + sum(one["itm"] >= 0.05 for one in text["scores"][1:])
            assert (text["reason"] == "below_threshold") == (ayes < 2)
        for text in row["texts"][1:]:
            lengths[text["captioner"]].add(len(text["text"].split()))
    assert max(lengths["blip2"]) <= 6 < max(lengths["llava"]) <= 9


def test_another_filter_scores_the_captions_on_record(
    make_spec: MakeSpec, web: list[bytes | None], models: dict[str, Any]
) -> None:
    spec = make_spec(captioners=(models["blip2"],), filters=(models["clip"],), sampling=SAMPLING)
    run(spec)
    before = texts(spec.output)
    summary = run(spec.model_copy(update={"filters": (models["siglip"],)}))
    assert list(summary.stages) == [Stage.SCORE]
    after = texts(spec.output)
    assert [[text["text"] for text in own] for own in after] == [[text["text"] for text in own] for own in before]
    assert {one["filter"] for own in after for text in own for one in text["scores"]} == {"siglip"}
    assert len(web) == len(after)


class Fussy:
    """A filter that cannot take pictures which are 32 pixels wide."""

    image_size, batch_size = None, 8

    def prepare(self, rgb: np.ndarray[Any, Any], sha256: str) -> str:
        if rgb.shape[1] == 32:
            raise ValueError("cannot infer\nthe channels")
        return sha256

    def score(self, images: Sequence[str], texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        assert all(len(one) == 64 for one in images)
        return [[(0.5, 0.0)] * len(own) for own in texts]


def test_a_picture_that_a_processor_cannot_take_costs_its_row(make_spec: MakeSpec, web: list[bytes | None]) -> None:
    def load(spec: CurateSpec, _device: str) -> Any:
        return [HashCaptioner(card, spec.sampling) for card in spec.captioners], [Fussy() for _ in spec.filters]

    spec = make_spec(max_error_fraction=1.0)
    run(spec, load)
    for n, row in enumerate(read(spec.output)):
        if n % 3 == 1:
            assert (row["status"], row["reason"]) == ("error", "model_error")
            assert row["detail"] == "filter stub-filter: ValueError: cannot infer the channels"
        elif n not in (3, 11):
            assert row["status"] == "kept"
    assert len(web) == 17


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_actors_on_ray_do_the_same(
    make_spec: MakeSpec, tmp_path: Path, web: list[bytes | None], models: dict[str, Any]
) -> None:
    with ChatServer() as server:
        remote = EndpointCard(
            role="captioner",
            model="openai",
            name="remote",
            base_url=server.url,
            served_model="m",
            prompt="Describe.",
            concurrency=4,
        )
        spec = make_spec(
            captioners=(models["llava"], models["blip2"], remote),
            filters=(models["clip"],),
            sampling=SAMPLING,
            fragment_rows=4,
        )
        plain = spec.model_copy(update={"output": str(tmp_path / "plain"), "fragment_rows": 40})
        run(plain)
        two = [
            card.model_copy(update={"placement": card.placement.model_copy(update={"max_actors": 2})})
            for card in spec.captioners
        ]
        assert run(spec.model_copy(update={"captioners": tuple(two)}), execute=None).counts.rows == len(web)
    written, expected = texts(spec.output), texts(plain.output)
    assert [[text["text"] for text in own] for own in written] == [[text["text"] for text in own] for own in expected]
    for own, other in zip(written, expected, strict=True):
        assert [text["itm"] for text in own] == pytest.approx([text["itm"] for text in other], abs=1e-5)
