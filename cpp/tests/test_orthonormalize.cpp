// Extending a basis: what comes out is orthonormal and adds up to what went in, however dependent that was.
#include <cmath>

#include "check.hpp"
#include "matrices.hpp"
#include "orthonormalize.hpp"
#include "packing.hpp"
#include "tall.hpp"

using namespace pissa;

namespace {

// float as bits of bf16 is orthonormal only to its rounding.
template <class Element>
constexpr double kRounding = kIsBf16<Element> ? 1e-2 : 2e-6;

enum class Kind { independent, twin_columns, near_basis, inside_basis };

template <class Element>
void check_extension(const Kernels& kernels, Kind kind, std::size_t n, std::size_t k) {
  const std::size_t p = 2 * k, stride = p + k;
  std::vector<std::vector<Element>> results;
  for (unsigned threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    std::vector<Element> x(n * stride + kReadBeyond);
    std::vector<float> z(n * k);
    for (std::size_t done = 0; done < p; done += k) {
      for (std::size_t i = 0; i < z.size(); ++i) z[i] = random_value(done + 1, i);
      extend_basis(kernels, pool, n, x.data(), stride, done, done, z.data(), k);
    }
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < k; ++j) {
        const float inside = 5 * to_float(x[i * stride + j]) - 3 * to_float(x[i * stride + (j + 1) % p]);
        float& place = z[i * k + j];
        place = random_value(9, i * k + j);
        if (kind == Kind::twin_columns && j % 2 == 1) place = z[i * k + j - 1] * 2;
        if (kind == Kind::near_basis) place = inside + 1e-4f * place;
        if (kind == Kind::inside_basis) place = inside;
      }
    }
    const std::vector<float> before = z;
    const Extension step = extend_basis(kernels, pool, n, x.data(), stride, p, p, z.data(), k);
    results.push_back(x);
    CHECK(results.front() == x, "%s: %u threads change it", kernels.name, threads);
    if (threads > 1) continue;
    if (kind == Kind::inside_basis) {
      CHECK(step.exhausted || kIsBf16<Element>, "%s: nothing new goes unnoticed", kernels.name);
      if (step.exhausted) continue;
    }
    CHECK(!step.exhausted, "%s", kernels.name);
    double worst = 0, off = 0, size = 0;
    for (std::size_t a = 0; a < stride; ++a) {
      for (std::size_t b = p; b < stride; ++b) {
        double sum = 0;
        for (std::size_t i = 0; i < n; ++i) {
          sum += static_cast<double>(to_float(x[i * stride + a])) * static_cast<double>(to_float(x[i * stride + b]));
        }
        worst = std::max(worst, std::fabs(sum - (a == b)));
      }
    }
    // What was there has no part outside the basis and the block.
    for (std::size_t j = 0; j < k; ++j) {
      std::vector<double> rest(n);
      for (std::size_t i = 0; i < n; ++i) {
        rest[i] = static_cast<double>(before[i * k + j]);
        size += rest[i] * rest[i];
      }
      for (int twice = 0; twice < 2; ++twice) {
        for (std::size_t a = 0; a < stride; ++a) {
          double sum = 0;
          for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(to_float(x[i * stride + a])) * rest[i];
          for (std::size_t i = 0; i < n; ++i) rest[i] -= static_cast<double>(to_float(x[i * stride + a])) * sum;
        }
      }
      for (const double value : rest) off += value * value;
    }
    CHECK(worst < kRounding<Element>, "%s kind %d: orthonormal to %g", kernels.name, static_cast<int>(kind), worst);
    CHECK(off < size * kRounding<Element> * kRounding<Element>, "%s kind %d: off by %g", kernels.name,
          static_cast<int>(kind), std::sqrt(off / size));
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) {
    for (const Kind kind : {Kind::independent, Kind::twin_columns, Kind::near_basis, Kind::inside_basis}) {
      for (const std::size_t n : {130u, 1001u}) {
        check_extension<float>(*kernels, kind, n, 16);
        if (kernels->bf16 != nullptr) check_extension<std::uint16_t>(*kernels, kind, n, 32);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
