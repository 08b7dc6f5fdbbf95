"""Parts of a training set: which samples, and the stream over them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contramask.data.index import build_index
from contramask.data.order import Layout
from contramask.data.shard_set import find_shards
from contramask.data.shards import ShardStream
from contramask.data.streaming import Streaming
from contramask.data.subset import Catalogue, Subset, catalogue, choose, missing, restricted
from contramask.errors import UserError
from tests.data.tars import number, numbered_shards, numbers, spoil, write_tar


def known(counts) -> Catalogue:
    """So many samples of each class, the classes mixed."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    return Catalogue([f"k{i:04d}" for i in range(len(labels))], labels)


def chosen_keys(subset, catalogue) -> set[str]:
    return set(itertools.compress(catalogue.keys, choose(subset, catalogue)))


# ---- the catalogue --------------------------------------------------------------------------


def members(keys, order) -> list[tuple[str, bytes]]:
    content = {"jpg": lambda i: b"x" * (i * 311 % 1300), "cls": lambda i: f"{i % 7}\n".encode()}
    content["json"] = lambda i: b"{}"
    return [(f"{key}.{s}", content[s](i)) for i, key in enumerate(keys) for s in order]


@pytest.mark.parametrize("order", [("cls", "jpg"), ("jpg", "cls"), ("json", "jpg", "cls")])
def test_keys_and_labels_wherever_the_label_is(tmp_path, order):
    keys = [f"deep/er/s{i:03d}" for i in range(19)]
    path = write_tar(tmp_path / "a-000000.tar", members(keys, order))
    found = catalogue(build_index([str(path)]))
    assert found.keys == keys
    assert found.labels.tolist() == [i % 7 for i in range(19)]


@pytest.mark.parametrize("format", ["pax", "gnu"])
def test_long_names(tmp_path, format):
    import tarfile

    keys = [f"{'long' * 60}/{i}" for i in range(3)]
    kind = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}[format]
    path = write_tar(tmp_path / "a-000000.tar", members(keys, ("jpg", "cls")), format=kind)
    found = catalogue(build_index([str(path)]))
    assert (found.keys, found.labels.tolist()) == (keys, [0, 1, 2])


def test_what_has_no_label(tmp_path):
    text = [("a.jpg", b"1"), ("a.cls", b"3"), ("b.jpg", b"2"), ("c.cls", b"cat"), ("c.jpg", b"3")]
    index = build_index([str(write_tar(tmp_path / "a-000000.tar", text))])
    assert catalogue(index).keys == ["a", "b", "c"]
    assert catalogue(index).labels.tolist() == [3, -1, -1]
    spoil(index.shards[0].url, int(index.shards[0].starts[0]), bytes([255]) * 512)
    assert catalogue(index).labels.tolist() == [-1, -1, -1]


# ---- the choice -----------------------------------------------------------------------------


def test_a_share_of_each_class():
    all_ = known([200, 100, 50])
    chosen = choose(Subset(fraction=0.1), all_)
    assert np.bincount(all_.labels[chosen]).tolist() == [20, 10, 5]
    chosen = choose(Subset(per_class=4), all_)
    assert np.bincount(all_.labels[chosen]).tolist() == [4, 4, 4]
    assert choose(Subset(), all_).all()
    assert choose(Subset(fraction=1.0), all_).all()


@given(
    st.floats(0.1, 1), st.floats(0.1, 1), st.lists(st.integers(9, 40), min_size=1, max_size=4),
    st.integers(0, 3),
)  # fmt: skip
def test_a_smaller_part_lies_in_a_larger(a, b, counts, seed):
    all_ = known(counts)
    small, large = (chosen_keys(Subset(fraction=f, seed=seed), all_) for f in sorted((a, b)))
    assert small <= large
    few = chosen_keys(Subset(per_class=len(small) // len(counts) % 9 + 1, seed=seed), all_)
    assert few <= chosen_keys(Subset(per_class=9, seed=seed), all_)


def test_the_choice_is_of_names_and_seed_not_of_places():
    all_ = known([30, 40])
    turned = Catalogue(all_.keys[::-1], all_.labels[::-1])
    one = chosen_keys(Subset(fraction=0.3, seed=1), all_)
    assert one == chosen_keys(Subset(fraction=0.3, seed=1), turned)
    assert one != chosen_keys(Subset(fraction=0.3, seed=2), all_)


def test_a_name_that_several_samples_share_is_not_guessed(tmp_path):
    keys = Catalogue(["cat/0001", "cat/0002", "dog/0001", "dog/0002"], np.array([0, 0, 1, 1]))
    file = tmp_path / "list.txt"
    file.write_text("cat/0001.png\ndog/0002\n")
    assert choose(Subset(file=str(file)), keys).tolist() == [True, False, False, True]
    file.write_text("cat/0001.png\n0002.png\n")
    with pytest.raises(UserError, match=r"0002.png may be cat/0002 or dog/0002; .*whole keys"):
        choose(Subset(file=str(file)), keys)


def test_a_list_of_names(tmp_path):
    """As SimCLR publishes them: file names, without the folders of ours."""
    all_ = Catalogue(["a/n01_1", "a/n01_2", "b/n02_7", "b/n02_8"], np.array([0, 0, 1, 1]))
    file = tmp_path / "1percent.txt"
    file.write_text("n01_2.JPEG\nb/n02_7\nn02_7.jpeg\n")
    assert choose(Subset(file=str(file)), all_).tolist() == [False, True, True, False]
    file.write_text("n01_2.JPEG\nn09_9.JPEG\n")
    with pytest.raises(UserError, match=r"1 of 2 names are no sample.*first n09_9.JPEG; a line is"):
        choose(Subset(file=str(file)), all_)
    file.write_text("n01_2.JPEG\n")
    with pytest.raises(UserError, match=r"1percent.txt leave class 1 without an image"):
        choose(Subset(file=str(file)), all_)
    file.write_text("")
    with pytest.raises(UserError, match=r"0 of 0 names"):
        choose(Subset(file=str(file)), all_)
    with pytest.raises(UserError, match=r"--subset_file .*nothere.txt cannot be read"):
        choose(Subset(file=str(tmp_path / "nothere.txt")), all_)


def test_mistakes():
    with pytest.raises(UserError, match=r"the fraction is 0.0; it is above 0 and at most 1"):
        Subset(fraction=0.0)
    with pytest.raises(UserError, match=r"the fraction is 10.0"):
        Subset(fraction=10.0)
    with pytest.raises(UserError, match=r"0 images of each class; set --per_class"):
        Subset(per_class=0)
    with pytest.raises(UserError, match=r"fraction and per_class are both given"):
        Subset(fraction=0.1, per_class=3)
    with pytest.raises(UserError, match=r"1 % of each class \(seed 0\) leave class 1 without"):
        choose(Subset(fraction=0.01), known([100, 20]))
    with pytest.raises(UserError, match=r"classes 1, 2, 3, 4, 5 and 2 more without an image"):
        choose(Subset(fraction=0.01), known([100, *[20] * 7]))
    with pytest.raises(UserError, match=r"21 images of each class are wanted, class 1 has 20"):
        choose(Subset(per_class=21), known([100, 20]))


def test_samples_without_a_label_are_never_chosen():
    all_ = Catalogue(["a", "b", "c"], np.array([0, -1, 0]))
    assert choose(Subset(fraction=1.0), all_).tolist() == [True, False, True]


def test_classes_that_training_lacks():
    train, val = np.array([0, 1, 1, -1]), np.array([1, 0, -1])
    assert missing(train, val) == ""
    assert missing(train, np.array([4, 0, 4])) == "class 4"


# ---- the stream -----------------------------------------------------------------------------


def test_every_chosen_sample_once_an_epoch(tmp_path):
    """Ten samples a class in four shards, one of which holds none that is chosen."""
    paths = numbered_shards(tmp_path, [40, 3, 37, 20])
    build_index(paths)
    shards = find_shards(str(tmp_path), streaming=Streaming(), where="data.train")
    chosen = choose(Subset(per_class=3), catalogue(shards.index))
    chosen[40:43] = False
    part = restricted(shards.index, chosen)
    assert part.samples == chosen.sum()
    wanted = np.flatnonzero(chosen).tolist()
    streamed = ShardStream(
        type(shards)(shards.sources, (part,)).stream(seed=1, unit=6, streaming=Streaming()),
        layout=Layout(6),
        decode=number,
        collate=numbers,
    )
    batches = list(itertools.islice(iter(streamed), part.samples))  # six epochs
    seen = [n for batch in batches for n in batch["numbers"]]
    epochs = [seen[i : i + part.samples] for i in range(0, len(seen), part.samples)]
    assert len(epochs) == 6
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1]
