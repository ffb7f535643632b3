// One token of each row through a whole language model, on the cores of a CPU. See decode.py.
//
// To make a token every weight is read once and used once, so the speed is that of the memory, if
// nothing else takes time. Here little else does: there is one parallel region, in which each
// thread takes its share of the rows of every matrix, and five places a layer where all wait:
//
//     q, k, v = W norm(x), rotated; k and v into the cache      | wait
//     a = softmax(q k / sqrt(A)) v, a head at a time            | wait
//     x = x + W_o a                                             | wait
//     u = silu(W_gate norm(x)) * W_up norm(x)                   | wait
//     x = x + W_down u                                          | wait
//
// A thread reads its rows one after the other, a single stream: two at a time take twice as long.
// Sums are in float32. A row's sums do not depend on the other rows or on the number of threads.
//
// Letters as in llm.py: B rows, D features, H query heads, G key/value heads, A features a head,
// F hidden features, V words. N slots of the cache.

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

// What a matrix is multiplied with: bfloat16 if the processor multiplies pairs of them
#ifdef __AVX512BF16__
typedef std::conditional_t<std::is_same_v<WEIGHT, bfloat16>, bfloat16, float> input;
static inline floats add_product(floats sum, const bfloat16 *w, const bfloat16 *x) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, read<__m512bh>(w), read<__m512bh>(x));
}
#else
typedef float input;
#endif
template <class T> static inline floats add_product(floats sum, const T *w, const float *x) {
    return sum + load(w) * load(x);
}

static inline float total(floats v) {
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
}

// y[c] = w times x[c], for C rows x. Four sums are under way at once: one would wait for itself.
template <int C, class T, class X> static inline void dots(const T *w, const X *x, int D, float *y) {
    constexpr int width = std::is_same_v<X, float> ? WIDTH : 2 * WIDTH;  // a pair in place of one
    floats sum[C][4] = {};
    int d = 0;
    for (; d + 4 * width <= D; d += 4 * width)
        for (int c = 0; c < C; c++)
            for (int u = 0; u < 4; u++) {
                int e = d + u * width;
                sum[c][u] = add_product(sum[c][u], w + e, x + (size_t)c * D + e);
            }
    for (int u = 0; d + width <= D; d += width, u++)
        for (int c = 0; c < C; c++)
            sum[c][u] = add_product(sum[c][u], w + d, x + (size_t)c * D + d);
    for (int c = 0; c < C; c++) {
        y[c] = total((sum[c][0] + sum[c][1]) + (sum[c][2] + sum[c][3]));
        for (int e = d; e < D; e++) y[c] += value(w[e]) * value(x[(size_t)c * D + e]);
    }
}

// ------------------------------------------------- the parts of a block

struct Matrix {
    const WEIGHT *weight;  // [F, D]
    const float *scale;    // [F], or null
};

// done(b, f, y) for y = row f of the matrix times x[b], for f from first up to last
template <class Done>
static void product(Matrix m, const input *x, int B, int D, int first, int last, Done done) {
    for (int f = first; f < last; f++) {
        const WEIGHT *row = m.weight + (size_t)f * D;
        float y[4], scale = m.scale ? m.scale[f] : 1;
        int b = 0;
        for (; b + 4 <= B; b += 4) {
            dots<4>(row, x + (size_t)b * D, D, y);
            for (int c = 0; c < 4; c++) done(b + c, f, y[c] * scale);
        }
        for (; b < B; b++) {
            dots<1>(row, x + (size_t)b * D, D, y);
            done(b, f, y[0] * scale);
        }
    }
}

static void norm(const float *x, const float *weight, float eps, int B, int D, input *out) {
    for (int b = 0; b < B; b++, x += D, out += D) {
        float squares;
        dots<1>(x, x, D, &squares);
        float scale = 1 / std::sqrt(squares / D + eps);
        for (int d = 0; d < D; d++) put(out + d, x[d] * scale * weight[d]);
    }
}

struct Layer {
    const float *norm1, *norm2;
    Matrix q, k, v, o, gate, up, down;
    CACHE *keys, *values;  // [B, G, N, A]
};

struct Step {
    int B, D, H, G, A, F, V, N, layers, threads;
    int window, used, slot;  // 0: none; slots in use, this token's among them; this token's
    float eps;
    const float *frequency, *norm;  // [A / 2] of RoPE; [D]
    int64_t *places;                // [B, 2, N] position and segment of each slot
    const int64_t *position;        // [B] of this token
    const Layer *layer;
    Matrix head;
    float *cos, *sin;               // [B, A / 2] of its angles
    float *x, *q, *logits, *score;  // [B, D], [B, H, A], [B, V], [threads, N]
    input *a, *u, *h;               // [B, H, A], [B, F], [threads, B, D]
};

struct Share { int first, last; };
static Share share(int n) {  // of n things, what this thread does
    long t = omp_get_thread_num(), T = omp_get_num_threads();
    return {(int)(n * t / T), (int)(n * (t + 1) / T)};
}

// Head n of q, k and v together, counted in this order
static void project(const Step &s, const Layer &l, const input *h, int n) {
    bool is_q = n < s.H, is_k = !is_q && n < s.H + s.G;
    int head = is_q ? n : is_k ? n - s.H : n - s.H - s.G, A = s.A;
    float y[s.B * A];
    product(is_q ? l.q : is_k ? l.k : l.v, h, s.B, s.D, head * A, (head + 1) * A,
            [&](int b, int f, float x) { y[b * A + f - head * A] = x; });
    for (int b = 0; b < s.B; b++) {
        float *z = y + b * A;
        for (int i = 0; i < A / 2 && (is_q || is_k); i++) {  // RoPE, as in llm.rotate
            float cos = s.cos[b * A / 2 + i], sin = s.sin[b * A / 2 + i];
            float first = z[i], second = z[i + A / 2];
            z[i] = first * cos - second * sin;
            z[i + A / 2] = second * cos + first * sin;
        }
        CACHE *slot = (is_k ? l.keys : l.values) + ((size_t)(b * s.G + head) * s.N + s.slot) * A;
        for (int i = 0; i < A; i++)
            if (is_q)
                s.q[(size_t)(b * s.H + head) * A + i] = z[i] / std::sqrt((float)A);
            else
                put(slot + i, z[i]);
    }
}

// Head n of row b: what its query finds in the cache, as in llm.sees
static void attend(const Step &s, const Layer &l, int b, int n, float *score) {
    size_t start = (size_t)(b * s.G + n / (s.H / s.G)) * s.N * s.A, place = (size_t)b * s.H + n;
    const int64_t *position = s.places + (size_t)b * 2 * s.N, *segment = position + s.N;
    float most = -INFINITY, total = 0, out[s.A];
    for (int i = 0; i < s.used; i++) {
        bool near = !s.window || s.position[b] - position[i] < s.window;
        score[i] = -INFINITY;
        if (segment[i] == 1 && near)
            dots<1>(l.keys + start + (size_t)i * s.A, s.q + place * s.A, s.A, score + i);
        most = std::fmax(most, score[i]);
    }
    for (int j = 0; j < s.A; j++) out[j] = 0;
    for (int i = 0; i < s.used; i++) {
        if (score[i] == -INFINITY) continue;
        const CACHE *v = l.values + start + (size_t)i * s.A;
        float p = std::exp(score[i] - most);
        total += p;
        for (int j = 0; j < s.A; j++) out[j] += p * value(v[j]);
    }
    for (int j = 0; j < s.A; j++) put(s.a + place * s.A + j, out[j] / total);
}

static void mlp(const Step &s, const Layer &l, const input *h, int first, int last) {
    constexpr int rows = 16;  // of each matrix in turn
    float gate[s.B * rows];
    for (int f = first; f < last; f += rows) {
        int end = f + rows < last ? f + rows : last;
        product(l.gate, h, s.B, s.D, f, end, [&](int b, int i, float y) {
            gate[b * rows + i - f] = y / (1 + std::exp(-y));
        });
        product(l.up, h, s.B, s.D, f, end, [&](int b, int i, float y) {
            put(s.u + (size_t)b * s.F + i, gate[b * rows + i - f] * y);
        });
    }
}

extern "C" void step(const Step *step) {
    const Step &s = *step;
    int B = s.B, D = s.D;
    for (int b = 0; b < B; b++) {
        s.places[(size_t)b * 2 * s.N + s.slot] = s.position[b];
        s.places[(size_t)(b * 2 + 1) * s.N + s.slot] = 1;
        for (int i = 0; i < s.A / 2; i++) {
            float angle = s.position[b] * s.frequency[i];
            s.cos[b * s.A / 2 + i] = std::cos(angle), s.sin[b * s.A / 2 + i] = std::sin(angle);
        }
    }
#pragma omp parallel num_threads(s.threads)
    {
        input *h = s.h + (size_t)omp_get_thread_num() * B * D;
        float *score = s.score + (size_t)omp_get_thread_num() * s.N;
        Share heads = share(s.H + 2 * s.G), queries = share(B * s.H);
        Share features = share(D), hidden = share(s.F), words = share(s.V);
        auto add = [&](int b, int f, float y) { s.x[(size_t)b * D + f] += y; };
        for (int i = 0; i < s.layers; i++) {
            const Layer &l = s.layer[i];
            norm(s.x, l.norm1, s.eps, B, D, h);
            for (int n = heads.first; n < heads.last; n++) project(s, l, h, n);
#pragma omp barrier
            for (int n = queries.first; n < queries.last; n++) attend(s, l, n / s.H, n % s.H, score);
#pragma omp barrier
            product(l.o, s.a, B, s.H * s.A, features.first, features.last, add);
#pragma omp barrier
            norm(s.x, l.norm2, s.eps, B, D, h);
            mlp(s, l, h, hidden.first, hidden.last);
#pragma omp barrier
            product(l.down, s.u, B, s.F, features.first, features.last, add);
#pragma omp barrier
        }
        norm(s.x, s.norm, s.eps, B, D, h);
        product(s.head, h, B, D, words.first, words.last,
                [&](int b, int f, float y) { s.logits[(size_t)b * s.V + f] = y; });
    }
}
