"""Random scenarios, each by its seed, against a model in NumPy that shares no code with csm.py (tests/reference.py).

A scenario takes one of a dozen small models (sizes, RoPE, quantization, adapter, codebooks, voice_match), which speaks
alone, streamed, in a batch that others join and leave, in a conversation that hears, is abandoned and forgets, as a
narrated text, or in the server's engine. Every code of every speech is checked.

    CSM_FUZZ=1000:3000 pytest tests/test_fuzz.py        # other seeds than the fixed 100
"""

import json
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

import csm  # before mlx
import csm_batch
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile
import tokenizers

import reference
from conftest import LLAMA3, PLAIN, clip, random_mimi, random_weights, write_tokenizer
from csm_tools import narrate, serve_conversations, serve_engine

FIRST, LAST = (int(n) for n in os.environ.get("CSM_FUZZ", "0:100").split(":"))
WORDS = "hello there how are you today i am fine yes no".split()
SIZES = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
ROPE = {k: v for k, v in LLAMA3.items() if not k.startswith("rope")}
MODELS = {  # codebooks, codes, positions, backbone, decoder (SIZES, RoPE), what else config.json says
    "small": (4, 24, 240, (2, 32, 4, 2, 8, 64, LLAMA3), (1, 32, 2, 1, 16, 64, PLAIN), {}),
    "other": (6, 40, 300, (1, 64, 4, 4, 16, 96, PLAIN), (2, 32, 4, 2, 8, 64, LLAMA3),
              {"speaker_prefix_space": True, "sampling": {"temperature": 0.7, "top_k": 12}}),
    "follows": (3, 16, 160, (3, 32, 2, 1, 16, 64, LLAMA3), (2, 64, 4, 4, 16, 96, PLAIN), {"voice_match": True}),
}  # fmt: skip
VARIANTS = (  # model, quantize, adapter's factor, codebooks
    ("small", None, None, None), ("small", 8, None, None), ("small", 4, 0.5, None), ("small", None, 1.0, 3),
    ("other", None, None, None), ("other", 6, None, 4), ("other", None, 1.5, None), ("other", "mxfp8", None, None),
    ("follows", None, None, None), ("follows", "mxfp4", None, None), ("follows", None, None, 2),
    ("follows", "nvfp4", 1.0, None),
)  # fmt: skip

# ------------------------------------------------------------------------------------ models


@dataclass
class World:
    """A model in csm.py and in the reference."""

    generator: csm.Generator
    judge: reference.Reference
    voices: dict  # name -> (text, codes)
    said: list  # the frames of each speech that `generator.speak` gave


def made_weights(config, seed):
    """Random weights whose speeches end by themselves: a nearly constant dimension makes code 0 likely."""
    w = {name: np.array(x) for name, x in random_weights(config, seed).items()}
    K, V = config["audio_num_codebooks"], config["audio_vocab_size"]
    w["audio_embeddings.weight"][:, 0], w["text_embeddings.weight"][:, 0] = 1.5, 1.5 * K
    w["projection.weight"][0] = np.eye(1, config["backbone"]["dim"])[0] * 2
    w["codebook0_head.weight"][0, 0] += 4
    w["audio_head"][:, 0, 0] += 3
    w["audio_head"][:, :, V - 3 :] *= 3  # ids that are no codes must not be drawn even if likely
    return w


def make_adapter(folder, weights, rng):
    """Write a LoRA in our format; returns {name: its change (out, in)}."""
    names = ["backbone.layers.0.self_attn.q_proj", "decoder.layers.0.mlp.down_proj", "codebook0_head", "projection"]
    tensors, changes = {}, {}
    for name in names:
        n_out, n_in = weights[f"{name}.weight"].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) * 0.4 for shape in ((n_in, 2), (2, n_out)))
        tensors |= {f"{name}.lora_a": mx.array(a), f"{name}.lora_b": mx.array(b)}
        changes[f"{name}.weight"] = 3.0 * (a @ b).T / n_in**0.5
        tensors[f"{name}.lora_b"] = tensors[f"{name}.lora_b"] / n_in**0.5
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 6.0, "model": "x"}))
    return changes


def rounded(weights, how):
    """The weights after quantization, in float32."""
    modes = {"mxfp4": (32, 4, "mxfp4"), "nvfp4": (16, 4, "nvfp4"), "mxfp8": (32, 8, "mxfp8")}
    group_size, bits, mode = modes.get(how, (32, how, "affine"))
    kind = {"group_size": group_size, "bits": bits, "mode": mode}

    def there_and_back(w):
        packed = mx.quantize(mx.array(w), **kind)
        return np.array(mx.dequantize(*packed, **kind).astype(mx.float32))

    out = {name: there_and_back(w) if w.ndim == 2 else w for name, w in weights.items()}
    out["audio_head"] = np.stack([there_and_back(head.T).T for head in weights["audio_head"]])
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = {}

    def make(variant):
        folder, (model, quantize, factor, codebooks) = tmp_path_factory.mktemp("fuzz"), variant
        K, n_codes, positions, *parts, more = MODELS[model]
        llamas = [
            dict(zip(SIZES, p), rope_theta=p[6]["rope_theta"], max_positions=positions)
            | {"rope_scaling": None if p[6] is PLAIN else ROPE}
            for p in parts
        ]
        vocab, rng = write_tokenizer(folder), np.random.default_rng(len(model))
        config = {"model_type": "csm", "layout": "native", "backbone": llamas[0], "decoder": llamas[1]}
        config |= {"text_vocab_size": vocab, "audio_vocab_size": n_codes + 3, "audio_num_codebooks": K} | more
        weights = made_weights(config, len(model))
        (folder / "config.json").write_text(json.dumps(config))
        arrays = {name: mx.array(w) for name, w in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        tensors, c = random_mimi(K, n_codes)
        mx.save_safetensors(str(folder / "mimi.safetensors"), tensors, {"format": "mlx", "config": json.dumps(c)})
        (folder / "prompts").mkdir()
        for i, name in enumerate(("conversational_a", "other")):
            soundfile.write(folder / "prompts" / f"{name}.wav", clip(0.4 + 0.3 * i, seed=i), 24000, subtype="FLOAT")
            (folder / "prompts" / f"{name}.txt").write_text(("how are you today?", "i am fine")[i])
        if factor:
            for name, change in make_adapter(folder / "lora", weights, rng).items():
                weights[name] = weights[name] + np.float32(factor) * change
        if quantize:
            weights = rounded(weights, quantize)
        adapter = [(str(folder / "lora"), factor)] if factor else None
        g = csm.load(
            folder, dtype="float32", quantize=quantize, group_size=32, adapter=adapter, codebooks=codebooks
        )  # fmt: skip
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        judge = reference.Reference(config, weights, tokenizer, n_codes, codebooks or K)
        voices, said, own = {}, [], g.speak
        for name in ("conversational_a", "other"):
            audio = soundfile.read(folder / "prompts" / f"{name}.wav", dtype="float32")[0]
            voices[name] = (folder / "prompts" / f"{name}.txt").read_text(), encoded(g, audio)

        def speak(*args):
            said.append([])
            for codes in own(*args):
                said[-1].append(codes)
                yield codes

        g.speak = speak
        return World(g, judge, voices, said)

    return lambda variant: made[variant] if variant in made else made.setdefault(variant, make(variant))


def encoded(generator, audio):
    """(samples,) -> (F, K) by our Mimi; tests/test_mimi.py compares it with others."""
    return np.array(generator.mimi.encode(mx.array(audio)[None, None]))[0].T


# ------------------------------------------------------------------------------------ what is drawn by lot


def some_text(r, most=6):
    return " ".join(r.choice(WORDS) for _ in range(r.randint(1, most)))


def some_turn(r, w, most=12):
    """A random Segment of limited length, and the same as (speaker, text, codes)."""
    speaker, text, g, K = r.randrange(3), some_text(r), w.generator, w.judge.K
    if r.random() < 0.3:
        audio = clip(r.uniform(0.1, 1.0), seed=r.randrange(99))
        return csm.Segment(speaker, text, audio), (speaker, text, encoded(g, audio))
    shape = r.randint(1, most), r.randint(w.judge.n, K)
    codes = np.random.default_rng(r.randrange(2**32)).integers(0, w.judge.n_codes, shape)
    return csm.Segment(speaker, text, codes=codes), (speaker, text, codes)


def some_opening(r, w, speaker, voice_match=None):
    """Arguments `context` and `voice` of generate, and what they mean: turns, and the clip that is continued."""
    kind = r.choice(["context", "default", "named", "none"])
    arguments, turns = {}, []
    if kind == "context":
        pairs = [some_turn(r, w) for _ in range(r.randint(1, 3))]
        arguments["context"], turns = [a for a, _ in pairs], [b for _, b in pairs]
        if r.random() < 0.3:
            arguments["voice"] = "none"
    elif kind == "none":
        arguments["voice"] = "none"
    else:
        name = r.choice(list(w.voices)) if kind == "named" else "conversational_a"
        turns = [(speaker, *w.voices[name])]
        if kind == "named":
            arguments["voice"] = name
    return arguments, *opening(w, speaker, turns, voice_match)


def opening(w, speaker, turns, voice_match=None):
    """Split off the clip: (the turns before, the clip)."""
    if w.judge.config.get("voice_match", False) if voice_match is None else voice_match:
        for i in reversed(range(len(turns))):
            if turns[i][0] == speaker:
                return turns[:i] + turns[i + 1 :], turns[i]
    return turns, None


def some_sampling(r, w, one=True, ends=True):
    """Arguments of generate or Sampling, and the reference's Options. one: for one speech; ends: by itself."""
    own, given = w.judge.config.get("sampling", {}), {}
    kind = r.choice(["own", "greedy", "filters", "filters", "functions", "sampler"])
    if kind == "greedy":
        given["temperature"] = 0.0
    if kind in ("filters", "functions"):
        given["temperature"] = r.choice([0.3, 0.7, 0.9, 1.0, 1.6])
        given["top_k"] = r.choice([0, 1, 2, 5, 20, 50])
        given["top_p"] = r.choice([1.0, 1.0, 0.5, 0.8, 0.95])
        given["min_p"] = r.choice([0.0, 0.0, 0.02, 0.1, 0.5])
        given["min_tokens_to_keep"] = r.choice([1, 1, 3])
        for name in list(given):
            if r.random() < 0.3:
                del given[name]
    options = reference.Options(**own | given)
    arguments = dict(given)
    if kind == "functions":
        chosen = r.sample(FUNCTIONS, r.randint(1, 2))
        options.functions = list(chosen)
        arguments["logits_processors"] = [in_mlx(function) for function in chosen]
    if kind == "sampler":
        options.rank, options.frames = r.choice([0, 0, 1, 3]), r.randint(0, 9) if one and ends else 2**30
        arguments["sampler"] = Ranked(options.rank, options.frames * w.judge.n)
    return arguments, options


class Ranked:
    """A sampler that takes the rank-th likeliest code, and zeros after n calls."""

    def __init__(self, rank, n):
        self.rank, self.n, self.calls = rank, n, 0

    def __call__(self, logp):
        self.calls += 1
        return mx.argsort(-logp)[:, self.rank] if self.calls <= self.n else mx.zeros((1,), mx.int32)


def not_again(said, logits):
    """Make the codes of the last three frames less likely."""
    out = np.array(logits)
    out[list(set(np.array(said)[-3:].tolist()))] -= 2
    return out


def in_turn(said, logits):
    """Make a code that depends on the frame's number likelier."""
    out = np.array(logits)
    out[len(said) % len(out)] += 3
    return out


FUNCTIONS = [not_again, in_turn]


def in_mlx(function):
    def process(said, logits):
        assert said.dtype == mx.int32 and logits.shape[0] == 1
        change = function(np.array(said), np.zeros(logits.shape[-1]))
        return logits + mx.array(change.astype(np.float32))

    return process


def length(r):
    """(max_audio_length_ms, the number of frames it allows)."""
    n = r.choice([1, 2, 5, 12, 25, 100])
    return n * 80 + r.choice([0, 0, 79]), n


def whole_text_frames(text, ms=None):
    """The default limit for a text in frames: 3 s and 200 ms per character."""
    return int(min(90_000, 3_000 + 200 * len(text)) / 80)


def some_seed(r):
    return r.choice([r.randrange(2**32), r.randrange(2**64), 2**64 - 1])


# ------------------------------------------------------------------------------------ the ways to speak


def rows_of(w, turns, speaker, text, clip):
    return np.concatenate([*(w.judge.turn(*turn) for turn in turns), w.judge.new_turn(speaker, text, clip)])


def same_sound(w, audio, codes):
    """Assert that (samples,) is Mimi's decoding of the codes."""
    audio = np.array(audio)
    if not len(codes):
        assert not len(audio)
        return
    whole = np.array(w.generator.mimi.decode(mx.array(np.array(codes)).T[None]))[0, 0]
    np.testing.assert_allclose(audio, whole, atol=2e-5 * np.abs(whole).max())


def alone(r, w):
    """generate, stream, generate_codes; an abandoned stream."""
    g, speaker, text = w.generator, r.randrange(3), some_text(r)
    match = r.choice([None, None, True, False])
    arguments, turns, clip = some_opening(r, w, speaker, match)
    sampling, options = some_sampling(r, w)
    seed, (ms, n) = some_seed(r), length(r)
    arguments |= sampling | {"seed": seed, "max_audio_length_ms": ms, "voice_match": match}
    if match and clip is None:
        with pytest.raises(ValueError, match="voice_match"):
            g.generate(text, speaker, **arguments)
        return
    rows = rows_of(w, turns, speaker, text, clip)
    if len(rows) >= w.judge.limit:
        with pytest.raises(ValueError, match="positions"):
            g.generate(text, speaker, **arguments)
        return
    w.said.clear()
    kind, ended = r.choice(["generate", "codes", "stream", "left"]), True
    if kind == "generate":
        same_sound(w, g.generate(text, speaker, **arguments), w.said[0])
    elif kind == "codes":
        assert g.generate_codes(text, speaker, **arguments).tolist() == [codes.tolist() for codes in w.said[0]]
    else:
        pieces, interval = [], r.choice([0.08, 0.2, 0.5, 3.0])
        stream = g.stream(text, speaker, streaming_interval=interval, **arguments)
        stop = r.randint(0, 3) if kind == "left" else 2**30
        for piece in stream:
            pieces.append(np.array(piece))
            if len(pieces) >= stop:
                ended = False
                break
        stream.close()
        if w.said:
            assert all(len(p) == round(interval * 12.5) * 1920 for p in pieces[:-1])
            same_sound(w, np.concatenate([np.zeros(0), *pieces]), w.said[0][: sum(map(len, pieces)) // 1920])
    for codes in w.said:
        w.judge.judge(rows, codes, n, seed, options, ended)


def batch(r, w):
    """A running batch: some utterances join later, some leave, some have functions that raise."""
    g, running, live, over = w.generator, csm_batch.Batch(w.generator), {}, []
    todo, shared = r.randint(2, 7), some_opening(r, w, 0)
    ways, begun = [], set()
    while todo or len(running):
        while todo and (not len(running) or r.random() < 0.4):
            todo -= 1
            speaker, text = 0, some_text(r)
            arguments, turns, clip = shared if r.random() < 0.5 else some_opening(r, w, speaker)
            if ways and r.random() < 0.2:
                text = ways[-1]  # the same prompt, perhaps
            ways.append(text)
            rows = rows_of(w, turns, speaker, text, clip)
            sampling, options = some_sampling(r, w)
            seed, (_, n), raises = some_seed(r), length(r), r.random() < 0.12
            if raises:
                sampling = {"sampler": Raising(r.randint(1, 9 * w.judge.n))}
                options = reference.Options(rank=0)
            before, new = g.prompt(text, speaker, **arguments)
            sampling["logits_processors"] = tuple(sampling.get("logits_processors", ()))
            cache = g.context_cache(before)
            if r.random() < 0.3:
                cache, new = None, np.concatenate([before, new])
            if len(rows) >= w.judge.limit:
                with pytest.raises(ValueError, match="positions"):
                    running.insert(new, n, seed, csm.Sampling(**sampling), cache)
                continue
            own = {**(w.judge.config.get("sampling") or {}), **sampling}
            uid = running.insert(new, n, seed, csm.Sampling(**own), cache)
            live[uid] = rows, [], n, seed, options
        if live and r.random() < 0.05:
            uid = r.choice(list(live))
            running.remove(uid)
            over.append((live.pop(uid), False))
        begun = begun or set(live)  # if one fails, the others' frame comes with the next call
        try:
            said = running.next()
        except ZeroDivisionError as e:
            over.append((live.pop(e.uid), False))
            begun.discard(e.uid)
            continue
        ends = {uid for uid, codes in said if codes is None}
        frames = [uid for uid, codes in said if codes is not None]
        assert len(frames) == len(set(frames)) and begun & live.keys() == ends | set(frames), "one has no frame"
        begun = set()
        for uid, codes in said:
            if codes is not None:
                live[uid][1].append(codes)
        over += [(live.pop(uid), True) for uid in ends]
    assert not live
    for (rows, codes, n, seed, options), ended in over:
        w.judge.judge(rows, codes, n, seed, options, ended)


class Raising(Ranked):
    def __init__(self, n):
        super().__init__(0, n)

    def __call__(self, logp):
        return super().__call__(logp) if self.calls < self.n else 1 / 0


def many(r, w):
    """csm_batch.generate."""
    n = r.randint(1, 5)
    texts, speakers = [some_text(r) for _ in range(n)], [r.randrange(3) for _ in range(n)]
    if r.random() < 0.5:
        speakers = [speakers[0]] * n
    arguments, turns, _ = some_opening(r, w, speakers[0], False)
    sampling, options = some_sampling(r, w, one=False)
    seed, lengths = some_seed(r), [length(r) for _ in range(n)]
    decoded = recorded(w.generator, "decode")
    voiced = "context" not in arguments and arguments.get("voice") != "none"
    jobs = []
    for i, (text, speaker) in enumerate(zip(texts, speakers)):
        before = [(speaker, *turns[0][1:])] if voiced else turns
        before, clip = opening(w, speaker, before)
        jobs.append((rows_of(w, before, speaker, text, clip), lengths[i][1], (seed + i) % 2**64))
    if any(len(rows) >= w.judge.limit for rows, *_ in jobs):
        return
    said = csm_batch.generate(
        w.generator, texts, speakers if r.random() < 0.7 or len(set(speakers)) > 1 else speakers[0],
        arguments.get("context", ()), voice=arguments.get("voice"), seed=seed,
        max_audio_length_ms=[ms for ms, _ in lengths], **sampling,
    )  # fmt: skip
    for audio, (codes,), (rows, n, seed) in zip(said, decoded(), jobs, strict=True):
        same_sound(w, audio, np.array(codes))
        w.judge.judge(rows, codes, n, seed, options)


def recorded(thing, name):
    """Record a method's arguments; the returned function ends this and returns them."""
    own, seen = getattr(thing, name), []
    setattr(thing, name, lambda *args: seen.append(args) or own(*args))

    def stop():
        delattr(thing, name)
        return seen

    return stop


class Talk:
    """A model of a conversation's memory."""

    def __init__(self, w, turns, clip):
        self.w, self.clip = w, clip
        self.blocks = [w.judge.turn(*turn) for turn in turns]
        self.n_context = len(turns)

    def size(self, n=None):
        return sum(map(len, self.blocks[:n]))

    def turn(self, speaker, text, n):
        """Forget what has to go; returns (whether there is room, a new turn's rows, the prompt's rows)."""
        limit = self.w.judge.limit
        rows = self.w.judge.new_turn(speaker, text, self.clip if self.clip and self.clip[0] == speaker else None)
        if self.size(self.n_context) + len(rows) >= limit:
            return False, rows, None
        if self.size() + len(rows) + min(n, limit // 4) > limit:
            while len(self.blocks) > self.n_context and self.size() + len(rows) > limit // 2:
                del self.blocks[self.n_context]
        return True, rows, np.concatenate([*self.blocks, rows])

    def said(self, speaker, rows, codes):
        codes = np.reshape(codes, (-1, self.w.judge.n)).astype(int)
        self.blocks.append(np.concatenate([rows, self.w.judge.audio(np.pad(codes, [(0, 1), (0, 0)]))]))
        if self.clip and self.clip[0] == speaker:
            self.clip = None


def same_talk(w, ours, talk):
    """Assert that a Conversation holds these turns, and its cache a prefix of their rows."""
    for block, rows in zip(ours.blocks, talk.blocks, strict=True):
        text = block[:, -1:] != csm.NO_TEXT
        np.testing.assert_array_equal(np.where(text & (np.arange(block.shape[1]) < w.judge.K), -1, block), rows)
    if ours.cache and ours.cache.offset:
        n, model, fresh = ours.cache.offset, w.generator.model, csm.KVCache(w.generator.model.config.backbone)
        csm.prefill(model, np.concatenate(ours.blocks)[:n], fresh)
        for a, b in zip(ours.cache.keys + ours.cache.values, fresh.keys + fresh.values, strict=True):
            np.testing.assert_allclose(np.array(a)[:, :, :n], np.array(b)[:, :, :n], atol=1e-3)


def conversation(r, w):
    """Turns are spoken, heard, abandoned, or fail, until the positions run out, and beyond."""
    g, first, match = w.generator, r.randrange(2), r.choice([None, None, False])
    arguments, turns, clip = some_opening(r, w, first, match)
    if sum(len(w.judge.turn(*turn)) for turn in turns) >= w.judge.limit // 2:
        return
    ours = g.conversation(speaker=first, voice_match=match, **arguments)
    talk = Talk(w, turns, clip)
    for _ in range(r.randint(2, 14)):
        kind = r.choice(["say", "say", "stream", "hear", "hear", "left", "fails"])
        if kind == "hear":
            segment, turn = some_turn(r, w, 40)
            rows = w.judge.turn(*turn)
            if talk.size(talk.n_context) + len(rows) >= w.judge.limit:
                with pytest.raises(ValueError, match="positions"):
                    ours.hear(segment)
                continue
            ours.hear(segment)
            talk.blocks.append(rows)
            continue
        speaker, text, seed, (ms, n) = r.randrange(2), some_text(r), some_seed(r), length(r)
        sampling, options = some_sampling(r, w)
        if kind == "fails":
            sampling, options = {"sampler": Raising(r.randint(1, 6 * w.judge.n))}, reference.Options(rank=0)
        sampling |= {"seed": seed, "max_audio_length_ms": ms}
        fits, rows, prompt = talk.turn(speaker, text, n)
        if not fits:
            with pytest.raises(ValueError, match="positions"):
                ours.say(text, speaker, **sampling)
            continue
        w.said.clear()
        if kind == "say":
            same_sound(w, ours.say(text, speaker, **sampling), w.said[0])
        elif kind == "stream":
            pieces = ours.stream(text, speaker, streaming_interval=r.choice([0.1, 0.4]), **sampling)
            same_sound(w, np.concatenate([np.zeros(0), *map(np.array, pieces)]), w.said[0])
        elif kind == "left":
            frames, stop = ours.frames(text, speaker, **sampling), r.randint(1, 5)
            said = list(islice(frames, stop))
            kind = "left" if len(said) == stop else "say"
            frames.close()
        elif kind == "fails":
            try:
                ours.say(text, speaker, **sampling)
                kind = "say"  # it ended before
            except ZeroDivisionError:
                pass
        ended = kind in ("say", "stream")
        w.judge.judge(prompt, w.said[0], n, seed, options, ended)
        if ended:
            talk.said(speaker, rows, w.said[0])
        same_talk(w, ours, talk)


def narrated(r, w):
    """A text in parts, in sequence or in a batch; some are done already."""
    g, speaker = w.generator, r.randrange(2)
    arguments, _, _ = some_opening(r, w, speaker)
    context = []
    if "context" in arguments:
        context = list(pairs_of(arguments["context"], w))
    elif arguments.get("voice") != "none":
        context = [(speaker, *w.voices[arguments.get("voice", "conversational_a")])]
    parts = [(some_text(r, 3), r.choice([0, 0.25])) for _ in range(r.randint(1, 5))]
    done = {i for i in range(len(parts)) if r.random() < 0.15}
    sampling, options = some_sampling(r, w, one=False)
    seed, (ms, n) = some_seed(r), length(r)
    limit, spoken = w.judge.limit, []
    sizes = []
    for text, _ in parts:
        turns, clip = opening(w, speaker, context)
        sizes.append(len(rows_of(w, turns, speaker, text, clip)))
    if max(sizes) >= limit - 60 or (not context and sizes[0] > limit // 4):
        return
    own = narrate.spoken

    def watched(*args):
        for i, codes in own(*args):
            spoken.append((i, codes))
            yield i, codes

    narrate.spoken = watched
    try:
        pieces = list(
            narrate.narrate(g, parts, speaker, batch=r.choice([1, 2, 8]), done=done, seed=seed,
                            max_audio_length_ms=ms, **arguments, **sampling)
        )  # fmt: skip
    finally:
        narrate.spoken = own
    assert [i for i, _, _ in pieces] == [i + 1 for i in range(len(parts)) if i not in done]
    heard = list(context)
    for i, codes in sorted(spoken, key=lambda one: one[0]):
        text = parts[i][0]
        turns, clip = opening(w, speaker, heard)
        rows = rows_of(w, turns, speaker, text, clip)
        n_frames = min(n, whole_text_frames(text), (limit if context or i else limit // 2) - sizes[i])
        for again in range(4):
            own_seed = (seed + i + again * 2**32) % 2**64
            try:
                w.judge.judge(rows, codes, n_frames, own_seed, options)
                break
            except AssertionError:
                if again == 3:
                    raise
                w.judge.judge(rows, codes[:0], n_frames, own_seed, options)  # ended at once, so it was tried again
        if not context and i == 0:
            heard = [(speaker, text, codes)]
    for i, _, audio in pieces:
        codes, silence = dict(spoken)[i - 1], int(parts[i - 1][1] * 24000)
        same_sound(w, audio[: len(audio) - silence], codes)


def pairs_of(segments, w):
    for s in segments:
        yield s.speaker, s.text, encoded(w.generator, s.audio) if s.codes is None else np.array(s.codes)


class Watched(serve_engine.Engine):
    """Records the parts of each Speech: [(part, tries, codes)]."""

    def __init__(self, *args):
        super().__init__(*args)
        self.noted = defaultdict(list)

    def after(self, speech):
        self.noted[speech].append((speech.part, speech.tries, list(speech.codes)))
        return super().after(speech)


@dataclass
class Kept:
    """A conversation of the server and a model of its memory."""

    kept: serve_conversations.Kept
    talk: Talk | None = None
    busy: bool = False


def served(r, w):
    """The server's engine, stepped by hand: texts of several parts, clips, conversations; some listeners leave."""
    g = w.generator
    engine = Watched(csm.Generator(g.model, g.mimi, g.tokenizer, g.voices, codebooks=g.codebooks), r.randint(1, 4), 9)
    conversations = [Kept(serve_conversations.Kept()) for _ in range(2)]
    todo, live, joining = r.randint(2, 6), {}, []
    for _ in range(3000):
        if todo and r.random() < 0.2:
            todo -= 1
            own = r.choice([None, None, *conversations])
            if own is None or not own.busy:
                speech, check = some_speech(r, w, own)
                live[speech] = [], check
                joining.append(speech)
        gone = [speech for speech in joining if speech.gone]
        out = [(speech, engine.undo(speech)) for speech in gone]
        for speech, piece in out + engine.step([speech for speech in joining if speech not in gone]):
            if isinstance(piece, np.ndarray):
                live[speech][0].append(piece)
                continue
            pieces, check = live.pop(speech)
            check(piece, pieces, engine.noted[speech])
        joining, engine.waiting = engine.waiting, []
        for speech in live:
            speech.gone |= r.random() < 0.003
        if not todo and not live:
            break
    assert not live, "it goes on and on"
    engine.thread.shutdown()


def some_speech(r, w, own):
    """A Speech, and a function to call at its end with the end, its pieces and its recorded parts.

    own: the Kept to which this turn belongs, or None.
    """
    parts = [(some_text(r, 3), r.choice([0, 0.1])) for _ in range(r.randint(1, 3))]
    speaker, seed = r.randrange(2), r.randrange(2**64)
    arguments, _, _ = some_opening(r, w, speaker)
    context, voice = arguments.get("context", []), arguments.get("voice")
    turns = list(pairs_of(context, w))
    if not turns and voice != "none":
        turns = [(speaker, *w.voices[voice or "conversational_a"])]
        if r.random() < 0.3:  # a client's clip
            audio = clip(r.uniform(0.1, 0.9), seed=r.randrange(9))
            voice, turns = csm.Segment(7, turns[0][1], audio), [(speaker, turns[0][1], encoded(w.generator, audio))]
    if own and own.talk and r.random() < 0.4:  # only hears
        segment, turn = some_turn(r, w)
        parts, context = [], [segment]
        if own.talk.size(own.talk.n_context) + len(w.judge.turn(*turn)) < w.judge.limit:
            own.talk.blocks.append(w.judge.turn(*turn))
    elif own and own.talk:
        context = []
    sampling, options = some_sampling(r, w, one=False)
    sampling = csm.Sampling(**{**w.judge.config.get("sampling", {}), **sampling})
    speech = serve_engine.Speech(parts, speaker, voice, context, seed, sampling)
    if own:
        own.busy, speech.kept = True, own.kept

    def check(end, pieces, noted):
        if own:
            own.busy = False
        if end is not None:
            whole = str(end).startswith("the model ended the speech at once")
            assert whole or isinstance(end, serve_engine.Left) or isinstance(end, ValueError), end
        else:
            assert [part for part, *_ in noted] == sorted(part for part, *_ in noted)
            assert {part for part, *_ in noted} == set(range(len(parts)))
        if own:
            judge_turns(w, own, turns, speech, parts, seed, options, noted, end)
        else:
            judge_parts(w, turns, speech, parts, seed, options, noted)
        if end is None:
            same_pcm(w, pieces, parts, noted)

    return speech, check


def judge_turns(w, own, context, speech, parts, seed, options, noted, end):
    """Check the parts as turns of a conversation; they are undone unless all were spoken."""
    if own.kept.talk is None:
        assert isinstance(end, Exception)
        return
    speaker = speech.speaker
    if own.talk is None:
        own.talk = Talk(w, *opening(w, speaker, context))
    talk = own.talk
    blocks, clip = list(talk.blocks), talk.clip
    for part, tries, codes in noted:
        text = parts[part][0]
        fits, rows, prompt = talk.turn(speaker, text, whole_text_frames(text))
        assert fits
        w.judge.judge(prompt, codes, whole_text_frames(text), (seed + part + tries * 2**32) % 2**64, options)
        if codes:
            talk.said(speaker, rows, codes)
    if isinstance(end, serve_engine.Left | ValueError):
        talk.blocks = [block for block in blocks if any(block is other for other in talk.blocks)]  # some are forgotten
        talk.clip = clip
    if end is None:
        same_talk(w, own.kept.talk, talk)


def judge_parts(w, context, speech, parts, seed, options, noted):
    """Check the parts in order, each after the context or, without one, after the first part."""
    heard, speaker = list(context), speech.speaker
    for part, tries, codes in noted:
        turns, clip = opening(w, speaker, heard)
        rows = rows_of(w, turns, speaker, parts[part][0], clip)
        n = whole_text_frames(parts[part][0])
        w.judge.judge(rows, codes, n, (seed + part + tries * 2**32) % 2**64, options)
        if codes and not heard:
            longest = max(len(w.judge.text(text, speaker)) for text, _ in parts)
            if len(w.judge.text(parts[part][0], speaker)) + len(codes) + 1 + longest < w.judge.limit:
                heard = [(speaker, parts[part][0], np.array(codes))]


def same_pcm(w, pieces, parts, noted):
    got = np.concatenate([np.zeros(0, np.int16), *pieces])
    want = []
    for part, (_, pause) in enumerate(parts):
        codes = [codes for other, _, codes in noted if other == part][-1]
        if codes:
            whole = w.generator.mimi.decode(mx.array(np.array(codes)).T[None])[0, 0]
            want.append(mimi.to_pcm16(whole))
        want.append(np.zeros(int(pause * 24000), np.int16))
    want = np.concatenate([np.zeros(0, np.int16), *want])
    assert len(got) == len(want) and np.abs(got.astype(int) - want).max(initial=0) <= 1


WAYS = [alone, alone, batch, batch, many, conversation, conversation, narrated, served]


def play(world, seed):
    r = random.Random(seed)
    variant, way = r.choice(VARIANTS), r.choice(WAYS)
    w = world(variant)
    if r.random() < 0.5:
        w.generator.context_caches.clear()
    try:
        way(r, w)
    except Exception as e:
        raise AssertionError(f"scenario {seed}, {way.__name__} of {variant}: {type(e).__name__}: {e}") from e


def some_seeds(first, last):
    """Tens of seeds; a bare pytest takes the first two."""
    for i in range(first, last, 10):
        yield pytest.param(range(i, min(i + 10, last)), id=str(i), marks=[pytest.mark.slow] * (i >= first + 20))


@pytest.mark.parametrize("seeds", list(some_seeds(FIRST, LAST)))
def test_scenarios(world, seeds):
    before = reference.counts.copy()
    for seed in seeds:
        play(world, seed)
    counts = reference.counts - before
    assert counts["codes"] > 100 and counts["ties"] * 1000 < counts["codes"], counts


def one_code_more(own):
    return lambda self: [n + (i == 1) for i, n in enumerate(own(self))]  # top-k


def a_little_warmer(own):
    return lambda self: [n * 0.99 if i == 0 else n for i, n in enumerate(own(self))]


def too_little(own):
    return lambda self, n: own(self, n - 4)


def as_if_alone(own):
    return lambda self: self.offset


def without_an_end(own):
    return lambda self, segment: own(self, segment)[:-1]


WRONG = [
    (csm.Sampling, "as_row", one_code_more), (csm.Sampling, "as_row", a_little_warmer),
    (csm.KVCache, "trim", too_little), (csm_batch.BatchCache, "positions", as_if_alone),
    (csm.Generator, "audio_rows", without_an_end),
    (serve_engine.Engine, "add_turn", lambda own: lambda self, speech, text: None),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("thing, name, change", WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_what_is_wrong_is_noticed(world, monkeypatch, thing, name, change):
    monkeypatch.setattr(thing, name, change(getattr(thing, name)))
    with pytest.raises(AssertionError, match="scenario"):
        for seed in range(100):
            play(world, seed)
