// Rigid registration: one Gauss-Newton step a launch, one thread a point of the template. The last block to finish adds
// up what all of them found and moves the pose, so that nothing ever waits for the host.
#include "register.cuh"

// Cubic B-spline of the four neighbours of a place t behind the second of them.
RTFMRI_FN void spline_weights(float t, float* w)
{
    const float u = 1.0f - t, sixth = 1.0f / 6.0f;
    w[0] = u * u * u * sixth;
    w[1] = (4.0f + t * t * (3.0f * t - 6.0f)) * sixth;
    w[2] = (4.0f + u * u * (3.0f * u - 6.0f)) * sixth;
    w[3] = t * t * t * sixth;
}

// first: of 4 x 4 x 4 coefficients, whose weights along x, y, z are wx, wy, wz.
RTFMRI_FN float sum_of_taps(const float* first, int nx, int plane, const float* wx, const float* wy, const float* wz)
{
    float sums[4];
    for (int z = 0; z < 4; ++z) {
        float parts[4];
        for (int y = 0; y < 4; ++y)
            for (int x = 0; x < 4; ++x) {
                const float term = wy[y] * first[z * plane + y * nx + x];
                parts[x] = y ? parts[x] + term : term;
            }
        for (int x = 0; x < 4; ++x) sums[x] = z ? sums[x] + wz[z] * parts[x] : wz[z] * parts[x];
    }
    return wx[0] * sums[0] + wx[1] * sums[1] + wx[2] * sums[2] + wx[3] * sums[3];
}

// Moves a point along one axis of a grid; returns whether it and its neighbours are inside.
RTFMRI_FN bool move_point(float x, float y, float z, const double* row, float end, int* first, float* weights)
{
    const float q = (float)row[0] * x + (float)row[1] * y + (float)row[2] * z + (float)row[3];
    const bool within = q >= 1.0f && q < end;
    const float place = within ? q : 1.0f;
    const int at = (int)place;
    *first = at - 1;
    spline_weights(place - (float)at, weights);
    return within;
}

// points (3, n_points), jacobian (7, n_points), to_mm and from_mm (2, 3, 4), state (N_STATE), followed by
// the blocks' sums (blocks, N_SUMS); counter is 0 before and after. Blocks must be of CHUNK threads.
extern "C" __global__ void register_step(const float* __restrict__ coefficients, int nx, int ny, int nz,
                                         const float* __restrict__ points, const float* __restrict__ values,
                                         const float* __restrict__ jacobian,
                                         const double* __restrict__ inverse_hessian,
                                         const double* __restrict__ to_mm, const double* __restrict__ from_mm,
                                         double* fields, double* matrix, double* state, int* counter, int n_points,
                                         int iteration, int last, double tolerance_mm)
{
    __shared__ double terms[N_SUMS][CHUNK];
    __shared__ double totals[N_SUMS], step[7], angles[6];
    __shared__ bool is_last_block, found;
    if (iteration > 0 && state[DONE] > 0) return;  // all threads of all blocks alike

    double* sums = state + N_STATE;
    const int t = threadIdx.x, i = blockIdx.x * CHUNK + t;
    for (int k = 0; k < N_SUMS; ++k) terms[k][t] = 0;
    if (i < n_points) {
        const float x = points[i], y = points[n_points + i], z = points[2 * n_points + i];
        int ix, iy, iz;
        float wx[4], wy[4], wz[4];
        bool use = move_point(x, y, z, state + PLACE, (float)(nx - 2), &ix, wx);
        use &= move_point(x, y, z, state + PLACE + 4, (float)(ny - 2), &iy, wy);
        use &= move_point(x, y, z, state + PLACE + 8, (float)(nz - 2), &iz, wz);
        const float f = sum_of_taps(coefficients + (iz * ny + iy) * nx + ix, nx, nx * ny, wx, wy, wz);
        float e = f / (float)state[TRIAL + 7] - values[i];
        // A value that is not finite is left out, as a place outside is.
        use &= fabsf(e) <= (float)LARGEST;
        if (use) {
            const float r = values[i];
            for (int k = 0; k < 7; ++k) terms[k][t] = (double)jacobian[k * n_points + i] * (double)e;
            terms[7][t] = (double)e * (double)e;
            terms[8][t] = 1;
            terms[9][t] = r;
            terms[10][t] = (double)r * (double)r;
        }
    }
    __syncthreads();
    for (int half = CHUNK / 2; half > 0; half /= 2) {
        if (t < half)
            for (int k = 0; k < N_SUMS; ++k) terms[k][t] += terms[k][t + half];
        __syncthreads();
    }

    if (t < N_SUMS) {
        sums[blockIdx.x * N_SUMS + t] = terms[t][0];
        __threadfence();
    }
    __syncthreads();
    if (t == 0) is_last_block = atomicAdd(counter, 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!is_last_block) return;
    __threadfence();
    if (t < N_SUMS) {
        double s = 0;
#pragma unroll 8
        for (int block = 0; block < (int)gridDim.x; ++block) s += ((volatile double*)sums)[block * N_SUMS + t];
        totals[t] = s;
    }
    __syncthreads();
    if (t < 7) {
        double s = 0;
        for (int k = 0; k < 7; ++k) s += inverse_hessian[7 * t + k] * totals[k];
        step[t] = s;
    }
    __syncthreads();
    if (t == 0) {
        *counter = 0;
        advance(state + TRIAL, step);
    }
    __syncthreads();
    if (t < 6) angles[t] = euler(state + (t < 3 ? BEFORE : TRIAL), t % 3);
    __syncthreads();
    if (t == 0) found = judge_step(step, angles, totals, n_points, state, fields, iteration, last, tolerance_mm);
    __syncthreads();
    if (t < 12) state[PLACE + t] = map_voxels(state + TRIAL, to_mm, from_mm, t / 4, t % 4);
    if (t < 12 && found) matrix[t] = map_voxels(state + BEFORE, to_mm + 12, from_mm + 12, t / 4, t % 4);
}
