// The next tokens of each answer through a whole language model, on the cores of a CPU. See
// decode.py.
//
// For one token every weight is read once and used once, so memory bandwidth limits the speed as
// long as nothing else takes time. There is one parallel region, in which each thread computes its
// share of the rows of every matrix, and five barriers a layer:
//
//     q, k, v = W norm(x); q, k rotated; k, v into the cache    | barrier
//     a = softmax(q k / sqrt(A)) v, heads of the same k at once | barrier
//     x = x + W_o a                                             | barrier
//     g = silu(W_gate norm(x)) * W_up norm(x)                   | barrier
//     x = x + W_down g                                          | barrier
//
// A single row of x is multiplied one register of features at a time. Several rows lie in the lanes
// of the registers instead, so that one weight is multiplied with all of them at once: sixteen
// answers take 1.6 to 2.8 times as long as one. Sums are in float32 or in integers (see `Ready`),
// in the same order for any number of threads.
//
// Letters as in llm.py: D features, H query heads, G key/value heads, A head size, F hidden
// features, V vocabulary. C answers, T tokens of each, B = C T rows; U slots of the cache.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct bfloat16 { uint16_t bits; };

#ifndef WEIGHT
#define WEIGHT float  // type of the matrices: float, bfloat16, or int8_t with a scale a row
#define CACHE float   // type of keys and values: float or bfloat16
#endif

// ------------------------------------------------- arithmetic on whole registers

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
#define VECTOR(type) __attribute__((vector_size(WIDTH * sizeof(type)))) type
typedef VECTOR(float) floats;
typedef VECTOR(int32_t) ints;

template <class V> static inline V read(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline floats load(const float *p) { return read<floats>(p); }
#ifdef __AVX512F__  // intrinsics, because compilers do not find these instructions
static inline floats load(const bfloat16 *p) {
    return (floats)(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16));
}
static inline floats load(const int8_t *p) {
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(p)));
}
#else
static inline floats load(const bfloat16 *p) {
    typedef VECTOR(uint16_t) halves;
    typedef VECTOR(uint32_t) bits;
    return (floats)(__builtin_convertvector(read<halves>(p), bits) << 16);
}
static inline floats load(const int8_t *p) {
    typedef VECTOR(int8_t) bytes;
    return __builtin_convertvector(__builtin_convertvector(read<bytes>(p), ints), floats);
}
#endif

static inline float value(float x) { return x; }
static inline float value(int8_t x) { return x; }
static inline float value(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    return read<float>(&bits);
}
static inline void put(float *p, float x) { *p = x; }
static inline void put(float *p, floats x) { memcpy(p, &x, sizeof x); }
static inline void put(bfloat16 *p, float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits = read<uint32_t>(&x);
    p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T> static inline void put(T *p, const float *x, int n) {
    for (int i = 0; i < n; i++) put(p + i, x[i]);
}

// e^x to two units in the last place, without a branch, so that compilers can vectorize its loops
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = std::rint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2
    float p = (1.9875691e-4f * r + 1.3981999e-3f) * r + 8.3334519e-3f;
    p = ((p * r + 4.1665796e-2f) * r + 1.6666665e-1f) * r + 0.5f;
    uint32_t power = (uint32_t)((int)n + 127) << 23;
    return (p * r * r + r + 1) * read<float>(&power);
}
static inline floats exponential(floats x) {
    for (int i = 0; i < WIDTH; i++) x[i] = exponential(x[i]);
    return x;
}

// The type of a matrix's input: bfloat16 if the processor multiplies pairs of them.
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
static inline void put(bfloat16 *p, floats x) {  // into every second element from p
    __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    _mm512_mask_storeu_epi16(p, 0x55555555, halves);
}
#else
constexpr int PAIR = 1;
typedef float input;
#endif
constexpr int ROWS = 8;           // rows of a matrix at once, where x has its rows in lanes
constexpr int HEADS = WIDTH / 4;  // heads at once that read the same keys and values
constexpr int TOKENS = 256;       // rows of the LM head at once
template <class T> static inline floats add_product(floats sum, const T *w, const float *x) {
    return sum + load(w) * load(x);
}
template <class T> static inline floats add_to_lanes(floats sum, const T *w, const float *x) {
    return sum + value(*w) * load(x);
}

// Address of feature d of row b of x [B, D]. A single row is stored in order. More rows are stored
// in groups of WIDTH: a feature (bfloat16: a pair of them) of each row, then the next of each row.
template <class T> static inline T *at(T *x, int B, int D, int b, int d) {
    constexpr int pair = sizeof(float) / sizeof(T);
    size_t pairs = (D + pair - 1) / pair;
    if (B == 1) return x + d;
    return x + ((b / WIDTH * pairs + d / pair) * WIDTH + b % WIDTH) * pair + d % pair;
}

static inline float total(floats v) {
#ifdef __AVX512F__  // the same sums; GCC compiles the loop to slow code
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
#endif
}
static inline float greatest(floats v) {  // v must not hold a NaN
    float most = v[0];
    for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
    return most;
}

static inline void put_totals(float *p, const floats *v) {  // totals of four registers
#ifdef __AVX512F__  // all four at once, by adding halves
    auto low = [](floats a, floats b) { return (floats)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
    auto high = [](floats a, floats b) { return (floats)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
    floats a = low(v[0], v[2]) + high(v[0], v[2]), b = low(v[1], v[3]) + high(v[1], v[3]);
    __m512 sum = (__m512)(low(a, b) + high(a, b));  // each one's, in every fourth lane
    __m256 half = _mm512_castps512_ps256(sum) + (__m256)_mm512_extractf64x4_pd((__m512d)sum, 1);
    _mm_storeu_ps(p, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    for (int i = 0; i < 4; i++) p[i] = total(v[i]);
#endif
}

// Weights are prefetched into the L2 cache this many bytes ahead, earlier than the hardware
// prefetcher does. The distances were found by trial.
template <class T> constexpr int AHEAD = sizeof(T) == 1 ? 16384 : 2048;

static inline void fetch(const void *line) { __builtin_prefetch(line, 0, 2); }

// w times x; meanwhile about as many weights are prefetched from `next` on. Four independent sums
// hide the latency of an addition.
template <class T, class X>
static inline float dot(const T *w, const X *x, int D, const T *next) {
    constexpr int width = std::is_same_v<X, float> ? WIDTH : 2 * WIDTH;
    floats sum[4] = {};
    int d = 0;
    for (; d + 4 * width <= D; d += 4 * width)
        for (int u = 0, e = d; u < 4; u++, e += width) {
            sum[u] = add_product(sum[u], w + e, x + e);
            fetch(next + e);
        }
    for (; d + width <= D; d += width) sum[0] = add_product(sum[0], w + d, x + d);
    float y = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; d < D; d++) y += value(w[d]) * value(x[d]);
    return y;
}
template <class T, class X> static inline float dot(const T *w, const X *x, int D) {
    return dot(w, x, D, w + AHEAD<T> / sizeof(T));
}

// x as `product` takes it. For int8 weights a single row is rounded to integers, so that weights
// need no conversion and 64 products take one instruction: x = unit X, |X| < 2^23. The greatest
// feature is as exact as in float32, and the others have the same absolute error. X is written in
// three digits, X = 65536 d2 + 256 d1 + d0, each from -128 to 127. The instruction needs one factor
// that is not negative: w + 128. To correct for it, a sum over digits d starts at -128 sum(d).
struct Ready {
    const input *x;
    int8_t *digits;  // [D / 64 rounded up, 3, 64], d0 first; then 3 starts of 16 int32 each
    float unit;      // NaN if x holds a NaN or an infinity; then every product is NaN, too
};
#ifdef __AVX512VNNI__
static inline uint64_t rest(int n) {  // a mask of the first n of 64 bytes
    return n >= 64 ? -1 : n > 0 ? (1ull << n) - 1 : 0;
}

template <class X>
static Ready ready(const int8_t *, const X *x, int B, int D, int8_t *digits) {
    if (B > 1) return {x};
    __m512 most = {}, damage = {};  // 0, or NaN: 0 times NaN or infinity
    for (int d = 0; d < D; d += WIDTH) {
        __m512 v = _mm512_maskz_loadu_ps(rest(D - d), x + d);
        most = _mm512_max_ps(most, _mm512_abs_ps(v)), damage += v * 0;
    }
    float greatest = _mm512_reduce_max_ps(most), last = 127 << 16;
    float inverse = greatest > 1e-30f ? last / greatest : 0;
    __m512i middle = _mm512_set1_epi32(0x808080), start[3] = {};
    int8_t *out = digits;
    for (int d = 0; d < D; d += 64) {
        for (int e = d; e < d + 64; e += WIDTH) {
            __m512 v = _mm512_maskz_loadu_ps(rest(D - e), x + e) * inverse;
            __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32(v), middle) ^ middle;
            for (int i = 0; i < 3; i++, n = _mm512_srli_epi32(n, 8))
                _mm_storeu_si128((__m128i *)(out + i * 64 + e - d), _mm512_cvtepi32_epi8(n));
        }
        for (int i = 0; i < 3; i++, out += 64)
            start[i] = _mm512_dpbusd_epi32(start[i], _mm512_set1_epi8(-128), read<__m512i>(out));
    }
    for (int i = 0; i < 3; i++, out += 64)
        _mm512_storeu_si512(out, _mm512_sub_epi32(__m512i{}, start[i]));
    return {x, digits, greatest / last + total((floats)damage)};
}

static inline float dot(const int8_t *w, Ready x, int D, const int8_t *next) {
    int8_t *digits = x.digits, *starts = digits + (D + 63) / 64 * 192;
    __m512i sum[3];
    for (int i = 0; i < 3; i++) sum[i] = read<__m512i>(starts + i * 64);
    auto add = [&](__m512i v) {
        v ^= _mm512_set1_epi8(-128);
        for (int i = 0; i < 3; i++, digits += 64)
            sum[i] = _mm512_dpbusd_epi32(sum[i], v, read<__m512i>(digits));
    };
    int d = 0;
    for (; d + 64 <= D; d += 64) {
        add(read<__m512i>(w + d));
        fetch(next + d);
    }
    if (d < D) add(_mm512_maskz_loadu_epi8(rest(D - d), w + d));
    floats y = (floats)_mm512_cvtepi32_ps(sum[2]);
    for (int i = 1; i >= 0; i--) y = y * 256 + (floats)_mm512_cvtepi32_ps(sum[i]);
    return total(y) * x.unit;
}
#endif
template <class T> static Ready ready(const T *, const input *x, ...) { return {x}; }
template <class T> static inline float dot(const T *w, Ready x, int D, const T *next) {
    return dot(w, x.x, D, next);
}

// y[r] = row r of w times x, for R rows of w, and a row of x in each lane. As many weights are
// prefetched from `next` on, because rows are too short for the hardware prefetcher. It is not
// inlined, so that the addresses of its rows stay in registers.
template <int R, class T>
static __attribute__((noinline)) void lanes(const T *w, const input *x, int D, const WEIGHT *next,
                                            floats *y) {
    constexpr int line = 64 / sizeof(WEIGHT);
    floats sum[R] = {};
    int d = 0;
    for (; d + PAIR <= D; d += PAIR) {
        if (d * R % line == 0) fetch(next + d * R);
        for (int r = 0; r < R; r++)
            sum[r] = add_to_lanes(sum[r], w + (size_t)r * D + d, x + (size_t)d * WIDTH);
    }
    for (int r = 0; r < R; r++) {
        T last[2] = {d < D ? w[(size_t)r * D + d] : T()};
        y[r] = d < D ? add_to_lanes(sum[r], last, x + (size_t)d * WIDTH) : sum[r];
    }
}

// ------------------------------------------------- the parts of a block

struct Matrix {
    const WEIGHT *weight;  // [F, D]
    const float *scale;    // [F], or null
    const WEIGHT *row(int f, int D) const { return weight + (size_t)f * D; }
};

template <class T> static inline void convert(const T *w, int n, float *out) {
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        floats v = load(w + i);
        memcpy(out + i, &v, sizeof v);
    }
    for (; i < n; i++) out[i] = value(w[i]);
}

// Calls done(b, f, y) with y = row f of the matrix times row b of x, for f from first up to last. y
// is a float if there is one row, else floats, for the WIDTH rows from b on. `then` points to what
// this thread reads next; it is prefetched.
template <class Done>
static void product(Matrix m, Ready x, int B, int D, int first, int last, const WEIGHT *then,
                    Done done) {
    auto later = [&](int f) { return f < last ? m.row(f, D) : then + (size_t)(f - last) * D; };
    if (B == 1) {
        int ahead = AHEAD<WEIGHT> / (D * sizeof(WEIGHT)) + 1;
        for (int f = first; f < last; f++) {
            float y = dot(m.row(f, D), x, D, later(f + ahead));
            done(0, f, m.scale ? y * m.scale[f] : y);
        }
        return;
    }
    typedef std::conditional_t<PAIR == 2, WEIGHT, float> ready;
    constexpr bool is_ready = std::is_same_v<WEIGHT, ready>;
    ready buffer[is_ready ? 1 : ROWS * D];
    for (int f = first, rows; f < last; f += rows) {
        rows = f + ROWS <= last ? ROWS : 1;
        const ready *w = buffer;
        const WEIGHT *next = later(f + 2 * ROWS);
        if constexpr (is_ready) w = m.row(f, D);
        else convert(m.row(f, D), rows * D, buffer);
        for (int b = 0; b < B; b += WIDTH) {
            const input *x_b = at(x.x, B, D, b, 0);
            floats y[ROWS];
            rows == 1 ? lanes<1>(w, x_b, D, next, y) : lanes<ROWS>(w, x_b, D, next, y);
            for (int r = 0; r < rows; r++)
                done(b, f + r, m.scale ? y[r] * m.scale[f + r] : y[r]);
        }
    }
}

struct Layer {
    const float *norm1, *norm2;
    Matrix q, k, v, o, gate, up, down;
    CACHE *keys, *values;  // [C, G, U, A]
};

struct Step {
    int C, T, B, D, H, G, A, F, V, U;
    int stride, layers, threads;    // stride: U rounded up to a multiple of 16
    int window, used, slot;         // 0: none; slots in use, with the new tokens; the first new one
    float eps;
    const float *frequency, *norm;  // [A / 2] of RoPE; [D]
    int64_t *places;                // [C, 2, U] position and segment of each slot
    int64_t *position;              // [C] of the first token; at the end, of the next one
    const int64_t *tokens;          // [B], or null and
    const float *embeddings;        // [B, D]
    const Layer *layer;
    Matrix embedding, head;
    float *q, *logits;              // [B, H, A], [C, V]
    float *mask, *score;            // [B, stride], 0 or -infinity by llm.sees; [threads, 4, stride]
    float *high;                    // [C] the greatest logit; infinity if one is not finite
    int64_t *best;                  // [C] its token, the first of several
    float *x, *cos, *sin;           // [B, D]; [B, A / 2] of the angles
    input *attended, *gated;        // [B, H A], [B, F]; these five are stored as in `at`
};

// The part of n items that this thread does, in multiples of `unit`
struct Share {
    int first, last;
    Share(int n, int unit = 1) {
        long i = omp_get_thread_num(), threads = omp_get_num_threads();
        long units = (n + unit - 1) / unit;
        first = units * i / threads * unit;
        last = std::min<long>(units * (i + 1) / threads * unit, n);
    }
};

struct alignas(64) Line {  // a cache line; a register that spans two takes twice as long to read
    char bytes[64];
};

// Data of one thread
struct Own {
    Share heads, values, queries, features, hidden, vocab;
    float *score;                    // [HEADS, stride]
    std::vector<Line> room, digits;  // memory of h; digits of the widest x
    input *h;                        // [B, D], stored as in `at`
    Own(const Step &s)
        : heads(s.H + s.G), values(s.G * s.A, ROWS), queries(s.B * s.H), features(s.D, ROWS),
          hidden(s.F, ROWS), vocab(s.V, ROWS),
          score(s.score + (size_t)omp_get_thread_num() * 4 * s.stride),
          room((size_t)(s.B + WIDTH) * (s.D + 1) * sizeof(input) / sizeof(Line) + 1),
          digits(std::max({s.D, s.H * s.A, s.F}) * 3 / sizeof(Line) + 6),
          h((input *)room.data()) {}
    Ready ready(const input *x, int B, int D) {
        return ::ready((const WEIGHT *)0, x, B, D, (int8_t *)digits.data());
    }
};

// Sum of the squares of D features of a row, or of each of WIDTH rows
static inline float squares(const float *x, int D, float) { return dot(x, x, D); }
static inline floats squares(const float *x, int D, floats sum) {
    floats more[4] = {};  // as in `dot`
    for (int d = 0; d < D; d++) more[d % 4] += load(x + d * WIDTH) * load(x + d * WIDTH);
    return sum + (more[0] + more[1]) + (more[2] + more[3]);
}

static inline float inverse_root(float x) { return 1 / std::sqrt(x); }
static inline floats inverse_root(floats x) {
    for (int i = 0; i < WIDTH; i++) x[i] = inverse_root(x[i]);
    return x;
}

// RMSNorm of B rows of x. Every thread computes it, because that is faster than a barrier.
template <class V> static void norm(const Step &s, const float *weight, int B, int b, input *h) {
    constexpr int rows = sizeof(V) / sizeof(float);
    const float *x = at(s.x, B, s.D, b, 0);
    V scale = inverse_root(squares(x, s.D, V{}) / (float)s.D + s.eps);
    for (int d = 0; d < s.D; d++)
        put(at(h, rows, s.D, 0, d), read<V>(x + d * rows) * scale * weight[d]);
}

static Ready norm(const Step &s, const float *weight, int B, Own &own) {
    for (int b = 0; b < B; b += WIDTH)
        B == 1 ? norm<float>(s, weight, B, b, own.h)
               : norm<floats>(s, weight, B, b, at(own.h, B, s.D, b, 0));
    return own.ready(own.h, B, s.D);
}

// RoPE of a head of one row, or of WIDTH rows, as in llm.rotate
template <class V> static void rotate(float *x, const float *cos, const float *sin, int A) {
    constexpr int rows = sizeof(V) / sizeof(float);
    float *y = x + A / 2 * rows;
    for (int i = 0; i < A / 2 * rows; i += rows) {
        V first = read<V>(x + i), second = read<V>(y + i);
        put(x + i, first * read<V>(cos + i) - second * read<V>(sin + i));
        put(y + i, second * read<V>(cos + i) + first * read<V>(sin + i));
    }
}

// The slot [A] for row b's key or value of a head
static inline CACHE *slot(const Step &s, CACHE *slots, int b, int head) {
    return slots + ((size_t)(b / s.T * s.G + head) * s.U + s.slot + b % s.T) * s.A;
}

// Head n of q (n < H) or head n - H of k
static void project(const Step &s, const Layer &l, int n, Ready h, const WEIGHT *then) {
    int A = s.A, B = s.B, head = n < s.H ? n : n - s.H;
    float room[(B + WIDTH) * A], *y = room;  // lambdas cannot capture such an array
    product(n < s.H ? l.q : l.k, h, B, s.D, head * A, (head + 1) * A, then,
            [&](int b, int f, auto sum) { put(at(y, B, A, b, f - head * A), sum); });
    for (int b = 0; b < B; b += WIDTH)
        (B == 1 ? rotate<float> : rotate<floats>)(
            at(y, B, A, b, 0), at(s.cos, B, A / 2, b, 0), at(s.sin, B, A / 2, b, 0), A);
    float scale = 1 / std::sqrt((float)A), row[A];
    for (int b = 0; b < B; b++) {
        for (int i = 0; i < A; i++) row[i] = *at(y, B, A, b, i);
        float *q = s.q + (size_t)(b * s.H + head) * A;
        if (n < s.H)
            for (int i = 0; i < A; i++) q[i] = row[i] * scale;
        else
            put(slot(s, l.keys, b, head), row, A);
    }
}

// Features first up to last of v, counted over all heads
static void remember(const Step &s, const Layer &l, int first, int last, Ready h,
                     const WEIGHT *then) {
    CACHE *room[s.B], **row = room;
    for (int b = 0; b < s.B; b++) row[b] = slot(s, l.values, b, 0);
    product(l.v, h, s.B, s.D, first, last, then, [&](int b, int f, auto y) {
        size_t place = (size_t)(f / s.A) * s.U * s.A + f % s.A;
        for (int i = 0; i < std::min<int>(sizeof y / sizeof(float), s.B - b); i++)
            put(row[b + i] + place, ((float *)&y)[i]);
    });
}

// Scores of R queries [R, A] for the slots in use, four slots at a time. Meanwhile the values of
// these slots are prefetched.
template <int R>
static void scores(const Step &s, const float *q, const CACHE *keys, const CACHE *values,
                   float *score) {
    int A = s.A, i = 0;
    for (; i + 4 <= s.used; i += 4, keys += 4 * A, values += 4 * A) {
        for (int a = 0; a < 4 * A; a += 64 / sizeof(CACHE)) fetch(values + a);
        floats sum[R][4] = {};
        int a = 0;
        for (; a + WIDTH <= A; a += WIDTH)
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < R; r++)
                    sum[r][j] += load(keys + j * A + a) * load(q + r * A + a);
        for (; a < A; a++)
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < R; r++) sum[r][j][0] += value(keys[j * A + a]) * q[r * A + a];
        for (int r = 0; r < R; r++) put_totals(score + (size_t)r * s.stride + i, sum[r]);
    }
    for (; i < s.used; i++, keys += A)
        for (int r = 0; r < R; r++) score[(size_t)r * s.stride + i] = dot(keys, q + r * A, A);
}

// score = exp(score - the greatest), 0 where masked; returns their sum
static float soften(const Step &s, const float *mask, float *score) {
    floats most = floats{} - INFINITY, sum = {};
    for (int i = 0; i < s.used; i += WIDTH) {
        floats hidden = load(mask + i), y = hidden == 0 ? load(score + i) : hidden;
        most = y > most ? y : most;
        put(score + i, y);
    }
    float high = greatest(most);
    for (int i = 0; i < s.used; i += WIDTH) {
        for (int j = i; j < i + WIDTH; j++)
            score[j] = score[j] == -INFINITY ? 0 : exponential(score[j] - high);
        sum += load(score + i);
    }
    return total(sum);
}

// out [R, A] = sums of the values seen, weighted by the scores: COUNT features, or COUNT registers
// of them. With registers as much is prefetched from `next` on.
template <int R, int COUNT, class V>
static inline void weigh(const Step &s, const float *mask, const float *score,
                         const CACHE *values, const CACHE *next, float *out) {
    constexpr int width = sizeof(V) / sizeof(float);
    V sum[R][COUNT] = {};
    for (int i = 0; i < s.used; i++, values += s.A, next += s.A)
        if (mask[i] == 0)
            for (int u = 0; u < COUNT; u++) {
                V v;
                if constexpr (width > 1) v = load(values + u * width), fetch(next + u * width);
                else v = value(values[u]);
                for (int r = 0; r < R; r++) sum[r][u] += score[(size_t)r * s.stride + i] * v;
            }
    for (int r = 0; r < R; r++)
        for (int u = 0; u < COUNT; u++) put(out + r * s.A + u * width, sum[r][u]);
}

// Attention of heads n up to n + R of row b, which share keys and values. Called with the greatest
// R; fewer heads (`count`) use the instance for that number. Meanwhile the keys `ahead` elements
// further on are prefetched: those of the next head.
template <int R>
static void attend(const Step &s, const Layer &l, int b, int n, int count, size_t ahead,
                   float *score) {
    if constexpr (R > 1)
        if (count < R) return attend<R - 1>(s, l, b, n, count, ahead, score);
    size_t start = (size_t)(b / s.T * s.G + n / (s.H / s.G)) * s.U * s.A;
    const CACHE *keys = l.keys + start, *values = l.values + start;
    const float *mask = s.mask + (size_t)b * s.stride;
    float sum[R], room[R * s.A], *out = room;
    scores<R>(s, s.q + ((size_t)b * s.H + n) * s.A, keys, values, score);
    for (int r = 0; r < R; r++) sum[r] = soften(s, mask, score + (size_t)r * s.stride);
    int a = 0;
    for (; a + 4 * WIDTH <= s.A; a += 4 * WIDTH)
        weigh<R, 4, floats>(s, mask, score, values + a, keys + ahead + a, out + a);
    for (; a < s.A; a++) weigh<R, 1, float>(s, mask, score, values + a, keys + ahead, out + a);
    input found[s.A];
    for (int r = 0; r < R; r++) {
        for (a = 0; a < s.A; a++) out[r * s.A + a] /= sum[r];
        put(found, out + r * s.A, s.A);
        for (a = 0; a < s.A; a++) *at(s.attended, s.B, s.H * s.A, b, (n + r) * s.A + a) = found[a];
    }
}

// Queries first up to last, counted over all rows; heads that share keys and values go together
static void attend(const Step &s, const Layer &l, int first, int last, float *score) {
    int group = s.H / s.G;
    for (int n = first, count; n < last; n += count) {
        count = std::min({HEADS, last - n, group - n % group});
        size_t ahead = n + count < last ? (size_t)s.U * s.A : 0;  // to the next head or answer
        attend<HEADS>(s, l, n / s.H, n % s.H, count, ahead, score);
    }
}

static void mlp(const Step &s, const Layer &l, int first, int last, Ready h,
                const WEIGHT *then) {
    int B = s.B, n = B == 1 ? last - first : (B + WIDTH - 1) / WIDTH * WIDTH * (last - first);
    float room[n], *gate = room;
    product(l.gate, h, B, s.D, first, last, l.up.row(first, s.D),
            [&](int b, int i, auto y) { put(at(gate, B, last - first, b, i - first), y); });
    for (int i = 0; i < n; i++) gate[i] /= 1 + exponential(-gate[i]);
    product(l.up, h, B, s.D, first, last, then, [&](int b, int i, auto y) {
        auto gated = read<decltype(y)>(at(gate, B, last - first, b, i - first));
        put(at(s.gated, B, s.F, b, i), gated * y);
    });
}

// The mask of row b: which slots it sees
static void look(const Step &s, int b) {
    const int64_t *position = s.places + (size_t)b / s.T * 2 * s.U, *segment = position + s.U;
    int64_t here = s.position[b / s.T] + b % s.T, window = s.window ? s.window : here + 1;
    float *mask = s.mask + (size_t)b * s.stride;
    for (int i = 0; i < s.used; i++) {
        int64_t ago = here - position[i];
        mask[i] = segment[i] == 1 && ago >= 0 && ago < window ? 0 : -INFINITY;
    }
    for (int i = s.used; i % WIDTH; i++) mask[i] = -INFINITY;  // fills the last register
}

// Positions, angles and embeddings of the tokens
static void begin(const Step &s) {
    const Matrix &e = s.embedding;
    for (int c = 0; c < s.C; c++) s.high[c] = -INFINITY, s.best[c] = s.V;
    for (int b = 0; b < s.B; b++) {
        int64_t *place = s.places + (size_t)b / s.T * 2 * s.U + s.slot + b % s.T;
        place[0] = s.position[b / s.T] + b % s.T, place[s.U] = 1;
        for (int i = 0; i < s.A / 2; i++) {
            float angle = place[0] * s.frequency[i];
            *at(s.cos, s.B, s.A / 2, b, i) = std::cos(angle);
            *at(s.sin, s.B, s.A / 2, b, i) = std::sin(angle);
        }
        for (int d = 0; d < s.D; d++) {
            float *x = at(s.x, s.B, s.D, b, d);
            if (s.tokens)
                *x = value(e.row(s.tokens[b], s.D)[d]) * (e.scale ? e.scale[s.tokens[b]] : 1);
            else
                *x = s.embeddings[(size_t)b * s.D + d];
        }
    }
    for (int b = 0; b < s.B; b++) look(s, b);  // after all places are written
}

// One layer; `next` points to what this thread reads after it
static void block(const Step &s, const Layer &l, Own &own, const WEIGHT *next) {
    int B = s.B, D = s.D, A = s.A, first = own.features.first, last = own.features.last;
    auto add = [&](int b, int f, auto y) {
        float *x = at(s.x, B, D, b, f);
        put(x, read<decltype(y)>(x) + y);
    };
    const WEIGHT *v = l.v.row(own.values.first, D), *o = l.o.row(first, s.H * A);
    const WEIGHT *gate = l.gate.row(own.hidden.first, D), *down = l.down.row(first, s.F);
    Ready h = norm(s, l.norm1, B, own);
    for (int n = own.heads.first, end = own.heads.last; n < end; n++)
        project(s, l, n, h, n + 1 < end ? l.q.row((n + 1) * A, D) : v);  // k follows q
    remember(s, l, own.values.first, own.values.last, h, o);
#pragma omp barrier
    attend(s, l, own.queries.first, own.queries.last, own.score);
#pragma omp barrier
    product(l.o, own.ready(s.attended, B, s.H * A), B, s.H * A, first, last, gate, add);
#pragma omp barrier
    h = norm(s, l.norm2, B, own);
    int some = B == 1 ? s.F : 2 * ROWS;  // rows of gate and up in turn
    for (int f = own.hidden.first, end; f < own.hidden.last; f = end) {
        end = std::min(f + some, own.hidden.last);
        mlp(s, l, f, end, h, end < own.hidden.last ? l.gate.row(end, D) : down);
    }
#pragma omp barrier
    product(l.down, own.ready(s.gated, B, s.F), B, s.F, first, last, next, add);
#pragma omp barrier
}

// The greatest logit so far and its token, in each lane
struct Best {
    floats logit = floats{} - INFINITY;
    ints token = {};
    void update(floats y, ints its) {
        y = y - y == 0 ? y : floats{} + INFINITY;  // infinite or NaN: counts as the greatest
        ints more = y > logit;
        logit = more ? y : logit, token = more ? its : token;
    }
};

// Writes the logits of tokens first up to last, from rows in lanes to rows in order. A lane of
// `best` belongs to an answer; if there is only one answer, to every WIDTH-th token.
static void write_logits(const Step &s, Ready h, int first, int last, const WEIGHT *then,
                         Best *best) {
    int n = last - first;
    float room[(s.C + WIDTH) * n + WIDTH], *y = room;
    product(s.head, h, s.C, s.D, first, last, then,
            [&](int b, int f, auto logit) { put(at(y, s.C, n, b, f - first), logit); });
    bool one = s.C == 1;
    ints token;
    for (int i = 0; i < WIDTH; i++) token[i] = first + (one ? i : 0);
    if (one) std::fill_n(y + n, WIDTH, -FLT_MAX);  // fills the last register; no logit is less
    for (int b = 0; b < s.C; b += WIDTH)
        for (int i = 0; i < n; i += one ? WIDTH : 1)
            best[b / WIDTH].update(load(at(y, s.C, n, b, i)), token + i);
    for (int c = 0; c < s.C; c++) {
        const float *from = at(y, s.C, n, c, 0);
        float *to = s.logits + (size_t)c * s.V + first;
        for (int i = 0; i < n; i++) to[i] = from[one ? i : i * WIDTH];
    }
}

enum { DONE, NO_TOKEN, NOT_FINITE };  // NO_TOKEN: a token is invalid, nothing was changed

extern "C" int step(const Step *step) {
    const Step &s = *step;
    for (int b = 0; b < s.B && s.tokens; b++)
        if (s.tokens[b] < 0 || s.tokens[b] >= s.V) return NO_TOKEN;
    begin(s);
#pragma omp parallel num_threads(s.threads)
    {
        Own own(s);
        auto start = [&](int i) { return s.layer[i].q.row(own.heads.first * s.A, s.D); };
        const WEIGHT *head = s.head.row(own.vocab.first, s.D);
        for (int i = 0; i < s.layers; i++)
            block(s, s.layer[i], own, i + 1 < s.layers ? start(i + 1) : head);
#pragma omp single  // keep the last token of each answer
        for (int c = 0; c < s.C && s.T > 1; c++)
            for (int d = 0; d < s.D; d++)
                *at(s.x, s.C, s.D, c, d) = *at(s.x, s.B, s.D, (c + 1) * s.T - 1, d);
        Ready h = norm(s, s.norm, s.C, own);
        std::vector<Best> best((s.C + WIDTH - 1) / WIDTH);
        for (int f = own.vocab.first, end; f < own.vocab.last; f = end) {
            end = std::min(f + TOKENS, own.vocab.last);
            const WEIGHT *then = end < own.vocab.last ? s.head.row(end, s.D) : start(0);
            write_logits(s, h, f, end, then, best.data());
        }
#pragma omp critical
        for (int i = 0, lanes = s.C == 1 ? WIDTH : s.C; i < lanes; i++) {
            float y = best[i / WIDTH].logit[i % WIDTH], &high = s.high[s.C == 1 ? 0 : i];
            int64_t token = best[i / WIDTH].token[i % WIDTH], &first = s.best[s.C == 1 ? 0 : i];
            if (y > high || (y == high && token < first)) high = y, first = token;
        }
    }
    for (int c = 0; c < s.C; c++) s.position[c] += s.T;
    return std::all_of(s.high, s.high + s.C, [](float y) { return std::isfinite(y); })
               ? DONE : NOT_FINITE;
}
