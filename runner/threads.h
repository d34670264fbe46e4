/* threads.h - how many threads the kernels use. */
#ifndef DS_THREADS_H
#define DS_THREADS_H

/* Sets the number of OpenMP threads, to be called once at the start of main(). May start the
 * program again with `argv` where libgomp has to be told before it is loaded. */
void ds_threads_init(char **argv);

#endif
