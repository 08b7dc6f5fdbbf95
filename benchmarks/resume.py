"""Seconds from a resume to the first batch, at the start, in the midst and at the end of an epoch.

    uv run python benchmarks/resume.py

1,000,000 samples: one shard of 1,000 JPEGs (500 x 375, 60 kB) under 1,000 names. A loader (2
workers, batches of 64) is started afresh at each position, positions in turn, several rounds;
medians. Once it gives the samples' bytes, and once the two 224-pixel crops of a contrastive run:
the difference is one worker's time to decode one batch, which no position changes. `open` is what
every start costs before: to read the index and to look at the size of each shard.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from contramask.data.examples import Examples, TrainExamples
from contramask.data.index import save_index
from contramask.data.loader import Loader
from contramask.data.order import Layout
from contramask.data.shard_set import ShardSet, find_shards
from contramask.data.shards import ShardStream
from contramask.data.streaming import Streaming
from contramask.data.tarwriter import TarWriter
from contramask.data.views import IMAGENET_MEAN, IMAGENET_STD, Crops, Views

BATCH = 64


def photo(n: int, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of smooth noise that takes about as many bytes as a photograph."""
    rng = np.random.default_rng(n)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = cv2.add(image, rng.integers(0, 24, image.shape, dtype=np.uint8))
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def make_shards(folder: Path, shards: int, count: int) -> None:
    """One shard of `count` samples, linked under other names, and the index of all."""
    writer = TarWriter(folder / "train-000000.tar")
    for n in range(count):
        writer.add(f"{n:08d}", {"jpg": photo(n), "cls": str(n % 1000).encode()})
    first = writer.close()
    os.replace(writer.part, writer.path)
    entries = [first]
    for i in range(1, shards):
        path = folder / f"train-{i:06d}.tar"
        os.link(first.url, path)
        entries.append(replace(first, url=str(path)))
    save_index(entries)


class Bytes:
    """Decodes nothing."""

    def decode(self, members: Mapping[str, bytes], key: int) -> int:
        return len(members["jpg"])

    def collate(self, items: list[int]) -> dict[str, Any]:
        return {"bytes": items}


def crops() -> TrainExamples:
    """The two views of a contrastive run."""
    groups = {"global": Crops(number=2)}
    views = Views(groups, on_device=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return TrainExamples(views, reads=Examples())


def first_batch(
    found: ShardSet, position: int, workers: int, examples: Bytes | TrainExamples
) -> float:
    """Seconds until a loader that begins at a position gives its first batch."""
    streaming = Streaming()
    begin = time.perf_counter()
    data = ShardStream(
        found.stream(seed=0, unit=BATCH, streaming=streaming),
        layout=Layout(BATCH, start=position),
        decode=examples.decode,
        collate=examples.collate,
        streaming=streaming,
    )
    batches = iter(Loader(lambda: data, workers=workers, streaming=streaming))
    batch = next(batches)
    seconds = time.perf_counter() - begin
    assert batch["position"] == position
    batches.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--count", type=int, default=1_000, help="samples of a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    total = given.shards * given.count
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), given.shards, given.count)
        pattern = f"{folder}/train-{{000000..{given.shards - 1:06d}}}.tar"
        begin = time.perf_counter()
        found = find_shards(pattern, streaming=Streaming(), where="pattern")
        opened = time.perf_counter() - begin
        places = [int(total * part) // BATCH * BATCH for part in (0, 0.25, 0.5, 0.75, 0.98, 7.3)]
        kinds = {"bytes": Bytes(), "two crops": crops()}
        seconds: dict[str, dict[int, list[float]]] = {k: {p: [] for p in places} for k in kinds}
        for _ in range(given.rounds):
            for place in places:
                for kind, examples in kinds.items():
                    took = first_batch(found, place, given.workers, examples)
                    seconds[kind][place].append(took)
    result: dict[str, Any] = {"samples": total, "open": round(opened, 3)}
    for kind, by_place in seconds.items():
        medians = {place: round(statistics.median(some), 3) for place, some in by_place.items()}
        ratio = max(medians.values()) / min(medians.values())
        result[f"first batch of {kind} after a resume at"] = medians
        result[f"{kind}, slowest / fastest"] = round(ratio, 2)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
