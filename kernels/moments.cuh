// One voxel's baseline arithmetic. The numba twin, rtfmri/backends/cpu/moments.py, has the same
// operations in the same order, so that both give the same bits (without FMA contraction).
#pragma once
#include "common.cuh"

struct VoxelMoments { float mean, variance; };
struct VoxelSubtraction { float difference, psc, z; };
struct VoxelContrast { float effect, psc, t; };

// x against the moments of the volumes before it.
RTFMRI_FN VoxelSubtraction subtract_voxel(float x, VoxelMoments m, float bessel)
{
    const float d = x - m.mean;
    const float variance = m.variance * bessel;
    return {d, m.mean > 0.0f ? 100.0f * d / m.mean : 0.0f, variance > 0.0f ? d / sqrtf(variance) : 0.0f};
}

// Weighted update; gain = 1/n gives the moments of n values (Welford 1962; West 1979, CACM 22:532).
RTFMRI_FN VoxelMoments fold_voxel(float x, VoxelMoments m, float gain)
{
    const float d = x - m.mean;
    const float step = gain * d;
    return {m.mean + step, (1.0f - gain) * (m.variance + step * d)};
}

// x takes the place of the oldest of 1/gain values.
RTFMRI_FN VoxelMoments replace_voxel(float x, float oldest, VoxelMoments m, float gain)
{
    const float step = gain * (x - oldest);
    const float mean = m.mean + step;
    const float variance = m.variance + step * ((x - mean) + (oldest - m.mean));
    return {mean, variance > 0.0f ? variance : 0.0f};
}

// Welch 1947, Biometrika 34:28, from population variances: s^2/n = variance / (n - 1).
RTFMRI_FN VoxelContrast contrast_voxel(VoxelMoments a, float per_dof_a, VoxelMoments b, float per_dof_b)
{
    const float effect = a.mean - b.mean;
    const float squared_error = a.variance * per_dof_a + b.variance * per_dof_b;
    return {effect, b.mean > 0.0f ? 100.0f * effect / b.mean : 0.0f,
            squared_error > 0.0f ? effect / sqrtf(squared_error) : 0.0f};
}
