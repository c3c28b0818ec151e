"""Many texts said at once on one model: the half of csm_tools.serve that knows nothing of HTTP.

One thread owns the model and runs a csm_batch.Batch: a Speech joins before the next frame, and leaves when it has ended
or nobody listens any more. What it is said after is encoded in pieces between the frames of others. Mimi decodes the
frames of all in one pass, each stream with a state of its own. `submit`, `health` and `run` are called in the event
loop's thread, all else in the model's, while the loop's touches none of that.
"""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import csm
import csm_batch
import mimi as codec
from csm_tools.serve_conversations import Kept

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_map

AHEAD = 30  # seconds of sound that a listener may leave untaken before the next part of its text waits for it
KEPT = 16  # voices and contexts whose KV caches are kept
LETTERS_A_SECOND = 15  # of speech, where it is not known how long a text takes
PIECE, ALONE = 8, 25  # frames (0.64 s, 2 s) of a clip that are encoded at once while others listen, or nobody does

log = logging.getLogger("csm.serve")


class Busy(Exception):
    """As many wait as may."""


class Left(Exception):
    """Nobody listens any more."""


@dataclass(eq=False)
class Cut:
    """A turn of a conversation, of which not all may have been heard."""

    turn: csm.Segment
    clip: csm.Segment | None  # that it continues
    whole: int  # frames of its whole text, estimated if it was broken off
    heard: int = 0  # frames


@dataclass(eq=False)
class Speech:
    """A text to say, and how far it is."""

    parts: list  # [(text, seconds of silence after it)]
    speaker: int
    voice: csm.Segment | str | None  # a clip, or as of Generator.generate; of no account where there is a context
    context: list  # csm.Segments, and (voice, speaker)
    seed: int  # of the first part; the others' are the next ones, as narrate has them
    sampling: csm.Sampling
    pieces: asyncio.Queue = field(default_factory=asyncio.Queue)  # (samples,) int16; at the end None or an exception
    part: int = 0  # the one that is said now, or next
    tries: int = 0  # of it that gave nothing
    codes: list = field(default_factory=list)  # of it so far, (K,) each
    limit: int = 0  # frames that it may take
    cut_off: list = field(default_factory=list)  # the parts that took as many, counted from 1
    captions: list = field(default_factory=list)  # of the parts that were said: (text, first sample, last sample + 1)
    part_start: int = 0  # the sample that the part begins with
    made: int = 0  # samples
    taken: int = 0  # of them; the listener's to write
    gone: bool = False  # nobody listens; the listener's to write
    kept: Kept | None = None  # the conversation that its parts are turns of; without parts, its context is
    rows: np.ndarray | None = None  # of the turn that is said now
    added: int = 0  # turns
    clip: csm.Segment | None = None  # the conversation's before them
    keeps: bool = False  # whether a listener who leaves leaves behind what was said so far
    turns: list = field(default_factory=list)  # that it has added, as Cuts
    cuts: list = field(default_factory=list)  # without parts: turns that were heard in part, to be cut there
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # `pieces` have got their last

    def begun(self):
        return self.part > 0 or self.tries > 0


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
        self.preparing = {}  # Speech -> its `prepare`
        self.shared = set()  # what one of them computes and others may need too
        self.batch, self.live = csm_batch.Batch(generator), {}  # uid -> Speech
        self.decoded, self.state = [], None  # uids, and Mimi's state of their streams
        self.steps = deque([(0, 0.0)], maxlen=125)  # (frames, seconds) of each

    def warm_up(self):
        """A frame of each size of batch that is compiled, so that no listener waits for the compiler."""
        sizes = {n for n in csm_batch.SIZES if n < self.max_batch} | {self.max_batch}

        def speak():
            for size in sorted(sizes) if csm.compiles(self.generator.model) else [1]:
                batch = csm_batch.Batch(self.generator)
                for seed in range(size):
                    batch.insert(self.generator.text_rows("Hello.", 0), 2, seed)
                batch.next()

        self.thread.submit(speak).result()

    def submit(self, speech, first=False):
        """Let a Speech wait for its turn. first: it goes on with another one, and so in front. Raises Busy."""
        if not first and self.count_waiting() >= self.max_waiting + self.max_batch - self.count_live():
            raise Busy("the server is busy")
        self.waiting.insert(0 if first else len(self.waiting), speech)
        self.changed.set()

    def count_live(self):
        return len(self.live) + len(self.preparing)

    def count_waiting(self):
        """Those that would speak if they could."""
        return sum(not self.held(speech) for speech in self.waiting)

    def held(self, speech):
        """Whether the listener has enough to hear for now."""
        return speech.made - speech.taken > AHEAD * self.generator.sample_rate

    def health(self):
        """real_time_factor: seconds a second of each stream's sound, below 1 where none has to wait for it."""
        frames, seconds = map(sum, zip(*self.steps))
        factor = seconds / len(self.steps) * self.generator.mimi.config.frame_rate
        speed = {"frames_per_second": round(frames / (seconds or 1), 1), "real_time_factor": round(factor, 3)}
        return {"status": "ok", "live": self.count_live(), "waiting": self.count_waiting()} | speed

    async def run(self):
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self.changed.clear()
                for speech in [speech for speech in self.waiting if speech.gone]:
                    self.waiting.remove(speech)
                    self.give(speech, self.undo(speech))
                ready = [speech for speech in self.waiting if not self.held(speech)]
                joining = ready[: self.max_batch - self.count_live()]
                if not joining and not self.count_live():
                    await self.changed.wait()
                    continue
                self.waiting = [speech for speech in self.waiting if speech not in joining]
                for speech, piece in await loop.run_in_executor(self.thread, self.step, joining):
                    self.give(speech, piece)
        finally:
            self.thread.submit(mx.clear_streams)  # or the process may not end well
            self.thread.shutdown()

    def give(self, speech, piece):
        """Hand a listener what was made, or what ends it."""
        speech.pieces.put_nowait(piece)
        if not isinstance(piece, np.ndarray):
            speech.ended.set()

    def step(self, joining):
        """Let them join, and say a frame of each that is live -> [(Speech, what its `pieces` get)]."""
        start, out = time.perf_counter(), []
        self.preparing |= {speech: self.prepare(speech) for speech in joining}
        self.advance(out)
        try:
            for uid in [uid for uid, speech in self.live.items() if speech.gone]:
                self.batch.remove(uid)
                out.append((self.live[uid], self.undo(self.live[uid])))
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
        except Exception as e:
            if (uid := getattr(e, "uid", None)) in self.live:  # it failed alone, and has left the batch
                speech = self.live.pop(uid)
                return [*out, (speech, self.undo(speech, failed(e)))]
            # and with it all that was being said
            out += [(speech, self.undo(speech, failed(e))) for speech in self.live.values()]
            self.batch, self.live, self.decoded = csm_batch.Batch(self.generator), {}, []
        for speech, piece in out:
            speech.made += len(piece) if isinstance(piece, np.ndarray) else 0
        return out

    # Preparing: in pieces, one between two frames, so that those who listen hear no gap.

    def advance(self, out):
        """Go on with those in `preparing`, until one of them has done a piece of work."""
        for speech, job in list(self.preparing.items()):
            del self.preparing[speech]
            if speech.gone:
                job.close()
                out.append((speech, self.undo(speech)))
                continue
            try:
                worked = next(job)
            except StopIteration as end:
                if end.value is None:
                    out.append((speech, None))
                else:
                    self.live[end.value] = speech
            except Exception as e:
                out.append((speech, self.undo(speech, failed(e))))
            else:
                self.preparing[speech] = job  # the last one now
                if worked:
                    return

    def prepare(self, speech):
        """Put the next part of a Speech into the batch -> its uid, None if it has no parts. Raises ValueError.

        Yields whether it has worked since, or waits for what another one computes.
        """
        if speech.kept:
            return (yield from self.prepare_turn(speech))
        generator, (text, _) = self.generator, speech.parts[speech.part]
        if not speech.begun():
            yield from self.set_context(speech)
        before, rows = generator.prompt(text, speech.speaker, speech.context, "none")
        cache = yield from self.context_cache(before)
        return self.insert(speech, rows, cache)

    def insert(self, speech, rows, cache):
        seed = (speech.seed + speech.part + speech.tries * 2**32) % 2**64
        room = self.generator.max_positions - cache.offset - len(rows)
        speech.limit = min(self.generator.max_frames(None, speech.parts[speech.part][0]), room)
        return self.batch.insert(rows, speech.limit, seed, speech.sampling, cache)

    def prepare_turn(self, speech):
        """`prepare` in a conversation: it is a turn after all others, and costs only what the cache lacks of them."""
        g, kept = self.generator, speech.kept
        if kept.talk is None:
            yield from self.set_context(speech)
            kept.talk = g.conversation(speech.context, voice="none", speaker=speech.speaker)
        elif not speech.begun():
            self.check_room(speech, kept.talk.turns[: kept.talk.n_context])
            for turn in speech.context:
                yield from self.encode(turn)
                kept.talk.hear(turn)
        for cut in speech.cuts:
            self.cut_turn(kept.talk, cut)
        if not speech.parts:
            return None
        talk, (text, _) = kept.talk, speech.parts[speech.part]
        speech.clip = speech.clip or talk.clip
        clip = talk.clip if talk.clip and talk.clip.speaker == speech.speaker else None
        speech.rows = g.turn_rows(text, speech.speaker, clip)
        g.check_length(talk.length(talk.n_context) + len(speech.rows))
        talk.make_room(len(speech.rows), g.max_frames(None, text))
        if talk.cache is None:
            context = np.concatenate([g.context_rows([]), *talk.blocks[: talk.n_context]])
            talk.cache = (yield from self.context_cache(context)).copy()
        before = np.concatenate([g.context_rows([]), *talk.blocks])
        while (done := talk.cache.offset) < len(before):
            csm.prefill(g.model, before[done : done + csm.PREFILL_ROWS], talk.cache)
            yield True
        return self.insert(speech, speech.rows, talk.cache)

    def add_turn(self, speech, text):
        """What a Speech has said is a turn of its conversation."""
        talk = speech.kept.talk
        turn = csm.Segment(speech.speaker, text, codes=np.stack(speech.codes))
        talk.turns.append(turn)
        talk.blocks.append(np.concatenate([speech.rows, self.generator.audio_rows(turn)]))
        clip = None
        if talk.clip and talk.clip.speaker == speech.speaker:
            clip, talk.clip = talk.clip, None
        speech.added += 1
        speech.turns.append(Cut(turn, clip, len(speech.codes)))

    def cut_turn(self, talk, cut):
        """Leave of a turn the frames that were heard, and the words that they can have held."""
        at = next((i for i, turn in enumerate(talk.turns) if turn is cut.turn), None)
        if at is None or cut.heard >= cut.whole:  # it is forgotten already, or was heard
            return
        g, text = self.generator, said_by_then(cut.turn.text, cut.heard / cut.whole)
        talk.cache.trim(talk.cache.offset - talk.length(at))
        if text:
            turn = replace(cut.turn, text=text, codes=cut.turn.codes[: cut.heard])
            talk.turns[at] = turn
            talk.blocks[at] = np.concatenate([g.turn_rows(text, turn.speaker, cut.clip), g.audio_rows(turn)])
        else:
            del talk.turns[at], talk.blocks[at]
            talk.clip = cut.clip or talk.clip

    def undo(self, speech, reason=None):
        """Leave a conversation as it was before a Speech that does not end -> what the listener gets.

        Of one that `keeps`, what was said so far is a turn.
        """
        talk = speech.kept and speech.kept.talk
        if talk and speech.keeps and not reason:
            if speech.codes:
                text, _ = speech.parts[speech.part]
                self.add_turn(speech, text)
                usual = len(text) / LETTERS_A_SECOND * self.generator.mimi.config.frame_rate
                speech.turns[-1].whole = max(len(speech.codes), round(usual))
            return Left("the client has left")
        if talk and speech.added:
            n = max(talk.n_context, len(talk.blocks) - speech.added)  # some may be forgotten already
            del talk.blocks[n:], talk.turns[n:]
            talk.clip = speech.clip
            if talk.cache:
                talk.cache.trim(talk.cache.offset - talk.length())
            speech.added = 0
        return reason or Left("the client has left")

    def set_context(self, speech):
        """Find and encode what a Speech is said after, if there is room for that and for all parts."""
        turns = []  # (Segment, its speaker)
        for item in speech.context or [(speech.voice, speech.speaker)]:
            voice, speaker = (item, item.speaker) if isinstance(item, csm.Segment) else item
            found = [voice] if isinstance(voice, csm.Segment) else self.generator.voice_prompt(voice, speaker)
            turns += [(turn, speaker) for turn in found]
        self.check_room(speech, [turn for turn, _ in turns])
        for turn, _ in turns:
            yield from self.encode(turn)
        speech.context = [replace(turn, speaker=speaker) for turn, speaker in turns]

    def check_room(self, speech, turns):
        """Raise ValueError if the turns leave no room for a part, each of which is said after them."""
        g, rows = self.generator, [len(self.generator.text_rows(text, speech.speaker)) for text, _ in speech.parts]
        n = sum(len(g.text_rows(turn.text, turn.speaker)) + n_frames(turn, g.mimi.frame_size) + 1 for turn in turns)
        if not rows:
            rows = [0]
        elif not turns and len(rows) > 1 and not speech.kept:  # the first is the context of the others
            n = rows[0] + g.max_frames(None, speech.parts[0][0]) // 2
        longest = int(np.argmax(rows))
        if n + rows[longest] >= g.max_positions:
            before, more, has = (x / g.mimi.config.frame_rate for x in (n, rows[longest], g.max_positions))
            text = in_short(speech.parts[longest][0]) if speech.parts else ""
            raise ValueError(
                f"too long: what is said before takes as much room as {before:.0f} s of sound, the text {text!r} "
                f"{more:.0f} s, and the model has {has:.0f} s"
            )

    def encode(self, turn):
        """Set the codes of a Segment, which several Speeches may share."""
        yield from self.alone(id(turn))
        if turn.codes is not None:
            return
        g, key = self.generator, id(turn)
        self.shared.add(key)
        try:
            audio = csm.as_samples(turn.audio, g.sample_rate)
            audio = mx.array(np.pad(audio, (0, -len(audio) % g.mimi.frame_size)))[None, None]
            state, codes, done = g.mimi.init_state(1), [], 0
            while done < audio.shape[2]:
                size = (PIECE if self.live else ALONE) * g.mimi.frame_size
                more, state = g.mimi.encode_step(audio[:, :, done : done + size], state)
                codes.append(np.array(more[0].T))
                done += size
                yield True
            n = min(g.mimi.n_codebooks, g.model.config.audio_num_codebooks)
            turn.codes, turn.audio = np.concatenate(codes)[:, :n], None
        finally:
            self.shared.discard(key)

    def context_cache(self, rows):
        """Generator.context_cache."""
        g, key = self.generator, rows.tobytes()
        yield from self.alone(key)
        if key not in g.context_caches:
            self.shared.add(key)
            try:
                cache = csm.KVCache(g.model.config.backbone, g.model.dtype)
                for i in range(0, len(rows), csm.PREFILL_ROWS):
                    csm.prefill(g.model, rows[i : i + csm.PREFILL_ROWS], cache)
                    yield True
                g.context_caches[key] = cache
            finally:
                self.shared.discard(key)
        return g.context_cache(rows)

    def alone(self, key):
        """Wait while another one computes what `key` names."""
        while key in self.shared:
            yield False

    # Frames to sound, and what follows a part.

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
        if len(speech.codes) == speech.limit:
            speech.cut_off.append(speech.part + 1)
        if speech.codes and speech.kept:
            self.add_turn(speech, text)
        elif speech.codes and not speech.context:  # this part's voice is that of the others
            self.keep_voice(speech, csm.Segment(speech.speaker, text, codes=np.stack(speech.codes)))
        if speech.codes:
            speech.captions.append((text, speech.part_start, speech.made))
        silence = np.zeros(int(pause * self.generator.sample_rate), np.int16)
        speech.part_start = speech.made + len(silence)
        speech.part, speech.tries, speech.codes = speech.part + 1, 0, []
        if speech.part < len(speech.parts):
            self.waiting.insert(0, speech)
            return [silence]
        if not speech.made:
            return [RuntimeError("the model ended the speech at once: try another seed")]
        return [silence, None] if len(silence) else [None]

    def keep_voice(self, speech, turn):
        """Say the parts that follow after this one, if it leaves room for them."""
        try:
            self.check_room(speech, [turn])
        except ValueError:
            log.warning("the first part is too long to be the voice of the others")
        else:
            speech.context = [turn]


def n_frames(turn, frame_size):
    """Of a Segment, encoded or not."""
    return -(-len(turn.audio) // frame_size) if turn.codes is None else len(turn.codes)


def said_by_then(text, share):
    """The words of a text that stand in so much of it, by letters."""
    words = text[: round(len(text) * share)]
    return words if share >= 1 else words.rpartition(" ")[0].strip()


def in_short(text):
    return text if len(text) <= 40 else f"{text[:39]}…"


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
