"""Images in tar archives: found by their headers, read by position, and never anything but what the archive holds."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dinoreg.data import tar_index as module
from dinoreg.data.decode import BadImage
from dinoreg.data.shards import find_shards
from dinoreg.data.tar_index import TarSource, index_tars
from dinoreg.runtime.errors import UserError
from tests.miniatures import imagenet22k

Members = dict[str, bytes]


def pack(path: Path, members: Members, **options: object) -> None:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def source(root: Path, index_dir: Path | None = None) -> TarSource:
    shards = find_shards(f"{root}/*.tar")
    assert shards is not None
    return index_tars(shards, index_dir)


def contents(found: TarSource) -> dict[str, bytes]:
    return {found.name(index): found.read(index) for index in range(len(found))}


def unpacked(root: Path) -> dict[str, bytes]:
    """What tarfile and gzip make of every archive, by the name that messages use."""
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                data = file.read()
                found[f"{path}:{member.name}"] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return found


def settle(root: Path) -> None:
    past = time.time() - 60
    for folder, _, files in os.walk(root):
        for name in files:
            os.utime(Path(folder, name), (past, past))


def test_headers_give_the_bytes_that_tarfile_gives(tmp_path: Path) -> None:
    root = imagenet22k.write(tmp_path, per_class=4)
    expected = unpacked(root)
    assert len(expected) == 4 * 4 + 1
    found = source(root)
    assert contents(found) == expected
    assert list(contents(found)) == list(expected)


def test_a_packed_member_is_unpacked_but_never_without_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"x" * 5000)
    damaged = packed[:12] + b"\xff\xff\xff\xff" + packed[16:]
    pack(tmp_path / "a.tar", {"whole.jpg": packed, "short.jpg": packed[:-12], "damaged.jpg": damaged})
    found = source(tmp_path)
    assert found.read(0) == b"x" * 5000
    with pytest.raises(BadImage, match=r"damaged gzip data \(Compressed file ended"):
        found.read(1)
    with pytest.raises(BadImage, match="damaged gzip data"):
        found.read(2)
    monkeypatch.setattr(module, "MAX_BYTES", 4999)
    with pytest.raises(BadImage, match="unpacks to more than the limit of 4999 bytes"):
        found.read(0)


def test_a_member_above_the_limit_is_bad_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path / "a.tar", {"large.jpg": b"x" * 5000, "small.jpg": b"y"})
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    found = source(tmp_path)
    with pytest.raises(BadImage, match="5632 bytes, more than the limit of 2000"):
        found.read(0)
    assert found.read(1) == b"y"


def test_offsets_beyond_four_gibibytes_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:  # a hole of 5 GiB that takes no room on the disk
        hole = tarfile.TarInfo("hole.bin")
        hole.size = 5 << 30
        file.write(hole.tobuf(tarfile.GNU_FORMAT))
        file.seek(hole.size, os.SEEK_CUR)
        last = tarfile.TarInfo("last.jpg")
        last.size = 3
        file.write(last.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0") + bytes(1024))
    found = source(tmp_path)
    assert int(found.start[0]) == (5 << 30) + 512
    assert contents(found) == {f"{tmp_path}/a.tar:last.jpg": b"abc"}


def test_names_are_never_paths_and_only_regular_images_count(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as archive:
        for name, kind, target in (
            ("../secret.jpg", tarfile.REGTYPE, ""),
            ("/etc/passwd.jpg", tarfile.REGTYPE, ""),
            ("link.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")),
            ("hard.jpg", tarfile.LNKTYPE, "../secret.jpg"),
            ("folder.jpg", tarfile.DIRTYPE, ""),
            ("device.jpg", tarfile.CHRTYPE, ""),
            ("._hidden.jpg", tarfile.REGTYPE, ""),
            ("notes.txt", tarfile.REGTYPE, ""),
            ("n" * 150 + ".JPEG", tarfile.REGTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            data = b"inside" if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = contents(source(root))
    assert [name.split(":", 1)[1] for name in found] == ["../secret.jpg", "/etc/passwd.jpg", "n" * 150 + ".JPEG"]
    assert set(found.values()) == {b"inside"}


def test_many_threads_read_what_one_reads(tmp_path: Path) -> None:
    found = source(imagenet22k.write(tmp_path, per_class=5))
    order = np.random.default_rng(0).integers(0, len(found), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.read, order)) == [found.read(index) for index in order]


def test_a_kept_index_is_reused_until_an_archive_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = imagenet22k.write(tmp_path, per_class=3)
    settle(root)
    first = contents(source(root, index_dir=tmp_path / "kept"))
    found: list[str] = []
    genuine = module.members_of
    monkeypatch.setattr(module, "members_of", lambda path: found.append(path) or genuine(path))
    assert contents(source(root, index_dir=tmp_path / "kept")) == first
    assert found == []
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    for damage in (b"", b"not an index", whole[: len(whole) // 2]):
        file.write_bytes(damage)
        assert contents(source(root, index_dir=tmp_path / "kept")) == first
    assert len(found) == 3 * 4
    pack(root / "n01440764.tar", {"new.jpg": b"new"})
    assert f"{root}/n01440764.tar:new.jpg" in contents(source(root, index_dir=tmp_path / "kept"))


def test_the_stamp_changes_with_an_archive_and_the_fingerprint_with_the_names(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"x.jpg": b"1"})
    before = source(tmp_path)
    prints, stamp = before.fingerprint(), before.stamp()
    pack(tmp_path / "a.tar", {"x.jpg": b"2" * 600})
    after = source(tmp_path)
    assert (after.fingerprint(), after.stamp() == stamp) == (prints, False)
    pack(tmp_path / "a.tar", {"y.jpg": b"1"})
    assert source(tmp_path).fingerprint() != prints


def test_an_archive_that_changed_under_its_index_gives_bad_images_not_wrong_ones(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"x.jpg": b"1" * 700, "y.jpg": b"2" * 700})
    found = source(tmp_path)
    pack(tmp_path / "a.tar", {"w.jpg": b"3" * 1300, "v.jpg": b"4" * 700})
    with pytest.raises(BadImage, match="ends or goes on with another file"):
        found.read(0)
    with pytest.raises(BadImage, match="no tar header at byte 1536"):
        found.read(1)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        found.read(0)


def test_a_damaged_archive_is_named_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "a.tar"
    pack(whole, {"x.jpg": b"1" * 700, "y.jpg": b"2" * 700})
    data = whole.read_bytes()
    for damage in (data[:1600], data[:1536] + b"junk" * 128 + data[2048:], b"", gzip.compress(data), b"x" * 2000):
        whole.write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.tar is not a whole uncompressed tar archive") as caught:
            source(tmp_path)
        assert "\n" not in str(caught.value)


def extended(size: str, name: str = "b.png") -> bytes:
    """A member with a pax header that says another size; its own is 0."""
    record = f"{len(size) + len(' size=') + 3:02} size={size}\n".encode()
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    return header.tobuf() + record.ljust(512, b"\0") + tarfile.TarInfo(name).tobuf()


def test_headers_that_lead_back_or_astray_are_a_damaged_archive(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("sparse.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    cut = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    cut[482] = 1  # the map goes on in a block that is not there
    cut[148:156] = b"%06o\0 " % (256 + sum(cut[:148]) + sum(cut[156:]))
    plain = tarfile.TarInfo("a.png").tobuf()
    negative = tarfile.TarInfo("a.png")
    negative.size = -1024
    for number, data in enumerate(
        (
            plain + extended("-1536"),
            extended("-512") + plain,
            plain + negative.tobuf(tarfile.GNU_FORMAT),
            plain + bytes(cut),
            plain + extended("99999999999999999999999"),
            extended("0")[:1024] * 3000 + plain,
        )
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data + bytes(1024) * (number != 3))
        with pytest.raises(UserError, match=r"is not a whole uncompressed tar archive") as caught:
            module.members_of(str(path))
        assert "\n" not in str(caught.value)


def test_a_walk_keeps_no_members(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {f"{number}.png": b"x" for number in range(9)})
    names = [(member.name, len(archive.members)) for archive, member in module._walked(str(tmp_path / "a.tar"))]
    assert names == [(f"{number}.png", 0) for number in range(9)]


def test_no_archives_and_no_images_in_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\*\.tar matches no file"):
        source(tmp_path)
    pack(tmp_path / "a.tar", {"notes.txt": b"1"})
    with pytest.raises(UserError, match="no image files in the 1 archives"):
        source(tmp_path)
