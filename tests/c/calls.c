/* Every function of vmix.h, called rightly and wrongly.
 *
 *     calls ADAPTER LINEAR INIT FOLDER FITTED
 *
 * Any layernorm adapter; the linear one and the init file of conftest.py; a folder to write into; the file
 * that `vmix fit` wrote.
 * Run as it is, under valgrind and with AddressSanitizer. */
#include <float.h>
#include <math.h>
#include <unistd.h>

#include "check.h"

#define NOT_A_HANDLE ((void *)(uintptr_t)0xdeadbee8)

/* A struct that must come out as it went in, but for struct_size. */
#define POISON(value) memset(&(value), 0x5a, sizeof(value)), (value).struct_size = sizeof(value)
#define UNTOUCHED(value, from)                                                      \
    do {                                                                            \
        for (size_t i_ = (from); i_ < sizeof(value); ++i_)                          \
            CHECK(((unsigned char *)&(value))[i_] == 0x5a);                         \
    } while (0)
#define AFTER_SIZE sizeof(size_t)

static void library(void) {
    CHECK(VMIX_ABI_COMPATIBLE(vmix_abi_version()));
    CHECK(!VMIX_ABI_COMPATIBLE(VMIX_ABI_VERSION + 0x10000));
    CHECK(VMIX_ABI_COMPATIBLE(VMIX_ABI_VERSION + 1));
    CHECK(strlen(vmix_version()) >= 5 && strstr(vmix_build_info(), vmix_version()) != NULL);
    CHECK(strcmp(vmix_status_name(VMIX_STATUS_INVALID_FILE), "invalid file") == 0);
    CHECK(strcmp(vmix_status_name(4000000000u), "unknown status") == 0);
    CHECK(strcmp(vmix_last_error(), "") == 0);
    const size_t cores = vmix_num_threads();
    CHECK(cores >= 1);
    vmix_set_num_threads(1);
    CHECK(vmix_num_threads() == 1);
    vmix_set_num_threads(cores + 1);
    CHECK(vmix_num_threads() == cores);
    vmix_set_num_threads(0);
    CHECK(vmix_num_threads() == cores);
}

static void opening(const char *path) {
    VmixAdapter *adapter = NOT_A_HANDLE;
    VmixValues *values = NOT_A_HANDLE;
    FAILS(NULL_ARGUMENT, "path", vmix_open(NULL, &adapter, &values));
    FAILS(NULL_ARGUMENT, "adapter", vmix_open(path, NULL, &values));
    FAILS(NULL_ARGUMENT, "values", vmix_open(path, &adapter, NULL));
    FAILS(IO, "no/such/file", vmix_open("no/such/file", &adapter, &values));
    FAILS(IO, "directory", vmix_open(".", &adapter, &values));
    FAILS(IO, "not a regular file", vmix_open("/dev/null", &adapter, &values));
    FAILS(INVALID_ARGUMENT, "path: expected the name of a file", vmix_open("", &adapter, &values));
    FAILS(INVALID_FILE, "not a safetensors file", vmix_open(__FILE__, &adapter, &values));
    FAILS(NULL_ARGUMENT, "path", vmix_adapter_open(NULL, &adapter));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_open(path, NULL));
    FAILS(IO, "no such", vmix_adapter_open("no such \xff", &adapter)); /* bytes, on Unix */
    FAILS(INVALID_FILE, "expected `preset`, found `adapter`", vmix_values_open(path, &values));
    FAILS(NULL_ARGUMENT, "path", vmix_values_open(NULL, &values));
    FAILS(NULL_ARGUMENT, "out", vmix_values_open(path, NULL));
    FAILS(NULL_ARGUMENT, "data", vmix_adapter_open_memory(NULL, 10, &adapter));
    FAILS(INVALID_FILE, "bytes", vmix_adapter_open_memory(NULL, 0, &adapter));
    FAILS(INVALID_ARGUMENT, "data", vmix_adapter_open_memory("", SIZE_MAX, &adapter));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_open_memory("", 0, NULL));
    FAILS(NULL_ARGUMENT, "data", vmix_values_open_memory(NULL, 10, &values));
    FAILS(INVALID_FILE, "bytes", vmix_values_open_memory("12345678", 8, &values));
    FAILS(NULL_ARGUMENT, "out", vmix_values_open_memory("", 0, NULL));
    CHECK(adapter == NOT_A_HANDLE && values == NOT_A_HANDLE);

    OK(vmix_open(path, &adapter, &values));
    CHECK(adapter != NULL && values == NULL);
    vmix_adapter_free(adapter);
    vmix_adapter_free(NULL);
    vmix_values_free(NULL);

    size_t size = 0;
    unsigned char *data = read_file(path, &size);
    OK(vmix_adapter_open_memory(data, size, &adapter));
    free(data); /* copied */
    vmix_adapter_free(adapter);
}

static void refusing_init(const char *path) {
    VmixAdapter *adapter = NOT_A_HANDLE;
    VmixValues *values = NOT_A_HANDLE;
    FAILS(INVALID_FILE, path, vmix_open(path, &adapter, &values));
    FAILS(INVALID_FILE, "expected `adapter` or `preset`, found `init`",
          vmix_open(path, &adapter, &values));
    FAILS(INVALID_FILE, "expected `adapter`, found `init`", vmix_adapter_open(path, &adapter));
    FAILS(INVALID_FILE, "expected `preset`, found `init`", vmix_values_open(path, &values));
    CHECK(adapter == NOT_A_HANDLE && values == NOT_A_HANDLE);
}

static void describing(const VmixAdapter *adapter) {
    VmixAdapterInfo info;
    POISON(info);
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_info(NULL, &info));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_info(adapter, NULL));
    FAILS(INVALID_ARGUMENT, "multiple of", vmix_adapter_info(adapter, (void *)((char *)&info + 1)));
    for (size_t size = 0; size < sizeof info; size += 7) {
        info.struct_size = size;
        FAILS(INVALID_ARGUMENT, "sizeof(VmixAdapterInfo)", vmix_adapter_info(adapter, &info));
    }
    info.struct_size = SIZE_MAX;
    FAILS(INVALID_ARGUMENT, "struct_size", vmix_adapter_info(adapter, &info));
    UNTOUCHED(info, AFTER_SIZE);
    info.struct_size = sizeof info;
    OK(vmix_adapter_info(adapter, &info));
    CHECK(info.label_count > 0 && info.layer_count > 0 && info.context_tokens > 0);
    CHECK(info.base >= VMIX_BASE_SD15 && info.base <= VMIX_BASE_OTHER);
    CHECK(info.apply_to >= VMIX_APPLY_TO_COND && info.apply_to <= VMIX_APPLY_TO_CONTRAST);
    CHECK(info.context_dim > 0 && info.struct_size == sizeof info);

    VmixLabel label;
    POISON(label);
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_label(NULL, 0, &label));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_label(adapter, 0, NULL));
    FAILS(OUT_OF_RANGE, "index below", vmix_adapter_label(adapter, info.label_count, &label));
    FAILS(OUT_OF_RANGE, "index below", vmix_adapter_label(adapter, SIZE_MAX, &label));
    UNTOUCHED(label, AFTER_SIZE);
    size_t index = 77;
    for (size_t i = 0; i < info.label_count; ++i) {
        OK(vmix_adapter_label(adapter, i, &label));
        CHECK(strlen(label.name) > 0 && strlen(label.positive) > 0 && strlen(label.negative) > 0);
        CHECK(label.dimension != NULL && label.low < label.high && label.step > 0);
        CHECK(label.low <= label.weight && label.weight <= label.high);
        OK(vmix_adapter_label_find(adapter, label.name, &index));
        CHECK(index == i);
    }
    index = 77;
    const char *text = NOT_A_HANDLE;
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_label_find(NULL, "a", &index));
    FAILS(NULL_ARGUMENT, "name", vmix_adapter_label_find(adapter, NULL, &index));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_label_find(adapter, "a", NULL));
    FAILS(NOT_FOUND, label.name, vmix_adapter_label_find(adapter, "no such label", &index));
    FAILS(INVALID_ARGUMENT, "UTF-8", vmix_adapter_label_find(adapter, "\xff", &index));
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_label_display_name(NULL, 0, "zh", &text));
    FAILS(NULL_ARGUMENT, "language", vmix_adapter_label_display_name(adapter, 0, NULL, &text));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_label_display_name(adapter, 0, "zh", NULL));
    FAILS(NOT_FOUND, "tlh", vmix_adapter_label_display_name(adapter, 0, "tlh", &text));
    FAILS(OUT_OF_RANGE, "label", vmix_adapter_label_display_name(adapter, 1000, "zh", &text));
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_metadata(NULL, "vmix.format", &text));
    FAILS(NULL_ARGUMENT, "key", vmix_adapter_metadata(adapter, NULL, &text));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_metadata(adapter, "vmix.format", NULL));
    FAILS(NOT_FOUND, "vmix.nothing", vmix_adapter_metadata(adapter, "vmix.nothing", &text));
    CHECK(index == 77 && text == NOT_A_HANDLE);
    OK(vmix_adapter_metadata(adapter, "vmix.format", &text));
    CHECK(strcmp(text, "2") == 0);

    VmixLayer layer;
    POISON(layer);
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_layer(NULL, 0, &layer));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_layer(adapter, 0, NULL));
    FAILS(OUT_OF_RANGE, "layer", vmix_adapter_layer(adapter, info.layer_count, &layer));
    UNTOUCHED(layer, AFTER_SIZE);
    for (size_t i = 0; i < info.layer_count; ++i) {
        OK(vmix_adapter_layer(adapter, i, &layer));
        OK(vmix_adapter_layer_find(adapter, layer.name, &index));
        CHECK(index == i && layer.inner_dim > 0);
        OK(vmix_adapter_layer_find(adapter, layer.ldm_name, &index));
        CHECK(index == i);
    }
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_layer_find(NULL, "a", &index));
    FAILS(NULL_ARGUMENT, "name", vmix_adapter_layer_find(adapter, NULL, &index));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_layer_find(adapter, "a", NULL));
    FAILS(NOT_FOUND, "did you mean", vmix_adapter_layer_find(adapter, "mid_block.attentions.0.transformer_blocks.0.attn1", &index));
    FAILS(INVALID_ARGUMENT, "UTF-8", vmix_adapter_layer_find(adapter, "\xc3", &index));

    size_t count = info.label_count * info.context_dim;
    float *f_t = calloc(count, sizeof *f_t);
    CHECK(f_t != NULL);
    float weights[64] = {0};
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_aes_embed(NULL, NULL, 0, f_t, count));
    FAILS(NULL_ARGUMENT, "weights",
          vmix_adapter_aes_embed(adapter, NULL, info.label_count, f_t, count));
    FAILS(INVALID_ARGUMENT, "one per label", vmix_adapter_aes_embed(adapter, weights, 1, f_t, count));
    FAILS(INVALID_ARGUMENT, "memory",
          vmix_adapter_aes_embed(adapter, weights, SIZE_MAX / 2, f_t, count));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_aes_embed(adapter, NULL, 0, NULL, count));
    FAILS(BUFFER_SIZE, "buffer for", vmix_adapter_aes_embed(adapter, NULL, 0, f_t, count - 1));
    weights[0] = NAN;
    FAILS(INVALID_ARGUMENT, "finite",
          vmix_adapter_aes_embed(adapter, weights, info.label_count, f_t, count));
    for (size_t i = 0; i < count; ++i)
        CHECK(f_t[i] == 0);
    OK(vmix_adapter_aes_embed(adapter, NULL, 0, f_t, count));
    CHECK(f_t[0] != 0);
    free(f_t);

    count = info.context_tokens * info.context_dim;
    float *f_a = calloc(count, sizeof *f_a);
    CHECK(f_a != NULL);
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_project(NULL, NULL, 0, f_a, count));
    FAILS(INVALID_ARGUMENT, "weights", vmix_adapter_project(adapter, weights, 1, f_a, count));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_project(adapter, NULL, 0, NULL, count));
    FAILS(BUFFER_SIZE, "out", vmix_adapter_project(adapter, NULL, 0, f_a, count + 1));
    OK(vmix_adapter_project(adapter, NULL, 0, f_a, count));
    free(f_a);
}

static VmixValues *computing(const VmixAdapter *adapter, VmixApplyTo apply_to, VmixDType dtype) {
    float weights[64];
    for (size_t i = 0; i < 64; ++i)
        weights[i] = 0.25f * (float)(i + 1);
    VmixAdapterInfo info = {.struct_size = sizeof info};
    OK(vmix_adapter_info(adapter, &info));
    VmixValues *values = NOT_A_HANDLE;
    VmixValuesParams params = {sizeof params, weights, info.label_count, apply_to, dtype};
    FAILS(NULL_ARGUMENT, "adapter", vmix_adapter_values(NULL, &params, &values));
    FAILS(NULL_ARGUMENT, "out", vmix_adapter_values(adapter, &params, NULL));
    params.apply_to = 9;
    FAILS(INVALID_ARGUMENT, "apply_to", vmix_adapter_values(adapter, &params, &values));
    params.apply_to = apply_to;
    params.dtype = 9;
    FAILS(INVALID_ARGUMENT, "dtype", vmix_adapter_values(adapter, &params, &values));
    params.dtype = dtype;
    params.weight_count += 1;
    FAILS(INVALID_ARGUMENT, "weights", vmix_adapter_values(adapter, &params, &values));
    params.weight_count = info.label_count;
    weights[0] = INFINITY;
    FAILS(INVALID_ARGUMENT, "finite", vmix_adapter_values(adapter, &params, &values));
    weights[0] = 0.25f;
    for (size_t size = 0; size < sizeof params; ++size) {
        params.struct_size = size;
        FAILS(INVALID_ARGUMENT, "struct_size", vmix_adapter_values(adapter, &params, &values));
    }
    params.struct_size = sizeof params + 3; /* half of a field to come */
    FAILS(INVALID_ARGUMENT, "struct_size", vmix_adapter_values(adapter, &params, &values));
    params.struct_size = sizeof params;
    struct {
        VmixValuesParams params;
        size_t later;
    } later = {params, 0};
    later.params.struct_size = sizeof later;
    later.later = 1;
    FAILS(UNSUPPORTED, "expected a VmixValuesParams of", vmix_adapter_values(adapter, &later.params, &values));
    CHECK(values == NOT_A_HANDLE);
    later.later = 0;
    OK(vmix_adapter_values(adapter, &later.params, &values));
    vmix_values_free(values);
    params.weight_count = 0; /* forgotten */
    VmixValues *none = NOT_A_HANDLE;
    FAILS(INVALID_ARGUMENT, "weights", vmix_adapter_values(adapter, &params, &none));
    CHECK(none == NOT_A_HANDLE);
    params.weights = NULL; /* the file's defaults */
    OK(vmix_adapter_values(adapter, &params, &values));
    VmixLabel label = {.struct_size = sizeof label};
    OK(vmix_values_label(values, 1, &label));
    CHECK(label.weight == 1);
    vmix_values_free(values);
    params.weights = weights, params.weight_count = info.label_count;
    OK(vmix_adapter_values(adapter, &params, &values));
    return values;
}

static void using(const VmixValues *values, VmixApplyTo apply_to, VmixDType dtype,
                  const char *folder) {
    VmixValuesInfo info;
    POISON(info);
    FAILS(NULL_ARGUMENT, "values", vmix_values_info(NULL, &info));
    FAILS(NULL_ARGUMENT, "out", vmix_values_info(values, NULL));
    UNTOUCHED(info, AFTER_SIZE);
    OK(vmix_values_info(values, &info));
    CHECK(info.apply_to == apply_to && info.dtype == dtype);

    VmixLabel label = {.struct_size = sizeof label};
    size_t index = 77;
    const char *text = NOT_A_HANDLE;
    FAILS(NULL_ARGUMENT, "values", vmix_values_label(NULL, 0, &label));
    FAILS(NULL_ARGUMENT, "out", vmix_values_label(values, 0, NULL));
    FAILS(OUT_OF_RANGE, "label", vmix_values_label(values, info.label_count, &label));
    OK(vmix_values_label(values, 1, &label));
    CHECK(label.weight == 0.5f);
    OK(vmix_values_label_find(values, label.name, &index));
    CHECK(index == 1);
    FAILS(NULL_ARGUMENT, "values", vmix_values_label_find(NULL, "a", &index));
    FAILS(NULL_ARGUMENT, "name", vmix_values_label_find(values, NULL, &index));
    FAILS(NULL_ARGUMENT, "out", vmix_values_label_find(values, "a", NULL));
    FAILS(NOT_FOUND, "known labels", vmix_values_label_find(values, "a", &index));
    FAILS(NULL_ARGUMENT, "values", vmix_values_label_display_name(NULL, 0, "zh", &text));
    FAILS(NULL_ARGUMENT, "language", vmix_values_label_display_name(values, 0, NULL, &text));
    FAILS(NULL_ARGUMENT, "out", vmix_values_label_display_name(values, 0, "zh", NULL));
    FAILS(NOT_FOUND, "tlh", vmix_values_label_display_name(values, 0, "tlh", &text));
    FAILS(NULL_ARGUMENT, "values", vmix_values_metadata(NULL, "vmix.kind", &text));
    FAILS(NULL_ARGUMENT, "key", vmix_values_metadata(values, NULL, &text));
    FAILS(NULL_ARGUMENT, "out", vmix_values_metadata(values, "vmix.kind", NULL));
    FAILS(NOT_FOUND, "nothing", vmix_values_metadata(values, "nothing", &text));
    CHECK(text == NOT_A_HANDLE);
    OK(vmix_values_metadata(values, "vmix.kind", &text));
    CHECK(strcmp(text, "preset") == 0);

    VmixLayer layer = {.struct_size = sizeof layer};
    FAILS(NULL_ARGUMENT, "values", vmix_values_layer(NULL, 0, &layer));
    FAILS(NULL_ARGUMENT, "out", vmix_values_layer(values, 0, NULL));
    FAILS(OUT_OF_RANGE, "layer", vmix_values_layer(values, info.layer_count, &layer));
    OK(vmix_values_layer(values, 0, &layer));
    OK(vmix_values_layer_find(values, layer.ldm_name, &index));
    CHECK(index == 0);
    FAILS(NULL_ARGUMENT, "values", vmix_values_layer_find(NULL, "a", &index));
    FAILS(NULL_ARGUMENT, "name", vmix_values_layer_find(values, NULL, &index));
    FAILS(NULL_ARGUMENT, "out", vmix_values_layer_find(values, "a", NULL));
    FAILS(NOT_FOUND, "layer", vmix_values_layer_find(values, "a", &index));

    VmixView v_a;
    POISON(v_a);
    FAILS(NULL_ARGUMENT, "values", vmix_values_get(NULL, 0, VMIX_PASS_COND, &v_a));
    FAILS(NULL_ARGUMENT, "out", vmix_values_get(values, 0, VMIX_PASS_COND, NULL));
    FAILS(OUT_OF_RANGE, "layer", vmix_values_get(values, info.layer_count, VMIX_PASS_COND, &v_a));
    FAILS(INVALID_ARGUMENT, "pass", vmix_values_get(values, 0, 0, &v_a));
    UNTOUCHED(v_a, AFTER_SIZE);
    OK(vmix_values_get(values, 0, VMIX_PASS_UNCOND, &v_a));
    CHECK((v_a.data == NULL) == (apply_to == VMIX_APPLY_TO_COND));
    VmixView uncond = v_a;
    OK(vmix_values_get(values, 0, VMIX_PASS_COND, &v_a));
    CHECK(v_a.data != NULL && v_a.dtype == dtype);
    CHECK((v_a.data == uncond.data) == (apply_to == VMIX_APPLY_TO_BOTH));
    CHECK(v_a.shape[1] == (int64_t)info.context_tokens);
    CHECK(v_a.shape[3] == (int64_t)layer.inner_dim && v_a.strides[1] == v_a.shape[3]);

    size_t count = info.context_tokens * layer.inner_dim;
    float *copy = calloc(count, sizeof *copy);
    CHECK(copy != NULL);
    int64_t tokens = v_a.shape[1], width = v_a.shape[3];
    VmixViewMut to = vmix_view_mut(copy, VMIX_DTYPE_F32, 1, tokens, 2, width / 2);
    FAILS(NULL_ARGUMENT, "values", vmix_values_copy(NULL, 0, VMIX_PASS_COND, &to));
    FAILS(NULL_ARGUMENT, "to", vmix_values_copy(values, 0, VMIX_PASS_COND, NULL));
    FAILS(OUT_OF_RANGE, "layer", vmix_values_copy(values, SIZE_MAX, VMIX_PASS_COND, &to));
    FAILS(INVALID_ARGUMENT, "pass", vmix_values_copy(values, 0, 77, &to));
    to.shape[1] -= 1;
    FAILS(INVALID_ARGUMENT, "to", vmix_values_copy(values, 0, VMIX_PASS_COND, &to));
    to.shape[1] += 1;
    to.data = NULL;
    FAILS(INVALID_ARGUMENT, "NULL", vmix_values_copy(values, 0, VMIX_PASS_COND, &to));
    to.data = (char *)copy + 1;
    FAILS(INVALID_ARGUMENT, "multiple of", vmix_values_copy(values, 0, VMIX_PASS_COND, &to));
    for (size_t i = 0; i < count; ++i)
        CHECK(copy[i] == 0);
    to.data = copy;
    OK(vmix_values_copy(values, 0, VMIX_PASS_COND, &to));
    if (dtype == VMIX_DTYPE_F32)
        CHECK(memcmp(copy, v_a.data, count * sizeof *copy) == 0);
    if (apply_to == VMIX_APPLY_TO_COND)
        FAILS(NOT_FOUND, "conditional", vmix_values_copy(values, 0, VMIX_PASS_UNCOND, &to));
    free(copy);

    char path[4096];
    snprintf(path, sizeof path, "%s/preset.safetensors", folder);
    FAILS(NULL_ARGUMENT, "values", vmix_values_save(NULL, path));
    FAILS(NULL_ARGUMENT, "path", vmix_values_save(values, NULL));
    FAILS(IO, "no/such", vmix_values_save(values, "no/such/folder/preset.safetensors"));
    FAILS(IO, "not a regular file", vmix_values_save(values, "/dev/null"));
    OK(vmix_values_save(values, path));
    VmixValues *again = NULL;
    VmixAdapter *none = NOT_A_HANDLE;
    OK(vmix_open(path, &none, &again));
    CHECK(none == NULL && again != NULL);
    vmix_values_free(again);
    size_t size = 0;
    unsigned char *data = read_file(path, &size);
    OK(vmix_values_open_memory(data, size, &again));
    free(data);
    VmixView opened = {.struct_size = sizeof opened};
    OK(vmix_values_get(again, 0, VMIX_PASS_COND, &opened));
    size_t bytes = count * (dtype == VMIX_DTYPE_F32 ? 4 : 2);
    CHECK(memcmp(opened.data, v_a.data, bytes) == 0);
    vmix_values_free(again);
    OK(vmix_values_open(path, &again));
    vmix_values_free(again);
}

static void mixing(void) {
    float v[24], a[6], out[24], strength[] = {0.5f, 0.0f};
    for (int i = 0; i < 24; ++i)
        v[i] = (float)i;
    for (int i = 0; i < 6; ++i)
        a[i] = 1.0f + (float)i;
    VmixViewMut value = vmix_view_mut(v, VMIX_DTYPE_F32, 2, 4, 1, 3);
    VmixView aes = vmix_view(a, VMIX_DTYPE_F32, 1, 2, 1, 3);
    VmixMixParams mix = {sizeof mix, &value, &aes, strength, 2};
    FAILS(NULL_ARGUMENT, "params", vmix_mix_values(NULL));
    VmixMixParams bad = mix;
    bad.value = NULL;
    FAILS(NULL_ARGUMENT, "value", vmix_mix_values(&bad));
    bad = mix, bad.aes_value = NULL;
    FAILS(NULL_ARGUMENT, "aes_value", vmix_mix_values(&bad));
    bad = mix, bad.strength = NULL;
    FAILS(NULL_ARGUMENT, "strength", vmix_mix_values(&bad));
    bad = mix, bad.strength_count = 3;
    FAILS(INVALID_ARGUMENT, "strength", vmix_mix_values(&bad));
    bad = mix, bad.strength_count = SIZE_MAX;
    FAILS(INVALID_ARGUMENT, "strength", vmix_mix_values(&bad));
    bad = mix, bad.struct_size = 1;
    FAILS(INVALID_ARGUMENT, "struct_size", vmix_mix_values(&bad));
    VmixViewMut wrong = value;
    bad = mix, bad.value = &wrong;
    wrong.shape[1] = 3;
    FAILS(INVALID_ARGUMENT, "multiple of the 2 tokens", vmix_mix_values(&bad));
    wrong = value, wrong.shape[0] = -1;
    FAILS(INVALID_ARGUMENT, "negative", vmix_mix_values(&bad));
    wrong = value, wrong.strides[1] = 0;
    FAILS(INVALID_ARGUMENT, "overlap", vmix_mix_values(&bad));
    wrong = value, wrong.shape[1] = INT64_MAX;
    FAILS(INVALID_ARGUMENT, "value", vmix_mix_values(&bad));
    wrong = value, wrong.strides[3] = INT64_MIN;
    FAILS(INVALID_ARGUMENT, "fits into memory", vmix_mix_values(&bad));
    wrong = value, wrong.dtype = 0;
    FAILS(INVALID_ARGUMENT, "dtype", vmix_mix_values(&bad));
    wrong = value, wrong.data = a;
    FAILS(INVALID_ARGUMENT, "aes_value", vmix_mix_values(&bad));
    float nan[] = {NAN, 0};
    bad = mix, bad.strength = nan;
    FAILS(INVALID_ARGUMENT, "finite", vmix_mix_values(&bad));
    for (int i = 0; i < 24; ++i)
        CHECK(v[i] == (float)i);
    OK(vmix_mix_values(&mix));
    for (int i = 0; i < 24; ++i)
        CHECK(v[i] == (float)i + (i < 12 ? 0.5f * a[i % 6] : 0.0f));

    /* One query, whose only key is certain: attention gives that key's mixed value. */
    VmixView q = vmix_view(v, VMIX_DTYPE_F32, 1, 1, 1, 3), k = q;
    VmixView one = vmix_view(a, VMIX_DTYPE_F32, 1, 1, 1, 3);
    VmixViewMut output = vmix_view_mut(out, VMIX_DTYPE_F32, 1, 1, 1, 3);
    float map_data[1] = {-1};
    VmixViewMut map = vmix_view_mut(map_data, VMIX_DTYPE_F32, 1, 1, 1, 1);
    VmixAttentionParams params = {.struct_size = sizeof params};
    FAILS(NULL_ARGUMENT, "params", vmix_attention(NULL));
    FAILS(NULL_ARGUMENT, "query", vmix_attention(&params));
    params.query = &q;
    FAILS(NULL_ARGUMENT, "key", vmix_attention(&params));
    params.key = &k;
    FAILS(NULL_ARGUMENT, "value", vmix_attention(&params));
    params.value = &k;
    FAILS(NULL_ARGUMENT, "output", vmix_attention(&params));
    params.output = &output;
    OK(vmix_attention(&params));
    CHECK(memcmp(out, v, 3 * sizeof(float)) == 0);
    params.aes_value = &one;
    FAILS(INVALID_ARGUMENT, "strength", vmix_attention(&params));
    params.strength = strength, params.strength_count = 1;
    params.attention_map = &map, params.attention_map_head = 1;
    FAILS(INVALID_ARGUMENT, "attention_map", vmix_attention(&params));
    params.attention_map_head = SIZE_MAX;
    FAILS(INVALID_ARGUMENT, "attention_map", vmix_attention(&params));
    params.attention_map_head = 0;
    params.scale = INFINITY;
    FAILS(INVALID_ARGUMENT, "scale", vmix_attention(&params));
    params.scale = 0;
    VmixView mask = vmix_view(out, VMIX_DTYPE_F32, 1, 1, 2, 1);
    params.mask = &mask;
    FAILS(INVALID_ARGUMENT, "mask", vmix_attention(&params));
    params.mask = NULL, params.query_mask = &mask;
    FAILS(INVALID_ARGUMENT, "query_mask", vmix_attention(&params));
    params.query_mask = NULL;
    CHECK(map_data[0] == -1);
    OK(vmix_attention(&params));
    for (int i = 0; i < 3; ++i)
        CHECK(out[i] == v[i] + 0.5f * a[i]);
    CHECK(map_data[0] == 1);
    /* Keys that need more memory than there is: a stride of 0 makes them free for the caller. */
    VmixView endless = k;
    endless.shape[1] = INT64_C(1) << 52, endless.strides[1] = 0;
    params.key = params.value = &endless, params.attention_map = NULL;
    FAILS(OUT_OF_MEMORY, "memory", vmix_attention(&params));
}

/* V_a of layer 0, two tokens wide two, as the linear example of docs/format.md has them. */
static void has_values(const VmixValues *values, VmixPass pass, const float *expected) {
    float found[4];
    VmixViewMut to = vmix_view_mut(found, VMIX_DTYPE_F32, 1, 2, 1, 2);
    OK(vmix_values_copy(values, 0, pass, &to));
    CHECK(memcmp(found, expected, sizeof found) == 0);
}

static void is_warm(const VmixLabel *label, float weight) {
    CHECK(strcmp(label->name, "warm") == 0 && strcmp(label->dimension, "") == 0);
    CHECK(strcmp(label->positive, "warm light\nwarm colors") == 0);
    CHECK(strcmp(label->negative, "cold light\n") == 0); /* the second text is empty */
    CHECK(label->weight == weight && label->neutral == 0);
    CHECK(label->low == -1 && label->high == 1.5f && label->step == 0.125f);
}

/* A file without AesEmb, with a label that has a range of its own. Its values are up to 8 times the
 * weight, so that at 8188 they reach the largest number of f16. */
static void linear(const char *path, const char *folder) {
    VmixAdapter *adapter = NULL;
    OK(vmix_adapter_open(path, &adapter));
    VmixAdapterInfo info = {.struct_size = sizeof info};
    OK(vmix_adapter_info(adapter, &info));
    CHECK(info.context_dim == 0 && info.context_tokens == 2 && info.label_count == 1);
    float nothing[1] = {7};
    FAILS(NOT_FOUND, "AesEmb", vmix_adapter_aes_embed(adapter, NULL, 0, nothing, 0));
    FAILS(NOT_FOUND, "AesEmb", vmix_adapter_aes_embed(adapter, NULL, 0, NULL, 0));
    FAILS(NOT_FOUND, "f_a", vmix_adapter_project(adapter, NULL, 0, nothing, 1));
    FAILS(NOT_FOUND, "f_a", vmix_adapter_project(adapter, NULL, 0, NULL, 0));
    CHECK(nothing[0] == 7);
    VmixLabel label;
    POISON(label);
    OK(vmix_adapter_label(adapter, 0, &label));
    is_warm(&label, 0.5f);

    const float half[] = {2, 0, 4, 0}, minus_half[] = {0, 2, 0, 4}, zero[] = {0, 0, 0, 0};
    VmixValues *values = NULL;
    OK(vmix_adapter_values(adapter, NULL, &values));
    has_values(values, VMIX_PASS_COND, half);
    vmix_values_free(values);
    float weight = -0.5f;
    VmixValuesParams params = {sizeof params, &weight, 1, VMIX_APPLY_TO_CONTRAST, 0};
    OK(vmix_adapter_values(adapter, &params, &values));
    has_values(values, VMIX_PASS_COND, minus_half);
    has_values(values, VMIX_PASS_UNCOND, half);
    POISON(label);
    OK(vmix_values_label(values, 0, &label));
    is_warm(&label, weight);
    char preset[4096];
    snprintf(preset, sizeof preset, "%s/warm.safetensors", folder);
    OK(vmix_values_save(values, preset));
    vmix_values_free(values);
    OK(vmix_values_open(preset, &values));
    has_values(values, VMIX_PASS_COND, minus_half);
    has_values(values, VMIX_PASS_UNCOND, half);
    POISON(label);
    OK(vmix_values_label(values, 0, &label));
    is_warm(&label, weight);
    vmix_values_free(values);
    weight = 0;
    OK(vmix_adapter_values(adapter, &params, &values));
    has_values(values, VMIX_PASS_COND, zero);
    vmix_values_free(values);

    params.dtype = VMIX_DTYPE_F16, weight = 8188;
    const float largest[] = {32752, 0, 65504, 0};
    OK(vmix_adapter_values(adapter, &params, &values));
    has_values(values, VMIX_PASS_COND, largest);
    vmix_values_free(values);
    values = NOT_A_HANDLE;
    weight = 1e4f;
    FAILS(INVALID_ARGUMENT,
          "layer `layer`: expected values that float16 can hold, found more: label `warm` at weight "
          "10000",
          vmix_adapter_values(adapter, &params, &values));
    weight = FLT_MAX, params.dtype = 0;
    FAILS(INVALID_ARGUMENT, "label `warm` at weight", vmix_adapter_values(adapter, &params, &values));
    CHECK(values == NOT_A_HANDLE);
    weight = 1e4f;
    const float more[] = {4e4f, 0, 8e4f, 0};
    OK(vmix_adapter_values(adapter, &params, &values));
    has_values(values, VMIX_PASS_COND, more);
    vmix_values_free(values);
    vmix_adapter_free(adapter);
}

/* What `vmix fit` wrote (tests/data/fitted.safetensors). Its V_a is linear in the weight on either side
 * of 0, and halves are exact. */
static void fitted(const char *path) {
    VmixAdapter *adapter = NULL;
    OK(vmix_adapter_open(path, &adapter));
    VmixAdapterInfo info = {.struct_size = sizeof info};
    OK(vmix_adapter_info(adapter, &info));
    CHECK(info.context_tokens == 32 && info.label_count == 1);
    VmixLabel label;
    POISON(label);
    OK(vmix_adapter_label(adapter, 0, &label));
    CHECK(strcmp(label.name, "light") == 0);
    CHECK(strcmp(label.positive, "bright") == 0 && strcmp(label.negative, "dark") == 0);
    CHECK(label.weight == 0 && label.neutral == 0 && label.low == -1.5f && label.high == 1.5f);
    for (float sign = -1; sign <= 1; sign += 2) {
        const float weights[] = {sign, sign / 2, 0};
        VmixValues *values[3];
        VmixView views[3];
        for (int i = 0; i < 3; ++i) {
            VmixValuesParams params = {sizeof params, &weights[i], 1, VMIX_APPLY_TO_DEFAULT, 0};
            OK(vmix_adapter_values(adapter, &params, &values[i]));
            views[i].struct_size = sizeof views[i];
            OK(vmix_values_get(values[i], 0, VMIX_PASS_COND, &views[i]));
        }
        const float *whole = views[0].data, *half = views[1].data, *nothing = views[2].data;
        float largest = 0;
        for (int64_t i = 0; i < views[0].shape[1] * views[0].shape[3]; ++i) {
            CHECK(whole[i] == 2 * half[i] && nothing[i] == 0);
            largest = whole[i] > largest ? whole[i] : largest;
        }
        CHECK(largest > 0.01f);
        for (int i = 0; i < 3; ++i)
            vmix_values_free(values[i]);
    }
    vmix_adapter_free(adapter);
}

static void same_values(const VmixValues *a, const VmixValues *b) {
    VmixValuesInfo info = {.struct_size = sizeof info};
    OK(vmix_values_info(a, &info));
    CHECK(info.layer_count > 0 && info.dtype == VMIX_DTYPE_F32);
    for (size_t i = 0; i < info.layer_count; ++i) {
        VmixView x = {.struct_size = sizeof x}, y = {.struct_size = sizeof y};
        OK(vmix_values_get(a, i, VMIX_PASS_COND, &x));
        OK(vmix_values_get(b, i, VMIX_PASS_COND, &y));
        CHECK(x.shape[1] == y.shape[1] && x.shape[3] == y.shape[3]);
        CHECK(memcmp(x.data, y.data, (size_t)(x.shape[1] * x.shape[3]) * sizeof(float)) == 0);
    }
}

static void has_the_values_of(const VmixAdapter *adapter, const VmixValues *expected) {
    VmixValues *values = NULL;
    OK(vmix_adapter_values(adapter, NULL, &values));
    same_values(values, expected);
    vmix_values_free(values);
}

static void overwrite(const char *path, size_t size) {
    FILE *file = fopen(path, "r+b");
    CHECK(file != NULL);
    for (size_t i = 0; i < size; ++i)
        CHECK(fputc(0x5a, file) != EOF);
    CHECK(fclose(file) == 0);
}

static void cut(const char *path) {
    VmixAdapter *adapter = NOT_A_HANDLE;
    VmixValues *values = NOT_A_HANDLE;
    CHECK(truncate(path, 0) == 0);
    FAILS(INVALID_FILE, "not a safetensors file", vmix_open(path, &adapter, &values));
}

/* What becomes of a file while it is open changes nothing. If it were mapped, overwriting would change
 * what is computed, and cutting would end the process. */
static void files_that_go(const char *path, const char *folder) {
    char copy[4096];
    snprintf(copy, sizeof copy, "%s/open.safetensors", folder);
    size_t size = 0;
    unsigned char *data = read_file(path, &size);
    FILE *file = fopen(copy, "wb");
    CHECK(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
    VmixAdapter *memory = NULL, *adapter = NULL;
    OK(vmix_adapter_open_memory(data, size, &memory));
    free(data);
    VmixValues *expected = NULL;
    OK(vmix_adapter_values(memory, NULL, &expected));
    vmix_adapter_free(memory);

    OK(vmix_adapter_open(copy, &adapter));
    overwrite(copy, size);
    has_the_values_of(adapter, expected);
    cut(copy);
    has_the_values_of(adapter, expected);
    const char *text = NULL;
    OK(vmix_adapter_metadata(adapter, "vmix.kind", &text));
    CHECK(strcmp(text, "adapter") == 0);
    vmix_adapter_free(adapter);

    VmixValues *values = NULL;
    OK(vmix_values_save(expected, copy));
    OK(vmix_values_open(copy, &values));
    data = read_file(copy, &size);
    free(data);
    overwrite(copy, size);
    same_values(values, expected);
    cut(copy);
    same_values(values, expected);
    vmix_values_free(values);
    vmix_values_free(expected);
}

int main(int argc, char **argv) {
    CHECK(argc == 6);
    const char *folder = argv[4];
    library();
    opening(argv[1]);
    refusing_init(argv[3]);
    linear(argv[2], folder);
    files_that_go(argv[1], folder);
    fitted(argv[5]);
    VmixAdapter *adapter = NULL;
    OK(vmix_adapter_open(argv[1], &adapter));
    describing(adapter);
    for (VmixApplyTo apply_to = VMIX_APPLY_TO_COND; apply_to <= VMIX_APPLY_TO_CONTRAST; ++apply_to)
        for (VmixDType dtype = VMIX_DTYPE_F32; dtype <= VMIX_DTYPE_BF16; ++dtype) {
            VmixValues *values = computing(adapter, apply_to, dtype);
            using(values, apply_to, dtype, folder);
            vmix_values_free(values);
        }
    VmixValues *values = computing(adapter, VMIX_APPLY_TO_CONTRAST, VMIX_DTYPE_F32);
    vmix_adapter_free(adapter);
    using(values, VMIX_APPLY_TO_CONTRAST, VMIX_DTYPE_F32, folder); /* it needs no adapter */
    vmix_values_free(values);
    mixing();
    puts("every function called rightly and wrongly");
    return 0;
}
