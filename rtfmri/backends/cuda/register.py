"""Rigid registration on the GPU: launches ``kernels/register.cu``, once a Gauss-Newton step."""

import numpy as np

from rtfmri.backends import Array, Pose, Shape, Template
from rtfmri.backends.cuda._launch import Launcher, blocks_for


class RegisterOperations(Launcher):
    """The operation of `rtfmri.backends.Backend` that finds where the head is."""

    def register(
        self,
        coefficients: Array,
        shape: Shape,
        template: Template,
        pose: Pose,
        *,
        max_iterations: int,
        tolerance_mm: float,
    ) -> None:
        """See `rtfmri.backends.Backend.register`.

        Every step is launched; those after the last one needed return at once.
        """
        n_points = template.values.size
        sizes = (np.int32(n) for n in shape)
        arrays = (coefficients, *sizes, *template, *pose, np.int32(n_points))
        for iteration in range(max_iterations):
            last = np.int32(iteration + 1 == max_iterations)
            args = (*arrays, np.int32(iteration), last, np.float64(tolerance_mm))
            n_blocks = blocks_for(n_points)
            self._launch("register.cu", "register_step", np.float32, n_blocks, *args)
