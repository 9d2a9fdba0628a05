"""DFN for fields: values at coordinates (images, audio, video) are pooled into entities and interpolated anywhere.

Samples are ordered along a Hilbert curve, so that a field is a left-aligned row like a text (`modules/row_layout.py`).
Entities are spans of that row (`field_sampling.py`), and bidirectional DFN layers run on them.

Shape letters: B batch, N samples, E entities, Q queries, S pieces of samples, c coordinate_dim, v value_dim.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from ..modules.outputs import OutputCollector
from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.hilbert_curve import KEY_BITS, LAST_KEY, Box
from .configuration_dfn import DFNConfig
from .entities import Entities, unit_variance_linear
from .field_interpolation import NUM_WAVES, FourierBasis, GaussianInterpolation, gather_rows
from .field_sampling import FlowDensity, PlacedEntities, Spans, cut_spans, normalize_density, place_entities
from .layers import DFNLayer
from .modeling_dfn import DFNPreTrainedModel

NUM_OCTAVES = 6  # frequencies of the sinusoidal features of an entity's coordinates
UNLIMITED = 2**62  # entities


@dataclass
class DFNFieldModelOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: `[B, E, hidden_size]`, of the entities, in the order of the curve.
        entity_coordinates: `[B, E, c]`, mean of the samples' coordinates.
        entity_weights: `[B, E]`, log mass: log of the number of samples.
        entity_mask: bool `[B, E]`, False at padding of rows with fewer entities; None without padding.
        entity_values: `[B, E, v]`, mean of the samples' values.
        entity_scales: `[B, E, 1]`, distance over which the entity acts, in units of the coordinates.
        density: `[B, N]`, entities per sample, in the order of the input; 0 where no sample is given.
        entities: per layer over entities `Entities`; with `output_entities`.
    """

    last_hidden_state: torch.Tensor | None = None
    entity_coordinates: torch.Tensor | None = None
    entity_weights: torch.Tensor | None = None
    entity_mask: torch.Tensor | None = None
    entity_values: torch.Tensor | None = None
    entity_scales: torch.Tensor | None = None
    density: torch.Tensor | None = None
    entities: tuple[Entities, ...] | None = None


@dataclass
class DFNFieldReconstructionOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, mean squared error over all labels that are not NaN.
        reconstruction: `[B, Q, v]`, values at the queries.
        last_hidden_state, entity_coordinates, entity_weights, entity_mask, density, entities: see
            `DFNFieldModelOutput`.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    entity_coordinates: torch.Tensor | None = None
    entity_weights: torch.Tensor | None = None
    entity_mask: torch.Tensor | None = None
    density: torch.Tensor | None = None
    entities: tuple[Entities, ...] | None = None


class DFNFieldPreTrainedModel(DFNPreTrainedModel):
    """Base class of models whose input is `coordinates`, not token ids."""

    main_input_name = "coordinates"
    _keep_in_fp32_modules = [*DFNPreTrainedModel._keep_in_fp32_modules, "coordinate_proj", "frequency"]
    _keep_in_fp32_modules_strict = [
        *DFNPreTrainedModel._keep_in_fp32_modules_strict,
        "log_floor",
        "log_exponent",
        "log_steps",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters and buffers of one module."""
        if isinstance(module, (FlowDensity, GaussianInterpolation)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class DFNFieldModel(DFNFieldPreTrainedModel):
    """Encoder of fields: layers over samples, pooling into entities, layers over entities, final norm.

    Raises:
        ValueError: `coordinate_dim` is too large for a Hilbert curve.
    """

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        c = config.coordinate_dim
        if c > KEY_BITS:
            raise ValueError(f"`coordinate_dim` must be at most {KEY_BITS} for a model of fields, got {c}.")
        bidirectional = copy.copy(config)
        bidirectional.is_causal = False
        bidirectional.memory_slots, bidirectional.readout_window = 0, 1
        sample_config = bidirectional.of_sample_layers()
        self.value_proj = unit_variance_linear(config.value_dim + 1, config.hidden_size)
        self.sample_layers = nn.ModuleList([DFNLayer(sample_config, c) for _ in range(config.num_sample_layers)])
        self.density = FlowDensity(config) if config.entity_sampling == "adaptive" else None
        self.waves = self.moment_proj = None  # with one sample per entity all moments are 0
        if config.entity_sampling != "token":
            self.waves = FourierBasis(config)
            self.moment_proj = nn.Linear(2 * NUM_WAVES * config.value_dim, config.hidden_size, bias=False)
            self.moment_proj.init_std = 1.0  # type: ignore[assignment]  # see FlowDensity
        self.place_proj = unit_variance_linear(2 * c * NUM_OCTAVES, config.hidden_size)
        self.layers = nn.ModuleList([DFNLayer(bidirectional, c) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        coordinates: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        output_entities: bool = False,
        **kwargs,
    ) -> DFNFieldModelOutput:
        """
        Args:
            coordinates: `[B, N, c]`, in the same unit on all axes; usually in [−1, 1].
            values: `[B, N, v]`, of order 1.
            mask: bool `[B, N]`, True where a sample is given; None if all are.
            output_entities: return positions, influence and neighbours of every layer over entities.

        Raises:
            ValueError: shapes contradict each other, a row has no sample, or an input is not finite.
        """
        mask = self._check(coordinates, values, mask)
        # Half precision distinguishes only a few hundred coordinates per axis.
        dtype = torch.promote_types(self.dtype, torch.float32)
        coordinates, values = (torch.where(mask.unsqueeze(-1), x, 0).to(dtype) for x in (coordinates, values))
        box = Box.around(coordinates, mask)
        counts = mask.sum(dim=1)
        order = curve_order(box, coordinates, values, mask)[:, : int(counts.max())]  # hidden samples are last
        coordinates, values = (gather_rows(x, order.unsqueeze(-1)).squeeze(2) for x in (coordinates, values))
        real, rows = left_aligned_rows(counts, order.shape[1])
        states = self.value_proj(F.pad(values, (0, 1), value=1.0).to(self.value_proj.weight.dtype))
        density = self._entities_per_sample(states, coordinates, real, box)
        for layer in self.sample_layers:
            states = layer(states, None, rows, coordinates)[0]
        spans = cut_spans(density, real, min(self._max_entities(), order.shape[1]), dtype)
        entities = place_entities(spans, coordinates, values, box)
        states = self._pool(spans, entities, states, coordinates, values)
        _, rows = left_aligned_rows(spans.real.sum(dim=1), spans.real.shape[1])
        outputs = OutputCollector(rows, entities=output_entities)
        for layer in self.layers:
            states, _, _, layer_entities, _ = layer(states, None, rows, entities.coordinates, entities.log_mass)
            outputs.add(entities=layer_entities)
        return DFNFieldModelOutput(
            last_hidden_state=self.norm(states) * spans.real.unsqueeze(-1),
            entity_coordinates=entities.coordinates,
            entity_weights=entities.log_mass,
            entity_mask=None if bool(spans.real.all()) else spans.real,
            entity_values=entities.values,
            entity_scales=entities.scale,
            density=density.new_zeros(mask.shape).scatter(1, order, density).to(dtype),
            entities=outputs.get("entities"),
        )

    def _max_entities(self) -> int:
        return self.config.num_entities if self.config.entity_sampling != "token" else UNLIMITED

    def _entities_per_sample(self, states, coordinates, real, box: Box) -> torch.Tensor:
        """Density of entities, float64 `[B, N]`, of which each row sums to its number of entities."""
        if self.config.entity_sampling == "token":
            return real.double()
        density = real.double() if self.density is None else self.density(states, coordinates, real, box)
        return normalize_density(density, real, self.config.num_entities)

    def _pool(self, spans: Spans, entities: PlacedEntities, states, coordinates, values) -> torch.Tensor:
        """Initial states of the entities, `[B, E, hidden_size]`.

        The sum of the mean of the samples' states, a projection of the moments of their values with Fourier features
        of their offsets, and a projection of sinusoidal features of the entity's coordinates.
        """
        pooled = spans.sums(spans.of_samples(states) * spans.share.unsqueeze(-1))
        if self.waves is not None:
            offsets = spans.of_samples(coordinates) - spans.of_entities(entities.coordinates)
            waves = self.waves(offsets / spans.of_entities(entities.scale))
            residual = spans.of_samples(values) - spans.of_entities(entities.values)
            moments = spans.means((waves.unsqueeze(-1) * residual.unsqueeze(2)).flatten(2))
            pooled = pooled + self.moment_proj(moments.to(states.dtype))
        octaves = 2.0 ** torch.arange(NUM_OCTAVES, device=pooled.device, dtype=pooled.dtype)
        angles = (entities.coordinates.unsqueeze(-1) * math.pi * octaves).flatten(2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return (pooled + self.place_proj(features.to(states.dtype))).to(states.dtype)

    def _check(self, coordinates, values, mask) -> torch.Tensor:
        """Check the inputs and return the mask of given samples, bool `[B, N]`."""
        config = self.config
        for name, tensor, field in (("coordinates", coordinates, "coordinate_dim"), ("values", values, "value_dim")):
            if tensor.dim() != 3 or tensor.shape[-1] != getattr(config, field):
                raise ValueError(
                    f"{name} must be [batch, samples, {getattr(config, field)}], whose last size is `{field}`, got "
                    f"{list(tensor.shape)}."
                )
        if coordinates.shape[:2] != values.shape[:2]:
            raise ValueError(
                "coordinates and values must have the same batch and number of samples, got "
                f"{list(coordinates.shape)} and {list(values.shape)}."
            )
        if mask is None:
            mask = torch.ones(coordinates.shape[:2], dtype=torch.bool, device=coordinates.device)
        if mask.shape != coordinates.shape[:2]:
            raise ValueError(f"mask must be [batch, samples] = {list(coordinates.shape[:2])}, got {list(mask.shape)}.")
        mask = mask.bool()
        if not mask.any(dim=1).all():
            raise ValueError("A row of mask is False for every sample, or empty: pass at least one sample per field.")
        for name, tensor in (("coordinates", coordinates), ("values", values)):
            if not torch.where(mask.unsqueeze(-1), tensor, 0).isfinite().all():
                raise ValueError(f"{name} must be finite: set `mask` to False at samples that are not.")
        return mask


def left_aligned_rows(counts: torch.Tensor, length: int) -> tuple[torch.Tensor, RowLayout]:
    """Lay out rows whose first `counts` `[B]` of `length` elements are real.

    Returns:
        (bool `[B, length]`, True where real; the layout).
    """
    positions = torch.arange(length, device=counts.device).expand(len(counts), -1)
    real = positions < counts.unsqueeze(1)
    return real, RowLayout(None, None, None if bool(real.all()) else counts, positions, positions, None)


@torch.no_grad()
def curve_order(box: Box, coordinates: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the order of the samples along the curve, int64 `[B, N]`, hidden samples last.

    Samples with equal curve keys are ordered by coordinates and values: the order of the input does not matter.
    """
    keys = box.keys(coordinates).masked_fill(~mask, LAST_KEY)
    ordered, order = keys.sort(dim=1, stable=True)
    if not (ordered[:, 1:] == ordered[:, :-1]).logical_and(ordered[:, 1:] < LAST_KEY).any():
        return order
    order = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    for column in (*values.unbind(-1)[::-1], *coordinates.unbind(-1)[::-1], keys):
        order = order.gather(1, column.gather(1, order).argsort(dim=1, stable=True))
    return order


class DFNForFieldReconstruction(DFNFieldPreTrainedModel):
    """Reconstruction of a field's values at any coordinates (docs/models/dfn.md, Fields).

    Example:
        >>> import torch
        >>> from dfn_hf import DFNConfig, DFNForFieldReconstruction
        >>> config = DFNConfig(hidden_size=16, num_hidden_layers=1, num_entities=8, entity_sampling="adaptive")
        >>> model = DFNForFieldReconstruction(config).eval()
        >>> coordinates, values = torch.rand(1, 100, 2) * 2 - 1, torch.randn(1, 100, 1)
        >>> model(coordinates, values, query_coordinates=torch.zeros(1, 5, 2)).reconstruction.shape
        torch.Size([1, 5, 1])
    """

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        self.model = DFNFieldModel(config)
        self.decoder = GaussianInterpolation(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        coordinates: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        query_coordinates: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_entities: bool = False,
        **kwargs,
    ) -> DFNFieldReconstructionOutput:
        """
        Args:
            coordinates, values, mask, output_entities: see `DFNFieldModel.forward`.
            query_coordinates: `[B, Q, c]`; None for the samples' coordinates, Q = N.
            labels: `[B, Q, v]`, target values; NaN is ignored. Without `labels` and `query_coordinates`, the targets
                are the values that `mask` hides (masked-field pre-training); pad hidden values with NaN.

        Raises:
            ValueError: shapes contradict each other, a row has no sample, or an input is not finite.
        """
        outputs: DFNFieldModelOutput = self.model(coordinates, values, mask, output_entities)
        self._check_queries(coordinates, query_coordinates, labels)
        if query_coordinates is None and labels is None and mask is not None and not bool(mask.all()):
            labels = values.masked_fill(mask.bool().unsqueeze(-1), math.nan)
        real, dtype = outputs.entity_mask, outputs.entity_coordinates.dtype
        if real is None:
            real = torch.ones_like(outputs.entity_weights, dtype=torch.bool)
        if mask is None:
            mask = torch.ones_like(coordinates[..., 0], dtype=torch.bool)
        reconstruction = self.decoder(
            None if query_coordinates is None else query_coordinates.to(dtype),
            outputs.last_hidden_state,
            outputs.entity_coordinates,
            outputs.entity_scales,
            outputs.entity_values,
            real,
            coordinates.to(dtype).nan_to_num(0.0, 0.0, 0.0),  # hidden samples may have any
            torch.where(mask.bool().unsqueeze(-1), values, 0).to(dtype),
            mask.bool(),
        )
        return DFNFieldReconstructionOutput(
            loss=None if labels is None else mean_squared_error(reconstruction, labels),
            reconstruction=reconstruction,
            last_hidden_state=outputs.last_hidden_state,
            entity_coordinates=outputs.entity_coordinates,
            entity_weights=outputs.entity_weights,
            entity_mask=outputs.entity_mask,
            density=outputs.density,
            entities=outputs.entities,
        )

    def _check_queries(self, coordinates, query_coordinates, labels) -> None:
        """Raise a ValueError if queries or labels have a wrong shape or queries are not finite."""
        queries = coordinates if query_coordinates is None else query_coordinates
        if queries.dim() != 3 or queries.shape[::2] != coordinates.shape[::2]:
            raise ValueError(
                "query_coordinates must be [batch, queries, coordinate_dim] with the batch and `coordinate_dim` of "
                f"coordinates {list(coordinates.shape)}, got {list(queries.shape)}."
            )
        if query_coordinates is not None and not query_coordinates.isfinite().all():
            raise ValueError("query_coordinates must be finite: remove those that are not, or set them to 0.")
        expected = [*queries.shape[:2], self.config.value_dim]
        if labels is not None and list(labels.shape) != expected:
            raise ValueError(f"labels must be [batch, queries, value_dim] = {expected}, got {list(labels.shape)}.")


def mean_squared_error(reconstruction: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over the labels that are not NaN; 0 if all are."""
    scored = ~labels.isnan()
    errors = (reconstruction - torch.where(scored, labels, 0).to(reconstruction.dtype)).square()
    return (errors * scored).sum() / scored.sum().clamp(min=1)


__all__ = ["DFNFieldModel", "DFNForFieldReconstruction"]
