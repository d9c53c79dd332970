"""What all processes that make inputs of images share: how one is read, and how the process is set up."""

import cv2
import numpy as np
import torch

from featdistill.distortions.kernels.scratch import keep_freed_memory
from featdistill.images.equalisation import Equalisation, equalise
from featdistill.images.reading import limit_side, read_image


def load_image(
    location: str, name: str, equalisation: Equalisation | None = None, max_side_px: int | None = None
) -> np.ndarray:
    """Read an image as it is before it is distorted.

    Args:
        location, name: `image` and `name` of its row.
        equalisation: gives every image a size and a JPEG quality that do not depend on its class.
        max_side_px: see `limit_side`.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        BrokenImage: it cannot be read.
    """
    image = read_image(location)
    if equalisation:
        image = equalise(image, name, equalisation)
    return limit_side(image, max_side_px)


def one_thread(worker: int) -> None:
    """Set up a loader's worker process.

    Workers are the parallelism: threads of their own would only get in each other's way, and so would a
    device that OpenCV takes for OpenCL.
    """
    keep_freed_memory()
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)
    torch.set_num_threads(1)
