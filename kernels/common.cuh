// What every kernel file needs. No toolkit header is included, so NVRTC needs no include path.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define RTFMRI_FN __host__ __device__ __forceinline__
#else
#define RTFMRI_FN inline
#endif

// The type of a raw voxel: short, unsigned short or float, set with -D by who compiles.
#ifndef RTFMRI_VOXEL
#define RTFMRI_VOXEL short
#endif
typedef RTFMRI_VOXEL Voxel;

// One voxel a thread; leaves the threads past the end.
#define RTFMRI_VOXEL_INDEX(v, n_voxels)                    \
    const int v = blockIdx.x * blockDim.x + threadIdx.x;   \
    if (v >= (n_voxels)) return
