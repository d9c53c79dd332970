"""How a published detector is described."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from featdistill.models.encoders import Backbone, BackboneSpec
from featdistill.models.expert import Expert


class Source(NamedTuple):
    """A file of a public repository at a fixed commit, or with `is_release`, of a release on GitHub."""

    host: Literal["huggingface.co", "github.com"]
    repository: str
    revision: str
    file: str
    is_release: bool = False

    @property
    def page(self) -> str:
        """The address of the file's page, where it can be downloaded; of a release, that of the file."""
        if self.is_release:
            return self.address
        return f"https://{self.host}/{self.repository}/blob/{self.revision}/{self.file}"

    @property
    def address(self) -> str:
        """The address of the file itself on GitHub, also of one that is kept outside git (LFS)."""
        where = "releases/download" if self.is_release else "raw"
        return f"https://{self.host}/{self.repository}/{where}/{self.revision}/{self.file}"


@dataclass(frozen=True)
class Published:
    """A published detector.

    Attributes:
        title: the detector, for people to read.
        license: that of the file.
        source: where the file is.
        parameters: number of parameters in the file.
        spec: the backbone, up to what its feature is.
        resize: see `Preprocessing`.
        has_backbone: whether the file holds the backbone, too; if not, it comes from `spec`.
        make: makes the expert around a backbone; what the file holds is filled in later.
        name_in_file: from the name of an expert's weight to that in the file; None for one of the backbone
            that is not in the file.
        sha256: of the file, if known.
        git_blob: git's SHA-1 of the file, if known.
        golden_logit: the head's output for the feature sin(0.37 k), k = 0, 1, ..., if known.
    """

    title: str
    license: str
    source: Source
    parameters: int
    spec: BackboneSpec
    resize: str
    has_backbone: bool
    make: Callable[[Backbone, BackboneSpec, str], Expert]
    name_in_file: Callable[[str], str | None]
    sha256: str | None = None
    git_blob: str | None = None
    golden_logit: float | None = None

    @property
    def size(self) -> int | None:
        """Side of the input in px."""
        return self.spec.input_size


@dataclass(frozen=True)
class PublishedGraph:
    """A published detector that is an ONNX file, from images normalized with ImageNet's statistics.

    Attributes:
        title, license, source, parameters, resize, sha256: see `Published`.
        size: side of the input in px.
        scale, offset: from its output to the logit whose sigmoid is P(AI), as its authors calibrated it.
    """

    title: str
    license: str
    source: Source
    parameters: int
    size: int
    resize: str
    sha256: str | None
    scale: float
    offset: float
    has_backbone = True
    git_blob = None
