// A few tokens, the next of each answer, through a whole language model on the cores of a CPU. See
// decode.py.
//
// To make a token every weight is read once and used once, so the speed is that of the memory, if
// nothing else takes time. Here little else does: there is one parallel region, in which each
// thread takes its share of the rows of every matrix, and five places a layer where all wait:
//
//     q, k, v = W norm(x); q, k rotated; k, v into the cache    | wait
//     a = softmax(q k / sqrt(A)) v, heads of the same k at once | wait
//     x = x + W_o a                                             | wait
//     u = silu(W_gate norm(x)) * W_up norm(x)                   | wait
//     x = x + W_down u                                          | wait
//
// One row's x is multiplied a register of features at a time. Of several rows each has a lane of
// the registers instead, and a weight is multiplied with all of them at once: sixteen answers take
// 1.6 to 2.8 times as long as one. Sums are in float32, or in whole numbers (see `Ready`),
// and in one order for any number of threads.
//
// Letters as in llm.py: D features, H query heads, G key/value heads, A features a head, F hidden
// features, V words. C answers, T tokens of each, B = C T rows; N slots of the cache, M = N rounded
// up to sixteens.

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
typedef VECTOR(int32_t) wholes;

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
    typedef VECTOR(uint32_t) bits;
    return (floats)(__builtin_convertvector(read<halves>(p), bits) << 16);
}
static inline floats load(const int8_t *p) {
    typedef VECTOR(int8_t) bytes;
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
static inline void put(float *p, floats x) { memcpy(p, &x, sizeof x); }
static inline void put(bfloat16 *p, float x) {  // the nearest, ties to even; NaN stays NaN
    uint32_t bits = read<uint32_t>(&x);
    p->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T> static inline void put(T *p, const float *x, int n) {
    for (int i = 0; i < n; i++) put(p + i, x[i]);
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
static inline floats exponential(floats x) {
    for (int i = 0; i < WIDTH; i++) x[i] = exponential(x[i]);
    return x;
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
static inline void put(bfloat16 *p, floats x) {  // to every second place from p
    __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
    _mm512_mask_storeu_epi16(p, 0x55555555, halves);
}
#else
constexpr int PAIR = 1;
typedef float input;
#endif
constexpr int ROWS = 8;           // of a matrix at once, where x has its rows in lanes
constexpr int HEADS = WIDTH / 4;  // at once, that read the same keys and values
constexpr int WORDS = 256;        // of the head at once
template <class T> static inline floats add_product(floats sum, const T *w, const float *x) {
    return sum + load(w) * load(x);
}
template <class T> static inline floats add_to_lanes(floats sum, const T *w, const float *x) {
    return sum + value(*w) * load(x);
}

// Feature d of row b of x [B, D]. One row lies in order; of more, WIDTH rows lie together: of each
// row a feature (or a pair, if they are bfloat16), then of each the next.
template <class T> static inline T *at(T *x, int B, int D, int b, int d) {
    constexpr int pair = sizeof(float) / sizeof(T);
    size_t pairs = (D + pair - 1) / pair;
    if (B == 1) return x + d;
    return x + ((b / WIDTH * pairs + d / pair) * WIDTH + b % WIDTH) * pair + d % pair;
}

static inline float total(floats v) {
#ifdef __AVX512F__  // the same sums; of the loop GCC makes something slow
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return v[0];
#endif
}
static inline float greatest(floats v) {  // none of them NaN
    float most = v[0];
    for (int i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
    return most;
}

static inline void put_totals(float *p, const floats *v) {  // of four registers
#ifdef __AVX512F__  // all at once, halves being added to halves
    auto low = [](floats a, floats b) { return (floats)_mm512_unpacklo_ps((__m512)a, (__m512)b); };
    auto high = [](floats a, floats b) { return (floats)_mm512_unpackhi_ps((__m512)a, (__m512)b); };
    floats a = low(v[0], v[2]) + high(v[0], v[2]), b = low(v[1], v[3]) + high(v[1], v[3]);
    __m512 sum = (__m512)(low(a, b) + high(a, b));  // of each, in every fourth lane
    __m256 half = _mm512_castps512_ps256(sum) + (__m256)_mm512_extractf64x4_pd((__m512d)sum, 1);
    _mm_storeu_ps(p, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    for (int i = 0; i < 4; i++) p[i] = total(v[i]);
#endif
}

// So many bytes before their turn weights are fetched into the second cache. The processor does so
// by itself, but later. How many was found by trial.
template <class T> constexpr int AHEAD = sizeof(T) == 1 ? 16384 : 2048;

static inline void fetch(const void *line) { __builtin_prefetch(line, 0, 2); }

// w times x, while about as many weights from `next` on are fetched. Four sums are under way at
// once: one would wait for itself.
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

// x as `product` takes it. A single row that meets int8 weights is rounded to whole numbers, so
// that the weights need not be converted, and 64 are multiplied at once: x = unit X, |X| < 2^23.
// Its greatest feature is as exact as in float32, and the others have the same absolute error. X is
// written in three digits, X = 65536 d2 + 256 d1 + d0, each from -128 to 127. The instruction wants
// one factor that is not negative, and gets w + 128; so a sum over digits d starts at -128 sum(d).
struct Ready {
    const input *x;
    int8_t *digits;  // [D / 64 rounded up, 3, 64], d0 first; then 3 starts, of 16 int32 each
    float unit;      // NaN if x has a NaN, or an infinite feature: then so is every product
};
#ifdef __AVX512VNNI__
static inline uint64_t rest(int n) {  // bits for n of 64
    return n >= 64 ? -1 : n > 0 ? (1ull << n) - 1 : 0;
}

template <class X>
static Ready ready(const int8_t *, const X *x, int B, int D, int8_t *digits) {
    if (B > 1) return {x};
    __m512 most = {}, damage = {};  // 0, or NaN: that is what 0 times NaN is, and 0 times infinity
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
// fetched from `next` on: rows end before the processor guesses that others follow. As a function
// of its own it has registers for the addresses of its rows.
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

// done(b, f, y) for y = row f of the matrix times row b of x, for f from first up to last. y is
// a float if there is one row, else floats, of the WIDTH rows from b on. `then` is what this thread
// reads afterwards, and fetches already.
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
    CACHE *keys, *values;  // [C, G, N, A]
};

struct Step {
    int C, T, B, D, H, G, A, F, V, N, M, layers, threads;
    int window, used, slot;  // 0: none; slots in use, those of these tokens too; that of the first
    float eps;
    const float *frequency, *norm;  // [A / 2] of RoPE; [D]
    int64_t *places;                // [C, 2, N] position and segment of each slot
    int64_t *position;              // [C] of the first token, afterwards of the next
    const int64_t *tokens;          // [B], or null and
    const float *embeddings;        // [B, D]
    const Layer *layer;
    Matrix embedding, head;
    float *q, *logits;              // [B, H, A], [C, V]
    float *mask, *score;            // [B, M], 0 or -infinity as llm.sees says; [threads, 4, M]
    float *high;                    // [C] the greatest logit; infinity if one is not finite
    int64_t *likeliest;             // [C] its word, the first of several
    float *x, *cos, *sin;           // [B, D]; [B, A / 2] of the angles
    input *a, *u;                   // [B, H A], [B, F]: these five lie as in `at`
};

// Of n things, those that this thread does, in whole units
struct Share {
    int first, last;
    Share(int n, int unit = 1) {
        long t = omp_get_thread_num(), T = omp_get_num_threads(), units = (n + unit - 1) / unit;
        first = units * t / T * unit, last = std::min<long>(units * (t + 1) / T * unit, n);
    }
};

struct alignas(64) Line {  // of the cache: a register that is read from two takes twice as long
    char bytes[64];
};

// What each thread has for itself
struct Own {
    Share heads, values, queries, features, hidden, words;
    float *score;                // [HEADS, M]
    std::vector<Line> room, digits;  // for h; of the widest x
    input *h;                        // [B, D], lies as in `at`
    Own(const Step &s)
        : heads(s.H + s.G), values(s.G * s.A, ROWS), queries(s.B * s.H), features(s.D, ROWS),
          hidden(s.F, ROWS), words(s.V, ROWS),
          score(s.score + (size_t)omp_get_thread_num() * 4 * s.M),
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

// Norm of B rows of x. Each thread does it for itself, which is over sooner than to wait for one.
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

// RoPE of a head of one row, or of WIDTH, as in llm.rotate
template <class V> static void rotate(float *x, const float *cos, const float *sin, int A) {
    constexpr int rows = sizeof(V) / sizeof(float);
    float *y = x + A / 2 * rows;
    for (int i = 0; i < A / 2 * rows; i += rows) {
        V first = read<V>(x + i), second = read<V>(y + i);
        put(x + i, first * read<V>(cos + i) - second * read<V>(sin + i));
        put(y + i, second * read<V>(cos + i) + first * read<V>(sin + i));
    }
}

// Where row b's key or value of a head goes, [A]
static inline CACHE *slot(const Step &s, CACHE *slots, int b, int head) {
    return slots + ((size_t)(b / s.T * s.G + head) * s.N + s.slot + b % s.T) * s.A;
}

// Head n of q and k together, counted in this order
static void project(const Step &s, const Layer &l, int n, Ready h, const WEIGHT *then) {
    int A = s.A, B = s.B, head = n < s.H ? n : n - s.H;
    float room[(B + WIDTH) * A], *y = room;  // lambdas cannot name such an array itself
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

// Features first up to last of v, of all heads
static void remember(const Step &s, const Layer &l, int first, int last, Ready h,
                     const WEIGHT *then) {
    CACHE *room[s.B], **row = room;
    for (int b = 0; b < s.B; b++) row[b] = slot(s, l.values, b, 0);
    product(l.v, h, s.B, s.D, first, last, then, [&](int b, int f, auto y) {
        size_t place = (size_t)(f / s.A) * s.N * s.A + f % s.A;
        for (int i = 0; i < std::min<int>(sizeof y / sizeof(float), s.B - b); i++)
            put(row[b + i] + place, ((float *)&y)[i]);
    });
}

// Scores of R queries [R, A] in the slots in use, four slots at a time. Meanwhile the values of
// these slots are fetched.
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
        for (int r = 0; r < R; r++) put_totals(score + (size_t)r * s.M + i, sum[r]);
    }
    for (; i < s.used; i++, keys += A)
        for (int r = 0; r < R; r++) score[(size_t)r * s.M + i] = dot(keys, q + r * A, A);
}

// score = exp(score - the greatest), 0 where the mask hides; returns the sum of these
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

// out [R, A] = the sums of the values seen, weighted by the scores: of U features, or U registers
// of them. Whole registers fetch as much from `next` on.
template <int R, int U, class V>
static inline void weigh(const Step &s, const float *mask, const float *score,
                         const CACHE *values, const CACHE *next, float *out) {
    constexpr int width = sizeof(V) / sizeof(float);
    V sum[R][U] = {};
    for (int i = 0; i < s.used; i++, values += s.A, next += s.A)
        if (mask[i] == 0)
            for (int u = 0; u < U; u++) {
                V v;
                if constexpr (width > 1) v = load(values + u * width), fetch(next + u * width);
                else v = value(values[u]);
                for (int r = 0; r < R; r++) sum[r][u] += score[(size_t)r * s.M + i] * v;
            }
    for (int r = 0; r < R; r++)
        for (int u = 0; u < U; u++) put(out + r * s.A + u * width, sum[r][u]);
}

// What heads n up to n + R of row b, which share keys and values, find in the cache. Called with
// the greatest R; fewer heads (`count`) go to the instance for as many. Meanwhile keys are fetched
// that lie `ahead` further on: those of the next head.
template <int R>
static void attend(const Step &s, const Layer &l, int b, int n, int count, size_t ahead,
                   float *score) {
    if constexpr (R > 1)
        if (count < R) return attend<R - 1>(s, l, b, n, count, ahead, score);
    size_t start = (size_t)(b / s.T * s.G + n / (s.H / s.G)) * s.N * s.A;
    const CACHE *keys = l.keys + start, *values = l.values + start;
    const float *mask = s.mask + (size_t)b * s.M;
    float sum[R], room[R * s.A], *out = room;
    scores<R>(s, s.q + ((size_t)b * s.H + n) * s.A, keys, values, score);
    for (int r = 0; r < R; r++) sum[r] = soften(s, mask, score + (size_t)r * s.M);
    int a = 0;
    for (; a + 4 * WIDTH <= s.A; a += 4 * WIDTH)
        weigh<R, 4, floats>(s, mask, score, values + a, keys + ahead + a, out + a);
    for (; a < s.A; a++) weigh<R, 1, float>(s, mask, score, values + a, keys + ahead, out + a);
    input found[s.A];
    for (int r = 0; r < R; r++) {
        for (a = 0; a < s.A; a++) out[r * s.A + a] /= sum[r];
        put(found, out + r * s.A, s.A);
        for (a = 0; a < s.A; a++) *at(s.a, s.B, s.H * s.A, b, (n + r) * s.A + a) = found[a];
    }
}

// Queries first up to last of those of all rows: those of the same keys and values together
static void attend(const Step &s, const Layer &l, int first, int last, float *score) {
    int group = s.H / s.G;
    for (int n = first, count; n < last; n += count) {
        count = std::min({HEADS, last - n, group - n % group});
        size_t ahead = n + count < last ? (size_t)s.N * s.A : 0;  // of the next head, or answer
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
        put(at(s.u, B, s.F, b, i), gated * y);
    });
}

// What row b sees of the cache
static void look(const Step &s, int b) {
    const int64_t *position = s.places + (size_t)b / s.T * 2 * s.N, *segment = position + s.N;
    int64_t here = s.position[b / s.T] + b % s.T, window = s.window ? s.window : here + 1;
    float *mask = s.mask + (size_t)b * s.M;
    for (int i = 0; i < s.used; i++) {
        int64_t ago = here - position[i];
        mask[i] = segment[i] == 1 && ago >= 0 && ago < window ? 0 : -INFINITY;
    }
    for (int i = s.used; i % WIDTH; i++) mask[i] = -INFINITY;  // the rest of the last register
}

// Places, angles and embeddings of the tokens
static void begin(const Step &s) {
    const Matrix &e = s.embedding;
    for (int c = 0; c < s.C; c++) s.high[c] = -INFINITY, s.likeliest[c] = s.V;
    for (int b = 0; b < s.B; b++) {
        int64_t *place = s.places + (size_t)b / s.T * 2 * s.N + s.slot + b % s.T;
        place[0] = s.position[b / s.T] + b % s.T, place[s.N] = 1;
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
    for (int b = 0; b < s.B; b++) look(s, b);  // after all have their places
}

// `next` is what this thread reads after this layer
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
    product(l.o, own.ready(s.a, B, s.H * A), B, s.H * A, first, last, gate, add);
#pragma omp barrier
    h = norm(s, l.norm2, B, own);
    int some = B == 1 ? s.F : 2 * ROWS;  // of each matrix in turn
    for (int f = own.hidden.first, end; f < own.hidden.last; f = end) {
        end = std::min(f + some, own.hidden.last);
        mlp(s, l, f, end, h, end < own.hidden.last ? l.gate.row(end, D) : down);
    }
#pragma omp barrier
    product(l.down, own.ready(s.u, B, s.F), B, s.F, first, last, next, add);
#pragma omp barrier
}

// The greatest logit so far, and its word: of each lane
struct Best {
    floats logit = floats{} - INFINITY;
    wholes word = {};
    void meet(floats y, wholes its) {
        y = y - y == 0 ? y : floats{} + INFINITY;  // infinite or NaN: counts as the greatest
        wholes more = y > logit;
        logit = more ? y : logit, word = more ? its : word;
    }
};

// From the rows that lie in lanes into rows one after the other, some words at a time. `best` has
// an answer in each lane; or every WIDTH-th word, if there is but one answer.
static void write_logits(const Step &s, Ready h, int first, int last, const WEIGHT *then,
                         Best *best) {
    int n = last - first;
    float room[(s.C + WIDTH) * n + WIDTH], *y = room;
    product(s.head, h, s.C, s.D, first, last, then,
            [&](int b, int f, auto logit) { put(at(y, s.C, n, b, f - first), logit); });
    bool one = s.C == 1;
    wholes word;
    for (int i = 0; i < WIDTH; i++) word[i] = first + (one ? i : 0);
    if (one) std::fill_n(y + n, WIDTH, -FLT_MAX);  // fills the last register; no logit is less
    for (int b = 0; b < s.C; b += WIDTH)
        for (int i = 0; i < n; i += one ? WIDTH : 1)
            best[b / WIDTH].meet(load(at(y, s.C, n, b, i)), word + i);
    for (int c = 0; c < s.C; c++) {
        const float *from = at(y, s.C, n, c, 0);
        float *to = s.logits + (size_t)c * s.V + first;
        for (int i = 0; i < n; i++) to[i] = from[one ? i : i * WIDTH];
    }
}

enum { DONE, NO_TOKEN, NOT_FINITE };  // of a token that is none, nothing has been done

extern "C" int step(const Step *step) {
    const Step &s = *step;
    for (int b = 0; b < s.B && s.tokens; b++)
        if (s.tokens[b] < 0 || s.tokens[b] >= s.V) return NO_TOKEN;
    begin(s);
#pragma omp parallel num_threads(s.threads)
    {
        Own own(s);
        auto start = [&](int i) { return s.layer[i].q.row(own.heads.first * s.A, s.D); };
        const WEIGHT *head = s.head.row(own.words.first, s.D);
        for (int i = 0; i < s.layers; i++)
            block(s, s.layer[i], own, i + 1 < s.layers ? start(i + 1) : head);
#pragma omp single  // of each answer the last token
        for (int c = 0; c < s.C && s.T > 1; c++)
            for (int d = 0; d < s.D; d++)
                *at(s.x, s.C, s.D, c, d) = *at(s.x, s.B, s.D, (c + 1) * s.T - 1, d);
        Ready h = norm(s, s.norm, s.C, own);
        std::vector<Best> best((s.C + WIDTH - 1) / WIDTH);
        for (int f = own.words.first, end; f < own.words.last; f = end) {
            end = std::min(f + WORDS, own.words.last);
            const WEIGHT *then = end < own.words.last ? s.head.row(end, s.D) : start(0);
            write_logits(s, h, f, end, then, best.data());
        }
#pragma omp critical
        for (int i = 0, lanes = s.C == 1 ? WIDTH : s.C; i < lanes; i++) {
            float y = best[i / WIDTH].logit[i % WIDTH], &high = s.high[s.C == 1 ? 0 : i];
            int64_t word = best[i / WIDTH].word[i % WIDTH];
            int64_t &likeliest = s.likeliest[s.C == 1 ? 0 : i];
            if (y > high || (y == high && word < likeliest)) high = y, likeliest = word;
        }
    }
    for (int c = 0; c < s.C; c++) s.position[c] += s.T;
    return std::all_of(s.high, s.high + s.C, [](float y) { return std::isfinite(y); })
               ? DONE : NOT_FINITE;
}
