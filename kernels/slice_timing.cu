// Interpolation in time, each slice with weights of its own: one thread a voxel, each array once.
#include "common.cuh"

// ring (n_before, n_voxels): the volumes before; row slot holds the oldest, and volume takes its place. weights
// (n_points, n_slices): of volume, then of the one before it, and so on; n_points is at most n_before + 1.
extern "C" __global__ void retime(const Voxel* __restrict__ volume, Voxel* __restrict__ ring,
                                  const float* __restrict__ weights, float* __restrict__ out, int n_before, int slot,
                                  int n_points, int n_slices, int n_plane, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const int z = v / n_plane;
    const Voxel newest = volume[v];
    float sum = weights[z] * (float)newest;
    int row = slot;
    for (int k = 1; k < n_points; ++k) {
        row = row > 0 ? row - 1 : n_before - 1;
        sum += weights[k * n_slices + z] * (float)ring[(long long)row * n_voxels + v];
    }
    ring[(long long)slot * n_voxels + v] = newest;
    out[v] = sum;
}
