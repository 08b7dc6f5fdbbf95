"""Commands in documents, recipes and job scripts can be run as they stand there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "slurm", "scripts", "configs")
FILES = [
    REPO / "README.md",
    *(
        path
        for folder in FOLDERS
        for path in sorted((REPO / folder).rglob("*"))
        if path.suffix in (".md", ".sbatch", ".sh", ".yaml")
    ),
]
# A command, or what an array reads as one, is a recipe with what is around it.
RECIPE = re.compile(r"(?:^| )(configs/pretrain/\w+\.yaml)(?: |$)")


def commands(text: str) -> Iterator[str]:
    """Lines of code that name a recipe, with those that go on from them; comments are code."""
    bare = re.sub(r"^ *# ?", "", text, flags=re.MULTILINE)
    joined = re.sub(r" *\\\n *", " ", bare)
    for line in joined.splitlines():
        command = re.search(r"contramask pretrain|slurm/pretrain\.sbatch|^ *configs/", line)
        if command and RECIPE.search(line) and "`" not in line:
            yield line.strip()


FOUND = [(path.relative_to(REPO), line) for path in FILES for line in commands(path.read_text())]


def test_lines_are_found() -> None:
    text = """# A
    contramask pretrain -c configs/pretrain/a.yaml \\
        --data.train b
    #   sbatch slurm/pretrain.sbatch configs/pretrain/a.yaml \\
    #       --data.train b
    configs/pretrain/a.yaml --seed 0
    Save it as `configs/pretrain/a.yaml` and run it. A job is `contramask pretrain`.
    """
    assert list(commands(text)) == [
        "contramask pretrain -c configs/pretrain/a.yaml --data.train b",
        "sbatch slurm/pretrain.sbatch configs/pretrain/a.yaml --data.train b",
        "configs/pretrain/a.yaml --seed 0",
    ]
    where = {str(path) for path, _ in FOUND}
    documents = {"README.md", "slurm/README.md", "slurm/pretrain.sbatch", "slurm/array.sbatch"}
    assert where > documents | {f"docs/tutorials/{n}.md" for n in ("cluster", "own_data")}


@pytest.mark.parametrize(("path", "command"), FOUND, ids=lambda x: str(x).replace(" ", "_")[:60])
def test_a_documented_command_runs(path: Path, command: str) -> None:
    """No recipe knows where the images are; and a schedule is changed, not replaced by a number."""
    assert "--data.train " in command or command.startswith("STAGE="), path
    assert "--model.optim.lr " not in command, path
    for recipe in RECIPE.findall(command):
        assert (REPO / recipe).is_file(), path
