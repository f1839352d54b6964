/*
 * vmix.hpp: vmix.h for C++17 and later. Header-only; link as vmix.h says.
 *
 * Handles free themselves, and failures throw vmix::Error. What a handle lends, strings and views,
 * lives as long as the Adapter or Values that it came from, wherever that is moved to; to ask a
 * temporary one is an error. All that is
 * const may be used from many threads at once. Functions have the names of vmix.h, which explains
 * them; those of C can be called as well, with handle().
 */
#ifndef VMIX_HPP
#define VMIX_HPP

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "vmix.h"

namespace vmix {

/** Types of their own for arguments that could be mixed up with numbers. */
enum class DType : VmixDType { f32 = VMIX_DTYPE_F32, f16 = VMIX_DTYPE_F16, bf16 = VMIX_DTYPE_BF16 };
enum class Pass : VmixPass { cond = VMIX_PASS_COND, uncond = VMIX_PASS_UNCOND };
enum class ApplyTo : VmixApplyTo {
    as_file_says = VMIX_APPLY_TO_DEFAULT,
    cond = VMIX_APPLY_TO_COND,
    both = VMIX_APPLY_TO_BOTH,
    contrast = VMIX_APPLY_TO_CONTRAST
};

/** What everything here throws; what() is the sentence of vmix_last_error(). */
class Error : public std::runtime_error {
public:
    Error(VmixStatus status, const std::string& message)
        : std::runtime_error(message), status_(status) {}

    VmixStatus status() const noexcept { return status_; }

private:
    VmixStatus status_;
};

/** Numbers of the caller's, for an argument: a call reads them, nobody keeps them. */
template <class T>
class Span {
public:
    constexpr Span() noexcept = default;
    constexpr Span(const T* data, std::size_t size) noexcept : data_(data), size_(size) {}
    constexpr Span(std::initializer_list<T> list) noexcept : Span(std::data(list), list.size()) {}

    /** Vectors, arrays, std::span: whatever lies in one piece. */
    template <class Range, class = std::enable_if_t<std::is_convertible_v<
                               decltype(std::data(std::declval<const Range&>())), const T*>>>
    constexpr Span(const Range& range) noexcept : Span(std::data(range), std::size(range)) {}

    constexpr const T* data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr const T* begin() const noexcept { return data_; }
    constexpr const T* end() const noexcept { return data_ + size_; }
    constexpr const T& operator[](std::size_t index) const noexcept { return data_[index]; }

private:
    const T* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Label {
    std::string_view name, dimension, positive, negative;  // the last two: texts, one per line
    float weight;
    std::optional<float> neutral;
    float low, high, step;  // of a slider
};

struct Layer {
    std::string_view name;
    std::optional<std::string_view> ldm_name;
    std::size_t inner_dim;
};

/** What to compute values of; as it stands, the file's own defaults. */
struct ValuesOptions {
    std::vector<float> weights{};  // one per label, or none
    ApplyTo apply_to = ApplyTo::as_file_says;
    DType dtype = DType::f32;
};

/** VmixAttentionParams, where it shows what can be left out. */
struct AttentionParams {
    VmixView query{}, key{}, value{};
    std::optional<VmixView> aes_value{};
    std::vector<float> strength{};  // owned: {0.8f} would be gone from a Span before the call
    float scale = 0;
    std::optional<VmixView> mask{}, query_mask{};
    VmixViewMut output{};
    std::optional<VmixViewMut> attention_map{};
    std::size_t attention_map_head = 0;
};

namespace detail {

inline void check(VmixStatus status) {
    if (status != VMIX_STATUS_OK) throw Error(status, vmix_last_error());
}

/** C ends a name or path at a NUL: one that has more after it would be taken for another. */
inline std::string c_string(std::string_view text) {
    if (text.find('\0') != text.npos)
        throw Error(VMIX_STATUS_INVALID_ARGUMENT, "name or path: expected no NUL, found one");
    return std::string(text);
}

/** An empty vector may have any address, but C says NULL for none. */
inline const float* pointer(Span<float> numbers) noexcept {
    return numbers.size() ? numbers.data() : nullptr;
}

/** All zeros but struct_size, as C asks of inputs and outputs alike. */
template <class T>
T sized() noexcept {
    T data{};
    data.struct_size = sizeof data;
    return data;
}

/** What Adapter and Values have in common. One that was moved from throws when it is used. */
template <class Handle, class Info, auto free, auto get_info, auto get_metadata, auto get_label,
          auto find_label, auto get_display_name, auto get_layer, auto find_layer>
class Owner {
public:
    /** Takes over a handle of the C API. */
    explicit Owner(Handle* handle) noexcept : handle_(handle) {}

    Handle* handle() const noexcept { return handle_.get(); }

    Info info() const {
        auto info = sized<Info>();
        check(get_info(handle(), &info));
        return info;
    }

    std::vector<Label> labels() const&& = delete;
    std::vector<Label> labels() const& {
        std::vector<Label> labels;
        for (std::size_t i = 0, count = info().label_count; i < count; ++i) {
            auto c = sized<VmixLabel>();
            check(get_label(handle(), i, &c));
            const auto neutral = std::isnan(c.neutral) ? std::nullopt : std::optional(c.neutral);
            labels.push_back({c.name, c.dimension, c.positive, c.negative, c.weight, neutral, c.low,
                              c.high, c.step});
        }
        return labels;
    }

    std::vector<Layer> layers() const&& = delete;
    std::vector<Layer> layers() const& {
        std::vector<Layer> layers;
        for (std::size_t i = 0, count = info().layer_count; i < count; ++i) {
            auto c = sized<VmixLayer>();
            check(get_layer(handle(), i, &c));
            std::optional<std::string_view> ldm_name;
            if (c.ldm_name) ldm_name = c.ldm_name;
            layers.push_back({c.name, ldm_name, c.inner_dim});
        }
        return layers;
    }

    std::size_t label_index(std::string_view name) const {
        std::size_t index = 0;
        check(find_label(handle(), c_string(name).c_str(), &index));
        return index;
    }

    /** By the diffusers or the LDM name. */
    std::size_t layer_index(std::string_view name) const {
        std::size_t index = 0;
        check(find_layer(handle(), c_string(name).c_str(), &index));
        return index;
    }

    std::optional<std::string_view> metadata(std::string_view key) const&& = delete;
    std::optional<std::string_view> metadata(std::string_view key) const& {
        const char* text = nullptr;
        return found(get_metadata(handle(), c_string(key).c_str(), &text), text);
    }

    std::optional<std::string_view> label_display_name(std::size_t, std::string_view) const&& =
        delete;
    std::optional<std::string_view> label_display_name(std::size_t label,
                                                       std::string_view language) const& {
        const char* text = nullptr;
        return found(get_display_name(handle(), label, c_string(language).c_str(), &text), text);
    }

private:
    struct Free {
        void operator()(Handle* handle) const noexcept { free(handle); }
    };
    std::unique_ptr<Handle, Free> handle_;

    /** By reference: the call that fills it may be evaluated after it. */
    static std::optional<std::string_view> found(VmixStatus status, const char* const& text) {
        if (status == VMIX_STATUS_NOT_FOUND) return std::nullopt;
        check(status);
        return text;
    }
};

using AdapterOwner =
    Owner<VmixAdapter, VmixAdapterInfo, vmix_adapter_free, vmix_adapter_info, vmix_adapter_metadata,
          vmix_adapter_label, vmix_adapter_label_find, vmix_adapter_label_display_name,
          vmix_adapter_layer, vmix_adapter_layer_find>;
using ValuesOwner =
    Owner<VmixValues, VmixValuesInfo, vmix_values_free, vmix_values_info, vmix_values_metadata,
          vmix_values_label, vmix_values_label_find, vmix_values_label_display_name,
          vmix_values_layer, vmix_values_layer_find>;

}  // namespace detail

/** V_a of every layer for one selection of labels. */
class Values : public detail::ValuesOwner {
public:
    using Owner::Owner;

    static Values open(std::string_view path) {
        VmixValues* values = nullptr;
        detail::check(vmix_values_open(detail::c_string(path).c_str(), &values));
        return Values(values);
    }

    static Values from_memory(const void* data, std::size_t size) {
        VmixValues* values = nullptr;
        detail::check(vmix_values_open_memory(data, size, &values));
        return Values(values);
    }

    void save(std::string_view path) const {
        detail::check(vmix_values_save(handle(), detail::c_string(path).c_str()));
    }

    /** V_a where it lies, {1, context_tokens, 1, inner_dim}; none where nothing is to be mixed. */
    std::optional<VmixView> get(std::size_t layer, Pass pass) const&& = delete;
    std::optional<VmixView> get(std::size_t layer, Pass pass) const& {
        auto view = detail::sized<VmixView>();
        detail::check(vmix_values_get(handle(), layer, VmixPass(pass), &view));
        return view.data ? std::optional(view) : std::nullopt;
    }

    std::optional<VmixView> get(std::string_view layer, Pass pass) const&& = delete;
    std::optional<VmixView> get(std::string_view layer, Pass pass) const& {
        return get(layer_index(layer), pass);
    }

    /** Throws VMIX_STATUS_NOT_FOUND where get() has none. */
    void copy(std::size_t layer, Pass pass, const VmixViewMut& to) const {
        detail::check(vmix_values_copy(handle(), layer, VmixPass(pass), &to));
    }
};

/** An adapter file: any selection of its labels. */
class Adapter : public detail::AdapterOwner {
public:
    using Owner::Owner;

    static Adapter open(std::string_view path) {
        VmixAdapter* adapter = nullptr;
        detail::check(vmix_adapter_open(detail::c_string(path).c_str(), &adapter));
        return Adapter(adapter);
    }

    static Adapter from_memory(const void* data, std::size_t size) {
        VmixAdapter* adapter = nullptr;
        detail::check(vmix_adapter_open_memory(data, size, &adapter));
        return Adapter(adapter);
    }

    Values values(const ValuesOptions& options = {}) const {
        auto params = detail::sized<VmixValuesParams>();
        params.weights = detail::pointer(options.weights);
        params.weight_count = options.weights.size();
        params.apply_to = VmixApplyTo(options.apply_to);
        params.dtype = VmixDType(options.dtype);
        VmixValues* values = nullptr;
        detail::check(vmix_adapter_values(handle(), &params, &values));
        return Values(values);
    }

    /** f_t, [label_count, context_dim]; without weights, of the file's defaults. Throws
     *  VMIX_STATUS_NOT_FOUND for a file without AesEmb. */
    std::vector<float> aes_embed(Span<float> weights = {}) const {
        std::vector<float> out(info().label_count * info().context_dim);
        detail::check(vmix_adapter_aes_embed(handle(), detail::pointer(weights), weights.size(),
                                             out.data(), out.size()));
        return out;
    }

    /** f_a, [context_tokens, context_dim]; without weights, of the file's defaults. Throws
     *  VMIX_STATUS_NOT_FOUND for a linear adapter, which has none. */
    std::vector<float> project(Span<float> weights = {}) const {
        std::vector<float> out(info().context_tokens * info().context_dim);
        detail::check(vmix_adapter_project(handle(), detail::pointer(weights), weights.size(),
                                           out.data(), out.size()));
        return out;
    }

    /** These weights for ValuesOptions; every other label is at its neutral weight, or at 0. */
    std::vector<float> weights(
        std::initializer_list<std::pair<std::string_view, float>> chosen) const {
        std::vector<float> weights;
        for (const Label& label : labels()) weights.push_back(label.neutral.value_or(0.0f));
        for (const auto& [name, weight] : chosen) weights[label_index(name)] = weight;
        return weights;
    }
};

/** Whichever the file is. */
inline std::variant<Adapter, Values> open(std::string_view path) {
    VmixAdapter* adapter = nullptr;
    VmixValues* values = nullptr;
    detail::check(vmix_open(detail::c_string(path).c_str(), &adapter, &values));
    if (adapter) return Adapter(adapter);
    return Values(values);
}

/** A dense tensor, [batch, tokens, heads, head_dim] in this order in memory. */
inline VmixView view(const float* data, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                     std::int64_t head_dim) noexcept {
    return vmix_view(data, VMIX_DTYPE_F32, batch, tokens, heads, head_dim);
}

/** The same of any dtype: that of 16 bits in memory no type of C++17 tells. */
inline VmixView view(const void* data, DType dtype, std::int64_t batch, std::int64_t tokens,
                     std::int64_t heads, std::int64_t head_dim) noexcept {
    return vmix_view(data, VmixDType(dtype), batch, tokens, heads, head_dim);
}

inline VmixViewMut view_mut(float* data, std::int64_t batch, std::int64_t tokens,
                            std::int64_t heads, std::int64_t head_dim) noexcept {
    return vmix_view_mut(data, VMIX_DTYPE_F32, batch, tokens, heads, head_dim);
}

inline VmixViewMut view_mut(void* data, DType dtype, std::int64_t batch, std::int64_t tokens,
                            std::int64_t heads, std::int64_t head_dim) noexcept {
    return vmix_view_mut(data, VmixDType(dtype), batch, tokens, heads, head_dim);
}

/** value += strength * aes_value; one strength, as in {0.8f}, or one per batch entry. */
inline void mix_values(const VmixViewMut& value, const VmixView& aes_value, Span<float> strength) {
    auto params = detail::sized<VmixMixParams>();
    params.value = &value;
    params.aes_value = &aes_value;
    params.strength = detail::pointer(strength);
    params.strength_count = strength.size();
    detail::check(vmix_mix_values(&params));
}

inline void attention(const AttentionParams& from) {
    const auto pointer = [](const auto& view) { return view ? &*view : nullptr; };
    auto params = detail::sized<VmixAttentionParams>();
    params.query = &from.query;
    params.key = &from.key;
    params.value = &from.value;
    params.aes_value = pointer(from.aes_value);
    params.strength = detail::pointer(from.strength);
    params.strength_count = from.strength.size();
    params.scale = from.scale;
    params.mask = pointer(from.mask);
    params.query_mask = pointer(from.query_mask);
    params.output = &from.output;
    params.attention_map = pointer(from.attention_map);
    params.attention_map_head = from.attention_map_head;
    detail::check(vmix_attention(&params));
}

/** At most so many threads for each call from now on; 0 for all cores. */
inline void set_num_threads(std::size_t count) { vmix_set_num_threads(count); }

/** How many threads a call may use. */
inline std::size_t num_threads() { return vmix_num_threads(); }

/** For programs that come without the library: throws if the one they run with does not fit. */
inline void require_compatible() {
    const auto version = vmix_abi_version();
    if (VMIX_ABI_COMPATIBLE(version)) return;
    const auto text = [](std::uint32_t v) {
        return std::to_string(v >> 16) + "." + std::to_string(v & 0xffff);
    };
    throw Error(VMIX_STATUS_UNSUPPORTED, "vmix library: expected ABI " + text(VMIX_ABI_VERSION) +
                                             " or a later minor version, found " + text(version));
}

}  // namespace vmix

#endif  // VMIX_HPP
