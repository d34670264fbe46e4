/* matmul.c - matrix products: strides and batches are put in order here, oneDNN multiplies.
 *
 * Three ways, tried in this order:
 *   direct      oneDNN takes the operands where they lie, transposed or not;
 *   by_scratch  operands that it cannot take (f16, bf16 on a processor without it, no stride of 1)
 *               are packed into scratch, by blocks, and the result is put where it belongs;
 *   loops       own loops in f64: for f64, where gradients are checked, and as the last resort.
 */
#include "kernels/cpu/matmul.h"

#include "kernels/cpu/dnnl.h"
#include "kernels/cpu/simd.h"
#include "kernels/scratch.h"

/* Elements of an operand that are packed at once: 16 MB of f32. Smaller blocks are converted more
 * often, larger ones leave the caches. */
#define BLOCK ((int64_t)1 << 22)
#define CHUNK 512 /* elements of a row converted at a time */

/* ---- direct ---- */

static int is_onednn_dtype(int dtype)
{
    return dtype == DS_F32 || (dtype == DS_BF16 && ds_dnnl_has_bf16());
}

/* Whether oneDNN can read x where it lies. */
static int is_readable(const ds_matrix *x, int64_t rows, int64_t cols)
{
    return is_onednn_dtype(x->dtype) && (ds_by_rows(x, cols) || ds_by_columns(x, rows));
}

static int is_plain(const ds_product *p)
{
    return is_readable(&p->a, p->m, p->k) && is_readable(&p->b, p->k, p->n) &&
           is_onednn_dtype(p->y.dtype) && ds_by_rows(&p->y, p->n);
}

/* DS_ENOSYS, without a message, where oneDNN has no fast way. */
static int direct(const ds_product *p)
{
    ds_dnnl_key key;

    if (!is_plain(p) || p->batches > DS_DNNL_BATCH || p->alpha == 0)
        return DS_ENOSYS;
    memset(&key, 0, sizeof key);
    key.m = p->m, key.n = p->n, key.k = p->k;
    key.a_row = p->a.row, key.a_col = p->a.col;
    key.b_row = p->b.row, key.b_col = p->b.col;
    key.c_row = p->y.row;
    for (int i = 0; i < p->batches; i++) {
        key.batch[i] = p->batch[i];
        key.a_batch[i] = p->a.batch[i];
        key.b_batch[i] = p->b.batch[i];
        key.c_batch[i] = p->y.batch[i];
    }
    key.alpha = (float)p->alpha, key.beta = (float)p->beta;
    key.a_dtype = (uint8_t)p->a.dtype, key.b_dtype = (uint8_t)p->b.dtype;
    key.c_dtype = (uint8_t)p->y.dtype;
    key.batches = (uint8_t)p->batches;
    key.bias = p->bias != NULL;
    return ds_dnnl_matmul(p->y.data, p->a.data, p->b.data, p->bias, &key);
}

/* ---- packing ---- */

/* Where batch number i of x begins, in elements. */
static int64_t batch_offset(const ds_product *p, const ds_matrix *x, int64_t i)
{
    int64_t offset = 0;

    for (int d = p->batches - 1; d >= 0; d--) {
        offset += i % p->batch[d] * x->batch[d];
        i /= p->batch[d];
    }
    return offset;
}

static char *at(const ds_matrix *x, int64_t offset)
{
    return x->data + offset * ds_bytes_of(x->dtype);
}

static void convert_row(void *dst, int dst_dtype, const void *src, int dtype, int64_t n,
                        int64_t stride)
{
    float chunk[CHUNK];

    if (dst_dtype == DS_F64) {
        ds_row_load_f64(dst, src, dtype, n, stride);
    } else if (dst_dtype == DS_F32) {
        ds_row_load(dst, src, dtype, n, stride);
    } else {
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t part = n - i < CHUNK ? n - i : CHUNK;

            ds_row_load(chunk, (const char *)src + i * stride * ds_bytes_of(dtype), dtype, part,
                        stride);
            ds_row_store((char *)dst + i * ds_bytes_of(dst_dtype), chunk, dst_dtype, part, 1);
        }
    }
}

/* The batch strides of a dense matrix in scratch. */
static void dense_batches(ds_matrix *x, const ds_product *p, int64_t elements)
{
    for (int d = p->batches - 1; d >= 0; d--) {
        x->batch[d] = elements;
        elements *= p->batch[d];
    }
}

/* Copies x [batch.., rows, cols] into the scratch of `slot` as dtype, and makes x that copy:
 * dense, f64 by rows, others in the order of the smaller stride; each batch written out unless
 * all of them repeat one matrix. */
static int pack(ds_matrix *x, const ds_product *p, int64_t rows, int64_t cols, int dtype, int slot)
{
    int by_column = dtype != DS_F64 && x->row < x->col;
    int64_t lines = by_column ? cols : rows, length = by_column ? rows : cols;
    int64_t step = by_column ? x->col : x->row, stride = by_column ? x->row : x->col;
    int64_t count = ds_product_batches(p), line_bytes = length * ds_bytes_of(dtype);
    int repeated = 1, threads;
    char *dst;

    for (int i = 0; i < p->batches; i++)
        repeated &= x->batch[i] == 0;
    if (repeated)
        count = 1;
    dst = ds_scratch(slot, (size_t)(count * lines * line_bytes));
    if (!dst)
        return DS_ENOMEM;
    threads = ds_threads(count * lines * length);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, count * lines, 1);
        for (int64_t i = begin; i < end; i++)
            convert_row(dst + i * line_bytes, dtype,
                        at(x, batch_offset(p, x, i / lines) + i % lines * step), x->dtype, length,
                        stride);
    }
    x->data = dst;
    x->dtype = dtype;
    x->row = by_column ? 1 : cols;
    x->col = by_column ? rows : 1;
    if (!repeated)
        dense_batches(x, p, rows * cols);
    return 0;
}

/* ---- the result from scratch to its place: y = alpha c + bias + beta y ---- */

static void finish_row(const ds_product *p, void *y, const float *c)
{
    float chunk[CHUNK], bias[CHUNK];
    int64_t bytes = ds_bytes_of(p->y.dtype);
    float alpha = (float)p->alpha, beta = (float)p->beta;

    for (int64_t i = 0; i < p->n; i += CHUNK) {
        int64_t part = p->n - i < CHUNK ? p->n - i : CHUNK;
        char *to = (char *)y + i * p->y.col * bytes;

        if (beta != 0)
            ds_row_load(chunk, to, p->y.dtype, part, p->y.col);
        for (int64_t j = 0; j < part; j++)
            chunk[j] = (alpha != 0 ? alpha * c[i + j] : 0) + (beta != 0 ? beta * chunk[j] : 0);
        if (p->bias) {
            ds_row_load(bias, (const char *)p->bias + i * bytes, p->y.dtype, part, 1);
            for (int64_t j = 0; j < part; j++)
                chunk[j] += bias[j];
        }
        ds_row_store(to, chunk, p->y.dtype, part, p->y.col);
    }
}

static void finish(const ds_product *p, const float *c)
{
    int64_t lines = ds_product_batches(p) * p->m;
    int threads = ds_threads(lines * p->n);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t begin, end;

        ds_part(&begin, &end, lines, 1);
        for (int64_t i = begin; i < end; i++)
            finish_row(p, at(&p->y, batch_offset(p, &p->y, i / p->m) + i % p->m * p->y.row),
                       c + i * p->n);
    }
}

/* ---- loops in f64 ---- */

/* sum[0..n) += x[0..k) b, where row i of b begins at b + i * n. */
static void multiply_row(double *restrict sum, const double *restrict x, const double *restrict b,
                         int64_t n, int64_t k)
{
    int64_t i = 0;

    for (; i + 4 <= k; i += 4) {
        const double *r = b + i * n;

        for (int64_t j = 0; j < n; j++)
            sum[j] += x[i] * r[j] + x[i + 1] * r[j + n] + x[i + 2] * r[j + 2 * n] +
                      x[i + 3] * r[j + 3 * n];
    }
    for (; i < k; i++)
        for (int64_t j = 0; j < n; j++)
            sum[j] += x[i] * b[i * n + j];
}

/* One row of y, by way of the two rows of f64 behind `sum`. */
static void loop_row(const ds_product *p, char *y, double *sum, const double *x, const double *b)
{
    double *old = sum + p->n, *bias = sum + 2 * p->n;

    memset(sum, 0, (size_t)p->n * sizeof *sum);
    multiply_row(sum, x, b, p->n, p->k);
    if (p->beta != 0)
        ds_row_load_f64(old, y, p->y.dtype, p->n, p->y.col);
    if (p->bias)
        ds_row_load_f64(bias, p->bias, p->y.dtype, p->n, 1);
    for (int64_t j = 0; j < p->n; j++) {
        double v = p->alpha != 0 ? p->alpha * sum[j] : 0;

        v += p->bias ? bias[j] : 0;
        sum[j] = p->beta != 0 ? v + p->beta * old[j] : v;
    }
    ds_row_store_f64(y, sum, p->y.dtype, p->n, p->y.col);
}

static int loops(const ds_product *p)
{
    ds_matrix a = p->a, b = p->b;
    int64_t lines = ds_product_batches(p) * p->m, k = p->k, n = p->n;
    int threads = ds_threads(lines * n * k / 4);
    double *sums;

    if (pack(&a, p, p->m, k, DS_F64, DS_SCRATCH_A) < 0 ||
        pack(&b, p, k, n, DS_F64, DS_SCRATCH_B) < 0)
        return DS_ENOMEM;
    sums = ds_scratch(DS_SCRATCH_SUMS, (size_t)(threads * 3 * n) * sizeof *sums);
    if (!sums)
        return DS_ENOMEM;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        double *sum = sums + omp_get_thread_num() * 3 * n;
        int64_t begin, end;

        ds_part(&begin, &end, lines, 1);
        for (int64_t i = begin; i < end; i++) {
            int64_t batch = i / p->m, row = i % p->m;

            loop_row(p, at(&p->y, batch_offset(p, &p->y, batch) + row * p->y.row), sum,
                     (double *)at(&a, batch_offset(p, &a, batch) + row * k),
                     (double *)at(&b, batch_offset(p, &b, batch)));
        }
    }
    return 0;
}

/* ---- by scratch ---- */

static int by_scratch(const ds_product *p)
{
    int dtype = p->a.dtype == DS_BF16 && ds_dnnl_has_bf16() ? DS_BF16 : DS_F32;
    ds_product q = *p;
    int rc = DS_ENOSYS;
    float *c;

    if (!is_readable(&q.a, p->m, p->k) && pack(&q.a, p, p->m, p->k, dtype, DS_SCRATCH_A) < 0)
        return DS_ENOMEM;
    if (!is_readable(&q.b, p->k, p->n) && pack(&q.b, p, p->k, p->n, dtype, DS_SCRATCH_B) < 0)
        return DS_ENOMEM;
    if (is_plain(&q))
        rc = direct(&q);
    if (rc != DS_ENOSYS)
        return rc;
    c = ds_scratch(DS_SCRATCH_C, (size_t)(ds_product_batches(p) * p->m * p->n) * sizeof *c);
    if (!c)
        return DS_ENOMEM;
    q.y = ds_matrix_of(c, p->n, 1, DS_F32);
    dense_batches(&q.y, p, p->m * p->n);
    q.alpha = 1, q.beta = 0, q.bias = NULL;
    rc = direct(&q);
    if (rc == DS_ENOSYS)
        return loops(p);
    if (rc == 0)
        finish(p, c);
    return rc;
}

/* ---- taking a product apart ---- */

static void advance(ds_matrix *x, int64_t elements)
{
    x->data = at(x, elements);
}

/* The outermost batch dimension, one by one. */
static int each(const ds_product *p)
{
    int rc = 0;

    for (int64_t i = 0; i < p->batch[0] && rc == 0; i++) {
        ds_product q = *p;

        advance(&q.y, i * p->y.batch[0]);
        advance(&q.a, i * p->a.batch[0]);
        advance(&q.b, i * p->b.batch[0]);
        ds_product_drop(&q, 0);
        rc = ds_product_run(&q);
    }
    return rc;
}

static int64_t most_elements(const ds_product *p)
{
    int64_t mk = p->m * p->k, kn = p->k * p->n, mn = p->m * p->n;
    int64_t most = mk > kn ? mk : kn;

    return (most > mn ? most : mn) * ds_product_batches(p);
}

/* In two along the longest dimension; along k only where y keeps the sums in full. DS_ENOSYS:
 * there is nothing to split. */
static int halves(const ds_product *p)
{
    int sums_in_y = p->y.dtype == DS_F32 || p->y.dtype == DS_F64;
    ds_product first = *p, second = *p;
    int rc;

    if (sums_in_y && p->k > 1 && p->k >= p->m && p->k >= p->n) {
        first.k = p->k / 2;
        second.k = p->k - first.k;
        advance(&second.a, first.k * p->a.col);
        advance(&second.b, first.k * p->b.row);
        second.beta = 1;
        second.bias = NULL;
    } else if (p->m > 1 && p->m >= p->n) {
        first.m = p->m / 2;
        second.m = p->m - first.m;
        advance(&second.a, first.m * p->a.row);
        advance(&second.y, first.m * p->y.row);
    } else if (p->n > 1) {
        first.n = p->n / 2;
        second.n = p->n - first.n;
        advance(&second.b, first.n * p->b.col);
        advance(&second.y, first.n * p->y.col);
        if (p->bias)
            second.bias = (const char *)p->bias + first.n * ds_bytes_of(p->y.dtype);
    } else {
        return DS_ENOSYS;
    }
    rc = ds_product_run(&first);
    return rc < 0 ? rc : ds_product_run(&second);
}

int ds_product_run(const ds_product *given)
{
    ds_product p = *given;
    int rc;

    if (p.m == 0 || p.n == 0 || ds_product_batches(&p) == 0)
        return 0;
    if (p.k == 0 || p.alpha == 0) { /* no product, only beta y + bias */
        p.k = 0;
        return loops(&p);
    }
    ds_product_tidy(&p, 0);
    rc = direct(&p);
    if (rc != DS_ENOSYS)
        return rc;
    if (p.batches && (is_plain(&p) || most_elements(&p) > BLOCK))
        return each(&p);
    if (most_elements(&p) > BLOCK && !is_plain(&p)) {
        rc = halves(&p);
        if (rc != DS_ENOSYS)
            return rc;
    }
    return p.y.dtype == DS_F64 ? loops(&p) : by_scratch(&p);
}

/* ---- the kernel ---- */

int DS_CPU(matmul)(ds_tensor *y, const ds_tensor *a, const ds_tensor *b, double alpha, double beta)
{
    ds_product p = {.alpha = alpha, .beta = beta};

    return ds_product_of(&p, y, a, b) < 0 ? DS_EINVAL : ds_product_run(&p);
}
