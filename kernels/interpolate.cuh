// Where a rigid motion takes a voxel, and what is there. The numba twin, rtfmri/backends/cpu/reslice.py, has the same
// operations in the same order, so that both give the same bits (without FMA contraction).
#pragma once
#include "common.cuh"

// A place along one axis: a whole voxel, and how far beyond it.
struct Place { int whole; float fraction; };

// What a voxel is displaced by, kept within 0 .. n - 1: base + slope x, x along the line of voxels. A displacement of a
// few voxels has more bits behind the point than a coordinate of a few hundred.
RTFMRI_FN Place place_voxel(float base, float slope, int x, int at, int n)
{
    const float d = fminf(fmaxf(base + slope * (float)x, (float)-at), (float)(n - 1 - at));
    const float whole = floorf(d);
    return {at + (int)whole, d - whole};
}

// Indices -1 .. n + 1, mirrored about the outer faces of the outer voxels (a | a b c d | d c).
RTFMRI_FN int mirror_neighbour(int i, int n)
{
    if (i < 0) return -1 - i;
    if (i < n) return i;
    return 2 * n - 1 - i > 0 ? 2 * n - 1 - i : 0;
}

struct Linear {
    static constexpr int taps = 2;
    RTFMRI_FN static void weights(float f, float* w)
    {
        w[0] = 1.0f - f;
        w[1] = f;
    }
};

// Cubic convolution with a = -1/2 (Keys 1981, IEEE Trans. ASSP 29:1153).
struct CatmullRom {
    static constexpr int taps = 4;
    RTFMRI_FN static void weights(float f, float* w)
    {
        const float g = 1.0f - f;
        const float n = -0.5f * f * g;
        const float t = 3.0f * f;
        w[0] = n * g;
        w[1] = g - n * (2.0f - t);
        w[2] = f - n * (t - 1.0f);
        w[3] = n * f;
    }
};

// Cubic B-spline (Unser 1999, IEEE Signal Proc. Mag. 16(6):22).
struct BSpline {
    static constexpr int taps = 4;
    RTFMRI_FN static void weights(float f, float* w)
    {
        const float g = 1.0f - f;
        const float f2 = f * f, g2 = g * g;
        w[0] = 1.0f / 6.0f * (g2 * g);
        w[1] = 2.0f / 3.0f - 0.5f * f2 * (2.0f - f);
        w[2] = 2.0f / 3.0f - 0.5f * g2 * (2.0f - g);
        w[3] = 1.0f / 6.0f * (f2 * f);
    }
};

// The weighted sum of the neighbours of a place, along x first.
template <class Kernel> RTFMRI_FN float interpolate(const Voxel* volume, int nx, int ny, int nz, Place x, Place y, Place z)
{
    constexpr int taps = Kernel::taps, before = taps / 2 - 1;
    float wx[taps], wy[taps], wz[taps];
    Kernel::weights(x.fraction, wx);
    Kernel::weights(y.fraction, wy);
    Kernel::weights(z.fraction, wz);
    int at_x[taps];
#pragma unroll
    for (int i = 0; i < taps; ++i) at_x[i] = mirror_neighbour(x.whole - before + i, nx);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < taps; ++k) {
        const int plane = mirror_neighbour(z.whole - before + k, nz) * ny;
        float in_plane = 0.0f;
#pragma unroll
        for (int j = 0; j < taps; ++j) {
            const Voxel* line = volume + (plane + mirror_neighbour(y.whole - before + j, ny)) * nx;
            float in_line = wx[0] * (float)line[at_x[0]];
#pragma unroll
            for (int i = 1; i < taps; ++i) in_line += wx[i] * (float)line[at_x[i]];
            in_plane = j ? in_plane + wy[j] * in_line : wy[j] * in_line;
        }
        sum = k ? sum + wz[k] * in_plane : wz[k] * in_plane;
    }
    return sum;
}
