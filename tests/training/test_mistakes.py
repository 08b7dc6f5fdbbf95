"""Mistakes of users, told before anything is computed: what was given, what is allowed, where."""

import pytest

from contramask.types import Batch, UserError
from tests.builders import MASKS, ToyStream, fit, pretraining, randn


@pytest.mark.parametrize("weights", [{"contrast": 1.0}, {"contrast": 1.0, "masked": 1.0, "x": 1.0}])
def test_weights_name_the_objectives(weights):
    with pytest.raises(UserError, match=r"weights has \[.*objectives are \['contrast', 'masked'\]"):
        pretraining("hybrid", weights=weights)


@pytest.mark.parametrize("masks", [None, {}, MASKS])
def test_masks_are_those_that_are_read(masks):
    with pytest.raises(UserError, match=r"model.masks has \[.*masks are \['units'\]"):
        pretraining("hybrid", masks=masks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentum": 1.5}, r"momentum is 1.5; it is in \[0, 1\].*set model.momentum"),
        ({"momentum": -0.1}, r"momentum is -0.1"),
    ],
)
def test_how_teachers_move(given, message):
    with pytest.raises(UserError, match=message):
        pretraining(**given)


def test_a_stream_that_starts_elsewhere_is_refused():
    with pytest.raises(
        RuntimeError, match=r"the stream is at step 2 \(position 8\), training at 0"
    ):
        fit(pretraining("simmim"), stream=ToyStream(late=2))


def test_training_is_counted_in_steps():
    with pytest.raises(UserError, match=r"max_steps is -1; .*set trainer.max_steps"):
        fit(pretraining("simmim"), steps=-1, max_epochs=1)


def test_clipping_belongs_to_the_recipe():
    with pytest.raises(UserError, match=r"gradient_clip_val is 1.0; .*set model.optim.clip"):
        fit(pretraining("simmim"), gradient_clip_val=1.0)


class Sized(ToyStream):
    """A stream of crops of another size or number."""

    def __init__(self, views):
        super().__init__()
        self.views = views

    def __iter__(self):
        for batch in super().__iter__():
            yield Batch(views=self.views, label=batch["label"], position=batch["position"])


@pytest.mark.parametrize(
    ("recipe", "views", "message"),
    [
        ("simmim", {"global": (2, 16, 20)}, r"SimMIM reads view 'mild'; data.views has global"),
        ("simclr", {"global": (1, 16, 20)}, r"SimCLR compares 2 crops.*set data.views.global"),
        ("simclr", {"global": (2, 18, 20)}, r"18 x 20 pixels, no whole number of patches of 4"),
        ("simmim", {"mild": (1, 20, 20)}, r"20 x 20 pixels, mask 'units' is drawn for 16 x 20"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_first_forward(recipe, views, message):
    module, forwards = pretraining(recipe), []
    module.backbone.register_forward_hook(lambda *_: forwards.append(1))
    stream = Sized({k: randn(v, 4, 3, h, w) for k, (v, h, w) in views.items()})
    with pytest.raises(UserError, match=message):
        fit(module, stream=stream)
    assert not forwards


def test_views_that_nobody_reads_are_told(caplog):
    views = {"mild": randn(1, 4, 3, 16, 20), "middle": randn(1, 4, 3, 16, 20)}
    fit(pretraining("simmim"), stream=Sized(views), steps=1)
    assert "no objective reads the views middle," in caplog.text
    caplog.clear()
    fit(pretraining("simmim"), stream=Sized({"mild": views["mild"]}), steps=1)
    assert "no objective reads" not in caplog.text
