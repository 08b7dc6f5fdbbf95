"""An exported backbone is the backbone, for us and for timm."""

import os
import resource
import stat
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from contramask.checkpoints.export import (
    SHEET,
    WEIGHTS,
    ExportError,
    export_backbone,
    load_backbone,
)
from contramask.models.vit import VisionTransformer
from contramask.types import UserError

DATA = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1], "size": 40}
TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}


def make(**kwargs) -> VisionTransformer:
    torch.manual_seed(3)
    arguments = {"img_size": (32, 40), "patch_size": 8, "timm": TINY} | kwargs
    return VisionTransformer("vit_tiny_patch16_224", **arguments).eval()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk():
    """No file of this process may have more than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Died(BaseException):
    """Stands for kill -9: no handler of an `Exception` sees it."""


@pytest.fixture
def dies(monkeypatch):
    """`dies(n)`: the process ends before it renames its n-th file from now."""
    rename = os.replace

    def arm(number: int) -> None:
        calls = iter(range(1, 100))

        def replace(source, target) -> None:
            if next(calls) == number:
                raise Died
            rename(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return arm


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"positions": "sincos", "init": "mae"},
        {"timm": TINY | {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1}},
        {"positions": "relative", "init": "simmim"},
    ],
)
def test_comes_back_the_same(tmp_path, image, kwargs):
    backbone = make(**kwargs)
    if backbone.bias is not None:
        torch.nn.init.normal_(backbone.bias.relative_position_bias_table)
    export_backbone(backbone, tmp_path, net="student", step=7, data=DATA)
    again, sheet = load_backbone(tmp_path)
    assert sheet["step"] == 7
    assert sheet["data"] == DATA
    assert torch.equal(again.eval()(image).patch, backbone(image).patch)
    assert not list(tmp_path.glob("*.tmp*"))


def test_timm_loads_it_with_the_same_features(tmp_path, image):
    backbone = make(positions="sincos_rows_first", init="mocov3")
    export_backbone(backbone, tmp_path, net="teacher", step=1, data=DATA)
    recipe = yaml.safe_load((tmp_path / SHEET).read_text())["timm"]
    vit = timm.create_model(recipe["name"], **recipe["arguments"])
    vit.load_state_dict(load_file(tmp_path / WEIGHTS), strict=True)
    tokens = backbone(image)
    found = vit.eval().forward_features(image)
    torch.testing.assert_close(
        found, torch.cat([tokens.prefix, tokens.patch], 1), atol=1e-6, rtol=0
    )


def test_damage_is_named(tmp_path):
    backbone = make()
    weights = export_backbone(backbone, tmp_path, net="student", step=1, data=DATA)
    state = load_file(weights)
    state["norm.bias"] += 1
    save_file(state, weights)
    with pytest.raises(UserError, match=r"another checksum"):
        load_backbone(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no backbone\.safetensors"):
        load_backbone(tmp_path)


def test_a_sheet_cannot_name_foreign_classes(tmp_path):
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    sheet = yaml.safe_load((tmp_path / SHEET).read_text())
    sheet["class_path"] = "os.system"
    (tmp_path / SHEET).write_text(yaml.safe_dump(sheet))
    with pytest.raises(UserError, match=r"contramask\.models"):
        load_backbone(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    sheet = yaml.safe_load((tmp_path / SHEET).read_text())
    sheet["init_args"]["timm"]["depth"] = 2
    (tmp_path / SHEET).write_text(yaml.safe_dump(sheet))
    with pytest.raises(UserError, match=r"does not fit"):
        load_backbone(tmp_path)


def test_what_is_not_there_is_named_as_it_was_given(tmp_path):
    with pytest.raises(UserError, match=rf"there is no {tmp_path}/nope: give a run directory"):
        load_backbone(tmp_path / "nope")
    with pytest.raises(UserError, match=rf"{tmp_path} has no backbone\.yaml.*every export\.every"):
        load_backbone(tmp_path)


def test_others_may_read_it_who_may_read_the_sheet(tmp_path):
    before = os.umask(0o022)
    try:
        weights = export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (weights, tmp_path / SHEET)]
    assert modes == [0o644, 0o644]


def test_a_full_disk_is_told_in_a_line_and_leaves_what_was_there(tmp_path, full_disk):
    old = make()
    export_backbone(old, tmp_path, net="student", step=1, data=DATA)
    full_disk(6000)
    with pytest.raises(ExportError, match=r"^.*safetensors could not be written: .*too large.*$"):
        export_backbone(make(init="mae"), tmp_path, net="student", step=2, data=DATA)
    assert names(tmp_path) == [WEIGHTS, SHEET]
    again, sheet = load_backbone(tmp_path)
    assert sheet["step"] == 1
    assert torch.equal(again.vit.cls_token, old.vit.cls_token)


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"file/backbone\.safetensors could not be written"):
        export_backbone(make(), tmp_path / "file", net="student", step=2, data=DATA)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_killed_at_any_rename_there_is_a_whole_backbone(
    tmp_path, dies, monkeypatch, links, first, second
):
    """Renamed are the second name, unless it is needed still, the weights, and the sheet."""

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    nets = [make(init=init) for init in ("mae", "mocov3", "simmim", "timm")]
    for net, seed in zip(nets, range(4), strict=True):
        torch.nn.init.constant_(net.vit.norm.bias, seed)
    export_backbone(nets[0], tmp_path, net="student", step=0, data=DATA)
    for step, number in ((1, first), (2, second)):
        dies(number)
        with pytest.raises(Died):
            export_backbone(nets[step], tmp_path, net="student", step=step, data=DATA)
        again, sheet = load_backbone(tmp_path)
        assert again.vit.norm.bias.unique().tolist() == [sheet["step"]] == [0]
    dies(0)
    export_backbone(nets[3], tmp_path, net="student", step=3, data=DATA)
    again, sheet = load_backbone(tmp_path)
    assert again.vit.norm.bias.unique().tolist() == [sheet["step"]] == [3]
    assert names(tmp_path) == [WEIGHTS, SHEET]


def test_what_a_second_name_of_long_ago_says_is_not_kept(tmp_path, dies):
    """A process that died before it removed it, then another one between two renames."""
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    (tmp_path / f"{WEIGHTS}.before").write_bytes(b"of long ago")
    dies(3)
    with pytest.raises(Died):
        export_backbone(make(init="mae"), tmp_path, net="student", step=2, data=DATA)
    assert load_backbone(tmp_path)[1]["step"] == 1


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    events: list[str] = []
    sync, rename = os.fsync, os.replace

    def told(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"name {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "replace", renamed)
    export_backbone(make(), tmp_path, net="student", step=1, data=DATA)
    assert events == [
        *(f"sync {name}.tmp.{os.getpid()}" for name in (WEIGHTS, SHEET)),
        *(f"name {WEIGHTS}", f"sync {tmp_path.name}"),
        *(f"name {SHEET}", f"sync {tmp_path.name}"),
    ]
