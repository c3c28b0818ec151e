"""A cache of clips' codes: shards on disk, from which clips are read one at a time.

    shards = Shards(folder)
    codes = shards.add(key, computed)       # (F, K) -> a Codes
    shards.flush()                          # write what was added to the disk
    codes = shards.get(key)                 # the Codes, or None

A shard is a file, written atomically, with two arrays of np.save: the codes of its clips (frames, K), then its index
(clips,) of keys and numbers of frames. It is named by a hash of its keys, so processes that compute the same shard do
not disturb each other. files.npy maps a file's path, size and times to its key, so unchanged files are not read again.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np

import mimi

N_CLIPS, SECONDS = 1024, 60  # a shard is written after so many clips or seconds; a kill loses no more than that
KEY = np.dtype("V16")
INDEX = np.dtype([("key", KEY), ("frames", "<i4")])
FILES = np.dtype([("stamp", KEY), ("key", KEY)])


def hashed(*parts):
    """Hash parts (bytes) to 16 bytes."""
    mark = hashlib.sha256()
    for part in parts:
        mark.update(len(part).to_bytes(8, "little") + part)
    return mark.digest()[:16]


class Codes:
    """A clip's codes (F, K) int32; np.array(codes) reads them from the disk. key: 16 bytes that identify them."""

    __slots__ = ("key", "n", "place", "start")

    def __init__(self, key, place, start, n):
        self.key, self.start, self.n = key, start, n
        self.place = place  # a Shard, or the array itself until it is written

    def __len__(self):
        return self.n

    def __array__(self, dtype=None, copy=None):
        held = isinstance(self.place, np.ndarray)
        codes = self.place if held else self.place.read(self.start, self.n)
        return codes.astype(dtype or np.int32)


class Shard:
    """A shard's file: the offset and dtype of its codes. Raises ValueError or OSError if it is damaged."""

    def __init__(self, path):
        self.path = str(path)
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("a newer NumPy's format")
            shape, by_columns, self.dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 2 or by_columns or self.dtype.kind != "i":
                raise ValueError("not codes")
            self.offset, self.K = file.tell(), shape[1]
            file.seek(self.offset + shape[0] * self.K * self.dtype.itemsize)
            self.index = np.load(file)
        if self.index.dtype != INDEX or self.index["frames"].sum() != shape[0]:
            raise ValueError("its index does not fit")

    def read(self, start, n):
        """Read n frames (n, K) from frame `start` on."""
        offset = self.offset + start * self.K * self.dtype.itemsize
        codes = np.fromfile(self.path, self.dtype, n * self.K, offset=offset)
        if len(codes) < n * self.K:
            raise ValueError(f"{self.path} was cut off while it was read")
        return codes.reshape(n, self.K)


class Shards:
    """All shards in a folder. Keys are 16 bytes."""

    def __init__(self, folder):
        self.folder, self.found, self.waiting, self.since = Path(folder), {}, [], time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("shard-*.npy")):
            try:
                self.take(Shard(path))
            except (ValueError, OSError, EOFError) as e:
                print(f"{path} is damaged ({e}): its clips are encoded again", file=sys.stderr)
        self.files, self.n_files = {}, 0
        try:
            table = np.load(self.folder / "files.npy")
            self.files = dict(zip(each(table["stamp"]), each(table["key"])))
        except (ValueError, OSError, EOFError, IndexError):
            pass  # read all files again
        self.n_files = len(self.files)

    def take(self, shard):
        """Add a shard's clips."""
        start = 0
        for key, n in zip(each(shard.index["key"]), shard.index["frames"].tolist()):
            if key not in self.found:
                self.found[key] = Codes(key, shard, start, n)
            self.found[key].place, self.found[key].start = shard, start
            start += n
        shard.index = None

    def key_of(self, path, *more):
        """The key for a file's content and `more` bytes, such as a codec's. Raises OSError."""
        about = os.stat(path)
        times = f"{os.path.abspath(path)}\0{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        stamp = hashed(times.encode("utf-8", "surrogateescape"), *more)
        if stamp not in self.files:
            self.files[stamp] = hashed(Path(path).read_bytes(), *more)
        return self.files[stamp]

    def get(self, key):
        """The Codes, or None."""
        return self.found.get(key)

    def add(self, key, codes):
        """Add integers (F, K); returns their Codes."""
        codes = np.asarray(codes)
        kind = np.int16 if codes.max(initial=0) < 2**15 else np.int32
        self.found[key] = new = Codes(key, codes.astype(kind), 0, len(codes))
        self.waiting.append(new)
        if len(self.waiting) >= N_CLIPS or time.monotonic() - self.since > SECONDS:
            self.flush()
        return new

    def flush(self):
        """Write what was added, and files.npy."""
        by_width = {}
        for codes in self.waiting:
            by_width.setdefault(codes.place.shape[1], []).append(codes)
        for some in by_width.values():
            self.write(some)
        self.waiting, self.since = [], time.monotonic()
        if len(self.files) > self.n_files:
            table = np.empty(len(self.files), FILES)
            table["stamp"], table["key"] = (np.frombuffer(b"".join(x), KEY) for x in (self.files, self.files.values()))
            with mimi.replacing(self.folder / "files.npy") as file:
                np.save(file, table)
            self.n_files = len(self.files)

    def write(self, some):
        """Write Codes of the same K that are in memory as a shard."""
        index = np.empty(len(some), INDEX)
        index["key"] = np.frombuffer(b"".join(codes.key for codes in some), KEY)
        index["frames"] = [len(codes) for codes in some]
        path = self.folder / f"shard-{hashed(index['key'].tobytes()).hex()}.npy"
        with mimi.replacing(path) as file:
            np.save(file, np.ascontiguousarray(np.concatenate([codes.place for codes in some])))
            np.save(file, index)
            file.flush()
            os.fsync(file.fileno())
        self.take(Shard(path))


def each(keys):
    """Keys (n,) of type KEY -> [bytes]."""
    raw = np.ascontiguousarray(keys).tobytes()
    return [raw[i : i + KEY.itemsize] for i in range(0, len(raw), KEY.itemsize)]
