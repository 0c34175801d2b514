"""An image classifier of transformers that says how likely an image is of a kind to be kept out.

B  images    S  side in pixels    K  labels
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification
from transformers.utils import cached_file

from capfilt.errors import CheckpointError
from capfilt.models.checkpoints import quiet
from capfilt.spec import ClassifierCard, HubCheckpoint
from capfilt.weights import check_labels


class Classifier:
    """Whatever `AutoModelForImageClassification` loads from safetensors, without code of its own.

    Attributes:
        image_size: side in pixels of the images it takes.
    """

    def __init__(self, card: ClassifierCard, device: str) -> None:
        """Load the checkpoint.

        Raises:
            CheckpointError: it cannot be found or loaded, or does not say how its images are normalised.
            SpecError: the model knows none such label.
        """
        self.image_size, self._batch_size, self._device = card.image_size, card.batch_size, device
        where: dict[str, Any] = {}
        source = card.checkpoint.hub if isinstance(card.checkpoint, HubCheckpoint) else card.checkpoint.path
        if isinstance(card.checkpoint, HubCheckpoint):
            where = {"revision": card.checkpoint.revision}
        try:
            with quiet():
                model = AutoModelForImageClassification.from_pretrained(
                    source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **where
                )
            said = json.loads(Path(cached_file(source, "preprocessor_config.json", **where)).read_bytes())
            plain = not said.get("do_normalize", True)
            mean, std = ([0.0] * 3, [1.0] * 3) if plain else (said["image_mean"], said["image_std"])
            self._mean, self._std = (torch.tensor(of, device=device).view(3, 1, 1) for of in (mean, std))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"keep_out.classifier: {source}: no image classifier that can be used: {error!r}. It takes "
                "config.json, safetensors, and preprocessor_config.json with image_mean and image_std"
            ) from error
        known = {label: number for number, label in model.config.id2label.items()}
        check_labels(card, known)
        self._labels = [known[label] for label in card.labels]
        self._independent = model.config.problem_type == "multi_label_classification"
        self._model = model.to(device).eval()

    def score(self, images_BCSS: Tensor) -> list[float]:
        """The probability of each image that it is of one of the card's labels: their sum, or the largest where the
        model gives each its own.

        Args:
            images_BCSS: uint8 [B, 3, S, S], resized RGB.

        Raises:
            FloatingPointError: a score is not a number.
        """
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(images_BCSS), self._batch_size):
                batch_BCSS = images_BCSS[start : start + self._batch_size]
                pixels_BCSS = (batch_BCSS.to(self._device).contiguous().float() / 255 - self._mean) / self._std
                logits_BK = self._model(pixel_values=pixels_BCSS).logits
                if self._independent:
                    scores += logits_BK.sigmoid()[:, self._labels].amax(dim=1).tolist()
                else:
                    scores += logits_BK.softmax(dim=1)[:, self._labels].sum(dim=1).clamp(max=1).tolist()
        if any(score != score for score in scores):
            raise FloatingPointError("a class has no probability: the model's logits are not numbers")
        return scores
