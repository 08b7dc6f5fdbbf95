"""The procedural set: factors exactly independent, images functions of their place, in shards."""

import json
import math
import tarfile
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from contramask.data.index import verify
from contramask.data.procedural import (
    BLOCK,
    classes,
    factors,
    render,
    write_shards,
)
from contramask.data.procedural_scene import (
    BACKGROUNDS,
    SHAPES,
    TEXTURES,
    Factors,
    draw,
    paint,
)
from contramask.data.procedural_shapes import FIGURES
from contramask.data.procedural_textures import FILLINGS, GROUNDS, oklch
from contramask.types import UserError

SEEDS = [0, 17]


def table(rows, columns) -> np.ndarray:
    """How often each pair occurs."""
    counts = Counter(zip(rows, columns, strict=True))
    return np.array([[counts[a, b] for b in sorted(set(columns))] for a in sorted(set(rows))])


def mutual_information(counts: np.ndarray) -> float:
    """In nats, of a table of joint counts."""
    p = counts / counts.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum())


class TestFactors:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("block", [0, 5])
    def test_any_block_holds_each_pair_of_shape_and_texture_once(self, seed, block):
        shown = [factors(seed, "train", block * BLOCK + i) for i in range(BLOCK)]
        assert sorted(f.label for f in shown) == list(range(BLOCK))

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("block", [0, 5])
    def test_in_any_block_the_background_tells_neither_shape_nor_texture(self, seed, block):
        shown = [factors(seed, "train", block * BLOCK + i) for i in range(BLOCK)]
        ground = [f.background for f in shown]
        for other in ([f.shape for f in shown], [f.texture for f in shown]):
            counts = table(other, ground)
            assert counts.shape == (8, 4)
            assert (counts == 2).all()  # chi-square and mutual information are exactly 0
            assert mutual_information(counts) == pytest.approx(0, abs=1e-12)

    def test_four_blocks_from_a_multiple_of_four_hold_every_triple_once(self):
        run = 4 * BLOCK
        shown = [factors(3, "val", i) for i in range(run, 2 * run)]
        assert len(set(shown)) == run

    def test_the_pair_tells_nothing_of_the_background_over_a_run(self):
        shown = [factors(3, "val", i) for i in range(4 * BLOCK)]
        assert mutual_information(
            table([f.label for f in shown], [f.background for f in shown])
        ) == pytest.approx(0, abs=1e-12)

    def test_the_order_differs_between_blocks_splits_and_seeds(self):
        def order(seed, split, block):
            return [factors(seed, split, block * BLOCK + i) for i in range(BLOCK)]

        places = [(0, "train", 0), (0, "train", 1), (0, "val", 0), (1, "val", 0)]
        labels = {tuple(f.label for f in order(*place)) for place in places}
        assert len(labels) == 4

    def test_the_label_gives_both_factors_back(self):
        for shape in range(len(SHAPES)):
            for texture in range(len(TEXTURES)):
                label = Factors(shape, texture, 0).label
                assert (label // len(TEXTURES), label % len(TEXTURES)) == (shape, texture)
                assert classes()[label] == f"{SHAPES[shape]} with {TEXTURES[texture]}"


class TestRender:
    def test_an_image_is_a_function_of_its_place_alone(self):
        first = render(seed=5, split="train", index=3, size=24)
        for other in (0, 9):
            render(seed=5, split="val", index=other, size=40)
        np.testing.assert_array_equal(render(seed=5, split="train", index=3, size=24), first)
        assert first.shape == (24, 24, 3)
        assert first.dtype == np.uint8

    @pytest.mark.parametrize("place", [(6, "train", 3), (5, "val", 3), (5, "train", 4)])
    def test_seed_split_and_index_each_change_the_image(self, place):
        seed, split, index = place
        one = render(seed=5, split="train", index=3, size=24)
        other = render(seed=seed, split=split, index=index, size=24)
        assert (one != other).mean() > 0.5

    def test_every_place_has_nuisances_of_its_own(self, monkeypatch):
        drawn = []

        def spy(rng):
            drawn.append(rng.random())
            return draw(rng)

        monkeypatch.setattr("contramask.data.procedural.draw", spy)
        places = [(5, "train", 3), (5, "train", 3), (6, "train", 3), (5, "val", 3), (5, "train", 4)]
        for seed, split, index in places:
            render(seed=seed, split=split, index=index, size=24)
        assert drawn[0] == drawn[1]
        assert len(set(drawn)) == 4

    def test_the_outline_is_one_pixel_wide_and_encloses_the_area(self):
        """What changes when the figure turns from black to white is its coverage."""
        size, radius = 64, 0.4
        plain = replace(
            draw(np.random.default_rng(2)),
            x=0.5,
            y=0.5,
            radius=radius,
            light=(0.0, 0.0),
            spot=(9.0, 9.0, 0.1),
        )

        def picture(tone):
            colours = plain.colours.copy()
            colours[:2] = tone
            scene = replace(plain, colours=colours)
            return paint(Factors(0, 0, 0), scene, size, np.random.default_rng(3)) / 255

        cover = (picture(0.9) - picture(0.1)).mean(-1) / 0.8
        side = 0.77 * radius * size  # the radius of the disc in pixels
        assert cover.sum() == pytest.approx(math.pi * side**2, rel=0.01)
        partial = ((cover > 0.05) & (cover < 0.95)).sum()
        assert partial < 1.6 * 2 * math.pi * side

    def test_a_larger_image_is_the_same_scene(self):
        small, large = (render(seed=5, split="train", index=8, size=s) for s in (32, 64))
        mean = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(mean - small).mean() < 8  # of 255: noise and anti-aliasing

    def test_shape_and_texture_each_change_the_figure_and_leave_the_corners(self):
        def picture(shape, texture):
            rng = np.random.default_rng(4)
            return paint(Factors(shape, texture, 1), draw(rng), 32, rng).astype(int)

        here = picture(0, 1)
        for there in (picture(3, 1), picture(0, 4)):
            change = np.abs(there - here).max(-1)
            assert change.max() > 60
            corners = [change[0, 0], change[0, -1], change[-1, 0], change[-1, -1]]
            assert max(corners) <= 1

    def test_figures_stand_out_of_the_ground(self):
        """In any image some pixels of the middle lie far from the mean of the border."""
        for index in range(64):
            picture = render(seed=2, split="val", index=index, size=32).astype(float)
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            middle = np.abs(picture[10:22, 10:22] - border.mean(0)).max(-1)
            assert np.percentile(middle, 90) > 30


class TestFigures:
    AXIS = np.linspace(-1.5, 1.5, 301)

    @pytest.mark.parametrize("name", SHAPES)
    def test_areas_lie_close_together(self, name):
        x, y = np.meshgrid(self.AXIS, self.AXIS)
        area = (FIGURES[name](x, y) < 0).mean() * 3.01**2
        assert 1.7 < area < 2.0

    @pytest.mark.parametrize("name", SHAPES)
    def test_the_distance_grows_by_one_a_unit_across_the_outline(self, name):
        """Anti-aliasing reads the distance as a length: its slope near the outline must be 1."""
        x, y = np.meshgrid(self.AXIS, self.AXIS)
        distance = FIGURES[name](x, y)
        step = self.AXIS[1] - self.AXIS[0]
        slope = np.hypot(*np.gradient(distance, step))
        near = np.abs(distance) < 0.05
        assert np.median(slope[near]) == pytest.approx(1, abs=0.02)
        assert np.mean(np.abs(slope[near] - 1) < 0.05) > 0.75  # all but corners

    def test_areas_of_some_in_closed_form(self):
        x, y = np.meshgrid(np.linspace(-1.5, 1.5, 1200), np.linspace(-1.5, 1.5, 1200))
        forms = {
            "disc": math.pi * 0.77**2,
            "square": 1.36**2,
            "triangle": 3 * math.sqrt(3) * 0.59**2,
            "star": 5 * 1.1 * 0.55 * math.sin(math.pi / 5),
            "ring": math.pi * (0.92**2 - 0.48**2),
        }
        for name, area in forms.items():
            assert (FIGURES[name](x, y) < 0).mean() * 9 == pytest.approx(area, rel=0.01)


class TestPatterns:
    @pytest.mark.parametrize("name", TEXTURES)
    def test_fillings_are_shares_and_all_but_the_plain_one_have_contrast(self, name):
        rng = np.random.default_rng(1)
        u, v = np.meshgrid(np.linspace(-3, 3, 200), np.linspace(-3, 3, 180))
        share = FILLINGS[name](u, v, rng.random((16, 16)))
        assert share.shape == u.shape
        assert share.min() >= 0
        assert share.max() <= 1
        assert 0.2 < share.mean() < 0.8
        local = share[:30, :33].std()  # one period
        assert (local < 0.1) if name == "plain" else (local > 0.2)

    @pytest.mark.parametrize("name", BACKGROUNDS)
    def test_grounds_are_smooth_wherever_they_are_turned(self, name):
        rng = np.random.default_rng(1)
        x, y = np.meshgrid(np.linspace(-0.3, 1.3, 160), np.linspace(-0.3, 1.3, 170))
        share = GROUNDS[name](x, y, rng.random((16, 16)))
        assert np.abs(np.diff(share, axis=1)).max() < 0.15

    def test_oklch_gives_the_published_colours(self):
        """White, black, and sRGB red = oklch(0.62796 0.25768 29.234deg) (CSS Color 4)."""
        lightness, chroma, hue = [1.0, 0.0, 0.62796], [0.0, 0.0, 0.25768], [0.0, 0.3, 29.234 / 360]
        colours = oklch(np.array(lightness), np.array(chroma), np.array(hue))
        np.testing.assert_allclose(colours, [[1, 1, 1], [0, 0, 0], [1, 0, 0]], atol=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("procedural")


@pytest.fixture(scope="module")
def patterns(folder):
    return write_shards(folder, images=2 * BLOCK, val_images=BLOCK, seed=9, size=24, shards=3)


class TestShards:
    def test_samples_hold_the_picture_and_its_factors(self, folder, patterns):
        assert patterns["train"] == str(folder / "train-{000000..000002}.tar")
        seen = []
        for number in range(3):
            with tarfile.open(folder / f"train-{number:06d}.tar") as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}
            for key in sorted({name.split(".")[0] for name in members}):
                told = json.loads(members[f"{key}.json"])
                assert int(members[f"{key}.cls"]) == told["shape"] * 8 + told["texture"]
                seen.append((key, Factors(**told), members[f"{key}.jpg"]))
        assert [key for key, _, _ in seen] == [f"train{i:06d}" for i in range(2 * BLOCK)]
        assert [shown for _, shown, _ in seen] == [factors(9, "train", i) for i in range(2 * BLOCK)]
        stored = cv2.imdecode(np.frombuffer(seen[70][2], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        exact = render(seed=9, split="train", index=70, size=24)
        assert np.abs(stored.astype(int) - exact).mean() < 4

    def test_the_index_agrees_with_the_shards(self, patterns):
        assert verify(list(patterns.values())) == []

    def test_the_bytes_are_a_function_of_the_arguments(self, folder, patterns, tmp_path):
        write_shards(tmp_path, images=2 * BLOCK, val_images=BLOCK, seed=9, size=24, shards=3)
        names = sorted(path.name for path in folder.iterdir())
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        for name in names:
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name

    def test_nothing_partial_stays_when_writing_fails(self, tmp_path, monkeypatch):
        calls = iter(range(10))

        def full(**_):
            if next(calls) == 5:
                raise OSError(28, "No space left on device")
            return np.zeros((24, 24, 3), np.uint8)

        monkeypatch.setattr("contramask.data.procedural.render", full)
        with pytest.raises(OSError, match="No space"):
            write_shards(tmp_path, images=BLOCK, val_images=BLOCK, size=24)
        assert list(tmp_path.iterdir()) == []

    def test_fewer_shards_leave_none_of_an_earlier_set_behind(self, tmp_path):
        for shards in (3, 2):
            patterns = write_shards(
                tmp_path, images=BLOCK, val_images=BLOCK, size=24, shards=shards
            )
        assert len(list(tmp_path.glob("train-*.tar"))) == 2
        assert verify(list(patterns.values())) == []

    @pytest.mark.parametrize("arguments", [{"images": 100}, {"images": 0}, {"val_images": 63}])
    def test_counts_that_would_unbalance_the_factors_are_refused(self, tmp_path, arguments):
        name, count = next(iter(arguments.items()))
        with pytest.raises(UserError, match=rf"{name} is {count}.*multiple of 64"):
            write_shards(tmp_path, **arguments)

    def test_images_too_small_for_textures_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="size is 16; below 24"):
            write_shards(tmp_path, size=16)


def nearest_neighbour_accuracy(train, val, labels, truth, k=10) -> float:
    """A plain vote of the k nearest by cosine after centring."""
    mean = train.mean(0)
    a, b = ((x - mean) / np.linalg.norm(x - mean, axis=1)[:, None] for x in (train, val))
    votes = labels[np.argsort(-b @ a.T, axis=1)[:, :k]]
    return float(np.mean([np.bincount(v, minlength=8).argmax() for v in votes] == truth))


def test_raw_pixels_tell_little_of_shape_and_texture():
    def split(name, count):
        pictures = [render(seed=0, split=name, index=i, size=24).ravel() for i in range(count)]
        return np.stack(pictures) / 255, np.array([factors(0, name, i) for i in range(count)])

    (x, y), (v, truth) = split("train", 512), split("val", 128)
    for factor in (0, 1):
        accuracy = nearest_neighbour_accuracy(x, v, y[:, factor], truth[:, factor])
        assert accuracy < 0.5
