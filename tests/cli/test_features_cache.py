"""Where a command keeps the features it reads."""

import pytest

from contramask.cli import features_cache
from contramask.cli.features_cache import agreed
from contramask.distributed import rank
from tests.training.test_linear import trainer

pytestmark = [
    # pytorch-lightning's own use of torch.utils._pytree
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\):FutureWarning"),
    # its processes are forked, which is the quickest way to have two
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_all_ranks_learn_what_the_first_one_brings(monkeypatch, tmp_path):
    """Ranks that were started apart, as by torchrun, bring each its own."""
    plain = features_cache._Agreement.on_validation_epoch_end

    def apart(self) -> None:
        self.text = f"of rank {rank()}"
        plain(self)
        (tmp_path / str(rank())).write_text(self.text)

    monkeypatch.setattr(features_cache._Agreement, "on_validation_epoch_end", apart)
    assert agreed(trainer(), "alone") == "alone"
    assert agreed(trainer(devices=2, strategy="ddp_fork"), "forked") == "forked"
    assert [(tmp_path / name).read_text() for name in "01"] == ["of rank 0", "of rank 0"]
