// What MLX computes slowly on a CPU, on all cores and with the CPU's wide instructions: exp, sigmoid, erf, softmax,
// quantizing, products with quantized matrices, and dequantizing, normalization, RoPE and attention as one operation each.
// MLX evaluates an operation by a virtual function of its class, eval_cpu. mlx_cpu_install writes ours into the tables of
// the first six classes; for the last four functions, and for products with scales of 16 bits, it makes mlx.core call ours.
// Graphs, gradients, mx.compile and mx.vmap thus stay MLX's own, and ours hands back to MLX what it does not do itself.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <limits>
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
#include "mlx/fast.h"
#include "mlx/fast_primitives.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace {

namespace mx = mlx::core;
using std::min;

enum { ROW_MAJOR = 101, PLAIN = 111, TURNED = 112 };
using Part = void (*)(const void *, int);
using Sgemm = void (*)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
void (*run)(Part, const void *, int); // mlx_cpu.c: Part(job, i) for all i < parts, on several threads
Sgemm sgemm;                          // a BLAS library's, on one thread
using Rows = void (*)(const void *, int, int, int, int, float *);
int (*many_rows)(int, int, int, const float *, Rows, const void *, float *); // mlx_cpu.c
int threads;

using Inputs = std::vector<mx::array>;
using Eval = void (*)(mx::UnaryPrimitive *, const Inputs &, mx::array &);
using EvalMany = void (*)(mx::Primitive *, const Inputs &, Inputs &);
Eval own_exp, own_sigmoid, own_erf, own_softmax, own_product;
EvalMany own_quantize;

// ------------------------------------------------------------------------------------- functions of each number

enum { LARGE = 1 << 10, STEP = 1 << 13 };
#if defined(__AVX512BW__)
enum { W = 16 }; // numbers of 32 bits in a register
#elif defined(__AVX2__)
enum { W = 8 };
#else
enum { W = 4 };
#endif
typedef float floats __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline floats within(float low, floats x, float high) { // NaN stays
  const ints below = x < low, above = x > high;
  const floats lows = low - floats{}, highs = high - floats{};
  return (floats)(((ints)lows & below) | ((ints)highs & above) | ((ints)x & ~(below | above)));
}

inline ints nearest(floats x) { // of a sum with a number so large, the lowest bits are the nearest integer
  return (ints)(x + 0x1.8p23f) - 0x4b400000;
}

inline float largest(floats x) {
  float most = x[0];
  for (int i = 1; i < W; i++)
    most = x[i] > most ? x[i] : most;
  return most;
}

inline floats exponential(floats x) { // 2^whole 2^rest; the latter is a polynomial within 1e-7, exact at 0
  const float shift = 0x1.8p23f + 127; // so large that a sum's lowest bits are an integer, here 127 more than `whole`
  x = within(-127, x * 1.44269504f, 128);
  const floats whole = x + shift, r = x - (whole - shift);
  const floats y = (((1.32647273e-3f * r + 9.6715128e-3f) * r + 5.55073374e-2f) * r + 2.40222421e-1f) * r + 6.93146978e-1f;
  return (y * r + 1) * (floats)((ints)whole << 23);
}

inline floats logistic(floats x) { return 1 / (1 + exponential(-x)); }

inline floats error_function(floats x) { // erf(x) / x as P(x^2) / Q(x^2): within 4e-7
  x = within(-4, x, 4);
  const floats s = x * x;
  const floats p = (((1.97483075e-6f * s + 2.8804043e-4f) * s + 4.0036168e-3f) * s + 5.34673904e-2f) * s + 1.96248343e-1f;
  const floats q = (((3.74808171e-5f * s + 1.21635217e-3f) * s + 1.54443651e-2f) * s + 1.1647616e-1f) * s + 5.07251725e-1f;
  return within(-1, x * (p * s + 1.12837898f) / (q * s + 1), 1);
}

struct Elements {
  const float *from;
  float *to;
  int64_t size;
};

template <floats function(floats)>
void each(const void *job, int part) {
  const Elements &p = *(const Elements *)job;
  int64_t i = (int64_t)part * STEP, end = min(i + STEP, p.size);
  for (; i + W <= end; i += W)
    *(floats *)(p.to + i) = function(*(const floats *)(p.from + i));
  floats last = {};
  std::memcpy(&last, p.from + i, 4 * (end - i));
  last = function(last);
  std::memcpy(p.to + i, &last, 4 * (end - i));
}

// --------------------------------------------------------------------------------------------- quantized products

// out (rows, n) = x (rows, k) w', where a group of w's integers q stands for scale * q + bias. Few rows: a group of x
// becomes integers of 16 bits with a scale, the products of integers are summed exactly, and each row of w is read from
// memory once, one after the other. Many rows: pieces of w become float32, for the products of mlx_cpu.c.

enum { FEW = 32, GROUPS = 16, BLOCK = 8 };
typedef short words __attribute__((vector_size(4 * W), aligned(2), may_alias));
typedef short shorts __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef unsigned short halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef unsigned char bytes __attribute__((vector_size(2 * W), aligned(1), may_alias));
enum { ROWS = W == 8 ? 4 : 8, SPAN = 4 * W }; // rows of x at a time: AVX2 has 16 registers; weights of 4 bits at a time

struct Product {
  const uint8_t *w;
  const void *scales, *biases;
  void *out;
  int rows, n, k, group, step;
  mx::Dtype::Val kind, scale_kind; // of x and out; of scales and biases
  const float *x;                 // many rows: as it is
  const short *integers;          // few rows: x = integers * x_scales; with 4 bits see to_integers()
  const float *x_scales, *x_sums; // of each group
};

// Numbers i to i + W of an array of float32, float16 or bfloat16; those from `end` on are 0.
inline floats load(const void *from, mx::Dtype::Val kind, int64_t i, int64_t end) {
  union { floats all; float each[W]; } to = {};
  if (kind == mx::Dtype::Val::float32) {
    if (i + W <= end)
      return *(const floats *)((const float *)from + i);
    std::memcpy(to.each, (const float *)from + i, 4 * (end - i));
    return to.all;
  }
  union { halves all; uint16_t each[W]; } h = {};
  if (i + W <= end)
    h.all = *(const halves *)((const uint16_t *)from + i);
  else
    std::memcpy(h.each, (const uint16_t *)from + i, 2 * (end - i));
  if (kind == mx::Dtype::Val::bfloat16)
    return (floats)(__builtin_convertvector(h.all, ints) << 16);
#if defined(__AVX512BW__)
  return (floats)_mm512_cvtph_ps((__m256i)h.all);
#elif defined(__AVX2__) && defined(__F16C__)
  return (floats)_mm256_cvtph_ps((__m128i)h.all);
#else
  for (int l = 0; l < W; l++) {
    mx::float16_t half;
    std::memcpy(&half, h.each + l, 2);
    to.each[l] = half;
  }
  return to.all;
#endif
}

inline float number(const void *from, mx::Dtype::Val kind, int64_t i) { return load(from, kind, i, i + 1)[0]; }

inline void store(void *to, mx::Dtype::Val kind, int64_t i, float value) {
  if (kind == mx::Dtype::Val::float32)
    ((float *)to)[i] = value;
  else if (kind == mx::Dtype::Val::float16)
    ((mx::float16_t *)to)[i] = value;
  else
    ((mx::bfloat16_t *)to)[i] = value;
}

// The next 2 W bytes of w as words
inline words widen(const uint8_t *w) {
#if defined(__AVX512BW__)
  return (words)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)w));
#elif defined(__AVX2__)
  return (words)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)w));
#else
  return __builtin_convertvector(*(const bytes *)w, words);
#endif
}

// sum + a b, where each sum takes two products; which ones does not matter
inline ints dot(ints sum, words a, words b) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (ints)vmlal_high_s16(vmlal_s16((int32x4_t)sum, vget_low_s16(x), vget_low_s16(y)), x, y);
#else
  for (int i = 0; i < 2 * W; i++)
    sum[i / 2] += a[i] * b[i];
  return sum;
#endif
}

inline float total(floats v) {
  typedef float quad __attribute__((vector_size(16)));
  union { floats all; quad part[W / 4]; } u = {v};
  for (int i = 1; i < W / 4; i++)
    u.part[0] += u.part[i];
  return (u.part[0][0] + u.part[0][1]) + (u.part[0][2] + u.part[0][3]);
}

// Add to `totals` the products of R rows of x, from `row` on, and C rows of w, every `apart`th from row j on, for the groups
// from `start` on.
template <int bits, int group, int R, int C>
inline void lines(const Product &p, int row, int64_t j, int64_t apart, int start, floats (*totals)[R]) {
  constexpr int PAIR = SPAN > group && bits == 4 ? 2 : 1; // groups that share a register
  constexpr int STEP = bits == 4 ? SPAN : SPAN / 2;       // weights that fill one
  const int groups = p.k / group, size = min(int(GROUPS), groups - start);
  const uint8_t *w = p.w + (j * p.k + start * group) * bits / 8;
  const int64_t next = apart * p.k * bits / 8;
  const short *x = p.integers + (int64_t)row * p.k + start * group;
  if (R > 1 && row == 0 && groups > GROUPS) { // pieces of long rows: the CPU does not foresee which comes next
    const uint8_t *ahead = start + GROUPS < groups ? w + GROUPS * group * bits / 8 : p.w + (j + BLOCK) * p.k * bits / 8;
    for (int i = 0; i < GROUPS * group * bits / 8; i += 64)
      __builtin_prefetch(ahead + i);
  }
  floats sums[C][R];
  float factors[C][R][GROUPS];
#pragma GCC unroll 2
  for (int c = 0; c < C; c++) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      sums[c][r] = totals[c][r];
    for (int g = 0; g < size; g += W) {
      const int64_t at = (j + c * apart) * groups + start + g, end = (j + c * apart + 1) * groups;
      const floats s = load(p.scales, p.scale_kind, at, end), b = load(p.biases, p.scale_kind, at, end);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const int64_t of_x = (int64_t)(row + r) * (groups + W) + start + g; // see multiply()
        *(floats *)(factors[c][r] + g) = s * *(const floats *)(p.x_scales + of_x);
        sums[c][r] += b * *(const floats *)(p.x_sums + of_x);
      }
    }
  }
  for (int g = 0; g < size; g += PAIR) {
    ints dots[C][R] = {};
#pragma GCC unroll 16
    for (int i = 0; i < group * PAIR; i += STEP, w += 2 * W, x += STEP) {
      words low[C], high[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; c++) {
        const words all = widen(w + c * next);
        low[c] = bits == 4 ? all & 15 : all, high[c] = all >> 4;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const words y = *(const words *)(x + (int64_t)r * p.k);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++)
          dots[c][r] = dot(dots[c][r], low[c], y);
        if constexpr (bits == 4) {
          const words z = *(const words *)(x + (int64_t)r * p.k + STEP / 2);
#pragma GCC unroll 2
          for (int c = 0; c < C; c++)
            dots[c][r] = dot(dots[c][r], high[c], z);
        }
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < C; c++) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        floats factor = factors[c][r][g] - floats{};
#ifdef __AVX512BW__
        if constexpr (PAIR == 2)
          factor = (floats)_mm512_mask_blend_ps(0xff00, (__m512)factor, (__m512)(factors[c][r][g + 1] - floats{}));
#endif
        sums[c][r] += __builtin_convertvector(dots[c][r], floats) * factor;
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < C; c++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      totals[c][r] = sums[c][r];
}

// R rows of x by n rows of w, every `apart`th: all n for some groups of x at a time, which stay in the innermost cache
template <int bits, int group, int R, int C = 1>
void block(const Product &p, int row, int column, int apart, int n) {
  floats totals[BLOCK][R] = {};
  for (int start = 0; start < p.k / group; start += GROUPS)
    for (int j = 0; j < n; j += C)
      lines<bits, group, R, C>(p, row, column + j * apart, apart, start, totals + j);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < n; j++)
      store(p.out, p.kind, (int64_t)(row + r) * p.n + column + j * apart, total(totals[j][r]));
}

template <int bits, int group>
void few_rows(const void *job, int part) {
  const Product &p = *(const Product *)job;
  const int first = part * p.step, end = min(first + p.step, p.n), half = (end - first) / 2;
  for (int j = first; p.rows == 1 && j < first + half; j++) // two rows of w, which memory reads as two long streams
    block<bits, group, 1, 2>(p, 0, j, half, 2);
  for (int j = p.rows == 1 ? first + 2 * half : first; j < end; j += BLOCK)
    for (int i = 0; i < p.rows;) {
      const int n = min(int(BLOCK), end - j), left = p.rows - i;
      if (left >= ROWS)
        block<bits, group, ROWS>(p, i, j, 1, n), i += ROWS;
      else if (ROWS == 8 && left >= 4)
        block<bits, group, 4>(p, i, j, 1, n), i += 4;
      else if (left >= 2)
        block<bits, group, 2>(p, i, j, 1, n), i += 2;
      else
        block<bits, group, 1>(p, i, j, 1, n), i++;
    }
}

// Numbers `from` to `end` of row `line` of w as float32; both are borders of groups
template <int bits>
void to_floats(const Product &p, int64_t line, int from, int end, float *to) {
  const uint8_t *w = p.w + (line * p.k + from) * bits / 8;
  for (int i = from; i < end; i += p.group) {
    const int64_t g = (line * p.k + i) / p.group;
    const float scale = number(p.scales, p.scale_kind, g), bias = number(p.biases, p.scale_kind, g);
    for (int l = 0; l < p.group; l += 2 * W, w += W * bits / 4, to += 2 * W) {
      union { words all; shorts part[2]; } q;
      if constexpr (bits == 8) {
        q.all = widen(w);
      } else { // a byte is two words
        typedef unsigned char few __attribute__((vector_size(W), aligned(1), may_alias));
        const ints pairs = __builtin_convertvector(*(const few *)w, ints);
        q.all = (words)((pairs & 15) | (pairs >> 4 << 16));
      }
      *(floats *)to = __builtin_convertvector(q.part[0], floats) * scale + bias;
      *(floats *)(to + W) = __builtin_convertvector(q.part[1], floats) * scale + bias;
    }
  }
}

template <int bits>
void read_rows(const void *source, int j, int n, int l, int depth, float *to) {
  for (int i = 0; i < n; i++)
    to_floats<bits>(*(const Product *)source, j + i, l, l + depth, to + i * depth);
}

// A row of x as integers of 16 bits; with 4 bits, of each SPAN numbers those at even places first. A number that is not
// finite makes its group's scale NaN, and thus the row of the product.
void to_integers(const void *x, const Product &p, int bits, short *integers, float *scales, float *sums) {
  for (int g = 0; g < p.k / p.group; g++) {
    floats most = {}, nan = {};
    const int64_t at = (int64_t)g * p.group;
    for (int i = 0; i < p.group; i += W) {
      const floats v = load(x, p.kind, at + i, p.k), size = (floats)((ints)v & 0x7fffffff);
      most = size > most ? size : most, nan += v * 0;
    }
    const float top = largest(most), factor = top > 1e-30f ? 32767 / top : 0;
    ints sum = {};
    for (int i = 0; i < p.group; i += W) {
      const ints v = nearest(load(x, p.kind, at + i, p.k) * factor);
      sum += v, *(shorts *)(integers + at + i) = __builtin_convertvector(v, shorts);
    }
    int all = 0;
    for (int i = 0; i < W; i++)
      all += sum[i];
    scales[g] = (factor ? top / 32767 : 0) + total(nan), sums[g] = all * scales[g];
  }
  for (int i = 0; bits == 4 && i < p.k; i += SPAN) {
    const ints low = *(const ints *)(integers + i), high = *(const ints *)(integers + i + SPAN / 2); // pairs
    *(shorts *)(integers + i) = __builtin_convertvector(low << 16 >> 16, shorts);
    *(shorts *)(integers + i + W) = __builtin_convertvector(high << 16 >> 16, shorts);
    *(shorts *)(integers + i + 2 * W) = __builtin_convertvector(low >> 16, shorts);
    *(shorts *)(integers + i + 3 * W) = __builtin_convertvector(high >> 16, shorts);
  }
}

struct alignas(64) Line { char bytes[64]; }; // of a cache: a register that is read from two of them takes twice as long

template <int bits>
void multiply(Product p, std::vector<int64_t> starts) {
  static thread_local std::vector<Line> held;
  static thread_local std::vector<float> scales, wide;
  const int groups = p.k / p.group, stride = groups + W, width = p.kind == mx::Dtype::Val::float32 ? 4 : 2;
  const auto row = [&](int i) { return (const char *)p.x + starts[i] * width; };
  if (p.rows <= FEW) {
    held.resize(std::max(held.size(), (size_t)p.rows * p.k * sizeof(short) / sizeof(Line) + 1));
    short *integers = (short *)held.data();
    scales.resize(std::max(scales.size(), (size_t)p.rows * stride * 2));
    float *sums = scales.data() + (int64_t)p.rows * stride;
    for (int64_t i = 0; i < p.rows; i++) {
      float *of_row = scales.data() + i * stride;
      to_integers(row(i), p, bits, integers + i * p.k, of_row, sums + i * stride);
      std::memset(of_row + groups, 0, 4 * W), std::memset(sums + i * stride + groups, 0, 4 * W);
    }
    p.integers = integers, p.x_scales = scales.data(), p.x_sums = sums;
    const double parts = min((double)p.n * p.k / (1 << 15), 4. * threads); // each worth handing out
    p.step = ((p.n - 1) / std::max(1, (int)parts) + BLOCK) / BLOCK * BLOCK;
    const Part part = p.group == 32 ? few_rows<bits, 32> : p.group == 64 ? few_rows<bits, 64> : few_rows<bits, 128>;
    return run(part, &p, (p.n + p.step - 1) / p.step);
  }
  const Product narrow = p;
  if (width == 2) { // the BLAS library takes float32
    wide.resize(std::max(wide.size(), (size_t)p.rows * (p.k + p.n)));
    for (int64_t i = 0; i < p.rows; i++)
      for (int l = 0; l < p.k; l += W)
        *(floats *)(wide.data() + i * p.k + l) = load(row(i), p.kind, l, p.k);
    p.x = wide.data(), p.out = wide.data() + (int64_t)p.rows * p.k;
  }
  if (!many_rows(p.rows, p.n, p.k, p.x, read_rows<bits>, &p, (float *)p.out))
    throw std::bad_alloc();
  for (int64_t i = 0; width == 2 && i < (int64_t)p.rows * p.n; i++)
    store(narrow.out, p.kind, i, ((const float *)p.out)[i]);
}

// --------------------------------------------------------------------------------------------------- quantizing

struct Quantizing {
  const void *w;
  uint8_t *out;
  void *scales, *biases;
  mx::Dtype::Val kind; // of w, scales and biases
  int bits, group;
  int64_t groups;
};

// The integers, scales and biases of STEP / group groups, the very same as MLX's
void quantize(const void *job, int part) {
  const Quantizing &p = *(const Quantizing *)job;
  const float top = (1 << p.bits) - 1;
  const int64_t first = (int64_t)part * (STEP / p.group), end = min(first + STEP / p.group, p.groups);
  for (int64_t g = first; g < end; g++) {
    floats values[128 / W], low = INFINITY - floats{}, high = -low;
    for (int i = 0; i < p.group / W; i++) {
      const floats v = values[i] = load(p.w, p.kind, g * p.group + i * W, p.groups * p.group);
      low = v < low ? v : low, high = v > high ? v : high;
    }
    const float least = -largest(-low), most = largest(high);
    const bool negative = std::abs(least) > std::abs(most); // the number furthest from 0 becomes exact
    const float range = std::max((most - least) / top, 1e-7f), edge = negative ? least : most;
    float scale = negative ? range : -range, bias = 0;
    if (const float steps = std::rint(edge / scale))
      scale = edge / steps, bias = edge;
    store(p.scales, p.kind, g, scale), store(p.biases, p.kind, g, bias);
    int q[128];
    for (int i = 0; i < p.group / W; i++)
      *(ints *)(q + i * W) = nearest(within(0, (values[i] - bias) / scale, top));
    uint8_t *to = p.out + g * p.group * p.bits / 8;
    for (int i = 0; p.bits == 8 && i < p.group; i++)
      to[i] = q[i];
    for (int i = 0; p.bits == 4 && i < p.group / 2; i++)
      to[i] = q[2 * i] | q[2 * i + 1] << 4;
  }
}

// ----------------------------------------------------------------------------------- normalization, RoPE, attention

// mx.fast's functions are a dozen operations each on a CPU, of which every one costs some microseconds. The module
// mlx.core calls MLX's by a table of addresses; mlx_cpu_install writes ours there. They make one operation of it, whose
// transformations are those of MLX's own.

thread_local bool plain = false; // whether MLX's own are wanted: what is exported has to be known to others

class Fast final : public mx::Primitive {
public:
  using Function = std::function<std::vector<mx::array>(const Inputs &)>;
  using Eval = std::function<void(const mx::Stream &, const Inputs &, mx::array &)>;
  Fast(mx::Stream stream, const char *name, Function own, Eval eval, int group = 0)
      : mx::Primitive(stream), own(std::move(own)), eval(std::move(eval)), label(name), group(group) {}

  void eval_cpu(const Inputs &inputs, Inputs &outputs) override { eval(stream(), inputs, outputs[0]); }
  void eval_gpu(const Inputs &, Inputs &) override { throw std::runtime_error("not on a GPU"); }
  const char *name() const override { return label; }

  std::vector<mx::Shape> output_shapes(const Inputs &inputs) override {
    mx::Shape shape = inputs[0].shape();
    if (!std::strcmp(label, "Attention"))
      shape.back() = inputs[2].shape(-1);
    if (!std::strcmp(label, "Dequantize"))
      shape.back() = inputs[1].shape(-1) * group;
    return {shape};
  }

  Inputs jvp(const Inputs &primals, const Inputs &tangents, const std::vector<int> &of) override {
    return mx::jvp(partly(primals, of), chosen(primals, of), tangents).second;
  }

  Inputs vjp(const Inputs &primals, const Inputs &slopes, const std::vector<int> &of, const Inputs &) override {
    return mx::vjp(partly(primals, of), chosen(primals, of), slopes).second;
  }

  std::pair<Inputs, std::vector<int>> vmap(const Inputs &inputs, const std::vector<int> &axes) override {
    return {mx::vmap(own, axes)(inputs), {0}};
  }

private:
  Function partly(const Inputs &all, const std::vector<int> &of) const { // as a function of some arguments
    return [own = own, all, of](const Inputs &some) {
      Inputs inputs = all;
      for (size_t i = 0; i < of.size(); i++)
        inputs[of[i]] = some[i];
      return own(inputs);
    };
  }

  static Inputs chosen(const Inputs &all, const std::vector<int> &of) {
    Inputs some;
    for (int i : of)
      some.push_back(all[i]);
    return some;
  }

  Function own;
  Eval eval;
  const char *label;
  int group;
};

bool for_us(const mx::Stream &stream, std::initializer_list<mx::array> arrays) {
  bool all = !plain && stream.device == mx::Device::cpu;
  for (const mx::array &x : arrays)
    all = all && x.dtype() == mx::float32 && x.size() > 0;
  return all;
}

// A contiguous copy of x in float32
mx::array copied(const mx::array &x, const mx::Stream &stream) {
  mx::array copy(x.shape(), mx::float32, nullptr, {});
  copy.set_data(mx::allocator::malloc(copy.nbytes()));
  auto &encoder = mx::cpu::get_command_encoder(stream);
  encoder.dispatch([from = mx::array::unsafe_weak_copy(x), to = copy.data<float>()]() mutable {
    for (size_t i = 0; i < from.size(); i++)
      to[i] = number(from.data<void>(), from.dtype().val(), mx::elem_to_loc(i, from));
  });
  encoder.add_temporary(copy);
  return copy;
}

// x with rows in one piece that do not overlap, as a BLAS library wants them
mx::array in_rows(const mx::array &x, const mx::Stream &stream) {
  const bool apart = x.ndim() < 2 || x.shape(-2) == 1 || x.strides(-2) >= x.shape(-1);
  return x.strides().back() == 1 && apart ? x : copied(x, stream);
}

std::vector<int64_t> row_starts(const mx::array &x) {
  std::vector<int64_t> starts;
  const int64_t k = x.shape(-1), rows = x.size() / k;
  for (int64_t i = 0; i < rows; i++)
    starts.push_back(x.flags().row_contiguous ? i * k : mx::elem_to_loc(i * k, x));
  return starts;
}

// Call work(i) for all i < count; `cost` is that of one in some ten thousandths of a second.
void share(int count, double cost, const std::function<void(int)> &work) {
  struct Job {
    const std::function<void(int)> *work;
    int count, step;
  };
  const int parts = std::max(1., min(min((double)count, 4. * threads), count * cost));
  const Job job = {&work, count, (count + parts - 1) / parts};
  run(
      [](const void *job, int part) {
        const Job &p = *(const Job *)job;
        for (int i = part * p.step; i < min((part + 1) * p.step, p.count); i++)
          (*p.work)(i);
      },
      &job, (count + job.step - 1) / job.step);
}

void eval_norm(const mx::Stream &stream, const Inputs &inputs, mx::array &out, float eps) {
  const mx::array x = in_rows(inputs[0], stream);
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const float *from = x.data<float>(), *weight = inputs.size() > 1 ? inputs[1].data<float>() : nullptr;
  const int64_t along = inputs.size() > 1 ? inputs[1].strides(0) : 0;
  const int k = x.shape(-1);
  mx::cpu::get_command_encoder(stream).dispatch([=, to = out.data<float>(), starts = row_starts(x)] {
    share(starts.size(), k / 2e5, [&](int i) {
      const float *a = from + starts[i];
      float *b = to + (int64_t)i * k, squares = 0;
      floats sums = {};
      int l = 0;
      for (; l + W <= k; l += W)
        sums += *(const floats *)(a + l) * *(const floats *)(a + l);
      for (; l < k; l++)
        squares += a[l] * a[l];
      const float factor = 1 / std::sqrt((squares + total(sums)) / k + eps);
      for (l = 0; l < k; l++)
        b[l] = weight ? a[l] * factor * weight[l * along] : a[l] * factor;
    });
  });
}

void eval_dequantize(const mx::Stream &stream, const Inputs &inputs, mx::array &out, int group, int bits) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const mx::array &w = inputs[0];
  const int k = out.shape(-1), rows = out.size() / k;
  const Product job = {w.data<uint8_t>(), inputs[1].data<void>(), inputs[2].data<void>(), out.data<void>(), 0, rows, k,
                       group, 0, mx::Dtype::Val::float32, mx::Dtype::Val::float32, nullptr, nullptr, nullptr, nullptr};
  mx::cpu::get_command_encoder(stream).dispatch([=] {
    share(rows, k / 1e5, [&](int i) {
      float *to = (float *)job.out + (int64_t)i * k;
      bits == 8 ? to_floats<8>(job, i, 0, k, to) : to_floats<4>(job, i, 0, k, to);
    });
  });
}

struct Rope {
  int dims;
  bool traditional, by_base;
  float base, scale;
};

// inputs: x (B, H, T, k), the offset, (1,) or (B,), and, unless by_base, the periods / 2 pi (dims / 2,)
void eval_rope(const mx::Stream &stream, const Inputs &inputs, mx::array &out, const Rope &rope) {
  const mx::array x = in_rows(inputs[0], stream);
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const int H = x.shape(1), T = x.shape(2), k = x.shape(3), half = rope.dims / 2;
  const int64_t per_sequence = inputs[1].size() > 1 ? inputs[1].strides(0) : 0;
  const int64_t along = rope.by_base ? 0 : inputs[2].strides(0), in[] = {x.strides(0), x.strides(1), x.strides(2)};
  const float *from = x.data<float>(), *periods = rope.by_base ? nullptr : inputs[2].data<float>();
  const int *offsets = inputs[1].data<int>();
  mx::cpu::get_command_encoder(stream).dispatch([=, to = out.data<float>(), rows = x.shape(0) * T] {
    share(rows, (half * 20 + H * k) / 2e5, [&](int row) {
      static thread_local std::vector<float> turns;
      turns.resize(2 * half);
      const int b = row / T, t = row % T;
      for (int i = 0; i < half; i++) {
        const float speed = periods ? 1 / periods[i * along] : std::exp(-i * (std::log(rope.base) / half));
        const float angle = (t + offsets[b * per_sequence]) * rope.scale * speed;
        turns[i] = std::cos(angle), turns[half + i] = std::sin(angle);
      }
      for (int h = 0; h < H; h++) {
        const float *a = from + b * in[0] + h * in[1] + t * in[2];
        float *y = to + ((int64_t)(b * H + h) * T + t) * k;
        const int next = rope.traditional ? 1 : half, step = rope.traditional ? 2 : 1;
        for (int i = 0; i < half; i++) {
          const float u = a[i * step], v = a[i * step + next], c = turns[i], s = turns[half + i];
          y[i * step] = u * c - v * s, y[i * step + next] = u * s + v * c;
        }
        std::memcpy(y + rope.dims, a + rope.dims, 4 * (k - rope.dims));
      }
    });
  });
}

// x becomes e^(x - the largest of x). Returns the sum.
float soften(float *x, int n) {
  const int whole = n / W * W; // what fills registers; the rest is filled up with numbers that count for nothing
  floats rest = -INFINITY - floats{};
  std::memcpy(&rest, x + whole, 4 * (n - whole));
  floats most = rest, sums = {};
  for (int i = 0; i < whole; i += W) {
    const floats v = *(const floats *)(x + i);
    most = v > most ? v : most;
  }
  const float top = largest(most);
  for (int i = 0; i < whole; i += W) {
    const floats v = exponential(*(const floats *)(x + i) - top);
    *(floats *)(x + i) = v, sums += v;
  }
  rest = exponential(rest - top);
  std::memcpy(x + whole, &rest, 4 * (n - whole));
  return total(sums + rest);
}

void eval_softmax(mx::UnaryPrimitive *self, const Inputs &inputs, mx::array &out) {
  const mx::array &x = inputs[0];
  if (x.dtype() != mx::float32 || !x.flags().row_contiguous || x.size() == 0 || x.ndim() == 0)
    return own_softmax(self, inputs, out);
  out.set_data(mx::allocator::malloc(out.nbytes()));
  const int k = x.shape(-1), rows = x.size() / k;
  mx::cpu::get_command_encoder(self->stream()).dispatch([=, from = x.data<float>(), to = out.data<float>()] {
    share(rows, k / 5e4, [&](int i) {
      float *y = to + (int64_t)i * k;
      std::memcpy(y, from + (int64_t)i * k, 4 * (size_t)k);
      const float sum = soften(y, k);
      for (int l = 0; l < k; l++)
        y[l] /= sum;
    });
  });
}

struct Attention {
  const float *q, *k, *v, *scores; // scores: what is added to them
  const bool *mask;
  float *out, scale;
  bool causal;
  int H, n, T, S, d, e, rows;                         // `rows` of the T at a time
  int64_t qs[3], ks[3], vs[3], ms[4];                 // steps in memory

  // Rows from t on of head h of sequence b, or, where T is 1, of all the heads that share its keys
  void operator()(int b, int h, int t) const {
    static thread_local std::vector<float> held;
    const int same = H / n, M = T == 1 ? same : min(rows, T - t), seen = causal ? S - T + min(t + rows, T) : S;
    const int64_t lda = T == 1 ? qs[1] : qs[2], kv = T == 1 ? h : h / same, head = T == 1 ? h * same : h;
    held.resize(std::max(held.size(), (size_t)M * seen));
    float *x = held.data(), *y = out + ((b * (int64_t)T + t) * H + head) * e;
    const int ldc = T == 1 ? e : H * e;
    sgemm(ROW_MAJOR, PLAIN, TURNED, M, seen, d, scale, q + b * qs[0] + head * qs[1] + t * qs[2], M == 1 ? d : lda,
          k + b * ks[0] + kv * ks[1], seen == 1 ? d : ks[2], 0, x, seen);
    for (int i = 0; i < M; i++) {
      float *row = x + (int64_t)i * seen;
      const int64_t at = b * ms[0] + (head + (T == 1 ? i : 0)) * ms[1] + (t + (T == 1 ? 0 : i)) * ms[2];
      for (int j = 0; mask && j < seen; j++)
        row[j] = mask[at + j * ms[3]] ? row[j] : -std::numeric_limits<float>::max();
      for (int j = 0; scores && j < seen; j++)
        row[j] += scores[at + j * ms[3]];
      const int count = causal ? S - T + t + (T == 1 ? 0 : i) + 1 : seen;
      const float sum = soften(row, count);
      for (int j = 0; j < count; j++)
        row[j] /= sum;
      std::memset(row + count, 0, 4 * (seen - count));
    }
    sgemm(ROW_MAJOR, PLAIN, PLAIN, M, e, seen, 1, x, seen, v + b * vs[0] + kv * vs[1], seen == 1 ? e : vs[2], 0, y, ldc);
  }
};

void eval_attention(const mx::Stream &stream, const Inputs &inputs, mx::array &out, float scale, bool causal) {
  const mx::array q = in_rows(inputs[0], stream), k = in_rows(inputs[1], stream), v = in_rows(inputs[2], stream);
  const int64_t B = q.shape(0), H = q.shape(1), T = q.shape(2), e = v.shape(3);
  const mx::Strides strides = {T * H * e, e, H * e, 1}; // as the projection that follows reads it
  const auto [size, by_rows, by_columns] = mx::check_contiguity(out.shape(), strides);
  out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), strides, {true, by_rows, by_columns});
  Attention job = {q.data<float>(), k.data<float>(), v.data<float>(), nullptr, nullptr, out.data<float>(), scale, causal,
                   (int)H, k.shape(1), (int)T, k.shape(2), q.shape(3), (int)e, 0, {}, {}, {}, {}};
  if (inputs.size() > 3) {
    const mx::array &mask = inputs[3];
    (mask.dtype() == mx::bool_ ? (const void *&)job.mask : (const void *&)job.scores) = mask.data<void>();
    for (int i = 0, j = 4 - mask.ndim(); i < (int)mask.ndim(); i++, j++)
      job.ms[j] = mask.shape(i) == 1 ? 0 : mask.strides(i);
  }
  for (int i = 0; i < 3; i++)
    job.qs[i] = q.strides(i), job.ks[i] = k.strides(i), job.vs[i] = v.strides(i);
  job.rows = min(job.T, std::max(16, (1 << 16) / job.S));
  mx::cpu::get_command_encoder(stream).dispatch([job, B] {
    const int heads = job.T == 1 ? job.n : job.H, blocks = (job.T + job.rows - 1) / job.rows;
    share(B * heads * blocks, (double)job.H / heads * job.rows * job.S * (job.d + job.e) / 2e6, [&](int i) {
      job(i / blocks / heads, i / blocks % heads, i % blocks * job.rows);
    });
  });
}

// ---- as mlx.core calls them

mx::array dequantize(const mx::array &w, const mx::array &scales, const std::optional<mx::array> &biases,
                     std::optional<int> group_size, std::optional<int> bits, const std::string &mode,
                     const std::optional<mx::array> &global, std::optional<mx::Dtype> dtype, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const int group = group_size.value_or(64), b = bits.value_or(4), n = w.ndim();
  bool fits = mode == "affine" && biases && !global && dtype.value_or(mx::float32) == mx::float32 && n > 0 &&
              (b == 4 || b == 8) && (group == 32 || group == 64 || group == 128) && w.dtype() == mx::uint32 &&
              scales.shape() == biases->shape() && (int)scales.ndim() == n;
  for (int i = 0; fits && i < n; i++)
    fits = i < n - 1 ? scales.shape(i) == w.shape(i) : scales.shape(i) * group == w.shape(i) * 32 / b;
  if (!fits || !for_us(stream, {scales, *biases}))
    return mx::dequantize(w, scales, biases, group_size, bits, mode, global, dtype, s);
  const auto own = [=](const Inputs &in) {
    return Inputs{mx::dequantize(in[0], in[1], in[2], group, b, mode, {}, mx::float32, stream)};
  };
  const auto eval = [=](const mx::Stream &stream, const Inputs &in, mx::array &out) {
    eval_dequantize(stream, in, out, group, b);
  };
  mx::Shape shape = w.shape();
  shape.back() = scales.shape(-1) * group;
  Inputs inputs;
  for (const mx::array &x : {w, scales, *biases})
    inputs.push_back(mx::contiguous(x, false, stream));
  return mx::array(shape, mx::float32, std::make_shared<Fast>(stream, "Dequantize", own, eval, group), inputs);
}

// MLX would make float32 of scales in 16 bits, for every product anew.
mx::array quantized_matmul(const mx::array &x, const mx::array &w, const mx::array &scales,
                           const std::optional<mx::array> &biases, bool turned, std::optional<int> group_size,
                           std::optional<int> bits, const std::string &mode, mx::StreamOrDevice s) {
  const mx::array out = mx::quantized_matmul(x, w, scales, biases, turned, group_size, bits, mode, s);
  const mx::Dtype kind = scales.dtype();
  if (mode != "affine" || !for_us(out.primitive().stream(), {x}) || biases->dtype() != kind ||
      (kind != mx::bfloat16 && kind != mx::float16))
    return out;
  return mx::array(out.shape(), mx::float32, out.primitive_ptr(), {x, w, scales, *biases});
}

mx::array rms_norm(const mx::array &x, const std::optional<mx::array> &weight, float eps, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  const bool fits = x.ndim() > 0 && (!weight || (weight->ndim() == 1 && weight->shape(0) == x.shape(-1)));
  if (!fits || !for_us(stream, {x, weight.value_or(x)}))
    return mx::fast::rms_norm(x, weight, eps, s);
  const auto own = [=](const Inputs &in) {
    return Inputs{mx::fast::rms_norm(in[0], in.size() > 1 ? std::optional(in[1]) : std::nullopt, eps, stream)};
  };
  const auto eval = [eps](const mx::Stream &stream, const Inputs &in, mx::array &out) { eval_norm(stream, in, out, eps); };
  return mx::array(x.shape(), mx::float32, std::make_shared<Fast>(stream, "Norm", own, eval),
                   weight ? Inputs{x, *weight} : Inputs{x});
}

mx::array rope(const mx::array &x, int dims, bool traditional, std::optional<float> base, float scale,
               const mx::array &offset, const std::optional<mx::array> &freqs, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  bool fits = x.ndim() == 4 && dims > 0 && dims % 2 == 0 && dims <= x.shape(3) && offset.dtype() == mx::int32 &&
              offset.ndim() < 2 && base.has_value() != freqs.has_value();
  fits = fits && (offset.size() == 1 || offset.size() == (size_t)x.shape(0));
  fits = fits && (!freqs || (freqs->ndim() == 1 && freqs->shape(0) == dims / 2));
  if (!fits || !for_us(stream, {x, freqs.value_or(x)}))
    return mx::fast::rope(x, dims, traditional, base, scale, offset, freqs, s);
  const auto own = [=](const Inputs &in) {
    const auto periods = in.size() > 2 ? std::optional(in[2]) : std::nullopt;
    return Inputs{mx::fast::rope(in[0], dims, traditional, base, scale, in[1], periods, stream)};
  };
  const Rope how = {dims, traditional, base.has_value(), base.value_or(0), scale};
  const auto eval = [how](const mx::Stream &stream, const Inputs &in, mx::array &out) { eval_rope(stream, in, out, how); };
  return mx::array(x.shape(), mx::float32, std::make_shared<Fast>(stream, "Rope", own, eval),
                   freqs ? Inputs{x, offset, *freqs} : Inputs{x, offset});
}

mx::array attention(const mx::array &q, const mx::array &k, const mx::array &v, const float scale,
                    const std::string &mode, std::optional<mx::array> mask, const std::optional<mx::array> &sinks,
                    bool fused, mx::StreamOrDevice s) {
  const mx::Stream stream = mx::to_stream(s);
  bool fits = q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && !sinks && !fused;
  fits = fits && q.shape(0) == k.shape(0) && q.shape(0) == v.shape(0) && k.shape(1) == v.shape(1) &&
         k.shape(2) == v.shape(2) && q.shape(3) == k.shape(3) && k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0;
  fits = fits && (mask ? (mode == "" || mode == "array") && mask->ndim() <= 4 &&
                             (mask->dtype() == mx::bool_ || mask->dtype() == mx::float32)
                       : mode == "" || (mode == "causal" && k.shape(2) >= q.shape(2)));
  for (int i = 0, n = mask ? mask->ndim() : 0; fits && i < n; i++) {
    const int j = i + 4 - n, size = j == 3 ? k.shape(2) : q.shape(j);
    fits = mask->shape(i) == 1 || mask->shape(i) == size;
  }
  if (!fits || !for_us(stream, {q, k, v}))
    return mx::fast::scaled_dot_product_attention(q, k, v, scale, mode, mask, sinks, fused, s);
  const auto own = [=](const Inputs &in) {
    const auto mask = in.size() > 3 ? std::optional(in[3]) : std::nullopt;
    return Inputs{mx::fast::scaled_dot_product_attention(in[0], in[1], in[2], scale, mode, mask, {}, false, stream)};
  };
  const auto eval = [=](const mx::Stream &stream, const Inputs &in, mx::array &out) {
    eval_attention(stream, in, out, scale, mode == "causal");
  };
  return mx::array({q.shape(0), q.shape(1), q.shape(2), v.shape(3)}, mx::float32,
                   std::make_shared<Fast>(stream, "Attention", own, eval), mask ? Inputs{q, k, v, *mask} : Inputs{q, k, v});
}

// ----------------------------------------------------------------------------------------------------- in MLX's place

template <floats function(floats), Eval &own>
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
  const int k = x.ndim() ? x.shape(-1) : 0, rows = k ? x.size() / k : 0;
  bool ours = mode == mx::QuantizationMode::Affine && (bits == 8 || bits == 4) && turned && w.ndim() == 2 &&
              (group == 32 || group == 64 || group == 128) && k % SPAN == 0 && issubdtype(x.dtype(), mx::floating) &&
              x.size() > 0 && out.size() > 0 && x.strides().back() == 1;
  for (size_t i = 1; i < inputs.size(); i++)
    ours = ours && inputs[i].flags().row_contiguous;
  if (!ours || x.dtype() == mx::float64 || (rows > FEW && x.dtype() == mx::float32 && !x.flags().row_contiguous)) {
    Inputs same = inputs;
    for (size_t i = 2; i < same.size() && x.dtype() == mx::float32; i++)
      same[i] = inputs[i].itemsize() == 2 ? copied(inputs[i], self->stream()) : inputs[i];
    return own_product(self, same, out);
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  Product job = {w.data<uint8_t>(), inputs[2].data<void>(), inputs[3].data<void>(), out.data<void>(), rows, w.shape(0),
                 k, group, 0, x.dtype().val(), inputs[2].dtype().val(), x.data<float>(), nullptr, nullptr, nullptr};
  mx::cpu::get_command_encoder(self->stream()).dispatch([job, starts = row_starts(x), bits = bits] {
    bits == 8 ? multiply<8>(job, starts) : multiply<4>(job, starts);
  });
}

void eval_quantize(mx::Primitive *self, const Inputs &inputs, Inputs &outputs) {
  const auto [none, group, bits, mode, back] = ((mx::fast::Quantize *)self)->state();
  const mx::array &w = inputs[0];
  if (back || mode != mx::QuantizationMode::Affine || (bits != 4 && bits != 8) || w.size() == 0 || group > 128 ||
      !w.flags().row_contiguous || !issubdtype(w.dtype(), mx::floating) || w.dtype() == mx::float64)
    return own_quantize(self, inputs, outputs);
  for (mx::array &out : outputs)
    out.set_data(mx::allocator::malloc(out.nbytes()));
  const Quantizing job = {w.data<void>(), outputs[0].data<uint8_t>(), outputs[1].data<void>(), outputs[2].data<void>(),
                          w.dtype().val(), bits, group, (int64_t)w.size() / group};
  mx::cpu::get_command_encoder(self->stream()).dispatch([job] {
    const int groups = STEP / job.group; // of a part
    run(quantize, &job, (job.groups + groups - 1) / groups);
  });
}

// Write `ours` into the table of the class of y's operation, and what was there into `own`.
template <typename Class, typename In, typename Out>
bool replace(const mx::array &y, void (*ours)(Class *, In, Out), void (*&own)(Class *, In, Out)) {
  using Eval = void (*)(Class *, In, Out);
  void (Class::*member)(In, Out) = &Class::eval_cpu;
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

// Make mlx.core call `ours` for `own`, which it knows by the name that C++ gives to a function and its arguments.
// Of a function that Python calls without a detour, the address is held by the Python function itself, among its bytes.
using Redirect = int (*)(const char *library, const char *name, void *function);
template <typename R, typename... A>
void instead(Redirect redirect, R (*own)(A...), R (*ours)(A...), void **python = nullptr, size_t bytes = 0) {
  Dl_info known;
  if (dladdr((void *)own, &known) && known.dli_sname)
    redirect("/core.", known.dli_sname, (void *)ours);
  for (size_t i = 0; i < bytes / sizeof *python; i++)
    if (python[i] == (void *)own)
      python[i] = (void *)ours;
}

} // namespace

extern "C" __attribute__((visibility("default"))) void mlx_cpu_plain(int on) { plain = on; }

extern "C" __attribute__((visibility("default"))) int mlx_cpu_install(void *pool, void *many, void *blas, int n_threads,
                                                                      Redirect redirect, void **norm, void **dequantizing,
                                                                      void **multiplying, size_t bytes) {
  run = (decltype(run))pool, many_rows = (decltype(many_rows))many, sgemm = (Sgemm)blas, threads = n_threads;
  const mx::Device cpu = mx::Device::cpu;
  const mx::array x = mx::zeros({1, 32}, cpu), w = mx::zeros({1, 8}, mx::uint32, cpu), s = mx::zeros({1, 1}, cpu);
  instead(redirect, mx::fast::rms_norm, rms_norm, norm, bytes);
  instead(redirect, mx::dequantize, dequantize, dequantizing, bytes);
  instead(redirect, mx::quantized_matmul, quantized_matmul, multiplying, bytes);
  instead(redirect, mx::fast::rope, rope);
  instead(redirect, mx::fast::scaled_dot_product_attention, attention);
  return replace(mx::exp(x, cpu), eval_elements<exponential, own_exp>, own_exp) &&
         replace(mx::sigmoid(x, cpu), eval_elements<logistic, own_sigmoid>, own_sigmoid) &&
         replace(mx::erf(x, cpu), eval_elements<error_function, own_erf>, own_erf) &&
         replace(mx::softmax(x, std::vector<int>{-1}, true, cpu), eval_softmax, own_softmax) &&
         replace(mx::quantize(x, 32, 8, "affine", {}, cpu)[0], eval_quantize, own_quantize) &&
         replace(mx::quantized_matmul(x, w, s, s, true, 32, 8, "affine", cpu), eval_product, own_product);
}
