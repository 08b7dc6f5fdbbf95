"""Videos of real textures with exact masks, in the layout of DAVIS 2017.

    python scripts/make_videos.py DATA_ROOT OUT --videos 8 --frames 24 --size 240 432

DATA_ROOT holds camvid/ and imagenet-sample/ (WebDataset shards). Cars, pedestrians, bicyclists and
signs are cut from CamVid by its masks, blobs of random outline from photographs; they move on
smooth paths over a photograph or a road scene that pans slowly, turn, grow and shrink a little,
change in brightness, cross each other, and in every other video pass behind a post that has no
label. The same arguments give the same pixels. OUT/categories.json names the category of each
object. Frames are JPEG of quality 95. Another set may go into the same OUT under a name of its own
(--set); what is there is never overwritten.
"""

import argparse
import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from contramask.data.video_files import write_mask
from contramask.types import UserError, fold

Size = tuple[int, int]  # height, width

# CamVid's class -> name, least pixels of a cutout, height / width of its box, its longest side as a
# part of the frame's height
CUT = {
    8: ("car", 2500, (0.4, 1.1), (0.4, 0.6)),
    9: ("pedestrian", 900, (1.6, 4.0), (0.42, 0.6)),
    10: ("bicyclist", 1200, (1.0, 3.0), (0.42, 0.6)),
    6: ("sign", 400, (0.3, 3.0), (0.24, 0.34)),
}
DARKEST, PLAINEST = 40, 16  # least mean and deviation of a cutout's grey values
BLOB = ("blob", (0.28, 0.48))
ATTEMPTS = 200  # arrangements tried for a first frame in which every object can be seen


@dataclass
class Cutout:
    """An object: colours 0..255, opacity 0..1, what it is."""

    pixels: np.ndarray  # (h, w, 3) float32
    alpha: np.ndarray  # (h, w) float32
    category: str


@dataclass
class Path2D:
    """Where an object is at time u in [0, 1]: a way with a sway, a turn, a size, a brightness."""

    start: np.ndarray  # (x, y) in pixels
    end: np.ndarray
    sway: float
    turn: float  # degrees
    growth: float
    light: float
    phases: np.ndarray

    def at(self, u: float) -> tuple[np.ndarray, float, float, float]:
        """(centre, degrees, scale, brightness)."""
        waves = np.sin(2 * math.pi * u + self.phases)
        eased = u + 0.08 * (math.sin(2 * math.pi * u))
        centre = self.start + eased * (self.end - self.start)
        centre = centre + np.array([0.0, self.sway * waves[0]])
        return centre, self.turn * waves[1], 1 + self.growth * waves[2], 1 + self.light * waves[3]


def members(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of all shards of a folder, in order."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder} has no shards (*.tar); give the folder that holds camvid/")
    for shard in shards:
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    key, _, extension = member.name.partition(".")
                    samples.setdefault(key, {})[extension] = file.read()
        yield from samples.items()


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Material:
    """What videos are made of. Images are decoded when they are used."""

    def __init__(self, root: Path):
        scenes = [s for _, s in members(root / "camvid") if {"jpg", "seg.png"} <= s.keys()]
        self.scenes = scenes
        self.photographs = [s["jpg"] for _, s in members(root / "imagenet-sample")]

    def cutout(self, rng: np.random.Generator, index: int) -> Cutout:
        """An object of one of CamVid's classes, of a random scene that has a good one."""
        for place in rng.permutation(len(self.scenes)):
            scene = self.scenes[place]
            seg = np.asarray(Image.open(io.BytesIO(scene["seg.png"])))
            for mask, box in _components(seg, index):
                found = _cut(opened(scene["jpg"]), mask, box, CUT[index][0])
                grey = found.pixels[found.alpha > 0].mean(1)
                if grey.mean() > DARKEST and grey.std() > PLAINEST:
                    return found
        raise UserError(f"camvid has no whole {CUT[index][0]} that is large enough")

    def photograph(self, rng: np.random.Generator) -> np.ndarray:
        return opened(self.photographs[rng.integers(len(self.photographs))])

    def background(self, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < 0.5:
            return opened(self.scenes[rng.integers(len(self.scenes))]["jpg"])
        return self.photograph(rng)


def _components(seg: np.ndarray, index: int) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
    """(mask in its box, box) of whole objects of a class that are large enough."""
    (height, width), (_, least, shape, _) = seg.shape, CUT[index]
    labels, _ = ndimage.label(seg == index)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = box
        edge = rows.start < 2 or columns.start < 2
        edge |= rows.stop > height - 2 or columns.stop > width - 2
        mask = ndimage.binary_fill_holes(labels[box] == number)
        fits = shape[0] < mask.shape[0] / mask.shape[1] < shape[1]
        if fits and not edge and mask.sum() > least and mask.mean() > 0.45:
            yield mask, box


def _cut(image: np.ndarray, mask: np.ndarray, box: tuple[slice, ...], category: str) -> Cutout:
    inner = ndimage.binary_erosion(mask)  # its outermost pixels show what was behind it
    return Cutout(image[box].astype(np.float32), inner.astype(np.float32), category)


def blob(photograph: np.ndarray, rng: np.random.Generator, side: int = 256) -> Cutout:
    """A part of a photograph with a smooth random outline."""
    crop = _cover(photograph, (side, side))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    outline = np.ones_like(angle)
    for wave in range(2, 6):
        height, phase = rng.uniform(0, 0.4 / wave), rng.uniform(0, 2 * math.pi)
        outline += height * np.cos(wave * angle + phase)
    outline *= 0.48 * side / outline.max()
    return Cutout(crop.astype(np.float32), (radius < outline).astype(np.float32), BLOB[0])


def _cover(image: np.ndarray, size: Size) -> np.ndarray:
    """The centre of an image, resized so that it just covers a size."""
    scale = max(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(s, round(scale * i)) for s, i in zip(size, image.shape, strict=False))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    large = cv2.resize(image, (width, height), interpolation=way)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return large[top : top + size[0], left : left + size[1]]


def sized(cutout: Cutout, longest: float) -> Cutout:
    """Resized, with a margin and a soft edge of about a pixel."""
    scale = longest / max(cutout.alpha.shape)
    way, soft = (cv2.INTER_AREA,) * 2 if scale < 1 else (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    pixels = cv2.resize(cutout.pixels, None, fx=scale, fy=scale, interpolation=way)
    alpha = cv2.resize(cutout.alpha, pixels.shape[1::-1], interpolation=soft)
    margin = ((4, 4), (4, 4))
    pixels = np.pad(pixels.clip(0, 255), (*margin, (0, 0)), mode="edge")
    alpha = cv2.GaussianBlur(np.pad(alpha, margin), (0, 0), 0.7)
    return Cutout(pixels, alpha, cutout.category)


def path(rng: np.random.Generator, category: str, size: Size) -> Path2D:
    height, width = size
    walks = category in ("car", "bicyclist", "pedestrian")
    start = rng.uniform((0.15, 0.45 if walks else 0.25), (0.85, 0.75)) * (width, height)
    for _ in range(ATTEMPTS):
        end = rng.uniform((0.1, 0.2), (0.9, 0.8)) * (width, height)
        if walks:  # or drives: it stays level
            end[1] = start[1] + rng.uniform(-0.08, 0.08) * height
        if 0.2 * width < np.hypot(*(end - start)) < 0.55 * width:
            break
    return Path2D(
        start, end, rng.uniform(0.005, 0.03) * height, rng.uniform(0, 4 if walks else 14),
        rng.uniform(0.03, 0.14), rng.uniform(0, 0.12), rng.uniform(0, 2 * math.pi, 4),
    )  # fmt: skip


def placed(cutout: Cutout, way: Path2D, u: float, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """(pixels (H, W, 3), alpha (H, W)) of an object in the frame at time u."""
    centre, degrees, scale, light = way.at(u)
    height, width = cutout.alpha.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    matrix[:, 2] += centre - ((width - 1) / 2, (height - 1) / 2)
    warp = {"dsize": size[::-1], "flags": cv2.INTER_LINEAR}
    pixels = cv2.warpAffine(cutout.pixels, matrix, borderMode=cv2.BORDER_REPLICATE, **warp)
    return pixels * light, cv2.warpAffine(cutout.alpha, matrix, **warp)


class Scene:
    """One video before it is drawn: a background, objects from back to front, perhaps a post."""

    def __init__(self, material: Material, rng: np.random.Generator, size: Size, *, post: bool):
        self.size = size
        self.canvas = _cover(material.background(rng), tuple(round(1.25 * s) for s in size))
        self.pan = rng.uniform(0, 1, (2, 2)) * (0.25 * size[1], 0.25 * size[0])  # start, end
        self.dim = rng.uniform(0, 0.08)
        cut = [material.cutout(rng, int(i)) for i in rng.choice(list(CUT), rng.integers(1, 4))]
        blobs = [blob(material.photograph(rng), rng) for _ in range(int(rng.integers(1, 3)))]
        objects = [[*cut, *blobs][i] for i in rng.permutation(len(cut) + len(blobs))]
        sides = {name: part for name, _, _, part in CUT.values()} | {BLOB[0]: BLOB[1]}
        self.objects = [sized(o, rng.uniform(*sides[o.category]) * size[0]) for o in objects]
        self.categories = [o.category for o in objects]
        self.post = self._post(material, rng) if post else None
        self.paths = self._arranged(rng)

    def _post(self, material: Material, rng: np.random.Generator) -> Cutout:
        height, width = self.size[0] + 40, round(rng.uniform(0.05, 0.08) * self.size[1])
        pixels = _cover(material.photograph(rng), (height, width)).astype(np.float32)
        alpha = np.pad(np.ones((height, width), np.float32), 2)
        return Cutout(np.pad(pixels, ((2, 2), (2, 2), (0, 0)), mode="edge"), alpha, "post")

    def _arranged(self, rng: np.random.Generator) -> list[Path2D]:
        """Paths, the post's last, so that the first frame shows enough of every object."""
        height, width = self.size
        for _ in range(ATTEMPTS):
            paths = [path(rng, category, self.size) for category in self.categories]
            if self.post is not None:
                x = rng.uniform(0.3, 0.7) * width
                ends = np.array([[x, height / 2], [x + rng.uniform(-0.1, 0.1) * width, height / 2]])
                paths.append(Path2D(*ends, 0, rng.uniform(0, 4), 0, 0, np.zeros(4)))
            self.paths = paths
            _, mask, whole = self.draw(0.0)
            seen = np.array([(mask == i + 1).sum() for i in range(len(self.objects))])
            # A smaller part of what is drawn would be a riddle, what is out of the frame too.
            full = [(o.alpha > 0.5).sum() for o in self.objects]
            if (seen > 0.7 * whole).all() and (seen > 0.5 * np.array(full)).all():
                return paths
        raise UserError("no arrangement shows every object; give larger frames (--size)")

    def draw(self, u: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(frame, mask, pixels of every object before others cover it) at time u in [0, 1]."""
        shift = (1 - u) * self.pan[0] + u * self.pan[1]
        matrix = np.array([[1.0, 0, -shift[0]], [0, 1.0, -shift[1]]])
        frame = cv2.warpAffine(self.canvas, matrix, self.size[::-1]).astype(np.float32)
        frame *= 1 + self.dim * math.sin(2 * math.pi * u)
        mask, whole = np.zeros(self.size, np.uint8), np.zeros(len(self.objects))
        things = [*self.objects, *([self.post] if self.post else [])]
        for i, (thing, way) in enumerate(zip(things, self.paths, strict=True)):
            pixels, alpha = placed(thing, way, u, self.size)
            frame += alpha[..., None] * (pixels - frame)
            solid = alpha > 0.5
            mask[solid] = i + 1 if i < len(self.objects) else 0
            if i < len(self.objects):
                whole[i] = solid.sum()
        return frame.clip(0, 255).round().astype(np.uint8), mask, whole


def make(
    root: Path,
    out: Path,
    *,
    videos: int,
    frames: int,
    size: Size,
    seed: int = 0,
    split: str = "val",
) -> None:
    """Write a set.

    Raises:
        UserError: where the data are missing, sizes are too small, or OUT has such a set.
    """
    if videos < 1 or frames < 3 or min(size) < 48:
        raise UserError(
            f"{videos} videos of {frames} frames, {size[0]} x {size[1]} pixels; allowed are 1 "
            "video and more, 3 frames (2 are not scored), 48 pixels; set --videos, --frames, --size"
        )
    listed = out / "ImageSets" / "2017" / f"{split}.txt"
    names = [f"{split}-{number:03d}" for number in range(videos)]
    told = out / "categories.json"
    known = json.loads(told.read_text()) if told.is_file() else {}
    _check_new(out, listed, names)
    material, categories = Material(root), {}
    resolution = f"{size[0]}p"
    for number, name in enumerate(names):
        rng = np.random.default_rng(fold(seed, split, number))
        scene = Scene(material, rng, size, post=number % 2 == 1)
        categories[name] = {str(i + 1): c for i, c in enumerate(scene.categories)}
        folder = out / "JPEGImages" / resolution / name
        folder.mkdir(parents=True, exist_ok=True)
        for t in range(frames):
            frame, mask, _ = scene.draw(t / (frames - 1))
            Image.fromarray(frame).save(folder / f"{t:05d}.jpg", quality=95)
            masks = out / "Annotations" / resolution / name
            write_mask(masks / f"{t:05d}.png", torch.from_numpy(mask))
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{name}\n" for name in categories))
    told.write_text(json.dumps(known | categories, indent=1) + "\n")


def _check_new(out: Path, listed: Path, names: list[str]) -> None:
    """Older frames would mix with new ones; categories and list are of one set, at one size."""
    folders = [path for kind in ("JPEGImages", "Annotations") for path in (out / kind).glob("*/*")]
    there = [path for path in folders if path.name in names]
    there += [listed] if listed.exists() else []
    if there:
        raise UserError(
            f"{there[0]} is there already ({len(there)} such files and folders); set another OUT "
            "or --set, or remove them"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the folder that holds camvid and imagenet-sample")
    parser.add_argument("out", type=Path)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", type=int, nargs=2, default=(240, 432), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", default="val", help="the name of the list")
    given = parser.parse_args()
    size = (given.size[0], given.size[1])
    make(
        given.root, given.out, videos=given.videos, frames=given.frames, size=size,
        seed=given.seed, split=given.set,
    )  # fmt: skip
    print(
        f"contramask probe track RUN --videos {given.out} --set {given.set} "
        f"--resolution {size[0]}p --short_side {min(size)}"
    )


if __name__ == "__main__":
    main()
