// A pose and what a Gauss-Newton step does to it, in double. The numba twin, rtfmri/backends/cpu/register.py, has the
// same operations in the same order: basic ones and square roots alone, which round alike everywhere.
#pragma once
#include "common.cuh"

#define CHUNK 256   // points whose terms are summed up by a tree
#define N_SUMS 11   // J e (7), e^2, points used, template value, its square
#define LARGEST 3.40282346638528859812e+38

// Places in fields, which rtfmri.backends.POSE_FIELDS has, too; the first are rotation (4), shift (3), scale.
enum Field { FD_POWER = 8, FD_JENKINSON = 9, INSIDE = 10, RESIDUAL = 11, N_ITERATIONS = 12, CONVERGED = 13 };

// Places in what is kept from step to step: the pose before and the one on trial (8 each), how many volumes were found,
// where the pose on trial takes the coefficient grid (12), whether the last step was taken.
enum State { BEFORE = 0, TRIAL = 8, N_FOUND = 16, PLACE = 17, DONE = 29, N_STATE = 30 };

// Quaternion product: first p, then q.
RTFMRI_FN void compose(const double* q, const double* p, double* out)
{
    const double w = q[0] * p[0] - q[1] * p[1] - q[2] * p[2] - q[3] * p[3];
    const double x = q[0] * p[1] + q[1] * p[0] + q[2] * p[3] - q[3] * p[2];
    const double y = q[0] * p[2] - q[1] * p[3] + q[2] * p[0] + q[3] * p[1];
    const double z = q[0] * p[3] + q[1] * p[2] - q[2] * p[1] + q[3] * p[0];
    out[0] = w;
    out[1] = x;
    out[2] = y;
    out[3] = z;
}

// Matrix of a quaternion, row by row.
RTFMRI_FN void rotation(const double* q, double* r)
{
    const double w = q[0], x = q[1], y = q[2], z = q[3];
    r[0] = 1 - 2 * (y * y + z * z);
    r[1] = 2 * (x * y - w * z);
    r[2] = 2 * (x * z + w * y);
    r[3] = 2 * (x * y + w * z);
    r[4] = 1 - 2 * (x * x + z * z);
    r[5] = 2 * (y * z - w * x);
    r[6] = 2 * (x * z - w * y);
    r[7] = 2 * (y * z + w * x);
    r[8] = 1 - 2 * (x * x + y * y);
}

// Element i, j of the pose as a map of voxels: to mm, moved, and back.
RTFMRI_FN double map_voxels(const double* pose, const double* to_mm, const double* from_mm, int i, int j)
{
    double r[9], moved[3];
    rotation(pose, r);
    for (int k = 0; k < 3; ++k) {
        const double s = r[3 * k] * to_mm[j] + r[3 * k + 1] * to_mm[4 + j] + r[3 * k + 2] * to_mm[8 + j];
        moved[k] = j == 3 ? s + pose[4 + k] : s;
    }
    const double s = from_mm[4 * i] * moved[0] + from_mm[4 * i + 1] * moved[1] + from_mm[4 * i + 2] * moved[2];
    return j == 3 ? s + from_mm[4 * i + 3] : s;
}

// Angle of (x, y): halved four times, where its series needs few terms.
RTFMRI_FN double angle(double y, double x)
{
    double u = y / (x + sqrt(x * x + y * y));
    for (int i = 0; i < 3; ++i) u = u / (1 + sqrt(1 + u * u));
    const double square = u * u;
    double s = 0;
    for (int k = 25; k > 0; k -= 2) s = 1.0 / k - square * s;
    return 16 * u * s;
}

// Angle about axis x, y or z of a rotation Rz Ry Rx, in radians.
RTFMRI_FN double euler(const double* q, int axis)
{
    double r[9];
    rotation(q, r);
    if (axis == 0) return angle(r[7], r[8]);
    if (axis == 1) return angle(-r[6], sqrt(r[7] * r[7] + r[8] * r[8]));
    return angle(r[3], r[0]);
}

// trial after the inverse of the template's step.
RTFMRI_FN void advance(double* trial, const double* step)
{
    const double turn[4] = {1, -(0.5 * step[3]), -(0.5 * step[4]), -(0.5 * step[5])};
    compose(trial, turn, trial);
    const double norm =
        sqrt(trial[0] * trial[0] + trial[1] * trial[1] + trial[2] * trial[2] + trial[3] * trial[3]);
    for (int i = 0; i < 4; ++i) trial[i] /= norm;
    double r[9];
    rotation(trial, r);
    for (int i = 0; i < 3; ++i)
        trial[4 + i] -= r[3 * i] * step[0] + r[3 * i + 1] * step[1] + r[3 * i + 2] * step[2];
    // Far beyond the limits for a result, so that a first step may overshoot.
    const double scale = trial[7] * (1 + step[6]);
    trial[7] = scale > 0.03 ? (scale < 30 ? scale : 30) : 0.03;
}

// Framewise displacement between two poses, of angles in radians: Power 2012 with 50 mm, Jenkinson 1999 with a sphere
// of 80 mm.
RTFMRI_FN void displace(double* fields, const double* before, const double* trial, const double* angles)
{
    double shifts = 0, turns = 0, squares = 0;
    for (int i = 0; i < 3; ++i) {
        const double d = trial[4 + i] - before[4 + i];
        shifts += fabs(d);
        squares += d * d;
        turns += fabs(angles[3 + i] - angles[i]);
    }
    fields[FD_POWER] = shifts + 50.0 * turns;
    double turn[4] = {before[0], -before[1], -before[2], -before[3]};
    compose(turn, trial, turn);
    const double sine = turn[1] * turn[1] + turn[2] * turn[2] + turn[3] * turn[3];
    // Over a sphere of radius r, mean squares are r^2 / 5 tr(A'A), here with A'A = 8 sine / 3.
    fields[FD_JENKINSON] = sqrt(squares + 1.6 * 80.0 * 80.0 * sine);
}

// Judges the pose on trial after a step; returns whether it is the volume's. Where the step was the last one, for
// better or worse, the fields say what came out. angles: of the pose before and of the one on trial.
RTFMRI_FN bool judge_step(const double* step, const double* angles, const double* totals, int n_points, double* state,
                          double* fields, int iteration, int last, double tolerance_mm)
{
    double *before = state + BEFORE, *trial = state + TRIAL;
    const double n = totals[8], mean = totals[9] / totals[8];
    const double spread = totals[10] / n - mean * mean;
    const double squared_residual = totals[7] / n / spread;
    const double shift = sqrt(step[0] * step[0] + step[1] * step[1] + step[2] * step[2]);
    const double turn = sqrt(step[3] * step[3] + step[4] * step[4] + step[5] * step[5]);
    const double inside = n / n_points;
    // Each is false of what is not a number.
    const bool still = shift + 50.0 * turn <= tolerance_mm && fabs(step[6]) <= 0.01;
    const bool finite = shift <= LARGEST && turn <= LARGEST;
    const bool sane = inside >= 0.5 && finite && trial[7] > 0.03 && trial[7] < 30;
    const bool done = still || !sane || last;
    const bool good = still && sane && squared_residual <= 0.5 && trial[7] >= 0.3 && trial[7] <= 3.0;
    state[DONE] = done;
    if (!done) return false;
    fields[FD_POWER] = 0;
    fields[FD_JENKINSON] = 0;
    fields[INSIDE] = inside;
    fields[RESIDUAL] = sqrt(squared_residual);
    fields[N_ITERATIONS] = iteration + 1;
    fields[CONVERGED] = good;
    if (good) {
        if (state[N_FOUND] > 0) displace(fields, before, trial, angles);
        state[N_FOUND] += 1;
    }
    double *from = good ? trial : before, *to = good ? before : trial;
    for (int i = 0; i < 8; ++i) {
        to[i] = from[i];
        fields[i] = before[i];
    }
    return good;
}
