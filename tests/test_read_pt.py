"""csm_layouts.read_pt against torch.save: types, views, nested states; what it refuses."""

import os
import pickle
import zipfile
from collections import OrderedDict

import mlx.core as mx
import pytest

import csm_layouts

torch = pytest.importorskip("torch")

TYPES = "float32 float64 float16 bfloat16 bool int64 int32 int16 int8 uint8 complex64".split()


def same(tensor, array):
    """The type, shape and values of a torch tensor are an MLX array's. (float64 becomes float32.)"""
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    assert (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) == (
        str(array.dtype).removeprefix("mlx.core.").removesuffix("_"),
        array.shape,
    )
    assert (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).tolist() == (
        array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    ).tolist()


def states():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) - 7.3
    types = {t: (base * 5).to(getattr(torch, t)) for t in TYPES}
    views = {
        "whole": base, "same": base, "row": base[2], "column": base[:, 3], "turned": base.T, "steps": base[1::2, ::3],
        "broadcast": base[:1].expand(5, 6), "number": torch.tensor(3.5), "nothing": torch.zeros(0, 7),
        "parameter": torch.nn.Parameter(base[1:]),
    }  # fmt: skip
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 5), torch.nn.BatchNorm1d(3)).state_dict()  # has ._metadata
    plain = [types, views, network, OrderedDict(types), {}]
    wrapped = [{name: network, "epoch": 3, "args": {"lr": [1e-3, None]}} for name in csm_layouts.STATES]
    module = {f"module.{name}": w for name, w in network.items()}
    return [(s, s) for s in plain] + [(w, network) for w in wrapped] + [(module, network), ({"model": module}, network)]


@pytest.mark.parametrize("saved, expected", states())
def test_reads_what_torch_saves(saved, expected, tmp_path):
    torch.save(saved, tmp_path / "a.pt")
    read = csm_layouts.read_pt(tmp_path / "a.pt")
    assert list(read) == list(expected)
    for name in read:
        same(expected[name].detach(), read[name])


def test_the_members_need_not_be_aligned(tmp_path):
    torch.save({"w": torch.arange(5.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "odd.pt", "w") as new:
        for i, name in enumerate(old.namelist()):
            new.writestr(name, old.read(name))
            new.writestr(f"padding{i}", "x" * (i + 1))
    assert csm_layouts.read_pt(tmp_path / "odd.pt")["w"].tolist() == [0, 1, 2, 3, 4]


class Runs:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def with_pickle(path, pickled):
    """A checkpoint whose pickle is another."""
    torch.save({"w": torch.arange(5.0)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, pickled(data) if name.endswith("data.pkl") else data)


def six_elements(pickled):
    """The size (5,) in a pickle becomes (6,)."""
    return pickled.replace(b"K\x05\x85", b"K\x06\x85")


def test_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(match, write):
        path = tmp_path / "a.pt"
        path.unlink(missing_ok=True)
        write(path)
        with pytest.raises(ValueError, match=match) as e:
            csm_layouts.read_pt(path)
        assert "\n" not in str(e.value) and str(path) in str(e.value)

    refused("no such file", lambda path: None)
    refused(r"holds a (posix|nt)\.mkdir", lambda path: torch.save({"w": Runs()}, path))
    refused(r"holds a (posix|nt)\.mkdir", lambda path: with_pickle(path, lambda _: pickle.dumps(Runs())))
    assert not (tmp_path / "made-by-a-pickle").exists()
    refused("holds a torch.nn.modules", lambda path: torch.save(torch.nn.Linear(2, 2), path))
    refused("holds a torch.ComplexDouble", lambda path: torch.save({"w": torch.zeros(2, dtype=torch.complex128)}, path))
    refused("'epoch' is not a tensor", lambda path: torch.save({"w": torch.zeros(2), "epoch": 3}, path))
    refused("3 is not a tensor", lambda path: torch.save({3: 1}, path))
    refused("before PyTorch 1.6", lambda path: torch.save({}, path, _use_new_zipfile_serialization=False))
    refused("not a PyTorch checkpoint", lambda path: torch.save([torch.zeros(2)], path))
    refused("empty file", lambda path: path.write_bytes(b""))
    refused("not a PyTorch checkpoint", lambda path: path.write_bytes(b"RIFF" + bytes(40)))
    refused("not a PyTorch checkpoint", lambda path: zipfile.ZipFile(path, "w").close())
    # a tensor that says it is larger than its storage must not be read past it
    refused(
        "larger than what holds it", lambda path: with_pickle(path, lambda p: p.replace(b"K\x05\x85", b"K\x06\x85"))
    )

    def truncated(path):
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:3000])

    refused("truncated", truncated)
