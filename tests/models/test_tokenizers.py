"""Tokenizers: shapes, words by hand, DALL-E's encoder written out, and files."""

import pytest
import torch
import torch.nn.functional as F

from contramask.functional.patches import unpatchify
from contramask.models.tokenizers.dalle import DalleTokenizer
from contramask.models.tokenizers.files import fingerprint, load_tokenizer, save_tokenizer
from contramask.models.tokenizers.patches import PatchTokenizer, patches_of
from contramask.models.tokenizers.tokenizer import Beside
from contramask.types import UserError
from tests.builders import randn


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dalle():
    torch.manual_seed(0)
    return DalleTokenizer(width=8, blocks=2, vocabulary=37).eval()


def published(net):
    """Its state dict with the names of the published weights."""
    return {
        k.replace(".weight", ".w").replace(".bias", ".b"): v.clone()
        for k, v in net.state_dict().items()
    }


def test_words_are_the_nearest_patches():
    codebook = uniform(11, 12)
    tokenizer = PatchTokenizer(codebook)
    assert (tokenizer.vocabulary, tokenizer.stride) == (11, 2)
    words = torch.arange(30).reshape(2, 15) % 11
    image = unpatchify(tokenizer.draw(words), 2, (3, 5))
    assert torch.equal(tokenizer(image), words)
    assert torch.equal(tokenizer(image + 0.005), words)
    assert torch.equal(patches_of(image, 2), codebook[words.flatten()])


def test_an_image_is_resized_to_the_grid():
    tokenizer, image = PatchTokenizer(uniform(11, 12)), uniform(2, 3, 24, 40)
    small = F.interpolate(image, size=(6, 10), mode="bicubic", antialias=True).clamp(0, 1)
    found = tokenizer.words(image, (3, 5))
    assert found.shape == (2, 15)
    assert torch.equal(found, tokenizer(small))
    assert torch.equal(tokenizer.words(small, (3, 5)), found)  # fits: nothing is done
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.words(image, (3, 5)), found)


def test_a_codebook_must_be_of_patches():
    with pytest.raises(UserError, match="have 13 numbers"):
        PatchTokenizer(uniform(4, 13))


def test_dalle_has_the_published_sizes():
    with torch.device("meta"):
        net = DalleTokenizer()
    shapes = {k: tuple(v.shape) for k, v in published_shapes(net).items()}
    assert (net.vocabulary, net.stride) == (8192, 8)
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_4.w"] == (2048, 512, 1, 1)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert "blocks.group_1.block_1.id_path.w" not in shapes
    assert sum(v.numel() for v in net.parameters()) == 53_786_240


def published_shapes(net):
    return {
        k.replace(".weight", ".w").replace(".bias", ".b"): v for k, v in net.state_dict().items()
    }


def test_dalle_written_out(dalle):
    """Pixels mapped to [0.1, 0.9], blocks by functions, the largest logit of each place."""
    state, x = published(dalle), 0.8 * uniform(2, 3, 24, 40) + 0.1

    def conv(name, x):
        weight = state[f"blocks.{name}.w"]
        return F.conv2d(x, weight, state[f"blocks.{name}.b"], padding=weight.shape[-1] // 2)

    x = conv("input", x)
    for g in range(1, 5):
        for b in (1, 2):
            at, rest = f"group_{g}.block_{b}", x
            for i in range(1, 5):
                rest = conv(f"{at}.res_path.conv_{i}", rest.clamp(min=0))
            own = conv(f"{at}.id_path", x) if f"blocks.{at}.id_path.w" in state else x
            x = own + rest / 64  # 8 blocks in all
        if g < 4:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    logits = conv("output.conv", x.clamp(min=0))
    torch.testing.assert_close(dalle.logits(uniform(2, 3, 24, 40)), logits, atol=1e-5, rtol=1e-4)
    words = dalle(uniform(2, 3, 24, 40))
    assert words.shape == (2, 3 * 5)
    for b in range(2):
        for n in range(15):
            row, column = divmod(n, 5)
            assert words[b, n] == logits[b, :, row, column].argmax()


@pytest.mark.parametrize("kind", ["plain", "wrapped", "prefixed", "safetensors"])
def test_dalle_from_a_file(dalle, kind, tmp_path):
    from safetensors.torch import save_file

    state, image = published(dalle), uniform(2, 3, 16, 24)
    path = tmp_path / ("e.safetensors" if kind == "safetensors" else "e.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "wrapped":
        torch.save({"state_dict": state}, path)
    else:
        torch.save({("encoder." * (kind == "prefixed")) + k: v for k, v in state.items()}, path)
    found = load_tokenizer(path)
    assert isinstance(found, DalleTokenizer)
    assert found.vocabulary == 37
    assert torch.equal(found(image), dalle(image))


def test_a_pickled_module_is_refused(dalle, tmp_path):
    torch.save(dalle, tmp_path / "encoder.pkl")  # as the encoder was published
    with pytest.raises(UserError, match=r"would run code.*weights_only=False.*state_dict\(\)"):
        load_tokenizer(tmp_path / "encoder.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.w": torch.zeros(1)}, r"no encoder of DALL-E.*the file has a.w"),
        ({"state_dict": {}}, r"the file has nothing"),
        ({"a": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "e.pt")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "e.pt")


def test_a_missing_layer_is_named(dalle, tmp_path):
    state = published(dalle)
    del state["blocks.group_3.block_2.res_path.conv_2.b"]
    torch.save(state, tmp_path / "e.pt")
    with pytest.raises(UserError, match=r"Missing key.*group_3.block_2.res_path.conv_2.bias"):
        load_tokenizer(tmp_path / "e.pt")


def test_codebooks_are_kept(tmp_path):
    tokenizer = PatchTokenizer(uniform(11, 27))
    save_tokenizer(tokenizer, tmp_path / "new" / "t.safetensors", perplexity=3.5)
    found = load_tokenizer(tmp_path / "new" / "t.safetensors")
    assert isinstance(found, PatchTokenizer)
    assert torch.equal(found.codebook, tokenizer.codebook)
    assert fingerprint(found) == fingerprint(tokenizer)
    assert fingerprint(PatchTokenizer(uniform(11, 27, seed=1))) != fingerprint(tokenizer)
    (tmp_path / "t.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no safetensors file"):
        load_tokenizer(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"no tokenizer at .*contramask tokenizer fit"):
        load_tokenizer(tmp_path / "absent.safetensors")


def test_what_is_beside_goes_along_and_is_no_part(dalle):
    owner = torch.nn.Module()
    owner.add_module("tokenizer", Beside(dalle.train()))
    assert not list(owner.parameters())
    assert not list(owner.buffers())
    assert not owner.state_dict()
    owner.double()
    assert {p.dtype for p in dalle.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in dalle.parameters())
    owner.train()
    assert not dalle.training
    owner.to("meta")
    assert {p.device.type for p in dalle.parameters()} == {"meta"}
    assert randn(1).device.type == "cpu"
