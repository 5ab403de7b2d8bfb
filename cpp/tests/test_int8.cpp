// Products of bytes against plain loops in double over the same roundings, for every kernel that has them.
#include <algorithm>
#include <cstring>

#include "check.hpp"
#include "int8_sweep.hpp"
#include "matrices.hpp"
#include "packing.hpp"
#include "products.hpp"

using namespace pissa;

namespace {

// `count` values, `stride` apart, as a scale times bytes: the multiples, and the scale.
float to_bytes(const float* values, std::size_t count, std::size_t stride, double* bytes, std::size_t byte_stride) {
  float largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(values[i * stride]));
  for (std::size_t i = 0; i < count; ++i) {
    bytes[i * byte_stride] = largest > 0 ? std::nearbyint(values[i * stride] * (127 / largest)) : 0.0f;
  }
  return largest / 127;
}

template <class Element>
void check_int8(const Kernels& kernels, DType dtype, const Shape& s) {
  TestWeight w(dtype, s.rows, s.cols, 1);
  std::vector<float> values(w.values.begin(), w.values.end());
  const std::size_t dead_row = s.rows / 2;
  for (std::size_t j = 0; j < s.cols; ++j) {  // all zeros
    values[dead_row * s.cols + j] = 0;
    std::memset(w.bytes.data() + (dead_row * s.cols + j) * size_of(dtype), 0, size_of(dtype));
  }
  const std::size_t stride = s.k + 16;
  std::vector<Element> x(s.cols * stride), y;
  std::vector<float> wide_x(x.size()), z;
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = to_element<Element>(i % stride == 3 ? 0.0f : random_value(2, i));  // and a column of zeros
    wide_x[i] = to_float(x[i]);
  }
  power_step<Int8Sweep<Element>>(kernels, w, x, stride, s.k, y, z);
  double squares = 0;  // of what rounding W leaves of it
  std::vector<double> bytes(s.rows * s.cols), x_bytes(s.cols * s.k), y_bytes(s.rows * s.k);
  std::vector<float> scales(s.rows), y_values(s.rows * s.k);
  for (std::size_t i = 0; i < s.rows; ++i) {
    scales[i] = to_bytes(&values[i * s.cols], s.cols, 1, &bytes[i * s.cols], 1);
    for (std::size_t j = i * s.cols; j < (i + 1) * s.cols; ++j) {
      const double off = static_cast<double>(values[j]) - static_cast<double>(scales[i]) * bytes[j];
      squares += off * off;
    }
    for (std::size_t c = 0; c < s.k; ++c) y_values[i * s.k + c] = to_float(y[i * stride + c]) * scales[i];
  }
  double worst_y = 0, worst_z = 0;
  for (std::size_t c = 0; c < s.k; ++c) {
    std::vector<double> x_scales(s.cols), y_scales(s.rows);
    for (std::size_t j = 0; j < s.cols; j += kPieceRows) {
      const std::size_t count = std::min(kPieceRows, s.cols - j);
      const float scale = to_bytes(&wide_x[j * stride + c], count, stride, &x_bytes[j * s.k + c], s.k);
      std::fill_n(x_scales.begin() + static_cast<std::ptrdiff_t>(j), count, static_cast<double>(scale));
    }
    for (std::size_t i = 0; i < s.rows; i += kInt8BlockRows) {
      const std::size_t count = std::min(kInt8BlockRows, s.rows - i);
      const float scale = to_bytes(&y_values[i * s.k + c], count, s.k, &y_bytes[i * s.k + c], s.k);
      std::fill_n(y_scales.begin() + static_cast<std::ptrdiff_t>(i), count, static_cast<double>(scale));
    }
    for (std::size_t i = 0; i < s.rows; ++i) {
      double sum = 0, size = 0;
      for (std::size_t j = 0; j < s.cols; ++j) {
        const double term =
            0.5 * static_cast<double>(scales[i]) * bytes[i * s.cols + j] * x_scales[j] * x_bytes[j * s.k + c];
        sum += term;
        size += std::fabs(term);
      }
      const double allowed = 1e-6 * size + (kIsBf16<Element> ? 0x1p-8 * std::fabs(sum) : 0);
      worst_y = std::max(worst_y, excess(to_float(y[i * stride + c]), sum, allowed));
    }
    for (std::size_t j = 0; j < s.cols; ++j) {
      double sum = 0, size = 0;
      for (std::size_t i = 0; i < s.rows; ++i) {
        const double term = 0.25 * bytes[i * s.cols + j] * y_scales[i] * y_bytes[i * s.k + c];
        sum += term;
        size += std::fabs(term);
      }
      worst_z = std::max(worst_z, excess(z[j * s.k + c], sum, 1e-6 * size));
    }
  }
  CHECK(worst_y <= 1 && worst_z <= 1, "%s %s %zux%zu k=%zu: int8's Y %g and Z %g of what is allowed", kernels.name,
        name_of(dtype), s.rows, s.cols, s.k, worst_y, worst_z);
  const double noise = std::sqrt(squares / static_cast<double>(s.cols));
  ThreadPool pool(2);
  const Int8Sweep<Element> sweep(kernels, pool, w.weight, s.k);
  CHECK(s.rows * s.cols < 1000 || excess(sweep.noise(), noise, 0.1 * noise) <= 1, "%s %s: noise %g, not %g",
        kernels.name, name_of(dtype), sweep.noise(), noise);
  double energy = 0;
  for (const float value : values) energy += static_cast<double>(value) * static_cast<double>(value);
  CHECK(excess(sweep.energy(), energy, 1e-5 * energy) <= 1, "%s %s: energy %g, not %g", kernels.name, name_of(dtype),
        sweep.energy(), energy);
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) {
    if (kernels->int8 == nullptr) continue;
    for (const DType dtype : kDTypes) {
      for (const Shape& shape : kShapes) {
        check_int8<float>(*kernels, dtype, shape);
        if (kernels->bf16 != nullptr) check_int8<std::uint16_t>(*kernels, dtype, shape);
      }
    }
    std::printf("%s: %d failures\n", kernels->name, failures);
  }
  return failures == 0 ? 0 : 1;
}
