/* plan.c - a job before it starts. */
#include "runner/plan.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/rank.h"
#include "runner/remote.h"
#include "runner/threads.h"
#include "runner/watch.h"

#define JOB_HOSTFILE "/job/hostfile" /* DeepSpeed's */
#define DSRUN "dsrun"                /* where a variable comes from: this program */

extern char **environ;

/* ---- which hosts */

static int cores_here(void)
{
    cpu_set_t set;

    return ds_threads_cores(&set);
}

/* The GPUs that CUDA_VISIBLE_DEVICES leaves, as their numbers; 0: it names none by number. */
static int visible_devices(int *out, int most)
{
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    int n = 0;

    while (list && *list && n < most) {
        char *end;

        out[n++] = (int)strtol(list, &end, 10);
        if (end == list || (*end && *end != ','))
            return 0; /* by a UUID, say */
        list = *end ? end + 1 : end;
    }
    return n;
}

/* This machine: as many slots as were asked for; where none were, one a GPU, or one a core. */
static int take_this_machine(ds_plan *p)
{
    const ds_options *o = p->options;
    int device[256], devices = visible_devices(device, 256);
    int wanted = o->num_slots ? o->num_slots : devices ? devices : cores_here();
    int rc;

    if (o->num_nodes > 1)
        return ds_fail(DS_EINVAL,
                       "--num_nodes %d: no other machines are known; name them in a file for "
                       "--hostfile",
                       o->num_nodes);
    rc = ds_hosts_local(&p->all, wanted);
    if (rc == 0 && devices >= wanted) { /* slots are those GPUs */
        p->devices = 1;
        memcpy(p->all->host[0].slot, device, (size_t)wanted * sizeof *device);
    }
    return rc;
}

static int find_hosts(ds_plan *p)
{
    const ds_options *o = p->options;
    const char *file = o->value[DS_OPT_hostfile];
    int rc;

    if (o->srun && !getenv("SLURM_JOB_NODELIST"))
        return ds_fail(DS_EINVAL, "--launcher slurm wants an allocation of SLURM's around it: "
                                  "salloc -N2 -n8 dsrun --launcher slurm …");
    if (!file && access(JOB_HOSTFILE, F_OK) == 0)
        file = JOB_HOSTFILE;
    if (file) {
        rc = ds_hosts_read(&p->all, file);
        p->devices = 1;
    } else if (getenv("SLURM_JOB_NODELIST")) {
        rc = ds_hosts_slurm(&p->all);
        p->slurm = 1;
    } else {
        rc = take_this_machine(p);
    }
    if (rc < 0)
        return rc;
    return ds_hosts_filter(p->all, o->value[DS_OPT_include], o->value[DS_OPT_exclude], o->num_nodes,
                           o->num_slots, o->slots_option);
}

/* ---- what the ranks are called */

static void drop_names(ds_plan *p)
{
    for (int r = 0; p->where && r < p->ranks; r++)
        free(p->where[r]);
    free(p->where);
    p->where = NULL;
}

static int name_ranks(ds_plan *p)
{
    int rank = 0;

    p->ranks = ds_hosts_ranks(&p->hosts);
    if (!p->network)
        return 0;
    p->where = calloc((size_t)p->ranks, sizeof *p->where);
    for (int h = 0; p->where && h < p->hosts.count; h++) {
        const ds_host *host = &p->hosts.host[h];

        for (int s = 0; s < host->slots; s++) {
            char text[300];

            snprintf(text, sizeof text, "%.256s, slot %d", host->name, host->slot[s]);
            p->where[rank] = strdup(text);
            if (!p->where[rank++])
                return ds_fail(DS_ENOMEM, "out of memory");
        }
    }
    return p->where ? 0 : ds_fail(DS_ENOMEM, "out of memory");
}

int ds_plan_use(ds_plan *p, const ds_preflight_host *found, int most)
{
    int n = 0, all = p->all->count;

    drop_names(p);
    free(p->hosts.host);
    free(p->places);
    p->fabric = found == NULL;
    p->hosts = (ds_hosts){.host = calloc((size_t)all, sizeof *p->hosts.host)};
    p->places = calloc((size_t)all, sizeof *p->places);
    if (!p->hosts.host || !p->places)
        return ds_fail(DS_ENOMEM, "out of memory");
    for (int h = 0; h < all && (!most || n < most); h++) {
        ds_place *place = &p->places[n];

        if (found && !found[h].ready)
            continue;
        p->hosts.host[n++] = p->all->host[h];
        place->here = ds_remote_is_here(p->all->host[h].name);
        if (found) {
            p->fabric = p->fabric || found[h].fabric;
            memcpy(place->address, found[h].address, sizeof place->address);
            memcpy(place->launcher, found[h].launcher, sizeof place->launcher);
        }
    }
    p->hosts.count = n;
    if (n == 0)
        return ds_fail(DS_ECOMM, "no host is left to start ranks on");
    p->network = n > 1 || !p->places[0].here || p->options->value[DS_OPT_force_multi] != NULL;
    return name_ranks(p);
}

int ds_plan_open(ds_plan *p, const ds_options *options)
{
    int rc;

    *p = (ds_plan){.options = options};
    rc = find_hosts(p);
    return rc < 0 ? rc : ds_plan_use(p, NULL, 0);
}

void ds_plan_close(ds_plan *p)
{
    drop_names(p);
    free(p->hosts.host);
    free(p->places);
    ds_hosts_free(p->all);
    ds_variables_free(&p->env);
}

/* ---- addresses */

static void to_text(char *out, const struct sockaddr *address, socklen_t length)
{
    if (getnameinfo(address, length, out, DS_ADDRESS_BYTES, NULL, 0, NI_NUMERICHOST) != 0)
        *out = 0;
}

/* Which address a host has, and which of this machine's it would see: what the routes say, without a
 * packet sent. */
static int ask_routes(ds_place *place, const char *name)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_DGRAM};
    struct sockaddr_storage own;
    struct addrinfo *all, *a;
    int rc = getaddrinfo(ds_host_bare(name), "9", &hints, &all);

    if (rc != 0)
        return ds_fail(DS_ENOENT,
                       "%s: no address is known (%s): put it into /etc/hosts or DNS, or leave out "
                       "--no_ssh_check, so that ssh can tell",
                       name, gai_strerror(rc));
    rc = -1;
    for (a = all; a && rc < 0; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        socklen_t length = sizeof own;

        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0 &&
            getsockname(fd, (struct sockaddr *)&own, &length) == 0) {
            to_text(place->address, a->ai_addr, a->ai_addrlen);
            to_text(place->launcher, (struct sockaddr *)&own, length);
            rc = 0;
        }
        if (fd >= 0)
            close(fd);
    }
    freeaddrinfo(all);
    return rc == 0 ? 0 : ds_fail(DS_ECOMM, "%s: there is no route to it from here", name);
}

/* must 0: a host whose address is not known is not an error. */
static int find_addresses(ds_plan *p, int must)
{
    const char *seen = NULL;

    for (int h = 0; p->network && h < p->hosts.count; h++) {
        ds_place *place = &p->places[h];
        int rc = place->here || *place->launcher ? 0 : ask_routes(place, p->hosts.host[h].name);

        if (rc < 0 && must)
            return rc;
        if (rc < 0)
            snprintf(place->address, sizeof place->address, "%.63s", p->hosts.host[h].name);
        seen = seen || place->here ? seen : place->launcher;
    }
    for (int h = 0; h < p->hosts.count; h++) {
        ds_place *place = &p->places[h];

        if (!place->here)
            continue;
        snprintf(place->launcher, sizeof place->launcher, "127.0.0.1");
        snprintf(place->address, sizeof place->address, "%s", seen ? seen : "127.0.0.1");
    }
    return 0;
}

static int same_net(uint32_t a, uint32_t b, uint32_t mask)
{
    return (a & mask) == (b & mask);
}

/* The interface that this machine reaches all hosts by, if there is one: a machine may have others,
 * of containers say, that have the same address everywhere and lead nowhere. IPv4 only. */
static void find_interface(ds_plan *p)
{
    struct ifaddrs *all = NULL, *a;

    *p->interface = 0;
    if (!p->network || getifaddrs(&all) < 0)
        return;
    for (a = all; a && !*p->interface; a = a->ifa_next) {
        uint32_t own, mask, net;
        int reaches = 1, others = 0;

        if (!a->ifa_addr || !a->ifa_netmask || a->ifa_addr->sa_family != AF_INET)
            continue;
        own = ntohl(((struct sockaddr_in *)a->ifa_addr)->sin_addr.s_addr);
        mask = ntohl(((struct sockaddr_in *)a->ifa_netmask)->sin_addr.s_addr);
        for (int h = 0; h < p->hosts.count; h++) {
            struct in_addr other;

            if (p->places[h].here)
                continue;
            others++;
            reaches = reaches && inet_pton(AF_INET, p->places[h].address, &other) == 1 &&
                      same_net(own, ntohl(other.s_addr), mask);
        }
        net = own & mask;
        if (reaches && others)
            snprintf(p->interface, sizeof p->interface, "%u.%u.%u.%u/%d", net >> 24,
                     net >> 16 & 255, net >> 8 & 255, net & 255, __builtin_popcount(mask));
    }
    freeifaddrs(all);
}

/* ---- variables */

/* Text that grows. */
typedef struct text {
    char *data;
    size_t used, room;
} text;

static int add(text *t, const char *more)
{
    size_t bytes = strlen(more) + 1;

    if (t->used + bytes > t->room) {
        char *grown = realloc(t->data, (t->used + bytes) * 2);

        if (!grown)
            return -1;
        t->data = grown;
        t->room = (t->used + bytes) * 2;
    }
    memcpy(t->data + t->used, more, bytes);
    t->used += bytes - 1;
    return 0;
}

/* "worker-1 0,1;worker-2 3": what ds_rank_hosts() reads. */
static int list_hosts(text *out, const ds_plan *p)
{
    char number[16];
    int rc = 0;

    for (int h = 0; h < p->hosts.count; h++) {
        const ds_host *host = &p->hosts.host[h];

        rc |= add(out, h ? ";" : "") | add(out, host->name);
        for (int s = 0; s < host->slots; s++) {
            snprintf(number, sizeof number, "%c%d", s ? ',' : ' ', host->slot[s]);
            rc |= add(out, number);
        }
    }
    return rc;
}

/* "PORT ADDRESS;ADDRESS…": what side.c reads. */
static int list_addresses(text *out, const ds_plan *p, int port)
{
    char number[16];
    int rc;

    snprintf(number, sizeof number, "%d ", port);
    rc = add(out, number);
    for (int h = 0; h < p->hosts.count; h++)
        rc |= add(out, h ? ";" : "") | add(out, p->places[h].launcher);
    return rc;
}

/* The same for who does not know its number: each address once, or none where there are too many. */
static void list_for_watchers(ds_plan *p, int port)
{
    size_t used = (size_t)snprintf(p->hub, sizeof p->hub, "%d,", port), begin = used;
    char piece[DS_ADDRESS_BYTES + 2];
    int n = 0;

    for (int h = 0; h < p->hosts.count; h++) {
        if (p->places[h].here)
            continue;
        snprintf(piece, sizeof piece, ",%s,", p->places[h].launcher);
        if (strstr(p->hub, piece))
            continue;
        if (++n > DS_WATCH_ADDRESSES || used + strlen(piece) > sizeof p->hub) {
            used = begin;
            break;
        }
        used += (size_t)sprintf(p->hub + used, "%s", piece + 1);
    }
    p->hub[used - 1] = 0; /* the last comma */
}

static int set(ds_plan *p, const char *name, const char *value)
{
    return ds_variables_set(&p->env, name, value, DSRUN);
}

static int set_number(ds_plan *p, const char *name, int value)
{
    char number[16];

    snprintf(number, sizeof number, "%d", value);
    return set(p, name, number);
}

static const char *value_of(const ds_variables *v, const char *name)
{
    const ds_variable *found = ds_variables_find(v, name);

    return found ? found->value : NULL;
}

/* Cores and threads. A rank of this machine is told here, so that it need not start itself anew to
 * have libgomp know (threads.c); others share out the cores of their own machine. */
static int set_threads(ds_plan *p)
{
    const char *list = p->options->value[DS_OPT_bind_core_list];
    const char *given = value_of(&p->env, "OMP_NUM_THREADS");
    int cpu[CPU_SETSIZE], cores = cores_here(), threads, rc = 0;

    unsetenv("DSRUN_CPUS");
    if (list) {
        cores = ds_rank_cpus(cpu, CPU_SETSIZE, list);
        rc = cores < 0 ? cores : set(p, "DSRUN_CPUS", list);
    } else if (p->options->value[DS_OPT_bind_cores_to_rank]) {
        rc = set(p, "DSRUN_CPUS", "all");
    }
    if (rc < 0 || p->network)
        return rc;
    if (value_of(&p->env, "DSRUN_CPUS") && cores < p->ranks)
        return ds_fail(DS_EINVAL, "%d ranks cannot be tied to %d cores, as one has at least one",
                       p->ranks, cores);
    threads = given && atoi(given) > 0 ? atoi(given) : cores / p->ranks;
    threads = threads > 0 ? threads : 1;
    rc = set_number(p, "OMP_NUM_THREADS", threads);
    /* who spins takes the time of who computes */
    if (rc == 0 && threads * p->ranks > cores && !value_of(&p->env, "OMP_WAIT_POLICY"))
        rc = set(p, "OMP_WAIT_POLICY", "passive");
    return rc;
}

/* The shared libraries that were pushed, before those of the user's. */
static int set_libraries(ds_plan *p)
{
    const char *before = value_of(&p->env, "LD_LIBRARY_PATH");
    text all = {0};
    int rc = add(&all, p->there->libraries);

    if (before)
        rc |= add(&all, ":") | add(&all, before);
    rc = rc ? ds_fail(DS_ENOMEM, "out of memory") : set(p, "LD_LIBRARY_PATH", all.data);
    free(all.data);
    return rc;
}

static int set_own(ds_plan *p, int port, const char *token, const char *folder, int restarts)
{
    const char *address = p->options->value[DS_OPT_master_addr];
    const char *master = p->options->value[DS_OPT_master_port];
    text hosts = {0}, side = {0};
    int rc = list_hosts(&hosts, p) || list_addresses(&side, p, port)
                 ? ds_fail(DS_ENOMEM, "out of memory")
                 : 0;

    if (rc == 0)
        rc = set(p, "DSRUN_HOSTS", hosts.data);
    if (rc == 0)
        rc = set(p, "DSRUN_SIDE", side.data);
    free(hosts.data);
    free(side.data);
    if (rc == 0 && p->there->library)
        rc = set(p, "DSRUN_LUA", p->there->library);
    if (rc == 0 && p->there->libraries)
        rc = set_libraries(p);
    if (rc == 0)
        rc = set(p, "DSRUN_JOB", token);
    if (rc == 0)
        rc = set(p, "DSRUN_FOLDER", folder);
    if (rc == 0 && p->devices)
        rc = set(p, "DSRUN_DEVICES", "slots");
    if (rc == 0)
        rc = set_number(p, "DSRUN_RESTARTS", restarts);
    if (rc == 0)
        rc = set(p, "MASTER_ADDR", address ? address : p->places[0].address);
    if (rc == 0)
        rc = set(p, "MASTER_PORT", master ? master : "29500");
    return rc;
}

int ds_plan_finish(ds_plan *p, int port, const char *token, const char *folder, int restarts)
{
    int rc = find_addresses(p, port != 0);

    if (rc < 0)
        return rc;
    find_interface(p);
    list_for_watchers(p, port);
    ds_variables_free(&p->env);
    p->env = (ds_variables){0};
    rc = ds_variables_read(&p->env);
    if (rc == 0)
        rc = ds_variables_inherit(&p->env, environ);
    if (rc == 0)
        rc = set_threads(p);
    return rc < 0 ? rc : set_own(p, port, token, folder, restarts);
}

int ds_plan_apply(const ds_plan *p)
{
    unsetenv("DSRUN_PID");
    unsetenv("DSRUN_DEVICES");
    for (int i = 0; i < p->env.count; i++)
        if (setenv(p->env.each[i].name, p->env.each[i].value, 1) < 0)
            return ds_fail(DS_EINVAL, "%s: cannot set %s", p->env.each[i].from,
                           p->env.each[i].name);
    return 0;
}
