"""RGB pixels -> what BLIP's vision transformer takes.

B  images in a batch    C  3, RGB    H, W  pixels
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(rgb: npt.NDArray[np.uint8], size: int) -> Tensor:
    """Squash a whole image to a square, as BLIP does for captioning and matching: no crop, no padding.

    Args:
        rgb: uint8 [H, W, 3]. C-contiguous and writeable costs no copy.
        size: side of the square in pixels.

    Returns:
        uint8 [3, size, size], within 2 grey levels of Pillow's bicubic up to version 12, which BLIP was trained with:
        first the rows, then the columns. (Pillow 13 takes some portraits the other way round; the clipping between the
        passes then moves single pixels by up to 10 levels.) Its memory lies as [size, size, 3]: torch's vectorised
        uint8 kernel works on interleaved pixels, planes would cost 40% more. Assigning it into a batch of
        `memory_format=torch.channels_last` is a plain copy; `torch.stack` is not.
    """
    if not (
        rgb.flags.c_contiguous and rgb.flags.writeable
    ):  # torch warns of read-only memory, refuses negative strides
        rgb = rgb.copy(order="C")
    # The leading 1 goes on before the permute: then strides are channels_last's, and the output keeps the layout.
    image_BCHW = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)
    return interpolate(image_BCHW, size=(size, size), mode="bicubic", align_corners=False, antialias=True)[0]


def normalise(images_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale to [0, 1], subtract CLIP's mean, divide by its standard deviation, on the tensor's device.

    Args:
        images_BCHW: uint8.
        dtype: floating; of the result. The arithmetic is float32's.

    Returns:
        [B, 3, H, W] of `dtype`, in the layout of the input.
    """
    device = images_BCHW.device
    mean = torch.tensor(CLIP_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=device).view(1, 3, 1, 1)
    return images_BCHW.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)
