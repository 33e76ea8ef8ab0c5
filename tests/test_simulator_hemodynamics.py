import numpy as np
import pytest

from rtfmri.errors import ConfigError
from rtfmri.simulator.hemodynamics import Balloon, bold_response

STEP_S = 0.05
ONSET_S = 10.0


def _block(duration_s: float, end_s: float = 80.0, step_s: float = STEP_S) -> np.ndarray:
    time_s = np.arange(round(end_s / step_s)) * step_s
    return ((time_s >= ONSET_S) & (time_s < ONSET_S + duration_s)).astype(np.float64)


def _since_onset(response: np.ndarray) -> np.ndarray:
    return np.arange(len(response)) * STEP_S - ONSET_S


def test_block_has_dip_plateau_and_undershoot():
    response = bold_response(_block(20.0), STEP_S)
    time_s = _since_onset(response)
    dip = response[(time_s > 0) & (time_s < 4)].min()
    assert -0.005 < dip < -0.0005
    assert response[(time_s > 8) & (time_s < 20)].min() > 0.02
    assert response.max() < 0.03
    undershoot = response[time_s > 25].min()
    assert -0.3 * response.max() < undershoot < -0.1 * response.max()


def test_brief_stimulus_peaks_after_five_to_six_seconds():
    response = bold_response(_block(1.0), STEP_S)
    assert 5 <= _since_onset(response)[response.argmax()] <= 6


def test_dip_comes_from_metabolism_ahead_of_flow():
    response = bold_response(_block(20.0), STEP_S, Balloon(metabolism_lead_s=0.0))
    time_s = _since_onset(response)
    assert response[(time_s > 0) & (time_s < 4)].min() == pytest.approx(0, abs=1e-5)


def test_rest_stays_at_exactly_zero():
    assert not bold_response(np.zeros(500), STEP_S).any()
    response = bold_response(_block(20.0), STEP_S)
    assert not response[_since_onset(response) <= 0].any()


def test_long_stimulus_reaches_the_steady_state():
    p = Balloon()
    response = bold_response(np.ones(round(400 / STEP_S)), STEP_S)
    volume = p.flow_peak**p.stiffness
    deoxy = (1 + (p.flow_peak - 1) / p.coupling) * volume / p.flow_peak
    expected = p.blood_volume * (p.deoxy_weight * (1 - deoxy) - p.volume_weight * (1 - volume))
    # The slowest mode decays with alpha (transit + viscoelastic) = 8.8 s: nothing is left of it.
    assert response[-1] == pytest.approx(expected, abs=1e-9)


def test_error_falls_with_the_square_of_the_step():
    def sampled(step_s: float) -> np.ndarray:
        every = round(0.2 / step_s)
        return bold_response(_block(20.0, 60.0, step_s), step_s)[::every]

    finest = sampled(0.0125)
    coarse, fine = (np.abs(sampled(step_s) - finest).max() for step_s in (0.2, 0.1))
    assert 3 < coarse / fine < 5
    assert np.abs(sampled(STEP_S) - finest).max() < 1e-3 * finest.max()


def test_agrees_with_glovers_response():
    from nilearn.glm.first_level.hemodynamic_models import glover_hrf

    stimulus = _block(20.0)
    hrf = glover_hrf(STEP_S, oversampling=1, time_length=32.0)
    expected = np.convolve(stimulus, hrf)[: len(stimulus)]
    assert np.corrcoef(bold_response(stimulus, STEP_S), expected)[0, 1] > 0.93


def test_empty_stimulus_gives_an_empty_response():
    assert bold_response(np.zeros(0), STEP_S).shape == (0,)


@pytest.mark.parametrize("step_s", [0.0, -0.1, 0.5, np.nan])
def test_step_must_resolve_the_model(step_s):
    with pytest.raises(ConfigError, match=r"step_s must be above 0 and at most 0\.25 s, got"):
        bold_response(np.zeros(10), step_s)
