/* The most f32 operations in a second that this core does: independent fused multiply-adds in registers. */
#include <stdio.h>
#include <time.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define CHAINS 12
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

int main(void) {
    Vector sums[CHAINS], a, b;
    for (int i = 0; i < LANES; ++i) a[i] = 0.999f, b[i] = 0.001f;
    for (int i = 0; i < CHAINS; ++i) sums[i] = b;
    const long rounds = 10000000;
    double best = 0;
    for (int turn = 0; turn < 7; ++turn) {
        const double start = seconds();
        for (long n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * a + b;
        }
        const double rate = 2.0 * LANES * CHAINS * rounds / (seconds() - start);
        if (rate > best) best = rate;
    }
    for (int i = 1; i < CHAINS; ++i) sums[0] += sums[i];
    fprintf(stderr, "%g\n", (double)sums[0][0]);
    printf("%.0f\n", best);
    return 0;
}
