// AVX-512 F, BW, VL, DQ.
#include "kernels/avx512.hpp"

namespace pissa {

const Kernels kAvx512 = {
    "avx512",      1u << 20, make_tile<Float16, 8, 3, 12>(), make_tile<Double8, 8, 3, 12>(), nullptr, widen, subtract,
    max_magnitude, quantise};

}  // namespace pissa
