// Separable convolution with symmetric filters, one axis a launch. Edges are mirrored about the outer faces of the outer
// voxels (d c b a | a b c d | d c b a), which scipy calls "reflect".
#include "common.cuh"

RTFMRI_FN int mirror(int i, int n)
{
    i %= 2 * n;
    if (i < 0) i += 2 * n;
    return i < n ? i : 2 * n - 1 - i;
}

// Neighbours along the axis lie stride apart, and it has n of them; every step-th gets a sum, n_out of them. taps:
// (radius + 1,), the middle first.
extern "C" __global__ void smooth_axis(const Voxel* __restrict__ volume, const float* __restrict__ taps,
                                       float* __restrict__ out, int radius, int stride, int n, int step, int n_out,
                                       int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const int line = v / stride, at = line % n_out * step;
    const Voxel* first = volume + (line / n_out * n * stride + v % stride);
    float sum = taps[0] * (float)first[at * stride];
    for (int k = 1; k <= radius; ++k) {
        const int before = at - k < 0 ? mirror(at - k, n) : at - k;
        const int after = at + k < n ? at + k : mirror(at + k, n);
        sum += taps[k] * ((float)first[before * stride] + (float)first[after * stride]);
    }
    out[v] = sum;
}
