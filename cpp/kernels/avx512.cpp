// AVX-512 F, BW, VL, DQ.
#include "kernels/avx512.hpp"

namespace pissa {

const Kernels kAvx512 = {"avx512",
                         1u << 20,
                         kFloatTile,
                         kDoubleTile,
                         kRows<Float16>,
                         kRows<From16<DType::f16>>,
                         kRows<From16<DType::bf16>>,
                         nullptr,
                         nullptr,
                         widen,
                         subtract,
                         max_magnitude,
                         quantise,
                         read_codes,
                         tridiagonalize};

}  // namespace pissa
