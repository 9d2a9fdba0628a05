"""Converts recordings to fields of log-mel spectra over time, for `DFNForContrastive` with `coordinate_dim=1`."""

from pathlib import Path

import torch

from .fields import array_field, read_wav

BANDS = 24
HOP_SECONDS = 0.01
WINDOW_SECONDS = 0.032
LOWEST_HERTZ = 100.0
FLOOR = 1e-4  # fraction of the largest band energy, added to every band before the logarithm


def read_recording(path: str | Path) -> tuple[torch.Tensor, int]:
    """Read a WAV file and average its channels.

    Returns:
        The samples, float32 `[samples]` in [−1, 1], and the sampling rate in Hz.

    Raises:
        ValueError: see `fields.read_wav`.
    """
    samples, rate = read_wav(path)
    return array_field(samples, 1)["values"].mean(dim=1), rate


def spectrum_field(samples: torch.Tensor, rate: int) -> dict[str, torch.Tensor]:
    """Compute the log-mel spectrogram of a recording as a field over time, one frame per 10 ms.

    Args:
        samples: float `[samples]`.
        rate: sampling rate in Hz.

    Returns:
        `coordinates` float32 `[frames, 1]`, seconds from the middle of the recording, and `values` float32
        `[frames, 24]`, the log energy of 24 mel bands, normalized to mean 0 and variance 1 over the recording.

    Raises:
        ValueError: the recording is shorter than one window (32 ms), or `rate` is too low for the lowest band.
    """
    if rate <= 2 * LOWEST_HERTZ:
        raise ValueError(
            f"the sampling rate is {rate} Hz but the lowest band needs more than {2 * LOWEST_HERTZ:g} Hz: remove the "
            "recording from the data"
        )
    window = round(WINDOW_SECONDS * rate)
    if len(samples) < window:
        raise ValueError(
            f"the recording has {len(samples)} samples but a window needs {window}: remove it from the data"
        )
    frames = samples.float().unfold(0, window, round(HOP_SECONDS * rate)) * torch.hann_window(window)
    energy = torch.fft.rfft(frames).abs().square() @ mel_bands(rate, window).T
    log = torch.log(energy + FLOOR * energy.max() + torch.finfo(torch.float32).tiny)
    values = (log - log.mean()) / (log.std() + 1e-6)
    seconds = HOP_SECONDS * torch.arange(len(values), dtype=torch.float32)
    return {"coordinates": (seconds - seconds.mean()).unsqueeze(1), "values": values}


def mel_bands(rate: int, window: int) -> torch.Tensor:
    """Triangular filters `[BANDS, window // 2 + 1]`, equally wide on the mel scale, mel = 2595 log10(1 + f / 700)."""
    low, high = (2595 * torch.log10(1 + torch.tensor(hertz) / 700) for hertz in (LOWEST_HERTZ, rate / 2))
    edges = 700 * (10 ** (torch.linspace(float(low), float(high), BANDS + 2) / 2595) - 1)
    bins = torch.fft.rfftfreq(window, 1 / rate)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clamp(min=0)
