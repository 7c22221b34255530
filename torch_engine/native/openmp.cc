// The threads that torch has: moetel_threads.run through OpenMP. Linked without a runtime of its own, so that the calls
// resolve to the one that torch has loaded.

#include <omp.h>

#include <cstdint>

extern "C" void moetel_openmp(void *, int64_t threads, void (*body)(void *state, int64_t rank), void *state) {
#pragma omp parallel num_threads(static_cast <int>(threads))
    for (int64_t rank = omp_get_thread_num(); rank < threads; rank += omp_get_num_threads()) body(state, rank);
}
