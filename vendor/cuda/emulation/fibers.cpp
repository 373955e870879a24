// Runs the threads of a block as fibers.
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda.h"
#include "state.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned LANES = 32;

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack and the stack pointer in `from`, then resumes the stack `to`.
extern "C" void detox_switch_stack(void** from, void* to);
asm(R"(
.text
.globl detox_switch_stack
.hidden detox_switch_stack
.type detox_switch_stack, @function
detox_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size detox_switch_stack, .-detox_switch_stack
)");
#endif

enum class State { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, DONE };

struct Fiber {
    char* stack = nullptr;
#if defined(__x86_64__)
    void* at = nullptr;
#else
    ucontext_t context;
#endif
    State state = State::DONE;
    dim3 index;
    unsigned linear = 0;
    // Exchanges so far. They alternate between two sets of slots, so that no lane overwrites a value before it is read.
    unsigned n_exchanges = 0;
};

struct Warp {
    uint64_t slots[2][LANES];
};

// State of the running kernel. One lock protects it, because `threadIdx` and the like are global variables.
std::mutex turn;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
float* shared = nullptr;
#if defined(__x86_64__)
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif
#ifdef WITH_ADDRESS_SANITIZER
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
#endif

[[noreturn]] void stop(const char* what) {
    std::fprintf(stderr, "the emulated GPU found a bug in a kernel: %s\n", what);
    std::abort();
}

// Switches from a fiber to the scheduler. `for_good`: the fiber is done.
void leave(Fiber& fiber, bool for_good) {
#ifdef WITH_ADDRESS_SANITIZER
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_bottom, scheduler_size);
#else
    (void)for_good;
#endif
#if defined(__x86_64__)
    detox_switch_stack(&fiber.at, scheduler);
#else
    swapcontext(&fiber.context, &scheduler);
#endif
#ifdef WITH_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

void enter() {
#ifdef WITH_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    Fiber& fiber = *running;
    (*body)();
    fiber.state = State::DONE;
    leave(fiber, true);
    std::abort();
}

void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) stop("out of memory for its stacks");
        fiber.stack = (char*)stack;
    }
#if defined(__x86_64__)
    // The stack as after a call: six registers, then the return address; the address above it is a multiple of 16.
    void** top = (void**)(fiber.stack + STACK_BYTES - 64);
    top[6] = (void*)&enter;
    top[7] = nullptr;
    for (int i = 0; i < 6; i++) top[i] = nullptr;
    fiber.at = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
#endif
    fiber.n_exchanges = 0;
    fiber.state = State::RUNS;
}

// Switches from the scheduler to a fiber. Returns when the fiber waits or is done.
void resume(Fiber& fiber) {
    running = &fiber;
    threadIdx = fiber.index;
#ifdef WITH_ADDRESS_SANITIZER
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, STACK_BYTES);
#endif
#if defined(__x86_64__)
    detox_switch_stack(&scheduler, fiber.at);
#else
    swapcontext(&scheduler, &fiber.context);
#endif
#ifdef WITH_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    running = nullptr;
}

// Lets fibers continue if their whole warp or block has reached the point where they wait. Returns whether any can.
bool release_waiting(unsigned n) {
    bool any = false;
    for (unsigned first = 0; first < n; first += LANES) {
        unsigned end = first + LANES < n ? first + LANES : n, n_waiting = 0;
        for (unsigned i = first; i < end; i++) n_waiting += fibers[i].state == State::WAITS_FOR_WARP;
        if (n_waiting == 0) continue;
        if (n_waiting < end - first) {
            bool others_wait_elsewhere = true;
            for (unsigned i = first; i < end; i++) others_wait_elsewhere &= fibers[i].state != State::RUNS;
            if (others_wait_elsewhere) stop("only some lanes of a warp take part in an exchange");
            continue;
        }
        for (unsigned i = first; i < end; i++) fibers[i].state = State::RUNS;
        any = true;
    }
    unsigned n_waiting = 0;
    for (unsigned i = 0; i < n; i++) n_waiting += fibers[i].state == State::WAITS_FOR_BLOCK;
    if (n_waiting == n) {
        for (unsigned i = 0; i < n; i++) fibers[i].state = State::RUNS;
        any = true;
    }
    return any;
}

void run_block(unsigned n, bool reverse) {
    for (unsigned i = 0; i < n; i++) {
        Fiber& fiber = fibers[i];
        fiber.linear = i;
        fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        prepare(fiber);
    }
    for (;;) {
        for (unsigned i = 0; i < n; i++) {
            Fiber& fiber = fibers[reverse ? n - 1 - i : i];
            if (fiber.state == State::RUNS) resume(fiber);
        }
        if (release_waiting(n)) continue;
        for (unsigned i = 0; i < n; i++)
            if (fibers[i].state != State::DONE)
                stop("threads wait at a barrier that other threads of the block never reach");
        return;
    }
}

} // namespace

namespace emulation {

float* shared_memory() { return shared; }

void wait_for_block() {
    running->state = State::WAITS_FOR_BLOCK;
    leave(*running, false);
}

uint64_t exchange(uint64_t bytes, int mask) {
    Fiber& fiber = *running;
    Warp& warp = warps[fiber.linear / LANES];
    unsigned lane = fiber.linear % LANES, other = lane ^ (unsigned)mask, phase = fiber.n_exchanges++ % 2;
    if (other >= LANES) stop("an exchange with a lane that does not exist");
    warp.slots[phase][lane] = bytes;
    fiber.state = State::WAITS_FOR_WARP;
    leave(fiber, false);
    return warp.slots[phase][other];
}

void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    if (cudaError_t error = launch_error(); error != cudaSuccess) return fail(error);
    std::lock_guard<std::mutex> lock(turn);
    unsigned n = block.x * block.y * block.z;
    bool fits = n > 0 && n <= 1024 && grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu &&
                grid.y <= 65535 && grid.z <= 65535 && shared_bytes <= allowed_shared_bytes(kernel);
    if (!fits) return fail(cudaErrorInvalidConfiguration);
    count_launch();
    if (fibers.size() < n) fibers.resize(n);
    if (warps.size() < (n + LANES - 1) / LANES) warps.resize((n + LANES - 1) / LANES);
    body = &thread;
    blockDim = block;
    gridDim = grid;
    bool reverse = runs_in_reverse();
    uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < n_blocks; i++) {
        uint64_t at = reverse ? n_blocks - 1 - i : i;
        blockIdx = dim3((unsigned)(at % grid.x), (unsigned)(at / grid.x % grid.y), (unsigned)(at / grid.x / grid.y));
        // On the heap, so that AddressSanitizer finds reads beyond its end. Filled with NaN until it is written.
        std::unique_ptr<char[]> memory(new char[shared_bytes + 1]);
        std::memset(memory.get(), 0xff, shared_bytes);
        shared = (float*)memory.get();
        run_block(n, reverse);
    }
    shared = nullptr;
    body = nullptr;
}

} // namespace emulation
