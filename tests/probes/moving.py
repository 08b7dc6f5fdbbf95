"""Small videos with exact masks: squares of one colour that move over noise."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from contramask.data.video_files import write_mask

SIZE = (48, 68)
# index -> colour, start (row, column), step a frame, side
SQUARES = {
    2: ((230, 30, 40), (4, 4), (0, 4), 20),
    5: ((20, 60, 220), (28, 46), (0, -2), 16),
}


def frame(seed: int, t: int, squares: dict | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, mask) of frame t; the background does not move."""
    noise = np.random.default_rng(seed).integers(90, 170, (SIZE[0] // 4, SIZE[1] // 4, 3))
    pixels = noise.repeat(4, 0).repeat(4, 1).astype(np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    for index, (colour, start, step, side) in (SQUARES if squares is None else squares).items():
        top, left = (max(0, s + t * d) for s, d in zip(start, step, strict=True))
        pixels[top : top + side, left : left + side] = colour
        mask[top : top + side, left : left + side] = index
    return pixels, mask


def write_set(
    root: Path, names: dict[str, int], *, split: str = "val", squares: dict | None = None
) -> Path:
    """Videos of so many frames in the layout of DAVIS 2017, and categories of their objects."""
    for seed, (name, count) in enumerate(names.items()):
        folder = root / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for t in range(count):
            pixels, mask = frame(seed, t, squares)
            Image.fromarray(pixels).save(folder / f"{t:05d}.jpg", quality=98, subsampling=0)
            path = root / "Annotations" / "480p" / name / f"{t:05d}.png"
            write_mask(path, torch.from_numpy(mask))
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{name}\n" for name in names))
    known = {name: {"2": "red square", "5": "blue square"} for name in names}
    (root / "davis_semantics.json").write_text(json.dumps(known))
    return root
