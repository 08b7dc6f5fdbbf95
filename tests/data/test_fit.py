import shutil

import pytest
import pytorch_lightning as pl
import torch

from contramask.data.index import build_index
from contramask.data.module import Images, ImageShards
from contramask.data.views import Crops
from contramask.types import UserError
from tests.data.tars import photo, photo_shards, write_tar

VIEWS = {"one": Crops(number=2, size=12), "two": Crops(number=1, size=8)}


def module(train, **kwargs) -> ImageShards:
    shared = {"views": VIEWS, "batch_size": 6, "workers": 0, "images": Images(size=10, resize=10)}
    return ImageShards(train, **(shared | kwargs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    build_index(photo_shards(path, [40, 33]))
    build_index([str(write_tar(path / "val-000000.tar", _labelled(100, 17)))])
    return path


def _labelled(first, count):
    return [
        pair
        for n in range(first, first + count)
        for pair in ((f"v{n}.png", photo(n)), (f"v{n}.cls", f"{n % 3}".encode()))
    ]


class Seen(pl.LightningModule):
    """Writes down what a model would be trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.looked_at = [], []

    def training_step(self, batch, batch_idx):
        mean = float(batch["views"]["one"].mean())
        self.seen.append((batch["position"], tuple(batch["keys"]), mean))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.looked_at += batch["keys"]

    def configure_optimizers(self):
        # Asks for the loaders before the checkpoint's step is restored: a start that is read then
        # would be 0.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(data, folder, max_steps, *, accumulate=1, ckpt=None):
    model = Seen()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    return model, trainer


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (2, 3)])
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated")  # of Lightning's own
def test_a_trainer_resumes_with_the_next_samples(folder, tmp_path, workers, accumulate):
    def data():
        return module(f"{folder}/train-*.tar", val=f"{folder}/val-*.tar", workers=workers)

    straight, _ = run(data(), tmp_path, 7, accumulate=accumulate)
    assert [p for p, *_ in straight.seen] == [6 * i for i in range(7 * accumulate)]
    assert straight.looked_at == [f"v{n}" for n in range(100, 117)] * 3
    _, trainer = run(data(), tmp_path, 4, accumulate=accumulate)
    path = tmp_path / "at-4.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    resumed, _ = run(data(), tmp_path, 7, accumulate=accumulate, ckpt=path)
    assert resumed.seen == straight.seen[4 * accumulate :]


def test_a_mixture_that_moved_goes_on_and_other_data_is_refused(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "there")

    def mixture(path, order=(0, 1)):
        weights = {f"{path}/train-00000{i}.tar": (0.7, 0.3)[i] for i in order}
        return module(weights, val=f"{path}/val-*.tar")

    straight, _ = run(mixture(folder), tmp_path, 6)
    _, trainer = run(mixture(folder), tmp_path, 3)
    path = tmp_path / "at-3.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    resumed, _ = run(mixture(there), tmp_path, 6, ckpt=path)
    assert resumed.seen == straight.seen[3:]

    with pytest.raises(UserError, match=r"shard 0 was train-000000.tar .* and is train-000001.tar"):
        run(mixture(there, (1, 0)), tmp_path, 6, ckpt=path)

    build_index([str(write_tar(there / "train-000000.tar", _labelled(200, 40)))])
    with pytest.raises(UserError, match=r"shard 0 was train-000000.tar \(40 samples, sha256 "):
        run(mixture(there), tmp_path, 6, ckpt=path)


def test_without_an_index_the_readers_must_be_as_many(folder, tmp_path):
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        shutil.copy(folder / name, tmp_path)

    def data(workers=0):
        return module(f"{tmp_path}/train-*.tar", val=f"{folder}/val-*.tar", workers=workers)

    _, trainer = run(data(), tmp_path, 3)
    path = tmp_path / "at-3.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    with pytest.raises(UserError, match=r"depends on data.workers, which was 0 and is 2"):
        run(data(workers=2), tmp_path, 6, ckpt=path)
    build_index(f"{tmp_path}/train-*.tar")
    with pytest.raises(UserError, match=r"had no index and now has one"):
        run(data(), tmp_path, 6, ckpt=path)
