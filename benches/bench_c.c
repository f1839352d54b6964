/* What a call of the C library costs, and vmix_mix_values() against memcpy: `make bench-c`.
 *
 * Calls: nanoseconds each, the median of 15 runs. Mixing: for the values of one layer, how many
 * times as long as copying them with memcpy takes, the two interleaved, medians of 101 runs. Mixing
 * reads v and V_a and writes v, memcpy reads one buffer and writes another: at equal bandwidth the
 * ratio is 1 where V_a stays in cache, as it does in a batch, and 1.5 where it does not. */
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmix.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *times, int count) {
    qsort(times, (size_t)count, sizeof *times, ascending);
    return times[count / 2];
}

#define CALLS 20000
#define TIME_CALL(name, call)                                          \
    do {                                                               \
        double times[15];                                              \
        for (int run = 0; run < 15; ++run) {                           \
            double start = now();                                      \
            for (int i = 0; i < CALLS; ++i)                            \
                (void)(call);                                          \
            times[run] = (now() - start) / CALLS;                      \
        }                                                              \
        printf("%-44s %8.1f ns\n", name, median(times, 15));           \
    } while (0)

static void mixing(int64_t batch, int64_t width, VmixDType dtype, VmixDType aes_dtype,
                   const char *name) {
    enum { RUNS = 101, TOKENS = 77 };
    const size_t size = dtype == VMIX_DTYPE_F32 ? 4 : 2;
    const size_t bytes = (size_t)(batch * TOKENS * width) * size;
    char *v = calloc(bytes, 1), *copy = calloc(bytes, 1), *a = calloc(TOKENS * (size_t)width, 4);
    if (v == NULL || copy == NULL || a == NULL)
        abort();
    memset(a, 1, TOKENS * (size_t)width * 4); /* small numbers, in memory of its own */
    VmixViewMut value = vmix_view_mut(v, dtype, batch, TOKENS, 1, width);
    VmixView aes = vmix_view(a, aes_dtype, 1, TOKENS, 1, width);
    const float strength = 0.5f;
    VmixMixParams params = {sizeof params, &value, &aes, &strength, 1};
    double mix[RUNS], move[RUNS];
    for (int run = 0; run < RUNS; ++run) {
        double start = now();
        if (vmix_mix_values(&params) != VMIX_STATUS_OK)
            abort();
        double middle = now();
        memcpy(copy, v, bytes);
        mix[run] = middle - start, move[run] = now() - middle;
        v[run % (int)bytes] = copy[run * 7 % (int)bytes]; /* so that the copy is made */
    }
    const double mixed = median(mix, RUNS), moved = median(move, RUNS);
    /* Mixing reads V_a beside what both read and write. */
    const double both = 2.0 * (double)bytes;
    const double more = (double)(batch * TOKENS * width) * (aes_dtype == VMIX_DTYPE_F32 ? 4 : 2);
    printf("%-44s %8.1f us  memcpy %8.1f us  ratio %.2f  bytes a second %.2f\n", name, mixed / 1e3,
           moved / 1e3, mixed / moved, (both + more) / both * moved / mixed);
    free(v), free(copy), free(a);
}

int main(int argc, char **argv) {
    VmixAdapter *adapter = NULL;
    VmixValues *values = NULL;
    if (argc != 2 || vmix_adapter_open(argv[1], &adapter) != VMIX_STATUS_OK ||
        vmix_adapter_values(adapter, NULL, &values) != VMIX_STATUS_OK) {
        fprintf(stderr, "usage: bench_c ADAPTER; %s\n", vmix_last_error());
        return 1;
    }
    puts(vmix_build_info());
    VmixView v_a = {.struct_size = sizeof v_a};
    VmixLayer layer = {.struct_size = sizeof layer};
    size_t index = 0;
    vmix_values_layer(values, 0, &layer);
    TIME_CALL("vmix_abi_version", vmix_abi_version());
    TIME_CALL("vmix_values_get", vmix_values_get(values, 0, VMIX_PASS_COND, &v_a));
    TIME_CALL("vmix_values_layer_find", vmix_values_layer_find(values, layer.name, &index));
    TIME_CALL("vmix_values_get, refused", vmix_values_get(values, 99, VMIX_PASS_COND, &v_a));
    float v[4] = {0}, a[4] = {0}, strength = 0.0f;
    VmixViewMut value = vmix_view_mut(v, VMIX_DTYPE_F32, 1, 1, 1, 4);
    VmixView aes = vmix_view(a, VMIX_DTYPE_F32, 1, 1, 1, 4);
    VmixMixParams params = {sizeof params, &value, &aes, &strength, 1};
    TIME_CALL("vmix_mix_values, strength 0", vmix_mix_values(&params));
    strength = 1.0f;
    TIME_CALL("vmix_mix_values, 4 numbers", vmix_mix_values(&params));
    enum { F32 = VMIX_DTYPE_F32, F16 = VMIX_DTYPE_F16, BF16 = VMIX_DTYPE_BF16 };
    mixing(2, 320, F32, F32, "mix 2 x 77 x 320, f32");
    mixing(2, 1280, F32, F32, "mix 2 x 77 x 1280, f32");
    mixing(2, 1280, F32, F16, "mix 2 x 77 x 1280, f32, V_a f16");
    mixing(2, 1280, F16, F16, "mix 2 x 77 x 1280, f16");
    mixing(2, 1280, BF16, BF16, "mix 2 x 77 x 1280, bf16");
    mixing(256, 1280, F32, F32, "mix 256 x 77 x 1280, f32 (beyond cache)");
    vmix_values_free(values);
    vmix_adapter_free(adapter);
    return 0;
}
