"""Find a checkpoint of a CSM or Mimi, download it if necessary, and read it into our layout; save a loaded model.

csm.py and mimi.py read a folder in our own layout by themselves, and find this module late for everything else: the
Hugging Face Hub, folders that lack a part, other layouts (csm_layouts.py), shards, .pt and .gguf files, adapters.
"""

import logging
import re
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

import csm_layouts
import mimi  # before mlx
from csm_layouts import CONTAINER_FILES, DEFAULT_MODEL, DEFAULT_PROMPTS, DEFAULT_TOKENIZER, MIMI_FILES, TOKENIZER
from csm_layouts import unfinished as unfinished  # for mimi.replacing

from mlx.utils import tree_flatten  # isort: skip

log = logging.getLogger("csm")
WEIGHTS = (  # patterns, tried in this order: the first match is loaded
    "model.safetensors", "model.safetensors.index.json", "ckpt.safetensors", "*.index.json", "*.safetensors",
    "ckpt.pt", "*.pt", "*.pth", "*backbone*.gguf", "*.gguf",
)  # fmt: skip

# ---- a CSM ------------------------------------------------------------------------------------------------------


def read(model):
    """What csm.load was given -> config.json, weights, functions that give Mimi and tokenizer, voices: as
    csm.read_folder gives them. What the model lacks comes from the default downloads. Raises ValueError.
    """
    path = find(model)
    folder = path if path.is_dir() else path.parent
    config, weights, inside = read_csm(path)
    voices = dict.fromkeys(csm_layouts.DEFAULT_VOICES) if model == "csm-1b" else {}
    voices |= {clip.stem: clip.parent for clip in (folder / "prompts").glob("*.wav")}

    def find_mimi():
        beside = first_match(folder, *MIMI_FILES)
        return mimi.from_weights(inside[1], inside[0]) if inside and not beside else mimi.load(beside)

    return config, weights, find_mimi, lambda: find_tokenizer(path, config.get("text_tokenizer")), voices


def find(model):
    """The local path of what csm.load was given; downloads it if necessary. Raises ValueError."""
    if model == "tiny":
        import csm

        return csm.TINY
    if Path(model).exists() and model != "csm-1b":
        return Path(model)
    return download_csm(model)


def read_csm(path):
    """A folder or weights file in any layout -> config, weights and the Mimi inside, in our layout.

    The weights are {name: array}, read lazily. The Mimi is (config, weights), or None.
    """
    file = weights_file(path)
    adapter = f"{path} is an adapter: give it with --adapter, and the model it is for with --model"
    if file is None and path.is_dir() and first_match(path, csm_layouts.ADAPTER_FILES):
        raise ValueError(adapter)
    if file is None:
        raise ValueError(f"{path} has no weights of a CSM: no .safetensors, .pt, .gguf or index")
    config = mimi.read_json(file.with_name("config.json"))
    if file.suffix == ".gguf":
        from csm_tools import gguf

        weights, fields = gguf.read_gguf(file)
        config = fields | config | {"layout": None}
    else:
        weights = read_weights(file)[0]
    if any(name.endswith((".lora_a", ".lora_A.weight")) for name in weights):
        raise ValueError(adapter)
    if "-of-0" in file.name and file.suffix == ".safetensors":
        raise ValueError(f"{file} is one of several shards: their index, *.index.json, is missing")
    if config.get("layout") == "native":
        return config, weights, None
    import csm

    try:
        return csm_layouts.csm_to_native(config, weights, asdict(csm.CSMConfig()))
    except (TypeError, AttributeError, LookupError, ArithmeticError) as e:
        raise ValueError(f"{file.with_name('config.json')} has a field of a wrong type: {e}") from None


def weights_file(path):
    """The weights file, or index of shards, of a CSM in a folder, or None; a file as it is."""
    files = [path]
    if path.is_dir():
        files = [file for pattern in WEIGHTS for file in sorted(path.glob(pattern))]
    other = (*MIMI_FILES, csm_layouts.ADAPTER_FILES) if path.is_dir() else MIMI_FILES
    for file in files:
        if not any(file.match(pattern) for pattern in other):
            return file
    return None


def find_tokenizer(path, repo):
    """The tokenizer beside the weights, in a .gguf, or of a Hub repository (None: the default)."""
    file = weights_file(path)
    found = first_match(file.parent, *TOKENIZER[:2])
    if not found and file.suffix == ".gguf":
        from csm_tools import gguf

        found = gguf.extract_tokenizer(file)
    return found or download_tokenizer(repo)


def change(config, weights, adapter=None, quantize=None, group_size=64):
    """Apply adapters, then quantize -> config and weights {name: array}, each head a matrix. Raises ValueError."""
    if adapter:
        from csm_tools import adapters

        config, weights = adapters.adapted(config, weights, adapter)
    if quantize:
        weights, note = csm_layouts.quantize(weights, quantize, group_size)
        config = replace(config, quantization=note)
    return config, weights


def check_weights(generator, name):
    """Raise ValueError if any weight of a csm.Generator's network or codec is NaN or infinite. Reads all of them."""
    import csm

    csm.check_finite(tree_flatten(generator.model.parameters()) + tree_flatten(generator.mimi.parameters()), name)


def tokenizer_files(generator):
    """{name: path} of the tokenizer and the files of settings beside it."""
    tokenizer = generator.tokenizer.path
    beside = [tokenizer.with_name(name) for name in TOKENIZER if name.endswith(".json")]
    return {path.name: path for path in [*beside, tokenizer] if path.is_file()}


def save(generator, folder):
    """Write a csm.Generator as a folder in our own layout, atomically. Raises ValueError."""
    weights, sound = (dict(tree_flatten(x.parameters())) for x in (generator.model, generator.mimi))
    config = generator.config_json | asdict(generator.model.config)
    files = csm_layouts.native_files(config, weights, asdict(generator.mimi.config), sound)
    files |= tokenizer_files(generator)
    clips = [
        place / f"{name}{suffix}" for name, place in generator.voices.items() if place for suffix in (".wav", ".txt")
    ]
    files |= {f"prompts/{path.name}": path for path in clips if path.is_file()}
    csm_layouts.write_folder(folder, files, (TOKENIZER, MIMI_FILES))


# ---- weights and a Mimi -----------------------------------------------------------------------------------------


def read_mimi(path_or_repo=None):
    """A Mimi, or the one inside a CSM -> weights {name: array} in our layout, config. None: kyutai's."""
    if path_or_repo is None:
        path = download(*csm_layouts.DEFAULT_MIMI)
    elif path_or_repo == "tiny":
        path = find("tiny")
    else:
        path = find_or_download(path_or_repo, MIMI_FILES, CONTAINER_FILES)
    file = first_match(path, *MIMI_FILES, *CONTAINER_FILES) if path.is_dir() else path
    if file is None:
        raise ValueError(f"no Mimi in {path}")
    weights, metadata = read_weights(file)
    if "config" in metadata:
        config = mimi.as_object(metadata["config"], file)
    else:
        config = mimi.read_json(file.with_name("config.json"))
    if "first.input_proj" not in weights:
        config, weights = csm_layouts.mimi_to_native(config, weights)
    return weights, config


def read_weights(path):
    """A .safetensors or .pt file, or an index of shards -> {name: array}, read lazily; metadata."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        mimi.check_file(path)
        return csm_layouts.read_pt(path), {}
    if path.suffix == ".json":
        return read_shards(path), {}
    return mimi.read_weights(path)


def read_shards(path):
    """An index of shards -> {name: array}, each from the shard that the index names."""
    shards, weights = mimi.read_json(path).get("weight_map"), {}
    if not (shards and isinstance(shards, dict) and all(isinstance(x, str) for x in shards.values())):
        raise ValueError(f"{path} has no weight_map from names to files")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{path} names {shard!r:.80}, which is no .safetensors file in its folder")
        tensors = mimi.read_weights(path.parent / shard)[0]
        weights |= {name: w for name, w in tensors.items() if shards.get(name, shard) == shard}
    return weights


# ---- the Hugging Face Hub ----------------------------------------------------------------------------------------


def first_match(folder, *patterns):
    """The first file in `folder` that matches the first pattern with any match, or None."""
    return next((f for p in patterns for f in sorted(Path(folder).glob(p))), None)


def find_or_download(source, *groups, **options):
    """A local file or folder as it is, or a Hugging Face repository as `fetch` has it."""
    return Path(source) if Path(source).exists() else fetch(source, *groups, **options)


class DownloadError(ValueError):
    """A file or repository of the Hugging Face Hub cannot be downloaded."""


def fetch(source, *groups, beside=("*.json",), known="no such file or folder"):
    """A Hugging Face repository -> the folder that it is downloaded to.

    groups: tuples of file patterns, tried in turn until one matches; files that match `beside` are
    downloaded, too. known: sources that the error message suggests. Raises ValueError.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"no such model: {source} ({known})")
    for patterns in groups:
        folder = download(str(source), *patterns, *beside)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def download(repo, *patterns, hint=" (--model tiny needs no download)"):
    """One file of a Hugging Face repository -> its path; several patterns -> the matches' folder.

    hint: what an error says behind its reason.

    Raises FileNotFoundError if the repository has no such file, DownloadError for other failures.
    """
    from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

    def get(**options):
        if len(patterns) == 1:
            return Path(hf_hub_download(repo, *patterns, **options))
        return Path(snapshot_download(repo, allow_patterns=list(patterns), **options))

    try:
        cached = None
        with suppress(errors.LocalEntryNotFoundError):
            cached = get(local_files_only=True)
            if len(patterns) == 1:
                return cached
        there = cached and any(cached.glob(patterns[0]))
        if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
            if there:
                return cached
            raise errors.LocalEntryNotFoundError("no answer")
        if not constants.HF_HUB_OFFLINE and not there:
            log.warning("fetching %s from %s", patterns[0], repo)
        return get()
    except errors.LocalEntryNotFoundError:
        reason = "no network, or HF_HUB_OFFLINE is set, and it is not in the cache"
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{repo} has no {patterns[0]}") from None
    except errors.GatedRepoError:
        reason = "it is gated: accept its licence on huggingface.co and run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "no such folder, file or Hugging Face repository"
    except Exception as e:  # many kinds: connection, proxy, disk
        reason = str(e).partition("\n")[0] or type(e).__name__
    raise DownloadError(f"cannot download {patterns[0]} from {repo}: {reason}{hint}")


def answers(url, seconds=3):
    """Whether the host of a URL takes a connection; with a proxy, which may be needed for that, always."""
    from urllib.request import getproxies, proxy_bypass  # here: it takes longer to import than all of this module

    place, found = urlsplit(url), []
    if getproxies() and not proxy_bypass(place.hostname):
        return True

    def connect():
        with suppress(OSError), socket.create_connection((place.hostname, place.port or 443), seconds):
            found.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no limit of its own
    thread.start()
    thread.join(seconds)
    return bool(found)


def download_csm(model):
    """The model csm-1b, or a Hugging Face repository -> its local path."""
    if model == "csm-1b":
        return download(*DEFAULT_MODEL)
    # A repository may have its weights in several layouts: prefer MLX's or Sesame's, in one file.
    groups = ("model*.safetensors*", "ckpt.safetensors"), ("*.pt",), ("*.safetensors*",)
    # Of the GGUF files: llama.cpp's three, or 8 bits, which MLX computes with, or what there is.
    groups += ("*backbone*.gguf", "*decoder*.gguf", "*mimi*.gguf"), ("*[qQ]8*.gguf",), ("*.gguf",)
    beside = ("*.json", "tokenizer.model", *MIMI_FILES, "prompts/*")
    known = "csm-1b, tiny, a folder, a .safetensors file or a Hugging Face repository"
    return fetch(model, *groups, beside=beside, known=known)


def download_tokenizer(repo):
    """The tokenizer of a Hugging Face repository, None for the default: the first of TOKENIZER that it has."""
    repo = repo or DEFAULT_TOKENIZER
    folder = download(repo, *TOKENIZER)
    for name in TOKENIZER[:2]:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{repo} has no {' or '.join(TOKENIZER[:2])}")


def download_voice(name):
    """A voice of CSM-1B -> the path of its clip, and what the clip says."""
    clip = download(DEFAULT_PROMPTS, f"prompts/{name}.wav")
    text = csm_layouts.TRANSCRIPTS.get(name) or download(DEFAULT_PROMPTS, f"prompts/{name}.txt").read_text(
        encoding="utf-8-sig"
    )
    return clip, text.strip()
