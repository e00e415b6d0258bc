"""Defenses in front of a network: the image is changed before the network sees it.

Both need no training and have nothing to learn; put one before a network by `nn.Sequential`.
"""

import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image


class ResizePad(nn.Module):
    """Shrink the batch to a random size and put it at a random place (Xie et al., 2018).

    Images (N, C, H, W) keep their shape: they are resized bilinearly to `smallest` … H - 1 pixels
    and padded with zeros. (The paper enlarges 299 pixels to at most 330 and pads to 331; its
    network takes any size.) Draws from PyTorch's global generator, in training and in evaluation.

    Raises
    ------
    ValueError
        The images are not square, or not larger than `smallest`.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if x.shape[-2] != side or not 0 < self.smallest < side:
            raise ValueError(f"expected square images of more than {self.smallest}, got {x.shape}")
        size = int(torch.randint(self.smallest, side, ()))
        left, top = (int(torch.randint(side - size + 1, ())) for _ in range(2))
        small = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return F.pad(small, (left, side - size - left, top, side - size - top))


class JPEG(nn.Module):
    """Compress each image and decode it again (Das et al., 2017); it has no gradient.

    Images (N, C, H, W) with 1 or 3 channels in [0, 1] are rounded to bytes; `quality` is 1 … 100.
    An attack has to get around it, with `attacks.bpda`: by itself it stops every gradient.
    """

    def __init__(self, quality: int) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be 1 … 100, got {quality}")
        self.quality = quality

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = (255 * x.clamp(0, 1)).round().to("cpu", torch.uint8)
            decoded = torch.stack([self._decoded(image) for image in pixels])
            return decoded.to(x.device, x.dtype) / 255

    def _decoded(self, image: Tensor) -> Tensor:
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=self.quality)
        return pil_to_tensor(Image.open(file))
