/*
 * Value-mixed cross-attention of one layer, with vmix::attention() and as the paper writes it.
 *
 *   attention comfy_nodes/demo/adapter.safetensors
 *
 * The paper's equations 3, 8 and 9 have two branches, softmax(Q K^T / sqrt D) V_c and lambda times
 * softmax(Q K^T / sqrt D) V_a; vmix adds lambda V_a to V_c and needs one. Exits with 1 where they
 * differ by more than roundings do, or where lambda = 0 is not attention without V_a to the last bit.
 */
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <random>
#include <vector>

#include "vmix.hpp"

namespace {

constexpr std::size_t batch = 2, queries = 64, heads = 4, chunks = 2;
constexpr float lambda = 0.8f;

std::vector<float> normal(std::size_t count, std::mt19937& generator) {
    std::normal_distribution<float> distribution;
    std::vector<float> numbers(count);
    for (float& number : numbers) number = distribution(generator);
    return numbers;
}

vmix::AttentionParams ordinary_attention(const std::vector<float>& q, const std::vector<float>& k,
                                         const std::vector<float>& v, std::size_t keys,
                                         std::size_t dim, std::vector<float>& out) {
    vmix::AttentionParams params;
    params.query = vmix::view(q.data(), batch, queries, heads, dim);
    params.key = vmix::view(k.data(), batch, keys, heads, dim);
    params.value = vmix::view(v.data(), batch, keys, heads, dim);
    params.output = vmix::view_mut(out.data(), batch, queries, heads, dim);
    return params;
}

int run(const char* path) {
    vmix::require_compatible();
    const auto adapter = vmix::Adapter::open(path);
    const auto values = adapter.values();  // the file's default labels, in f32
    const auto layer = values.layers().front();
    const auto v_a = values.get(layer.name, vmix::Pass::cond).value();
    std::printf("%s: %zu labels, layer %.*s\n", path, values.info().label_count,
                int(layer.name.size()), layer.name.data());

    const std::size_t width = layer.inner_dim, dim = width / heads;
    const std::size_t tokens = values.info().context_tokens, keys = chunks * tokens;
    std::mt19937 generator(1);
    const auto q = normal(batch * queries * width, generator);
    const auto k = normal(batch * keys * width, generator);
    const auto v_c = normal(batch * keys * width, generator);

    std::vector<float> mixed(q.size()), plain(q.size()), off(q.size());
    auto params = ordinary_attention(q, k, v_c, keys, dim, plain);
    vmix::attention(params);
    params.aes_value = v_a;
    params.strength = {0};
    params.output.data = off.data();
    vmix::attention(params);
    params.strength = {lambda};
    params.output.data = mixed.data();
    vmix::attention(params);

    const auto* a = static_cast<const float*>(v_a.data);
    double error = 0, effect = 0, largest_score = 0, largest_value = 0;
    std::vector<double> weights(keys);
    for (std::size_t b = 0; b < batch; ++b)
        for (std::size_t i = 0; i < queries; ++i)
            for (std::size_t head = 0; head < width; head += dim) {
                double top = -std::numeric_limits<double>::infinity(), total = 0;
                for (std::size_t j = 0; j < keys; ++j) {
                    double score = 0, magnitude = 0;
                    for (std::size_t c = head; c < head + dim; ++c) {
                        const double product = double(q[(b * queries + i) * width + c]) *
                                               double(k[(b * keys + j) * width + c]);
                        score += product / std::sqrt(double(dim));
                        magnitude += std::abs(product) / std::sqrt(double(dim));
                    }
                    weights[j] = score;
                    top = std::max(top, score);
                    largest_score = std::max(largest_score, magnitude);
                }
                for (double& weight : weights) {
                    weight = std::exp(weight - top);
                    total += weight;
                }
                for (std::size_t c = head; c < head + dim; ++c) {
                    double content = 0, aesthetic = 0;
                    for (std::size_t j = 0; j < keys; ++j) {
                        const double c_value = v_c[(b * keys + j) * width + c];
                        const double a_value = a[j % tokens * width + c];
                        content += weights[j] / total * c_value;
                        aesthetic += weights[j] / total * a_value;
                        largest_value = std::max(
                            largest_value, std::abs(c_value) + double(lambda) * std::abs(a_value));
                    }
                    const double found = mixed[(b * queries + i) * width + c];
                    error = std::max(error, std::abs(found - (content + lambda * aesthetic)));
                    effect = std::max(effect, std::abs(lambda * aesthetic));
                }
            }

    // A result is an average of values. In f32 a score takes part in `dim` roundings, which exp()
    // makes relative ones of its weight, once above and once below the fraction; sums over the keys
    // take `keys` more, also twice; 16 are for exp(), the division, and the mix.
    const double roundings = 2 * double(dim) * largest_score + 2 * double(keys) + 16;
    const double tolerance =
        roundings * double(std::numeric_limits<float>::epsilon()) / 2 * largest_value;
    const bool same = std::memcmp(off.data(), plain.data(), off.size() * sizeof(float)) == 0;
    std::printf("V_a moves results by up to %.3g; largest error %.3g, tolerance %.3g\n", effect,
                error, tolerance);
    std::printf("lambda = 0 %s attention without V_a\n", same ? "is" : "IS NOT");
    // An effect below the tolerance would prove nothing.
    return same && error <= tolerance && effect > 10 * tolerance ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: attention ADAPTER.safetensors\n");
        return 2;
    }
    try {
        return run(argv[1]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "attention: %s\n", error.what());
        return 1;
    }
}
