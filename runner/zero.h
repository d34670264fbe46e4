/* zero.h - the layout of the partitioned optimizer: which element lies where, and who owns it.
 *
 * Trained parameters are laid behind each other, group by group, in flat buffers: one for weights,
 * one for gradients, one for the fp32 master and each piece of optimizer state. A group's buffer is
 * cut into buckets, the units that are reduced and gathered; a bucket is cut into one part a rank.
 * Element-wise optimizers take even parts, so that every rank sends and receives equally much of
 * every bucket; those that need whole tensors take parts that end where tensors do. One map serves
 * all stages: stage 0 is the same reduction and gathering with every rank keeping a copy of it all.
 */
#ifndef DS_ZERO_H
#define DS_ZERO_H

#include "runner/ds.h"

#define DS_ZERO_ALIGN 16 /* elements: a cache line of f32; parameters and parts start on it */

#endif
