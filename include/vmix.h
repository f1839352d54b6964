/*
 * vmix.h: aesthetics adapters for Stable Diffusion U-Nets, from C.
 *
 * WHAT IT IS
 *
 *   An adapter turns aesthetic labels into one tensor per cross-attention layer, V_a, which is mixed
 *   into the layer's values (VMix, Wu et al. 2024, eq. 9):
 *
 *       x = softmax(Q K^T / sqrt(D)) (V_c + lambda V_a)
 *
 *   V_a depends on the adapter and the labels alone: compute it once, or open it from a preset file,
 *   and add it in every step. A host with an attention of its own does three things:
 *
 *       VmixValues *values = NULL;                             // once per choice of labels
 *       if (vmix_values_open("warm.safetensors", &values) != VMIX_STATUS_OK)
 *           fail(vmix_last_error());
 *
 *       size_t layer = 0;                                      // once per layer, by its name
 *       vmix_values_layer_find(values, "middle_block.1.transformer_blocks.0.attn2", &layer);
 *       VmixView v_a = {.struct_size = sizeof v_a};
 *       vmix_values_get(values, layer, VMIX_PASS_COND, &v_a);
 *       if (v_a.data != NULL) {                                // in every step, after to_v
 *           VmixViewMut v = vmix_view_mut(v_data, VMIX_DTYPE_F32, batch, 77 * k, heads, head_dim);
 *           VmixMixParams mix = {sizeof mix, &v, &v_a, &lambda, 1};
 *           vmix_mix_values(&mix);
 *       }                                                      // NULL: nothing in this pass
 *
 *   or adds v_a.data itself, on whatever device it has its values. docs/c-api.md says more.
 *
 * FUNCTIONS, BY TASK (below they are in alphabetical order)
 *
 *   open a file        vmix_open; vmix_adapter_open, vmix_values_open, and _open_memory of both
 *   what it holds      vmix_adapter_info, _label, _label_find, _label_display_name, _layer,
 *                      _layer_find, _metadata; the same of vmix_values_
 *   choose labels      vmix_adapter_values; its steps: vmix_adapter_aes_embed, vmix_adapter_project
 *   use V_a            vmix_values_get, vmix_values_copy, vmix_mix_values, vmix_attention
 *   keep it            vmix_values_save
 *   free               vmix_adapter_free, vmix_values_free
 *   the library        vmix_abi_version, vmix_version, vmix_build_info, vmix_last_error,
 *                      vmix_status_name, vmix_set_num_threads, vmix_num_threads
 *
 * LINKING
 *
 *   Linux    cc host.c $(pkg-config --cflags --libs vmix)        libvmix.so.1; static: libvmix.a
 *   macOS    the same                                            libvmix.1.dylib
 *   Windows  cl host.c /I include vmix.dll.lib                   vmix.dll; static: vmix.lib
 *   CMake    find_package(vmix CONFIG REQUIRED), then vmix::vmix or vmix::static
 *
 *   Statically with pkg-config: $(pkg-config --variable=static_libs vmix) instead of --libs. After
 *   an install into /usr/local, Linux wants an ldconfig; a library elsewhere is found at run time
 *   through -Wl,-rpath, LD_LIBRARY_PATH or, on macOS, -Wl,-rpath alone.
 *
 * OWNERSHIP
 *
 *   Handles (VmixAdapter, VmixValues) are freed with the function of their name, once; NULL is
 *   allowed. Strings and views that a handle lends live as long as the handle, and are not freed.
 *   Whatever a caller passes in is used during the call only, files as well: they are read whole.
 *   Values do not need the adapter they were computed from.
 *
 *   Structs that are passed by pointer begin with struct_size, which the caller sets to sizeof:
 *   `VmixLabel label = {.struct_size = sizeof label}`. All other fields of an input must be set too,
 *   if only to zero, as that line does. Zero always means the default.
 *
 * THREADS
 *
 *   A pointer to const is never written through, and may be used from many threads at once. That is
 *   every use of a handle but freeing it. vmix_last_error() is per thread. Functions that use all
 *   cores say so; vmix_set_num_threads() sets how many. Their threads do not survive
 *   a fork(): a child of a process that called one must not call one itself, unless it exec()s.
 *
 * ERRORS
 *
 *   Every function that can fail returns a VmixStatus, writes its out-parameters on VMIX_STATUS_OK
 *   only, and otherwise leaves one sentence in vmix_last_error() that names the thing, what was
 *   expected and what was found. NULL, unknown numbers, sizes that overflow and files that lie are
 *   errors. Dangling pointers, sizes or strides beyond the caller's memory, and outputs that overlap
 *   inputs where the function does not allow it, cannot be seen.
 *   No panic leaves the library; nothing is printed to stdout. vmix_attention(), whose work grows with
 *   its arguments, says when memory is short, and so does opening a file for which there is not enough;
 *   elsewhere running out of memory ends the process.
 *
 * ABI
 *
 *   Version 1.0 promises: within a major version no function, constant or field changes or goes;
 *   functions may be added, and structs may grow at their ends, which struct_size tells apart. A new
 *   major version may change anything and has another library name (libvmix.so.2). So a host that
 *   loads the library by itself checks, before anything else, that
 *
 *       VMIX_ABI_COMPATIBLE(vmix_abi_version())
 *
 *   holds, which is: the same major version, and at least the minor version of this header; and
 *   refuses the library otherwise. The file format has a version of its own (docs/format.md).
 *
 * Written by `make headers`; do not edit.
 */
#ifndef VMIX_H
#define VMIX_H

#include "vmix_types.h"

#ifdef __cplusplus
extern "C" {
#endif

/** \brief
 *  Version of the binary interface that this library has: VMIX_ABI_VERSION of its own header. Ask
 *  VMIX_ABI_COMPATIBLE() whether it will do.
 */
uint32_t
vmix_abi_version (void);

/** An adapter: any selection of its labels. Freed with vmix_adapter_free(). */
typedef struct VmixAdapter VmixAdapter;

/** \brief
 *  f_t, the features of a selection looked up in AesEmb (paper, section 3.3): row-major
 *  `[label_count, context_dim]`, which `out_count` must equal exactly.
 *
 *  `weights`: one per label, or NULL with `weight_count` 0 for the file's defaults.
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, BUFFER_SIZE, NOT_FOUND (a file without AesEmb).
 */
VmixStatus
vmix_adapter_aes_embed (
    VmixAdapter const * adapter,
    float const * weights,
    size_t weight_count,
    float * out,
    size_t out_count);

/** \brief
 *  Frees an adapter; NULL is allowed. Values that were computed from it live on.
 */
void
vmix_adapter_free (
    VmixAdapter * adapter);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size).
 */
VmixStatus
vmix_adapter_info (
    VmixAdapter const * adapter,
    VmixAdapterInfo * out);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set, with label `index`, below label_count.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
 */
VmixStatus
vmix_adapter_label (
    VmixAdapter const * adapter,
    size_t index,
    VmixLabel * out);

/** \brief
 *  What to call label `index` in a language ("zh", "de"), where the file says so. The string
 *  belongs to the handle.
 *
 *  Statuses: NULL_ARGUMENT, OUT_OF_RANGE, NOT_FOUND.
 */
VmixStatus
vmix_adapter_label_display_name (
    VmixAdapter const * adapter,
    size_t index,
    char const * language,
    char const * * out);

/** \brief
 *  The index of the label of this name. The message of NOT_FOUND lists the known ones.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
 */
VmixStatus
vmix_adapter_label_find (
    VmixAdapter const * adapter,
    char const * name,
    size_t * out);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set, with layer `index`, below layer_count. Layers
 *  are in order from down to up; hosts walk U-Nets in orders of their own, so go by the name.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
 */
VmixStatus
vmix_adapter_layer (
    VmixAdapter const * adapter,
    size_t index,
    VmixLayer * out);

/** \brief
 *  The index of the layer of this diffusers or LDM name.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
 */
VmixStatus
vmix_adapter_layer_find (
    VmixAdapter const * adapter,
    char const * name,
    size_t * out);

/** \brief
 *  The value of a metadata key of the file, such as "modelspec.license", up to its first NUL. The
 *  string belongs to the handle.
 *
 *  Statuses: NULL_ARGUMENT, NOT_FOUND.
 */
VmixStatus
vmix_adapter_metadata (
    VmixAdapter const * adapter,
    char const * key,
    char const * * out);

/** \brief
 *  Reads an adapter file whole and checks it. The file is not needed afterwards.
 *
 *  `path`: bytes on Unix, UTF-8 on Windows. `*out` is freed with vmix_adapter_free().
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
 *  OUT_OF_MEMORY.
 */
VmixStatus
vmix_adapter_open (
    char const * path,
    VmixAdapter * * out);

/** \brief
 *  Opens an adapter file of `size` bytes that lies in memory; it is copied.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (a size beyond memory), INVALID_FILE.
 */
VmixStatus
vmix_adapter_open_memory (
    void const * data,
    size_t size,
    VmixAdapter * * out);

/** \brief
 *  f_a, the aesthetic context of a selection (paper, eq. 6): row-major
 *  `[context_tokens, context_dim]`, which `out_count` must equal exactly.
 *
 *  `weights`: one per label, or NULL with `weight_count` 0 for the file's defaults.
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (also a result that overflows), BUFFER_SIZE, NOT_FOUND (a
 *  linear adapter, which has none).
 */
VmixStatus
vmix_adapter_project (
    VmixAdapter const * adapter,
    float const * weights,
    size_t weight_count,
    float * out,
    size_t out_count);

/** V_a of every layer for one selection. Freed with vmix_values_free(). */
typedef struct VmixValues VmixValues;

/** \brief
 *  V_a of every layer for a selection (paper, eq. 7): once per choice of labels. It uses all cores.
 *
 *  `params`: NULL for the file's defaults in f32. `*out` is freed with vmix_values_free() and does
 *  not need the adapter any more.
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (also values beyond the dtype), UNSUPPORTED (params of a
 *  later version).
 */
VmixStatus
vmix_adapter_values (
    VmixAdapter const * adapter,
    VmixValuesParams const * params,
    VmixValues * * out);

/** \brief
 *  softmax(Q·Kᵀ/√D)·(V_c + λ·V_a) (paper, eq. 9), for hosts without an attention of their own,
 *  computed in f32. λ = 0 gives bit for bit what no V_a gives.
 *
 *  The number of keys must be a multiple of the tokens of V_a. It may use as many threads as
 *  vmix_set_num_threads() allows. On failure nothing is written.
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED (params of a later version),
 *  OUT_OF_MEMORY.
 */
VmixStatus
vmix_attention (
    VmixAttentionParams const * params);

/** \brief
 *  How the library was built: version, target and options, for bug reports. Static.
 */
char const *
vmix_build_info (void);

/** \brief
 *  What went wrong in the last call of this thread that failed: one sentence of UTF-8 that names the
 *  thing, what was expected and what was found. Empty before the first failure; calls that succeed
 *  leave it as it is. The string belongs to the thread, and lives until its next failure or end.
 */
char const *
vmix_last_error (void);

/** \brief
 *  V_c + λ·V_a in place (paper, eq. 9): all that a host with an attention of its own needs. Each sum
 *  is computed in f32 and rounded once. Where λ is 0 not a bit changes.
 *
 *  The number of keys must be a multiple of the tokens of V_a. On failure nothing is written.
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, UNSUPPORTED (params of a later version).
 */
VmixStatus
vmix_mix_values (
    VmixMixParams const * params);

/** \brief
 *  How many threads a call may use.
 */
size_t
vmix_num_threads (void);

/** \brief
 *  Opens an adapter or a preset, whichever the file is. On success exactly one of `*adapter` and
 *  `*values` is a handle, and the other is NULL. Init files, which are for training, are refused.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
 *  OUT_OF_MEMORY.
 */
VmixStatus
vmix_open (
    char const * path,
    VmixAdapter * * adapter,
    VmixValues * * values);

/** \brief
 *  From now on, at most so many threads for each call, of those in a pool that all calls share; 0 for
 *  as many as there are cores, or as RAYON_NUM_THREADS says. With 1 a call computes in the thread that
 *  makes it, as a host wants that has threads of its own.
 */
void
vmix_set_num_threads (
    size_t count);

/** \brief
 *  Name of a status, such as "invalid file"; "unknown status" for numbers that are none. Static.
 */
char const *
vmix_status_name (
    uint32_t status);

/** \brief
 *  Copies V_a of layer `index` in a pass into the caller's buffer, whose shape must be
 *  `{1, context_tokens, heads, inner_dim / heads}` for any number of heads, in the buffer's dtype.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT, OUT_OF_RANGE, NOT_FOUND (where vmix_values_get() gives
 *  NULL), UNSUPPORTED (a view of a later version).
 */
VmixStatus
vmix_values_copy (
    VmixValues const * values,
    size_t index,
    VmixPass pass,
    VmixViewMut const * to);

/** \brief
 *  Frees values; NULL is allowed. Views of them end.
 */
void
vmix_values_free (
    VmixValues * values);

/** \brief
 *  V_a of layer `index` in a pass, where it lies: `*out`, whose struct_size the caller has set,
 *  becomes a dense view of shape `{1, context_tokens, 1, inner_dim}`, valid until the values are
 *  freed. Its data is NULL where nothing is to be mixed: in the unconditional pass of values that
 *  are for the conditional one only.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size, pass), OUT_OF_RANGE.
 */
VmixStatus
vmix_values_get (
    VmixValues const * values,
    size_t index,
    VmixPass pass,
    VmixView * out);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size).
 */
VmixStatus
vmix_values_info (
    VmixValues const * values,
    VmixValuesInfo * out);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set, with label `index`, below label_count, and
 *  the weight it was selected with.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
 */
VmixStatus
vmix_values_label (
    VmixValues const * values,
    size_t index,
    VmixLabel * out);

/** \brief
 *  What to call label `index` in a language ("zh", "de"), where the file says so. The string
 *  belongs to the handle.
 *
 *  Statuses: NULL_ARGUMENT, OUT_OF_RANGE, NOT_FOUND.
 */
VmixStatus
vmix_values_label_display_name (
    VmixValues const * values,
    size_t index,
    char const * language,
    char const * * out);

/** \brief
 *  The index of the label of this name. The message of NOT_FOUND lists the known ones.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
 */
VmixStatus
vmix_values_label_find (
    VmixValues const * values,
    char const * name,
    size_t * out);

/** \brief
 *  Fills `*out`, whose struct_size the caller has set, with layer `index`, below layer_count. Layers
 *  are in order from down to up; hosts walk U-Nets in orders of their own, so go by the name.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (struct_size), OUT_OF_RANGE.
 */
VmixStatus
vmix_values_layer (
    VmixValues const * values,
    size_t index,
    VmixLayer * out);

/** \brief
 *  The index of the layer of this diffusers or LDM name.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (not UTF-8), NOT_FOUND.
 */
VmixStatus
vmix_values_layer_find (
    VmixValues const * values,
    char const * name,
    size_t * out);

/** \brief
 *  The value of a metadata key as a preset file has it, such as "vmix.origin", the SHA-256 of the
 *  adapter file. The string belongs to the handle.
 *
 *  Statuses: NULL_ARGUMENT, NOT_FOUND.
 */
VmixStatus
vmix_values_metadata (
    VmixValues const * values,
    char const * key,
    char const * * out);

/** \brief
 *  Reads a preset file whole and checks it. The file is not needed afterwards.
 *
 *  `path`: bytes on Unix, UTF-8 on Windows. `*out` is freed with vmix_values_free().
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path, a file beyond 4 GiB), IO, INVALID_FILE,
 *  OUT_OF_MEMORY.
 */
VmixStatus
vmix_values_open (
    char const * path,
    VmixValues * * out);

/** \brief
 *  Opens a preset file of `size` bytes that lies in memory; what is needed is copied.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (a size beyond memory), INVALID_FILE.
 */
VmixStatus
vmix_values_open_memory (
    void const * data,
    size_t size,
    VmixValues * * out);

/** \brief
 *  Writes a preset file, whole or not at all: beside its place, and then renamed into it. A link stays
 *  one, and what it leads to is replaced; what is no regular file is refused.
 *
 *  Statuses: NULL_ARGUMENT, INVALID_ARGUMENT (an empty path), IO.
 */
VmixStatus
vmix_values_save (
    VmixValues const * values,
    char const * path);

/** \brief
 *  Version of the library, such as "0.1.0". Static.
 */
char const *
vmix_version (void);

#ifdef __cplusplus
} /* extern \"C\" */
#endif

#endif /* VMIX_H */
