"""`contramask tokenizer fit`: what it writes, that it is deterministic, and its mistakes."""

import json

import pytest
import torch
from safetensors import safe_open

from contramask.cli.tokenizer import main
from contramask.models.tokenizers.files import load_tokenizer
from contramask.types import UserError

SMALL = ["--data.images.size", "32", "--data.images.resize", "32", "--data.workers", "0"]
SMALL += ["--patch", "4", "--grid", "8", "--vocabulary", "23", "--steps", "30", "--limit", "60"]


def test_a_codebook_is_fitted(shards, tmp_path, capsys):
    """Twice the same bytes; another seed, other words; what is printed is in the header."""
    fit = ["fit", "--data.train", shards["train"], *SMALL]
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        main([*fit, "--seed", str(seed), "--out", str(tmp_path / f"{name}.safetensors")])
    one, again, other = (
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again
    assert one != other
    tokenizer = load_tokenizer(tmp_path / "one.safetensors")
    assert (tokenizer.vocabulary, tokenizer.stride) == (23, 4)
    words = tokenizer.get_buffer("codebook")
    assert words.min() >= 0
    assert words.max() <= 1
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["contramask tokenizer"])
    assert facts["images"] == 54  # a tenth of 60 is held out
    assert 8 < facts["perplexity"] <= facts["used"] <= 23
    assert facts["error"] < 0.7 * facts["variance"]
    said = " ".join(capsys.readouterr().out.split())
    assert "23 words of 4 x 4 pixels from 54 images" in said
    assert f"on 6 others {facts['used']} are used, perplexity {facts['perplexity']:.0f}" in said
    assert torch.isfinite(words).all()


def test_help(capsys):
    main([])
    assert "contramask tokenizer fit --data.train SHARDS --out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train"], "no command 'train' of tokenizer; there is fit"),
        (["fit", "--out", "t.pt"], r"--out is t.pt; give a name that ends in .safetensors"),
        (["fit", "--out", "t.safetensors", "--vocabulary", "1"], "--vocabulary is 1; give a"),
    ],
)
def test_mistakes(shards, options, message):
    more = ["--data.train", shards["train"]] if options[0] == "fit" else []
    with pytest.raises(UserError, match=message):
        main([*options, *more])
