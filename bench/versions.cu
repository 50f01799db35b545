// The Hopper scan of the tree that -I names, for versions.py: loaded by itself, without a binding.
#include "ssd_scan_wgmma.cu"

namespace {

// Contiguous bfloat16 data, no scale, no initial state.
reasoners::SsdScanParams make_params(const int64_t (&sizes)[8]) {
  const auto [batch, length, heads, x_heads, b_groups, c_groups, head_dim, state_dim] = sizes;
  const auto strides = [&, length = length](int64_t row) {
    return reasoners::TokenStrides{length * row, row};
  };
  reasoners::SsdScanParams p{};
  p.batch = p.sequences = batch;
  p.length = length;
  p.heads = static_cast<int>(heads);
  p.x_heads = static_cast<int>(x_heads);
  p.b_groups = static_cast<int>(b_groups);
  p.c_groups = static_cast<int>(c_groups);
  p.head_dim = static_cast<int>(head_dim);
  p.state_dim = static_cast<int>(state_dim);
  p.dtype = reasoners::DType::kBFloat16;
  p.x_strides = strides(x_heads * head_dim);
  p.log_decay_strides = p.scale_strides = strides(heads);
  p.b_strides = strides(b_groups * state_dim);
  p.c_strides = strides(c_groups * state_dim);
  return p;
}

}  // namespace

extern "C" int64_t count_scratch(const int64_t (&sizes)[8]) {
  return reasoners::count_ssd_scan_wgmma_scratch(make_params(sizes));
}

// pointers: x, log_decay, B, C, D, y, final_state, scratch, tickets. Returns a cudaError_t.
extern "C" int scan(const int64_t (&sizes)[8], void* const (&pointers)[9], cudaStream_t stream) {
  auto p = make_params(sizes);
  const auto floats = [&](int i) { return static_cast<float*>(pointers[i]); };
  p.x = pointers[0];
  p.log_decay = floats(1);
  p.B = pointers[2];
  p.C = pointers[3];
  p.D = floats(4);
  p.y = pointers[5];
  p.final_state = floats(6);
  p.scratch = floats(7);
  p.tickets = static_cast<uint32_t*>(pointers[8]);
  reasoners::launch_ssd_scan_wgmma(p, stream);
  return cudaGetLastError();
}
