"""Conversations that the server keeps: csm.Conversations under names of the clients' own, in bounded memory."""

import asyncio
import time
from dataclasses import dataclass, field

import csm

IDLE = 30 * 60  # seconds after which a conversation is forgotten
MOST_CONVERSATIONS = 1000


@dataclass(eq=False)
class Kept:
    """A conversation, and who has it now."""

    talk: csm.Conversation | None = None  # from its first turn on
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # of the one request that adds to it
    used: float = field(default_factory=time.monotonic)

    def turns(self):
        """The Segments since the context."""
        return self.talk.turns[self.talk.n_context :] if self.talk else []

    def n_bytes(self):
        cache = self.talk and self.talk.cache
        return sum(x.nbytes for x in (*cache.keys, *cache.values) if x is not None) if cache else 0


class Conversations:
    """Kepts by name. The longest unused go where they take more than `most` bytes, and all that are idle."""

    def __init__(self, most):
        self.most, self.kept = most, {}

    def open(self, name):
        """The Kept of this name, a new one if there is none."""
        self.tidy()
        return self.kept.setdefault(name, Kept())

    def find(self, name):
        """The Kept of this name if it has begun, or None."""
        self.tidy()
        kept = self.kept.get(name)
        return kept if kept and kept.talk else None

    def tidy(self):
        now = time.monotonic()
        free = sorted((k for k, kept in self.kept.items() if not kept.lock.locked()), key=lambda k: self.kept[k].used)
        n_bytes = sum(kept.n_bytes() for kept in self.kept.values())
        for name in free:
            kept = self.kept[name]
            if n_bytes > self.most or len(self.kept) > MOST_CONVERSATIONS or now - kept.used > IDLE:
                n_bytes -= kept.n_bytes()
                del self.kept[name]

    def remove(self, name):
        """Whether there was one."""
        return self.kept.pop(name, None) is not None
