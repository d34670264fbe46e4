/* attention_cudnn.h - attention by cuDNN, where it applies. */
#ifndef DS_CUDA_ATTENTION_CUDNN_H
#define DS_CUDA_ATTENTION_CUDNN_H

#include "kernels/cuda/attention.cuh"

/* 1: done. 0: not for cuDNN, *why says why, and nothing was written. Negative: it failed. */
int attention_cudnn(const attention_call *c, int backward, const char **why);

#endif
