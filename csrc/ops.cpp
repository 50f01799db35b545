// Table of contents: the schema of every operator and the facts of this build. Kernels register
// themselves for CPU in cpu/<op>.cpp and for CUDA in cuda/bindings.cpp; reasoners/ops.py documents
// each operator and adds its fake function and derivative.

#include <torch/extension.h>
#include <torch/library.h>

TORCH_LIBRARY(reasoners, m) {
  // Chunked scan of the scalar-decay recurrence (discrete Mamba-2, Mamba-2) and its derivative.
  m.def(
      "ssd_scan(Tensor x, Tensor log_decay, Tensor B, Tensor C, Tensor? scale, Tensor? D, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor y, Tensor final_state)");
  m.def(
      "ssd_scan_backward(Tensor dy, Tensor dfinal_state, Tensor x, Tensor log_decay, Tensor B, "
      "Tensor C, Tensor? scale, Tensor? D, Tensor? initial_state, Tensor? cu_seqlens) -> "
      "(Tensor dx, Tensor dlog_decay, Tensor dB, Tensor dC, Tensor dscale, Tensor dD, "
      "Tensor dinitial_state)");
  // The same recurrence, one token a row, on states kept in slots.
  m.def(
      "state_update(Tensor(a!) state, Tensor slots, Tensor x, Tensor log_decay, Tensor B, "
      "Tensor C, Tensor? scale, Tensor? D, Tensor? rng_key) -> Tensor");
  // And with the state written every `period` tokens only.
  m.def(
      "deferred_state_update(Tensor(a!) state, Tensor(b!) recent, Tensor(c!) recent_decay, "
      "Tensor pending, Tensor slots, Tensor x, Tensor log_decay, Tensor B, Tensor C, "
      "Tensor? scale, Tensor? D, int period, Tensor? rng_key) -> Tensor");
  m.def("count_pending(Tensor(a!) pending, Tensor slots, int period) -> ()");
  // Mamba-1: a decay per channel and state entry.
  m.def(
      "selective_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor y, Tensor final_state)");
  m.def(
      "selective_scan_backward(Tensor dy, Tensor dfinal_state, Tensor x, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D, Tensor? initial_state, Tensor? cu_seqlens) -> "
      "(Tensor dx, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
      "Tensor dinitial_state)");
  m.def(
      "selective_update(Tensor(a!) state, Tensor slots, Tensor x, Tensor delta, Tensor A, "
      "Tensor B, Tensor C, Tensor? D) -> Tensor");
  // Short depthwise convolution in front of a mixer.
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor dfinal_state, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "conv_update(Tensor(a!) state, Tensor slots, Tensor lengths, Tensor x, Tensor weight, "
      "Tensor? bias, bool silu) -> Tensor");
  // A whole recurrent mixer between its projections: over sequences, without a derivative.
  m.def(
      "discrete_mamba2_scan(Tensor projected, Tensor conv_weight, Tensor conv_bias, Tensor z_bias, "
      "Tensor D, int state_dim, Tensor? past, Tensor? initial_state, Tensor? cu_seqlens) -> "
      "(Tensor y, Tensor last_inputs, Tensor final_state)");
  m.def(
      "mamba2_scan(Tensor projected, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, "
      "Tensor A_log, Tensor D, Tensor norm_weight, float eps, int state_dim, Tensor? past, "
      "Tensor? initial_state, Tensor? cu_seqlens) -> "
      "(Tensor y, Tensor last_inputs, Tensor final_state)");
  // And one token of it.
  m.def(
      "discrete_mamba2_update(Tensor(a!) conv_state, Tensor(b!) state, Tensor(c!)? recent, "
      "Tensor(d!)? recent_decay, Tensor? pending, Tensor slots, Tensor lengths, "
      "Tensor projected, Tensor conv_weight, Tensor conv_bias, Tensor z_bias, Tensor D, "
      "int period, Tensor? rng_key) -> Tensor");
  m.def(
      "mamba2_update(Tensor(a!) conv_state, Tensor(b!) state, Tensor(c!)? recent, "
      "Tensor(d!)? recent_decay, Tensor? pending, Tensor slots, Tensor lengths, "
      "Tensor projected, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A_log, "
      "Tensor D, Tensor norm_weight, float eps, int period, Tensor? rng_key) -> Tensor");
  m.def(
      "mamba1_update(Tensor(a!) conv_state, Tensor(b!) state, Tensor slots, Tensor lengths, "
      "Tensor projected, Tensor dt, Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, "
      "Tensor A_log, Tensor D, int kv_dim) -> Tensor");
  // Elementwise, with the same bits wherever in a tensor an element stands.
  m.def("gate(Tensor x, Tensor z, Tensor? bias) -> Tensor");
  m.def("gate_backward(Tensor dy, Tensor x, Tensor z, Tensor? bias) -> (Tensor dx, Tensor dz)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate_up) -> Tensor");
  m.def("softplus(Tensor x, Tensor? bias) -> Tensor");
  // What distillation minimises, and its gradient in place of the logits.
  m.def(
      "distillation_losses(Tensor(a!) logits, Tensor? taught, Tensor labels, float beta, "
      "float temperature, float kl_weight, bool gradient) -> (Tensor ce, Tensor kl)");
  // Around the mixers.
  m.def("add_rms_norm(Tensor(a!) h, Tensor? delta, Tensor weight, float eps) -> Tensor");
  m.def("rotate(Tensor(a!) x, Tensor positions, Tensor inv_freq) -> ()");
  // A product with weights whose rows do not depend on how many there are.
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "rms_norm_linear(Tensor h, Tensor norm_weight, float eps, Tensor weight, Tensor? bias, "
      "bool gated) -> Tensor");
  m.def("add_linear(Tensor(a!) h, Tensor x, Tensor weight) -> ()");
  // Attention over a paged cache.
  m.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor page_table, "
      "Tensor cu_seqlens_q, Tensor kv_lengths) -> ()");
  m.def(
      "rotate_append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) qkv, Tensor inv_freq, "
      "Tensor page_table, Tensor cu_seqlens_q, Tensor kv_lengths) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, "
      "Tensor cu_seqlens_q, Tensor kv_lengths, float scale, SymInt max_queries, Tensor? shared) -> "
      "Tensor");
  m.def(
      "paged_attention_lse(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, "
      "Tensor cu_seqlens_q, Tensor kv_lengths, float scale, SymInt max_queries, Tensor? shared) -> "
      "(Tensor y, Tensor lse)");
  // From logits to a token, and from a token to the next step.
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor rng_key) -> (Tensor token, Tensor logprob)");
  m.def(
      "advance(Tensor token, Tensor logprob, Tensor stop_ids, Tensor(a!) last, Tensor(b!) slots, "
      "Tensor(c!) lengths, Tensor(d!) remaining, Tensor(e!) rng_key, Tensor(f!) drawn, "
      "Tensor(g!) logprobs, Tensor(h!) step) -> ()");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Kernels of reasoners; the operators are in torch.ops.reasoners.";
#ifdef REASONERS_WITH_CUDA
  m.attr("compiled_with_cuda") = true;
#else
  m.attr("compiled_with_cuda") = false;
#endif
#if defined(CPU_CAPABILITY_AVX512)
  m.attr("cpu_vectors") = "avx512";
#elif defined(CPU_CAPABILITY_AVX2)
  m.attr("cpu_vectors") = "avx2";
#else
  m.attr("cpu_vectors") = "portable";
#endif
  m.attr("cuda_archs") = REASONERS_CUDA_ARCHS;
  m.attr("cutlass_version") = REASONERS_CUTLASS_VERSION;
  m.attr("torch_version") = TORCH_VERSION;
}
