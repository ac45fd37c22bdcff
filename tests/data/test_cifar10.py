"""The reader of CIFAR-10's pickles: what it reads, what it refuses, and that it runs nothing."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from ucvae.data import cifar10
from ucvae.data.cifar10 import BatchFile, Cifar10, read_values
from ucvae.errors import DataError

from .small_files import (
    cifar_bytes,
    expect_cifar,
    marked_colours,
    md5,
    python2_array,
    read_marks,
    small_cifar,
    write_all,
)

FOLDER = "cifar-10-batches-py"
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES = marked_colours(4, 1)


def refusal(path, content, count=4):
    """What is said of a file that has this content, and the MD5 that was expected."""
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        BatchFile(path.name, md5(content), count).read(path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_the_small_files_are_in_the_real_format():
    """What torchvision does with a real file gives the same images here."""
    entry = pickle.loads(cifar_bytes(IMAGES), encoding="bytes")
    assert list(entry) == [b"batch_label", b"labels", b"data", b"filenames"]
    assert entry[b"data"].dtype == np.uint8 and entry[b"data"].shape == (4, 3072)
    assert np.array_equal(entry[b"data"].reshape(-1, 3, 32, 32), IMAGES)
    assert entry[b"labels"] == [0, 1, 2, 3] and entry[b"filenames"][3] == b"frog_s_000003.png"


@pytest.mark.parametrize("packed", [False, True])
def test_splits(packed, tmp_path, monkeypatch):
    write_all(tmp_path / FOLDER, small_cifar(monkeypatch), packed)
    data = Cifar10().load(tmp_path)
    assert (data.name, data.binarization, data.levels) == ("cifar10", "none", 256)
    assert data.image_shape == (3, 32, 32)
    counts, whole = (6, 7, 8, 9, 10, 12), []
    for mark, count in enumerate(counts, start=1):
        whole.append(torch.from_numpy(marked_colours(count, mark)))
    train = torch.cat(whole[:5])
    assert torch.equal(data.train, train[:30]) and torch.equal(data.valid, train[30:])
    assert torch.equal(data.test, whole[5])
    assert all(part.dtype == torch.uint8 for part in (data.train, data.valid, data.test))
    # Every red plane says which file and row it came from.
    assert read_marks(data.valid[:, 0]) == (list(range(10)), {5})
    assert read_marks(data.test[:, 0]) == (list(range(12)), {6})


def test_torchvision_reads_the_same_images(tmp_path, monkeypatch):
    content = small_cifar(monkeypatch)
    meta = pickle.dumps({"label_names": ["frog"]}, protocol=2)
    write_all(tmp_path / FOLDER, content | {"batches.meta": meta})
    listed = [[name, md5(data)] for name, data in content.items()]
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(meta)})
    data = Cifar10().load(tmp_path)
    train = torch.cat([data.train, data.valid])
    for ours, is_train in ((train, True), (data.test, False)):
        theirs = CIFAR10(tmp_path, train=is_train).data  # [N, H, W, C]
        assert np.array_equal(theirs, ours.movedim(1, -1).numpy())


def test_known_checksums():
    """Those of the original files, as torchvision has them."""
    assert [file.name for file in (*cifar10.TRAIN, *cifar10.TEST)] == NAMES
    assert {file.count for file in (*cifar10.TRAIN, *cifar10.TEST)} == {10_000}
    assert [file.md5 for file in (*cifar10.TRAIN, *cifar10.TEST)] == [
        "c99cafc152244af753f735de768cd75f",
        "d4bba439e000b95fd0a9bffe97cbabec",
        "54ebc095f3ab1f0389bbae665268c751",
        "634d18415352ddfa80567beed471001a",
        "482c414d41f54cd18b22e5b47cb7c3cb",
        "40351d587109b95175f43aff81a1287e",
    ]
    assert cifar10.NUM_VALID == 5_000


def test_a_file_of_the_real_size(tmp_path, memory_growth):
    """10,000 images: within the bound on a file's size, and in no more memory than they need."""
    content = cifar_bytes(np.zeros((10_000, 3, 32, 32), np.uint8))
    (tmp_path / "data_batch_1").write_bytes(content)
    growth = memory_growth()
    images = BatchFile("data_batch_1", md5(content)).read(tmp_path / "data_batch_1")
    assert images.shape == (10_000, 3, 32, 32) and not images.any()
    assert growth() < 5 * len(content)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch"])
@pytest.mark.parametrize("damage", ["empty", "short", "one bit", "other", "page"])
def test_wrong_content_is_refused_before_it_is_read(name, damage, tmp_path, monkeypatch):
    content = small_cifar(monkeypatch)
    data = content[name]
    content[name] = {
        "empty": b"",
        "short": data[:-1],
        "one bit": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "other": cifar_bytes(marked_colours({"1": 6, "5": 10}.get(name[-1], 12), 9)),
        "page": b"<html>no such file</html>",
    }[damage]
    write_all(tmp_path / FOLDER, content)
    read = []
    monkeypatch.setattr(cifar10, "read_values", lambda it: read.append(it) or read_values(it))
    with pytest.raises(DataError) as error:
        Cifar10().load(tmp_path)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{tmp_path / FOLDER / name}: wrong content: MD5 {md5(content[name])}")
    assert content[name] not in read


def test_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    write_all(tmp_path / FOLDER, small_cifar(monkeypatch))
    with open(tmp_path / FOLDER / "data_batch_3", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="data_batch_3: longer than the "):
        Cifar10().load(tmp_path)


class Mark:
    """Unpickled, it would call a function of this module."""

    called = False

    def __reduce__(self):
        return _call, (1,)


def _call(value):
    Mark.called = True


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    wicked = {b"data": Mark(), b"labels": []}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(wicked, protocol)
        Mark.called = False
        pickle.loads(content)
        assert Mark.called  # so it would have been
        Mark.called = False
        reason = refusal(tmp_path / "data_batch_1", content)
        assert reason.startswith("cannot be read as a file of CIFAR-10: ") and "no place" in reason
        assert not Mark.called


@pytest.mark.parametrize(
    "name",
    [
        *("os system", "builtins eval", "__builtin__ eval", "builtins getattr", "posix system"),
        *("numpy load", "numpy.core.multiarray scalar", "numpy ndarray.tofile", "numpy core"),
        *("ucvae.data.cifar10 read_values", "copy_reg _reconstructor", "_codecs encode"),
    ],
)
@pytest.mark.parametrize("how", ["reduce", "inst", "obj"])
def test_no_other_name_is_looked_up(name, how, tmp_path):
    module, _, attribute = name.partition(" ")
    asked = f"{module}\n{attribute}\n".encode()
    (tmp_path / "touched").touch()
    argument = f"rm {tmp_path}/touched".encode()
    argument = b"U" + bytes([len(argument)]) + argument
    data = {
        "reduce": b"c" + asked + argument + b"\x85R",
        "inst": b"(" + argument + b"i" + asked,
        "obj": b"(c" + asked + argument + b"o",
    }[how]
    reason = refusal(tmp_path / "data_batch_1", cifar_bytes(IMAGES, data))
    assert reason.endswith(f"{module}.{attribute} has no place in it")
    assert (tmp_path / "touched").exists()


PIXELS = IMAGES.tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (python2_array(PIXELS[:9216], (3, 3072)), "b'data' is 3 x 3072, expected 4 x 3072"),
        (python2_array(PIXELS, (3072, 4)), "b'data' is 3072 x 4, expected 4 x 3072"),
        (python2_array(PIXELS, (4, 3, 32, 32)), "b'data' is 4 x 3 x 32 x 32, expected 4 x 3072"),
        (python2_array(PIXELS, (12288,)), "b'data' is 12288, expected 4 x 3072"),
        (python2_array(b"", (0, 3072)), "b'data' is 0 x 3072, expected 4 x 3072"),
        (python2_array(PIXELS[:-1], (4, 3072)), "cannot be read as a file of CIFAR-10: cannot re"),
        (python2_array(PIXELS, (2**31 - 1, 3072)), "cannot be read as a file of CIFAR-10: cannot"),
        (python2_array(PIXELS, (2**31 - 1,) * 9), "cannot be read as a file of CIFAR-10: "),
        (python2_array(PIXELS, (4, 3072), b"i1"), "cannot be read as a file of CIFAR-10: b'data'"),
        (python2_array(PIXELS, (4, 3072), b"O"), "cannot be read as a file of CIFAR-10: b'data'"),
        (python2_array(PIXELS, (4, 3072), b"f8"), "cannot be read as a file of CIFAR-10: b'data'"),
        (
            python2_array(PIXELS, (4, 3072), fortran=True),
            "cannot be read as a file of CIFAR-10: b'data' is not of unsigned bytes, row by row",
        ),
        (b"N", "cannot be read as a file of CIFAR-10: it has no array b'data'"),
        (b"]", "cannot be read as a file of CIFAR-10: it has no array b'data'"),
        (b"cnumpy\nndarray\n)R", "cannot be read as a file of CIFAR-10: "),
        (b"cnumpy\ndtype\nK\x07\x85RK\x07b", "cannot be read as a file of CIFAR-10: "),
    ],
)
def test_other_arrays_are_refused(data, reason, tmp_path):
    found = refusal(tmp_path / "data_batch_1", cifar_bytes(IMAGES, data))
    assert found.startswith(reason)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x02N.",
        b"\x80\x02]q\x01.",
        b"\x80\x02}q\x01.",
        b"not a pickle",
        bytes(100),
        b"h\x07.",
        b"\x80\x02" + b"(" * 10_000,
        b"\x80\x02Pname\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_other_pickles_are_refused(content, tmp_path):
    reason = refusal(tmp_path / "data_batch_1", content)
    assert reason.startswith("cannot be read as a file of CIFAR-10: ")


def test_cut_anywhere_it_is_refused(tmp_path):
    content = cifar_bytes(IMAGES)
    for size in [*range(0, 300), *range(300, len(content), 97)]:
        refusal(tmp_path / "data_batch_1", content[:size])


@pytest.mark.parametrize(
    "data",
    [
        python2_array(PIXELS, (2**31 - 1, 3072)),  # 6 TB in the shape
        b"T\xff\xff\xff\x7f" + PIXELS,  # 2 GB in a string's size
        b"\x8b\xff\xff\xff\x7f" + PIXELS,  # in a number's
        b"\x8e" + struct.pack("<Q", 1 << 34) + PIXELS,  # in those of later protocols
        b"\x96" + struct.pack("<Q", 1 << 34) + PIXELS,
        b"]r\x00\x00\x00\x10",  # place 2**28 of the memo
    ],
    ids=["shape", "string", "number", "bytes", "buffer", "memo"],
)
def test_absurd_sizes_take_no_memory(data, tmp_path, memory_growth):
    content = cifar_bytes(IMAGES, data)
    growth = memory_growth()
    refusal(tmp_path / "data_batch_1", content)
    assert growth() < 20 << 20


def serve(folder, content, monkeypatch, address):
    """Have the web server offer the archive with these files."""
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    monkeypatch.setattr(CIFAR10, "url", address + "cifar-10-python.tar.gz")
    packed = (folder / "cifar-10-python.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(packed))


def test_download(tmp_path, server, monkeypatch):
    folder, address = server
    content = small_cifar(monkeypatch)
    serve(folder, content | {"batches.meta": b"", "readme.html": b""}, monkeypatch, address)
    data = Cifar10().load(tmp_path / "data")
    assert read_marks(data.test[:, 0]) == (list(range(12)), {6})
    written = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert written == [tmp_path / "data" / FOLDER / name for name in sorted(NAMES)]
    # The second time, nothing is asked of the server.
    monkeypatch.setattr(CIFAR10, "url", "http://data.invalid/cifar-10-python.tar.gz")
    assert Cifar10().load(tmp_path / "data").split_sha256 == data.split_sha256


@pytest.mark.parametrize("damage", ["other archive", "no archive", "absent"])
def test_a_bad_download_is_not_kept(damage, tmp_path, server, monkeypatch):
    folder, address = server
    serve(folder, small_cifar(monkeypatch), monkeypatch, address)
    if damage == "other archive":
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(b"the real one"))
    if damage == "no archive":
        (folder / "cifar-10-python.tar.gz").write_text("<html></html>")
    if damage == "absent":
        (folder / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(DataError) as error:
        Cifar10().load(tmp_path / "data")
    text = str(error.value)
    assert len(text.splitlines()) == 1 and "they could not be downloaded: " in text
    assert text.startswith(f"CIFAR-10 is not found: put {', '.join(NAMES)} (or .gz) into ")
    assert not (tmp_path / "data").exists()


def test_one_missing_file_is_the_one_that_is_named(tmp_path, monkeypatch):
    content = small_cifar(monkeypatch)
    content.pop("data_batch_4")
    write_all(tmp_path / FOLDER, content)
    monkeypatch.setattr(CIFAR10, "url", "http://data.invalid/cifar-10-python.tar.gz")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError) as error:
        Cifar10().load(tmp_path)
    assert str(error.value).startswith(
        f"CIFAR-10 is not found: put data_batch_4 (or .gz) into {tmp_path}/{FOLDER}, or use "
    )


def test_a_file_that_differs_in_count_alone(tmp_path, monkeypatch):
    """A file whose MD5 is known but whose images are not as many is refused all the same."""
    content = small_cifar(monkeypatch)
    expect_cifar(monkeypatch, content, (6, 7, 8, 9, 10, 11))
    write_all(tmp_path / FOLDER, content)
    with pytest.raises(DataError, match="test_batch: b'data' is 12 x 3072, expected 11 x 3072"):
        Cifar10().load(tmp_path)
