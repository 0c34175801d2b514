"""The authors' `.pth` files, made here under the names of salesforce/BLIP (models/vit.py, models/med.py)."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from capfilt.errors import CheckpointError
from capfilt.models.authors import fill_from, read
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork
from capfilt.models.checkpoints import load
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import CaptionerCard, LocalCheckpoint

WORDS, TEXT, VISION, JOINT, POSITIONS = 21, 12, 8, 6, 10


def config(image_size: int = 24) -> BlipConfig:
    text = BlipTextConfig(
        vocab_size=WORDS,
        hidden_size=TEXT,
        encoder_hidden_size=VISION,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    vision = BlipVisionConfig(
        hidden_size=VISION,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
    )
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=JOINT)


class Made:
    """Random weights by the authors' names."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.state: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int) -> None:
        self.state[name] = torch.randn(shape, generator=self.generator)

    def linear(self, name: str, out: int, into: int) -> None:
        self.add(f"{name}.weight", out, into)
        self.add(f"{name}.bias", out)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width)
        self.add(f"{name}.bias", width)

    def vit(self, name: str = "visual_encoder") -> Made:
        self.add(f"{name}.cls_token", 1, 1, VISION)
        self.add(f"{name}.pos_embed", 1, 10, VISION)
        self.add(f"{name}.patch_embed.proj.weight", VISION, 3, 8, 8)
        self.add(f"{name}.patch_embed.proj.bias", VISION)
        for block in range(3):
            at = f"{name}.blocks.{block}"
            self.norm(f"{at}.norm1", VISION)
            self.linear(f"{at}.attn.qkv", 3 * VISION, VISION)
            self.linear(f"{at}.attn.proj", VISION, VISION)
            self.norm(f"{at}.norm2", VISION)
            self.linear(f"{at}.mlp.fc1", 20, VISION)
            self.linear(f"{at}.mlp.fc2", VISION, 20)
        self.norm(f"{name}.norm", VISION)
        return self

    def bert(self, name: str) -> Made:
        self.state[f"{name}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        self.add(f"{name}.embeddings.word_embeddings.weight", WORDS, TEXT)
        self.add(f"{name}.embeddings.position_embeddings.weight", POSITIONS, TEXT)
        self.norm(f"{name}.embeddings.LayerNorm", TEXT)
        for layer in range(2):
            at = f"{name}.encoder.layer.{layer}"
            for attention, read_width in (("attention", TEXT), ("crossattention", VISION)):
                self.linear(f"{at}.{attention}.self.query", TEXT, TEXT)
                self.linear(f"{at}.{attention}.self.key", TEXT, read_width)
                self.linear(f"{at}.{attention}.self.value", TEXT, read_width)
                self.linear(f"{at}.{attention}.output.dense", TEXT, TEXT)
                self.norm(f"{at}.{attention}.output.LayerNorm", TEXT)
            self.linear(f"{at}.intermediate.dense", 16, TEXT)
            self.linear(f"{at}.output.dense", TEXT, 16)
            self.norm(f"{at}.output.LayerNorm", TEXT)
        return self

    def decoder(self) -> Made:
        self.bert("text_decoder.bert")
        self.linear("text_decoder.cls.predictions.transform.dense", TEXT, TEXT)
        self.norm("text_decoder.cls.predictions.transform.LayerNorm", TEXT)
        self.add("text_decoder.cls.predictions.bias", WORDS)
        at = "text_decoder.cls.predictions.decoder"
        self.state[f"{at}.weight"] = self.state["text_decoder.bert.embeddings.word_embeddings.weight"]
        self.state[f"{at}.bias"] = self.state["text_decoder.cls.predictions.bias"]
        return self

    def heads(self, twin: str = "") -> Made:
        self.linear(f"vision_proj{twin}", JOINT, VISION)
        self.linear(f"text_proj{twin}", JOINT, TEXT)
        if not twin:
            self.linear("itm_head", 2, TEXT)
        return self

    def twin(self, *pointers: str) -> Made:
        self.vit("visual_encoder_m").bert("text_encoder_m").heads("_m")
        for name in ("image_queue", "text_queue"):
            self.add(name, JOINT, 30)
        for name in pointers:
            self.state[name] = torch.zeros(1, dtype=torch.int64)
        self.state["temp"] = torch.tensor(0.07)
        return self


def captioning() -> dict[str, Tensor]:
    return Made().vit().decoder().state


def retrieval() -> dict[str, Tensor]:
    return Made().vit().bert("text_encoder").heads().twin("idx_queue", "ptr_queue").state


def pretraining() -> dict[str, Tensor]:
    return Made().vit().bert("text_encoder").heads().decoder().twin("queue_ptr").state


def write(path: Path, state: Any) -> Path:
    torch.save({"model": state, "optimizer": {"state": {}, "lr": 1e-5}, "config": {"vit": "base"}, "epoch": 4}, path)
    return path


SOME = {  # by hand, one of each row of the table
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual_encoder.blocks.2.norm1.weight": "vision_model.encoder.layers.2.layer_norm1.weight",
    "visual_encoder.blocks.2.attn.qkv.bias": "vision_model.encoder.layers.2.self_attn.qkv.bias",
    "visual_encoder.blocks.1.attn.proj.weight": "vision_model.encoder.layers.1.self_attn.projection.weight",
    "visual_encoder.blocks.0.norm2.bias": "vision_model.encoder.layers.0.layer_norm2.bias",
    "visual_encoder.blocks.0.mlp.fc1.weight": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "visual_encoder.blocks.0.mlp.fc2.weight": "vision_model.encoder.layers.0.mlp.fc2.weight",
    "visual_encoder.norm.weight": "vision_model.post_layernorm.weight",
}
DECODER = {
    name: name
    for name in (
        "text_decoder.bert.embeddings.word_embeddings.weight",
        "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight",
        "text_decoder.bert.encoder.layer.0.output.LayerNorm.bias",
        "text_decoder.cls.predictions.transform.dense.weight",
        "text_decoder.cls.predictions.bias",
    )
}
ENCODER = {
    name: name
    for name in (
        "text_encoder.embeddings.LayerNorm.weight",
        "text_encoder.encoder.layer.1.attention.self.query.weight",
        "vision_proj.weight",
        "text_proj.bias",
        "itm_head.weight",
    )
}


@pytest.mark.parametrize(
    ("made", "kind", "names"),
    [
        (captioning, CaptioningNetwork, DECODER),
        (pretraining, CaptioningNetwork, DECODER),
        (retrieval, RetrievalNetwork, ENCODER),
        (pretraining, RetrievalNetwork, ENCODER),
    ],
)
def test_every_weight_finds_its_place(made: Any, kind: Any, names: dict[str, str], tmp_path: Path) -> None:
    state = made()
    network = kind(config())
    fill_from(network, write(tmp_path / "model.pth", state))  # strictly: none is missing
    own = network.state_dict()
    for theirs, ours in {**SOME, **names}.items():
        assert torch.equal(own[ours], state[theirs]), theirs
    # each of our weights is one of theirs, and no two the same but for the tied
    whose = {ours: [name for name, weight in state.items() if torch.equal(weight, own[ours])] for ours in own}
    assert all(whose.values())
    assert len({names[0] for names in whose.values()}) == len(dict(network.named_parameters()))


def test_what_only_training_needs_is_apart(tmp_path: Path) -> None:
    weights = read(write(tmp_path / "model.pth", pretraining()))
    assert {"image_queue", "text_queue", "queue_ptr", "temp"} < weights.rest.keys()
    assert weights.rest["temp"] == pytest.approx(0.07)
    of_twin = {name.split(".")[0] for name in weights.rest if "_m." in name}
    assert of_twin == {"visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m"}
    assert not any("_m." in name or "position_ids" in name or "queue" in name for name in weights.ours)
    assert len(weights.ours) + len(weights.rest) == len(pretraining())
    assert {"idx_queue", "ptr_queue"} < read(write(tmp_path / "model.pth", retrieval())).rest.keys()


def test_positions_of_another_grid_are_interpolated(tmp_path: Path) -> None:
    """As models/vit.py does it, interpolate_pos_embed: 24 px to 40 px here, 224 to 384 in BLIP."""
    state = captioning()
    network = CaptioningNetwork(config(image_size=40))
    fill_from(network, write(tmp_path / "model.pth", state))
    learnt = state["visual_encoder.pos_embed"]
    grid = learnt[:, 1:].reshape(-1, 3, 3, VISION).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    expected = torch.cat((learnt[:, :1], resized), dim=1)
    assert torch.allclose(network.vision_model.embeddings.position_embedding, expected, atol=1e-6)


def test_weights_alone_are_enough(tmp_path: Path) -> None:
    torch.save(captioning(), tmp_path / "model.pth")
    fill_from(CaptioningNetwork(config()), tmp_path / "model.pth")


def test_the_recipe_of_the_documentation_makes_a_checkpoint_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/checkpoints.md, with a tiny checkpoint in place of the published one."""
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    (recipe,) = re.findall(r"^<!-- tested: pth -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    base, _ = write_tiny_pair(tmp_path / "pair")
    (tmp_path / "checkpoints").mkdir()
    base.rename(tmp_path / "checkpoints" / "blip-image-captioning-base")
    own = CaptioningNetwork(BlipConfig.from_pretrained("checkpoints/blip-image-captioning-base"))
    state = {theirs_of(name): weight for name, weight in own.state_dict().items()}
    write(tmp_path / "model_base_caption_capfilt_large.pth", state)
    exec(compile(recipe, "docs/checkpoints.md", "exec"), {})
    card = CaptionerCard(
        role="captioner",
        name="mine",
        image_size=32,
        checkpoint=LocalCheckpoint(path=str(tmp_path / "checkpoints/mine")),
    )
    loaded = load(card, "cpu").model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in own.state_dict().items())


def theirs_of(name: str) -> str:
    """The authors' name of a weight of ours; the inverse of capfilt.models.authors.NAMES."""
    for theirs, ours in (
        ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
        ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
        ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("visual_encoder.norm.", "vision_model.post_layernorm."),
        ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    ):
        name = name.replace(ours, theirs)
    for theirs, ours in (("attn.", "self_attn."), ("attn.proj.", "attn.projection."), ("norm", "layer_norm")):
        if name.startswith("visual_encoder.blocks."):
            name = name.replace(ours, theirs)
    return name


def untied(state: dict[str, Tensor]) -> None:
    state["text_decoder.cls.predictions.decoder.weight"] = torch.zeros(WORDS, TEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual_encoder.norm.bias"), "1 missing keys .*: vision_model.post_layernorm.bias$"),
        (lambda state: state.update({"text_decoder.x": torch.zeros(1)}), r"1 unexpected keys .*: text_decoder\.x$"),
        (lambda state: state.update({"visual_encoder.norm.bias": torch.zeros(3)}), "1 mismatched keys"),
        (
            lambda state: state.update({"cls_head.0.weight": torch.zeros(3)}),
            r"cls_head\.0\.weight is of no pretraining",
        ),
        (
            lambda state: state.update({"visual_encoder.head.weight": torch.zeros(3)}),
            r"head\.weight is of no pretraining",
        ),
        (lambda state: state.update({"note": "five"}), "expected tensors by name"),
        (untied, "in BLIP they are one"),
    ],
)
def test_other_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    state = captioning()
    change(state)
    file = write(tmp_path / "model.pth", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        fill_from(CaptioningNetwork(config()), file)
    assert str(caught.value).startswith(str(file))


class _Touch:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.file),)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    touched, bomb = tmp_path / "touched", tmp_path / "bomb.pth"
    torch.save({"model": captioning(), "args": _Touch(str(touched))}, bomb)
    with pytest.raises(CheckpointError, match="the weights do not load"):
        read(bomb)
    bomb.write_bytes(pickle.dumps(_Touch(str(touched))))
    with pytest.raises(CheckpointError, match="the weights do not load"):
        read(bomb)
    assert not touched.exists()
    pickle.loads(bomb.read_bytes())
    assert touched.exists()  # it was armed


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: the weights do not load"):
        read(tmp_path / "none.pth")
