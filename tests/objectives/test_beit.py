"""BEiT: words of the whole image, loss over hidden patches, what a checkpoint holds."""

import math

import pytest
import pytorch_lightning as pl
import torch

from contramask.masks import BlockMasking
from contramask.models.tokenizers.files import save_tokenizer
from contramask.models.tokenizers.patches import PatchTokenizer
from contramask.models.tokenizers.tokenizer import Tokenizer
from contramask.objectives.beit import BEiT
from contramask.types import Batch, Spec, Step, Tokens, UserError
from tests.builders import fit, pretraining, randn

SPEC = Spec(dim=7, patch=4, grid=(4, 6), depth=1)
STEP = Step(2, 0.1)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Given(Tokenizer):
    """Words that were made elsewhere."""

    def __init__(self, ids: torch.Tensor, vocabulary: int):
        super().__init__()
        self.ids, self.vocabulary, self.stride = ids, vocabulary, 2
        self.seen: list[torch.Tensor] = []

    def forward(self, image):
        self.seen.append(image)
        return self.ids


def case(exact=True, **changes):
    torch.manual_seed(0)
    ids = torch.arange(6 * 24).reshape(6, 24) * 5 % 11
    tokenizer = Given(ids, 11)
    options = {"tokenizer": tokenizer, "vocabulary": 11, "mean": MEAN, "std": STD}
    objective = BEiT(SPEC, mask="blocks", **options | changes)
    masking = BlockMasking(SPEC, count=9, smallest=2, exact=exact)
    mask = masking.sample("blocks", 3, 2, STEP, "cpu")
    tokens = Tokens(randn(6, 1, 7), randn(6, 24, 7, seed=1), mask)
    views = {"mild": 0.3 * randn(2, 3, 3, 16, 24, seed=2)}
    batch = Batch(views=views, label=torch.zeros(3).long(), position=0)
    return objective, {objective.passes[0]: tokens}, batch, tokenizer


@pytest.mark.parametrize("exact", [True, False])
def test_loss_by_a_loop(exact):
    objective, feats, batch, tokenizer = case(exact)
    (tokens,) = feats.values()
    assert (tokens.mask.visible is None) != exact
    losses, right = [], []
    for i in range(6):
        for n in range(24):
            if tokens.mask.hidden[i, n]:
                scores = objective.head(tokens.patch[i, n]).tolist()
                word = int(tokenizer.ids[i, n])
                losses.append(math.log(sum(map(math.exp, scores))) - scores[word])
                right.append(scores[word] == max(scores))
    found = objective(feats, batch, STEP)
    assert found.value.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.logs["accuracy"].item() == pytest.approx(sum(right) / len(right))


def test_words_are_of_the_image_before_normalisation():
    objective, feats, batch, tokenizer = case()
    objective(feats, batch, STEP)
    (seen,) = tokenizer.seen
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    pixels = batch["views"]["mild"].flatten(0, 1) * std + mean
    assert seen.shape == (6, 3, 8, 12)  # two pixels a word
    small = torch.nn.functional.interpolate(pixels, (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen, small.clamp(0, 1))


@pytest.mark.parametrize("exact", [True, False])
def test_words_that_are_known(exact):
    """The tokenizer is not asked."""
    objective, feats, batch, tokenizer = case(exact)
    asked = objective(feats, batch, STEP)
    given = objective(feats, batch, STEP, words=tokenizer.ids)
    assert torch.equal(given.value, asked.value)
    assert len(tokenizer.seen) == 1
    other = objective(feats, batch, STEP, words=(tokenizer.ids + 1) % 11)
    assert not torch.equal(other.value, asked.value)


def test_an_untrained_head_knows_nothing():
    objective, feats, batch, _ = case()
    assert objective(feats, batch, STEP).value.item() == pytest.approx(math.log(11), rel=0.02)
    assert objective.head.weight.abs().max() <= 0.02
    assert not objective.head.bias.any()


def test_the_vocabularies_must_agree(tmp_path):
    with pytest.raises(UserError, match=r"has 11 words and the head 13; set .*vocabulary: 11"):
        case(vocabulary=13)
    path = tmp_path / "t.safetensors"
    save_tokenizer(PatchTokenizer(torch.rand(11, 12)), path)
    with pytest.raises(UserError, match=r"has 11 words and the head 8192"):
        BEiT(SPEC, mask="blocks", tokenizer=str(path))
    assert BEiT(SPEC, mask="blocks", tokenizer=str(path), vocabulary=11).head.out_features == 11


def test_only_the_head_is_trained_and_kept():
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(torch.rand(11, 12))
    objective = BEiT(SPEC, mask="blocks", tokenizer=tokenizer, vocabulary=11)
    assert {n for n, _ in objective.named_parameters()} == {"head.weight", "head.bias"}
    assert set(objective.state_dict()) == {"head.weight", "head.bias", "fingerprint"}
    objective.double()
    assert tokenizer.codebook.dtype == torch.float64


def test_another_tokenizer_cannot_continue_a_run():
    first, same, other = (
        BEiT(SPEC, mask="m", vocabulary=11, tokenizer=PatchTokenizer(randn(11, 12, seed=s)))
        for s in (0, 0, 1)
    )
    same.load_state_dict(first.state_dict())
    assert torch.equal(same.head.weight, first.head.weight)
    with pytest.raises(UserError, match=r"begun with another tokenizer.*init_args.tokenizer"):
        other.load_state_dict(first.state_dict())


def test_a_stopped_run_goes_on(tmp_path):
    straight = pretraining("beit", drop_path=0.1)
    fit(straight, steps=4)
    stopped, path = pretraining("beit", drop_path=0.1), tmp_path / "mid.ckpt"
    trainer = fit(stopped, steps=4, max_epochs=None, callbacks=[_Save(path, 2)])
    assert trainer.global_step == 4
    resumed = pretraining("beit", drop_path=0.1)
    fit(resumed, steps=4, ckpt=path)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not any("codebook" in name for name in torch.load(path, weights_only=True)["state_dict"])


class _Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_the_mean_over_the_world_is_that_of_one_process(monkeypatch):
    """Two ranks of three images whose masks hide different numbers of patches."""
    objective, feats, batch, tokenizer = case(exact=False)
    (tokens,), ids = feats.values(), tokenizer.ids
    counts = tokens.mask.hidden.unflatten(0, (2, 3)).sum((1, 2))
    assert counts[0] != counts[1]
    whole = objective(feats, batch, STEP).value.item()

    def of_rank(r: int) -> float:
        rows = slice(3 * r, 3 * r + 3)
        hidden = tokens.mask.hidden[rows]
        mask = tokens.mask._replace(hidden=hidden, targets=hidden[:, None])
        part = Tokens(tokens.prefix[rows], tokens.patch[rows], mask)
        views = {"mild": batch["views"]["mild"][r : r + 1]}
        tokenizer.ids = ids[rows]
        return objective({objective.passes[0]: part}, {**batch, "views": views}, STEP).value.item()

    monkeypatch.setattr("contramask.distributed.mean", lambda count: counts.float().mean())
    assert (of_rank(0) + of_rank(1)) / 2 != pytest.approx(whole, rel=1e-6)
    objective.average = "world"
    assert (of_rank(0) + of_rank(1)) / 2 == pytest.approx(whole, rel=1e-6)
