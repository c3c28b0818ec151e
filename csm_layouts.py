import math
import mmap
import pickle
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import mlx.core as mx

# ---- PyTorch's checkpoints --------------------------------------------------------------------------------------

STATES = ("model_state", "model_state_dict", "model", "state_dict")  # where trainers keep the weights in a checkpoint
STORAGES = {  # torch.XStorage -> what is in it. MLX has float64 on the CPU alone: it becomes float32 on the way
    "Float": mx.float32, "Double": mx.float64, "Half": mx.float16, "BFloat16": mx.bfloat16, "Bool": mx.bool_,
    "Long": mx.int64, "Int": mx.int32, "Short": mx.int16, "Char": mx.int8, "Byte": mx.uint8,
    "ComplexFloat": mx.complex64,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor that is still in the file."""

    data: memoryview  # from its first element to its last
    dtype: mx.Dtype
    shape: tuple
    strides: tuple  # in elements

    def read(self):
        flat = mx.array(self.data.cast("BHIQ"[self.dtype.size.bit_length() - 1]))  # MLX counts in 32 bits
        flat = flat.view(self.dtype, stream=mx.cpu)
        if self.dtype == mx.float64:
            flat = flat.astype(mx.float32, stream=mx.cpu)
        return mx.as_strided(flat, self.shape, self.strides) if flat.size else mx.zeros(self.shape, flat.dtype)


def rebuild(storage, offset, shape, strides, *_):
    """torch._utils._rebuild_tensor_v2 -> Stored. storage: its bytes and their type."""
    data, dtype = storage
    if min((*strides, *shape, offset), default=0) < 0:
        raise ValueError("a tensor of negative strides")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides)) if math.prod(shape) else offset
    if end * dtype.size > len(data):
        raise ValueError("a tensor is larger than what holds it")
    return Stored(data[offset * dtype.size : end * dtype.size], dtype, tuple(shape), tuple(strides))


class Unpickler(pickle.Unpickler):
    """Builds what a state dict is made of, tensors and plain containers, and calls nothing else that a pickle names."""

    storages: dict  # name -> memoryview

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage") and name[:-7] in STORAGES:
            return STORAGES[name[:-7]]
        allowed = {
            "torch._utils._rebuild_tensor_v2": rebuild,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": tuple,
            "collections.OrderedDict": OrderedDict,
        }
        if f"{module}.{name}" not in allowed:
            raise ValueError(f"it holds a {module}.{name}, and nothing but tensors and plain containers is read")
        return allowed[f"{module}.{name}"]

    def persistent_load(self, pid):
        _, dtype, key, _, n = pid
        return self.storages[key][: n * dtype.size], dtype


def read_pt(path):
    """A PyTorch checkpoint (.pt, .pth, .ckpt, .bin), as torch.save writes it -> {name: mx.array}, without torch.

    The file is a zip archive: a pickle, which names and shapes the tensors, and each tensor's bytes, uncompressed;
    they are mapped, so that no more is read than is returned. The weights may lie under one of STATES, and their
    names begin with "module." (DataParallel's). A pickle can run any code: this one is held to tensors and plain
    containers. float64 is returned as float32. Raises ValueError.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if file_bytes[:1] == b"\x80":  # a pickle; a zip begins with PK
                raise ValueError("of the format before PyTorch 1.6; torch.load it and torch.save it again")
            with zipfile.ZipFile(file) as archive:
                members = {m.filename: m for m in archive.infolist()}
                pickled = next(name for name in members if name.endswith("data.pkl"))
                root = pickled.removesuffix("data.pkl")
                storages = {}
                for name, m in members.items():
                    if name.startswith(f"{root}data/"):
                        if m.compress_type != zipfile.ZIP_STORED:
                            raise ValueError("compressed, which torch.save never does")
                        local = file_bytes[m.header_offset : m.header_offset + 30]  # its last: lengths of what follows
                        start = m.header_offset + 30 + sum(local[26:30].cast("H"))
                        storages[name.removeprefix(f"{root}data/")] = file_bytes[start : start + m.file_size]
                unpickler = Unpickler(archive.open(pickled))
                unpickler.storages = storages
                state = unpickler.load()
        state = next((state[name] for name in STATES if isinstance(state.get(name), dict)), state)
        for name, tensor in state.items():
            if not (isinstance(name, str) and isinstance(tensor, Stored)):
                raise ValueError(f"its {name!r} is not a tensor, and it has none of {', '.join(STATES)}")
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except Exception as error:  # of many kinds: a damaged zip, a damaged pickle
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint ({type(error).__name__})") from None
    return {name.removeprefix("module."): tensor.read() for name, tensor in state.items()}
