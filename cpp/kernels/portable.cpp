// Any CPU: plain C++ that the compiler turns into whatever vectors the baseline has.
#include "kernels/blocks.hpp"
#include "kernels/tiles.hpp"

namespace pissa {
namespace {

template <class T>
struct Plain {
  using Element = T;
  using Sum = T;
  static constexpr std::size_t kDepth = 1;
  static constexpr std::size_t kWidth = 8;
  struct Register {
    T lane[kWidth];
  };
  using Operand = Register;
  static Register zero() { return Register{}; }
  static Register add(const Register& x, const Register& y) {
    Register r;
    for (std::size_t i = 0; i < kWidth; ++i) r.lane[i] = x.lane[i] + y.lane[i];
    return r;
  }
  static Register load_sum(const T* p) {
    Register r;
    std::memcpy(r.lane, p, sizeof r.lane);
    return r;
  }
  static void store_sum(T* p, const Register& r) { std::memcpy(p, r.lane, sizeof r.lane); }
  static Register load(const T* p) { return load_sum(p); }
  static void store(T* p, const Register& r) { store_sum(p, r); }
  static Register broadcast(const T* p) {
    Register r;
    for (T& lane : r.lane) lane = *p;
    return r;
  }
  static Register multiply_add(const Register& a, const Register& b, const Register& c) {
    Register r;
    for (std::size_t i = 0; i < kWidth; ++i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return r;
  }
};

struct ConvertF16 {
  using Bits = std::uint16_t;
  static float widen(Bits bits) { return f16_to_float(bits); }
  static Bits round(float value) { return float_to_f16(value); }
};

// 2-byte values as operands of Plain<float>.
template <class Convert>
struct From {
  using Element = std::uint16_t;
  static Plain<float>::Operand load(const Element* p) {
    Plain<float>::Operand r;
    for (std::size_t i = 0; i < Plain<float>::kWidth; ++i) r.lane[i] = Convert::widen(p[i]);
    return r;
  }
};

void widen(const void* src, DType dtype, float* dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = widen_one(src, dtype, i);
}

void subtract(void* w, DType dtype, const void* product, std::size_t count, float scale, TileNorms& norms) {
  switch (dtype) {
    case DType::f32:
      return subtract_as<ConvertF32>(static_cast<float*>(w), static_cast<const double*>(product), count, scale, norms);
    case DType::f16:
      return subtract_as<ConvertF16>(static_cast<std::uint16_t*>(w), static_cast<const float*>(product), count, scale,
                                     norms);
    case DType::bf16:
      return subtract_as<ConvertBf16>(static_cast<std::uint16_t*>(w), static_cast<const float*>(product), count, scale,
                                      norms);
  }
}

bool quantise(const void* src, DType dtype, std::size_t count, const FourBitCode& code, std::uint8_t* packed,
              float* absmax) {
  return quantise_with(widen, src, dtype, count, code, packed, absmax);
}

void read_codes(const std::uint8_t* packed, const float* absmax, std::size_t count, const FourBitCode& code,
                DType dtype, float* q) {
  read_codes_one_by_one(packed, absmax, count, code, dtype, q);
}

template <class From>
constexpr RowKernels kRows = {multiply_stored<Plain<float>, From, 2, 2, 4>, add_transposed<Plain<float>, From, 2>};

}  // namespace

const Kernels kPortable = {"portable",
                           512u << 10,
                           make_tile<Plain<float>, 2, 2, 2>(),
                           make_tile<Plain<double>, 2, 2, 2>(),
                           kRows<Plain<float>>,
                           kRows<From<ConvertF16>>,
                           kRows<From<ConvertBf16>>,
                           nullptr,
                           nullptr,
                           widen,
                           subtract,
                           max_magnitude,
                           quantise,
                           read_codes,
                           tridiagonalize};

}  // namespace pissa
