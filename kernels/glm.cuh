// Least squares by Givens rotations (Golub 1965, Numer. Math. 7:206; Gentleman 1973, JIMA 12:329): a volume's row of the
// design is rotated into the triangular factor of the rows before it, and every voxel's value goes along with it. The
// numba twin, rtfmri/backends/cpu/glm.py, has the same operations in the same order, so that both give the same bits.
#pragma once
#include "register.cuh"

#define MAX_COLUMNS 128     // of a design
#define NEW_DIRECTION 1e-24 // square of the share of a column that must be new for it to count as another direction
#define ESTIMABLE 1e-6      // share of a contrast that may lie outside of the rows so far
#define INDEPENDENT 1e-12   // square of the share of an F contrast's row that the rows before must leave

// Places in the four numbers that voxels are told of a volume, and in the two that are kept.
enum Scalar { GAIN = 0, CARRY = 1, PER_DOF = 2, FIRST = 3, N_SCALARS = 4 };
enum Count { N_VOLUMES = 0, RANK = 1, N_COUNTS = 2 };

struct Rotation { double c, s; };

// What makes x zero against the diagonal element r. squares: sum of squares of all elements of x's column.
RTFMRI_FN Rotation rotation_of(double r, double x, double squares)
{
    if (x == 0 || (r == 0 && x * x <= NEW_DIRECTION * squares)) return {1, 0};
    const double h = sqrt(r * r + x * x);
    return {r / h, x / h};
}

// Solves R' w = contrast; returns whether the contrast lies in the span of the rows so far. factor: (p, p), row by row.
RTFMRI_FN bool solve(const double* factor, const double* contrast, double* w, int p)
{
    bool estimable = true;
    for (int j = 0; j < p; ++j) {
        double sum = contrast[j], size = fabs(sum);
        for (int i = 0; i < j; ++i) {
            const double term = factor[i * p + j] * w[i];
            sum -= term;
            size += fabs(term);
        }
        const double r = factor[j * p + j];
        w[j] = r > 0 ? sum / r : 0.0;
        if (!(r > 0) && fabs(sum) > ESTIMABLE * size) estimable = false;
    }
    return estimable;
}

// Makes row w orthogonal to the n unit rows before it, and a unit itself; returns its length, 0 if they leave nothing.
RTFMRI_FN double orthonormalise(double* w, int n, int p)
{
    double before = 0, after = 0;
    for (int j = 0; j < p; ++j) before += w[j] * w[j];
    for (int k = n; k > 0; --k) {
        const double* unit = w - k * p;
        double dot = 0;
        for (int j = 0; j < p; ++j) dot += unit[j] * w[j];
        for (int j = 0; j < p; ++j) w[j] -= dot * unit[j];
    }
    for (int j = 0; j < p; ++j) after += w[j] * w[j];
    const double length = after > INDEPENDENT * before ? sqrt(after) : 0.0;
    for (int j = 0; j < p; ++j) w[j] = length > 0 ? w[j] / length : 0.0;
    return length;
}
