"""Model folders whose JSON files say what they should not: one ValueError that names the file, and no traceback."""

import copy
import json
import random

import convert
import csm  # before mlx

import mlx.core as mx  # isort: skip
import pytest
from mlx.utils import tree_flatten  # noqa: F401

from conftest import write_model
from test_adapters import our_adapter
from test_layouts import folder

WRONG = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7.5,
    1e300,
    -0.0,
    2**31,
    2**70,
    "",
    "x",
    "4",
    "../x",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
)


def places(value, path=()):
    """Every place in a JSON value: its path of keys and indices."""
    yield path
    if isinstance(value, dict | list) and len(value) < 100:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(value, chance):
    """A copy with one to three places replaced or left out; the last place of a path is what changes."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice([place for place in places(value) if place] or [("new",)])
        part = value
        for key in path:
            part = part[key]
        if isinstance(part, dict) and chance.random() < 0.15:
            part.pop(last, None)
        else:
            part[last] = chance.choice(WRONG)
    return value if chance.random() > 0.03 else chance.choice(WRONG)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in our layout, in shards, in transformers' layout, and an adapter."""
    base = tmp_path_factory.mktemp("folders")
    write_model(base / "ours", voices=False)
    config = json.loads((base / "ours/config.json").read_text())
    weights = dict(mx.load(str(base / "ours/model.safetensors")))
    convert.convert(base / "ours", base / "transformers", to="transformers")
    convert.convert(base / "ours", base / "sesame", to="sesame")
    shards = {"weight_map": {}}
    for i, name in enumerate(weights):
        shards["weight_map"][name] = f"x-{i % 2}.safetensors"
    for i in range(2):
        part = {name: w for n, (name, w) in enumerate(weights.items()) if n % 2 == i}
        folder(base / "shards", part, config, f"x-{i}.safetensors")
    (base / "shards/model.safetensors.index.json").write_text(json.dumps(shards))
    for name in ("tokenizer.json", "tokenizer_config.json", "mimi.safetensors"):
        (base / "shards" / name).write_bytes((base / "ours" / name).read_bytes())
    settings, tensors = our_adapter(config, ("self_attn", "mlp"))
    folder(base / "adapter", tensors, None, "adapters.safetensors")
    (base / "adapter/adapter_config.json").write_text(json.dumps(settings))
    return base


def try_one(base, kind, name, content):
    """Load with another content of one file; the exception, or None."""
    file = base / kind / name
    before = file.read_bytes()
    file.write_text(json.dumps(content))
    try:
        csm.load(
            base / ("ours" if kind == "adapter" else kind), adapter=base / "adapter" if kind == "adapter" else None
        )
    except Exception as e:
        return e
    finally:
        file.write_bytes(before)


FILES = (
    ("ours", "config.json"),
    ("ours", "config.json"),
    ("ours", "tokenizer.json"),
    ("ours", "tokenizer_config.json"),
    ("transformers", "config.json"),
    ("transformers", "config.json"),
    ("sesame", "config.json"),
    ("shards", "model.safetensors.index.json"),
    ("adapter", "adapter_config.json"),
)


def test_500_damaged_folders(folders):
    chance, wrong, refused = random.Random(0), [], 0
    for i in range(500):
        kind, name = FILES[i % len(FILES)]
        content = mutated(json.loads((folders / kind / name).read_text()), chance)
        error = try_one(folders, kind, name, content)
        refused += error is not None
        if error is not None and not (isinstance(error, ValueError) and "\n" not in str(error)):
            wrong.append((kind, name, type(error).__name__, str(error)[:90], str(content)[:200]))
    assert not wrong, f"{len(wrong)} of {refused}: " + "\n".join(map(str, wrong[:100]))
