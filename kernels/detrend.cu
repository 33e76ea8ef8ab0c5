// Drift taken out of a volume. One thread a voxel, coalesced, each array once. The numba twin,
// rtfmri/backends/cpu/detrend.py, has the same operations in the same order, so that both give the same bits.
#include "common.cuh"

// slow, level: means of the volumes before this one. gains: (2,), their weights of it; 0 leaves level alone.
extern "C" __global__ void remove_slow(const float* __restrict__ volume, float* __restrict__ slow,
                                       float* __restrict__ level, const double* __restrict__ gains,
                                       const float* __restrict__ usable, float* __restrict__ out, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const float x = volume[v], s = slow[v], l = level[v];
    out[v] = x - (s - l);
    if (!(usable[0] > 0.0f)) return;
    const float gain = (float)gains[0], level_gain = (float)gains[1];
    slow[v] = s + gain * (x - s);
    if (level_gain > 0.0f) level[v] = l + level_gain * (x - l);
}

// The part of a fit (glm.cu) that is scales[0] times directions, (p,), times coordinates, (p, n_voxels).
extern "C" __global__ void remove_fit(const float* __restrict__ volume, const float* __restrict__ coordinates,
                                      const float* __restrict__ directions, const double* __restrict__ scales,
                                      float* __restrict__ out, int p, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    float score = 0.0f;
    for (int i = 0; i < p; ++i) {
        const float weight = directions[i];
        if (weight == 0.0f) continue;  // all threads alike
        score += weight * coordinates[(long long)i * n_voxels + v];
    }
    out[v] = volume[v] - (float)scales[0] * score;
}
