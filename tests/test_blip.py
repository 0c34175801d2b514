"""The network against transformers' modules, and what training asks of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
)

from capfilt.errors import CheckpointError
from capfilt.models import blip
from capfilt.models.blip import (
    Cache,
    CaptioningNetwork,
    RetrievalNetwork,
    VisionLayer,
    VisionTransformer,
    fill,
    initialise,
    resize_positions,
)
from capfilt.models.checkpoints import load, quiet, save, write_processor
from capfilt.spec import CaptionerCard, FilterCard, LocalCheckpoint

torch.set_num_threads(1)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue dog cat sits on grass [DEC] [ENC]"
VOCABULARY = {word: number for number, word in enumerate(WORDS.split())}


def tiny(**text: Any) -> BlipConfig:
    """Text and images of different widths, depths and heads, so that none stands for another."""
    return BlipConfig(
        text_config=BlipTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            encoder_hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=VOCABULARY["[DEC]"],
            pad_token_id=VOCABULARY["[PAD]"],
            sep_token_id=VOCABULARY["[SEP]"],
            eos_token_id=VOCABULARY["[SEP]"],
            **text,
        ).to_dict(),
        vision_config=BlipVisionConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=24,
            patch_size=8,
            layer_norm_eps=1e-6,
        ).to_dict(),
        image_text_hidden_size=20,
    )


def published(size: str) -> BlipConfig:
    """BLIP's two sizes, at 224 px."""
    width, depth, heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(num_attention_heads=12, encoder_hidden_size=width)
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


@torch.no_grad()
def random_weights(network: nn.Module, seed: int = 0) -> None:
    """Weights of variance 1 / fan-in, biases and norms away from 0 and 1: nothing is hidden by what it multiplies."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(network.named_parameters()):
        most = 0.2 if weight.dim() < 2 else math.sqrt(3 / weight[0].numel())
        is_norm = weight.dim() < 2 and name.endswith("weight")
        weight.uniform_(-most, most, generator=generator).add_(1.0 if is_norm else 0.0)


class Pair(NamedTuple):
    """Of transformers' and ours, with the same weights."""

    their_captioner: Any
    our_captioner: CaptioningNetwork
    their_filter: Any
    our_filter: RetrievalNetwork
    side: int
    tolerance: float


@pytest.fixture(
    scope="module",
    params=["tiny", pytest.param("base", marks=pytest.mark.slow), pytest.param("large", marks=pytest.mark.slow)],
)
def pair(request: pytest.FixtureRequest) -> Pair:
    config = tiny() if request.param == "tiny" else published(request.param)
    made: list[Any] = []
    for theirs, ours in (
        (BlipForConditionalGeneration, CaptioningNetwork),
        (BlipForImageTextRetrieval, RetrievalNetwork),
    ):
        with torch.device("meta"):  # drawing weights twice takes longer than the tests
            reference, own = theirs(config), ours(config)
        reference = reference.to_empty(device="cpu")
        with quiet():
            reference.tie_weights()
        for module in reference.modules():
            if isinstance(getattr(module, "position_ids", None), Tensor):  # transformers' one buffer, now empty
                module.position_ids.copy_(torch.arange(module.position_ids.shape[-1]))
        random_weights(reference)
        own.load_state_dict(reference.state_dict(), assign=True)  # strictly; one memory
        made += [reference.eval(), own.eval()]
    return Pair(*made, side=config.vision_config.image_size, tolerance=1e-5 if request.param == "tiny" else 1e-4)


def pixels(images: int, side: int, seed: int = 1) -> Tensor:
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))


def ids(texts: int, tokens: int, seed: int = 2) -> Tensor:
    return torch.randint(1, len(VOCABULARY), (texts, tokens), generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 30 * tolerance, "nothing to compare"
    assert (ours - theirs).abs().max().item() < tolerance


@torch.inference_mode()
def test_vision_tokens_are_transformers(pair: Pair) -> None:
    for side in (pair.side, 40 if pair.side == 24 else 384):  # the second: positions between those learnt
        images = pixels(1, side)
        theirs = pair.their_captioner.vision_model(pixel_values=images, interpolate_pos_encoding=True)
        assert_close(pair.our_captioner.vision_model(images), theirs.last_hidden_state, pair.tolerance)


@torch.inference_mode()
def test_decoder_logits_are_transformers(pair: Pair) -> None:
    """Two images with two texts each; all tokens at once, then three and one at a time."""
    images, texts = pixels(2, pair.side), ids(4, 7)
    bert, decoder = pair.our_captioner.text_decoder.bert, pair.our_captioner.text_decoder
    seen = pair.our_captioner.vision_model(images)
    theirs = pair.their_captioner.text_decoder(
        input_ids=texts, encoder_hidden_states=seen.repeat_interleave(2, 0), use_cache=False
    ).logits
    look = bert.look(seen)
    assert_close(decoder.logits(bert(texts, image=look, causal=True)), theirs, pair.tolerance)
    cache = Cache(bert.config, 4, 7, seen)
    steps = [bert(part, image=look, causal=True, cache=cache) for part in texts.split([3, 1, 1, 1, 1], 1)]
    assert cache.length == 7
    assert_close(decoder.logits(torch.cat(steps, 1)), theirs, pair.tolerance)


@torch.inference_mode()
def test_padding_is_transformers(pair: Pair) -> None:
    texts, mask = ids(3, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 2 + [1] * 2])
    bert = pair.our_captioner.text_decoder.bert
    for causal in (True, False):
        theirs = pair.their_captioner.text_decoder.bert(
            input_ids=texts, attention_mask=mask, is_decoder=causal, use_cache=False
        ).last_hidden_state
        assert_close(bert(texts, mask, causal=causal)[mask.bool()], theirs[mask.bool()], pair.tolerance)
    unmasked = bert(texts, causal=True)  # a decoder needs no mask: nothing reads what comes after it
    assert_close(unmasked[1, :4], bert(texts, mask, causal=True)[1, :4], pair.tolerance)


@torch.inference_mode()
def test_itm_and_itc_are_transformers(pair: Pair) -> None:
    images, texts, mask = pixels(2, pair.side), ids(6, 5), torch.ones(6, 5)
    mask[1:4, 3:] = 0
    ours, theirs = pair.our_filter, pair.their_filter
    seen = ours.vision_model(images)
    repeated = images.repeat_interleave(3, 0)
    expected = theirs(input_ids=texts, pixel_values=repeated, attention_mask=mask).itm_score
    for first in (False, True):
        hidden = ours.text_encoder(texts, mask, ours.text_encoder.look(seen), first=first)
        assert hidden.shape[1] == (1 if first else 5)
        assert_close(ours.match(hidden), expected, pair.tolerance)
    expected = theirs(input_ids=texts, pixel_values=images, attention_mask=mask, use_itm_head=False).itm_score
    for first in (False, True):
        hidden = ours.text_encoder(texts, mask, first=first)
        assert_close(ours.embed_images(seen) @ ours.embed_texts(hidden).T, expected, pair.tolerance)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [(CaptioningNetwork, BlipForConditionalGeneration), (RetrievalNetwork, BlipForImageTextRetrieval)],
)
def test_checkpoints_load_in_both_directions(kind: Any, reference: Any, tmp_path: Path) -> None:
    ours = kind(tiny())
    random_weights(ours)
    save(ours, tmp_path / "ours", VOCABULARY)
    with quiet():
        theirs, report = reference.from_pretrained(tmp_path / "ours", local_files_only=True, output_loading_info=True)
    assert not any(report.values())
    state = theirs.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in ours.state_dict().items())

    random_weights(theirs, seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (
        load_file(tmp_path / "theirs/model.safetensors").keys() == load_file(tmp_path / "ours/model.safetensors").keys()
    )
    write_processor(tmp_path / "theirs", tmp_path / "ours", theirs.config)
    card: Any = CaptionerCard if kind is CaptioningNetwork else FilterCard
    role = "captioner" if kind is CaptioningNetwork else "filter"
    checkpoint = LocalCheckpoint(path=str(tmp_path / "theirs"))
    loaded: Any = load(card(role=role, name="t", checkpoint=checkpoint, image_size=24), "cpu")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in theirs.state_dict().items())
    assert any(not torch.equal(state[name], weight) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(("size", "millions"), [("base", 252.7), ("large", 475.1)])
def test_trainable_parameters(size: str, millions: float) -> None:
    """MED at 384 px: the captioner, and of the filter what is not shared with it: self-attention and heads."""
    config = published(size)
    config.vision_config.image_size = 384
    with torch.device("meta"):
        decoder, encoder = CaptioningNetwork(config), RetrievalNetwork(config)
    counted = sum(parameter.numel() for parameter in decoder.parameters())
    own = ("vision_proj.", "text_proj.", "itm_head.")
    for name, parameter in encoder.named_parameters():
        if name.startswith(own) or ".attention." in name:
            counted += parameter.numel()
    assert counted / 1e6 == pytest.approx(millions, abs=0.05)


# --- training ---


def gradients(network: CaptioningNetwork, again: bool) -> dict[str, Tensor]:
    network.train().zero_grad()
    network.vision_model.checkpointing = network.text_decoder.bert.checkpointing = again
    torch.manual_seed(0)
    look = network.text_decoder.bert.look(network.vision_model(pixels(3, 24)))
    logits = network.text_decoder.logits(network.text_decoder.bert(ids(6, 5), image=look, causal=True))
    logits.square().mean().backward()
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """With dropout and drop path, whose draws must come again."""
    network = CaptioningNetwork(tiny(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), drop_path=0.3)
    random_weights(network)
    kept, again = gradients(network, False), gradients(network, True)
    assert kept.keys() == again.keys() == dict(network.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in kept.values())
    for name, gradient in kept.items():
        assert torch.allclose(gradient, again[name], rtol=1e-5, atol=1e-7), name


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    network = CaptioningNetwork(tiny())
    kept = []
    for again in (False, True):
        numbers: list[int] = []

        def pack(x: Tensor, numbers: list[int] = numbers) -> Tensor:
            numbers.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gradients(network, again)
        kept.append(sum(numbers))
    assert kept[1] < 0.5 * kept[0]


def test_wide_feed_forwards_do_not_keep_their_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times as wide as the rest, and cheap to have again; small ones are kept, which takes less time."""
    network = CaptioningNetwork(tiny())
    wide = {network.config.text_config.intermediate_size, network.config.vision_config.intermediate_size}

    def kept() -> set[int]:
        widths = set[int]()

        def pack(x: Tensor) -> Tensor:
            if not isinstance(x if x._base is None else x._base, nn.Parameter):
                widths.add(x.shape[-1])
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            look = network.text_decoder.bert.look(network.vision_model(pixels(3, 24)))
            network.text_decoder.bert(ids(6, 5), image=look, causal=True)
        return widths

    assert wide <= kept()
    plain = gradients(network, again=False)
    monkeypatch.setattr(blip, "_WORTH_COMPUTING_AGAIN", 0)
    assert kept()
    assert not kept() & wide
    for name, gradient in gradients(network, again=False).items():
        assert torch.equal(gradient, plain[name]), name


def test_drop_path_drops_whole_branches_of_images() -> None:
    config = tiny().vision_config
    layer = VisionLayer(config)
    layer.drop_path = 0.25
    random_weights(layer)
    nn.init.zeros_(layer.mlp["fc2"].weight)  # one branch is enough to look at
    nn.init.zeros_(layer.mlp["fc2"].bias)
    x = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0)).expand(4000, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        branch = layer.eval()(x) - x
        dropped = layer.train()(x) - x
    skipped = (dropped == 0).flatten(1).all(1)
    assert skipped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(dropped[~skipped], branch[~skipped] / 0.75, atol=1e-5)
    assert torch.allclose(dropped.mean(0), branch[0], atol=0.1)


def test_drop_path_rises_with_depth_and_sleeps_in_evaluation() -> None:
    config = tiny().vision_config
    config.num_hidden_layers = 5
    network = VisionTransformer(config, drop_path=0.4)
    rates = [layer.drop_path for layer in network.encoder["layers"]]  # type: ignore[union-attr]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    random_weights(network)
    images = pixels(4, 24)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), network(images))
        assert not torch.allclose(network.train()(images), network.eval()(images))


@torch.inference_mode()
def test_selected_rows_go_on_as_if_alone() -> None:
    network = CaptioningNetwork(tiny()).eval()
    random_weights(network)
    bert = network.text_decoder.bert
    texts, follow = ids(4, 5), ids(6, 2, seed=3)
    cache = Cache(bert.config, 4, 7, bert.embeddings.word_embeddings.weight)
    bert(texts, causal=True, cache=cache)
    rows = torch.tensor([2, 0, 0, 3, 2, 1])
    cache = cache.selected(rows)
    steps = [bert(part, causal=True, cache=cache) for part in follow.split(1, 1)]
    whole = bert(torch.cat([texts[rows], follow], 1), causal=True)
    assert torch.allclose(torch.cat(steps, 1), whole[:, -2:], atol=1e-5)


def test_misuse_of_the_cache_and_the_positions() -> None:
    bert = CaptioningNetwork(tiny()).text_decoder.bert
    cache = Cache(bert.config, 2, 5, bert.embeddings.word_embeddings.weight)
    with torch.inference_mode():
        bert(ids(2, 4), causal=True, cache=cache)
        with pytest.raises(ValueError, match="2 tokens at once after 4 in the cache"):
            bert(ids(2, 2), causal=True, cache=cache)
        bert(ids(2, 1), causal=True, cache=cache)
        with pytest.raises(ValueError, match="6 tokens for a cache of 5"):
            bert(ids(2, 1), causal=True, cache=cache)
        long = Cache(bert.config, 2, 20, bert.embeddings.word_embeddings.weight)
        bert(ids(2, 16), causal=True, cache=long)
        with pytest.raises(ValueError, match="17 tokens, but 16 positions"):
            bert(ids(2, 1), causal=True, cache=long)
        with pytest.raises(ValueError, match="17 tokens, but 16 positions"):
            bert(ids(2, 17))


def test_initialise() -> None:
    config = tiny()
    networks = [CaptioningNetwork(config) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        initialise(network, torch.Generator().manual_seed(seed))
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    for name, weight in states[0].items():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        assert (name in drawn) != (is_norm or name.endswith("bias")), name
        if name in drawn:
            assert weight.abs().max() <= 0.04
            assert abs(weight.mean().item()) < 0.01
            assert weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.15), name  # of a normal cut at 2 deviations
        else:
            assert (weight == is_norm).all(), name


# --- what is refused ---


def test_fill_names_what_is_wrong() -> None:
    network = CaptioningNetwork(tiny())
    state = network.state_dict()
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    head = "text_decoder.cls.predictions.decoder.weight"

    def refused(changed: dict[str, Tensor]) -> str:
        with pytest.raises(CheckpointError) as caught:
            fill(network, changed, "here")
        return str(caught.value)

    some = {name: weight for name, weight in state.items() if ".layer_norm1." not in name and name not in (words, head)}
    assert refused(some).startswith("here: 5 missing keys for a BlipForConditionalGeneration: text_decoder.bert.")
    del some["vision_model.embeddings.class_embedding"]
    assert refused(some).startswith("here: 6 missing keys")
    assert refused(some).endswith(", ...")
    assert refused({**state, "stray": torch.zeros(1)}) == (
        "here: 1 unexpected keys for a BlipForConditionalGeneration: stray"
    )
    norm = "vision_model.post_layernorm.bias"
    assert refused({**state, norm: torch.zeros(7)}).endswith(
        f"1 mismatched keys for a BlipForConditionalGeneration: {norm}"
    )
    assert "differ" in refused({**state, head: state[head] + 1})
    without_words = {name: weight for name, weight in state.items() if name not in (words, head)}
    assert refused(without_words).endswith(f"1 missing keys for a BlipForConditionalGeneration: {words}")
    fill(network, {**without_words, head: state[head]}, "here")  # either name will do
    fill(network, {**without_words, words: state[head], "a.position_ids": torch.arange(3)}, "here")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"hidden_act": "relu"}, r"text_config\.hidden_act is relu, expected gelu"),
        ("vision_config", {"hidden_act": "quick_gelu"}, r"vision_config\.hidden_act is quick_gelu, expected gelu"),
        ("text_config", {"encoder_hidden_size": 32}, r"text_config\.encoder_hidden_size is 32, expected 48"),
        ("vision_config", {"image_size": 30}, r"vision_config\.image_size % patch_size is 6, expected 0"),
        ("vision_config", {"image_size": [24, 24]}, r"vision_config\.image_size is \[24, 24\], expected one number"),
        ("vision_config", {"patch_size": 0}, r"vision_config\.patch_size is 0, expected one number above 0"),
        ("vision_config", {"num_attention_heads": 5}, r"vision_config\.hidden_size % num_attention_heads is 3"),
        ("text_config", {"num_attention_heads": 5}, r"text_config\.hidden_size % num_attention_heads is 2"),
        ("text_config", {"num_attention_heads": 0}, r"text_config\.num_attention_heads is 0"),
    ],
)
def test_configurations_it_would_not_compute(part: str, changes: dict[str, Any], message: str) -> None:
    config = tiny()
    for name, value in changes.items():
        setattr(getattr(config, part), name, value)
    for network in (CaptioningNetwork, RetrievalNetwork):
        with pytest.raises(CheckpointError, match=r"config\.json: " + message):
            network(config)


def test_a_refused_configuration_names_its_file(tmp_path: Path) -> None:
    save(CaptioningNetwork(tiny()), tmp_path / "c", VOCABULARY)
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["text_config"]["hidden_act"] = "relu"
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    card = CaptionerCard(
        role="captioner", name="c", checkpoint=LocalCheckpoint(path=str(tmp_path / "c")), image_size=24
    )
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/c: config.json: text_config.hidden_act is relu"):
        load(card, "cpu")


def test_positions_of_the_grid_itself_are_left_alone() -> None:
    positions = torch.randn(1, 10, 4)
    assert resize_positions(positions, 3) is positions
    larger = resize_positions(positions, 5)
    assert larger.shape == (1, 26, 4)
    assert torch.equal(larger[:, 0], positions[:, 0])
