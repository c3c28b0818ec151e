"""The tests of csm.py: equal to transformers on the same weights, and right where the references do not reach.

    pytest                   # everything; the tests that need torch and transformers are skipped where these are absent

Weights are random and small, made on the spot, and scaled so that a greedy choice is not decided by rounding.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import csm  # first: it puts a fast BLAS in place before mlx is imported
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile

HERE = Path(__file__).parent
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
WORDS = "hello there , how are you today ? i am fine . yes no ä ö 你 0 1 2 3".split()

# name -> codebooks, code values, backbone and decoder (layers, dim, heads, kv heads, head dim, ffn, rope)
SHAPES = {
    "k8": (8, 64, (2, 64, 4, 2, 16, 128, PLAIN), (2, 32, 4, 1, 8, 64, PLAIN)),
    "k32": (32, 128, (2, 96, 6, 2, 32, 160, LLAMA3), (2, 48, 3, 3, 16, 96, LLAMA3)),
    "k4": (4, 32, (3, 128, 4, 4, 32, 128, PLAIN), (1, 64, 8, 2, 8, 128, LLAMA3)),
    "1b-wide": (32, 2048, (2, 2048, 32, 8, 64, 8192, LLAMA3), (1, 1024, 8, 2, 128, 8192, LLAMA3)),
}
MIMI = {
    "num_filters": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 32,
}
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|AUDIO|>", "<|audio_eos|>"]


def write_tokenizer(folder):
    """A word-level tokenizer.json with every character as fallback."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab = {w: i for i, w in enumerate([*SPECIAL, *dict.fromkeys([*WORDS, "[", "]", *map(chr, range(32, 127))])])}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    t.normalizer = normalizers.Lowercase()
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|."), "isolated")
    t.add_special_tokens(SPECIAL)
    t.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return len(vocab)


def native_config(shape, text_vocab):
    """The config.json of our own layout for one of SHAPES."""
    K, n_codes, *parts = SHAPES[shape]
    names = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
    llamas = [
        dict(zip(names, p), rope_theta=p[6]["rope_theta"], max_positions=512,
             rope_scaling=None if p[6] is PLAIN else {k: v for k, v in LLAMA3.items() if not k.startswith("rope")})
        for p in parts
    ]  # fmt: skip
    return {"model_type": "csm", "layout": "native", "backbone": llamas[0], "decoder": llamas[1],
            "text_vocab_size": text_vocab, "audio_vocab_size": n_codes + 3, "audio_num_codebooks": K}  # fmt: skip


def random_weights(config, seed=0):
    """{name: array} of our layout."""
    from mlx.utils import tree_flatten

    model = csm.CSM(csm.CSMConfig.from_dict(config))
    key, out, heads = mx.random.key(seed), {}, []
    for name, w in tree_flatten(model.parameters()):
        key, k = mx.random.split(key)
        scale = 1 if "embeddings" in name else 3 / w.shape[-1] ** 0.5 if "head" in name else 1 / w.shape[-1] ** 0.5
        value = mx.random.normal(w.shape, key=k) * scale if w.ndim > 1 else mx.ones(w.shape)
        if name.startswith("audio_head."):
            heads.append(value.T)
        else:
            out[name] = value
    return out | {"audio_head": mx.stack(heads)}


def random_mimi(K, n_codes, seed=0):
    """A small Mimi's {name: array} in kyutai's names, which are ours, and its config."""
    c = {"n_filters": 4, "dim": 32, "n_layers": 1, "n_heads": 2, "ffn_dim": 64, "codebook_size": n_codes,
         "codebook_dim": 16, "n_codebooks": K, "kernel_size": 7, "ratios": [8, 6, 5, 4]}  # fmt: skip
    key, w = mx.random.key(seed), {}

    def add(name, *shape, scale=None):
        nonlocal key
        key, k = mx.random.split(key)
        w[name] = mx.random.normal(shape, key=k) * (scale or 1 / np.prod(shape[1:]) ** 0.5)

    def conv(name, kind, *shape):
        add(f"{name}.{kind}.{kind}.weight", *shape)
        add(f"{name}.{kind}.{kind}.bias", shape[1] if kind == "convtr" else shape[0], scale=0.1)

    conv("encoder.model.0", "conv", 4, 1, 7)
    conv("decoder.model.0", "conv", 64, 32, 7)
    for i, ratio in enumerate([8, 6, 5, 4]):
        dim = 4 * 2 ** (3 - i)  # narrower side, decoder order
        for part, block, strided in (("encoder", 10 - 3 * i, 12 - 3 * i), ("decoder", 3 + 3 * i, 2 + 3 * i)):
            conv(f"{part}.model.{block}.block.1", "conv", dim // 2, dim, 3)
            conv(f"{part}.model.{block}.block.3", "conv", dim, dim // 2, 1)
            if part == "encoder":
                conv(f"{part}.model.{strided}", "conv", 2 * dim, dim, 2 * ratio)
            else:
                conv(f"{part}.model.{strided}", "convtr", 2 * dim, dim, 2 * ratio)
    conv("encoder.model.14", "conv", 32, 64, 3)
    conv("decoder.model.14", "conv", 1, 4, 3)
    for part in ("encoder", "decoder"):
        layer = f"{part}_transformer.transformer.layers.0"
        add(f"{layer}.self_attn.in_proj_weight", 96, 32)
        add(f"{layer}.self_attn.out_proj.weight", 32, 32)
        add(f"{layer}.linear1.weight", 64, 32)
        add(f"{layer}.linear2.weight", 32, 64)
        for n in (1, 2):
            w[f"{layer}.norm{n}.weight"], w[f"{layer}.norm{n}.bias"] = mx.ones((32,)), mx.zeros((32,))
            w[f"{layer}.layer_scale_{n}.scale"] = mx.full((32,), 0.1)
    for part, n in (("first", 1), ("rest", K - 1)):
        add(f"quantizer.rvq_{part}.input_proj.weight", 16, 32, 1)
        add(f"quantizer.rvq_{part}.output_proj.weight", 32, 16, 1)
        for i in range(n):
            add(f"quantizer.rvq_{part}.vq.layers.{i}._codebook.embedding_sum", n_codes, 16, scale=0.5)
            w[f"quantizer.rvq_{part}.vq.layers.{i}._codebook.cluster_usage"] = mx.ones((n_codes,))
    add("downsample.conv.conv.conv.weight", 32, 32, 4)
    add("upsample.convtr.convtr.convtr.weight", 32, 1, 4, scale=0.5)
    return w, c


def write_model(folder, shape="k8", weights=None, voices=True):
    """A whole model folder in our own layout, with two voices."""
    folder.mkdir(exist_ok=True)
    config = native_config(shape, write_tokenizer(folder))
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights or random_weights(config))
    tensors, c = random_mimi(SHAPES[shape][0], SHAPES[shape][1])
    mx.save_safetensors(str(folder / "mimi.safetensors"), tensors, {"format": "mlx", "config": json.dumps(c)})
    if voices:
        (folder / "prompts").mkdir(exist_ok=True)
        for i, voice in enumerate(("conversational_a", "other")):
            soundfile.write(folder / "prompts" / f"{voice}.wav", clip(0.5, seed=i), 24000)
            (folder / "prompts" / f"{voice}.txt").write_text("how are you today?\n")
    return folder


def clip(seconds, seed=0):
    """Noise with a slow envelope, (samples,) float32."""
    n = int(seconds * 24000)
    noise = np.random.default_rng(seed).standard_normal(n) * 0.2
    return (noise * np.sin(np.arange(n) / 2000)).astype(np.float32)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def generator(folder):
    return csm.load(folder)


GREEDY = {"temperature": 0, "voice": "none", "max_audio_length_ms": 800}

# ------------------------------------------------------------------------------- equal to transformers


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """transformers' model, its processor, and ours loaded from what it saved."""
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    K, n_codes, backbone, decoder = SHAPES[request.param]
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "rope_parameters")  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    vocab = write_tokenizer(folder)
    sizes = {"num_codebooks": K, "vocab_size": n_codes + 3}
    config = tf.CsmConfig(
        **dict(zip(names, backbone)), **sizes, text_vocab_size=vocab, max_position_embeddings=2048,
        audio_token_id=3, audio_eos_token_id=4, pad_token_id=0, bos_token_id=1, codebook_pad_token_id=n_codes + 2,
        depth_decoder_config=dict(
            zip(names, decoder), **sizes, backbone_hidden_size=backbone[1], max_position_embeddings=K + 1
        ),
        codec_config=dict(MIMI, model_type="mimi", num_quantizers=K, codebook_size=n_codes),
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.CsmForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, w in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("embed_sum"):
                w.normal_()
            elif "layer_scale" in name:
                w.fill_(0.1)
            elif w.ndim > 1 and not name.startswith("codec_model"):
                fan = w.shape[1] if "codebooks_head" in name else w.shape[-1]
                w.normal_(
                    0,
                    1 if "embed" in name and "projector" not in name else 3 / fan**0.5 if "head" in name else fan**-0.5,
                )
        model.lm_head.weight[n_codes:] = 0  # ids that Mimi lacks, which ours never says: keep theirs from it too
        model.depth_decoder.codebooks_head.weight[..., n_codes:] = 0
    model.save_pretrained(folder)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    template = (
        "{% for m in messages %}<bos>[{{ m.role }}]{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}<eos>"
        "{% else %}<|AUDIO|><|audio_eos|>{% endif %}{% endfor %}{% endfor %}"
    )
    processor = tf.CsmProcessor(tf.EncodecFeatureExtractor(sampling_rate=24000), tokenizer, chat_template=template)
    return torch, model, processor, csm.load(folder)


def conversation(processor, turns):
    """[(speaker, text, audio or None)] -> the inputs that transformers' processor makes."""
    messages = []
    for speaker, text, audio in turns:
        content = [{"type": "text", "text": text}] + [{"type": "audio", "audio": audio}] * (audio is not None)
        messages.append({"role": str(speaker), "content": content})
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True)


TURNS = [(0, "hello there, how are you?", clip(1.6, 1)), (1, "i am fine.", clip(0.8, 2)), (0, "yes", None)]


def test_prompt_rows_are_the_processors(pair):
    torch, model, processor, ours = pair
    inputs = conversation(processor, TURNS)
    segments = [csm.Segment(s, t, a) for s, t, a in TURNS[:-1]]
    rows = np.concatenate([*map(ours.segment_rows, segments), ours.text_rows(TURNS[-1][1], TURNS[-1][0])])
    ids = inputs["input_ids"][0].numpy()
    assert len(rows) == len(ids)
    text = rows[:, -1] != csm.NO_TEXT
    assert (text == ~np.isin(ids, [3, 4])).all() and (rows[text, -1] == ids[text]).all()
    assert (rows[ids == 4, :-1] == 0).all()  # each clip ends with a frame of zeros
    with torch.no_grad():
        theirs = model._merge_input_ids_with_input_values(
            inputs["input_ids"], inputs["input_values"], inputs["input_values_cutoffs"]
        )["inputs_embeds"]
    K = ours.model.config.audio_num_codebooks
    mask = np.where(text[:, None], np.arange(K + 1) == K, np.arange(K + 1) < K)
    embedded = ours.model.embed(mx.array(np.maximum(rows, 0))[None], mx.array(mask)[None])
    assert np.abs(np.array(embedded) - theirs.numpy()).max() < 1e-4


def test_logits_are_transformers(pair):
    torch, model, _, ours = pair
    c, rng = ours.model.config, np.random.default_rng(0)
    K, T = c.audio_num_codebooks, 40
    codes = rng.integers(0, c.audio_vocab_size, (2, T, K))
    with torch.no_grad():
        out = model.backbone_model(input_ids=torch.tensor(codes))
        logits0, h = model.lm_head(out.last_hidden_state), out.last_hidden_state[0]
        ids = torch.cat([torch.zeros(T, 1, dtype=torch.long), torch.tensor(codes[0, :, :-1])], dim=1)
        depth = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=h, use_cache=False).logits
    rows = mx.array(np.pad(codes, [(0, 0), (0, 0), (0, 1)]))
    ours_h = ours.model(rows, mx.broadcast_to(mx.arange(K + 1) < K, rows.shape))
    assert np.abs(np.array(ours.model.head(0, ours_h)) - logits0.numpy()).max() < 1e-4
    ours_depth = ours.model.depth_logits(mx.array(h.numpy()), mx.array(codes[0]))
    assert ours_depth.shape == tuple(depth.shape) == (T, K - 1, c.audio_vocab_size)
    assert np.abs(np.array(ours_depth) - depth.numpy()).max() < 1e-4


@pytest.mark.parametrize("n_context", [0, 1, 2])
def test_greedy_codes_are_transformers(pair, n_context):
    torch, model, processor, ours = pair
    turns = TURNS[2 - n_context :]
    with torch.no_grad():
        theirs = model.generate(
            **conversation(processor, turns), max_new_tokens=30, do_sample=False, depth_decoder_do_sample=False
        )[0].numpy()
    segments = [csm.Segment(s, t, a) for s, t, a in turns[:-1]]
    codes = ours.generate_codes("yes", 0, segments, temperature=0, voice="none", max_audio_length_ms=30 * 80)
    assert len(theirs) == 30 and len(np.unique(theirs)) > 10  # not one code over and over
    np.testing.assert_array_equal(np.array(codes), theirs)


# ------------------------------------------------------------------------------- cache and conversation


def test_steps_after_a_prefill_equal_one_pass(generator):
    model, K = generator.model, generator.model.config.audio_num_codebooks
    rows = np.concatenate(
        [generator.segment_rows(csm.Segment(0, "hello there", clip(2))), generator.text_rows("yes", 1)]
    )
    mask = np.where(rows[:, -1:] != csm.NO_TEXT, np.arange(K + 1) == K, np.arange(K + 1) < K)
    rows, mask = mx.array(np.maximum(rows, 0))[None], mx.array(mask)[None]
    whole = model(rows, mask)
    for cuts in ([7], [1, 2, 3], list(range(1, rows.shape[1])), [20, 21]):
        cache = csm.KVCache(model.config.backbone)
        parts = [model(rows[:, a:b], mask[:, a:b], cache) for a, b in zip([0, *cuts], [*cuts, rows.shape[1]])]
        assert mx.abs(mx.concatenate(parts, axis=1) - whole).max() < 1e-5
        cache.trim(cache.offset - 5)  # and again from the sixth position on
        assert cache.offset == 5 and mx.abs(model(rows[:, 5:], mask[:, 5:], cache) - whole[:, 5:]).max() < 1e-5


def test_long_prompts_are_prefilled_in_parts(generator, monkeypatch):
    context = [csm.Segment(0, "hello", clip(8))]
    whole = generator.generate_codes("yes", 0, context, **GREEDY)
    monkeypatch.setattr(csm, "PREFILL", 7)
    np.testing.assert_array_equal(generator.generate_codes("yes", 0, context, **GREEDY), whole)


def test_conversation_prefills_only_what_is_new(generator):
    options = {"temperature": 0.8, "max_audio_length_ms": 480}
    talk = generator.conversation([csm.Segment(1, "how are you?", clip(1))])
    said = [csm.Segment(1, "how are you?", clip(1))]
    for i, text in enumerate(["hello", "i am fine", "yes", "no"]):
        if i == 2:
            said.append(csm.Segment(1, "there", clip(0.4, 3)))
            talk.hear(said[-1])
        before, cached = talk.prefilled, talk.cache.offset
        audio = talk.say(text, 0, seed=i, **options)
        rows = sum(map(len, talk.blocks[:-1])) + len(generator.text_rows(text, 0))
        assert talk.prefilled - before == rows - cached  # nothing twice
        if i:
            new = len(generator.text_rows(text, 0)) + (len(talk.blocks[-2]) if i == 2 else 0)
            assert talk.prefilled - before == new + 2  # the frame that was not fed back, the frame of zeros
        from_scratch = generator.generate_codes(text, 0, said, seed=i, voice="none", **options)
        said.append(talk.turns[-1])
        np.testing.assert_array_equal(said[-1].codes, from_scratch)
        assert len(from_scratch) == 6 and audio.shape == (6 * 1920,)


def test_an_abandoned_stream_leaves_the_conversation_as_it_was(generator):
    talk, other = generator.conversation(voice="none"), generator.conversation(voice="none")
    options = {"seed": 3, "max_audio_length_ms": 800, "streaming_interval": 0.08}
    first = [talk.say("hello", seed=1, max_audio_length_ms=400), other.say("hello", seed=1, max_audio_length_ms=400)]
    stream = talk.stream("how are you?", 1, **options)
    next(stream), next(stream)
    with pytest.raises(ValueError, match="still being said"):
        talk.say("yes")
    with pytest.raises(ValueError, match="still being said"):
        talk.hear(csm.Segment(1, "yes", clip(0.2)))
    stream.close()
    assert len(talk.turns) == 1
    assert mx.array_equal(*first)
    np.testing.assert_array_equal(*(mx.concatenate(list(t.stream("yes", 0, **options))) for t in (talk, other)))


def test_conversation_forgets_the_oldest_turns_but_not_the_voice(generator, caplog):
    talk = generator.conversation(voice="other")
    for i in range(5):
        talk.hear(csm.Segment(1, f"{i} hello", clip(8, i)))  # 100 frames each, of 512 positions
    assert len(talk.say("yes", 1, seed=0, max_audio_length_ms=80_000)) > 0
    assert [t.text for t in talk.turns[:2]] == ["how are you today?", "2 hello"] and "forgotten" in caplog.text
    again = generator.generate_codes("yes", 1, talk.turns[:-1], seed=0, max_audio_length_ms=80_000)
    np.testing.assert_array_equal(talk.turns[-1].codes, again)


def test_stream_is_generate_in_pieces(generator):
    options = {"seed": 5, "max_audio_length_ms": 1680}
    whole = generator.generate("hello there", 1, **options)
    assert whole.shape == (21 * 1920,) and whole.dtype == mx.float32
    for interval, n in ((0.01, 1), (0.08, 1), (0.5, 6), (60, 21)):
        pieces = list(generator.stream("hello there", 1, streaming_interval=interval, **options))
        assert [len(p) for p in pieces[:-1]] == [n * 1920] * (len(pieces) - 1)
        assert mx.abs(mx.concatenate(pieces) - whole).max() < 1e-5
    decoded = generator.mimi.decode(generator.generate_codes("hello there", 1, **options).T[None])[0, 0]
    assert mx.abs(decoded - whole).max() < 1e-5
    streams = [
        generator.stream("hello there", 1, **options),
        generator.stream("no", 0, seed=1, max_audio_length_ms=1680),
    ]
    assert mx.abs(mx.concatenate([a for a, _ in zip(*streams)]) - whole).max() < 1e-5  # interleaved


def test_two_threads_share_a_generator(generator):
    alone = [np.array(generator.generate("hello", i, seed=i, max_audio_length_ms=1200)) for i in range(2)]
    out = [None, None]

    def work(i):
        out[i] = generator.generate("hello", i, seed=i, max_audio_length_ms=1200)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    np.testing.assert_array_equal(out, alone)  # results leave the thread that made them
    stream = generator.stream("hello", 0, seed=0, streaming_interval=0.1, max_audio_length_ms=1200)
    pieces = []
    for _ in range(15):  # each piece from another thread
        t = threading.Thread(target=lambda: pieces.append(next(stream)))
        t.start()
        t.join()
    np.testing.assert_allclose(mx.concatenate(pieces), alone[0], atol=1e-5)
    talk = generator.conversation([csm.Segment(0, "yes", clip(0.4))])
    t = threading.Thread(target=lambda: out.append(talk.say("hello", seed=0, max_audio_length_ms=400)))
    t.start()
    t.join()
    assert talk.say("no", 1, seed=0, max_audio_length_ms=400).shape == out[-1].shape == (5 * 1920,)


# ------------------------------------------------------------------------------- prompt, voices, context


def test_text_rows(generator, tmp_path):
    t = generator.tokenizer
    for text in ("hello", "<bos>hello<eos>", "ä 你 😀", "  hello\n"):
        ids = t.encode(f"[0]{text}")
        assert ids[0] == t.bos == 1 and ids[-1] == t.eos == 2 and not {1, 2} & set(ids[1:-1])
    rows = generator.text_rows("hello", 3)
    assert rows.dtype == np.int32 and (rows[:, :-1] == 0).all()
    np.testing.assert_array_equal(rows[:, -1], t.encode("[3]hello"))
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="empty"):
            generator.generate(text)
    for speaker in (-1, "0", 1.5):
        with pytest.raises(ValueError, match="speaker"):
            generator.generate("hello", speaker)


def test_sentencepiece_tokenizer(tmp_path, generator):
    import sentencepiece

    (tmp_path / "text").write_text("hello there how are you today\n[0] [1] 0123456789 äöü\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=80, model_type="unigram",
        character_coverage=1.0, byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    t = csm.Tokenizer(tmp_path / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert t.encode("[0]hello ä") == [sp.bos_id(), *sp.encode("[0]hello ä"), sp.eos_id()]
    theirs = csm.Generator(generator.model, generator.mimi, t)
    assert theirs.generate_codes("hello there", **GREEDY).shape == (10, 8)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        csm.Tokenizer(tmp_path / "bad.json")


def test_context_in_every_form_of_audio(generator, tmp_path):
    wave = clip(0.8)
    soundfile.write(tmp_path / "a.wav", wave, 24000, subtype="FLOAT")
    codes = generator.mimi.encode(mx.array(wave)[None, None])[0].T
    forms = [wave, mx.array(wave), wave.astype(np.float64), np.stack([wave, wave]), wave[:, None], tmp_path / "a.wav"]
    said = [generator.generate_codes("yes", 0, [csm.Segment(0, "hello", f)], **GREEDY) for f in forms]
    said.append(generator.generate_codes("yes", 0, [csm.Segment(0, "hello", codes=codes)], **GREEDY))
    assert len({np.array(s).tobytes() for s in said}) == 1
    rows = generator.segment_rows(csm.Segment(0, "hello", (wave * 32768).astype(np.int16)))
    assert (rows == generator.segment_rows(csm.Segment(0, "hello", wave))).mean() > 0.9  # rounded to 16 bits
    for audio, match in (
        (np.zeros(0), "samples"),
        (np.array([0.1, np.nan]), "NaN"),
        (None, "no audio"),
        ("no.wav", "no such"),
    ):
        with pytest.raises(ValueError, match=match):
            generator.generate("yes", 0, [csm.Segment(0, "hello", audio)])
    for codes in (np.zeros((3, 5), int), np.full((3, 8), 999)):
        with pytest.raises(ValueError, match="codes"):
            generator.generate("yes", 0, [csm.Segment(0, "hello", codes=codes)])


def test_voices(generator, folder):
    prompt = [csm.Segment(1, "how are you today?", folder / "prompts/conversational_a.wav")]
    options = {"temperature": 0, "max_audio_length_ms": 400}
    given = generator.generate_codes("yes", 1, prompt, **options)
    for voice in (None, "conversational_a"):  # a preset speaks with the speaker's id
        np.testing.assert_array_equal(generator.generate_codes("yes", 1, voice=voice, **options), given)
    talk = generator.conversation()
    talk.say("yes", 1, **options)  # and with the id of whoever speaks first
    np.testing.assert_array_equal(talk.turns[-1].codes, given)
    others = [generator.generate_codes("yes", 1, voice=v, **options) for v in ("none", "other")]
    assert not mx.array_equal(others[0], given) and not mx.array_equal(others[1], given)
    with pytest.raises(ValueError, match="unknown voice 'bob'; this model has: conversational_a, other"):
        generator.generate("yes", voice="bob")


def test_voice_match_continues_the_clip_and_keeps_the_turns(generator, monkeypatch):
    prompts = []
    monkeypatch.setattr(csm.Conversation, "_prefill", lambda self, rows: prompts.append(rows) or 1 / 0)
    turns = [
        csm.Segment(0, "hello", clip(0.4)),
        csm.Segment(1, "yes", clip(0.4, 1)),
        csm.Segment(0, "no", clip(0.4, 2)),
    ]
    for speaker, rest, ref in ((1, [turns[0], turns[2]], turns[1]), (0, turns[:2], turns[2])):
        with pytest.raises(ZeroDivisionError):
            generator.generate("there", speaker, turns, voice_match=True)
        joined = [generator.text_rows(f"{ref.text} there", speaker), generator.audio_rows(ref)[:-1]]  # no end frame
        np.testing.assert_array_equal(prompts[-1], np.concatenate([*map(generator.segment_rows, rest), *joined]))
    with pytest.raises(ValueError, match="no"):
        generator.generate("there", 5, turns, voice_match=True)


def test_too_long_a_prompt_says_how_long(generator):
    n = len(generator.segment_rows(csm.Segment(0, "hello", clip(41)))) + len(generator.text_rows("yes", 0))
    with pytest.raises(ValueError, match=rf"{n} positions, and the model has 512"):
        generator.generate("yes", 0, [csm.Segment(0, "hello", clip(41))])
    almost = generator.generate_codes("yes", 0, [csm.Segment(0, "hello", clip(39))], seed=0)
    assert 1 <= len(almost) <= 512 - 490  # what room there is


# ------------------------------------------------------------------------------- sampling


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, min_tokens_to_keep=1):
    """The distribution that the options define, in NumPy: filters on the untempered probabilities."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    n = len(p)
    if top_p < 1:
        n = int((np.cumsum(p[order]) - p[order] < top_p).sum())
    if min_p:
        n = min(n, max(int((p >= min_p * p.max()).sum()), min_tokens_to_keep))
    n = min(n, top_k or n)
    kept = np.zeros(len(p))
    kept[order[:n]] = p[order[:n]] ** (1 / temperature)
    return kept / kept.sum()


FILTERS = [
    {},
    {"temperature": 0.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1, "temperature": 1.5},
    {"min_p": 0.9, "min_tokens_to_keep": 4},
    {"top_k": 10, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
]


def chi_square_fits(counts, expected):
    assert (counts[expected == 0] == 0).all()
    e = expected[expected > 0] * counts.sum()
    chi2, df = ((counts[expected > 0] - e) ** 2 / e).sum(), len(e) - 1
    assert chi2 < df + 5 * (2 * df) ** 0.5 + 5, (chi2, df)


@pytest.mark.parametrize("options", FILTERS)
def test_sampled_frequencies(options):
    N, logits = 20_000, np.random.default_rng(1).standard_normal(40).astype(np.float32) * 2
    options = {"temperature": 1.0, "top_k": 0} | options
    rows = mx.broadcast_to(mx.array(logits), (N, 40))
    expected = reference(logits, **options)
    chi_square_fits(np.bincount(csm.Sampling(**options)(rows, mx.random.key(0)), minlength=40), expected)
    mlx_lm = pytest.importorskip("mlx_lm.sample_utils")
    sampler = mlx_lm.make_sampler(temp=options.pop("temperature"), **options)
    mx.random.seed(0)  # which mlx-lm draws from
    chi_square_fits(np.bincount(csm.Sampling(sampler=sampler)(rows, None), minlength=40), expected)


def test_exactly_k_survive():
    tied = mx.broadcast_to(mx.array([1.0, 3.0, 3.0, 3.0, 0.0, 3.0]), (4000, 6))
    for k in range(1, 7):
        ids = csm.Sampling(temperature=1, top_k=k)(tied, mx.random.key(k))
        assert len(set(ids.tolist())) == k
    flat = csm.Sampling(temperature=5, top_k=7)(mx.zeros((4000, 100)), mx.random.key(0))
    assert len(set(flat.tolist())) == 7
    logits = mx.random.normal((50, 30), key=mx.random.key(1))
    for one in (csm.Sampling(temperature=0), csm.Sampling(top_k=1), csm.Sampling(top_p=1e-9), csm.Sampling(min_p=1)):
        assert mx.array_equal(one(logits, mx.random.key(2)), mx.argmax(logits, axis=-1))
    bad = [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_tokens_to_keep": 0}]
    for options in [*bad, {"temperature": float("nan")}]:
        with pytest.raises(ValueError):
            csm.Sampling(**options)


def test_seeds(generator, folder, caplog):
    state = np.array(mx.random.state[0])
    a, b, c = (generator.generate_codes("hello", seed=s, max_audio_length_ms=800) for s in (1, 1, 2))
    csm.load(folder)
    assert mx.array_equal(a, b) and not mx.array_equal(a, c)
    caplog.set_level("INFO", "csm")
    drawn = generator.generate_codes("hello", max_audio_length_ms=800)
    seed = int(caplog.messages[-1].split()[-1])
    assert mx.array_equal(generator.generate_codes("hello", seed=seed, max_audio_length_ms=800), drawn)
    assert (np.array(mx.random.state[0]) == state).all()  # the global generator is as it was


def test_logits_processors_see_the_first_codebook(generator):
    seen = []

    def only_seven(ids, logits):
        seen.append(ids.tolist())
        return mx.where(mx.arange(logits.shape[-1]) == 7, logits + 1e4, logits)

    codes = generator.generate_codes("hello", logits_processors=[only_seven], seed=0, max_audio_length_ms=400)
    assert (codes[:, 0] == 7).all() and not (codes[:, 1:] == 7).all()
    assert seen == [[7] * i for i in range(5)]


def test_codes_that_mimi_lacks_are_never_said(tmp_path):
    generator = csm.load(write_model(tmp_path, "k4"))
    n = generator.mimi.config.codebook_size

    def favour(ids, logits):
        return mx.where(mx.arange(logits.shape[-1]) >= n, logits + 100, logits)

    codes = [
        generator.generate_codes("hello", seed=s, temperature=9, top_k=0, voice="none", logits_processors=[favour])
        for s in range(5)
    ]
    codes = np.concatenate(codes)
    assert len(codes) > 2000 and codes.shape[1] == 4 and codes.min() == 0 and codes.max() == n - 1


class Script:
    """A sampler that says frames of ones, then, from frame `n` on, `end`."""

    def __init__(self, n, end):
        self.calls, self.n, self.end = 0, n, end

    def __call__(self, logprobs):
        assert logprobs.shape == (1, 67) and abs(mx.exp(logprobs).sum().item() - 1) < 1e-4
        frame, i = divmod(self.calls, 8)
        self.calls += 1
        return mx.array([self.end[i] if frame >= self.n else 1])


@pytest.mark.parametrize("n", [0, 3])
def test_end_of_speech(generator, n):
    codes = generator.generate_codes("hello", sampler=Script(n, [0] * 8))
    assert codes.shape == (n, 8) and generator.generate("hello", sampler=Script(n, [0] * 8)).shape == (n * 1920,)
    with pytest.raises(ValueError, match="sampler gave 64, and Mimi has 64"):
        generator.generate_codes("hello", sampler=Script(n, [64] * 8))
    almost = generator.generate_codes("hello", sampler=Script(n, [0] * 7 + [1]), max_audio_length_ms=800)
    assert almost.shape == (10, 8)  # the last codebook counts too: transformers looks at the others only


# ------------------------------------------------------------------------------- quantization, types


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(folder, generator, bits):
    config = json.loads((folder / "config.json").read_text())
    q = csm.load(folder, quantize=bits, group_size=32)
    assert q.model.audio_head[0].weight.dtype == q.model.text_embeddings.weight.dtype == mx.uint32
    assert q.generate_codes("hello there", seed=1, max_audio_length_ms=800).shape == (10, 8)
    weights = csm.quantize_weights(mx.load(str(folder / "model.safetensors")), bits, 32)
    plain = {}  # what the quantized matrices stand for
    for name, w in weights.items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" in weights and name != base:
            w = mx.dequantize(w, weights[f"{base}.scales"], weights[f"{base}.biases"], 32, bits)
        if not name.endswith((".scales", ".biases")):
            plain[name] = w
    same = csm.CSM(csm.CSMConfig.from_dict(config))
    mimi.fill(same, plain)
    h = mx.random.normal((3, 64), key=mx.random.key(0))
    codes = mx.random.randint(0, 64, (3, 8), key=mx.random.key(1))
    assert mx.abs(q.model.depth_logits(h, codes) - same.depth_logits(h, codes)).max() < 1e-3
    error = mx.abs(q.model.head(0, h) - generator.model.head(0, h)).max()
    assert 1e-4 < error < (0.2 if bits == 8 else 3)


def test_quantize_refuses(folder):
    for options in ({"quantize": 7}, {"quantize": 4, "group_size": 48}, {"dtype": "int8"}):
        with pytest.raises(ValueError):
            csm.load(folder, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", mx.float32])
def test_types(folder, generator, dtype):
    g = csm.load(folder, dtype=dtype)
    assert g.model.dtype == (getattr(mx, dtype) if isinstance(dtype, str) else dtype)
    h = mx.random.normal((3, 64), key=mx.random.key(0))
    assert mx.abs(g.model.head(0, h.astype(g.model.dtype)) - generator.model.head(0, h)).max() < 0.2
    assert g.generate("hello", seed=1, max_audio_length_ms=800).dtype == mx.float32


# ------------------------------------------------------------------------------- the command

SHORT = ["--max-audio-length-ms", "400"]


def run(*args, input=None, **env):
    """`python csm.py ARGS` in a process of its own."""
    command = [sys.executable, str(HERE / "csm.py"), *map(str, args)]
    return subprocess.run(command, input=input, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


def wav(path):
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype, info.format) == (24000, 1, "PCM_16", "WAV")
    return soundfile.read(path, dtype="int16")[0]


def test_command_and_library_say_the_same(folder, generator, tmp_path):
    done = run("hello there", tmp_path / "a.wav", "--model", folder, "--seed", 7, *SHORT)
    assert done.returncode == 0, done.stderr.decode()
    expected = mimi.to_pcm16(generator.generate("hello there", seed=7, max_audio_length_ms=400))
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), expected)
    last = done.stderr.decode().splitlines()[-1]
    for part in ("0.40 s of audio in", "real-time factor", "first audio after", "peak memory", "seed 7"):
        assert part in last
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        assert csm.main(["hello there", "--model", str(folder), *SHORT, "--seed", "7", str(tmp_path / "pipe")]) == 0
        assert len(reader.stdout.read()) == 44 + 2 * len(expected) and (tmp_path / "pipe").is_fifo()
    (tmp_path / "text").write_text("hello there\n")
    for text, stdin in ((f"@{tmp_path / 'text'}", None), ("-", b"hello there\n")):
        done = run(text, "-", "--model", folder, "--seed", 7, *SHORT, input=stdin)
        head, pcm = done.stdout[:44], np.frombuffer(done.stdout[44:], "<i2")
        assert head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt "
        assert np.abs(pcm.astype(int) - expected).max() <= 1  # a stream's pieces are rounded apart


def test_command_with_context(folder, generator, tmp_path):
    stereo = np.stack([clip(1), clip(1)], axis=1)
    soundfile.write(tmp_path / "me.wav", stereo, 24000, subtype="FLOAT")
    turns = [csm.Segment(1, "hello", clip(1)), csm.Segment(0, "yes", clip(1))]
    (tmp_path / "turns.json").write_text(
        json.dumps(
            [
                {"speaker": 1, "text": "hello", "audio": "me.wav"},
                {"speaker_id": 0, "text": "yes", "audio_path": "me.wav"},
            ]
        )
    )
    expected = generator.generate("no", 1, turns, seed=1, max_audio_length_ms=400)
    args = ["no", tmp_path / "a.wav", "--model", folder, "--speaker", 1, "--seed", 1, *SHORT]
    assert csm.main([str(a) for a in [*args, "--context", tmp_path / "turns.json"]]) == 0
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(expected))
    expected = generator.generate("no", 1, [turns[0]], seed=1, voice_match=True, max_audio_length_ms=400)
    args += ["--ref-audio", tmp_path / "me.wav", "--ref-text", "hello", "--voice-match"]
    assert csm.main([str(a) for a in args]) == 0
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(expected))


def test_dialogue(folder, generator, tmp_path):
    (tmp_path / "script.txt").write_text("0: hello\n\n[1]: yes: no\n  0 : there\n")
    args = ["--dialogue", tmp_path / "script.txt", tmp_path / "a.wav", "--model", folder, "--seed", 1, *SHORT]
    assert csm.main([str(a) for a in args]) == 0
    talk = generator.conversation()
    turns = [(0, "hello"), (1, "yes: no"), (0, "there")]
    said = [talk.say(text, s, seed=1 + i, max_audio_length_ms=400) for i, (s, text) in enumerate(turns)]
    np.testing.assert_array_equal(wav(tmp_path / "a.wav"), mimi.to_pcm16(mx.concatenate(said)))


def bad_inputs(d):
    """(arguments, part of the message) of everything that a user can get wrong."""
    d.joinpath("text.wav").write_text("not audio")
    d.joinpath("empty.txt").write_text("\n")
    d.joinpath("bad.json").write_text('[{"speaker": 0}]')
    d.joinpath("odd.json").write_text('["hello"]')
    d.joinpath("script.txt").write_text("0: hello\nhello\n")
    d.joinpath("turns.json").write_text('[{"speaker": 0, "text": "hello", "audio": "none.wav"}]')
    soundfile.write(d / "nan.wav", np.array([0, np.nan, 0], np.float32), 24000, subtype="FLOAT")
    soundfile.write(d / "nothing.wav", np.zeros(0), 24000)
    soundfile.write(d / "ok.wav", clip(0.2), 24000)
    soundfile.write(d / "long.wav", clip(41), 24000)

    def ref(name):
        return ["--ref-audio", d / name, "--ref-text", "hello"]

    return [
        ([], ["--model", d / "none"], "no such model"),
        ([], ["--model", "tiny-bird"], "no such model: tiny-bird (csm-1b, tiny, a folder"),
        ([], ["--model", "nobody/nothing"], "--model tiny"),
        ([], ref("none.wav"), "no such file"),
        ([], ref("text.wav"), "not an audio file"),
        ([], ref("nan.wav"), "NaN"),
        ([], ref("nothing.wav"), "no sound"),
        ([], ref("long.wav"), "positions, and the model has 512"),
        ([], ["--ref-audio", d / "ok.wav"], "--ref-text"),
        ([], ["--ref-text", "hello"], "--ref-audio"),
        ([], ["--voice", "bob"], "unknown voice 'bob'; this model has: conversational_a, other"),
        ([], ["--speaker", "-1"], "speaker must be 0 or more"),
        ([], ["--context", d / "none.json"], "none.json"),
        ([], ["--context", d / "bad.json"], "bad.json"),
        ([], ["--context", d / "turns.json"], "none.wav"),
        ([], ["--temperature", "-1"], "temperature"),
        ([], ["--temperature", "warm"], "temperature"),
        ([], ["--context", d / "odd.json"], "odd.json"),
        ([], ["--top-p", "2"], "top_p"),
        ([], ["--top-k", "-3"], "top_k"),
        ([], ["--seed", "-1"], "seed"),
        ([], ["--max-audio-length-ms", "0"], "max_audio_length_ms"),
        ([], ["--stream", "--streaming-interval", "0"], "streaming_interval"),
        ([], ["--voice", "none", "--voice-match"], "voice_match"),
        ([""], [], "empty"),
        ([f"@{d / 'empty.txt'}"], [], "empty"),
        ([f"@{d / 'none.txt'}"], [], "none.txt"),
        ([None], ["--dialogue", d / "script.txt"], "line 2"),
        ([None], ["--dialogue", d / "empty.txt"], "no turns"),
        (["hello"], ["--dialogue", d / "script.txt"], "not both"),
        ([None], [], "TEXT and OUT"),
    ]


def test_bad_input_gets_one_line_and_loses_nothing(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out.wav"
    out.write_bytes(b"what was there before")
    for text, args, message in bad_inputs(tmp_path):
        text = [t for t in (text or ["hello"]) if t is not None]
        model = [] if "--model" in args else ["--model", folder]
        before = sorted(tmp_path.iterdir())
        with pytest.raises(SystemExit) as error:
            csm.main([str(a) for a in [*text, out, *model, *args]])
        err = capfd.readouterr().err
        assert error.value.code == 2, args
        assert err.startswith("csm.py: error: ") and err.count("\n") == 1 and message in err, err
        assert out.read_bytes() == b"what was there before" and sorted(tmp_path.iterdir()) == before
    for bad_out in (tmp_path, tmp_path / "none" / "a.wav"):
        done = run("hello", bad_out, "--model", folder)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"cannot write" in done.stderr


def test_damaged_models_say_what_is_wrong(folder, tmp_path):
    weights = mx.load(str(folder / "model.safetensors"))
    name = "decoder.layers.0.mlp.up_proj.weight"
    cases = {
        f"missing {name}": {k: w for k, w in weights.items() if k != name},
        "unexpected decoder.extra": weights | {"decoder.extra": mx.zeros(3)},
        f"{name} is (64, 16), not (64, 32)": weights | {name: mx.zeros((64, 16))},
    }
    for message, damaged in cases.items():
        write_model(tmp_path / "m", weights=damaged, voices=False)
        with pytest.raises(ValueError) as error:
            csm.load(tmp_path / "m")
        assert message in str(error.value)
    write_model(tmp_path / "m", voices=False)
    data = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(data[: len(data) // 2])
    done = run("hello", tmp_path / "a.wav", "--model", tmp_path / "m")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"truncated" in done.stderr
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(ValueError, match="no such file"):
        csm.load(tmp_path / "m")


def test_interrupted_keeps_what_is_finished(folder, generator, tmp_path, monkeypatch, capfd):
    def frames(self, text, speaker=0, **options):
        yield from mx.ones((3, 1, 8), mx.int32)
        raise KeyboardInterrupt

    monkeypatch.setattr(csm.Conversation, "frames", frames)
    args = ["hello", str(tmp_path / "a.wav"), "--model", str(folder)]
    assert csm.main(args) == 130
    assert len(wav(tmp_path / "a.wav")) == 3 * 1920 and "0.2 s finished so far are in" in capfd.readouterr().err


def test_a_reader_that_leaves_is_no_error(folder):
    command = [sys.executable, HERE / "csm.py", "hello", "-", "--model", folder, "--streaming-interval", "0.08"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(44)[:4] == b"RIFF"
        p.stdout.close()
        assert b"Traceback" not in p.stderr.read() and p.wait() == 1


def test_help_needs_no_model():
    done = run("--help")
    assert done.returncode == 0 and b"--voice-match" in done.stdout


# ------------------------------------------------------------------------------- downloads, README, the real weights


def stand_in_hub(cache):
    """A Hugging Face cache with small random models in the place of the default downloads; returns the environment."""
    write_model(cache / "made")
    repos = {
        "senstella/csm-1b-mlx": {"ckpt.safetensors": "model.safetensors", "config.json": "config.json"},
        mimi.DEFAULT_REPO: {mimi.DEFAULT_FILE: "mimi.safetensors"},
        csm.DEFAULT_TOKENIZER: {"tokenizer.json": "tokenizer.json"},
        csm.DEFAULT_PROMPTS: {f"prompts/conversational_a.{x}": f"prompts/conversational_a.{x}" for x in ("wav", "txt")},
    }
    for repo, files in repos.items():
        place = cache / "hub" / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("0" * 40)
        for name, made in files.items():
            (place / "snapshots" / ("0" * 40) / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "snapshots" / ("0" * 40) / name).write_bytes((cache / "made" / made).read_bytes())
    return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return stand_in_hub(tmp_path_factory.mktemp("hub"))


def test_default_downloads(hub, tmp_path):
    done = run("hello", tmp_path / "a.wav", *SHORT, "--seed", 1, **hub)
    assert done.returncode == 0, done.stderr.decode()
    assert len(wav(tmp_path / "a.wav")) == 5 * 1920
    done = run("hello", tmp_path / "a.wav", "--voice", "read_speech_a", **hub)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"read_speech_a" in done.stderr


README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""


def blocks(kind):
    return [part.split("```")[0] for part in README.split(f"```{kind}\n")[1:]]


def test_readme_examples_run(hub, tmp_path):
    """Every Python block, one after the other, and every `python csm.py` line, with the stand-ins for the downloads."""
    soundfile.write(tmp_path / "me.wav", clip(1), 24000)
    soundfile.write(tmp_path / "you.wav", clip(1), 24000)
    (tmp_path / "turns.json").write_text('[{"speaker": 0, "text": "hello", "audio": "me.wav"}]')
    (tmp_path / "script.txt").write_text("0: hello\n1: yes\n")
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))
    environment = {**os.environ, **hub, "PYTHONPATH": str(HERE)}
    assert len(blocks("python")) > 2
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = [line for b in blocks("sh") for line in b.splitlines() if "csm.py" in line or "mimi.py" in line]
    assert len(lines) > 5
    for line in lines:
        line = line.replace("python ", f"{sys.executable} ").replace("ffplay", "cat #")
        line = line.replace("csm.py", f"{HERE / 'csm.py'} --max-audio-length-ms 400").replace(
            "mimi.py", f"{HERE / 'mimi.py'}"
        )
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, (line, done.stderr.decode())


@pytest.mark.skipif(not os.environ.get("CSM_GOLDEN"), reason="opt-in: CSM_GOLDEN=csm-1b with the real weights at hand")
def test_golden_codes_of_the_real_weights():
    golden = json.loads((HERE / "golden_csm_1b.json").read_text())
    generator = csm.load(os.environ["CSM_GOLDEN"], dtype="float32")
    n = len(golden["frames"])
    codes = generator.generate_codes(
        golden["text"], golden["speaker"], voice="none", temperature=0, max_audio_length_ms=n * 80
    )
    assert codes.tolist() == golden["frames"]
