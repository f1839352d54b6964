/* Data, constants and status codes of vmix. Include vmix.h, which explains them.
   Written by `make headers`; do not edit. */

#ifndef VMIX_TYPES_H
#define VMIX_TYPES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Major version of the binary interface: another one may have changed anything.
 */
#define VMIX_ABI_MAJOR 1

/**
 * Minor version of the binary interface: a later one has more.
 */
#define VMIX_ABI_MINOR 0

/**
 * What every fallible function returns. Numbers 11 to 63 are reserved for statuses to come:
 * treat a number that you do not know as a failure.
 */
enum VmixStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * It worked, and the out-parameters are filled.
     */
    VMIX_STATUS_OK = 0,
    /**
     * A pointer that must not be NULL is NULL.
     */
    VMIX_STATUS_NULL_ARGUMENT = 1,
    /**
     * An argument does not fit: a shape, a number, a dtype, a struct_size, text that is not UTF-8.
     */
    VMIX_STATUS_INVALID_ARGUMENT = 2,
    /**
     * There is no label, layer or metadata key of that name.
     */
    VMIX_STATUS_NOT_FOUND = 3,
    /**
     * An index is not below the count.
     */
    VMIX_STATUS_OUT_OF_RANGE = 4,
    /**
     * A buffer has not the size that the result has.
     */
    VMIX_STATUS_BUFFER_SIZE = 5,
    /**
     * A file cannot be read or written; the message has the operating system's words.
     */
    VMIX_STATUS_IO = 6,
    /**
     * A file is not what docs/format.md asks for; the message names the key or tensor.
     */
    VMIX_STATUS_INVALID_FILE = 7,
    /**
     * The request is valid, but needs something that this library does not do.
     */
    VMIX_STATUS_UNSUPPORTED = 8,
    /**
     * The result, or the work on it, does not fit into memory.
     */
    VMIX_STATUS_OUT_OF_MEMORY = 9,
    /**
     * A bug in this library, caught at the boundary. Handles remain usable and must be freed.
     */
    VMIX_STATUS_INTERNAL = 10,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum VmixStatus VmixStatus;
#else
typedef uint32_t VmixStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Element type of a tensor: one of the VMIX_DTYPE_ constants.
 */
typedef uint32_t VmixDType;

/**
 * The kind of U-Net a file is for: one of the VMIX_BASE_ constants.
 */
typedef uint32_t VmixBase;

/**
 * Which passes of classifier-free guidance values are for: one of the VMIX_APPLY_TO_ constants.
 */
typedef uint32_t VmixApplyTo;

/**
 * A pass of classifier-free guidance: one of the VMIX_PASS_ constants.
 */
typedef uint32_t VmixPass;

/**
 * A tensor that is read: `[batch, tokens, heads, head dim]`, wherever and however it lies.
 *
 * The order of the dimensions is fixed; the strides say how they lie in memory. Dense
 * `[B, L, H·D]` has strides `{L*H*D, H*D, D, 1}`, dense `[B, H, L, D]` has `{H*L*D, D, L*D, 1}`.
 * Strides may be negative, and 0 where all entries of a dimension are the same one.
 * vmix_view() makes the first of these.
 */
typedef struct VmixView {
    /**
     * sizeof(VmixView)
     */
    size_t struct_size;
    /**
     * The first element, aligned to its size. May be NULL only if a size is 0.
     */
    const void *data;
    /**
     * Element type; any, whatever the other tensors have.
     */
    VmixDType dtype;
    /**
     * Sizes: batch, tokens, heads, head dim.
     */
    int64_t shape[4];
    /**
     * Distances between neighbours, in elements.
     */
    int64_t strides[4];
} VmixView;

/**
 * A tensor that is written; otherwise as VmixView. No two of its elements may share memory, and
 * each stride must reach beyond all that the shorter ones span.
 */
typedef struct VmixViewMut {
    /**
     * sizeof(VmixViewMut)
     */
    size_t struct_size;
    /**
     * The first element, aligned to its size. May be NULL only if a size is 0.
     */
    void *data;
    /**
     * Element type; results are computed in f32 and rounded to nearest even once, which beyond
     * the dtype's range gives infinity.
     */
    VmixDType dtype;
    /**
     * Sizes: batch, tokens, heads, head dim.
     */
    int64_t shape[4];
    /**
     * Distances between neighbours, in elements; negative ones are allowed.
     */
    int64_t strides[4];
} VmixViewMut;

/**
 * What an adapter is, filled by vmix_adapter_info().
 */
typedef struct VmixAdapterInfo {
    /**
     * sizeof(VmixAdapterInfo), set by the caller.
     */
    size_t struct_size;
    /**
     * The kind of U-Net it is for.
     */
    VmixBase base;
    /**
     * What it was made to be applied to.
     */
    VmixApplyTo apply_to;
    /**
     * N, the number of labels.
     */
    size_t label_count;
    /**
     * The number of cross-attention layers.
     */
    size_t layer_count;
    /**
     * C, the tokens of one chunk of context.
     */
    size_t context_tokens;
    /**
     * d, the width of the context; 0 if neither the base nor the file says it.
     */
    size_t context_dim;
} VmixAdapterInfo;

/**
 * What values are, filled by vmix_values_info().
 */
typedef struct VmixValuesInfo {
    /**
     * sizeof(VmixValuesInfo), set by the caller.
     */
    size_t struct_size;
    /**
     * The kind of U-Net they are for.
     */
    VmixBase base;
    /**
     * Which passes they are for.
     */
    VmixApplyTo apply_to;
    /**
     * Element type of all V_a.
     */
    VmixDType dtype;
    /**
     * N, the number of labels.
     */
    size_t label_count;
    /**
     * The number of cross-attention layers.
     */
    size_t layer_count;
    /**
     * C, the tokens of one chunk of context.
     */
    size_t context_tokens;
} VmixValuesInfo;

/**
 * An aesthetic label. The strings belong to the handle that was asked, and live as long.
 */
typedef struct VmixLabel {
    /**
     * sizeof(VmixLabel), set by the caller.
     */
    size_t struct_size;
    /**
     * What users choose by, unique in a file.
     */
    const char *name;
    /**
     * The aesthetic dimension, such as "lighting"; may be empty.
     */
    const char *dimension;
    /**
     * The texts that mean having the label, one per line.
     */
    const char *positive;
    /**
     * The texts that mean the opposite, one per line.
     */
    const char *negative;
    /**
     * Of an adapter the weight that hosts start from; of values the weight they were made with.
     */
    float weight;
    /**
     * The weight at which the label changes nothing; NaN if there is none.
     */
    float neutral;
    /**
     * Lowest weight of a slider.
     */
    float low;
    /**
     * Highest weight of a slider.
     */
    float high;
    /**
     * Step of a slider.
     */
    float step;
} VmixLabel;

/**
 * A cross-attention layer. The strings belong to the handle that was asked, and live as long.
 */
typedef struct VmixLayer {
    /**
     * sizeof(VmixLayer), set by the caller.
     */
    size_t struct_size;
    /**
     * diffusers path, such as "down_blocks.0.attentions.0.transformer_blocks.0.attn2".
     */
    const char *name;
    /**
     * LDM path, such as "input_blocks.1.1.transformer_blocks.0.attn2", as in checkpoints after
     * "model.diffusion_model."; NULL if unknown.
     */
    const char *ldm_name;
    /**
     * Width of the layer's values, heads times head dim.
     */
    size_t inner_dim;
} VmixLayer;

/**
 * What vmix_adapter_values() is to compute. All zeros but struct_size asks for the file's own
 * defaults in f32.
 */
typedef struct VmixValuesParams {
    /**
     * sizeof(VmixValuesParams)
     */
    size_t struct_size;
    /**
     * The weight of every label in the file's order. A label that is not wanted is at its neutral
     * weight, or at 0 where that is NaN. vmix_adapter_label_find() gives the index of a name.
     */
    const float *weights;
    /**
     * Number of weights: the number of labels, or 0 with NULL for the file's defaults.
     */
    size_t weight_count;
    /**
     * Which passes the values are for; VMIX_APPLY_TO_DEFAULT as the file says.
     */
    VmixApplyTo apply_to;
    /**
     * Element type of V_a; 0 for VMIX_DTYPE_F32. Sums are f32 in any case.
     */
    VmixDType dtype;
} VmixValuesParams;

/**
 * What vmix_mix_values() is to mix.
 */
typedef struct VmixMixParams {
    /**
     * sizeof(VmixMixParams)
     */
    size_t struct_size;
    /**
     * V_c, `{B, k*C, H, D}`, changed in place.
     */
    const struct VmixViewMut *value;
    /**
     * V_a, `{1 or B, C, H, D}` or `{1 or B, C, 1, H*D}`; repeated k times.
     */
    const struct VmixView *aes_value;
    /**
     * λ: one for all, or one per batch entry. Where it is 0 not a bit changes.
     */
    const float *strength;
    /**
     * 1 or B.
     */
    size_t strength_count;
} VmixMixParams;

/**
 * What vmix_attention() is to compute. B batch entries, L_q queries, L_k = k*C keys, H heads of
 * width D. Masks may have size 1 in a dimension in which they do not vary.
 */
typedef struct VmixAttentionParams {
    /**
     * sizeof(VmixAttentionParams)
     */
    size_t struct_size;
    /**
     * Q, `{B, L_q, H, D}`.
     */
    const struct VmixView *query;
    /**
     * K_c, `{B, L_k, H, D}`.
     */
    const struct VmixView *key;
    /**
     * V_c, `{B, L_k, H, D}`.
     */
    const struct VmixView *value;
    /**
     * V_a, `{1 or B, C, H, D}` or `{1 or B, C, 1, H*D}`; NULL for ordinary attention.
     */
    const struct VmixView *aes_value;
    /**
     * λ: one for all, or one per batch entry. None are needed if aes_value is NULL.
     */
    const float *strength;
    /**
     * 1 or B; 0 for none.
     */
    size_t strength_count;
    /**
     * What scores are multiplied with; 0 for 1/√D.
     */
    float scale;
    /**
     * Added to the scaled scores, `{B, L_q, H, L_k}`: -INFINITY hides a key. A query all of whose
     * keys are hidden gives zeros; NaN and +INFINITY give NaN. NULL for none.
     */
    const struct VmixView *mask;
    /**
     * What λ is multiplied with for each query, `{B, L_q, 1, 1}`: the strength of a region. NULL
     * for 1.
     */
    const struct VmixView *query_mask;
    /**
     * The result, `{B, L_q, H, D}`. It may be the query itself, and must not overlap the other
     * tensors.
     */
    const struct VmixViewMut *output;
    /**
     * The attention maps, softmax(Q·Kᵀ·scale + mask), of as many heads as it has:
     * `{B, L_q, heads, L_k}`. NULL for none.
     */
    const struct VmixViewMut *attention_map;
    /**
     * The first of these heads.
     */
    size_t attention_map_head;
} VmixAttentionParams;

/**
 * 32-bit IEEE float.
 */
#define VMIX_DTYPE_F32 1

/**
 * 16-bit IEEE float.
 */
#define VMIX_DTYPE_F16 2

/**
 * bfloat16.
 */
#define VMIX_DTYPE_BF16 3

/**
 * Stable Diffusion 1.x: 16 cross-attention layers, 77 tokens of width 768.
 */
#define VMIX_BASE_SD15 1

/**
 * Stable Diffusion XL: 70 cross-attention layers, 77 tokens of width 2048.
 */
#define VMIX_BASE_SDXL 2

/**
 * Another U-Net, with the layers that the file names.
 */
#define VMIX_BASE_OTHER 3

/**
 * In requests only: as the file says.
 */
#define VMIX_APPLY_TO_DEFAULT 0

/**
 * Values are mixed in the conditional pass only.
 */
#define VMIX_APPLY_TO_COND 1

/**
 * The same V_a is mixed in both passes.
 */
#define VMIX_APPLY_TO_BOTH 2

/**
 * The selection in the conditional pass, its opposite in the unconditional one.
 */
#define VMIX_APPLY_TO_CONTRAST 3

/**
 * The pass that sees the prompt.
 */
#define VMIX_PASS_COND 1

/**
 * The pass that sees the negative prompt, or none.
 */
#define VMIX_PASS_UNCOND 2

/** The version of this header; see "ABI" in vmix.h. */
#define VMIX_ABI_VERSION (VMIX_ABI_MAJOR * 65536u + VMIX_ABI_MINOR)

/** Whether a library of this vmix_abi_version() has all that this header has. */
#define VMIX_ABI_COMPATIBLE(version) \
    ((version) >> 16 == VMIX_ABI_MAJOR && (version) >= VMIX_ABI_VERSION)

/** The view of a dense tensor, `[batch, tokens, heads, head_dim]` in this order in memory, which is
 *  also `[batch, tokens, heads * head_dim]`. */
static inline VmixView vmix_view(const void *data, VmixDType dtype, int64_t batch, int64_t tokens,
                                 int64_t heads, int64_t head_dim) {
    VmixView view = {sizeof(VmixView), data, dtype, {batch, tokens, heads, head_dim},
                     {tokens * heads * head_dim, heads * head_dim, head_dim, 1}};
    return view;
}

/** The view of a dense tensor that is written; see vmix_view(). */
static inline VmixViewMut vmix_view_mut(void *data, VmixDType dtype, int64_t batch, int64_t tokens,
                                        int64_t heads, int64_t head_dim) {
    VmixViewMut view = {sizeof(VmixViewMut), data, dtype, {batch, tokens, heads, head_dim},
                        {tokens * heads * head_dim, heads * head_dim, head_dim, 1}};
    return view;
}

#endif /* VMIX_TYPES_H */
