// The extension module fastfusion._C: nothing but the schemas of the CPU ops. They are internal:
// fastfusion/ops/cpp_backend.py calls them, fastfusion/ops/adapter_fusion.py says what they
// compute. The routing ops have PyTorch implementations beside ours: their schemas are in
// fastfusion/ops/routing.py.
//
// All tensors are contiguous. Activations, weights and gradients are fp32 or bf16, all alike;
// biases, LayerNorm parameters, mask, temperature, score_offset, p and doffset are fp32.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) {
  m.def(
      "adapter_fusion_cpu(Tensor[] x, Tensor? query, Tensor? residual, Tensor w_down, "
      "Tensor b_down, Tensor? w_score, Tensor? b_score, Tensor w_out, Tensor? temperature, "
      "Tensor? mask, Tensor? score_offset, int[] sizes, int[] activations) -> (Tensor, Tensor)");
  m.def(
      "adapter_fusion_backward_cpu(Tensor grad_out, Tensor[] x, Tensor? query, Tensor w_down, "
      "Tensor b_down, Tensor? w_score, Tensor? b_score, Tensor w_out, Tensor? temperature, "
      "Tensor? mask, Tensor p, int[] sizes, int[] activations, bool needs_x, bool needs_query, "
      "bool needs_down, bool needs_score, bool needs_out, bool needs_offset) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adapter_fusion_norm_cpu(Tensor hidden, Tensor input, Tensor ln_weight, Tensor ln_bias, "
      "float ln_eps, bool ln_before, Tensor w_down, Tensor b_down, Tensor? w_score, "
      "Tensor? b_score, Tensor w_out, Tensor? temperature, Tensor? mask, int[] sizes, "
      "int[] activations, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adapter_fusion_norm_backward_cpu(Tensor grad_out, Tensor? hidden, Tensor summed, "
      "Tensor pre_norm, Tensor ln_weight, Tensor ln_bias, float ln_eps, bool ln_before, "
      "Tensor w_down, Tensor b_down, Tensor? w_score, Tensor? b_score, Tensor w_out, "
      "Tensor? temperature, Tensor? mask, Tensor p, int[] sizes, int[] activations, bool needs_x, "
      "bool needs_down, bool needs_score, bool needs_out) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adapter_fusion_grouped_cpu(Tensor x, Tensor? residual, Tensor order, Tensor offsets, "
      "Tensor blocks, Tensor w_in, Tensor b_in, Tensor w_out, Tensor? mask, int[] sizes, "
      "int[] activations, int[] counts, int[] scored) -> (Tensor, Tensor)");
  m.def(
      "adapter_fusion_grouped_backward_cpu(Tensor grad_out, Tensor x, Tensor order, "
      "Tensor offsets, Tensor blocks, Tensor w_in, Tensor b_in, Tensor w_out, Tensor? mask, "
      "Tensor p, int[] sizes, int[] activations, int[] counts, int[] scored, bool needs_x, "
      "bool needs_in, bool needs_out) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
