"""Rankings: by hand, by loops, and against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from contramask.functional.retrieval import (
    find_originals,
    match_patches,
    micro_average_precision,
    rank,
    ready,
    retrieve,
    similarities,
    wrong_pairs_above,
)

Q, N, D = 11, 23, 5
METRICS = ["dot", "cosine", "l2"]


def rows(number: int, seed: int = 0, width: int = D) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def whole(number: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, (number,), generator=torch.Generator().manual_seed(seed))


def by_definition(metric: str, q: np.ndarray, b: np.ndarray) -> float:
    if metric == "cosine":
        return float(q @ b / np.linalg.norm(q) / np.linalg.norm(b))
    return float(q @ b) if metric == "dot" else -float(((q - b) ** 2).sum())


def matrix(metric: str, queries: torch.Tensor, bank: torch.Tensor) -> np.ndarray:
    pairs = [
        [by_definition(metric, q, b) for b in bank.double().numpy()]
        for q in queries.double().numpy()
    ]
    return np.array(pairs)


def by_loops(scores, relevant, excluded) -> tuple[int, float, float, int]:
    """One query: sort by score, what is not relevant first among equals; walk down the list."""
    order = sorted(
        (-s, bool(r)) for s, r, x in zip(scores, relevant, excluded, strict=True) if not x
    )
    total = sum(r for _, r in order)
    hits, ap, at_r, first = 0, 0.0, 0.0, 0
    for place, (_, right) in enumerate(order, start=1):
        if right:
            hits += 1
            first = first or place
            ap += hits / place
            at_r += hits / place if place <= total else 0
    return total, ap / max(1, total), at_r / max(1, total), first


@pytest.mark.parametrize("metric", METRICS)
def test_similarities_are_those_of_the_definition(metric):
    queries, bank = rows(Q), rows(N, 1)
    found = similarities(ready(queries, metric), ready(bank, metric), metric)
    np.testing.assert_allclose(found, matrix(metric, queries, bank), atol=1e-5)


# ---- patches ------------------------------------------------------------------------------------


IMAGES, PATCHES = 4, 6
LABELS = torch.tensor([3, 1, 3, 0])


def matches_by_loops(scores, wanted: int) -> list[bool]:
    """All patches of the highest score must be right, of all images and of the other images."""
    home, patches = wanted // PATCHES, range(IMAGES * PATCHES)
    others = [n for n in patches if n // PATCHES != home]
    best = [n for n in patches if scores[n] == max(scores)]
    away = [n for n in others if scores[n] == max(scores[m] for m in others)]

    def alike(found: list[int]) -> bool:
        return all(LABELS[n // PATCHES] == LABELS[home] for n in found)

    same = all(n // PATCHES == home for n in best)
    return [best == [wanted], same, alike(best), alike(away)]


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15)
@given(elements=st.integers(1, 300))
def test_patches_are_matched_by_loops(metric, elements: int):
    bank, wanted = rows(24, 1).view(IMAGES, PATCHES, D), whole(Q, 24)
    queries = bank.flatten(0, 1)[wanted] + 0.7 * rows(Q)
    shared = {"metric": metric, "elements": elements}
    found = match_patches(ready(queries, metric), ready(bank, metric), wanted, LABELS, **shared)
    scores = matrix(metric, queries, bank.flatten(0, 1))
    assert 0 < found.patch.sum() < Q
    for q in range(Q):
        expected = matches_by_loops(scores[q].tolist(), int(wanted[q]))
        assert [bool(part[q]) for part in found] == expected


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_ties_of_patches_are_lost_as_by_loops(seed: int):
    """Features of few whole numbers: scores are exact, and many are equal."""
    bank, queries = whole(24 * 2, 3, seed).view(24, 2).float(), whole(Q * 2, 3, seed + 1).float()
    queries, wanted = queries.view(Q, 2), whole(Q, 24, seed)
    found = match_patches(queries, bank.view(IMAGES, PATCHES, 2), wanted, LABELS)
    for q in range(Q):
        expected = matches_by_loops((queries[q] @ bank.mT).tolist(), int(wanted[q]))
        assert [bool(part[q]) for part in found] == expected


def test_patches_by_hand():
    bank = torch.tensor([[[1.0, 0], [0, 1]], [[2, 0], [0, 0.9]], [[-1, 0], [1, 1]]])
    queries = torch.tensor([[1.0, 0], [0, 1], [-1, -0.1]])
    wanted, labels = torch.tensor([0, 1, 4]), torch.tensor([7, 8, 8])
    dot = match_patches(queries, bank, wanted, labels, metric="dot")
    # The longest vector wins; the second query's also looks like the last patch of all: a tie.
    assert dot.patch.tolist() == [False, False, True]
    assert dot.image.tolist() == [False, False, True]
    assert dot.label.tolist() == [False, False, True]
    assert dot.elsewhere.tolist() == [False, False, True]
    near = match_patches(queries, bank, wanted, labels, metric="l2")
    assert near.patch.tolist() == near.image.tolist() == near.label.tolist() == [True] * 3
    assert near.elsewhere.tolist() == [False, False, True]


def test_patches_that_are_all_alike_find_nothing_but_a_label_that_all_have():
    bank, wanted = torch.ones(IMAGES, PATCHES, D), whole(Q, 24)
    found = match_patches(torch.ones(Q, D), bank, wanted, LABELS)
    assert not torch.stack(found).any()
    found = match_patches(torch.ones(Q, D), bank, wanted, torch.zeros_like(LABELS))
    assert [bool(part.all()) for part in found] == [False, False, True, True]


def test_no_patch_matches_nothing():
    found = match_patches(rows(Q)[:0], rows(24).view(4, 6, D), whole(0, 4), LABELS)
    assert [len(part) for part in found] == [0, 0, 0, 0]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_of_full_precision_under_autocast(metric):
    queries, bank = ready(rows(Q), metric), ready(rows(N, 1), metric)
    expected = similarities(queries, bank, metric)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarities(queries, bank, metric), expected)


# ---- rankings -----------------------------------------------------------------------------------


def test_a_ranking_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    relevant = torch.tensor([[True, False, True, False, True], [False] * 5])
    found = rank(scores, relevant)
    assert found.relevant.tolist() == [3, 0]
    assert found.average_precision.tolist() == pytest.approx([(1 + 2 / 3 + 3 / 5) / 3, 0])
    assert found.precision_at_r.tolist() == pytest.approx([(1 + 2 / 3) / 3, 0])
    assert found.first.tolist() == [1, 0]
    without = rank(scores, relevant, torch.tensor([[True, True, False, False, False]] * 2))
    assert without.relevant.tolist() == [2, 0]
    assert without.average_precision.tolist() == pytest.approx([(1 + 2 / 3) / 2, 0])
    assert without.precision_at_r.tolist() == pytest.approx([1 / 2, 0])


def test_ties_are_lost():
    found = rank(torch.zeros(1, 5), torch.tensor([[True, False, True, False, False]]))
    assert found.average_precision.item() == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert (found.precision_at_r.item(), found.first.item()) == (0, 4)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 4, 1000]), share=st.floats(0, 1))
def test_rankings_are_those_of_loops(seed: int, levels: int, share: float):
    """Few levels of scores make many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (Q, N), generator=generator).float() - levels / 2
    relevant = torch.rand(Q, N, generator=generator) < share
    excluded = torch.rand(Q, N, generator=generator) < 0.2
    found = rank(scores, relevant, excluded)
    for q in range(Q):
        expected = by_loops(scores[q].tolist(), relevant[q], excluded[q])
        assert [float(part[q]) for part in found] == pytest.approx(expected)


def test_average_precisions_are_those_of_scikit_learn_and_torchmetrics():
    scores, relevant = rows(Q, width=N), rows(Q, 1, width=N) > 0.8
    found = rank(scores, relevant)
    assert found.relevant.min() > 0
    for q in range(Q):
        theirs = average_precision_score(relevant[q].numpy(), scores[q].numpy())
        assert found.average_precision[q].item() == pytest.approx(theirs)
        above_0 = scores[q].sigmoid()  # torchmetrics drops documents whose score is not
        theirs = retrieval_average_precision(above_0, relevant[q]).item()
        assert found.average_precision[q].item() == pytest.approx(theirs, abs=1e-6)
        for k in (1, 5, 10):
            hit = retrieval_hit_rate(above_0, relevant[q], top_k=k).item()
            assert (found.first[q] <= k).item() == hit


@settings(max_examples=20)
@given(elements=st.integers(1, 400))
def test_retrieval_leaves_the_image_itself_out(elements: int):
    bank, labels, images = rows(N), whole(N, 4), torch.arange(N) + 100
    found = retrieve(bank, bank, (labels, labels), (images, images), metric="l2", elements=elements)
    scores = matrix("l2", bank, bank)
    for q in range(N):
        expected = by_loops(scores[q], labels == labels[q], images == images[q])
        assert [float(part[q]) for part in found] == pytest.approx(expected)


def test_no_query_gives_no_row():
    found = retrieve(rows(0), rows(N), (whole(0, 3), whole(N, 3)), (whole(0, 3), whole(N, 3)))
    assert [len(part) for part in found] == [0, 0, 0, 0]
    assert rank(torch.zeros(0, N), torch.zeros(0, N, dtype=torch.bool)).first.shape == (0,)


# ---- copies -------------------------------------------------------------------------------------


def micro_by_sorting(scores: np.ndarray, targets: list[int]) -> float:
    """All pairs in one list, wrong ones first among equals."""
    pairs = sorted((-s, n == targets[q]) for q, row in enumerate(scores) for n, s in enumerate(row))
    hits, total = 0, 0.0
    for place, (_, right) in enumerate(pairs, start=1):
        hits += right
        total += hits / place if right else 0
    return total / len(targets)


def test_copies_by_hand():
    """Scores of two copies with a bank of three: (0.9 right, 0.1, 0.5) and (0.7, 0.6 right, 0)."""
    bank, queries = torch.eye(3), torch.tensor([[0.9, 0.1, 0.5], [0.7, 0.6, 0.0]])
    originals = torch.tensor([0, 1])
    right, ranks = find_originals(queries, bank, originals, metric="dot")
    assert right.tolist() == pytest.approx([0.9, 0.6])
    assert ranks.tolist() == [1, 2]  # mAP = (1 + 1/2) / 2
    above = wrong_pairs_above(right.sort().values, queries, bank, originals, metric="dot")
    assert above.tolist() == [1, 0]  # 0.7 is above 0.6, nothing above 0.9
    assert micro_average_precision(above).item() == pytest.approx((1 / 1 + 2 / 3) / 2)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15)
@given(elements=st.integers(1, 400), seed=st.integers(0, 1000))
def test_copies_are_ranked_as_by_sorting(metric, elements: int, seed: int):
    bank = ready(rows(N, seed), metric)
    originals = whole(Q, N, seed)
    queries = ready(bank[originals] + rows(Q, seed + 1), metric)
    shared = {"metric": metric, "elements": elements}
    right, ranks = find_originals(queries, bank, originals, **shared)
    thresholds = right.sort().values
    # Two halves of the queries, as on two ranks.
    above = sum(
        wrong_pairs_above(thresholds, queries[part], bank, originals[part], **shared)
        for part in (slice(0, 4), slice(4, Q))
    )
    scores = matrix(metric, queries, bank)
    assert micro_average_precision(above).item() == pytest.approx(
        micro_by_sorting(scores, originals.tolist()), abs=1e-6
    )
    truth = np.arange(N) == originals.numpy()[:, None]
    assert micro_average_precision(above).item() == pytest.approx(
        average_precision_score(truth.ravel(), scores.ravel()), abs=1e-6
    )
    for q in range(Q):
        assert ranks[q] == by_loops(scores[q], truth[q], np.zeros(N))[3]


def test_copies_of_equal_features_are_not_found():
    bank, queries = torch.ones(N, D), torch.ones(Q, D)
    originals = torch.arange(Q)
    right, ranks = find_originals(queries, bank, originals)
    assert ranks.tolist() == [N] * Q
    above = wrong_pairs_above(right.sort().values, queries, bank, originals)
    assert above.tolist() == [Q * (N - 1)] * Q
    expected = micro_by_sorting(np.ones((Q, N)), originals.tolist())
    assert micro_average_precision(above).item() == pytest.approx(expected)


def test_no_copy_has_no_score_and_adds_no_pair():
    right, ranks = find_originals(rows(0), rows(N), whole(0, N))
    assert (right.shape, ranks.shape) == ((0,), (0,))
    assert wrong_pairs_above(torch.zeros(3), rows(0), rows(N), whole(0, N)).tolist() == [0, 0, 0]
