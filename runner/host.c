/* host.c - the Lua state: what is in it, how a script is run, how it ends.
 *
 * C never calls Lua while Lua runs: a script is run from here, and everything else in C is called
 * by it and returns to it. The rules of the state (strict globals, where modules are found, how an
 * error is shown) are policy and stand in lua/ds/boot.lua; this file gives it the facts.
 *
 * os.exit() does not raise, as a pcall would catch that: it jumps back into ds_host_run(), which
 * returns to main(), where the process is closed in order.
 */
#include "runner/host.h"

#include <lauxlib.h>
#include <lua.h>
#include <luajit.h>
#include <lualib.h>

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "kernels/error.h"
#include "runner/cdef.h"
#include "runner/process.h"
#include "runner/side.h"
#include "runner/version.h"

struct ds_host {
    lua_State *L;
    ds_host_config config;
    char executable[PATH_MAX];  /* this program */
    char root[PATH_MAX];        /* the folder that holds ds/ */
    char library[PATH_MAX + 8]; /* what the names of the library's chunks begin with */
    jmp_buf top;                /* where os.exit() goes */
    int running;
    int code; /* os.exit()'s */
};

/* Where the library may lie, from the program's folder: a checkout's build/, an installation, a
 * checkout's build/<name>/. */
static const char *const library_places[] = {"../lua", "../share/dsrun/lua", "../../lua"};

static int holds_library(char *root, const char *folder)
{
    char file[PATH_MAX + 16];

    if (!realpath(folder, root))
        return 0;
    snprintf(file, sizeof file, "%s/ds/boot.lua", root);
    return access(file, R_OK) == 0;
}

int ds_host_find(char *executable, char *root)
{
    const char *given = getenv("DSRUN_LUA");
    char folder[PATH_MAX + 32];
    ssize_t length = readlink("/proc/self/exe", executable, PATH_MAX - 1);
    int up;

    executable[length > 0 ? length : 0] = 0;
    if (given && *given) {
        if (holds_library(root, given))
            return 0;
        return ds_fail(DS_ENOENT,
                       "DSRUN_LUA is %s, but there is no ds/boot.lua in it (unset it to use the "
                       "library beside the program)",
                       given);
    }
    if (length <= 0)
        return ds_fail(DS_ENOENT, "cannot read /proc/self/exe (set DSRUN_LUA to the lua folder)");
    up = (int)(strrchr(executable, '/') - executable);
    for (size_t i = 0; i < sizeof library_places / sizeof *library_places; i++) {
        snprintf(folder, sizeof folder, "%.*s/%s", up, executable, library_places[i]);
        if (holds_library(root, folder))
            return 0;
    }
    return ds_fail(DS_ENOENT,
                   "the Lua library is neither in %.*s/../lua nor in %.*s/../share/dsrun/lua "
                   "(set DSRUN_LUA to its folder)",
                   up, executable, up, executable);
}

/* ---- what Lua is told: the table that require("ds.host") returns */

static void set_string(lua_State *L, const char *key, const char *value)
{
    if (value) {
        lua_pushstring(L, value);
        lua_setfield(L, -2, key);
    }
}

/* Lists of kernel names: unary as { name =, saved = }, the others as strings. */
static void push_kernels(lua_State *L, enum ds_kind kind)
{
    int n = 0;

    lua_newtable(L);
    for (const ds_kernel_entry *k = ds_kernel_list; k->name; k++) {
        if (k->kind != kind)
            continue;
        if (kind == DS_KIND_UNARY) {
            char saved[2] = {k->saved, 0};
            lua_createtable(L, 0, 2);
            set_string(L, "name", k->name);
            set_string(L, "saved", k->saved ? saved : NULL);
        } else {
            lua_pushstring(L, k->name);
        }
        lua_rawseti(L, -2, ++n);
    }
}

/* Told by boot.lua of every trace that the compiler begins. */
static int compiling(lua_State *L)
{
    ds_site_loop(luaL_checkstring(L, 1));
    return 0;
}

static int here(lua_State *L);

static int push_host_table(lua_State *L, const ds_host *host)
{
    static const char *const lists[] = {
        [DS_KIND_UNARY] = "unary",
        [DS_KIND_BINARY] = "binary",
        [DS_KIND_COMPARE] = "compare",
        [DS_KIND_KERNEL] = "kernels",
    };
    size_t bytes;
    char folder[PATH_MAX];
    char *text = ds_cdef(&bytes);

    if (!text)
        return ds_fail(DS_ENOMEM, "out of memory");
    lua_newtable(L);
    lua_pushlstring(L, text, bytes);
    lua_setfield(L, -2, "cdef");
    free(text);
    for (int kind = DS_KIND_UNARY; kind <= DS_KIND_KERNEL; kind++) {
        push_kernels(L, (enum ds_kind)kind);
        lua_setfield(L, -2, lists[kind]);
    }
    set_string(L, "root", host->root);
    set_string(L, "program", host->config.program);
    set_string(L, "executable", host->executable);
    set_string(L, "script", host->config.script);
    set_string(L, "version", ds_version);
    set_string(L, "commit", ds_commit);
    set_string(L, "compiler", ds_compiler);
    set_string(L, "folder", getcwd(folder, sizeof folder));
    lua_pushcfunction(L, compiling);
    lua_setfield(L, -2, "compiling");
    lua_pushlightuserdata(L, (void *)host);
    lua_pushcclosure(L, here, 1);
    lua_setfield(L, -2, "here");
    lua_newtable(L);
    set_string(L, "device", host->config.device);
    if (host->config.seed) {
        lua_pushnumber(L, strtod(host->config.seed, NULL));
        lua_setfield(L, -2, "seed");
    }
    lua_setfield(L, -2, "options");
    return 0;
}

/* arg as the lua program has it: the script is arg[0], its options follow, the program precedes. */
static void push_arguments(lua_State *L, const ds_host_config *config)
{
    lua_createtable(L, config->count, 2);
    lua_pushstring(L, config->script ? config->script : config->program);
    lua_rawseti(L, -2, 0);
    if (config->script) {
        lua_pushstring(L, config->program);
        lua_rawseti(L, -2, -1);
    }
    for (int i = 0; i < config->count; i++) {
        lua_pushstring(L, config->arguments[i]);
        lua_rawseti(L, -2, i + 1);
    }
}

/* ---- the state */

static int os_exit(lua_State *L)
{
    ds_host *host = lua_touserdata(L, lua_upvalueindex(1));

    if (lua_isboolean(L, 1))
        host->code = lua_toboolean(L, 1) ? 0 : 1;
    else
        host->code = (int)luaL_optinteger(L, 1, 0);
    if (!host->running)
        return luaL_error(L, "os.exit: the script has ended already");
    longjmp(host->top, 1);
}

static int preload_host(lua_State *L)
{
    lua_pushvalue(L, lua_upvalueindex(1));
    return 1;
}

/* Runs boot.lua with the host table; what it returns is kept in the registry under the host. */
static int boot(lua_State *L, ds_host *host)
{
    char file[PATH_MAX + 16];
    int rc;

    rc = push_host_table(L, host);
    if (rc < 0)
        return rc;
    lua_getglobal(L, "package");
    lua_getfield(L, -1, "preload");
    lua_pushvalue(L, -3);
    lua_pushcclosure(L, preload_host, 1);
    lua_setfield(L, -2, "ds.host");
    lua_pop(L, 2);
    snprintf(file, sizeof file, "%s/ds/boot.lua", host->root);
    if (luaL_loadfile(L, file))
        return ds_fail(DS_EINVAL, "%s", lua_tostring(L, -1));
    lua_insert(L, -2);
    if (lua_pcall(L, 1, 1, 0))
        return ds_fail(DS_EINVAL, "%s", lua_tostring(L, -1));
    lua_setfield(L, LUA_REGISTRYINDEX, "ds.boot");
    return 0;
}

int ds_host_open(ds_host **out, const ds_host_config *config)
{
    ds_host *host = calloc(1, sizeof *host);
    lua_State *L;
    int rc;

    if (!host)
        return ds_fail(DS_ENOMEM, "out of memory");
    host->config = *config;
    rc = ds_host_find(host->executable, host->root);
    if (rc < 0)
        goto fail;
    snprintf(host->library, sizeof host->library, "@%s/ds/", host->root);
    L = host->L = luaL_newstate();
    if (!L) {
        rc = ds_fail(DS_ENOMEM, "out of memory for a Lua state");
        goto fail;
    }
    luaL_openlibs(L);
    lua_getglobal(L, "os");
    lua_pushlightuserdata(L, host);
    lua_pushcclosure(L, os_exit, 1);
    lua_setfield(L, -2, "exit");
    lua_pop(L, 1);
    push_arguments(L, config);
    lua_setglobal(L, "arg");
    rc = boot(L, host);
    if (rc < 0)
        goto fail;
    *out = host;
    return 0;

fail:
    ds_host_close(host);
    return rc;
}

void ds_host_close(ds_host *host)
{
    if (host && host->L)
        lua_close(host->L);
    free(host);
}

/* ---- running */

static void push_boot(lua_State *L, const char *field)
{
    lua_getfield(L, LUA_REGISTRYINDEX, "ds.boot");
    lua_getfield(L, -1, field);
    lua_remove(L, -2);
}

/* What is to be run: the function that pushes a chunk and its arguments, and what it needs. */
typedef struct task {
    int (*push)(ds_host *host, const struct task *task); /* how many arguments, -1: a message */
    const char *text, *function, *argument;
} task;

static int load_stdin(lua_State *L)
{
    luaL_Buffer buffer;
    size_t length;
    const char *text, *end;

    luaL_buffinit(L, &buffer);
    for (size_t n = 1; n > 0;) {
        n = fread(luaL_prepbuffer(&buffer), 1, LUAL_BUFFERSIZE, stdin);
        luaL_addsize(&buffer, n);
    }
    luaL_pushresult(&buffer);
    text = lua_tolstring(L, -1, &length);
    if (length && *text == '#') { /* keeps the line's end, so that lines keep their numbers */
        end = memchr(text, '\n', length);
        length = end ? length - (size_t)(end - text) : 0;
        text = end ? end : "";
    }
    return luaL_loadbuffer(L, text, length, "@stdin");
}

static int push_script(ds_host *host, const task *task)
{
    lua_State *L = host->L;
    const ds_host_config *config = &host->config;

    if (strcmp(task->text, "-") ? luaL_loadfile(L, task->text) : load_stdin(L))
        return -1;
    push_boot(L, "strict");
    lua_setfenv(L, -2);
    if (!lua_checkstack(L, config->count)) {
        lua_pushliteral(L, "too many arguments");
        return -1;
    }
    for (int i = 0; i < config->count; i++)
        lua_pushstring(L, config->arguments[i]);
    return config->count;
}

static int push_text(ds_host *host, const task *task)
{
    if (luaL_loadbuffer(host->L, task->text, strlen(task->text), "@-e"))
        return -1;
    push_boot(host->L, "eval");
    lua_setfenv(host->L, -2);
    return 0;
}

static int push_call(ds_host *host, const task *task)
{
    push_boot(host->L, "call");
    lua_pushstring(host->L, task->text);
    lua_pushstring(host->L, task->function);
    lua_pushstring(host->L, task->argument); /* NULL makes nil */
    return 3;
}

/* A nil error means "failed, say nothing more": busted ends a failed run so. */
static int show_error(lua_State *L)
{
    const char *message = lua_tostring(L, -1);

    if (!message)
        return 1;
    if (!strcmp(message, "stack overflow")) /* interpreted code: Lua asks no handler */
        message = "stack overflow: does a function call itself without end?";
    ds_side_failed(message);
    return 1;
}

/* boot.lua's handler, unless the stack is full: Lua has a few slots left then, too few for it, and
 * the place is in the message already. */
static int on_error(lua_State *L)
{
    const char *message = lua_tostring(L, 1);

    if (message && strstr(message, "stack overflow"))
        return 1;
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    lua_call(L, 1, 1);
    return 1;
}

static int run(ds_host *host, const task *task)
{
    lua_State *L = host->L;
    int handler, count, code = 0;

    push_boot(L, "handler");
    lua_pushcclosure(L, on_error, 1);
    handler = lua_gettop(L);
    count = task->push(host, task);
    if (count < 0 || lua_pcall(L, count, 0, handler))
        code = show_error(L);
    lua_settop(L, handler - 1);
    return code;
}

/* Nothing of this frame but `host`, `exited` and the return value is used after the jump. */
static int run_to_end(ds_host *host, const task *task, int *exited)
{
    *exited = 0;
    host->running = 1;
    if (setjmp(host->top) == 0) {
        int code = run(host, task);
        host->running = 0;
        return code;
    }
    *exited = 1;
    host->running = 0;
    return host->code;
}

int ds_host_script(ds_host *host, int *exited)
{
    const task script = {.push = push_script, .text = host->config.script};

    struct stat s;

    if (strcmp(script.text, "-")) {
        if (stat(script.text, &s) == 0 && S_ISDIR(s.st_mode))
            return ds_fail(DS_ENOENT, "cannot read the script %s: it is a folder", script.text);
        if (access(script.text, R_OK) < 0)
            return ds_fail(DS_ENOENT, "cannot read the script %s: %s", script.text,
                           strerror(errno));
    }
    return run_to_end(host, &script, exited);
}

int ds_host_eval(ds_host *host, const char *text, int *exited)
{
    const task eval = {.push = push_text, .text = text};

    return run_to_end(host, &eval, exited);
}

static int push_end(ds_host *host, const task *task)
{
    push_boot(host->L, "finish");
    lua_pushboolean(host->L, task->text != NULL);
    return 1;
}

int ds_host_end(ds_host *host, int code)
{
    int well = code == 0 || code == 128 + ds_signal_pending(), exited, failed;
    const task end = {.push = push_end, .text = well ? "" : NULL};

    failed = run_to_end(host, &end, &exited);
    return failed && well ? failed : code;
}

int ds_host_call(ds_host *host, const char *module, const char *function, const char *argument,
                 int *exited)
{
    const task call = {push_call, module, function, argument};

    return run_to_end(host, &call, exited);
}

/* ---- where the script is: LuaJIT's profiler, without its timer
 *
 * Its hook is what reaches into compiled code: with mode "f" a trace looks for it wherever it
 * enters or leaves a function. (Mode "l", at every line, made small loops 1.4 to 3 times slower;
 * "f" measured nothing.) The profiler's own timer is switched off, as an armed one makes os.clock()
 * tick in steps of 4 ms. SIGPROF is sent by the handler of SIGUSR2 instead, to the thread that runs
 * Lua.
 */

static pthread_t lua_thread;

static void ask_lua(void)
{
    pthread_kill(lua_thread, SIGPROF);
}

/* Up to four frames of the user's: "train.lua:12, called from train.lua:30"; "" if there is none. */
static void find_site(char *text, size_t bytes, const ds_host *host, lua_State *L)
{
    size_t used = 0;
    int shown = 0;
    lua_Debug frame;

    *text = 0;
    for (int level = 0; shown < 4 && lua_getstack(L, level, &frame); level++) {
        lua_getinfo(L, "Sl", &frame);
        if (frame.currentline <= 0 || *frame.source != '@' ||
            !strncmp(frame.source, host->library, strlen(host->library)))
            continue;
        used +=
            (size_t)snprintf(text + used, bytes - used, "%s%s:%d", shown++ ? ", called from " : "",
                             frame.source + 1, frame.currentline);
        if (used >= bytes - 1)
            break;
    }
}

static void on_sample(void *data, lua_State *L, int samples, int state)
{
    char text[512];

    (void)samples;
    (void)state;
    find_site(text, sizeof text, data, L);
    ds_site_answer(*text ? text : "the library's own code");
}

/* For library code that is about to wait for others: notes the user's line exactly, where samples
 * are up to a second old. */
static int here(lua_State *L)
{
    char text[512];

    find_site(text, sizeof text, lua_touserdata(L, lua_upvalueindex(1)), L);
    if (*text)
        ds_site_note(text);
    return 0;
}

int ds_host_watch(ds_host *host)
{
    const struct itimerval off = {{0, 0}, {0, 0}};
    struct sigaction ignore = {.sa_handler = SIG_IGN};

    lua_thread = pthread_self();
    sigaction(SIGPROF, &ignore, NULL); /* what stopping the profiler goes back to */
    luaJIT_profile_start(host->L, "fi1000", on_sample, host);
    ds_signal_off_stack(SIGPROF);
    setitimer(ITIMER_PROF, &off, NULL);
    push_boot(host->L, "watch");
    lua_call(host->L, 0, 0);
    return ds_site_watch(ask_lua);
}
