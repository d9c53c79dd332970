"""The libraries of distortions by name: what a policy can draw from (paper, section 4.2)."""

from featdistill.distortions.evaluation import EVALUATION
from featdistill.distortions.extended import (
    blur,
    color,
    compression,
    environment,
    geometry,
    noise,
    occlusion,
    sensor,
)
from featdistill.distortions.extras import digital, film, screen, video
from featdistill.distortions.official import OFFICIAL
from featdistill.distortions.operation import Operation
from featdistill.distortions.redelivery import REDELIVERY

# The paper's extended library: 35 operations in 8 categories.
EXTENDED: dict[str, Operation] = {
    name: operation
    for module in (blur, noise, compression, color, geometry, environment, sensor, occlusion)
    for name, operation in module.OPERATIONS.items()
}
# Distortions that the authors' training policy used and the paper's 35 lack.
EXTRAS: dict[str, Operation] = {
    name: operation
    for module in (film, video, digital, screen)
    for name, operation in module.OPERATIONS.items()
}
LIBRARIES: dict[str, dict[str, Operation]] = {
    "official": OFFICIAL,
    "extended": EXTENDED,
    "extras": EXTRAS,
    "evaluation": EVALUATION,
    "redelivery": REDELIVERY,
}
