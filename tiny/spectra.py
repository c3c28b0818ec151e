"""How train.py compares sounds: spectra, distances between them, and networks that learn to tell them apart.

Shapes: B batch, S samples.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from teacher import RATE
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


@cache
def mel_filters(n_mels, n_fft, device):
    """(n_mels, n_fft / 2 + 1): triangular filters that sum to 1."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), n_mels + 2) / 2595) - 1)
    f = np.linspace(0, RATE / 2, n_fft // 2 + 1)
    up = (f - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - f) / (edges[2:] - edges[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(up, down))
    empty = triangles.sum(1) == 0  # narrower than a bin: take the nearest bin
    triangles[empty, np.abs(f - edges[1:-1][empty, None]).argmin(1)] = 1
    return torch.tensor(triangles / triangles.sum(1, keepdims=True), dtype=torch.float32, device=device)


def stft(x, n, hop, center=True):
    """(B, S) -> (B, n / 2 + 1, S / hop), complex"""
    window = torch.hann_window(n, device=x.device)
    return torch.stft(x, n, hop, n, window, center=center, pad_mode="constant", return_complex=True)


def log_mels(x, n_mels):
    """(B, S) -> causal log-mel spectra (B, n_mels, S / 120)."""
    y = stft(F.pad(x, (392, 0)), 512, 120, center=False).abs()
    return torch.log(mel_filters(n_mels, 512, x.device) @ y + 0.01)


def unlike(y, x):
    """Two distances between a sound y and its target x, both (B, S)."""
    a, b, mels = stft(y, 1024, 240), stft(x, 1024, 240), mel_filters(80, 1024, x.device)
    mel = (torch.log(mels @ a.abs() + 0.05) - torch.log(mels @ b.abs() + 0.05)).abs().mean()
    far = 0
    for n, hop, pool in ((2048, 480, 1), (512, 120, 4), (256, 64, 8)):
        # Pool short windows over 20 ms. Otherwise a shifted pulse would cost more than a missing one.
        a, b = (stft(m, n, hop).abs().square() / n + 1e-7 for m in (y, x))
        a, b = (F.avg_pool1d(m, pool, max(1, pool // 2)).sqrt() for m in (a, b))
        far = far + (torch.log(a + 0.01) - torch.log(b + 0.01)).abs().mean() / 3
        far = far + 0.1 * (a - b).abs().mean() / (b.mean() + 0.02)
    return {"mel": mel, "far": far}


class Spectrogram(nn.Module):
    """(B, S) -> log-magnitude spectrogram (B, 1, n / 2 + 1, S / hop), scaled to lie around 0."""

    def __init__(self, n, hop):
        super().__init__()
        self.n, self.hop = n, hop

    def forward(self, x):
        return torch.log(stft(x, self.n, self.hop).abs() / self.n**0.5 + 1e-3)[:, None] / 2


class Adversary:
    """Networks that learn to tell the decoder's sound from the teacher's.

    They see magnitudes only, because no code holds the phase. A checkpoint holds them and their optimizer.
    """

    def __init__(self, device, windows=((2048, 300, 8), (1024, 240, 12), (512, 120, 12))):
        self.nets = nn.ModuleList()
        for n, hop, width in windows:
            widths, layers = (1, width, 2 * width, 3 * width, 4 * width), [Spectrogram(n, hop)]
            for a, b, stride in zip(widths, widths[1:], ((2, 1), (2, 2), (2, 2), (2, 1))):
                layers += [weight_norm(nn.Conv2d(a, b, (5, 3), stride, (2, 1))), nn.LeakyReLU(0.2)]
            self.nets.append(nn.Sequential(*layers, weight_norm(nn.Conv2d(4 * width, 1, 3, 1, 1))))
        self.nets.to(device)
        self.optimizer = torch.optim.AdamW(self.nets.parameters(), 5e-4, (0.5, 0.9))

    def state_dict(self):
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])

    def learn(self, y, x):
        """One training step on a sound y and its target x (B, S). Returns the networks' accuracy."""
        loss, told = 0, 0
        for net in self.nets:
            true, made = net(torch.cat([x, y.detach()])).chunk(2)
            loss = loss + F.relu(1 - true).mean() + F.relu(1 + made).mean()
            told = told + ((true > 0).float().mean() + (made < 0).float().mean()) / 2 / len(self.nets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return told

    def join(self, y, loss, weight, start):
        """A loss whose gradient adds the networks' to that of `loss`, for the decoder's sound y (B, S).

        The networks' gradient with respect to y gets `weight` times the norm of that of `loss`. They hear y from
        sample `start` on.
        """
        a = torch.autograd.grad(loss, y)[0]
        b = torch.autograd.grad(-sum(net(y[:, start:]).mean() for net in self.nets), y)[0]
        return (y * (a + weight * a.norm() / (b.norm() + 1e-12) * b)).sum()
