"""The spec of bootstrapping rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from capfilt.spec.cards import BatchSize, Placement, ThresholdsOverride
from capfilt.spec.evaluation import EvaluationSettings, Truth
from capfilt.spec.fields import Images, Input, Model, Ray, SharedDirectory, no_percent
from capfilt.spec.sampling import Sampling
from capfilt.spec.training import CaptionerSettings, FilterSettings, PretrainSettings, Workers


class CurateSettings(Model):
    """How the web is curated."""

    sampling: Sampling = Sampling()
    thresholds: ThresholdsOverride | None = Field(default=None, description="In place of the cards', each.")
    batch_size: BatchSize = Field(default="auto", description="Images in one forward pass, as a card's.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of both models.")
    placement: Placement = Placement()
    fragment_rows: int = Field(default=1000, ge=1, le=1_000_000, description="As of a `curate` run.")
    max_error_fraction: float = Field(default=0.1, ge=0, le=1, description="As of a `curate` run.")


class BootstrapSpec(Model):
    """BLIP's loop (section 3.3): pretrain on human pairs and the raw web; then, in each round, fine-tune a captioner
    and a filter, curate the web with them, and pretrain a new model on human pairs and what was kept."""

    kind: Literal["bootstrap"]
    name: str = Field(pattern=r"^[\w.-]{1,30}$", description="Models are named after it.")
    web: Input = Field(description="Noisy pairs.")
    human: Input = Field(description="Clean pairs; captioner and filter are fine-tuned on them.")
    human_weight: float = Field(default=1.0, gt=0, le=1000, description="Passes over them in an epoch of pretraining.")
    output: Annotated[SharedDirectory, AfterValidator(no_percent)] = Field(description="For all stages; without `%`.")
    rounds: int = Field(default=1, ge=1, le=20, description="Of fine-tuning, curating and pretraining anew.")
    ablation: bool = Field(
        default=False,
        description="In round 1, also pretrain on what the filter keeps of the web (F), and on web and "
        "synthetic texts unfiltered (C): the four settings of BLIP's table 1.",
    )
    pretrain: PretrainSettings
    captioner: CaptionerSettings = Field(description="Of fine-tuning.")
    filter: FilterSettings = Field(description="Of fine-tuning.")
    curate: CurateSettings = CurateSettings()
    evaluate: EvaluationSettings
    truth: Truth | None = Field(default=None, description="Of the web: measures the filter and the noise.")
    parallel: int = Field(default=1, ge=1, le=64, description="Stages that run at the same time where they can.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of everything that is drawn.")
    images: Images = Images()
    workers: Workers = Workers()
    ray: Ray = Ray()

    @model_validator(mode="after")
    def _works(self) -> BootstrapSpec:
        if self.ablation and self.pretrain.steps is None:
            raise ValueError("ablation: settings are compared at equal steps; give pretrain.steps")
        if self.evaluate.pairs is None or not (self.evaluate.retrieval or self.evaluate.captioning):
            raise ValueError("evaluate: give pairs to measure each model with, and retrieval or captioning")
        if self.parallel > 1 and self.ray.address == "local" and (self.workers.gpus or self.curate.placement.gpus):
            raise ValueError("parallel: stages would meet on one GPU; set it to 1, or join a cluster (ray.address)")
        return self
