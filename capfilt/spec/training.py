"""The specs of pretraining and fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from capfilt.spec.cards import CaptionerCard, FilterCard
from capfilt.spec.fields import Checkpoint, Images, Input, Location, Model, Ray, SharedDirectory, StorageOptions


class Tower(Model):
    """A transformer."""

    width: int = Field(ge=8, le=8192, description="Of hidden states; a multiple of heads.")
    depth: int = Field(ge=1, le=96, description="Layers.")
    heads: int = Field(ge=1, le=128, description="Of attention.")
    mlp: int = Field(ge=8, le=65536, description="Width of the feed-forward layer.")

    @model_validator(mode="after")
    def _divides(self) -> Tower:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        return self


class VisionTower(Tower):
    """The vision transformer."""

    patch: int = Field(default=16, ge=2, le=64, description="Side of a patch in pixels.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Of the last layer; rises from 0.")


class TextTower(Tower):
    """The text transformer, BERT with attention to images."""

    positions: int = Field(default=512, ge=8, le=8192, description="Longest text in tokens.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of hidden states and attention.")


class Architecture(Model):
    """A MED. `base` and `large` are BLIP's ViT-B/16 and ViT-L/16, both with a text transformer like BERT-base."""

    vision: VisionTower
    text: TextTower
    joint: int = Field(default=256, ge=8, le=4096, description="Width of the embeddings that ITC compares.")


_BERT_BASE = TextTower(width=768, depth=12, heads=12, mlp=3072)
ARCHITECTURES = {
    "base": Architecture(vision=VisionTower(width=768, depth=12, heads=12, mlp=3072), text=_BERT_BASE),
    "large": Architecture(vision=VisionTower(width=1024, depth=24, heads=16, mlp=4096, drop_path=0.1), text=_BERT_BASE),
}


def _named(value: Any) -> Any:
    return ARCHITECTURES.get(value, value) if isinstance(value, str) else value


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimiser(Model):
    """AdamW and its learning rate. The defaults are BLIP's pretraining of ViT-B (configs/pretrain.yaml)."""

    lr: float = Field(default=3e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["decay", "cosine"] = Field(
        default="decay", description="`decay`: times decay_rate an epoch (pretraining); `cosine`: to min_lr at the end."
    )
    decay_rate: float = Field(default=0.9, gt=0, le=1, description="Of `decay`.")
    min_lr: float = Field(default=1e-6, ge=0, le=1, description="The learning rate never falls below it.")
    warmup_steps: int = Field(default=3000, ge=0, description="Linear from warmup_lr.")
    warmup_lr: float = Field(default=1e-6, ge=0, le=1, description="Learning rate of the first step.")
    weight_decay: float = Field(default=0.05, ge=0, le=1, description="Of AdamW.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="What AdamW's two moments keep of themselves.")
    accumulate: int = Field(default=1, ge=1, le=4096, description="Batches a step.")
    clip_norm: float | None = Field(default=None, gt=0, description="Of the gradient; as published, none.")


class Augment(Model):
    """Random views of training images (salesforce/BLIP, data/__init__.py); the defaults are pretraining's."""

    min_scale: float = Field(
        default=0.2, gt=0, le=1, description="Smallest crop, of the image's area; BLIP fine-tunes with 0.5."
    )
    flip: float = Field(
        default=0.5, ge=0, le=1, description="Probability of mirroring; 0 where captions say left or right."
    )
    operations: int = Field(
        default=2, ge=0, le=10, description="RandAugment's, drawn for each image; each is applied half the time."
    )
    magnitude: float = Field(default=5, ge=0, le=10, description="Of the operations.")


class FinetuneOptimiser(Optimiser):
    """AdamW as BLIP fine-tunes ViT-B (configs/caption_coco.yaml, retrieval_coco.yaml)."""

    lr: float = Field(default=1e-5, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["decay", "cosine"] = Field(
        default="cosine",
        description="`decay`: times decay_rate an epoch (pretraining); `cosine`: to min_lr at the end.",
    )
    min_lr: float = Field(default=0, ge=0, le=1, description="The learning rate never falls below it.")
    warmup_steps: int = Field(default=0, ge=0, description="Linear from warmup_lr.")


class FinetuneAugment(Augment):
    """Random views as in fine-tuning."""

    min_scale: float = Field(default=0.5, gt=0, le=1, description="Smallest crop, of the image's area.")


class PairSource(Model):
    """Image-text pairs to train on: a curated dataset, or plain Parquet (human pairs, or a raw web)."""

    dataset: Location | None = Field(default=None, description="Output of a `curate` run.")
    version: int | None = Field(default=None, ge=0, description="Of its pairs table; the newest if not given.")
    texts: tuple[Literal["web", "synthetic"], ...] = Field(
        default=("web", "synthetic"), min_length=1, description="Which kept texts of a dataset; each image draws one."
    )
    pairs: Input | None = Field(default=None, description="Parquet files of images and texts, in place of a dataset.")
    weight: float = Field(default=1.0, gt=0, le=1000, description="Passes over it in one epoch; 0.5 is half of it.")
    storage_options: StorageOptions = Field(default={}, description="Of the dataset's store; never a secret.")

    @model_validator(mode="after")
    def _one(self) -> PairSource:
        if (self.dataset is None) == (self.pairs is None):
            raise ValueError("give either dataset or pairs")
        given = {
            "version": self.version is not None,
            "texts": set(self.texts) != {"web", "synthetic"},
            "storage_options": bool(self.storage_options),
        }
        if self.pairs is not None and (unused := [name for name, is_given in given.items() if is_given]):
            raise ValueError(f"{', '.join(unused)}: only of a dataset; pairs have storage_options of their own")
        return self


class Contrast(Model):
    """ITC and ITM: the momentum twin, its queue, and where negatives come from (BLIP section 3.2)."""

    momentum: float = Field(default=0.995, ge=0, lt=1, description="What the twin keeps of itself each step.")
    queue: int = Field(default=57_600, ge=1, le=2**22, description="Rows of it.")
    temperature: float = Field(default=0.07, ge=0.001, le=0.5, description="Of the contrast at the start; learnt.")
    alpha: float = Field(default=0.4, ge=0, le=1, description="Weight of the twin's opinion in the targets.")
    alpha_epochs: float = Field(default=2.0, ge=0, description="Epochs over which alpha rises from 0.")
    by_image: bool = Field(default=False, description="Pairs of one image are positives of each other.")
    across_ranks: bool = Field(default=False, description="Negatives are drawn from the batches of all workers.")


class FilterContrast(Contrast):
    """ITC and ITM as the filter is fine-tuned (configs/retrieval_coco.yaml)."""

    alpha_epochs: float = Field(default=1.0, ge=0, description="Epochs over which alpha rises from 0.")
    by_image: bool = Field(default=True, description="Pairs of one image are positives of each other.")
    across_ranks: bool = Field(default=True, description="Negatives are drawn from the batches of all workers.")


class Initial(Model):
    """Checkpoints that a MED starts from; what is not given is random."""

    std: float = Field(
        default=0.02, gt=0, le=1, description="Of random weights; BERT's suits its width, small networks need more."
    )
    vision: Checkpoint | None = Field(default=None, description="A ViT or DeiT.")
    text: Checkpoint | None = Field(default=None, description="A BERT of the tokenizer's vocabulary.")
    allow_pickle: bool = Field(
        default=False, description="Load pytorch_model.bin where no safetensors exist (weights only, still no code)."
    )


class Workers(Model):
    """Training processes, each on its own device."""

    count: int = Field(default=1, ge=1, le=4096, description="So many processes.")
    gpus: float = Field(default=0, ge=0, le=1, description="GPUs of each; 0 computes on the CPU.")
    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores of each; also its decoding threads.")
    retries: int = Field(
        default=3,
        ge=0,
        description="Times that workers are started anew after one died. One worker on a local Ray is the run's own "
        "process, which nobody starts anew.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Workers:
        if self.count > 1 and self.gpus not in (0, 1):
            raise ValueError(f"gpus: {self.gpus:g}; several workers cannot share a GPU, give 1")
        return self


class TrainingSettings(Model):
    """How a network is trained, whatever for."""

    image_size: int = Field(ge=8, le=1024, description="Side in pixels.")
    max_tokens: int = Field(default=30, ge=4, le=512, description="Longer texts are cut; special tokens are counted.")
    batch_size: int = Field(ge=2, le=65536, description="Pairs of one worker in one forward pass.")
    epochs: float = Field(default=20, gt=0, description="Passes over the data.")
    steps: int | None = Field(default=None, ge=1, description="Of the optimiser, in place of epochs.")
    optimiser: Optimiser = Optimiser()
    augment: Augment | None = Field(default=Augment(), description="Null squashes whole images, as inference does.")
    bfloat16: bool = Field(default=False, description="Autocast the forward pass; weights stay float32.")
    checkpointing: bool = Field(default=False, description="Recompute activations on the way back: less memory.")
    state_steps: int = Field(default=1000, ge=1, description="Steps between the states that a run resumes from.")


class PretrainSettings(TrainingSettings):
    """How a MED is pretrained; the defaults are BLIP's."""

    architecture: Annotated[Architecture, BeforeValidator(_named)] = Field(
        description="`base`, `large`, or vision and text spelt out."
    )
    tokenizer: Checkpoint = Field(description="Where the tokenizer is: bert-base-uncased, or a directory.")
    initial: Initial = Initial()
    contrast: Contrast = Contrast()
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing of the LM loss.")


class _FinetuneSettings(TrainingSettings):
    optimiser: FinetuneOptimiser = FinetuneOptimiser()
    augment: FinetuneAugment | None = Field(
        default=FinetuneAugment(), description="Null squashes whole images, as inference does."
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Of the text transformer; the checkpoint's if not given. BLIP has 0.1."
    )
    drop_path: float = Field(default=0, ge=0, lt=1, description="Of the last vision layer; BLIP has 0.1 for ViT-L.")


class CaptionerSettings(_FinetuneSettings):
    """How a captioner is fine-tuned (LM); the defaults are BLIP's for COCO and ViT-B (configs/caption_coco.yaml)."""

    max_tokens: int = Field(default=40, ge=4, le=512, description="Longer texts are cut; special tokens are counted.")
    epochs: float = Field(default=5, gt=0, description="Passes over the data.")
    prompt: str = Field(
        default="a picture of ", max_length=200, description="Put before every text; no loss is taken on it."
    )
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing of the LM loss.")


class FilterSettings(_FinetuneSettings):
    """How a filter is fine-tuned (ITC + ITM); the defaults are BLIP's for COCO (configs/retrieval_coco.yaml)."""

    max_tokens: int = Field(default=35, ge=4, le=512, description="Longer texts are cut; special tokens are counted.")
    epochs: float = Field(default=6, gt=0, description="Passes over the data.")
    contrast: FilterContrast = FilterContrast()


class _Run(Model):
    name: str = Field(pattern=r"^[\w.-]{1,60}$", description="Of the model; its cards are named after it.")
    data: tuple[PairSource, ...] = Field(min_length=1, description="What to train on.")
    output: SharedDirectory = Field(description="For the log, the state that a run resumes from, and checkpoints.")
    licence: str | None = Field(default=None, description="Of the weights, for the cards; the start's if not given.")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of weights, order, views, texts and negatives.")
    images: Images = Images()
    workers: Workers = Workers()
    ray: Ray = Ray()


class PretrainSpec(PretrainSettings, _Run):
    """Pretraining of a MED, ITC + ITM + LM; ends with a captioner and a filter."""

    kind: Literal["pretrain"]


class FinetuneCaptionerSpec(CaptionerSettings, _Run):
    """Fine-tuning of a captioner."""

    kind: Literal["finetune-captioner"]
    start: CaptionerCard = Field(description="What to start from: a card, or the path of one.")


class FinetuneFilterSpec(FilterSettings, _Run):
    """Fine-tuning of a filter."""

    kind: Literal["finetune-filter"]
    start: FilterCard = Field(description="What to start from: a card, or the path of one.")


TrainSpec = PretrainSpec | FinetuneCaptionerSpec | FinetuneFilterSpec
