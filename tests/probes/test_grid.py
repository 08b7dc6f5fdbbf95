"""A grid of linear probes: each cell is the probe alone, and nothing is chosen on val."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import multiclass_accuracy

from contramask.data.subset import Catalogue, Subset, choose
from contramask.probes import grid_rows
from contramask.probes.features import Feature
from contramask.probes.grid import LinearGrid
from contramask.probes.grid_cells import Axes, missing_classes
from contramask.probes.grid_heads import Heads, drawn
from contramask.probes.grid_rows import Share
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.store import Bank, StoredFeatures, StoredRows
from contramask.types import UserError

N, C = 90, 7
A, B = Feature(), Feature("last4", "mean", "none")
WIDTH = {A: 5, B: 8}
RECIPE = LinearRecipe(rates=(0.1, 3.0), epochs=4, batch=16)


def bank(number: int = N, *, seed: int = 0, noise: float = 1.5, classes: int = C) -> Bank:
    """Overlapping classes, so that the best weights are finite."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (number,), generator=generator)
    x = {}
    for feature, width in WIDTH.items():
        centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(width))
        x[feature] = centres[y] + noise * torch.randn(number, width, generator=generator)
    return Bank(x, y, [f"image{i}" for i in range(number)])


def fitted(train: Bank, axes: Axes, classes: int = C) -> LinearGrid:
    grid = LinearGrid(axes, classes)
    grid.fit(train)
    return grid


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "sgd"},
        {"optimiser": "sgd", "rates": (0.5,), "batch": 500, "per_epoch": True},
        {"optimiser": "sgd", "weight_decay": 0.01},
        {"optimiser": "lars", "rates": (3.0, 30.0), "warmup": 0.2},
        {"optimiser": "adamw", "rates": (0.01, 0.1), "weight_decay": 0.1},
    ],
)
def test_a_grid_of_one_cell_is_the_probe(norm, changes: dict):
    train, recipe = bank(), replace(RECIPE, **changes)
    grid = fitted(train, Axes((A,), (norm,), recipe=recipe))
    probe = LinearProbe(WIDTH[A], C, recipe=replace(recipe, batch_norm=norm == "batch"))
    x = train.x[A]
    x = torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-6) if norm == "layer" else x
    probe.fit(x, train.y)
    (cell,), (heads,) = grid.cells, grid.heads
    assert cell.rate == probe.rates[0]
    assert cell.sweep == pytest.approx(probe.sweep)
    torch.testing.assert_close(heads.weight, probe.weight[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heads.bias, probe.bias[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heads.logits(x)[:, 0], probe.predict(x), rtol=1e-4, atol=1e-5)
    if norm != "layer":
        assert cell.protocol(recipe) == probe.protocol


def test_cells_of_a_grid_do_not_touch_each_other():
    train, shares = bank(), (Share(), Share(0.5), Share(per_class=4))
    grid = fitted(train, Axes((A, B), ("none", "batch", "layer"), shares, RECIPE))
    assert len(grid.cells) == 2 * 3 * 3
    for cell, heads in zip(grid.cells, grid.heads, strict=True):
        rows = cell.share.of(train.y, train.keys, RECIPE.seed)
        part = Bank({f: x[rows] for f, x in train.x.items()}, train.y[rows], [""] * len(rows))
        alone = fitted(part, Axes((cell.feature,), (cell.norm,), recipe=RECIPE))
        assert cell.rows == len(rows)
        assert alone.cells[0].rate == cell.rate
        assert alone.cells[0].sweep == pytest.approx(cell.sweep)
        torch.testing.assert_close(heads.weight, alone.heads[0].weight, rtol=1e-5, atol=1e-6)


def test_accuracies_are_those_of_torchmetrics():
    train, val = bank(), bank(41, seed=1)
    grid = fitted(train, Axes((A, B), ("batch",), recipe=RECIPE))
    grid.score(val)
    for cell, heads in zip(grid.cells, grid.heads, strict=True):
        scores = heads.logits(val.x[cell.feature])[:, 0]
        for k, found in ((1, cell.top1), (5, cell.top5)):
            theirs = multiclass_accuracy(scores, val.y, C, average="micro", top_k=k)
            assert found == pytest.approx(theirs.item())
        assert cell.images == 41
        assert 1 / C < cell.top1 < cell.top5


def test_few_classes_have_no_top5():
    train, val = bank(classes=3), bank(20, seed=1, classes=3)
    grid = fitted(train, Axes((A,), recipe=RECIPE), classes=3)
    grid.score(val)
    assert grid.cells[0].top5 is None


def test_at_convergence_it_is_logistic_regression():
    """Accuracy, probabilities and loss, each feature of the grid for itself."""
    n, classes = 400, 4
    train, val = bank(n, noise=3.0, classes=classes), bank(60, seed=1, classes=classes)
    recipe = LinearRecipe(rates=(0.3, 0.5), epochs=400, batch=n)
    grid = fitted(train, Axes((A, B), ("none",), recipe=recipe), classes=classes)
    for cell, heads in zip(grid.cells, grid.heads, strict=True):
        x, v = train.x[cell.feature], val.x[cell.feature]
        theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=10000)
        theirs.fit(x.numpy(), train.y.numpy())
        expected = torch.from_numpy(theirs.predict_proba(v.numpy())).float()
        found = heads.logits(v)[:, 0].softmax(1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        loss = torch.nn.functional.cross_entropy(heads.logits(x)[:, 0], train.y)
        best = -torch.from_numpy(theirs.predict_log_proba(x.numpy()))[range(n), train.y].mean()
        assert best - 1e-5 < loss < best + 1e-4


def test_the_best_cell_is_that_of_the_held_out_rows():
    """B is of the labels; A is noise, however well it fits what it is trained on."""
    train = bank(300, noise=0.5)
    train = replace(train, x={A: torch.randn_like(train.x[A]), B: train.x[B]})
    grid = fitted(train, Axes((A, B), ("none", "batch"), recipe=RECIPE))
    best = grid.best(Share())
    assert best.feature == B
    assert best.held_out == max(cell.held_out for cell in grid.cells) > 0.9


def test_held_out_rows_do_not_train_what_is_chosen():
    """Random labels cannot be predicted: a sweep that saw its held-out rows would do better."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 200, generator=generator), torch.arange(60) % 3
    recipe = LinearRecipe(rates=(1.0, 3.0), epochs=100, batch=64, holdout=0.5)
    grid = fitted(Bank({A: x}, y, [""] * 60), Axes((A,), recipe=recipe), classes=3)
    assert grid.heads[0].logits(x).argmax(2)[:, 0].eq(y).float().mean() > 0.95
    assert max(grid.cells[0].sweep.values()) < 0.6


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=5),
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 3),
)
def test_shares_are_stratified_and_nested(counts, fractions, seed):
    y = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)]).long()
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(5))]
    keys = [f"image{i}" for i in range(len(y))]
    small, large = (set(Share(f).of(y, keys, seed).tolist()) for f in sorted(fractions))
    assert small <= large
    for label, count in enumerate(counts):
        taken = sum(int(y[i]) == label for i in large)
        exact = count * max(fractions)
        assert abs(taken - exact) <= 0.5 + 1e-9 or (taken == 1 and count)
    fewest = min(filter(None, counts), default=0)
    if fewest:
        few = Share(per_class=fewest).of(y, keys, seed)
        assert y[few].bincount(minlength=len(counts)).tolist() == [fewest * (n > 0) for n in counts]


def test_another_seed_takes_other_rows():
    y, keys = bank().y, bank().keys
    assert not torch.equal(Share(0.3).of(y, keys, 0), Share(0.3).of(y, keys, 1))
    assert torch.equal(Share(0.3).of(y, keys, 0), Share(0.3).of(y, keys, 0))


@pytest.mark.parametrize("part", [{"fraction": 0.3}, {"fraction": 0.05}, {"per_class": 4}])
def test_the_images_of_a_share_are_those_of_fine_tuning(part: dict):
    """Wherever they lie in the shards."""
    train = bank(400)
    chosen = choose(Subset(**part, seed=2), Catalogue(train.keys, train.y.numpy()))
    rows = Share(**part).of(train.y, train.keys, 2)
    assert rows.tolist() == chosen.nonzero()[0].tolist()
    back = Share(**part).of(train.y.flip(0), train.keys[::-1], 2)
    assert {train.keys[::-1][i] for i in back.tolist()} == {train.keys[i] for i in rows.tolist()}


def test_a_class_of_too_few_images_is_named():
    train = Bank(
        {A: torch.randn(9, 5)}, torch.tensor([0] * 6 + [2] * 3), [f"{i}" for i in range(9)]
    )
    with pytest.raises(UserError, match="4 labels per class are wanted, class 2 has 3 images of"):
        fitted(train, Axes((A,), shares=(Share(per_class=4),), recipe=RECIPE))


def test_classes_that_selection_cannot_train_are_told():
    train = bank()
    grid = fitted(train, Axes((A,), shares=(Share(per_class=1),), recipe=RECIPE))
    assert grid.cells[0].rows == C
    assert any("1 classes (" in n and "1 per class of the labels" in n for n in grid.notes)


def test_classes_missing_in_a_split_are_told():
    train, val = bank(), bank(30, seed=1)
    train.y[train.y == 2] = 3
    val.y[val.y == 5] = 4
    assert missing_classes(train, val) == [
        "1 classes of val have no image in train: 2",
        "1 classes of train have no image in val: 5",
    ]
    assert missing_classes(train, train) == []


def test_an_input_that_diverges_is_left_out_and_told():
    train = bank()
    train.x[B][3, 2] = torch.inf
    grid = fitted(train, Axes((A, B), ("none",), recipe=RECIPE))
    assert [cell.feature for cell in grid.cells] == [A]
    assert any("every rate diverged on last4/mean/none, norm none, 100%" in n for n in grid.notes)
    with pytest.raises(UserError, match=r"every learning rate of .* diverged; check that"):
        fitted(train, Axes((B,), ("none",), recipe=RECIPE))


def test_a_rate_that_nothing_was_chosen_for_may_diverge_too():
    """One cell of one rate has no held-out rows; its weights say it."""
    recipe = replace(RECIPE, rates=(3e38,))
    with pytest.raises(UserError, match=r"every learning rate of \[3e\+38\] diverged; check that"):
        fitted(bank(), Axes((A,), ("none",), recipe=recipe))


def test_a_chosen_head_that_diverges_on_all_rows_has_no_number():
    """The sweep learns nothing from the held-out row that spoils it."""
    shares, train = (Share(), Share(0.5)), bank()
    order = torch.randperm(N, generator=drawn(RECIPE, "split")).tolist()
    half = shares[1].of(train.y, train.keys, RECIPE.seed).tolist()
    row = next(i for i in order[: round(N * RECIPE.holdout)] if i not in half)
    train.x[B][row] = 1e30  # its scores are finite, those of the head that it trains are not
    grid = LinearGrid(Axes((A, B), ("none",), shares, RECIPE), C)
    grid.fit(train)
    grid.score(bank(31, seed=1))
    found = [(cell.feature, cell.share) for cell in grid.cells]
    assert found == [(A, shares[0]), (A, shares[1]), (B, shares[1])]
    assert [h.weight.shape[0] for h in grid.heads] == [WIDTH[f] for f, _ in found]
    assert all(cell.top1 is not None for cell in grid.cells)
    assert any("diverged on last4/mean/none, norm none, 100%, when it was" in n for n in grid.notes)


def test_an_edge_of_the_rates_is_told():
    recipe = replace(RECIPE, rates=(1e-7, 1.0, 1e-6))
    grid = fitted(bank(noise=0.2), Axes((A,), recipe=recipe))
    assert grid.cells[0].edge
    assert "1 x batch/256 (the edge of the grid), the best of 3" in grid.cells[0].protocol(recipe)
    assert any(n.startswith("1 of 1 cells chose the smallest or largest rate") for n in grid.notes)
    train, recipe = bank(noise=0.2), replace(RECIPE, rates=(1e-9, 1e-3, 3e38))
    train.x[A].mul_(100)  # so that the largest overflows
    inner = fitted(train, Axes((A,), ("none",), recipe=recipe))
    assert inner.cells[0].rate == 1e-3
    assert inner.cells[0].sweep[3e38] == -1
    assert not inner.cells[0].edge
    assert not inner.notes


def test_a_label_out_of_range_is_named():
    train = bank()
    train.y[[4, 9]] = torch.tensor([C, -2])
    with pytest.raises(UserError, match=r"label of image4 in train is 7 \(and 1 more\); .* 0 to 6"):
        fitted(train, Axes((A,), recipe=RECIPE))
    grid = fitted(bank(), Axes((A,), recipe=RECIPE))
    with pytest.raises(UserError, match="no image of val has a label"):
        grid.score(bank(0))


def test_too_few_rows_are_named():
    with pytest.raises(UserError, match=r"2 labelled images \(2 per class of the labels\)"):
        fitted(bank(classes=1), Axes((A,), shares=(Share(per_class=2),), recipe=RECIPE))


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.5}, {"per_class": 0}])
def test_a_wrong_share_is_named(wrong: dict):
    with pytest.raises(UserError, match=r"linear probe: .* allowed is"):
        Share(**wrong)


def test_rows_read_from_part_files_are_the_rows_in_memory(tmp_path, monkeypatch):
    """Features that do not fit in memory are read batch by batch."""
    train, axes = bank(), Axes((A, B), ("none", "batch"), recipe=RECIPE)
    rows, part = {}, np.arange(N) % 3
    for feature, x in train.x.items():
        files = [tmp_path / f"{feature.source}{i}.npy" for i in range(3)]
        for i, file in enumerate(files):
            np.save(file, x[part == i].numpy())
        rows[feature] = StoredRows(files, part, np.arange(N) // 3, x.shape[1])
    stored = Bank(StoredFeatures(rows), train.y, train.keys)
    monkeypatch.setattr(grid_rows, "MEMORY", 0)
    found, expected = fitted(stored, axes), fitted(train, axes)
    for one, other in zip(found.heads, expected.heads, strict=True):
        assert torch.equal(one.weight, other.weight)
    assert B not in stored.x._joined  # beartype looks at the first


def _on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    grid = fitted(bank(), Axes((A, B), ("batch",), (Share(), Share(0.3)), RECIPE))
    grid.score(bank(31, seed=1))
    cells = [(c.top1, c.top5, c.images, c.rate) for c in grid.cells]
    torch.save((cells, [h.weight for h in grid.heads]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# forked, which is the quickest way to have two
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_ranks_are_one_process(tmp_path):
    """Each scores its part of 31 images, an odd number."""
    mp.start_processes(_on_a_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    grid = fitted(bank(), Axes((A, B), ("batch",), (Share(), Share(0.3)), RECIPE))
    grid.score(bank(31, seed=1))
    for rank in range(2):
        cells, weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert cells == [(c.top1, c.top5, c.images, c.rate) for c in grid.cells]
        for weight, heads in zip(weights, grid.heads, strict=True):
            assert torch.equal(weight, heads.weight)


@pytest.mark.parametrize("kind", ["avg", "cls"])
def test_batch_norm_is_that_of_maes_official_probe(parity, kind):
    """`BatchNorm1d(affine=False, eps=1e-6)` in training, from the authors' own code."""
    official = parity("mae")["finetune"][kind]
    x = official["features"]
    heads = Heads(
        x.shape[1], 3, (0.1,), recipe=RECIPE, norm="batch", steps=1, device=torch.device("cpu")
    )
    found = heads.normed(x, training=True)
    torch.testing.assert_close(found, official["probe_bn_train_out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heads.mean, x.mean(0), rtol=1e-5, atol=1e-6)
