// Work shared out among the caller's threads, in phases.

#ifndef MOETEL_THREADS_H
#define MOETEL_THREADS_H

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <vector>

#include "kernels.h"

namespace moetel {

// Work items 0..items-1, a range for each thread to begin with: neighbours in memory are read by one thread. A thread
// whose range is done goes on with the others', so the caller alone can finish if the pool is busy.
class Phase {
   public:
    Phase(int64_t items, int64_t threads) : ranges_(threads), left_(items) {
        for (int64_t t = 0; t < threads; t++) {
            ranges_[t].next = items * t / threads;
            ranges_[t].end = items * (t + 1) / threads;
        }
    }

    template <typename F>
    void work(int64_t rank, const F &item_of) {
        const int64_t threads = static_cast<int64_t>(ranges_.size());
        for (int64_t i = 0; i < threads; i++) {
            Range &range = ranges_[(rank + i) % threads];
            for (int64_t item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
                item_of(item);
                left_.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    // Only after `work`: what is left has been begun by a running thread.
    void wait() const {
        for (int spins = 0; left_.load(std::memory_order_acquire) > 0; spins++) {
            if (spins < 2000)
                _mm_pause();
            else
                sched_yield();
        }
    }

   private:
    struct alignas(64) Range {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    std::vector<Range> ranges_;
    alignas(64) std::atomic<int64_t> left_;
};

// Threads may begin after the call has returned, so the job is theirs, too. f lives as long as items are left.
template <typename F>
struct Job {
    std::deque<Phase> phases;
    const F &f;
    std::atomic<int64_t> owners;

    static void body(void *state, int64_t rank) {
        Job *job = static_cast<Job *>(state);
        for (size_t p = 0; p < job->phases.size(); p++) {
            job->phases[p].work(rank, [&](int64_t item) { job->f(static_cast<int>(p), item); });
            job->phases[p].wait();
        }
        if (job->owners.fetch_sub(1) == 1) delete job;
    }
};

// f(phase, item) for the items of one phase, then of the next. multiplications: of the whole call; waking a thread costs
// as much time as some ten thousands of them.
template <typename F>
void run(const moetel_threads &threads, int64_t multiplications, std::initializer_list<int64_t> items, const F &f) {
    const int64_t count = std::min({threads.count, multiplications >> 16, std::max(items)});
    if (count <= 1 || !threads.run) {
        int phase = 0;
        for (const int64_t number : items) {
            for (int64_t item = 0; item < number; item++) f(phase, item);
            phase++;
        }
        return;
    }
    auto *job = new Job<F>{{}, f, {count}};
    for (const int64_t number : items) job->phases.emplace_back(number, count);
    threads.run(threads.pool, count, Job<F>::body, job);
}

}  // namespace moetel

#endif
