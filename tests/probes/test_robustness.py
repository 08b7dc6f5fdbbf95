"""Counting of right answers and of decisions; folds that share nothing; what one cue tells."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contramask.probes import robustness
from contramask.probes.cue_splits import check_split, groups_of, skipped_of, too_few
from contramask.probes.grouped_linear import GroupedLinear
from contramask.probes.linear import LinearProbe, LinearRecipe
from contramask.probes.robustness import (
    Decisions,
    Decoded,
    classes_to_learn,
    deal,
    decodability,
    matched,
    relative_drop,
    right,
)
from contramask.types import UserError

RECIPE = LinearRecipe(rates=(1.0,), epochs=40, batch_norm=False)


def test_the_drop_is_relative_to_clean():
    assert relative_drop(0.8, 0.6) == pytest.approx(0.25)
    assert relative_drop(0.5, 0.6) == pytest.approx(-0.2)
    assert relative_drop(0.0, 0.0) is None


def test_right_is_what_the_largest_score_says():
    probe = LinearProbe(4, 3, recipe=RECIPE)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    best = (x.numpy() @ probe.weight[0].numpy()).argmax(1)
    y = torch.tensor([*best[:3], (best[3] + 1) % 3, 7])  # 7: a class it has not learnt
    assert right(probe, x, y).tolist() == [True, True, True, False, False]
    assert right(probe, x[:0], y[:0]).shape == (0,)


def test_one_class_is_too_few():
    assert classes_to_learn(torch.tensor([4, 0, 4]), "data.train") == 5
    with pytest.raises(UserError, match=r"data.train has images of 1 class\(es\)"):
        classes_to_learn(torch.tensor([4, 4]), "data.train")
    with pytest.raises(UserError, match=r"0 class\(es\)"):
        classes_to_learn(torch.tensor([], dtype=torch.long), "data.train")


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=25, max_size=60),
    st.integers(2, 5),
    st.integers(0, 3),
)
def test_groups_stay_whole_and_folds_are_even(pairs, folds: int, seed: int):
    strata = torch.tensor([s for s, _ in pairs])
    groups = torch.tensor([10 * s + g for s, g in pairs])
    if len(groups.unique()) < folds:
        return
    placed = deal(strata, groups, folds, seed=seed)
    held = [set(groups[placed == f].tolist()) for f in range(folds)]
    assert sum(map(len, held)) == len(groups.unique())
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for s in range(4):
        mine = [len({g for g in part if g // 10 == s}) for part in held]
        assert max(mine) - min(mine) <= 1  # stratified
    assert torch.equal(placed, deal(strata, groups, folds, seed=seed))


def test_folds_are_another_deal_with_another_seed():
    strata, groups = torch.zeros(40, dtype=torch.long), torch.arange(40)
    assert not torch.equal(*(deal(strata, groups, 4, seed=s) for s in (0, 1)))


@pytest.mark.parametrize(("folds", "groups"), [(6, 5), (1, 5), (3, 2)])
def test_more_folds_than_groups_are_refused(folds: int, groups: int):
    with pytest.raises(UserError, match=f"cue: {folds} folds of 12 images in {groups} groups"):
        deal(torch.zeros(12).long(), torch.arange(12) % groups, folds, seed=0)


def conflicts(copies: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape and texture of every pair of 4 classes that differ, `copies` of each."""
    pairs = [(s, t) for s in range(4) for t in range(4) if s != t for _ in range(copies)]
    shape, texture = torch.tensor(pairs).T
    return shape.contiguous(), texture.contiguous()


def test_a_cue_that_is_in_the_features_is_read_and_the_other_is_not():
    shape, texture = conflicts()
    x = torch.eye(4)[shape] + 0.1 * torch.randn(36, 4, generator=torch.Generator().manual_seed(1))
    placed = deal(shape, torch.arange(36), 3, seed=0)
    assert decodability(x, shape, texture, placed, RECIPE).mean == 1
    # Of texture the features say only that it is not the shape.
    assert decodability(x, texture, shape, placed, RECIPE).mean < 0.5


def test_memorised_pictures_are_no_reading_of_a_class():
    """Features that only say which picture it is: folds that share pictures take that for more."""
    pictures = torch.arange(12).repeat_interleave(5)  # 12 pictures, 3 of each class
    y, other = pictures // 3, torch.arange(60) % 5
    x = torch.eye(12)[pictures]
    random = deal(y, torch.arange(60), 3, seed=0)
    source = deal(y, pictures, 3, seed=0)
    assert decodability(x, y, other, random, RECIPE).mean == 1
    assert decodability(x, y, other, source, RECIPE).mean < 0.5


def test_rates_are_chosen_on_images_of_other_pictures_than_are_trained_on(monkeypatch):
    pictures = torch.arange(12).repeat_interleave(5)
    y, other = pictures // 3, torch.arange(60) % 5
    trained = []

    class Seen(GroupedLinear):
        def _train(self, x, y, rows):
            trained.append((x.argmax(1), rows))
            super()._train(x, y, rows)

    monkeypatch.setattr(robustness, "GroupedLinear", Seen)
    placed = deal(y, pictures, 3, seed=0)
    two = LinearRecipe(rates=(0.1, 1.0), epochs=2)
    decodability(torch.eye(12)[pictures], y, other, placed, two, pictures)
    assert len(trained) == 3 * 2
    for (of_rows, learnt), (_, again) in zip(trained[::2], trained[1::2], strict=True):
        held = torch.ones(len(of_rows), dtype=torch.bool)
        held[learnt] = False
        # One of eight pictures is held out, all its images.
        assert (int(held.sum()), len(of_rows)) == (5, 40)
        assert not set(of_rows[held].tolist()) & set(of_rows[learnt].tolist())
        assert again.tolist() == list(range(40))


def test_groups_are_enough_where_folds_and_rates_find_theirs():
    for count in range(1, 10):
        groups = torch.arange(3 * count) % count
        for folds in range(2, 7):
            try:
                placed = deal(torch.zeros_like(groups), groups, folds, seed=0)
            except UserError:
                left = 0
            else:
                left = min(len(groups[placed != f].unique()) for f in range(folds))
            for rates in ((1.0,), (0.1, 1.0)):
                reason = too_few(groups, folds, LinearRecipe(rates=rates))
                assert (reason is None) == (left >= len(rates)), (count, folds, reason)


def test_splits_that_images_do_not_allow_are_skipped_with_a_reason():
    shape, texture = conflicts(1)  # 12 images of 4 x 3 pairs
    y = torch.stack([shape, texture, torch.arange(12) // 2, torch.arange(12)], 1)
    groups = groups_of(y)
    assert [len(some.unique()) for pair in groups.values() for some in pair] == [
        6,
        12,
        4,
        4,
        12,
        12,
    ]
    assert skipped_of(groups, 4, RECIPE) == {}
    assert list(skipped_of(groups, 5, RECIPE)) == ["other"]
    skipped = skipped_of(groups, 7, RECIPE)
    assert "6 groups of images that stay together for 7 folds" in skipped["source"]
    assert "4 groups" in skipped["other"]
    check_split(None, skipped)
    check_split("random", skipped)
    with pytest.raises(UserError, match=r"cue.split is 'source', but .*; allowed are random; set"):
        check_split("source", skipped)
    bare = groups_of(torch.where(torch.arange(4) < 3, y, -1))  # one of the pictures is not told
    assert "keys do not name the pictures" in skipped_of(bare, 2, RECIPE)["source"]
    with pytest.raises(UserError, match=r"12 groups .* for 13 folds; set cue\.folds lower"):
        check_split(None, skipped_of(groups, 13, RECIPE))


def test_what_the_other_cue_gives_away_by_hand():
    y = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 0, 1])
    other = torch.tensor([2, 2, 0, 0, 0, 2, 2, 3, 2, 3])
    placed = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    # Fold 1 tested: with other 2 the class 0 was seen twice and 1 once, so 0 is guessed: two right.
    # Other 3 was never seen: the most frequent class, 0 before 1 where they tie: two wrong.
    # Fold 0 tested: other 2 -> 0 (right for two of three), 0 was never seen -> 0 (right for one of
    # three).
    found = decodability(torch.randn(10, 3), y, other, placed, RECIPE)
    assert found.from_other == pytest.approx((2 + 2 + 1) / 10)
    assert len(found.folds) == 2
    assert found.unseen == 0


def test_classes_that_only_a_test_fold_has_are_counted():
    y = torch.tensor([0, 1, 0, 1, 0, 1, 2, 2])
    placed = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = decodability(torch.randn(8, 3), y, torch.zeros(8).long(), placed, RECIPE)
    assert found.unseen == 2


def test_mean_and_spread_are_over_folds():
    found = Decoded((0.5, 0.75, 0.25), 0.1, 0)
    assert found.mean == pytest.approx(0.5)
    assert found.spread == pytest.approx(np.std([0.5, 0.75, 0.25], ddof=1))


def test_shape_bias_by_hand():
    shape = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    texture = torch.tensor([1, 2, 0, 2, 0, 1, 1])
    decided = torch.tensor([0, 2, 1, 1, 1, 0, 2])
    #                       s  t  s  s  -  -  s
    found = Decisions.of(decided, shape, texture)
    assert found == Decisions(shape=4, texture=1, neither=2)
    assert found.shape_bias == pytest.approx(4 / 5)
    assert found.images == 7


def test_there_is_no_bias_where_nothing_was_decided_for_a_cue():
    assert Decisions(0, 0, 3).shape_bias is None
    with pytest.raises(AssertionError, match="without a conflict"):
        Decisions.of(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))


def test_classes_are_matched_by_name():
    assert matched(["ship", "cat", "dog"], ["dog", "bear", "cat"]).tolist() == [-1, 2, 0]
