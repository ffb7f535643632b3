// A few tokens, the next of each answer, through a whole language model on the cores of a CPU. See
// decode.py.
//
// To make a token every weight is read once and used once, so the speed is that of the memory, if
// nothing else takes time. Here little else does: there is one parallel region, in which each
// thread takes its share of the rows of every matrix, and seven places a layer where all wait:
//
//     h = norm(x)                                               | wait
//     q, k, v = W h, rotated; k and v into the cache            | wait
//     a = softmax(q k / sqrt(A)) v, a head at a time            | wait
//     x = x + W_o a                                             | wait
//     h = norm(x)                                               | wait
//     u = silu(W_gate h) * W_up h                               | wait
//     x = x + W_down u                                          | wait
//
// One row's x is multiplied a register of features at a time. Of several rows each has a lane of
// the registers instead, and a weight is multiplied with all of them at once: sixteen answers take
// three times as long as one. Sums are in float32, in one order for any number of threads.
//
// Letters as in llm.py: D features, H query heads, G key/value heads, A features a head, F hidden
// features, V words. C answers, T tokens of each, B = C T rows; N slots of the cache.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct bfloat16 { uint16_t bits; };

#ifndef WEIGHT
#define WEIGHT float  // of the matrices: float, bfloat16, or int8_t with a scale a row
#define CACHE float   // of keys and values: float or bfloat16
#endif

// ------------------------------------------------- numbers, as many as a register holds

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
#define VECTOR(type) __attribute__((vector_size(WIDTH * sizeof(type)))) type
typedef VECTOR(float) floats;

template <class V> static inline V read(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline floats load(const float *p) { return read<floats>(p); }
#ifdef __AVX512F__  // in one instruction, which compilers do not find
static inline floats load(const bfloat16 *p) {
    return (floats)(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16));
}
static inline floats load(const int8_t *p) {
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(p)));
}
#else
static inline floats load(const bfloat16 *p) {
    typedef VECTOR(uint16_t) halves;
    typedef VECTOR(uint32_t) wholes;
    return (floats)(__builtin_convertvector(read<halves>(p), wholes) << 16);
}
static inline floats load(const int8_t *p) {
    typedef VECTOR(int8_t) bytes;
    typedef VECTOR(int32_t) wholes;
    return __builtin_convertvector(__builtin_convertvector(read<bytes>(p), wholes), floats);
}
#endif

static inline float value(float x) { return x; }
static inline float value(int8_t x) { return x; }
static inline float value(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    return read<float>(&bits);
}
static inline void put(float *p, float x) { *p = x; }
static inline void put(bfloat16 *p, float x) {  // the nearest, ties to even; NaN stays NaN
    uint32_t bits = read<uint32_t>(&x);
    p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// e^x to two units in the last place, without a branch, so that loops of it use whole registers
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = std::rint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2
    float p = (1.9875691e-4f * r + 1.3981999e-3f) * r + 8.3334519e-3f;
    p = ((p * r + 4.1665796e-2f) * r + 1.6666665e-1f) * r + 0.5f;
    uint32_t power = (uint32_t)((int)n + 127) << 23;
    return (p * r * r + r + 1) * read<float>(&power);
}

// What a matrix is multiplied with: bfloat16, if the processor multiplies pairs of them.
#ifdef __AVX512BF16__
constexpr int PAIR = std::is_same_v<WEIGHT, bfloat16> ? 2 : 1;
typedef std::conditional_t<PAIR == 2, bfloat16, float> input;
static inline floats add_product(floats sum, const bfloat16 *w, const bfloat16 *x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, read<__m512bh>(w), read<__m512bh>(x));
}
static inline floats add_to_lanes(floats sum, const bfloat16 *w, const bfloat16 *x) {
    __m512bh pair = (__m512bh)_mm512_set1_epi32(read<int>(w));
    return (floats)_mm512_dpbf16_ps((__m512)sum, pair, read<__m512bh>(x));
}
#else
constexpr int PAIR = 1;
typedef float input;
#endif
constexpr int ROWS = 8;  // of a matrix at once, where x has its rows in lanes
template <class T> static inline floats add_product(floats sum, const T *w, const float *x) {
    return sum + load(w) * load(x);
}
template <class T> static inline floats add_to_lanes(floats sum, const T *w, const float *x) {
    return sum + value(*w) * load(x);
}

// Place of feature d of row b: alone, features in order; else the same pair of WIDTH rows together.
static inline size_t place(int B, int D, int b, int d) {
    if (B == 1) return d;
    size_t pairs = (D + PAIR - 1) / PAIR;
    return ((b / WIDTH * pairs + d / PAIR) * WIDTH + b % WIDTH) * PAIR + d % PAIR;
}

static inline float total(floats v) {
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}

// w times x. Four sums are under way at once: one would wait for itself.
template <class T, class X> static inline float dot(const T *w, const X *x, int D) {
    constexpr int width = std::is_same_v<X, float> ? WIDTH : 2 * WIDTH;
    floats sum[4] = {};
    int d = 0;
    for (; d + 4 * width <= D; d += 4 * width)
        for (int u = 0, e = d; u < 4; u++, e += width) sum[u] = add_product(sum[u], w + e, x + e);
    for (int u = 0; d + width <= D; d += width, u++) sum[u] = add_product(sum[u], w + d, x + d);
    float y = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; d < D; d++) y += value(w[d]) * value(x[d]);
    return y;
}

// y[r] = row r of w times x, for R rows of w, and a row of x in each lane
template <int R, class T> static inline void lanes(const T *w, const input *x, int D, floats *y) {
    floats sum[R] = {};
    int d = 0;
    for (; d + PAIR <= D; d += PAIR)
        for (int r = 0; r < R; r++)
            sum[r] = add_to_lanes(sum[r], w + (size_t)r * D + d, x + (size_t)d * WIDTH);
    for (int r = 0; r < R; r++) {
        T last[2] = {d < D ? w[(size_t)r * D + d] : T()};
        y[r] = d < D ? add_to_lanes(sum[r], last, x + (size_t)d * WIDTH) : sum[r];
    }
}

// ------------------------------------------------- the parts of a block

struct Matrix {
    const WEIGHT *weight;  // [F, D]
    const float *scale;    // [F], or null
};

template <class T> static inline void convert(const T *w, int n, float *out) {
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        floats v = load(w + i);
        memcpy(out + i, &v, sizeof v);
    }
    for (; i < n; i++) out[i] = value(w[i]);
}

// done(b, f, y) for y = row f of the matrix times row b of x, for f from first up to last
template <class Done>
static void product(Matrix m, const input *x, int B, int D, int first, int last, Done done) {
    if (B == 1) {
        for (int f = first; f < last; f++)
            done(0, f, dot(m.weight + (size_t)f * D, x, D) * (m.scale ? m.scale[f] : 1));
        return;
    }
    typedef std::conditional_t<PAIR == 2, WEIGHT, float> ready;
    constexpr bool is_ready = std::is_same_v<WEIGHT, ready>;
    ready buffer[is_ready ? 1 : ROWS * D];
    for (int f = first, rows; f < last; f += rows) {
        rows = f + ROWS <= last ? ROWS : 1;
        const ready *w = buffer;
        if constexpr (is_ready) w = m.weight + (size_t)f * D;
        else convert(m.weight + (size_t)f * D, rows * D, buffer);
        for (int b = 0; b < B; b += WIDTH) {
            const input *x_b = x + place(B, D, b, 0);
            floats y[ROWS];
            rows == 1 ? lanes<1>(w, x_b, D, y) : lanes<ROWS>(w, x_b, D, y);
            for (int r = 0; r < rows && m.scale; r++) y[r] *= m.scale[f + r];
            int used = b + WIDTH <= B ? WIDTH : B - b;
            for (int i = 0; i < used; i++)
                for (int r = 0; r < rows; r++) done(b + i, f + r, y[r][i]);
        }
    }
}

struct Layer {
    const float *norm1, *norm2;
    Matrix q, k, v, o, gate, up, down;
    CACHE *keys, *values;  // [C, G, N, A]
};

struct Step {
    int C, T, B, D, H, G, A, F, V, N, layers, threads;
    int window, used, slot;  // 0: none; slots in use, those of these tokens too; that of the first
    float eps;
    const float *frequency, *norm;  // [A / 2] of RoPE; [D]
    int64_t *places;                // [C, 2, N] position and segment of each slot
    const int64_t *position;        // [C] of the first token
    const Layer *layer;
    Matrix head;
    float *cos, *sin;               // [B, A / 2] of the angles
    float *x, *q, *logits, *score;  // [B, D], [B, H, A], [C, V], [threads, N]
    input *a, *u, *h;               // [B, H A], [B, F], [B, D]: see `place`; zeros between
};

struct Share { int first, last; };
static Share share(int n, int unit = 1) {  // of n things, what this thread does, in whole units
    long t = omp_get_thread_num(), T = omp_get_num_threads(), units = (n + unit - 1) / unit;
    int first = units * t / T * unit, last = units * (t + 1) / T * unit;
    return {first, last < n ? last : n};
}

// h = norm of x, or of the last of each `step` rows of x
static void norm(const Step &s, const float *weight, int step = 1) {
    int B = s.B / step;
    Share rows = share(B);
    for (int b = rows.first; b < rows.last; b++) {
        const float *x = s.x + (size_t)(b * step + step - 1) * s.D;
        float scale = 1 / std::sqrt(dot(x, x, s.D) / s.D + s.eps);
        for (int d = 0; d < s.D; d++) put(s.h + place(B, s.D, b, d), x[d] * scale * weight[d]);
    }
#pragma omp barrier
}

// Head n of q, k and v together, counted in this order
static void project(const Step &s, const Layer &l, int n) {
    bool is_q = n < s.H, is_k = !is_q && n < s.H + s.G;
    int head = is_q ? n : is_k ? n - s.H : n - s.H - s.G, A = s.A;
    float y[s.B * A];
    product(is_q ? l.q : is_k ? l.k : l.v, s.h, s.B, s.D, head * A, (head + 1) * A,
            [&](int b, int f, float x) { y[b * A + f - head * A] = x; });
    for (int b = 0; b < s.B; b++) {
        float *z = y + b * A;
        for (int i = 0; i < A / 2 && (is_q || is_k); i++) {  // RoPE, as in llm.rotate
            float cos = s.cos[b * A / 2 + i], sin = s.sin[b * A / 2 + i];
            float first = z[i], second = z[i + A / 2];
            z[i] = first * cos - second * sin;
            z[i + A / 2] = second * cos + first * sin;
        }
        size_t row = (size_t)(b / s.T * s.G + head) * s.N + s.slot + b % s.T;
        CACHE *slot = (is_k ? l.keys : l.values) + row * A;
        for (int i = 0; i < A; i++)
            if (is_q)
                s.q[(size_t)(b * s.H + head) * A + i] = z[i] / std::sqrt((float)A);
            else
                put(slot + i, z[i]);
    }
}

// Head n of row b: what its query finds in the cache, as in llm.sees
static void attend(const Step &s, const Layer &l, int b, int n, float *score) {
    size_t start = (size_t)(b / s.T * s.G + n / (s.H / s.G)) * s.N * s.A;
    const float *q = s.q + ((size_t)b * s.H + n) * s.A;
    const int64_t *position = s.places + (size_t)b / s.T * 2 * s.N, *segment = position + s.N;
    int64_t here = s.position[b / s.T] + b % s.T;
    float most = -INFINITY, total = 0, out[s.A];
    for (int i = 0; i < s.used; i++) {
        bool near = position[i] <= here && (!s.window || here - position[i] < s.window);
        score[i] = -INFINITY;
        if (segment[i] == 1 && near)
            score[i] = dot(l.keys + start + (size_t)i * s.A, q, s.A);
        most = std::fmax(most, score[i]);
    }
    for (int i = 0; i < s.used; i++)
        score[i] = score[i] == -INFINITY ? 0 : exponential(score[i] - most);
    for (int j = 0; j < s.A; j++) out[j] = 0;
    for (int i = 0; i < s.used; i++) {
        if (score[i] == 0) continue;
        const CACHE *v = l.values + start + (size_t)i * s.A;
        total += score[i];
        for (int j = 0; j < s.A; j++) out[j] += score[i] * value(v[j]);
    }
    for (int j = 0; j < s.A; j++)
        put(s.a + place(s.B, s.H * s.A, b, n * s.A + j), out[j] / total);
}

static void mlp(const Step &s, const Layer &l, int first, int last) {
    constexpr int rows = 16;  // of each matrix in turn
    float gate[s.B * rows];
    for (int f = first; f < last; f += rows) {
        int end = f + rows < last ? f + rows : last;
        product(l.gate, s.h, s.B, s.D, f, end,
                [&](int b, int i, float y) { gate[b * rows + i - f] = y; });
        for (int i = 0; i < s.B * rows; i++) gate[i] /= 1 + exponential(-gate[i]);
        product(l.up, s.h, s.B, s.D, f, end, [&](int b, int i, float y) {
            put(s.u + place(s.B, s.F, b, i), gate[b * rows + i - f] * y);
        });
    }
}

extern "C" void step(const Step *step) {
    const Step &s = *step;
    int B = s.B, D = s.D;
    for (int b = 0; b < B; b++) {
        int64_t *place = s.places + (size_t)b / s.T * 2 * s.N + s.slot + b % s.T;
        place[0] = s.position[b / s.T] + b % s.T, place[s.N] = 1;
        for (int i = 0; i < s.A / 2; i++) {
            float angle = place[0] * s.frequency[i];
            s.cos[b * s.A / 2 + i] = std::cos(angle), s.sin[b * s.A / 2 + i] = std::sin(angle);
        }
    }
#pragma omp parallel num_threads(s.threads)
    {
        float *score = s.score + (size_t)omp_get_thread_num() * s.N;
        Share heads = share(s.H + 2 * s.G), queries = share(B * s.H);
        Share features = share(D, ROWS), hidden = share(s.F, ROWS), words = share(s.V, ROWS);
        auto add = [&](int b, int f, float y) { s.x[(size_t)b * D + f] += y; };
        for (int i = 0; i < s.layers; i++) {
            const Layer &l = s.layer[i];
            norm(s, l.norm1);
            for (int n = heads.first; n < heads.last; n++) project(s, l, n);
#pragma omp barrier
            for (int n = queries.first; n < queries.last; n++)
                attend(s, l, n / s.H, n % s.H, score);
#pragma omp barrier
            product(l.o, s.a, B, s.H * s.A, features.first, features.last, add);
#pragma omp barrier
            norm(s, l.norm2);
            mlp(s, l, hidden.first, hidden.last);
#pragma omp barrier
            product(l.down, s.u, B, s.F, features.first, features.last, add);
#pragma omp barrier
        }
        norm(s, s.norm, s.T);  // of the last tokens
        product(s.head, s.h, s.C, D, words.first, words.last,
                [&](int b, int f, float y) { s.logits[(size_t)b * s.V + f] = y; });
    }
}
