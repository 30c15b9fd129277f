#include "cuda/mlstm/hopper/outputs.cuh"

namespace flash_xlstm::cuda::hopper {

cudaError_t output_dk_dv(const Work& w, const Maps& maps, const Strided& dh, void* dk, void* dv, cudaStream_t stream) {
  const int tile_dqk = column_tile_beside(w.p.dqk, w.p.dv), tile_dv = column_tile_beside(w.p.dv, w.p.dqk);
  const int64_t tiles = w.dk_tiles + ceil_div(w.p.dv, tile_dv);
  const OutputArgs args{w, maps, dk, dv, nullptr, nullptr, nullptr, dh, w.dk_tiles, 0};
  return dispatch_16_bit(w.p.dtype, [&](auto t) {
    using T = decltype(t);
    if (tile_dqk == 256) return launch_outputs<DkAndDv<256, 256, T>>(args, tiles, stream);
    if (tile_dqk == 128) {
      return tile_dv == 128 ? launch_outputs<DkAndDv<128, 128, T>>(args, tiles, stream)
                            : launch_outputs<DkAndDv<128, 64, T>>(args, tiles, stream);
    }
    return tile_dv == 128 ? launch_outputs<DkAndDv<64, 128, T>>(args, tiles, stream)
                          : launch_outputs<DkAndDv<64, 64, T>>(args, tiles, stream);
  });
}

}  // namespace flash_xlstm::cuda::hopper
