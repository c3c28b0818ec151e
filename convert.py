"""Any published CSM or Mimi checkpoint -> one folder in our own layout, and back to the layouts that others read.

    python convert.py unsloth/csm-1b my-csm --quantize 8
    python convert.py my-csm for-transformers --dequantize --to transformers

The layouts are csm_layouts.py's. All is lazy: a tensor is read, changed and written at the end, when it is its turn.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import csm  # before mlx
import csm_layouts
import mimi as codec

import mlx.core as mx  # isort: skip


def read(source):
    """csm.read, with the Mimi beside or inside: (config, weights, mimi). Of a Mimi alone the first two are None."""
    file, beside = csm.weights_file(source), codec.find(source if source.is_dir() else source.parent, *codec.FILES)
    if not file and (beside or source.is_file()):
        return None, None, codec.read_mimi(source if source.is_file() else beside)[::-1]
    if file and any(name.startswith(("quantizer.", "first.")) for name in codec.read_weights(file)[0]):
        return None, None, codec.read_mimi(file)[::-1]
    config, weights, mimi = csm.read(source)
    return config, weights, codec.read_mimi(beside)[::-1] if beside else mimi


def text_files(folder, tokenizer):
    """The tokenizer and the voices: {name in the destination: path}"""
    place = Path(tokenizer) if tokenizer else folder
    if not place.exists():
        place = codec.download(str(tokenizer), *csm.TOKENIZER)
    if place.is_file():
        files = {"tokenizer.model" if place.suffix == ".model" else "tokenizer.json": place}
    else:
        files = {name: place / name for name in csm.TOKENIZER if (place / name).is_file()}
    if tokenizer and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise ValueError(f"{tokenizer} has no tokenizer.json and no tokenizer.model")
    return files | {f"prompts/{f.name}": f for f in (folder / "prompts").glob("*") if f.is_file()}


def for_transformers(files):
    """tokenizer.json and its settings as a CsmProcessor needs them -> ({name: content}, ids for the config)"""
    names = "tokenizer.json", "tokenizer_config.json"
    marks, (tokenizer, settings) = csm.Tokenizer(files[names[0]]), (codec.read_json(files.get(n, "")) for n in names)
    *contents, ids = csm_layouts.to_transformers_tokenizer(tokenizer, settings, marks.bos, marks.eos)
    return dict(zip(names, contents)), ids


def convert(
    source, destination, *, mimi=None, tokenizer=None, dequantize=False, quantize=None, group_size=64, dtype=None,
    to=None,
):  # fmt: skip
    """Write `source` (folder, file or Hub repo) as the folder `destination`; the names of its files come back.

    mimi, tokenizer: sources of these where `source` has none, or others are wanted. quantize: 4, 6 or 8 bits, or one of
    csm_layouts.MODES. dequantize: make a quantized source plain (first). dtype: cast CSM's tensors (None: as stored).
    to: None for our layout, "sesame" or "transformers" for theirs. Raises ValueError.
    """
    source, destination = csm.locate(source), Path(destination).resolve()
    folder = source if source.is_dir() else source.parent
    if destination == folder.resolve() or destination.is_file():
        raise ValueError(f"{destination} is where the source is, or a file: the destination must be another folder")
    if to not in (None, "sesame", "transformers"):
        raise ValueError(f"to is sesame or transformers, not {to}")
    config, weights, sound = read(source)
    if mimi:
        sound = codec.read_mimi(codec.locate(mimi))[::-1]
    if to == "transformers" and sound is None:
        raise ValueError("transformers keeps the Mimi inside, and this source has none: give one with --mimi")
    if weights is None and (quantize or dequantize or dtype or tokenizer):
        raise ValueError(f"{source} is a Mimi alone: quantize, dequantize, dtype and tokenizer are for a CSM")

    files, kind = {}, {"format": "pt" if to else "mlx"}  # name: what to write there
    if sound:
        sound_config, sound = asdict(codec.from_weights(sound[1], sound[0]).config), sound[1]  # checks them, too
        sound_kind = kind | {"config": json.dumps(sound_config)}  # since the shapes do not tell how many heads it has
    if weights:
        files = text_files(folder, tokenizer)
        sizes = csm.CSMConfig.from_dict(config)
        codec.check(csm.blank(sizes, weights), csm.split_heads(weights))
        config |= {part: asdict(getattr(sizes, part)) for part in ("backbone", "decoder")}
        if dequantize:
            weights = csm.join_heads(csm.dequantize_weights(sizes, weights))
            config.pop("quantization", None)
        if to and (quantize or any(name.endswith(".scales") for name in weights)):
            raise ValueError("a quantized CSM can be written in our own layout only: --dequantize makes it plain")
        if dtype:
            cast = csm.as_dtype(dtype)
            plain = [name for name in weights if not name.endswith((".scales", ".biases"))]
            weights |= {name: weights[name].astype(cast) for name in plain if weights[name].dtype != mx.uint32}
        if quantize:
            weights, config["quantization"] = csm_layouts.quantize(csm.split_heads(weights), quantize, group_size)

    if to == "transformers":
        if "tokenizer.json" in files:
            texts, ids = for_transformers(files)
            files, config = files | texts, ids | config
        files |= csm_layouts.to_transformers(config, weights, sound_config, sound)
    elif weights:
        if to:
            config, weights = csm_layouts.to_sesame(config, weights, asdict(csm.CSMConfig()))
        files |= {"config.json": config, "model.safetensors": (weights, kind)}
    if sound and to == "sesame":
        files[codec.DEFAULT_FILE] = csm_layouts.to_kyutai(sound_config, sound), sound_kind
    elif sound and not to:
        files["mimi.safetensors"] = sound, sound_kind
    csm.write_folder(destination, files)
    return sorted(files)


def main(argv=None):
    p = csm.parser_for("convert.py", description="Any published CSM or Mimi checkpoint -> a folder that csm.py loads.")
    p.add_argument("source", help="csm-1b, a folder, .safetensors, .index.json or .pt file, or a Hub repo")
    p.add_argument("destination", help="the folder to write")
    p.add_argument("--mimi", help="where the Mimi comes from, if not from SOURCE")
    p.add_argument("--tokenizer", help="where the text tokenizer comes from, if not from SOURCE")
    p.add_argument("--dequantize", action="store_true", help="make a quantized CSM plain")
    p.add_argument("--quantize", **csm.QUANTIZE)
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="of --quantize 4, 6, 8")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the CSM; as stored if not given")
    p.add_argument("--to", choices=("sesame", "transformers"), help="write another layout than ours")

    def command(args):
        print(f"{args.destination}: {', '.join(convert(**vars(args)))}")

    return csm.run(p, command, p.parse_args(argv), "interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
