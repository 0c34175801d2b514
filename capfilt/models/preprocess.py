"""RGB pixels -> what BLIP's vision transformer takes.

B  images in a batch    C  3, RGB    H, W  pixels
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(
    rgb: npt.NDArray[np.uint8], size: int, out_HWC: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """Squash a whole image to a square, as BLIP does for captioning and matching: no crop, no padding.

    Args:
        rgb: uint8 [H, W, 3]. C-contiguous and writeable costs no copy.
        size: side of the square in pixels.
        out_HWC: uint8 [size, size, 3], contiguous, to write into; a row of a batch, say. Fresh memory if not given.
        scratch: uint8 [N], contiguous, memory for what lies between the two passes, if it fits: fresh memory costs a
            tenth of the whole.

    Returns:
        uint8 [3, size, size], a view of `out_HWC`, within 2 grey levels of Pillow 13's bicubic: rows first, but columns
        first where much more is to go from the height than from the width. (Pillow up to 12, which BLIP was trained
        with, always took rows first. The clipping between the passes moves single pixels by up to 10 levels, and the
        mean by 0.05.) Its memory lies as [size, size, 3]: torch's vectorised uint8 kernel works on interleaved pixels,
        planes would cost 40% more.
    """
    if not (
        rgb.flags.c_contiguous and rgb.flags.writeable
    ):  # torch warns of read-only memory, refuses negative strides
        rgb = rgb.copy(order="C")
    if out_HWC is None:
        out_HWC = torch.empty((size, size, 3), dtype=torch.uint8)
    height, width, _ = rgb.shape
    columns_first = height - size > max(0, 2 * (width - size))  # Pillow 13, ImagingResampleInner (Resample.c)
    between = (size, width, 3) if columns_first else (height, size, 3)
    count = between[0] * between[1] * 3
    if scratch is None or len(scratch) < count:
        scratch = torch.empty(count, dtype=torch.uint8)
    half_HWC = _bicubic(torch.from_numpy(rgb), scratch[:count].view(between))
    return _bicubic(half_HWC, out_HWC).permute(2, 0, 1)


def _bicubic(image_HWC: Tensor, out_HWC: Tensor) -> Tensor:
    """Resize one side into `out_HWC`; what torch.nn.functional.interpolate calls, which takes no `out`."""
    # The leading 1 goes on before the permute: then strides are channels_last's, which the kernel looks for.
    image_BCHW, out_BCHW = (tensor[None].permute(0, 3, 1, 2) for tensor in (image_HWC, out_HWC))
    torch.ops.aten._upsample_bicubic2d_aa.out(image_BCHW, out_HWC.shape[:2], False, None, None, out=out_BCHW)
    return out_HWC


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
