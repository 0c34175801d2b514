"""Load a BLIP checkpoint in the hub's format, or say why not; write one. Never remote code, pickles only where allowed.

B  images in a batch    S  side in pixels    T  image tokens, 1 + patches    W  vision width
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from transformers import BlipConfig
from transformers.utils import logging as transformers_logging

from capfilt.errors import CheckpointError, SpecError
from capfilt.fingerprints import TOKENIZER_FILES, checkpoint_files, tokenizer_files, weight_files
from capfilt.models import fused
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork, fill
from capfilt.models.memory import keep_freed_memory
from capfilt.models.packed import pack
from capfilt.models.preprocess import CLIP_MEAN, CLIP_STD, normalise
from capfilt.models.tokenizer import bert_tokenizer, read_tokenizer, token_ids
from capfilt.spec import CaptionerCard, FilterCard, HubCheckpoint, LocalCheckpoint
from capfilt.weights import inspect

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Network = TypeVar("Network", CaptioningNetwork, RetrievalNetwork)
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_SIZES = 32
"""Batches that cuDNN sees are multiples of it: it plans every other size anew."""
_IN_CACHE = 8
"""Images that a CPU's vision transformer sees at a time: the layers' activations of more come from memory. A text
decoder gains by more of them: what it waits for is its weights."""
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Network]):
    """A BLIP checkpoint on its device.

    Attributes:
        model: the network, evaluating, without gradients.
        tokenizer: without padding or truncation; reads `[SEP]` and its like in a text as plain characters. Safe to use
            from several threads.
        source: directory or hub id, for messages.
        dec, enc, cls, sep, pad: token ids of [DEC], [ENC], [CLS], [SEP], [PAD].
    """

    model: Network
    tokenizer: Tokenizer
    source: str
    image_size: int
    device: torch.device
    dtype: torch.dtype
    dec: int
    enc: int
    cls: int
    sep: int
    pad: int

    def see(self, images_BCSS: Tensor) -> Tensor:
        """The vision transformer's output tokens.

        Args:
            images_BCSS: uint8 [B, 3, S, S], S the card's image_size.

        Returns:
            [B, T, W], [CLS] first, after the final norm. Positions are interpolated if S is not the checkpoint's.

        Raises:
            ValueError: another shape or dtype.
        """
        expected = (3, self.image_size, self.image_size)
        if images_BCSS.dtype != torch.uint8 or tuple(images_BCSS.shape[1:]) != expected:
            raise ValueError(f"expected uint8 [B, {expected}], got {images_BCSS.dtype} {tuple(images_BCSS.shape)}")
        # One memory layout whatever the caller's: a row's pixels must meet the same kernels in every run.
        images_BCSS = images_BCSS.to(self.device).contiguous()
        if self.device.type != "cpu" or len(images_BCSS) <= _IN_CACHE:
            return self._see(images_BCSS)
        starts = range(0, len(images_BCSS), _IN_CACHE)
        return torch.cat([self._see(images_BCSS[start : start + _IN_CACHE]) for start in starts])

    def _see(self, images_BCSS: Tensor) -> Tensor:
        pixels = normalise(images_BCSS, self.dtype)
        if fused.kernels_for(pixels) and (missing := -len(pixels) % _SIZES):
            pixels = pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
        seen_BTW: Tensor = self.model.vision_model(pixels)
        return seen_BTW[: len(images_BCSS)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def require_positions(self, tokens: int, field: str) -> None:
        """Refuse sequences longer than the position table.

        Raises:
            SpecError: naming `field`.
        """
        positions = self.model.config.text_config.max_position_embeddings
        if tokens > positions:
            raise SpecError(f"{field}: {tokens} tokens, but {self.source} has {positions} positions; lower it")


@overload
def load(card: CaptionerCard, device: str) -> Loaded[CaptioningNetwork]: ...
@overload
def load(card: FilterCard, device: str) -> Loaded[RetrievalNetwork]: ...
def load(card: CaptionerCard | FilterCard, device: str) -> Loaded[Any]:
    """Load the checkpoint of a card, downloading from the hub what its cache lacks.

    Takes memory for the weights once, and maps the file.

    Args:
        device: as torch names it: "cpu", "cuda", "cuda:1".

    Raises:
        CheckpointError: not found, not reachable, a pickle that the card does not allow, the other role's checkpoint,
            a broken file, missing or unexpected weights.
        SpecError: the card's image_size does not fit the checkpoint's patches.
    """
    return _load(card, device)[0]


def _load(card: CaptionerCard | FilterCard, device: str, *, borrow: bool = False) -> tuple[Loaded[Any], set[int]]:
    """As :func:`load`; with `borrow`, on a CPU, weights of the card's type stay where they are, in pages of the files.

    Returns:
        The checkpoint, and the addresses of what is borrowed.
    """
    directory = locate(card.checkpoint, card.allow_pickle)
    source = card.checkpoint.hub if isinstance(card.checkpoint, HubCheckpoint) else str(directory)
    kind = CaptioningNetwork if card.role == "captioner" else RetrievalNetwork
    inspect(card, directory)
    config = _config(directory)
    state = read_weights(directory, card.allow_pickle)
    try:
        with torch.device("meta"), _Blank():
            network = kind(config).to(DTYPES[card.dtype])
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}; name another checkpoint") from None
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape anew, in every thread
    if borrow:
        borrowed = {weight.untyped_storage().data_ptr() for weight in state.values()}
        state = {name: weight.to(DTYPES[card.dtype]) for name, weight in state.items()}
    else:
        borrowed = set()
        materialise(network, device)
    fill(network, state, str(directory), keep=borrow)
    tokenizer = read_tokenizer(directory)
    loaded: Loaded[Any] = Loaded(
        model=network.eval().requires_grad_(False),
        tokenizer=tokenizer,
        source=source,
        image_size=card.image_size,
        device=torch.device(device),
        dtype=DTYPES[card.dtype],
        **token_ids(tokenizer, config.text_config, directory),
    )
    return loaded, borrowed


@overload
def load_to_run(card: CaptionerCard, device: str) -> Loaded[CaptioningNetwork]: ...
@overload
def load_to_run(card: FilterCard, device: str) -> Loaded[RetrievalNetwork]: ...
def load_to_run(card: CaptionerCard | FilterCard, device: str) -> Loaded[Any]:
    """As :func:`load`, to compute and nothing else.

    On a CPU the linear layers of a float32 network are packed or split (capfilt.models.packed), and the process keeps
    the memory that it frees (capfilt.models.memory).

    Raises:
        CheckpointError, SpecError: as :func:`load`.
    """
    on_cpu = torch.device(device).type == "cpu"
    loaded, borrowed = _load(card, device, borrow=on_cpu)
    if on_cpu:
        keep_freed_memory()  # not earlier: what a conversion takes goes back
        if loaded.dtype == torch.float32:
            pack(loaded.model)
    _own(loaded.model, borrowed)
    return loaded


class _Blank(TorchFunctionMode):
    """Modules are made without drawing weights: on the meta device that draws nothing, but imports torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def _own(network: nn.Module, borrowed: set[int]) -> None:
    """Copy what a network has borrowed and still holds; parameters that share memory go on to do so."""
    copies: dict[tuple[Any, ...], nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.untyped_storage().data_ptr() in borrowed:
                at = (parameter.data_ptr(), parameter.shape, parameter.stride())
                if at not in copies:
                    copies[at] = nn.Parameter(parameter.clone(), requires_grad=False)
                setattr(module, name, copies[at])


def locate(
    checkpoint: HubCheckpoint | LocalCheckpoint,
    allow_pickle: bool,
    complete: Callable[[Path], Sequence[Path]] = checkpoint_files,
    names: Sequence[str] = TOKENIZER_FILES,
) -> Path:
    """The directory that holds a checkpoint; from the hub, after a download if the cache lacks it.

    Args:
        complete: raises CheckpointError where a directory lacks what is needed of it.
        names: of the files beside config.json and the weights that are downloaded.

    Raises:
        CheckpointError: not complete, or the hub cannot be reached, or has no such checkpoint.
    """
    if isinstance(checkpoint, LocalCheckpoint):
        complete(Path(checkpoint.path))
        return Path(checkpoint.path)
    try:  # a revision never changes: ask the cache first, alone
        return _fetch(checkpoint, allow_pickle, complete, names, local_only=True)
    except CheckpointError:
        pass
    try:
        return _fetch(checkpoint, allow_pickle, complete, names, local_only=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.hub} at {checkpoint.revision} is not in the cache and could not be downloaded: {error}\n"
            f"On a connected machine: hf download {checkpoint.hub} --revision {checkpoint.revision} --local-dir DIR\n"
            "then write `path: DIR` in place of the hub's id, or set HF_HOME to a cache that holds it."
            + ("" if allow_pickle else "\nIf the revision has a pytorch_model.bin only: allow_pickle: true.")
        ) from error


def _fetch(
    checkpoint: HubCheckpoint,
    allow_pickle: bool,
    complete: Callable[[Path], Sequence[Path]],
    names: Sequence[str],
    local_only: bool,
) -> Path:
    """The hub's snapshot of a revision, with the files a model needs; a pickle only for want of safetensors."""

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                checkpoint.hub, revision=checkpoint.revision, allow_patterns=patterns, local_files_only=local_only
            )
        )

    try:
        directory = snapshot(["config.json", *names, *_SAFETENSORS])
        if allow_pickle and not any(directory.glob("model*.safetensors*")):
            directory = snapshot(_PICKLES)
    except Exception as error:  # huggingface_hub's, httpx's and the file system's have no common root
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    complete(directory)
    return directory


def _config(directory: Path) -> BlipConfig:
    file = directory / "config.json"
    try:
        with quiet():
            return BlipConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file}: transformers cannot read it: {error}; fetch it again, or name another"
        ) from error


def read_weights(directory: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Every weight of a checkpoint by name, on the CPU: pages of its files where the format allows, so copy them.

    Raises:
        CheckpointError: files are missing or broken, or a pickle that is not allowed.
    """
    files = [file for file in weight_files(directory) if file.suffix != ".json"]
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= _read_safetensors(file)
        elif allow_pickle:
            state |= weights_in(read_pickle(file), file)
        else:
            raise CheckpointError(
                f"{file}: a pickle, which is not allowed; convert it to model.safetensors, or set allow_pickle: true "
                "(it is read as weights only, no code runs)"
            )
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not safetensors: {error}; fetch it again") from error


def read_pickle(file: Path) -> Any:
    """What `torch.save` wrote: tensors and plain containers only, so no code runs.

    Raises:
        CheckpointError: no such file, broken, or it holds anything else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{file}: the weights do not load: {error}; fetch it again, or name another") from error


def weights_in(content: Any, file: Path) -> dict[str, Tensor]:
    """The content of a file, if it is weights by name.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(content, dict) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise CheckpointError(f"{file}: the weights do not load: expected tensors by name; name another checkpoint")
    return content


def materialise(network: nn.Module, device: str) -> None:
    """Give a network on the meta device memory, not filled. Unlike `to_empty`, it leaves tied parameters one."""
    memory = {parameter: nn.Parameter(torch.empty_like(parameter, device=device)) for parameter in network.parameters()}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, memory[parameter])


# --- writing ---


def save(network: CaptioningNetwork | RetrievalNetwork, directory: Path, tokenizer: Mapping[str, int] | Path) -> None:
    """Write a checkpoint in the hub's format, which transformers reads, and :func:`load`.

    Args:
        directory: made, or replaced; appears whole.
        tokenizer: a vocabulary, token to id, of bert-base-uncased's kind; or a checkpoint whose tokenizer is copied.

    Raises:
        CheckpointError: the other checkpoint has no tokenizer.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(network.config)
    config.architectures = [network.architecture]
    weights = {name: weight.detach().contiguous() for name, weight in network.named_parameters()}  # tied ones once
    config.dtype = next(iter(weights.values())).dtype
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".writing-") as scratch:
        staged = Path(scratch) / "checkpoint"
        staged.mkdir()
        config.to_json_file(staged / "config.json")
        save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
        (staged / "model.safetensors").chmod((staged / "config.json").stat().st_mode)  # safetensors lets no one else in
        write_processor(staged, tokenizer, config)
        if directory.exists():
            directory.rename(Path(scratch) / "replaced")
        staged.rename(directory)


def write_processor(directory: Path, tokenizer: Mapping[str, int] | Path, config: BlipConfig) -> None:
    """Write the files that make texts and images into a network's input.

    Args:
        tokenizer: as :func:`save`'s.
        config: the network's.

    Raises:
        CheckpointError: as :func:`save`.
    """
    if isinstance(tokenizer, Path):
        _copy_tokenizer(tokenizer, directory)
    else:
        _write_tokenizer(directory, tokenizer, config.text_config.max_position_embeddings)
    side = config.vision_config.image_size
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    _write_json(directory / "preprocessor_config.json", processor)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for file in tokenizer_files(source):
        shutil.copyfile(file, directory / file.name)


def _write_tokenizer(directory: Path, vocabulary: Mapping[str, int], positions: int) -> None:
    tokenizer = bert_tokenizer(dict(vocabulary))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in in_order), encoding="utf-8")
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    _write_json(directory / "special_tokens_map.json", marks)
    settings = {**marks, "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions}
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings: what they say is checked, and raised, here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
