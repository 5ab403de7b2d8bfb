#include "factorize.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "clock.hpp"
#include "exact.hpp"
#include "packing.hpp"
#include "projection.hpp"
#include "range_finder.hpp"
#include "rayleigh_ritz.hpp"

namespace pissa {
namespace {

// Columns of X to a pass. Narrower blocks reach the target with fewer columns, but blocks narrower than a vector waste
// more than that. Where even so few columns of X and Z are more than a second-level cache holds, every block of rows
// fetches them from beyond it: products of bf16 are then sooner done with twice as many a pass, but for low ranks,
// which need few passes.
constexpr std::size_t kBlock = 16, kWideBlock = 32;
constexpr std::size_t kRankForWide = 128;

std::size_t block_for(const Weight& weight, std::size_t rank, bool bf16) {
  constexpr std::size_t kBytes = kBlock * (sizeof(std::uint16_t) + sizeof(float));
  return bf16 && rank >= kRankForWide && weight.cols * kBytes > kLargestCache ? kWideBlock : kBlock;
}

// A check of k columns costs about as much as a pass over k³ values; it is cheap where that is a share of
// 1/kCheapCheck.
constexpr std::size_t kCheapCheck = 4;

// How the work is laid out for a rank. On weights with language models' spectra, 2·rank + 32 to 2.5·rank + 64 columns
// reach the target, or 128 where blocks are wide. The first check, which tells from the speed of convergence when the
// next is due, comes at the least of it where a check costs little beside a pass, or else at the most.
struct Schedule {
  Schedule(const Weight& weight, std::size_t rank, std::size_t passes, bool bf16)
      : block(block_for(weight, rank, bf16)) {
    const std::size_t limit = std::min(weight.rows, weight.cols);
    const std::size_t least = 2 * rank + 32, most = 2 * rank + rank / 2 + 4 * block;
    const bool cheap = kCheapCheck * least * least * least <= weight.rows * weight.cols;
    first_check = (cheap ? least : most) / block;
    max_passes = passes > 0 ? passes : (6 * rank + 64) / block + 1;
    // Where the basis would have to span most of the space, its whole Gram matrix is cheaper and exact.
    const std::size_t expected = 2 * rank + rank / 4 + 64;
    exact = passes == 0 ? 4 * expected >= 3 * limit : rank + 2 * block > limit;
    if (!exact) max_passes = std::min(max_passes, limit / block);
    min_passes = (rank + block - 1) / block;
    if (!exact && max_passes < min_passes) exact = true;
    first_check = std::clamp(first_check, min_passes, std::max(min_passes, max_passes));
  }
  std::size_t block, first_check, max_passes, min_passes;
  bool exact;
};

// In a small matrix the rounding of X and Y to bf16 does not average out, and there is little to gain.
constexpr std::size_t kSmallForBf16 = 96;

// In one of this size rounding to int8 averages out; and so large a copy is worth its memory.
constexpr std::size_t kSmallForInt8 = 512;
constexpr std::size_t kLargestInt8 = std::size_t{256} << 20;

// The error of rounding to bf16.
constexpr double kRounding = 0x1p-8;

// What is so much shorter than the largest may drown in the rounding of X and Y, which power steps make larger. Vectors
// of bf16 can be right far below this; but from what they give, it does not show whether they are.
constexpr double kDrowned = 0x1p-4;

// What rounding a weight to int8 costs must be no more of the triplets' energy, and of what they leave; W must be so
// many times longer in the last's direction than by it; and no choice may hang on so small differences.
constexpr double kInt8Cost = 5e-4, kInt8CostOfRest = 0.02;
constexpr double kAboveInt8 = 8, kInt8Rounding = 0x1p-6;

// Share of the energy that a weight's triplets lose by its rounding to bf16, at most.
constexpr double kFaithful = 2e-5;

// Krylov methods converge the faster the further they are: each pass gains by so much more than the one before.
constexpr double kAcceleration = 0.9;

// A check costs as much as a pass or two: the next is where the estimate will have come down, but not far ahead, as
// single passes gain more or less than those around them.
std::size_t passes_ahead(std::size_t passes, const RitzTriplets& ritz) {
  const std::size_t limit = std::max<std::size_t>(3, (passes + 1) / 2);
  double estimate = ritz.estimated_deficit, ratio = ritz.convergence;
  std::size_t ahead = 0;
  while (ahead < limit && estimate > kTargetDeficit) {
    ratio *= kAcceleration;
    estimate *= ratio;
    ++ahead;
  }
  return ahead;
}

// The triplets that a Krylov basis holds. X is orthonormal up to its rounding only, and so X·v is not quite of length
// one: W·(X·v) = σ·u holds as it is, and for the direction of X·v, σ is less by that length.
template <class Element>
Factors combine(ThreadPool& pool, const RangeFinder<Element>& finder, const RitzTriplets& ritz, std::size_t rank,
                bool precise) {
  const KrylovBasis& basis = finder.basis();
  const std::size_t k = basis.columns();
  std::vector<double> to_left(ritz.vectors);
  for (std::size_t i = 0; i < rank; ++i) {
    for (std::size_t j = 0; j < k; ++j) to_left[i * k + j] *= ritz.sigma[i] > 0 ? 1 / ritz.sigma[i] : 0.0;
  }
  Buffer<float> left = finder.combine_y(to_left, rank, precise), right = finder.combine_x(ritz.vectors, rank, precise);
  const std::size_t stride = round_up(rank, 16);
  const std::vector<double> length = column_lengths(pool, right, right.size() / stride, stride, rank);
  std::vector<double> sigma(rank, 0.0);
  for (std::size_t i = 0; i < rank; ++i) {
    if (ritz.sigma[i] > 0) sigma[i] = std::ldexp(ritz.sigma[i], basis.weight_exponent + basis.exponent) / length[i];
  }
  return in_descending_order(stride, std::move(left), std::move(right), length, sigma);
}

// Root mean square of the lengths of Y's last columns, from its Gram matrix (k × k).
double mean_length_of_last(const Buffer<double>& gram, std::size_t k, std::size_t columns) {
  double sum = 0;
  for (std::size_t i = k - columns; i < k; ++i) sum += gram[i * k + i];
  return std::sqrt(sum / static_cast<double>(columns));
}

Factors zeros(ThreadPool& pool, const Weight& weight, std::size_t rank) {
  Factors none;
  none.stride = rank;
  none.left = Buffer<float>(pool.scratch(), weight.rows * rank);
  none.right = Buffer<float>(pool.scratch(), weight.cols * rank);
  std::fill(none.left.begin(), none.left.end(), 0.0f);
  std::fill(none.right.begin(), none.right.end(), 0.0f);
  none.length.assign(rank, 0.0);
  none.sigma.assign(rank, 0.0);
  none.order.assign(rank, 0);
  return none;
}

// Whether rounding the weight to int8 has cost the factors too much.
template <class Element>
bool too_coarse(const Int8Sweep<Element>& int8, const Factors& factors) {
  double energy = 0;
  for (const double sigma : factors.sigma) energy += sigma * sigma;
  const double cost = int8.cost(factors.left, factors.stride, factors.sigma.size());
  return cost > kInt8Cost * energy || cost > kInt8CostOfRest * (int8.energy() - energy);
}

// Whether a copy of the weight in int8 has digits enough, next to its own, and there is something to gain.
bool suits_int8(const Weight& weight) {
  return weight.dtype == DType::bf16 && std::min(weight.rows, weight.cols) >= kSmallForInt8 &&
         weight.rows * weight.cols <= kLargestInt8;
}

template <class Element>
Factors factor_by_krylov(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request,
                         const Schedule& schedule, bool exact, bool int8, SplitResult& result) {
  const Weight& weight = request.weight;
  const std::size_t rank = request.rank;
  const bool rounded = kIsBf16<Element> && weight.dtype != DType::bf16;
  auto start = Clock::now();
  std::optional<RangeFinder<Element>> finder;
  finder.emplace(kernels, pool, weight, schedule.block, schedule.max_passes, request.key, int8);
  const auto without_int8 = [&] {
    finder.reset();
    return factor_by_krylov<Element>(kernels, pool, request, schedule, exact, false, result);
  };
  const auto in_float = [&] {
    finder.reset();
    return factor_by_krylov<float>(kernels, pool, request, schedule, true, false, result);
  };
  if (finder->out_of_range()) return in_float();
  int8 = finder->int8() != nullptr;
  result.sweep_seconds += seconds_since(start);
  result.block = schedule.block;
  if (finder->zero()) return zeros(pool, weight, rank);
  const KrylovBasis& basis = finder->basis();
  RitzTriplets ritz;
  std::size_t next = request.passes > 0 ? schedule.max_passes : schedule.first_check;
  for (bool last = request.passes > 0;; last = true) {
    start = Clock::now();
    finder->advance_to(next, last);
    result.sweep_seconds += seconds_since(start);
    start = Clock::now();
    Buffer<double> gram = finder->gram(exact);
    const double beyond = mean_length_of_last(gram, basis.columns(), schedule.block);
    ritz = rayleigh_ritz(kernels, pool, std::move(gram), basis.columns(), rank, schedule.block, exact);
    if (basis.exhausted) ritz.estimated_deficit = 0;
    result.ritz_seconds += seconds_since(start);
    const double first = ritz.sigma[0], least = ritz.sigma[rank - 1];
    // A few directions far above all others, or a W of low rank: the others drown in the rounding of X and Y, or of
    // sums in float. So does what is beyond the basis: further blocks would be copies of the first, and have to be done
    // by Householder.
    const bool drowned =
        (kIsBf16<Element> || int8) && (basis.householder || std::min(beyond, least) < kDrowned * first);
    if (!exact && (drowned || least < kPrecise * first)) return in_float();
    // Where the singular values are the same but for the errors of rounding, those that it makes larger are chosen.
    const auto alike = [&](double rounding) { return rank > 1 && ritz.sigma[(rank - 1) / 2] * (1 - rounding) < least; };
    if (rounded && request.precise && alike(kRounding)) return in_float();
    // Where next to nothing is missing, it would be what the rounding loses.
    if (rounded && ritz.estimated_deficit < kFaithful) return in_float();
    if (int8) {
      const double noise = std::ldexp(finder->int8()->noise(), -basis.exponent);
      if (least < kAboveInt8 * noise || alike(kInt8Rounding)) return without_int8();
    }
    if (ritz.estimated_deficit <= kTargetDeficit || basis.exhausted || basis.passes == schedule.max_passes) break;
    next = std::min(schedule.max_passes, basis.passes + passes_ahead(basis.passes, ritz));
  }
  start = Clock::now();
  // Triplets of a weight that was rounded to bf16 hold the more of it than these digits can tell: what they miss by
  // that is next to nothing, but what they are made of has the weight's own digits.
  const bool precise = rounded && request.precise;
  Factors factors = combine(pool, *finder, ritz, rank, precise);
  if (int8 && too_coarse(*finder->int8(), factors)) return without_int8();
  result.passes = basis.passes;
  result.householder = basis.householder;
  result.int8 = int8;
  result.estimated_deficit = ritz.estimated_deficit;
  finder.reset();
  if (precise) factors = in_singular_form(kernels, pool, std::move(factors));
  result.ritz_seconds += seconds_since(start);
  return factors;
}

}  // namespace

bool uses_bf16(const Kernels& kernels, const Weight& weight) {
  return kernels.bf16 != nullptr && std::min(weight.rows, weight.cols) >= kSmallForBf16;
}

Factors factorize(const Kernels& kernels, ThreadPool& pool, const SplitRequest& request, SplitResult& result) {
  const Weight& weight = request.weight;
  const bool bf16 = uses_bf16(kernels, weight);
  const Schedule schedule(weight, request.rank, request.passes, bf16);
  if (!schedule.exact) {
    const bool int8 = kernels.int8 != nullptr && suits_int8(weight);
    return bf16 ? factor_by_krylov<std::uint16_t>(kernels, pool, request, schedule, false, int8, result)
                : factor_by_krylov<float>(kernels, pool, request, schedule,
                                          weight.dtype == DType::f32 && request.precise, int8, result);
  }
  const auto start = Clock::now();
  Factors factors = factor_exactly(kernels, pool, weight, request.rank, request.precise);
  result.ritz_seconds = seconds_since(start);
  return factors;
}

std::size_t factorize_workspace_bytes(const Weight& weight, std::size_t rank, std::size_t passes, unsigned threads) {
  const auto with = [&](const Schedule& schedule) {
    if (schedule.exact) return exact_workspace_bytes(weight, rank, threads);
    const std::size_t columns = schedule.block * schedule.max_passes;
    return std::max(
        RangeFinder<float>::workspace_bytes(weight, schedule.block, schedule.max_passes, suits_int8(weight), threads) +
            sizeof(double) * 6 * columns * columns,
        projection_workspace_bytes(weight, with_spare(rank), threads));
  };
  return std::max(with(Schedule(weight, rank, passes, false)), with(Schedule(weight, rank, passes, true)));
}

}  // namespace pissa
