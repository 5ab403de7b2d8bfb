#include "split.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "buffer.hpp"
#include "kernels/scalar.hpp"
#include "lapack.hpp"
#include "range_finder.hpp"
#include "rayleigh_ritz.hpp"
#include "residual.hpp"
#include "tall.hpp"

namespace pissa {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Stop when the estimate says that a full SVD would capture at most this much more of the leading energy.
constexpr double kTargetDeficit = 1e-3;

// How the work is laid out for a rank. Measured on language models' weights: about 5.5 (rank 16) to 2.6 (rank 128)
// basis columns per direction reach the target, fewer with narrower blocks; blocks narrower than a vector waste it.
struct Schedule {
  Schedule(const Weight& weight, std::size_t rank, std::size_t passes) {
    const std::size_t limit = std::min(weight.rows, weight.cols);
    block = rank <= 32 ? 16 : 32;
    first_check = (9 * rank / 4 + 40 + block - 1) / block;
    max_passes = passes > 0 ? passes : (6 * rank + 64) / block + 1;
    // Where the basis would have to span most of the space, its whole Gram matrix is cheaper and exact.
    exact = passes == 0 ? 4 * first_check * block >= 3 * limit : rank + 2 * block > limit;
    if (!exact) max_passes = std::min(max_passes, limit / block - 1);
    min_passes = (rank + block - 1) / block;
    if (!exact && max_passes < min_passes) exact = true;
    first_check = std::clamp(first_check, min_passes, std::max(min_passes, max_passes));
  }
  std::size_t block, first_check, max_passes, min_passes;
  bool exact;
};

// Left singular vectors scaled by nothing, and Wᵀ·left: W ≈ left·(Wᵀ·left)ᵀ.
struct Factors {
  Buffer<float> left;   // rows × rank, column-major, orthonormal
  Buffer<float> right;  // cols × rank, column-major, column i of length σ_i
  std::vector<double> sigma;
};

constexpr std::size_t kExactPiece = 512;

// All singular directions of the smaller side, from its Gram matrix in double.
Factors factor_exactly(const Kernels& kernels, ThreadPool& pool, const Weight& weight, std::size_t rank) {
  const bool wide = weight.rows <= weight.cols;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  std::vector<float> row(weight.cols);
  Buffer<double> piece(pool.scratch(), small * kExactPiece), gram(pool.scratch(), small * small);
  // Column-major small × count: elements [begin, begin + count) of the larger side.
  const auto load = [&](std::size_t begin, std::size_t count) {
    const std::size_t bytes = size_of(weight.dtype);
    if (wide) {
      for (std::size_t i = 0; i < small; ++i) {
        kernels.widen(static_cast<const char*>(weight.data) + (i * weight.cols + begin) * bytes, weight.dtype,
                      row.data(), count);
        for (std::size_t j = 0; j < count; ++j) piece[j * small + i] = static_cast<double>(row[j]);
      }
    } else {
      for (std::size_t j = 0; j < count; ++j) {
        kernels.widen(static_cast<const char*>(weight.data) + (begin + j) * weight.cols * bytes, weight.dtype,
                      row.data(), small);
        for (std::size_t i = 0; i < small; ++i) piece[j * small + i] = static_cast<double>(row[i]);
      }
    }
  };
  for (std::size_t at = 0; at < large; at += kExactPiece) {
    const std::size_t count = std::min(kExactPiece, large - at);
    load(at, count);
    lapack::gemm('N', 'T', small, small, count, 1.0, piece.data(), small, piece.data(), small, at == 0 ? 0.0 : 1.0,
                 gram.data(), small);
  }
  double trace = 0;
  for (std::size_t i = 0; i < small; ++i) trace += gram[i * small + i];
  if (!std::isfinite(trace)) throw std::domain_error("holds NaN or infinity");
  std::vector<double> values(rank);
  Buffer<double> vectors(pool.scratch(), small * rank), other(pool.scratch(), large * rank);
  if (!lapack::largest_eigenpairs(small, gram.data(), rank, values.data(), vectors.data())) {
    throw std::runtime_error("LAPACK dsyevr did not converge");
  }
  for (std::size_t at = 0; at < large; at += kExactPiece) {
    const std::size_t count = std::min(kExactPiece, large - at);
    load(at, count);
    lapack::gemm('T', 'N', count, rank, small, 1.0, piece.data(), small, vectors.data(), small, 0.0, other.data() + at,
                 large);
  }
  Factors factors;
  factors.sigma.resize(rank);
  factors.left = Buffer<float>(pool.scratch(), weight.rows * rank);
  factors.right = Buffer<float>(pool.scratch(), weight.cols * rank);
  for (std::size_t i = 0; i < rank; ++i) {
    const double* image = other.data() + i * large;
    factors.sigma[i] = std::sqrt(std::inner_product(image, image + large, image, 0.0));
    const double inverse = factors.sigma[i] > 0 ? 1 / factors.sigma[i] : 0;
    for (std::size_t j = 0; j < small; ++j) {
      const double v = vectors[i * small + j];
      if (wide) {
        factors.left[i * weight.rows + j] = static_cast<float>(v);
      } else {
        factors.right[i * weight.cols + j] = static_cast<float>(v * factors.sigma[i]);
      }
    }
    for (std::size_t j = 0; j < large; ++j) {
      if (wide) {
        factors.right[i * weight.cols + j] = static_cast<float>(image[j]);
      } else {
        factors.left[i * weight.rows + j] = static_cast<float>(image[j] * inverse);
      }
    }
  }
  return factors;
}

Factors factor_by_krylov(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                         const Schedule& schedule, SplitResult& result) {
  const Weight& weight = request.weight;
  const std::size_t rank = request.rank;
  auto start = Clock::now();
  RangeFinder finder(kernels, pool, weight, schedule.block, schedule.max_passes, request.key);
  result.sketch_seconds = seconds_since(start);
  result.block = schedule.block;
  Factors factors;
  factors.sigma.assign(rank, 0.0);
  factors.left = Buffer<float>(pool.scratch(), weight.rows * rank);
  factors.right = Buffer<float>(pool.scratch(), weight.cols * rank);
  if (finder.zero()) {
    std::fill_n(factors.left.data(), factors.left.size(), 0.0f);
    std::fill_n(factors.right.data(), factors.right.size(), 0.0f);
    return factors;
  }
  const bool fixed = request.passes > 0;
  RitzTriplets ritz;
  std::size_t next_check = fixed ? schedule.max_passes : schedule.first_check;
  for (bool more = true; more;) {
    start = Clock::now();
    while (finder.basis().passes < next_check && (more = finder.advance())) {
    }
    more = more && !finder.basis().exhausted && finder.basis().passes < schedule.max_passes;
    result.sweep_seconds += seconds_since(start);
    start = Clock::now();
    ritz = rayleigh_ritz(pool, finder.basis(), weight.rows, rank, weight.dtype == DType::f32);
    result.ritz_seconds += seconds_since(start);
    if (ritz.estimated_deficit <= kTargetDeficit) break;
    // A check costs as much as a pass or two: the next is where the estimate will have come down, if it goes on so.
    const double factor = std::log(ritz.estimated_deficit / kTargetDeficit) / -std::log(ritz.convergence);
    const double ahead = ritz.convergence < 1 ? std::clamp(std::ceil(factor - 0.25), 1.0, 8.0) : 2.0;
    next_check = std::min(schedule.max_passes, finder.basis().passes + static_cast<std::size_t>(ahead));
  }
  start = Clock::now();
  const KrylovBasis& basis = finder.basis();
  result.passes = basis.passes;
  result.householder = basis.householder;
  result.estimated_deficit = ritz.estimated_deficit;
  const std::vector<float> y_coefficients(ritz.y_coefficients.begin(), ritz.y_coefficients.end());
  std::vector<float> x_coefficients(ritz.x_coefficients.size());
  for (std::size_t i = 0; i < x_coefficients.size(); ++i) {
    x_coefficients[i] = static_cast<float>(std::ldexp(ritz.x_coefficients[i], basis.exponent));
  }
  multiply(pool, weight.rows, 1.0f, basis.y.data(), basis.columns(), y_coefficients.data(), rank, 0.0f,
           factors.left.data());
  multiply(pool, weight.cols, 1.0f, basis.x.data(), basis.x_columns(), x_coefficients.data(), rank, 0.0f,
           factors.right.data());
  for (std::size_t i = 0; i < rank; ++i) factors.sigma[i] = std::ldexp(ritz.sigma[i], basis.exponent);
  result.ritz_seconds += seconds_since(start);
  return factors;
}

// Stores `value` in the adapter's dtype and returns what was stored.
float store(void* place, DType dtype, std::size_t index, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(place)[index] = value;
    return value;
  }
  const std::uint16_t bits = dtype == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
  static_cast<std::uint16_t*>(place)[index] = bits;
  return dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

struct StoredFactors {
  Buffer<float> left;   // rows × rank, row-major
  Buffer<float> right;  // rank × cols, row-major
  bool finite = true;
};

// Shares σ/s out as a square root to both sides, fixes signs, and rounds to the adapter's dtype. The largest entry of
// each row of A is positive (the first of equals).
StoredFactors store_factors(ThreadPool& pool, const SplitRequest& request, const Factors& factors) {
  const std::size_t rows = request.weight.rows, cols = request.weight.cols, rank = request.rank;
  StoredFactors stored;
  stored.left = Buffer<float>(pool.scratch(), rows * rank);
  stored.right = Buffer<float>(pool.scratch(), rank * cols);
  std::vector<double> left_scale(rank), right_scale(rank);
  pool.run(rank, [&](std::size_t i) {
    const float* left = factors.left.data() + i * rows;
    const float* right = factors.right.data() + i * cols;
    const float* a_row = request.fan_in_fan_out ? left : right;
    const std::size_t length = request.fan_in_fan_out ? rows : cols;
    const float* largest =
        std::max_element(a_row, a_row + length, [](float x, float y) { return std::fabs(x) < std::fabs(y); });
    const double sign = *largest < 0 ? -1 : 1;
    const double shared = factors.sigma[i] / request.scaling;
    left_scale[i] = sign * std::sqrt(shared);
    right_scale[i] = shared > 0 ? sign / (std::sqrt(shared) * request.scaling) : 0;
  });
  const bool transposed = request.fan_in_fan_out;
  constexpr std::size_t kPiece = 512;
  std::vector<unsigned char> finite((rows + kPiece - 1) / kPiece + rank, 1);
  pool.run((rows + kPiece - 1) / kPiece, [&](std::size_t task) {
    bool good = true;
    for (std::size_t j = task * kPiece; j < std::min(rows, (task + 1) * kPiece); ++j) {
      for (std::size_t i = 0; i < rank; ++i) {
        const auto value = static_cast<float>(static_cast<double>(factors.left[i * rows + j]) * left_scale[i]);
        float& place = stored.left[j * rank + i];
        place = transposed ? store(request.a, request.adapter_dtype, i * rows + j, value)
                           : store(request.b, request.adapter_dtype, j * rank + i, value);
        good = good && std::isfinite(place);
      }
    }
    finite[rank + task] = good;
  });
  pool.run(rank, [&](std::size_t i) {
    bool good = true;
    for (std::size_t j = 0; j < cols; ++j) {
      const auto value = static_cast<float>(static_cast<double>(factors.right[i * cols + j]) * right_scale[i]);
      float& place = stored.right[i * cols + j];
      place = transposed ? store(request.b, request.adapter_dtype, j * rank + i, value)
                         : store(request.a, request.adapter_dtype, i * cols + j, value);
      good = good && std::isfinite(place);
    }
    finite[i] = good;
  });
  stored.finite = std::all_of(finite.begin(), finite.end(), [](unsigned char good) { return good != 0; });
  return stored;
}

}  // namespace

SplitResult split(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request) {
  const Schedule schedule(request.weight, request.rank, request.passes);
  SplitResult result;
  const auto start = Clock::now();
  Factors factors;
  if (schedule.exact) {
    factors = factor_exactly(kernels, pool, request.weight, request.rank);
    result.ritz_seconds = seconds_since(start);
  } else {
    factors = factor_by_krylov(kernels, pool, request, schedule, result);
  }
  auto phase = Clock::now();
  const StoredFactors stored = store_factors(pool, request, factors);
  if (!stored.finite) throw std::domain_error("gives adapter factors that overflow the adapter's dtype");
  result.sigma = std::move(factors.sigma);
  factors = Factors{};
  result.ritz_seconds += seconds_since(phase);
  phase = Clock::now();
  const int exponent = result.sigma[0] > 0 ? std::clamp(std::ilogb(result.sigma[0]), -120, 120) : 0;
  const ResidualNorms norms = subtract_product(kernels, pool, request.weight, stored.left.data(), stored.right.data(),
                                               request.rank, request.scaling, std::ldexp(1.0f, -exponent));
  if (!norms.finite) throw std::overflow_error("has a residual that overflows its dtype");
  result.weight_norm = norms.weight;
  result.rounding_error = norms.error;
  result.residual_seconds = seconds_since(phase);
  return result;
}

std::size_t split_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes) {
  const Schedule schedule(weight, rank, passes);
  const std::size_t factors = 2 * sizeof(float) * (weight.rows + weight.cols) * rank;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  const std::size_t columns = schedule.block * schedule.max_passes;
  const std::size_t range = schedule.exact
                                ? sizeof(double) * (2 * small * small + small * (kExactPiece + rank) + large * rank)
                                : RangeFinder::workspace_bytes(weight, schedule.block, schedule.max_passes) +
                                      sizeof(double) * 6 * columns * columns;
  return std::max(range + factors / 2, factors + residual_workspace_bytes(weight, rank)) + (4u << 20);
}

}  // namespace pissa
