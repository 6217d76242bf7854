// DecodeStep for Python: checks what a step is given, and hands its addresses over.
#include "cpu/step/binding.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/step/ahead.h"
#include "cpu/step/builder.h"
#include "cpu/step/step.h"

namespace depthprune {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;

constexpr const char* kOp = "decode_step";
constexpr int64_t kMostSteps = 1 << 30;

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
  explicit Step(const StepBuilder& builder)
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
          py::init<Tensors, std::optional<at::Tensor>, int64_t, int64_t, int64_t, int64_t, int64_t>(),
          py::arg("weight"), py::arg("bias"), py::arg("out_features"), py::arg("in_features"), py::arg("format"),
          py::arg("bits"), py::arg("group_size"));
  py::class_<StepBuilder>(m, "StepBuilder")
      .def(py::init<at::ScalarType, int64_t, double>(), py::arg("dtype"), py::arg("hidden_size"), py::arg("eps"))
      .def(
          "add_attention", &StepBuilder::add_attention, py::arg("norm"), py::arg("qkv"), py::arg("o"),
          py::arg("q_norm"), py::arg("k_norm"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
          py::arg("scale"), py::arg("window"), py::arg("rotary"), py::arg("k_cache"), py::arg("v_cache"))
      .def("add_ffn", &StepBuilder::add_ffn, py::arg("norm"), py::arg("gate_up"), py::arg("down"))
      .def("set_ends", &StepBuilder::set_ends, py::arg("embedding"), py::arg("norm"), py::arg("lm_head"));
  py::class_<Step>(m, "DecodeStep")
      .def(py::init<const StepBuilder&>())
      .def("max_tokens", &Step::max_tokens)
      .def("run", &Step::run, py::call_guard<py::gil_scoped_release>())
      .def("ahead", &Step::ahead, py::call_guard<py::gil_scoped_release>());
}

}  // namespace depthprune
