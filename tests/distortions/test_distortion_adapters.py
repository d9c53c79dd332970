"""Adapters: who provides a distortion, what is checked of what it returns, and the one that is built in."""

import importlib.util
import sys
import urllib.error
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import smooth_picture

from featdistill.command_line import UserError
from featdistill.distortions import adapters as distortion_adapters
from featdistill.distortions.adapters import EXTERNAL, GROUP, find, is_available

IMAGE = smooth_picture(1, 100, 130)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is remembered from the test before."""
    find.cache_clear()
    distortion_adapters._pretrained.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with a module of that source and entry points."""

    def add(package: str, source: str, **entry_points: str) -> None:
        site = tmp_path / package
        information = site / f"{package}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {place}" for name, place in entry_points.items()]
        (information / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
        (site / f"{package}_module.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"{package}_module", raising=False)

    return add


class Codec(torch.nn.Module):
    """Like a model of compressai: halves the sides six times and comes back, darker by its quality."""

    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = quality
        self.inputs = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        assert x.shape[2] % 64 == x.shape[3] % 64 == 0
        assert not self.training and not torch.is_grad_enabled()
        self.inputs.append(x.clone())
        return {"x_hat": x - self.quality / 255, "likelihoods": {}}


@pytest.fixture
def compressai(monkeypatch):
    """Put a stand-in for compressai in place and return its list of the models that it made."""
    models = []

    def cheng2020_anchor(quality, metric="mse", pretrained=False, progress=True):
        assert metric == "mse" and pretrained
        models.append(Codec(quality))
        return models[-1]

    package, zoo = ModuleType("compressai"), ModuleType("compressai.zoo")
    package.__spec__ = ModuleSpec("compressai", None, is_package=True)
    package.zoo, zoo.cheng2020_anchor = zoo, cheng2020_anchor
    monkeypatch.setitem(sys.modules, "compressai", package)
    monkeypatch.setitem(sys.modules, "compressai.zoo", zoo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return models


@pytest.fixture
def no_compressai(monkeypatch):
    """Compressai is not installed, whatever is installed here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def apply(name: str, level: int = 3, image: np.ndarray = IMAGE) -> np.ndarray:
    return distortion_adapters.apply(name, image, level, np.random.default_rng(0))


def test_the_scales_are_the_published_ones():
    assert {name: external.scales for name, external in EXTERNAL.items()} == {
        "jpeg_ai": (0, 1, 2, 3, 3),
        "cheng2020": (5, 4, 3, 2, 1),
        "wmforger": (1, 2, 3, 4, 5),
        "adv_embed_resnet": (4, 6, 8, 10, 12),
        "adv_embed_clip": (4, 6, 8, 10, 12),
    }


# Packages with entry points.


def test_a_package_provides_a_distortion_by_an_entry_point(install):
    source = "def forge(image, level, rng):\n    return image[:50] ^ level ^ rng.bytes(1)[0]\n"
    install("forgery", source, wmforger="forgery_module:forge")
    assert is_available("wmforger") and "forgery_module" not in sys.modules
    assert find("wmforger")[0].__name__ == "forge"
    drawn = np.random.default_rng(0).bytes(1)[0]
    np.testing.assert_array_equal(apply("wmforger", 4), IMAGE[:50] ^ 4 ^ drawn)
    assert not is_available("jpeg_ai")


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_distortion_that_nothing_provides_is_an_error_that_says_what_to_install(name, no_compressai):
    assert not is_available(name)
    with pytest.raises(UserError) as error:
        find(name)
    assert f"distortion {name} " in str(error.value) and "\n" not in str(error.value)
    assert f"entry point '{name}' of group 'featdistill.distortions'" in str(error.value)
    assert ("pip install compressai" in str(error.value)) == (name == "cheng2020")
    with pytest.raises(UserError, match="entry point"):
        apply(name)


def test_a_package_installed_later_is_found(install):
    with pytest.raises(UserError):
        find("jpeg_ai")
    install("later", "def same(image, level, rng):\n    return image\n", jpeg_ai="later_module:same")
    np.testing.assert_array_equal(apply("jpeg_ai"), IMAGE)


@pytest.mark.parametrize("function", [find, is_available, apply])
def test_an_unknown_name_is_an_error_that_names_the_nearest(function):
    with pytest.raises(UserError, match=r"'jpegai' \(did you mean jpeg_ai\?\)"):
        function("jpegai")


def test_two_packages_for_one_distortion_are_an_error_that_names_both(install):
    for package in ("alpha", "zeta"):
        install(package, "def same(image, level, rng):\n    return image\n", jpeg_ai=f"{package}_module:same")
    with pytest.raises(UserError, match="several packages provide jpeg_ai: alpha, zeta; uninstall"):
        find("jpeg_ai")


@pytest.mark.parametrize(
    "source,place,what",
    [
        ("import no_such_package", "codec", "cannot be loaded .*no_such_package"),
        ("", "codec", "cannot be loaded .*codec"),
        ("codec = 3", "codec", "is not a function"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_an_error_that_names_it(install, source, place, what):
    install("broken", source, jpeg_ai=f"broken_module:{place}")
    with pytest.raises(UserError, match=f"jpeg_ai: broken_module:codec of package broken {what}"):
        find("jpeg_ai")


@pytest.mark.parametrize(
    "returned,said",
    [
        ("image / 255", "float64 of shape"),
        ("image[..., 0]", r"uint8 of shape \(100, 130\)"),
        ("image[..., :2]", r"\(100, 130, 2\)"),
        ("image.transpose(2, 0, 1)", r"\(3, 100, 130\)"),
        ("image[:15]", r"\(15, 130, 3\)"),
        ("image.tolist()", "list"),
        ("None", "NoneType"),
    ],
)
def test_an_adapter_that_returns_no_image_is_an_error_that_names_it_and_its_package(install, returned, said):
    source = f"def codec(image, level, rng):\n    return {returned}\n"
    install("sloppy", source, jpeg_ai="sloppy_module:codec")
    with pytest.raises(UserError, match=f"adapter jpeg_ai of package sloppy returned .*{said}"):
        apply("jpeg_ai")


def test_an_adapter_can_neither_change_nor_return_the_image_it_is_given(install):
    source = "def codec(image, level, rng):\n    image += 1\n    return image\n"
    install("careless", source, jpeg_ai="careless_module:codec")
    image = IMAGE.copy()
    result = apply("jpeg_ai", image=image[:, ::-1])
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(result, IMAGE[:, ::-1] + 1)
    assert not np.shares_memory(result, image)


# The one that is built in.


@pytest.mark.parametrize("shape", [(16, 16), (64, 128), (100, 130), (17, 233)])
def test_cheng2020_goes_through_the_model_of_the_levels_quality(compressai, shape):
    image = smooth_picture(2, *shape)
    for level, quality in zip((1, 2, 3, 4, 5), EXTERNAL["cheng2020"].scales, strict=True):
        expected = np.maximum(image.astype(int) - quality, 0)
        np.testing.assert_array_equal(apply("cheng2020", level, image), expected)
    assert [model.quality for model in compressai] == [5, 4, 3, 2, 1]


def test_cheng2020_fills_up_to_multiples_of_64_with_the_edge(compressai):
    result = apply("cheng2020")
    (given,) = compressai[0].inputs
    padded = np.pad(IMAGE, ((0, 28), (0, 62), (0, 0)), mode="edge")
    np.testing.assert_array_equal((255 * given[0]).round().byte().permute(1, 2, 0).numpy(), padded)
    assert result.flags.c_contiguous and result.flags.writeable


def test_cheng2020_loads_a_model_once_for_each_quality(compressai):
    for level in (2, 4, 2, 4, 2):
        apply("cheng2020", level)
    assert [model.quality for model in compressai] == [4, 2]


def test_cheng2020_rounds_to_the_nearest_and_clips(compressai, monkeypatch):
    values = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.3])
    expected = [0, 0, 1, 255, 255]

    def forward(self, x):
        return {"x_hat": values.repeat(x.shape[3] // 5 + 1)[: x.shape[3]].expand(x.shape)}

    monkeypatch.setattr(Codec, "forward", forward)
    result = apply("cheng2020")
    np.testing.assert_array_equal(result, np.resize(expected, 130)[None, :, None].repeat(100, 0).repeat(3, 2))


def test_an_entry_point_wins_over_what_is_built_in(compressai, install):
    install("better", "def codec(image, level, rng):\n    return image\n", cheng2020="better_module:codec")
    np.testing.assert_array_equal(apply("cheng2020"), IMAGE)
    assert not compressai


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        urllib.error.HTTPError("address", 403, "no route", {}, None),
        OSError("no route"),
    ],
)
def test_weights_that_cannot_be_downloaded_are_an_error_of_one_line(compressai, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(sys.modules["compressai.zoo"], "cheng2020_anchor", fail)
    assert is_available("cheng2020")
    with pytest.raises(UserError, match=r"weights of quality 5 \(.*no route.*\); connect") as raised:
        apply("cheng2020", 1)
    assert "\n" not in str(raised.value)


def test_compressai_that_cannot_be_imported_is_an_error_that_names_it(compressai, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressai.zoo", None)
    with pytest.raises(UserError, match="of package compressai cannot be loaded"):
        apply("cheng2020")


@pytest.mark.parametrize("in_worker,device", [(True, "cpu"), (False, "cuda")])
def test_a_gpu_is_used_but_not_by_a_worker_of_a_data_loader(compressai, monkeypatch, in_worker, device):
    def tell(zoo_model, quality, device):
        raise LookupError(device)

    monkeypatch.setattr(distortion_adapters, "_pretrained", tell)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object() if in_worker else None)
    with pytest.raises(LookupError, match=device):
        apply("cheng2020")
