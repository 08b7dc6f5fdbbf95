"""The tasks of retrieval on a tiny backbone whose patches see nothing but themselves."""

import weakref

import cv2
import numpy as np
import pytest
import torch

from contramask.functional.cleaning import Cleaning
from contramask.functional.warps import Warp, warp
from contramask.probes.features import CLEAN, Feature, frozen
from contramask.probes.retrieval import Reader, Stock, everywhere, fingerprints
from contramask.probes.retrieval_distortions import DISTORTIONS, distort
from contramask.probes.retrieval_images import COPIES_HELD, detect_copies, retrieve_images
from contramask.probes.retrieval_patches import PatchBank
from contramask.probes.retrieval_tasks import LOADERS, Retrieval, RetrievalRecipe, told
from contramask.types import Batch, UserError
from tests.functional.held import peak
from tests.probes.tiny import PATCH, SIZE, TinyBackbone

MEAN, STD = (0.4, 0.5, 0.3), (0.25, 0.2, 0.3)
RAW = Cleaning.parse("raw")
PATCHES = 6


def pictures(labels: list[int], *, seed: int = 0) -> torch.Tensor:
    """8-bit noise in the colour of the label."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(40, 215, (20, 3, 1, 1), generator=torch.Generator().manual_seed(9))
    noise = torch.randint(-40, 41, (len(labels), 3, *SIZE), generator=generator)
    return (colours[labels] + noise).to(torch.uint8)


def batches(levels: torch.Tensor, labels: list[int], size: int, name: str = "k") -> list[Batch]:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    images = (levels.float() / 255 - mean) / std
    return [
        Batch(
            views={CLEAN: images[i : i + size][None]},
            label=torch.tensor(labels[i : i + size]),
            position=i,
            keys=[f"{name}{j}" for j in range(i, min(i + size, len(labels)))],
        )
        for i in range(0, len(labels), size)
    ]


@pytest.fixture
def reader():
    backbone = TinyBackbone()
    with frozen(backbone):
        yield Reader(backbone, Feature(pool="mean"), MEAN, STD)


def stock(reader: Reader, levels: torch.Tensor, labels: list[int], **kinds: bool) -> Stock:
    found = Stock(reader, **(kinds or {"keep": True, "read": True}))
    for batch in batches(levels, labels, 5):
        found.add(batch)
    return found


# ---- images -------------------------------------------------------------------------------------


def test_every_level_survives_normalisation(reader):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert torch.equal(reader.levels((levels.float() / 255 - mean) / std), levels)


def test_fingerprints_know_pixels_and_nothing_else():
    levels = pictures([0, 1, 2, 0])
    levels[3] = levels[0]
    found = fingerprints(levels)
    assert found[3] == found[0]
    assert len(found.unique()) == 3
    assert torch.equal(fingerprints(levels[1:2]), found[1:2])
    other = levels.clone()
    other[0, 2, 3, 4] += 1
    other[1] = other[1].flip(2)
    assert fingerprints(other)[0] != found[0]
    assert fingerprints(other)[1] != found[1]


def test_one_row_of_each_image_in_the_order_of_fingerprints():
    ids, rows = torch.tensor([7, -3, 7, 0]), torch.tensor([[1.0], [2], [3], [4]])
    found, (x, y) = everywhere(ids, rows, torch.arange(4), via=torch.device("cpu"))
    assert found.tolist() == [-3, 0, 7]
    assert x.tolist() == [[2], [4], [1]]
    assert y.tolist() == [1, 3, 0]


def test_a_batch_without_keys_is_named_by_its_place(reader):
    found = Stock(reader, keep=True)
    for batch in batches(pictures([0] * 7), [0] * 7, 5):
        del batch["keys"]
        found.add(batch)
    assert found.keys == [f"image {i}" for i in range(7)]


def test_features_that_are_not_finite_are_named(reader):
    reader.backbone.embed.bias.data[2] = float("nan")
    with pytest.raises(UserError, match="features are not finite"):
        stock(reader, pictures([0, 1]), [0, 1])


# ---- patches ------------------------------------------------------------------------------------

LABELS = [0, 1, 0, 2, -1, 1, 0]  # one image alone in its class, one without a class


def bank_of(reader: Reader, labels=LABELS, *, metric="l2", cleaning=RAW) -> PatchBank:
    levels = pictures([max(y, 0) for y in labels])
    return PatchBank(reader, stock(reader, levels, labels), cleaning=cleaning, metric=metric)


def rates_by_loops(reader: Reader, word: str, metric: str, same: str) -> dict[str, float]:
    levels = pictures([max(y, 0) for y in LABELS]).float() / 255
    keys = [f"k{i}" for i in range(len(LABELS))]
    moved, origin = warp(levels, Warp.parse(word), keys=keys, patch=PATCH)
    bank, queries = (reader.patches(x).double().numpy() for x in (levels, moved))
    asked = {"queries": 0, "patch": 0, "image": 0, "known": 0, "class": 0, "other": 0, "away": 0}
    for m, label in enumerate(LABELS):
        for p in range(PATCHES):
            if origin[p] < 0:
                continue
            q = queries[m, p]
            places = [(n, i) for n in range(len(LABELS)) for i in range(PATCHES)]

            def score(place, q=q):
                b = bank[place]
                return q @ b if metric == "dot" else -((q - b) ** 2).sum()

            best = max(places, key=score)
            away = max((place for place in places if place[0] != m), key=score)
            asked["queries"] += 1
            asked["patch"] += best == (m, p if same == "index" else int(origin[p]))
            asked["image"] += best[0] == m
            if label >= 0:
                asked["known"] += 1
                asked["class"] += LABELS[best[0]] == label
            if label >= 0 and LABELS.count(label) > 1:
                asked["other"] += 1
                asked["away"] += LABELS[away[0]] == label
    return {
        "queries": asked["queries"],
        "same_patch_rate": asked["patch"] / asked["queries"],
        "same_image_rate": asked["image"] / asked["queries"],
        "same_class_rate": asked["class"] / asked["known"],
        "other_image_class_rate": asked["away"] / asked["other"],
    }


@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("same", ["index", "place"])
@pytest.mark.parametrize("word", ["shift3", "rotate20", "noise40", "scale1.2"])
def test_rates_are_those_of_loops(reader, metric, same, word):
    found = bank_of(reader, metric=metric).identify(Warp.parse(word), same=same)
    assert found == pytest.approx(rates_by_loops(reader, word, metric, same), abs=1e-6)


def test_what_is_not_changed_is_found(reader):
    found = bank_of(reader).identify(Warp.parse("none"))
    assert (found["same_patch_rate"], found["same_image_rate"]) == (1, 1)


def test_a_shift_by_a_patch_is_another_index_but_the_same_place(reader):
    """Of 2 x 3 patches the shifted image shows two, moved by one row and column."""
    bank, wanted = bank_of(reader), Warp.parse(f"shift{PATCH}")
    assert bank.identify(wanted, same="place")["same_patch_rate"] == 1
    found = bank.identify(wanted, same="index")
    assert found["queries"] == 2 * len(LABELS)
    assert (found["same_patch_rate"], found["same_image_rate"]) == (0, 1)


def test_chances_by_hand(reader):
    """7 images x 6 patches; labelled: three of class 0, two of class 1, one of class 2."""
    found = bank_of(reader).chances()
    assert (found["images"], found["patches"]) == (7, 42)
    assert found["same_patch_rate"] == pytest.approx(1 / 42)
    assert found["same_image_rate"] == pytest.approx(1 / 7)
    assert found["same_class_rate"] == pytest.approx((3 * 3 + 2 * 2 + 1) / 6 / 7)
    assert found["other_image_class_rate"] == pytest.approx((3 * 2 + 2 * 1) / 5 / 6)


def test_without_labels_there_are_no_rates_of_classes(reader):
    bank = bank_of(reader, [-1] * 4)
    assert set(bank.chances()) == {"images", "patches", "same_patch_rate", "same_image_rate"}
    found = bank.identify(Warp.parse("noise9"))
    assert set(found) == {"queries", "same_patch_rate", "same_image_rate"}


def test_a_channel_that_drowns_the_others_can_be_cleaned_away(reader):
    """As of an MAE: one channel is large in every patch, so the inner product finds the largest."""
    weight = reader.backbone.embed.weight.data
    weight[4] *= 300
    raw, clean = (
        bank_of(reader, metric="dot", cleaning=Cleaning.parse(word)).identify(Warp.parse("noise5"))
        for word in ("raw", "zscore")
    )
    assert raw["same_patch_rate"] < 0.1
    assert clean["same_patch_rate"] > 0.5


def test_equal_images_are_one(reader):
    levels = pictures([0, 1, 2])[[0, 1, 2, 1]]
    bank = PatchBank(reader, stock(reader, levels, [0, 1, 2, 1]), cleaning=RAW, metric="l2")
    assert bank.rows.shape[:2] == (3, PATCHES)
    found = bank.identify(Warp.parse("none"))
    assert (found["queries"], found["same_patch_rate"]) == (4 * PATCHES, 1)


def test_one_image_is_too_few(reader):
    levels = pictures([0])[[0, 0]]
    with pytest.raises(UserError, match=r"1 image\(s\) for patches; at least 2"):
        PatchBank(reader, stock(reader, levels, [0, 0]), cleaning=RAW, metric="dot")


def test_a_warp_that_leaves_nothing_is_named(reader):
    with pytest.raises(UserError, match="warp shift40 leaves nothing"):
        bank_of(reader).identify(Warp.parse("shift40"))


# ---- images of a class --------------------------------------------------------------------------


def by_loops(queries: Stock, database: Stock) -> dict[str, float]:
    aps, hits = [], []
    for x, y, i in zip(queries.x, queries.labels.tolist(), queries.ids.tolist(), strict=True):
        ranked = sorted(
            (-float(torch.cosine_similarity(x, b, dim=0)), label == y)
            for b, label, j in zip(
                database.x, database.labels.tolist(), database.ids.tolist(), strict=True
            )
            if j != i and label >= 0
        )
        places = [place for place, (_, right) in enumerate(ranked, start=1) if right]
        if y >= 0 and places:
            aps.append(np.mean([(n + 1) / place for n, place in enumerate(places)]))
            hits.append(places[0])
    return {
        "queries": len(aps),
        "map": np.mean(aps),
        **{f"recall{k}_rate": np.mean([h <= k for h in hits]) for k in (1, 5, 10)},
    }


@pytest.mark.parametrize("alone", [False, True])
def test_retrieval_is_that_of_loops(reader, alone: bool):
    labels = [0, 1, 2, 3, -1, 1, 2, 0, 4, 1, 1]
    queries = stock(reader, pictures([max(y, 0) for y in labels], seed=1), labels)
    train = [0, 1, 2, -1, 2, 1, 0, 0, 2, 2, 5, 1, 0]
    database = stock(reader, pictures([max(y, 0) for y in train]), train)
    database = queries if alone else database
    found = retrieve_images(queries, database, cleaning=RAW, metric="cosine")
    expected = by_loops(queries, database)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["queries_without_relevant"] == 2  # class 3 and class 4 have one image
    assert found["database"] == (10 if alone else 12)
    if alone:  # classes 0, 1, 2 of 2, 4, 2 images, 9 others each
        chance = (2 * 1 + 4 * 3 + 2 * 1) / 8 / 9
        assert found["chance_recall1_rate"] == pytest.approx(chance, abs=1e-6)
    assert found["map"] > 2 * found["chance_recall1_rate"]


def test_a_query_that_is_in_the_database_does_not_find_itself(reader):
    levels = pictures([0, 1, 0])
    queries, database = stock(reader, levels[:1], [0]), stock(reader, levels, [0, 1, 1])
    found = retrieve_images(queries, database, cleaning=RAW, metric="dot")
    assert found == {"queries": 0, "database": 3, "queries_without_relevant": 1}


@pytest.mark.parametrize("which", ["queries", "database"])
def test_without_labels_there_is_nothing_to_retrieve(reader, which):
    labels = [0, 1, 0]
    given = {name: stock(reader, pictures(labels), labels) for name in ("queries", "database")}
    given[which] = stock(reader, pictures(labels), [-1] * 3)
    found = retrieve_images(**given, cleaning=Cleaning.parse("zscore"), metric="dot")
    assert (found["queries"], "map" in found) == (0, False)
    values = {f"images_{name}": value for name, value in found.items()}
    with pytest.raises(UserError, match="images need `cls` in their shards"):
        told(RetrievalRecipe(tasks=("images",)), values)
    (note,) = told(RetrievalRecipe(tasks=("images", "copies")), values)
    assert "retrieval of images is left out" in note


def test_a_database_is_held_as_often_as_is_said(reader, monkeypatch):
    """Wide features, so that nothing else counts."""
    monkeypatch.setattr("contramask.functional.cleaning.ELEMENTS", 2**12)
    images, width = 700, 512
    stocks = [Stock(reader, read=True) for _ in range(2)]
    for seed, (found, count) in enumerate(zip(stocks, (2, images), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        found._x = [torch.randn(count, width, generator=generator)]
        found._y = [torch.zeros(count, dtype=torch.long)]
        found._ids = [seed + 2 * torch.arange(count)]
    cleaning = Cleaning.parse("zscore")
    most = peak(lambda: retrieve_images(*stocks, cleaning=cleaning, metric="cosine"))
    floats = 4 * images * width
    # The stock's own is there before.
    assert COPIES_HELD - 1.1 < most / floats < COPIES_HELD - 1 + 0.1


def test_what_was_used_for_the_last_time_is_let_go(reader):
    """The bank of patches before images are ranked, and the database before copies are."""
    labels = [0, 1, 0, 1]
    stocks = {
        name: stock(reader, pictures(labels, seed=seed), labels)
        for seed, name in enumerate(LOADERS)
    }
    recipe = RetrievalRecipe(warps=("none",), copies=1)
    tasks, database = Retrieval(recipe, reader, stocks), weakref.ref(stocks["database"])
    del stocks
    held = []
    for part in recipe.parts:
        tasks.compute(part)
        held.append((tasks._bank is not None, database() is not None))
    assert held == [(True, True), (True, True), (False, False), (False, False)]


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTORTIONS)
def test_every_distortion_changes_an_image_as_its_generator_says(name: str):
    noise = torch.rand(3, 50, 40, generator=torch.Generator().manual_seed(1))
    image = (60 + 40 * noise + torch.linspace(0, 90, 40)).to(torch.uint8)
    image[1] = 220 - image[1]
    before = image.clone()
    made = [DISTORTIONS[name](image, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(image, before)
    assert made[0].shape == image.shape
    assert made[0].dtype == torch.uint8
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert (made[0].float() - image.float()).abs().mean() > 0.3


def test_distortions_are_as_strong_as_they_say():
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous()
    for seed in range(5):
        cropped = DISTORTIONS["crop"](ramp, torch.Generator().manual_seed(seed))
        spread = int(cropped.max()) - int(cropped.min())
        assert spread == pytest.approx(0.5**0.5 * 200, abs=3)
        marked = DISTORTIONS["overlay"](ramp, torch.Generator().manual_seed(seed))
        share = (marked != ramp).any(0).float().mean()
        assert 0.24 * 0.59 < share < 0.41 * 0.91
        turned = DISTORTIONS["rotate"](ramp + 50, torch.Generator().manual_seed(seed))
        black = (turned == 0).float().mean()  # corners: 2 tan / (1 + tan)^2 and less
        assert 0.05 < black < 0.35
        contrast = DISTORTIONS["contrast"](ramp, torch.Generator().manual_seed(seed))
        ratio = contrast.float().std() / ramp.float().std()
        assert 0.28 < ratio < 0.62 or ratio > 1.2  # levels beyond 0 and 255 are cut


def test_jpeg_has_a_quality_of_10_to_30():
    image = pictures([0])[0]
    rows = image.permute(1, 2, 0).numpy()
    theirs = {}
    for quality in range(101):
        _, coded = cv2.imencode(".jpg", rows[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        theirs[quality] = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1].astype(float)
    for seed in range(6):
        found = DISTORTIONS["jpeg"](image, torch.Generator().manual_seed(seed))
        ours = found.permute(1, 2, 0).numpy().astype(float)
        away = {quality: np.abs(ours - x).mean() for quality, x in theirs.items()}
        nearest = min(away, key=away.__getitem__)
        assert 10 <= nearest <= 30
        assert away[nearest] < 0.5


def test_a_copy_is_a_function_of_seed_key_and_number():
    image = pictures([3])[0]
    made = {
        (key, copy, seed): distort(image, key=key, copy=copy, seed=seed)
        for key in ("a", "b") for copy in range(4) for seed in (0, 1)
    }  # fmt: skip
    again, _ = distort(image, key="b", copy=2, seed=1)
    assert torch.equal(again, made["b", 2, 1][0])
    assert all(len(set(names)) == 2 for _, names in made.values())
    assert len({names for _, names in made.values()}) > 8
    assert len({fingerprints(x[None]).item() for x, _ in made.values()}) == len(made)
    assert len(distort(image, key="a", copy=0, steps=7)[1]) == 7


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_copies_are_found_as_by_loops(reader, metric):
    levels, others = pictures([0, 1, 2, 3, 4, 5, 6]), pictures(list(range(10)), seed=1)
    others[3] = levels[2]  # an original among the distractors is left out
    originals = stock(reader, levels, [0] * 7, keep=True)
    distractors = stock(reader, others, [0] * 10, read=True)
    found = detect_copies(
        reader, originals, distractors, copies=3, cleaning=RAW, metric=metric, seed=4
    )
    bank = reader.images(torch.cat([levels, others[:3], others[4:]]).float() / 255).double()
    pairs, ranks, blurred = [], [], []
    for n in range(7):
        for copy in range(3):
            image, names = distort(levels[n], key=f"k{n}", copy=copy, seed=4)
            x = reader.images(image[None].float() / 255).double()
            away = -(torch.cdist(x, bank)[0] ** 2)
            scores = torch.cosine_similarity(x, bank) if metric == "cosine" else away
            ranks.append(1 + int((scores > scores[n]).sum()))
            pairs += [(-s, m == n) for m, s in enumerate(scores.tolist())]
            blurred += [ranks[-1] == 1] if "blur" in names else []
    hits = [place for place, (_, right) in enumerate(sorted(pairs), start=1) if right]
    assert found["queries"] == 21
    assert found["database"] == 16
    assert found["map"] == pytest.approx(np.mean([1 / r for r in ranks]), abs=1e-5)
    assert found["recall1_rate"] == pytest.approx(np.mean([r == 1 for r in ranks]), abs=1e-5)
    assert found["blur_recall1_rate"] == pytest.approx(np.mean(blurred), abs=1e-5)
    micro = np.mean([(i + 1) / place for i, place in enumerate(hits)])
    assert found["micro_map"] == pytest.approx(micro, abs=1e-4)
    assert found["map"] > 3 * found["chance_recall1_rate"]


def test_copies_need_two_images(reader):
    originals = stock(reader, pictures([0]), [0], keep=True)
    nothing = Stock(reader, read=True)
    with pytest.raises(UserError, match="1 originals and 0 distractors; copies need"):
        detect_copies(reader, originals, nothing, cleaning=RAW, metric="cosine")


# ---- recipes ------------------------------------------------------------------------------------


def test_a_recipe_reads_what_its_tasks_need():
    assert RetrievalRecipe().loaders == ["database", "queries", "originals", "distractors"]
    assert RetrievalRecipe(tasks=("patches",)).loaders == ["originals"]
    assert RetrievalRecipe(tasks=("copies", "images"), database="val").loaders == [
        *("queries", "originals", "distractors")
    ]
    assert RetrievalRecipe(tasks=("copies", "patches"), warps=("blur2", "blur2.0")).parts == [
        *("patches_chance", "patches_blur2", "copies")
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ()}, "no task; there are patches, images, copies"),
        ({"warps": ()}, "patches without a warp"),
        ({"warps": ("blur2", "turn3")}, "'turn3' is none of none, shift3"),
        ({"copies": 0}, "copies is 0"),
        ({"cleaning": "wash"}, "cleaning is 'wash'"),
    ],
)
def test_a_recipe_of_nonsense_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        RetrievalRecipe(**options)
