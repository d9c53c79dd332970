"""Manifests are put together: every image once, nothing on both sides of a hold-out, balance by names."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import smooth_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_trees import cells_of
from PIL import Image

from data_prep import combine
from data_prep.duplicates import near as near_duplicates
from data_prep.duplicates.exact import equal_images
from featdistill.command_line import UserError
from featdistill.images import reading as image_io
from featdistill.records.manifest import make_manifest, read_manifest, write_manifest


def encoded(seed: int, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(smooth_picture(seed)).save(data, kind, **options)
    return data.getvalue()


def write_set(path: Path, images: dict[str, bytes], **columns) -> str:
    """Write images beside a manifest and the manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (path.parent / name).write_bytes(data)
    rows = {"image": [str(path.parent / name) for name in images], "name": list(images)}
    write_manifest(make_manifest({**rows, **columns}), path)
    return str(path)


@pytest.fixture
def manifests(tmp_path):
    """Two manifests of images that are not there."""
    paths = []
    for name, part in (("one", ["train", "val", "train"]), ("two", ["train", "val"])):
        rows = {
            "image": [f"/photos/{name}{place}.jpg" for place in range(len(part))],
            "name": [f"{name}{place}.jpg" for place in range(len(part))],
            "label": [place % 2 for place in range(len(part))],
            "split": part,
        }
        write_manifest(make_manifest(rows), tmp_path / f"{name}.csv")
        paths.append(str(tmp_path / f"{name}.csv"))
    return paths


def test_rows_of_all_manifests_are_there_in_order_with_all_columns(manifests, tmp_path):
    out = tmp_path / "all.csv"
    assert combine.main([*manifests, "--no-duplicates-check", "--out", str(out)]) == 0
    found = read_manifest(out)
    assert found["name"].tolist() == ["one0.jpg", "one1.jpg", "one2.jpg", "two0.jpg", "two1.jpg"]
    assert found["image"].tolist()[3] == "/photos/two0.jpg"
    assert found["split"].tolist() == ["train", "val", "train", "train", "val"]


def test_where_keeps_the_rows_that_meet_every_condition(manifests, tmp_path):
    out = tmp_path / "some.csv"
    where = ["--where", "split=train", "label=0"]
    combine.main([*manifests, *where, "--no-duplicates-check", "--out", str(out)])
    assert read_manifest(out)["name"].tolist() == ["one0.jpg", "one2.jpg", "two0.jpg"]


def test_where_takes_any_of_the_values_of_one_column(manifests, tmp_path):
    out = tmp_path / "some.csv"
    where = ["--where", "name=one1.jpg", "name=two1.jpg", "name=two0.jpg", "split=val"]
    combine.main([*manifests, *where, "--no-duplicates-check", "--out", str(out)])
    assert read_manifest(out)["name"].tolist() == ["one1.jpg", "two1.jpg"]


def test_names_that_repeat_get_the_name_of_their_manifest_in_front(manifests, tmp_path):
    out = tmp_path / "twice.csv"
    (tmp_path / "again.csv").write_text((tmp_path / "two.csv").read_text())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "two.csv").write_text((tmp_path / "two.csv").read_text())
    combine.main([manifests[1], str(tmp_path / "again.csv"), "--no-duplicates-check", "--out", str(out)])
    assert read_manifest(out)["name"].tolist() == [
        "two/two0.jpg",
        "two/two1.jpg",
        "again/two0.jpg",
        "again/two1.jpg",
    ]
    rows = combine.combine([manifests[1], str(tmp_path / "a" / "two.csv")], [])
    assert rows["name"].tolist()[2:] == ["a/two/two0.jpg", "a/two/two1.jpg"]
    with pytest.raises(UserError, match=r"two\.csv is given twice"):
        combine.combine([manifests[1], manifests[1]], [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--where", "splt=train"], r"no manifest has a column splt \(did you mean split\?\)"),
        (["--where", "split=test"], r"no row of .* is left with split=test"),
        (["--where", "split"], "argument --where: must be COLUMN=VALUE, not split"),
        (["--weight", "one=0"], "argument --weight: must be SOURCE=W with a positive number W, not one=0"),
        (["--weight", "one=inf"], "argument --weight: must be SOURCE=W"),
        (["--weight", "one=1", "--no-duplicates-check"], "unknown source 'one'"),
        (["--near-duplicates", "40"], "argument --near-duplicates: must be from 0 to 10"),
        (
            ["--balance", "generator", "--no-duplicates-check"],
            "2 rows have no generator, one1.jpg among them",
        ),
        ([], "no image of .* could be read"),
    ],
)
def test_what_cannot_be_done_is_an_error(manifests, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        combine.main([*manifests, *flags, "--out", str(tmp_path / "x.csv")])
    assert not (tmp_path / "x.csv").exists()


def test_an_image_that_is_there_twice_is_kept_once_and_its_groups_are_joined(tmp_path, read_rows):
    same = encoded(1)
    one = write_set(
        tmp_path / "a" / "one.csv",
        {"1.jpg": same, "2.jpg": encoded(2), "3.jpg": encoded(3)},
        label=[None, 1, 0],
        group=["g1", "g2", ""],
        protocol_sets=["x", "", ""],
    )
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("m/4.jpg", same)
        archive.writestr("m/5.jpg", encoded(5))
        archive.writestr("m/6.jpg", encoded(3))
    rows = {
        "image": [f"{tmp_path}/two.zip::m/{name}.jpg" for name in (4, 5, 6)],
        "name": ["4.jpg", "5.jpg", "6.jpg"],
        "label": [0, 1, 0],
        "group": ["h1", "g1", "h3"],
        "protocol_sets": ["y", "y", "y"],
    }
    write_manifest(make_manifest(rows), tmp_path / "two.csv")
    out = tmp_path / "all.csv"
    assert combine.main([one, str(tmp_path / "two.csv"), "--out", str(out)]) == 0
    found = read_manifest(out).set_index("name")
    # Of 1 and 4 the one with a label stays; its group is one with that of 1, and so with that of 5.
    assert found.index.tolist() == ["2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert found.loc["4.jpg", "group"] == found.loc["5.jpg", "group"] != found.loc["2.jpg", "group"]
    assert found.loc["3.jpg", "group"] == "h3"
    assert found["protocol_sets"].to_dict() == {"2.jpg": "", "3.jpg": "y", "4.jpg": "y;x", "5.jpg": "y"}
    dropped = read_rows(tmp_path / "all.dropped.csv")
    assert dropped.to_numpy().tolist() == [
        ["1.jpg", "equal bytes", "4.jpg"],
        ["6.jpg", "equal bytes", "3.jpg"],
    ]


def test_equal_bytes_with_two_labels_are_an_error_that_names_both(tmp_path):
    one = write_set(tmp_path / "a" / "one.csv", {"1.jpg": encoded(1)}, label=[0])
    two = write_set(tmp_path / "b" / "two.csv", {"2.jpg": encoded(1)}, label=[1])
    with pytest.raises(UserError, match=r"a/1\.jpg and .*b/2\.jpg have equal bytes, but labels 0 and 1"):
        combine.main([one, two, "--out", str(tmp_path / "all.csv")])


def test_equal_bytes_are_found_wherever_they_lie_and_close_ones_are_not(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 9000, dtype=np.uint8).tobytes()
    late = data[:-1] + bytes([data[-1] ^ 1])
    for name, content in {"a": data, "b": data, "late": late, "empty": b"", "empty2": b""}.items():
        (tmp_path / name).write_bytes(content)
    for kind, method in (("stored", zipfile.ZIP_STORED), ("packed", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / f"{kind}.zip", "w", method) as archive:
            archive.writestr("same", data)
            archive.writestr("late", late)
            archive.writestr("only", data[:5000] + bytes(100))
    files = [str(tmp_path / name) for name in ("a", "late", "b", "empty", "empty2", "missing")]
    members = [f"{tmp_path}/{kind}.zip::{name}" for kind in ("stored", "packed") for name in ("same", "late")]
    more = [f"{tmp_path}/stored.zip::only", f"{tmp_path}/packed.zip::gone", f"{tmp_path}/no.zip::x", files[0]]
    sets, faults = equal_images([*files, *members, *more])
    assert sets == [[0, 2, 6, 8, 13], [1, 7, 9]]
    assert sorted(faults) == [5, 11, 12] and "no member gone" in faults[11]
    # Files alone are told apart by another way than a mixture of files and members.
    assert equal_images(files[:5])[0] == [[0, 2]]


def test_zip_members_of_equal_size_and_crc_are_still_compared_by_their_bytes(tmp_path, monkeypatch):
    reads = []
    read = image_io.read_bytes
    monkeypatch.setattr(image_io, "read_bytes", lambda location: reads.append(location) or read(location))
    one = encoded(1)
    # The generator polynomial of CRC-32, least significant bit first: adding it leaves the CRC as it is.
    other = bytes(a ^ b for a, b in zip(one, b"\x41\x06\x71\xdb\x01" + bytes(len(one) - 5), strict=True))
    assert zlib.crc32(one) == zlib.crc32(other) and one != other
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, data in {"a": one, "b": other, "c": one, "d": one[:-1] + b"x"}.items():
            archive.writestr(name, data)
    locations = [f"{tmp_path}/z.zip::{name}" for name in "abcd"]
    assert equal_images(locations)[0] == [[0, 2]]
    assert reads == locations[:3], "the directory tells the last one from the others"


def test_missing_images_are_left_out_listed_and_the_status_says_so(tmp_path, read_rows):
    one = write_set(tmp_path / "one.csv", {"1.jpg": encoded(1), "2.jpg": encoded(2)}, label=[0, 1])
    (tmp_path / "1.jpg").unlink()
    assert combine.main([one, "--out", str(tmp_path / "all.csv")]) == 1
    assert read_manifest(tmp_path / "all.csv")["name"].tolist() == ["2.jpg"]
    assert read_rows(tmp_path / "all.errors.csv")["name"].tolist() == ["1.jpg"]
    (tmp_path / "1.jpg").write_bytes(encoded(1))
    assert combine.main([one, "--out", str(tmp_path / "all.csv")]) == 0
    assert not (tmp_path / "all.errors.csv").exists()


def test_near_duplicates_of_one_label_and_generator_are_kept_once(tmp_path, read_rows):
    images = {
        "a.jpg": encoded(1, quality=95),
        "b.png": encoded(1, "PNG"),
        "edit.jpg": encoded(1, quality=70),
        "edit2.jpg": encoded(1, quality=60),
        "other.jpg": encoded(2),
        "broken.jpg": encoded(3)[:300],
    }
    one = write_set(
        tmp_path / "one.csv", images, label=[0, 0, 1, 1, 0, 0], generator=["", "", "m1", "m2", "", ""]
    )
    flags = ["--near-duplicates", "4", "--workers", "1", "--out", str(tmp_path / "all.csv")]
    assert combine.main([one, *flags]) == 1
    assert read_manifest(tmp_path / "all.csv")["name"].tolist() == [
        "a.jpg",
        "edit.jpg",
        "edit2.jpg",
        "other.jpg",
    ]
    assert read_rows(tmp_path / "all.dropped.csv").to_numpy().tolist() == [
        ["b.png", "near-duplicate", "a.jpg"]
    ]
    assert read_rows(tmp_path / "all.errors.csv")["name"].tolist() == ["broken.jpg"]


def test_no_training_image_looks_like_a_held_out_one(tmp_path, capsys):
    # 20 originals and an edit of each, in groups of their own: only their looks say that they are related.
    images = {f"{seed}.jpg": encoded(seed) for seed in range(20)}
    images |= {f"{seed}e.jpg": encoded(seed, quality=60) for seed in range(20)}
    one = write_set(tmp_path / "one.csv", images, label=[0] * 20 + [1] * 20, generator=[""] * 20 + ["m"] * 20)
    out = tmp_path / "all.csv"
    flags = [one, "--holdout", "0.3", "--workers", "1", "--out", str(out)]
    combine.main(flags)
    stems = [
        set(read_manifest(path)["name"].str.removesuffix(".jpg").str.removesuffix("e")) for path in parts(out)
    ]
    assert stems[0] & stems[1], "the case is not tested"
    combine.main([*flags, "--near-duplicates", "4"])
    training, held = (read_manifest(path) for path in parts(out))
    stems = [set(side["name"].str.removesuffix(".jpg").str.removesuffix("e")) for side in (training, held)]
    assert not stems[0] & stems[1] and len(held) == 12
    assert "near-duplicate of a held-out image" in capsys.readouterr().out
    combine.main([one, "--out", str(out)])
    assert not parts(out)[1].exists(), "the former hold-out is now part of the training rows"


def parts(out: Path) -> tuple[Path, Path]:
    return out, out.with_suffix(".holdout.csv")


def test_balance_keeps_as_many_of_each_value_whatever_the_order_of_the_rows():
    rows = make_manifest(
        {
            "image": [f"/{place}.jpg" for place in range(40)],
            "name": [f"{place}.jpg" for place in range(40)],
            "label": [int(place < 30) for place in range(40)],
            "source": ["s" if place % 4 else "t" for place in range(40)],
            "generator": ["" if place >= 30 else "gh"[place % 3 == 0] for place in range(40)],
        }
    )
    shuffled = rows.iloc[np.random.default_rng(1).permutation(40)].reset_index(drop=True)
    for by in ("label", "source", "generator"):
        kept = combine.balance(rows, by, 0)
        counts = kept[kept["generator"] != ""] if by == "generator" else kept
        assert counts[by].value_counts().tolist() == [10, 10]
        assert sorted(kept["name"]) == sorted(combine.balance(shuffled, by, 0)["name"])
        assert kept["name"].tolist() == [name for name in rows["name"] if name in set(kept["name"])]
        assert sorted(kept["name"]) != sorted(combine.balance(rows, by, 1)["name"])
    assert (combine.balance(rows, "generator", 0)["label"] == 0).sum() == 10
    assert combine.balance(rows, "none", 0) is rows


def test_a_source_gets_its_weight_and_the_others_keep_theirs(tmp_path):
    rows = {"image": ["/1", "/2", "/3"], "name": list("123"), "source": list("abc"), "weight": ["2", "", "3"]}
    write_manifest(make_manifest(rows), tmp_path / "one.csv")
    out = tmp_path / "all.csv"
    flags = ["--no-duplicates-check", "--weight", "c=0.25", "--out", str(out)]
    combine.main([str(tmp_path / "one.csv"), *flags])
    assert read_manifest(out)["weight"].tolist() == ["2", "1", "0.25"]


def test_the_table_counts_every_image_by_source_generator_and_label(tmp_path, capsys):
    rows = make_manifest(
        {
            "image": [f"/{place}" for place in range(120)],
            "name": [str(place) for place in range(120)],
            "label": [(0, 1, None)[place % 3] for place in range(120)],
            "source": ["s"] * 120,
            "generator": [f"g{place // 3:02}" if place % 3 == 1 else "" for place in range(120)],
        }
    )
    lines = cells_of(combine.table(rows, rows[:30]))
    assert lines[0] == ["source", "generator", "real", "AI", "unlabeled", "held out"]
    assert lines[1] == ["s", "", "50", "0", "50", "20"]
    assert lines[-1] == ["all", "", "50", "50", "50", "30"]
    assert lines[-2] == ["(1 more)", "", "0", "1", "0", "0"] and len(lines) == 43
    assert cells_of(combine.table(rows, None))[-1] == ["all", "", "40", "40", "40"]


def test_the_hash_stands_storing_and_scaling_and_tells_pictures_apart():
    rng = np.random.default_rng(0)
    hashes = []
    for seed in range(30):
        picture = smooth_picture(seed, 200, 240)
        stored = io.BytesIO()
        Image.fromarray(picture).resize((97, 81), Image.Resampling.BICUBIC).save(stored, "JPEG", quality=60)
        again = np.asarray(Image.open(stored))
        noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        own, *others = (
            near_duplicates.perceptual_hash(near_duplicates.thumbnail(image))
            for image in (picture, again, noisy)
        )
        assert all((own ^ other).bit_count() <= 4 for other in others)
        hashes.append(own)
    assert len(near_duplicates.near_pairs(hashes, near_duplicates.MAX_DISTANCE_BITS)) == 0
    flat = near_duplicates.thumbnail(np.full((40, 50, 3), 200, np.uint8))
    assert near_duplicates.is_flat(flat) and near_duplicates.perceptual_hash(flat) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 10))
def test_pairs_by_bands_are_those_of_all_comparisons(seed, bits):
    rng = np.random.default_rng(seed)
    hashes = [int(value) for value in rng.integers(0, 2**64, 12, dtype=np.uint64)]
    for _ in range(40):
        flips = rng.choice(64, rng.integers(0, 12), replace=False)
        hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in flips))
    hashes = [None if rng.random() < 0.1 else value for value in hashes]
    expected = [
        [one, other, (hashes[one] ^ hashes[other]).bit_count()]
        for one in range(len(hashes))
        for other in range(one + 1, len(hashes))
        if None not in (hashes[one], hashes[other]) and (hashes[one] ^ hashes[other]).bit_count() <= bits
    ]
    assert near_duplicates.near_pairs(hashes, bits).tolist() == expected


def test_the_same_command_writes_the_same_bytes_with_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.writing.parallel._ITEMS_PER_TASK", 2)
    images = {f"{seed}.jpg": encoded(seed) for seed in range(12)}
    one = write_set(tmp_path / "one.csv", images, label=[0, 1] * 6, source=["s", "t"] * 6)
    made = []
    for workers in ("1", "2"):
        out = tmp_path / workers / "all.csv"
        flags = ["--near-duplicates", "2", "--holdout", "0.25", "--balance", "label", "--weight", "s=2"]
        combine.main([one, *flags, "--workers", workers, "--out", str(out)])
        made.append([path.read_text().replace("../", "") for path in parts(out)])
    assert made[0] == made[1] and pd.read_csv(io.StringIO(made[0][1]))["weight"].isin([1, 2]).all()


def test_an_input_is_never_replaced_by_the_result(manifests):
    path = Path(manifests[0])
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"would replace the input .*; choose another --out"):
        combine.main([str(path), "--out", str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".csv", ".holdout.csv", ".dropped.csv", ".errors.csv"])
@pytest.mark.parametrize("content", ["a letter", "name,score\na.jpg,0.5\n", "\0\xff" * 40, None])
def test_only_a_manifest_and_its_lists_are_replaced(manifests, tmp_path, suffix, content):
    out = tmp_path / "all.csv"
    arguments = [*manifests, "--no-duplicates-check", "--out", str(out)]
    foreign = out.with_suffix(suffix)
    if content is None:
        foreign.mkdir()
    else:
        foreign.write_text(content)
    with pytest.raises(UserError, match=rf"all\{suffix} already exists and was not written by this command"):
        combine.main(arguments)
    assert content is None or foreign.read_text() == content
    foreign.rmdir() if content is None else foreign.unlink()
    combine.main([*arguments, "--holdout", "0.4"])
    out.with_suffix(".dropped.csv").write_text("name,reason,kept\n")
    out.with_suffix(".errors.csv").write_text("name,reason\n")
    combine.main(arguments)
    assert len(read_manifest(out)) == 5 and not out.with_suffix(".holdout.csv").exists()
