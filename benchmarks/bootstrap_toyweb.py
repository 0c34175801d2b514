"""BLIP's table 1 on the toy web: pipelines/bootstrap-toyweb.yaml over several seeds, one after the other.

    python benchmarks/bootstrap_toyweb.py [--seeds 0 1 2] [--runs runs] [--json FILE]

A seed draws everything anew: the web and its noise, the clean pairs, the test set, the initial weights, the order of
the data, the captions. Each seed renders its web and runs the spec as a user would, with the command line; one that was
begun in `--runs` before is resumed, or left alone if done, and is not timed. Printed are the means over the seeds with
the smallest and largest in brackets: R@1 is the mean of both ways among the 576 scenes, by ITC alone and, as BLIP
reports it, reranked by ITM; a caption is right if it names all four attributes of the picture and nothing else (greedy
search).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
AUC, NOISE_RATIO, MINUTES = 0.95, 0.25, 30.0


def run_seed(seed: int, runs: Path) -> tuple[dict[str, Any], float]:
    """The tables of a seed, and the seconds from rendering to the last table; not a number if it was begun before."""
    web, output = runs / f"toyweb-{seed}", runs / f"bootstrap-toyweb-{seed}"
    capfilt = [sys.executable, "-m", "capfilt"]
    begin = time.monotonic()
    fresh = not output.exists()
    if not (web / "test" / "shards").exists():
        subprocess.run([*capfilt, "toyweb", str(web), "--seed", str(seed)], check=True)
    settings = {
        "web.paths": web / "web" / "shards",
        "human.paths": web / "human" / "shards",
        "output": output,
        "seed": seed,
        "truth.toyweb": web / "web",
        "evaluate.pairs.paths": web / "test" / "shards",
        "evaluate.truth.toyweb": web / "test",
    }
    command = [*capfilt, "run", str(ROOT / "pipelines" / "bootstrap-toyweb.yaml")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    subprocess.run(command, check=True)
    tables = json.loads((output / "bootstrap.json").read_text(encoding="utf-8"))
    return tables, time.monotonic() - begin if fresh else float("nan")


def recall(found: dict[str, Any], how: str) -> float:
    """R@1, the mean of both ways."""
    ways = found["retrieval"][how]
    return statistics.mean((ways["image_to_text"]["1"], ways["text_to_image"]["1"]))


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "R@1, ITC": lambda found: recall(found, "itc"),
    "R@1, ITM": lambda found: recall(found, "itm"),
    "captions right": lambda found: found["captioning"]["exact"],
    "CIDEr": lambda found: found["captioning"]["cider"],
}


def web_measures(found: dict[str, Any]) -> dict[str, float]:
    """What a round made of the web."""
    (quality,) = found["quality"]
    web, synthetic = quality["sources"]["web"], quality["sources"]["synthetic"]
    return {
        "ROC AUC, web": web["roc_auc"],
        "precision, web": web["precision"],
        "recall, web": web["recall"],
        "ROC AUC, synthetic": synthetic["roc_auc"],
        "precision, synthetic": synthetic["precision"],
        "noise of the web": web["noise_before"],
        "noise kept": quality["noise_after"],
        "noise kept / of the web": quality["noise_after"] / web["noise_before"],
    }


def spread(values: Sequence[float]) -> str:
    """Mean, smallest and largest."""
    return f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models: dict[str, list[dict[str, float]]] = {}
    webs: dict[int, list[dict[str, float]]] = {}
    seconds = []
    for seed in arguments.seeds:
        tables, took = run_seed(seed, arguments.runs.absolute())
        seconds.append(took)
        for result in tables["results"]:
            found = result["evaluation"]
            name = f"{result['setting']}, round {result['round']}"
            models.setdefault(name, []).append({measure: of(found) for measure, of in MEASURES.items()})
            if found["quality"]:
                webs.setdefault(result["round"], []).append(web_measures(found))
    print(f"\nseeds {arguments.seeds}; minutes each: {', '.join(f'{took / 60:.1f}' for took in seconds)}")
    for name, rows in models.items():
        print(
            f"  {name:<15}" + "   ".join(f"{measure} {spread([row[measure] for row in rows])}" for measure in MEASURES)
        )
    for number, rows in webs.items():
        print(f"  the web, curated in round {number}")
        for measure in rows[0]:
            print(f"    {measure:<26}{spread([row[measure] for row in rows])}")
    print_verdicts(models, webs, seconds)
    if arguments.json:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        packages = {name: version(name) for name in ("torch", "transformers", "ray")}
        content = {**machine, "packages": packages, "seconds": seconds, "models": models, "webs": webs}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_verdicts(
    models: dict[str, list[dict[str, float]]], webs: dict[int, list[dict[str, float]]], seconds: list[float]
) -> None:
    """The claims, each with whether it held."""

    def mean(name: str, measure: str) -> float:
        return statistics.mean(row[measure] for row in models[name])

    claims = []
    for measure in ("R@1, ITC", "R@1, ITM", "captions right"):
        none, filtered, captioned, both = (
            mean(f"{setting}, round {number}", measure)
            for setting, number in (("none", 0), ("F", 1), ("C", 1), ("C+F", 1))
        )
        claims.append(
            (f"{measure}: C+F > F > none and C+F > C, in the mean", both > filtered > none and both > captioned)
        )
        if (second := "C+F, round 2") in models:
            claims.append((f"{measure}: round 2 no worse than round 1, in the mean", mean(second, measure) >= both))
    auc = min(row["ROC AUC, web"] for row in webs[1])
    ratio = max(row["noise kept / of the web"] for row in webs[1])
    found = statistics.mean(row["ROC AUC, web"] for row in webs[1])
    claims.append((f"ROC AUC of the filter on web texts at least {AUC}, round 1, in the mean", found >= AUC))
    claims.append((f"ROC AUC of the filter on web texts at least {AUC}, round 1, every seed", auc >= AUC))
    claims.append((f"noise kept at most {NOISE_RATIO} of the web's, round 1, every seed", ratio <= NOISE_RATIO))
    timed = [took for took in seconds if took == took]
    if timed:
        claims.append((f"a seed takes at most {MINUTES:.0f} minutes", max(timed) / 60 <= MINUTES))
    for claim, held in claims:
        print(f"  {'yes' if held else 'NO '}  {claim}")


if __name__ == "__main__":
    main()
