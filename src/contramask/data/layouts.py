"""Data sets as they lie on disk: folders of classes, manifests, CIFAR, STL-10 and Imagenette.

Files of pickles are never opened: where a data set comes both ways, its binary version is asked
for.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from contramask.data.originals import LAYOUTS, Layout, Original
from contramask.errors import UserError

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
NAMES = ("cifar10", "cifar100", "stl10", "imagenette")


class Listing(NamedTuple):
    """Images in a fixed order, and the names of their labels if they have any."""

    originals: list[Original]
    classes: list[str] | None
    aside: str = ""  # other files in the folder: how many of each ending


def image_folder(
    folder: Path, *, classes: Sequence[str] | None = None, masks: Path | None = None
) -> Listing:
    """`folder/CLASS/.../image.jpg`: the first folder is the class; images right in it have none.

    Args:
        folder: what to list, links followed.
        classes: the names whose places are the labels; None: the sorted names of the folders.
        masks: a folder with the same names, ending in .png.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the classes")
    files = sorted(_files(folder))
    names = [name for name in files if _ending(name) in ENDINGS]
    if not names:
        raise UserError(
            f"{folder} holds no images; they end in {' '.join(sorted(ENDINGS))}, in any case"
        )
    found = sorted({name.split("/")[0] for name in names if "/" in name})
    bare = [name for name in names if "/" not in name]
    if found and bare:
        raise UserError(
            f"{folder} holds classes and, beside them, images of none ({bare[0]} ...); move these "
            "away, or pack each folder of classes by itself"
        )
    places = _places(found, classes, folder) if found else None
    originals = [
        Original(
            path=str(folder / name),
            label=None if places is None else places[name.split("/")[0]],
            notes={"file": name},
            mask=None if masks is None else str(masks / name.rsplit(".", 1)[0]) + ".png",
        )
        for name in names
    ]
    others = Counter(_ending(name) or "without ending" for name in files)
    aside = ", ".join(f"{n} {e}" for e, n in others.most_common() if e not in ENDINGS)
    return Listing(originals, None if places is None else list(classes or found), aside)


def manifest(
    file: Path, *, root: Path | None = None, classes: Sequence[str] | None = None
) -> Listing:
    """A CSV with a header, or JSON lines: `path`, and if wanted `label` (number or name), `mask`.

    Paths are relative to `root`, by default the manifest's folder. Further columns become notes.
    """
    rows = _rows(file)
    root = root or file.parent
    for number, row in enumerate(rows, 1):
        if not row.get("path"):
            have = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"{file}: entry {number} has no path, only {have}; a path is needed")
    labels = {str(row["label"]) for row in rows if _given(row, "label")}
    if labels and not all(_given(row, "label") for row in rows):
        number = next(i for i, row in enumerate(rows, 1) if not _given(row, "label"))
        raise UserError(f"{file}: entry {number} has no label, others do; label all or none")
    numeric = classes is None and all(label.isdecimal() for label in labels)
    places = {} if numeric else _places(sorted(labels), classes, file)
    originals = []
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("label", "mask")}
        label = None
        if labels:
            text = str(row["label"])
            label = int(text) if numeric else places[text]
        rest["file"] = rest.pop("path")
        mask = str(root / row["mask"]) if _given(row, "mask") else None
        path = str(root / row["path"])
        originals.append(Original(path=path, label=label, notes=rest, mask=mask))
    return Listing(originals, None if numeric else list(classes or sorted(labels)))


def torchvision(root: Path, name: str) -> dict[str, Listing]:
    """The splits of a data set as torchvision leaves it on disk."""
    if name == "imagenette":
        return _imagenette(root)
    if name == "stl10":
        return _stl10(root)
    return _cifar(root, name)


def _cifar(root: Path, name: str) -> dict[str, Listing]:
    ten = name == "cifar10"
    folder = _find(
        root,
        "cifar-10-batches-bin" if ten else "cifar-100-binary",
        "batches.meta.txt" if ten else "fine_label_names.txt",
        f"the binary version, cifar-{10 if ten else 100}-binary.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html (the Python version holds pickles, which "
        "contramask never opens)",
    )
    text = (folder / ("batches.meta.txt" if ten else "fine_label_names.txt")).read_text("utf-8")
    classes = text.split()
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    files = {"train": train, "val": ["test_batch.bin" if ten else "test.bin"]}
    layout: Layout = "cifar10" if ten else "cifar100"
    return {
        split: Listing([o for f in names for o in _records(folder / f, layout)], classes)
        for split, names in files.items()
    }


def _stl10(root: Path) -> dict[str, Listing]:
    folder = _find(
        root,
        "stl10_binary",
        "class_names.txt",
        "stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10",
    )
    classes = (folder / "class_names.txt").read_text("utf-8").split()
    splits = {}
    for split, stem in (("train", "train"), ("val", "test"), ("unlabeled", "unlabeled")):
        images, labels = folder / f"{stem}_X.bin", folder / f"{stem}_y.bin"
        if images.is_file():
            numbers = np.fromfile(labels, np.uint8).astype(int) - 1 if labels.is_file() else None
            splits[split] = Listing(
                list(_records(images, "stl10", numbers)), None if numbers is None else classes
            )
    if not splits:
        raise UserError(f"{folder} holds no train_X.bin, test_X.bin or unlabeled_X.bin")
    return splits


def _imagenette(root: Path) -> dict[str, Listing]:
    names = ("imagenette2", "imagenette2-320", "imagenette2-160", ".")
    folder = next((root / n for n in names if (root / n / "train").is_dir()), None)
    if folder is None:
        raise UserError(
            f"{root} holds no imagenette2*/train; download imagenette2.tgz from "
            "https://github.com/fastai/imagenette and unpack it there"
        )
    train = image_folder(folder / "train")
    return {"train": train, "val": image_folder(folder / "val", classes=train.classes)}


def _records(file: Path, layout: Layout, labels: np.ndarray | None = None) -> Iterable[Original]:
    """The records of a binary file; CIFAR's labels are the byte before the pixels."""
    if not file.is_file():
        raise UserError(f"{file} is missing; unpack the whole archive")
    skip, side = LAYOUTS[layout]
    size = skip + 3 * side * side
    count, rest = divmod(file.stat().st_size, size)
    if rest or (labels is not None and len(labels) != count):
        raise UserError(f"{file} is not whole: {count} images and {rest} bytes; unpack it again")
    if skip:
        labels = np.fromfile(file, np.uint8).reshape(count, size)[:, skip - 1]
    for i in range(count):
        label = None if labels is None else int(labels[i])
        notes = {"file": file.name, "record": i}
        yield Original(path=str(file), label=label, notes=notes, layout=layout, record=i)


def _find(root: Path, name: str, mark: str, where: str) -> Path:
    folder = next((f for f in (root, root / name) if (f / mark).is_file()), None)
    if folder is None:
        raise UserError(f"{root} holds no {name}/{mark}; download {where} and unpack it there")
    return folder


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _files(folder: Path) -> Iterable[str]:
    """Paths of files inside a folder, with slashes; hidden ones are none."""
    for place, _, names in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder)
        for name in names:
            if not name.startswith("."):
                yield (inside / name).as_posix()


def _places(found: Sequence[str], classes: Sequence[str] | None, where: Path) -> dict[str, int]:
    """Name -> label."""
    known = {name: i for i, name in enumerate(classes or found)}
    strange = [name for name in found if name not in known]
    if strange:
        raise UserError(
            f"{where} has the class {strange[0]!r}, which is none of the {len(known)} in "
            "classes.json beside the shards; pack sets of different classes into different folders"
        )
    return known


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"there is no manifest {file}")
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix.lower() in (".csv", ".tsv"):
            comma = "\t" if file.suffix.lower() == ".tsv" else ","
            rows: list[dict[str, Any]] = list(csv.DictReader(lines, delimiter=comma))
        elif file.suffix.lower() in (".jsonl", ".ndjson"):
            rows = [_line(file, i, text) for i, text in enumerate(lines, 1) if text.strip()]
        else:
            raise UserError(f"{file}: a manifest ends in .csv, .tsv or .jsonl")
    if not rows:
        raise UserError(f"{file} lists no images")
    return rows


def _line(file: Path, number: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: line {number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{file}: line {number} is not an object with a path")
    return row


def _given(row: dict[str, Any], name: str) -> bool:
    return row.get(name) not in (None, "")
