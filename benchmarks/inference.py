"""Captions and scores of resized images: capfilt against transformers, same weights, images, lengths and threads.

    python benchmarks/inference.py [--candidates 1 8] [--tokens 16] [--images 8] [--repeats 3] [--json FILE]

Every image gets k captions of exactly `--tokens` new tokens (nucleus 0.9, repetition penalty 1.1), then they and a web
text of ten words are matched with it. The sides take turns, each in a process of its own:

    ours         Captioner.caption and ItmFilter.score, as a run calls them; ITC is computed, too, as cards have it
                 unless they say `itc: false` (`--no-itc`); the other sides compute none
    documented   as transformers' pages show: `BlipForConditionalGeneration.generate` over the batch, then
                 `BlipForImageTextRetrieval` on each image-text pair, a batch of pairs at a time
    hand-tuned   the same `generate`, but the filter's vision transformer runs once an image, and its text encoder over
                 all pairs at once
    bfloat16     ours with cards of that dtype, not the same results (`--bfloat16`); fast where the processor has matrix
                 units for it (AMX)

Weights are random at real size (speed does not depend on them), scaled so that captions have a trained model's entropy.
First the sides must agree: greedy captions token by token, and match probabilities within 1e-4. On a processor with
matrix units for bfloat16 (AMX) ours multiplies float32 by way of three bfloat16 products (capfilt.models.split);
`--no-split` keeps it from that.

Every side first runs once without being timed: that takes the memory which the others use. Ratios are medians over the
repeats, with the smallest and largest. *Floor* counts the matrix products of ours (FLOPs, 2
for a multiply and add; a split product counts once) and gives their rate as a part of what torch's float32 product does
with square matrices of side 2,048, measured between the repeats.

Targets at base size, 384 px, on a CPU: k = 1 at least 1.6 x documented and 1.2 x hand-tuned; k = 8 at least 4.5 x and
2 x; at least 85% of the matrix product's rate; k = 8 at most 1.35 x the time of k = 1 (with `--tokens 20`).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measuring import machine, matrix_product_rate, shown, spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt.models import checkpoints, packed
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork
from capfilt.models.captioner import Captioner
from capfilt.models.checkpoints import quiet, save
from capfilt.models.initial import blip_config
from capfilt.models.itm import ItmFilter
from capfilt.models.preprocess import normalise
from capfilt.models.tokenizer import bert_tokenizer, padded
from capfilt.spec import ARCHITECTURES, BatchSize, CaptionerCard, FilterCard, LocalCheckpoint, Sampling

PROMPT = "a picture of "
WORDS = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOLERANCE = 1e-4
TARGETS = {"documented": {1: 1.6, 8: 4.5}, "hand-tuned": {1: 1.2, 8: 2.0}}
OF_MATRIX_PRODUCT = 0.85
EIGHT_TO_ONE = 1.35


# --- what all sides start from ---


@torch.no_grad()
def draw_weights(network: nn.Module, seed: int) -> None:
    """Random weights whose captions have the entropy of a trained captioner's (logits of std 4 or so)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(network.named_parameters()):
        if weight.dim() == 1:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            std = 0.16 if "word_embeddings" in name else 0.02 if "embedding" in name else 0.05
            weight.normal_(std=std, generator=generator)


def write_checkpoints(architecture: str, image_size: int, directory: Path) -> None:
    """A captioner and a filter, in the hub's format; a vocabulary in which every word is a token."""
    vocabulary = {token: n for n, token in enumerate((*SPECIAL, *PROMPT.split()))}
    vocabulary |= {f"w{n}": n for n in range(len(vocabulary), WORDS)}
    config = blip_config(ARCHITECTURES[architecture], image_size, bert_tokenizer(vocabulary))
    for seed, kind in enumerate((CaptioningNetwork, RetrievalNetwork)):
        network = kind(config)
        draw_weights(network, seed)
        save(network, directory / ("captioner", "filter")[seed], vocabulary | {"[DEC]": WORDS, "[ENC]": WORDS + 1})


class Pictures:
    """What is captioned and matched."""

    def __init__(self, count: int, image_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        colour = torch.randint(0, 200, (count, 3, 1, 1), generator=generator)
        grain = torch.randint(0, 56, (count, 3, image_size, image_size), generator=generator)
        self.pixels = (colour + grain).to(torch.uint8)
        self.sha256 = [hashlib.sha256(bytes([number])).hexdigest() for number in range(count)]
        words = torch.randint(100, WORDS, (count, 10), generator=generator)
        self.web = [" ".join(f"w{word}" for word in row) for row in words.tolist()]


# --- sides ---


class Ours:
    """capfilt."""

    def __init__(
        self,
        directory: Path,
        size: int,
        batch: BatchSize,
        sampling: Sampling,
        device: str = "cpu",
        dtype: str = "float32",
        itc: bool = True,
        **card: Any,
    ) -> None:
        common: dict[str, Any] = {"name": "x", "image_size": size, "batch_size": batch, "dtype": dtype, **card}
        cards = [{**common, "checkpoint": LocalCheckpoint(path=str(directory / r))} for r in ("captioner", "filter")]
        self.captioner = Captioner(CaptionerCard(role="captioner", prompt=PROMPT, **cards[0]), sampling, device)
        self.filter = ItmFilter(FilterCard(role="filter", first_token="[CLS]", itc=itc, **cards[1]), device)

    def run(self, pictures: Pictures) -> list[list[float]]:
        """Match probabilities: the web text's, then the captions'."""
        captions = self.captioner.caption(pictures.pixels, pictures.sha256)
        texts = [[web, *own] for web, own in zip(pictures.web, captions, strict=True)]
        return [[score.itm for score in own] for own in self.filter.score(pictures.pixels, texts)]


class Theirs:
    """transformers."""

    def __init__(self, directory: Path, ours: Ours, sampling: Sampling) -> None:
        self._device, self._dtype = ours.captioner._blip.device, ours.captioner._blip.dtype
        with quiet():
            self.captioner, self.filter = (
                kind.from_pretrained(directory / role).eval().to(self._device, self._dtype)
                for kind, role in ((BlipForConditionalGeneration, "captioner"), (BlipForImageTextRetrieval, "filter"))
            )
        self._blip, self._sampling = ours.captioner._blip, sampling
        rules = ours.captioner._rules
        self._prompt, self._banned = list(rules.prompt), rules.banned_V.nonzero().flatten().tolist()

    def pixel_values(self, pictures: Pictures) -> Tensor:
        """On the device, normalised."""
        return normalise(pictures.pixels.to(self._device), self._dtype).contiguous()

    def write(self, pixel_values: Tensor, **how: Any) -> list[list[str]]:
        """Captions of each image."""
        s, images = self._sampling, len(pixel_values)
        row = [*self._prompt, 0]  # generate() cuts the last, meant for [SEP]
        prompt = torch.tensor([row] * images, device=self._device)
        ids = self.captioner.generate(
            pixel_values=pixel_values,
            input_ids=prompt,
            suppress_tokens=self._banned,
            repetition_penalty=s.repetition_penalty,
            min_new_tokens=s.min_tokens,
            max_new_tokens=s.max_tokens,
            **how,
        )
        texts = [
            self._blip.tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, len(prompt[0]) - 1 :].tolist()
        ]
        each = len(texts) // images
        return [texts[n * each : (n + 1) * each] for n in range(images)]

    def sample(self, pixel_values: Tensor) -> list[list[str]]:
        """Sampled captions, K of each image."""
        s = self._sampling
        return self.write(pixel_values, do_sample=True, top_p=s.top_p, top_k=0, num_return_sequences=s.candidates)

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """Ids and mask."""
        rows = [[self._blip.cls, *self._blip.ids(text), self._blip.sep] for text in texts]
        ids, mask = padded(rows, self._blip.pad)
        return {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}

    def documented(self, pictures: Pictures) -> list[list[float]]:
        """As the pages show."""
        pixel_values = self.pixel_values(pictures)
        columns = [pictures.web, *map(list, zip(*self.sample(pixel_values), strict=True))]
        scores = [
            self.filter(pixel_values=pixel_values, use_itm_head=True, **self.tokens(column))[0].float().softmax(1)[:, 1]
            for column in columns
        ]
        return torch.stack(scores, 1).tolist()

    def hand_tuned(self, pictures: Pictures) -> list[list[float]]:
        """The vision transformer once an image and model."""
        pixel_values = self.pixel_values(pictures)
        captions = self.sample(pixel_values)
        return self.match(pixel_values, [[web, *own] for web, own in zip(pictures.web, captions, strict=True)])

    def match(self, pixel_values: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """All texts of all images in one pass of the text encoder."""
        seen = self.filter.vision_model(pixel_values).last_hidden_state
        each = len(texts[0])
        hidden = self.filter.text_encoder(
            **self.tokens([text for own in texts for text in own]),
            encoder_hidden_states=seen.repeat_interleave(each, 0),
        ).last_hidden_state
        return self.filter.itm_head(hidden[:, 0]).float().softmax(1)[:, 1].view(-1, each).tolist()


# --- measuring ---


def agree(ours: Ours, theirs: Theirs, pictures: Pictures) -> float:
    """Greedy captions and match probabilities. Returns the largest difference of these.

    Raises:
        SystemExit: they differ.
    """
    pixel_values = theirs.pixel_values(pictures)
    greedy = [own for (own,) in theirs.write(pixel_values, do_sample=False)]
    if (written := ours.captioner.describe(pictures.pixels, beams=1)) != greedy:
        raise SystemExit(f"greedy captions differ: {written} against {greedy}")
    texts = [[web, caption] for web, caption in zip(pictures.web, greedy, strict=True)]
    expected = torch.tensor(theirs.match(pixel_values, texts))
    scores = torch.tensor([[score.itm for score in own] for own in ours.filter.score(pictures.pixels, texts)])
    gap = (scores - expected).abs().max().item()
    if not gap <= TOLERANCE:
        raise SystemExit(f"match probabilities differ by {gap:.1e}")
    print(f"  {len(greedy)} greedy captions are the same; match probabilities differ by {gap:.1e} at most")
    return gap


def _linear_flops(x: Sequence[int], *_others: Any, out_shape: Sequence[int], **_more: Any) -> int:
    """Of a linear layer that is packed or split: of the one float32 product that it stands for."""
    return 2 * math.prod(x) * out_shape[-1]


def count_flops(ours: Ours, pictures: Pictures) -> int:
    """Of ours, attention spelled out in matrix products."""
    own: Any = {torch.ops.capfilt.split_linear: _linear_flops}
    own |= {torch.ops.mkl._mkl_linear: _linear_flops} if torch.backends.mkl.is_available() else {}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(SDPBackend.MATH):
        ours.run(pictures)
    return counter.get_total_flops()


VARIANTS: dict[str, dict[str, Any]] = {"ours": {}, "bfloat16": {"dtype": "bfloat16"}}


def serve(name: str, k: int, directory: Path, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Be one of the sides, or the check, for whoever asks at the other end of the pipe."""
    torch.set_num_threads(arguments.threads)
    if arguments.no_split:
        packed.splits = lambda _linear: False
    sampling = Sampling(candidates=k, min_tokens=arguments.tokens, max_tokens=arguments.tokens)
    batch = arguments.batch or max(arguments.images, 9)
    pictures = Pictures(arguments.images, arguments.image_size)

    def ours(**card: Any) -> Ours:
        return Ours(directory, arguments.image_size, batch, sampling, itc=not arguments.no_itc, **card)

    with torch.inference_mode():
        if name == "check":
            own = ours()
            gap = agree(own, Theirs(directory, own, sampling), pictures)
            pipe.send((gap, count_flops(own, pictures)))
            return
        if name in VARIANTS:
            run: Callable[[Pictures], Any] = ours(**VARIANTS[name]).run
        else:
            checkpoints.keep_freed_memory = lambda: None  # who uses transformers has none of it
            theirs = Theirs(directory, ours(), sampling)
            run = {"documented": theirs.documented, "hand-tuned": theirs.hand_tuned}[name]
        run(pictures)  # what is done once, and takes the memory that later runs use
        pipe.send(None)
        while (what := pipe.recv()) is not None:
            gc.collect()
            begin = time.perf_counter()
            answer = matrix_product_rate() if what == "rate" else run(pictures)
            pipe.send(answer if what == "rate" else (time.perf_counter() - begin) / arguments.images)


class Side:
    """One of the sides, in a process of its own: how it uses memory is not another's doing."""

    def __init__(self, name: str, k: int, directory: Path, arguments: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, there = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(name, k, directory, arguments, there), daemon=True)
        os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(name not in TARGETS))  # capfilt's own doing (capfilt.models)
        self._process.start()
        there.close()
        self.ready = self._pipe.recv()

    def ask(self, what: str) -> float:
        """Seconds an image of a `run`, or the matrix product's `rate`."""
        self._pipe.send(what)
        answer: float = self._pipe.recv()
        return answer

    def end(self) -> None:
        """End its process."""
        self._pipe.send(None)
        self._process.join()


def measure(k: int, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn."""
    print(f"k = {k}", flush=True)
    gap, flops = Side("check", k, directory, arguments).ready
    names = ["ours", *([] if arguments.only_ours else ["documented", "hand-tuned"])]
    names += ["bfloat16"] if arguments.bfloat16 else []
    sides = {name: Side(name, k, directory, arguments) for name in names}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    rates: list[float] = []
    for repeat in range(arguments.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            seconds[side].append(sides[side].ask("run"))
        rates.append(sides["ours"].ask("rate"))
        times = "  ".join(f"{side} {own[-1]:.3f}" for side, own in seconds.items())
        print(f"  s an image: {times}; matrix product {rates[-1] / 1e9:.0f} GFLOP/s", flush=True)
    for side in sides.values():
        side.end()
    used = spread([flops / arguments.images / s / rate for s, rate in zip(seconds["ours"], rates, strict=True)])
    print(
        f"  ours: {flops / arguments.images / 1e9:.0f} GFLOP an image at {100 * used['median']:.0f}% of the matrix "
        f"product's rate ({'met' if used['median'] >= OF_MATRIX_PRODUCT else 'MISSED'}: {OF_MATRIX_PRODUCT:.0%})"
    )
    result: dict[str, Any] = {
        "seconds_per_image": seconds,
        "flops_per_image": flops // arguments.images,
        "of_matrix_product": used,
        "matrix_product_flop_per_s": rates,
        "largest_difference": gap,
        "ratios": {},
    }
    for side in list(sides)[1:]:
        ratio = spread([theirs / own for theirs, own in zip(seconds[side], seconds["ours"], strict=True)])
        target = TARGETS.get(side, {}).get(k)
        word = "" if target is None else f" (target {target}: {'met' if ratio['median'] >= target else 'MISSED'})"
        print(f"  ours / {side}: {shown(ratio)} images/s{word}", flush=True)
        result["ratios"][side] = ratio
    return result


def eight_to_one(directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """The time of k = 8 as a multiple of k = 1's: the two in turn, for on a shared machine speeds drift."""
    sides = {k: Side("ours", k, directory, arguments) for k in (1, 8)}
    seconds: dict[int, list[float]] = {k: [] for k in sides}
    for repeat in range(arguments.repeats):
        for k in sides if repeat % 2 == 0 else reversed(sides):
            seconds[k].append(sides[k].ask("run"))
    for side in sides.values():
        side.end()
    ratio = spread([b / a for a, b in zip(seconds[1], seconds[8], strict=True)])
    times = ", ".join(f"k = {k} {statistics.median(own):.3f}" for k, own in seconds.items())
    word = "met" if ratio["median"] <= EIGHT_TO_ONE else "MISSED"
    print(f"in turn, s an image: {times}: k = 8 takes {shown(ratio)} the time (target at most {EIGHT_TO_ONE}: {word})")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--arch", choices=("base", "large"), default="base", help="(default base)")
    parser.add_argument("--image-size", type=int, default=384, help="side in pixels (default 384)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8], help="k (default 1 8)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of every caption (default 16)")
    parser.add_argument("--images", type=int, default=8, help="of a batch, on all sides (default 8)")
    parser.add_argument("--batch", type=int, help="ours: images, and texts, at a time (default: all the images)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="(default 3)")
    parser.add_argument("--only-ours", action="store_true", help="time no other side")
    parser.add_argument("--no-itc", action="store_true", help="ours: no image-text contrast")
    parser.add_argument("--no-split", action="store_true", help="ours: float32's own products, with AMX too")
    parser.add_argument("--bfloat16", action="store_true", help="time ours in bfloat16, too")
    arguments = parser.parse_args()
    chosen = {name: value for name, value in vars(arguments).items() if name != "json"}
    result: dict[str, Any] = {"machine": machine(), "arguments": chosen, "k": {}}
    print(result["machine"])
    print(
        f"{arguments.arch}, {arguments.image_size} px, {arguments.tokens} new tokens, {arguments.images} images, "
        f"{arguments.threads} threads, float32, median of {arguments.repeats}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoints(arguments.arch, arguments.image_size, Path(directory))
        for k in arguments.candidates:
            result["k"][k] = measure(k, Path(directory), arguments)
            gc.collect()
        if {1, 8} <= set(arguments.candidates):
            result["eight_to_one"] = eight_to_one(Path(directory), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
