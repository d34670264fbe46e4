/* zero.h - the layout of the partitioned optimizer: which element lies where, and who owns it.
 *
 * Trained parameters are laid behind each other, group by group, in flat buffers: one for weights,
 * one for gradients, one for the fp32 master and each piece of optimizer state. Every group is padded
 * so that its elements divide evenly among the ranks; rank r owns the r-th equal part of each group
 * (DeepSpeed's stages 1 and 2 shard so, too). One map serves all stages: stage 0 is the same
 * reduce-scatter and all-gather with every rank owning a copy of the state.
 */
#ifndef DS_ZERO_H
#define DS_ZERO_H

#include "runner/ds.h"

#define DS_ZERO_ALIGN 16    /* elements: a cache line of f32; parameters start on it */
#define DS_NORM_BLOCK 65536 /* elements: gradient norms are summed over blocks of that size */

#endif
