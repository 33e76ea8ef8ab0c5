// Volumes sampled where a rigid motion takes the voxels of a region, and voxels copied from place to place. One thread a
// voxel of the region; neighbours come from the caches.
#include "interpolate.cuh"

// m: 12 numbers, voxel to place, row by row; the sums for a line of voxels are double, the same for all its voxels.
template <class Kernel>
RTFMRI_FN float resliced_voxel(const Voxel* volume, int nx, int ny, int nz, const double* m, int source)
{
    const int x = source % nx, y = source / nx % ny, z = source / nx / ny;
    const Place px = place_voxel((float)(m[1] * y + m[2] * z + m[3]), (float)(m[0] - 1.0), x, x, nx);
    const Place py = place_voxel((float)((m[5] - 1.0) * y + m[6] * z + m[7]), (float)m[4], x, y, ny);
    const Place pz = place_voxel((float)(m[9] * y + (m[10] - 1.0) * z + m[11]), (float)m[8], x, z, nz);
    return interpolate<Kernel>(volume, nx, ny, nz, px, py, pz);
}

extern "C" __global__ void reslice_trilinear(const Voxel* __restrict__ volume, const int* __restrict__ sources,
                                             const int* __restrict__ targets, const double* __restrict__ matrix,
                                             float* __restrict__ out, int nx, int ny, int nz, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    out[targets[v]] = resliced_voxel<Linear>(volume, nx, ny, nz, matrix, sources[v]);
}

extern "C" __global__ void reslice_catmull_rom(const Voxel* __restrict__ volume, const int* __restrict__ sources,
                                               const int* __restrict__ targets, const double* __restrict__ matrix,
                                               float* __restrict__ out, int nx, int ny, int nz, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    out[targets[v]] = resliced_voxel<CatmullRom>(volume, nx, ny, nz, matrix, sources[v]);
}

// volume: cubic B-spline coefficients.
extern "C" __global__ void reslice_bspline(const Voxel* __restrict__ volume, const int* __restrict__ sources,
                                           const int* __restrict__ targets, const double* __restrict__ matrix,
                                           float* __restrict__ out, int nx, int ny, int nz, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    out[targets[v]] = resliced_voxel<BSpline>(volume, nx, ny, nz, matrix, sources[v]);
}

extern "C" __global__ void gather(const Voxel* __restrict__ volume, const int* __restrict__ sources,
                                  const int* __restrict__ targets, float* __restrict__ out, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    out[targets[v]] = (float)volume[sources[v]];
}

// scale: (n_voxels,), in the order of the region.
extern "C" __global__ void gather_scaled(const Voxel* __restrict__ volume, const int* __restrict__ sources,
                                         const int* __restrict__ targets, const float* __restrict__ scale,
                                         float* __restrict__ out, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    out[targets[v]] = (float)volume[sources[v]] * scale[v];
}
