"""Attention maps are let go block by block: no more than one block's are ever held."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from contramask.analysis import record
from contramask.analysis.analysis import Tap
from contramask.analysis.attention import AttentionStatistics
from contramask.analysis.pictures import Pictures
from contramask.analysis.run import analyse
from contramask.models.attention import attend
from tests.builders import SIZE, randn, tiny_vit

DEPTH = 5
IMAGES = 11  # two slices of the statistics, and with chunks of 9 two passes


class Hoarder(AttentionStatistics):
    """Keeps what it should not: a part of the maps, which keeps all of their memory."""

    def taps(self, spec):
        return {"attention": Tap("attention", "*", lambda attended, label: attended.maps[:, :1])}

    def update(self, seen):
        pass

    def readings(self):
        return []


@pytest.fixture
def held(monkeypatch):
    """How many maps made before are still in memory: each time new ones are made."""
    made: list[StorageWeakRef] = []
    counts: list[int] = []

    def watched(*args):
        counts.append(sum(not maps.expired() for maps in made))
        found = attend(*args)
        made.append(StorageWeakRef(found.maps.untyped_storage()))
        return found

    monkeypatch.setattr(record, "attend", watched)
    yield counts
    assert all(maps.expired() for maps in made)


def look(analyses) -> None:
    vit = tiny_vit(timm={"depth": DEPTH})
    analyse(vit, [randn(IMAGES, 3, *SIZE)], analyses, chunk=9)


def test_no_map_outlives_its_block(held):
    look({"attention": AttentionStatistics()})
    assert held == [0] * (2 * DEPTH)


def test_nor_where_several_analyses_read_maps(held):
    both = {"attention": AttentionStatistics(), "pictures": Pictures(images=IMAGES)}
    look(both)
    assert held == [0] * (2 * (DEPTH + 3))  # pictures are of three blocks


def test_the_count_sees_who_keeps_maps(held):
    look({"attention": Hoarder()})
    # The maps of a chunk are let go when the next chunk's are there.
    assert held[:DEPTH] == list(range(DEPTH))


def test_the_heads_outputs_are_those_of_one_block_before(monkeypatch):
    """The statistics compare with the block before; nothing older stays."""
    outputs: list[StorageWeakRef] = []

    def watched(*args):
        alive = [not output.expired() for output in outputs]
        assert sum(alive) <= 1, f"outputs of {sum(alive)} blocks are held"
        found = attend(*args)
        outputs.append(StorageWeakRef(found.output.untyped_storage()))
        return found

    monkeypatch.setattr(record, "attend", watched)
    metric = AttentionStatistics()
    look({"attention": metric})
    assert len(outputs) == 2 * DEPTH
    assert all(output.expired() for output in outputs)
    value = metric.means("sums")[0]
    assert torch.isfinite(value).all()
    assert value.shape[0] == DEPTH
