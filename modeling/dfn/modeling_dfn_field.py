"""Fields: values at coordinates, sampled into entities that flow, and read back at any coordinates.

Samples lie along a Hilbert curve, so that a field is a row like any other (`padding.py`); entities are spans of it
(`field_sampling.py`), and DFN layers that are not causal run over them.

Shape letters: B batch, N samples, E entities, Q queries, S pieces of samples, c coordinate_dim, v value_dim.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from ..modules.rms_norm import RMSNorm
from ..modules.row_layout import RowLayout
from ..ops.hilbert_curve import KEY_BITS, LAST_KEY, Box
from .configuration_dfn import DFNConfig
from .field_interpolation import NUM_WAVES, FourierBasis, GaussianInterpolation, take
from .field_sampling import FlowDensity, PlacedEntities, Spans, cut, fill, place_entities
from .layers import DFNLayer, Entities, unit_variance_linear
from .modeling_dfn import DFNPreTrainedModel

NUM_OCTAVES = 6  # of the frequencies in which an entity knows where it lies


@dataclass
class DFNFieldModelOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: `[B, E, hidden_size]`, the entities in the order of the curve.
        entity_coordinates: `[B, E, c]`, the mean of the samples' coordinates.
        entity_weights: `[B, E]`, log mass: the log of how many samples it stands for.
        entity_mask: bool `[B, E]`, False where a row has fewer entities than another; None if all have as many.
        entity_values: `[B, E, v]`, the mean of the samples' values.
        entity_scales: `[B, E, 1]`, the distance over which it reaches.
        density: `[B, N]`, entities per sample, in the order of the input; 0 where no sample is given.
        entities: per layer over entities `dfn_layer.Entities`; with `output_entities`.
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
        loss: scalar, mean squared error over all values that are scored.
        reconstruction: `[B, Q, v]`.
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
    """Samples may be given in any number and order: there is nothing to count tokens by."""

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
        if isinstance(module, (FlowDensity, GaussianInterpolation)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class DFNFieldModel(DFNFieldPreTrainedModel):
    """Samples of a field → layers over samples → entities → layers over entities → norm."""

    def __init__(self, config: DFNConfig):
        super().__init__(config)
        c = config.coordinate_dim
        if c > KEY_BITS:
            raise ValueError(f"`coordinate_dim` must be at most {KEY_BITS} for a field, got {c}.")
        both_sides = copy.copy(config)
        both_sides.is_causal = False
        both_sides.memory_slots, both_sides.readout_window = 0, 1
        of_samples = both_sides.of_sample_layers()
        self.value_proj = unit_variance_linear(config.value_dim + 1, config.hidden_size)
        self.sample_layers = nn.ModuleList(
            [DFNLayer(of_samples, layer_idx, c) for layer_idx in range(config.num_sample_layers)]
        )
        self.density = FlowDensity(config) if config.entity_sampling == "adaptive" else None
        self.waves = self.moment_proj = None  # a sample that is an entity has no moments
        if config.entity_sampling != "token":
            self.waves = FourierBasis(config)
            self.moment_proj = nn.Linear(2 * NUM_WAVES * config.value_dim, config.hidden_size, bias=False)
            self.moment_proj.init_std = 1.0
        self.place_proj = unit_variance_linear(2 * c * NUM_OCTAVES, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                DFNLayer(both_sides, config.num_sample_layers + layer_idx, c)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
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
            coordinates: `[B, N, c]`, in units in which all axes count the same; [−1, 1] by custom.
            values: `[B, N, v]`, of order 1.
            mask: bool `[B, N]`, True where a sample is given; everywhere if None.
            output_entities: return positions, influence and neighbours of every layer over entities.

        Raises:
            ValueError: inputs that do not fit together or are not finite; the message names them and the remedy.
        """
        mask = self._check(coordinates, values, mask)
        # Half precision would leave an axis a few hundred places.
        dtype = torch.promote_types(self.dtype, torch.float32)
        coordinates, values = (torch.where(mask.unsqueeze(-1), x, 0).to(dtype) for x in (coordinates, values))
        box = Box.around(coordinates, mask)
        counts = mask.sum(dim=1)
        order = curve_order(box, coordinates, values, mask)[:, : int(counts.max())]  # hidden ones lie behind
        coordinates, values = (take(x, order.unsqueeze(-1)).squeeze(2) for x in (coordinates, values))
        real, rows = rows_of(counts, order.shape[1])
        states = self.value_proj(F.pad(values, (0, 1), value=1.0).to(self.value_proj.weight.dtype))
        density = self._fill(states, coordinates, real, box)
        for layer in self.sample_layers:
            states = layer(states, None, rows, coordinates)[0]
        spans = cut(density, real, min(self._most_entities(), order.shape[1]), dtype)
        entities = place_entities(spans, coordinates, values, box)
        states = self._pool(spans, entities, states, coordinates, values)
        _, rows = rows_of(spans.real.sum(dim=1), spans.real.shape[1])
        seen = []
        for layer in self.layers:
            states, _, _, flowed, _ = layer(states, None, rows, entities.coordinates, entities.log_mass)
            if output_entities:
                seen.append(flowed)
        return DFNFieldModelOutput(
            last_hidden_state=self.norm(states) * spans.real.unsqueeze(-1),
            entity_coordinates=entities.coordinates,
            entity_weights=entities.log_mass,
            entity_mask=None if bool(spans.real.all()) else spans.real,
            entity_values=entities.values,
            entity_scales=entities.scale,
            density=density.new_zeros(mask.shape).scatter(1, order, density).to(dtype),
            entities=tuple(seen) if output_entities else None,
        )

    def _most_entities(self) -> int:
        return self.config.num_entities if self.config.entity_sampling != "token" else 2**62

    def _fill(self, states, coordinates, real, box) -> torch.Tensor:
        """Entities per sample, float64 `[B, N]`."""
        if self.config.entity_sampling == "token":
            return real.double()
        density = real.double() if self.density is None else self.density(states, coordinates, real, box)
        return fill(density, real, self.config.num_entities)

    def _pool(self, spans: Spans, entities: PlacedEntities, states, coordinates, values) -> torch.Tensor:
        """States of entities: the mean of their samples', the moments of values with waves, and where they lie."""
        pooled = spans.sums(spans.of_samples(states) * spans.share.unsqueeze(-1))
        if self.waves is not None:
            offsets = spans.of_samples(coordinates) - spans.of_entities(entities.coordinates)
            waves = self.waves(offsets / spans.of_entities(entities.scale))
            left = spans.of_samples(values) - spans.of_entities(entities.values)
            moments = spans.means((waves.unsqueeze(-1) * left.unsqueeze(2)).flatten(2))
            pooled = pooled + self.moment_proj(moments.to(states.dtype))
        octaves = 2.0 ** torch.arange(NUM_OCTAVES, device=pooled.device, dtype=pooled.dtype)
        angles = (entities.coordinates.unsqueeze(-1) * math.pi * octaves).flatten(2)
        place = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return (pooled + self.place_proj(place.to(states.dtype))).to(states.dtype)

    def _check(self, coordinates, values, mask) -> torch.Tensor:
        """The mask of the samples that are given, bool `[B, N]`."""
        config = self.config
        for name, tensor, field in (("coordinates", coordinates, "coordinate_dim"), ("values", values, "value_dim")):
            if tensor.dim() != 3 or tensor.shape[-1] != getattr(config, field):
                raise ValueError(
                    f"{name} must be [batch, samples, {getattr(config, field)}], the last by `{field}`; got "
                    f"{list(tensor.shape)}."
                )
        if coordinates.shape[:2] != values.shape[:2]:
            raise ValueError(
                f"coordinates and values must have as many samples: got {list(coordinates.shape)} and "
                f"{list(values.shape)}."
            )
        if mask is None:
            mask = torch.ones(coordinates.shape[:2], dtype=torch.bool, device=coordinates.device)
        if mask.shape != coordinates.shape[:2]:
            raise ValueError(f"mask must be [batch, samples] = {list(coordinates.shape[:2])}, got {list(mask.shape)}.")
        mask = mask.bool()
        if not mask.any(dim=1).all():
            raise ValueError("mask hides every sample of a row, or there is none: give at least one of each field.")
        for name, tensor in (("coordinates", coordinates), ("values", values)):
            if not torch.where(mask.unsqueeze(-1), tensor, 0).isfinite().all():
                raise ValueError(f"{name} must be finite: hide samples that have none with `mask`.")
        return mask


def rows_of(counts: torch.Tensor, length: int) -> tuple[torch.Tensor, RowLayout]:
    """Left-aligned rows that hold the first `counts` `[B]` of `length` places: which do, and the rows."""
    places = torch.arange(length, device=counts.device).expand(len(counts), -1)
    real = places < counts.unsqueeze(1)
    return real, RowLayout(None, None, None if bool(real.all()) else counts, places, places, None)


@torch.no_grad()
def curve_order(box: Box, coordinates: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Order of the samples along the curve, int64 `[B, N]`, hidden ones last; at one place by what they hold."""
    keys = box.keys(coordinates).masked_fill(~mask, LAST_KEY)
    ordered, order = keys.sort(dim=1, stable=True)
    if not (ordered[:, 1:] == ordered[:, :-1]).logical_and(ordered[:, 1:] < LAST_KEY).any():
        return order
    order = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    for column in (*values.unbind(-1)[::-1], *coordinates.unbind(-1)[::-1], keys):
        order = order.gather(1, column.gather(1, order).argsort(dim=1, stable=True))
    return order


class DFNForFieldReconstruction(DFNFieldPreTrainedModel):
    """A field's values at any coordinates, from entities sampled where it turns (architecture, "Fields")."""

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
            query_coordinates: `[B, Q, c]`, where values are asked for; the samples' coordinates if None.
            labels: `[B, Q, v]`, what they should be; NaN is not scored. If None, and the samples' coordinates are
                asked for, the values that `mask` hides: masked-field pre-training. A value that is NaN is padding.

        Raises:
            ValueError: inputs that do not fit together; the message names them and the remedy.
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
            coordinates.to(dtype).nan_to_num(0.0, 0.0, 0.0),  # hidden ones may be anything
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
        asked = coordinates if query_coordinates is None else query_coordinates
        if asked.dim() != 3 or asked.shape[::2] != coordinates.shape[::2]:
            raise ValueError(
                f"query_coordinates must be [batch, queries, coordinate_dim] with the batch and `coordinate_dim` of "
                f"coordinates {list(coordinates.shape)}, got {list(asked.shape)}."
            )
        if query_coordinates is not None and not query_coordinates.isfinite().all():
            raise ValueError("query_coordinates must be finite: leave out, or set to 0, those that are not.")
        expected = [*asked.shape[:2], self.config.value_dim]
        if labels is not None and list(labels.shape) != expected:
            raise ValueError(f"labels must be [batch, queries, value_dim] = {expected}, got {list(labels.shape)}.")


def mean_squared_error(reconstruction: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the labels that are not NaN, of which there must be one."""
    scored = ~labels.isnan()
    errors = (reconstruction - torch.where(scored, labels, 0).to(reconstruction.dtype)).square()
    return (errors * scored).sum() / scored.sum().clamp(min=1)


__all__ = ["DFNFieldModel", "DFNForFieldReconstruction"]
