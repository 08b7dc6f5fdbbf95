import pytest

from contramask.cli.pack import main
from contramask.data.index import load_index


def test_index_and_check_by_command(images, tmp_path, capsys):
    main(["imagefolder", str(images), str(tmp_path / "s" / "train"), "--max-count", "25"])
    (tmp_path / "s" / "train.index.json").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["--check", str(tmp_path / "s")])
    assert ended.value.code == 1
    assert "train.index.json: there is no such index" in capsys.readouterr().out
    main(["index", str(tmp_path / "s")])
    assert "39 samples in 2 shards, indexed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--check", str(tmp_path / "s"), "--processes", "1"])
    assert ended.value.code == 0
    assert "all shards are as their index says" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--check", str(tmp_path / "s"), "--decode", "--processes", "1"])
    assert ended.value.code == 0
    shard = tmp_path / "s" / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        main(["--check", str(tmp_path / "s")])
    assert ended.value.code == 1
    assert "train-000001.tar: sha256" in capsys.readouterr().out


def test_an_index_out_of_the_folder(images, tmp_path):
    main(["imagefolder", str(images), str(tmp_path / "s" / "train")])
    main(["index", str(tmp_path / "s" / "train-*.tar"), "--out", str(tmp_path / "i.json")])
    index = load_index([str(tmp_path / "s" / "train-000000.tar")], file=str(tmp_path / "i.json"))
    assert index is not None
    assert index.samples == 39


@pytest.mark.parametrize(
    "argv",
    [
        ["imagefolder", "a", "b", "--max-mb", "0"],
        ["imagefolder", "a", "b", "--quality", "101"],
        ["torchvision", "a", "b", "--name", "mnist"],
        ["imagefolder"],
        ["index", "a", "--processes", "x"],
    ],
)
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_options_after_the_verb_win_and_before_it_count():
    from contramask.cli.pack import build_parser

    parser = build_parser()
    shared = ["imagefolder", "a", "b"]
    assert parser.parse_args(["--processes", "3", *shared]).processes == 3
    assert parser.parse_args([*shared, "--processes", "5"]).processes == 5
    assert parser.parse_args([*shared, "--no-shuffle"]).shuffle is False


def test_no_arguments_give_help(capsys):
    main([])
    assert "examples" in capsys.readouterr().out


def test_packing_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, contramask.cli.pack, contramask.data.pack, contramask.data.layouts;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
