// The attention of one decode step on a CPU: every key and value is read once for all rows that want it.
//
// Rows lie across the lanes of a vector register, so that one loop and four loops (4 and 16 rows a key/value head, say)
// take the same instructions for the scores: what more loops cost is little beside the reading of the cache.
//
//     N slots   R passes   H query heads   G key/value heads   K head size   T capacity   W window + 1   M = R * H / G rows

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#define PLT_PAIRS 1  // products of two pairs of bfloat16 at once
#endif

namespace {

template <int W>
struct Lanes;
#define PLT_LANES(W)                                                                  \
  template <>                                                                         \
  struct Lanes<W> {                                                                   \
    typedef float V __attribute__((vector_size(4 * W), aligned(4), may_alias));       \
    typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));     \
  }
PLT_LANES(4);
PLT_LANES(8);
PLT_LANES(16);
#undef PLT_LANES

constexpr int kBlock = 64;      // keys that are widened to float32 and scored at once
constexpr int kTogether = 8;    // keys whose scores are summed side by side, to hide the latency of a sum
constexpr int kLeast = 256;     // keys that are worth a task of their own
constexpr float kNone = -std::numeric_limits<float>::infinity();

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// e^x for x <= 0, to about 2 units in the last place; 0 below -87.
template <int W>
inline typename Lanes<W>::V exponential(typename Lanes<W>::V x) {
  using V = typename Lanes<W>::V;
  using I = typename Lanes<W>::I;
  const V zero = V{};
  const V low = zero - 87.0f;
  const auto tiny = x < low;
  x = tiny ? low : x;
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // the integer is in the low bits
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = zero + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof(power));
  return tiny ? zero : p * power;
}

inline float single(float x) { return x <= -87.0f ? 0.0f : std::exp(x); }

template <typename T>
inline void widen(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void widen(const c10::BFloat16* from, float* to, int64_t count) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  uint32_t* wide = reinterpret_cast<uint32_t*>(to);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
}

// The running softmax of M rows: the largest score, the sum of weights, and the weighted sum of values, by row.
struct Sums {
  float* largest;  // [lanes]
  float* total;    // [lanes]
  float* values;   // [lanes, size]
};

// Floats that the sums of some rows take.
int64_t room(int64_t lanes, int64_t size) { return lanes * (size + 2); }

Sums sums_at(float* at, int64_t lanes) { return {at, at + lanes, at + 2 * lanes}; }

// scores[b][m] = sum over k of q[k][m] * keys[b][k], for the kBlock keys of a block.
template <int W>
void score(const float* q, const float* keys, float* scores, int64_t size, int64_t lanes, int64_t count) {
  using V = typename Lanes<W>::V;
  for (int64_t m = 0; m < lanes; m += W) {
    for (int64_t b = 0; b < count; b += kTogether) {
      V sum[kTogether] = {};
      const float* k = keys + b * size;
      for (int64_t i = 0; i < size; ++i) {
        const V row = *reinterpret_cast<const V*>(q + i * lanes + m);
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) sum[j] += row * k[j * size + i];
      }
      for (int j = 0; j < kTogether; ++j) *reinterpret_cast<V*>(scores + (b + j) * lanes + m) = sum[j];
    }
  }
}

#ifdef PLT_PAIRS
inline __m512 add_pairs(__m512 sum, __m512i a, int32_t b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(b));
}
inline __m256 add_pairs(__m256 sum, __m256i a, int32_t b) {
  return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)_mm256_set1_epi32(b));
}
inline __m128 add_pairs(__m128 sum, __m128i a, int32_t b) {
  return _mm_dpbf16_ps(sum, (__m128bh)a, (__m128bh)_mm_set1_epi32(b));
}

template <int W>
struct Pairs;
template <>
struct Pairs<4> {
  using F = __m128;
  using I = __m128i;
};
template <>
struct Pairs<8> {
  using F = __m256;
  using I = __m256i;
};
template <>
struct Pairs<16> {
  using F = __m512;
  using I = __m512i;
};

// As `score`, on keys as they lie in the cache; q holds [head / 2, lanes] pairs. Scores past `count` mean nothing.
template <int W>
void score_pairs(const int32_t* q, const c10::BFloat16* keys, int64_t key_step, float* scores, int64_t head, int64_t lanes,
                 int64_t count) {
  using F = typename Pairs<W>::F;
  using I = typename Pairs<W>::I;
  for (int64_t m = 0; m < lanes; m += W) {
    for (int64_t b = 0; b < count; b += kTogether) {
      const char* k[kTogether];
      for (int j = 0; j < kTogether; ++j)
        k[j] = reinterpret_cast<const char*>(keys + std::min(b + j, count - 1) * key_step);
      F sum[kTogether] = {};
      for (int64_t i = 0; i < head / 2; ++i) {
        I row;
        std::memcpy(&row, q + i * lanes + m, sizeof(row));
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) {
          int32_t pair;
          std::memcpy(&pair, k[j] + 4 * i, 4);
          sum[j] = add_pairs(sum[j], row, pair);
        }
      }
      for (int j = 0; j < kTogether; ++j) std::memcpy(scores + (b + j) * lanes + m, &sum[j], sizeof(F));
    }
  }
}
#endif

// Scores, times `by`, to weights, and what they change of the running sums.
template <int W>
void weigh(float* scores, Sums sums, float* scale, float by, int64_t lanes, int64_t count) {
  using V = typename Lanes<W>::V;
  for (int64_t m = 0; m < lanes; m += W) {
    V& largest = *reinterpret_cast<V*>(sums.largest + m);
    V& total = *reinterpret_cast<V*>(sums.total + m);
    V now = largest;
    for (int64_t b = 0; b < count; ++b) now = larger(now, *reinterpret_cast<V*>(scores + b * lanes + m) * by);
    const V less = exponential<W>(largest - now);
    V sum = V{};
    for (int64_t b = 0; b < count; ++b) {
      V& at = *reinterpret_cast<V*>(scores + b * lanes + m);
      at = exponential<W>(at * by - now);
      sum += at;
    }
    largest = now;
    total = total * less + sum;
    *reinterpret_cast<V*>(scale + m) = less;
  }
}

// values[m] = values[m] * scale[m] + sum over b of weights[b][m] * held[b], four rows and 64 (or 16) numbers at a time.
template <int Wide>
void gather_part(const float* weights, const float* held, float* values, const float* scale, int64_t size, int64_t lanes,
                 int64_t count, int64_t m, int64_t i) {
  using V = typename Lanes<16>::V;
  V sum[4][Wide];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Wide; ++c)
      sum[r][c] = *reinterpret_cast<const V*>(values + (m + r) * size + i + 16 * c) * scale[m + r];
  for (int64_t b = 0; b < count; ++b) {
    V v[Wide];
#pragma GCC unroll 4
    for (int c = 0; c < Wide; ++c) v[c] = *reinterpret_cast<const V*>(held + b * size + i + 16 * c);
    const float* w = weights + b * lanes + m;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < Wide; ++c) sum[r][c] += v[c] * w[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Wide; ++c) *reinterpret_cast<V*>(values + (m + r) * size + i + 16 * c) = sum[r][c];
}

void gather(const float* weights, const float* held, float* values, const float* scale, int64_t size, int64_t lanes,
            int64_t rows, int64_t count) {
  for (int64_t m = 0; m < rows; m += 4) {
    int64_t i = 0;
    for (; i + 64 <= size; i += 64) gather_part<4>(weights, held, values, scale, size, lanes, count, m, i);
    for (; i < size; i += 16) gather_part<1>(weights, held, values, scale, size, lanes, count, m, i);
  }
}

// What one thread writes into while it works.
struct Scratch {
  std::vector<float> q, held, scores, scale;

  void fit(int64_t lanes, int64_t size) {
    q.resize(std::max<size_t>(q.size(), lanes * size));
    held.resize(std::max<size_t>(held.size(), kBlock * size));
    scores.resize(std::max<size_t>(scores.size(), kBlock * lanes));
    scale.resize(std::max<size_t>(scale.size(), lanes));
  }
};

// The scores of one block of keys, not yet divided by sqrt(K), in scratch.scores.
template <int W, typename T>
void score_block(Scratch& s, const T* keys, int64_t key_step, int64_t head, int64_t size, int64_t lanes, int64_t count) {
#ifdef PLT_PAIRS
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (head % 2 == 0) return score_pairs<W>(reinterpret_cast<int32_t*>(s.q.data()), keys, key_step, s.scores.data(), head, lanes, count);
  }
#endif
  const int64_t whole = rounded(count, kTogether);
  for (int64_t b = 0; b < count; ++b) widen(keys + b * key_step, s.held.data() + b * size, head);
  std::fill(s.held.data() + count * size, s.held.data() + whole * size, 0.0f);
  score<W>(s.q.data(), s.held.data(), s.scores.data(), size, lanes, whole);
}

// `rows` rows (in `lanes` lanes; scratch.q holds them, turned and scaled) against keys and values first .. last - 1.
template <typename T, int W>
void attend(Scratch& s, const T* keys, const T* values, int64_t key_step, int64_t value_step, int64_t first, int64_t last,
            int64_t head, int64_t size, int64_t rows, int64_t lanes, Sums sums) {
  std::fill(sums.largest, sums.largest + lanes, kNone);
  std::fill(sums.total, sums.total + lanes, 0.0f);
  std::fill(sums.values, sums.values + lanes * size, 0.0f);
  if (first >= last) return;
  const float by = 1.0f / std::sqrt(static_cast<float>(head));
  if (head < size) std::fill(s.held.begin(), s.held.end(), 0.0f);
  for (int64_t from = first; from < last; from += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, last - from);
    score_block<W>(s, keys + from * key_step, key_step, head, size, lanes, count);
    weigh<W>(s.scores.data(), sums, s.scale.data(), by, lanes, count);
    for (int64_t b = 0; b < count; ++b) widen(values + (from + b) * value_step, s.held.data() + b * size, head);
    gather(s.scores.data(), s.held.data(), sums.values, s.scale.data(), size, lanes, rows, count);
  }
}

int64_t lanes_for(int64_t rows) { return rows <= 4 ? 4 : rows <= 8 ? 8 : rounded(rows, 16); }

template <typename T, typename... Rest>
void attend_rows(int64_t lanes, Rest&&... rest) {
  if (lanes == 4) return attend<T, 4>(rest...);
  if (lanes == 8) return attend<T, 8>(rest...);
  attend<T, 16>(rest...);
}

// One call: the shapes, and where everything is.
template <typename T>
struct Call {
  const at::Tensor &q, &keys, &values;
  const at::Tensor *ring_keys, *ring_values, *gate;
  const int64_t* lengths;
  at::Tensor& y;
  int64_t slots, loops, heads, groups, head, per, size, rows, lanes, local_lanes, ring, splits;
  std::vector<float>& found;  // per slot, group: the sums of `splits` parts of the shared keys, then of each later pass
  int64_t step;               // floats of found a slot and group

  // The rows of `count` loops of one slot and group into the thread's scratch: [size, lanes], or [head / 2, lanes] pairs.
  void turn(Scratch& s, int64_t n, int64_t g, int64_t first_loop, int64_t count, int64_t lanes_here) const {
    std::fill(s.q.begin(), s.q.begin() + size * lanes_here, 0.0f);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < per; ++j) {
        const T* from = q.const_data_ptr<T>() + n * q.stride(0) + (first_loop + r) * q.stride(1) + (g * per + j) * q.stride(2);
        float* to = s.q.data() + r * per + j;
#ifdef PLT_PAIRS
        if (std::is_same_v<T, c10::BFloat16> && head % 2 == 0) {
          for (int64_t k = 0; k < head / 2; ++k) std::memcpy(to + k * lanes_here, from + 2 * k, 4);
          continue;
        }
#endif
        for (int64_t k = 0; k < head; ++k) to[k * lanes_here] = static_cast<float>(from[k]);
      }
  }

  void shared(Scratch& s, int64_t n, int64_t g, int64_t split) const {
    const int64_t length = std::min<int64_t>(std::max<int64_t>(lengths[n], 0), keys.size(2));
    const int64_t share = rounded((length + splits - 1) / splits, kBlock);
    turn(s, n, g, 0, loops, lanes);
    attend_rows<T>(lanes, s, keys.const_data_ptr<T>() + n * keys.stride(0) + g * keys.stride(1),
                   values.const_data_ptr<T>() + n * values.stride(0) + g * values.stride(1), keys.stride(2),
                   values.stride(2), split * share, std::min(length, (split + 1) * share), head, size, rows, lanes,
                   sums_at(found.data() + (n * groups + g) * step + split * room(lanes, size), lanes));
  }

  void local(Scratch& s, int64_t n, int64_t g) const {
    const int64_t length = std::min<int64_t>(std::max<int64_t>(lengths[n], 0), ring);
    for (int64_t r = 1; r < loops; ++r) {
      turn(s, n, g, r, 1, local_lanes);
      const auto at = [&](const at::Tensor& of) {
        return of.const_data_ptr<T>() + n * of.stride(0) + (r - 1) * of.stride(1) + g * of.stride(2);
      };
      attend_rows<T>(local_lanes, s, at(*ring_keys), at(*ring_values), ring_keys->stride(3), ring_values->stride(3),
                     int64_t{0}, length, head, size, per, local_lanes, local_sums(n, g, r));
    }
  }

  Sums local_sums(int64_t n, int64_t g, int64_t r) const {
    float* at = found.data() + (n * groups + g) * step + splits * room(lanes, size) + (r - 1) * room(local_lanes, size);
    return sums_at(at, local_lanes);
  }

  // The parts of one slot and group together, mixed with their windows, into y.
  void join(int64_t n, int64_t g) const {
    float* parts = found.data() + (n * groups + g) * step;
    std::vector<float> mixed(head);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t r = m / per, h = g * per + m % per;
      float largest = kNone, total = 0.0f;
      for (int64_t i = 0; i < splits; ++i) largest = std::max(largest, sums_at(parts + i * room(lanes, size), lanes).largest[m]);
      std::fill(mixed.begin(), mixed.end(), 0.0f);
      for (int64_t i = 0; i < splits; ++i) {
        const Sums part = sums_at(parts + i * room(lanes, size), lanes);
        if (part.total[m] == 0.0f) continue;
        const float by = single(part.largest[m] - largest);
        total += part.total[m] * by;
        for (int64_t k = 0; k < head; ++k) mixed[k] += part.values[m * size + k] * by;
      }
      const float share = (r == 0 || !gate) ? 1.0f
          : static_cast<float>(gate->const_data_ptr<T>()[n * gate->stride(0) + (r - 1) * gate->stride(1) + h * gate->stride(2)]);
      const float by = total == 0.0f ? 0.0f : share / total;
      for (int64_t k = 0; k < head; ++k) mixed[k] *= by;
      if (r > 0 && gate) {
        const Sums own = local_sums(n, g, r);
        const int64_t j = m % per;
        const float rest = own.total[j] == 0.0f ? 0.0f : (1.0f - share) / own.total[j];
        for (int64_t k = 0; k < head; ++k) mixed[k] += own.values[j * size + k] * rest;
      }
      T* to = y.mutable_data_ptr<T>() + ((n * loops + r) * heads + h) * head;
      for (int64_t k = 0; k < head; ++k) to[k] = static_cast<T>(mixed[k]);
    }
  }
};

template <typename T>
void run(Call<T>& call) {
  const int64_t kinds = call.splits + (call.gate ? 1 : 0), pairs = call.slots * call.groups;
  at::parallel_for(0, pairs * kinds, 1, [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    scratch.fit(std::max(call.lanes, call.local_lanes), call.size);
    for (int64_t i = from; i < to; ++i) {
      const int64_t n = i / kinds / call.groups, g = i / kinds % call.groups, kind = i % kinds;
      if (kind < call.splits)
        call.shared(scratch, n, g, kind);
      else
        call.local(scratch, n, g);
    }
  });
  at::parallel_for(0, pairs, 8, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) call.join(i / call.groups, i % call.groups);
  });
}

at::Tensor gswa_decode(const at::Tensor& q_in, const at::Tensor& keys_in, const at::Tensor& values_in,
                       const std::optional<at::Tensor>& ring_keys_in, const std::optional<at::Tensor>& ring_values_in,
                       const std::optional<at::Tensor>& gate_in, const at::Tensor& lengths_in) {
  const auto dense = [](const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); };
  const at::Tensor q = dense(q_in), keys = dense(keys_in), values = dense(values_in), lengths = lengths_in.contiguous();
  const bool mixing = gate_in.has_value();
  at::Tensor ring_keys, ring_values, gate;
  if (mixing) {
    ring_keys = dense(*ring_keys_in);
    ring_values = dense(*ring_values_in);
    gate = gate_in->to(q.scalar_type());
  }
  at::Tensor y = at::empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.options());
  static thread_local std::vector<float> found;
  const auto go = [&](auto kind) {
    using T = decltype(kind);
    const int64_t slots = q.size(0), loops = q.size(1), heads = q.size(2), groups = keys.size(1), head = q.size(3);
    const int64_t per = heads / groups, size = rounded(head, 16), rows = loops * per, lanes = lanes_for(rows);
    const int64_t local_lanes = lanes_for(per), threads = at::get_num_threads(), pairs = slots * groups;
    const int64_t most = std::max<int64_t>(1, keys.size(2) / kLeast);
    const int64_t splits = pairs >= threads ? 1 : std::min<int64_t>((threads + pairs - 1) / pairs, most);
    const int64_t step = splits * room(lanes, size) + (mixing ? (loops - 1) * room(local_lanes, size) : 0);
    found.resize(std::max<size_t>(found.size(), pairs * step));
    Call<T> call{q, keys, values, &ring_keys, &ring_values, mixing ? &gate : nullptr, lengths.const_data_ptr<int64_t>(), y,
                 slots, loops, heads, groups, head, per, size, rows, lanes, local_lanes, mixing ? ring_keys.size(3) : 0,
                 splits, found, step};
    run(call);
  };
  switch (q.scalar_type()) {
    case at::kFloat: go(float{}); break;
    case at::kBFloat16: go(c10::BFloat16{}); break;
    case at::kHalf: go(c10::Half{}); break;
    default: TORCH_CHECK(false, "gswa_decode takes float32, float16 and bfloat16, not ", q.scalar_type());
  }
  return y;
}

}  // namespace

TORCH_LIBRARY(plt_model_cpu, m) {
  m.def("gswa_decode(Tensor q, Tensor keys, Tensor values, Tensor? ring_keys, Tensor? ring_values, Tensor? gate, Tensor lengths) -> Tensor");
}

TORCH_LIBRARY_IMPL(plt_model_cpu, CPU, m) { m.impl("gswa_decode", &gswa_decode); }
