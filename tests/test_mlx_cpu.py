"""mlx_cpu: products against NumPy's float64, functions against NumPy's and MLX's, and loading."""

import ctypes
import itertools
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_cpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mlx_cpu does nothing here")
HERE = Path(mlx_cpu.__file__).parent.parent
ROW, COL, PLAIN, TURNED = 101, 102, 111, 112
REPORT = """
import mlx_cpu, mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
for m, n, k in ((1, 2051, 700), (5, 700, 300), (200, 300, 400)):
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k)))
    error = np.abs(np.array(mx.array(a) @ mx.array(b).T) - a.astype(float) @ b.T.astype(float)).max()
    assert error < 1e-3, error
assert np.abs(np.array(mx.exp(mx.zeros(9999))) - 1).max() < 1e-6
print(*mlx_cpu.BLAS, sep="|")
"""
NO_COMPILER = "import shutil; shutil.which = lambda name: None\n"
NO_OPENBLAS = "import importlib.util; importlib.util.find_spec = lambda name: None\n"  # but MKL, where it is
NO_LIBRARY = """
import ctypes, glob, importlib.util
importlib.util.find_spec, glob.glob, load = lambda name: None, lambda pattern: [], ctypes.CDLL
def CDLL(name, *args, **kwargs):
    if name in ("libopenblas.so.0", "libmkl_rt.so"):
        raise OSError(name)
    return load(name, *args, **kwargs)
ctypes.CDLL = CDLL
"""


def python(code, **env):
    """Run this code in a process, which compiles nothing in the background unless told to."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CSM_PLAIN", "CSM_FAST_BLAS")}
    env = kept | {"MLX_CPU_BACKGROUND": "0"} | env
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def output(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture(scope="module")
def primitives():
    """MLX's operations call primitives.cpp."""
    if not mlx_cpu.wait():
        pytest.skip("no C++ compiler, or CSM_PLAIN=1")


# ---------------------------------------------------------------------------------------------------- products


@pytest.fixture(scope="module")
def sgemm():
    function = mlx_cpu.products.mlx_cpu_sgemm if mlx_cpu.products else pytest.skip("no C compiler")
    integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [*[integer] * 6, real, pointer, integer, pointer, integer, real, pointer, integer]
    return function


def matrix(rng, rows, columns, order, spare):
    """A random matrix with `spare` unused numbers per line: (its array, a view of the same memory)."""
    lines, length = (rows, columns) if order == ROW else (columns, rows)
    held = np.full((lines, length + spare), np.nan, np.float32)
    held[:, :length] = rng.standard_normal((lines, length))
    return held, held[:, :length] if order == ROW else held[:, :length].T


@pytest.mark.parametrize("order", [ROW, COL])
@pytest.mark.parametrize("ta", [PLAIN, TURNED])
@pytest.mark.parametrize("tb", [PLAIN, TURNED])
def test_every_kind_of_product(sgemm, order, ta, tb):
    rng = np.random.default_rng(0)
    sizes = [(1, 1, 1), (1, 7, 3), (5, 1, 40), (1, 1030, 130), (1030, 1, 130), (3, 66, 267), (130, 6, 235),
             (32, 33, 216), (33, 32, 217), (1, 1, 300), (7, 2, 300), (40, 50, 60), (7, 5, 0), (200, 130, 150),
             (130, 700, 90), (33, 300, 129), (90, 35, 520), (300, 270, 257)]  # fmt: skip
    for (m, n, k), (alpha, beta), spare in itertools.product(sizes, [(1, 0), (0.5, -2), (0, 1), (0, 0)], [0, 3]):
        a_held, a = matrix(rng, *((m, k) if ta == PLAIN else (k, m)), order, spare)
        b_held, b = matrix(rng, *((k, n) if tb == PLAIN else (n, k)), order, spare)
        c_held, c = matrix(rng, m, n, order, spare)
        if beta == 0:
            c[:] = np.nan  # not read
        products = [x.astype(float) if t == PLAIN else x.T.astype(float) for x, t in ((a, ta), (b, tb))]
        expected = alpha * (products[0] @ products[1]) + (beta * c.astype(float) if beta else 0)
        lds = [max(1, held.shape[1]) for held in (a_held, b_held, c_held)]
        sgemm(order, ta, tb, m, n, k, alpha, a_held.ctypes.data, lds[0], b_held.ctypes.data, lds[1], beta,
              c_held.ctypes.data, lds[2])  # fmt: skip
        assert np.abs(c - expected).max() <= 2e-6 * (k + 4), (m, n, k, alpha, beta, spare)
        assert spare == 0 or np.isnan(c_held[:, -spare:]).all()


def test_products_keep_nan_and_infinity(sgemm):
    for m in (1, 4, 40):
        a, b = mx.ones((m, 100)), mx.ones((50, 100))
        a[0, 3], b[7, 99] = math.inf, math.nan
        c = np.array(a @ b.T)
        assert np.isnan(c[:, 7]).all() and (np.delete(c[0], 7) == np.inf).all()
        assert np.isfinite(np.delete(c[1:], 7, axis=1)).all()


def test_products_of_a_row_do_not_depend_on_the_others(sgemm):
    """Few rows give each what it gets alone; so do many, in pieces of any size."""
    w = mx.random.normal((500, 700), key=mx.random.key(0))
    x = mx.random.normal((600, 700), key=mx.random.key(1))
    few, many = np.array(x[:32] @ w.T), np.array(x @ w.T)
    for n in (1, 2, 7, 20):
        assert (np.array(x[3 : 3 + n] @ w.T) == few[3 : 3 + n]).all()
    for n in (33, 47, 100, 300):
        assert (np.array(x[250 : 250 + n] @ w.T) == many[250 : 250 + n]).all()


def test_products_through_mlx():
    rng = np.random.default_rng(1)
    for a, b in [((3, 1, 64), (3, 64, 90)), ((2, 4, 5, 64), (64, 200)), ((300, 70), (70,)), ((70,), (70, 300)),
                 ((1, 2048), (2048, 4096))]:  # fmt: skip
        x, y = (rng.standard_normal(s).astype(np.float32) for s in (a, b))
        expected = x.astype(float) @ y.astype(float)
        assert np.abs(np.array(mx.array(x) @ mx.array(y)) - expected).max() < 1e-3
        if y.ndim > 1:  # as the transpose of a matrix in the other order
            turned = mx.contiguous(mx.array(y).swapaxes(-1, -2)).swapaxes(-1, -2)
            assert np.abs(np.array(mx.array(x) @ turned) - expected).max() < 1e-3
            assert np.abs(np.array(mx.addmm(mx.ones(y.shape[-1:]), mx.array(x), turned)) - 1 - expected).max() < 1e-3


def test_products_in_threads():
    w = mx.random.normal((512, 512), key=mx.random.key(0))
    xs = [mx.random.normal((rows, 512), key=mx.random.key(rows)) for rows in (1, 3, 20, 300)]
    expected = [np.array(x @ w.T) for x in xs]
    same = []

    def work(x, y):
        same.append(all((np.array(x @ w.T) == y).all() for _ in range(50)))
        mx.clear_streams()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert same == [True] * 4


FORK = """
import ctypes, os, threading, mlx_cpu, numpy as np
a, b, c = (np.ones((n, 512), np.float32) for n in (40, 512, 40))
def product():
    real = ctypes.c_float(1)
    mlx_cpu.products.mlx_cpu_sgemm(101, 111, 112, 40, 512, 512, real, ctypes.c_void_p(a.ctypes.data), 512,
        ctypes.c_void_p(b.ctypes.data), 512, ctypes.c_float(0), ctypes.c_void_p(c.ctypes.data), 512)
    return (c == 512).all()
def busy():
    while True:
        product()
threading.Thread(target=busy, daemon=True).start()
for _ in range(60):
    child = os.fork()
    if child == 0:
        os._exit(0 if product() and product() else 1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_fork():
    """Fork while another thread computes products and holds the pool's locks."""
    output(python(FORK))
    fork = "import os, mlx_cpu\nchild = os.fork()\n"  # before MLX has threads, which a fork does not copy
    output(python(fork + REPORT + "child and os.waitpid(child, 0)[1] == 0 or child and 1 / 0\nos._exit(0)"))


def test_a_library_of_others_is_left_alone():
    """mlx_cpu adds no symbols to the process: lookups find what was there before."""
    code = "import ctypes\nbefore = [hasattr(ctypes.CDLL(None), n) for n in names]\nimport mlx_cpu\n"
    code += "assert mlx_cpu.products and before == [hasattr(ctypes.CDLL(None), n) for n in names]"
    output(python("names = 'cblas_sgemm', 'threads', 'rest', 'mlx_cpu_run'\n" + code))


# ---------------------------------------------------------------------------------------------------- quantized


def quantized(x, n, group, bits, seed=0):
    w = mx.random.normal((n, x.shape[-1]), key=mx.random.key(seed)) * 0.05
    packed = mx.quantize(w, group, bits)
    return packed, np.array(mx.dequantize(*packed, group_size=group, bits=bits)).astype(float)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_products(primitives, bits, group):
    for rows, n, k in ((1, 1, 128), (1, 70, 256), (2, 8, 1024), (3, 33, 128), (4, 300, 512), (7, 66, 2176),
                       (32, 130, 256), (33, 130, 1152), (200, 257, 384)):  # fmt: skip
        x = mx.random.normal((rows, k), key=mx.random.key(rows)) * 10 ** mx.random.uniform(-3, 3, (rows, 1))
        packed, w = quantized(x, n, group, bits)
        y = np.array(mx.quantized_matmul(x, *packed, group_size=group, bits=bits))
        expected = np.array(x, np.float64) @ w.T
        assert y.dtype == np.float32 and y.shape == (rows, n)
        spread = np.sqrt((np.array(x) ** 2).sum(1, keepdims=True)) * w.std()
        assert (np.abs(y - expected) / spread).max() < 2e-4, (rows, n, k)


def test_quantized_products_of_a_row_with_outliers(primitives):
    """Massive activations: a few numbers a thousand times larger do not cost the others their precision."""
    x = mx.random.normal((1, 4096), key=mx.random.key(1))
    x[0, 7], x[0, 2000] = 3000.0, -1000.0
    packed, w = quantized(x, 500, 64, 8)
    w[:, [7, 2000]] = 0  # only the other numbers' share counts
    without = mx.array(x)
    without[0, 7], without[0, 2000] = 0, 0
    y, big = (np.array(mx.quantized_matmul(v, *packed, group_size=64, bits=8), np.float64) for v in (x, x - without))
    expected = np.array(without, np.float64) @ w.T
    assert (y - big - expected).std() < 5e-3 * expected.std()  # 0.03 with one scale for the whole row


def test_quantized_products_of_all_kinds_of_arrays(primitives):
    x = mx.random.normal((2, 3, 5, 256), key=mx.random.key(0))
    packed, w = quantized(x, 40, 64, 4)
    product = partial(mx.quantized_matmul, group_size=64, bits=4)
    for view in (
        x,
        x[:, 1],
        x[:, :, -1:],
        x.swapaxes(1, 2),
        x[0, 0, 0],
        x[..., ::-1],
        mx.broadcast_to(x[:1, :1], x.shape),
    ):
        expected = np.array(view, np.float64) @ w.T
        np.testing.assert_allclose(np.array(product(view, *packed)), expected, atol=2e-3)
    expected = np.array(product(x[0, 0], *packed))
    for dtype, precision in ((mx.float16, 2**-11), (mx.bfloat16, 2**-8)):
        for rows in (x[0, 0].astype(dtype), mx.random.normal((50, 256)).astype(dtype)):
            kept = [p.astype(dtype) for p in packed[1:]]
            y = product(rows, packed[0], *kept)
            matrix = mx.dequantize(packed[0], *(p.astype(mx.float32) for p in kept), group_size=64, bits=4)
            exact = np.array(rows.astype(mx.float32), np.float64) @ np.array(matrix, np.float64).T
            error = np.abs(np.array(y.astype(mx.float32)) - exact)
            assert y.dtype == dtype and (error <= precision * np.abs(exact) + 5e-4).all()  # only the result is rounded
    assert product(x[:0], *packed).shape == (0, 3, 5, 40)
    many = mx.random.normal((40, 512), key=mx.random.key(3))[:, ::2]  # many non-contiguous rows
    np.testing.assert_allclose(np.array(product(many, *packed)), np.array(many, np.float64) @ w.T, atol=2e-3)
    for values in (math.nan, math.inf):
        bad = mx.array(x[0, 0])
        bad[2, 100] = values
        y = np.array(product(bad, *packed))
        assert not np.isfinite(y[2]).any() and (np.delete(y, 2, 0) == np.delete(expected, 2, 0)).all()
    assert (np.array(product(mx.zeros((3, 256)), *packed)) == 0).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantized_products_with_scales_of_16_bits(primitives, tmp_path, bits, dtype):
    """They are read as they are, with the result of the same scales in float32; MLX does what we do not."""
    w, tangent = (mx.random.normal((n, 256), key=mx.random.key(n)) for n in (40, 3))
    weight, *kept = mx.quantize(w.astype(dtype), 64, bits)
    wide = [p.astype(mx.float32) for p in kept]
    product = partial(mx.quantized_matmul, group_size=64, bits=bits)
    assert kept[0].dtype == dtype
    rows = mx.random.normal((80, 256), key=mx.random.key(0))
    for x in (rows[:1], rows[:3], rows[:50], rows[::2], mx.broadcast_to(rows[:1], (50, 256)), rows.astype(dtype)):
        y, expected = product(x, weight, *kept), product(x, weight, *(kept if x.dtype == dtype else wide))
        assert y.dtype == x.dtype and (y == expected).all()
    apart = [mx.stack([p, p], 2)[..., 0] for p in kept]  # not contiguous
    assert mx.allclose(product(rows, weight, *apart), product(rows, weight, *wide), atol=2e-3)
    x, across = rows[:3], rows[:5, :40]
    y = product(x, weight, *kept)
    assert mx.allclose(product(across, weight, *kept, transpose=False), product(across, weight, *wide, transpose=False))
    for change in (
        lambda f: mx.grad(lambda x: (f(x) ** 2).sum())(x),
        lambda f: mx.jvp(f, [x], [tangent])[1][0],
        lambda f: mx.compile(lambda x: f(x * 2) + 1)(x),
    ):
        assert mx.allclose(*(change(lambda x, s=s: product(x, weight, *s)) for s in (kept, wide)), atol=1e-4)
    mx.export_to_dot(str(tmp_path / "graph"), y)
    assert "AsType" not in (tmp_path / "graph").read_text()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantizing(primitives, group, bits, dtype):
    """The very numbers of MLX's own, which quantizes what is not contiguous."""
    w = mx.random.normal((513, 256), key=mx.random.key(0)) * mx.exp(2 * mx.random.normal((513, 1)))
    w[3], w[4], w[5], w[6], w[7] = 0, 1e-9, 7.5, mx.abs(w[6]), -mx.abs(w[7])
    w = w.astype(dtype)
    ours, own = mx.quantize(w, group, bits), mx.quantize(mx.contiguous(w.T).T, group, bits)
    for a, b in zip(ours, own):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    assert all((a == b[:6]).all() for a, b in zip(mx.quantize(w[:6], group, bits), ours))  # less than a thread's part


def test_quantized_products_transformed(primitives):
    """Gradients, jvp and compile work as MLX's, with our products inside."""
    x, tangent = (mx.random.normal((3, 256), key=mx.random.key(i)) for i in (0, 1))
    packed, w = quantized(x, 40, 64, 8)
    product = partial(mx.quantized_matmul, group_size=64, bits=8)
    y = np.array(x, np.float64) @ w.T
    np.testing.assert_allclose(np.array(mx.grad(lambda x: (product(x, *packed) ** 2).sum())(x)), 2 * y @ w, atol=5e-3)
    slope = mx.grad(lambda s: product(x, packed[0], s, packed[2]).sum())(packed[1])
    assert slope.shape == packed[1].shape and mx.abs(slope).max() > 1
    moved = mx.jvp(lambda x: product(x, *packed), [x], [tangent])[1][0]
    np.testing.assert_allclose(np.array(moved), np.array(tangent, np.float64) @ w.T, atol=2e-3)
    for shapeless in (False, True):
        compiled = mx.compile(lambda x: mx.exp(product(x, *packed) * 0.1), shapeless=shapeless)
        for part in (x, x[:1]):
            np.testing.assert_allclose(np.array(compiled(part)), np.exp(y[: len(part)] * 0.1), rtol=1e-3)


def test_quantized_products_are_repeatable(primitives):
    x = mx.random.normal((5, 2048), key=mx.random.key(0))
    packed, _ = quantized(x, 1000, 64, 8)
    product = partial(mx.quantized_matmul, group_size=64, bits=8)
    first = np.array(product(x, *packed))
    alone = np.concatenate([np.array(product(x[i : i + 1], *packed)) for i in range(5)])
    assert (first == alone).all()  # each row of a batch is the same as alone
    assert all((np.array(product(x, *packed)) == first).all() for _ in range(50))


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("without", ["", NO_COMPILER, NO_LIBRARY, NO_COMPILER + NO_LIBRARY, NO_OPENBLAS])
def test_with_and_without_compiler_and_library(without, tmp_path):
    out, err = output(python(without + REPORT, XDG_CACHE_HOME=str(tmp_path)))
    if without == "":
        compiled, library = out.split("|")
        assert compiled.startswith(str(tmp_path)) and "openblas" in library
    elif without == NO_LIBRARY:
        assert out.endswith("libmlx.so") and "install scipy-openblas32 or mkl" in err
    elif NO_LIBRARY in without:
        assert out == "" and "there is no compiler" in err and "install a C compiler" in err
    else:
        assert "scipy" not in out  # a library with MLX's own names, if there is one


def test_the_order_of_imports_does_not_matter():
    first, second = (
        output(python(code + REPORT))[0] for code in ("", "import mlx.core as mx; mx.ones((9, 9)) @ mx.ones(9)\n")
    )
    assert first == second != ""
    out, err = output(python("import mlx.core\n" + NO_COMPILER + REPORT))
    assert out == "" and "import mlx_cpu, or csm, before mlx" in err  # too late to help, so it says so


@pytest.mark.slow
def test_processes_that_compile_at_once(tmp_path):
    for _ in range(2):  # the second time nothing is compiled
        for process in [python(REPORT, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]:
            assert output(process)[0].startswith(str(tmp_path))
    (library,) = (tmp_path / "csm").iterdir()
    library.write_bytes(b"not a library")
    assert output(python(REPORT, XDG_CACHE_HOME=str(tmp_path)))[0].startswith(str(library))


def test_libraries_that_are_no_longer_loaded_are_removed(tmp_path):
    folder = tmp_path / "csm"
    folder.mkdir()
    names = "mlx_cpu-0.so", "mlx_cpu-1.so", "notes"
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, (0, 0) if name != "mlx_cpu-1.so" else None)
    output(python(REPORT, XDG_CACHE_HOME=str(tmp_path)))
    assert [name for name in names if (folder / name).exists()] == ["mlx_cpu-1.so", "notes"]


def test_a_cache_that_cannot_be_written(tmp_path):
    """Then the libraries go to a private folder among the temporary files, which nobody else can write."""
    (tmp_path / "file").touch()
    folder = tmp_path / f"csm-{os.getuid()}"
    for _ in range(2):
        out, _ = output(python(REPORT, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)))
        assert out.startswith(str(folder)) and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    out, err = output(python(REPORT, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)))
    assert not out.startswith(str(folder)) and "may be another user's" in err
    assert "let XDG_CACHE_HOME be a folder" in err and "C compiler" not in err  # which is there


def test_no_home(tmp_path):
    no_home = "import os.path; os.path.expanduser = lambda path: path\n"  # as for a user without an entry in passwd
    out, _ = output(
        python(
            f"import os; os.chdir({str(tmp_path)!r}); import sys; sys.path.insert(0, {str(HERE)!r})\n"
            + no_home
            + REPORT,
            XDG_CACHE_HOME="",
            TMPDIR=str(tmp_path),
        )
    )
    assert out.startswith(f"{tmp_path}/csm-{os.getuid()}/") and not (tmp_path / "~").exists()


def test_the_clock_of_the_cpu_is_not_in_the_key(monkeypatch):
    texts = [
        f"processor\t: 0\nmodel name\t: X\ncpu MHz\t\t: {clock}\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n"
        for clock in (2000, 3000)
    ]
    infos = set()
    for text in texts:
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        infos.add(mlx_cpu.cpu_info())
    assert infos == {"model name\t: X\nflags\t\t: fpu avx2"}


def test_number_of_threads(monkeypatch, tmp_path):
    cores = len(os.sched_getaffinity(0))
    for text, threads in (("3", 3), ("0", 1), (str(2**31), max(64, cores)), ("many", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads is None or mlx_cpu.n_threads() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    for quota, threads in ((0.5, 1), (1.6, min(2, cores)), (math.inf, cores)):
        monkeypatch.setattr(mlx_cpu, "cpu_quota", lambda quota=quota: quota)
        assert mlx_cpu.n_threads() == threads


def test_quota_of_control_groups(tmp_path):
    from_root = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        "sys/fs/cgroup/a/cpu.max": "50000 100000",
    }
    for name, text in from_root.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert mlx_cpu.cpu_quota(tmp_path) == 0.5
    (tmp_path / "sys/fs/cgroup/a/cpu.max").write_text("max 100000")
    assert mlx_cpu.cpu_quota(tmp_path) == math.inf
    (tmp_path / "sys/fs/cgroup/cpu").mkdir()
    for name, number in (("quota", 150000), ("period", 100000)):
        (tmp_path / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").write_text(f"{number}\n")
    assert mlx_cpu.cpu_quota(tmp_path) == 1.5
    assert mlx_cpu.cpu_quota(tmp_path / "nothing") == math.inf


def test_settings():
    report = "import mlx_cpu\nprint(len(mlx_cpu.BLAS), mlx_cpu.wait())"
    installed = mlx_cpu.wait()
    assert output(python(report))[0] == f"2 {installed}"
    assert output(python(report, CSM_PLAIN="1"))[0] == "2 False"
    assert output(python(report, CSM_FAST_BLAS="0"))[0] == "0 False"
    report = "import os, mlx_cpu\nprint(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OPENBLAS_CORETYPE'])"
    assert output(python(report, OPENBLAS_NUM_THREADS="7", OPENBLAS_CORETYPE="Haswell"))[0] == "7 Haswell"  # for others


BACKGROUND = """
import sys, time, mlx_cpu
assert not mlx_cpu.installed
print(mlx_cpu.wait(), sorted(p.name[:8] for p in mlx_cpu.folders()[0].iterdir() if p.suffix == ".so"))
"""


def test_compiling_in_the_background(primitives, tmp_path):
    """Of two processes only one compiles, and both get the primitives."""
    processes = [python(BACKGROUND, XDG_CACHE_HOME=str(tmp_path), MLX_CPU_BACKGROUND="1") for _ in range(2)]
    for process in processes:
        assert output(process)[0] == "True ['mlx_cpu-', 'primitiv']"
    names = sorted(p.name for p in (tmp_path / "csm").iterdir())
    assert len(names) == 3 and names[0] == "lock" and names[2].startswith("primitives-")
    out, err = output(python("import mlx_cpu; print(mlx_cpu.installed)", XDG_CACHE_HOME=str(tmp_path)))
    assert (out, err) == ("True", "")


def test_a_compiler_that_fails(primitives, tmp_path):
    """Each start prints one line and does not retry; MLX computes as before."""
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin/c++"
    compiler.write_text("#!/bin/sh\necho called >> $0.log\necho 'a.h: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "MLX_CPU_BACKGROUND": "1"}
    out, _ = output(python("import mlx_cpu; print(mlx_cpu.wait())\n" + REPORT, **env))
    assert out.startswith("False")
    out, err = output(python("import mlx_cpu; print(mlx_cpu.wait())\n" + REPORT, **env))
    assert out.startswith("False") and err.count("\n") == 1 and "a.h: error: no such header" in err
    assert Path(f"{compiler}.log").read_text() == "called\n"


def test_without_a_cpp_compiler():
    none = "import shutil; which = shutil.which; shutil.which = lambda name: None if '++' in name else which(name)\n"
    out, err = output(python(none + REPORT))
    assert "|" in out and err.count("\n") == 1 and "g++" in err


def test_a_library_whose_results_are_wrong_is_not_kept(primitives, tmp_path, monkeypatch):
    source = mlx_cpu.primitives()
    source.path = tmp_path / "primitives.cpp"
    text = (HERE / "mlx_cpu/primitives.cpp").read_text()
    assert text.count("return 1 / (1 + exponential(-x))") == 1
    source.path.write_text(text.replace("return 1 / (1 + exponential(-x))", "return exponential(-x)"))
    code = (
        "import mlx_cpu, pathlib\nmlx_cpu.HERE = pathlib.Path("
        + repr(str(tmp_path))
        + ")\nprint(mlx_cpu.compile_primitives())"
    )
    out, _ = output(python(code, XDG_CACHE_HOME=str(tmp_path), CSM_PLAIN="1"))
    assert out == "the results are not MLX's" and not list((tmp_path / "csm").glob("primitives*.so"))


def test_compiled_functions_need_no_compiler_and_no_folder(tmp_path):
    """mx.compile needs g++ and TMPDIR to fuse operations, and fails without."""
    code = "import mlx_cpu, mlx.core as mx, mlx.nn as nn\nf = mx.compile(lambda x: x * mx.exp(x) + 1)\n"
    code += "print(f(mx.zeros(5)).sum().item(), nn.silu(mx.zeros(5)).sum().item())"
    (tmp_path / "mlx").touch()
    assert output(python(code, TMPDIR=str(tmp_path)))[0] == "5.0 0.0"


# ---------------------------------------------------------------------------------------------------- functions

N = 2**16 + 8  # several threads take part, and the last numbers fill no register
REFERENCE = {"exp": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": np.vectorize(math.erf)}
SLOPE = {"exp": np.exp, "sigmoid": lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2,
         "erf": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x)}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE)
def test_elementwise(primitives, name):
    function = getattr(mx, name)
    for low, high in ((-87, 88), (-5, 5), (-1e-3, 1e-3)):
        x = np.linspace(low, high, N).astype(np.float32)
        y, expected = np.array(function(mx.array(x))), REFERENCE[name](x.astype(float))
        assert y.dtype == np.float32
        assert (np.abs(y - expected) <= 5e-7 * np.abs(expected) * max(1, high / 6)).all()  # as x is rounded itself
    edges = [-math.inf, -200, -90, 0, 90, 200, math.inf, math.nan]
    y = np.array(function(mx.array(edges * (N // 8))))[:8]
    with np.errstate(over="ignore"):
        expected = REFERENCE[name](np.array(edges, np.float64)).astype(np.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-37)


def test_erf_stays_within_one(primitives):
    x = mx.linspace(-6, 6, 2**20)
    assert mx.abs(mx.erf(x)).max() == 1 and mx.isfinite(mx.log(1 - mx.erf(x[: 2**19]))).all()


@pytest.mark.parametrize("name", REFERENCE)
def test_elementwise_gradients_and_transformations(primitives, name):
    function = getattr(mx, name)
    x = mx.linspace(-4, 4, N)
    exact = SLOPE[name](np.array(x, np.float64))
    np.testing.assert_allclose(np.array(mx.grad(lambda x: function(x).sum())(x)), exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(mx.jvp(function, [x], [mx.ones(N)])[1][0]), exact, rtol=1e-5, atol=1e-6)
    y = function(x)
    assert mx.allclose(mx.vmap(function)(x.reshape(2, -1)), y.reshape(2, -1), rtol=1e-6)
    assert mx.allclose(mx.compile(function)(x), y, rtol=1e-6)
    shapeless = mx.compile(function, shapeless=True)
    assert all(mx.allclose(shapeless(part), function(part), atol=1e-6) for part in (x, x[: N // 3], x[:5]))


def test_elementwise_of_views_and_of_other_types(primitives):
    x = mx.random.normal((300, 400), key=mx.random.key(0))
    expected = np.exp(np.array(x, np.float64))
    views = (
        (lambda a: a),
        (lambda a: a.T),
        (lambda a: a[:, ::2]),
        (lambda a: a[5:]),
        (lambda a: a[:, None] + a[:3, :1] * 0),
    )
    for view in views:
        np.testing.assert_allclose(np.array(mx.exp(view(x))), view(expected), rtol=1e-6)
    x_before = np.array(x)
    mx.eval(mx.exp(x))
    assert (np.array(x) == x_before).all()  # the result takes an array's place only where nobody else holds it
    np.testing.assert_allclose(np.array(mx.exp(x + 0.0)), expected, rtol=1e-6)
    for dtype in (mx.bfloat16, mx.float16):
        np.testing.assert_allclose(np.array(mx.exp(x.astype(dtype)).astype(mx.float32)), expected, rtol=0.05)
    assert mx.exp(mx.zeros((2000,), mx.complex64)).dtype == mx.complex64


def test_activations_of_mlx_nn():
    """They are compiled for all shapes, so one call's shapes must not be baked in."""
    import mlx.nn as nn

    x = mx.linspace(-9, 9, 100000)
    for f in (nn.silu, nn.gelu, nn.sigmoid, nn.elu):
        assert mx.allclose(f(x)[::1000], f(x[::1000]), rtol=1e-5, atol=1e-6)


def agree(function, *arrays, limit=2e-6):
    """Compare values, gradients, jvp, compiled and vmapped results of `function` with our operations and MLX's."""

    def results(f):
        yield f(*arrays)
        yield from mx.grad(lambda *x: (f(*x) ** 3).sum(), argnums=tuple(range(len(arrays))))(*arrays)
        yield mx.jvp(f, list(arrays), [mx.cos(x) for x in arrays])[1][0]
        yield mx.compile(f)(*arrays)
        yield mx.vmap(f, in_axes=(0, *[None] * (len(arrays) - 1)))(mx.stack([arrays[0], arrays[0] + 1]), *arrays[1:])

    for ours, own in zip(results(function), results(mlx_cpu.plain_when_exported(function))):
        assert ours.shape == own.shape and ours.dtype == own.dtype
        assert mx.abs(ours - own).max() <= limit * mx.abs(own).max()


def names_of_operations(tmp_path, *arrays):
    mx.export_to_dot(str(tmp_path / "graph"), *arrays)
    return (tmp_path / "graph").read_text()


def test_normalization(primitives, tmp_path):
    x = mx.random.normal((3, 5, 200), key=mx.random.key(0))
    weight = mx.random.normal((200,), key=mx.random.key(1))
    assert "Norm" in names_of_operations(tmp_path, mx.fast.rms_norm(x, weight, 1e-5))
    for view in (x, x[:, ::2], x.swapaxes(0, 1), x[..., ::-1], mx.broadcast_to(x[:1], x.shape)):
        agree(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), view, weight)
    agree(lambda x: mx.fast.rms_norm(x, None, 0.1), x)
    agree(lambda x: mx.fast.rms_norm(x, weight[:5], 1e-5), x.swapaxes(1, 2))
    shapeless = mx.compile(lambda x: mx.fast.rms_norm(x, weight, 1e-5), shapeless=True)
    assert all((shapeless(part) == mx.fast.rms_norm(part, weight, 1e-5)).all() for part in (x, x[:2]))
    assert mx.isnan(mx.fast.rms_norm(mx.full((1, 40), math.nan), None, 1e-5)).all()
    assert mx.fast.rms_norm(x.astype(mx.bfloat16), None, 1e-5).dtype == mx.bfloat16
    assert mx.fast.rms_norm(x[:0], weight, 1e-5).shape == (0, 5, 200)
    with pytest.raises((ValueError, RuntimeError)):
        mx.eval(mx.fast.rms_norm(x, weight[:7], 1e-5))


def test_dequantize(primitives, tmp_path):
    w = mx.random.normal((4, 60, 256), key=mx.random.key(0))
    for bits, group in itertools.product((4, 8), (32, 64, 128)):
        dequantize = partial(mx.dequantize, group_size=group, bits=bits)
        packed = mx.quantize(w, group, bits)
        assert "Dequantize" in names_of_operations(tmp_path, dequantize(*packed))
        expected = mlx_cpu.plain_when_exported(dequantize)(*packed)
        for view in (lambda x: x, lambda x: x[:, ::3], lambda x: x.swapaxes(0, 1), lambda x: x[1, 2]):
            y = dequantize(*map(view, packed))
            assert y.shape == view(expected).shape and mx.allclose(y, view(expected), atol=1e-6)
        shapeless = mx.compile(lambda *x, f=dequantize: f(*x), shapeless=True)
        assert all(mx.allclose(shapeless(*(x[:n] for x in packed)), expected[:n], atol=1e-6) for n in (4, 2))
        slopes = (
            mx.grad(lambda s, f=f, p=packed: (f(p[0], s, p[2]) ** 2).sum())(packed[1])
            for f in (dequantize, mlx_cpu.plain_when_exported(dequantize))
        )
        assert mx.allclose(*slopes, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("traditional", [True, False])
def test_rope(primitives, traditional, tmp_path):
    x = mx.random.normal((2, 7, 5, 64), key=mx.random.key(0)).swapaxes(1, 2)
    periods = mx.exp(mx.arange(32) * 0.3)
    rope = partial(mx.fast.rope, traditional=traditional)
    for offset in (0, 999, mx.array(5), mx.array([3, 70])):
        agree(lambda x, o=offset: rope(x, 64, base=None, scale=1.0, offset=o, freqs=periods), x)
        agree(lambda x, o=offset: rope(x, 32, base=1e4, scale=0.5, offset=o), x, limit=1e-5)  # exp rounds otherwise
    y = rope(x[:, :, :1], 64, base=None, scale=1.0, offset=4, freqs=periods)
    assert "Rope" in names_of_operations(tmp_path, y) and mx.abs(y).max() > 1
    for other in (x[0], x.astype(mx.float16)):  # MLX's own
        assert rope(other, 64, base=1e4, scale=1.0, offset=0).shape == other.shape


def test_softmax(primitives):
    x = mx.random.normal((7, 3, 201), key=mx.random.key(0)) * 30
    some = (x[0, :, :n] + 0.0 for n in range(1, 36))  # more and fewer than registers hold
    for view in (x, x[0, 0], x.T, *some):
        expected = np.exp(np.array(view, np.float64) - np.array(view).max(-1, keepdims=True))
        expected /= expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(np.array(mx.softmax(view, axis=-1)), expected, atol=1e-6)
    y = mx.softmax(mx.array([[0.0, -math.inf], [math.inf, 0], [math.nan, 0]]), axis=-1)
    assert y[0].tolist() == [1, 0] and mx.isnan(y[1, 0]) and mx.isnan(y[2]).all()
    for at in (0, 17, 39):
        y = mx.softmax(mx.where(mx.arange(40) == at, mx.array([[math.nan], [-math.inf]]), 1.0), axis=-1)
        assert mx.isnan(y[0]).all() and y[1, at] == 0 and mx.allclose(y[1].sum(), mx.array(1.0))


ATTENTION = [  # B, H, heads of k and v, T, S, mask
    (1, 8, 8, 50, 50, None), (2, 8, 2, 40, 70, "causal"), (1, 4, 4, 300, 300, "causal"), (3, 4, 2, 20, 90, (20, 90)),
    (2, 4, 2, 30, 99, (2, 1, 30, 99)), (2, 4, 2, 30, 99, (2, 4, 30, 99)), (1, 4, 1, 700, 700, (1, 1, 700, 700)),
    (16, 8, 2, 1, 99, (16, 1, 1, 99)), (2, 4, 4, 40, 60, "scores"),
]  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(primitives, case):
    *sizes, mask = case
    B, H, n, T, S = sizes
    keys = mx.random.split(mx.random.key(0), 4)
    q, k, v = (mx.random.normal((B, T if i == 0 else S, H if i == 0 else n, 32), key=keys[i]) for i in range(3))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if mask == "scores":
        mask = mx.random.normal((T, S), key=keys[3])
    elif isinstance(mask, tuple):
        mask = mx.random.uniform(shape=mask, key=keys[3]) < 0.7
        mask[..., : int(T > 1), :] = False  # a row that sees nothing
    options = {"scale": 0.2, "mask": mask}
    ours = partial(mx.fast.scaled_dot_product_attention, **options)
    own = mlx_cpu.plain_when_exported(ours)
    y, expected = ours(q, k, v), own(q, k, v)
    assert y.shape == expected.shape and mx.abs(y - expected).max() < 2e-6
    slopes = (
        mx.grad(lambda *x, f=f: (f(*x)[:, :, int(T > 1) :] ** 2).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, own)
    )
    assert all(mx.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*slopes))
    assert mx.abs(mx.compile(ours)(q, k, v) - expected).max() < 2e-6


def test_attention_refuses_what_mlx_refuses():
    x = mx.zeros((1, 4, 64, 32))
    wrong = mx.ones((63, 64), mx.bool_)
    for q, k, v, mask in ((x, x[:, :3], x[:, :3], None), (x, x, x[:, :, :60], None), (x, x[..., :16], x, None),
                          (x, x, x, "nonsense"), (x, x, x, wrong), (x[0], x, x, None),
                          (x, x, x[:, :2], None)):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask))


def test_export(tmp_path):
    q = mx.random.normal((1, 4, 64, 32), key=mx.random.key(0))

    def f(q):
        return mx.exp(mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1, mask="causal"))

    mx.export_function(str(tmp_path / "f"), f, q)
    assert mx.allclose(mx.import_function(str(tmp_path / "f"))(q)[0], f(q), atol=1e-6)

    def g(q):
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1)

    mx.export_function(str(tmp_path / "g"), g, q, shapeless=True)
    with mx.exporter(str(tmp_path / "h"), g, shapeless=True) as export:
        export(q)
    longer = mx.random.normal((1, 4, 99, 32), key=mx.random.key(1))
    for name in ("g", "h"):
        assert mx.allclose(mx.import_function(str(tmp_path / name))(longer)[0], g(longer), atol=1e-6)
