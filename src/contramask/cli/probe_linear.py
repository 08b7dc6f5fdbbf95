"""`contramask probe linear`: what a linear layer reads from frozen features."""

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
from contramask.probes.linear import LinearRecipe
from contramask.training.clean_loaders import CleanImages
from contramask.training.linear import LinearEvaluation


def main(argv: Sequence[str]) -> None:
    """Probe; print the result and write it beside the run."""
    parser = build_parser()
    config = parser.parse_args(positional(argv))
    opened, feature = open_model(config.run, config.images), feature_of(config)
    parts = parser.build(config)
    evaluation = LinearEvaluation(
        opened.backbone, recipe=parts.recipe, feature=feature, transform=opened.transform
    )
    trainer = make_trainer(parts.trainer.as_dict())
    parts.data.images = opened.images
    trainer.validate(
        evaluation, datamodule=CleanImages(parts.data, limit=config.limit), verbose=False
    )
    result = {"probe": "linear", **opened.about, **evaluation.result}
    if trainer.is_global_zero:
        name = f"linear-{str(feature).replace('/', '-').replace('+', '-')}.json"
        out = config.out or opened.folder / name
        write_result(result, out)
        show_result(result, out)


def build_parser() -> Parser:
    """The options."""
    parser = probe_parser("linear", __doc__)
    add_feature(parser)
    parser.add_class_arguments(LinearRecipe, "recipe")
    return parser
