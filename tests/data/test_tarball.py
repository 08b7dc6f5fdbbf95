import hashlib
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contramask.data.tarball import SUFFIXES, Damaged, scan, split_name
from tests.data.tars import cut, header_of, numbered, spoil, write_tar

NAMES = st.text("ab./_Z0é", min_size=1, max_size=8).map(lambda s: s.strip("/") or "x")
LONG = st.sampled_from(["k" * 120, "d/" * 60 + "x", "é" * 90])
MEMBERS = st.lists(
    st.tuples(
        st.one_of(NAMES, LONG),
        st.sampled_from([".jpg", ".JPG", ".cls", ".seg.png", ".txt", ".pyd", "", "."]),
        st.binary(max_size=1300),
    ),
    max_size=9,
)


@given(MEMBERS, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(max_examples=80)
def test_scan_sees_what_tarfile_sees(tmp_path_factory, members, form):
    path = tmp_path_factory.getbasetemp() / "scan.tar"
    try:
        write_tar(path, [(n + s, d) for n, s, d in members], format=form)
    except ValueError:  # names too long for ustar
        return
    shard, _ = scan(str(path))
    keys, starts, ends = [], [], []
    with tarfile.open(path) as tar:
        for member in tar:
            named = split_name(member.name)
            if named is None or named[1] not in SUFFIXES:
                continue
            if not keys or keys[-1] != named[0]:
                keys.append(named[0])
                starts.append(member.offset)
                ends.append(0)
            ends[-1] = member.offset_data + -(-member.size // 512) * 512
    assert shard.starts.tolist() == starts
    assert (shard.starts + shard.lengths).tolist() == ends
    assert shard.bytes == path.stat().st_size
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.text("ab./_0", max_size=9))
def test_names_are_split_as_webdataset_splits_them(name):
    import re

    from webdataset.tariterators import base_plus_ext

    theirs = base_plus_ext(name)
    if theirs[0] is None or re.match(r"__[^/]*__($|/)", name):
        assert split_name(name) is None
    else:
        assert split_name(name) == (theirs[0], theirs[1].lower())


def test_foreign_members_and_links_are_no_samples(tmp_path):
    members = [
        ("__meta__/x.cls", b"1"),
        ("a.jpg", b"1"),
        ("a.pyd", b"bad" * 999),
        ("a.cls", b"4"),
        ("alone.pkl", b"bad"),
        ("b.seg.png", b"1"),
        ("b.jpg", b"2"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    shard, flaws = scan(str(path))
    assert shard.count == 2
    assert shard.suffixes == {"jpg": 2, "cls": 1, "seg.png": 1}
    assert shard.foreign == {"__meta__/x.cls": 1, "pkl": 1, "pyd": 1}
    assert shard.labels == 5
    assert flaws == ["b: no label"]


def test_flaws_of_samples_are_named(tmp_path):
    members = [
        ("a.jpg", b"1"), ("a.cls", b"0"),
        ("b.cls", b"1"),
        ("c.jpg", b"1"), ("c.jpg", b"2"), ("c.cls", b"x"),
        ("a.cls", b"2"),
    ]  # fmt: skip
    _, flaws = scan(str(write_tar(tmp_path / "x.tar", members)))
    assert flaws == [
        "b: no image",
        "c: two members .jpg",
        "c: its label is b'x', not a number from 0 on",
        "a: its members are not next to each other",
        "a: no image",
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: cut(p, header_of(p, 20) + 700), r"cut short inside the member .* 10"),
        (lambda p: cut(p, header_of(p, 20) + 100), r"cut short at byte \d+, after 10 samples"),
        (lambda p: cut(p, header_of(p, 20)), r"cut short at byte \d+, after 10 samples"),
        (lambda p: spoil(p, header_of(p, 20), os.urandom(512)), r"damaged header .* after 10"),
        (lambda p: spoil(p, header_of(p, 20), bytes(512)), r"zeroed header .* after 10 samples"),
        (lambda p: cut(p, 0), "empty at byte 0"),
        (lambda p: p.write_bytes(b"no tar at all" * 99), "not a tar"),
        (lambda p: p.write_bytes(bytes(range(256)) * 9), "not a tar"),
    ],
)
def test_damage_that_tarfile_passes_over(tmp_path, damage, message):
    members = [(n, d or b"1") for n, d in numbered(20, 40)]
    path = write_tar(tmp_path / "x.tar", [(n, d + b" " * 600) for n, d in members])
    damage(path)
    with pytest.raises(Damaged, match=message):
        scan(str(path))
