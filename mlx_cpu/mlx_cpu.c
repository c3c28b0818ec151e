// Products of float32 matrices for MLX on a CPU: C = alpha op(A) op(B) + beta C, on all cores. Products with few rows do
// little more than read a matrix and are computed here; the others are cut into slices for a BLAS library.
// mlx_cpu_start makes libmlx.so call mlx_cpu_sgemm wherever it called cblas_sgemm; nothing else in the process changes.
#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
enum { BY_ROWS = 101, PLAIN = 111, LANES = __BIGGEST_ALIGNMENT__ / 4 };
#if defined(__AVX512F__) || defined(__aarch64__) // 32 registers: sums of ROWS by SIDE numbers; V registers by COLUMNS numbers
enum { FEW = 32, ROWS = 4, SIDE = 6, V = 4, COLUMNS = 6, STREAMS = LANES == 16 ? 1 : 4 };
#else
enum { FEW = 32, ROWS = 4, SIDE = 3, V = 2, COLUMNS = 6, STREAMS = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4))), quad __attribute__((vector_size(16)));
#define LOAD(p) (*(const volatile vec *)(p)) // volatile: GCC 12 reads memory again for each use otherwise
#define LEAST(x, y) ((x) < (y) ? (x) : (y))

typedef void sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
static sgemm *blas; // the library's, on one thread; NULL until mlx_cpu_start
static int threads = 1;

// ------------------------------------------------------------------------------------------------------ threads

// Workers take parts as they get scheduled; the caller computes whatever is left, so it never waits for a busy core.
static struct {
  void (*part)(const void *, int);
  const void *job;
} now;
static atomic_int left, done;
static int started = 1;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER, door = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;

static void work(void) {
  while (atomic_load(&left) > 0) {
    const int i = atomic_fetch_sub(&left, 1); // `now` stays as it is until this part is done
    if (i > 0)
      now.part(now.job, i - 1), atomic_fetch_add(&done, 1);
  }
}

static void *worker(void *nothing) {
  for (;;) {
    for (int i = 0; i < 200 && atomic_load(&left) <= 0; i++) // spin for some 50 us, then sleep
      sched_yield();
    pthread_mutex_lock(&door);
    while (atomic_load(&left) <= 0)
      pthread_cond_wait(&bell, &door);
    pthread_mutex_unlock(&door);
    work();
  }
  return nothing;
}

static void forked(void) { // The child has no workers, and locks may be held by threads that it lacks: start afresh.
  turn = door = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER, bell = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
  atomic_store(&left, 0), started = 1;
}

// Call part(job, i) for all i < parts, on several threads.
API void mlx_cpu_run(void (*part)(const void *, int), const void *job, int parts) {
  if (parts == 1 || pthread_mutex_trylock(&turn)) { // small, or the workers serve another caller
    for (int i = 0; i < parts; i++)
      part(job, i);
    return;
  }
  for (pthread_t t; started < threads && !pthread_create(&t, NULL, worker, NULL); started++)
    pthread_detach(t);
  now.part = part, now.job = job;
  atomic_store(&done, 0), atomic_store(&left, parts);
  pthread_mutex_lock(&door), pthread_cond_broadcast(&bell), pthread_mutex_unlock(&door);
  work();
  for (int i = 0; atomic_load(&done) < parts; i++)
    if (i > 1000)
      sched_yield();
  pthread_mutex_unlock(&turn);
}

// ----------------------------------------------------------------------------------------------------- products

typedef void columns(const void *source, int j, int n, int l, int depth, float *to);

typedef struct job {
  int ta, tb, m, n, k, lda, ldb, ldc, step; // a part computes `step` of the m rows or n columns
  float alpha, beta, *c;
  const float *a, *b;
  ptrdiff_t down, right; // C's number (i, j) is c[i * down + j * right]
  columns *read; // gives the numbers l to l + depth of rows j to j + n of b, where they are not in memory
  const void *source;
  float *packed; // see pack()
} job;

static inline float total(vec v) {
  union { vec all; quad part[LANES / 4]; } u = {v};
  for (int i = 1; i < LANES / 4; i++)
    u.part[0] += u.part[i];
  return (u.part[0][0] + u.part[0][1]) + (u.part[0][2] + u.part[0][3]);
}

static inline void put(const job *p, float *to, float sum) {
  *to = p->alpha * sum + (p->beta ? p->beta * *to : 0); // with beta 0 even a NaN in C is ignored
}

// Rows of a from i on, m of them, by n <= SIDE rows of b from j on; m is a constant for the compiler.
static inline __attribute__((always_inline)) void tile(const int m, int n, const job *p, int i, int j) {
  const ptrdiff_t lda = p->lda, ldb = p->ldb;
  const float *a = p->a + i * lda, *b[SIDE], *next = p->b + (j + SIDE) * ldb;
  const int tiles = (p->m + ROWS - 1) / ROWS; // of the same rows of b
  int l = 0, wait = 0;
  vec sums[ROWS][SIDE] = {};
  for (int s = 0; s < SIDE; s++)
    b[s] = p->b + (j + LEAST(s, n - 1)) * ldb;
  next += i / ROWS * (p->k / tiles);
  for (; l + LANES <= p->k; l += LANES) {
    vec y[SIDE];
#pragma GCC unroll 6
    for (int s = 0; s < SIDE; s++)
      y[s] = LOAD(b[s] + l);
    if (--wait < 0) { // each tile has memory bring its share of the next rows of b, evenly
#pragma GCC unroll 6
      for (int s = 0; s < SIDE; s++)
        __builtin_prefetch(next + s * ldb);
      wait = tiles - 1, next += LANES;
    }
#pragma GCC unroll 4
    for (int r = 0; r < m; r++) {
      const vec x = LOAD(a + r * lda + l);
#pragma GCC unroll 6
      for (int s = 0; s < SIDE; s++)
        sums[r][s] += x * y[s];
    }
  }
  for (int r = 0; r < m; r++)
    for (int s = 0; s < n; s++) {
      float sum = total(sums[r][s]);
      for (int t = l; t < p->k; t++)
        sum += a[r * lda + t] * b[s][t];
      put(p, p->c + (i + r) * p->down + (j + s) * p->right, sum);
    }
}

// One row of a by n rows of b, every `apart`th from j on, summed in the order of `tile`; n is a constant for the compiler.
// With rows of 2 to 8 KB, memory gives a third to a half more to whoever reads one after the other than to four at a time;
// with registers of 8 numbers one at a time keeps the CPU waiting for its sums (Zen 3), so STREAMS are read, far apart.
static inline __attribute__((always_inline)) void line(const int n, const job *p, int j, int apart) {
  const float *b = p->b + (ptrdiff_t)j * p->ldb;
  const ptrdiff_t next = (ptrdiff_t)apart * p->ldb;
  vec sums[STREAMS] = {};
  int l = 0;
  for (; l + LANES <= p->k; l += LANES) {
    const vec x = LOAD(p->a + l);
#pragma GCC unroll 4
    for (int s = 0; s < n; s++)
      sums[s] += x * LOAD(b + s * next + l);
  }
  for (int s = 0; s < n; s++) {
    float sum = total(sums[s]);
    for (int t = l; t < p->k; t++)
      sum += p->a[t] * b[s * next + t];
    put(p, p->c + (j + s * apart) * p->right, sum);
  }
}

static void few_rows(const void *a_job, int part) { // reads each row of b from memory once
  const job *p = a_job;
  const int begin = part * p->step, end = LEAST(begin + p->step, p->n), each = (end - begin) / STREAMS;
  for (int j = begin; p->m == 1 && j < begin + each; j++)
    line(STREAMS, p, j, each);
  for (int j = begin + STREAMS * each; p->m == 1 && j < end; j++)
    line(1, p, j, 0);
  for (int j = begin; p->m > 1 && j < end; j += SIDE)
    for (int i = 0, n = LEAST(SIDE, p->n - j); i < p->m; i += ROWS)
      switch (LEAST(ROWS, p->m - i)) {
      case 1: tile(1, n, p, i, j); break;
      case 2: tile(2, n, p, i, j); break;
      case 3: tile(3, n, p, i, j); break;
      default: tile(ROWS, n, p, i, j);
      }
}

// Many rows: of up to TALL rows of a, panels of V registers' height are packed so that memory has l by l what they
// multiply with one number of b, which is read as it lies. COLUMNS rows of b at a time fill the registers with sums.
enum { PANEL = V * LANES, TALL = 256, DEPTH = 256, WIDE = 96, LINE = 16 };

static void pack(const void *a_job, int part) { // columns of a from part * DEPTH on
  const job *p = a_job;
  for (int l = part * DEPTH, end = LEAST(l + DEPTH, p->k); l < end; l += LINE)
    for (int i = 0; i < p->m; i++) {
      const int panel = i / PANEL * PANEL, width = LEAST(PANEL, (p->m - panel + LANES - 1) / LANES * LANES);
      const float *from = p->a + (ptrdiff_t)i * p->lda + l;
      float *to = p->packed + (ptrdiff_t)panel * p->k + (ptrdiff_t)l * width + i - panel;
      for (int t = 0; t < LEAST(LINE, end - l); t++)
        to[t * width] = from[t];
    }
}

// Add to c, whose rows belong to those of b, the products of v registers' height of a by COLUMNS rows of b.
static inline __attribute__((always_inline)) void panel(const int v, int depth, const float *a, const float *const *b,
                                                        float *c, int ldc) {
  vec sums[COLUMNS][V] = {};
  for (int l = 0; l < depth; l++, a += v * LANES) {
    vec x[V];
#pragma GCC unroll 4
    for (int i = 0; i < v; i++)
      x[i] = *(const vec *)(a + i * LANES);
#pragma GCC unroll 6
    for (int j = 0; j < COLUMNS; j++) {
      const vec y = b[j][l] - (vec){};
#pragma GCC unroll 4
      for (int i = 0; i < v; i++)
        sums[j][i] += x[i] * y;
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < COLUMNS; j++)
#pragma GCC unroll 4
    for (int i = 0; i < v; i++)
      *(vec *)(c + j * ldc + i * LANES) += sums[j][i];
}

static void many_rows(const void *a_job, int part) { // all rows of a by `step` rows of b
  const job *p = a_job;
  const int begin = part * p->step, n = LEAST(p->step, p->n - begin), ld = (p->m + LANES - 1) / LANES * LANES;
  float sums[WIDE * TALL], piece[WIDE * DEPTH];
  memset(sums, 0, 4 * ld * (size_t)LEAST(WIDE, n + COLUMNS));
  for (int start = 0; start < p->k; start += DEPTH) {
    const int depth = LEAST(DEPTH, p->k - start);
    const float *rows = p->b + (ptrdiff_t)begin * p->ldb + start;
    ptrdiff_t next = p->ldb;
    if (p->read)
      p->read(p->source, begin, n, start, next = depth, piece), rows = piece;
    for (int j = 0; j < n; j += COLUMNS) {
      const float *b[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) // the last row of b once more where there are fewer
        b[c] = rows + LEAST(j + c, n - 1) * next;
      for (int i = 0; i < p->m; i += PANEL) {
        const int v = LEAST(V, (ld - i) / LANES);
        const float *a = p->packed + (ptrdiff_t)i * p->k + (ptrdiff_t)start * v * LANES;
        float *c = sums + j * ld + i;
        switch (v) {
        case 1: panel(1, depth, a, b, c, ld); break;
        case 2: panel(2, depth, a, b, c, ld); break;
        case 3: panel(LEAST(3, V), depth, a, b, c, ld); break;
        default: panel(V, depth, a, b, c, ld);
        }
      }
    }
  }
  for (int i = 0; p->right == 1 && i < p->m; i++) // a row of a has C's numbers side by side
    for (int j = 0; j < n; j++)
      put(p, p->c + i * p->down + begin + j, sums[j * ld + i]);
  for (int j = 0; p->right != 1 && j < n; j++) // a row of b has
    for (int i = 0; i < p->m; i++)
      put(p, p->c + i + (begin + j) * p->right, sums[j * ld + i]);
}

// Returns 0 where there is no memory.
static int multiply(job j) {
  float *packed = j.packed = malloc(4 * (size_t)j.k * (LEAST(j.m, TALL) + LANES));
  const int step = (j.n / (8 * threads) + COLUMNS) / COLUMNS * COLUMNS;
  for (int left = j.m; left > 0 && packed; left -= TALL, j.a += (ptrdiff_t)TALL * j.lda, j.c += TALL * j.down) {
    j.m = LEAST(TALL, left), j.step = LEAST(WIDE, step);
    mlx_cpu_run(pack, &j, (j.k + DEPTH - 1) / DEPTH);
    mlx_cpu_run(many_rows, &j, (j.n + j.step - 1) / j.step);
  }
  free(packed);
  return packed != NULL;
}

// c (m, n) = a (m, k) b', for whose rows `read` is asked
API int mlx_cpu_multiply(int m, int n, int k, const float *a, columns *read, const void *source, float *c) {
  return multiply((job){.m = m, .n = n, .k = k, .lda = k, .alpha = 1, .c = c, .a = a, .down = n, .right = 1, .read = read,
                        .source = source});
}

static void slice(const void *a_job, int part) { // computes a slice of C's rows or columns, whichever are more
  const job *p = a_job;
  const int wide = p->n > p->m, i = part * p->step, m = LEAST(p->step, p->m - i), n = LEAST(p->step, p->n - i);
  const ptrdiff_t a = wide ? 0 : p->ta == PLAIN ? p->lda : 1, b = !wide ? 0 : p->tb == PLAIN ? 1 : p->ldb;
  blas(BY_ROWS, p->ta, p->tb, wide ? p->m : m, wide ? n : p->n, p->k, p->alpha, p->a + i * a, p->lda, p->b + i * b,
       p->ldb, p->beta, p->c + i * (wide ? (ptrdiff_t)1 : p->ldc), p->ldc);
}

API void mlx_cpu_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc) {
  if (order != BY_ROWS) // the same memory: C' = B' A'
    return mlx_cpu_sgemm(BY_ROWS, tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  if (m <= 0 || n <= 0)
    return;
  const int along_k = (ta == PLAIN || (m == 1 && lda == 1)) && (tb != PLAIN || (n == 1 && ldb == 1));
  const int dots = along_k && alpha != 0 && k > 128; // both are read along k
  const int few = dots && LEAST(m, n) <= FEW;
  job j = {ta, tb, m, n, k, lda, ldb, ldc, 0, alpha, beta, c, a, b, .down = ldc, .right = 1};
  if (dots && m > n) // few columns: C' = B' A'
    j = (job){tb, ta, n, m, k, ldb, lda, ldc, 0, alpha, beta, c, b, a, .down = 1, .right = ldc};
  if (dots && !few && multiply(j))
    return;
  const int longer = m > n ? m : n, unit = few ? SIDE : 64;
  const double parts = few ? (double)longer * k / (1 << 14) : (double)m * n * k / (1 << 19); // worth handing out
  j.step = (longer / (int)(parts < 2 ? 1 : LEAST(parts, (few ? 4 : 2) * threads)) + unit) / unit * unit;
  mlx_cpu_run(few ? few_rows : slice, &j, (longer + j.step - 1) / j.step);
}

// ------------------------------------------------------------------------------------------------- in MLX's place

typedef struct wanted {
  const char *library, *name;
  void *function;
} wanted;

// Write `function` into the slots through which the library calls the function `name`. Returns their number.
static int redirect(struct dl_phdr_info *library, size_t size, void *a_wanted) {
  const wanted *w = a_wanted;
  const char *file = strrchr(library->dlpi_name, '/');
  if (!file || strncmp(file, w->library, strlen(w->library)) || !strstr(library->dlpi_name, "mlx"))
    return 0;
  const ElfW(Rela) *relocations[2] = {NULL, NULL}; // of calls, and of addresses
  const ElfW(Sym) *symbols = NULL;
  const char *names = NULL, *base = (const char *)library->dlpi_addr;
  size_t sizes[2] = {0, 0}, page = sysconf(_SC_PAGESIZE);
  int found = 0;
  for (int i = 0; i < library->dlpi_phnum; i++)
    if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
      for (const ElfW(Dyn) *d = (const void *)(base + library->dlpi_phdr[i].p_vaddr); d->d_tag; d++) {
        const char *address = (d->d_un.d_ptr < library->dlpi_addr ? base : NULL) + d->d_un.d_ptr; // musl: an offset
        switch (d->d_tag) {
        case DT_JMPREL: relocations[0] = (const void *)address; break;
        case DT_PLTRELSZ: sizes[0] = d->d_un.d_val; break;
        case DT_RELA: relocations[1] = (const void *)address; break;
        case DT_RELASZ: sizes[1] = d->d_un.d_val; break;
        case DT_SYMTAB: symbols = (const void *)address; break;
        case DT_STRTAB: names = address; break;
        }
      }
  for (int kind = 0; kind < 2; kind++)
    for (size_t i = 0; relocations[kind] && symbols && names && i < sizes[kind] / sizeof **relocations; i++)
      if (!strcmp(names + symbols[relocations[kind][i].r_info >> 32].st_name, w->name)) {
        void **slot = (void **)(library->dlpi_addr + relocations[kind][i].r_offset);
        void *start = (void *)((size_t)slot & ~(page - 1)); // read-only where the library was linked with -z now
        if (!mprotect(start, page, PROT_READ | PROT_WRITE))
          __atomic_store_n(slot, w->function, __ATOMIC_RELEASE), found++;
      }
  (void)size;
  return found;
}

// Make the library of MLX whose file's name begins like this, "/libmlx.so" or "/core.", call this function in the place
// of another one. Returns 0 where this cannot be done.
API int mlx_cpu_redirect(const char *library, const char *name, void *function) {
  return dl_iterate_phdr(redirect, &(wanted){library, name, function});
}

// Compute MLX's products, which is loaded by now, from here on: with this library's sgemm, and on so many threads.
// Returns 0 where this cannot be done.
API int mlx_cpu_start(sgemm *library, int n_threads) {
  if (!blas) // once
    pthread_atfork(NULL, NULL, forked);
  blas = library, threads = n_threads;
  return mlx_cpu_redirect("/libmlx.so", "cblas_sgemm", (void *)mlx_cpu_sgemm);
}
