// AVX-512 with BF16.
#include "kernels/avx512bf16.hpp"
#include "kernels/avx512vnni.hpp"

namespace pissa {
namespace {

constexpr Bf16Kernels kBf16 = {
    make_tile<Bf16Pair16, 8, 3, 12>(), narrow, round_weight, take_apart, put_together, pack_pairs, nullptr};

}  // namespace

const Kernels kAvx512Bf16 = {"avx512bf16",
                             1u << 20,
                             kFloatTile,
                             kDoubleTile,
                             kRows<Float16>,
                             kRows<From16<DType::f16>>,
                             kRows<From16<DType::bf16>>,
                             &kBf16,
                             &kInt8,
                             widen,
                             subtract_bf16,
                             max_magnitude,
                             quantise,
                             read_codes,
                             tridiagonalize};

}  // namespace pissa
