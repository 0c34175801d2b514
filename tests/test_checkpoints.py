from __future__ import annotations

import ast
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
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt.errors import CheckpointError, SpecError
from capfilt.models.checkpoints import load, load_to_run, quiet, save
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import CaptionerCard, FilterCard, HubCheckpoint, LocalCheckpoint, load_card

torch.set_num_threads(1)

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def captioner(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A captioner of one's own, to break."""
    return shutil.copytree(pair[0], tmp_path / "captioner")


def captioner_card(path: Path, **fields: Any) -> CaptionerCard:
    fields = {"image_size": 32, **fields}
    return CaptionerCard(role="captioner", name="tiny", checkpoint=LocalCheckpoint(path=str(path)), **fields)


def filter_card(path: Path, **fields: Any) -> FilterCard:
    return FilterCard(role="filter", name="tiny", checkpoint=LocalCheckpoint(path=str(path)), image_size=32, **fields)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_only_tests_use_transformers_networks() -> None:
    """transformers is for configuration, hub access and tokenizer files; BLIP's networks are our own."""
    used = set()
    others = {"generator.py", "dual.py", "classifier.py"}  # models other than BLIP are transformers' own
    for file in (file for file in (Path(__file__).parent.parent / "capfilt").rglob("*.py") if file.name not in others):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
                used |= {name.name for name in node.names}
            assert not (isinstance(node, ast.Import) and any(name.name == "transformers" for name in node.names)), file
    assert used == {"BlipConfig", "BlipTextConfig", "BlipVisionConfig", "logging"}


def test_loads_every_weight(pair: tuple[Path, Path]) -> None:
    for loaded, path in ((load(captioner_card(pair[0]), "cpu"), pair[0]), (load(filter_card(pair[1]), "cpu"), pair[1])):
        weights = load_file(path / "model.safetensors")
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        assert (loaded.dec, loaded.enc) == (len(vocabulary) - 2, len(vocabulary) - 1)
        assert [loaded.tokenizer.id_to_token(i) for i in (loaded.pad, loaded.cls, loaded.sep)] == [
            "[PAD]",
            "[CLS]",
            "[SEP]",
        ]


def test_transformers_reads_what_tiny_writes(pair: tuple[Path, Path]) -> None:
    for path, network in zip(pair, (BlipForConditionalGeneration, BlipForImageTextRetrieval), strict=True):
        with quiet():
            _, report = network.from_pretrained(path, local_files_only=True, output_loading_info=True)
            theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours = Tokenizer.from_file(str(path / "tokenizer.json"))
        for text in ("A small red circle, on a WHITE background!", "zebra ~42%", ""):
            assert theirs(text)["input_ids"] == ours.encode(text).ids
            assert ours.token_to_id("[UNK]") not in ours.encode(text).ids


def test_tiny_is_its_seeds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    again, other = write_tiny_pair(tmp_path / "a"), write_tiny_pair(tmp_path / "b", seed=1)
    for before, same, different in zip(pair, again, other, strict=True):
        assert sorted(file.name for file in same.iterdir()) == sorted(file.name for file in before.iterdir())
        assert all(file.read_bytes() == (same / file.name).read_bytes() for file in before.iterdir())
        assert (different / "model.safetensors").read_bytes() != (before / "model.safetensors").read_bytes()


def test_tiny_has_a_token_for_any_ascii(pair: tuple[Path, Path]) -> None:
    loaded = load(captioner_card(pair[0]), "cpu")
    unknown = loaded.tokenizer.token_to_id("[UNK]")
    assert unknown not in loaded.ids("".join(chr(code) + " x" + chr(code) for code in range(32, 127)))


def drop(key: str) -> Callable[[Path], None]:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights[key]

    return lambda path: edit_weights(path, edit)


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def add_a_key(path: Path) -> None:
    edit_weights(path, lambda weights: weights.update(stray=torch.zeros(1)))


def reshape(path: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        name = "vision_model.post_layernorm.bias"
        weights[name] = weights[name][:7].clone()

    edit_weights(path, edit)


def another_separator(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["sep_token_id"] = 9
    edit_config(path, text_config=config["text_config"])


def dangling_index(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: [(path / name).unlink() for name in ("tokenizer.json", "vocab.txt")], "tokenizer.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: not a model configuration"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json: not a model configuration"),
        (lambda path: edit_config(path, model_type="bert"), r"config.json: .*\(bert\)"),
        (
            lambda path: edit_config(path, text_config={"vocab_size": "many"}),
            "config.json: transformers cannot read it",
        ),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
        (truncate, "model.safetensors: truncated"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors: truncated"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"<html>not found</html>"),
            "model.safetensors: truncated",
        ),
        (drop("vision_model.post_layernorm.bias"), "1 missing keys .*vision_model.post_layernorm.bias"),
        (add_a_key, "1 unexpected keys .*stray"),
        (reshape, "1 mismatched keys .*vision_model.post_layernorm.bias"),
        (another_separator, "tokenizer and config.json disagree"),
        (dangling_index, "model-00001-of-00002.safetensors"),
    ],
)
def test_broken_checkpoints(captioner: Path, harm: Callable[[Path], Any], message: str) -> None:
    harm(captioner)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(captioner_card(captioner), "cpu")
    assert str(captioner) in str(caught.value)


def test_the_other_roles_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a filter is a BlipForImageTextRetrieval; this is a BlipForConditional"):
        load(filter_card(pair[0]), "cpu")
    with pytest.raises(
        CheckpointError, match="a captioner is a BlipForConditionalGeneration; this is a BlipForImageText"
    ):
        load(captioner_card(pair[1]), "cpu")
    silent = shutil.copytree(pair[1], tmp_path / "silent")  # a config that does not say what it is
    edit_config(silent, architectures=None)
    with pytest.raises(CheckpointError, match=r"missing keys .*text_decoder"):
        load(captioner_card(silent), "cpu")


def test_old_checkpoints_position_ids_are_welcome(captioner: Path) -> None:
    """The hub's BLIPs of 2022 carry a buffer that newer transformers compute."""
    position_ids = {"text_decoder.bert.embeddings.position_ids": torch.arange(128)[None]}
    edit_weights(captioner, lambda weights: weights.update(position_ids))
    load(captioner_card(captioner), "cpu")


def to_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def test_pickles_are_asked_for(captioner: Path) -> None:
    safe = load(captioner_card(captioner), "cpu").model.state_dict()
    to_pickle(captioner)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: a pickle.*allow_pickle: true"):
        load(captioner_card(captioner), "cpu")
    loaded = load(captioner_card(captioner, allow_pickle=True), "cpu").model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in safe.items())


class _Touch:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.file),)


def test_an_allowed_pickle_still_runs_no_code(captioner: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    to_pickle(captioner)
    bomb = captioner / "pytorch_model.bin"
    torch.save({"a": _Touch(str(touched))}, bomb)
    with pytest.raises(CheckpointError, match="the weights do not load"):
        load(captioner_card(captioner, allow_pickle=True), "cpu")
    bomb.write_bytes(pickle.dumps(_Touch(str(touched))))
    with pytest.raises(CheckpointError, match="the weights do not load"):
        load(captioner_card(captioner, allow_pickle=True), "cpu")
    assert not touched.exists()
    pickle.loads(bomb.read_bytes())
    assert touched.exists()  # it was armed


def test_remote_code_is_ignored(captioner: Path, tmp_path: Path) -> None:
    (captioner / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(captioner, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    load(captioner_card(captioner), "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(captioner: Path, name: str) -> None:
    weights = load_file(captioner / "model.safetensors")
    (captioner / "model.safetensors").unlink()
    names, (stem, suffix) = sorted(weights), name.split(".")
    parts = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    for file, own in parts.items():
        part = {name: weights[name] for name in own}
        if suffix == "bin":
            torch.save(part, captioner / file)
        else:
            save_file(part, captioner / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in parts.items() for name in own}
    (captioner / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if suffix == "bin":
        with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin: a pickle"):
            load(captioner_card(captioner), "cpu")
    state = load(captioner_card(captioner, allow_pickle=suffix == "bin"), "cpu").model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_other_pickles(captioner: Path) -> None:
    """torch's format before 1.6, which cannot be mapped, is read; what is not weights by name is refused."""
    weights = load_file(captioner / "model.safetensors")
    to_pickle(captioner)
    file = captioner / "pytorch_model.bin"
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    state = load(captioner_card(captioner, allow_pickle=True), "cpu").model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    for content in ({"model": weights}, list(weights.values())):
        torch.save(content, file)
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin: the weights do not load: expected tensors by name"
        ):
            load(captioner_card(captioner, allow_pickle=True), "cpu")
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: the weights do not load"):
        load(captioner_card(captioner, allow_pickle=True), "cpu")


def test_bfloat16(pair: tuple[Path, Path]) -> None:
    weights = load_file(pair[0] / "model.safetensors")
    state = load(captioner_card(pair[0], dtype="bfloat16"), "cpu").model.state_dict()
    assert all(torch.equal(state[name], weight.bfloat16()) for name, weight in weights.items())


def test_what_is_tied_stays_one(pair: tuple[Path, Path]) -> None:
    decoder = load(captioner_card(pair[0]), "cpu").model.text_decoder
    head = dict(decoder.cls.named_parameters(remove_duplicate=False))
    assert head["predictions.decoder.weight"] is decoder.bert.embeddings.word_embeddings.weight
    assert head["predictions.decoder.bias"] is head["predictions.bias"]


@pytest.mark.parametrize("how", [load, load_to_run])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_checkpoint_does_not_need_its_files(
    pair: tuple[Path, Path], captioner: Path, how: Any, dtype: str
) -> None:
    """They are mapped while they are read, and no longer: a file that shrinks would kill the process."""
    for pickled in (False, True):
        if pickled:
            to_pickle(captioner)
        loaded = how(captioner_card(captioner, allow_pickle=pickled, dtype=dtype), "cpu")
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(captioner) not in maps.read_text()
        images = torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32).to(torch.uint8)
        before = loaded.see(images)
        os.truncate(captioner / ("pytorch_model.bin" if pickled else "model.safetensors"), 0)
        assert torch.equal(loaded.see(images), before)
        if not pickled:
            shutil.copyfile(pair[0] / "model.safetensors", captioner / "model.safetensors")


@pytest.mark.parametrize("packs", [False, True])
def test_a_network_that_only_runs_is_the_same(
    pair: tuple[Path, Path], packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights go from the file's pages to where they are used; what is tied stays one, and takes memory once."""
    if not packs:
        monkeypatch.setattr("capfilt.models.packed._serves", lambda _kind: False)
    loaded, run = (how(captioner_card(pair[0]), "cpu") for how in (load, load_to_run))
    images = torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32).to(torch.uint8)
    torch.testing.assert_close(run.see(images), loaded.see(images), rtol=1e-4, atol=1e-4)
    decoder, exact = run.model.text_decoder, loaded.model.text_decoder
    head = dict(decoder.cls.named_parameters(remove_duplicate=False))
    words = decoder.bert.embeddings.word_embeddings.weight
    assert torch.equal(words, exact.bert.embeddings.word_embeddings.weight)
    assert packs or head["predictions.decoder.weight"] is words
    assert head["predictions.decoder.bias"] is head["predictions.bias"]
    hidden = torch.linspace(-1, 1, words.shape[1])[None, None]
    torch.testing.assert_close(decoder.logits(hidden), exact.logits(hidden), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in run.model.parameters())


def test_loading_does_not_import_the_compiler(pair: tuple[Path, Path]) -> None:
    """It takes a second of every worker's start, for weights that are drawn on the meta device, to no end."""
    script = f"""
import sys
from capfilt.models.checkpoints import load_to_run
from capfilt.spec import CaptionerCard, LocalCheckpoint

card = CaptionerCard(role="captioner", name="tiny", checkpoint=LocalCheckpoint(path={str(pair[0])!r}), image_size=32)
load_to_run(card, "cpu")
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- writing ---


def test_saved_and_loaded_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for card, path in ((captioner_card(pair[0]), pair[0]), (filter_card(pair[1]), pair[1])):
        loaded: Any = load(card, "cpu")  # type: ignore[call-overload]
        copied = tmp_path / "made" / path.name
        save(loaded.model, copied, path)  # tokenizer copied
        assert sorted(file.name for file in copied.iterdir()) == sorted(file.name for file in path.iterdir())
        assert all(file.read_bytes() == (copied / file.name).read_bytes() for file in path.iterdir())
        assert all(file.stat().st_mode == (copied / "config.json").stat().st_mode for file in copied.iterdir())


def test_saved_in_another_type(pair: tuple[Path, Path], tmp_path: Path) -> None:
    half = load(captioner_card(pair[0], dtype="bfloat16"), "cpu").model
    save(half, tmp_path / "half", pair[0])
    assert {weight.dtype for weight in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    with quiet():
        theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "half", local_files_only=True, dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_a_checkpoint_is_replaced_whole(pair: tuple[Path, Path], captioner: Path) -> None:
    (captioner / "stale.bin").write_bytes(b"")
    loaded = load(captioner_card(captioner), "cpu")
    loaded.model.vision_model.post_layernorm.bias.fill_(7)
    save(loaded.model, captioner, captioner)  # over itself
    assert sorted(file.name for file in captioner.iterdir()) == sorted(file.name for file in pair[0].iterdir())
    assert load(captioner_card(captioner), "cpu").model.vision_model.post_layernorm.bias.eq(7).all()
    assert list(captioner.parent.iterdir()) == [captioner]


def test_a_failed_save_leaves_what_was_there(pair: tuple[Path, Path], captioner: Path, tmp_path: Path) -> None:
    loaded = load(captioner_card(captioner), "cpu")
    loaded.model.vision_model.post_layernorm.bias.fill_(7)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/none: neither tokenizer\.json nor vocab\.txt"):
        save(loaded.model, captioner, tmp_path / "none")
    assert all(file.read_bytes() == (captioner / file.name).read_bytes() for file in pair[0].iterdir())
    assert list(captioner.parent.iterdir()) == [captioner]


def test_vocabulary_alone_is_a_tokenizer(captioner: Path) -> None:
    text = "A small red circle, on the ZEBRA's back"
    whole = load(captioner_card(captioner), "cpu")
    (captioner / "tokenizer.json").unlink()
    alone = load(captioner_card(captioner), "cpu")
    assert alone.ids(text) == whole.ids(text)
    assert (alone.dec, alone.enc, alone.sep) == (whole.dec, whole.enc, whole.sep)


def test_plain_berts_vocabulary_gets_enc_by_position(captioner: Path) -> None:
    """The hub's tokenizers know 30522 tokens; [DEC] and [ENC] are 30522 and 30523."""
    (captioner / "tokenizer.json").unlink()
    vocabulary = (captioner / "vocab.txt").read_text().splitlines()
    (captioner / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary[:-2]))
    loaded = load(captioner_card(captioner), "cpu")
    assert (loaded.dec, loaded.enc) == (len(vocabulary) - 2, len(vocabulary) - 1)


def test_special_tokens_in_a_text_are_characters(pair: tuple[Path, Path]) -> None:
    loaded = load(filter_card(pair[1]), "cpu")
    for text in ("[SEP]", "a [ENC] b", "[PAD][CLS][MASK][DEC]"):
        assert not {loaded.sep, loaded.enc, loaded.pad, loaded.cls, loaded.dec} & set(loaded.ids(text))


def test_image_size(pair: tuple[Path, Path]) -> None:
    with pytest.raises(SpecError, match="image_size 36 is not a multiple of the patch size 8"):
        load(captioner_card(pair[0], image_size=36), "cpu")
    resized = load(captioner_card(pair[0], image_size=48), "cpu")  # positions are interpolated, as BLIP does 224 -> 384
    assert resized.see(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 37, 32)
    for wrong in (
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 48, 48),
        torch.zeros(3, 48, 48).byte(),
    ):
        with pytest.raises(ValueError, match="expected uint8"):
            resized.see(wrong)


def test_the_hub_out_of_reach(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Offline: an error that says what to do; a cache that holds the revision is enough; pickles where allowed."""
    revision = "a" * 40
    cached = tmp_path / "hub" / "models--owner--cached" / "snapshots" / revision
    shutil.copytree(pair[0], cached)
    pickled = tmp_path / "hub" / "models--owner--pickled" / "snapshots" / revision
    shutil.copytree(pair[0], pickled)
    to_pickle(pickled)
    half = tmp_path / "hub" / "models--owner--half" / "snapshots" / revision
    half.mkdir(parents=True)
    shutil.copy(pair[0] / "config.json", half)
    script = """
import sys
from capfilt.errors import CheckpointError
from capfilt.models.checkpoints import load
from capfilt.spec import CaptionerCard, HubCheckpoint
for name, pickles in (("cached", False), ("pickled", True), ("pickled", False), ("half", False), ("absent", True)):
    checkpoint = HubCheckpoint(hub=f"owner/{name}", revision="a" * 40)
    card = CaptionerCard(role="captioner", name="c", checkpoint=checkpoint, image_size=32, allow_pickle=pickles)
    try:
        print("loaded", name, load(card, "cpu").source)
    except CheckpointError as error:
        print("refused", name, str(error).replace(chr(10), " "))
"""
    offline = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=True)
    said = run.stdout.splitlines()
    assert said[:2] == ["loaded cached owner/cached", "loaded pickled owner/pickled"]
    assert said[2].startswith("refused pickled")
    assert "allow_pickle: true" in said[2]
    for line, name in ((said[3], "half"), (said[4], "absent")):
        assert line.startswith(f"refused {name} owner/{name} at {revision} is not in the cache")
        assert f"hf download owner/{name} --revision {revision} --local-dir DIR" in line
        assert "HF_HOME" in line


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.yaml")), ids=lambda file: file.stem)
def test_cards(file: Path) -> None:
    card = load_card(file)
    assert card.name == file.stem
    assert card.licence != "unknown"
    if isinstance(card.checkpoint, HubCheckpoint):
        assert card.image_size == 384
        assert "captioning" in card.checkpoint.hub if card.role == "captioner" else "itm" in card.checkpoint.hub
        assert card.role != "captioner" or card.prompt == "a picture of "
        assert card.role != "filter" or (card.first_token, card.max_tokens) == ("[ENC]", 35)
    else:  # the demo's, which are in the repository
        load(card, "cpu")
        assert sum(file.stat().st_size for file in Path(card.checkpoint.path).iterdir()) < 3_000_000


def test_there_are_cards() -> None:
    assert len(list(MODELS.glob("*.yaml"))) == 8
