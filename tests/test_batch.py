"""csm_batch against csm.frames: utterances that join and leave a batch give the same codes as alone."""

import _thread
import threading
import time

import csm  # before mlx
import csm_batch
import mimi

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from conftest import EXACT, clip, same_codes, write_model

OPTIONS = (
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 50},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "min_tokens_to_keep": 2},
    {"temperature": 1.0, "top_k": 0},
)


def alone(generator, rows, frames, seed, sampling, cache=None):
    """The frames of csm.frames: (F, K)."""
    config, dtype = generator.model.config, generator.model.dtype
    cache = cache.copy() if cache else csm.KVCache(config.backbone, dtype)
    said = list(csm.frames(generator.model, rows, cache, frames, seed, sampling))
    return np.array(said).reshape(-1, config.audio_num_codebooks)


def prompts(generator):
    """(rows, cache, expected frames) of very different lengths."""
    texts = ["yes", "hello there, how are you today?", "i am fine", "no " * 30]
    context = generator.segment_rows(csm.Segment(0, "hello", clip(1.2)))
    for i, text in enumerate(texts):
        rows = generator.text_rows(text, i % 2)
        yield (rows, None) if i % 2 else (rows, generator.context_cache(context))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["0", "1"])
def test_joining_and_leaving_changes_nobodys_codes(generator, monkeypatch, compiled):
    monkeypatch.setenv("CSM_COMPILE", compiled)
    jobs = [
        (*p, csm.Sampling(**OPTIONS[i % 5]), 5 + 7 * (i % 4), 100 + i) for i, p in enumerate([*prompts(generator)] * 3)
    ]
    expected = [alone(generator, rows, n, seed, s, cache) for rows, cache, s, n, seed in jobs]
    assert len({e.tobytes() for e in expected}) > 6
    batch, said, ended = csm_batch.Batch(generator), {}, set()
    join = {0: jobs[:4], 3: jobs[4:7], 7: jobs[7:11], 20: jobs[11:]}
    order, gone, frame = [], None, 0
    while len(batch) or frame <= max(join):
        for rows, cache, s, n, seed in join.get(frame, ()):
            order.append(batch.insert(rows, n, seed, s, cache))
        if frame == 9:  # one leaves in the middle of its speech
            gone = order[3]
            batch.remove(gone)
        for uid, codes in batch.next():
            assert uid not in ended and (uid != gone or frame <= 9)
            if codes is None:
                ended.add(uid)
            else:
                said.setdefault(uid, []).append(codes)
        frame += 1
    for uid, codes in zip(order, expected):
        n = len(said.get(uid, []))
        assert n == len(codes) or (uid == gone and 0 < n < len(codes)) or not EXACT
        same_codes(said[uid], codes[:n])
    assert ended == set(order) - {gone}


@pytest.mark.slow
def test_the_cache_is_as_long_as_its_longest_live_sequence(generator):
    rng, batch, live = np.random.default_rng(0), csm_batch.Batch(generator), {}
    texts = ["yes", "no", "hello there", "i am fine, how are you today?"]
    for frame in range(2000):
        while len(live) < 3:
            rows = generator.text_rows(texts[rng.integers(4)], 0)
            uid = batch.insert(rows, int(rng.integers(3, 40)), frame, csm.Sampling())
            live[uid] = len(rows)
        for uid, codes in batch.next():
            live[uid] += 1
            if codes is None:
                del live[uid]
        if live and rng.random() < 0.02:
            uid = next(iter(live))
            batch.remove(uid)
            del live[uid]
        if batch.cache is not None:
            longest = max(len(u.rows) + len(u.said) for u in batch.live)
            assert batch.cache.offset <= longest
            assert max(k.shape[2] for k in batch.cache.keys) <= longest + csm.CACHE_STEP


def test_a_shared_prompt_is_computed_once(generator, monkeypatch):
    computed, own = [], csm.prefill
    monkeypatch.setattr(csm, "prefill", lambda m, rows, cache: computed.append(rows) or own(m, rows, cache))
    rows = generator.text_rows("hello there", 0)
    batch = csm_batch.Batch(generator)
    uids = [batch.insert(rows, 6, seed, csm.Sampling()) for seed in range(5)]
    said = {uid: [] for uid in uids}
    while len(batch):
        for uid, codes in batch.next():
            said[uid] += [] if codes is None else [codes]
    assert len(computed) == 1  # csm_batch looks it up in csm
    for seed, uid in enumerate(uids):
        np.testing.assert_array_equal(said[uid], alone(generator, rows, 6, seed, csm.Sampling()))
    before = len(computed)
    context = [csm.Segment(0, "hello", clip(1))]
    csm_batch.generate(generator, ["yes", "no"], 0, context, max_audio_length_ms=240)
    generator.generate("yes", 0, context, max_audio_length_ms=240)
    n_context = len(generator.segment_rows(context[0]))
    assert sum(len(rows) == n_context for rows in computed[before:]) == 1


def test_a_clip_in_many_contexts_is_encoded_once(generator, monkeypatch):
    whole, clips = mimi.Mimi.encode, []
    monkeypatch.setattr(mimi.Mimi, "encode", lambda self, audio: clips.append(audio.shape) or whole(self, audio))
    a, b = csm.Segment(0, "hello", clip(0.4)), csm.Segment(1, "yes", clip(0.6))
    options = {"seed": 1, "max_audio_length_ms": 400}
    said = csm_batch.generate(generator, ["no", "there", "yes"], 0, [[a], [a, b], [a, b]], **options)
    assert len(clips) == 2
    alone = generator.generate("there", 0, [a, b], seed=2, max_audio_length_ms=400)
    np.testing.assert_allclose(said[1], alone, atol=1e-5)


def test_numbers_that_are_not_finite_are_named(generator, monkeypatch):
    """They are an error, not an empty speech; the other utterances continue."""
    rows = generator.text_rows("hello", 0)
    batch, own = csm_batch.Batch(generator), csm.CSM.__call__
    uids = [batch.insert(rows, 4, seed) for seed in range(2)]
    first = batch.next()

    def broken(self, *args):
        h = own(self, *args)
        return mx.where(mx.arange(len(h))[:, None, None] == 1, mx.nan, h) if len(h) == 2 else h

    monkeypatch.setattr(csm.CSM, "__call__", broken)
    assert [uid for uid, _ in first] == uids == [uid for uid, _ in batch.next()]
    with pytest.raises(ValueError, match="NaN") as error:
        batch.next()
    assert error.value.uid == uids[1] and [uid for uid, _ in batch.next()] == uids[:1]


def test_what_is_removed_says_nothing_more(generator):
    rows = generator.text_rows("hello", 0)
    for order in ((0, 1), (1, 0)):
        batch = csm_batch.Batch(generator)
        uids = [batch.insert(rows, n, seed=n) for n in (10, 4, 9)]
        assert len(batch.next()) == len(batch.next()) == 3
        for i in order:
            batch.remove(uids[i])
        assert len(batch) == 1 and {uid for uid, _ in batch.next()} == {uids[2]}


def test_a_function_that_raises_costs_nobody_else_a_frame(generator):
    """Its utterance leaves; the others, some with functions too, give the same codes as alone."""
    rows, calls = generator.text_rows("hello there", 0), []

    def third(ids, logits):
        calls.append(len(ids))
        return logits if len(ids) < 2 else 1 / 0

    def likeliest(logp):
        return mx.argmax(logp, axis=-1)

    kinds = [{}, {"logits_processors": (third,)}, {"sampler": likeliest}, {"sampler": lambda logp: mx.array([-1])}]
    samplings = [csm.Sampling(**kind) for kind in kinds]
    batch = csm_batch.Batch(generator)
    said = {batch.insert(rows, 6, seed, sampling): [] for seed, sampling in enumerate(samplings)}
    errors = {}
    while len(batch):
        try:
            for uid, codes in batch.next():
                said[uid] += [] if codes is None else [codes]
        except (ValueError, ZeroDivisionError) as e:
            errors[e.uid] = type(e)
    assert errors == {1: ZeroDivisionError, 3: ValueError}
    assert len(said[1]) == 2 and not said[3] and calls == [0, 1, 2]
    for uid in (0, 2):
        same_codes(said[uid], alone(generator, rows, 6, uid, samplings[uid]))
    np.testing.assert_array_equal(said[1], alone(generator, rows, 2, 1, csm.Sampling()))


def test_all_of_them_raise_at_once(generator):
    rows, bad = generator.text_rows("hello", 0), csm.Sampling(sampler=lambda logp: 1 / 0)
    batch = csm_batch.Batch(generator)
    uids = [batch.insert(rows, 6, 0, bad) for _ in range(3)]
    seen = []
    while len(batch) or len(seen) < 3:
        with pytest.raises(ZeroDivisionError) as e:
            batch.next()
        seen.append(e.value.uid)
    assert seen == uids and batch.next() == []


@pytest.mark.parametrize("options", [{"top_k": 10**30}, {"min_tokens_to_keep": 2**70, "min_p": 0.5}])
def test_numbers_beyond_all_ids_are_all_ids(generator, options):
    most = {"top_k": 0} if "top_k" in options else {"min_p": 0}
    one, other = (generator.generate_codes("hello", seed=1, max_audio_length_ms=400, **o) for o in (options, most))
    np.testing.assert_array_equal(one, other)


def test_a_batch_refuses(generator):
    batch, rows = csm_batch.Batch(generator), generator.text_rows("yes", 0)
    with pytest.raises(ValueError, match="positions"):
        batch.insert(np.concatenate([rows] * 200), 5, 0)
    with pytest.raises(ValueError, match="seed"):
        batch.insert(rows, 5, -1)
    with pytest.raises(ValueError, match="max_frames"):
        batch.insert(rows, 0, 0)
    for wrong in (rows[:0], rows[:, 1:], rows[0]):
        with pytest.raises(ValueError, match="prompt_rows"):
            batch.insert(wrong, 5, 0)
    assert len(batch) == 0 and batch.next() == [] and batch.remove(3) is None
    uid = batch.insert(rows, 5, 0)
    batch.remove(uid)
    assert len(batch) == 0 and batch.next() == []


@pytest.mark.slow
def test_threads_while_the_loop_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_COMPILE", "1")
    generator = csm.load(write_model(tmp_path))
    options = {"max_audio_length_ms": 400, "voice": "none"}
    expected = [generator.generate_codes("hello", seed=s, **options).tolist() for s in range(25)]
    wrong = []

    def work():
        for s in range(25):
            if generator.generate_codes("hello", seed=s, **options).tolist() != expected[s]:
                wrong.append(s)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_an_interrupted_trace_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_COMPILE", "1")
    monkeypatch.setattr(csm, "COMPILED", {})  # to trace it here
    generator = csm.load(write_model(tmp_path))
    plain = csm.load(tmp_path)
    own, calls = csm.CSM.next_frame, []

    def interrupted(self, *args):
        calls.append(self)
        out = own(self, *args)
        if len(calls) == 1:  # within the trace, after the weights have become tracers
            _thread.interrupt_main()
            time.sleep(0.1)
        return out

    monkeypatch.setattr(csm.CSM, "next_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generator.generate_codes("hello", seed=1, max_audio_length_ms=400)
    assert len(calls) == 1 and calls[0] is not generator.model
    for seed in (1, 2):
        codes = generator.generate_codes("hello", seed=seed, max_audio_length_ms=400)
        monkeypatch.setenv("CSM_COMPILE", "0")
        same_codes(codes, plain.generate_codes("hello", seed=seed, max_audio_length_ms=400))
        monkeypatch.setenv("CSM_COMPILE", "1")


def test_a_changed_weight_is_heard_when_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_COMPILE", "1")
    generator = csm.load(write_model(tmp_path))
    before = generator.generate_codes("hello", seed=1, max_audio_length_ms=800)
    head = generator.model.audio_head[2]
    head.weight = head.weight[::-1] * 1.0
    after = generator.generate_codes("hello", seed=1, max_audio_length_ms=800)
    monkeypatch.setenv("CSM_COMPILE", "0")
    np.testing.assert_array_equal(after, generator.generate_codes("hello", seed=1, max_audio_length_ms=800))
    assert not np.array_equal(before[:, 3], after[:, 3])


# ------------------------------------------------------------------------------- csm_batch.generate


@pytest.mark.slow
def test_batch_is_one_at_a_time(generator):

    texts = ["hello", "how are you today ? i am fine .", "yes", "no no no"]
    a, b = csm.Segment(1, "hello there", clip(1)), csm.Segment(0, "yes", clip(0.6, 1))
    for speaker, context in ((0, [a]), ([0, 1, 2, 0], [a, b]), (1, [[a], [], [a, b], [b, a]]), (0, [])):
        for options in ({"temperature": 0.9}, {"temperature": 0}):
            options |= {"seed": 5, "max_audio_length_ms": 480, "top_k": 20}
            said = csm_batch.generate(generator, texts, speaker, context, **options)
            for i, (text, one) in enumerate(zip(texts, said, strict=True)):
                speaker_i = speaker if isinstance(speaker, int) else speaker[i]
                context_i = context[i] if context and isinstance(context[0], list) else context
                alone = generator.generate(text, speaker_i, context_i, **options | {"seed": 5 + i})
                assert one.shape == alone.shape == (6 * 1920,) and mx.abs(one - alone).max() < 1e-5
    assert csm_batch.generate(generator, []) == []
    with pytest.raises(ValueError, match="2 texts need as many"):
        csm_batch.generate(generator, ["a", "b"], [0])
    for wrong in (["a", " "], "hello"):
        with pytest.raises(ValueError):
            csm_batch.generate(generator, wrong)
    for context in (a, [a, "b"], [[a], "b"], [[a]]):
        with pytest.raises((ValueError, TypeError)):
            csm_batch.generate(generator, ["a", "b"], 0, context)
    with pytest.raises(ValueError, match="speaker"):
        csm_batch.generate(generator, ["a"], None)
    iterators = csm_batch.generate(
        generator, ["hello", "hello"], 0, [iter([a]), iter([a])], max_audio_length_ms=160, seed=1
    )
    again = generator.generate("hello", 0, [a], max_audio_length_ms=160, seed=2)
    assert mx.abs(iterators[1] - again).max() < 1e-5


@pytest.mark.slow
def test_long_beside_short_up_to_the_limit(generator):

    contexts = [[csm.Segment(0, "hello", clip(36))], [csm.Segment(0, "hello", clip(1))]]
    said = csm_batch.generate(generator, ["hello", "yes"], 0, contexts, max_audio_length_ms=8_000, seed=1)
    for i, (text, context) in enumerate(zip(["hello", "yes"], contexts)):
        alone = generator.generate(text, 0, context, max_audio_length_ms=8_000, seed=1 + i)
        assert alone.shape == said[i].shape and mx.abs(alone - said[i]).max() < 1e-4
    assert len(said[0]) < len(said[1]) == 100 * 1920


def test_where_nothing_can_be_compiled(generator, monkeypatch, caplog):
    """MLX's message may hold all that a compiler says: the model goes on as it is, and says why in one line."""
    options = {"seed": 1, "max_audio_length_ms": 400, "voice": "none"}
    monkeypatch.setenv("CSM_COMPILE", "0")
    expected = generator.generate_codes("hello", **options)

    def fails(*arrays):
        raise RuntimeError('[Compile::eval_cpu] Failed to compile: "g++ x.cpp" 2>&1\ncompilation terminated.\n')

    monkeypatch.setenv("CSM_COMPILE", "1")
    monkeypatch.setattr(csm, "COMPILED", {})
    monkeypatch.setattr(mx, "compile", lambda function: fails)
    for _ in range(2):
        np.testing.assert_array_equal(generator.generate_codes("hello", **options), expected)
    (line,) = [r.getMessage() for r in caplog.records if "cut off" not in r.getMessage()]
    assert "without mx.compile" in line and "2>&1 compilation terminated." in line and "\n" not in line
