"""csm.py equals transformers on the same weights, and is right where the references have no counterpart.

    pytest                   # everything; the tests that need torch and transformers are skipped where these are absent

Weights are random and small (conftest.py), scaled so that a greedy choice is not decided by rounding.
"""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import csm  # before mlx
import csm_layouts
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import soundfile
from mlx.utils import tree_flatten

from conftest import DTYPE, LOGITS, SHAPES, clip, same_codes, write_model, write_tokenizer

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
GREEDY = {"temperature": 0, "voice": "none", "max_audio_length_ms": 800}

# ------------------------------------------------------------------------------- equal to transformers


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """transformers' model, its processor, and our model loaded from its files."""
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
        model.lm_head.weight[n_codes:] = 0  # ours never draws ids that Mimi lacks; keep theirs from it, too
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
    return torch, model, processor, csm.load(folder, dtype=DTYPE)


def conversation(processor, turns):
    """[(speaker, text, audio or None)] -> inputs by transformers' processor."""
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
    embedded = ours.model.embed(mx.array(rows)[None])
    assert np.abs(np.array(embedded.astype(mx.float32)) - theirs.numpy()).max() < LOGITS


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
    ours_h = ours.model(mx.array(np.pad(codes, [(0, 0), (0, 0), (0, 1)], constant_values=csm.NO_TEXT)))
    assert np.abs(np.array(ours.model.head(0, ours_h).astype(mx.float32)) - logits0.numpy()).max() < LOGITS
    ours_depth = ours.model.depth_logits(mx.array(h.numpy()).astype(ours.model.dtype), mx.array(codes[0]))
    assert ours_depth.shape == tuple(depth.shape) == (T, K - 1, c.audio_vocab_size)
    assert np.abs(np.array(ours_depth.astype(mx.float32)) - depth.numpy()).max() < LOGITS


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
    assert len(theirs) == 30 and len(np.unique(theirs)) > 10  # many different codes
    same_codes(codes, theirs)


# ------------------------------------------------------------------------------- cache and conversation


def clip_and_text(generator):
    """The rows of a turn of 2 s and of a text."""
    turn = csm.Segment(0, "hello there", clip(2))
    return np.concatenate([generator.segment_rows(turn), generator.text_rows("yes", 1)])


def test_steps_after_a_prefill_equal_one_pass(generator):
    model = generator.model
    rows = clip_and_text(generator)
    rows = mx.array(rows)[None]
    whole = model(rows)
    for cuts in ([7], [1, 2, 3], list(range(1, rows.shape[1])), [20, 21]):
        cache = csm.KVCache(model.config.backbone, model.dtype)
        parts = [model(rows[:, a:b], cache) for a, b in zip([0, *cuts], [*cuts, rows.shape[1]])]
        assert mx.abs(mx.concatenate(parts, axis=1) - whole).max() < LOGITS / 10
        cache.trim(cache.offset - 5)  # and again from the sixth position on
        assert cache.offset == 5 and mx.abs(model(rows[:, 5:], cache) - whole[:, 5:]).max() < LOGITS / 10


def test_prefill_computes_one_row_in_the_last_layer(generator, monkeypatch):
    model, plain, widths = generator.model, csm.MLP.__call__, []
    rows = clip_and_text(generator)
    whole = csm.KVCache(model.config.backbone, model.dtype)
    h = model(mx.array(rows)[None], whole)
    monkeypatch.setattr(csm.MLP, "__call__", lambda self, x: widths.append(x.shape[1]) or plain(self, x))
    for held in (0, 5, len(rows) - 1):  # rows before
        cache = csm.KVCache(model.config.backbone, model.dtype)
        if held:
            model(mx.array(rows)[None, :held], cache)
        widths.clear()
        assert mx.abs(csm.prefill(model, rows[held:], cache) - h[:, -1]).max() < LOGITS / 10
        assert widths == [len(rows) - held] * (model.config.backbone.n_layers - 1) + [1]
        for theirs, ours in zip(whole.keys + whole.values, cache.keys + cache.values):
            assert mx.abs((theirs - ours)[:, :, : len(rows)]).max() < LOGITS / 10


def test_long_prompts_are_prefilled_in_parts(generator, monkeypatch):
    context = [csm.Segment(0, "hello", clip(8))]
    whole = generator.generate_codes("yes", 0, context, **GREEDY)
    monkeypatch.setattr(csm, "PREFILL_ROWS", 7)
    same_codes(generator.generate_codes("yes", 0, context, **GREEDY), whole)


def test_conversation_prefills_only_what_is_new(generator, monkeypatch):
    passed, prefill = [], csm.prefill  # rows
    monkeypatch.setattr(
        csm, "prefill", lambda model, rows, cache: passed.append(len(rows)) or prefill(model, rows, cache)
    )
    options = {"temperature": 0.8, "max_audio_length_ms": 480}
    talk = generator.conversation([csm.Segment(1, "how are you?", clip(1))])
    said = [csm.Segment(1, "how are you?", clip(1))]
    for i, text in enumerate(["hello", "i am fine", "yes", "no"]):
        if i == 2:
            said.append(csm.Segment(1, "there", clip(0.4, 3)))
            talk.hear(said[-1])
        passed.clear()
        audio = talk.say(text, 0, seed=i, **options)
        new = len(generator.text_rows(text, 0)) + (len(talk.blocks[-2]) if i == 2 else 0)
        # The context is the generator's to prefill; a turn that was cut off lacks its frame of zeros.
        assert passed == ([new + 1] if i else [len(talk.blocks[0]), new])
        assert talk.cache.offset == sum(map(len, talk.blocks)) - 1
        from_scratch = generator.generate_codes(text, 0, said, seed=i, voice="none", **options)
        said.append(talk.turns[-1])
        same_codes(said[-1].codes, from_scratch)
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


def test_who_has_the_voice_is_said_when_a_conversation_is_made(generator):
    options = {"seed": 4, "max_audio_length_ms": 400}
    talk = generator.conversation(voice="other", speaker=1)
    begun = talk.stream("hi", 0, streaming_interval=0.08, **options)
    next(begun), begun.close()
    assert [turn.speaker for turn in talk.turns] == [1]
    alone = generator.generate("hello", 1, voice="other", **options)
    np.testing.assert_array_equal(talk.say("hello", 1, **options), alone)
    assert [turn.speaker for turn in generator.conversation(voice="other").turns] == [0]


def test_conversation_of_a_model_that_continues_clips(tmp_path):
    """Only the first turn of the clip's speaker continues it."""
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"voice_match": True}))
    generator, options = csm.load(tmp_path, dtype="float32"), {"seed": 4, "max_audio_length_ms": 400}
    clips = [csm.Segment(i, "yes", clip(0.4, i)) for i in (0, 1)]
    talk = generator.conversation(clips, speaker=1)
    begun = talk.stream("hi", 1, streaming_interval=0.08, **options)
    next(begun), begun.close()
    for _ in range(2):
        codes = generator.generate_codes("hello", 1, clips, **options) if len(talk.turns) == 1 else None
        talk.say("hello", 1, **options)
        assert codes is None or mx.array_equal(talk.turns[-1].codes, codes)
    assert [len(turns) for turns in (talk.turns, talk.blocks)] == [3, 3]
    assert len(talk.blocks[1]) == len(generator.turn_rows("hello", 1, clips[1])) + 6  # 5 frames and the end
    assert len(talk.blocks[2]) == len(generator.text_rows("hello", 1)) + 6


def test_a_context_is_of_segments(generator):
    for context in (["hello"], [("hello", 0)], csm.Segment(0, "hello", clip(0.5))):
        with pytest.raises(ValueError, match="list of Segments"):
            generator.generate("hi", 0, context)
    said = [generator.generate_codes("hi", 0, context, **GREEDY) for context in ((), [], None)]
    assert mx.array_equal(said[0], said[1]) and mx.array_equal(said[0], said[2])


@pytest.mark.slow
def test_conversation_forgets_the_oldest_turns_but_not_the_voice(generator, caplog):
    talk = generator.conversation(voice="other", speaker=1)
    for i in range(5):
        talk.hear(csm.Segment(1, f"{i} hello", clip(8, i)))  # 100 frames each, of 512 positions
    assert len(talk.say("yes", 1, seed=0, max_audio_length_ms=80_000)) > 0
    assert [t.text for t in talk.turns[:2]] == ["how are you today?", "3 hello"] and "forgotten" in caplog.text
    again = generator.generate_codes("yes", 1, talk.turns[:-1], seed=0, max_audio_length_ms=80_000)
    same_codes(talk.turns[-1].codes, again)


@pytest.mark.slow
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


def test_a_shared_context_is_nobody_elses(generator):
    """A context's cache is reused, so one speech must not change another's."""
    context, options = [csm.Segment(0, "hello there", clip(1))], {"temperature": 0, "max_audio_length_ms": 800}
    expected = [np.array(generator.generate_codes(text, 0, context, **options)) for text in ("yes", "no no")]
    frames = [generator.conversation(context).frames(text, 0, **options) for text in ("yes", "no no")]
    said = list(zip(*frames))  # in turns
    for i in (0, 1):
        np.testing.assert_array_equal(np.stack([pair[i] for pair in said]), expected[i])
    talk = generator.conversation(context)
    talk.say("yes", 0, **options)
    generator.generate("how are you", 0, context, **options)
    talk.say("yes", 0, **options)
    fresh = generator.conversation([*context, *talk.turns[1:2]])
    fresh.say("yes", 0, **options)
    np.testing.assert_array_equal(talk.turns[-1].codes, fresh.turns[-1].codes)
    found = {}

    def work(i):
        found[i] = np.array(generator.generate_codes(("yes", "no no")[i], 0, context, **options))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in (0, 1):
        np.testing.assert_array_equal(found[i], expected[i])


def test_every_piece_may_be_taken_by_another_thread(generator):
    def elsewhere(function, *args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    options = {"max_audio_length_ms": 400, "seed": 3, "logits_processors": [lambda ids, logits: logits - ids.sum() * 0]}
    pieces, said = generator.stream("hello there", streaming_interval=0.08, **options), []
    while (piece := elsewhere(next, pieces, None)) is not None:
        said.append(np.array(piece))
    np.testing.assert_allclose(np.concatenate(said), generator.generate("hello there", **options), atol=1e-5)

    codec = generator.mimi
    audio = np.linspace(-1, 1, 2 * codec.frame_size, dtype=np.float32)[None, None]
    state = elsewhere(codec.init_state, 1)
    few, state = elsewhere(codec.encode_step, audio[..., :100], state)
    codes, _ = elsewhere(codec.encode_step, audio[..., 100:], state)
    assert few.shape[2] == 0
    np.testing.assert_array_equal(codes, codec.encode(audio))


def test_a_failed_turn_leaves_the_conversation_as_it_was(generator):
    talk = generator.conversation(voice="none")
    options = {"max_audio_length_ms": 240, "seed": 1}
    with pytest.raises(ValueError, match="sampler"):
        talk.say("hello", 0, sampler=lambda logp: mx.full(logp.shape[:1], -1), **options)
    fresh = generator.conversation(voice="none")
    np.testing.assert_array_equal(talk.say("yes", 1, **options), fresh.say("yes", 1, **options))


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
    ints = [(wave * 32768).astype(np.int16), mx.array((wave * 32768).astype(np.int16))]
    for kind in (np.uint8, np.uint16, np.int16, np.int32):  # unsigned types have silence in the middle
        middle = np.iinfo(kind).max // 2 + 1 if np.issubdtype(kind, np.unsignedinteger) else 0
        assert (csm.as_samples(np.full(10, middle, kind)) == 0).all()
        assert csm.as_samples(np.array([np.iinfo(kind).min], kind)) == -1
    forms = [wave, mx.array(wave), wave.astype(np.float64), np.stack([wave, wave]), wave[:, None], tmp_path / "a.wav"]
    said = [generator.generate_codes("yes", 0, [csm.Segment(0, "hello", f)], **GREEDY) for f in forms]
    said.append(generator.generate_codes("yes", 0, [csm.Segment(0, "hello", codes=codes)], **GREEDY))
    assert len({np.array(s).tobytes() for s in said}) == 1
    for rounded in ints:
        rows = generator.segment_rows(csm.Segment(0, "hello", rounded))
        assert (rows == generator.segment_rows(csm.Segment(0, "hello", wave))).mean() > 0.9
    for audio, match in (
        (np.zeros(0), "samples"),
        (np.array([0.1, np.nan]), "NaN"),
        (None, "no audio"),
        ("no.wav", "no such"),
    ):
        with pytest.raises(ValueError, match=match):
            generator.generate("yes", 0, [csm.Segment(0, "hello", audio)])
    for codes in (np.zeros((3, 9), int), np.full((3, 8), 999)):
        with pytest.raises(ValueError, match="codes"):
            generator.generate("yes", 0, [csm.Segment(0, "hello", codes=codes)])


def test_a_clip_is_read_at_the_codecs_rate(generator, tmp_path):
    slow = copy.copy(generator)
    slow.sample_rate, wave = 16_000, clip(0.8)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    rows = [slow.audio_rows(csm.Segment(0, "hello", audio)) for audio in (wave, tmp_path / "a.wav")]
    assert np.array_equal(*rows)


def test_voices(generator, folder):
    prompt = [csm.Segment(1, "how are you today?", folder / "prompts/conversational_a.wav")]
    options = {"temperature": 0, "max_audio_length_ms": 400}
    given = generator.generate_codes("yes", 1, prompt, **options)
    for voice in (None, "conversational_a"):  # a preset speaks with the speaker's id
        np.testing.assert_array_equal(generator.generate_codes("yes", 1, voice=voice, **options), given)
    talk = generator.conversation(speaker=1)
    talk.say("yes", 1, **options)
    np.testing.assert_array_equal(talk.turns[-1].codes, given)
    others = [generator.generate_codes("yes", 1, voice=v, **options) for v in ("none", "other")]
    assert not mx.array_equal(others[0], given) and not mx.array_equal(others[1], given)
    with pytest.raises(ValueError, match="unknown voice 'bob'; this model has: conversational_a, other"):
        generator.generate("yes", voice="bob")


def test_a_voice_is_a_clip_with_its_transcript_beside_it(generator, folder, tmp_path, caplog):
    soundfile.write(tmp_path / "me.wav", clip(0.5), 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"me\.txt"):
        generator.generate("yes", voice=tmp_path / "me.wav")
    (tmp_path / "me.txt").write_text("hello there\n")
    options = {"temperature": 0, "max_audio_length_ms": 400}
    own = generator.generate_codes("yes", 1, voice=str(tmp_path / "me.wav"), **options)
    told = generator.generate_codes("yes", 1, [csm.Segment(1, "hello there", tmp_path / "me.wav")], **options)
    np.testing.assert_array_equal(own, told)
    for file, new in (("me.wav", clip(0.5, 3)), ("me.txt", "how are you today?")):  # a changed file is read again
        before = generator.segment_rows(*generator.voice_prompt(tmp_path / "me.wav"))
        soundfile.write(tmp_path / file, new, 24000) if file == "me.wav" else (tmp_path / file).write_text(new)
        after = generator.segment_rows(*generator.voice_prompt(tmp_path / "me.wav"))
        assert before.shape != after.shape or (before != after).any()
    # A missing default voice is a warning, and no voice is used.
    lost = csm.Generator(generator.model, generator.mimi, generator.tokenizer, {"conversational_a": tmp_path})
    np.testing.assert_array_equal(
        lost.generate_codes("yes", 1, **options), generator.generate_codes("yes", 1, voice="none", **options)
    )
    assert "without the default voice conversational_a" in caplog.text


def test_a_refused_prompt_changes_nothing(generator):
    talk, options = generator.conversation(voice="other"), {"temperature": 0, "max_audio_length_ms": 400}
    with pytest.raises(ValueError, match="positions"):
        talk.say("no " * 500, 3, **options)
    with pytest.raises(ValueError, match="empty"):
        talk.say(" ", 3, **options)
    assert [turn.text for turn in talk.turns] == ["how are you today?"] and talk.cache is None
    talk.say("yes", 1, **options)
    assert [s.speaker for s in talk.turns] == [0, 1]


def test_defaults_of_the_models_own(tmp_path):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sampling": {"temperature": 0}, "voice_match": True}))
    own, options = csm.load(tmp_path), {"max_audio_length_ms": 800, "seed": 1}
    voice = [csm.Segment(0, "how are you today?", tmp_path / "prompts/conversational_a.wav")]
    said = own.generate_codes("yes", 0, **options)
    np.testing.assert_array_equal(
        said, own.generate_codes("yes", 0, voice, temperature=0.0, voice_match=True, **options)
    )
    others = {"temperature": 0.9}, {"voice_match": False}
    assert all(not np.array_equal(said, own.generate_codes("yes", 0, **other, **options)) for other in others)
    (tmp_path / "config.json").write_text(json.dumps(config | {"sampling": {"warmth": 1}}))
    with pytest.raises(ValueError, match="warmth"):
        csm.load(tmp_path).generate("yes")


def test_how_long_a_speech_may_get(generator, caplog):
    assert generator.max_frames(None, "hello") == int(4000 / 80) and generator.max_frames(None, "h" * 1000) == 1125
    codes = generator.generate_codes("yes", seed=1, temperature=0, max_audio_length_ms=160)
    assert len(codes) == 2 and "cut off at 2 frames" in caplog.text


def test_saved_is_the_same(generator, folder, tmp_path):
    options = {"seed": 1, "max_audio_length_ms": 800}
    whole = generator.generate("hello", **options)
    generator.save(tmp_path / "new")
    again = csm.load(tmp_path / "new")
    assert mx.array_equal(again.generate("hello", **options), whole) and again.voices.keys() == generator.voices.keys()
    small = csm.load(folder, quantize=4, group_size=32)
    small.save(tmp_path / "small")
    assert mx.array_equal(csm.load(tmp_path / "small").generate("hello", **options), small.generate("hello", **options))
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        generator.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "" and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_embeddings_are_added_up_in_float32(tmp_path):
    g = csm.load(write_model(tmp_path, "k32"), dtype="bfloat16")
    rows = np.random.default_rng(0).integers(0, 128, (1, 50, 32))
    rows = np.pad(rows, [(0, 0), (0, 0), (0, 1)], constant_values=csm.NO_TEXT)
    each = np.array(g.model.embed_code(mx.arange(32), mx.array(rows[..., :32])).astype(mx.float32))
    exact = each.astype(np.float64).sum(axis=2)
    ours = np.array(g.model.embed(mx.array(rows)).astype(mx.float32))
    error = np.abs(ours - exact) / np.abs(exact).max()
    assert error.max() < 2**-8, error.max()  # only the result is rounded


def test_voice_match_continues_the_clip_and_keeps_the_turns(generator, monkeypatch):
    prompts = []
    monkeypatch.setattr(csm, "prefill", lambda model, rows, cache: prompts.append(rows) or len(prompts) % 2 or 1 / 0)
    turns = [
        csm.Segment(0, "hello", clip(0.4)),
        csm.Segment(1, "yes", clip(0.4, 1)),
        csm.Segment(0, "no", clip(0.4, 2)),
    ]
    again = [turns[0], turns[1], turns[0]]  # the same clip twice: one of them stays
    for speaker, context, rest, ref in (
        (1, turns, [turns[0], turns[2]], turns[1]), (0, turns, turns[:2], turns[2]), (0, again, again[:2], turns[0])
    ):  # fmt: skip
        generator.context_caches.clear()
        with pytest.raises(ZeroDivisionError):
            generator.generate("there", speaker, context, voice_match=True)
        joined = [generator.text_rows(f"{ref.text} there", speaker), generator.audio_rows(ref)[:-1]]  # no end frame
        np.testing.assert_array_equal(prompts[-2], np.concatenate([*map(generator.segment_rows, rest)]))
        np.testing.assert_array_equal(prompts[-1][-len(np.concatenate(joined)) :], np.concatenate(joined))
    with pytest.raises(ValueError, match="no"):
        generator.generate("there", 5, turns, voice_match=True)


def test_too_long_a_prompt_says_how_long(generator):
    n = len(generator.segment_rows(csm.Segment(0, "hello", clip(41)))) + len(generator.text_rows("yes", 0))
    with pytest.raises(ValueError, match=rf"{n / 12.5:.0f} s of sound, and the model has 41 s .{n} positions of 512"):
        generator.generate("yes", 0, [csm.Segment(0, "hello", clip(41))])
    almost = generator.generate_codes("yes", 0, [csm.Segment(0, "hello", clip(39))], seed=0)
    assert 1 <= len(almost) <= 512 - 490  # what room there is


# ------------------------------------------------------------------------------- sampling


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, min_tokens_to_keep=1):
    """The options' distribution in NumPy: filters on the untempered probabilities."""
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


def draw(logits, seed, **options):
    """Ids from logits (N, V), each row with the same options."""
    noise = mx.random.gumbel(logits.shape, key=mx.random.key(seed))
    numbers = mx.array([csm.Sampling(**options).as_row()])
    return csm.sample(logits, noise, mx.broadcast_to(numbers, (len(logits), 5)))


@pytest.mark.parametrize("options", FILTERS)
def test_sampled_frequencies(options):
    N, logits = 20_000, np.random.default_rng(1).standard_normal(40).astype(np.float32) * 2
    options = {"temperature": 1.0, "top_k": 0} | options
    rows = mx.broadcast_to(mx.array(logits), (N, 40))
    expected = reference(logits, **options)
    chi_square_fits(np.bincount(draw(rows, 0, **options), minlength=40), expected)
    mlx_lm = pytest.importorskip("mlx_lm.sample_utils")
    sampler = mlx_lm.make_sampler(temp=options.pop("temperature"), **options)
    mx.random.seed(0)  # mlx-lm uses it
    logp = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
    chi_square_fits(np.bincount(sampler(logp), minlength=40), expected)


def test_exactly_k_survive():
    tied = mx.broadcast_to(mx.array([1.0, 3.0, 3.0, 3.0, 0.0, 3.0]), (4000, 6))
    for k in range(1, 7):
        ids = draw(tied, k, temperature=1, top_k=k)
        assert len(set(ids.tolist())) == k
    flat = draw(mx.zeros((4000, 100)), 0, temperature=5, top_k=7)
    assert len(set(flat.tolist())) == 7
    logits = mx.random.normal((50, 30), key=mx.random.key(1))
    for one in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1}):
        assert mx.array_equal(draw(logits, 2, **one), mx.argmax(logits, axis=-1))
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
    seed = int(next(m for m in caplog.messages if m.startswith("seed ")).split()[-1])
    assert mx.array_equal(generator.generate_codes("hello", seed=seed, max_audio_length_ms=800), drawn)
    assert (np.array(mx.random.state[0]) == state).all()  # the global generator is unchanged
    for wrong in (-1, 2**64, 1.5, "1"):
        with pytest.raises(ValueError, match="seed"):
            generator.generate("hello", seed=wrong)


def test_logits_processors_see_the_first_codebook(generator):
    seen = []

    def only_seven(ids, logits):
        seen.append(ids.tolist())
        return mx.where(mx.arange(logits.shape[-1]) == 7, logits + 1e4, logits)

    codes = generator.generate_codes("hello", logits_processors=[only_seven], seed=0, max_audio_length_ms=400)
    assert (codes[:, 0] == 7).all() and not (codes[:, 1:] == 7).all()
    assert seen == [[7] * i for i in range(5)]


@pytest.mark.slow
def test_codes_that_mimi_lacks_are_never_said(tmp_path):
    generator = csm.load(write_model(tmp_path, "k4"))
    n = generator.mimi.config.codebook_size

    def favour(ids, logits):
        return mx.where(mx.arange(logits.shape[-1]) >= n, logits + 100, logits)

    options = {"temperature": 9, "top_k": 0, "voice": "none", "max_audio_length_ms": 90_000}
    codes = [generator.generate_codes("hello", seed=s, logits_processors=[favour], **options) for s in range(5)]
    codes = np.concatenate(codes)
    assert len(codes) > 2000 and codes.shape[1] == 4 and codes.min() == 0 and codes.max() == n - 1


class Script:
    """A sampler that gives frames of ones and, from frame `n` on, `end`."""

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
    weights = csm_layouts.quantize(csm.split_heads(mx.load(str(folder / "model.safetensors"))), bits, 32)[0]
    plain = {}  # the dequantized matrices
    for name, w in weights.items():
        base = name.removesuffix(".weight")
        if f"{base}.scales" in weights and name != base:
            w = mx.dequantize(w, weights[f"{base}.scales"], weights[f"{base}.biases"], 32, bits)
        if not name.endswith((".scales", ".biases")):
            plain[name] = w
    same = csm.CSM(csm.CSMConfig.from_dict(config))
    mimi.load_weights(same, plain)
    h = mx.random.normal((3, 64), key=mx.random.key(0))
    codes = mx.random.randint(0, 64, (3, 8), key=mx.random.key(1))
    assert mx.abs(q.model.depth_logits(h, codes) - same.depth_logits(h, codes)).max() < max(1e-3, LOGITS)
    error = mx.abs(q.model.head(0, h) - generator.model.head(0, h)).max()
    assert 1e-4 < error < (0.2 if bits == 8 else 3) + LOGITS


def test_scales_stay_in_16_bits_on_a_cpu():
    """As the checkpoint has them: they are read with every product. A row of an embedding becomes float32."""
    model = csm.load("tiny", dtype="float32", quantize=8).model
    assert model.text_embeddings.scales.dtype == model.dtype == mx.float32
    assert model.audio_head[0].scales.dtype == (mx.float32 if csm.on_gpu() else mx.bfloat16)
    rows = mx.zeros((1, 3, model.config.audio_num_codebooks + 1), mx.int32)
    wide = {k: w.astype(mx.float32) for k, w in tree_flatten(model.parameters()) if w.dtype == mx.bfloat16}
    ours = model(rows)
    model.load_weights(list(wide.items()), strict=False)
    assert ours.dtype == mx.float32 and (ours == model(rows)).all()


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
