/* The arithmetic of a conjugate-gradient step on a block of a layer, fused, and that of the regularizer: what torch does in
 * many passes over the block, this does channel by channel in one, with all that lies between in a core's cache.
 *
 * A block is [g, c, M, T]: g groups, c channels, M filters, T taps a kernel, of which the first are even; but within
 * each CHUNK of filters (the last one may be smaller) the taps come before the filters, so that memory is read and
 * written from end to end. The spectrum of a kernel has N rows: F cosines, then N - F sines. Only what the defaults
 * need: float32, all pairs, matched channels.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Compiled for several generations of processors; the one at hand is found when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

#define SMALL_SQUARE 1e-30 /* of norms: within, nothing is lost in single precision */
#define LARGE_SQUARE 1e30
enum { LANES = 16, CHUNK = 2 * LANES }; /* filters at a time */
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Numbers of taps, of even ones among them, of points of a lattice, and of cosines among these. */
typedef struct {
    int64_t taps, even, points, cosines;
} Sizes;

typedef struct {
    Sizes full, coarse;
    int64_t groups, channels, filters;
    const float *first, *second;               /* the basis: [F, even] and [N - F, taps - even] */
    const float *identity;                     /* [F]: partners whose gradient is twice the weights */
    const float *coarse_first, *coarse_second; /* of the coarse lattice; null where the weights are its coefficients */
    float coarse_constant;                     /* factor of the constant's power there */
} Layout;

/* Of these the compiler knows the loops. */
static const Sizes FULL_3X3 = {9, 5, 25, 13}, COARSE_3X3 = {9, 5, 9, 5}, ALL_1X1 = {1, 1, 1, 1};

INLINE int same(Sizes a, Sizes b) {
    return a.taps == b.taps && a.even == b.even && a.points == b.points && a.cosines == b.cosines;
}

/* To be raised whenever a function or the layout changes: what was built before is then not used. */
int64_t interface_version(void) { return 2; }

int64_t chunk_size(void) { return CHUNK; }

INLINE int64_t chunks(const Layout *l) { return (l->filters + CHUNK - 1) / CHUNK; }

/* Two rows [CHUNK] of a matrix product, or twice the same one. */
INLINE void two_rows(const float *a, const float *b, int64_t step, int64_t columns, const float *restrict in,
                     float *out_a, float *out_b, float factor) {
    Vector a0 = {0}, a1 = {0}, b0 = {0}, b1 = {0}; /* kept in registers */
    for (int64_t t = 0; t < columns; t++, in += CHUNK, a += step, b += step) {
        const Vector *part = (const Vector *)in;
        a0 += *a * part[0], a1 += *a * part[1], b0 += *b * part[0], b1 += *b * part[1];
    }
    Vector *to_a = (Vector *)out_a, *to_b = (Vector *)out_b;
    to_a[0] = factor * a0, to_a[1] = factor * a1, to_b[0] = factor * b0, to_b[1] = factor * b1;
}

/* out[rows, CHUNK] = factor * matrix[rows, columns] @ in[columns, CHUNK]; steps exchanged: its transpose. */
INLINE void product(const float *restrict matrix, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
                    const float *restrict in, float *restrict out, float factor) {
    for (int64_t r = 0; r < rows; r += 2) {
        const int64_t other = r + 1 < rows ? r + 1 : r;
        two_rows(matrix + r * row_step, matrix + other * row_step, column_step, columns, in, out + r * CHUNK,
                 out + other * CHUNK, factor);
    }
}

/* Ask for memory that is needed soon, so that it comes while others compute; it may lie beyond the block's. */
INLINE void expect(const float *memory, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(memory + i, 1, 2);
}

INLINE float total(const float *lanes) {
    float sum = 0;
    for (int i = 0; i < CHUNK / 2; i++) sum += lanes[i] + lanes[i + CHUNK / 2];
    return sum;
}

/* The coefficients of a chunk of kernels on a lattice: cosines of the even taps, sines of the odd ones. */
INLINE void project(const float *first, const float *second, Sizes z, const float *restrict w, float *restrict x) {
    const int64_t even = z.even, odd = z.taps - even, F = z.cosines;
    product(first, even, 1, F, even, w, x, 1);
    product(second, odd, 1, z.points - F, odd, w + even * CHUNK, x + F * CHUNK, 1);
}

/* The spectra of a chunk of kernels, and what they add to the power of all. */
INLINE void transform(const Layout *l, Sizes z, const float *restrict w, float *restrict x, float *restrict powers) {
    const int64_t F = z.cosines;
    const float none[CHUNK] = {0}; /* the constant has no sine */
    project(l->first, l->second, z, w, x);
    for (int64_t f = 0; f < F; f++) {
        const float *cosine = x + f * CHUNK, *sine = f ? cosine + (F - 1) * CHUNK : none;
        for (int64_t i = 0; i < CHUNK; i++) powers[f * CHUNK + i] += cosine[i] * cosine[i] + sine[i] * sine[i];
    }
}

/* The gradient of a chunk of kernels, less 2 * taken * weights, from their spectra, which are spent, and the power of
 * all, summed over filters; their energies, inner products of their own and their partners' power, are added up. */
INLINE void differentiate(const Layout *l, Sizes z, const float *restrict powers, const float *restrict taken,
                          float *restrict x, float *restrict g, float *restrict energies) {
    const int64_t T = z.taps, even = z.even, N = z.points, F = z.cosines;
    float none[CHUNK] = {0};
    for (int64_t f = 0; f < F; f++) {
        float *cosine = x + f * CHUNK, *sine = f ? cosine + (F - 1) * CHUNK : none;
        for (int64_t i = 0; i < CHUNK; i++) {
            const float power = cosine[i] * cosine[i] + sine[i] * sine[i];
            const float partners = powers[f] - power - taken[i] * l->identity[f];
            energies[i] += power * partners;
            cosine[i] *= partners;
            sine[i] *= partners;
        }
    }
    product(l->first, 1, even, even, F, x, g, 2);
    product(l->second, 1, T - even, T - even, N - F, x + F * CHUNK, g + even * CHUNK, 2);
}

/* Move n filters' weights, and take them along to a chunk; filters that are missing there are zero. */
INLINE void move(int64_t n, int64_t taps, const float *restrict keep, const float *restrict add,
                 float *restrict weights, const float *restrict ascent, float *restrict chunk,
                 double *restrict squares) {
    float sums[CHUNK] = {0};
    for (int64_t t = 0; t < taps; t++, weights += n, ascent += n, chunk += CHUNK)
        for (int64_t i = 0; i < n; i++) {
            chunk[i] = weights[i] = weights[i] * keep[i] + ascent[i] * add[i];
            sums[i] += chunk[i] * chunk[i];
        }
    for (int64_t i = 0; i < n; i++) squares[i] += sums[i];
}

/* Keep n filters' gradient in place of the previous one, and add to what is known of each; return the inner product. */
INLINE float keep_gradient(int64_t n, int64_t taps, const float *restrict chunk, const float *restrict weights,
                           const float *restrict ascent, float *restrict gradient, double *restrict sums,
                           int64_t next) {
    float along[CHUNK] = {0}, squares[CHUNK] = {0}, climb[CHUNK] = {0}, overlap[CHUNK] = {0};
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t i = 0; i < n; i++) {
            const float g = chunk[i];
            along[i] += g * weights[i];
            squares[i] += g * g;
            climb[i] += g * ascent[i];
            overlap[i] += g * gradient[i];
            gradient[i] = g;
        }
        chunk += CHUNK, weights += CHUNK, gradient += n, ascent += n;
    }
    for (int64_t i = 0; i < n; i++) {
        sums[i] += along[i];
        sums[next + i] += squares[i];
        sums[2 * next + i] += climb[i];
    }
    return total(overlap);
}

/* Turn n filters' directions, and take them and the weights along to chunks. */
INLINE void turn(int64_t n, int64_t taps, float beta, const float *restrict lean, const float *restrict weights,
                 const float *restrict gradient, float *restrict ascent, float *restrict weights_chunk,
                 float *restrict ascent_chunk) {
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t i = 0; i < n; i++) {
            weights_chunk[i] = weights[i];
            ascent_chunk[i] = ascent[i] = gradient[i] + beta * ascent[i] + lean[i] * weights[i];
        }
        weights += n, gradient += n, ascent += n, weights_chunk += CHUNK, ascent_chunk += CHUNK;
    }
}

/* Floats of scratch memory that any function needs. */
int64_t scratch_size(const Layout *l) {
    const int64_t arriving = chunks(l) * (l->full.taps + l->full.points) + l->full.cosines + l->full.taps;
    const int64_t aiming = 2 * (l->coarse.taps + l->coarse.points) + 3 * l->coarse.cosines;
    return CHUNK * (arriving > aiming ? arriving : aiming) + l->groups * l->filters;
}

/* Move to weights * keep + ascent * add (both per filter), and take the gradient there, less all_taken * weights.
 * sums[4, g, M]: the gradient along the weights, its squared norms, along the ascents; squared norms of the weights. */
INLINE void arrive_sized(const Layout *l, Sizes z, const float *keep, const float *add, const float *all_taken,
                         float *weights, const float *ascent, float *gradient, float *scratch, double *sums,
                         double *overlap) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters, next = l->groups * M; /* between sums */
    float *all_w = scratch, *all_x = all_w + chunks(l) * T * CHUNK, *lanes = all_x + chunks(l) * N * CHUNK;
    float *g = lanes + F * CHUNK, energies[CHUNK] = {0}; /* not needed */
    for (int64_t i = 0; i < 4 * next; i++) sums[i] = 0;
    *overlap = 0;

    for (int64_t row = 0; row < l->groups * l->channels; row++) {
        const int64_t group = row / l->channels * M;
        for (int64_t i = 0; i < F * CHUNK; i++) lanes[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            float *w = all_w + m * T, *x = all_x + m * N;
            expect(gradient + at, n * T);
            if (n == CHUNK) {
                move(CHUNK, T, keep + filter, add + filter, weights + at, ascent + at, w, sums + 3 * next + filter);
            } else {
                for (int64_t i = 0; i < T * CHUNK; i++) w[i] = 0;
                move(n, T, keep + filter, add + filter, weights + at, ascent + at, w, sums + 3 * next + filter);
            }
            transform(l, z, w, x, lanes);
        }
        for (int64_t f = 0; f < F; f++) lanes[f] = total(lanes + f * CHUNK);
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            float *w = all_w + m * T, *x = all_x + m * N, taken[CHUNK] = {0};
            expect(weights + at + M * T, n * T);
            expect(ascent + at + M * T, n * T);
            for (int64_t i = 0; i < n; i++) taken[i] = all_taken[filter + i] / 2;
            differentiate(l, z, lanes, taken, x, g, energies);
            if (n == CHUNK)
                *overlap += keep_gradient(CHUNK, T, g, w, ascent + at, gradient + at, sums + filter, next);
            else
                *overlap += keep_gradient(n, T, g, w, ascent + at, gradient + at, sums + filter, next);
        }
    }
}

/* Between a kernel's taps and half the sum and the difference of opposite ones, up to the root of 2: orthogonal. */
INLINE void fold(int64_t T, float factor, const float *restrict kernel, float *restrict folded, int64_t step) {
    const float half_root = 0.70710678f * factor;
    for (int64_t t = 0; t < T / 2; t++) {
        folded[t * step] = half_root * (kernel[t] + kernel[T - 1 - t]);
        folded[(T - T / 2 + t) * step] = half_root * (kernel[t] - kernel[T - 1 - t]);
    }
    if (T % 2)
        folded[T / 2 * step] = factor * kernel[T / 2];
}

INLINE void unfold(int64_t T, const float *restrict folded, int64_t step, float *restrict kernel) {
    const float half_root = 0.70710678f;
    for (int64_t t = 0; t < T / 2; t++) {
        const float sum = folded[t * step], difference = folded[(T - T / 2 + t) * step];
        kernel[t] = half_root * (sum + difference);
        kernel[T - 1 - t] = half_root * (sum - difference);
    }
    if (T % 2)
        kernel[T / 2] = folded[T / 2 * step];
}

INLINE double similarity_sized(const Layout *l, Sizes z, const float *kernels, const float *factors, float *gradient,
                               float *scratch) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters, C = l->channels;
    const float taken[CHUNK] = {0};
    float *all_x = scratch, *lanes = all_x + chunks(l) * N * CHUNK, *w = lanes + F * CHUNK;
    double sum = 0;
    for (int64_t row = 0; row < l->groups * C; row++) {
        const int64_t first = (row / C * M * C + row % C) * T; /* the kernel of the first filter */
        float energies[CHUNK] = {0};
        for (int64_t i = 0; i < F * CHUNK; i++) lanes[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK;
            if (n < CHUNK)
                for (int64_t i = 0; i < T * CHUNK; i++) w[i] = 0;
            for (int64_t i = 0; i < n; i++)
                fold(T, factors[row / C * M + m + i], kernels + first + (m + i) * C * T, w + i, CHUNK);
            transform(l, z, w, all_x + m * N, lanes);
        }
        for (int64_t f = 0; f < F; f++) lanes[f] = total(lanes + f * CHUNK);
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK;
            differentiate(l, z, lanes, taken, all_x + m * N, w, energies);
            for (int64_t i = 0; i < n; i++) unfold(T, w + i, CHUNK, gradient + first + (m + i) * C * T);
        }
        sum += total(energies);
    }
    return sum / 2;
}

/* Turn the ascents to gradient + beta * ascent + lean * weights, and look along them: with the power at distance t
 * P0 - 2 t P1 + t^2 (P2 + slow * P0) on the coarse lattice, how the terms i <= j are coupled; couplings[3, 3]. */
INLINE void aim_sized(const Layout *l, Sizes z, float beta, const float *lean, const float *slow, const float *weights,
                      const float *gradient, float *ascent, float *scratch, double *couplings) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters;
    float *w = scratch, *a = w + T * CHUNK, *wx = l->coarse_first ? a + T * CHUNK : w;
    float *ax = l->coarse_first ? wx + N * CHUNK : a, *lanes = a + (T + 2 * N) * CHUNK, none[CHUNK] = {0};
    for (int64_t i = 0; i < 9; i++) couplings[i] = 0;

    for (int64_t row = l->groups * l->channels; row-- > 0;) { /* backwards: what was seen last is still in the cache */
        const int64_t group = row / l->channels * M;
        float products[5][CHUNK] = {{0}};
        for (int64_t i = 0; i < 3 * F * CHUNK; i++) lanes[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            float slower[CHUNK] = {0};
            expect(weights + at - M * T, n * T);
            expect(ascent + at - M * T, n * T);
            expect(gradient + at - M * T, n * T);
            for (int64_t i = 0; i < n; i++) slower[i] = slow[filter + i];
            if (n == CHUNK) {
                turn(CHUNK, T, beta, lean + filter, weights + at, gradient + at, ascent + at, w, a);
            } else {
                for (int64_t i = 0; i < 2 * T * CHUNK; i++) w[i] = 0;
                turn(n, T, beta, lean + filter, weights + at, gradient + at, ascent + at, w, a);
            }
            if (l->coarse_first) {
                project(l->coarse_first, l->coarse_second, z, w, wx);
                project(l->coarse_first, l->coarse_second, z, a, ax);
            }
            for (int64_t f = 0; f < F; f++) {
                const float *wc = wx + f * CHUNK, *ws = f ? wc + (F - 1) * CHUNK : none; /* cosines, sines */
                const float *ac = ax + f * CHUNK, *as = f ? ac + (F - 1) * CHUNK : none;
                const float scale = f ? 1 : l->coarse_constant;
                float *s = lanes + 3 * f * CHUNK;
                for (int64_t i = 0; i < CHUNK; i++) {
                    const float p0 = scale * (wc[i] * wc[i] + ws[i] * ws[i]);
                    const float p1 = scale * (wc[i] * ac[i] + ws[i] * as[i]);
                    const float p2 = scale * (ac[i] * ac[i] + as[i] * as[i]) + slower[i] * p0;
                    s[i] += p0, s[CHUNK + i] += p1, s[2 * CHUNK + i] += p2;
                    products[0][i] += p0 * p1, products[1][i] += p0 * p2, products[2][i] += p1 * p1;
                    products[3][i] += p1 * p2, products[4][i] += p2 * p2;
                }
            }
        }
        for (int64_t f = 0; f < F; f++) {
            const float *s = lanes + 3 * f * CHUNK;
            const double s0 = total(s), s1 = total(s + CHUNK), s2 = total(s + 2 * CHUNK);
            couplings[1] += s0 * s1, couplings[2] += s0 * s2, couplings[4] += s1 * s1;
            couplings[5] += s1 * s2, couplings[8] += s2 * s2;
        }
        couplings[1] -= total(products[0]), couplings[2] -= total(products[1]), couplings[4] -= total(products[2]);
        couplings[5] -= total(products[3]), couplings[8] -= total(products[4]);
    }
}

FOR_EVERY_PROCESSOR
void arrive(const Layout *l, const float *keep, const float *add, const float *all_taken, float *weights,
            const float *ascent, float *gradient, float *scratch, double *sums, double *overlap) {
    if (same(l->full, FULL_3X3))
        arrive_sized(l, FULL_3X3, keep, add, all_taken, weights, ascent, gradient, scratch, sums, overlap);
    else if (same(l->full, ALL_1X1))
        arrive_sized(l, ALL_1X1, keep, add, all_taken, weights, ascent, gradient, scratch, sums, overlap);
    else
        arrive_sized(l, l->full, keep, add, all_taken, weights, ascent, gradient, scratch, sums, overlap);
}
FOR_EVERY_PROCESSOR
void aim(const Layout *l, float beta, const float *lean, const float *slow, const float *weights, const float *gradient,
         float *ascent, float *scratch, double *couplings) {
    if (same(l->coarse, COARSE_3X3))
        aim_sized(l, COARSE_3X3, beta, lean, slow, weights, gradient, ascent, scratch, couplings);
    else if (same(l->coarse, ALL_1X1))
        aim_sized(l, ALL_1X1, beta, lean, slow, weights, gradient, ascent, scratch, couplings);
    else
        aim_sized(l, l->coarse, beta, lean, slow, weights, gradient, ascent, scratch, couplings);
}

INLINE double dot(int64_t n, const float *a, const float *b) {
    float lanes[CHUNK] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + CHUNK <= n; i += CHUNK)
        for (int64_t j = 0; j < CHUNK; j++) lanes[j] += a[i + j] * b[i + j];
    for (; i < n; i++) rest += a[i] * b[i];
    return (double)total(lanes) + rest;
}

/* Similarity of a layer's kernels [g, M, c, T], as they lie in its weight, and its gradient; with a radius, that of
 * filters scaled to this norm, or -1 where one is too short or too long for that. The basis is that over folded kernels. */
FOR_EVERY_PROCESSOR
double similarity(const Layout *l, float radius, const float *kernels, float *gradient, float *scratch) {
    const int64_t filters = l->groups * l->filters, length = l->channels * l->full.taps;
    float *factors = scratch, *rest = scratch + filters;
    for (int64_t i = 0; i < filters; i++) {
        const double squares = radius ? dot(length, kernels + i * length, kernels + i * length) : 1;
        if (!(squares > SMALL_SQUARE && squares < LARGE_SQUARE)) return -1;
        factors[i] = radius ? radius / sqrt(squares) : 1;
    }
    const double found = same(l->full, FULL_3X3)  ? similarity_sized(l, FULL_3X3, kernels, factors, gradient, rest)
                         : same(l->full, ALL_1X1) ? similarity_sized(l, ALL_1X1, kernels, factors, gradient, rest)
                                                  : similarity_sized(l, l->full, kernels, factors, gradient, rest);
    for (int64_t i = 0; radius && i < filters; i++) { /* what lies along a filter does not count */
        const float *w = kernels + i * length;
        float *g = gradient + i * length;
        const float factor = factors[i], along = dot(length, g, w) * (factor / radius) * (factor / radius);
        for (int64_t j = 0; j < length; j++) g[j] = factor * (g[j] - along * w[j]);
    }
    return found;
}
