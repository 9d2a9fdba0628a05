"""The benchmarks of fields with small sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfn_hf.benchmarks.baselines.models import count_parameters
from dfn_hf.benchmarks.harness.environment import without_isolation
from dfn_hf.benchmarks.quality.fields import (
    FieldSettings,
    Siren,
    _resample,
    draw_clip,
    field_runs,
    fields_table,
    load_array,
    measure_field,
    run_fields,
)
from dfn_hf.benchmarks.speed.field_speed import FieldSpeedSettings, field_speed_table, run_field_speed

TINY = FieldSettings(side=16, steps=1, hidden_size=16, num_hidden_layers=1, intermediate_size=16)


def test_methods_are_measured_and_stored(tmp_path):
    runs = [
        replace(TINY, field="elevation", method=method) for method in ("adaptive", "uniform", "siren", "resampling")
    ]
    finished = run_fields(runs, tmp_path / "fields.csv")
    assert finished == run_fields(runs, tmp_path / "fields.csv", report=pytest.fail)
    adaptive, uniform, siren, resampling = (result for _, result in finished)
    assert adaptive.entities == uniform.entities == 16 and siren.entities is None and resampling.parameters == 0
    assert siren.parameters == pytest.approx(adaptive.parameters, rel=0.05)
    assert -1 <= adaptive.correlation <= 1 and uniform.correlation is None
    assert fields_table(finished).count("elevation") == 4


def test_photographs_are_reconstructed_from_a_quarter():
    settings = replace(TINY, side=64, method="pre-trained", pretraining_steps=1)
    result = measure_field(settings)
    assert 900 < result.samples < 1150 and result.psnr_db > 10
    again = replace(settings, seed=1), replace(result, psnr_db=result.psnr_db + 2)
    (line,) = fields_table([(settings, result), again]).splitlines()[2:]
    assert "| 1 + 1 " in line and "| 2     |" in line and f"{result.psnr_db + 1:.1f} ± 1.0" in line
    assert {run.seed for run in field_runs(TINY, ["camera"]) if run.method == "pre-trained"} == {0, 1, 2}


def test_a_clip_has_moving_objects_and_a_static_background():
    clip = draw_clip(4, 20, 20)
    moving = np.abs(np.diff(clip, axis=0)).max(axis=0) > 0.1
    assert np.abs(clip).max() <= 1 and 0.1 < moving.mean() < 0.7
    assert {run.method for run in field_runs(TINY, ["clip"])} == {"adaptive", "frames"}


def test_resampling_preserves_a_linear_field():
    values = torch.linspace(-1, 1, 64).expand(64, 64)
    assert (_resample(values, 2, 16) - values).abs()[:, 2:-2].max() < 1e-5
    assert _resample(values[0, :, None], 1, 16).shape == (64, 1)


def test_a_siren_matches_the_number_of_parameters():
    assert count_parameters(Siren(120_000, 2, 1)) == pytest.approx(120_000, rel=0.02)


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="nowhere"):
        load_array(replace(TINY, field="nowhere"))
    with pytest.raises(ValueError, match="recording"):
        load_array(replace(TINY, field="speech"))
    with pytest.raises(ValueError, match="magic"):
        measure_field(replace(TINY, method="magic"))


def test_field_speed_has_a_slope(tmp_path):
    runs = [FieldSpeedSettings(side=side, hidden_size=16, num_hidden_layers=1) for side in (8, 32)]
    with without_isolation():
        finished = run_field_speed(runs, tmp_path / "speed.csv")
    assert "slope" in field_speed_table(finished) and "1,024" in field_speed_table(finished)
    assert "slope" not in field_speed_table(finished[:1])
