"""Field reconstruction: adaptive and uniform entities, a SIREN, resampling, frame by frame, and pre-training."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from dfn_hf.data.fields import FieldCollator, array_field, psnr, snr, sound_field
from dfn_hf.modeling.dfn.configuration_dfn import DFNConfig
from dfn_hf.modeling.dfn.modeling_dfn_field import DFNForFieldReconstruction

from ..baselines.models import count_parameters
from ..harness.environment import describe_machine
from ..harness.results import ResultsFile, markdown_table, mean_with_error
from ..harness.training_loop import fit

FIELDS = ("camera", "elevation", "speech", "clip")
METHODS = ("adaptive", "uniform", "frames", "siren", "resampling")
PRETRAINING = ("pre-trained", "from scratch")
PRETRAINING_SEEDS = 3
SIREN_LAYERS = 3
SIREN_RATES = (3e-4, 1e-3)
# ω₀ of the first layer by coordinate_dim: sound, images and video (Sitzmann et al. 2020, §4 and supplement)
SIREN_INITIAL_FREQUENCY = {1: 3000.0, 2: 30.0, 3: 30.0}
CLIP = (8, 48, 48)
CROP = 64


@dataclass(frozen=True)
class FieldSettings:
    """One run.

    Attributes:
        field: "camera" (scikit-image), "elevation" (matplotlib), "speech" (a WAV file), or "clip" (synthetic video).
        method: one of `METHODS`, or of `PRETRAINING`, which reconstruct the field from a quarter of its samples.
        side: samples per side of an image, to which it is averaged down.
        samples_per_entity: for resampling, samples per sample of the coarse grid.
        pretraining_steps: steps on crops of other photographs from scikit-image and scikit-learn.
    """

    field: str = "camera"
    method: str = "adaptive"
    side: int = 128
    samples_per_entity: int = 16
    steps: int = 150
    learning_rate: float = 3e-3
    pretraining_steps: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 2
    intermediate_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class FieldResult:
    """Reconstruction quality.

    Attributes:
        psnr_db: PSNR in dB; SNR for sound; for `PRETRAINING` the PSNR at the masked samples.
        initial_psnr_db: the same before training; None for methods without entities.
        correlation: Pearson correlation of density and gradient magnitude; None without adaptive entities.
        seconds: training time.
    """

    samples: int
    entities: int | None
    parameters: int
    psnr_db: float
    initial_psnr_db: float | None
    correlation: float | None
    seconds: float
    machine: str


def load_array(settings: FieldSettings, recording: Path | None = None) -> np.ndarray:
    """Load the field as an array in [−1, 1] with one axis per coordinate; speech has a channel axis in addition.

    Args:
        settings: the run.
        recording: WAV file for "speech".

    Raises:
        ValueError: the field is unknown, the recording is missing, or the WAV file has an unsupported format.
        OSError: the file does not exist.
    """
    if settings.field == "camera":
        from skimage.data import camera

        return _average_down(camera() / 127.5 - 1, settings.side)
    if settings.field == "elevation":
        import matplotlib

        path = os.path.join(matplotlib.get_data_path(), "sample_data", "jacksboro_fault_dem.npz")
        with np.load(path) as file:
            heights = _average_down(file["elevation"].astype(np.float64), settings.side)
        return (heights - heights.min()) / (heights.max() - heights.min()) * 2 - 1
    if settings.field == "clip":
        return draw_clip(*CLIP)
    if settings.field != "speech":
        raise ValueError(f"field is {settings.field!r}: choose one of {', '.join(FIELDS)}")
    if recording is None:
        raise ValueError("field is 'speech', but recording is None: pass a WAV file with --recording")
    values = sound_field(recording)["values"].numpy()
    return values / np.abs(values).max()


def draw_clip(frames: int, height: int, width: int) -> np.ndarray:
    """Return a video of a disc and a bar that move over a static background, `[frames, height, width]` in [−1, 1]."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, size) for size in (frames, height, width)), indexing="ij")
    background = 0.3 * np.sin(9 * x + 4 * y) * np.cos(6 * y) - 0.3
    disc = np.hypot(x - 0.2 - 0.5 * t, y - 0.3 - 0.2 * t) - 0.12
    bar = np.maximum(np.abs(y - 0.75 + 0.2 * t) - 0.04, np.abs(x - 0.6) - 0.25)
    clip = background
    for distance, brightness in ((disc, 0.9), (bar, -0.9)):
        inside = 1 / (1 + np.exp(np.clip(distance * 150, -50, 50)))
        clip = clip * (1 - inside) + brightness * inside
    return clip


def measure_field(
    settings: FieldSettings, recording: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> FieldResult:
    """FitResult one field, or reconstruct it from a quarter of its samples; the seed determines all random numbers."""
    set_seed(settings.seed)
    if settings.method in PRETRAINING:
        return _measure_quarter(settings)
    if settings.method not in METHODS:
        raise ValueError(f"method is {settings.method!r}: choose one of {', '.join((*METHODS, *PRETRAINING))}")
    array = load_array(settings, recording)
    axes = 1 if settings.field == "speech" else array.ndim
    quality = snr if axes == 1 else psnr
    if settings.method == "resampling":
        values = torch.from_numpy(array).float()
        coarse = _resample(values, axes, settings.samples_per_entity)
        return FieldResult(array.size, None, 0, quality(coarse, values), None, None, 0.0, describe_machine("cpu"))
    fields = [array_field(array, axes)]
    if settings.method == "frames":
        fields = [array_field(frame, axes - 1) for frame in array]
    batch = {name: torch.stack([field[name] for field in fields]) for name in fields[0]}
    batch["labels"] = batch["values"]
    entities = batch["values"].shape[1] // settings.samples_per_entity
    model: PreTrainedModel = _build(settings, batch, entities)
    first, correlation = None, None
    if settings.method == "siren":
        model, seconds = _fit_siren(count_parameters(model), batch, settings)
    else:
        first = quality(_reconstruct(model, batch).reconstruction, batch["values"])
        seconds = fit(
            model, repeat(batch), steps=settings.steps, learning_rate=settings.learning_rate, weight_decay=0.0
        ).seconds
    output = _reconstruct(model, batch)
    if settings.method == "adaptive":
        correlation = _correlation(array if axes > 1 else array[:, 0], output.density)
    report(f"{settings.field}, {settings.method}: {quality(output.reconstruction, batch['values']):.2f} dB")
    return FieldResult(
        samples=batch["values"].shape[0] * batch["values"].shape[1],
        entities=None if settings.method == "siren" else entities * len(fields),
        parameters=count_parameters(model),
        psnr_db=quality(output.reconstruction, batch["values"]),
        initial_psnr_db=first,
        correlation=correlation,
        seconds=round(seconds, 1),
        machine=describe_machine("cpu"),
    )


def _measure_quarter(settings: FieldSettings) -> FieldResult:
    """Reconstruct a photograph from a quarter of its samples, with or without pre-training on other photographs.

    Training on the photograph uses only this quarter, and masks a quarter of it.
    """
    crops = [array_field(crop, 2) for crop in _crops(load_array(settings))]
    generator = torch.Generator().manual_seed(settings.seed)
    for crop in crops:
        crop["mask"] = torch.rand(CROP**2, generator=generator) < 0.25
    given = [{name: crop[name][crop["mask"]] for name in ("coordinates", "values")} for crop in crops]
    entities = CROP**2 // settings.samples_per_entity
    model = _build(settings, {"coordinates": torch.empty(1, 1, 2), "values": torch.empty(1, 1, 1)}, entities)
    seconds = 0.0
    if settings.method == "pre-trained":
        seconds += fit(
            model,
            _other_photographs(FieldCollator(mask_ratio=0.75), len(crops), settings.seed),
            steps=settings.pretraining_steps,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
        ).seconds
    whole = FieldCollator()(crops)
    first = _hidden_psnr(model, whole, crops)
    if settings.steps:
        collate = FieldCollator(mask_ratio=0.25)
        batches = (collate(given) for _ in range(settings.steps))
        seconds += fit(
            model, batches, steps=settings.steps, learning_rate=settings.learning_rate / 3, weight_decay=0.0
        ).seconds
    return FieldResult(
        samples=sum(int(crop["mask"].sum()) for crop in crops),
        entities=entities * len(crops),
        parameters=count_parameters(model),
        psnr_db=_hidden_psnr(model, whole, crops),
        initial_psnr_db=first,
        correlation=None,
        seconds=round(seconds, 1),
        machine=describe_machine("cpu"),
    )


def _hidden_psnr(model: nn.Module, batch: dict[str, torch.Tensor], crops: list[dict[str, torch.Tensor]]) -> float:
    hidden = ~batch["mask"]
    values = torch.stack([crop["values"] for crop in crops])
    return psnr(_reconstruct(model, batch).reconstruction[hidden], values[hidden])


def _other_photographs(collate: FieldCollator, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of crops of other photographs at random scales, rotated and mirrored."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    colour = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]
    photographs = [image.mean(axis=2) / 127.5 - 1 for image in colour] + [data.moon() / 127.5 - 1]
    rng = np.random.default_rng(seed)
    while True:
        fields = []
        for _ in range(batch_size):
            image = photographs[rng.integers(len(photographs))]
            step = int(rng.integers(1, min(image.shape) // CROP + 1))
            top, left = (int(rng.integers(size - step * CROP + 1)) for size in image.shape)
            crop = _average_down(image[top : top + step * CROP, left : left + step * CROP], CROP)
            crop = np.rot90(crop, int(rng.integers(4)))
            fields.append(array_field(crop.T if rng.random() < 0.5 else crop, 2))
        yield collate(fields)


def _crops(image: np.ndarray) -> list[np.ndarray]:
    return [
        image[top : top + CROP, left : left + CROP]
        for top in range(0, image.shape[0] - CROP + 1, CROP)
        for left in range(0, image.shape[1] - CROP + 1, CROP)
    ]


def _average_down(image: np.ndarray, side: int) -> np.ndarray:
    """Average the upper left square of an image down to `[side, side]`."""
    step = min(image.shape) // side
    return image[: side * step, : side * step].reshape(side, step, side, step).mean(axis=(1, 3))


def _build(settings: FieldSettings, batch: dict[str, torch.Tensor], entities: int) -> DFNForFieldReconstruction:
    config = DFNConfig(
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        intermediate_size=settings.intermediate_size,
        coordinate_dim=batch["coordinates"].shape[-1],
        value_dim=batch["values"].shape[-1],
        num_entities=entities,
        entity_sampling="uniform" if settings.method == "uniform" else "adaptive",
    )
    return DFNForFieldReconstruction(config)


@torch.no_grad()
def _reconstruct(model: nn.Module, batch: dict[str, torch.Tensor]):
    model.eval()
    return model(**batch)


def _resample(values: torch.Tensor, axes: int, samples_per_entity: int) -> torch.Tensor:
    """Average the values to a grid with `samples_per_entity` times fewer samples, and interpolate linearly."""
    mode = ("linear", "bilinear", "trilinear")[axes - 1]
    channels = values.movedim(-1, 0)[None] if values.dim() > axes else values[None, None]
    shape = channels.shape[2:]
    step = samples_per_entity ** (1 / axes)
    coarse = F.interpolate(channels, size=[max(1, round(size / step)) for size in shape], mode="area")
    fine = F.interpolate(coarse, size=shape, mode=mode)[0]
    return fine.movedim(0, -1) if values.dim() > axes else fine[0]


def _correlation(array: np.ndarray, density: torch.Tensor) -> float:
    gradient = np.gradient(array)
    magnitude = np.sqrt(sum(np.square(g) for g in (gradient if array.ndim > 1 else [gradient])))
    return float(np.corrcoef(magnitude.ravel(), density.flatten().numpy())[0, 1])


class Siren(PreTrainedModel):
    """SIREN (Sitzmann et al. 2020), a sine network from coordinates to values with at most `parameters` parameters."""

    def __init__(self, parameters: int, coordinate_dim: int, value_dim: int):
        super().__init__(PreTrainedConfig())
        linear = coordinate_dim + value_dim + SIREN_LAYERS
        width = int((-linear + math.sqrt(linear**2 + 4 * (SIREN_LAYERS - 1) * parameters)) / (2 * (SIREN_LAYERS - 1)))
        sizes = [coordinate_dim, *[width] * SIREN_LAYERS, value_dim]
        layers = [nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.ModuleList(layers)
        self.frequency = SIREN_INITIAL_FREQUENCY[coordinate_dim]
        for index, layer in enumerate(layers):
            bound = 1 / coordinate_dim if index == 0 else math.sqrt(6 / width) / 30
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, coordinates: torch.Tensor, labels: torch.Tensor, **kwargs) -> SimpleNamespace:
        x = torch.sin(self.frequency * self.layers[0](coordinates))
        for layer in self.layers[1:-1]:
            x = torch.sin(30 * layer(x))
        reconstruction = self.layers[-1](x)
        return SimpleNamespace(loss=F.mse_loss(reconstruction, labels), reconstruction=reconstruction)


def _fit_siren(parameters: int, batch: dict[str, torch.Tensor], settings: FieldSettings) -> tuple[Siren, float]:
    """Return the SIREN with the lowest loss over `SIREN_RATES`, and its training time in seconds."""
    runs = []
    for rate in SIREN_RATES:
        set_seed(settings.seed)
        model = Siren(parameters, batch["coordinates"].shape[-1], batch["values"].shape[-1])
        seconds = fit(model, repeat(batch), steps=settings.steps, learning_rate=rate, weight_decay=0.0).seconds
        runs.append((_reconstruct(model, batch).loss.item(), model, seconds))
    _, model, seconds = min(runs, key=lambda run: run[0])
    return model, seconds


def run_fields(
    runs: Iterable[FieldSettings],
    path: Path,
    recording: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[tuple[FieldSettings, FieldResult]]:
    """Measure the runs; finished ones are read from the CSV at `path`."""
    results = ResultsFile(path, FieldSettings, FieldResult)
    return [(run, results.run(run, lambda missing: measure_field(missing, recording, report))) for run in runs]


def field_runs(settings: FieldSettings, fields: Sequence[str]) -> list[FieldSettings]:
    """Return the runs of these fields; "camera" includes the reconstructions from a quarter of its samples."""
    runs = [
        replace(settings, field=field, method=method)
        for field in fields
        for method in (("adaptive", "frames") if field == "clip" else ("adaptive", "uniform", "siren", "resampling"))
    ]
    if "camera" in fields:
        quarter = replace(settings, steps=settings.steps // 3, learning_rate=2 * settings.learning_rate)
        runs += [
            replace(quarter, method=method, seed=seed, pretraining_steps=pretraining_steps)
            for method, pretraining_steps in zip(PRETRAINING, (3 * settings.steps, 0), strict=True)
            for seed in range(PRETRAINING_SEEDS)
        ]
    return runs


def fields_table(finished: list[tuple[FieldSettings, FieldResult]]) -> str:
    """Return a table with one row per field and method: mean ± standard error over seeds."""
    header = (
        "field",
        "method",
        "seeds",
        "samples",
        "entities",
        "parameters",
        "steps",
        "untrained dB",
        "dB",
        "correlation",
        "training s",
    )
    lines = []
    for run in dict.fromkeys(replace(settings, seed=0) for settings, _ in finished):
        found = [result for settings, result in finished if replace(settings, seed=0) == run]
        lines.append(
            (
                Path(run.field).name + (", 1/4 of samples" if run.method in PRETRAINING else ""),
                run.method,
                str(len(found)),
                f"{round(np.mean([result.samples for result in found])):,}",
                "–" if found[0].entities is None else f"{found[0].entities:,}",
                f"{found[0].parameters:,}",
                _steps(run),
                mean_with_error([result.initial_psnr_db for result in found], 1),
                mean_with_error([result.psnr_db for result in found], 1),
                mean_with_error([result.correlation for result in found], 2),
                mean_with_error([result.seconds for result in found], 0),
            )
        )
    return markdown_table(header, lines)


def _steps(settings: FieldSettings) -> str:
    if settings.method == "resampling":
        return "0"
    before = f"{settings.pretraining_steps} + " if settings.method == "pre-trained" else ""
    return f"{before}{settings.steps}"
