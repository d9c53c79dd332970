"""Splits for the tests of the report, and a reader of its page."""

import json
from html.parser import HTMLParser

import numpy as np
from conftest import smooth_picture
from PIL import Image

from featdistill.records.manifest import make_manifest, write_manifest
from featdistill.records.predictions import manifest_entry, write_predictions

EXPERTS = ("clip_l14_a", "siglip_so400m", "dinov3_l", "convnext")
GENERATORS = ("flux", "sdxl", "midjourney", "ideogram", "firefly", "dalle3")
# Each has a level that is known, but for the first: the challenge draws its scale from a range.
STEPS = [
    ["downscale", 0.61],
    ["jpeg", 43],
    ["jpeg", 4],
    ["gausblur", 2],
    ["whitenoise", 0.01],
    ["jitter", 0.1],
]
_PICTURES = 6


def make_split(folder, name, rows=160, seed=0, *, experts=EXPERTS, changes=None):
    """Write a split with pictures, chains of distortions and predictions, and return the predictions' path.

    Args:
        changes: columns of the manifest to put in the place of the usual ones.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(_PICTURES):
        path = folder / f"picture_{place}.jpg"
        if not path.exists():
            Image.fromarray(smooth_picture(place, 200, 170 + 20 * place)).save(path, quality=92)
    label = rng.permutation(np.arange(rows) % 2)
    is_distorted = np.arange(rows) // 2 % 2
    chains = [
        [STEPS[step] for step in rng.permutation(len(STEPS))[: rng.integers(1, 4)]] if state else []
        for state in is_distorted
    ]
    generator = [GENERATORS[rng.integers(len(GENERATORS))] if ai else "" for ai in label]
    columns = {
        "image": [str(folder / f"picture_{row % _PICTURES}.jpg") for row in range(rows)],
        "name": [f"{seed:x}{row:019x}.jpg" for row in range(rows)],
        "label": label.tolist(),
        "generator": generator,
        "is_distorted": is_distorted.tolist(),
        "distortions": [json.dumps(chain) for chain in chains],
    } | (changes or {})
    manifest, predictions = folder / f"{name}_manifest.csv", folder / f"{name}.csv"
    write_manifest(make_manifest(columns), manifest)
    truth = np.array([-1 if own is None else own for own in columns["label"]])
    logit = 3 * (2 * (truth == 1) - 1) * np.where(is_distorted, 0.5, 1)
    scores = {
        expert: 1 / (1 + np.exp(-(logit + rng.normal(0, 2 + place / 3, rows))))
        for place, expert in enumerate(experts)
    }
    sidecar = {
        "experts": {expert: f"{place:064x}" for place, expert in enumerate(experts)},
        "preprocessing": {expert: {"size": 224, "resize": "crop"} for expert in experts},
        "fusion": "probability_mean",
        "manifest": manifest_entry(manifest, predictions),
    }
    score = np.mean(list(scores.values()), axis=0)
    write_predictions(predictions, columns["name"], score, scores, sidecar)
    return predictions


def make_sweep(path, name="jpeg"):
    """Write the result of a sweep over two operations, one of them only at one level."""
    cells = [
        {"library": "official", "operation": name, "level": level, "auc": 1 - 0.1 * level}
        for level in range(1, 6)
    ]
    cells.append({"library": "official", "operation": "gausblur", "level": 2, "auc": None})
    for cell in cells:
        cell.update({"low": None, "high": None, "n": 40})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "clean_auc": 0.99, "mean_robust_auc": 0.7}))


class Node:
    """An element: tag, attributes, and the texts and elements in it."""

    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def __getitem__(self, attribute):
        return self.attributes.get(attribute)

    def all(self, tag=None, **attributes):
        """Return the elements below, in the page's order; `class_` is looked for among the classes."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and all(child._has(*pair) for pair in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def text(self):
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def _has(self, key, value):
        own = self[key.rstrip("_")]
        return value in (own or "").split() if key == "class_" else own == value


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = Node("")
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs)
        self.open[-1].children.append(node)
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read_page(path):
    """Return the page as a tree; a tag that is closed where another one is open fails."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def table_rows(page, caption):
    """Return the rows of the first table with that caption, each as texts."""
    table = next(one for one in page.all("table") if one.all("caption")[0].text() == caption)
    return [[cell.text() for cell in row.children] for row in table.all("tr")]


def heat_map_cells(drawing):
    """Return {(row, column): (text, shade)} of a heat map, by the places of its cells."""
    groups = [group for group in drawing.all("g") if group.all("text")]
    places = [(float(group.all("rect")[0]["y"]), float(group.all("rect")[0]["x"])) for group in groups]
    downs, acrosses = (sorted(set(column)) for column in zip(*places, strict=True))
    return {
        (downs.index(down), acrosses.index(across)): (group.text().strip(), int(group["class"][1:]))
        for (down, across), group in zip(places, groups, strict=True)
    }
