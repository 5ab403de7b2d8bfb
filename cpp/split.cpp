#include "split.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "buffer.hpp"
#include "kernels/scalar.hpp"
#include "lapack.hpp"
#include "packing.hpp"
#include "range_finder.hpp"
#include "rayleigh_ritz.hpp"
#include "residual.hpp"

namespace pissa {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Stop when the estimate says that a full SVD would capture at most this much more of the leading energy.
constexpr double kTargetDeficit = 4e-3;

// How the work is laid out for a rank. Narrower blocks reach the target with fewer columns, but blocks narrower than a
// vector, or of many passes, waste more than that. Measured on weights with language models' spectra: 6 (rank 16), 4.5
// (rank 64) or 3.25 (rank 128) columns per direction reach it. The first check comes early, where it costs little, and
// tells from the speed of convergence when the next is due.
struct Schedule {
  Schedule(const Weight& weight, std::size_t rank, std::size_t passes) {
    const std::size_t limit = std::min(weight.rows, weight.cols);
    block = rank <= 32 ? 16 : 32;
    first_check = (2 * rank + 32) / block;
    max_passes = passes > 0 ? passes : (6 * rank + 64) / block + 1;
    // Where the basis would have to span most of the space, its whole Gram matrix is cheaper and exact.
    const std::size_t expected = (rank <= 32 ? 3 * rank + 47 : 2 * rank + 127) / block * block;
    exact = passes == 0 ? 4 * expected >= 3 * limit : rank + 2 * block > limit;
    if (!exact) max_passes = std::min(max_passes, limit / block - 1);
    min_passes = (rank + block - 1) / block;
    if (!exact && max_passes < min_passes) exact = true;
    first_check = std::clamp(first_check, min_passes, std::max(min_passes, max_passes));
  }
  std::size_t block, first_check, max_passes, min_passes;
  bool exact;
};

// Left singular vectors scaled by nothing, and Wᵀ·left: W ≈ left·(Wᵀ·left)ᵀ. Row-major with `stride`.
struct Factors {
  std::size_t stride = 0;
  Buffer<float> left;   // rows × rank, orthonormal
  Buffer<float> right;  // cols × rank, column i of length σ_i
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
    throw std::runtime_error("LAPACK stedc did not converge");
  }
  for (std::size_t at = 0; at < large; at += kExactPiece) {
    const std::size_t count = std::min(kExactPiece, large - at);
    load(at, count);
    lapack::gemm('T', 'N', count, rank, small, 1.0, piece.data(), small, vectors.data(), small, 0.0, other.data() + at,
                 large);
  }
  Factors factors;
  factors.sigma.resize(rank);
  factors.stride = rank;
  factors.left = Buffer<float>(pool.scratch(), weight.rows * rank);
  factors.right = Buffer<float>(pool.scratch(), weight.cols * rank);
  for (std::size_t i = 0; i < rank; ++i) {
    const double* image = other.data() + i * large;
    factors.sigma[i] = std::sqrt(std::inner_product(image, image + large, image, 0.0));
    const double inverse = factors.sigma[i] > 0 ? 1 / factors.sigma[i] : 0;
    for (std::size_t j = 0; j < small; ++j) {
      const double v = vectors[i * small + j];
      if (wide) {
        factors.left[j * rank + i] = static_cast<float>(v);
      } else {
        factors.right[j * rank + i] = static_cast<float>(v * factors.sigma[i]);
      }
    }
    for (std::size_t j = 0; j < large; ++j) {
      if (wide) {
        factors.right[j * rank + i] = static_cast<float>(image[j]);
      } else {
        factors.left[j * rank + i] = static_cast<float>(image[j] * inverse);
      }
    }
  }
  return factors;
}

template <class Element>
Factors factor_by_krylov(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                         const Schedule& schedule, bool exact, SplitResult& result) {
  const Weight& weight = request.weight;
  const std::size_t rank = request.rank;
  auto start = Clock::now();
  std::optional<RangeFinder<Element>> finder;
  finder.emplace(kernels, pool, weight, schedule.block, schedule.max_passes, request.key);
  const auto start_over = [&] {
    finder.reset();
    return factor_by_krylov<float>(kernels, pool, request, schedule, true, result);
  };
  if (finder->out_of_range()) return start_over();
  result.sweep_seconds += seconds_since(start);
  result.block = schedule.block;
  Factors factors;
  factors.sigma.assign(rank, 0.0);
  if (finder->zero()) {
    factors.stride = rank;
    factors.left = Buffer<float>(pool.scratch(), weight.rows * rank);
    factors.right = Buffer<float>(pool.scratch(), weight.cols * rank);
    std::fill(factors.left.begin(), factors.left.end(), 0.0f);
    std::fill(factors.right.begin(), factors.right.end(), 0.0f);
    return factors;
  }
  const KrylovBasis& basis = finder->basis();
  RitzTriplets ritz;
  std::size_t next_check = request.passes > 0 ? schedule.max_passes : schedule.first_check;
  for (bool more = true; more;) {
    start = Clock::now();
    while (basis.passes < next_check && (more = finder->advance())) {
    }
    more = more && !basis.exhausted && basis.passes < schedule.max_passes;
    result.sweep_seconds += seconds_since(start);
    start = Clock::now();
    ritz = rayleigh_ritz(pool, basis, finder->gram(exact), rank, more ? kTargetDeficit : INFINITY, exact);
    result.ritz_seconds += seconds_since(start);
    // A few directions far above all others, or a W of low rank: what bf16 leaves of orthogonality is not enough.
    if (kIsBf16<Element> && !ritz.well_conditioned) return start_over();
    if (ritz.estimated_deficit <= kTargetDeficit) break;
    // A check costs as much as a pass or two: the next is where the estimate will have come down, if it goes on so.
    const double factor = std::log(ritz.estimated_deficit / kTargetDeficit) / -std::log(ritz.convergence);
    const double ahead = ritz.convergence < 1 ? std::clamp(std::ceil(0.6 * factor), 1.0, 8.0) : 2.0;
    next_check = std::min(schedule.max_passes, basis.passes + static_cast<std::size_t>(ahead));
  }
  start = Clock::now();
  result.passes = basis.passes;
  result.householder = basis.householder;
  result.estimated_deficit = ritz.estimated_deficit;
  for (double& coefficient : ritz.x_coefficients) coefficient = std::ldexp(coefficient, basis.exponent);
  factors.stride = round_up(rank, 16);
  factors.left = finder->combine_y(ritz.y_coefficients, rank);
  factors.right = finder->combine_x(ritz.x_coefficients, rank);
  for (std::size_t i = 0; i < rank; ++i) factors.sigma[i] = std::ldexp(ritz.sigma[i], basis.exponent);
  result.ritz_seconds += seconds_since(start);
  return factors;
}

// In a small matrix the rounding of X and Y to bf16 does not average out, and there is little to gain.
constexpr std::size_t kSmallForBf16 = 256;

bool uses_bf16(const Kernels& kernels, const Weight& weight) {
  return kernels.bf16 != nullptr && weight.dtype == DType::bf16 && std::min(weight.rows, weight.cols) >= kSmallForBf16;
}

// values ← what `dtype` can hold of them.
void round_to_dtype(DType dtype, float* values, std::size_t count) {
  if (dtype == DType::bf16) {
    for (std::size_t i = 0; i < count; ++i) values[i] = bf16_to_float(float_to_bf16(values[i]));
  } else if (dtype == DType::f16) {
    for (std::size_t i = 0; i < count; ++i) values[i] = f16_to_float(float_to_f16(values[i]));
  }
}

// Rows [begin, begin + rows) of a factor (n × rank), given as `values`, go to `place`: as they are, or as columns.
template <class Element, class Convert>
void write_rows(const float* values, std::size_t begin, std::size_t rows, std::size_t rank, std::size_t n,
                bool as_columns, Element* place, const Convert& convert) {
  if (!as_columns) {
    for (std::size_t i = 0; i < rows * rank; ++i) place[begin * rank + i] = convert(values[i]);
    return;
  }
  for (std::size_t i = 0; i < rank; ++i) {
    for (std::size_t j = 0; j < rows; ++j) place[i * n + begin + j] = convert(values[j * rank + i]);
  }
}

void write_factor(const float* values, std::size_t begin, std::size_t rows, std::size_t rank, std::size_t n,
                  bool as_columns, void* place, DType dtype) {
  auto* halves = static_cast<std::uint16_t*>(place);
  switch (dtype) {
    case DType::f32:
      return write_rows(values, begin, rows, rank, n, as_columns, static_cast<float*>(place),
                        [](float value) { return value; });
    case DType::f16:
      return write_rows(values, begin, rows, rank, n, as_columns, halves, float_to_f16);
    case DType::bf16:
      return write_rows(values, begin, rows, rank, n, as_columns, halves, float_to_bf16);
  }
}

struct StoredFactors {
  Buffer<float> left;   // rows × rank, row-major
  Buffer<float> right;  // rank × cols, row-major
  bool finite = true;
};

// Shares σ/s out as a square root to both sides, fixes signs, and rounds to the adapter's dtype. The largest entry of
// each row of A is positive (the first of equals).
//
// The factors of a bf16 weight keep its 8 bits whatever dtype they are stored in. That costs 1e-5 of their energy,
// which the residual takes up; the residual is then an exact product of bf16, at twice the speed of float.
StoredFactors store_factors(ThreadPool& pool, const SplitRequest& request, const Factors& factors) {
  const std::size_t rows = request.weight.rows, cols = request.weight.cols, rank = request.rank;
  const bool transposed = request.fan_in_fan_out;
  StoredFactors stored;
  stored.left = Buffer<float>(pool.scratch(), rows * rank);
  stored.right = Buffer<float>(pool.scratch(), rank * cols);
  const Buffer<float>& a_side = transposed ? factors.left : factors.right;
  std::vector<float> largest(rank, 0.0f);
  for (std::size_t j = 0; j < (transposed ? rows : cols); ++j) {
    const float* row = a_side.data() + j * factors.stride;
    for (std::size_t i = 0; i < rank; ++i) largest[i] = std::fabs(row[i]) > std::fabs(largest[i]) ? row[i] : largest[i];
  }
  std::vector<double> left_scale(rank), right_scale(rank);
  for (std::size_t i = 0; i < rank; ++i) {
    const double sign = largest[i] < 0 ? -1 : 1;
    const double shared = factors.sigma[i] / request.scaling;
    left_scale[i] = sign * std::sqrt(shared);
    right_scale[i] = shared > 0 ? sign / (std::sqrt(shared) * request.scaling) : 0;
  }
  constexpr std::size_t kPiece = 64;
  const std::size_t left_tasks = (rows + kPiece - 1) / kPiece, right_tasks = (cols + kPiece - 1) / kPiece;
  std::vector<unsigned char> finite(left_tasks + right_tasks, 1);
  pool.run(finite.size(), [&](std::size_t task) {
    const bool is_left = task < left_tasks;
    const std::size_t n = is_left ? rows : cols;
    const std::size_t begin = (is_left ? task : task - left_tasks) * kPiece, count = std::min(kPiece, n - begin);
    const double* scale = (is_left ? left_scale : right_scale).data();
    Buffer<float> values(pool.scratch(), count * rank);
    for (std::size_t j = 0; j < count; ++j) {
      const float* row = (is_left ? factors.left : factors.right).data() + (begin + j) * factors.stride;
      for (std::size_t i = 0; i < rank; ++i) {
        values[j * rank + i] = static_cast<float>(static_cast<double>(row[i]) * scale[i]);
      }
    }
    if (request.weight.dtype == DType::bf16) round_to_dtype(DType::bf16, values.data(), count * rank);
    round_to_dtype(request.adapter_dtype, values.data(), count * rank);
    float sum = 0;  // of zeros, or NaN
    for (const float value : values) sum += value * 0.0f;
    finite[task] = sum == 0.0f;
    float* kept = (is_left ? stored.left : stored.right).data();
    write_factor(values.data(), begin, count, rank, n, !is_left, kept, DType::f32);
    // B is the left factor and A the right one; a transposed weight swaps them and their layouts.
    void* place = is_left == transposed ? request.a : request.b;
    write_factor(values.data(), begin, count, rank, n, is_left == transposed, place, request.adapter_dtype);
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
    factors =
        uses_bf16(kernels, request.weight)
            ? factor_by_krylov<std::uint16_t>(kernels, pool, request, schedule, false, result)
            : factor_by_krylov<float>(kernels, pool, request, schedule, request.weight.dtype == DType::f32, result);
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

std::size_t split_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads) {
  const Schedule schedule(weight, rank, passes);
  const std::size_t factors = 2 * sizeof(float) * (weight.rows + weight.cols) * rank;
  const std::size_t small = std::min(weight.rows, weight.cols), large = std::max(weight.rows, weight.cols);
  const std::size_t columns = schedule.block * schedule.max_passes;
  const std::size_t range =
      schedule.exact ? sizeof(double) * (2 * small * small + small * (kExactPiece + rank) + large * rank)
                     : RangeFinder<float>::workspace_bytes(weight, schedule.block, schedule.max_passes, threads) +
                           sizeof(double) * 6 * columns * columns;
  return std::max(range + factors / 2, factors + residual_workspace_bytes(weight, rank)) + (4u << 20);
}

}  // namespace pissa
