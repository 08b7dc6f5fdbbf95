"""Objects followed through videos, and instances found again."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contramask.functional.contours import contour_accuracy, region_similarity
from contramask.functional.propagation import labels_on_grid, mask_of_labels, propagate
from contramask.probes.features import frozen, patch_features
from contramask.probes.instances import (
    InstanceMatching,
    boxes_of,
    instance_features,
    rates,
    similarities,
)
from contramask.probes.track import Clip, TrackRecipe, track
from contramask.probes.video_scores import scores_of, statistics
from contramask.types import UserError
from tests.probes.moving import SIZE, SQUARES, frame
from tests.probes.tiny import PATCH, TinyBackbone

GRID = (SIZE[0] // PATCH, SIZE[1] // PATCH)
RECIPE = TrackRecipe(last_frames=2, radius=3, deltas=(1, 2))


def clip(frames: int = 6, seed: int = 0, *, without: tuple[int, ...] = ()) -> Clip:
    """Two squares over noise."""
    pairs = [frame(seed, t) for t in range(frames)]
    images = [torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1 for p, _ in pairs]
    masks = [None if t in without else torch.from_numpy(m) for t, (_, m) in enumerate(pairs)]
    return Clip(images, lambda t: masks[t], tuple(SQUARES), {2: "red", 5: "blue"})


def test_a_linear_embedding_follows_squares_of_one_colour():
    record = track(TinyBackbone(), clip(9), TrackRecipe())
    assert (record["frames"], record["scored"], record["lost"]) == (9, 7, 0)
    assert record["objects"].keys() == {"2", "5"}
    for scores in record["objects"].values():
        assert scores["j_mean"] > 0.8
        assert scores["f_mean"] > 0.8
        assert scores["j_recall"] == 1
    found = rates(record["instances"])
    assert found["instance_delta1_rate"] == found["category_delta3_rate"] == 1
    assert found["instance_delta1_chance_rate"] == 0.5


def test_what_cannot_see_cannot_follow():
    """The measure falls where features say nothing of colour: J of a frozen first mask."""
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.embed.weight.zero_()  # all patches are the same: labels smear over the window
    record = track(backbone, clip(9), TrackRecipe())
    assert record["objects"]["2"]["j_mean"] < 0.6


def test_masks_are_those_of_the_protocol_written_out():
    """Context: the first frame and the last two, with their labels as probabilities."""
    backbone, given = TinyBackbone(), clip()
    written: dict[int, torch.Tensor] = {}
    record = track(backbone, given, RECIPE, batch_size=4, write=written.__setitem__)
    with frozen(backbone):
        features = patch_features(backbone, torch.stack(list(given.frames)))
    features = F.normalize(features, dim=2)
    objects = torch.tensor(given.objects)
    labels = [labels_on_grid(given.mask(0), objects, GRID)]
    j = []
    for t in range(1, 6):
        context = sorted({0, *range(max(0, t - 2), t)})
        labels.append(
            propagate(
                features[t],
                features[context],
                torch.stack([labels[c] for c in context]),
                grid=GRID,
                radius=3,
            )
        )
        mask = mask_of_labels(labels[t], objects, grid=GRID, patch=PATCH, size=SIZE)
        assert torch.equal(written[t], mask)
        j.append(region_similarity((mask == 5)[None], (given.mask(t) == 5)[None]).item())
    assert written.keys() == {1, 2, 3, 4, 5}
    # The last frame is not scored.
    assert record["objects"]["5"]["j_mean"] == pytest.approx(np.mean(j[:4]))


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_the_batch_of_the_forward_changes_nothing(batch_size: int):
    record = track(TinyBackbone(), clip(), RECIPE, batch_size=batch_size)
    assert record == track(TinyBackbone(), clip(), RECIPE, batch_size=2)


def test_frames_without_a_mask_are_tracked_but_not_scored():
    written: dict[int, torch.Tensor] = {}
    record = track(TinyBackbone(), clip(without=(2, 3)), RECIPE, write=written.__setitem__)
    assert (record["frames"], record["scored"], len(written)) == (6, 2, 5)
    assert record["instances"]["1"]["questions"] == 4  # (0, 1) and (4, 5), two squares each
    only_first = track(TinyBackbone(), clip(without=(1, 2, 3, 4, 5)), RECIPE)
    assert (only_first["scored"], only_first["objects"]) == (0, {})


def test_an_object_too_small_for_the_grid_is_counted():
    given = clip(4)
    mask = given.mask(0).clone()
    mask[0, 0] = 9
    tiny = Clip(given.frames, lambda t: mask if t == 0 else given.mask(t), (2, 5, 9), {})
    record = track(TinyBackbone(), tiny, RECIPE)
    assert record["lost"] == 1
    assert record["objects"]["9"]["j_mean"] == 1  # nowhere, and found nowhere, as DAVIS counts it


def test_broken_features_are_told():
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.embed.bias[0] = torch.nan
    with pytest.raises(UserError, match="features of frame 0 are not finite"):
        track(backbone, clip(), RECIPE)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"last_frames": -1}, "last_frames is -1; it is at least 0"),
        ({"topk": 0}, "topk is 0"),
        ({"radius": -2}, "radius is -2"),
        ({"deltas": (3, 0)}, "deltas is 0; it is at least 1"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(setting: dict, told: str):
    with pytest.raises(UserError, match=told):
        TrackRecipe(**setting)


def test_no_frame_before_but_the_first():
    record = track(TinyBackbone(), clip(), TrackRecipe(last_frames=0, deltas=()))
    assert record["objects"]["2"]["j_mean"] > 0.8
    assert record["instances"] == {}


def official_statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, recall and decay in four bins, in NumPy."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return {
        "mean": values.mean(),
        "recall": (values > 0.5).mean(),
        "decay": first.mean() - last.mean(),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 23, 66])
def test_statistics_are_the_official_ones(count: int):
    values = np.random.default_rng(count).random(count)
    assert statistics(torch.from_numpy(values)) == pytest.approx(official_statistics(values))


def test_statistics_by_hand():
    found = statistics(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2]).double())
    assert found == pytest.approx({"mean": 0.56, "recall": 0.4, "decay": 0.9 - 0.25})


def test_the_last_frame_is_left_out():
    rows = [torch.tensor([0.5, 1.0]), torch.tensor([0.7, 0.2]), torch.tensor([0.0, 0.0])]
    found = scores_of({"j": rows, "f": rows}, (3, 8))
    assert found["scored"] == 2
    assert found["objects"]["3"]["j_mean"] == pytest.approx(0.6)
    assert found["objects"]["8"]["f_recall"] == 0.5


# ---- instances ----------------------------------------------------------------------------------


def test_boxes_by_hand():
    mask = torch.zeros(6, 8, dtype=torch.uint8)
    mask[1:3, 2:7] = 9
    mask[4, 5] = 3
    indices, boxes = boxes_of(mask)
    assert indices.tolist() == [3, 9]
    assert boxes.tolist() == [[5, 4, 6, 5], [2, 1, 7, 3]]
    assert boxes_of(torch.zeros_like(mask))[1].shape == (0, 4)


def test_a_box_reads_what_lies_in_it():
    """On a linear map a cell of RoIAlign reads the coordinate of its centre."""
    rows, columns = 12, 16
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    box = torch.tensor([[20.0, 12.0, 76.0, 47.0]])  # of a mask 5 times as large
    found = instance_features(torch.stack([x, y]), box, (60, 80)).view(2, 7, 7)
    torch.testing.assert_close(found[0], (4 + (torch.arange(7) + 0.5) * 1.6).expand(7, 7))
    torch.testing.assert_close(found[1], (2.4 + (torch.arange(7) + 0.5)[:, None]).expand(7, 7))


def painted(places: dict[int, tuple[int, int]], vectors: dict[int, list[float]]):
    """(features (F, 4, 6), mask (4, 6)): each object fills a 2 x 2 square with its vector."""
    mask, features = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(2, 4, 6)
    for index, (top, left) in places.items():
        mask[top : top + 2, left : left + 2] = index
        features[:, top : top + 2, left : left + 2] = torch.tensor(vectors[index])[:, None, None]
    return features, mask


HERE = {1: (0, 0), 2: (0, 4), 3: (2, 2)}


def test_matches_by_hand():
    """Objects 1 and 2 look alike and 2 is brighter, so by the dot product 1 is taken for 2."""
    vectors = {1: [1.0, 0.0], 2: [2.0, 0.1], 3: [0.0, 1.0]}
    kinds = {1: "car", 2: "car", 3: "man"}
    for similarity, right in (("dot", 2), ("cosine", 3)):
        matching = InstanceMatching((1, 4), similarity)
        for t in range(2):
            matching.add(t, *painted(HERE, vectors), kinds)
        found = matching.counts()
        assert found["1"]["questions"] == 3
        assert found["1"]["right"] == right
        assert found["1"]["chance"] == pytest.approx(1)
        assert (found["1"]["category_questions"], found["1"]["category_right"]) == (3, 3)
        assert found["1"]["category_chance"] == pytest.approx(2 / 3 + 2 / 3 + 1 / 3)
        assert found["4"]["questions"] == 0
        assert "instance_delta4_rate" not in rates(found)
        assert rates(found)["instance_delta1_rate"] == pytest.approx(right / 3)


def test_what_is_no_question_is_counted():
    vectors = {1: [1.0, 0.0], 2: [0.0, 1.0], 3: [1.0, 1.0]}
    matching = InstanceMatching((1, 2))
    two = {1: (0, 0), 2: (0, 4)}
    for t, places in enumerate((two, {1: (2, 2)}, HERE, {})):
        matching.add(t, *painted(places, vectors), {1: "car", 2: "car"})
    found = matching.counts()
    # 0 -> 1: 2 is gone, 1 is alone. 1 -> 2: one question. 2 -> 3: all three are gone.
    one = found["1"]
    assert (one["questions"], one["gone"], one["single"]) == (1, 1 + 3, 1)
    assert one["chance"] == pytest.approx(1 / 3)
    # 0 -> 2: both are asked for. 1 -> 3: the one is gone.
    assert (found["2"]["questions"], found["2"]["gone"], found["2"]["single"]) == (2, 1, 0)
    assert found["1"]["category_questions"] == 0  # 3 has no category: a match with it tells nothing


def test_matches_are_those_of_loops():
    """Random features over five frames, one of which has no mask."""
    generator = torch.Generator().manual_seed(0)
    matching, frames = InstanceMatching((1, 3)), {}
    kinds = {1: "a", 2: "b", 3: "a"}
    _, mask = painted(HERE, {i: [0.0, 0.0] for i in HERE})
    for t in (0, 1, 3, 4):
        frames[t] = torch.randn(5, 4, 6, generator=generator)
        matching.add(t, frames[t], mask, kinds)
    for delta in (1, 3):
        right = same = questions = 0
        for t in frames:
            if t + delta not in frames:
                continue
            _, boxes = boxes_of(mask)
            then, now = (instance_features(frames[s], boxes, mask.shape) for s in (t, t + delta))
            for i in range(3):
                best = max(range(3), key=lambda o, i=i, a=then, b=now: float(a[i] @ b[o]))
                questions += 1
                right += best == i
                same += kinds[best + 1] == kinds[i + 1]
        found = matching.counts()[str(delta)]
        assert (found["questions"], found["right"]) == (questions, right)
        assert found["category_right"] == same


def test_features_are_kept_no_longer_than_the_longest_gap():
    matching = InstanceMatching((1, 3))
    for t in range(9):
        matching.add(t, *painted(HERE, {i: [1.0, 0.0] for i in HERE}), {})
        assert len(matching.seen) <= 3
    assert matching.counts()["3"]["questions"] == 6 * 3


def test_cosines_are_free_of_lengths():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(similarities(5 * x, x, "cosine"), similarities(x, x, "cosine"))
    torch.testing.assert_close(similarities(5 * x, x, "dot"), 5 * x @ x.T)


def test_f_of_a_record_is_f_of_its_masks():
    written: dict[int, torch.Tensor] = {}
    given = clip()
    record = track(TinyBackbone(), given, RECIPE, write=written.__setitem__)
    f = [
        contour_accuracy((written[t] == 2)[None], (given.mask(t) == 2)[None]).item()
        for t in range(1, 5)
    ]
    assert record["objects"]["2"]["f_mean"] == pytest.approx(np.mean(f))
