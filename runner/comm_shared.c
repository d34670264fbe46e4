/* comm_shared.c - the group of all ranks whose tensors lie in memory that their GPUs share.
 *
 * It is a second group of the same ranks: what scripts exchange, from whatever memory, stays with the
 * first (comm_nccl_share.c says why the two must not be mixed).
 */
#include "runner/comm.h"

#include "kernels/error.h"

static struct {
    ds_comm *group; /* NULL: there is none */
    int asked;
} shared;

static int make(ds_comm **out)
{
    const ds_transport *transport;
    ds_comm *all, *c;
    int rc = ds_comm_world(&all);

    *out = NULL;
    if (rc < 0 || all->size == 1)
        return rc;
    transport = ds_comm_transport(all, DS_CUDA);
    if (!transport)
        return DS_ENOSYS; /* ds_error() says why */
    if (!transport->share)
        return 0;
    rc = ds_comm_split(&c, all, 0, all->rank);
    if (rc < 0)
        return rc;
    c->transport[DS_CUDA] = transport;
    rc = transport->share(c);
    if (rc > 0) {
        c->shared = 1;
        *out = c;
        return 0;
    }
    ds_comm_close(c);
    return rc;
}

int ds_comm_shared(ds_comm **out)
{
    int rc = 0;

    if (!shared.asked)
        rc = make(&shared.group);
    shared.asked = rc == 0;
    *out = shared.group;
    return rc;
}

ds_comm *ds_comm_forget_shared(void)
{
    ds_comm *c = shared.group;

    shared.group = NULL;
    shared.asked = 0;
    return c;
}
