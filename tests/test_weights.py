"""What config.json and the list of files say of a checkpoint, against what loading it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BlipConfig

from capfilt.errors import CapfiltError, CheckpointError, SpecError
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork
from capfilt.models.checkpoints import load
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import CaptionerCard, FilterCard, HubCheckpoint, LocalCheckpoint
from capfilt.weights import ARCHITECTURES, DEFAULT_PATCH, inspect


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def captioner(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A captioner of one's own, to break."""
    return shutil.copytree(pair[0], tmp_path / "captioner")


def captioner_card(path: Path, **fields: Any) -> CaptionerCard:
    card: dict[str, Any] = {"checkpoint": LocalCheckpoint(path=str(path)), "image_size": 32, **fields}
    return CaptionerCard(role="captioner", name="tiny", **card)


def filter_card(path: Path) -> FilterCard:
    return FilterCard(role="filter", name="tiny", checkpoint=LocalCheckpoint(path=str(path)), image_size=32)


def edit(**changes: Any) -> Callable[[Path], None]:
    """Sets fields of config.json; None takes one out."""

    def harm(path: Path) -> None:
        config = {**json.loads((path / "config.json").read_text()), **changes}
        (path / "config.json").write_text(
            json.dumps({name: value for name, value in config.items() if value is not None})
        )

    return harm


def rename_weights(name: str) -> Callable[[Path], Any]:
    return lambda path: (path / "model.safetensors").rename(path / name)


def pickled_shards(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_what_is_well_is_well(pair: tuple[Path, Path]) -> None:
    inspect(captioner_card(pair[0]))
    inspect(filter_card(pair[1]))
    inspect(captioner_card(pair[0], image_size=48))


HARM: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "captioner: no such directory"),
    (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
    (lambda path: (path / "model.safetensors").unlink(), "no weights"),
    (lambda path: (path / "config.json").write_text("{"), "config.json: not a model configuration"),
    (edit(vision_config=[1]), "config.json: not a model configuration"),
    (edit(model_type="bert"), r"config.json: a captioner is a BlipForConditionalGeneration; this is a Blip.* \(bert\)"),
    (edit(model_type=None), r"config.json: .* \(None\)"),
    (edit(architectures=["BlipForQuestionAnswering"]), r"config.json: .* this is a BlipForQuestionAnswering \(blip\)"),
    (edit(vision_config={"patch_size": [8, 8]}), r"config.json: vision_config.patch_size is \[8, 8\]"),
    (edit(vision_config={"patch_size": 0}), "config.json: vision_config.patch_size is 0"),
    (rename_weights("pytorch_model.bin"), r"pytorch_model\.bin: a pickle.*allow_pickle: true"),
    (pickled_shards, r"pytorch_model-00001-of-00001\.bin: a pickle.*allow_pickle: true"),
]


@pytest.mark.parametrize(("harm", "message"), HARM)
def test_what_cannot_be_used(captioner: Path, harm: Callable[[Path], Any], message: str) -> None:
    harm(captioner)
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect(captioner_card(captioner))
    assert str(captioner) in str(caught.value)


@pytest.mark.parametrize("config", ["", "[]", "null", '{"architectures": 3}', '{"vision_config": 3}'])
def test_what_is_no_configuration(captioner: Path, config: str) -> None:
    (captioner / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.json: not a model configuration"):
        inspect(captioner_card(captioner))


def test_the_other_roles_checkpoint(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="a captioner is a BlipForConditionalGeneration; this is a BlipForImageT"):
        inspect(captioner_card(pair[1]))
    with pytest.raises(CheckpointError, match="a filter is a BlipForImageTextRetrieval; this is a BlipForConditional"):
        inspect(filter_card(pair[0]))


@pytest.mark.parametrize(("size", "patch", "fits"), [(36, 8, 32), (8, 16, 16), (1023, 14, 1022)])
def test_an_image_size_that_is_no_multiple_of_the_patch_size(captioner: Path, size: int, patch: int, fits: int) -> None:
    edit(vision_config={"patch_size": patch})(captioner)
    with pytest.raises(
        SpecError, match=rf"tiny: image_size {size} is not a multiple of the patch size {patch} .*{fits}"
    ):
        inspect(captioner_card(captioner, image_size=size))
    inspect(captioner_card(captioner, image_size=fits))


def test_an_allowed_pickle(captioner: Path) -> None:
    rename_weights("pytorch_model.bin")(captioner)
    inspect(captioner_card(captioner, allow_pickle=True))


def test_what_a_configuration_leaves_out_is_transformers_default(captioner: Path) -> None:
    """A config.json need not say what it is (older ones do not), nor what transformers takes by default."""
    edit(architectures=None, vision_config=None)(captioner)
    inspect(captioner_card(captioner, image_size=2 * DEFAULT_PATCH))
    with pytest.raises(SpecError, match="patch size 16"):
        inspect(captioner_card(captioner, image_size=DEFAULT_PATCH + 8))


def test_the_names_and_defaults_are_the_loaders() -> None:
    assert {"captioner": CaptioningNetwork.architecture, "filter": RetrievalNetwork.architecture} == ARCHITECTURES
    assert BlipConfig().vision_config.patch_size == DEFAULT_PATCH


@pytest.mark.parametrize("harm", [harm for harm, _ in HARM])
def test_what_is_refused_does_not_load(captioner: Path, harm: Callable[[Path], Any]) -> None:
    """No good checkpoint is refused: loading refuses it as well."""
    harm(captioner)
    with pytest.raises(CapfiltError):
        load(captioner_card(captioner), "cpu")


def test_a_checkpoint_of_the_hub_is_looked_for_in_the_cache_alone(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # read when it is imported
    hub = HubCheckpoint(hub="owner/name", revision="a" * 40)
    wrong = captioner_card(tmp_path, checkpoint=hub)
    inspect(wrong)  # not there: the hub is asked at first use
    snapshot = tmp_path / "models--owner--name" / "snapshots" / hub.revision
    shutil.copytree(pair[1], snapshot)
    with pytest.raises(CheckpointError, match="this is a BlipForImageTextRetrieval"):
        inspect(wrong)
    right = FilterCard(role="filter", name="tiny", checkpoint=hub, image_size=32)
    inspect(right)
    rename_weights("pytorch_model.bin")(snapshot)
    with pytest.raises(CheckpointError, match="a pickle"):
        inspect(right)
    (snapshot / "pytorch_model.bin").unlink()
    inspect(right)  # there in part: the rest is fetched at first use
    with pytest.raises(SpecError, match="patch size 8"):
        inspect(right.model_copy(update={"image_size": 36}))
