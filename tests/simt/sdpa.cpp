/* sdpa.cpp - cuDNN's plans for attention on the simulated device: what their graphs say, by plain loops.
 *
 * So all that surrounds them is tested: which calls go there and as which graph, masks, rows that see
 * nothing, rows that are left out. It does what a graph says and no more: a row of -inf has NaN. They
 * are there only where DS_ATTENTION=cudnn asks for them.
 */
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <vector>

#include "kernels/cuda/attention_plan.h"
#include "kernels/scalar.h"

struct sdpa_plan {
    sdpa_form form;
};

namespace
{

[[noreturn]] void wrong(const char *what)
{
    fprintf(stderr, "simt: attention by cuDNN: %s\n", what);
    abort();
}

/* A plan with its memory. */
struct work {
    sdpa_form f;
    char *data[SDPA_TENSORS];
    float scale, hidden;
    int32_t rows, keys;

    int64_t place(int which, int64_t b, int64_t n, int64_t h, int64_t d) const
    {
        const int64_t *s = f.stride[which];

        return b * s[0] + n * s[1] + h * s[2] + d;
    }
    float get(int which, int64_t b, int64_t n, int64_t h, int64_t d) const
    {
        uint16_t bits = ((const uint16_t *)data[which])[place(which, b, n, h, d)];

        return f.f16 ? ds_f16_to_f32(bits) : ds_bf16_to_f32(bits);
    }
    void put(int which, int64_t b, int64_t n, int64_t h, int64_t d, float v) const
    {
        ((uint16_t *)data[which])[place(which, b, n, h, d)] =
            f.f16 ? ds_f32_to_f16(v) : ds_f32_to_bf16(v);
    }
    float &lse(int64_t b, int64_t h, int64_t t) const
    {
        return ((float *)data[SDPA_LSE])[(b * f.H + h) * f.T + t];
    }
    float bias(int64_t b, int64_t h, int64_t t, int64_t s) const
    {
        int64_t i = b * f.bias_stride[0] + (f.bias_heads > 1 ? h : 0) * f.bias_stride[1] +
                    t * f.bias_stride[2] + s;

        return !f.bias                   ? 0
               : f.bias == SDPA_BIAS_F32 ? ((const float *)data[SDPA_BIAS])[i]
                                         : ds_bf16_to_f32(((const uint16_t *)data[SDPA_BIAS])[i]);
    }

    /* Scores of a row. */
    void score(std::vector<float> &s, int64_t b, int64_t h, int64_t t) const
    {
        int64_t last = t + (f.T != f.S ? keys - rows : 0);

        for (int64_t j = 0; j < f.S; j++) {
            float sum = 0;

            for (int64_t d = 0; d < f.D; d++)
                sum += get(SDPA_Q, b, t, h, d) * get(SDPA_K, b, j, h / (f.H / f.G), d);
            s[j] = sum * scale + bias(b, h, t, j);
            if (f.causal && j > last)
                s[j] = hidden;
        }
    }

    void forward(int64_t b, int64_t h, int64_t t) const
    {
        std::vector<float> s(f.S);
        float most = -INFINITY, sum = 0;

        score(s, b, h, t);
        for (float x : s)
            most = fmaxf(most, x);
        for (float &x : s)
            sum += x = expf(x - most);
        lse(b, h, t) = most + logf(sum);
        for (int64_t d = 0; d < f.D; d++) {
            float y = 0;

            for (int64_t j = 0; j < f.S; j++)
                y += s[j] / sum * get(SDPA_V, b, j, h / (f.H / f.G), d);
            put(SDPA_Y, b, t, h, d, y);
        }
    }

    /* Adds to dk and dv [G, S, D] of a batch. */
    void backward(std::vector<float> &dk, std::vector<float> &dv, int64_t b, int64_t h,
                  int64_t t) const
    {
        int64_t g = h / (f.H / f.G);
        std::vector<float> s(f.S), dq(f.D);
        float delta = 0;

        score(s, b, h, t);
        for (int64_t d = 0; d < f.D; d++)
            delta += get(SDPA_DY, b, t, h, d) * get(SDPA_Y, b, t, h, d);
        for (int64_t j = 0; j < f.S; j++) {
            float w = expf(s[j] - lse(b, h, t)), dw = 0, ds;

            for (int64_t d = 0; d < f.D; d++)
                dw += get(SDPA_DY, b, t, h, d) * get(SDPA_V, b, j, g, d);
            ds = w * (dw - delta) * scale;
            for (int64_t d = 0; d < f.D; d++) {
                int64_t at = (g * f.S + j) * f.D + d;

                dq[d] += ds * get(SDPA_K, b, j, g, d);
                dk[at] += ds * get(SDPA_Q, b, t, h, d);
                dv[at] += w * get(SDPA_DY, b, t, h, d);
            }
        }
        for (int64_t d = 0; d < f.D; d++)
            put(SDPA_DQ, b, t, h, d, dq[d]);
    }

    void run() const
    {
        for (int64_t b = 0; b < f.B; b++) {
            std::vector<float> dk(f.G * f.S * f.D), dv(f.G * f.S * f.D);

            for (int64_t i = 0; i < f.H * f.T; i++)
                if (f.backward)
                    backward(dk, dv, b, i / f.T, i % f.T);
                else
                    forward(b, i / f.T, i % f.T);
            for (int64_t i = 0; f.backward && i < f.G * f.S * f.D; i++) {
                int64_t g = i / f.D / f.S, s = i / f.D % f.S, d = i % f.D;

                put(SDPA_DK, b, s, g, d, dk[i]);
                put(SDPA_DV, b, s, g, d, dv[i]);
            }
        }
    }
};

/* What cuDNN would refuse, or read wrongly. */
void examine(const work &w)
{
    const sdpa_form &f = w.f;
    bool has_sum = f.backward && !f.deterministic;

    for (int i = SDPA_Q; i < SDPA_SCALE; i++) {
        bool wanted = i < SDPA_DY       ? true
                      : i < SDPA_HEADS  ? f.backward
                      : i == SDPA_LSE   ? true
                      : i == SDPA_BIAS  ? f.bias != 0
                      : i == SDPA_DELTA ? f.backward
                                        : has_sum;

        if (wanted != (w.data[i] != NULL))
            wrong("a tensor is missing, or too many");
        if (wanted && ((uintptr_t)w.data[i] % 16 || !simt::is_device(w.data[i], 1)))
            wrong("a tensor is not aligned to 16 bytes of device memory");
    }
    if (f.D % 8 || f.T < 1 || (f.causal && (f.T > f.S || (f.bias && f.T != f.S))))
        wrong("its engines do not take this form");
    if (f.causal && f.T != f.S && (w.rows != f.T || w.keys != f.S))
        wrong("the numbers of rows and keys");
    if (f.bias && !simt::is_device(w.data[SDPA_BIAS], ((f.B - 1) * f.bias_stride[0] +
                                                       (f.bias_heads - 1) * f.bias_stride[1] +
                                                       (f.T - 1) * f.bias_stride[2] + f.S) *
                                                          (f.bias == SDPA_BIAS_F32 ? 4 : 2)))
        wrong("the bias is shorter than its form");
}

} // namespace

const sdpa_plan *sdpa_plan_for(const sdpa_form *form, const char **why)
{
    static std::vector<sdpa_plan *> plans;
    const char *asked = getenv("DS_ATTENTION");

    if (!asked || strcmp(asked, "cudnn")) {
        *why = "the simulated device has it only where it is asked for";
        return NULL;
    }
    for (sdpa_plan *p : plans)
        if (!memcmp(&p->form, form, sizeof *form))
            return p;
    plans.push_back(new sdpa_plan{*form});
    return plans.back();
}

int sdpa_plan_run(const sdpa_plan *p, void *const pointers[SDPA_TENSORS])
{
    work w = {};

    w.f = p->form;
    for (int i = SDPA_Q; i < SDPA_SCALE; i++)
        w.data[i] = (char *)pointers[i];
    w.scale = *(const float *)pointers[SDPA_SCALE];
    w.hidden = pointers[SDPA_HIDDEN] ? *(const float *)pointers[SDPA_HIDDEN] : NAN;
    w.rows = pointers[SDPA_ROWS] ? *(const int32_t *)pointers[SDPA_ROWS] : 0;
    w.keys = pointers[SDPA_KEYS] ? *(const int32_t *)pointers[SDPA_KEYS] : 0;
    examine(w);
    simt::enqueue(ds_cuda.stream, [w] { w.run(); });
    return ds_cuda_launched("attention");
}
