"""`contramask probe knn`: what the nearest neighbours of frozen features know."""

from collections.abc import Sequence

from contramask.cli.parser import Parser
from contramask.cli.probing import (
    add_feature,
    feature_of,
    make_trainer,
    open_model,
    positional,
    probe_parser,
    show_result,
    write_result,
)
from contramask.training.clean_loaders import CleanImages
from contramask.training.knn import KNNEvaluation


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    opened, feature = open_model(config.run, config.images), feature_of(config)
    parts = parser.build(config)
    evaluation = KNNEvaluation(
        opened.backbone,
        ks=tuple(config.ks),
        temperature=config.temperature,
        feature=feature,
        transform=opened.transform,
    )
    trainer = make_trainer(parts.trainer.as_dict())
    parts.data.images = opened.images
    trainer.validate(
        evaluation, datamodule=CleanImages(parts.data, limit=config.limit), verbose=False
    )
    result = {"probe": "knn", **opened.about, **evaluation.result}
    if trainer.is_global_zero:
        name = f"knn-{str(feature).replace('/', '-').replace('+', '-')}.json"
        out = config.out or opened.folder / name
        write_result(result, out)
        show_result(result, out)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("knn", __doc__)
    add_feature(parser)
    parser.add_argument("--ks", type=tuple[int, ...], default=(10, 20, 100, 200))
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    return parser
