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
