/* A host in C: lists what a VMix file holds, and mixes values into a buffer.
 *
 *     cc host.c $(pkg-config --cflags --libs vmix) -lm -o host
 *     ./host adapter.safetensors          an adapter: the values of its default labels
 *     ./host preset.safetensors           a preset: the values it holds
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "vmix.h"

/* Every call returns a status; the sentence that explains it is per thread. */
static void check(VmixStatus status, const char *call) {
    if (status != VMIX_STATUS_OK) {
        fprintf(stderr, "%s: %s: %s\n", call, vmix_status_name(status), vmix_last_error());
        exit(1);
    }
}
#define CHECK(call) check(call, #call)

static void list_labels(const VmixValues *values, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        VmixLabel label = {.struct_size = sizeof label};
        CHECK(vmix_values_label(values, i, &label));
        printf("label %s (%s), weight %g\n", label.name, label.dimension, label.weight);
    }
}

/* The Euclidean norm of a layer's V_a, copied as f32 whatever the file has. */
static double norm(const VmixValues *values, size_t layer, int64_t tokens, int64_t inner_dim) {
    float *copy = calloc((size_t)(tokens * inner_dim), sizeof *copy);
    if (copy == NULL)
        abort();
    VmixViewMut to = vmix_view_mut(copy, VMIX_DTYPE_F32, 1, tokens, 1, inner_dim);
    CHECK(vmix_values_copy(values, layer, VMIX_PASS_COND, &to));
    double sum = 0;
    for (int64_t i = 0; i < tokens * inner_dim; ++i)
        sum += (double)copy[i] * copy[i];
    free(copy);
    return sqrt(sum);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 2;
    }
    if (!VMIX_ABI_COMPATIBLE(vmix_abi_version())) {
        fprintf(stderr, "%s is not the library of this header\n", vmix_build_info());
        return 1;
    }

    VmixAdapter *adapter = NULL;
    VmixValues *values = NULL;
    CHECK(vmix_open(argv[1], &adapter, &values));
    if (adapter != NULL) {
        /* Once per choice of labels; without params it is the file's own defaults, in f32. */
        CHECK(vmix_adapter_values(adapter, NULL, &values));
        vmix_adapter_free(adapter);
    }
    VmixValuesInfo info = {.struct_size = sizeof info};
    CHECK(vmix_values_info(values, &info));
    list_labels(values, info.label_count);
    const int64_t tokens = (int64_t)info.context_tokens;
    for (size_t i = 0; i < info.layer_count; ++i) {
        VmixLayer layer = {.struct_size = sizeof layer};
        CHECK(vmix_values_layer(values, i, &layer));
        printf("layer %s, %zu wide, |V_a| %.4f\n", layer.name, layer.inner_dim,
               norm(values, i, tokens, (int64_t)layer.inner_dim));
    }

    /* What a host does after to_v: here for one layer, a batch of 2 (unconditional, conditional)
     * and a prompt of 2 chunks. A real host finds its layer by name. */
    VmixLayer layer = {.struct_size = sizeof layer};
    CHECK(vmix_values_layer(values, 0, &layer));
    const int64_t batch = 2, keys = 2 * tokens, width = (int64_t)layer.inner_dim;
    float *v = calloc((size_t)(batch * keys * width), sizeof *v);
    if (v == NULL)
        abort();
    VmixView v_a = {.struct_size = sizeof v_a};
    CHECK(vmix_values_get(values, 0, VMIX_PASS_COND, &v_a));
    VmixViewMut value = vmix_view_mut(v, VMIX_DTYPE_F32, batch, keys, 1, width);
    const float strength[] = {0.0f, 0.5f};
    VmixMixParams mix = {sizeof mix, &value, &v_a, strength, 2};
    CHECK(vmix_mix_values(&mix));

    /* The buffer was zero: now it is lambda V_a, in both chunks of the conditional half alone. */
    double sums[2] = {0, 0};
    for (int64_t i = 0; i < batch * keys * width; ++i)
        sums[i / (keys * width)] += (double)v[i] * v[i];
    printf("mixed: unconditional %.4f, conditional %.4f\n", sqrt(sums[0]), sqrt(sums[1]));
    const double expected = 0.5 * sqrt(2.0) * norm(values, 0, tokens, width);
    free(v);
    vmix_values_free(values);
    /* Halving is exact; the sums of squares differ by their order. */
    return sums[0] == 0 && fabs(sqrt(sums[1]) - expected) <= 1e-9 * expected ? 0 : 1;
}
