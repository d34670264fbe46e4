/* error.h - how C reports a failure: 0 or a negative code, and a message beside it.
 *
 * Nothing in kernels/ or runner/ exits, prints or raises. A function that fails calls ds_fail(),
 * which keeps the message in a thread-local slot, and returns the code; Lua's check() reads the
 * message and raises it at the user's line.
 */
#ifndef DS_ERROR_H
#define DS_ERROR_H

enum ds_code {
    DS_OK = 0,
    DS_EINVAL = -1,   /* an argument makes no sense */
    DS_ENOMEM = -2,   /* out of memory */
    DS_EIO = -3,      /* a file could not be read or written */
    DS_ENOSYS = -4,   /* this backend has no such kernel */
    DS_ERANGE = -5,   /* an index is out of range */
    DS_ECORRUPT = -6, /* a file is not what it should be */
    DS_ENOENT = -7,   /* there is no such file */
    DS_ECOMM = -8     /* a collective failed */
};

/* Room for a message with its final 0; one with all that is wrong with a file has many lines. */
#define DS_ERROR_BYTES 8192

/* Keeps the formatted message for this thread and returns `code`. Messages are lower case, without
 * a full stop, with values, shapes and units. */
int ds_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Returns what a call failed with. */
#define DS_TRY(call)                                                                               \
    do {                                                                                           \
        int rc_ = (call);                                                                          \
        if (rc_ < 0)                                                                               \
            return rc_;                                                                            \
    } while (0)

/* The message of this thread's last failure; never NULL; valid until the next ds_fail(). */
const char *ds_error(void);

#endif
