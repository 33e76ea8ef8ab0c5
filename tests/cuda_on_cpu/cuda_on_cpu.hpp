// Executes CUDA kernels on the CPU, so that the tests can run the .cu files without a GPU.
//
// Every CUDA thread of a block is a fiber: a stack of its own, switched to by hand. One fiber runs
// at a time, until it returns or waits at a barrier; when none can run, the barriers that all
// their threads have reached are opened. Blocks run one after another. The order in which blocks
// and threads take their turns is chosen by the test (forward, backward, shuffled), so that a
// result that depends on it, such as with a missing barrier, differs between the orders.
//
// What it cannot show: races inside one barrier-free stretch that each order happens to hide,
// memory ordering between blocks, code that relies on a warp running in lockstep, flushed
// subnormals, fused multiply-add, speed. Not provided: dynamic shared memory, partial warp masks,
// textures, cooperative groups.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_cpu {

constexpr unsigned warp_size = 32;
constexpr unsigned max_block_threads = 1024;
constexpr std::size_t page_bytes = 4096, stack_bytes = 64 * 1024;

enum class State { ready, at_block_barrier, at_warp_barrier, returned };

struct Fiber {
    ucontext_t context;
    dim3 thread;
    unsigned rank;     // in the block, x fastest
    State state;
    int barrier_line;  // where it waits, in the source
    void* stack = std::aligned_alloc(page_bytes, stack_bytes);  // kept and reused by later blocks
};

inline dim3 grid_dim, block_dim, block;
inline Fiber fibers[max_block_threads];
inline unsigned n_fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline void (*kernel)();
inline std::uint64_t exchanged[max_block_threads];  // what each thread shows to its warp
inline char error[256];

// Adds to the error and returns false.
template <class... A> bool fail(const char* format, A... values)
{
    const std::size_t used = std::strlen(error);
    std::snprintf(error + used, sizeof error - used, format, values...);
    return false;
}

inline unsigned size(dim3 d) { return d.x * d.y * d.z; }

inline dim3 unrank(unsigned i, dim3 d) { return {i % d.x, i / d.x % d.y, i / (d.x * d.y)}; }

inline unsigned count(State state)
{
    unsigned n = 0;
    for (unsigned i = 0; i < n_fibers; ++i) n += fibers[i].state == state;
    return n;
}

// The order of turns: 0 forward, 1 backward, else shuffled anew each time, with this seed.
class Turns {
  public:
    explicit Turns(unsigned order) : order_(order), random_(order) {}

    std::vector<unsigned> next(unsigned n)
    {
        std::vector<unsigned> turns(n);
        for (unsigned i = 0; i < n; ++i) turns[i] = order_ == 1 ? n - 1 - i : i;
        if (order_ > 1)
            for (unsigned i = n; i > 1; --i) std::swap(turns[i - 1], turns[random() % i]);
        return turns;
    }

  private:
    unsigned random()  // xorshift, Marsaglia 2003, J. Stat. Softw. 8:14
    {
        random_ ^= random_ << 13;
        random_ ^= random_ >> 17;
        random_ ^= random_ << 5;
        return random_;
    }

    unsigned order_, random_;
};

// Called by a fiber: hands control back until the barrier opens.
inline void wait(State state, int line)
{
    Fiber* self = running;
    self->state = state;
    self->barrier_line = line;
    swapcontext(&self->context, &scheduler);
}

template <class T> T exchange(T value, unsigned source, int line)
{
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::memcpy(&exchanged[running->rank], &value, sizeof(T));
    wait(State::at_warp_barrier, line);  // until all have written
    std::memcpy(&value, &exchanged[source], sizeof(T));
    wait(State::at_warp_barrier, line);  // until all have read
    return value;
}

inline void start_fibers()
{
    n_fibers = size(block_dim);
    for (unsigned i = 0; i < n_fibers; ++i) {
        Fiber& f = fibers[i];
        f.thread = unrank(i, block_dim);
        f.rank = i;
        f.state = State::ready;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack;
        f.context.uc_stack.ss_size = stack_bytes;
        f.context.uc_link = &scheduler;
        void (*entry)() = [] {
            kernel();
            running->state = State::returned;
        };
        makecontext(&f.context, entry, 0);
    }
}

inline bool run_ready_fibers(Turns& turns)
{
    bool any = false;
    for (unsigned i : turns.next(n_fibers)) {
        if (fibers[i].state != State::ready) continue;
        running = &fibers[i];
        swapcontext(&scheduler, &running->context);
        any = true;
    }
    return any;
}

// Opens the barrier at which fibers first to last wait, if none of them is elsewhere.
inline bool open_barrier(State barrier, unsigned first, unsigned last)
{
    bool waiting = false;
    for (unsigned i = first; i < last; ++i) {
        if (fibers[i].state != barrier && fibers[i].state != State::returned) return false;
        waiting |= fibers[i].state == barrier;
    }
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].state == barrier) fibers[i].state = State::ready;
    return waiting;
}

// The block barrier is the whole block's: nobody may have returned, or wait at another line.
inline bool block_barrier_is_divergent()
{
    const unsigned waiting = count(State::at_block_barrier), returned = count(State::returned);
    if (!waiting || waiting + returned < n_fibers) return false;
    if (returned) return !fail("%u threads returned while %u wait at __syncthreads()", returned, waiting);
    const int line = fibers[0].barrier_line;
    for (unsigned i = 1; i < n_fibers; ++i)
        if (const int other = fibers[i].barrier_line; other != line)
            return !fail("threads wait at different __syncthreads(), lines %d and %d", line, other);
    return false;
}

inline bool run_block(Turns& turns)
{
    start_fibers();
    for (;;) {
        bool moved = run_ready_fibers(turns);
        if (count(State::returned) == n_fibers) return true;
        for (unsigned w = 0; w < n_fibers; w += warp_size)
            moved |= open_barrier(State::at_warp_barrier, w, n_fibers < w + warp_size ? n_fibers : w + warp_size);
        if (block_barrier_is_divergent()) return false;
        moved |= open_barrier(State::at_block_barrier, 0, n_fibers);
        if (!moved)
            return fail("deadlock: %u threads at __syncthreads(), %u at a warp operation, %u returned",
                        count(State::at_block_barrier), count(State::at_warp_barrier), count(State::returned));
    }
}

// Returns whether all went well; if not, error says what did not.
inline bool run_grid(dim3 grid, dim3 threads, unsigned order)
{
    grid_dim = grid;
    block_dim = threads;
    error[0] = 0;
    if (!size(grid) || !size(threads) || size(threads) > max_block_threads)
        return fail("grid and block must not be empty, and a block has at most 1024 threads");
    Turns turns(order);
    for (unsigned i : turns.next(size(grid))) {
        block = unrank(i, grid);
        if (!run_block(turns)) return fail(", in block (%u,%u,%u)", block.x, block.y, block.z);
    }
    return true;
}

// Appends a parameter's type as NumPy writes it: f4, i4, i8, ...; a pointer's with a P before it.
template <class T> void append_type(char* codes)
{
    using Value = std::remove_cv_t<std::remove_pointer_t<T>>;
    const char kind = std::is_floating_point_v<Value> ? 'f' : std::is_signed_v<Value> ? 'i' : 'u';
    std::sprintf(codes + std::strlen(codes), std::is_pointer_v<T> ? "P%c%zu " : "%c%zu ", kind, sizeof(Value));
}

template <class... A> const char* signature(void (*)(A...))
{
    static char codes[8 * sizeof...(A) + 1];
    codes[0] = 0;
    (append_type<A>(codes), ...);
    return codes;
}

// A kernel with its parameters, called by every fiber.
template <class... A> struct Call {
    inline static void (*function)(A...);
    inline static std::tuple<A...>* values;
    static void run() { std::apply(function, *values); }
};

template <class... A, std::size_t... I>
const char* launch(void (*function)(A...), const unsigned* grid, const unsigned* threads, void** parameters,
                   unsigned order, std::index_sequence<I...>)
{
    std::tuple<A...> values{*static_cast<A*>(parameters[I])...};
    Call<A...>::function = function;
    Call<A...>::values = &values;
    kernel = Call<A...>::run;
    const bool fine = run_grid({grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]}, order);
    return fine ? nullptr : error;
}

template <class... A>
const char* launch(void (*function)(A...), const unsigned* grid, const unsigned* threads, void** parameters,
                   unsigned order)
{
    return launch(function, grid, threads, parameters, order, std::index_sequence_for<A...>{});
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::running->thread)
#define blockIdx (cuda_on_cpu::block)
#define blockDim (cuda_on_cpu::block_dim)
#define gridDim (cuda_on_cpu::grid_dim)

#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier, __LINE__)
#define __syncwarp(...) cuda_on_cpu::wait(cuda_on_cpu::State::at_warp_barrier, __LINE__)

inline void __threadfence() {}  // blocks run one after another

// As on a GPU, a lane whose source would lie outside the warp gets its own value.
template <class T> T __shfl_down_sync(unsigned, T value, unsigned delta)
{
    const unsigned rank = cuda_on_cpu::running->rank;
    const bool inside = rank % cuda_on_cpu::warp_size + delta < cuda_on_cpu::warp_size;
    return cuda_on_cpu::exchange(value, inside ? rank + delta : rank, __LINE__);
}

template <class T> T __shfl_xor_sync(unsigned, T value, unsigned mask)
{
    return cuda_on_cpu::exchange(value, cuda_on_cpu::running->rank ^ mask % cuda_on_cpu::warp_size, __LINE__);
}

template <class T> T atomicAdd(T* address, T value)
{
    const T old = *address;  // no other fiber runs meanwhile
    *address += value;
    return old;
}

// What the Python side loads: one pair of functions a kernel.
#define CUDA_ON_CPU_EXPORT(name)                                                                            \
    extern "C" const char* name##_signature() { return cuda_on_cpu::signature(&name); }                    \
    extern "C" const char* name##_launch(const unsigned* grid, const unsigned* threads, void** parameters, \
                                         unsigned order)                                                   \
    {                                                                                                      \
        return cuda_on_cpu::launch(&name, grid, threads, parameters, order);                               \
    }
