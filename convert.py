"""Convert any published CSM or Mimi checkpoint to a folder in our layout, and back to the layouts of others.

    python convert.py unsloth/csm-1b my-csm --quantize 8
    python convert.py my-csm for-transformers --dequantize --to transformers

csm_layouts.py knows the layouts. Arrays are lazy: a tensor is read and converted when it is written.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx
import csm_layouts
import mimi as codec
from csm_tools import adapters, checkpoints, command, gguf

import mlx.core as mx  # isort: skip


def read(source):
    """A folder or file -> (config, weights, (config, weights) of the Mimi beside or inside it, or None).

    If it holds only a Mimi, the first two are None.
    """
    file = checkpoints.weights_file(source)
    beside = checkpoints.first_match(source if source.is_dir() else source.parent, *csm_layouts.MIMI_FILES)
    if not file and (beside or source.is_file()):
        return None, None, read_mimi(source if source.is_file() else beside)
    names = checkpoints.read_weights(file)[0] if file and file.suffix != ".gguf" else ()
    if any(name.startswith(("quantizer.", "first.")) for name in names):
        return None, None, read_mimi(file)
    config, weights, inside = checkpoints.read_csm(source)
    return config, weights, read_mimi(beside) if beside else inside


def read_mimi(source):
    weights, config = checkpoints.read_mimi(source)
    return config, weights


def text_files(source, folder, tokenizer):
    """The files of the tokenizer and the voices: {name in the destination: path}."""
    place = Path(tokenizer) if tokenizer else folder
    if not place.exists():
        place = checkpoints.download(str(tokenizer), *csm_layouts.TOKENIZER)
    if place.is_file():
        files = {"tokenizer.model" if place.suffix == ".model" else "tokenizer.json": place}
    else:
        files = {name: place / name for name in csm_layouts.TOKENIZER if (place / name).is_file()}
    weights = checkpoints.weights_file(source)
    if not files and weights.suffix == ".gguf" and (inside := gguf.extract_tokenizer(weights)):
        files = {"tokenizer.json": inside}
    if tokenizer and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise ValueError(f"{tokenizer} has no tokenizer.json and no tokenizer.model")
    return files | {f"prompts/{f.name}": f for f in (folder / "prompts").glob("*") if f.is_file()}


def for_transformers(files):
    """The tokenizer as a CsmProcessor needs it: ({name: content}, ids for the config)."""
    names = "tokenizer.json", "tokenizer_config.json"
    marks = csm.Tokenizer(files[names[0]])
    tokenizer, settings = (codec.read_json(files.get(name, Path())) for name in names)
    *contents, ids = csm_layouts.to_transformers_tokenizer(tokenizer, settings, marks.bos, marks.eos)
    return dict(zip(names, contents)), ids


def convert(
    source: str | Path, destination: str | Path, *, mimi: str | Path | None = None,
    tokenizer: str | Path | None = None, dequantize: bool = False, quantize: int | str | None = None,
    group_size: int = 64, dtype=None, to: str | None = None,
) -> list[str]:  # fmt: skip
    """Convert `source` (a folder, file or Hub repository) to the folder `destination`; returns its files' names.

    mimi, tokenizer: take these from elsewhere. dequantize: undo the source's quantization, before quantize. quantize:
    4, 6 or 8 bits in groups of group_size, or one of csm_layouts.MODES. dtype: cast the CSM (None: as stored). to: None
    for our layout, or "sesame" or "transformers". Raises ValueError.
    """
    source, destination = checkpoints.find(source), Path(destination).resolve()
    folder = source if source.is_dir() else source.parent
    if destination == folder.resolve() or destination.is_file():
        raise ValueError(f"the destination must be a folder, and another folder than the source: {destination}")
    if to not in (None, "sesame", "transformers"):
        raise ValueError(f"to must be sesame or transformers, not {to}")
    config, weights, sound = read(source)
    sound_config, sound = read_mimi(mimi) if mimi else sound or (None, None)
    if to == "transformers" and sound is None:
        raise ValueError("transformers' layout includes a Mimi, and this source has none: give one with --mimi")
    if weights is None and (quantize or dequantize or dtype or tokenizer):
        raise ValueError(f"{source} holds only a Mimi: quantize, dequantize, dtype and tokenizer are for a CSM")

    files = {}  # name in the destination: content, as csm_layouts.write_folder takes it
    if sound:
        sound_config = asdict(codec.from_weights(sound, sound_config).config)  # this also checks the weights
    if weights:
        files = text_files(source, folder, tokenizer)
        sizes = csm.CSMConfig.from_dict(config)
        codec.check_weights(csm.blank_model(sizes, weights), csm.split_heads(weights))
        config |= {part: asdict(getattr(sizes, part)) for part in ("backbone", "decoder")}
        if dequantize:
            weights = csm_layouts.join_heads(adapters.dequantize_weights(sizes, weights))
            config.pop("quantization", None)
        if to and (quantize or any(name.endswith(".scales") for name in weights)):
            raise ValueError("a quantized CSM can only be written in our own layout: add --dequantize")
        if dtype:
            cast = csm.as_dtype(dtype)
            for name, w in weights.items():
                if not name.endswith((".scales", ".biases")) and w.dtype != mx.uint32:
                    weights[name] = w.astype(cast)
        if quantize:
            weights, config["quantization"] = csm_layouts.quantize(csm.split_heads(weights), quantize, group_size)

    if to == "transformers":
        if "tokenizer.json" in files:
            texts, ids = for_transformers(files)
            files, config = files | texts, ids | config
        files |= csm_layouts.to_transformers(config, weights, sound_config, sound)
    elif to == "sesame":
        if weights:
            config, weights = csm_layouts.to_sesame(config, weights, asdict(csm.CSMConfig()))
            files |= {"config.json": config, "model.safetensors": (weights, {"format": "pt"})}
        if sound:
            note = {"format": "pt", "config": json.dumps(sound_config)}  # shapes do not show the heads
            files[csm_layouts.DEFAULT_MIMI[1]] = csm_layouts.to_kyutai(sound_config, sound), note
    else:
        files |= csm_layouts.native_files(config, weights, sound_config, sound)
    csm_layouts.write_folder(destination, files, (csm_layouts.TOKENIZER, csm_layouts.MIMI_FILES))
    return sorted(files)


def main(argv=None):
    p = command.parser_for("convert.py", description="Any published CSM or Mimi -> a folder that csm.py loads.")
    p.add_argument("source", help="csm-1b, a folder, a .safetensors, .index.json, .pt or .gguf file, or a Hub repo")
    p.add_argument("destination", help="the folder to write")
    p.add_argument("--mimi", help="where to take the Mimi from, if not from SOURCE")
    p.add_argument("--tokenizer", help="where to take the text tokenizer from, if not from SOURCE")
    p.add_argument("--dequantize", action="store_true", help="undo a CSM's quantization")
    p.add_argument("--quantize", **command.QUANTIZE)
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="for --quantize 4, 6, 8")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the CSM (default: as stored)")
    p.add_argument("--to", choices=("sesame", "transformers"), help="write another layout than ours")

    def program(args):
        print(f"{args.destination}: {', '.join(convert(**vars(args)))}")

    return command.run(p, program, p.parse_args(argv), "interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
