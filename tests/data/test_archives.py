"""Members of archives and rows of arrays: the bytes that were put in, and one line for each thing that is refused."""

import io
import os
import struct
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from retentive.data import archives as module
from retentive.data.archives import Archives, Row, split

HELD = {f"{n}.bin": os.urandom(50 + n) for n in range(40)} | {"sub/a b.bin": b"deep", "empty": b""}
MOST = 1 << 20


def zipped(file: Path, held=HELD, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, raw in held.items():
            archive.writestr(name, raw)
    return file


def tarred(file: Path, held=HELD, mode="w", form=tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, mode, format=form) as archive:
        for name, raw in held.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return file


MAKERS = {".zip": zipped, ".tar": tarred}


@pytest.mark.parametrize("suffix", MAKERS)
def test_members_are_what_was_put_in(tmp_path, suffix):
    file, found = MAKERS[suffix](tmp_path / f"pics{suffix}"), Archives()
    assert {name: found.read(file / name, MOST) for name in HELD} == HELD
    assert found.read(tmp_path / f"no/../pics{suffix}" / "1.bin", MOST) is None  # no such folder: named by the caller
    (tmp_path / "no").mkdir()
    assert found.read(tmp_path / f"no/../pics{suffix}" / "1.bin", MOST) == HELD["1.bin"]  # as any file beside


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_any_form(tmp_path, form):
    held = {"./x.bin": b"x", "d/" + "n" * 90 + ".bin": b"long", "twice": b"first"}
    file = tarred(tmp_path / "a.tar", held, form=form)
    with tarfile.open(file, "a") as archive:  # a later member of the same name counts, as when it is unpacked
        member = tarfile.TarInfo("twice")
        member.size = 6
        archive.addfile(member, io.BytesIO(b"second"))
    found = Archives()
    assert found.read(file / "x.bin", MOST) == b"x" and found.read(file / "twice", MOST) == b"second"
    assert found.read(file / "d" / ("n" * 90 + ".bin"), MOST) == b"long"


@pytest.mark.parametrize("order", "CF")
def test_rows_are_what_was_put_in(tmp_path, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 256, (7, 5, 4), np.uint8), order=order)
    np.save(tmp_path / "a.npy", array)
    found = Archives()
    for n in range(7):
        values, rate = found.read(tmp_path / f"a.npy[{n}]", MOST)
        assert np.array_equal(values, array[n]) and rate is None
    assert found.read(tmp_path / "a.npy[3]@8000", MOST).rate == 8000


def test_a_file_of_that_name_is_that_file(tmp_path):
    (tmp_path / "a.npy[3]").write_bytes(b"x")
    np.save(tmp_path / "a.npy", np.zeros((9, 2)))
    (tmp_path / "pics.zip").mkdir()
    (tmp_path / "pics.zip/1.png").write_bytes(b"x")
    found = Archives()
    for name in ("a.npy[3]", "pics.zip/1.png", "pics.zip/2.png", "none.zip/2.png", "none.npy[1]", "none.png"):
        assert found.read(tmp_path / name, MOST) is None
    assert split(tmp_path / "a.npy[4]") == (tmp_path / "a.npy", "[4]")
    inner = zipped(tmp_path / "b.zip")
    assert split(inner / "sub/x.zip/1.png") == (inner, "sub/x.zip/1.png")


@pytest.mark.parametrize("suffix", MAKERS)
def test_members_that_are_refused(tmp_path, refuses, suffix):
    file, found = MAKERS[suffix](tmp_path / f"pics{suffix}", HELD | {"/etc/out": b"x", "../out": b"x"}), Archives()
    for name in ("none.png", "sub", "sub/a", "etc/out", "1.bin/x"):
        with refuses(f"{file / name}: not in the archive, which has 44 members, as '0.bin'; name one of its files"):
            found.read(file / name, MOST)
    for name in ("../out", "sub/../1.bin"):
        with refuses(f"{file / name}: '..' leads out of the archive; name a member of it"):
            found.read(file / name, MOST)
    with refuses(f"{file / '9.bin'}: has 59 bytes, more than 58; give it as a file beside the archive"):
        found.read(file / "9.bin", 58)
    assert found.read(file / "9.bin", 59) == HELD["9.bin"]
    empty = MAKERS[suffix](tmp_path / f"empty{suffix}", {})
    with refuses(f"{empty / 'a'}: not in the archive, which has no members; name one of its files"):
        found.read(empty / "a", MOST)


def test_links_of_a_tar_are_not_followed(tmp_path, refuses):
    (tmp_path / "secret").write_bytes(b"x")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret")
            archive.addfile(member)
    found = Archives()
    for name in ("soft", "hard", "pipe"):
        with refuses(f"{tmp_path / 'a.tar' / name}: a link, a folder or a sparse file; name a regular file"):
            found.read(tmp_path / "a.tar" / name, MOST)


def changed(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


def test_a_member_that_states_another_size_is_no_bomb(tmp_path, refuses, monkeypatch):
    """A member unpacks to no more bytes than it states, whatever is in it."""
    raw = zipped(tmp_path / "a.zip", {"a": bytes(50 << 20)}).read_bytes()
    assert len(raw) < 1 << 17
    for at in (raw.index(b"PK\x03\x04") + 22, raw.rindex(b"PK\x01\x02") + 24):  # both of its headers
        raw = changed(raw, at, struct.pack("<I", 1000))
    (tmp_path / "a.zip").write_bytes(raw)
    asked = []
    real = zipfile.ZipExtFile._read1
    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", lambda self, n: asked.append(n) or real(self, n))
    with refuses(f"{tmp_path / 'a.zip/a'}: damaged (Bad CRC-32 for file 'a'); zip the files again"):
        Archives().read(tmp_path / "a.zip/a", MOST)
    assert asked and max(asked) <= 1000
    with refuses("has 52,428,800 bytes, more than 1,048,576"):
        Archives().read(zipped(tmp_path / "b.zip", {"a": bytes(50 << 20)}) / "a", MOST)
    for method, number in ((zipfile.ZIP_BZIP2, 12), (zipfile.ZIP_LZMA, 14)):
        with refuses(f"a: compressed by method {number}; zip it by deflate, or store it"):
            Archives().read(zipped(tmp_path / f"{number}.zip", {"a": bytes(99)}, method) / "a", MOST)


def test_a_member_with_a_password(tmp_path, refuses):
    raw = zipped(tmp_path / "a.zip", {"a": b"text"}).read_bytes()
    for at in (raw.index(b"PK\x03\x04") + 6, raw.rindex(b"PK\x01\x02") + 8):
        raw = changed(raw, at, b"\x01")
    (tmp_path / "a.zip").write_bytes(raw)
    with refuses(f"{tmp_path / 'a.zip/a'}: encrypted; zip it without a password"):
        Archives().read(tmp_path / "a.zip/a", MOST)


def test_damaged_archives(tmp_path, refuses, monkeypatch):
    zip_, tar = zipped(tmp_path / "a.zip").read_bytes(), tarred(tmp_path / "a.tar").read_bytes()
    stored = zipped(tmp_path / "s.zip", method=zipfile.ZIP_STORED).read_bytes()
    at = tar.index(b"7.bin")  # the header of a member in the middle
    for name, raw, why in (
        ("0.zip", b"", "no zip, or damaged (File is not a zip file); zip the files again"),
        ("1.zip", zip_[: len(zip_) // 2], "no zip, or damaged (File is not a zip file); zip the files again"),
        ("2.zip", b"no zip" * 99, "no zip, or damaged"),
        ("3.zip", changed(zip_, 0, bytes(4)), "0.bin: damaged (Bad magic number for file header); zip the files again"),
        ("4.zip", changed(stored, 40, b"xx"), "0.bin: damaged (Bad CRC-32 for file '0.bin'); zip the files again"),
        ("0.tar", b"", "no plain tar, or damaged (cannot mmap an empty file); make it again, without compression"),
        ("1.tar", tar[: at + 700], "no plain tar, or damaged (unexpected end of data)"),
        ("2.tar", tar[: at + 200], f"no plain tar, or damaged (no header at byte {at:,})"),
        ("3.tar", changed(tar, at + 20, b"xx"), f"no plain tar, or damaged (no header at byte {at:,})"),
        ("4.tar", b"no tar" * 999, "no plain tar, or damaged"),
    ):
        (tmp_path / name).write_bytes(raw)
        found = Archives()
        for _ in range(2):  # the error is kept as well
            with refuses(why):
                found.read(tmp_path / name / "0.bin", MOST)
            monkeypatch.setattr(module, "_get", None)
        monkeypatch.undo()
    for mode, name in (("w:gz", "a.tar.gz"), ("w:bz2", "a.tar.bz2"), ("w:xz", "a.txz"), ("w:gz", "a.TGZ")):
        file = tarred(tmp_path / name, mode=mode)
        with refuses(f"{file}: compressed as a whole, so members cannot be found; use .zip, or .tar by itself"):
            Archives().read(file / "0.bin", MOST)
    with refuses("no plain tar, or damaged"):
        Archives().read(tarred(tmp_path / "gz.tar", mode="w:gz") / "0.bin", MOST)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_arrays_that_are_refused(tmp_path, refuses):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.uint8))
    np.save(tmp_path / "none.npy", np.uint8(3))
    np.save(tmp_path / "objects.npy", np.array([Trap()]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    found, write = Archives(), "; write it by np.save"
    for name, why in (
        ("a.npy[3]", "a.npy[3]: the array has 3 rows; name one from 0 to 2"),
        ("a.npy[99999999999999999]", "the array has 3 rows; name one from 0 to 2"),
        ("a.npy", f"names no row of the array; write its number, as {tmp_path / 'a.npy'}[0], from 0"),
        ("a.npy[-1]", "a.npy[-1]: names no row of the array"),
        ("a.npy[0:2]", "a.npy[0:2]: names no row of the array"),
        ("a.npy[1]@", "a.npy[1]@: names no row of the array"),
        ("a.npy[\u0661]", "names no row of the array"),
        ("none.npy[0]", "none.npy[0]: the array has no rows; give one of pictures or of sounds"),
        (
            "objects.npy[0]",
            "objects.npy: no array of numbers, or damaged (Array can't be memory-mapped: Python objects",
        ),
        ("short.npy[0]", "short.npy: no array of numbers, or damaged ("),
        ("several.npy[0]", "several.npy: no array of numbers, or damaged (it does not begin as one)" + write),
    ):
        with refuses(why):
            found.read(tmp_path / name, MOST)


@pytest.mark.skipif(sys.platform == "win32" or not os.getuid(), reason="root may read any file")
def test_a_file_without_permission(tmp_path):
    file = zipped(tmp_path / "a.zip")
    file.chmod(0)
    with pytest.raises(PermissionError, match=r"cannot read .*a\.zip: permission denied"):
        Archives().read(file / "0.bin", MOST)


def test_each_is_opened_once_and_few_stay_open(tmp_path, monkeypatch):
    opened, real = [], module._get
    monkeypatch.setattr(module, "_get", lambda file: opened.append(file.name) or real(file))
    monkeypatch.setattr(module, "KEPT", 2)
    files = [MAKERS[suffix](tmp_path / f"a{suffix}") for suffix in MAKERS]
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    found = Archives()
    for _ in range(3):
        for name in list(HELD)[:9]:
            assert [found.read(file / name, MOST) for file in files] == [HELD[name]] * 2
    assert opened == ["a.zip", "a.tar"]
    found.read(files[0] / "0.bin", MOST)
    assert isinstance(found.read(tmp_path / "a.npy[0]", MOST), Row)
    assert found.read(files[0] / "1.bin", MOST) == HELD["1.bin"] and opened == ["a.zip", "a.tar", "a.npy"]
    assert found.read(files[1] / "1.bin", MOST) == HELD["1.bin"]
    assert opened[3:] == ["a.tar"]  # unused for longest, so it was closed


@pytest.mark.parametrize("suffix", MAKERS)
def test_threads_share_an_archive(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 1)
    held = {f"{n}.bin": bytes([n]) * (1 << 16) for n in range(20)}
    files, found = [MAKERS[suffix](tmp_path / f"{n}{suffix}", held) for n in range(2)], Archives()
    names = [*held] * 20
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda n: found.read(files[n % 2] / names[n], MOST), range(len(names)))
        assert list(read) == [held[name] for name in names]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of other tests
@pytest.mark.parametrize("suffix", MAKERS)
def test_a_fork_reads_by_itself(tmp_path, suffix):
    """Parent and child read at once; with a shared position of the file each would move the other's."""
    held = {f"{n}.bin": bytes([n]) * (1 << 16) for n in range(20)}
    how = {"method": zipfile.ZIP_STORED} if suffix == ".zip" else {}
    file, found = MAKERS[suffix](tmp_path / f"a{suffix}", held, **how), Archives()

    def right() -> bool:
        try:
            return all(found.read(file / name, MOST) == raw for _ in range(30) for name, raw in held.items())
        except ValueError:
            return False

    assert right()
    child = os.fork()
    if not child:
        os._exit(0 if right() else 1)
    here = right()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and here
