/* Eight threads use the same handles in every way that const allows.
 *
 *     threads ADAPTER ROUNDS
 *
 * Every result must be the one that a single thread got. Run as it is and under a race detector. */
#include <pthread.h>

#include "check.h"

#define THREADS 8

static const VmixAdapter *adapter;
static const VmixValues *values;
static int rounds;
static size_t layer_count, tokens, dim;
static float *expected_f_a;
static float *expected_v_a;
static size_t v_a_count;

static void mix(size_t layer) {
    VmixView v_a = {.struct_size = sizeof v_a};
    OK(vmix_values_get(values, layer, VMIX_PASS_COND, &v_a));
    size_t count = (size_t)(v_a.shape[1] * v_a.shape[3]);
    float *v = calloc(count, sizeof *v);
    CHECK(v != NULL);
    VmixViewMut value =
        vmix_view_mut(v, VMIX_DTYPE_F32, 1, v_a.shape[1], 4, v_a.shape[3] / 4);
    const float strength = 1;
    VmixMixParams params = {sizeof params, &value, &v_a, &strength, 1};
    OK(vmix_mix_values(&params));
    CHECK(memcmp(v, v_a.data, count * sizeof *v) == 0);
    free(v);
}

/* Ordinary attention of one query to one key is the key's value, whatever the numbers. */
static void attend(int round) {
    float q[4] = {1, 2, 3, (float)round}, out[4] = {0};
    VmixView query = vmix_view(q, VMIX_DTYPE_F32, 1, 1, 2, 2);
    VmixViewMut output = vmix_view_mut(out, VMIX_DTYPE_F32, 1, 1, 2, 2);
    VmixAttentionParams params = {.struct_size = sizeof params};
    params.query = params.key = params.value = &query;
    params.output = &output;
    OK(vmix_attention(&params));
    CHECK(memcmp(out, q, sizeof q) == 0);
}

static void compute(void) {
    VmixValues *fresh = NULL;
    OK(vmix_adapter_values(adapter, NULL, &fresh));
    VmixView v_a = {.struct_size = sizeof v_a};
    OK(vmix_values_get(fresh, 0, VMIX_PASS_COND, &v_a));
    CHECK(memcmp(v_a.data, expected_v_a, v_a_count * sizeof(float)) == 0);
    vmix_values_free(fresh);
}

static void *work(void *argument) {
    const int thread = *(const int *)argument;
    float *f_a = malloc(tokens * dim * sizeof *f_a);
    CHECK(f_a != NULL);
    for (int round = 0; round < rounds; ++round) {
        VmixLayer layer = {.struct_size = sizeof layer};
        size_t index = 0;
        OK(vmix_values_layer(values, (size_t)round % layer_count, &layer));
        OK(vmix_adapter_layer_find(adapter, layer.ldm_name, &index));
        mix(index);
        attend(round);
        /* The message of a failure is that of this thread's. */
        char name[32];
        snprintf(name, sizeof name, "no label %d-%d", thread, round);
        FAILS(NOT_FOUND, name, vmix_adapter_label_find(adapter, name, &index));
        const char *text = NULL;
        OK(vmix_values_metadata(values, "vmix.origin", &text)); /* made once, by any thread */
        CHECK(strlen(text) == 64);
        if (round % 50 == thread) {
            compute();
            OK(vmix_adapter_project(adapter, NULL, 0, f_a, tokens * dim));
            CHECK(memcmp(f_a, expected_f_a, tokens * dim * sizeof *f_a) == 0);
        }
    }
    free(f_a);
    return NULL;
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    rounds = atoi(argv[2]);
    VmixAdapter *opened = NULL;
    VmixValues *computed = NULL;
    OK(vmix_adapter_open(argv[1], &opened));
    OK(vmix_adapter_values(opened, NULL, &computed));
    adapter = opened, values = computed;
    VmixAdapterInfo info = {.struct_size = sizeof info};
    OK(vmix_adapter_info(adapter, &info));
    layer_count = info.layer_count, tokens = info.context_tokens, dim = info.context_dim;
    expected_f_a = malloc(tokens * dim * sizeof *expected_f_a);
    CHECK(expected_f_a != NULL);
    OK(vmix_adapter_project(adapter, NULL, 0, expected_f_a, tokens * dim));
    VmixView v_a = {.struct_size = sizeof v_a};
    OK(vmix_values_get(values, 0, VMIX_PASS_COND, &v_a));
    v_a_count = (size_t)(v_a.shape[1] * v_a.shape[3]);
    expected_v_a = malloc(v_a_count * sizeof *expected_v_a);
    CHECK(expected_v_a != NULL);
    memcpy(expected_v_a, v_a.data, v_a_count * sizeof *expected_v_a);

    pthread_t threads[THREADS];
    int numbers[THREADS];
    for (int i = 0; i < THREADS; ++i) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, work, &numbers[i]) == 0);
    }
    for (int i = 0; i < THREADS; ++i)
        CHECK(pthread_join(threads[i], NULL) == 0);
    printf("%d threads, %d rounds each\n", THREADS, rounds);
    free(expected_f_a);
    free(expected_v_a);
    vmix_adapter_free(opened);
    vmix_values_free(computed);
    return 0;
}
