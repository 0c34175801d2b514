"""Every model a user writes: model cards and run specs. The spec is the interface.

All are frozen pydantic models that refuse unknown keys. Paths in a file resolve relative to that file; a spec names a
card by path or holds it inline. Only the driver reads YAML; workers receive validated objects.
"""

from capfilt.spec.bootstrap import BootstrapSpec, CurateSettings
from capfilt.spec.cards import (
    BatchSize,
    CaptionerCard,
    FilterCard,
    ModelCard,
    Placement,
    Thresholds,
    ThresholdsOverride,
)
from capfilt.spec.curation import CurateSpec, Decision, Keep, Sampling
from capfilt.spec.evaluation import Captioning, EvaluateSpec, EvaluationSettings, Quality, Retrieval, Truth
from capfilt.spec.fields import (
    Checkpoint,
    Columns,
    HubCheckpoint,
    Images,
    Input,
    LocalCheckpoint,
    Ray,
    output_location,
)
from capfilt.spec.reading import RunSpec, load_card, load_curate_spec, load_spec
from capfilt.spec.removal import Retention, Withdrawn
from capfilt.spec.training import (
    ARCHITECTURES,
    Architecture,
    Augment,
    CaptionerSettings,
    Contrast,
    FilterSettings,
    FinetuneCaptionerSpec,
    FinetuneFilterSpec,
    Initial,
    Optimiser,
    PairSource,
    PretrainSettings,
    PretrainSpec,
    TextTower,
    TrainingSettings,
    TrainSpec,
    VisionTower,
    Workers,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Augment",
    "BatchSize",
    "BootstrapSpec",
    "CaptionerCard",
    "CaptionerSettings",
    "Captioning",
    "Checkpoint",
    "Columns",
    "Contrast",
    "CurateSettings",
    "CurateSpec",
    "Decision",
    "EvaluateSpec",
    "EvaluationSettings",
    "FilterCard",
    "FilterSettings",
    "FinetuneCaptionerSpec",
    "FinetuneFilterSpec",
    "HubCheckpoint",
    "Images",
    "Initial",
    "Input",
    "Keep",
    "LocalCheckpoint",
    "ModelCard",
    "Optimiser",
    "PairSource",
    "Placement",
    "PretrainSettings",
    "PretrainSpec",
    "Quality",
    "Ray",
    "Retention",
    "Retrieval",
    "RunSpec",
    "Sampling",
    "TextTower",
    "Thresholds",
    "ThresholdsOverride",
    "TrainSpec",
    "TrainingSettings",
    "Truth",
    "VisionTower",
    "Withdrawn",
    "Workers",
    "load_card",
    "load_curate_spec",
    "load_spec",
    "output_location",
]
