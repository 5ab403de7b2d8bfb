// Every kernel this CPU has against plain loops in double, for every dtype, odd shapes, and any number of threads.
#include <algorithm>
#include <cstring>

#include "check.hpp"
#include "halves.hpp"
#include "matrices.hpp"
#include "packing.hpp"
#include "products.hpp"
#include "residual.hpp"
#include "sweep.hpp"

using namespace pissa;

namespace {

template <class Element>
void check_power_step(const Kernels& kernels, DType dtype, const Shape& s) {
  TestWeight w(dtype, s.rows, s.cols, 1);
  const std::size_t stride = s.k + 16;  // the operands are columns of wider matrices
  std::vector<Element> x(s.cols * stride), y;
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = to_element<Element>(random_value(2, i));
  std::vector<float> z, sketch(s.cols * s.k), signs(s.rows);
  power_step<Sweep<Element>>(kernels, w, x, stride, s.k, y, z);
  for (std::size_t i = 0; i < s.rows; ++i) signs[i] = i % 3 == 0 ? -0.5f : 0.5f;
  for (unsigned threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    std::vector<float> other(sketch.size());
    Sweep<Element>(kernels, pool, w.weight, s.k).sketch(signs.data(), s.k, other.data());
    if (threads == 1) sketch = other;
    CHECK(sketch == other, "%s %s: %u threads change the sketch", kernels.name, name_of(dtype), threads);
  }
  const auto weight = [&](std::size_t i) {  // as the products see it
    const auto value = static_cast<float>(w.values[i]);
    return static_cast<double>(to_float(to_element<Element>(value)));
  };
  double worst_y = 0, worst_z = 0, worst_sketch = 0;
  for (std::size_t c = 0; c < s.k; ++c) {
    for (std::size_t i = 0; i < s.rows; ++i) {
      double sum = 0, size = 0;
      for (std::size_t j = 0; j < s.cols; ++j) {
        const double term = weight(i * s.cols + j) * 0.5 * static_cast<double>(to_float(x[j * stride + c]));
        sum += term;
        size += std::fabs(term);
      }
      const double allowed = 2e-6 * size + (kIsBf16<Element> ? 0x1p-8 * std::fabs(sum) : 0);
      worst_y = std::max(worst_y, excess(to_float(y[i * stride + c]), sum, allowed));
    }
    for (std::size_t j = 0; j < s.cols; ++j) {
      double sum = 0, size = 0;
      for (std::size_t i = 0; i < s.rows; ++i) {
        const double term = 0.25 * weight(i * s.cols + j) * static_cast<double>(to_float(y[i * stride + c]));
        sum += term;
        size += std::fabs(term);
      }
      worst_z = std::max(worst_z, excess(z[j * s.k + c], sum, 2e-6 * size));
      double signed_sum = 0, total = 0;
      for (std::size_t i = c; i < s.rows; i += s.k) {
        signed_sum += static_cast<double>(signs[i]) * weight(i * s.cols + j);
        total += std::fabs(weight(i * s.cols + j));
      }
      worst_sketch = std::max(worst_sketch, excess(sketch[j * s.k + c], signed_sum, 1e-6 * total));
    }
  }
  CHECK(worst_y <= 1 && worst_z <= 1 && worst_sketch <= 1,
        "%s %s %zux%zu k=%zu: Y %g, Z %g and sketch %g of what is allowed", kernels.name, name_of(dtype), s.rows,
        s.cols, s.k, worst_y, worst_z, worst_sketch);
}

void check_residual(const Kernels& kernels, DType dtype, const Shape& s) {
  const std::size_t rank = s.rank;
  std::vector<float> left(s.rows * rank), right(rank * s.cols);
  for (std::size_t i = 0; i < left.size(); ++i) left[i] = 0.3f * random_value(3, i);
  for (std::size_t i = 0; i < right.size(); ++i) right[i] = 0.3f * random_value(4, i);
  if (dtype == DType::bf16) {
    for (float& value : left) value = bf16_to_float(float_to_bf16(value));
    for (float& value : right) value = bf16_to_float(float_to_bf16(value));
  }
  std::vector<unsigned char> first;
  for (unsigned threads = 1; threads <= 3; ++threads) {
    TestWeight w(dtype, s.rows, s.cols, 1);
    ThreadPool pool(threads);
    const ResidualNorms norms = subtract_product(kernels, pool, w.weight, left.data(), right.data(), rank, 0.75, 0.25f);
    if (threads > 1) {
      CHECK(w.bytes == first, "%s %s: %u threads change the residual", kernels.name, name_of(dtype), threads);
      continue;
    }
    first = w.bytes;
    const double unit = dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
    const double noise = dtype == DType::f32 ? 1e-15 : 2e-6;  // of sums in double, and in float
    double weight = 0, error = 0, worst = 0;
    for (std::size_t i = 0; i < s.rows * s.cols; ++i) {
      double exact = w.values[i], size = std::fabs(exact);
      for (std::size_t t = 0; t < rank; ++t) {
        const double term = 0.75 * static_cast<double>(left[i / s.cols * rank + t]) *
                            static_cast<double>(right[t * s.cols + i % s.cols]);
        exact -= term;
        size += std::fabs(term);
      }
      const double off = w.at(i) - exact;
      const double allowed = unit * std::fabs(exact) + noise * size + (dtype == DType::f16 ? 0x1p-25 : 0);
      worst = std::max(worst, excess(off, 0, allowed));
      weight += w.values[i] * w.values[i];
      error += off * off;
    }
    weight = std::sqrt(weight);
    error = std::sqrt(error);
    CHECK(worst <= 1.0001, "%s %s %zux%zu rank %zu: off by %g of what rounding allows", kernels.name, name_of(dtype),
          s.rows, s.cols, rank, worst);
    CHECK(excess(norms.weight, weight, 1e-5 * weight) <= 1, "%s %s: norm %g", kernels.name, name_of(dtype),
          norms.weight);
    CHECK(excess(norms.error, error, 0.02 * error + 1e-7 * weight) <= 1, "%s %s: error %g, not %g", kernels.name,
          name_of(dtype), norms.error, error);
    CHECK(norms.finite, "%s %s", kernels.name, name_of(dtype));
  }
}

// The conversions against the scalar ones, for every 16-bit pattern and for roundings of every kind.
void check_conversions(const Kernels& kernels) {
  std::vector<std::uint16_t> bits(65536);
  std::vector<float> wide(bits.size());
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    kernels.widen(bits.data(), dtype, wide.data(), bits.size());
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const float expected = dtype == DType::f16 ? f16_to_float(bits[i]) : bf16_to_float(bits[i]);
      const bool same = std::isnan(expected) ? std::isnan(wide[i]) : std::memcmp(&wide[i], &expected, 4) == 0;
      CHECK(same, "%s widens %s %04x wrongly", kernels.name, name_of(dtype), bits[i]);
    }
    // Many at once, as the rows of a weight are, and a few that fill no register.
    constexpr std::size_t kCount = 77;
    for (std::size_t begin = 0; begin < bits.size(); begin += kCount) {
      const std::size_t count = std::min(kCount, bits.size() - begin);
      std::uint16_t place[kCount];
      float product[kCount];
      float exact[kCount];
      for (std::size_t i = 0; i < count; ++i) {
        const bool finite = std::isfinite(wide[begin + i]);
        place[i] = finite ? bits[begin + i] : std::uint16_t{0};
        product[i] = finite ? random_value(5, begin + i) * std::fabs(wide[begin + i]) : 0.0f;
        exact[i] = finite ? wide[begin + i] - product[i] : 0.0f;
      }
      TileNorms norms;
      kernels.subtract(place, dtype, product, count, 1.0f, norms);
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint16_t rounded = dtype == DType::f16 ? float_to_f16(exact[i]) : float_to_bf16(exact[i]);
        CHECK(place[i] == rounded, "%s rounds %a to %s %04x, not %04x", kernels.name, static_cast<double>(exact[i]),
              name_of(dtype), place[i], rounded);
      }
    }
  }
}

std::uint16_t upper_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
}

// A weight taken apart is multiplied as its values in bf16 are, and comes back bit by bit, whatever the bits are.
void check_halves(const Kernels& kernels, const Shape& s) {
  TestWeight w(DType::f32, s.rows, s.cols, 6), narrow(DType::bf16, s.rows, s.cols, 6);
  const auto* values = reinterpret_cast<const float*>(w.bytes.data());
  for (std::size_t i = 0; i < s.rows * s.cols; ++i) narrow.halves()[i] = upper_half(values[i]);
  const std::vector<unsigned char> before = w.bytes;
  std::vector<std::uint16_t> x(s.cols * s.k), y(s.rows * s.k), y_of_narrow(y.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float_to_bf16(random_value(7, i));
  std::vector<float> z(s.cols * s.k), z_of_narrow(z.size());
  ThreadPool pool(2);
  Sweep<std::uint16_t> sweep(kernels, pool, w.weight, s.k);
  if (sweep.can_read_halves()) {
    {
      const Halves halves(kernels, pool, w.weight);
      sweep.read_halves();
      sweep.power_step(x.data(), s.k, s.k, 0.5f, y.data(), s.k, 0.25f, z.data());
    }
    Sweep<std::uint16_t> other(kernels, pool, narrow.weight, s.k);
    other.power_step(x.data(), s.k, s.k, 0.5f, y_of_narrow.data(), s.k, 0.25f, z_of_narrow.data());
    CHECK(y == y_of_narrow && z == z_of_narrow, "%s: %zux%zu in halves differs from bf16", kernels.name, s.rows,
          s.cols);
    CHECK(w.bytes == before, "%s: %zux%zu does not come back from halves", kernels.name, s.rows, s.cols);
  }
  for (std::size_t i = 0; i < w.bytes.size(); ++i) w.bytes[i] = static_cast<unsigned char>(philox(8, i)[0] >> 24);
  const std::vector<unsigned char> any = w.bytes;
  {
    const Halves halves(kernels, pool, w.weight);
    for (std::size_t i = 0; i < s.rows; ++i) {
      for (std::size_t j = 0; j < s.cols; ++j) {
        float value;
        std::memcpy(&value, &any[4 * (i * s.cols + j)], sizeof value);
        CHECK(w.halves()[2 * i * s.cols + j] == upper_half(value), "%s: half of %a", kernels.name,
              static_cast<double>(value));
      }
    }
  }
  CHECK(w.bytes == any, "%s: %zux%zu loses bits in halves", kernels.name, s.rows, s.cols);
}

void check_limits(const Kernels& kernels) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    for (const std::size_t bad : {0u, 16u, 38u}) {
      TestWeight w(dtype, 3, 13, 9);
      CHECK(std::isfinite(max_magnitude(kernels, pool, w.weight)), "%s", kernels.name);
      if (dtype == DType::f32) {
        reinterpret_cast<float*>(w.bytes.data())[bad] = NAN;
      } else {
        w.halves()[bad] = 0xffffu;
      }
      CHECK(std::isinf(max_magnitude(kernels, pool, w.weight)), "%s misses a NaN", kernels.name);
    }
  }
  std::uint16_t largest = 0x7bffu;  // 65504 in f16
  const Weight w{&largest, DType::f16, 1, 1};
  const float left = -1, right = 65504;
  CHECK(!subtract_product(kernels, pool, w, &left, &right, 1, 1.0, 1.0f).finite, "%s misses an overflow", kernels.name);
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) {
    check_conversions(*kernels);
    check_limits(*kernels);
    if (kernels->bf16 != nullptr) {
      for (const Shape& shape : kShapes) check_halves(*kernels, shape);
    }
    for (const DType dtype : kDTypes) {
      for (const Shape& shape : kShapes) {
        check_power_step<float>(*kernels, dtype, shape);
        if (kernels->bf16 != nullptr) check_power_step<std::uint16_t>(*kernels, dtype, shape);
        check_residual(*kernels, dtype, shape);
      }
    }
    std::printf("%s: %d failures\n", kernels->name, failures);
  }
  return failures == 0 ? 0 : 1;
}
