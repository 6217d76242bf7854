// DecodeStep for Python: checks tensors once, keeps them alive, and hands their addresses over.
#include "cpu/step/binding.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dtype_of.h"
#include "cpu/step/ahead.h"
#include "cpu/step/step.h"

namespace depthprune {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;

constexpr const char* kOp = "decode_step";
constexpr int64_t kMostSize = 1 << 30;  // of a dimension: products of two fit 64 bits
constexpr int64_t kMostSteps = 1 << 30;

void check_size(const char* name, int64_t size) {
  DEPTHPRUNE_CHECK(size >= 1 && size <= kMostSize, kOp, name, c10::str("1 to ", kMostSize), size);
}

// Weight [N, K] as [weight] or [panels], or as [codes, scales] or [codes, scales, zeros] with its sizes.
struct StepLinear {
  Tensors weight;
  std::optional<at::Tensor> bias;
  int64_t out_features;
  int64_t in_features;
  int64_t bits;  // 0: rows in the model's dtype; 16: bfloat16 in panels
  int64_t group_size;

  StepLinear(
      Tensors weight, std::optional<at::Tensor> bias, int64_t out_features, int64_t in_features, int64_t bits,
      int64_t group_size)
      : weight(std::move(weight)),
        bias(std::move(bias)),
        out_features(out_features),
        in_features(in_features),
        bits(bits),
        group_size(group_size) {
    check_size("out_features", out_features);
    check_size("in_features", in_features);
    const auto count = static_cast<int64_t>(this->weight.size());
    DEPTHPRUNE_CHECK(bits == 0 || bits == 4 || bits == 8 || bits == 16, kOp, "bits", "0, 4, 8 or 16", bits);
    const bool dense = bits == 0 || bits == 16;
    DEPTHPRUNE_CHECK(
        dense ? count == 1 : count == 2 || count == 3, kOp, "weight",
        dense ? "one tensor" : "two tensors, or three with zero points", c10::str(count, " tensors"));
    DEPTHPRUNE_CHECK(
        dense || group_size == 32 || group_size == 64 || group_size == 128, kOp, "group_size", "32, 64 or 128",
        group_size);
  }
};

class Builder {
 public:
  Builder(at::ScalarType dtype, int64_t hidden_size, double eps) : dtype_(dtype) {
    DEPTHPRUNE_CHECK(is_known(dtype), kOp, "dtype", "bfloat16, float16 or float32", dtype);
    check_size("hidden_size", hidden_size);
    weights_.dtype = dtype_of(dtype);
    weights_.hidden_size = hidden_size;
    weights_.eps = static_cast<float>(eps);
  }

  void add_attention(
      const at::Tensor& norm, const StepLinear& qkv, const StepLinear& o, const std::optional<at::Tensor>& q_norm,
      const std::optional<at::Tensor>& k_norm, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, double scale,
      int64_t window, int64_t rotary, const at::Tensor& k_cache, const at::Tensor& v_cache) {
    check_size("num_heads", num_heads);
    check_size("num_kv_heads", num_kv_heads);
    check_size("head_dim", head_dim);
    DEPTHPRUNE_CHECK(
        num_heads % num_kv_heads == 0 && head_dim % 2 == 0, kOp, "num_heads, num_kv_heads, head_dim",
        "whole groups and an even head_dim", c10::str(num_heads, ", ", num_kv_heads, ", ", head_dim));
    DEPTHPRUNE_CHECK(window >= 0, kOp, "window", "at least 0 (0: all tokens)", window);
    DEPTHPRUNE_CHECK(
        q_norm.has_value() == k_norm.has_value(), kOp, "q_norm and k_norm", "both or neither",
        q_norm ? "q_norm alone" : "k_norm alone");
    DEPTHPRUNE_CHECK(
        k_cache.dim() == 4 && k_cache.size(1) > 0, kOp, "k_cache", "shape [N, P, K, D], P at least 1", k_cache.sizes());
    AttentionLayer layer{};
    layer.norm = plain("norm", norm, {hidden()});
    layer.qkv = projection("qkv", qkv, (num_heads + 2 * num_kv_heads) * head_dim, hidden());
    layer.o = projection("o", o, hidden(), num_heads * head_dim);
    if (q_norm) layer.q_norm = plain("q_norm", *q_norm, {num_heads, head_dim});
    if (k_norm) layer.k_norm = plain("k_norm", *k_norm, {num_kv_heads, head_dim});
    layer.num_heads = num_heads;
    layer.num_kv_heads = num_kv_heads;
    layer.head_dim = head_dim;
    layer.scale = static_cast<float>(scale);
    layer.window = window;
    layer.rotary = rotary;
    layer.num_kv_blocks = k_cache.size(0);
    layer.kv_block_size = k_cache.size(1);
    layer.k_cache = cache("k_cache", k_cache, {layer.num_kv_blocks, layer.kv_block_size, num_kv_heads, head_dim});
    layer.v_cache = cache("v_cache", v_cache, {layer.num_kv_blocks, layer.kv_block_size, num_kv_heads, head_dim});
    weights_.layers.emplace_back(layer);
  }

  void add_ffn(const at::Tensor& norm, const StepLinear& gate_up, const StepLinear& down) {
    FfnLayer layer{};
    layer.norm = plain("norm", norm, {hidden()});
    layer.gate_up = projection("gate_up", gate_up, 2 * down.in_features, hidden());
    layer.down = projection("down", down, hidden(), down.in_features);
    weights_.layers.emplace_back(layer);
  }

  void set_ends(const StepLinear& embedding, const at::Tensor& norm, const StepLinear& lm_head) {
    // A token that is chosen is looked up in the next step.
    DEPTHPRUNE_CHECK(
        lm_head.out_features <= embedding.out_features, kOp, "lm_head",
        c10::str("at most ", embedding.out_features, " rows (those of the embedding)"), lm_head.out_features);
    weights_.embedding = projection("embedding", embedding, embedding.out_features, hidden());
    weights_.lm_head = projection("lm_head", lm_head, lm_head.out_features, hidden());
    weights_.norm = plain("norm", norm, {hidden()});
  }

  DecoderWeights weights() const { return weights_; }
  Tensors tensors() const { return tensors_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  int64_t hidden() const { return weights_.hidden_size; }

  const void* part(const char* name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
    DEPTHPRUNE_CHECK(
        t.sizes() == sizes && t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), kOp, name,
        c10::str("shape ", sizes, ", dtype ", dtype, ", dense, device cpu"),
        c10::str(t.sizes(), " ", t.scalar_type(), " ", t.device()));
    tensors_.push_back(t);
    return t.const_data_ptr();
  }

  const void* plain(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
    return part(name, t, dtype_, sizes);
  }

  attention::Source cache(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
    return {part(name, t, dtype_, sizes), t.stride(0), t.stride(1), t.stride(2)};
  }

  Projection projection(const char* name, const StepLinear& linear, int64_t out_features, int64_t in_features) {
    DEPTHPRUNE_CHECK(
        linear.out_features == out_features && linear.in_features == in_features, kOp, name,
        c10::str("shape [", out_features, ", ", in_features, "]"),
        c10::str("[", linear.out_features, ", ", linear.in_features, "]"));
    Projection found{};
    found.dtype = weights_.dtype;
    found.out_features = out_features;
    found.in_features = in_features;
    if (linear.bias) found.bias = plain(name, *linear.bias, {out_features});
    if (linear.bits == 0) {
      found.weight = plain(name, linear.weight.at(0), {out_features, in_features});
      return found;
    }
    if (linear.bits == 16) {
      const int64_t count = (out_features + kGemmRows - 1) / kGemmRows;
      DEPTHPRUNE_CHECK(dtype_ == at::kBFloat16, kOp, name, "a model in bfloat16, for panels", dtype_);
      found.panels = static_cast<const uint32_t*>(
          plain(name, linear.weight.at(0), {count, (in_features + 31) / 32 * 16, kGemmRows, 2}));
      return found;
    }
    QuantizedWeight& codes = found.codes;
    codes.out_features = out_features;
    codes.in_features = in_features;
    codes.group_size = linear.group_size;
    codes.groups = (in_features + linear.group_size - 1) / linear.group_size;
    codes.bits = static_cast<int>(linear.bits);
    const int64_t panels = codes.panels();
    codes.codes = static_cast<const uint8_t*>(
        part(name, linear.weight.at(0), at::kByte, {panels, codes.padded() * linear.bits / 32, kPanelRows, 4}));
    codes.scales = static_cast<const uint16_t*>(
        part(name, linear.weight.at(1), at::kBFloat16, {panels, codes.groups, kPanelRows}));
    if (linear.weight.size() > 2) {
      codes.zeros =
          static_cast<const uint8_t*>(part(name, linear.weight.at(2), at::kByte, {panels, codes.groups, kPanelRows}));
    }
    return found;
  }

  at::ScalarType dtype_;
  DecoderWeights weights_{};
  Tensors tensors_;
};

// A dense int64 tensor on the CPU.
const int64_t* integers(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  DEPTHPRUNE_CHECK(
      t.sizes() == sizes && t.scalar_type() == at::kLong && t.is_cpu() && t.is_contiguous(), kOp, name,
      c10::str("shape ", sizes, ", dtype Long, dense, device cpu"),
      c10::str(t.sizes(), " ", t.scalar_type(), " ", t.device()));
  return t.const_data_ptr<int64_t>();
}

void check_values(const char* name, const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    DEPTHPRUNE_CHECK(
        values[i] >= 0 && values[i] < limit, kOp, name, c10::str("values from 0 to ", limit - 1),
        c10::str(values[i], " at index ", i));
  }
}

class Step {
 public:
  explicit Step(const Builder& builder)
      : tensors_(builder.tensors()), dtype_(builder.dtype()), step_(builder.weights()) {
    DEPTHPRUNE_CHECK(step_.weights().norm != nullptr, kOp, "builder", "both ends (set_ends)", "none");
  }

  int64_t max_tokens() const { return step_.max_tokens(); }

  at::Tensor run(
      const at::Tensor& ids,           // [T]
      const at::Tensor& positions,     // [T]
      const at::Tensor& slots,         // [T]
      const at::Tensor& block_tables,  // [T, M]
      const at::Tensor& context_lens,  // [T]
      const Tensors& cos_sin) {        // [S, 2, D/2] each -> [T, V]
    const DecoderWeights& weights = step_.weights();
    const int64_t tokens = count_of(ids);
    StepInputs inputs{};
    inputs.tokens = tokens;
    inputs.ids = integers("ids", ids, {tokens});
    inputs.positions = integers("positions", positions, {tokens});
    inputs.slots = integers("slots", slots, {tokens});
    DEPTHPRUNE_CHECK(block_tables.dim() == 2, kOp, "block_tables", "shape [T, M]", block_tables.sizes());
    inputs.table_width = block_tables.size(1);
    inputs.block_tables = integers("block_tables", block_tables, {tokens, inputs.table_width});
    inputs.context_lens = integers("context_lens", context_lens, {tokens});
    check_values("ids", inputs.ids, tokens, weights.embedding.out_features);
    inputs.cos_sin = tables_of(cos_sin, inputs.positions, tokens, 0);
    const AttentionLayer* checked = nullptr;
    for (const auto& layer : weights.layers) {
      const auto* attention = std::get_if<AttentionLayer>(&layer);
      if (attention == nullptr) continue;
      check_table(*attention, cos_sin);
      // All sub-layers have the same kv_blocks as a rule: then the first pays for the loop.
      if (checked == nullptr || checked->num_kv_blocks != attention->num_kv_blocks ||
          checked->kv_block_size != attention->kv_block_size) {
        check_values("slots", inputs.slots, tokens, attention->num_kv_blocks * attention->kv_block_size);
        check_contexts(*attention, inputs.block_tables, inputs.table_width, inputs.context_lens, tokens);
      }
      checked = attention;
    }
    at::Tensor logits = at::empty({tokens, weights.lm_head.out_features}, at::TensorOptions().dtype(dtype_));
    step_.run(inputs, logits.mutable_data_ptr(), at::get_num_threads());
    return logits;
  }

  at::Tensor ahead(
      const at::Tensor& ids,           // [T]
      const at::Tensor& positions,     // [T]
      const at::Tensor& block_tables,  // [T, M], with room for all steps
      const Tensors& cos_sin,          // [S, 2, D/2] each
      const at::Tensor& stop_ids,      // [T, E], padded with -1
      int64_t steps,
      double seconds) {  // -> [steps that were made, T]
    const DecoderWeights& weights = step_.weights();
    const int64_t tokens = count_of(ids);
    DEPTHPRUNE_CHECK(steps >= 1 && steps <= kMostSteps, kOp, "steps", c10::str("1 to ", kMostSteps), steps);
    DEPTHPRUNE_CHECK(block_tables.dim() == 2, kOp, "block_tables", "shape [T, M]", block_tables.sizes());
    DEPTHPRUNE_CHECK(stop_ids.dim() == 2, kOp, "stop_ids", "shape [T, E]", stop_ids.sizes());
    AheadInputs inputs{};
    inputs.tokens = tokens;
    inputs.ids = integers("ids", ids, {tokens});
    inputs.positions = integers("positions", positions, {tokens});
    inputs.table_width = block_tables.size(1);
    inputs.block_tables = integers("block_tables", block_tables, {tokens, inputs.table_width});
    inputs.stop_width = stop_ids.size(1);
    inputs.stop_ids = integers("stop_ids", stop_ids, {tokens, inputs.stop_width});
    inputs.steps = steps;
    inputs.seconds = seconds;
    check_values("ids", inputs.ids, tokens, weights.embedding.out_features);
    inputs.cos_sin = tables_of(cos_sin, inputs.positions, tokens, steps - 1);
    int64_t num_kv_blocks = 0;
    std::vector<int64_t> contexts(tokens);  // after the last step
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = inputs.positions[t];
      DEPTHPRUNE_CHECK(
          position >= 0 && position < kMostSize, kOp, "positions", c10::str("values from 0 to ", kMostSize - 1),
          position);
      contexts[t] = position + steps;
    }
    for (const auto& layer : weights.layers) {
      const auto* attention = std::get_if<AttentionLayer>(&layer);
      if (attention == nullptr) continue;
      check_table(*attention, cos_sin);
      if (inputs.kv_block_size == 0) {
        inputs.kv_block_size = attention->kv_block_size;
        num_kv_blocks = attention->num_kv_blocks;
        check_contexts(*attention, inputs.block_tables, inputs.table_width, contexts.data(), tokens);
      }
      DEPTHPRUNE_CHECK(
          attention->kv_block_size == inputs.kv_block_size && attention->num_kv_blocks == num_kv_blocks, kOp, "k_cache",
          "kv_blocks of one size and number", c10::str(attention->num_kv_blocks, " of ", attention->kv_block_size));
    }
    at::Tensor found = at::empty({steps, tokens}, at::TensorOptions().dtype(at::kLong));
    const int64_t made = decode_ahead(step_, inputs, at::get_num_threads(), found.mutable_data_ptr<int64_t>());
    return found.narrow(0, 0, made);
  }

 private:
  // T, which must fit.
  int64_t count_of(const at::Tensor& ids) const {
    const int64_t tokens = ids.dim() == 1 ? ids.size(0) : 0;
    DEPTHPRUNE_CHECK(
        tokens > 0 && tokens <= max_tokens(), kOp, "ids", c10::str("1 to ", max_tokens(), " tokens"), ids.sizes());
    return tokens;
  }

  // The rotary tables, which must hold each position and `more` after it.
  static std::vector<const float*> tables_of(
      const Tensors& cos_sin, const int64_t* positions, int64_t tokens, int64_t more) {
    std::vector<const float*> found;
    for (const at::Tensor& table : cos_sin) {
      DEPTHPRUNE_CHECK(
          table.dim() == 3 && table.scalar_type() == at::kFloat && table.is_contiguous() && table.is_cpu(), kOp,
          "cos_sin", "shape [S, 2, D/2], dtype Float, dense, device cpu", table.sizes());
      check_values("positions", positions, tokens, table.size(0) - more);
      found.push_back(table.const_data_ptr<float>());
    }
    return found;
  }

  static void check_table(const AttentionLayer& layer, const Tensors& cos_sin) {
    const bool there = layer.rotary >= 0 && layer.rotary < static_cast<int64_t>(cos_sin.size());
    DEPTHPRUNE_CHECK(
        there && cos_sin[layer.rotary].size(1) == 2 && cos_sin[layer.rotary].size(2) * 2 == layer.head_dim, kOp,
        "cos_sin", c10::str("a table [S, 2, ", layer.head_dim / 2, "] at ", layer.rotary),
        there ? c10::str(cos_sin[layer.rotary].sizes()) : c10::str(cos_sin.size(), " tables"));
  }

  static void check_contexts(
      const AttentionLayer& layer, const int64_t* block_tables, int64_t table_width, const int64_t* context_lens,
      int64_t tokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t context = context_lens[t];
      DEPTHPRUNE_CHECK(
          context >= 1 && context <= table_width * layer.kv_block_size, kOp, "context_lens",
          c10::str("values from 1 to ", table_width * layer.kv_block_size), context);
      const int64_t used = (context + layer.kv_block_size - 1) / layer.kv_block_size;
      check_values("block_tables", block_tables + t * table_width, used, layer.num_kv_blocks);
    }
  }

  Tensors tensors_;
  at::ScalarType dtype_;
  DecodeStep step_;
};

}  // namespace

void bind_decode_step(py::module_& m) {
  py::class_<StepLinear>(m, "StepLinear")
      .def(
          py::init<Tensors, std::optional<at::Tensor>, int64_t, int64_t, int64_t, int64_t>(), py::arg("weight"),
          py::arg("bias"), py::arg("out_features"), py::arg("in_features"), py::arg("bits"), py::arg("group_size"));
  py::class_<Builder>(m, "StepBuilder")
      .def(py::init<at::ScalarType, int64_t, double>(), py::arg("dtype"), py::arg("hidden_size"), py::arg("eps"))
      .def(
          "add_attention", &Builder::add_attention, py::arg("norm"), py::arg("qkv"), py::arg("o"), py::arg("q_norm"),
          py::arg("k_norm"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("scale"),
          py::arg("window"), py::arg("rotary"), py::arg("k_cache"), py::arg("v_cache"))
      .def("add_ffn", &Builder::add_ffn, py::arg("norm"), py::arg("gate_up"), py::arg("down"))
      .def("set_ends", &Builder::set_ends, py::arg("embedding"), py::arg("norm"), py::arg("lm_head"));
  py::class_<Step>(m, "DecodeStep")
      .def(py::init<const Builder&>())
      .def("max_tokens", &Step::max_tokens)
      .def("run", &Step::run, py::call_guard<py::gil_scoped_release>())
      .def("ahead", &Step::ahead, py::call_guard<py::gil_scoped_release>());
}

}  // namespace depthprune
