"""The general linear model on the GPU: launches ``kernels/glm.cu``."""

import numpy as np

from rtfmri.backends import Array, Contrasts, DesignState, DesignStep, GlmState
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class GlmOperations(Launcher):
    """The operations of `rtfmri.backends.Backend` on the general linear model."""

    def update_design(
        self,
        known: Array,
        pose: Array,
        whitening: Array,
        contrasts: Contrasts,
        state: DesignState,
        step: DesignStep,
        row: Array,
        *,
        motion_at: int,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.update_design`."""
        n_classes, n_rows, p = step.directions.shape
        sizes = (np.int32(n) for n in (motion_at, p, n_rows, contrasts.kinds.size))
        gate = self._gate(usable)
        given = (known, pose, whitening, contrasts.weights, contrasts.offsets, gate, row)
        self._launch(
            "glm.cu", "update_design", np.float32, n_classes, *given, *state, *step, *sizes
        )

    def update_glm(
        self,
        volume: Array,
        state: GlmState,
        contrasts: Contrasts,
        step: DesignStep,
        statistics: Array,
        *,
        whitened: bool,
        first_column: int,
        usable: Array | None = None,
    ) -> None:
        """See `rtfmri.backends.Backend.update_glm`."""
        _, n_rows, p = step.directions.shape
        n = volume.size
        numbers = (whitened, p, n_rows, contrasts.kinds.size, first_column, n)
        told = (step.rotations, step.directions, step.scalars)
        gate = self._gate(usable)
        args = (*state[:6], *told, contrasts.offsets, contrasts.kinds, gate, statistics)
        sizes = (np.int32(number) for number in numbers)
        self._launch("glm.cu", "update_glm", np.float32, blocks_for(n), volume, *args, *sizes)
