// One cross-attention layer of a ggml host (stable-diffusion.cpp, llama.cpp) with VMix: V_a is a
// constant tensor, and lambda * V_a is added to the output of to_v, before the heads are split.
//
//     g++ -std=c++17 host.cpp $(pkg-config --cflags --libs vmix) -lggml-cpu -lggml-base -o host
//     ./host adapter-or-preset.safetensors mid_block.attentions.0.transformer_blocks.0.attn2
//
// Exit status 1 if that disagrees with the paper's two branches,
// softmax(QK'/sqrt(d)) V_c + lambda softmax(QK'/sqrt(d)) V_a, computed in double precision.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"
#include "vmix.hpp"

// B prompts of K chunks; row-major, so x is [B][L_Q][D_X]. What the file says of the layer:
// chunks of C tokens, values INNER wide.
constexpr int B = 2, L_Q = 24, D_X = 40, K = 2, D_CTX = 48, HEADS = 4;
static int C, INNER, D_HEAD, TOKENS;
// ggml works in single precision: of the largest output, about 1e-6 is seen.
constexpr double TOLERANCE = 1e-5;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
static Floats random_values(size_t n, float deviation = 1.0f) {
    static std::mt19937 rng(1); // a fixed seed: every run sees the same numbers
    Floats values(n);
    std::normal_distribution<float> normal(0.0f, deviation);
    std::generate(values.begin(), values.end(), [&] { return normal(rng); });
    return values;
}

// All of the library that a host needs: V_a of one layer, [C][INNER], as the file has it.
static Floats load_v_a(const char *path, const char *layer) {
    auto file = vmix::open(path);
    if (auto *adapter = std::get_if<vmix::Adapter>(&file)) {
        vmix::Values values = adapter->values(); // the file's default labels
        file = std::move(values);
    }
    const auto &values = std::get<vmix::Values>(file);
    const size_t index = values.layer_index(layer);
    C = static_cast<int>(values.info().context_tokens);
    INNER = static_cast<int>(values.layers()[index].inner_dim);
    D_HEAD = INNER / HEADS, TOKENS = K * C;
    Floats v_a(static_cast<size_t>(C) * INNER);
    values.copy(index, vmix::Pass::cond, vmix::view_mut(v_a.data(), 1, C, 1, INNER));
    return v_a;
}

struct Layer {
    Floats x, context, w_q, w_k, w_v; // weights [out][in], as in a checkpoint
};
static ggml_tensor *constant(ggml_context *ctx, const Floats &values, int ne0, int ne1, int ne2) {
    ggml_tensor *t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
    GGML_ASSERT(ggml_nbytes(t) == values.size() * sizeof(float));
    std::memcpy(t->data, values.data(), ggml_nbytes(t));
    return t;
}

// [INNER, n, B] -> [D_HEAD, n, HEADS, B], still a view.
static ggml_tensor *split_heads(ggml_context *ctx, ggml_tensor *t) {
    return ggml_permute(ctx, ggml_reshape_4d(ctx, t, D_HEAD, HEADS, t->ne[1], B), 0, 2, 1, 3);
}

// The layer's output [B][L_Q][INNER]; without v_a it is the host's layer as it was.
static Floats run_graph(const Layer &layer, const Floats *v_a, float lambda) {
    ggml_context *ctx = ggml_init({/*.mem_size=*/size_t{16} << 20, nullptr, /*.no_alloc=*/false});
    ggml_tensor *context = constant(ctx, layer.context, D_CTX, TOKENS, B);
    ggml_tensor *x = constant(ctx, layer.x, D_X, L_Q, B);
    ggml_tensor *q = ggml_mul_mat(ctx, constant(ctx, layer.w_q, D_X, INNER, 1), x);
    ggml_tensor *k = ggml_mul_mat(ctx, constant(ctx, layer.w_k, D_CTX, INNER, 1), context);
    ggml_tensor *v = ggml_mul_mat(ctx, constant(ctx, layer.w_v, D_CTX, INNER, 1), context);
    // All of VMix. ggml_add repeats V_a [INNER, C, 1] over v [INNER, K * C, B]: once for every
    // chunk and prompt. At lambda = 0 the node is left out, so the host's bits are unchanged.
    if (v_a != nullptr && lambda != 0.0f) {
        ggml_tensor *a = ggml_scale(ctx, constant(ctx, *v_a, INNER, C, 1), lambda);
        GGML_ASSERT(ggml_can_repeat(a, v)); // a whole number of chunks
        v = ggml_add(ctx, v, a);
    }
    q = ggml_cont(ctx, split_heads(ctx, q));
    k = ggml_cont(ctx, split_heads(ctx, k));
    v = ggml_cont(ctx, ggml_transpose(ctx, split_heads(ctx, v))); // [TOKENS, D_HEAD, HEADS, B]
    ggml_tensor *scores = ggml_mul_mat(ctx, k, q);                // [TOKENS, L_Q, HEADS, B]
    scores = ggml_soft_max_ext(ctx, scores, nullptr, 1.0f / std::sqrt(static_cast<float>(D_HEAD)), 0.0f);
    ggml_tensor *out = ggml_mul_mat(ctx, v, scores); // [D_HEAD, L_Q, HEADS, B]
    out = ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));
    ggml_cgraph *graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    GGML_ASSERT(ggml_graph_compute_with_ctx(ctx, graph, /*n_threads=*/1) == GGML_STATUS_SUCCESS);
    Floats result(ggml_nelements(out));
    std::memcpy(result.data(), out->data, ggml_nbytes(out));
    ggml_free(ctx);
    return result;
}

// rows [n][in] times the transpose of w [INNER][in], in double precision.
static Doubles project(const Floats &rows, const Floats &w, int in) {
    Doubles out(rows.size() / in * INNER);
    for (size_t r = 0; r < rows.size() / in; r++)
        for (int o = 0; o < INNER; o++)
            for (int i = 0; i < in; i++)
                out[r * INNER + o] += static_cast<double>(rows[r * in + i]) * w[o * in + i];
    return out;
}

// The paper's formula to the letter: each branch has its own weighted sum.
static Doubles two_branches(const Layer &layer, const Floats &v_a, double lambda) {
    const Doubles q = project(layer.x, layer.w_q, D_X);
    const Doubles k = project(layer.context, layer.w_k, D_CTX);
    const Doubles v_c = project(layer.context, layer.w_v, D_CTX);
    Doubles out(q.size());
    for (int row = 0; row < B * L_Q; row++)
        for (int head = 0; head < HEADS; head++) {
            const size_t q0 = static_cast<size_t>(row) * INNER + head * D_HEAD;
            const size_t k0 = static_cast<size_t>(row / L_Q) * TOKENS * INNER + head * D_HEAD;
            Doubles p(TOKENS);
            double sum = 0.0; // the scores are small: exp needs no shift by their maximum
            for (int t = 0; t < TOKENS; t++) {
                for (int d = 0; d < D_HEAD; d++)
                    p[t] += q[q0 + d] * k[k0 + t * INNER + d];
                sum += p[t] = std::exp(p[t] / std::sqrt(static_cast<double>(D_HEAD)));
            }
            for (int d = 0; d < D_HEAD; d++) {
                double text = 0.0, aesthetic = 0.0;
                for (int t = 0; t < TOKENS; t++) {
                    text += p[t] / sum * v_c[k0 + t * INNER + d];
                    aesthetic += p[t] / sum * v_a[t % C * INNER + head * D_HEAD + d];
                }
                out[q0 + d] = text + lambda * aesthetic;
            }
        }
    return out;
}

static int run(const char *path, const char *name) {
    const Floats v_a = load_v_a(path, name);
    const Layer layer{random_values(B * L_Q * D_X), random_values(B * TOKENS * D_CTX),
                      random_values(INNER * D_X, 0.15f), random_values(INNER * D_CTX, 0.15f),
                      random_values(INNER * D_CTX, 0.15f)};
    // The layer as it was; and what stands in V_a's place at lambda = 0, where nothing may read it.
    const Floats without = run_graph(layer, nullptr, 0.0f);
    const Floats unread(v_a.size(), NAN);
    bool ok = true;
    for (float lambda : {0.0f, 0.5f, 1.0f, -2.0f}) {
        const Floats got = run_graph(layer, lambda == 0.0f ? &unread : &v_a, lambda);
        const Doubles want = two_branches(layer, v_a, lambda);
        double error = 0.0, largest = 0.0;
        for (size_t i = 0; i < want.size(); i++) {
            const double e = std::fabs(got[i] - want[i]);
            error = std::isnan(e) ? INFINITY : std::max(error, e); // max alone loses a NaN
            largest = std::max(largest, std::fabs(want[i]));
        }
        error /= largest;
        const bool same = std::memcmp(got.data(), without.data(), got.size() * sizeof(float)) == 0;
        std::printf("lambda %4.1f: largest relative error %.1e%s\n", lambda, error,
                    same ? ", bit-identical to the layer without VMix" : "");
        ok = ok && error <= TOLERANCE && same == (lambda == 0.0f);
    }
    std::printf("%s: tolerance %.0e\n", ok ? "ok" : "FAILED", TOLERANCE);
    return ok ? 0 : 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s FILE LAYER\n", argv[0]);
        return 2;
    }
    try {
        return run(argv[1], argv[2]);
    } catch (const vmix::Error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
