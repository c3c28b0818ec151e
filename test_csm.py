"""Tests to copy along with csm.py and mimi.py. They need only numpy and pytest.

    pytest test_csm.py

They use a small random model. tests/ compares csm.py with transformers and moshi.
"""

from pathlib import Path

import csm  # before mlx

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

import mimi

K, CODES, TEXT = 6, 40, 130
PLAIN = {"rope_scaling": None, "max_positions": 300}
CONFIG = csm.CSMConfig(
    csm.LlamaConfig(2, 48, 4, 2, 16, 96, **PLAIN), csm.LlamaConfig(2, 32, 2, 1, 16, 64, **PLAIN), TEXT, CODES + 3, K
)
CODEC = mimi.MimiConfig(
    n_filters=4, ratios=(4, 2), dim=16, n_layers=1, n_heads=2, ffn_dim=32, context=12, codebook_size=CODES,
    codebook_dim=8, n_codebooks=K, sample_rate=200,
)  # fmt: skip
SHORT = {"max_audio_length_ms": 20 * 1000 / CODEC.frame_rate}  # 20 frames


class Letters:
    """A tokenizer whose tokens are a text's characters, between two marks."""

    def encode(self, text):
        return [1, *(ord(c) % TEXT for c in text), 2]


def randomize(module, seed):
    key = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(path, w):
        if w.ndim == 1:
            return mx.ones(w.shape) if "norm" in path else 0.1 * mx.random.normal(w.shape, key=next(key))
        scale = 1 if "embeddings" in path or "codebooks" in path else 3 if "head" in path else 1
        return mx.random.normal(w.shape, key=next(key)) * scale / (1 if "embeddings" in path else w.shape[-1] ** 0.5)

    module.update(tree_map_with_path(draw, module.parameters()))
    return module


@pytest.fixture(scope="module")
def generator():
    codec = randomize(mimi.Mimi(CODEC), 1)
    for rvq in (codec.first, codec.rest):
        rvq.norms = (rvq.codebooks**2).sum(-1)
    return csm.Generator(randomize(csm.CSM(CONFIG), 0), codec, Letters())


def sound(frames, seed=0):
    return np.random.default_rng(seed).standard_normal(frames * CODEC.frame_size).astype(np.float32) * 0.3


def test_the_cache_changes_nothing(generator):
    rows = np.concatenate([generator.segment_rows(csm.Segment(0, "hello", sound(5))), generator.text_rows("yes", 1)])
    rows = mx.array(rows)[None]
    whole = generator.model(rows)
    cache = csm.KVCache(CONFIG.backbone)
    steps = [generator.model(rows[:, i : i + 3], cache) for i in range(0, rows.shape[1], 3)]
    assert mx.abs(mx.concatenate(steps, axis=1) - whole).max() < 1e-4


def test_the_depth_decoder_is_the_teacher_forced_one(generator):
    h = mx.random.normal((3, 48), key=mx.random.key(3))
    codes = generator.model.next_frame(h, lambda i, logits: mx.argmax(logits, axis=-1))
    logits = mx.concatenate([generator.model.head(0, h)[:, None], generator.model.depth_logits(h, codes)], axis=1)
    assert mx.array_equal(mx.argmax(logits, axis=-1), codes)


def test_streamed_and_in_a_conversation_it_is_the_same(generator):
    context = [csm.Segment(0, "hello", sound(8)), csm.Segment(1, "good day", sound(6, 1))]
    options = {"seed": 5, **SHORT}
    whole = generator.generate("how are you?", 0, context, **options)
    codes = generator.generate_codes("how are you?", 0, context, **options)
    assert len(np.unique(codes)) > 5 and whole.shape == (len(codes) * CODEC.frame_size,) and whole.dtype == mx.float32
    pieces = list(generator.stream("how are you?", 0, context, streaming_interval=3 / CODEC.frame_rate, **options))
    assert len(pieces) > 3 and mx.abs(mx.concatenate(pieces) - whole).max() < 1e-4
    before, rows = generator.prompt("how are you?", 0, context)
    cache = csm.KVCache(CONFIG.backbone)
    frames = csm.frames(generator.model, np.concatenate([before, rows]), cache, 20, 5)
    assert np.array_equal(np.stack(list(frames)), codes)
    talk = generator.conversation(context)
    talk.say("how are you?", 0, **options)
    assert mx.array_equal(talk.turns[-1].codes, codes)
    talk.say("fine", 1, **options)
    again = generator.generate_codes("fine", 1, talk.turns[:-1], **options)
    assert mx.array_equal(talk.turns[-1].codes, again)


def test_seeds_and_greed(generator):
    a, b, c = (generator.generate_codes("hello", seed=s, **SHORT).tolist() for s in (1, 1, 2))
    assert a == b != c
    greedy = [generator.generate_codes("hello", seed=s, temperature=0, **SHORT).tolist() for s in (1, 2)]
    assert greedy[0] == greedy[1]
    assert (
        generator.generate_codes("hello", sampler=lambda logp: mx.argmax(logp, axis=-1), **SHORT).tolist() == greedy[0]
    )


def test_a_frame_of_zeros_ends_the_speech(generator):
    spoken = iter([7] * K * 3 + [0] * K * 9)
    codes = generator.generate_codes("hello", sampler=lambda logp: mx.array([next(spoken)]))
    assert codes.tolist() == [[7] * K] * 3


@pytest.mark.parametrize("frames", [1, 5, 30])
def test_the_codec_in_chunks_is_the_whole(generator, frames):
    codec, audio = generator.mimi, mx.array(sound(frames, 2))[None, None]
    codes = codec.encode(audio)
    assert codes.shape == (1, K, frames) and (frames < 9 or len(np.unique(codes)) > 5)
    state, parts = codec.init_state(), []
    for i in range(0, audio.shape[2], 7):
        part, state = codec.encode_step(audio[..., i : i + 7], state)
        parts.append(part)
    assert mx.array_equal(mx.concatenate(parts, axis=2), codes)
    state, parts = codec.init_state(), []
    for i in range(frames):
        part, state = codec.decode_step(codes[..., i : i + 1], state)
        parts.append(part)
    assert mx.abs(mx.concatenate(parts, axis=2) - codec.decode(codes)).max() < 1e-4


def test_mistakes_are_value_errors(generator):
    for args, options, words in (
        (("",), {}, "empty"), (("hello", -1), {}, "speaker"), (("hello", True), {}, "speaker"),
        (("hello",), {"temperature": -1}, "temperature"),
        (("hello",), {"voice": "bob"}, "bob"), (("hello", 0, [csm.Segment(0, "yes")]), {}, "no audio"),
        (("hello", 0, [csm.Segment(0, "yes", np.array([0, np.nan]))]), {}, "NaN"), (("hello" * 99,), {}, "positions"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            generator.generate(*args, **options)


@pytest.mark.skipif(not Path(__file__).with_name("tiny").is_dir(), reason="the folder tiny is not beside this file")
def test_the_model_in_the_box_speaks(tmp_path):
    assert csm.main(["hello world", str(tmp_path / "hello.wav"), "--model", "tiny", "--seed", "1"]) == 0
    audio = mimi.read_audio(tmp_path / "hello.wav")
    assert 0.2 < len(audio) / 24_000 < 5 and 0.01 < np.abs(audio).max() <= 1
