// The functions of kernels.py that a CPU runs faster as one loop. cpu.py builds this file and
// checks every argument.
//
// A decoding step is bound by reading caches and weights. torch's products of a few rows read them
// at half the speed of memory, and read every sequence's cache to the length of the longest one;
// here each key and value in use is read once.
//
// HEADS (R, query heads of a key/value head), HEAD_DIM (D) and NUMBER (float or bfloat16) are
// compile-time constants, so that loops over them unroll and vectorise. Tensors are contiguous;
// shapes are those of kernels.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int R = HEADS;
constexpr int D = HEAD_DIM;
constexpr int BLOCK = 128;  // keys whose scores are in registers and L1 at one time

struct bfloat16 {
    uint16_t bits;
};

typedef NUMBER Number;  // of keys, values and weights

static float to_float(float x) {
    return x;
}

static float to_float(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

// e^x for x <= 0: 2^n e^r with |r| <= ln(2) / 2, and the Taylor series of e^r. Vectorises, unlike
// std::exp.
static float exponential(float x) {
    x = std::max(x, -87.0f);
    int32_t n = int32_t(x * 1.44269504f - 0.5f);
    int32_t bits = (n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    float r = x - n * 0.693147181f;
    return power *
           (1 + r * (1 + r * (1 / 2.0f +
                              r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r / 720))))));
}

// Online softmax (arXiv 1805.02867) for the R query heads of a key/value head, with a_i = q . k_i
// and m the largest so far.
struct Attention {
    float numerator[R][D] = {};  // sum_i exp(a_i - m) v_i
    float denominator[R] = {};   // sum_i exp(a_i - m)
    float largest[R];            // m

    Attention() {
        std::fill_n(largest, R, -1e30f);
    }

    // The token that leaves the window joins the tail, S += phi(k) v^T and z += phi(k); then the
    // tail's terms phi(q)^T S and phi(q)^T z, at m = b. Query heads lie `stride` features apart.
    void add_tail(const float* phi_query, int64_t stride, const float* phi_key, const Number* left,
                  const float* b, float* S, float* z, int64_t features) {
        for (int64_t f = 0; f < features; f++, S += D) {
            z[f] += phi_key[f];
            for (int d = 0; d < D; d++)
                S[d] += phi_key[f] * to_float(left[d]);

            for (int r = 0; r < R; r++) {
                float phi = phi_query[r * stride + f];
                denominator[r] += phi * z[f];
                for (int d = 0; d < D; d++)
                    numerator[r][d] += phi * S[d];
            }
        }
        for (int r = 0; r < R; r++)
            if (denominator[r] > 0) // else there is no tail yet
                largest[r] = b[r];
    }

    // `count` keys and values, a block at a time. Query heads lie `stride` numbers apart.
    void add_keys(const float* q, int64_t stride, const Number* key, const Number* value,
                  int64_t count) {
        float query[R][D], weight[R][BLOCK];
        for (int r = 0; r < R; r++)
            std::copy_n(q + r * stride, D, query[r]);

        for (; count > 0; count -= BLOCK, key += BLOCK * D, value += BLOCK * D) {
            int n = std::min<int64_t>(BLOCK, count);

            for (int i = 0; i < n; i++) {
                float a[R] = {};
                for (int d = 0; d < D; d += 32)
                    __builtin_prefetch(value + i * D + d);
#pragma omp simd reduction(+ : a[ : R])
                for (int d = 0; d < D; d++)
                    for (int r = 0; r < R; r++)
                        a[r] += query[r][d] * to_float(key[i * D + d]);
                for (int r = 0; r < R; r++)
                    weight[r][i] = a[r];
            }

            for (int r = 0; r < R; r++) {
                float m = largest[r];
#pragma omp simd reduction(max : m)
                for (int i = 0; i < n; i++)
                    m = std::max(m, weight[r][i]);

                float sum = 0;
                for (int i = 0; i < n; i++) {
                    weight[r][i] = exponential(weight[r][i] - m);
                    sum += weight[r][i];
                }

                float scale = exponential(largest[r] - m);
                for (int d = 0; d < D; d++)
                    numerator[r][d] *= scale;
                denominator[r] = denominator[r] * scale + sum;
                largest[r] = m;
            }

            for (int i = 0; i < n; i++) {
                for (int d = 0; d < D; d += 32)
                    __builtin_prefetch(key + (i + BLOCK) * D + d);
                for (int r = 0; r < R; r++)
                    for (int d = 0; d < D; d++)
                        numerator[r][d] += weight[r][i] * to_float(value[i * D + d]);
            }
        }
    }

    void write(float* out, int64_t stride) {
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++)
                out[r * stride + d] = numerator[r][d] / denominator[r];
    }
};

// softmax_step (no features) and window_linear_step. Gives false, and changes nothing, where a slot
// is outside the room.
extern "C" bool step(int64_t batch, int64_t groups, int64_t room, int64_t features, float* out,
                     const float* query, const Number* new_key, const Number* new_value,
                     const int64_t* slot, Number* key, Number* value, const int64_t* first,
                     const int64_t* end, const float* phi_query, const float* phi_key,
                     const Number* left, const float* tail_logit, float* state, float* norm) {
    for (int64_t b = 0; b < batch; b++)
        if (slot[b] < 0 || slot[b] >= room || first[b] < 0 || end[b] > room || first[b] > end[b])
            return false;

#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < batch * groups; i++) {
        int64_t b = i / groups, g = i % groups;
        std::copy_n(new_key + i * D, D, key + (i * room + slot[b]) * D);
        std::copy_n(new_value + i * D, D, value + (i * room + slot[b]) * D);

        Attention attention;
        if (features)
            attention.add_tail(phi_query + i * R * features, features, phi_key + i * features,
                               left + i * D, tail_logit + g * R, state + i * features * D,
                               norm + i * features, features);
        int64_t start = (i * room + first[b]) * D;
        attention.add_keys(query + i * R * D, D, key + start, value + start, end[b] - first[b]);
        attention.write(out + i * R * D, D);
    }
    return true;
}

// One row times a matrix, W x: bound by reading W. One stream a thread, since two streams get half
// the bandwidth of one.
extern "C" bool row_product(int64_t rows, int64_t columns, float* out, const float* x,
                            const Number* weight) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < columns; j++)
            sum += x[j] * to_float(weight[i * columns + j]);
        out[i] = sum;
    }
    return true;
}
