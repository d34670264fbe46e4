/* whole.c - files that are read in one piece, as they are: texts, lists, settings.
 *
 * They may be pipes, as in `--hostfile <(make-hosts)`, so their size is not known beforehand.
 */
#include "runner/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"

static int cannot(const char *verb, const char *path)
{
    int code = errno == ENOENT || errno == ENOTDIR ? DS_ENOENT : DS_EIO;

    return ds_fail(code, "cannot %s %s: %s", verb, path, strerror(errno));
}

int ds_read_open(struct stat *out, const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC), rc;

    if (fd < 0)
        return cannot("open", path);
    if (fstat(fd, out) < 0)
        rc = cannot("open", path);
    else if (S_ISDIR(out->st_mode))
        rc = ds_fail(DS_EIO, "%s is a directory, not a file", path);
    else
        return fd;
    close(fd);
    return rc;
}

/* Fills *text, of *room bytes, which grows, up to the end of the file; how many bytes there were. */
static int64_t read_all(char **text, size_t room, int fd, const char *path, int64_t most)
{
    size_t n = 0;
    ssize_t got;
    char *more;

    while ((got = read(fd, *text + n, room - n)) != 0) {
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return cannot("read", path);
        n += (size_t)got;
        if ((int64_t)n > most)
            return ds_fail(DS_ECORRUPT, "%s has more than %lld bytes: that is another kind of file",
                           path, (long long)most);
        if (n == room) {
            more = realloc(*text, room *= 2);
            if (!more)
                return ds_fail(DS_ENOMEM, "out of memory: reading %s", path);
            *text = more;
        }
    }
    (*text)[n] = 0; /* there is room: it has grown whenever it was full */
    return (int64_t)n;
}

int ds_read_whole(char **out, int64_t *bytes, const char *path, int64_t most)
{
    struct stat st;
    int fd = ds_read_open(&st, path), rc;
    size_t room;

    *out = NULL;
    *bytes = 0;
    if (fd < 0)
        return fd;
    room = st.st_size > 0 && st.st_size <= most ? (size_t)st.st_size + 1 : 65536;
    *out = malloc(room);
    *bytes = *out ? read_all(out, room, fd, path, most)
                  : ds_fail(DS_ENOMEM, "out of memory: reading %s", path);
    close(fd);
    if (*bytes >= 0)
        return 0;
    rc = (int)*bytes;
    free(*out);
    *out = NULL;
    *bytes = 0;
    return rc;
}
