"""Any published CSM or Mimi checkpoint -> one folder in our own layout, and back to the layouts others read.

The layouts are csm_layouts.py's. All is lazy, so that a checkpoint is never in memory as a whole.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

# mimi puts a fast BLAS in place, which must come before mlx. Where mlx is loaded already it has done so, perhaps as the
# program itself: `python csm.py` and `python mimi.py` are named __main__ and not to be loaded again from here.
if "mlx.core" not in sys.modules:
    import mimi  # noqa: F401

import mlx.core as mx

import csm_layouts

# fmt: off
CSM_FILES = ("model.safetensors", "model.safetensors.index.json", "ckpt.safetensors", "*.index.json", "*.safetensors",
             "ckpt.pt", "*.pt", "*.pth", "*.ckpt")  # tried in this order
MIMI_FILES = ("mimi.safetensors", "tokenizer-*.safetensors")  # a Mimi by itself: ours, kyutai's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# fmt: on

# ---- reading ----------------------------------------------------------------------------------------------------


def read_file(path):
    """One checkpoint file, or the index of its shards -> (weights, metadata)"""
    import mimi as codec

    metadata = {}
    if path.suffix in (".pt", ".pth", ".ckpt"):
        weights = csm_layouts.read_pt(path)
    elif path.suffix == ".json":
        shards = {path.parent / shard for shard in codec.read_json(path).get("weight_map", {}).values()}
        weights = {name: w for shard in sorted(shards) for name, w in codec.read_safetensors(shard)[0].items()}
    else:
        weights, metadata = codec.read_safetensors(path)
    return weights, metadata


def find(folder, patterns):
    for pattern in patterns:
        files = sorted(f for f in folder.glob(pattern) if patterns == MIMI_FILES or not any(map(f.match, MIMI_FILES)))
        if len(files) > 1:
            raise ValueError(f"{folder} has several checkpoints, name one: {', '.join(f.name for f in files)}")
        if files:
            return files[0]


def read(source):
    """A folder, weights file or index -> (native config, native weights, (Mimi's config, its weights) or None), lazily.

    The config of a file lies beside it. Of a Mimi alone the first two are None; what its config lacks, mimi.py infers.
    """
    from mimi import read_json

    source = Path(source)
    folder = source if source.is_dir() else source.parent
    file = (find(folder, CSM_FILES) or find(folder, MIMI_FILES)) if source.is_dir() else source
    if file is None:
        raise ValueError(f"{source} has no checkpoint: no .safetensors, no index of shards, no .pt")
    weights, metadata = read_file(file)
    config = read_json(folder / "config.json")

    mimi = None
    if any(name.startswith("quantizer.") for name in weights):  # a Mimi by itself
        sizes, weights = csm_layouts.mimi_to_native(config if config.get("model_type") == "mimi" else {}, weights)
        return None, None, (sizes | json.loads(metadata.get("config", "{}")), weights)
    native, weights, mimi = csm_layouts.csm_to_native(config, weights, csm_1b())
    if mimi is None and (beside := find(folder, MIMI_FILES)):
        mimi = read(beside)[2]
    return native, weights, mimi


def csm_1b():
    import csm

    return asdict(csm.CSMConfig())


# ---- writing ----------------------------------------------------------------------------------------------------


def text_files(folder, tokenizer):
    """The tokenizer and the voices: {name in the destination: path}"""
    import mimi as codec

    place = Path(tokenizer) if tokenizer else folder
    if not place.exists():
        place = codec.download(str(tokenizer), *TOKENIZER_FILES)
    if place.is_file():
        files = {"tokenizer.model" if place.suffix == ".model" else "tokenizer.json": place}
    else:
        files = {name: place / name for name in TOKENIZER_FILES if (place / name).is_file()}
    if tokenizer and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise ValueError(f"{tokenizer} has no tokenizer.json and no tokenizer.model")
    return files | {f"prompts/{f.name}": f for f in (folder / "prompts").glob("*") if f.is_file()}


def write_folder(destination, files):
    """files: {name: a path to copy, a dict for JSON, or (weights, metadata)}. All of them are written, or none."""
    staging = destination.parent / f".{destination.name}.{os.getpid()}"
    try:
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            elif isinstance(content, str):
                path.write_text(content)
            elif isinstance(content, dict):
                path.write_text(json.dumps(content, indent=2) + "\n")
            else:
                mx.save_safetensors(str(path), *content)
        for name in files:
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(destination / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert(source, destination, *, mimi=None, tokenizer=None, quantize=None, group_size=64, dtype=None, to=None):
    """Write `source` (folder, file or Hub repo) as the folder `destination`; the names of its files come back.

    mimi, tokenizer: sources of these where `source` has none, or others are wanted. quantize: 4 or 8 bits. dtype: cast
    CSM's tensors (None: as stored). to: None for our layout, "sesame" or "transformers" for theirs. Raises ValueError.
    """
    import csm
    import mimi as codec

    source, destination = csm.locate(source), Path(destination).resolve()
    folder = source if source.is_dir() else source.parent
    if destination == folder.resolve() or destination.is_file():
        raise ValueError(f"{destination} is where the source is, or a file: the destination must be another folder")
    config, weights, sound = read(source)
    if mimi:
        sound = read(codec.locate(mimi))[2]
        if sound is None:
            raise ValueError(f"{mimi} has no Mimi")
    if to not in (None, "sesame", "transformers"):
        raise ValueError(f"to is sesame or transformers, not {to}")
    if to == "transformers" and sound is None:
        raise ValueError("transformers keeps the Mimi inside, and this source has none: give one with --mimi")
    if weights is None and (quantize or dtype or tokenizer):
        raise ValueError(f"{source} is a Mimi alone: quantize, dtype and tokenizer are for a CSM")

    files = {}  # name: what to write there
    if sound:
        sound_config, sound = asdict(codec.from_weights(sound[1], sound[0]).config), sound[1]  # checks them, too
    if weights:
        files = text_files(folder, tokenizer)
        model_config = csm.CSMConfig.from_dict(config)
        codec.check(csm.blank(model_config, weights), csm.split_heads(weights))
        config |= {part: asdict(getattr(model_config, part)) for part in ("backbone", "decoder")}
        if to and (quantize or model_config.quantization):
            raise ValueError("a quantized CSM can be written in our own layout only")
        if dtype:
            kind = csm.as_dtype(dtype)
            plain = [name for name in weights if not name.endswith((".scales", ".biases"))]
            weights |= {name: weights[name].astype(kind) for name in plain if weights[name].dtype != mx.uint32}
        if quantize:
            weights = csm.quantize_weights(weights, quantize, group_size)
            config |= {"quantization": {"group_size": group_size, "bits": quantize}}

    if to == "transformers":
        if "tokenizer.json" in files:
            both = "tokenizer.json", "tokenizer_config.json"
            marks, said = csm.Tokenizer(files[both[0]]), [codec.read_json(files.get(name, "")) for name in both]
            *said, ids = csm_layouts.to_transformers_tokenizer(*said, marks.bos, marks.eos)
            files |= dict(zip(both, said))
            config = ids | config
        files |= csm_layouts.to_transformers(weights and config, weights, sound_config, sound)
    elif weights:
        if to:
            config, weights = csm_layouts.to_sesame(config, weights, csm_1b())
        files |= {"config.json": config, "model.safetensors": (weights, {"format": "pt" if to else "mlx"})}
    if sound and to != "transformers":
        metadata = {"format": "mlx", "config": json.dumps(sound_config)}
        files[codec.DEFAULT_FILE if to else "mimi.safetensors"] = sound, metadata
    write_folder(destination, files)
    return sorted(files)


# ---- the command ------------------------------------------------------------------------------------------------


def main(argv=None):
    p = argparse.ArgumentParser(description="Any published CSM or Mimi checkpoint -> a folder that csm.py loads.")
    p.add_argument("source", help="csm-1b, a folder, .safetensors, .index.json or .pt file, or a Hub repo")
    p.add_argument("destination", help="the folder to write")
    p.add_argument("--mimi", help="where the Mimi comes from, if not from SOURCE")
    p.add_argument("--tokenizer", help="where the text tokenizer comes from, if not from SOURCE")
    p.add_argument("--quantize", type=int, choices=(4, 8), help="bits")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="of --quantize")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the CSM; as stored if not given")
    p.add_argument("--to", choices=("sesame", "transformers"), help="write another layout than ours")
    p.error = lambda message: p.exit(2, f"convert.py: error: {message}\n")  # one line, without the usage
    args = p.parse_args(argv)
    try:
        print(f"{args.destination}: {', '.join(convert(**vars(args)))}")
    except (ValueError, OSError, RuntimeError) as error:
        p.exit(2, f"convert.py: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        p.exit(130, "interrupted: nothing was written\n")


if __name__ == "__main__":
    main()
