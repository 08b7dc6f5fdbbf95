"""The verbs: help at once and without torch, mistakes in one line."""

import subprocess
import sys

import pytest

from contramask.cli.main import VERBS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "contramask", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_does_not_import_torch():
    code = (
        "import sys; from contramask.cli.main import main; main(['--help']); "
        "heavy = {'torch', 'pytorch_lightning', 'timm', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert verb in done.stdout


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("contramask 0.")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["xyz"], "verbs are quickstart"),
        (["probe", "lineer", "runs/x"], "did you mean 'linear'"),
        (["pretrain", "-c", "none.yaml"], "none.yaml"),
        (["pretrain", "--model.optim.clipp=1"], "did you mean clip"),
        (["pretrain", "--model.wieghts=1"], "did you mean model.weights"),
        (["pretrain", "--trainer.max_step=1"], "did you mean trainer.max_steps"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("contramask: error: ")
    assert error.count("\n") == 1


def test_the_module_runs_as_the_script_does():
    done = run("--help")
    assert done.returncode == 0
    assert "quickstart" in done.stdout
    done = run("nonsense")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
