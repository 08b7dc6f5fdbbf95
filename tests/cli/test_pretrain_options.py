"""What `contramask pretrain` makes of its options, and says of mistakes in them."""

import io

import numpy as np
import pytest
import yaml
from PIL import Image

from contramask.cli.main import main
from contramask.cli.pretrain import build_parser, pretrain
from contramask.data.index import build_index
from contramask.types import UserError
from tests.conftest import REPO
from tests.data.tars import write_tar

RECIPE = REPO / "configs" / "pretrain" / "mae_cifar10.yaml"
DEBUG = REPO / "configs" / "debug.yaml"
QUICK = ["-c", str(DEBUG), "--balance.every", "0", "--pictures.every", "0"]


def parsed(*options: str):
    parser = build_parser()
    return parser.parse_args(["-c", str(RECIPE), "--data.train", "x.tar", *options])


def told(capsys, *options: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main(["pretrain", "-c", str(RECIPE), *options])
    assert info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("contramask: error: ")
    return lines[-1]


def test_views_of_another_file_can_be_overridden():
    plain, changed = parsed(), parsed("--data.views.mild.size", "16", "--data.views.mild.flip", "0")
    assert plain.data.views["mild"].size == 32
    view = changed.data.views["mild"]
    assert (view.size, view.flip) == (16, 0)
    assert view.scale == plain.data.views["mild"].scale
    assert changed.data.views.keys() == {"mild"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "auto"),
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume=false"], False),
        (["--resume", "--name", "a"], True),
    ],
)
def test_resume_may_stand_alone(options, expected):
    assert parsed(*options).resume is expected or parsed(*options).resume == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--data.workers", "-1"], "data.workers -1; a batch has 1 image"),
        (["--trainer.accelerator", "mps"], "correct the options under --trainer"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps is -1; training is counted in steps"),
        (["--root", "FILE"], "cannot be made (Not a directory); set --root"),
        (["--resume"], "no run of debug in "),
    ],
)
def test_mistakes_are_one_line(capsys, data, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    options = [str(tmp_path / "file") if o == "FILE" else o for o in options]
    root = [] if "--root" in options else ["--root", str(tmp_path)]
    assert message in told(capsys, *QUICK, *data, *root, *options)


def test_a_corrected_mistake_keeps_its_name(capsys, data, tmp_path):
    common = [*QUICK, *data, "--root", str(tmp_path), "--name", "first"]
    assert "patch" in told(capsys, *common, "--model.backbone.patch_size", "5")
    main(["pretrain", "-c", str(RECIPE), *common])
    assert (tmp_path / "first" / "checkpoints" / "last.ckpt").exists()
    # Now something was trained: the name is taken.
    line = told(capsys, *common, "--model.optim.decay", "0.2")
    assert "model.optim.decay: 0.05 -> 0.2; put these back" in line


def test_resume_without_a_name_finds_the_run(data, tmp_path):
    parser = build_parser()
    options = ["-c", str(RECIPE), *QUICK, *data, "--root", str(tmp_path)]
    first = pretrain(parser, parser.parse_args(options))
    again = pretrain(parser, parser.parse_args([*options, "--resume"]))
    assert again.path == first.path
    assert again.checkpoint is not None
    with pytest.raises(UserError, match=r"no run of debug .* this configuration \(\d looked at\)"):
        pretrain(parser, parser.parse_args([*options, "--resume", "--seed", "7"]))


def test_images_smaller_than_a_patch_are_bad(capsys, tmp_path):
    def picture(side: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()

    members = [(f"p{n}.png", picture(3)) for n in range(64)]
    url = str(write_tar(tmp_path / "train-000000.tar", members))
    build_index([url])
    options = ["--data.train", url, "--root", str(tmp_path), "--data.streaming.grace", "3"]
    assert "too small" in told(capsys, *QUICK, *options)


def test_the_recorded_configuration_holds_the_views(data, tmp_path):
    options = [*QUICK, *data, "--root", str(tmp_path), "--name", "a"]
    main(["pretrain", "-c", str(RECIPE), *options, "--data.views.mild.flip", "0.25"])
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert written["data"]["views"]["mild"]["flip"] == 0.25
    assert list(written["data"]["views"]) == ["mild"]
