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
