"""A whole CapFilt run: capfilt against Data-Juicer's two operators, same weights, images, lengths and threads.

    python benchmarks/data_juicer.py [--candidates 1 8] [--images 16] [--tokens 16] [--repeats 3] [--json FILE]

Each side is the command that its user gives, a fresh process and a fresh cache over a Parquet of the same photographs
(300 crops of scikit-image's, long side 512 px) and web texts of ten words, in the columns it expects:

    ours    `capfilt run SPEC`: `--threads` workers of one core
    theirs  `dj-process --config FILE`: `image_captioning_mapper`, which keeps the original sample beside its k, then
            `image_text_matching_filter`; one process of `--threads` threads (OMP_NUM_THREADS, MKL_NUM_THREADS), or with
            `--processes` as many processes of one thread

*Cores*: with `np: n` Data-Juicer computes in n worker processes and lets torch have one thread in each, whatever the
environment says, so `np: 1` would leave all cores but one idle. `num_proc: 0` runs an operator in the main process,
with all threads. Either needs `auto_op_parallelism: false`: else the 16 GB it asks for a captioner set the number.
Which of the two is faster depends on the machine; what counts is ours against the faster.

Both load one checkpoint of each role in the hub's format, float32, random weights at real size (speed does not depend
on them). Both write k captions of exactly `--tokens` new tokens after the prompt, drawn from the 50 likeliest, and
score each and the web text, in their own batches (ours: what `batch_size: auto` is; theirs: 8, its own default); the
thresholds are 0, so all is kept and written.

*Token limit*: Data-Juicer asks `generate` for max_new_tokens=128, which no setting changes. Here its list of files to
import, `custom_operator_paths`, names one (LIMIT below) that sets the two limits in calls of that `generate`, and
nothing else. The captions of both sides are counted after every run.

*Candidates*: `keep_candidate_mode: all` makes Data-Juicer score all k, as we do; its default, `--mode random_any`,
scores one of the k, drawn by chance.

Data-Juicer lives in an environment of its own, made once in `--venv` by pip (PACKAGES below), with our torch's version.

*Whole* is from the start of a process to its end. *Marginal* is without start-up and loading: the difference between
runs of `--images` and of a quarter of them, by the image. Ratios are medians over the repeats, with the smallest and
largest; the sides take turns. Targets at base size, 384 px, 2 cores: k = 1 at least 1.8 x images/s, k = 8 at least 6 x.

*Rows*: in the timed runs, and before them in one of twelve rows, of which one has a web page for an image and one half
a JPEG. Ours are counted in the annotations, by status; theirs are the input rows that the output has any text of. With
thresholds of 0 the filter drops nothing, so a row that is missing was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from inference import PROMPT, WORDS, write_checkpoints
from measuring import machine, shown, spread
from pipeline_overhead import DISTINCT, photographs

from capfilt.dataset import CuratedDataset
from capfilt.schema import Source, Status

PACKAGES = (
    "py-data-juicer==1.6.1",
    "datasets>=4.7,<5",
    "huggingface_hub<1",
    "transformers==4.57.1",
    f"torch=={version('torch').partition('+')[0]}",
)
LIMIT = '''"""Every caption gets exactly {tokens} new tokens, where Data-Juicer says 128 at most."""

from transformers import BlipForConditionalGeneration

generate = BlipForConditionalGeneration.generate


def limited(self, **how):
    return generate(self, **how | {{"min_new_tokens": {tokens}, "max_new_tokens": {tokens}}})


BlipForConditionalGeneration.generate = limited
'''
IMAGE, END = "<__dj__image>", "<|__dj__eoc|>"  # Data-Juicer's marks of an image, and of the end of what belongs to it
TOP_K = 50  # transformers' default, which Data-Juicer leaves
BATCH = 8  # Data-Juicer's gpu_batch_size
TARGETS = {1: 1.8, 8: 6.0}
ROWS, PAGE, HALF = 12, 2, 9  # of the run with unusable images: how many, and which these are


# --- what both sides start from ---


@dataclass(frozen=True)
class Job:
    """What both sides are asked to do.

    Attributes:
        checkpoints: holds captioner/ and filter/.
        venv: Data-Juicer's environment.
        rows: web text and encoded image of each.
    """

    checkpoints: Path
    venv: Path
    rows: Sequence[tuple[str, bytes]]
    candidates: int
    tokens: int
    image_size: int
    threads: int
    mode: str
    processes: bool

    @property
    def keys(self) -> list[str]:
        """Of the rows."""
        return [f"{number:09d}" for number in range(len(self.rows))]


@dataclass(frozen=True)
class Run:
    """What a side did.

    Attributes:
        seconds: from the start of its process to the end.
        rows: of the input, by what became of them.
        kept: keys of those that the output has.
        errors: as the side itself counts them.
        words: of each caption, the prompt not counted; a word is a token here.
    """

    seconds: float
    rows: dict[str, int]
    kept: set[str]
    errors: int
    words: list[int]


def install(venv: Path) -> dict[str, str]:
    """Make Data-Juicer's environment, if it is not there. Returns the versions in it.

    Raises:
        SystemExit: it cannot be made.
    """
    python, stamp = venv / "bin" / "python", venv / "installed"
    if not stamp.exists() or stamp.read_text() != "\n".join(PACKAGES):
        print(f"making {venv}: {' '.join(PACKAGES)}", flush=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *PACKAGES]
        for command in ([sys.executable, "-m", "venv", str(venv)], pip):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise SystemExit(
                    f"{done.stdout[-3000:]}\n{venv}: Data-Juicer's environment could not be made: "
                    f"`{' '.join(command)}` exits with {done.returncode}. It needs a package index and some GB of "
                    "disk; or make it elsewhere, with the same packages, and name it by --venv"
                )
        stamp.write_text("\n".join(PACKAGES))
    names = ("py-data-juicer", "torch", "transformers", "datasets", "numpy", "pillow")
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    versions: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", ask], text=True))
    return versions


def timed(command: Sequence[str], folder: Path, threads: int) -> float:
    """Seconds of a process in a folder.

    Raises:
        SystemExit: it failed.
    """
    settings = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    caches = {name: str(folder / "cache") for name in ("HF_HOME", "DATA_JUICER_CACHE_HOME")}
    log = folder / "log"
    with log.open("w") as said:
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env={**os.environ, **settings, **caches}, stdout=said, stderr=said)
        seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{log.read_text()[-3000:]}\n`{' '.join(command)}` exits with {done.returncode}")
    return seconds


# --- sides ---


def run_ours(job: Job, folder: Path) -> Run:
    """`capfilt run` in a folder."""
    texts, images = zip(*job.rows, strict=True)
    table = {"key": job.keys, "caption": texts, "jpg": pa.array(images, pa.binary())}
    pq.write_table(pa.table(table), folder / "in.parquet")
    card = {
        "name": "random",
        "image_size": job.image_size,
        "placement": {"cpus": 1, "min_actors": job.threads, "max_actors": job.threads},
    }
    captioner, itm = ({**card, "checkpoint": {"path": str(job.checkpoints / r)}} for r in ("captioner", "filter"))
    spec = {
        "kind": "curate",
        "input": {"paths": "in.parquet"},
        "output": "out",
        "captioners": [{**captioner, "role": "captioner", "prompt": PROMPT}],
        "filters": [{**itm, "role": "filter", "first_token": "[CLS]"}],  # which transformers' model reads, too
        "sampling": {
            "candidates": job.candidates,
            "min_tokens": job.tokens,
            "max_tokens": job.tokens,
            "top_k": TOP_K,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
        },
        "thresholds": {"web": 0.0, "synthetic": 0.0},
        "keep": "all-above-threshold",
        "fragment_rows": max(1, len(job.rows) // (2 * job.threads)),  # a file of few rows, for all workers
        "max_error_fraction": 1.0,
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    seconds = timed([sys.executable, "-m", "capfilt", "run", "spec.yaml"], folder, job.threads)
    annotations = CuratedDataset.for_reading(str(folder / "out"), {}).annotations()
    table = annotations.to_table(columns=["key", "status", "texts"]).to_pydict()
    by_status = Counter(table["status"])
    rows = {status.value: by_status[status] for status in Status}
    rows["lost"] = len(job.rows) - sum(rows.values())
    kept = {key for key, status in zip(table["key"], table["status"], strict=True) if status == Status.KEPT}
    captions = [text["text"] for own in table["texts"] for text in own if text["source"] == Source.SYNTHETIC]
    words = [len(caption.split()) for caption in captions if caption is not None]
    return Run(seconds, rows, kept, rows[Status.ERROR], words)


def run_theirs(job: Job, folder: Path) -> Run:
    """`dj-process` in a folder."""
    texts, images = zip(*job.rows, strict=True)
    table = {
        "key": job.keys,
        "text": [f"{IMAGE} {text}" for text in texts],
        "images": pa.array([[image] for image in images], pa.list_(pa.binary())),
    }
    pq.write_table(pa.table(table), folder / "in.parquet")
    (folder / "limit.py").write_text(LIMIT.format(tokens=job.tokens))
    captioning = {
        "hf_img2seq": str(job.checkpoints / "captioner"),
        "caption_num": job.candidates,
        "keep_candidate_mode": job.mode,
        "keep_original_sample": True,
        "prompt": PROMPT,
        "batch_size": BATCH,
        "gpu_batch_size": BATCH,
    }
    matching = {"hf_blip": str(job.checkpoints / "filter"), "min_score": 0.0}
    operators = {"image_captioning_mapper": captioning, "image_text_matching_filter": matching}
    main_process = {} if job.processes else {"num_proc": 0}
    recipe = {
        "dataset": {"configs": [{"type": "local", "path": str(folder / "in.parquet")}]},
        "export_path": str(folder / "out" / "out.parquet"),
        "np": job.threads if job.processes else 1,
        "auto_op_parallelism": False,
        "open_monitor": False,
        "use_cache": False,
        "custom_operator_paths": [str(folder / "limit.py")],
        "process": [{name: settings | main_process} for name, settings in operators.items()],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    seconds = timed([str(job.venv / "bin" / "dj-process"), "--config", "recipe.yaml"], folder, job.threads)
    table = pq.read_table(folder / "out" / "out.parquet", columns=["key", "text"]).to_pydict()
    kept = set(table["key"])
    captions = [text.removeprefix(IMAGE).removesuffix(END) for text in table["text"] if text.endswith(END)]
    words = [len(caption.split()) - len(PROMPT.split()) for caption in captions]
    errors = re.findall(r"^Errors: (\d+)$", (folder / "log").read_text(), re.MULTILINE)
    return Run(seconds, {"kept": len(kept), "lost": len(job.rows) - len(kept)}, kept, int(errors[-1]), words)


SIDES: dict[str, Callable[[Job, Path], Run]] = {"ours": run_ours, "Data-Juicer": run_theirs}


def run(side: str, job: Job) -> Run:
    """One side, in a folder that is gone afterwards.

    Raises:
        SystemExit: its captions have another length.
    """
    with tempfile.TemporaryDirectory(prefix="data-juicer-") as folder:
        done = SIDES[side](job, Path(folder))
    # Data-Juicer may draw a special token, which is no word in the end; never a token more.
    if not done.words or max(done.words) > job.tokens or statistics.median(done.words) != job.tokens:
        raise SystemExit(f"{side}: captions of {sorted(Counter(done.words).items())} (words, times), not {job.tokens}")
    return done


# --- measuring ---


def measure(job: Job, repeats: int) -> dict[str, Any]:
    """Both sides in turn, all images and a quarter of them."""
    print(f"k = {job.candidates}", flush=True)
    few, many = max(1, len(job.rows) // 4), len(job.rows)
    seconds: dict[str, dict[int, list[float]]] = {side: {few: [], many: []} for side in SIDES}
    rows: dict[str, dict[str, int]] = {}
    for repeat in range(repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            for count in (few, many):
                done = run(side, replace(job, rows=job.rows[:count]))
                seconds[side][count].append(done.seconds)
                rows[side] = done.rows
            took = ", ".join(f"{own[-1]:.1f} s for {count}" for count, own in seconds[side].items())
            print(f"  {side}: {took} images; of {many} rows {rows[side]}", flush=True)
    result: dict[str, Any] = {"seconds": seconds, "rows": rows, "images_per_s": {}, "ratios": {}}
    whole = {side: [s / many for s in own[many]] for side, own in seconds.items()}
    marginal = {
        side: [(b - a) / (many - few) for a, b in zip(own[few], own[many], strict=True)]
        for side, own in seconds.items()
    }
    for name, each in {"whole": whole, "marginal": marginal}.items():
        if min(min(own) for own in each.values()) <= 0:
            print(f"  {name}: {many} images take no longer than {few}: too few to tell")
            continue
        rates = {side: 1 / statistics.median(own) for side, own in each.items()}
        ratio = spread([b / a for a, b in zip(each["ours"], each["Data-Juicer"], strict=True)])
        target = TARGETS.get(job.candidates)
        word = "" if target is None else f" (target {target}: {'met' if ratio['median'] >= target else 'MISSED'})"
        speeds = ", ".join(f"{side} {rate:.3f}" for side, rate in rates.items())
        print(f"  {name}: images/s {speeds}; ours / Data-Juicer: {shown(ratio)}{word}", flush=True)
        result["images_per_s"][name], result["ratios"][name] = rates, ratio
    return result


def account(job: Job) -> dict[str, dict[str, int]]:
    """Both sides over a few rows, two of them unusable. Returns what became of the rows."""
    rows = list(job.rows[:ROWS])
    rows[PAGE] = (rows[PAGE][0], b"<!DOCTYPE html><title>404 Not Found</title>")
    rows[HALF] = (rows[HALF][0], rows[HALF][1][: len(rows[HALF][1]) // 2])
    small = replace(job, rows=rows, candidates=1)
    unusable = {small.keys[n] for n in (PAGE, HALF)}
    print(f"{ROWS} rows, a web page for the image of one and half a JPEG for that of another")
    became: dict[str, dict[str, int]] = {}
    for side in SIDES:
        done = run(side, small)
        became[side] = {**done.rows, "unusable but kept": len(unusable & done.kept), "errors reported": done.errors}
        print(f"  {side}: exits with 0; {became[side]}", flush=True)
    return became


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--arch", choices=("base", "large"), default="base", help="(default base)")
    parser.add_argument("--image-size", type=int, default=384, help="side in pixels (default 384)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8], help="k (default 1 8)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of every caption (default 16)")
    parser.add_argument("--images", type=int, default=16, help=f"2 to {DISTINCT} (default 16)")
    parser.add_argument("--threads", type=int, default=2, help="(default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side and number of images (default 3)")
    parser.add_argument("--mode", choices=("all", "random_any"), default="all", help="(default all)")
    parser.add_argument("--processes", action="store_true", help="theirs: --threads processes of one thread each")
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "runs" / "data-juicer-venv",
        help="Data-Juicer's environment; made if it is not there (default runs/data-juicer-venv)",
    )
    arguments = parser.parse_args()
    if not 2 <= arguments.images <= DISTINCT:
        parser.error(f"--images: 2 to {DISTINCT}")
    venv = arguments.venv.absolute()
    chosen = {name: value for name, value in vars(arguments).items() if name not in ("json", "venv")}
    result: dict[str, Any] = {"machine": machine(), "data_juicer": install(venv), "arguments": chosen, "k": {}}
    print(result["machine"])
    print(f"Data-Juicer's: {result['data_juicer']}")
    print(
        f"{arguments.arch}, {arguments.image_size} px, {arguments.tokens} new tokens, {arguments.images} images, "
        f"{arguments.threads} threads, float32, median of {arguments.repeats}",
        flush=True,
    )
    words = np.random.default_rng(0).integers(100, WORDS, (DISTINCT, 10))
    web = [" ".join(f"w{word}" for word in row) for row in words]
    rows = list(zip(web, photographs(), strict=True))
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoints(arguments.arch, arguments.image_size, Path(directory))
        how = {name: getattr(arguments, name) for name in ("tokens", "image_size", "threads", "mode", "processes")}
        job = Job(checkpoints=Path(directory), venv=venv, rows=rows, candidates=1, **how)
        result["accounts"] = account(job)
        for k in arguments.candidates:
            result["k"][k] = measure(replace(job, rows=rows[: arguments.images], candidates=k), arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
