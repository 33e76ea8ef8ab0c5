// The incremental general linear model. Voxels keep their coordinates in the orthonormal basis of the design so far, of
// which every statistic is a dot product: nothing is inverted, and nothing cancels.
#include "glm.cuh"

// One block a noise class. row: the design's row with motion filled in from the pose's fields, (p,); the rest is
// (classes, ...): whitening 2, factor p * p, squares p, previous p, counts N_COUNTS, rotations 2 * p, solved and
// directions n_rows * p, scales n_rows, scalars N_SCALARS. contrasts: (n_rows, p), of which contrast k has rows
// offsets[k] to offsets[k + 1].
extern "C" __global__ void update_design(const double* __restrict__ known, const double* __restrict__ pose,
                                         const double* __restrict__ whitening, const double* __restrict__ contrasts,
                                         const int* __restrict__ offsets, const float* __restrict__ usable, double* row,
                                         double* factor, double* squares, double* previous, double* counts,
                                         double* solved, double* scales, float* rotations, float* directions,
                                         float* scalars, int motion_at, int p, int n_rows, int n_contrasts)
{
    __shared__ double x[MAX_COLUMNS];
    const int t = threadIdx.x, g = blockIdx.x, motion = t - motion_at;
    factor += g * p * p;
    squares += g * p;
    previous += g * p;
    counts += g * N_COUNTS;
    solved += g * n_rows * p;
    scales += g * n_rows;
    rotations += g * 2 * p;
    directions += g * n_rows * p;
    scalars += g * N_SCALARS;
    const double gain = whitening[2 * g], carry = whitening[2 * g + 1];
    double value = 0;
    if (t < p) {
        value = known[t];
        if (motion_at >= 0 && motion >= 0 && motion < 3) value = pose[4 + motion];
        if (motion_at >= 0 && motion >= 3 && motion < 6) value = euler(pose, motion - 3);
        if (g == 0) row[t] = value;
    }
    if (!(usable[0] > 0.0f)) return;  // all threads alike
    if (t < p) {
        x[t] = gain * value - carry * previous[t];
        previous[t] = value;
        squares[t] += x[t] * x[t];
    }
    double rank = 0;
    for (int i = 0; i < p; ++i) {
        __syncthreads();
        const double xi = x[i], r = factor[i * p + i];
        const Rotation turn = rotation_of(r, xi, squares[i]);
        __syncthreads();
        if (r > 0 || turn.s != 0) rank += 1;
        if (t >= i && t < p) {
            const double rt = factor[i * p + t], xt = x[t];
            factor[i * p + t] = turn.c * rt + turn.s * xt;
            x[t] = turn.c * xt - turn.s * rt;
        }
        if (t == 0) {
            rotations[2 * i] = (float)turn.c;
            rotations[2 * i + 1] = (float)turn.s;
        }
    }
    __syncthreads();
    if (t == 0) {
        const double n = counts[N_VOLUMES] + 1, dof = n - rank;
        counts[N_VOLUMES] = n;
        counts[RANK] = rank;
        scalars[GAIN] = (float)gain;
        scalars[CARRY] = (float)carry;
        scalars[PER_DOF] = dof > 0 ? (float)(1 / dof) : 0.0f;
        scalars[FIRST] = n == 1 ? 1.0f : 0.0f;
    }
    if (t >= n_contrasts) return;
    bool estimable = true;
    for (int k = offsets[t]; k < offsets[t + 1]; ++k) {
        estimable &= solve(factor, contrasts + k * p, solved + k * p, p);
        scales[k] = orthonormalise(solved + k * p, k - offsets[t], p);
        estimable &= scales[k] > 0;
    }
    for (int k = offsets[t]; k < offsets[t + 1]; ++k) {
        if (!estimable) scales[k] = 0;
        for (int j = 0; j < p; ++j) directions[k * p + j] = estimable ? (float)solved[k * p + j] : 0.0f;
    }
}

// One thread a voxel. coordinates: (p, n_voxels); statistics: (n_contrasts, n_voxels). Where whitened, voxel v is volume's
// order[v], of noise class labels[v], and previous has the value before; else these are not read. kinds: 1 for F.
// Contrasts are of columns from first_column on.
extern "C" __global__ void update_glm(const float* __restrict__ volume, float* __restrict__ coordinates,
                                      float* __restrict__ squares, float* __restrict__ origin,
                                      float* __restrict__ previous, const int* __restrict__ order,
                                      const int* __restrict__ labels, const float* __restrict__ rotations,
                                      const float* __restrict__ directions, const float* __restrict__ scalars,
                                      const int* __restrict__ offsets, const int* __restrict__ kinds,
                                      const float* __restrict__ usable, float* __restrict__ statistics, int whitened,
                                      int p, int n_rows, int n_contrasts, int first_column, int n_voxels)
{
    RTFMRI_VOXEL_INDEX(v, n_voxels);
    if (!(usable[0] > 0.0f)) return;
    const int g = whitened ? labels[v] : 0, at = whitened ? order[v] : v;
    rotations += g * 2 * p;
    directions += g * n_rows * p;
    scalars += g * N_SCALARS;
    const float x = volume[at];
    if (scalars[FIRST] > 0.0f) origin[v] = x;
    float rest = x - origin[v];
    if (whitened) {
        const float before = previous[v];
        previous[v] = rest;
        rest = scalars[GAIN] * rest - scalars[CARRY] * before;
    }
    for (int i = 0; i < p; ++i) {
        const float c = rotations[2 * i], s = rotations[2 * i + 1];
        if (s == 0.0f) continue;  // all threads of a class alike
        const long long here = (long long)i * n_voxels + v;
        const float z = coordinates[here];
        coordinates[here] = c * z + s * rest;
        rest = c * rest - s * z;
    }
    const float sum = squares[v] + rest * rest;
    squares[v] = sum;
    const float variance = sum * scalars[PER_DOF];
    for (int k = 0; k < n_contrasts; ++k) {
        float total = 0.0f;
        for (int row = offsets[k]; row < offsets[k + 1]; ++row) {
            float score = 0.0f;
            for (int i = first_column; i < p; ++i)
                score += directions[row * p + i] * coordinates[(long long)i * n_voxels + v];
            total += kinds[k] ? score * score : score;
        }
        const float size = kinds[k] ? (float)(offsets[k + 1] - offsets[k]) * variance : sqrtf(variance);
        statistics[(long long)k * n_voxels + at] = size > 0.0f ? total / size : 0.0f;
    }
}
