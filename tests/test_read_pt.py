"""csm_layouts.read_pt against torch.save: types, views, nested states, and refused files."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import mlx.core as mx
import pytest

import csm_layouts

torch = pytest.importorskip("torch")

TYPES = "float32 float64 float16 bfloat16 bool int64 int32 int16 int8 uint8 complex64".split()


def same(tensor, array):
    """Assert that a torch tensor and an MLX array have the same type, shape and values (float64 becomes float32)."""
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
    """Replace a checkpoint's pickle."""
    torch.save({"w": torch.arange(5.0)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, pickled(data) if name.endswith("data.pkl") else data)


class Tensor:
    """Pickled as a tensor of 5 float32 with false attributes."""

    def __init__(self, offset=0, shape=(5,), strides=(1,), storage=None):
        self.args = storage or self, offset, shape, strides

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


def crafted(**what):
    """A function that writes a checkpoint with one such tensor."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Tensor) and self.seen:  # itself again: its storage
                return "storage", torch.FloatStorage, "0", "cpu", 5
            self.seen = self.seen or isinstance(value, Tensor)

    def pickled(_):
        file = io.BytesIO()
        pickler = Pickler(file, 2)
        pickler.seen = False
        pickler.dump({"w": Tensor(**what)})
        return file.getvalue()

    return lambda path: with_pickle(path, pickled)


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
    # A tensor that lies about its size must not be read past its storage, nor fill the memory.
    crafted()(tmp_path / "good.pt")
    assert csm_layouts.read_pt(tmp_path / "good.pt")["w"].tolist() == [0, 1, 2, 3, 4]
    for what in (
        {"shape": (6,)}, {"offset": 1}, {"strides": (2,)}, {"shape": (10**6,)}, {"shape": (2, 4), "strides": (4, 1)},
        {"offset": 2**30},
    ):  # fmt: skip
        refused("larger than what holds it", crafted(**what))
    for what in (
        {"shape": (64,), "strides": ()}, {"shape": (5,), "strides": (1, 1)}, {"shape": (2**31,), "strides": (0,)},
        {"shape": (2**16, 2**16), "strides": (0, 0)}, {"shape": (-1,)}, {"strides": (-1,)}, {"offset": -1},
        {"shape": (2.5,)}, {"shape": (True,)}, {"shape": (5, 1), "strides": (1, 2**70)}, {"shape": (1,) * 9},
        {"shape": ("5",)}, {"storage": ("12345678", "float32")}, {"storage": ("12345678", None)},
    ):  # fmt: skip
        refused("no possible shape", crafted(**what))
    refused("far larger than the file", crafted(shape=(2**30,), strides=(0,)))
    refused("not a PyTorch checkpoint", crafted(shape=None))
    # Files that would fill the memory or overflow the stack.
    empty_lists = b"\x80\x02]" + b"]a" * (csm_layouts.MAX_PICKLE // 2) + b"."
    refused("has more than 16 MB", lambda path: with_pickle(path, lambda _: empty_lists))
    nested = b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."
    refused("no string and no number", lambda path: with_pickle(path, lambda _: nested))
    memo = b"\x80\x02}r" + b"\xff\xff\xff\x7f" + b"."
    with_pickle(tmp_path / "memo.pt", lambda _: memo)
    assert csm_layouts.read_pt(tmp_path / "memo.pt") == {}
    refused("not as torch.save", lambda path: with_pickle(path, lambda _: b"\x80\x04\x8f."))
    bytearray_of_4_gb = b"\x80\x05\x96" + (2**32 - 1).to_bytes(8, "little") + b"."
    refused("not as torch.save", lambda path: with_pickle(path, lambda _: bytearray_of_4_gb))

    def compressed(path):
        torch.save({"w": torch.zeros(1000)}, path)
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in members.items():
                new.writestr(name, data)

    refused("compressed", compressed)

    def truncated(path):
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:3000])

    refused("truncated", truncated)


MUTATE = """
import random, sys, zipfile
import csm_layouts

whole, random = open(sys.argv[1], "rb").read(), random.Random(0)
with zipfile.ZipFile(sys.argv[1]) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
pickled = next(name for name in members if name.endswith("data.pkl"))
refused = 0
for i in range(300):
    if i % 3:  # of the pickle, in an archive that is whole
        data = bytearray(members[pickled])
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.choice((random.randrange(256), *b"K.()tR}usqrJX"))
        with zipfile.ZipFile(sys.argv[2], "w") as new:
            for name, content in (members | {pickled: bytes(data)}).items():
                new.writestr(name, content)
    else:  # of the archive
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        open(sys.argv[2], "wb").write(data[: random.choice((len(data), random.randrange(len(data))))])
    try:
        for w in csm_layouts.read_pt(sys.argv[2]).values():
            w.tolist()
    except ValueError as error:
        assert "\\n" not in str(error) and sys.argv[2] in str(error), error
        refused += 1
print(refused)
"""


def test_300_damaged_files(tmp_path):
    """No crash, and only one-line errors. Runs in its own process, which a crash would end."""
    views = states()[1][0]
    torch.save({"model": views, "epoch": 3, "args": {"lr": [1e-3, None]}}, tmp_path / "a.pt")
    files = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    done = subprocess.run([sys.executable, "-c", MUTATE, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 150 < int(done.stdout) < 300
