"""Files of tensors from strangers: what is true of them is read, and what is not is refused before memory is taken."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from medusa_ray.medusa import tensors

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test whose file is loaded after all."""
    for name in ("torch.frombuffer", "torch.load"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("memory was taken"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_as_safetensors_has_written_them(dtype: torch.dtype, tmp_path: Path) -> None:
    written = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
        "one": torch.tensor(7).to(dtype),
    }
    save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = tensors.read((tmp_path / "x.safetensors").as_uri())
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    """A whole model has gigabytes beside its heads."""
    save_file({"base": torch.zeros(1000, 1000), "head": torch.ones(3)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").stat().st_size
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/model/x.safetensors", (tmp_path / "x.safetensors").read_bytes())
    found = tensors.read("memory://model/x.safetensors", ["head"])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"head": [1.0, 1.0, 1.0]}
    assert found["head"].untyped_storage().nbytes() < whole / 1000


def written_as(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return str(file)


def entry(dtype: str = "F32", shape: list | None = None, offsets: list | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [2], "data_offsets": offsets or [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry(shape=[2**40])}, r"x is F32 \[1099511627776\] in bytes"),
        ({"x": entry(shape=[2**32, 2**32])}, "x is F32"),
        ({"x": entry(offsets=[0, 2**40], shape=[2**38])}, "but the file has"),
        ({"x": entry(offsets=[-8, 0])}, "numbers that are none"),
        ({"x": entry(offsets=[8, 0])}, "x is F32"),
        ({"x": entry(shape=[-1, -2])}, "numbers that are none"),
        ({"x": entry(shape=[True, 2])}, "numbers that are none"),
        ({"x": entry(offsets=[4, 12])}, "but the file has"),
        ({"x": entry("U1024", offsets=[0, 2**40])}, "x is U1024"),
        ({name: entry() for name in "abcdefghijklmnopqrstuvwxyz" * 4}, None),
        ({f"x{i}": entry(shape=[16], offsets=[0, 64]) for i in range(1000)}, None),
        ({"x": [1]}, "its header is none"),
        ({"x": {"dtype": "F32"}}, "its header is none"),
        ([], "its header is none"),
        (b"\xff\xfe{}", "its header is none"),
        (b"[" * 100_000, "its header is none"),
        (b"{", "its header is none"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_header_that_lies_is_refused(header: Any, message: str | None, tmp_path: Path) -> None:
    data = bytes(64) if message is None else bytes(8)
    with pytest.raises(ValueError, match=message or "share their bytes"):
        tensors.read(written_as(tmp_path, header, data))


@pytest.mark.parametrize("length", [2**30, 2**63, 2**64 - 1])
@pytest.mark.usefixtures("untouched")
def test_a_header_of_a_gigabyte_is_refused_unread(length: int, tmp_path: Path) -> None:
    where = written_as(tmp_path, {}, length=length)
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(2**31)  # a hole: it takes no disk
    with pytest.raises(ValueError, match=f"header has {length:,} bytes, but there can be"):
        tensors.read(where)


def test_a_quantised_tensor_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x is F8_E4M3, but heads are F64, F32, F16, BF16"):
        tensors.read(str(tmp_path / "x.safetensors"))


# ------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_state_dict_of_torch_save_is_read(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.pt")
    assert tensors.read_pickled(str(tmp_path / "x.pt"))["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("is_torch_s", [True, False])
def test_nothing_in_a_pickle_is_run(is_torch_s: bool, tmp_path: Path) -> None:
    """The file is a bomb: plain pickle would set it off."""
    file, mark = tmp_path / "x.pt", tmp_path / "exploded"
    if is_torch_s:
        torch.save({"x": torch.zeros(3), "bomb": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"x": Bomb(mark)}))
    with pytest.raises(ValueError, match="without running code from it"):
        tensors.read_pickled(str(file))
    assert not mark.exists()
    if not is_torch_s:
        pickle.loads(file.read_bytes())
        assert mark.exists()  # so that the test would notice


@pytest.mark.parametrize(
    "found", [[torch.zeros(3)], {"x": [1.0]}, {3: torch.zeros(3)}, {"x": torch.zeros(3).to_sparse()}]
)
def test_what_is_no_dict_of_tensors_is_refused(found: Any, tmp_path: Path) -> None:
    torch.save(found, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="a dict of tensors by name was expected"):
        tensors.read_pickled(str(tmp_path / "x.pt"))


def repacked(source: bytes, file: Path, compression: int, **replaced: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, replaced.get(Path(name).stem, old.read(name)))


@pytest.mark.usefixtures("untouched")
def test_a_pickle_that_grows_when_unpacked_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(2**22)}, whole)
    repacked(whole.getvalue(), tmp_path / "x.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pt").stat().st_size < 2**18
    with pytest.raises(ValueError, match="it unpacks to more bytes than it has"):
        tensors.read_pickled(str(tmp_path / "x.pt"))


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    """One number seen as a terabyte of them, and a list of numbers longer than the file has."""
    torch.save({"x": torch.zeros(1).expand(2**38)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="share their bytes"):
        tensors.read_pickled(str(tmp_path / "x.pt"))
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(16)}, whole)
    with zipfile.ZipFile(whole) as archive:
        listed = archive.read("archive/data.pkl")
    assert listed.count(b"K\x10") == 2  # sixteen, as the length of the storage and of the tensor
    repacked(
        whole.getvalue(), tmp_path / "x.pt", zipfile.ZIP_STORED, data=listed.replace(b"K\x10", b"M\xff\x7f")
    )
    with pytest.raises(ValueError, match="without running code from it"):
        tensors.read_pickled(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("length", [0, 5, 100, -30])
def test_a_stump_of_a_pickle_is_refused(length: int, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(100)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:length])
    with pytest.raises(ValueError, match="without running code from it"):
        tensors.read_pickled(str(tmp_path / "x.pt"))


def test_safetensors_under_a_pickle_s_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(save({"x": torch.zeros(3)}))
    with pytest.raises(ValueError, match="without running code from it"):
        tensors.read_pickled(str(tmp_path / "x.pt"))
