"""One training step of MED's pretraining (ITC + ITM + LM): capfilt against transformers' modules.

    python benchmarks/med_step.py [--arch base] [--batch 8] [--dropout 0] [--threads 2] [--repeats 5] [--json FILE]
    python benchmarks/med_step.py --device cuda --bf16 --batch 48
    python benchmarks/med_step.py --device cuda --bf16 --batch 256 --only-ours

Ours: `capfilt.models.train.Training` over `PretrainObjective`, a whole step as a run does it: momentum update, twin,
queue, three losses, backward, gradient norm, AdamW. Reference: the same step put together from transformers'
`BlipVisionModel`, `BlipTextModel` and `BlipTextLMHeadModel` in the order of salesforce/BLIP, models/blip_pretrain.py,
as someone would who has the paper and transformers. Targets: ours no slower, aim 1.15 x; peak memory at most 0.8 x.

First both compute the losses of one batch in float32, without dropout, and must agree within 1e-4: same weights, same
queue, and the same negatives (the reference draws them by our rule: student's similarities and our noise; published are
the twin's as candidates and torch.multinomial). The reference leaves out the image's mask, which is all ones. Then the
norms of their first gradients must agree within 1e-4 of it, unless dropout or bfloat16 makes them differ.

Dropout is 0 on both sides unless `--dropout` gives another, of hidden states and attention; a run with `architecture:
base` trains with 0.1. The printed line says which it was.

Each side is a process of its own; they take turns, one step each, the order alternating, while the other waits on its
pipe. Times are the worker's wall clock around a step; *CPU* is user and system time of all its threads, the steadier
number on a machine that does other work. Speeds are medians over the pairs, with the smallest and largest in brackets.

Memory is the largest resident set of a side's process (cuda: what torch allocated at most). *Stays* is what lives from
step to step: weights, twin, queue and Adam's moments. *A step's own* is the peak less that and less what the process
had before it made anything (interpreter, torch, transformers): gradients and activations.

FLOPs are those of matrix products, 2 for a multiply and add, counted on 8 rows at most, with attention spelled out in
matrix products. The matrix product's rate is that of square matrices of side 2,048 (cuda: 8,192) of the steps' type,
measured between the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import machine, matrix_product_rate, spread, wait
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own name for it
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from capfilt.models.initial import blip_config
from capfilt.models.losses import NEGATIVE_FLOOR
from capfilt.models.med import Batch, Losses, MatchSettings, Med, PretrainObjective, Tokens
from capfilt.models.tokenizer import bert_tokenizer
from capfilt.models.train import Training
from capfilt.spec import ARCHITECTURES, Architecture, Optimiser, TextTower, VisionTower

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of the norm, relative
COUNTED_ROWS = 8
SLOWEST, AIM, MEMORY = 1.0, 1.15, 0.8
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CLS, SEP = 2, 3
ALPHA, SMOOTHING = 0.4, 0.1
SETTINGS = MatchSettings()
OPTIMISER = Optimiser(lr=1e-5, warmup_steps=0)
SEED = 0  # Training then seeds the noise of a step with the step's number
TINY = Architecture(
    vision=VisionTower(width=48, depth=2, heads=3, mlp=96),
    text=TextTower(width=32, depth=2, heads=2, mlp=64, positions=64),
    joint=16,
)
MIB = 2**20


# --- what both sides start from ---


def make_config(arguments: argparse.Namespace) -> BlipConfig:
    """The architecture; its vocabulary has as many tokens as BLIP's (tiny: 1,000), [DEC] and [ENC] last."""
    architecture = ARCHITECTURES.get(arguments.arch, TINY)
    text = architecture.text.model_copy(update={"dropout": arguments.dropout})
    words = 998 if arguments.arch == "tiny" else 30_522
    vocabulary = [*SPECIAL, *(f"word{n}" for n in range(words - len(SPECIAL)))]
    tokenizer = bert_tokenizer({word: n for n, word in enumerate(vocabulary)})
    return blip_config(architecture.model_copy(update={"text": text}), arguments.image_size, tokenizer)


def make_tokens(config: BlipConfig) -> Tokens:
    """[DEC] and [ENC]."""
    dec = config.text_config.bos_token_id
    return Tokens(enc=dec + 1, dec=dec)


def make_batch(arguments: argparse.Namespace, config: BlipConfig) -> Batch:
    """Random images, each with a text of 6 random tokens to the longest, and padded to the longest, as published."""
    generator = torch.Generator().manual_seed(1)
    rows, longest = arguments.batch, arguments.tokens
    pixels = torch.randn(rows, 3, arguments.image_size, arguments.image_size, generator=generator)
    lengths = torch.randint(6, longest + 1, (rows, 1), generator=generator)
    ids = torch.randint(len(SPECIAL), config.text_config.bos_token_id, (rows, longest), generator=generator)
    at = torch.arange(longest)
    ids[:, 0] = CLS
    ids = ids.masked_fill(at == lengths - 1, SEP).masked_fill(at >= lengths, 0)
    parts = (pixels, ids, (at < lengths).long(), torch.arange(rows))
    return Batch(*(part.to(arguments.device) for part in parts))


@torch.no_grad()
def draw_weights(network: nn.Module) -> None:
    """Weights of variance 1 / fan-in, in the order of names: rows differ, and so do losses of other negatives."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in sorted(network.named_parameters()):
        most = 0.1 if weight.dim() < 2 else (3 / weight[0].numel()) ** 0.5
        is_norm = weight.dim() < 2 and name.endswith("weight")
        weight.uniform_(-most, most, generator=generator).add_(1.0 if is_norm else 0.0)


def queue_generator() -> torch.Generator:
    """Draws the queues' start."""
    return torch.Generator().manual_seed(3)


# --- ours ---


class Ours:
    """The step as capfilt trains."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = make_config(arguments)
        network = Med(config)
        draw_weights(network)
        objective = PretrainObjective(network, make_tokens(config), SETTINGS, SMOOTHING, queue_generator())
        self.module = objective.to(arguments.device)
        self.batch = make_batch(arguments, config)
        training = Training(
            objective,
            objective,
            OPTIMISER,
            steps_per_epoch=10**6,
            total=10**6,
            alpha_target=ALPHA,
            alpha_epochs=0,
            autocast=arguments.bf16,
            seed=SEED,
        )
        self.adam = training.adam
        self._metrics: dict[str, float] = {}
        batches = iter(lambda: self.batch, None)
        self._steps = training.run(batches, self._metrics.update, lambda said: print(said, file=sys.stderr))

    def losses(self, noise: torch.Generator) -> Losses:
        """Of the batch."""
        losses: Losses = self.module(self.batch, ALPHA, noise)
        return losses

    def step(self) -> dict[str, float]:
        """One step. Returns its losses."""
        next(self._steps)
        return {name: self._metrics[name] for name in Losses._fields}

    def gradient_norm(self) -> float:
        """Of the step before."""
        return self._metrics["gradient_norm"]


# --- reference ---


class ReferenceMed(nn.Module):
    """BLIP's pretraining from transformers' modules, in the order of models/blip_pretrain.py."""

    def __init__(self, config: BlipConfig, tokens: Tokens) -> None:
        super().__init__()
        text, joint = config.text_config, config.image_text_hidden_size
        text.label_smoothing = SMOOTHING
        self.tokens, self.momentum = tokens, SETTINGS.momentum
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, joint)
        self.text_proj = nn.Linear(text.hidden_size, joint)
        self.itm_head = nn.Linear(text.hidden_size, 2)
        self.text_decoder = BlipTextLMHeadModel(text)
        self._share()
        draw_weights(self)
        online = (self.vision_model, self.vision_proj, self.text_encoder, self.text_proj)
        self.pairs = [(module, copy.deepcopy(module).requires_grad_(False)) for module in online]
        self.twins = nn.ModuleList(twin for _, twin in self.pairs)
        self.temp = nn.Parameter(torch.tensor(SETTINGS.temperature))
        generator = queue_generator()
        for name in ("image_queue", "text_queue"):  # [E, Q]
            drawn = torch.randn(SETTINGS.queue, joint, generator=generator)
            self.register_buffer(name, F.normalize(drawn, dim=1).T.contiguous())
        self.pointer = 0

    def _share(self) -> None:
        """All but self-attention is one in encoder and decoder."""
        bert, head = self.text_decoder.bert, self.text_decoder.cls.predictions
        bert.embeddings = self.text_encoder.embeddings
        for own, shared in zip(bert.encoder.layer, self.text_encoder.encoder.layer, strict=True):
            own.crossattention, own.intermediate, own.output = shared.crossattention, shared.intermediate, shared.output
        head.decoder.weight, head.decoder.bias = bert.embeddings.word_embeddings.weight, head.bias

    @torch.no_grad()
    def follow(self) -> None:
        """The twins' step, and the temperature's bounds."""
        self.temp.clamp_(0.001, 0.5)
        for module, twin in self.pairs:
            for p, p_m in zip(module.parameters(), twin.parameters(), strict=True):
                p_m.data.mul_(self.momentum).add_(p.data, alpha=1 - self.momentum)

    def forward(self, batch: Batch, noise: torch.Generator) -> Losses:
        """A batch's losses; the twins' features of it enter the queue."""
        image_embeds = self.vision_model(batch.pixels).last_hidden_state
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        text_embeds = self.text_encoder(batch.ids, attention_mask=batch.mask).last_hidden_state
        text_feat = F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)
        itc = self._itc(batch, image_feat, text_feat)
        itm = self._itm(batch, image_embeds, image_feat, text_feat, noise)

        decoder_ids = batch.ids.clone()
        decoder_ids[:, 0] = self.tokens.dec
        labels = decoder_ids.masked_fill(batch.mask == 0, -100)
        lm = self.text_decoder(
            decoder_ids, attention_mask=batch.mask, encoder_hidden_states=image_embeds, labels=labels
        ).loss
        return Losses(itc, itm, lm)

    def _itc(self, batch: Batch, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        vision_m, vision_proj_m, text_m, text_proj_m = self.twins
        with torch.no_grad():
            image_feat_m = F.normalize(vision_proj_m(vision_m(batch.pixels).last_hidden_state[:, 0]), dim=-1)
            hidden_m = text_m(batch.ids, attention_mask=batch.mask).last_hidden_state
            text_feat_m = F.normalize(text_proj_m(hidden_m[:, 0]), dim=-1)
            images = torch.cat([image_feat_m.t(), self.image_queue], 1)
            texts = torch.cat([text_feat_m.t(), self.text_queue], 1)
            sim_i2t_m, sim_t2i_m = image_feat_m @ texts / self.temp, text_feat_m @ images / self.temp
            targets = torch.zeros_like(sim_i2t_m).fill_diagonal_(1)
            i2t_targets = ALPHA * F.softmax(sim_i2t_m, 1) + (1 - ALPHA) * targets
            t2i_targets = ALPHA * F.softmax(sim_t2i_m, 1) + (1 - ALPHA) * targets
        sim_i2t, sim_t2i = image_feat @ texts / self.temp, text_feat @ images / self.temp
        loss_i2t = -(F.log_softmax(sim_i2t, 1) * i2t_targets).sum(1).mean()
        loss_t2i = -(F.log_softmax(sim_t2i, 1) * t2i_targets).sum(1).mean()
        self._enqueue(image_feat_m, text_feat_m)
        return (loss_i2t + loss_t2i) / 2

    @torch.no_grad()
    def _enqueue(self, image_feat_m: Tensor, text_feat_m: Tensor) -> None:
        rows = slice(self.pointer, self.pointer + len(image_feat_m))
        self.image_queue[:, rows], self.text_queue[:, rows] = image_feat_m.T, text_feat_m.T
        self.pointer = rows.stop % SETTINGS.queue

    def _itm(
        self, batch: Batch, image_embeds: Tensor, image_feat: Tensor, text_feat: Tensor, noise: torch.Generator
    ) -> Tensor:
        enc_ids, mask, rows = batch.ids.clone(), batch.mask, len(batch.ids)
        enc_ids[:, 0] = self.tokens.enc
        positive = self.text_encoder(enc_ids, attention_mask=mask, encoder_hidden_states=image_embeds)

        with torch.no_grad():
            drawn = torch.rand(2, rows, rows, generator=noise).clamp(1e-7, 1 - 1e-7).to(mask.device)
            sim = image_feat @ text_feat.T / self.temp
            text_neg, image_neg = self._negatives(sim, drawn[0]), self._negatives(sim.T, drawn[1])
        negative = self.text_encoder(
            torch.cat([enc_ids, enc_ids[text_neg]]),
            attention_mask=torch.cat([mask, mask[text_neg]]),
            encoder_hidden_states=torch.cat([image_embeds[image_neg], image_embeds]),
        )
        first = torch.cat([positive.last_hidden_state[:, 0], negative.last_hidden_state[:, 0]])
        labels = torch.cat([torch.ones(rows, dtype=torch.long), torch.zeros(2 * rows, dtype=torch.long)])
        return F.cross_entropy(self.itm_head(first), labels.to(mask.device))

    @staticmethod
    def _negatives(sim: Tensor, drawn: Tensor) -> Tensor:
        """One of each row's, in proportion to its weight, as torch.multinomial; by a Gumbel race, which is ours."""
        weights = (F.softmax(sim.float(), 1) + NEGATIVE_FLOOR).fill_diagonal_(0)
        return (weights.log() - (-drawn.log()).log()).argmax(1)


class Reference:
    """The step from transformers' modules."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = make_config(arguments)
        self.module = ReferenceMed(config, make_tokens(config)).to(arguments.device)
        self.batch = make_batch(arguments, config)
        self._device, self._bf16, self._number = arguments.device, arguments.bf16, 0
        self.adam = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad],
            lr=OPTIMISER.lr,
            betas=OPTIMISER.betas,
            weight_decay=OPTIMISER.weight_decay,
        )

    def losses(self, noise: torch.Generator) -> Losses:
        """Of the batch."""
        losses: Losses = self.module(self.batch, noise)
        return losses

    def step(self) -> dict[str, float]:
        """One step. Returns its losses."""
        self.module.train()
        noise = torch.Generator().manual_seed(self._number)
        self._number += 1
        self.adam.zero_grad()
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            self.module.follow()
            losses = self.losses(noise)
            loss = losses.itc + losses.itm + losses.lm
        loss.backward()
        self.adam.step()
        return {name: loss.item() for name, loss in losses._asdict().items()}

    def gradient_norm(self) -> float:
        """Of the step before, whose gradients are still there."""
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))


# --- a worker: one side in a process ---


class Worker:
    """Answers the parent's requests, names of its methods, one at a time; between them it waits and uses no core."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        self._at_start = psutil.Process().memory_info().rss
        self._cuda = arguments.device == "cuda"
        self._arguments = arguments
        self._side: Ours | Reference = {"ours": Ours, "reference": Reference}[arguments.side](arguments)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def check(self) -> dict[str, float]:
        """Losses of the batch, float32, no dropout."""
        self._side.module.eval()
        with torch.no_grad():
            losses = self._side.losses(torch.Generator().manual_seed(SEED))
        return {name: loss.item() for name, loss in losses._asdict().items()}

    def step(self) -> dict[str, Any]:
        """A step, timed."""
        wait(self._arguments.device)
        cpu, begin = time.process_time(), time.perf_counter()
        losses = self._side.step()
        wait(self._arguments.device)
        taken = {"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
        return taken | {"losses": losses, "gradient_norm": self._side.gradient_norm()}

    def memory(self) -> dict[str, float]:
        """MiB."""
        module, adam = self._side.module, self._side.adam
        moments = (x for state in adam.state.values() for x in state.values())
        stays = sum(x.nbytes for x in itertools.chain(module.parameters(), module.buffers(), moments))
        if self._cuda:
            peak, at_start = torch.cuda.max_memory_allocated(), 0
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak, at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, self._at_start
        sizes = {"peak": peak, "before": at_start, "stays": stays, "step": peak - at_start - stays}
        return {name: round(size / MIB) for name, size in sizes.items()}

    def flops(self) -> int:
        """Of a step. Ask last: it changes the batch."""
        side, rows = self._side, min(COUNTED_ROWS, self._arguments.batch)
        side.batch = Batch(*(getattr(side.batch, field)[:rows] for field in Batch.__slots__))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            side.step()
        return counter.get_total_flops() * self._arguments.batch // rows

    def serve(self) -> None:
        """Until the parent closes the pipe."""
        for line in sys.stdin:
            print(json.dumps(getattr(self, line.strip())()), flush=True)


class Remote:
    """A worker, from the parent's side."""

    def __init__(self, side: str) -> None:
        command = [sys.executable, __file__, f"--side={side}", *sys.argv[1:]]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, name: str) -> Any:
        """Request and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"a worker ended with {self._process.wait()} when asked for {name}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# --- measuring ---


def agree(workers: dict[str, Remote]) -> dict[str, Any]:
    """Losses of the sides.

    Raises:
        SystemExit: they differ.
    """
    losses = {side: worker.ask("check") for side, worker in workers.items()}
    for side, row in losses.items():
        print(f"  losses, {side:10}" + "".join(f"{name:>6} {loss:.6f}" for name, loss in row.items()))
    if "reference" not in losses:
        return {"losses": losses}
    gap = max(abs(losses["ours"][name] - losses["reference"][name]) for name in Losses._fields)
    if not gap <= TOLERANCE:
        raise SystemExit(f"the sides differ by {gap:.2e}, more than {TOLERANCE}: they do not compute the same")
    print(f"  they agree: the largest difference is {gap:.1e} (at most {TOLERANCE})")
    return {"losses": losses, "largest_difference": gap}


def warm_up(workers: dict[str, Remote], arguments: argparse.Namespace) -> dict[str, float]:
    """A step of each, which makes Adam's moments. Returns the norms of its gradients.

    Raises:
        SystemExit: they differ, where neither dropout nor bfloat16 is the cause.
    """
    norms = {side: worker.ask("step")["gradient_norm"] for side, worker in workers.items()}
    print("  norm of the first gradient: " + ", ".join(f"{side} {norm:.5f}" for side, norm in norms.items()))
    least, most = min(norms.values()), max(norms.values())
    if most > least * (1 + GRADIENT_TOLERANCE) and not arguments.bf16 and not arguments.dropout:
        raise SystemExit("the sides' gradients differ: they do not compute the same")
    return norms


def measure(workers: dict[str, Remote], arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps in turn. Returns them, and what they come to by side."""
    sides = list(workers)
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    rates: list[float] = []
    for repeat in range(arguments.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            steps[side].append(workers[side].ask("step"))
        rates.append(matrix_product_rate(arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32))
        times = "  ".join(f"{side} {steps[side][-1]['s']:.3f} s (CPU {steps[side][-1]['cpu_s']:.2f})" for side in sides)
        print(f"  {times}  matrix product {rates[-1] / 1e12:.3f} TFLOP/s", flush=True)
    result: dict[str, Any] = {"steps": steps, "matrix_product_flop_per_s": rates, "sides": {}}
    for side, worker in workers.items():
        mib, flops = worker.ask("memory"), worker.ask("flops")  # in this order
        speed = spread([arguments.batch / step["s"] for step in steps[side]])
        used = spread([flops / step["s"] / rate for step, rate in zip(steps[side], rates, strict=True)])
        row = {"samples_per_s": speed, "flops_per_step": flops, "of_matrix_product": used, "mib": mib}
        result["sides"][side] = row
        print(
            f"  {side:10}{speed['median']:9.3f} samples/s  {flops / 1e12:.3f} TFLOP a step at "
            f"{100 * used['median']:.1f}% of the matrix product's rate  peak {mib['peak']} MiB "
            f"(before {mib['before']}, stays {mib['stays']}, a step's own {mib['step']})",
            flush=True,
        )
    return result


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Ours against the reference, by pairs of steps."""
    pairs = list(zip(result["steps"]["ours"], result["steps"]["reference"], strict=True))
    ours, theirs = (result["sides"][side]["mib"] for side in ("ours", "reference"))
    ratios = {
        "samples_per_s": spread([theirs["s"] / ours["s"] for ours, theirs in pairs]),
        "samples_per_cpu_s": spread([theirs["cpu_s"] / ours["cpu_s"] for ours, theirs in pairs]),
        "peak_memory": ours["peak"] / theirs["peak"],
        "memory_of_a_step": ours["step"] / theirs["step"],
    }
    gap = max(abs(ours["losses"][name] - theirs["losses"][name]) for ours, theirs in pairs for name in Losses._fields)
    print(f"  largest difference between the losses of the timed steps: {gap:.1e} (dropout and bfloat16 widen it)")
    speed, cpu = ratios["samples_per_s"], ratios["samples_per_cpu_s"]
    print(
        f"  ours / reference: {speed['median']:.3f} x the samples/s ({speed['min']:.3f} to {speed['max']:.3f}), "
        f"by CPU time {cpu['median']:.3f} x ({cpu['min']:.3f} to {cpu['max']:.3f}); "
        f"memory {ratios['peak_memory']:.3f} x, a step's own {ratios['memory_of_a_step']:.3f} x"
    )
    met = {"no slower": speed["median"] >= SLOWEST, "aim": speed["median"] >= AIM}
    met["memory"] = ratios["peak_memory"] <= MEMORY
    words = {name: "met" if good else "MISSED" for name, good in met.items()}
    print(
        f"  targets: no slower ({words['no slower']}), aim {AIM}x ({words['aim']}); "
        f"memory at most {MEMORY}x ({words['memory']})"
    )
    return ratios | {"largest_difference_of_timed_losses": gap, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--arch", choices=("tiny", "base", "large"), default="base", help="(default base)")
    parser.add_argument("--batch", type=int, default=8, help="images, each with a text (default 8)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default 224)")
    parser.add_argument("--tokens", type=int, default=30, help="of the longest text; others are padded (default 30)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the text transformer (default 0; published 0.1)")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    parser.add_argument("--bf16", action="store_true", help="forward pass under autocast to bfloat16")
    parser.add_argument("--only-ours", action="store_true", help="without the reference, whose memory then is free")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.only_ours and SETTINGS.queue % arguments.batch:
        parser.error(f"--batch: the published queue takes divisors of {SETTINGS.queue}, not {arguments.batch}")
    if arguments.side:
        Worker(arguments).serve()
        return
    torch.set_num_threads(arguments.threads)
    chosen = {name: value for name, value in vars(arguments).items() if name not in ("json", "side")}
    result: dict[str, Any] = {"machine": machine(arguments.device), "arguments": chosen}
    print(result["machine"])
    print(
        f"{arguments.arch}, batch {arguments.batch}, {arguments.image_size} px, {arguments.tokens} tokens, "
        f"dropout {arguments.dropout} on both sides, {'bfloat16 autocast' if arguments.bf16 else 'float32'}, "
        f"{arguments.device}, {arguments.threads} threads, median of {arguments.repeats}"
    )
    workers = {side: Remote(side) for side in (("ours",) if arguments.only_ours else ("ours", "reference"))}
    try:
        result["agreement"] = agree(workers)
        result["gradient_norm"] = warm_up(workers, arguments)
        result |= measure(workers, arguments)
    finally:
        for worker in workers.values():
            worker.close()
    if not arguments.only_ours:
        result["ours / reference"] = compare(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
