"""Decoding on the GPU, with torchvision's decoder for the CPU in its place: the same code but for nvJPEG."""

import io

import cv2
import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from conftest import smooth_picture
from PIL import Image

from benchmarks.scenes import fitted, synthetic_scene
from featdistill.command_line import UserError
from featdistill.data import gpu_decoding
from featdistill.data.gpu_decoding import Jpeg, JpegDataset, check_input, repeats_chroma, require_decoder
from featdistill.data.loading import ScoreDataset, make_loader
from featdistill.data.preprocessing import Preprocessing, fit_stack, prepare, to_planes
from featdistill.data.views import PLAIN, parse_tta
from featdistill.images.reading import JpegHeader, plain_jpeg_header
from featdistill.inference.scoring import on_device

CPU = torch.device("cpu")
KEYS = [(48, "shorter"), (32, "squash"), (40, "crop"), (48, "shorter", 300)]


def encoded(picture: np.ndarray, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(picture).convert(mode).save(data, kind, **options)
    return data.getvalue()


def turned(**options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(smooth_picture(7), exif=exif, **options)


# What is decoded on the device ...
PLAIN_JPEGS = {
    "420": encoded(smooth_picture(0), quality=90),
    "444": encoded(smooth_picture(1, 130, 90), quality=95, subsampling=0),
    "422": encoded(smooth_picture(2, 91, 200), subsampling=1),
    "gray": encoded(smooth_picture(3, 77, 61), mode="L"),
    "progressive": encoded(smooth_picture(4), progressive=True),
    "small": encoded(smooth_picture(5, 20, 30)),
    "strip": encoded(smooth_picture(6, 10, 290)),
    "input": encoded(smooth_picture(8, 48, 48)),
}
# ... and what is prepared as ever.
COMPLETE = encoded(smooth_picture(9))
OTHERS = {
    "png": encoded(smooth_picture(10), "PNG"),
    "webp": encoded(smooth_picture(11), "WebP"),
    "turned": turned(),
    "cmyk": encoded(smooth_picture(12), mode="CMYK"),
    "rgb": encoded(smooth_picture(13), keep_rgb=True),
    "440": cv2.imencode(".jpg", smooth_picture(14), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111])[
        1
    ].tobytes(),
    "limited": encoded(smooth_picture(15, 310, 200)),
    "end missing": COMPLETE[:-2],
    "truncated": COMPLETE[:600],
    "empty": b"",
    "text": b"no image",
}


@pytest.fixture
def rows(tmp_path) -> pd.DataFrame:
    """Both kinds of files by turns, a missing one, and a plain JPEG at the end."""
    both = [*PLAIN_JPEGS.items(), *OTHERS.items()]
    files = dict(both[::2] + both[1::2] + [("last", PLAIN_JPEGS["420"])])
    for name, data in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    names = [*list(files)[:5], "missing", *list(files)[5:]]
    return pd.DataFrame({"image": [str(tmp_path / f"{name}.jpg") for name in names], "name": names})


def items(dataset: ScoreDataset, workers: int = 0, batch_size: int = 6) -> dict[int, dict | str]:
    """Row -> its images, or why it is broken; in the order in which they come out of the batches."""
    parts = [range(len(dataset))[first : first + batch_size] for first in range(0, len(dataset), batch_size)]
    move = getattr(dataset, "to_device", None)
    found = {}
    for batch in on_device(make_loader(dataset, parts, workers), CPU, *([move] if move else [])):
        found |= dict(batch["broken"])
        for position, index in enumerate(batch["index"].tolist() if "images" in batch else []):
            found[index] = {key: images[position] for key, images in batch["images"].items()}
    return found


def compare(rows: pd.DataFrame, found: dict, equal: set[str] = frozenset()) -> None:
    """Compare with the normal way: other formats, unreadable images and `equal` bit by bit."""
    expected = items(ScoreDataset(rows, KEYS))
    assert sorted(found) == sorted(expected) == list(range(len(rows)))
    for row, name in enumerate(rows["name"]):
        if isinstance(expected[row], str):
            assert found[row] == expected[row] and name not in PLAIN_JPEGS
            continue
        assert found[row].keys() == expected[row].keys() == set(KEYS)
        for key, pixels in expected[row].items():
            difference = (found[row][key].int() - pixels.int()).abs()
            is_resized = key[1] != "crop" and (name, key[0]) != ("input", 48)
            is_equal = name in OTHERS or name in equal or not is_resized
            assert difference.max() <= (0 if is_equal else 1), (name, key)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 6), (1, 6), (0, 1), (0, 64)])
def test_only_plain_jpegs_are_decoded_on_the_device_and_the_rest_is_as_ever(
    rows, workers, batch_size, monkeypatch
):
    repeats_chroma(CPU)  # which decodes a trial
    seen, decode = [], gpu_decoding._decode
    monkeypatch.setattr(
        gpu_decoding, "_decode", lambda files, device: seen.extend(files) or decode(files, device)
    )
    found = items(JpegDataset(rows, KEYS), workers, batch_size)
    compare(rows, found)
    good = [row for row in found if isinstance(found[row], dict)]
    assert good == sorted(good)
    assert {file.numpy().tobytes() for file in seen} == set(PLAIN_JPEGS.values())
    broken = {rows["name"][row] for row in found if isinstance(found[row], str)}
    assert broken == {"missing", "end missing", "truncated", "empty", "text"}


def test_what_the_decoder_refuses_is_decoded_as_ever_and_broken_only_if_that_fails(
    rows, tmp_path, monkeypatch
):
    # What would be quantization tables looks like an application's own data.
    damaged = PLAIN_JPEGS["422"].replace(b"\xff\xdb", b"\xff\xec")
    assert plain_jpeg_header(damaged) == JpegHeader(91, 200, "422")
    rows.loc[len(rows)] = [str(tmp_path / "damaged.jpg"), "damaged"]
    (tmp_path / "damaged.jpg").write_bytes(damaged)
    decode, refused = gpu_decoding._decode, {PLAIN_JPEGS["gray"], PLAIN_JPEGS["444"]}

    def refusing(files, device):
        if refused & {file.numpy().tobytes() for file in files}:
            raise RuntimeError("Error while decoding JPEG images")
        return decode(files, device)

    monkeypatch.setattr(gpu_decoding, "_decode", refusing)
    found = items(JpegDataset(rows, KEYS))
    compare(rows, found, {"gray", "444"})
    assert "broken data stream" in found[len(rows) - 1]


def test_what_a_gpu_cannot_reduce_far_enough_is_left_to_the_workers(tmp_path):
    for name, width in (("wide", 1024), ("too wide", 1025)):
        (tmp_path / name).write_bytes(encoded(smooth_picture(0, 20, width)))
    rows = pd.DataFrame({"image": [str(tmp_path / "wide"), str(tmp_path / "too wide")], "name": ["a", "b"]})
    dataset = JpegDataset(rows, [(32, "shorter"), (48, "squash")])
    assert isinstance(dataset[0], Jpeg) and isinstance(dataset[1], dict)


def test_full_memory_is_not_a_jpeg_that_cannot_be_decoded(rows, monkeypatch):
    def full(files, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_decoding, "_decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        items(JpegDataset(rows, KEYS))


def test_few_pixels_at_a_time_give_the_same_batches(rows, monkeypatch):
    sizes, expected = [], items(JpegDataset(rows, KEYS))
    monkeypatch.setattr(gpu_decoding, "_PIXELS_AT_ONCE", 10_000)
    decode = gpu_decoding._decode
    monkeypatch.setattr(
        gpu_decoding, "_decode", lambda files, device: sizes.append(len(files)) or decode(files, device)
    )
    found = items(JpegDataset(rows, KEYS), batch_size=len(rows))
    assert sum(sizes) == len(PLAIN_JPEGS) + 1 and len(sizes) > 3
    for row, images in expected.items():
        for key in KEYS if isinstance(images, dict) else ():
            assert torch.equal(found[row][key], images[key])


def repeating(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Decode like nvJPEG, which repeats chroma."""
    pictures = (simplejpeg.decode_jpeg(file.numpy().tobytes(), fastupsample=True) for file in files)
    return [to_planes(picture) for picture in pictures]


def test_chroma_that_a_decoder_repeats_is_interpolated(rows, monkeypatch):
    assert not repeats_chroma(CPU)
    plain = rows[rows["name"].isin(PLAIN_JPEGS)].reset_index(drop=True)
    expected = items(ScoreDataset(plain, KEYS))
    monkeypatch.setattr(gpu_decoding, "_decode", repeating)
    repeats_chroma.cache_clear()
    try:
        assert repeats_chroma(CPU)
        found = items(JpegDataset(plain, KEYS))
        monkeypatch.setattr(gpu_decoding, "repeats_chroma", lambda device: False)
        repeated = items(JpegDataset(plain, KEYS))
    finally:
        repeats_chroma.cache_clear()
    for row, name in enumerate(plain["name"]):
        for key in KEYS:
            ours, theirs = (
                (one[row][key].int() - expected[row][key].int()).abs().float() for one in (found, repeated)
            )
            if name in ("gray", "444"):
                assert torch.equal(ours, theirs) and ours.max() <= 1
            else:
                assert ours.mean() < min(1.1, theirs.mean()), (name, key)
                if key[1] == "crop" and name != "422":
                    assert theirs.mean() > 8 * ours.mean(), name


@pytest.mark.parametrize(("resize", "mean"), [("shorter", 0.01), ("squash", 0.01), ("crop", 0)])
def test_pixels_are_those_of_the_cpu_but_for_the_last_rounding(resize, mean):
    rng, differences = np.random.default_rng(0), []
    for number in range(30):
        height, width = (int(side) for side in rng.integers(10, 500, 2))
        noise = rng.integers(0, 2, (height, width, 3), np.uint8) * 255
        scene = fitted(synthetic_scene(number % 2), (width, height))
        pictures = [scene, smooth_picture(number, height, width), noise]
        stack = torch.stack([to_planes(picture) for picture in pictures])
        for size in (32, 224):
            found = fit_stack(stack, size, resize)
            expected = torch.stack([prepare(picture, size, resize) for picture in pictures])
            differences.append((found.int() - expected.int()).abs().flatten())
            assert torch.equal(fit_stack(stack[1:2], size, resize)[0], found[1])
    differences = torch.cat(differences).float()
    assert differences.max() <= 2 and differences.mean() <= mean


def test_an_image_of_the_inputs_size_is_not_touched():
    stack = torch.stack([to_planes(smooth_picture(number, 48, 48)) for number in range(2)])
    for resize in ("shorter", "squash", "crop"):
        assert torch.equal(fit_stack(stack, 48, resize), stack)


def test_what_has_to_be_prepared_on_the_cpu_is_refused():
    plain = Preprocessing(32, "shorter", (0.5,) * 3, (0.5,) * 3)
    check_input("alpha", plain, PLAIN)
    check_input("alpha", plain, parse_tta("hflip")[1])
    for changed, views, message in (
        ({"resize": "bilinear:40"}, PLAIN, "expert alpha needs bilinear:40"),
        ({"resize": "pad"}, PLAIN, "expert alpha needs pad"),
        ({"sizes": (32, 64)}, PLAIN, "--decode gpu needs inputs of one size"),
        ({}, parse_tta("blur")[1], "no test-time views but hflip"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            check_input("alpha", Preprocessing(**(vars(plain) | changed)), views)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="--decode gpu needs a GPU, not cpu"):
        require_decoder(CPU)
