"""Views as functions of (image, key, name, crop), and the evaluation view."""

import io
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from contramask.data import decode as decoding
from contramask.data import views as viewing
from contramask.data.decode import BadImage
from contramask.data.photometric import FIELDS, Photometric
from contramask.data.views import IMAGENET_MEAN, IMAGENET_STD, Crops, EvalView, Views
from contramask.types import UserError

COLOURS = Photometric(jitter=0.8, grey=0.2, blur=0.5, solarise=0.2)
PAIR = Crops(number=2, size=21, photometric=(COLOURS,))
MILD = Crops(number=1, size=17, scale=(0.5, 1.0), interpolation="bilinear")


def picture(height: int = 67, width: int = 83) -> Image.Image:
    """Smooth, coloured, without symmetry."""
    y, x = np.mgrid[:height, :width] * 6 / max(height, width)
    waves = [np.sin(2 * x + k) * np.cos(y * (k + 1)) + x / 4 for k in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, -1) * 70 + 90, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


DATA = encode(picture())
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def make(on_device: bool = False, **groups: Crops) -> Views:
    return Views(groups, on_device=on_device, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def test_the_same_key_gives_the_same_bits():
    one, two = (make(pair=PAIR, mild=MILD)(DATA, 7) for _ in range(2))
    other = make(pair=PAIR, mild=MILD)(DATA, 8)
    for name in ("pair", "mild"):
        assert torch.equal(one.crops[name], two.crops[name])
        assert torch.equal(one.photometric[name], two.photometric[name])
        assert not torch.equal(one.crops[name], other.crops[name])
    assert one.crops["pair"].shape == (2, 3, 21, 21)
    assert one.photometric["pair"].shape == (2, len(FIELDS))
    assert one.crops["mild"].dtype == torch.uint8


def test_names_and_crops_draw_apart():
    example = make(one=PAIR, two=PAIR)(DATA, 7)
    first, second = example.crops["one"], example.crops["two"]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_what_is_added_moves_nobody():
    alone = make(pair=PAIR)(DATA, 7)
    more = Crops(number=3, size=21, photometric=(COLOURS,))
    crowd = make(mild=MILD, pair=more, again=PAIR)(DATA, 7)
    assert torch.equal(crowd.crops["pair"][:2], alone.crops["pair"])
    assert torch.equal(crowd.photometric["pair"][:2], alone.photometric["pair"])


def test_colours_do_not_move_boxes():
    plain = make(pair=Crops(number=2, size=21))(DATA, 7)
    shipped = make(on_device=True, pair=PAIR)(DATA, 7)
    assert torch.equal(plain.crops["pair"], shipped.crops["pair"])
    assert not torch.equal(make(pair=PAIR)(DATA, 7).crops["pair"], plain.crops["pair"])


def test_an_image_is_decoded_once(monkeypatch):
    calls = []
    decode = decoding.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        decoding.simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k)
    )
    make(pair=PAIR, again=PAIR, mild=MILD)(encode(picture(), "JPEG"), 3)
    assert len(calls) == 1


def test_large_images_are_decoded_smaller_where_no_crop_misses_it(monkeypatch):
    data = encode(picture(600, 800), "JPEG", quality=95)
    large = Crops(number=1, size=40, scale=(0.6, 1.0))
    sizes = []
    cut = viewing.geometry.cut

    def watched(image: np.ndarray, *args: object, **options: object) -> np.ndarray:
        sizes.append(image.shape)
        return cut(image, *args, **options)

    monkeypatch.setattr(viewing.geometry, "cut", watched)
    reduced = make(large=large)(data, 3).crops["large"].float()
    monkeypatch.setattr(viewing, "OVERSAMPLING", 100.0)
    whole = make(large=large)(data, 3).crops["large"].float()
    assert sizes == [(150, 200, 3), (600, 800, 3)]
    # The box is moved to whole pixels of the smaller image: a quarter of a final pixel at most.
    assert (reduced - whole).abs().mean() < 1.5


@pytest.mark.parametrize(
    "fine",
    [
        Crops(size=40, scale=(0.01, 0.01)),
        Crops(size=40, scale=(0.15, 0.15), ratio=(6.0, 6.0)),  # wide enough, but not high enough
    ],
)
def test_the_finest_crop_decides_how_small_the_image_may_be(monkeypatch, fine):
    data = encode(picture(600, 800), "JPEG")
    sizes = []
    cut = viewing.geometry.cut
    monkeypatch.setattr(
        viewing.geometry, "cut", lambda i, *a, **k: sizes.append(i.shape) or cut(i, *a, **k)
    )
    make(large=Crops(size=40, scale=(0.6, 1.0)), fine=fine)(data, 3)
    assert sizes == [(600, 800, 3)] * 2


def test_turned_images_are_cut_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture()
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    views = make(pair=PAIR)
    turned = views(encode(stored, exif=exif), 5).crops["pair"]
    assert torch.equal(turned, views(encode(upright), 5).crops["pair"])


def test_collate_is_crop_major():
    views = make(pair=PAIR, mild=MILD)
    examples = [views(DATA, key) for key in range(5)]
    crops, rows = views.collate(examples)
    assert crops["pair"].shape == (2, 5, 3, 21, 21)
    assert crops["mild"].shape == (1, 5, 3, 17, 17)
    assert rows["pair"].shape == (2, 5, len(FIELDS))
    for v in range(2):
        for b in range(5):
            assert torch.equal(crops["pair"][v, b], examples[b].crops["pair"][v])
            assert torch.equal(rows["pair"][v, b], examples[b].photometric["pair"][v])


def test_finish_normalises():
    views = make(mild=MILD)
    crops, rows = views.collate([views(DATA, key) for key in range(4)])
    expected = v2.functional.normalize(crops["mild"] / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(views.finish(crops, rows)["mild"], expected, atol=1e-5, rtol=0)
    plain = Views({"mild": MILD}, on_device=True, mean=ZERO, std=ONE)
    torch.testing.assert_close(plain.finish(crops, rows)["mild"], crops["mild"] / 255)


def test_device_and_worker_finish_alike():
    pair = Crops(number=2, size=32, photometric=(COLOURS, Photometric(jitter=1.0, blur=1.0)))
    finished = []
    for on_device in (True, False):
        views = Views(
            {"pair": pair}, on_device=on_device, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )
        finished.append(views.finish(*views.collate([views(DATA, key) for key in range(16)])))
    apart = (finished[0]["pair"] - finished[1]["pair"]).abs().mean((1, 2, 3, 4)) * 255
    assert apart.max() < 1.0
    flat = make(on_device=True, pair=Crops(number=2, size=32))
    untouched = flat.collate([flat(DATA, key) for key in range(16)])[0]["pair"] / 255
    assert (finished[0]["pair"] - untouched).abs().mean() * 255 > 10


def test_each_crop_has_its_own_colours():
    solarised = Photometric(solarise=1.0, threshold=0)
    views = make(pair=Crops(number=2, size=21, photometric=(Photometric(), solarised)))
    rows = views(DATA, 7).photometric["pair"]
    assert rows[:, FIELDS.index("threshold")].tolist() == [256, 0]


def test_flips_come_at_their_rate():
    left = Image.new("RGB", (40, 40))
    left.paste((255, 255, 255), (0, 0, 20, 40))
    views = make(mild=Crops(number=4, size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.3))
    data = encode(left)
    flipped = [views(data, n).crops["mild"][:, 0, 0, 0] == 0 for n in range(500)]
    assert torch.stack(flipped).float().mean() == pytest.approx(0.3, abs=0.03)


def test_views_travel_to_spawned_workers():
    views = make(pair=PAIR)
    copy = ForkingPickler.loads(ForkingPickler.dumps(views))
    assert torch.equal(copy(DATA, 7).crops["pair"], views(DATA, 7).crops["pair"])


def test_bad_images_are_passed_on():
    with pytest.raises(BadImage, match="not an image"):
        make(pair=PAIR)(b"nothing", 7)


@pytest.mark.parametrize(("height", "width"), [(67, 83), (90, 51), (300, 301), (20, 24)])
def test_the_evaluation_view_is_torchvisions(height, width):
    image = picture(height, width)
    ours = EvalView(56, resize=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    theirs = v2.Compose(
        [v2.Resize(64, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(56), v2.ToImage()]
    )
    square = ours(encode(image))
    assert square.shape == (3, 56, 56)
    assert (square.float() - theirs(image).float()).abs().mean() < 0.2
    expected = v2.functional.normalize(square / 255, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ours.normalise(square[None])[0], expected, atol=1e-5, rtol=0)


def test_the_evaluation_view_keeps_small_pictures_and_bounds_strips():
    same = EvalView(32, resize=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    image = picture(32, 32)
    assert np.array_equal(same(encode(image)).permute(1, 2, 0).numpy(), np.asarray(image))
    assert same(encode(Image.new("RGB", (20_000, 3)))).shape == (3, 32, 32)
    assert EvalView(224, mean=IMAGENET_MEAN, std=IMAGENET_STD).shorter == 256
    with pytest.raises(UserError, match="resize is 30 and size 32"):
        EvalView(32, resize=30, mean=IMAGENET_MEAN, std=IMAGENET_STD)
