"""k-NN of stored features under a Lightning Trainer: tables, ranks, stops, leave one out."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from contramask.probes import knn_table
from contramask.probes.features import CLS
from contramask.probes.knn_plan import TablePlan
from contramask.probes.parts import Parts
from contramask.probes.store import Bank, StoredFeatures, StoredRows
from contramask.training.knn_search import KNNSearch
from contramask.types import UserError
from tests.builders import randn
from tests.training.test_linear import trainer

pytestmark = [
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

N, Q, F, C = 131, 47, 9, 7
SPREAD = torch.tensor([1.0, 1.0, 60.0, 1.0, 1.0, 20.0, 1.0, 1.0, 0.0])
FULL = TablePlan(("cosine", "dot", "l2"), ("raw", "zscore", "pca", "pca3", "top2"), (1, 4, 11, 60))


def bank(rows: int = N, seed: int = 0, *, twins: bool = False) -> Bank:
    """Classes apart in quiet channels; two loud ones say nothing, and one is constant."""
    y = torch.randint(C, (rows,), generator=torch.Generator().manual_seed(seed))
    x = 2 * randn(C, F, seed=5)[y] + randn(rows, F, seed=seed + 1)
    x = x * (SPREAD == 1) + randn(rows, F, seed=seed + 2) * SPREAD * (SPREAD != 1) + 3
    if twins:  # of other classes: whoever breaks ties otherwise has other numbers
        x[::5], x[2::5] = x[0], x[2]
    return Bank({CLS: x}, y, [f"{seed}/{i}" for i in range(rows)])


def table(train: Bank, val: Bank | None, plan: TablePlan, **options) -> dict:
    search = KNNSearch(train, val, CLS, plan)
    trainer(**options).validate(search, verbose=False)
    return search.result("features")


def cleaned(word: str, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By scikit-learn and NumPy, in float64."""
    if word == "raw":
        return x, v
    if word.startswith("top"):
        kept = np.argsort(-x.var(0))[int(word[3:]) :]
        return x[:, kept], v[:, kept]
    if word == "zscore":
        by = StandardScaler().fit(x)
        return by.transform(x), by.transform(v)
    by = PCA(int(word[3:] or F - 1), whiten=True, svd_solver="full").fit(x)
    return by.transform(x), by.transform(v)


def right(metric: str, k: int, x, y, v, w) -> float:
    """Top-1 accuracy by scikit-learn, ties of uniform votes by hand."""
    if metric == "dot":
        places = np.argsort(-(v @ x.T), axis=1)[:, :k]
    else:
        how = {"cosine": "cosine", "l2": "euclidean"}[metric]
        by = KNeighborsClassifier(k, algorithm="brute", metric=how).fit(x, y)
        distance, places = by.kneighbors(v)
    votes = np.zeros((len(v), C))
    for q, near in enumerate(places):
        for j, n in enumerate(near):
            one = np.exp((1 - distance[q, j]) / 0.07) if metric == "cosine" else 1
            votes[q, y[n]] += one
        if metric != "cosine":
            for j, n in reversed(list(enumerate(near))):
                votes[q, y[n]] = np.floor(votes[q, y[n]]) + (k - j) / (k + 1)
    return float((votes.argmax(1) == w).mean())


def test_every_cell_is_that_of_scikit_learn():
    train, val = bank(), bank(Q, 10)
    found = table(train, val, FULL)
    assert len(found["table"]) == 3 * 5 * 4
    x, v = (b.x[CLS].double().numpy() for b in (train, val))
    cells = set()
    for row in found["table"]:
        a, b = cleaned(row["cleaning"], x, v)
        expected = right(row["metric"], row["k"], a, train.y.numpy(), b, val.y.numpy())
        assert row["top1"] == pytest.approx(expected, abs=1e-6), row
        assert (row["top5"] is None) == (row["k"] < 5)
        assert row["top5"] is None or row["top1"] <= row["top5"] <= 1
        cells.add((row["metric"], row["cleaning"], row["k"]))
    assert len(cells) == 60
    assert found["widths"] == {"raw": 9, "zscore": 9, "pca": 8, "pca3": 3, "top2": 7}
    assert found["values"]["k11_top1"] == next(r["top1"] for r in found["table"] if r["k"] == 11)
    assert found["values"]["images"] == Q


def test_loud_channels_break_and_cleaning_mends_what_the_one_sentence_says():
    found = table(bank(400), bank(Q, 10), TablePlan(("dot", "cosine"), ("raw", "top2"), (1, 20)))
    cells = {(r["metric"], r["cleaning"], r["k"]): 100 * r["top1"] for r in found["table"]}
    raw, mended = cells["dot", "raw", 1], cells["dot", "top2", 1]
    assert mended > raw + 15
    assert found["finding"] == (
        f"1-NN by inner product is {raw:.2f} % raw and {mended:.2f} % with top2, the best cleaning "
        f"({mended - raw:+.2f} points); cosine 20-NN is {cells['cosine', 'raw', 20]:.2f} % raw and "
        f"{cells['cosine', 'top2', 20]:.2f} % with top2, the best cleaning "
        f"({cells['cosine', 'top2', 20] - cells['cosine', 'raw', 20]:+.2f} points)."
    )
    variance = bank(400).x[CLS].double().var(0, correction=0).sort(descending=True).values
    assert found["variance_share"]["2"] == pytest.approx(
        float(variance[:2].sum() / variance.sum()), abs=1e-6
    )
    assert table(bank(), bank(Q, 10), TablePlan())["finding"] is None


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("rows", [N, 1])
def test_two_ranks_have_the_numbers_of_one(alone: bool, rows: int, tmp_path, monkeypatch):
    """Ties of many twins, several blocks and parts; of one query the first rank has none."""
    monkeypatch.setattr(knn_table, "BLOCK", 60)
    monkeypatch.setattr(knn_table, "PART", 50)
    cleanings = ("raw", "top2", "pca")
    plan = TablePlan(("cosine", "dot", "l2"), cleanings, (1, 6), leave_one_out=alone)
    train, val = bank(max(rows, 8), twins=True), bank(rows, 10)
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        path = tmp_path / f"{devices}"
        search = KNNSearch(
            train, None if alone else val, CLS, plan, parts=lambda path=path: Parts(path, "same")
        )
        trainer(devices=devices, strategy=strategy).validate(search, verbose=False)
        found.append(search.result("features"))
    assert found[0]["table"] == found[1]["table"]
    assert (
        found[0]["values"]["images"] == found[1]["values"]["images"] == len(train if alone else val)
    )
    assert found[0]["variance_share"] == found[1]["variance_share"]


def test_an_image_left_out_does_not_vote_for_itself():
    train = bank()
    with_itself = table(train, train, TablePlan(ks=(1,)))
    found = table(train, None, TablePlan(ks=(1, N - 1), leave_one_out=True))
    assert with_itself["values"]["k1_top1"] == 1
    x = train.x[CLS].double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T - 9 * np.eye(N)
    expected = (train.y.numpy()[cosine.argmax(1)] == train.y.numpy()).mean()
    assert found["values"]["k1_top1"] == pytest.approx(expected, abs=1e-6)
    assert "each query without its own row" in found["protocol"]
    assert f"{N} train images as queries" in found["protocol"]


def test_a_stopped_table_goes_on(tmp_path):
    """What is finished is not searched again; when all is, nothing is."""
    train, val = bank(), bank(Q, 10)
    made = []

    def run(cleanings: tuple[str, ...], settings: str = "same") -> dict:
        def parts() -> Parts:
            made.append(Parts(tmp_path / "parts", settings))
            return made[-1]

        search = KNNSearch(train, val, CLS, TablePlan(cleanings=cleanings), parts=parts)
        trainer().validate(search, verbose=False)
        return search.result("features")

    first = run(("raw",))
    text = (tmp_path / "parts").read_text()
    true = f'"top1": {first["table"][0]["top1"]}'
    assert true in text
    (tmp_path / "parts").write_text(text.replace(true, '"top1": 0.123456'))
    both = run(("raw", "zscore"))
    assert both["table"][0]["top1"] == 0.123456
    assert list(made[-1].done) == ["raw", "zscore"]
    assert run(("zscore", "raw"))["table"] == both["table"][4:] + both["table"][:4]
    other = run(("raw", "zscore"), settings="others")
    assert other["table"][0] == first["table"][0]
    assert other["table"][4:] == both["table"][4:]


def test_rows_come_from_the_disk_by_their_numbers(tmp_path):
    train, val = bank(), bank(Q, 10)
    x = train.x[CLS].numpy()
    np.save(tmp_path / "0.npy", x[::2])
    np.save(tmp_path / "1.npy", x[1::2])
    part, row = np.arange(N) % 2, np.arange(N) // 2
    rows = StoredRows([tmp_path / "0.npy", tmp_path / "1.npy"], part, row, F)
    stored = Bank(StoredFeatures({CLS: rows}), train.y, train.keys)
    assert table(stored, val, FULL)["table"] == table(train, val, FULL)["table"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"metrics": ()}, "metrics is .*one or more, each once"),
        ({"metrics": ("cosine", "cosine")}, "each once"),
        ({"cleanings": ("raw", "white")}, "cleaning is 'white'"),
        ({"ks": ()}, "ks is .*one or more"),
        ({"ks": (0, 3)}, "allowed are 1 and more"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"weights": "exp", "metrics": ("cosine", "l2")}, "set weights to auto or uniform"),
    ],
)
def test_plans_that_cannot_be_are_named(plan: dict, message: str):
    with pytest.raises(UserError, match=message):
        TablePlan(**plan)


@pytest.mark.parametrize(("name", "word"), [("metrics", ("manhattan",)), ("weights", "linear")])
def test_words_are_checked_where_types_are_not(name: str, word):
    plan = TablePlan()
    object.__setattr__(plan, name, word)
    with pytest.raises(UserError, match=f"there are .*; set {name}"):
        plan.__post_init__()


def test_banks_that_cannot_be_are_named():
    train, val = bank(), bank(Q, 10)
    with pytest.raises(UserError, match="no image of val has a label"):
        KNNSearch(train, bank(0), CLS, TablePlan())
    with pytest.raises(UserError, match=r"cleaning top9 removes channels; .* allow 1\.\.8"):
        KNNSearch(train, val, CLS, TablePlan(cleanings=("top9",)))
    with pytest.raises(UserError, match=f"k is {N}; .* 1..{N - 1} without the image itself"):
        KNNSearch(train, None, CLS, TablePlan(ks=(N,), leave_one_out=True))
    with pytest.raises(UserError, match=r"limit_val_batches is 2; .* set --limit"):
        trainer(limit_val_batches=2).validate(KNNSearch(train, val, CLS, TablePlan()))
    broken = bank(Q, 10)
    broken.x[CLS][3, 2] = torch.inf
    with pytest.raises(UserError, match="features of queries are not finite"):
        table(train, broken, TablePlan())
    one = Bank({CLS: train.x[CLS]}, torch.zeros_like(train.y), train.keys)
    with pytest.raises(UserError, match="needs at least two"):
        table(one, one, TablePlan())
