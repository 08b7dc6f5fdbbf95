"""Images with both labels, and samples whose labels cannot be trusted."""

import json
import tarfile
from collections import Counter

import pytest
import torch

from contramask.data.cues import CueShards, NamedShards, cues_of, sources_of
from contramask.data.examples import Images
from contramask.data.faults import BadSample
from contramask.data.index import build_index
from contramask.data.streaming import Streaming
from contramask.errors import UserError
from tests.data.tars import photo, write_tar

NAMES = ["bear", "cat", "dog"]
SIZE = 12
LOOSE = Streaming(max_bad=0.9)


def sample(n: int, shape: object, texture: object) -> list[tuple[str, bytes]]:
    pair = json.dumps({"shape": shape, "texture": texture}).encode()
    return [(f"s{n:02d}.png", photo(n)), (f"s{n:02d}.json", pair)]


def shards(folder, samples, names=NAMES, *, index: bool = True) -> str:
    """Two shards; returns their pattern."""
    half = len(samples) // 2
    paths = [
        str(write_tar(folder / f"cue-{i}.tar", [m for members in part for m in members]))
        for i, part in enumerate((samples[:half], samples[half:]))
    ]
    if names is not None:
        (folder / "classes.json").write_text(json.dumps(names))
    if index:
        build_index(paths)
    return f"{folder}/cue-{{0..1}}.tar"


def read(pattern: str, limit: int | None = None, **options) -> tuple[CueShards, list[dict]]:
    options = {"images": Images(size=SIZE, resize=SIZE), "workers": 0, "batch_size": 3} | options
    data = CueShards(pattern, option="cue.data", **options)
    loader = data.clean_dataloader("train", limit)
    batches = [data.to_device(batch, "cpu") for batch in loader]
    return data, batches


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"shape": 0, "texture": 2}', (0, 2)),
        (b'{"shape": "dog", "texture": "bear", "more": [1]}', (2, 0)),
        (b'{"texture": 1, "shape": "cat"}', (1, 1)),
    ],
)
def test_numbers_and_names_are_read(text: bytes, expected: tuple[int, int]):
    assert cues_of({"json": text}, NAMES) == expected
    assert cues_of({"json": text, "cls": b"%d\n" % expected[0]}, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        (None, "missing key", "no .json"),
        (b'{"shape": 0}', "missing key", "no 'texture' in the json"),
        (b"{", "label", "cannot be read"),
        (b"\xff", "label", "cannot be read"),
        (b"[" * 100_000, "label", "cannot be read"),
        (b"[0, 2]", "label", "is a list, not an object"),
        (b'{"shape": 3, "texture": 0}', "label", "shape is 3; classes.json has 3 classes"),
        (b'{"shape": -1, "texture": 0}', "label", "shape is -1"),
        (b'{"shape": true, "texture": 0}', "label", "shape is True"),
        (b'{"shape": 1.0, "texture": 0}', "label", "shape is 1.0"),
        (b'{"shape": 1, "texture": "Dog"}', "label", "texture is 'Dog'"),
        (b'{"shape": 1, "texture": null}', "label", "texture is None"),
    ],
)
def test_what_is_no_pair_of_classes_is_a_fault(text: bytes | None, reason: str, told: str):
    members = {"jpg": b""} if text is None else {"jpg": b"", "json": text}
    with pytest.raises(BadSample, match=told) as error:
        cues_of(members, NAMES)
    assert error.value.reason == reason


def test_a_label_beside_the_json_is_the_shape():
    with pytest.raises(BadSample, match="cls is b'2', the shape 1"):
        cues_of({"json": b'{"shape": 1, "texture": 2}', "cls": b"2"}, NAMES)


@pytest.mark.parametrize("index", [True, False])
def test_each_image_comes_once_with_both_labels(tmp_path, index: bool):
    pairs = [(n % 3, n // 3 % 3) for n in range(11)]
    pattern = shards(tmp_path, [sample(n, s, t) for n, (s, t) in enumerate(pairs)], index=index)
    data, batches = read(pattern)
    found = {
        key: (s, t)
        for b in batches
        for key, s, t in zip(b["keys"], b["label"].tolist(), b["texture"].tolist(), strict=True)
    }
    assert found == {f"s{n:02d}": pair for n, pair in enumerate(pairs)}
    assert data.names == NAMES
    view = batches[0]["views"]["clean"]
    assert view.shape == (1, 3, 3, SIZE, SIZE)
    assert view.min() < 0 < view.max()  # normalised


def test_faults_are_counted_and_left_out(tmp_path, caplog):
    samples = [sample(n, 0, 1) for n in range(6)]
    samples[1] = sample(1, 0, "wolf")
    samples[4] = samples[4][:1]  # no json
    data = CueShards(
        shards(tmp_path, samples),
        option="cue.data",
        images=Images(size=SIZE, resize=SIZE),
        workers=0,
        streaming=LOOSE,
    )
    loader = data.clean_dataloader("train")
    assert [key for b in loader for key in b["keys"]] == ["s00", "s02", "s03", "s05"]
    assert loader.faults == {"label": 1, "missing key": 1}
    assert "bad sample, label: s01" in caplog.text


def test_too_many_faults_stop_the_reading(tmp_path):
    samples = [sample(n, "wolf", 1) for n in range(6)]
    with pytest.raises(UserError, match=r"samples are bad .*'wolf'; classes.json has 3 classes"):
        read(shards(tmp_path, samples), streaming=Streaming(max_bad=0.0))


@pytest.mark.parametrize(("names", "told"), [(None, "no classes.json"), (["a", "a"], "twice")])
def test_names_are_needed(tmp_path, names, told: str):
    pattern = shards(tmp_path, [sample(0, 0, 1), sample(1, 1, 0)], names)
    with pytest.raises(UserError, match=f"cue.data: .*{told}.*write the list"):
        read(pattern)


def test_missing_shards_are_told_by_the_option(tmp_path):
    data = NamedShards(f"{tmp_path}/none-*.tar", option="cue.train", workers=0)
    with pytest.raises(UserError, match=r"cue\.train"):
        _ = data.names


def test_sources_are_read_from_keys():
    assert sources_of("cat3-dog12") == ("cat3", "dog12")
    assert sources_of("train/airplane10-bicycle2") == ("airplane10", "bicycle2")
    for other in ("cat3", "cat-dog", "0001", "cat3-dog1-bear2", "s00-1"):
        assert sources_of(other) is None


def test_real_conflicts_are_those_of_the_json(shared_data):
    path = shared_data("cue-conflict") / "train-000000.tar"
    with tarfile.open(path) as tar:
        expected = {
            m.name.split(".")[0]: tuple(json.load(tar.extractfile(m)).values())
            for m in tar
            if m.name.endswith(".json")
        }
    _, batches = read(str(path), batch_size=64)
    found = {}
    for b in batches:
        pairs = torch.stack([b["label"], b["texture"]], 1).tolist()
        found |= {key: tuple(pair) for key, pair in zip(b["keys"], pairs, strict=True)}
    assert found == expected
    # The key says the same by names: cat3-dog2.
    data, _ = read(str(path), limit=1)
    for key, (shape, texture) in found.items():
        named = tuple(source.rstrip("0123456789") for source in sources_of(key))
        assert named == (data.names[shape], data.names[texture])
    assert Counter(shape == texture for shape, texture in found.values())[True] < 20
