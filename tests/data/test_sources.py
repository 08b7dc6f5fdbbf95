import logging
import os

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contramask.data import storage
from contramask.data.sources import braces, expand, sources
from contramask.data.storage import Span
from contramask.types import UserError
from tests.data.server import serving


@pytest.fixture
def folder(tmp_path):
    for name in ("b-1.tar", "a-0.tar", "a-1.tar", "note.txt"):
        (tmp_path / name).write_bytes(b"x" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a-0.tar").write_bytes(b"y")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x", ["x"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("a{x,y}b{1..2}", ["axb1", "axb2", "ayb1", "ayb2"]),
        ("{a,{b,c}d}e", ["ae", "bde", "cde"]),
        ("{a}{}", ["{a}{}"]),
        ("{a", ["{a"]),
        ("{,x}y", ["y", "xy"]),
    ],
)
def test_braces_as_in_a_shell(pattern, expected):
    assert list(braces(pattern)) == expected


@given(st.text("{},.a01", max_size=9))
def test_braces_never_fail(text):
    assert list(braces(text))


def test_kinds_of_patterns(folder):
    def names(pattern):
        return [os.path.relpath(p, folder) for p in expand(pattern)]

    assert names(f"{folder}") == ["a-0.tar", "a-1.tar", "b-1.tar"]
    assert names(f"{folder}/*-1.tar") == ["a-1.tar", "b-1.tar"]
    assert names(f"{folder}/b-1.tar::{folder}/a-{{0..1}}.tar") == ["b-1.tar", "a-0.tar", "a-1.tar"]
    assert names([f"file://{folder}/{{a,sub/a}}-0.tar"]) == ["a-0.tar", "sub/a-0.tar"]


def test_home_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert expand("~/b-*.tar") == [f"{folder}/b-1.tar"]


def test_weights_make_sources(folder):
    spec = {f"{folder}/a-*.tar": 3.0, f"{folder}/b-*.tar": 1.0}
    found = sources(spec)
    assert [(s.name, len(s.shards), s.weight) for s in found] == [
        (f"{folder}/a-*.tar", 2, 3.0),
        (f"{folder}/b-*.tar", 1, 1.0),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/*.tar", r"data.train: no shards match nowhere/\*.tar"),
        ("FOLDER/a-{0..3}.tar", r"2 of the 4 shards .* are missing: .*a-2.tar, .*a-3.tar"),
        ("FOLDER/empty*", "no shards match"),
        ([], "names no shards"),
        ("", "names no shards"),
        (["FOLDER/a-0.tar", "FOLDER/a-*.tar"], "a-0.tar is listed twice"),
        ({"FOLDER/a-0.tar": 0.0}, "weight of .*a-0.tar is 0.0; weights are positive"),
        ({"FOLDER/a-0.tar": float("nan")}, "weight of .*a-0.tar is nan"),
        ("pipe:cat a.tar", "would run a shell command.*data.streaming.allow_pipe"),
        ("teleport://x/a.tar", "teleport.*allowed are https, s3, gs and paths"),
        ("a-{0..99999999}.tar", "names more than 1000000 shards"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, spec, message):
    def here(text):
        return text.replace("FOLDER", str(folder))

    if isinstance(spec, str):
        spec = here(spec)
    elif isinstance(spec, dict):
        spec = {here(k): v for k, v in spec.items()}
    else:
        spec = [here(x) for x in spec]
    with pytest.raises(UserError, match=message) as caught:
        sources(spec)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    def absent(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(storage, "filesystem", absent)
    with pytest.raises(UserError, match=r"install contramask\[s3\]"):
        expand("s3://bucket/a.tar")


def test_pipe_runs_only_when_allowed(folder):
    (url,) = expand(f"pipe:cat {folder}/a-0.tar", allow_pipe=True)
    with storage.open_stream(url) as stream:
        assert stream.read() == b"x" * 10
    with storage.open_stream("pipe:exit 3") as stream, pytest.raises(OSError, match="code 3"):
        stream.read()


def test_a_closed_pipe_leaves_no_process():
    before = set(psutil.Process().children())
    with storage.open_stream("pipe:echo started; cat /dev/zero") as stream:
        assert stream.read(7) == b"started"
        assert len(set(psutil.Process().children()) - before) == 1
    assert set(psutil.Process().children()) <= before


# ---- bytes ----------------------------------------------------------------------------------

SPANS = st.lists(st.builds(Span, st.integers(0, 300), st.integers(0, 90)), max_size=8)


@given(spans=SPANS)
def test_spans_are_what_slices_are(spans, tmp_path_factory):
    data = bytes(i * 7 % 251 for i in range(256))
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(data)
    assert storage.read(str(path), spans) == [data[s.start : s.start + s.length] for s in spans]


def test_http_reads_ranges_and_joins_neighbours(tmp_path):
    data = os.urandom(9_000_000)
    (tmp_path / "x.tar").write_bytes(data)
    spans = [Span(8_000_000, 1000), Span(100, 50), Span(150, 50), Span(9_000, 10)]
    with serving(tmp_path) as server:
        url = f"{server.url}/x.tar"
        assert storage.size(url) == len(data)
        assert storage.read(url, spans) == [data[s.start : s.start + s.length] for s in spans]
        assert server.sent == [("x.tar", 100, 8910), ("x.tar", 8_000_000, 1000)]
        assert storage.sizes([url, f"{server.url}/y.tar"]) == [len(data), None]


def test_http_without_ranges_still_gives_the_right_bytes(tmp_path, caplog):
    (tmp_path / "x.tar").write_bytes(bytes(range(200)))
    with serving(tmp_path, ranges=False) as server, caplog.at_level(logging.WARNING):
        parts = storage.read(f"{server.url}/x.tar", [Span(10, 3)])
    assert parts == [bytes([10, 11, 12])]
    assert "ignores range requests" in caplog.text


def test_a_server_that_recovers_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    (tmp_path / "x.tar").write_bytes(b"0123456789")
    with serving(tmp_path) as server:
        url = f"{server.url}/x.tar"
        server.broken["x.tar"] = 2
        assert storage.read(url, [Span(2, 3)]) == [b"234"]
        server.broken["x.tar"] = 9
        with pytest.raises(OSError, match=r"x.tar: ClientResponseError: 503"):
            storage.read(url, [Span(2, 3)])
        with pytest.raises(FileNotFoundError):
            storage.read(f"{server.url}/y.tar", [Span(0, 1)])
