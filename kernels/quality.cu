// Numbers that tell whether a volume is any good, and the moments of those that are. Sums are in double and always in
// the same order: a block's threads take every 256th voxel of its chunk, a tree adds the threads, and the last block to
// finish adds the chunks. chunks and counter are scratch; counter is 0 before and after.
#include "quality.cuh"

// Adds the values of a block's threads. A barrier must come before shared is used again.
template <class T> __device__ T block_sum(T value, T* shared)
{
    const int t = threadIdx.x;
    shared[t] = value;
    __syncthreads();
    for (int half = QUALITY_THREADS / 2; half > 0; half /= 2) {
        if (t < half) shared[t] = add(shared[t], shared[t + half]);
        __syncthreads();
    }
    return shared[0];
}

// Keeps a block's sum; true in the one block that finds all others kept (CUDA Programming Guide, memory fences).
template <class T> __device__ bool keep_and_be_last(T sum, T* chunks, int* counter)
{
    __shared__ int n_before;
    if (threadIdx.x == 0) {
        chunks[blockIdx.x] = sum;
        __threadfence();
        n_before = atomicAdd(counter, 1);
        if (n_before == (int)gridDim.x - 1) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return n_before == (int)gridDim.x - 1;
}

// One block for each of the chunks_per_slice chunks of a slice of n_plane voxels. slices: (n_slices + 1, 4).
extern "C" __global__ void inspect(const Voxel* __restrict__ volume, double* chunks, int* counter, double* slices,
                                   int n_plane, int chunks_per_slice, int n_slices)
{
    __shared__ SliceFields shared[QUALITY_THREADS];
    const int start = blockIdx.x % chunks_per_slice * QUALITY_CHUNK;
    const int stop = start + QUALITY_CHUNK < n_plane ? start + QUALITY_CHUNK : n_plane;
    const Voxel* plane = volume + (long long)(blockIdx.x / chunks_per_slice) * n_plane;
    SliceFields sum = no_voxels();
    for (int i = start + threadIdx.x; i < stop; i += QUALITY_THREADS) sum = add(sum, one_voxel((float)plane[i]));
    sum = block_sum(sum, shared);
    SliceFields* kept = (SliceFields*)chunks;
    if (!keep_and_be_last(sum, kept, counter)) return;
    SliceFields* rows = (SliceFields*)slices;
    SliceFields whole = no_voxels();
    for (int z = threadIdx.x; z < n_slices; z += QUALITY_THREADS) {
        SliceFields slice = kept[z * chunks_per_slice];
        for (int part = 1; part < chunks_per_slice; ++part) slice = add(slice, kept[z * chunks_per_slice + part]);
        rows[z] = slice;
        whole = add(whole, slice);
    }
    whole = block_sum(whole, shared);
    if (threadIdx.x == 0) rows[n_slices] = whole;
}

extern "C" __global__ void compare(const float* __restrict__ volume, const float* __restrict__ previous,
                                   double* chunks, int* counter, double* sums, int n_voxels)
{
    __shared__ Sums shared[QUALITY_THREADS];
    const int start = blockIdx.x * QUALITY_CHUNK;
    const int stop = start + QUALITY_CHUNK < n_voxels ? start + QUALITY_CHUNK : n_voxels;
    Sums sum = {0.0, 0.0};
    for (int i = start + threadIdx.x; i < stop; i += QUALITY_THREADS)
        sum = add(sum, one_difference(volume[i], previous[i]));
    sum = block_sum(sum, shared);
    Sums* kept = (Sums*)chunks;
    if (!keep_and_be_last(sum, kept, counter)) return;
    sum = {0.0, 0.0};
    for (int i = threadIdx.x; i < (int)gridDim.x; i += QUALITY_THREADS) sum = add(sum, kept[i]);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *(Sums*)sums = sum;
}

// One block. limits: (2, n).
extern "C" __global__ void judge(const double* __restrict__ values, const double* __restrict__ limits,
                                 float* __restrict__ usable, int n)
{
    __shared__ int n_outside;
    if (threadIdx.x == 0) n_outside = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += QUALITY_THREADS)
        if (!(values[i] >= limits[i] && values[i] <= limits[n + i])) atomicAdd(&n_outside, 1);
    __syncthreads();
    if (threadIdx.x == 0) usable[0] = n_outside ? 0.0f : 1.0f;
}

extern "C" __global__ void track(const float* __restrict__ volume, float* __restrict__ previous,
                                 float* __restrict__ mean, float* __restrict__ variance,
                                 float* __restrict__ successive, const float* __restrict__ usable, float gain,
                                 float successive_gain, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    const float x = volume[v];
    if (!is_finite(x)) return;
    if (usable[0] > 0.0f && gain > 0.0f) {
        const VoxelMoments m = fold_voxel(x, {mean[v], variance[v]}, gain);
        mean[v] = m.mean;
        variance[v] = m.variance;
    }
    if (usable[0] > 0.0f && successive_gain > 0.0f) {
        const float d = x - previous[v];
        successive[v] = successive[v] + successive_gain * (d * d - successive[v]);
    }
    previous[v] = x;
}
