"""Folders, lists and shards are found whole, and hostile or truncated tars refused.

Run: pytest tests/test_images_index.py       (a second; files are written to a temporary folder)
"""

import io
import os
import tarfile

import pytest

from config import UserError
from images import index
from images.index import index_folder, index_list, index_shards


def names_of(found):
    return [found.name(i) for i in range(len(found.labels))]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def write_tar(path, members):
    """Members by name; instead of bytes, type and target of something that is no file."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def test_a_folder_of_many_names_needs_little_more_than_their_letters():
    found = index.make_index([f"some/folder/{i:08d}.jpg" for i in range(10_000)], ["a"] * 10_000)
    assert found.names.nbytes + found.labels.nbytes == 10_000 * (24 + 4)
    assert found.name(0) == "some/folder/00000000.jpg"
    assert found.name(9_999) == "some/folder/00009999.jpg"


# ---- folders and lists --------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="may read every folder")
def test_unreadable_folders_are_left_out_with_a_warning(tmp_path, capsys):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a").chmod(0)
    assert names_of(index_folder(tmp_path)) == ["b/2.jpg"]
    (tmp_path / "a").chmod(0o700)
    assert "a is left out: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "classes", "labels"),
    [
        ("list.txt", "a.jpg\n\nsub/b c.jpg\n", [], [-1, -1]),
        ("list.csv", "a.jpg,c\u2028t\rsub/b c.jpg,dog", ["c\u2028t", "dog"], [0, 1]),
        ("list.csv", 'a.jpg,cat\n"sub/b c.jpg",dog\n', ["cat", "dog"], [0, 1]),
        ("list.csv", "Path,class\na.jpg,\nsub/b c.jpg,dog\n", ["dog"], [-1, 0]),
        ("list.tsv", "path\tlabel\na.jpg\t10\nsub/b c.jpg\t9\n", ["9", "10"], [1, 0]),
        ("list.csv", "a.jpg,nan\nsub/b c.jpg,Nan bread\n", ["Nan bread"], [-1, 0]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_give_paths_and_labels(tmp_path, name, text, classes, labels, encoding):
    touch(tmp_path, "a.jpg", "sub/b c.jpg")
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = index_list(tmp_path / name)
    assert names_of(found) == ["a.jpg", "sub/b c.jpg"]
    assert found.classes == classes and found.labels.tolist() == labels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.jpg,cat\na.jpg,dog\n", "line 2: a.jpg has another label further up"),
        (b"a.jpg,cat\n,dog\n", " does not exist; a line is path,label"),
        (b"b.jpg\n", "b.jpg does not exist; a line is path,label, and paths are relative to"),
        (b"a.jpg,cat,dog\n", "line 1: 3 columns; a line is path,label"),
        (b"label,path\ncat,a.jpg\n", "label does not exist; a line is path,label"),
        (b"a.jpg;cat\n", "a.jpg;cat does not exist; a line is path,label"),
        ("a.jpg\n".encode("utf-16"), "save it as UTF-8"),
        ("a.jpg\n".encode("utf-16-le"), "does not exist"),
        ("ä.jpg\n".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, data, message):
    touch(tmp_path, "a.jpg")
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        index_list(tmp_path / "list.csv")


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    touch(tmp_path, "1.jpg", "2.JFIF", "a/3.avif", "a/4.jp2", ".hidden.jpg", "README", "b/5.MOV")
    touch(tmp_path, "a/6.mov", "old.tar", "@eaDir/7.jpg", "b/__MACOSX/8.jpg", "9.heicx")
    found = index_folder(tmp_path)
    read = ["1.jpg", "2.JFIF", "a/3.avif", "a/4.jp2"]
    assert names_of(found) == read and found.classes == ["a"]
    assert found.left_out == {
        ".mov": 2, ".tar": 1, ".heicx": 1, "no ending": 1, "folder @eaDir": 1, "folder __MACOSX": 1,
    }  # fmt: skip
    assert index.kind_of("x.HEIC") == ".heic (pip install pillow-heif)"


# ---- shards -------------------------------------------------------------------------------------


def test_a_shard_gives_places_and_labels(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {"x/1.jpg": b"first", "x/1.cls": b"7", "x/1.json": b"{}", "2.PNG": b"second"},
    )
    found = index_shards([path])
    assert names_of(found) == ["x/1.jpg", "2.PNG"]
    assert found.classes == ["7"] and found.labels.tolist() == [0, -1]
    data = path.read_bytes()
    assert [data[o : o + n] for _, o, n in found.slices] == [b"first", b"second"]


def test_names_with_dots_keep_their_own_labels(tmp_path):
    """Up to the last dot, or to the first (WebDataset's rule) where there is no such label."""
    members = {"7.left.jpg": b"x", "7.right.png": b"x", "7.cls": b"4", "7.json": b"{}"}
    for i in range(3):
        members |= {f"a/scan.2024.{i}.png": b"x", f"a/scan.2024.{i}.cls": b"%d" % i}
    members |= {"b/scan.2024.0.png": b"x", "b/scan.2024.9.cls": b"9", "7.mp4": b"x"}
    found = index_shards([write_tar(tmp_path / "a.tar", members)])
    labels = dict(zip(names_of(found), found.labels.tolist(), strict=True))
    classes = {name: found.classes[n] if n >= 0 else "" for name, n in labels.items()}
    assert classes == {
        "7.left.jpg": "4", "7.right.png": "4", "a/scan.2024.0.png": "0", "a/scan.2024.1.png": "1",
        "a/scan.2024.2.png": "2", "b/scan.2024.0.png": "",
    }  # fmt: skip
    assert found.left_out == {".mp4": 1, ".json": 1}


@pytest.mark.parametrize("name", ["1.jpg", "1.cls"])
def test_a_name_that_comes_again_in_a_shard_is_refused(tmp_path, name):
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"1"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=rf"a\.tar: {name} is in it twice"):
        index_shards([path])


def test_several_shards_are_one_index(tmp_path):
    for name, label in [("a", b"10"), ("b", b"9"), ("c", b"10")]:
        members = {f"{name}.jpg": b"x", f"{name}.cls": label, f"{name}.mov": b"x"}
        write_tar(tmp_path / f"{name}.tar", members)
    paths = sorted(tmp_path.glob("*.tar"))
    found = index_shards(paths)
    assert names_of(found) == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.slices[:, 0].tolist() == [0, 1, 2]
    assert [found.classes[label] for label in found.labels] == ["10", "9", "10"]
    assert found.left_out == {".mov": 3}


@pytest.mark.parametrize(
    "member",
    [
        {"../out.jpg": b"x"},
        {"/etc/out.jpg": b"x"},
        {"a/../../out.jpg": b"x"},
        {"link.jpg": (tarfile.SYMTYPE, "/etc/passwd")},
        {"hard.jpg": (tarfile.LNKTYPE, "1.jpg")},
        {"device.jpg": (tarfile.CHRTYPE, "")},
        {"pipe.jpg": (tarfile.FIFOTYPE, "")},
    ],
)
def test_a_shard_with_hostile_members_is_refused_and_extracts_nothing(tmp_path, member):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    path = write_tar(folder / "a.tar", {"1.jpg": b"x"} | member)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="refused"):
        index_shards([path])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_shard_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes(700) for i in range(4)})
    whole = path.read_bytes()
    assert len(index_shards([path]).labels) == 4
    size = 512 + 1024  # of a member: its header and its padded content
    for cut in (4 * size, 4 * size - 400, 3 * size + 100, size + 512, 3 * size, 0):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.tar: truncated, or not an uncompressed tar"):
            index_shards([path])


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"this is not a tar file" * 100)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        index_shards([tmp_path / "a.tar"])
