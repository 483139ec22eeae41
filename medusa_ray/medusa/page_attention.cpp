// A step's queries and the paged cache -> its attention on a CPU, read straight from the pages.
//
// As kernels.py has it for GPUs. One key/value head of one sequence is one piece of work: its rows are the nodes and the
// query heads that share it, so keys are read once for all of them. A page is a tile: scores, a mask, an online softmax
// (Milakov and Gimelshein 2018), values. A few rows multiply keys as they lie, a sum across lanes for each; for many the
// tile is turned over first, so that each lane is a slot.
//
// Vectors are the compiler's own (GCC's and Clang's vector_size), which it splits to what the processor has.
//
// B sequences   T nodes   P pages of a sequence   H query heads   K key/value heads   E size of a key   U of a value
// R rows, H / K for each node   S slots of a tile

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

constexpr int64_t LANES = 16, TILE = PAGE_SIZE;
constexpr int64_t BLOCK = 4;      // rows at a time, whose sums stay in registers
constexpr int64_t MANY_ROWS = 5;  // from here on a tile of keys is turned over
constexpr float MASKED = -1e30f;  // finite, so that the difference of two is a number
static_assert(TILE % LANES == 0);

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
typedef int8_t ByteVec __attribute__((vector_size(LANES)));

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To taken(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Vec load(const float* from) { return taken<Vec>(from); }

inline Vec load(const BFloat16* from) {
  return (Vec)(__builtin_convertvector(taken<HalfVec>(from), BitVec) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline void store(BFloat16* to, Vec value) {
  const BitVec bits = (BitVec)value;
  const HalfVec half = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, HalfVec);  // to the nearest
  std::memcpy(to, &half, sizeof half);
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Lanes of two vectors, b's counted from LANES on.
template <int... from>
inline Vec pick(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, IntVec{from...});
#endif
}

// Half of a's lanes and then half of b's: runs of `run` lanes, the first of each two or the second.
template <int run, bool is_second, int... i>
inline Vec runs(Vec a, Vec b, std::integer_sequence<int, i...>) {
  return pick<(i / 8 * LANES + i % 8 / run * 2 * run + i % run + is_second * run)...>(a, b);
}

template <int run, bool is_second>
inline Vec runs(Vec a, Vec b) {
  return runs<run, is_second>(a, b, std::make_integer_sequence<int, LANES>());
}

template <int run>
inline Vec folded(Vec a, Vec b) {
  return runs<run, false>(a, b) + runs<run, true>(a, b);
}

// The sum of each of as many vectors as there are lanes, in its lane.
inline Vec sums_of(Vec* value) {
  for (int i = 0; i < 8; ++i) value[i] = folded<8>(value[2 * i], value[2 * i + 1]);
  for (int i = 0; i < 4; ++i) value[i] = folded<4>(value[2 * i], value[2 * i + 1]);
  for (int i = 0; i < 2; ++i) value[i] = folded<2>(value[2 * i], value[2 * i + 1]);
  return folded<1>(value[0], value[1]);
}

inline float sum_of(Vec value) {
  value = folded<8>(value, value);
  value = folded<4>(value, value);
  value = folded<2>(value, value);
  return folded<1>(value, value)[0];
}

template <int run>
inline Vec larger_runs(Vec value) {
  return larger(runs<run, false>(value, value), runs<run, true>(value, value));
}

inline float largest_of(Vec value) {
  return larger_runs<1>(larger_runs<2>(larger_runs<4>(larger_runs<8>(value))))[0];
}

// A square of lanes turned over: each round puts a lane of one vector beside that of another half the square away.
inline void turn(Vec* square) {
  for (int round = 0; round < 4; ++round) {
    Vec next[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      const Vec a = square[i], b = square[i + LANES / 2];
      next[2 * i] = pick<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23>(a, b);
      next[2 * i + 1] = pick<8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(a, b);
    }
    std::copy(next, next + LANES, square);
  }
}

// e to the power of each lane, none above 0: as 2^n e^r, r within ln(2) / 2; the polynomial is Cephes' (expf.c).
inline Vec power_of_e(Vec x) {
  const Vec shift = Vec{} + 12582912.0f;  // at 1.5 * 2^23 a float's last bit is 1
  const Vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return x < -87.0f ? Vec{} : (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// What all pieces of work share.
struct Tables {
  const int64_t *table_BP, *length_B, *depth_T;
  const bool* mask_TT;  // the row's node sees the column's
  int64_t T, P, window;  // a window of 0 is none
};

// One sequence's tile: slots from `start` on, of which the first `size` are read.
struct Tile {
  int64_t length, start, size;  // length: of the context; the nodes stand behind it

  bool is_context() const { return start + size <= length; }
};

// Whether some row of a block sees any slot of a tile behind the context: a prompt's later tokens are hidden from all
// its earlier ones.
inline bool is_seen(const Tables& of, const Tile& tile, int64_t first_node, int64_t last_node) {
  if (tile.start < tile.length) return true;
  for (int64_t node = first_node; node <= last_node; ++node)
    if (std::memchr(of.mask_TT + node * of.T + tile.start - tile.length, 1, tile.size)) return true;
  return false;
}

// Hides from a node what it does not see of a tile, and what lies past the tile's end.
inline void hide(const Tables& of, const Tile& tile, int64_t node, float* score_S) {
  for (int64_t s = tile.size; s < TILE; ++s) score_S[s] = MASKED;
  const bool* mask_T = of.mask_TT + node * of.T;
  const int64_t behind = tile.start - tile.length;  // of the first slot; negative in the context
  for (int64_t s = std::max<int64_t>(0, -behind); s < tile.size;) {
    if (s % LANES == 0 && s + LANES <= tile.size) {
      const IntVec is_seen = __builtin_convertvector(taken<ByteVec>(mask_T + behind + s), IntVec) != 0;
      store(score_S + s, is_seen ? load(score_S + s) : Vec{} + MASKED);
      s += LANES;
    } else {
      if (!mask_T[behind + s]) score_S[s] = MASKED;
      ++s;
    }
  }
  if (!of.window) return;
  const int64_t position = tile.length + of.depth_T[node];
  for (int64_t s = 0; s < tile.size; ++s) {
    const int64_t its = behind + s < 0 ? tile.start + s : tile.length + of.depth_T[behind + s];
    if (position - its >= of.window) score_S[s] = MASKED;
  }
}

template <class T>
inline void multiply(const float* query_E, int64_t E, const T* keys, int64_t stride, int64_t size, float* score_S) {
  for (int64_t s = 0; s < size; s += LANES) {  // past the end too, where the page goes on
    Vec sum[LANES] = {};
    for (int64_t e = 0; e < E; e += LANES) {
      const Vec query = load(query_E + e);
      for (int64_t i = 0; i < LANES; ++i) sum[i] += query * load(keys + (s + i) * stride + e);
    }
    store(score_S + s, sums_of(sum));
  }
}

template <class T>
void turn_keys(const T* keys, int64_t stride, int64_t size, int64_t E, float* key_ES) {
  for (int64_t s = 0; s < size; s += LANES)
    for (int64_t e = 0; e < E; e += LANES) {
      Vec square[LANES];
      for (int64_t i = 0; i < LANES; ++i) square[i] = load(keys + (s + i) * stride + e);
      turn(square);
      for (int64_t i = 0; i < LANES; ++i) store(key_ES + (e + i) * TILE + s, square[i]);
    }
}

template <int R>
inline void multiply_turned(const float* query_RE, int64_t E, const float* key_ES, float* score_RS) {
  Vec sum[R][TILE / LANES] = {};
  for (int64_t e = 0; e < E; ++e)
    for (int64_t j = 0; j < TILE / LANES; ++j) {
      const Vec key = load(key_ES + e * TILE + j * LANES);
      for (int r = 0; r < R; ++r) sum[r][j] += query_RE[r * E + e] * key;
    }
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < TILE / LANES; ++j) store(score_RS + r * TILE + j * LANES, sum[r][j]);
}

template <int R, int W, class T>
inline void add_columns(const float* share_RS, const T* values, int64_t stride, int64_t size, int64_t U, float* sum_RU) {
  Vec sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load(sum_RU + r * U + w * LANES);
  for (int64_t s = 0; s < size; ++s)
    for (int w = 0; w < W; ++w) {
      const Vec value = load(values + s * stride + w * LANES);
      for (int r = 0; r < R; ++r) sum[r][w] += share_RS[r * TILE + s] * value;
    }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store(sum_RU + r * U + w * LANES, sum[r][w]);
}

template <int R, class T>
inline void add_values(const float* share_RS, const T* values, int64_t stride, int64_t size, int64_t U, float* sum_RU) {
  int64_t u = 0;
  for (; u + 4 * LANES <= U; u += 4 * LANES) add_columns<R, 4>(share_RS, values + u, stride, size, U, sum_RU + u);
  for (; u < U; u += LANES) add_columns<R, 1>(share_RS, values + u, stride, size, U, sum_RU + u);
}

// One row's softmax goes on: scores become shares of the largest so far, and what was summed before shrinks to it.
inline void soften(float* score_S, float* sum_U, int64_t U, float& peak, float& weight) {
  Vec most = load(score_S);
  for (int64_t s = LANES; s < TILE; s += LANES) most = larger(most, load(score_S + s));
  const float new_peak = std::max(peak, largest_of(most));
  Vec added = {};
  for (int64_t s = 0; s < TILE; s += LANES) {
    const Vec share = power_of_e(load(score_S + s) - new_peak);
    store(score_S + s, share);
    added += share;
  }
  // A row that has seen nothing yet has gathered rubbish; kept is nothing once it sees, and it sees itself.
  const float kept = power_of_e(Vec{} + (peak - new_peak))[0];
  weight = weight * kept + sum_of(added);
  if (kept != 1)
    for (int64_t u = 0; u < U; u += LANES) store(sum_U + u, load(sum_U + u) * kept);
  peak = new_peak;
}

template <class T>
struct Problem {
  const T *query, *keys, *values;
  T* out;
  int64_t B, H, K, E, U;
  const int64_t* query_strides;  // of B, H and T
  float scale;
  Tables of;

  int64_t groups() const { return H / K; }
  int64_t rows() const { return of.T * groups(); }
  int64_t scratch_size() const { return rows() * (E + U + 2) + BLOCK * TILE + E * TILE; }

  // A block of R rows, from `row` on, takes in a tile.
  template <int R>
  void take_in(const Tile& tile, int64_t row, const T* key, const T* value, const float* turned_ES, float* query_RE,
               float* sum_RU, float* peak_R, float* weight_R, float* score_RS) const {
    if (turned_ES)
      multiply_turned<R>(query_RE + row * E, E, turned_ES, score_RS);
    else
      for (int r = 0; r < R; ++r) multiply(query_RE + (row + r) * E, E, key, K * E, tile.size, score_RS + r * TILE);
    for (int r = 0; r < R; ++r) {
      float* score_S = score_RS + r * TILE;
      if (of.window || !tile.is_context() || tile.size < TILE) hide(of, tile, (row + r) / groups(), score_S);
      soften(score_S, sum_RU + (row + r) * U, U, peak_R[row + r], weight_R[row + r]);
    }
    add_values<R>(score_RS, value, K * U, tile.size, U, sum_RU + row * U);
  }

  void attend(int64_t b, int64_t k, float* scratch) const {
    const int64_t R = rows(), length = of.length_B[b];
    float* query_RE = scratch;
    float *sum_RU = query_RE + R * E, *peak_R = sum_RU + R * U, *weight_R = peak_R + R;
    float *score_RS = weight_R + R, *turned_ES = score_RS + BLOCK * TILE;
    for (int64_t row = 0; row < R; ++row) {
      const int64_t node = row / groups(), head = k * groups() + row % groups();
      const T* from = query + b * query_strides[0] + head * query_strides[1] + node * query_strides[2];
      for (int64_t e = 0; e < E; e += LANES) store(query_RE + row * E + e, load(from + e) * scale);
    }
    std::fill(sum_RU, peak_R, 0.0f);
    std::fill(peak_R, weight_R, MASKED);
    std::fill(weight_R, score_RS, 0.0f);

    const int64_t end = std::min(length + of.T, of.P * PAGE_SIZE);
    const int64_t first = of.window ? std::max<int64_t>(length - of.window + 1, 0) : 0;
    for (int64_t start = first / TILE * TILE; start < end; start += TILE) {
      const Tile tile{length, start, std::min(TILE, end - start)};
      const int64_t slot = of.table_BP[b * of.P + start / PAGE_SIZE] * PAGE_SIZE;
      const T *key = keys + (slot * K + k) * E, *value = values + (slot * K + k) * U;
      const bool is_turned = R >= MANY_ROWS;
      for (int64_t s = 0; s < tile.size; ++s)  // on their way while keys are multiplied
        for (int64_t u = 0; u < U; u += LANES) __builtin_prefetch(value + s * K * U + u);
      if (is_turned) turn_keys(key, K * E, tile.size, E, turned_ES);
      for (int64_t row = 0; row < R; row += BLOCK) {
        const int64_t num = std::min(BLOCK, R - row);
        if (!is_seen(of, tile, row / groups(), (row + num - 1) / groups())) continue;
        const auto go = [&]<int N>() {
          take_in<N>(tile, row, key, value, is_turned ? turned_ES : nullptr, query_RE, sum_RU, peak_R, weight_R,
                     score_RS);
        };
        switch (num) {
          case 1: go.template operator()<1>(); break;
          case 2: go.template operator()<2>(); break;
          case 3: go.template operator()<3>(); break;
          default: go.template operator()<BLOCK>();
        }
      }
    }
    for (int64_t row = 0; row < R; ++row) {
      const int64_t node = row / groups(), head = k * groups() + row % groups();
      T* to = out + ((b * of.T + node) * H + head) * U;
      const float share = weight_R[row] > 0 ? 1 / weight_R[row] : 0;
      for (int64_t u = 0; u < U; u += LANES) store(to + u, load(sum_RU + row * U + u) * share);
    }
  }

  void run(int64_t threads) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const std::unique_ptr<float[]> scratch(new float[scratch_size()]);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t b = 0; b < B; ++b)
        for (int64_t k = 0; k < K; ++k) attend(b, k, scratch.get());
    }
  }
};

template <class T>
T* data_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  return static_cast<T*>(data);
}

const int64_t* sizes_of(AtenTensorHandle tensor) {
  int64_t* sizes = nullptr;
  aoti_torch_get_sizes(tensor, &sizes);
  return sizes;
}

}  // namespace

// The operator medusa_ray::page_attention (page_attention.py) in torch's C interface.
extern "C" AOTITorchError aoti_torch_cpu_page_attention(
    AtenTensorHandle query_BHTE, AtenTensorHandle keys_LKE, AtenTensorHandle values_LKU, AtenTensorHandle table_BP,
    AtenTensorHandle length_B, AtenTensorHandle mask_TT, AtenTensorHandle depth_T, double scale, int64_t window,
    int64_t threads, AtenTensorHandle* out_BTHU) {
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_strides(query_BHTE, &strides);
  aoti_torch_get_dtype(query_BHTE, &dtype);
  if (strides[3] != 1) return AOTI_TORCH_FAILURE;
  const int64_t *query = sizes_of(query_BHTE), *values = sizes_of(values_LKU);
  const int64_t B = query[0], H = query[1], T = query[2], E = query[3], K = values[1], U = values[2];
  const int64_t out_sizes[] = {B, T, H, U}, out_strides[] = {T * H * U, H * U, U, 1};
  const AOTITorchError error =
      aoti_torch_empty_strided(4, out_sizes, out_strides, dtype, aoti_torch_device_type_cpu(), 0, out_BTHU);
  if (error != AOTI_TORCH_SUCCESS) return error;
  const Tables of{data_of<int64_t>(table_BP), data_of<int64_t>(length_B), data_of<int64_t>(depth_T),
                  data_of<bool>(mask_TT),     T,                          sizes_of(table_BP)[1],
                  window};
  const auto run = [&]<class D>() {
    Problem<D>{data_of<D>(query_BHTE), data_of<D>(keys_LKE), data_of<D>(values_LKU), data_of<D>(*out_BTHU),
               B, H, K, E, U, strides, static_cast<float>(scale), of}
        .run(threads);
  };
  if (dtype == aoti_torch_dtype_float32())
    run.template operator()<float>();
  else if (dtype == aoti_torch_dtype_bfloat16())
    run.template operator()<BFloat16>();
  else
    return AOTI_TORCH_FAILURE;
  return AOTI_TORCH_SUCCESS;
}
