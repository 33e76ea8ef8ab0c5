// Weighted mean of a raw volume in each ROI: one block a ROI, sums in double, always in the same order.
#include "common.cuh"

#define ROI_THREADS 256

extern "C" __global__ void roi_means(const Voxel* __restrict__ volume, const int* __restrict__ offsets,
                                     const int* __restrict__ voxels, const float* __restrict__ weights,
                                     double* __restrict__ means)
{
    __shared__ double sums[ROI_THREADS];
    const int t = threadIdx.x;
    double sum = 0.0;
    for (int i = offsets[blockIdx.x] + t; i < offsets[blockIdx.x + 1]; i += ROI_THREADS)
        sum += (double)weights[i] * (double)volume[voxels[i]];
    sums[t] = sum;
    __syncthreads();
    for (int half = ROI_THREADS / 2; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    if (t == 0) means[blockIdx.x] = sums[0];
}
