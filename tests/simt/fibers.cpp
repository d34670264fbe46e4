/* fibers.cpp - runs a kernel's blocks, one after the other, its threads as fibers.
 *
 * DS_SIMT_BACKWARDS set: the last block and the last thread come first. What depends on who comes
 * first shows.
 */
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

#ifdef __has_feature
#if __has_feature(address_sanitizer) && !defined __SANITIZE_ADDRESS__
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt
{

place now;

namespace
{

#ifdef __SANITIZE_ADDRESS__
const size_t STACK = 1 << 20; /* what surrounds its variables takes more */
#else
const size_t STACK = 256 << 10;
#endif
const size_t MOST_THREADS = 1024;

/* A stack, as the address sanitizer has to know of it: whose frames are whose, and where it ends. */
struct stack {
    const void *bottom;
    size_t bytes;
    void *frames; /* the sanitizer's own, while another stack is in use */
};

#ifdef __SANITIZE_ADDRESS__
/* Before another stack is in use; `of` NULL: this one is not used again. */
void leave(stack *of, const stack *to)
{
    __sanitizer_start_switch_fiber(of ? &of->frames : NULL, to->bottom, to->bytes);
}
/* When a stack is in use again, or (`of` NULL) for the first time; *last: the one before. */
void arrive(const stack *of, stack *last)
{
    __sanitizer_finish_switch_fiber(of ? of->frames : NULL, last ? &last->bottom : NULL,
                                    last ? &last->bytes : NULL);
}
void forbid(const void *data, size_t bytes)
{
    ASAN_POISON_MEMORY_REGION(data, bytes);
}
void allow(const void *data, size_t bytes)
{
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
}
#else
void leave(stack *, const stack *)
{
}
void arrive(const stack *, stack *)
{
}
void forbid(const void *, size_t)
{
}
void allow(const void *, size_t)
{
}
#endif

#ifdef __x86_64__
/* Saves what a call must keep, and goes on with another stack: some 20 ns, where swapcontext() asks
 * the system. */
extern "C" void simt_switch(void **from, void *to);
__asm__(".text\n"
        ".type simt_switch,@function\n"
        "simt_switch:\n"
        "  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "  mov %rsp, (%rdi)\n"
        "  mov %rsi, %rsp\n"
        "  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n"
        "  ret\n");
struct context {
    void *stack_pointer;
    struct stack stack;
};
static void jump(context *from, context *to)
{
    simt_switch(&from->stack_pointer, to->stack_pointer);
}
static void prepare(context *c, char *stack, void (*entry)())
{
    void **top = (void **)(stack + STACK);

    *--top = NULL; /* so that the entry's stack is aligned as after a call */
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    c->stack_pointer = top;
}
#else
struct context {
    ucontext_t c;
    struct stack stack;
};
static void jump(context *from, context *to)
{
    swapcontext(&from->c, &to->c);
}
static void prepare(context *c, char *stack, void (*entry)())
{
    getcontext(&c->c);
    c->c.uc_stack.ss_sp = stack;
    c->c.uc_stack.ss_size = STACK;
    c->c.uc_link = NULL;
    makecontext(&c->c, entry, 0);
}
#endif

static void go(context *from, context *to)
{
    leave(&from->stack, &to->stack);
    jump(from, to);
    arrive(&from->stack, NULL);
}

enum state { READY, AT_BARRIER, IN_WARP, DONE };

struct transfer {
    void *to;
    const void *from; /* NULL: zeros */
    int bytes;
};

struct fiber {
    context at;
    state is;
    uint3 thread;
    int votes;                                 /* of the block's vote under way */
    std::vector<std::vector<transfer>> copies; /* asynchronous ones, by groups; the last is open */
};

struct warp {
    unsigned present; /* lanes that are not done */
    unsigned arrived; /* at the operation under way */
    unsigned mask;
    unsigned generation;
    uint64_t value[2][32];
};

struct {
    const char *name;
    std::function<void()> *body;
    char *stacks;
    context scheduler;
    fiber fibers[MOST_THREADS];
    warp warps[MOST_THREADS / 32];
    int threads, current, alive, at_barrier;
    unsigned barriers; /* generation */
    int vote[3], vote_result[2][3];
    std::vector<char> shared;
    bool moved, backwards;
} b;

[[noreturn]] void wrong(const char *what)
{
    fprintf(stderr, "simt: %s: thread %d of block %u: %s\n", b.name, b.current, now.block.x, what);
    abort();
}

void yield()
{
    int me = b.current;
    place mine = now;

    go(&b.fibers[me].at, &b.scheduler);
    now = mine;
    b.current = me;
}

void entry()
{
    arrive(NULL, &b.scheduler.stack);
    (*b.body)();
    fiber &f = b.fibers[b.current];

    f.is = DONE;
    b.alive--;
    b.moved = true;
    warp &w = b.warps[b.current / 32];
    w.present &= ~(1u << b.current % 32);
    if (w.arrived && (w.mask & ~w.present & ~w.arrived))
        wrong("ended while lanes of its warp wait for it");
    leave(NULL, &b.scheduler.stack);
    jump(&f.at, &b.scheduler);
}

void run_block()
{
    b.alive = b.threads;
    b.at_barrier = 0;
    for (int i = 0; i < b.threads; i++) {
        fiber &f = b.fibers[i];

        f.is = READY;
        f.copies.clear();
        f.thread.x = (unsigned)i % now.threads.x;
        f.thread.y = (unsigned)i / now.threads.x % now.threads.y;
        f.thread.z = (unsigned)i / now.threads.x / now.threads.y;
        prepare(&f.at, b.stacks + (size_t)i * STACK, entry);
        f.at.stack = {b.stacks + (size_t)i * STACK, STACK, NULL};
    }
    for (int i = 0; i < (b.threads + 31) / 32; i++) {
        int lanes = b.threads - i * 32 < 32 ? b.threads - i * 32 : 32;

        b.warps[i] = warp();
        b.warps[i].present = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    }
    while (b.alive) {
        b.moved = false;
        for (int n = 0; n < b.threads; n++) {
            int i = b.backwards ? b.threads - 1 - n : n;
            fiber &f = b.fibers[i];

            if (f.is == DONE)
                continue;
            b.current = i;
            now.thread = f.thread;
            go(&b.scheduler, &f.at);
        }
        if (!b.moved)
            wrong(
                "the block waits for ever: some threads are at a barrier that others do not reach");
    }
}

} // namespace

void launch_now(const char *name, dim3 grid, dim3 block, size_t shared, std::function<void()> body)
{
    size_t threads = (size_t)block.x * block.y * block.z;

    b.name = name;
    b.current = 0;
    if (threads < 1 || threads > MOST_THREADS || !grid.x || !grid.y || !grid.z || block.z > 64)
        wrong("a block has 1 to 1024 threads, and a grid some blocks");
    if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff)
        wrong("the grid is too large");
    if (shared > 227 << 10)
        wrong("too much shared memory");
    if (!b.stacks)
        b.stacks = (char *)mmap(NULL, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    b.threads = (int)threads;
    b.body = &body;
    b.shared.assign(shared + 128, (char)0xff); /* whatever was there: NaN */
    b.backwards = getenv("DS_SIMT_BACKWARDS") != NULL;
    now.threads = block;
    now.blocks = grid;
    uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    char *end = (char *)dynamic_shared() + shared;
    for (uint64_t n = 0; n < blocks; n++) {
        uint64_t i = b.backwards ? blocks - 1 - n : n;

        now.block.x = (unsigned)(i % grid.x);
        now.block.y = (unsigned)(i / grid.x % grid.y);
        now.block.z = (unsigned)(i / grid.x / grid.y);
        memset(b.shared.data(), 0xff, b.shared.size());
        forbid(end, (size_t)(b.shared.data() + b.shared.size() - end));
        run_block();
        allow(b.shared.data(), b.shared.size());
    }
}

void *dynamic_shared()
{
    return (void *)(((uintptr_t)b.shared.data() + 127) & ~(uintptr_t)127);
}

/* What the host reads anyway, and a GPU does not. */
void must_align(const void *p, size_t bytes)
{
    if ((uintptr_t)p % bytes)
        wrong("a load or store is not aligned");
}

/* Until all threads that are not done are here. */
void block_barrier()
{
    unsigned mine = b.barriers;

    b.moved = true;
    b.at_barrier++;
    while (b.barriers == mine) {
        if (b.at_barrier >= b.alive) {
            b.at_barrier = 0;
            b.barriers++;
            memcpy(b.vote_result[mine & 1], b.vote, sizeof b.vote);
            b.vote[0] = 0, b.vote[1] = 0, b.vote[2] = 0;
            b.moved = true;
            break;
        }
        yield();
    }
}

int block_vote(int kind, int predicate)
{
    unsigned mine = b.barriers;

    b.vote[0] |= predicate != 0;
    b.vote[1] |= predicate == 0;
    b.vote[2] += predicate != 0;
    block_barrier();
    return kind == 1 ? !b.vote_result[mine & 1][1] : b.vote_result[mine & 1][kind];
}

namespace
{

/* All lanes of the mask come here; values of two rounds are kept, as a fast lane may be one ahead. */
warp &meet(unsigned mask, uint64_t value, unsigned *round)
{
    warp &w = b.warps[b.current / 32];
    int lane = b.current % 32;

    if (!(mask >> lane & 1))
        wrong("a lane is not in its own mask");
    if (mask & ~w.present) {
        unsigned all = b.threads - b.current / 32 * 32 >= 32 ? 0xffffffffu : 0;
        if (all || (mask & ~w.present & ((1u << b.threads % 32) - 1)))
            wrong("a warp operation wants lanes that are done");
    }
    mask &= w.present;
    if (w.arrived && w.mask != mask)
        wrong("lanes of a warp are at operations with different masks");
    w.mask = mask;
    *round = w.generation;
    w.value[w.generation & 1][lane] = value;
    w.arrived |= 1u << lane;
    b.moved = true;
    while (w.generation == *round) {
        if (w.arrived == mask) {
            w.arrived = 0;
            w.generation++;
            break;
        }
        yield();
    }
    return w;
}

} // namespace

uint64_t exchange(unsigned mask, uint64_t value, int from)
{
    unsigned round;
    warp &w = meet(mask, value, &round);

    return w.value[round & 1][from & 31];
}

void gather(unsigned mask, uint64_t value, uint64_t all[32])
{
    unsigned round;
    warp &w = meet(mask, value, &round);

    memcpy(all, w.value[round & 1], sizeof w.value[0]);
}

void async_copy(void *to, const void *from, int whole, int bytes)
{
    fiber &f = b.fibers[b.current];

    if (bytes && ((uintptr_t)from % (uintptr_t)whole || (uintptr_t)to % (uintptr_t)whole))
        wrong("an asynchronous copy is not aligned");
    if (f.copies.empty())
        f.copies.emplace_back();
    f.copies.back().push_back({to, bytes ? from : NULL, whole});
}

void async_commit()
{
    fiber &f = b.fibers[b.current];

    if (f.copies.empty())
        f.copies.emplace_back();
    f.copies.emplace_back();
}

void async_wait(int pending)
{
    fiber &f = b.fibers[b.current];

    while ((int)f.copies.size() > pending + 1) {
        for (const transfer &t : f.copies.front())
            if (t.from)
                memcpy(t.to, t.from, (size_t)t.bytes);
            else
                memset(t.to, 0, (size_t)t.bytes);
        f.copies.erase(f.copies.begin());
    }
}

void warp_barrier(unsigned mask)
{
    unsigned round;

    meet(mask, 0, &round);
}

unsigned ballot(unsigned mask, int predicate)
{
    unsigned round, bits = 0;
    warp &w = meet(mask, predicate != 0, &round);

    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            bits |= (unsigned)(w.value[round & 1][i] != 0) << i;
    return bits;
}

} // namespace simt
