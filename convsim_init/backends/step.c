/* The two passes of a conjugate-gradient step over a block of a layer, `evaluate` and `turn`, and the
 * similarity of a layer with its gradient for the regularizer. What torch's operations do in many
 * passes over the block, each of these does channel by channel in one, with all intermediate values in
 * a core's cache: see backends/block.py for what they compute, optim/conjugate_gradient.py for why.
 *
 * A block is [g, c, M, T]: g groups, c channels, M filters, T taps a kernel, of which the first are even; but within
 * each CHUNK of filters (the last one may be smaller) the taps come before the filters, so that memory is read and
 * written from end to end. The spectrum of a kernel has N rows: F cosines, then N - F sines. Only what the defaults
 * need: float32, all pairs, matched channels.
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Compiled once for each width of the processors' vectors: step_avx2.c and step_avx512.c include this file, and set
 * LANES. A vector that is wider than the processor's is kept in memory, 25 times as slow. Windows aligns the stack to
 * 16 bytes and gcc expects 32: only if setup.py has the assembler move vectors as unaligned, and says so. */
#if defined(__x86_64__) && (defined(__ELF__) || defined(MOVES_UNALIGNED)) && defined(__GNUC__) && !defined(__clang__)
#define WIDER
#endif
#ifndef LANES
#define LANES 4
#endif
#define JOIN(name, lanes) name##_##lanes
#define NAME(name, lanes) JOIN(name, lanes)
#define INLINE static inline __attribute__((always_inline))

#define SMALL_SQUARE 1e-30 /* of norms: within, nothing is lost in single precision */
#define LARGE_SQUARE 1e30
enum { CHUNK = 32, PARTS = CHUNK / LANES }; /* filters at a time, and vectors of them */
/* aligned(4), for a chunk may begin at any float; may_alias, for it is memory of floats. */
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

/* For these the loops have a length that the compiler knows: 10 % faster. Not worth its time for old processors. */
#if defined(WIDER) && LANES == 4
#define SPECIALIZED 0
#else
#define SPECIALIZED 1
#endif
static const Sizes FULL_3X3 = {9, 5, 25, 13}, COARSE_3X3 = {9, 5, 9, 5}, ALL_1X1 = {1, 1, 1, 1};

INLINE int same(Sizes a, Sizes b) {
    return SPECIALIZED && a.taps == b.taps && a.even == b.even && a.points == b.points && a.cosines == b.cosines;
}

/* A function of these sizes first, or of n filters first: by themselves where the compiler knows them. */
#define SIZED(z, usual, function, ...)                   \
    (same(z, usual)     ? function(usual, __VA_ARGS__)   \
     : same(z, ALL_1X1) ? function(ALL_1X1, __VA_ARGS__) \
                        : function(z, __VA_ARGS__))
#define FILTERS(n, function, ...) (n == CHUNK ? function(CHUNK, __VA_ARGS__) : function(n, __VA_ARGS__))

/* To be raised, with INTERFACE in compiled.py, whenever a function or the layout changes: a library that
 * was built from an older version is then not used. */
#if LANES == 4
int64_t interface_version(void) { return 4; }

int64_t chunk_size(void) { return CHUNK; }

/* How wide the vectors are of this processor: the functions to be called end in this number. */
int64_t lanes(void) {
#ifdef WIDER
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return LANES;
}
#endif

INLINE int64_t chunks(const Layout *l) { return (l->filters + CHUNK - 1) / CHUNK; }

/* Two rows [CHUNK] of a matrix product, or twice the same one. */
INLINE void two_rows(const float *a, const float *b, int64_t step, int64_t columns, const float *restrict in,
                     float *out_a, float *out_b, float factor) {
    Vector sums_a[PARTS] = {0}, sums_b[PARTS] = {0}; /* kept in registers */
    for (int64_t t = 0; t < columns; t++, in += CHUNK, a += step, b += step)
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) {
            const Vector part = ((const Vector *)in)[p];
            sums_a[p] += *a * part, sums_b[p] += *b * part;
        }
#pragma GCC unroll 8
    for (int p = 0; p < PARTS; p++) {
        ((Vector *)out_a)[p] = factor * sums_a[p];
        ((Vector *)out_b)[p] = factor * sums_b[p];
    }
}

/* out[rows, CHUNK] = factor * matrix[rows, columns] @ in[columns, CHUNK]; steps exchanged: its transpose. */
INLINE void product(const float *restrict matrix, int64_t row_step, int64_t column_step, int64_t rows, int64_t columns,
                    const float *restrict in, float *restrict out, float factor) {
    for (int64_t r = 0; r < rows; r += 2) {
        /* An odd last row is computed twice, into one place: so neither out is restrict. */
        const int64_t other = r + 1 < rows ? r + 1 : r;
        two_rows(matrix + r * row_step, matrix + other * row_step, column_step, columns, in, out + r * CHUNK,
                 out + other * CHUNK, factor);
    }
}

/* Ask for memory that is needed soon, so that it arrives during other work. The address may lie beyond the
 * block: a prefetch never faults. */
INLINE void prefetch(const float *memory, int64_t floats) {
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(memory + i, 1, 2);
}

/* The order of a sum is fixed by the code, never by the compiler: the same bits on any number of threads. */
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
    const float zeros[CHUNK] = {0}; /* the constant has no sine */
    project(l->first, l->second, z, w, x);
    for (int64_t f = 0; f < F; f++) {
        const float *cosine = x + f * CHUNK, *sine = f ? cosine + (F - 1) * CHUNK : zeros;
        for (int64_t i = 0; i < CHUNK; i++) powers[f * CHUNK + i] += cosine[i] * cosine[i] + sine[i] * sine[i];
    }
}

/* The gradient of a chunk of kernels, less 2 * shift * weights, from their spectra x (overwritten) and the
 * power of all filters: with P a filter's own power and S the sum of all, dCS/dx = 2 (S - P) x. The shift is
 * subtracted from S - P, where it costs nothing: the basis takes l->identity to twice the weights.
 * <P, S - P> is added to energies, unless that is null. */
INLINE void differentiate(const Layout *l, Sizes z, const float *restrict powers, const float *restrict shift,
                          float *restrict x, float *restrict g, float *restrict energies) {
    const int64_t T = z.taps, even = z.even, N = z.points, F = z.cosines;
    float zeros[CHUNK] = {0};
    for (int64_t f = 0; f < F; f++) {
        float *cosine = x + f * CHUNK, *sine = f ? cosine + (F - 1) * CHUNK : zeros;
        for (int64_t i = 0; i < CHUNK; i++) {
            const float power = cosine[i] * cosine[i] + sine[i] * sine[i];
            const float partners = powers[f] - power - shift[i] * l->identity[f];
            if (energies) energies[i] += power * partners;
            cosine[i] *= partners;
            sine[i] *= partners;
        }
    }
    product(l->first, 1, even, even, F, x, g, 2);
    product(l->second, 1, T - even, T - even, N - F, x + F * CHUNK, g + even * CHUNK, 2);
}

/* Move n filters' weights and copy them to a chunk, whose other filters are zero already. */
INLINE void move(int64_t n, int64_t taps, const float *restrict keep, const float *restrict add,
                 float *restrict weights, const float *restrict direction, float *restrict chunk,
                 double *restrict squares) {
    float sums[CHUNK] = {0};
    for (int64_t t = 0; t < taps; t++, weights += n, direction += n, chunk += CHUNK)
        for (int64_t i = 0; i < n; i++) {
            chunk[i] = weights[i] = weights[i] * keep[i] + direction[i] * add[i];
            sums[i] += chunk[i] * chunk[i];
        }
    for (int64_t i = 0; i < n; i++) squares[i] += sums[i];
}

/* Store n filters' gradient over the previous one, and add to the sums per filter; return the inner product
 * of the two gradients, over all n. */
INLINE float keep_gradient(int64_t n, int64_t taps, const float *restrict chunk, const float *restrict weights,
                           const float *restrict direction, float *restrict gradient, double *restrict sums,
                           int64_t next) {
    float dot_weights[CHUNK] = {0}, squares[CHUNK] = {0}, dot_direction[CHUNK] = {0}, dot_previous[CHUNK] = {0};
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t i = 0; i < n; i++) {
            const float g = chunk[i];
            dot_weights[i] += g * weights[i];
            squares[i] += g * g;
            dot_direction[i] += g * direction[i];
            dot_previous[i] += g * gradient[i];
            gradient[i] = g;
        }
        chunk += CHUNK, weights += CHUNK, gradient += n, direction += n;
    }
    for (int64_t i = 0; i < n; i++) {
        sums[i] += dot_weights[i];
        sums[next + i] += squares[i];
        sums[2 * next + i] += dot_direction[i];
    }
    return total(dot_previous);
}

/* Turn n filters' directions, and copy them and the weights to chunks. */
INLINE void turn_chunk(int64_t n, int64_t taps, float beta, const float *restrict weight_coefficient,
                       const float *restrict weights, const float *restrict gradient, float *restrict direction,
                       float *restrict weights_chunk, float *restrict direction_chunk) {
    for (int64_t t = 0; t < taps; t++) {
        for (int64_t i = 0; i < n; i++) {
            weights_chunk[i] = weights[i];
            direction_chunk[i] = direction[i] = gradient[i] + beta * direction[i] + weight_coefficient[i] * weights[i];
        }
        weights += n, gradient += n, direction += n, weights_chunk += CHUNK, direction_chunk += CHUNK;
    }
}

/* Floats of scratch memory that any function needs. */
#if LANES == 4
int64_t scratch_size(const Layout *l) {
    const int64_t evaluation = chunks(l) * (l->full.taps + l->full.points) + l->full.cosines + l->full.taps;
    const int64_t turning = 2 * (l->coarse.taps + l->coarse.points) + 3 * l->coarse.cosines;
    /* The last ones are the factors of `similarity`. */
    return CHUNK * (evaluation > turning ? evaluation : turning) + l->groups * l->filters;
}
#endif

/* Move to weights * keep + direction * add (both per filter), and take the gradient there, less
 * all_shifts * weights. sums[4, g, M]: inner products of that gradient with the weights, itself and the
 * direction; squared norms of the weights. */
INLINE void evaluate_sized(Sizes z, const Layout *l, const float *keep, const float *add, const float *all_shifts,
                           float *weights, const float *direction, float *gradient, float *scratch, double *sums,
                           double *dot_previous) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters, next = l->groups * M; /* between sums */
    float *all_w = scratch, *all_x = all_w + chunks(l) * T * CHUNK, *power_sums = all_x + chunks(l) * N * CHUNK;
    float *g = power_sums + F * CHUNK;
    for (int64_t i = 0; i < 4 * next; i++) sums[i] = 0;
    *dot_previous = 0;

    for (int64_t row = 0; row < l->groups * l->channels; row++) {
        const int64_t group = row / l->channels * M;
        for (int64_t i = 0; i < F * CHUNK; i++) power_sums[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            /* m is a multiple of CHUNK: the chunks before this one have m T floats. */
            float *w = all_w + m * T, *x = all_x + m * N;
            prefetch(gradient + at, n * T);
            /* Filters that are not there must add no power; scratch memory may hold any numbers. */
            if (n < CHUNK)
                for (int64_t i = 0; i < T * CHUNK; i++) w[i] = 0;
            FILTERS(n, move, T, keep + filter, add + filter, weights + at, direction + at, w, sums + 3 * next + filter);
            transform(l, z, w, x, power_sums);
        }
        /* In place: f <= f * CHUNK, so that only what has been summed is written over. */
        for (int64_t f = 0; f < F; f++) power_sums[f] = total(power_sums + f * CHUNK);
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            float *w = all_w + m * T, *x = all_x + m * N, shift[CHUNK] = {0};
            prefetch(weights + at + M * T, n * T);
            prefetch(direction + at + M * T, n * T);
            /* Half of it: the transposed basis is doubled, as in dCS/dx = 2 (S - P) x. */
            for (int64_t i = 0; i < n; i++) shift[i] = all_shifts[filter + i] / 2;
            differentiate(l, z, power_sums, shift, x, g, NULL);
            *dot_previous += FILTERS(n, keep_gradient, T, g, w, direction + at, gradient + at, sums + filter, next);
        }
    }
}

/* From a kernel's taps to the sums and differences of opposite taps, over the root of 2: orthogonal. */
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

INLINE double similarity_sized(Sizes z, const Layout *l, const float *kernels, const float *factors, float *gradient,
                               float *scratch) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters, C = l->channels;
    const float shift[CHUNK] = {0};
    float *all_x = scratch, *power_sums = all_x + chunks(l) * N * CHUNK, *w = power_sums + F * CHUNK;
    double sum = 0;
    for (int64_t row = 0; row < l->groups * C; row++) {
        const int64_t first = (row / C * M * C + row % C) * T; /* the kernel of the first filter */
        float energies[CHUNK] = {0};
        for (int64_t i = 0; i < F * CHUNK; i++) power_sums[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK;
            if (n < CHUNK)
                for (int64_t i = 0; i < T * CHUNK; i++) w[i] = 0;
            for (int64_t i = 0; i < n; i++)
                fold(T, factors[row / C * M + m + i], kernels + first + (m + i) * C * T, w + i, CHUNK);
            transform(l, z, w, all_x + m * N, power_sums);
        }
        for (int64_t f = 0; f < F; f++) power_sums[f] = total(power_sums + f * CHUNK);
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK;
            differentiate(l, z, power_sums, shift, all_x + m * N, w, energies);
            for (int64_t i = 0; i < n; i++) unfold(T, w + i, CHUNK, gradient + first + (m + i) * C * T);
        }
        sum += total(energies);
    }
    return sum / 2;
}

/* Turn the directions to gradient + beta * direction + weight_coefficient * weights, and expand the loss
 * along them: with the power P0 - 2 t P1 + t^2 P2 on the coarse lattice, P2 including curvature * P0, the
 * coefficients[3, 3] are <P_i, S_j - P_j> for i <= j, (0, 0) aside, S the sums over filters. */
INLINE void turn_sized(Sizes z, const Layout *l, float beta, const float *weight_coefficient, const float *curvature,
                       const float *weights, const float *gradient, float *direction, float *scratch,
                       double *coefficients) {
    const int64_t T = z.taps, N = z.points, F = z.cosines, M = l->filters;
    float *w = scratch, *a = w + T * CHUNK, *wx = l->coarse_first ? a + T * CHUNK : w;
    float *ax = l->coarse_first ? wx + N * CHUNK : a, *power_sums = a + (T + 2 * N) * CHUNK, zeros[CHUNK] = {0};
    for (int64_t i = 0; i < 9; i++) coefficients[i] = 0;

    for (int64_t row = l->groups * l->channels; row-- > 0;) { /* backwards: the last ones are still in the cache */
        const int64_t group = row / l->channels * M;
        float products[5][CHUNK] = {{0}};
        for (int64_t i = 0; i < 3 * F * CHUNK; i++) power_sums[i] = 0;
        for (int64_t m = 0; m < M; m += CHUNK) {
            const int64_t n = M - m < CHUNK ? M - m : CHUNK, at = (row * M + m) * T, filter = group + m;
            float curvatures[CHUNK] = {0};
            prefetch(weights + at - M * T, n * T);
            prefetch(direction + at - M * T, n * T);
            prefetch(gradient + at - M * T, n * T);
            for (int64_t i = 0; i < n; i++) curvatures[i] = curvature[filter + i];
            /* a lies right behind w: both at once. */
            if (n < CHUNK)
                for (int64_t i = 0; i < 2 * T * CHUNK; i++) w[i] = 0;
            FILTERS(n, turn_chunk, T, beta, weight_coefficient + filter, weights + at, gradient + at, direction + at,
                    w, a);
            if (l->coarse_first) {
                project(l->coarse_first, l->coarse_second, z, w, wx);
                project(l->coarse_first, l->coarse_second, z, a, ax);
            }
            for (int64_t f = 0; f < F; f++) {
                const float *wc = wx + f * CHUNK, *ws = f ? wc + (F - 1) * CHUNK : zeros; /* cosines, sines */
                const float *ac = ax + f * CHUNK, *as = f ? ac + (F - 1) * CHUNK : zeros;
                const float scale = f ? 1 : l->coarse_constant;
                float *s = power_sums + 3 * f * CHUNK;
                for (int64_t i = 0; i < CHUNK; i++) {
                    const float p0 = scale * (wc[i] * wc[i] + ws[i] * ws[i]);
                    const float p1 = scale * (wc[i] * ac[i] + ws[i] * as[i]);
                    const float p2 = scale * (ac[i] * ac[i] + as[i] * as[i]) + curvatures[i] * p0;
                    s[i] += p0, s[CHUNK + i] += p1, s[2 * CHUNK + i] += p2;
                    products[0][i] += p0 * p1, products[1][i] += p0 * p2, products[2][i] += p1 * p1;
                    products[3][i] += p1 * p2, products[4][i] += p2 * p2;
                }
            }
        }
        for (int64_t f = 0; f < F; f++) {
            const float *s = power_sums + 3 * f * CHUNK;
            const double s0 = total(s), s1 = total(s + CHUNK), s2 = total(s + 2 * CHUNK);
            coefficients[1] += s0 * s1, coefficients[2] += s0 * s2, coefficients[4] += s1 * s1;
            coefficients[5] += s1 * s2, coefficients[8] += s2 * s2;
        }
        coefficients[1] -= total(products[0]), coefficients[2] -= total(products[1]);
        coefficients[4] -= total(products[2]), coefficients[5] -= total(products[3]);
        coefficients[8] -= total(products[4]);
    }
}

void NAME(evaluate, LANES)(const Layout *l, const float *keep, const float *add, const float *all_shifts,
                           float *weights, const float *direction, float *gradient, float *scratch, double *sums,
                           double *dot_previous) {
    SIZED(l->full, FULL_3X3, evaluate_sized, l, keep, add, all_shifts, weights, direction, gradient, scratch, sums,
          dot_previous);
}

void NAME(turn, LANES)(const Layout *l, float beta, const float *weight_coefficient, const float *curvature,
                       const float *weights, const float *gradient, float *direction, float *scratch,
                       double *coefficients) {
    SIZED(l->coarse, COARSE_3X3, turn_sized, l, beta, weight_coefficient, curvature, weights, gradient, direction,
          scratch, coefficients);
}

INLINE double dot(int64_t n, const float *a, const float *b) {
    float lanes[CHUNK] = {0}, rest = 0;
    int64_t i = 0;
    for (; i + CHUNK <= n; i += CHUNK)
        for (int64_t j = 0; j < CHUNK; j++) lanes[j] += a[i + j] * b[i + j];
    for (; i < n; i++) rest += a[i] * b[i];
    return (double)total(lanes) + rest;
}

/* Similarity of a layer's kernels [g, M, c, T], in the order of its weight, and its gradient. With a radius it
 * is that of filters scaled to this norm, or -1 where a filter is too short or too long for float32. The
 * basis is that over folded kernels. */
double NAME(similarity, LANES)(const Layout *l, float radius, const float *kernels, float *gradient, float *scratch) {
    const int64_t filters = l->groups * l->filters, length = l->channels * l->full.taps;
    float *factors = scratch, *rest = scratch + filters;
    for (int64_t i = 0; i < filters; i++) {
        const double squares = radius ? dot(length, kernels + i * length, kernels + i * length) : 1;
        /* Negated as a whole, so that NaN is refused, too. */
        if (!(squares > SMALL_SQUARE && squares < LARGE_SQUARE)) return -1;
        factors[i] = radius ? radius / sqrt(squares) : 1;
    }
    const double found = SIZED(l->full, FULL_3X3, similarity_sized, l, kernels, factors, gradient, rest);
    for (int64_t i = 0; radius && i < filters; i++) { /* project: radial changes do not count */
        /* With u = w factor / radius, of norm 1: dCS/dw = factor (g - <g, u> u). */
        const float *w = kernels + i * length;
        float *g = gradient + i * length;
        const float factor = factors[i], radial = dot(length, g, w) * (factor / radius) * (factor / radius);
        for (int64_t j = 0; j < length; j++) g[j] = factor * (g[j] - radial * w[j]);
    }
    return found;
}
