// AVX-512 F, BW, VL, DQ with VNNI.
#include "kernels/avx512vnni.hpp"

namespace pissa {

const Kernels kAvx512Vnni = {"avx512vnni",
                             1u << 20,
                             kFloatTile,
                             kDoubleTile,
                             kRows<Float16>,
                             kRows<From16<DType::f16>>,
                             kRows<From16<DType::bf16>>,
                             nullptr,
                             &kInt8,
                             widen,
                             subtract,
                             max_magnitude,
                             quantise,
                             read_codes,
                             tridiagonalize};

}  // namespace pissa
