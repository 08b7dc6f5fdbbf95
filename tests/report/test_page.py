"""The page holds all in itself, shows every figure, and fits its window."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contramask.analysis.study import Study
from contramask.report.heat import cka_maps
from contramask.report.markup import to_palette
from contramask.report.page import write_report
from contramask.report.style import DPI
from tests.report.studies import NAMES, layers, reading, study

SECTIONS = [
    "What this says", "Summary", "Classes by depth", "Attention", "Frequencies", "Representation",
    "Invariance", "Similarity of models", "Notes", "Models and images",
]  # fmt: skip
CALLED = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, CALLED)), None)
MAGIC = {
    "data:image/png": b"\x89PNG", "data:image/jpeg": b"\xff\xd8", "data:image/svg+xml": b"<?xml"
}  # fmt: skip
WRITTEN = """
<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5);
  const boxes = document.querySelectorAll("p, li, dd, th, td, h1, h2, nav, figcaption, figure");
  const spills = [...boxes].filter(e => e.scrollWidth > e.clientWidth + 1);
  const out = document.createElement("pre"); out.id = "measured";
  out.textContent = JSON.stringify({
    document: document.documentElement.scrollWidth, window: innerWidth,
    images: [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.width]),
    wide: wide.map(e => e.outerHTML.slice(0, 80)),
    spills: spills.map(e => e.outerHTML.slice(0, 80)),
  });
  document.body.append(out);
})</script></body>"""


class Page(HTMLParser):
    """Headings, links, tags and the texts of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("report")
    write_report(study(), where)
    return where


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


def test_every_section_has_a_heading_and_a_link(page):
    assert page.texts["h2"] == SECTIONS
    assert page.texts["a"] == SECTIONS
    names = [attrs["id"] for attrs in page.all("section")]
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{name}" for name in names]
    assert not page.open


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert {tag for tag, _ in page.seen} & {"script", "link", "iframe", "object", "video"} == set()
    for _, attrs in page.seen:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "srcset", "style"):
            value = attrs.get(name) or ""
            assert value.startswith(("data:", "#", "background:#")) or not value
    assert not re.search(r"url\(|@import|https?://", page.texts["style"][0])


def test_every_figure_is_a_file_and_in_the_page(folder, page):
    files = {p.name for p in (folder / "figures").iterdir()}
    drawn = {name.removesuffix(".png") for name in files if name.endswith(".png")}
    assert len(drawn) == len(page.all("img")) == len(page.texts["figcaption"]) > 12
    assert drawn - {name.removesuffix(".svg") for name in files} == {"attention_pictures"}
    for attrs in page.all("img"):
        kind, _, data = (attrs["src"] or "").partition(";base64,")
        head = base64.b64decode(data)[:8]
        assert head.startswith(MAGIC[kind])
        assert attrs["alt"]


def test_a_palette_changes_no_colour_that_one_could_see(tmp_path):
    table = reading("c", {"layer_a": layers(40), "layer_b": layers(40)}, np.eye(40) * 0.5 + 0.2)
    path = cka_maps({NAMES[:2]: table}, tmp_path / "c.png", dict(zip(NAMES, NAMES, strict=True)))
    before, size = np.asarray(Image.open(path).convert("RGB")).astype(int), path.stat().st_size
    to_palette(path)
    with Image.open(path) as few:
        assert few.mode == "P"
        assert few.info["dpi"] == pytest.approx((DPI, DPI), rel=1e-3)
        assert np.abs(np.asarray(few.convert("RGB")) - before).max() <= 12
    assert path.stat().st_size < 0.6 * size


def test_the_page_is_small(tmp_path):
    """Three models as deep as ViT-B, with all nine sub-layers of every block."""
    path = write_report(study(12, 6, side=224), tmp_path)
    assert path.stat().st_size < 1_000_000
    assert sum(p.stat().st_size for p in (tmp_path / "figures").glob("*.png")) < 1_000_000


def test_names_and_notes_are_text_whatever_is_in_them(tmp_path):
    evil = '<img src=x onerror="alert(1)"> & </title><b>'
    made = Study({evil: {"path": evil, "depth": 2}}, {"shards": evil}, notes=[evil])
    made.add((evil,), [reading("attn/nmi", {"layer": layers(2)}, [0.1, 0.2], about=evil)])
    source = write_report(made, tmp_path).read_text("utf-8")
    found = Page(source)
    assert not [attrs for _, attrs in found.seen if "onerror" in attrs]
    assert not found.all("b")
    assert source.count(html.escape(evil)) >= 6
    assert found.texts["h1"][0].startswith("<img src=x")


def test_the_summary_has_a_row_for_each_model_and_dashes_where_nothing_is(page, folder):
    source = (folder / "report.html").read_text("utf-8")
    summary = source.partition('id="summary"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", summary)
    assert [html.escape(name) in row for name, row in zip(NAMES, rows, strict=True)] == [True] * 3
    assert [row.count("<td>\u2013</td>") for row in rows] == [
        0,
        0,
        2,
    ]  # distance, mutual information
    assert "<td>70.0 %<span" in rows[0]
    assert "<td>19.5<span" in rows[0]


def test_what_is_known_of_models_and_images_is_there(page):
    cells = page.texts["td"]
    assert {"runs/0/export", "student", "14 \u00d7 14", "21.6 M", "000000000000"} <= set(cells)
    assert "1,024" in page.texts["dd"]
    assert any("on 1,024 images of 224 pixels from data/imagenette" in p for p in page.texts["p"])
    assert any(text.startswith(f"{NAMES[2]} has 3 blocks") for text in page.texts["li"])


def test_captions_say_where_definitions_come_from(page):
    said = " ".join(page.texts["figcaption"])
    for source in ("2305.00729", "2304.13089", "2401.00463", "2403.02233"):
        assert source in said


def test_sections_without_readings_are_left_out(tmp_path):
    made = Study({"one": {"depth": 3}}, {})
    axes = {"feature": ("mean",), "layer": layers(3)}
    made.add(("one",), [reading("class/knn", axes, [[0.1, 0.2, 0.3]])])
    found = Page(write_report(made, tmp_path).read_text("utf-8"))
    assert found.texts["h2"] == [
        "What this says",
        "Summary",
        "Classes by depth",
        "Models and images",
    ]
    assert [p.name for p in (tmp_path / "figures").glob("*.png")] == ["classes.png"]
    bare = Page(write_report(Study({"one": {}}, {}), tmp_path / "bare").read_text("utf-8"))
    assert bare.texts["h2"] == ["Models and images"]
    assert not bare.all("img")


def test_a_study_that_was_read_again_gives_the_same_words(tmp_path):
    made = study()
    for who, known in made.readings.items():
        kept = ("class/", "agree/", "cka/flat/raw/same", "repr/rankme", "attn/to_cls")
        made.readings[who] = {n: r for n, r in known.items() if n.startswith(kept)}
    tmp_path.joinpath("read").mkdir()
    again = Study.read(made.write(tmp_path / "read")[0])
    made.pictures, made.points = {}, {}
    one, two = (write_report(s, tmp_path / n).read_bytes() for s, n in ((made, "a"), (again, "b")))
    assert one == two


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to show the page in")
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1024, 768)])
def test_a_browser_shows_every_figure_and_nothing_overflows(folder, page, tmp_path, width, height):
    measured = measure((folder / "report.html").read_text("utf-8"), tmp_path, width, height)
    assert measured["window"] == width
    assert measured["document"] <= width
    assert (measured["wide"], measured["spills"]) == ([], [])
    assert len(measured["images"]) == len(page.all("img"))
    for alt, complete, natural, shown in measured["images"]:
        assert complete, alt
        assert natural > 0, alt
        assert 200 < shown <= width, alt


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome to show the page in")
def test_the_browser_test_sees_what_overflows(tmp_path):
    """A page too wide, and a picture that is none: the measurements tell."""
    source = '<p style="width:3000px">x</p><img alt="a" src="data:image/png;base64,AA">'
    measured = measure(f"<body><main>{source}</main></body>", tmp_path, 1024, 768)
    assert measured["document"] > 1024
    assert measured["wide"]
    assert measured["images"][0][2] == 0


def measure(source: str, where: Path, width: int, height: int) -> dict:
    """What a browser says of the page: sizes, images, and what reaches out of its box."""
    copy = where / "measured.html"
    copy.write_text(source.replace("</body>", WRITTEN), "utf-8")
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={where / 'profile'}", "--virtual-time-budget=3000",
        f"--window-size={width},{height}", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', shown, re.DOTALL)
    assert found, shown[-500:]
    return json.loads(html.unescape(found[1]))
