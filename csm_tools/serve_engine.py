"""Many texts said at once on one model: the half of csm_tools.serve that knows nothing of HTTP.

One thread owns the model and runs a csm_batch.Batch: a Speech joins before the next frame, and leaves when it has ended
or nobody listens any more. Mimi decodes the frames of all in one pass, each stream with a state of its own. Everything
else belongs to the event loop's thread.
"""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import csm
import csm_batch
import mimi as codec

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_map

AHEAD = 30  # seconds of sound that a listener may leave untaken before the next part of its text waits for it
KEPT = 16  # voices and contexts whose KV caches are kept

log = logging.getLogger("csm.serve")


class Busy(Exception):
    """As many wait as may."""


@dataclass(eq=False)
class Speech:
    """A text to say, and how far it is."""

    parts: list  # [(text, seconds of silence after it)]
    speaker: int
    voice: str | None  # as of Generator.generate, but with a context too: it then goes before that
    context: list  # csm.Segments
    seed: int  # of the first part; the others' are the next ones, as narrate has them
    sampling: csm.Sampling
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)  # (samples,) int16; at the end None or an exception
    part: int = 0  # the one that is said now, or next
    tries: int = 0  # of it that gave nothing
    codes: list = field(default_factory=list)  # of it so far, (K,) each
    made: int = 0  # samples
    taken: int = 0  # of them; the listener's to write
    gone: bool = False  # nobody listens; the listener's to write


class Engine:
    """Says max_batch Speeches at once; max_waiting more wait in their order."""

    def __init__(self, generator, max_batch, max_waiting):
        self.generator, self.max_batch, self.max_waiting = generator, max_batch, max_waiting
        generator.n_context_caches = KEPT
        if csm.on_gpu():  # whoever joins changes the sizes of arrays: those that were freed would pile up
            mx.set_cache_limit(2 << 30)
        self.thread = ThreadPoolExecutor(1, "model")
        self.changed = asyncio.Event()  # there may be something to do
        self.waiting = []  # Speeches; those between two parts stand in front
        self.batch, self.live = csm_batch.Batch(generator), {}  # uid -> Speech
        self.decoded, self.state = [], None  # uids, and Mimi's state of their streams
        self.steps = deque([(0, 0.0)], maxlen=125)  # (frames, seconds) of each

    def warm_up(self):
        """One frame, with what is slow only once."""
        self.thread.submit(lambda: next(self.generator.frames("Hello.", seed=0), None)).result()

    def submit(self, speech):
        """Let a Speech wait for its turn. Raises Busy."""
        if len(self.waiting) >= self.max_waiting + self.max_batch - len(self.live):
            raise Busy("the server is busy")
        self.waiting.append(speech)
        self.changed.set()

    def health(self):
        """real_time_factor: seconds a second of each stream's sound, below 1 where none has to wait for it."""
        frames, seconds = map(sum, zip(*self.steps))
        factor = seconds / len(self.steps) * self.generator.mimi.config.frame_rate
        speed = {"frames_per_second": round(frames / (seconds or 1), 1), "real_time_factor": round(factor, 3)}
        return {"status": "ok", "live": len(self.live), "waiting": len(self.waiting)} | speed

    async def run(self):
        """Until it is cancelled."""
        loop, ahead = asyncio.get_running_loop(), AHEAD * self.generator.sample_rate
        try:
            while True:
                self.changed.clear()
                self.waiting = [speech for speech in self.waiting if not speech.gone]
                ready = [speech for speech in self.waiting if speech.made - speech.taken <= ahead]
                joining = ready[: self.max_batch - len(self.live)]
                if not joining and not self.live:
                    await self.changed.wait()
                    continue
                self.waiting = [speech for speech in self.waiting if speech not in joining]
                for speech, piece in await loop.run_in_executor(self.thread, self.step, joining):
                    speech.pieces.put_nowait(piece)
        finally:
            self.thread.submit(mx.clear_streams)  # or the process may not end well
            self.thread.shutdown()

    def step(self, joining):
        """Let them join, and say a frame of each that is live -> [(Speech, what its `pieces` get)]."""
        start, out = time.perf_counter(), []
        for speech in joining:
            try:
                self.live[self.begin(speech)] = speech
            except Exception as e:
                out.append((speech, failed(e)))
        try:
            for uid in [uid for uid, speech in self.live.items() if speech.gone]:
                self.batch.remove(uid)
                del self.live[uid]
            said = self.batch.next() if self.live else []
            frames = {uid: codes for uid, codes in said if codes is not None}
            for (uid, codes), audio in zip(frames.items(), self.decode(frames)):
                speech = self.live[uid]
                speech.codes.append(codes)
                out.append((speech, audio))
            if frames:
                self.steps.append((len(frames), time.perf_counter() - start))
            ended = [self.live.pop(uid) for uid, codes in said if codes is None]
            out += [(speech, piece) for speech in ended for piece in self.after(speech)]
        except Exception as e:  # and with it all that was being said
            out += [(speech, failed(e)) for speech in self.live.values()]
            self.batch, self.live, self.decoded = csm_batch.Batch(self.generator), {}, []
        for speech, piece in out:
            speech.made += len(piece) if isinstance(piece, np.ndarray) else 0
        return out

    def begin(self, speech):
        """Put the next part of a Speech into the batch -> its uid. Raises ValueError."""
        generator, (text, _) = self.generator, speech.parts[speech.part]
        if speech.part == speech.tries == 0:
            first = speech.context[0].speaker if speech.context else speech.speaker
            use_voice = speech.voice or not speech.context
            voice = generator.voice_prompt(speech.voice, first) if use_voice else []
            turns = voice + speech.context
            speech.context = [generator.encode(turn) for turn in turns]
        before, rows = generator.prompt(text, speech.speaker, speech.context, "none")
        seed = (speech.seed + speech.part + speech.tries * 2**32) % 2**64
        frames, cache = generator.max_frames(None, text), generator.context_cache(before)
        return self.batch.insert(rows, frames, seed, speech.sampling, cache)

    def decode(self, frames):
        """{uid: codes (K,)} -> (B, 1920) int16, each stream going on from its own state."""
        if not frames:
            return []
        mimi = self.generator.mimi
        with mx.stream(self.generator.codec_stream):  # beside the next frame, not behind it
            if list(frames) != self.decoded:
                states = dict(zip(self.decoded, split_state(self.state))) if self.decoded else {}
                self.state = join_states([states.get(uid) or mimi.init_state(1) for uid in frames])
                self.decoded = list(frames)
            audio, self.state = mimi.decode_step(np.stack(list(frames.values()))[:, :, None], self.state)
        return codec.to_pcm16(audio[:, 0])

    def after(self, speech):
        """A part has ended: let the next wait in front -> what `pieces` get: silence, or at the end what ends them."""
        text, pause = speech.parts[speech.part]
        if not speech.codes and speech.tries < 3:  # it ended at once: again with another seed, as narrate does
            speech.tries += 1
            self.waiting.insert(0, speech)
            return []
        if speech.codes and not speech.context:  # this part's voice is that of the others
            speech.context = [csm.Segment(speech.speaker, text, codes=np.stack(speech.codes))]
        speech.part, speech.tries, speech.codes = speech.part + 1, 0, []
        if speech.part < len(speech.parts):
            self.waiting.insert(0, speech)
            return [np.zeros(int(pause * self.generator.sample_rate), np.int16)]
        return [None if speech.made else RuntimeError("the model ended the speech at once: try another seed")]


def failed(e):
    """What a listener is told of an exception."""
    if isinstance(e, ValueError):
        return e
    log.error("generation failed", exc_info=e)
    return RuntimeError("generation failed")


def join_states(states):
    """Mimi's states of decoding streams, of any ages, as one state of a batch."""
    waiting = mx.concatenate([state.rest for state in states])
    begun = next((state.decoder for state in states if state.decoder), None)
    if begun is None:
        return codec.State(waiting)
    empty = tree_map(lambda x: x if x is None else mx.zeros_like(x[:1]), begun)  # the past before the first frame
    pasts = [state.decoder or empty for state in states]
    decoder = tree_map(lambda *x: x[0] if x[0] is None else mx.concatenate(x), *pasts)
    return codec.State(waiting, None, decoder)


def split_state(state):
    """The inverse: the state of a batch as a list of the states of its streams."""

    def only(i, part):
        return tree_map(lambda x: x if x is None else x[i : i + 1], part)

    return [codec.State(*(only(i, part) for part in state)) for i in range(len(state.rest))]
