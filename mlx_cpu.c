// cblas_sgemm, which MLX calls on a CPU: C = alpha op(A) op(B) + beta C, float32. Products with few rows, which do little
// more than read the other matrix, are done here, on all cores; the rest by the library that `rest` points to.
#include <omp.h>
#include <stddef.h>

#ifndef SLICES
#define SLICES 2
#endif
enum { COL_MAJOR = 102, NO_TRANS = 111, FEW = 32, ROWS = 4, SMALL = 1 << 16 };
#ifdef __AVX512F__
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
#define LOAD(p) (*(const volatile vec *)(p)) // volatile: GCC 12 reads memory again for each use otherwise

void (*rest)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

// c[i * down + j * right] for i < m rows of a and j < n <= 4 rows of b, each row k long. m is known when it is compiled.
static inline __attribute__((always_inline)) void tile(
    const int m, int n, int k, float alpha, const float *a, ptrdiff_t lda, const float *b, ptrdiff_t ldb, float beta,
    float *c, ptrdiff_t down, ptrdiff_t right) {
  const float *b1 = b + (n > 1 ? ldb : 0), *b2 = b + (n > 2 ? 2 * ldb : 0), *b3 = b + (n > 3 ? 3 * ldb : 0);
  vec sums[ROWS][4] = {};
  int l = 0;
  for (; l + LANES <= k; l += LANES) {
    const vec y0 = LOAD(b + l), y1 = LOAD(b1 + l), y2 = LOAD(b2 + l), y3 = LOAD(b3 + l);
    for (int j = 4; j < 8; j++) // the next four rows, which the CPU does not foresee
      __builtin_prefetch(b + j * ldb + l);
    for (int i = 0; i < m; i++) {
      const vec x = LOAD(a + i * lda + l);
      sums[i][0] += x * y0, sums[i][1] += x * y1, sums[i][2] += x * y2, sums[i][3] += x * y3;
    }
  }
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      float sum = 0, *p = c + i * down + j * right;
      for (int lane = 0; lane < LANES; lane++)
        sum += sums[i][j][lane];
      for (int t = l; t < k; t++)
        sum += a[i * lda + t] * b[j * ldb + t];
      *p = alpha * sum + (beta ? beta * *p : 0); // beta 0: what C holds, NaN even, counts for nothing
    }
}

// c (m, n) = alpha a b' + beta c for m <= FEW rows of a: b's four rows are read from memory once, a's again and again.
static void few(int m, int n, int k, float alpha, const float *a, ptrdiff_t lda, const float *b, ptrdiff_t ldb,
                float beta, float *c, ptrdiff_t down, ptrdiff_t right) {
#define TILE(m) tile(m, n - j < 4 ? n - j : 4, k, alpha, a + i * lda, lda, b + j * ldb, ldb, beta, \
                     c + i * down + j * right, down, right)
#pragma omp parallel for schedule(static) if ((double)n * k > SMALL)
  for (int j = 0; j < n; j += 4)
    for (int i = 0; i < m; i += ROWS)
      switch (m - i) {
      case 1: TILE(1); break;
      case 2: TILE(2); break;
      case 3: TILE(3); break;
      default: TILE(4);
      }
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  if (order == COL_MAJOR) // the same memory by rows: C' = B' A'
    return cblas_sgemm(101, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  const int a_rows = ta == NO_TRANS || (m == 1 && lda == 1), b_rows = tb != NO_TRANS || (n == 1 && ldb == 1);
  if (a_rows && b_rows && alpha != 0 && m <= FEW && m <= n)
    return few(m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, 1);
  if (a_rows && b_rows && alpha != 0 && n <= FEW)
    return few(n, m, k, alpha, b, ldb, a, lda, beta, c, 1, ldc);
  const int side = m > n ? m : n, slices = (double)m * n * k < 1e6 ? 1 : SLICES * omp_get_max_threads();
  const int step = (side / slices + 64) / 64 * 64; // slices of the longer side, in whole tiles
#pragma omp parallel for schedule(dynamic, 1) if (slices > 1)
  for (int i = 0; i < side; i += step) {
    const int size = side - i < step ? side - i : step;
    if (side == n)
      rest(order, ta, tb, m, size, k, alpha, a, lda, b + (tb == NO_TRANS ? i : (ptrdiff_t)i * ldb), ldb, beta, c + i, ldc);
    else
      rest(order, ta, tb, size, n, k, alpha, a + (ta == NO_TRANS ? (ptrdiff_t)i * lda : i), lda, b, ldb, beta,
           c + (ptrdiff_t)i * ldc, ldc);
  }
}
