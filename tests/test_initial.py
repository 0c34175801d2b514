"""Initial weights: what our network computes with them is what transformers' ViT, DeiT and BERT compute."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    BertModel,
    BlipConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from capfilt.errors import CheckpointError, SpecError
from capfilt.fingerprints import weight_files
from capfilt.models.blip import resize_positions
from capfilt.models.checkpoints import locate, quiet
from capfilt.models.initial import blip_config, initial_med
from capfilt.models.tokenizer import bert_tokenizer, token_ids
from capfilt.spec import ARCHITECTURES, Architecture, LocalCheckpoint, TextTower, VisionTower

torch.set_num_threads(1)

TINY = Architecture(
    vision=VisionTower(width=24, depth=2, heads=3, mlp=40, patch=8, drop_path=0.1),
    text=TextTower(width=16, depth=2, heads=4, mlp=36, positions=20, dropout=0.2),
    joint=12,
)
SIDE = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square"]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
MODES = {**VOCABULARY, "[DEC]": 10, "[ENC]": 11}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": SIDE,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
BERT = {
    "vocab_size": 10,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return bert_tokenizer(VOCABULARY)


def drawn(model: Any, seed: int = 0) -> Any:
    """A model in which no weight is 0 or 1, and none small: what a mapping mixes up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def saved(model: Any, directory: Path, **how: Any) -> Path:
    with quiet():
        model.save_pretrained(directory, **how)
    return directory


def started(
    tokenizer: Tokenizer,
    vision: Path | None = None,
    text: Path | None = None,
    size: int = SIDE,
    allow_pickle: bool = False,
    seed: int = 5,
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return initial_med(TINY, size, tokenizer, generator, vision=vision, text=text, allow_pickle=allow_pickle).eval()


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reconfigure(directory: Path, **changes: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def pixels(size: int = SIDE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- configuration ---


def test_base_is_blip(tokenizer: Tokenizer) -> None:
    """configs/med_config.json and models/vit.py; where the hub's checkpoints agree with them, they are the witness."""
    config = blip_config(ARCHITECTURES["base"], 224, tokenizer)
    text, vision = config.text_config, config.vision_config
    assert (text.num_attention_heads, text.num_hidden_layers, text.hidden_size) == (12, 12, 768)
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (text.layer_norm_eps, text.intermediate_size, text.max_position_embeddings) == (1e-12, 3072, 512)
    assert (text.label_smoothing, config.label_smoothing) == (0.0, 0.0)
    assert (vision.layer_norm_eps, vision.initializer_range, vision.attention_dropout) == (1e-6, 0.02, 0.0)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (224, 16, 12)
    assert config.image_text_hidden_size == 256
    assert blip_config(ARCHITECTURES["large"], 384, tokenizer).text_config.encoder_hidden_size == 1024


@pytest.mark.parametrize("vocabulary", [VOCABULARY, MODES], ids=["bert", "with modes"])
def test_ids_are_what_the_curator_reads(vocabulary: dict[str, int], tmp_path: Path) -> None:
    words = bert_tokenizer(vocabulary)
    config = blip_config(TINY, SIDE, words)
    config.save_pretrained(tmp_path)
    with quiet():
        text = BlipConfig.from_pretrained(tmp_path).text_config
    assert token_ids(words, text, tmp_path) == {"dec": 10, "enc": 11, "cls": 2, "sep": 3, "pad": 0}
    assert (text.vocab_size, text.eos_token_id) == (12, 3)


@pytest.mark.parametrize("lost", ["[CLS]", "[DEC]", "[ENC]"])
def test_a_tokenizer_without_a_special_token(lost: str) -> None:
    words = bert_tokenizer({word: number for word, number in MODES.items() if word != lost})
    with pytest.raises(CheckpointError, match=rf"lacks \{lost}"):
        blip_config(TINY, SIDE, words)


def test_image_size_of_whole_patches(tokenizer: Tokenizer) -> None:
    with pytest.raises(SpecError, match=r"image_size: 33 .* architecture.vision.patch, 8"):
        blip_config(TINY, 33, tokenizer)


def test_random_start(tokenizer: Tokenizer) -> None:
    first, again, other = (started(tokenizer, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    words = "text_encoder.embeddings.word_embeddings.weight"
    assert not torch.equal(first[words], other[words])
    assert 0.015 < first["vision_model.embeddings.position_embedding"].std() < 0.02
    assert started(tokenizer).vision_model.encoder["layers"][1].drop_path == 0.1


# --- vision ---


@pytest.mark.parametrize("model", [ViTModel, ViTForImageClassification])
def test_vit(model: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = drawn(model(ViTConfig(**VIT)))
    network = started(tokenizer, vision=saved(theirs, tmp_path))
    with torch.no_grad():
        expected = getattr(theirs, "vit", theirs)(pixels()).last_hidden_state
        seen = network.vision_model(pixels())
    assert seen.std() > 0.1
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


def test_vit_at_another_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Positions are interpolated once, here as transformers does at every forward pass."""
    theirs = drawn(ViTModel(ViTConfig(**VIT)))
    network = started(tokenizer, vision=saved(theirs, tmp_path), size=56)
    assert network.vision_model.embeddings.position_embedding.shape == (1, 50, 24)
    with torch.no_grad():
        expected = theirs(pixels(56), interpolate_pos_encoding=True).last_hidden_state
        seen = network.vision_model(pixels(56))
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", [DeiTModel, DeiTForImageClassificationWithTeacher])
def test_distilled_deit_without_its_second_token(model: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The reference is transformers' ViT with what is left of the DeiT: [CLS] and patches see no second token."""
    theirs = drawn(model(DeiTConfig(**VIT)))
    state = dict(getattr(theirs, "deit", theirs).state_dict())
    del state["embeddings.distillation_token"]
    positions = state["embeddings.position_embeddings"]
    assert positions.shape[1] == 18
    kept = [0, *range(2, 18)]
    state["embeddings.position_embeddings"] = positions[:, kept]
    reference = ViTModel(ViTConfig(**VIT), add_pooling_layer=False).eval()
    reference.load_state_dict({name: weight for name, weight in state.items() if not name.startswith("pooler.")})
    network = started(tokenizer, vision=saved(theirs, tmp_path))
    with torch.no_grad():
        expected = reference(pixels()).last_hidden_state
        torch.testing.assert_close(network.vision_model(pixels()), expected, atol=1e-5, rtol=0)


def test_distilled_deit_at_another_size(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = drawn(DeiTModel(DeiTConfig(**VIT)))
    network = started(tokenizer, vision=saved(theirs, tmp_path), size=48)
    kept = theirs.embeddings.position_embeddings.detach()[:, [0, *range(2, 18)]]
    assert torch.equal(network.vision_model.embeddings.position_embedding, resize_positions(kept, 6))


def test_the_text_does_not_depend_on_the_vision(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = started(tokenizer).state_dict()
    network = started(tokenizer, vision=saved(drawn(ViTModel(ViTConfig(**VIT))), tmp_path)).state_dict()
    for name in plain:
        assert torch.equal(plain[name], network[name]) != name.startswith("vision_model."), name


# --- text ---


def texts() -> tuple[Tensor, Tensor]:
    """Ids and mask; the second text is padded."""
    ids = torch.tensor([[2, 5, 6, 8, 5, 7, 9, 3], [2, 5, 7, 9, 3, 0, 0, 0]])
    return ids, (ids != 0).long()


@torch.no_grad()
def without_types(model: Any) -> Any:
    model.base_model.embeddings.token_type_embeddings.weight.zero_()
    return model


@pytest.mark.parametrize("model", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_text_encoder(model: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """BLIP's embeddings have no token types, and its authors drop BERT's: the reference is BERT with those at zero."""
    theirs = drawn(model(BertConfig(**BERT)))
    network = started(tokenizer, text=saved(theirs, tmp_path))
    ids, mask = texts()
    real = mask.bool()
    with torch.no_grad():
        hidden = network.text_encoder(ids, mask)[real]
        with_types = theirs.base_model(ids, mask).last_hidden_state[real]
        expected = without_types(theirs).base_model(ids, mask).last_hidden_state[real]
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
    assert (hidden - with_types).abs().max() > 0.01


@pytest.mark.parametrize("model", [BertForMaskedLM, BertForPreTraining])
def test_decoder_and_its_head(model: Any, tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = without_types(drawn(model(BertConfig(**BERT))))
    directory = saved(theirs, tmp_path)
    network = started(tokenizer, text=directory)
    with quiet():
        reference = BertLMHeadModel.from_pretrained(directory, is_decoder=True).eval()
    ids, _ = texts()
    with torch.no_grad():
        expected = reference(ids[:1]).logits
        decoder = network.text_decoder
        logits = decoder.logits(decoder.bert(ids[:1], causal=True))
    torch.testing.assert_close(logits[..., :10], expected, atol=1e-5, rtol=0)
    assert logits.shape[-1] == 12


def test_what_bert_does_not_have_is_random(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = drawn(BertForMaskedLM(BertConfig(**BERT)))
    plain = started(tokenizer).state_dict()
    network = started(tokenizer, text=saved(theirs, tmp_path))
    state = network.state_dict()
    own = ("vision_model.", "vision_proj.", "text_proj.", "itm_head.")
    for name in plain:
        kept = name.startswith(own) or ".crossattention." in name
        assert torch.equal(plain[name], state[name]) == kept, name
    words = "text_encoder.embeddings.word_embeddings.weight"
    assert torch.equal(state[words][:10], theirs.bert.embeddings.word_embeddings.weight)
    assert torch.equal(state[words][10:], plain[words][10:])
    assert state["text_decoder.cls.predictions.bias"][10:].tolist() == [0, 0]
    encoder, decoder = network.text_encoder.layers[1], network.text_decoder.bert.layers[1]
    assert torch.equal(encoder.attention.self["query"].weight, decoder.attention.self["query"].weight)
    assert encoder.attention.self["query"].weight is not decoder.attention.self["query"].weight
    assert encoder.crossattention is decoder.crossattention


def test_bert_without_a_head_leaves_the_decoders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    network = started(tokenizer, text=saved(drawn(BertModel(BertConfig(**BERT))), tmp_path)).state_dict()
    plain = started(tokenizer).state_dict()
    for name in ("transform.dense.weight", "transform.LayerNorm.weight", "bias"):
        assert torch.equal(
            network[f"text_decoder.cls.predictions.{name}"], plain[f"text_decoder.cls.predictions.{name}"]
        )


def test_bert_that_knows_the_two_tokens(tmp_path: Path) -> None:
    theirs = drawn(BertModel(BertConfig(**{**BERT, "vocab_size": 12})))
    network = started(bert_tokenizer(MODES), text=saved(theirs, tmp_path))
    assert torch.equal(network.text_encoder.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight)


def test_names_of_2018(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """bert-base-uncased's norms have gamma and beta, and its file both names of the word embeddings."""

    def age(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "LayerNorm" in name]:
            weights[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = (
                weights.pop(name)
            )
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
        weights["bert.embeddings.position_ids"] = torch.arange(20)[None]

    new = saved(drawn(BertForPreTraining(BertConfig(**BERT))), tmp_path / "new")
    old = edit(shutil.copytree(new, tmp_path / "old"), age)
    state, aged = (started(tokenizer, text=directory).state_dict() for directory in (new, old))
    assert all(torch.equal(state[name], aged[name]) for name in state)


def test_shards_and_half_precision(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = drawn(BertForMaskedLM(BertConfig(**BERT))).to(torch.bfloat16)
    directory = saved(theirs, tmp_path, max_shard_size="4KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    network = started(tokenizer, text=directory)
    words = network.text_encoder.embeddings.word_embeddings.weight
    assert words.dtype == torch.float32
    assert torch.equal(words[:10], theirs.bert.embeddings.word_embeddings.weight.float())


# --- refusals ---


def lose(name: str) -> Callable[[Path], object]:
    return lambda directory: edit(directory, lambda weights: weights.pop(name))


def stray(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({"encoder.layer.2.output.dense.bias": torch.zeros(24)}))


def rectangular(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({"embeddings.position_embeddings": torch.zeros(1, 13, 24)}))


def other_patch(directory: Path) -> None:
    name = "embeddings.patch_embeddings.projection.weight"
    edit(directory, lambda weights: weights.update({name: torch.zeros(24, 3, 16, 16)}))


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lose("encoder.layer.1.attention.attention.key.bias"),
            r"lacks encoder\.layer\.1\.attention\.attention\.key\.bias;",
        ),
        (lose("embeddings.position_embeddings"), r"lacks embeddings\.position_embeddings;"),
        (stray, r"has also encoder\.layer\.2\.output\.dense\.bias;"),
        (rectangular, "12 patches, which are no square grid"),
        (other_patch, r"projection\.weight is \[24, 3, 16, 16\], but the architecture's is \[24, 3, 8, 8\]"),
        (truncate, r"model\.safetensors: truncated or not safetensors"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no weights"),
        (lambda directory: (directory / "config.json").write_text("{"), r"config\.json: not a model configuration"),
        (lambda directory: (directory / "config.json").write_text("3"), r"config\.json: not a model configuration"),
        (lambda directory: reconfigure(directory, num_attention_heads=4), "num_attention_heads is 4, expected 3"),
        (lambda directory: reconfigure(directory, hidden_act="gelu_new"), "hidden_act is gelu_new, expected gelu"),
        (lambda directory: reconfigure(directory, model_type="bert"), "model_type is bert, expected vit or deit"),
    ],
)
def test_refused_vision(spoil: Callable[[Path], object], message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = saved(drawn(ViTModel(ViTConfig(**VIT))), tmp_path / "vit")
    spoil(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        started(tokenizer, vision=directory)
    assert str(directory) in str(error.value)


def untie(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({"cls.predictions.decoder.weight": torch.zeros(10, 16)}))


def headless(directory: Path) -> None:
    edit(directory, lambda weights: weights.pop("cls.predictions.transform.dense.bias"))


def other_words(directory: Path) -> None:
    (directory / "vocab.txt").write_text("\n".join([*WORDS[:-2], WORDS[-1], WORDS[-2]]))


def more_words(directory: Path) -> None:
    edit(directory, lambda weights: weights.update({"bert.embeddings.word_embeddings.weight": torch.zeros(11, 16)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (untie, "word_embeddings.weight and cls.predictions.decoder.weight differ"),
        (headless, r"lacks cls\.predictions\.transform\.dense\.bias;"),
        (other_words, "2 tokens have another id or none, 'square' for one|2 tokens .* 'circle' for one"),
        (more_words, r"word_embeddings\.weight is \[11, 16\], but the architecture's is \[12, 16\]"),
        (lambda directory: reconfigure(directory, model_type="roberta"), "model_type is roberta, expected bert"),
        (
            lambda directory: reconfigure(directory, position_embedding_type="relative_key"),
            "position_embedding_type is relative_key",
        ),
    ],
)
def test_refused_text(spoil: Callable[[Path], object], message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = saved(drawn(BertForMaskedLM(BertConfig(**BERT))), tmp_path / "bert")
    spoil(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        started(tokenizer, text=directory)
    assert str(directory) in str(error.value)


def test_its_own_vocabulary_is_welcome(tmp_path: Path) -> None:
    directory = saved(drawn(BertForMaskedLM(BertConfig(**BERT))), tmp_path)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    for vocabulary in (VOCABULARY, MODES):
        started(bert_tokenizer(vocabulary), text=directory)


def to_pickle(directory: Path) -> Path:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def test_pickles_only_where_allowed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    theirs = drawn(ViTModel(ViTConfig(**VIT)))
    directory = to_pickle(saved(theirs, tmp_path / "vit"))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle, which is not allowed"):
        started(tokenizer, vision=directory)
    network = started(tokenizer, vision=directory, allow_pickle=True)
    assert torch.equal(network.vision_model.post_layernorm.weight, theirs.layernorm.weight)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("hacked",))


def test_a_pickle_runs_no_code(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = to_pickle(saved(drawn(ViTModel(ViTConfig(**VIT))), tmp_path / "vit"))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="the weights do not load"):
        started(tokenizer, vision=directory, allow_pickle=True)
    assert not (tmp_path / "hacked").exists()


# --- where from ---


def test_a_local_checkpoint_needs_no_tokenizer(tmp_path: Path) -> None:
    directory = saved(ViTModel(ViTConfig(**VIT)), tmp_path / "vit")
    assert locate(LocalCheckpoint(path=str(directory)), False, weight_files) == directory
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        locate(LocalCheckpoint(path=str(tmp_path / "absent")), False, weight_files)


def test_the_hubs_cache(tmp_path: Path) -> None:
    """A cache that holds the revision is enough; pickles where allowed; else an error that says what to do."""
    revision = "a" * 40
    cached = saved(ViTModel(ViTConfig(**VIT)), tmp_path / "models--owner--cached" / "snapshots" / revision)
    pickled = to_pickle(shutil.copytree(cached, tmp_path / "models--owner--pickled" / "snapshots" / revision))
    script = """
from capfilt.errors import CheckpointError
from capfilt.fingerprints import weight_files
from capfilt.models.checkpoints import locate
from capfilt.spec import HubCheckpoint
for name, pickles in (("cached", False), ("cached", True), ("pickled", True), ("absent", True), ("absent", False)):
    try:
        print(locate(HubCheckpoint(hub=f"owner/{name}", revision="a" * 40), pickles, weight_files))
    except CheckpointError as error:
        print("refused", str(error).replace(chr(10), " "))
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=True)
    said = run.stdout.splitlines()
    assert said[:3] == [str(cached), str(cached), str(pickled)]
    for line in said[3:]:
        assert line.startswith(f"refused owner/absent at {revision} is not in the cache")
        assert f"hf download owner/absent --revision {revision} --local-dir DIR" in line
    assert "allow_pickle" not in said[3]
    assert said[4].endswith("allow_pickle: true.")
