"""From neural activity to the BOLD signal: the balloon (Windkessel) model.

Blood flow answers neural activity within seconds and overshoots what the tissue's oxygen
metabolism needs. The veins downstream swell like a balloon and relax slowly. Three phases follow:
an initial dip (metabolism is ahead of flow), a positive response (flow outruns metabolism) and a
post-stimulus undershoot (flow is back, the balloon is not).

Model: Buxton, Wong & Frank 1998 (MRM 39:855), in the form of Buxton, Uludag, Dubowitz & Liu 2004
(NeuroImage 23:S220), here called B2004, without its neural adaptation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtfmri.errors import ConfigError

MAX_STEP_S = 0.25
"""Steps above a tenth of the shortest time constant are refused."""


@dataclass(frozen=True, slots=True)
class Balloon:
    """Parameters of the model; at rest, flow, metabolism, volume and deoxyhaemoglobin are 1."""

    flow_peak: float = 2.0
    """Steady flow under full stimulation, relative to rest: chosen so that pure grey matter
    reaches 2 to 3 %. Flow in motor cortex rises with the rate of movement (Sadato 1996, JCBFM
    16:23)."""
    coupling: float = 3.0
    """n: fractional change of flow over that of metabolism, about 3 in primary motor cortex
    (Jezzard 2006, Proc. ISMRM 14:2761); B2004 has 2 to 3."""
    response_fwhm_s: float = 3.0
    """Width of the impulse response of flow and metabolism. B2004 has 4 s; with 3 s the response
    to a brief stimulus peaks 5 to 6 s after it, as measured (Glover 1999, NeuroImage 9:416)."""
    metabolism_lead_s: float = 1.0
    """Metabolism is this much ahead of flow, which makes the initial dip; B2004 has 0 to 2 s."""
    transit_s: float = 2.0
    """Mean transit time through the venous balloon at rest, 1 to 3 s (Buxton 1998; B2004)."""
    viscoelastic_s: float = 20.0
    """How slowly the balloon follows the flow, 0 to 30 s (B2004): makes the undershoot last."""
    stiffness: float = 0.4
    """alpha: volume = flow**alpha in the steady state (Grubb 1974, Stroke 5:630; B2004)."""
    blood_volume: float = 0.03
    """V0: fraction of the voxel that is venous blood at rest (B2004)."""
    deoxy_weight: float = 3.4
    """a1: signal lost to deoxyhaemoglobin (B2004, 1.5 T; lower bound for 3 T)."""
    volume_weight: float = 1.0
    """a2: signal lost to blood volume (B2004)."""


def bold_response(
    stimulus: NDArray[np.float64], step_s: float, balloon: Balloon | None = None
) -> NDArray[np.float64]:
    """Return the BOLD signal change that *stimulus* causes.

    Parameters
    ----------
    stimulus : (n,) float64
        Neural activity, 0 at rest and 1 under full stimulation; value i holds from time
        ``i * step_s`` for one step.
    step_s : float
        Step of the integration, above 0 and at most 0.25 s; the error falls with its square.
    balloon : Balloon, optional
        Parameters.

    Returns
    -------
    (n,) float64
        dS/S as a fraction, at times ``i * step_s``.

    Raises
    ------
    ConfigError
        If *step_s* breaks its rule.

    Notes
    -----
    With flow f, metabolism m, volume v and deoxyhaemoglobin q, relative to rest (B2004):

    - impulse response of f and m: ``(t/b)**3 exp(-t/b) / (6 b)``, FWHM 4.13 b, f later than m;
    - ``dv/dt = (f - v**(1/alpha)) / (transit + viscoelastic)``;
    - ``dq/dt = (m - f_out q/v) / transit``, where ``f_out = f - transit dv/dt``;
    - ``dS/S = V0 (a1 (1 - q) - a2 (1 - v))``.

    Heun's method; the convolution with the impulse response is exact.
    """
    if not 0 < step_s <= MAX_STEP_S:
        raise ConfigError(f"step_s must be above 0 and at most {MAX_STEP_S} s, got {step_s}")
    p = balloon or Balloon()
    drive = _respond(stimulus, step_s, p, delay_s=0.0)
    late_drive = _respond(stimulus, step_s, p, delay_s=p.metabolism_lead_s)
    metabolism = (1 + (p.flow_peak - 1) / p.coupling * drive).tolist()
    flow = (1 + (p.flow_peak - 1) * late_drive).tolist()

    def slopes(v: float, q: float, f: float, m: float) -> tuple[float, float]:
        dv = (f - v ** (1 / p.stiffness)) / (p.transit_s + p.viscoelastic_s)
        return dv, (m - (f - p.transit_s * dv) * q / v) / p.transit_s

    v = q = 1.0
    states = [(v, q)]
    for i in range(1, len(flow)):
        dv, dq = slopes(v, q, flow[i - 1], metabolism[i - 1])
        end_dv, end_dq = slopes(v + step_s * dv, q + step_s * dq, flow[i], metabolism[i])
        v += step_s * (dv + end_dv) / 2
        q += step_s * (dq + end_dq) / 2
        states.append((v, q))
    volume, deoxy = np.array(states[: len(flow)]).reshape(-1, 2).T
    return p.blood_volume * (p.deoxy_weight * (1 - deoxy) - p.volume_weight * (1 - volume))


def _respond(
    stimulus: NDArray[np.float64], step_s: float, p: Balloon, *, delay_s: float
) -> NDArray[np.float64]:
    """Convolve with the impulse response, integrated over each step in closed form."""
    from scipy.special import gammainc

    scale_s = p.response_fwhm_s / 4.13
    n_edges = int((delay_s + 30 * scale_s) / step_s) + 2
    edges_s = np.arange(n_edges) * step_s - delay_s
    weights = np.diff(gammainc(4, np.maximum(edges_s, 0) / scale_s))
    return np.convolve(np.concatenate([[0.0], stimulus]), weights)[: len(stimulus)]
