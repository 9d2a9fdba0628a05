"""Recordings as fields: a spectrum at every moment, for `DFNForContrastive` with `coordinate_dim` 1."""

from pathlib import Path

import torch

from .fields import array_field, read_wav

BANDS = 24
HOP_SECONDS = 0.01
WINDOW_SECONDS = 0.032
LOWEST_HERTZ = 100.0
FLOOR = 1e-4  # of the loudest, below which a band counts as silent


def read_recording(path: str | Path) -> tuple[torch.Tensor, int]:
    """The samples of a recording, float32 `[samples]` in [−1, 1], channels averaged, and how many make a second.

    Raises:
        OSError, ValueError: see `fields.read_wav`; ValueError too where it holds no sample.
    """
    samples, rate = read_wav(path)
    if not len(samples):
        raise ValueError(f"{path} holds no sample: leave it out")
    return array_field(samples, 1)["values"].mean(dim=1), rate


def spectrum_field(samples: torch.Tensor, rate: int) -> dict[str, torch.Tensor]:
    """A recording as a field over time, its spectrum at each moment.

    Args:
        samples: float `[samples]`.
        rate: samples per second.

    Returns:
        `coordinates` float32 `[moments, 1]`, seconds from the middle, and `values` float32 `[moments, 24]`: the log of
        the energy in bands of equal width in mel, of mean 0 and variance 1 over the recording. A moment is 10 ms.

    Raises:
        ValueError: the recording is shorter than one window of 32 ms.
    """
    window = round(WINDOW_SECONDS * rate)
    if len(samples) < window:
        raise ValueError(f"a recording of {len(samples)} samples is shorter than a window of {window}: leave it out")
    frames = samples.float().unfold(0, window, round(HOP_SECONDS * rate)) * torch.hann_window(window)
    energy = torch.fft.rfft(frames).abs().square() @ mel_bands(rate, window).T
    log = torch.log(energy + FLOOR * energy.max() + torch.finfo(torch.float32).tiny)
    values = (log - log.mean()) / (log.std() + 1e-6)
    seconds = HOP_SECONDS * torch.arange(len(values), dtype=torch.float32)
    return {"coordinates": (seconds - seconds.mean()).unsqueeze(1), "values": values}


def mel_bands(rate: int, window: int) -> torch.Tensor:
    """Triangles over a spectrum, `[BANDS, window // 2 + 1]`, of equal width in mel = 2595 log10(1 + f / 700)."""
    low, high = (2595 * torch.log10(1 + torch.tensor(hertz) / 700) for hertz in (LOWEST_HERTZ, rate / 2))
    edges = 700 * (10 ** (torch.linspace(float(low), float(high), BANDS + 2) / 2595) - 1)
    bins = torch.fft.rfftfreq(window, 1 / rate)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clamp(min=0)
