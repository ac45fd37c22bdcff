"""Where files are found, what is refused, and what a download leaves."""

import gzip
import os
import socket
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torchvision

from ucvae.data import cifar10, fashion_mnist, files, mnist, mnist_larochelle, omniglot
from ucvae.data.cifar10 import Cifar10
from ucvae.data.fashion_mnist import FashionMnist
from ucvae.data.files import FileSet, unpacked
from ucvae.data.mnist import Mnist
from ucvae.data.mnist_larochelle import MnistLarochelle
from ucvae.data.omniglot import Omniglot
from ucvae.errors import DataError

from .small_files import (
    IDX_FOLDERS,
    TEST,
    TRAIN,
    amat_bytes,
    marked_images,
    matlab_columns,
    md5,
    read_marks,
    save_matlab,
    small_cifar,
    small_idx,
    write_all,
)

UNRESOLVABLE = "http://data.invalid/"  # RFC 6761: no such name exists, with or without a network
DATASETS = [Mnist, FashionMnist, MnistLarochelle, Omniglot, Cifar10]


def message(error) -> str:
    """The error's text, which must be one line."""
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


def refuse_to_download(names, folder):
    raise AssertionError("tried to download")


def lettered(*names: str, fetch=refuse_to_download) -> FileSet:
    return FileSet("Letters", names, "Letters/raw", "letters", fetch)


def test_search_order(tmp_path, monkeypatch):
    system = tmp_path / "system"
    monkeypatch.setattr(files, "SYSTEM_FOLDERS", (tmp_path / "absent", system))
    data_dir = tmp_path / "data"
    places = [
        data_dir / "Letters/raw/a",
        data_dir / "Letters/raw/a.gz",
        system / "letters/a",
        system / "letters/a.gz",
    ]
    for place in reversed(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        assert lettered("a").locate(data_dir) == {"a": place}


def test_a_folder_of_the_files_name_is_no_file(tmp_path):
    (tmp_path / "Letters/raw/a").mkdir(parents=True)
    write_all(tmp_path / "Letters/raw", {"a": b""}, packed=True)
    assert lettered("a").locate(tmp_path) == {"a": tmp_path / "Letters/raw/a.gz"}


def test_only_what_is_missing_is_downloaded(tmp_path):
    write_all(tmp_path / "Letters/raw", {"a": b"mine"})
    asked = []

    def fetch(names, folder):
        asked.extend(names)
        return write_all(folder / "deep", {"a": b"theirs", "b": b"theirs", "other": b""})

    found = lettered("a", "b", fetch=fetch).locate(tmp_path)
    assert asked == ["b"]
    assert {name: path.read_bytes() for name, path in found.items()} == {
        "a": b"mine",
        "b": b"theirs",
    }
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / "Letters",
        tmp_path / "Letters/raw",
        tmp_path / "Letters/raw/a",
        tmp_path / "Letters/raw/b",
    ]


@pytest.mark.parametrize("reason", [URLError("no route"), RuntimeError("two\n\nlines"), OSError()])
def test_failed_download_leaves_nothing(reason, tmp_path, capsys):
    def fetch(names, folder):
        print("Downloading to a place that is not for the user")
        write_all(folder, {"a": b"half"})
        raise reason

    with pytest.raises(DataError) as error:
        lettered("a", "b", fetch=fetch).locate(tmp_path / "new" / "data")
    assert message(error).startswith(
        f"Letters is not found: put a, b (or .gz) into {tmp_path}/new/data/Letters/raw, or use "
        "dataset=digits, which needs no files; they could not be downloaded: "
    )
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr().out == ""


def test_interrupted_download_leaves_nothing(tmp_path):
    def fetch(names, folder):
        write_all(folder, {"a": b"half"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lettered("a", fetch=fetch).locate(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")

    def fetch(names, folder):
        return write_all(folder, {"a": b""})

    with pytest.raises(DataError, match="Letters is not found: put a .*Not a directory"):
        lettered("a", fetch=fetch).locate(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_without_a_network(dataset, tmp_path, monkeypatch, capfd):
    """The real downloaders, sent to a name that does not exist."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [UNRESOLVABLE, UNRESOLVABLE])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [UNRESOLVABLE])
    monkeypatch.setattr(mnist_larochelle, "ADDRESS", UNRESOLVABLE)
    monkeypatch.setattr(omniglot, "ADDRESS", UNRESOLVABLE + "chardata.mat")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", UNRESOLVABLE + "cifar.tar.gz")
    monkeypatch.setenv("no_proxy", "*")
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        dataset().load(tmp_path / "data")
    assert time.monotonic() - start < 10
    text = message(error)
    folder, names = {
        Mnist: ("MNIST/raw", [TRAIN, TEST]),
        FashionMnist: ("FashionMNIST/raw", [TRAIN, TEST]),
        MnistLarochelle: ("BinaryMNIST", list(mnist_larochelle.FILE_NAMES.values())),
        Omniglot: ("OMNIGLOT", ["chardata.mat"]),
        Cifar10: ("cifar-10-batches-py", [f.name for f in (*cifar10.TRAIN, *cifar10.TEST)]),
    }[dataset]
    assert f"put {', '.join(names)} (or .gz) into {tmp_path}/data/{folder}," in text
    assert "dataset=digits" in text and "urlopen error" in text
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "DOWNLOAD_TIMEOUT_S", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(mnist_larochelle, "ADDRESS", address)
        start = time.monotonic()
        with pytest.raises(DataError, match="could not be downloaded: .*timed out"):
            MnistLarochelle().load(tmp_path / "data")
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_torchvision_downloads(module, tmp_path, server, monkeypatch):
    folder, address = server
    content = small_idx(monkeypatch, module)
    labels = {name.replace("images-idx3", "labels-idx1"): b"" for name in content}
    for name in labels:
        count = module.FILES.train.count if name.startswith("train") else module.FILES.test.count
        labels[name] = (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(count)
    write_all(folder, content | labels, packed=True)
    torchvision_class = module.FILES.torchvision_class
    monkeypatch.setattr(torchvision_class, "mirrors", [address])
    monkeypatch.setattr(
        torchvision_class,
        "resources",
        [(path.name, md5(path.read_bytes())) for path in folder.iterdir()],
    )
    grey = module.FILES.load_grey(tmp_path / "data")
    assert read_marks(grey["train"]) == (list(range(20)), {1})
    written = [path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*-*")]
    assert sorted(map(str, written)) == sorted(f"{IDX_FOLDERS[module]}/{name}" for name in content)


def serve_larochelle(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(mnist_larochelle, "COUNTS", {"train": 20, "valid": 7, "test": 9})
    write_all(
        folder,
        {
            name: amat_bytes(marked_images(mnist_larochelle.COUNTS[split], 1))
            for split, name in mnist_larochelle.FILE_NAMES.items()
        },
    )


def serve_omniglot(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(omniglot, "COUNTS", {"data": 30, "testdata": 8})
    monkeypatch.setattr(omniglot, "NUM_VALID", 10)
    save_matlab(
        folder / "chardata.mat",
        data=matlab_columns(marked_images(30, 1)),
        testdata=matlab_columns(marked_images(8, 2)),
    )


@pytest.mark.parametrize(
    ("dataset", "module", "serve", "last_part"),
    [
        (MnistLarochelle, mnist_larochelle, serve_larochelle, ""),
        (Omniglot, omniglot, serve_omniglot, "chardata.mat"),
    ],
)
def test_download_by_address(dataset, module, serve, last_part, tmp_path, server, monkeypatch):
    folder, address = server
    serve(folder, monkeypatch)
    monkeypatch.setattr(module, "ADDRESS", address + last_part)
    data = dataset().load(tmp_path / "data")
    assert read_marks(data.train) == (list(range(20)), {1})
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "data").rglob("*.*")} == names
    # The second time, nothing is asked of the server.
    monkeypatch.setattr(module, "ADDRESS", UNRESOLVABLE)
    assert dataset().load(tmp_path / "data").split_sha256 == data.split_sha256


@pytest.mark.parametrize(
    ("dataset", "module", "serve", "last_part"),
    [
        (MnistLarochelle, mnist_larochelle, serve_larochelle, ""),
        (Omniglot, omniglot, serve_omniglot, "chardata.mat"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "absent", "page"])
def test_bad_download_is_not_kept(
    dataset, module, serve, last_part, damage, tmp_path, server, monkeypatch
):
    folder, address = server
    serve(folder, monkeypatch)
    for path in sorted(folder.iterdir()):
        if damage == "cut":  # the line breaks in the middle
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "absent":
            path.unlink()
        else:  # a login page in place of the file
            path.write_text("<html></html>")
    if damage == "cut":
        (folder / "cut").touch()
    monkeypatch.setattr(module, "ADDRESS", address + last_part)
    with pytest.raises(DataError) as error:
        dataset().load(tmp_path / "data")
    assert "could not be downloaded" in message(error)
    assert not (tmp_path / "data").exists()


def test_unpacked_gives_plain_content_and_cleans_up(tmp_path):
    write_all(tmp_path, {"a": b"content"}, packed=True)
    with unpacked(tmp_path / "a.gz", 7) as plain:
        assert plain.read_bytes() == b"content"
    assert not plain.parent.exists()


def test_unpacked_is_bounded(tmp_path, monkeypatch, memory_growth):
    """A small file that unpacks to a large one is given up at the bound."""
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(64 << 20)))
    sizes = []
    real = files._check_size

    def watched(plain, path, max_bytes):
        sizes.append(plain.stat().st_size)
        real(plain, path, max_bytes)

    monkeypatch.setattr(files, "_check_size", watched)
    growth = memory_growth()
    with pytest.raises(DataError, match="a.gz: longer than the 1000 bytes"):
        with unpacked(tmp_path / "a.gz", 1000):
            pass
    assert sizes[0] <= 1000 + files._CHUNK_BYTES
    assert growth() < 20 << 20


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(bytes(range(256)))[:-20], gzip.compress(b"abc" * 99) + b"tail"],
    ids=["empty", "no gzip", "cut short", "with a tail"],  # gzip's own bytes tell the time of day
)
def test_damaged_gzip(content, tmp_path):
    (tmp_path / "a.gz").write_bytes(content)
    if content == b"":  # gzip reads an empty file as empty content, which each reader refuses
        with unpacked(tmp_path / "a.gz", 9) as plain:
            assert plain.read_bytes() == b""
        return
    with pytest.raises(DataError) as error:
        with unpacked(tmp_path / "a.gz", 10_000):
            pass
    assert message(error).startswith(f"{tmp_path}/a.gz: cannot be read: ")


def test_file_that_the_system_will_not_read(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(DataError) as error:
        with unpacked(tmp_path / "a", 9):
            raise OSError(5, "Input/output error", "where it happened")
    assert message(error) == f"{tmp_path}/a: cannot be read: Input/output error"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        (Mnist, f"MNIST/raw/{TRAIN}"),
        (MnistLarochelle, "BinaryMNIST/binarized_mnist_train.amat"),
        (Omniglot, "OMNIGLOT/chardata.mat"),
        (Cifar10, "cifar-10-batches-py/data_batch_1"),
    ],
)
def test_unreadable_file(dataset, file, tmp_path, monkeypatch):
    write_all(tmp_path / "MNIST/raw", small_idx(monkeypatch, mnist))
    write_all(tmp_path / "BinaryMNIST", dict.fromkeys(mnist_larochelle.FILE_NAMES.values(), b"0"))
    write_all(tmp_path / "OMNIGLOT", {"chardata.mat": b"0"})
    write_all(tmp_path / "cifar-10-batches-py", small_cifar(monkeypatch))
    (tmp_path / file).chmod(0)
    with pytest.raises(DataError) as error:
        dataset().load(tmp_path)
    assert message(error) == f"{tmp_path / file}: cannot be read: Permission denied"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_system_folder(module, packed, tmp_path, monkeypatch):
    """Debian's package: gzipped idx files under the data set's own name."""
    content = small_idx(monkeypatch, module)
    name = {mnist: "mnist", fashion_mnist: "fashion-mnist"}[module]
    write_all(tmp_path / "datasets" / name, content, packed)
    monkeypatch.setattr(files, "SYSTEM_FOLDERS", (tmp_path / "datasets",))
    grey = module.FILES.load_grey(tmp_path / "nowhere")
    assert read_marks(grey["train"]) == (list(range(20)), {1})
    assert read_marks(grey["test"]) == (list(range(10)), {2})


def damage_idx(data: bytes, damage: str) -> bytes:
    return {
        "empty": b"",
        "header only": data[:16],
        "half a header": data[:7],
        "short": data[:-1],
        "long": data + b"\0",
        "one bit": data[:500] + bytes([data[500] ^ 1]) + data[501:],
        "labels": (2049).to_bytes(4, "big") + data[4:],
        "absurd": data[:4] + b"\x7f\xff\xff\xff" * 3 + data[16:],
        "negative": data[:4] + b"\xff" * 12 + data[16:],
    }[damage]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [TRAIN, TEST])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("empty", "has 0 bytes unpacked, expected "),
        ("header only", "has 16 bytes unpacked, expected "),
        ("half a header", "has 7 bytes unpacked, expected "),
        ("short", "bytes unpacked, expected "),
        ("long", "longer than the "),
        ("one bit", "wrong content: MD5 "),
        ("labels", "has the idx header (2049, "),
        (
            "absurd",
            "has the idx header (2051, 2147483647, 2147483647, 2147483647), expected (2051, ",
        ),
        ("negative", "has the idx header (2051, 4294967295, "),
    ],
)
def test_damaged_idx(damage, reason, name, packed, tmp_path, monkeypatch):
    content = small_idx(monkeypatch, mnist)
    content[name] = damage_idx(content[name], damage)
    folder = write_all(tmp_path / "MNIST/raw", content, packed)
    with pytest.raises(DataError) as error:
        Mnist().load(tmp_path)
    text = message(error)
    assert text.startswith(f"{folder / name}{'.gz' if packed else ''}: ")
    assert reason in text


def test_wrong_hash_names_both(tmp_path, monkeypatch):
    content = small_idx(monkeypatch, mnist)
    expected = md5(content[TRAIN])
    content[TRAIN] = damage_idx(content[TRAIN], "one bit")
    folder = write_all(tmp_path / "MNIST/raw", content)
    with pytest.raises(DataError) as error:
        Mnist().load(tmp_path)
    assert message(error) == (
        f"{folder / TRAIN}: wrong content: MD5 {md5(content[TRAIN])}, expected {expected}"
    )


def test_a_damaged_file_is_not_passed_over(tmp_path, monkeypatch):
    """A good copy in the system's folder does not hide a bad one in data_dir."""
    content = small_idx(monkeypatch, mnist)
    write_all(tmp_path / "datasets" / "mnist", content)
    monkeypatch.setattr(files, "SYSTEM_FOLDERS", (tmp_path / "datasets",))
    write_all(tmp_path / "MNIST/raw", {TRAIN: b"bad"})
    with pytest.raises(DataError, match="MNIST/raw/train-images-idx3-ubyte: has 3 bytes"):
        Mnist().load(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    """A sparse file of 1 TB: reading it would never end."""
    content = small_idx(monkeypatch, mnist)
    folder = write_all(tmp_path / "MNIST/raw", content)
    os.truncate(folder / TRAIN, 1 << 40)
    with pytest.raises(DataError, match="longer than the "):
        Mnist().load(tmp_path)


def test_known_checksums():
    """Those of the unpacked files as published; Fashion-MNIST's are of the originals."""
    assert [mnist.FILES.train.md5, mnist.FILES.test.md5] == [
        "6bbc9ace898e44ae57da46a324031adb",
        "2646ac647ad5339dbf082846283269ea",
    ]
    assert [fashion_mnist.FILES.train.md5, fashion_mnist.FILES.test.md5] == [
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ]
