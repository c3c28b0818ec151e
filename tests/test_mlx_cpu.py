"""mlx_cpu: its products against NumPy's in float64, its functions against NumPy's and MLX's, and how it is loaded."""

import ctypes
import itertools
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import mlx_cpu

import mlx.core as mx  # isort: skip  after mlx_cpu
import numpy as np
import pytest

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
    env = {k: v for k, v in os.environ.items() if k not in ("CSM_PLAIN", "CSM_FAST_BLAS")} | env
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def output(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip(), err


# ---------------------------------------------------------------------------------------------------- products


@pytest.fixture(scope="module")
def sgemm():
    function = ctypes.CDLL(None).cblas_sgemm if len(mlx_cpu.BLAS) == 2 else pytest.skip("no C compiler")
    integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [*[integer] * 6, real, pointer, integer, pointer, integer, real, pointer, integer]
    return function


def matrix(rng, rows, columns, order, spare):
    """A random matrix, as its array and, a view of the same memory, with `spare` unused numbers a line."""
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
             (130, 700, 90)]  # fmt: skip
    for (m, n, k), (alpha, beta), spare in itertools.product(sizes, [(1, 0), (0.5, -2), (0, 1), (0, 0)], [0, 3]):
        a_held, a = matrix(rng, *((m, k) if ta == PLAIN else (k, m)), order, spare)
        b_held, b = matrix(rng, *((k, n) if tb == PLAIN else (n, k)), order, spare)
        c_held, c = matrix(rng, m, n, order, spare)
        if beta == 0:
            c[:] = np.nan  # which is not read
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


def test_products_through_mlx():
    rng = np.random.default_rng(1)
    for a, b in [((3, 1, 64), (3, 64, 90)), ((2, 4, 5, 64), (64, 200)), ((300, 70), (70,)), ((70,), (70, 300)),
                 ((1, 2048), (2048, 4096))]:  # fmt: skip
        x, y = (rng.standard_normal(s).astype(np.float32) for s in (a, b))
        expected = x.astype(float) @ y.astype(float)
        assert np.abs(np.array(mx.array(x) @ mx.array(y)) - expected).max() < 1e-3
        if y.ndim > 1:  # as y' of a matrix that is held the other way round
            turned = mx.contiguous(mx.array(y).swapaxes(-1, -2)).swapaxes(-1, -2)
            assert np.abs(np.array(mx.array(x) @ turned) - expected).max() < 1e-3
            assert np.abs(np.array(mx.addmm(mx.ones(y.shape[-1:]), mx.array(x), turned)) - 1 - expected).max() < 1e-3


def test_products_in_threads_and_after_a_fork():
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
    fork = "import os, mlx_cpu\nchild = os.fork()\n"  # before MLX has threads, which do not go along
    output(python(fork + REPORT + "child and os.waitpid(child, 0)[1] == 0 or child and 1 / 0\nos._exit(0)"))


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("without", ["", NO_COMPILER, NO_LIBRARY, NO_COMPILER + NO_LIBRARY, NO_OPENBLAS])
def test_with_and_without_compiler_and_library(without, tmp_path):
    out, err = output(python(without + REPORT, XDG_CACHE_HOME=str(tmp_path)))
    if without == "":
        compiled, library = out.split("|")
        assert compiled.startswith(str(tmp_path)) and "openblas" in library
    elif NO_LIBRARY in without:
        assert out == "" and "scipy-openblas32" in err  # how to have one
    else:
        assert "scipy" not in out  # a library with MLX's own names, if there is one


@pytest.mark.slow
def test_processes_that_compile_at_once(tmp_path):
    for _ in range(2):  # the second time nothing is compiled
        for process in [python(REPORT, XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]:
            assert output(process)[0].startswith(str(tmp_path))
    (library,) = (tmp_path / "csm").iterdir()
    library.write_bytes(b"not a library")
    assert output(python(REPORT, XDG_CACHE_HOME=str(tmp_path)))[0].startswith(str(library))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    out, _ = output(python(REPORT, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)))
    assert out.startswith(str(tmp_path)) and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_settings():
    report = "import mlx_cpu, mlx.core as mx\nprint(len(mlx_cpu.BLAS), mx.exp is mlx_cpu.exp)"
    assert output(python(report))[0] == "2 True"
    assert output(python(report, CSM_PLAIN="1"))[0] == "2 False"
    assert output(python(report, CSM_FAST_BLAS="0"))[0] == "0 True"
    assert output(python("import mlx.core\n" + report))[0] == "0 False"  # too late
    report = "import os, mlx_cpu\nprint(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OPENBLAS_CORETYPE'])"
    assert output(python(report, OPENBLAS_NUM_THREADS="7", OPENBLAS_CORETYPE="Haswell"))[0] == "7 Haswell"  # for others


# ---------------------------------------------------------------------------------------------------- functions

N = 2**16 + 8  # several threads take part, and the last numbers fill no register
REFERENCE = {"exp": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "erf": np.vectorize(math.erf)}
SLOPE = {"exp": np.exp, "sigmoid": lambda x: np.exp(-x) / (1 + np.exp(-x)) ** 2,
         "erf": lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x)}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCE)
def test_elementwise(name):
    function = getattr(mlx_cpu, name)
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


@pytest.mark.parametrize("name", REFERENCE)
def test_elementwise_gradients_and_transformations(name):
    function, own = getattr(mlx_cpu, name), getattr(mx, name)
    x = mx.linspace(-4, 4, N)
    slope = mx.grad(lambda x: function(x).sum())
    np.testing.assert_allclose(np.array(slope(x)), SLOPE[name](np.array(x, np.float64)), rtol=1e-5, atol=1e-9)
    curve, expected = (mx.grad(lambda x, f=f: mx.grad(lambda x: f(x).sum())(x).sum())(x) for f in (function, own))
    assert mx.allclose(curve, expected, rtol=1e-4, atol=1e-5)
    y = function(x)
    assert mx.allclose(mx.vmap(function)(x.reshape(2, -1)), y.reshape(2, -1), rtol=1e-6)
    assert mx.allclose(mx.compile(function)(x), y, rtol=1e-6)
    shapeless = mlx_cpu.compile(function, shapeless=True)
    assert all(mx.allclose(shapeless(part), function(part), atol=1e-6) for part in (x, x[: N // 3], x[:5]))


@pytest.mark.parametrize("name", REFERENCE)
def test_elementwise_transformations_of_transformations(name):
    function, own = getattr(mlx_cpu, name), getattr(mx, name)
    x, tangent = (mx.random.normal((8, N // 8), key=mx.random.key(i)) for i in (0, 1))

    def results(f):
        yield mx.grad(lambda x: (mx.vmap(f)(x) * tangent).sum())(x)
        yield mx.grad(lambda x: (mx.vmap(f, in_axes=1, out_axes=1)(x) * tangent).sum())(x)
        yield mx.vmap(mx.grad(lambda x: f(x).sum()))(x)
        yield mx.jvp(f, [x], [tangent])[1][0]
        yield mx.jvp(mx.vmap(f), [x], [tangent])[1][0]
        yield mx.jvp(mx.grad(lambda x: f(x).sum()), [x], [tangent])[1][0]

    for ours, expected in zip(results(function), results(partial(own, stream=mx.cpu)), strict=True):
        assert mx.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_to_mlx():
    assert mlx_cpu.exp(1.0).item() == mx.exp(1.0).item()
    x = mx.linspace(-3, 3, N)
    assert (mlx_cpu.exp(x[:9]) == mx.exp(x[:9], stream=mx.cpu)).all()
    assert (mlx_cpu.exp(x, stream=mx.cpu) == mx.exp(x, stream=mx.cpu)).all()
    for dtype in (mx.bfloat16, mx.float16, mx.int32, mx.complex64):
        assert (mlx_cpu.exp(x.astype(dtype)) == mx.exp(x.astype(dtype), stream=mx.cpu)).all()


def test_activations_of_mlx_nn():
    """They are compiled for all shapes at once."""
    code = "import mlx_cpu, mlx.core as mx, mlx.nn as nn\nx = mx.linspace(-9, 9, 100000)\n"
    code += (
        "for f in (nn.silu, nn.gelu, nn.sigmoid, nn.elu): print(f(x)[::1000].sum().item(), f(x[::1000]).sum().item())"
    )
    for line in output(python(code))[0].splitlines():
        assert len(set(line.split())) == 1, line


ATTENTION = [  # B, H, heads of k and v, T, S, mask
    (1, 8, 8, 50, 50, None), (2, 8, 2, 40, 70, "causal"), (1, 4, 4, 300, 300, "causal"), (3, 4, 2, 20, 90, (20, 90)),
    (2, 4, 2, 30, 99, (2, 1, 30, 99)), (2, 4, 2, 30, 99, (2, 4, 30, 99)), (1, 4, 1, 700, 700, (1, 1, 700, 700)),
    (16, 8, 2, 1, 99, (16, 1, 1, 99)), (2, 4, 4, 40, 60, "scores"),
]  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(case):
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
    own = partial(mx.fast.scaled_dot_product_attention, **options, stream=mx.cpu)
    ours = partial(mlx_cpu.scaled_dot_product_attention, **options)
    y, expected = ours(q, k, v), own(q, k, v)
    assert y.shape == expected.shape and mx.abs(y - expected).max() < 2e-6
    slopes = (
        mx.grad(lambda *x, f=f: (f(*x)[:, :, int(T > 1) :] ** 2).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, own)
    )
    assert all(mx.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*slopes))
    assert mx.abs(mx.compile(ours)(q, k, v) - expected).max() < 2e-6
