// cblas_sgemm, which MLX calls on a CPU: C = alpha op(A) op(B) + beta C in float32, on all cores. Products with few
// rows, which do little more than read a matrix, are done here; others, sliced, by the library that `rest` points to.
// A product of a column with a 1 x 1 matrix that holds a mark is no product but a function of each number: MLX has no
// other door through which a lazy operation in C could come.
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>

enum { BY_ROWS = 101, PLAIN = 111, FEW = 32, LANES = __BIGGEST_ALIGNMENT__ / 4, ROWS = LANES == 8 ? 2 : 6 };
enum { MARK = 0x7fca5e00, EXP = MARK, SIGMOID, ERF, LAST = ERF }; // NaN that no calculation gives
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4))), quad __attribute__((vector_size(16)));
typedef int ints __attribute__((vector_size(4 * LANES), aligned(4)));
#define LOAD(p) (*(const volatile vec *)(p)) // volatile: GCC 12 reads memory again for each use otherwise
#define LEAST(x, y) ((x) < (y) ? (x) : (y))

typedef struct job {
  void (*part)(const struct job *, int); // does the numbers from part * step on, of n or m
  int ta, tb, m, n, k, lda, ldb, ldc, step;
  float alpha, beta, *c;
  const float *a, *b;
  ptrdiff_t down, right; // c[i * down + j * right], i < m, j < n
} job;

void (*rest)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
int threads = 1;

// Threads. A thread takes parts when it comes to it, and the caller does the others itself: it need not wait for a core
// that something else keeps busy, nor, in a process that was forked, for threads that are not there.
static job now;
static atomic_int left, done;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER, door = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;

static void work(void) {
  while (atomic_load(&left) > 0) {
    const int i = atomic_fetch_sub(&left, 1); // until that part is done, nobody changes `now`
    if (i > 0)
      now.part(&now, i - 1), atomic_fetch_add(&done, 1);
  }
}

static void *worker(void *nothing) {
  for (;;) {
    for (int i = 0; i < 200 && atomic_load(&left) <= 0; i++) // 50 us or so, then it sleeps
      sched_yield();
    pthread_mutex_lock(&door);
    while (atomic_load(&left) <= 0)
      pthread_cond_wait(&bell, &door);
    pthread_mutex_unlock(&door);
    work();
  }
  return nothing;
}

static void run(job j, int parts) {
  static int started = 1;
  if (parts == 1 || pthread_mutex_trylock(&turn)) { // small, or the threads are at another caller's
    for (int i = 0; i < parts; i++)
      j.part(&j, i);
    return;
  }
  for (pthread_t t; started < threads && !pthread_create(&t, NULL, worker, NULL); started++)
    pthread_detach(t);
  now = j;
  atomic_store(&done, 0), atomic_store(&left, parts);
  pthread_mutex_lock(&door), pthread_cond_broadcast(&bell), pthread_mutex_unlock(&door);
  work();
  for (int i = 0; atomic_load(&done) < parts; i++)
    if (i > 1000)
      sched_yield();
  pthread_mutex_unlock(&turn);
}

static inline float total(vec v) {
  union { vec all; quad part[LANES / 4]; } u = {v};
  for (int i = 1; i < LANES / 4; i++)
    u.part[0] += u.part[i];
  return (u.part[0][0] + u.part[0][1]) + (u.part[0][2] + u.part[0][3]);
}

// m rows of a by n <= 4 rows of b. m is known when this is compiled.
static inline __attribute__((always_inline)) void tile(const int m, int n, const job *p, const float *a, const float *b,
                                                       float *c) {
  const ptrdiff_t lda = p->lda, ldb = p->ldb;
  const float *b1 = b + (n > 1 ? ldb : 0), *b2 = b + (n > 2 ? 2 * ldb : 0), *b3 = b + (n > 3 ? 3 * ldb : 0);
  vec sums[6][4] = {};
  int l = 0;
  for (; l + LANES <= p->k; l += LANES) {
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
      float sum = total(sums[i][j]), *to = c + i * p->down + j * p->right;
      for (int t = l; t < p->k; t++)
        sum += a[i * lda + t] * b[j * ldb + t];
      *to = p->alpha * sum + (p->beta ? p->beta * *to : 0); // beta 0: what C holds, NaN even, counts for nothing
    }
}

static void few_rows(const job *p, int part) { // each row of b is read from memory once
#define TILE(rows) tile(rows, LEAST(4, p->n - j), p, p->a + (ptrdiff_t)i * p->lda, p->b + (ptrdiff_t)j * p->ldb, \
                        p->c + i * p->down + j * p->right)
  for (int j = part * p->step, end = LEAST(j + p->step, p->n); j < end; j += 4)
    for (int i = 0; i < p->m; i += ROWS)
      switch (LEAST(ROWS, p->m - i)) {
      case 1: TILE(1); break;
      case 2: TILE(2); break;
      case 3: TILE(3); break;
      case 4: TILE(4); break;
      case 5: TILE(5); break;
      default: TILE(6);
      }
}

static inline vec within(float low, vec x, float high) { // NaN stays
  const ints below = x < low, above = x > high;
  const vec lows = low - (vec){}, highs = high - (vec){};
  return (vec)(((ints)lows & below) | ((ints)highs & above) | ((ints)x & ~(below | above)));
}

static inline vec exponential(vec x) { // 2^whole 2^rest, the latter a polynomial within 1e-7, exact at 0
  const float shift = 0x1.8p23f + 127; // so large that the lowest bits of a sum are its integer, 127 more than `whole`
  x = within(-127, x * 1.44269504f, 128);
  const vec whole = x + shift, r = x - (whole - shift);
  const vec y = ((((1.32647273e-3f * r + 9.6715128e-3f) * r + 5.55073374e-2f) * r + 2.40222421e-1f) * r + 6.93146978e-1f);
  return (y * r + 1) * (vec)((ints)whole << 23);
}

static inline vec error_function(vec x) { // erf(x) / x as P(x^2) / Q(x^2): within 3e-8
  x = within(-4, x, 4);
  const vec s = x * x;
  const vec p = ((((1.97483075e-6f * s + 2.8804043e-4f) * s + 4.0036168e-3f) * s + 5.34673904e-2f) * s + 1.96248343e-1f);
  const vec q = ((((3.74808171e-5f * s + 1.21635217e-3f) * s + 1.54443651e-2f) * s + 1.1647616e-1f) * s + 5.07251725e-1f);
  return x * (p * s + 1.12837898f) / (q * s + 1);
}

static inline int mark(const float *b) {
  int bits;
  __builtin_memcpy(&bits, b, 4);
  return bits >= MARK && bits <= LAST ? bits : 0;
}

static inline vec function(int what, vec x) {
  return what == EXP ? exponential(x) : what == SIGMOID ? 1 / (1 + exponential(-x)) : error_function(x);
}

static void each(const job *p, int part) {
  const int what = mark(p->b), end = LEAST((part + 1) * p->step, p->m);
  int i = part * p->step;
  for (; i + LANES <= end; i += LANES)
    *(vec *)(p->c + i) = function(what, *(const vec *)(p->a + i));
  vec last = {};
  __builtin_memcpy(&last, p->a + i, 4 * (end - i));
  last = function(what, last);
  __builtin_memcpy(p->c + i, &last, 4 * (end - i));
}

static void slice(const job *p, int part) { // of the rows of C or of its columns, whichever are more
  const int wide = p->n > p->m, i = part * p->step, m = LEAST(p->step, p->m - i), n = LEAST(p->step, p->n - i);
  const ptrdiff_t a = wide ? 0 : p->ta == PLAIN ? p->lda : 1, b = !wide ? 0 : p->tb == PLAIN ? 1 : p->ldb;
  rest(BY_ROWS, p->ta, p->tb, wide ? p->m : m, wide ? n : p->n, p->k, p->alpha, p->a + i * a, p->lda, p->b + i * b,
       p->ldb, p->beta, p->c + i * (wide ? (ptrdiff_t)1 : p->ldc), p->ldc);
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  if (order != BY_ROWS) // the same memory: C' = B' A'
    return cblas_sgemm(BY_ROWS, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  const int lines = (ta == PLAIN || (m == 1 && lda == 1)) && (tb != PLAIN || (n == 1 && ldb == 1)); // of k
  const int rows = lines && alpha != 0 && k > 128;
  job j = {slice, ta, tb, m, n, k, lda, ldb, ldc, 0, alpha, beta, c, a, b, ldc, 1};
  if (rows && m <= FEW && m <= n)
    j.part = few_rows;
  else if (rows && n <= FEW) // few columns: C' = B' A'
    j = (job){few_rows, tb, ta, n, m, k, ldb, lda, ldc, 0, alpha, beta, c, b, a, 1, ldc};
  else if (n == 1 && k == 1 && lda == 1 && mark(b))
    j.part = each;
  const int few = j.part == few_rows, longer = LEAST(j.m, j.n) == j.m ? j.n : j.m, unit = few ? 4 : 64;
  const double parts = // each worth being handed out
      few ? (double)j.n * k / (1 << 14) : (double)m * n * k / (j.part == each ? 1 << 13 : 1 << 19);
  j.step = (longer / (int)(parts < 2 ? 1 : LEAST(parts, (few ? 4 : 2) * threads)) + unit) / unit * unit;
  run(j, (longer + j.step - 1) / j.step);
}
