// exp, sigmoid, erf and products with quantized matrices for MLX on a CPU, on all cores and with the CPU's wide
// instructions. MLX evaluates an operation by a virtual function of its class, eval_cpu. mlx_cpu_install writes ours into
// the table of these four classes. Graphs, gradients, mx.compile and mx.vmap thus stay MLX's own, and ours hands back to
// MLX's eval_cpu what it does not do itself.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "mlx/array.h"
#include "mlx/backend/common/unary.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace {

namespace mx = mlx::core;
using std::min;

enum { ROW_MAJOR = 101, PLAIN = 111, TURNED = 112 };
using Part = void (*)(const void *, int);
using Sgemm = void (*)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
void (*run)(Part, const void *, int); // mlx_cpu.c: Part(job, i) for all i < parts, on several threads
Sgemm sgemm;                          // a BLAS library's, on one thread
int threads;

// ------------------------------------------------------------------------------------- functions of each number

enum { LANES = __BIGGEST_ALIGNMENT__ / 4, LARGE = 1 << 10, STEP = 1 << 13 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vec within(float low, vec x, float high) { // NaN stays
  const ivec below = x < low, above = x > high;
  const vec lows = low - vec{}, highs = high - vec{};
  return (vec)(((ivec)lows & below) | ((ivec)highs & above) | ((ivec)x & ~(below | above)));
}

inline vec exponential(vec x) { // 2^whole 2^rest; the latter is a polynomial within 1e-7, exact at 0
  const float shift = 0x1.8p23f + 127; // so large that a sum's lowest bits are an integer, here 127 more than `whole`
  x = within(-127, x * 1.44269504f, 128);
  const vec whole = x + shift, r = x - (whole - shift);
  const vec y = (((1.32647273e-3f * r + 9.6715128e-3f) * r + 5.55073374e-2f) * r + 2.40222421e-1f) * r + 6.93146978e-1f;
  return (y * r + 1) * (vec)((ivec)whole << 23);
}

inline vec logistic(vec x) { return 1 / (1 + exponential(-x)); }

inline vec error_function(vec x) { // erf(x) / x as P(x^2) / Q(x^2): within 3e-7
  x = within(-4, x, 4);
  const vec s = x * x;
  const vec p = (((1.97483075e-6f * s + 2.8804043e-4f) * s + 4.0036168e-3f) * s + 5.34673904e-2f) * s + 1.96248343e-1f;
  const vec q = (((3.74808171e-5f * s + 1.21635217e-3f) * s + 1.54443651e-2f) * s + 1.1647616e-1f) * s + 5.07251725e-1f;
  return within(-1, x * (p * s + 1.12837898f) / (q * s + 1), 1);
}

struct Elements {
  const float *from;
  float *to;
  int64_t size;
};

template <vec function(vec)>
void each(const void *job, int part) {
  const Elements &p = *(const Elements *)job;
  int64_t i = (int64_t)part * STEP, end = min(i + STEP, p.size);
  for (; i + LANES <= end; i += LANES)
    *(vec *)(p.to + i) = function(*(const vec *)(p.from + i));
  vec last = {};
  std::memcpy(&last, p.from + i, 4 * (end - i));
  last = function(last);
  std::memcpy(p.to + i, &last, 4 * (end - i));
}

// --------------------------------------------------------------------------------------------- quantized products

// out (rows, n) = x (rows, k) w', where a group of w's integers q stands for scale * q + bias. Few rows: a group of x
// becomes integers of 16 bits with a scale, the products of integers are summed exactly, and each row of w is read from
// memory once. Many rows: pieces of w become float32, and the BLAS library multiplies.

enum { FEW = 32, BLOCK = 32, GROUPS = 64, WIDE = 192, DEEP = 1024 };
#if defined(__AVX512VL__) || defined(__aarch64__)
enum { ROWS = 4 }; // of x at a time, as there are 32 registers
#else
enum { ROWS = 2 };
#endif
typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef short words __attribute__((vector_size(32), aligned(2), may_alias));
typedef short shorts __attribute__((vector_size(16), aligned(2), may_alias));
typedef unsigned char bytes __attribute__((vector_size(16), aligned(1), may_alias));

struct Product {
  const uint8_t *w;
  const float *scales, *biases;
  float *out;
  int rows, n, k, group, step;
  const float *x;                // many rows: as it is
  const short *integers;         // few rows: x = integers * x_scales, in the order of unpack()
  const float *x_scales, *x_sums; // of each group
};

// The next 32 integers of w. With 4 bits `a` holds those at even places, `b` the others.
template <int bits>
inline void unpack(const uint8_t *w, words &a, words &b) {
  if constexpr (bits == 8) {
    a = __builtin_convertvector(*(const bytes *)w, words);
    b = __builtin_convertvector(*(const bytes *)(w + 16), words);
  } else {
    const words pairs = __builtin_convertvector(*(const bytes *)w, words);
    a = pairs & 15, b = pairs >> 4;
  }
}

// sum + a b, where each of the eight sums takes two products; which ones does not matter
inline ints dot(ints sum, words a, words b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (ints)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  union { words all; int16x8_t part[2]; } x = {a}, y = {b};
  union { ints all; int32x4_t part[2]; } s = {sum};
  for (int i = 0; i < 2; i++)
    s.part[i] = vmlal_high_s16(vmlal_s16(s.part[i], vget_low_s16(x.part[i]), vget_low_s16(y.part[i])), x.part[i], y.part[i]);
  return s.all;
#else
  for (int i = 0; i < 16; i++)
    sum[i / 2] += a[i] * b[i];
  return sum;
#endif
}

inline float total(floats v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// R rows of x by n <= 4 rows of w
template <int bits, int R>
void tile(const Product &p, int row, int column, int n) {
  const int groups = p.k / p.group, group_bytes = p.group * bits / 8;
  const int64_t row_bytes = (int64_t)p.k * bits / 8;
  const uint8_t *w[4];
  const float *scales[4], *biases[4];
  for (int j = 0; j < 4; j++) {
    const int64_t line = column + (j < n ? j : 0);
    w[j] = p.w + line * row_bytes, scales[j] = p.scales + line * groups, biases[j] = p.biases + line * groups;
  }
  const short *x = p.integers + (int64_t)row * p.k;
  const float *x_scales = p.x_scales + (int64_t)row * groups, *x_sums = p.x_sums + (int64_t)row * groups;
  floats sums[R][4] = {};
  for (int start = 0; start < groups; start += GROUPS) {
    const int size = min(int(GROUPS), groups - start);
    float factors[R][4][GROUPS];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 4; j++) {
        const float *s = scales[j] + start, *b = biases[j] + start, *c = x_scales + (int64_t)r * groups + start,
                    *d = x_sums + (int64_t)r * groups + start;
        int g = 0;
        for (; g + 8 <= size; g += 8) {
          *(floats *)(factors[r][j] + g) = *(const floats *)(s + g) * *(const floats *)(c + g);
          sums[r][j] += *(const floats *)(b + g) * *(const floats *)(d + g);
        }
        for (; g < size; g++)
          factors[r][j][g] = s[g] * c[g], sums[r][j][0] += b[g] * d[g];
      }
    for (int g = 0; g < size; g++) {
      const int64_t at = (int64_t)(start + g) * group_bytes;
      for (int j = 0; j < 4; j++) {
        for (int i = 0; i < group_bytes; i += 64)
          __builtin_prefetch(w[j] + 4 * row_bytes + at + i);
        ints dots[R] = {};
        for (int block = 0; block < p.group / BLOCK; block++) {
          words a, b;
          unpack<bits>(w[j] + at + block * (BLOCK * bits / 8), a, b);
          for (int r = 0; r < R; r++) {
            const short *y = x + (int64_t)r * p.k + (start + g) * p.group + block * BLOCK;
            dots[r] = dot(dot(dots[r], a, *(const words *)y), b, *(const words *)(y + 16));
          }
        }
        for (int r = 0; r < R; r++)
          sums[r][j] += __builtin_convertvector(dots[r], floats) * factors[r][j][g];
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < n; j++)
      p.out[(int64_t)(row + r) * p.n + column + j] = total(sums[r][j]);
}

template <int bits>
void few_rows(const void *job, int part) {
  const Product &p = *(const Product *)job;
  for (int j = part * p.step, end = min(j + p.step, p.n); j < end; j += 4)
    for (int i = 0; i < p.rows; i += ROWS) {
      const int n = min(4, end - j);
      switch (min(int(ROWS), p.rows - i)) {
      case 1: tile<bits, 1>(p, i, j, n); break;
      case 2: tile<bits, min(2, int(ROWS))>(p, i, j, n); break;
      case 3: tile<bits, min(3, int(ROWS))>(p, i, j, n); break;
      default: tile<bits, ROWS>(p, i, j, n);
      }
    }
}

template <int bits>
void many_rows(const void *job, int part) {
  static thread_local std::vector<float> piece(WIDE * DEEP);
  const Product &p = *(const Product *)job;
  const int column = part * p.step, n = min(p.step, p.n - column), groups = p.k / p.group;
  for (int start = 0; start < p.k; start += DEEP) {
    const int depth = min(int(DEEP), p.k - start);
    for (int j = 0; j < n; j++) {
      const int64_t line = column + j;
      for (int i = 0; i < depth; i += BLOCK) {
        words a, b;
        unpack<bits>(p.w + (line * p.k + start + i) * bits / 8, a, b);
        const int64_t g = line * groups + (start + i) / p.group;
        float *to = piece.data() + j * depth + i;
        for (int l = 0; l < 16; l++) {
          to[bits == 4 ? 2 * l : l] = a[l] * p.scales[g] + p.biases[g];
          to[bits == 4 ? 2 * l + 1 : l + 16] = b[l] * p.scales[g] + p.biases[g];
        }
      }
    }
    sgemm(ROW_MAJOR, PLAIN, TURNED, p.rows, n, depth, 1, p.x + start, p.k, piece.data(), depth, start ? 1 : 0,
          p.out + column, p.n);
  }
}

// x as integers of 16 bits. A number that is not finite makes its group's scale NaN, and thus the row of the product.
template <int bits>
void to_integers(const float *x, const Product &p, short *integers, float *scales, float *sums) {
  for (int g = 0; g < p.k / p.group; g++, x += p.group, integers += p.group) {
    floats most = {}, nan = {};
    for (int i = 0; i < p.group; i += 8) {
      const floats v = *(const floats *)(x + i), size = (floats)((ints)v & 0x7fffffff);
      most = size > most ? size : most, nan += v * 0;
    }
    float largest = 0;
    for (int i = 0; i < 8; i++)
      largest = most[i] > largest ? most[i] : largest;
    const float factor = largest > 1e-30f ? 32767 / largest : 0;
    ints sum = {};
    for (int i = 0; i < p.group; i += 8) {
      const float shift = 0x1.8p23f; // rounds to an integer, which stands in the lowest bits
      const ints v = (ints)(*(const floats *)(x + i) * factor + shift) - 0x4b400000;
      sum += v, *(shorts *)(integers + i) = __builtin_convertvector(v, shorts);
    }
    for (int i = 0; bits == 4 && i < p.group; i += BLOCK) { // even places first, then odd ones
      const ints low = *(const ints *)(integers + i), high = *(const ints *)(integers + i + 16); // pairs
      *(shorts *)(integers + i) = __builtin_convertvector(low << 16 >> 16, shorts);
      *(shorts *)(integers + i + 8) = __builtin_convertvector(high << 16 >> 16, shorts);
      *(shorts *)(integers + i + 16) = __builtin_convertvector(low >> 16, shorts);
      *(shorts *)(integers + i + 24) = __builtin_convertvector(high >> 16, shorts);
    }
    int all = 0;
    for (int i = 0; i < 8; i++)
      all += sum[i];
    scales[g] = (factor ? largest / 32767 : 0) + total(nan), sums[g] = all * scales[g];
  }
}

template <int bits>
void multiply(Product p, std::vector<int64_t> starts) {
  const bool few = p.rows <= FEW || !sgemm;
  const int groups = p.k / p.group;
  static thread_local std::vector<short> integers;
  static thread_local std::vector<float> scales;
  if (few) {
    integers.resize(std::max(integers.size(), (size_t)p.rows * p.k));
    scales.resize(std::max(scales.size(), (size_t)p.rows * groups * 2));
    float *sums = scales.data() + (int64_t)p.rows * groups;
    for (int64_t i = 0; i < p.rows; i++)
      to_integers<bits>(p.x + starts[i], p, integers.data() + i * p.k, scales.data() + i * groups, sums + i * groups);
    p.integers = integers.data(), p.x_scales = scales.data(), p.x_sums = sums;
    const double parts = min((double)p.n * p.k / (1 << 15), 4. * threads); // each worth handing out
    p.step = ((p.n - 1) / std::max(1, (int)parts) + 4) / 4 * 4;
  } else {
    p.step = std::max(16, min(int(WIDE), ((p.n - 1) / threads + 16) / 16 * 16));
  }
  run(few ? few_rows<bits> : many_rows<bits>, &p, (p.n + p.step - 1) / p.step);
}

// ----------------------------------------------------------------------------------------------------- in MLX's place

using Inputs = std::vector<mx::array>;
using Eval = void (*)(mx::UnaryPrimitive *, const Inputs &, mx::array &);
Eval own_exp, own_sigmoid, own_erf, own_product;

template <vec function(vec), Eval &own>
void eval_elements(mx::UnaryPrimitive *self, const Inputs &inputs, mx::array &out) {
  const mx::array &x = inputs[0];
  if (x.dtype() != mx::float32 || !x.flags().contiguous || x.data_size() < LARGE)
    return own(self, inputs, out);
  mx::set_unary_output_data(x, out);
  const Elements job = {x.data<float>(), out.data<float>(), (int64_t)x.data_size()};
  mx::cpu::get_command_encoder(self->stream()).dispatch([job] {
    run(each<function>, &job, (job.size + STEP - 1) / STEP);
  });
}

void eval_product(mx::UnaryPrimitive *self, const Inputs &inputs, mx::array &out) {
  const auto [group, bits, mode, turned] = ((mx::QuantizedMatmul *)self)->state();
  const mx::array &x = inputs[0], &w = inputs[1];
  bool ours = mode == mx::QuantizationMode::Affine && (bits == 8 || bits == 4) && turned && w.ndim() == 2 &&
              group % BLOCK == 0 && x.dtype() == mx::float32 && x.size() > 0 && out.size() > 0 &&
              x.strides().back() == 1;
  for (size_t i = 1; i < inputs.size(); i++)
    ours = ours && inputs[i].flags().row_contiguous && (i == 1 || inputs[i].dtype() == mx::float32);
  const int k = x.ndim() ? x.shape(-1) : 0, rows = k ? x.size() / k : 0;
  if (!ours || (rows > FEW && sgemm && !x.flags().row_contiguous))
    return own_product(self, inputs, out);
  out.set_data(mx::allocator::malloc(out.nbytes()));
  Product job = {w.data<uint8_t>(), inputs[2].data<float>(), inputs[3].data<float>(), out.data<float>(), rows,
                 w.shape(0), k, group, 0, x.data<float>(), nullptr, nullptr, nullptr};
  std::vector<int64_t> starts;
  for (int i = 0; i < rows && rows <= FEW; i++)
    starts.push_back(mx::elem_to_loc(i * k, x));
  for (int64_t i = starts.size(); i < rows; i++)
    starts.push_back(i * k);
  mx::cpu::get_command_encoder(self->stream()).dispatch([job, starts = std::move(starts), bits = bits] {
    bits == 8 ? multiply<8>(job, starts) : multiply<4>(job, starts);
  });
}

// Write `ours` into the table of the class of y's operation, and what was there into `own`.
bool replace(const mx::array &y, Eval ours, Eval &own) {
  void (mx::UnaryPrimitive::*member)(const Inputs &, mx::array &) = &mx::UnaryPrimitive::eval_cpu;
  size_t offset, page = sysconf(_SC_PAGESIZE);
  std::memcpy(&offset, &member, sizeof offset); // of GCC and Clang: the place in the table, on x86 one more
  char *slot = *(char **)&y.primitive() + (offset & ~(size_t)1);
  void *start = (void *)((size_t)slot & ~(page - 1));
  if (mprotect(start, page, PROT_READ | PROT_WRITE))
    return false;
  if (*(Eval *)slot != ours)
    own = *(Eval *)slot;
  __atomic_store_n((Eval *)slot, ours, __ATOMIC_RELEASE);
  return !mprotect(start, page, PROT_READ);
}

} // namespace

extern "C" __attribute__((visibility("default"))) int mlx_cpu_install(void *pool, void *blas, int n_threads) {
  run = (void (*)(Part, const void *, int))pool, sgemm = (Sgemm)blas, threads = n_threads;
  const mx::Device cpu = mx::Device::cpu;
  const mx::array x = mx::zeros({1, 32}, cpu), w = mx::zeros({1, 8}, mx::uint32, cpu), s = mx::zeros({1, 1}, cpu);
  return replace(mx::exp(x, cpu), eval_elements<exponential, own_exp>, own_exp) &&
         replace(mx::sigmoid(x, cpu), eval_elements<logistic, own_sigmoid>, own_sigmoid) &&
         replace(mx::erf(x, cpu), eval_elements<error_function, own_erf>, own_erf) &&
         replace(mx::quantized_matmul(x, w, s, s, true, 32, 8, "affine", cpu), eval_product, own_product);
}
