"""What tiny's codes mean. Other codecs learn their codes; here each codebook holds something that the teacher knows.

    codebooks 0 to 3   the phoneme in each quarter of the frame (20 ms)
    4 and 5            the pitch of the first and the second half, in steps of 1.2 %; 0: unvoiced
    6                  the loudness of both halves
    7                  the voice: one of 512 mixes of the teacher's voices
So the language model only adds melody and timing to the text, the decoder follows a recipe, and the encoder is a
recogniser. Each codebook has its own dimensions of the latents, so residual quantization finds each code independently.
F frames, K codebooks.
"""

import numpy as np

K, N_CODES, CODE_DIM = 8, 512, 128
PARTS = 4  # phonemes in a frame
NO_WORD = 255
PHONEMES = "bdfhijklmnopstuvwzɑɔæðəɛɜɡɪŋɹɾʃʊʌʒʤʧθAIOWYɒɐaeᵊᵻʔ"  # Kokoro's letters for English
SILENCE = 1  # not 0: code 0 of codebook 0 ends the speech
INDEX = {letter: 2 + i for i, letter in enumerate(PHONEMES)}
PITCHES, LEVELS = 192, 22
LOWEST, HIGHEST = 50, 500  # Hz
PITCH_STEP = np.log(HIGHEST / LOWEST) / (PITCHES - 1)  # nepers
QUIETEST, LEVEL_STEP = -9, 0.86  # in Kokoro's unit of loudness
LEVEL = 0.45  # nepers in that unit
STEPS_APART = 6  # the vectors of levels this many steps apart have distance 1
VOICES = ("jm_kumo", "jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro")  # Kokoro's voices that are mixed
SPANS = ((0, 32), (0, 32), (32, 64), (64, 96), (96, 107), (107, 118), (118, 120), (120, 125))  # dimensions by codebook
USED = (*[2 + len(PHONEMES)] * 4, PITCHES, PITCHES, LEVELS**2, N_CODES)  # codes in use by codebook
SPARE = CODE_DIM - 1  # unused codes lie far out in this dimension, so nothing is quantized to them


def encode(phonemes, pitch, level, voice):
    """Labels -> codes (F, K) int16.

    phonemes, pitch, level: (PARTS * F,) each. A phoneme not in PHONEMES is silence; pitch in Hz, 0: unvoiced.
    voice: int, the code of codebook 7.
    """
    out = np.zeros((len(pitch) // PARTS, K), np.int16)
    out[:, :4] = np.reshape([INDEX.get(p, SILENCE) for p in phonemes], (-1, PARTS))
    pitch = pitch.reshape(-1, 2, PARTS // 2).astype(float)
    voiced = (pitch > LOWEST) & (out[:, :4].reshape(pitch.shape) != SILENCE)
    height = (np.log(np.maximum(pitch, LOWEST) / LOWEST) * voiced).sum(2) / np.maximum(1, voiced.sum(2))  # nepers
    step = np.floor(height / PITCH_STEP).clip(0, PITCHES - 2)
    out[:, 4:6] = np.where(voiced.any(2), 1 + step, 0)
    halves = level.reshape(pitch.shape).astype(float).mean(2)
    out[:, 6] = np.floor((halves - QUIETEST) / LEVEL_STEP).clip(0, LEVELS - 1) @ (LEVELS, 1)
    out[:, 7] = voice
    return out


def hertz(code):
    """The pitch in Hz that a code of codebooks 4 and 5 means; below LOWEST for code 0."""
    return LOWEST * np.exp((code - 0.5) * PITCH_STEP)


def vectors(voices):
    """The codebooks (K, N_CODES, CODE_DIM) float32. voices[i]: the mix {name: share} for code i of codebook 7."""
    out, r = np.zeros((K, N_CODES, CODE_DIM), np.float32), np.random.default_rng(0)
    sounds = r.normal(size=(USED[0], 32))
    sounds *= 2 / np.linalg.norm(sounds, axis=1, keepdims=True)
    hz = hertz(np.arange(1, PITCHES))
    turns = 2 * np.pi * np.outer(hz, (0.0025, 0.005, 0.01, 0.02))  # phase after so many seconds
    waves = np.stack([np.cos(turns), np.sin(turns)], 2).reshape(len(hz), -1)
    high = np.log(hz / 160)[:, None]
    level = (np.arange(LEVELS) - (LEVELS - 1) / 2) / STEPS_APART
    pitches = np.vstack([-np.eye(1, 11), np.hstack([0 * high + 1, 3 * high, 4 * high, 0.7 * waves])])
    books = [sounds] * 4 + [pitches] * 2
    books.append(np.stack([np.repeat(level, LEVELS), np.tile(level, LEVELS)], 1))
    books.append([[1.5 * voice.get(name, 0) for name in VOICES] for voice in voices])
    for k, (book, (a, b)) in enumerate(zip(books, SPANS)):
        out[k, : USED[k], a:b] = book
        out[k, USED[k] :, SPARE] = 6
    out[0, 0, SPARE] = 6
    return out


def pointer(rows, words, spans):
    """The token that each frame speaks (F,); -1: none. Assumes that a word's phonemes spread evenly over its tokens.

    rows: codes (F, K); words: the word that each frame speaks (F,); spans: [(first token, end)] by word.
    """
    sounds, out = np.pad(rows[:, :PARTS].reshape(-1), (1, 0)), np.full(len(rows), -1)
    begun = np.cumsum((sounds[1:] != sounds[:-1]) & (sounds[1:] != SILENCE))  # phonemes so far
    for word in set(words.tolist()) - {NO_WORD}:
        at, (a, b) = np.nonzero(words == word)[0], spans[word]
        first, last = begun[PARTS * at[0]], begun[PARTS * (at[-1] + 1) - 1]
        out[at] = a + (begun[PARTS * at] - first + 0.5) / (last - first + 1) * (b - a)
    return out
