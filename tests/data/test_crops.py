"""The configuration of views: what is read, what is refused, and how crops are drawn."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from contramask.data.crops import Crops, uniforms
from contramask.data.photometric import Photometric
from contramask.types import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "views"
COLOURS = Photometric(jitter=0.8, grey=0.2, blur=0.5, solarise=0.2)


def test_uniform_numbers_are_uniform_and_begin_alike():
    table = np.array([uniforms(n, "name", count=9) for n in range(5000)])
    assert table.min() >= 0
    assert table.max() < 1
    even = np.linspace(0, 1, 5000)[:, None]
    assert np.abs(np.sort(table, axis=0) - even).max() < 0.03
    assert np.abs(np.corrcoef(table.T) - np.eye(9)).max() < 0.06
    assert uniforms(3, "name", count=4) == table[3, :4].tolist()
    assert uniforms(3, "other", count=4) != table[3, :4].tolist()


def test_boxes_and_colours_are_independent():
    crops = Crops(number=1, photometric=(Photometric(jitter=1.0, grey=0.5, blur=1.0),))
    plans = [crops.plan("pair", key, 375, 500)[0] for key in range(4000)]
    boxes = np.array([[box.top, box.left, box.height, box.width, box.flip] for box, _ in plans])
    rows = np.array([row for _, row in plans])[:, [0, 1, 2, 3, 4, 8, 9]]
    assert np.abs(np.corrcoef(boxes.T, rows.T)[:5, 5:]).max() < 0.06


class Reads:
    """What a configuration is read into."""

    def __init__(self, views: dict[str, Crops]) -> None:
        self.views = views


def parsed(text: dict) -> dict[str, Crops]:
    parser = ArgumentParser()
    parser.add_class_arguments(Reads, "data")
    return parser.instantiate(parser.parse_object({"data": {"views": text}})).data.views


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_read(path):
    groups = parsed(yaml.safe_load(path.read_text()))
    assert set(groups) <= {"global", "mild", "local", "shifted"}
    assert all(len(g.plan(n, 1, 60, 80)) == g.number for n, g in groups.items())


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "name",
    ["mocov3", "simclr", "mae", "simmim", "maskfeat", "ijepa", "beit", "multicrop", "hybrid"],
)
def test_recipes_have_their_papers_views(name, small):
    text = (CONFIGS / f"{name}{'_cifar' * small}.yaml").read_text()
    assert "arXiv:" in text.split("\n\n")[0]
    groups = parsed(yaml.safe_load(text))
    assert set(groups) == {
        "mae": {"mild"},
        "simmim": {"mild"},
        "maskfeat": {"mild"},
        "ijepa": {"mild"},
        "beit": {"mild"},
        "multicrop": {"global", "local"},
        "hybrid": {"global", "mild"},
    }.get(name, {"global"})
    for kind, crops in groups.items():
        coloured = bool(crops.photometric) != (name == "beit")  # its one view is
        assert (crops.number, crops.size, coloured) == {
            "global": (2, 32 if small else 224, True),
            "mild": (1, 32 if small else 224, False),
            "local": (4 if small else 8, 16 if small else 96, True),
        }[kind]
        assert not small or all(p.blur == 0 for p in crops.photometric)


def test_the_hybrids_views_are_its_halves():
    for ending in ("", "_cifar"):
        hybrid, moco, simmim = (
            yaml.safe_load((CONFIGS / f"{name}{ending}.yaml").read_text())
            for name in ("hybrid", "mocov3", "simmim")
        )
        assert hybrid == moco | simmim


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"number": 0}, "number is 0"),
        ({"scale": (0.5, 0.2)}, "scale is"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"number": 3, "photometric": (COLOURS, COLOURS)}, "2 entries for 3 crops"),
        ({"size": 5, "photometric": (COLOURS,)}, "sigma is"),
        (
            {"size": 5, "photometric": (Photometric(blur=0.5, taps=11),)},
            "taps is 11 for crops of 5",
        ),
    ],
)
def test_wrong_views_are_told(wrong, message):
    with pytest.raises(UserError, match=message):
        Crops(**wrong)
