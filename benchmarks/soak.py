"""Memory and file descriptors over 50,000 streamed images.

    uv run python benchmarks/soak.py

Two workers read, decode and crop JPEGs from shards through `ImageShards`, over several epochs and
all block changes; every thousand images the resident memory of all processes together is read, and
their open file descriptors. Growth is of the last fifth against the second fifth: the first fills
the caches.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import psutil

from contramask.data.examples import Images
from contramask.data.module import ImageShards
from contramask.data.views import Crops
from resume import make_shards


def usage() -> tuple[float, int]:
    """Resident MB and open file descriptors of this process and its children."""
    me = psutil.Process()
    all_of_us = [me, *me.children(recursive=True)]
    memory = sum(p.memory_info().rss for p in all_of_us) / 1e6
    return memory, sum(p.num_fds() for p in all_of_us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    batch, every = 125, 1_000
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), 20, 1_000)
        data = ImageShards(
            folder,
            views={"global": Crops(number=2, size=96)},
            batch_size=batch,
            workers=given.workers,
            images=Images(size=96),
        )
        begin, rows = time.perf_counter(), []
        for number, _ in enumerate(islice(data.train_dataloader(), given.images // batch), 1):
            if number * batch % every == 0:
                rows.append(usage())
        seconds = time.perf_counter() - begin
    fifth = len(rows) // 5
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]
    before, after = (statistics.mean(m for m, _ in part) for part in (early, late))
    result = {
        "images": given.images,
        "images/s": round(given.images / seconds, 1),
        "resident MB, second fifth": round(before, 1),
        "resident MB, last fifth": round(after, 1),
        "growth, %": round(100 * (after / before - 1), 2),
        "highest / mean": round(max(m for m, _ in rows) / after, 3),
        "file descriptors, second fifth": max(n for _, n in early),
        "file descriptors, last fifth": max(n for _, n in late),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
