"""Many texts at once on one model: a running batch that utterances join and leave between frames.

    batch = csm_batch.Batch(generator)
    before, rows = generator.prompt("Hello.", speaker=0)
    uid = batch.insert(rows, max_frames=50, seed=1, cache=generator.context_cache(before))
    while len(batch):
        for uid, codes in batch.next():  # (K,) int32 each; None: this utterance has ended
            ...

A frame mostly costs the reading of the weights, which a batch reads once. Each utterance gives the
codes that csm.frames gives: its random numbers come from its own seed. (On a GPU other kernels
serve other batch sizes, so there codes may differ where two are almost equally likely.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import csm  # before mlx

import mlx.core as mx  # isort: skip
import numpy as np


class BatchCache(csm.KVCache):
    """A KVCache of sequences of different lengths, aligned at their ends.

    Sequence b begins at position pad[b] of the arrays: RoPE counts from there, and nothing before
    it is attended to.
    """

    def __init__(self, cache):
        """A batch of one, from a KVCache."""
        copy = cache.copy()
        self.dtype, self.step, self.offset = copy.dtype, copy.step, copy.offset
        self.keys, self.values, self.pad = copy.keys, copy.values, np.zeros(1, np.int32)

    def positions(self):
        return mx.array(self.offset - self.pad) if self.pad.any() else self.offset

    def mask(self, T):
        if not self.pad.any():
            return super().mask(T)
        s, t = mx.arange(self.offset + T), self.offset + mx.arange(T)[:, None]
        return ((s >= mx.array(self.pad)[:, None, None]) & (s <= t))[:, None]  # (B, 1, T, S)

    def filter(self, indices):
        """Keep these sequences only, without the positions that none of them uses."""
        start = int(self.pad[indices].min())
        at = mx.array(indices)
        self.keys = [k[at, :, start : self.offset] for k in self.keys]
        self.values = [v[at, :, start : self.offset] for v in self.values]
        self.offset, self.pad = self.offset - start, self.pad[indices] - start

    def join(self, others):
        """Append the sequences of other BatchCaches; the shorter ones move to the common end."""
        caches = [self, *others]
        end = max(cache.offset for cache in caches)

        def joined(arrays):  # one layer's keys or values, of each cache
            left = [end - cache.offset for cache in caches]
            ends = [x[:, :, : end - n] for x, n in zip(arrays, left)]
            return mx.concatenate(
                [mx.pad(x, [(0, 0), (0, 0), (n, 0), (0, 0)]) for x, n in zip(ends, left)]
            )

        self.keys = [joined(layer) for layer in zip(*(cache.keys for cache in caches))]
        self.values = [joined(layer) for layer in zip(*(cache.values for cache in caches))]
        self.pad = np.concatenate([cache.pad + (end - cache.offset) for cache in caches])
        self.offset = end


@dataclass(eq=False)
class Utterance:
    """What a Batch knows of one of its sequences."""

    uid: int
    rows: np.ndarray  # (T, K + 1), its prompt
    max_frames: int
    seed: int
    sampling: csm.Sampling
    cache: csm.KVCache | None  # what goes before the prompt
    said: list = field(default_factory=list)  # its codes of codebook 0 so far


class Batch:
    """Utterances spoken side by side, one frame of all at a time.

    For one thread at a time; several batches may share a Generator.
    """

    def __init__(self, generator: csm.Generator):
        self.generator, self.model = generator, generator.model
        self.ids = count()
        self.waiting: list[Utterance] = []  # they join before the next frame
        self.live: list[Utterance] = []  # in the order of the arrays' rows
        self.errors: list[Exception] = []  # to raise, and
        self.results: list = []  # to return, before the next frame
        self._clear()

    def _clear(self):
        self.cache = None  # BatchCache
        self.h = mx.zeros((0, self.model.config.backbone.dim), self.model.dtype)  # (B, D)
        self.keys = mx.zeros((0, 2), mx.uint32)  # (B, 2) random keys
        mx.eval(self.h, self.keys)  # so that another thread can go on with them

    def __len__(self):
        """How many speak or wait to speak."""
        ended = sum(codes is None for _, codes in self.results)  # which nobody was told yet
        return len(self.waiting) + len(self.live) + ended

    def insert(
        self, prompt_rows: np.ndarray, max_frames: int, seed: int,
        sampling: csm.Sampling | None = None, cache: csm.KVCache | None = None,
    ) -> int:  # fmt: skip
        """Let an utterance join before the next frame -> its uid. Raises ValueError.

        prompt_rows: (T, K + 1), see Generator.prompt. cache: what goes before them; not changed.
        """
        csm.check_seed(seed)
        if max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, not {max_frames}")
        rows = np.array(prompt_rows, np.int32)
        width = self.model.config.audio_num_codebooks + 1
        if not len(rows) or rows.shape[1:] != (width,):
            raise ValueError(f"prompt_rows must be (rows, {width}), not {rows.shape}")
        n = len(rows) + (cache.offset if cache else 0)
        self.generator.check_length(n)
        uid, max_frames = next(self.ids), min(max_frames, self.generator.max_positions - n)
        cache, sampling = cache if cache and cache.offset else None, sampling or csm.Sampling()
        self.waiting.append(Utterance(uid, rows, max_frames, seed, sampling, cache))
        return uid

    def next(self) -> list[tuple[int, np.ndarray | None]]:
        """One frame of every utterance: [(uid, codes (K,) int32)]; codes None: it has ended.

        If an utterance's own sampler or logits processor raises, that utterance leaves and the
        exception, with the attribute `uid`, comes from here. The next call returns the frame of
        the others.
        """
        if not self.errors and not self.results:
            self._join()
            self.results = self._next_frame() if self.live else []
        if self.errors:
            raise self.errors.pop(0)
        results, self.results = self.results, []
        return results

    def _next_frame(self):
        codes, errors = self._step()
        results, leaving = [], []
        for i, (utterance, frame) in enumerate(zip(self.live, np.array(codes))):
            if i not in errors and not frame.any() and not mx.isfinite(self.h[i]).all():
                errors[i] = ValueError(
                    f"the model computes NaN or infinite numbers in {self.model.dtype}"
                )
            if i in errors:
                leaving.append(utterance.uid)
                errors[i].uid = utterance.uid
                self.errors.append(errors[i])
                continue
            utterance.said.append(int(frame[0]))
            if frame.any():
                results.append((utterance.uid, frame))
            if frame.any() and len(utterance.said) == utterance.max_frames:
                csm.log.warning("the speech was cut off at %d frames", utterance.max_frames)
            if not frame.any() or len(utterance.said) == utterance.max_frames:
                results.append((utterance.uid, None))
                leaving.append(utterance.uid)
        self._leave(leaving)
        return results

    def remove(self, uid: int):
        """Let an utterance leave at once, if it is there."""
        self.results = [result for result in self.results if result[0] != uid]
        self._leave([uid])

    def _leave(self, uids):
        self.waiting = [u for u in self.waiting if u.uid not in uids]
        stay = [i for i, u in enumerate(self.live) if u.uid not in uids]
        if len(stay) == len(self.live):
            return
        self.live = [self.live[i] for i in stay]
        if not stay:
            return self._clear()
        at = mx.array(stay)
        self.h, self.keys = self.h[at], self.keys[at]
        self.cache.filter(stay)

    def _join(self):
        """Bring those who wait into the arrays. A prompt that several have is computed once."""
        if not self.waiting:
            return
        done, new = {}, []
        for u in self.waiting:
            prompt = u.rows.tobytes(), id(u.cache)
            if prompt not in done:
                config, dtype = self.model.config.backbone, self.model.dtype
                cache = u.cache.copy() if u.cache else csm.KVCache(config, dtype)
                done[prompt] = csm.prefill(self.model, u.rows, cache), cache
            new.append(done[prompt])
        caches = [BatchCache(cache) for _, cache in new]
        if self.cache is None:
            self.cache, *caches = caches
        if caches:
            self.cache.join(caches)
        self.h = mx.concatenate([self.h, *(h for h, _ in new)])
        keys = [mx.random.key(u.seed)[None] for u in self.waiting]
        self.keys = mx.concatenate([self.keys, *keys])
        self.live, self.waiting = self.live + self.waiting, []

    def _step(self):
        """The next frame of all -> codes (B, K), {row: exception of a user's own function}."""
        config, n, B = self.model.config, self.generator.codebooks, len(self.live)
        samplings = [u.sampling for u in self.live]
        now, keys = mx.vmap(mx.random.split)(self.keys).swapaxes(0, 1)  # (B, 2) each
        noise = None
        if not all(s.greedy for s in samplings):
            shape = (n, config.audio_vocab_size)
            noise = mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(now)  # (B, n, V)
        options = mx.array([s.as_row() for s in samplings])
        draw, errors = csm.Draw(noise, options, self.generator.mimi.config.codebook_size), {}
        if any(s.sampler or s.logits_processors for s in samplings):
            draw = self._draw_by_row(draw, errors)
            codes = self.model.next_frame(self.h, draw, n)
        else:
            h, draw = padded(self.h, draw)
            codes = csm.fast_next_frame(self.model, h, draw, n)[:B]
        rows = csm.frame_row(codes, config.audio_num_codebooks)
        mx.async_eval(codes)
        self.h, self.keys = self.model(rows, self.cache)[:, -1], keys
        mx.async_eval(self.h, self.keys)  # queue this before looking at the codes
        return codes, errors

    def _draw_by_row(self, draw, errors):
        """`draw`, where the rows with functions of their own go through these."""

        def draw_all(i, logits):
            ids = mx.split(draw(i, logits), len(logits))
            for b, u in enumerate(self.live):
                if b in errors or not (u.sampling.sampler or u.sampling.logits_processors):
                    continue
                noise = draw.noise if draw.noise is None else draw.noise[b : b + 1]
                one = csm.Draw(noise, draw.options[b : b + 1], draw.n_codes)
                try:
                    ids[b] = csm.add_functions(one, u.sampling, u.said)(i, logits[b : b + 1])
                except Exception as e:  # it must not cost the others their frame
                    errors[b] = e
            return mx.concatenate(ids)

        return draw_all


SIZES = sorted({2**i for i in range(16)} | {3 * 2**i for i in range(15)})  # 1, 2, 3, 4, 6, 8, 12


def padded(h, draw):
    """h and a Draw with rows of zeros up to one of SIZES: next_frame is compiled for each size."""
    size = next(size for size in SIZES if size >= len(h))

    def pad(x):
        return x if x is None else mx.pad(x, [(0, size - len(h))] + [(0, 0)] * (x.ndim - 1))

    return pad(h), csm.Draw(pad(draw.noise), pad(draw.options), draw.n_codes)


def generate(
    generator: csm.Generator, texts: Sequence[str], speaker: int | Sequence[int] = 0,
    context: Sequence = (), *, voice=None, voice_match: bool | None = None,
    max_audio_length_ms: float | Sequence | None = None, seed: int | None = None, **sampling,
) -> list[mx.array]:  # fmt: skip
    """Speech for each of `texts`, computed together: [(samples,) float32].

    speaker, max_audio_length_ms: one for all, or a list with one for each. context: Segments for
    all, or a list with a list for each. Text i sounds as Generator.generate with seed + i makes it.
    Raises ValueError.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, not one text")
    n, context = len(texts), list(context or ())
    speakers = speaker if np.ndim(speaker) else [speaker] * n
    lengths = max_audio_length_ms if np.ndim(max_audio_length_ms) else [max_audio_length_ms] * n
    shared = not context or isinstance(context[0], csm.Segment)
    contexts = [context] * n if shared else [list(segments) for segments in context]
    if not len(speakers) == len(lengths) == len(contexts) == n:
        raise ValueError(f"{n} texts need as many speakers, contexts and lengths, or one for all")
    clips = {id(segment): segment for segments in contexts for segment in segments}
    encoded = {key: generator.encode(segment) for key, segment in clips.items()}  # each once
    contexts = [[encoded[id(segment)] for segment in segments] for segments in contexts]
    seed, sampling = generator.read_options(seed, sampling)
    batch, said = Batch(generator), {}
    for i, (text, speaker, segments, ms) in enumerate(zip(texts, speakers, contexts, lengths)):
        before, rows = generator.prompt(text, speaker, segments, voice, voice_match)
        max_frames, cache = generator.max_frames(ms, text), generator.context_cache(before)
        said[batch.insert(rows, max_frames, (seed + i) % 2**64, sampling, cache)] = []
    while len(batch):
        for uid, codes in batch.next():
            if codes is not None:
                said[uid].append(codes)
    return [generator.decode(generator.join_frames(frames)) for frames in said.values()]
