"""Mean over seeds of what `contramask evaluate` found: one row an objective.

    python scripts/seeds_of_evaluations.py OUT/evaluation.json ...

Models are named OBJECTIVE_sSEED. A cell is the mean over the seeds there are and the largest
distance of a seed from it; shares are in per cent.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from contramask.cli.evaluation_suite import load_suite
from contramask.cli.probing import is_share


def table(files: list[Path], suite: str) -> str:
    """Markdown."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    columns = {t: (e.name, v) for e in load_suite(suite) for t, v in e.columns.items()}
    for file in files:
        for model, results in json.loads(file.read_text("utf-8"))["results"].items():
            objective = model.rsplit("_s", 1)[0]
            for title, (entry, value) in columns.items():
                number = results.get(entry, {}).get("values", {}).get(value)
                if number is not None:
                    found[objective][title].append(100 * number if is_share(value) else number)
    shown = [t for t in columns if any(t in row for row in found.values())]
    lines = [f"| {' | '.join(['objective', *shown])} |", "|---" * (len(shown) + 1) + "|"]
    for objective, row in found.items():
        seeds = max(map(len, row.values()))
        cells = [_cell(row.get(title, []), seeds) for title in shown]
        lines.append(f"| {objective} ({seeds}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(numbers: list[float], seeds: int) -> str:
    if not numbers:
        return "-"
    mean = sum(numbers) / len(numbers)
    spread = max(abs(n - mean) for n in numbers)
    few = f" ({len(numbers)})" if len(numbers) < seeds else ""
    return f"{mean:.1f} ± {spread:.1f}{few}"


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="evaluation.json of each call")
    parser.add_argument("--suite", default="cifar10", help="of those evaluations")
    given = parser.parse_args()
    print(table(given.files, given.suite))


if __name__ == "__main__":
    main()
