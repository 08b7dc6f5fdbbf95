"""Probes of single patches against loops in NumPy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from contramask.functional.segmentation import VOID
from contramask.probes.features import frozen, patch_feature_set, patch_features
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.patch_linear import PatchLinear
from contramask.probes.patches import Cell, PatchRecipe, PatchRows, SourceProbe
from contramask.types import UserError
from tests.builders import randn, tiny_vit

CLASSES, F, IMAGES = 4, 7, 6
RECIPE = PatchRecipe(
    metrics=("dot", "cosine", "l2"),
    cleanings=("raw", "zscore", "top2"),
    ks=(1, 5),
    linear=("raw", "top2"),
    recipe=LinearRecipe(rates=(0.1, 1.0), epochs=5, batch=16),
)


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that know their class but for two loud channels; labels; numbers of images."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    x = randn(count, F, seed=seed) + 3 * randn(CLASSES, F, seed=99)[y]
    x[:, :2] = 200 * randn(count, 2, seed=seed + 1)
    return x, y, torch.arange(count) * IMAGES // count


def cleaned(word: str, train: np.ndarray, x: np.ndarray) -> np.ndarray:
    if word == "zscore":
        return (x - train.mean(0)) / train.std(0)
    keep = np.sort(np.argsort(-train.var(0))[2:]) if word == "top2" else slice(None)
    return x[:, keep]


def one_nearest(metric: str, train: np.ndarray, y: np.ndarray, x: np.ndarray) -> list[int]:
    found = []
    for query in x:
        if metric == "l2":
            near = -((train - query) ** 2).sum(1)
        else:
            near = train @ query
            if metric == "cosine":
                near = near / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        found.append(int(y[near.argmax()]))
    return found


def test_every_cell_of_the_table_against_numpy_and_scikit_learn():
    (x, y, image), (v, w, _) = rows(90), rows(41, seed=5)
    probe = SourceProbe(x, y, image, classes=CLASSES, recipe=RECIPE)
    found = probe.predict(v)
    assert set(found) == set(RECIPE.cells())
    assert len(RECIPE.cells()) == 3 * 3 * 2 + 2
    train, labels, queries = (t.double().numpy() for t in (x, y, v))
    for word in RECIPE.cleanings:
        bank, q = cleaned(word, train, train), cleaned(word, train, queries)
        for metric in RECIPE.metrics:
            expected = one_nearest(metric, bank, labels, q)
            assert found[Cell("knn", word, metric, 1)].tolist() == expected, (word, metric)
        sklearn = KNeighborsClassifier(5).fit(bank, labels)
        near = sklearn.kneighbors(q, return_distance=False)
        for patch, neighbours in zip(found[Cell("knn", word, "l2", 5)].tolist(), near, strict=True):
            votes = np.bincount(labels[neighbours].astype(int), minlength=CLASSES)
            tied = np.flatnonzero(votes == votes.max())
            first = next(int(labels[n]) for n in neighbours if labels[n] in tied)
            assert patch == first
    accuracy = {cell: (p == w).float().mean().item() for cell, p in found.items()}
    # What the paper finds of an MAE: loud channels spoil the inner product, until they are removed.
    assert accuracy[Cell("knn", "top2", "dot", 1)] > 0.7
    assert accuracy[Cell("knn", "raw", "dot", 1)] < 0.5


def test_votes_are_weighted_for_cosine_only():
    recipe = PatchRecipe(weights="exp", linear=())
    assert [recipe.voting(m) for m in ("dot", "cosine", "l2")] == ["uniform", "exp", "uniform"]


def test_a_recipe_with_nothing_to_do_is_refused():
    for changes, told in (
        ({"ks": (), "linear": ()}, "nothing is to be probed"),
        ({"ks": (0, 3)}, r"ks is \[0, 3\]"),
        ({"cleanings": ("bleach",)}, "cleaning is 'bleach'"),
        ({"linear": ("zscor",)}, "cleaning is 'zscor'"),
        ({"temperature": 0.0}, "temperature is 0"),
    ):
        with pytest.raises(UserError, match=told):
            PatchRecipe(**changes)
    assert PatchRecipe(metrics=(), linear=("raw",)).cells() == [Cell("linear", "raw")]


def test_more_neighbours_than_patches_are_refused_before_anything_is_trained():
    x, y, image = rows(9)
    with pytest.raises(UserError, match="k is 10; the bank has 9"):
        SourceProbe(x, y, image, classes=CLASSES, recipe=PatchRecipe(ks=(1, 10)))


def test_the_rate_is_chosen_on_whole_images():
    x, y, image = rows(90)
    probe = PatchLinear(F, CLASSES, recipe=RECIPE.recipe)
    held = probe.held_out(image)
    assert len(image[held].unique()) == 1
    assert not set(image[held].tolist()) & set(image[~held].tolist())
    probe.fit(x, y, image)
    # By hand: train on the other images, choose, then train on all.
    (trained, chosen) = (LinearProbe(F, CLASSES, recipe=RECIPE.recipe) for _ in range(2))
    trained._train(x, y, (~held).nonzero()[:, 0])
    right = (trained.heads(x[held]).argmax(-1) == y[held]).float().mean(1)
    assert list(probe.sweep.values()) == pytest.approx(right.tolist())
    chosen._start(probe.rates, F, CLASSES)
    chosen._train(x, y, torch.arange(90))
    assert torch.equal(probe.weight, chosen.weight)
    assert probe.recipe == RECIPE.recipe
    assert "patches of 10% of the train images" in probe.protocol


def test_one_image_gives_no_rate_to_choose():
    x, y, _ = rows(30)
    with pytest.raises(UserError, match="there is 1 train image"):
        PatchLinear(F, CLASSES, recipe=RECIPE.recipe).fit(x, y, torch.zeros(30, dtype=torch.long))
    one = LinearRecipe(rates=(0.1,), epochs=2)
    PatchLinear(F, CLASSES, recipe=one).fit(x, y, torch.zeros(30, dtype=torch.long))


def test_rows_come_in_the_order_of_images_whoever_read_them():
    patches, widths = 3, (F, 2)
    labels = torch.tensor([[0, VOID, 1], [VOID, VOID, VOID], [2, 3, 0], [1, VOID, VOID]])
    image = torch.tensor([4, 2, 2, 7])
    held = PatchRows(widths, torch.device("cpu"))
    features = [randn(4, patches, width, seed=width) for width in widths]
    held.add([f[:1] for f in features], labels[:1], image[:1], images=1)
    held.add([f[1:] for f in features], labels[1:], image[1:], images=2)
    y, numbers, order = held.gathered()
    assert numbers.tolist() == [2, 2, 2, 4, 4, 7]
    assert y.tolist() == [2, 3, 0, 0, 1, 1]
    assert order.tolist() == [2, 3, 4, 0, 1, 5]
    assert held.count == 3
    x = held.features(1, order)
    known = [(2, 0), (2, 1), (2, 2), (0, 0), (0, 2), (3, 0)]  # tile and patch of each row
    assert torch.equal(x, torch.stack([features[1][tile, patch] for tile, patch in known]))
    assert held.parts[1] == []


def test_several_sources_are_read_from_one_forward():
    backbone, images = tiny_vit(), randn(3, 3, 16, 20)
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    with frozen(backbone):
        found = patch_feature_set(backbone, images, ["last", "block_00", "last2"], norm="none")
        assert len(calls) == 1
        for source, x in zip(("last", "block_00", "last2"), found, strict=True):
            assert torch.equal(x, patch_features(backbone, images, source=source, norm="none"))
    assert [x.shape for x in found] == [(3, 20, 24), (3, 20, 24), (3, 20, 48)]
