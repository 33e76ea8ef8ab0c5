// Baseline moments and what is subtracted from them. One thread a voxel, coalesced, each array once.
#include "moments.cuh"

// usable, in all of these: (1,), 0 leaves the moments as they are.
// into_mean, into_variance may be mean, variance themselves: hence no __restrict__ on these four.
extern "C" __global__ void subtract(const Voxel* __restrict__ volume, const float* mean, const float* variance,
                                    float* __restrict__ difference, float* __restrict__ psc, float* __restrict__ z,
                                    float* into_mean, float* into_variance, const float* __restrict__ usable,
                                    float bessel, float gain, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const float x = (float)volume[v];
    const VoxelSubtraction s = subtract_voxel(x, {mean[v], variance[v]}, bessel);
    difference[v] = s.difference;
    psc[v] = s.psc;
    z[v] = s.z;
    if (gain > 0.0f && usable[0] > 0.0f) {
        const VoxelMoments m = fold_voxel(x, {into_mean[v], into_variance[v]}, gain);
        into_mean[v] = m.mean;
        into_variance[v] = m.variance;
    }
}

extern "C" __global__ void fold(const Voxel* __restrict__ volume, float* __restrict__ mean,
                                float* __restrict__ variance, const float* __restrict__ usable, float gain,
                                int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    if (!(usable[0] > 0.0f)) return;
    const VoxelMoments m = fold_voxel((float)volume[v], {mean[v], variance[v]}, gain);
    mean[v] = m.mean;
    variance[v] = m.variance;
}

// slot: the ring's row for this volume, (n_voxels,).
extern "C" __global__ void slide(const Voxel* __restrict__ volume, float* __restrict__ mean,
                                 float* __restrict__ variance, Voxel* __restrict__ slot,
                                 float* __restrict__ difference, float* __restrict__ psc, float* __restrict__ z,
                                 const float* __restrict__ usable, float bessel, float gain, int full, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const Voxel raw = volume[v];
    const float x = (float)raw;
    const VoxelMoments before = {mean[v], variance[v]};
    const VoxelSubtraction s = subtract_voxel(x, before, bessel);
    difference[v] = s.difference;
    psc[v] = s.psc;
    z[v] = s.z;
    if (!(usable[0] > 0.0f)) return;
    const VoxelMoments m = full ? replace_voxel(x, (float)slot[v], before, gain) : fold_voxel(x, before, gain);
    slot[v] = raw;
    mean[v] = m.mean;
    variance[v] = m.variance;
}

// Voxels start to stop, from all rows of ring (window, n_voxels).
extern "C" __global__ void refresh(const Voxel* __restrict__ ring, float* __restrict__ mean,
                                   float* __restrict__ variance, int window, int start, int stop, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(i, stop - start);
    const int v = start + i;
    const float first = (float)ring[v];
    float sum = 0.0f;
    for (int row = 1; row < window; ++row) sum += (float)ring[(long long)row * n_voxels + v] - first;
    const float m = first + sum / (float)window;
    float squares = 0.0f;
    for (int row = 0; row < window; ++row) {
        const float d = (float)ring[(long long)row * n_voxels + v] - m;
        squares += d * d;
    }
    mean[v] = m;
    variance[v] = squares / (float)window;
}

extern "C" __global__ void contrast(const float* __restrict__ mean_a, const float* __restrict__ variance_a,
                                    const float* __restrict__ mean_b, const float* __restrict__ variance_b,
                                    float* __restrict__ effect, float* __restrict__ psc, float* __restrict__ t,
                                    float per_dof_a, float per_dof_b, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const VoxelContrast c =
        contrast_voxel({mean_a[v], variance_a[v]}, per_dof_a, {mean_b[v], variance_b[v]}, per_dof_b);
    effect[v] = c.effect;
    psc[v] = c.psc;
    t[v] = c.t;
}
