// What is said of voxels, of a part of a slice, and how parts add up. The numba twin,
// rtfmri/backends/cpu/quality.py, gives the same bits: it adds up the same numbers in the same order.
#pragma once
#include "moments.cuh"

#define QUALITY_THREADS 256
#define QUALITY_CHUNK 4096  // voxels a block; fewer, larger blocks would leave a GPU idle on small volumes

RTFMRI_FN bool is_finite(float x) { return fabsf(x) <= 3.402823466e+38f; }  // false for NaN, too

// The four SLICE_FIELDS, in their order: what four doubles of the output hold.
struct SliceFields { double total, largest, n_largest, n_not_finite; };

RTFMRI_FN SliceFields no_voxels() { return {0.0, -1.0 / 0.0, 0.0, 0.0}; }

RTFMRI_FN SliceFields one_voxel(float x)
{
    if (is_finite(x)) return {(double)x, (double)x, 1.0, 0.0};
    return {0.0, -1.0 / 0.0, 0.0, 1.0};
}

RTFMRI_FN SliceFields add(SliceFields a, SliceFields b)
{
    const double n = a.largest == b.largest ? a.n_largest + b.n_largest
                     : a.largest > b.largest ? a.n_largest : b.n_largest;
    return {a.total + b.total, a.largest > b.largest ? a.largest : b.largest, n, a.n_not_finite + b.n_not_finite};
}

// Sum of a volume and of its squared differences from the one before.
struct Sums { double total, squares; };

RTFMRI_FN Sums add(Sums a, Sums b) { return {a.total + b.total, a.squares + b.squares}; }

RTFMRI_FN Sums one_difference(float x, float before)
{
    if (!is_finite(x)) return {0.0, 0.0};
    const double d = (double)x - (double)before;
    return {(double)x, d * d};
}
