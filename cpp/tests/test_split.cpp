// Whole splits through the core alone, so that sanitizers see every path: Krylov and exact, every dtype, any threads.
#include <stdexcept>

#include "check.hpp"
#include "correction.hpp"
#include "matrices.hpp"
#include "split.hpp"

using namespace pissa;

namespace {

struct Case {
  std::size_t rows, cols, rank, passes;
};

const Case kCases[] = {{300, 400, 16, 0}, {400, 300, 40, 0}, {257, 131, 3, 4},  {64, 64, 64, 0},    {1, 9, 1, 0},
                       {9, 1, 1, 0},      {500, 40, 8, 0},   {700, 650, 20, 0}, {150, 14000, 16, 0}};

struct Output {
  std::vector<unsigned char> residual, a, b;
  SplitResult result;
};

Output run(const Case& c, DType dtype, DType adapter_dtype, bool fan_in_fan_out, unsigned threads) {
  TestWeight w(dtype, c.rows, c.cols, 7);
  const std::size_t in = fan_in_fan_out ? c.rows : c.cols, out = fan_in_fan_out ? c.cols : c.rows;
  Output output;
  output.a.resize(c.rank * in * size_of(adapter_dtype));
  output.b.resize(c.rank * out * size_of(adapter_dtype));
  ThreadPool pool(threads);
  output.result =
      split(select_kernels(), pool,
            {w.weight, c.rank, 0.5, fan_in_fan_out, adapter_dtype, output.a.data(), output.b.data(), c.passes, 42});
  output.residual = w.bytes;
  const std::size_t bound = split_workspace_bytes(w.weight, c.rank, c.passes, threads);
  CHECK(pool.scratch().peak() <= bound, "%zux%zu %s: took %zu bytes of %zu", c.rows, c.cols, name_of(dtype),
        pool.scratch().peak(), bound);
  return output;
}

void check_split(const Case& c, DType dtype, DType adapter_dtype) {
  TestWeight original(dtype, c.rows, c.cols, 7);
  double norm = 0;
  for (const double value : original.values) norm += value * value;
  const double limit = dtype == DType::f32 ? 1e-7 : dtype == DType::f16 ? 5e-4 : 4e-3;
  for (const bool fan_in_fan_out : {false, true}) {
    const Output one = run(c, dtype, adapter_dtype, fan_in_fan_out, 1);
    for (const unsigned threads : {2u, 3u}) {
      const Output other = run(c, dtype, adapter_dtype, fan_in_fan_out, threads);
      CHECK(one.residual == other.residual && one.a == other.a && one.b == other.b, "%u threads change it", threads);
    }
    CHECK(one.result.rounding_error <= limit * std::sqrt(norm), "error %g of %g", one.result.rounding_error,
          std::sqrt(norm));
    for (std::size_t i = 1; i < c.rank; ++i) {
      CHECK(one.result.sigma[i] <= one.result.sigma[i - 1] * (1 + 1e-6), "sigma %zu ascends", i);
    }
  }
}

struct Refitted {
  std::vector<unsigned char> left;
  std::vector<float> a, b;
  SplitResult result;
};

// The refit of a matrix whose every value is up to a hundredth away from those of one that was split.
Refitted refit_near(const Case& c, unsigned threads) {
  TestWeight w(DType::f32, c.rows, c.cols, 7), near = w;
  near.weight.data = near.bytes.data();
  auto* values = reinterpret_cast<float*>(near.bytes.data());
  for (std::size_t i = 0; i < c.rows * c.cols; ++i) values[i] *= 1 + 0.01f * random_value(8, i);
  Refitted found{{}, std::vector<float>(c.rank * c.cols), std::vector<float>(c.rank * c.rows), {}};
  ThreadPool pool(threads);
  SplitRequest request{w.weight, c.rank, 0.5, false, DType::f32, found.a.data(), found.b.data(), 0, 42};
  split(select_kernels(), pool, request);
  request.weight = near.weight;
  found.result = refit(select_kernels(), pool, request);
  found.left = near.bytes;
  const std::size_t bound = refit_workspace_bytes(w.weight, c.rank, threads);
  CHECK(pool.scratch().peak() <= bound, "%zux%zu: took %zu bytes of %zu", c.rows, c.cols, pool.scratch().peak(), bound);
  return found;
}

// A and B of a matrix whose every value then changes a little.
void check_correction(const Case& c) {
  std::vector<unsigned char> left;
  std::vector<float> a, b;
  for (const unsigned threads : {1u, 2u, 3u}) {
    TestWeight w(DType::f32, c.rows, c.cols, 7);
    std::vector<float> own_a(c.rank * c.cols), own_b(c.rank * c.rows);
    ThreadPool pool(threads);
    const SplitRequest request{w.weight, c.rank, 0.5, false, DType::f32, own_a.data(), own_b.data(), 0, 42};
    split(select_kernels(), pool, request);
    auto* values = reinterpret_cast<float*>(w.bytes.data());
    for (std::size_t i = 0; i < c.rows * c.cols; ++i) {
      values[i] += 0.01f * random_value(8, i) * static_cast<float>(w.values[i]);
    }
    const std::vector<unsigned char> before = w.bytes;
    ThreadPool fresh(threads);
    const bool done = correct(select_kernels(), fresh, request);
    CHECK(done || w.bytes == before, "%zux%zu: refused, and changed", c.rows, c.cols);
    const std::size_t bound = refit_workspace_bytes(w.weight, c.rank, threads);
    CHECK(fresh.scratch().peak() <= bound, "%zux%zu: took %zu bytes of %zu", c.rows, c.cols, fresh.scratch().peak(),
          bound);
    if (threads == 1) {
      left = w.bytes;
      a = own_a;
      b = own_b;
    }
    CHECK(left == w.bytes && a == own_a && b == own_b, "%u threads change the correction", threads);
  }
}

void check_refit(const Case& c) {
  const Refitted one = refit_near(c, 1);
  for (const unsigned threads : {2u, 3u}) {
    const Refitted other = refit_near(c, threads);
    CHECK(one.left == other.left && one.a == other.a && one.b == other.b, "%u threads change the refit", threads);
  }
  const auto* left = reinterpret_cast<const float*>(one.left.data());
  double missing = 0, energy = 0;
  for (std::size_t i = 0; i < c.rows * c.cols; ++i) missing += static_cast<double>(left[i]) * left[i];
  for (const double sigma : one.result.sigma) energy += sigma * sigma;
  const double norm = one.result.weight_norm;
  CHECK(std::fabs(missing + energy - norm * norm) <= 1e-4 * norm * norm, "%g and %g of %g", missing, energy, norm);
}

// A weight so wide that bf16 is multiplied in wide blocks.
void check_wide() {
  const Case c{300, 22016, 128, 8};
  const Output one = run(c, DType::bf16, DType::f32, false, 1), other = run(c, DType::bf16, DType::f32, false, 3);
  CHECK(one.result.block == (select_kernels().bf16 != nullptr ? 32 : 16), "a block of %zu", one.result.block);
  CHECK(one.residual == other.residual && one.a == other.a && one.b == other.b, "threads change a wide weight");
}

// Beyond W and the residual, which takes W's place, a split takes (rows + cols)·block·passes floats at most; a copy in
// int8 is less than a residual beside W would be.
void check_memory() {
  const Case c{2048, 3072, 32, 8};
  TestWeight w(DType::bf16, c.rows, c.cols, 7);
  std::vector<float> a(c.rank * c.cols), b(c.rank * c.rows);
  ThreadPool pool(2);
  const SplitResult result =
      split(select_kernels(), pool, {w.weight, c.rank, 1.0, false, DType::f32, a.data(), b.data(), c.passes, 42});
  const std::size_t bound = w.bytes.size() + (c.rows + c.cols) * result.block * result.passes * sizeof(float);
  CHECK(result.int8 == (select_kernels().int8 != nullptr), "%s: int8 %d", select_kernels().name, result.int8);
  CHECK(pool.scratch().peak() <= bound, "took %zu bytes of %zu", pool.scratch().peak(), bound);
}

void check_refusals() {
  for (const std::size_t rows : {20u, 300u}) {  // the exact and the iterative path
    TestWeight w(DType::f32, rows, 280, 7);
    reinterpret_cast<float*>(w.bytes.data())[77] = INFINITY;
    const std::vector<unsigned char> before = w.bytes;
    std::vector<float> a(4 * 280), b(4 * rows);
    ThreadPool pool(2);
    bool refused = false;
    try {
      split(select_kernels(), pool, {w.weight, 4, 1.0, false, DType::f32, a.data(), b.data(), 0, 1});
    } catch (const std::domain_error&) {
      refused = true;
    }
    CHECK(refused && w.bytes == before, "infinity in %zu rows", rows);
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const DType adapter : {DType::f32, DType::f16, DType::bf16}) check_split(c, dtype, adapter);
    }
    check_refit(c);
    check_correction(c);
  }
  check_wide();
  check_memory();
  check_refusals();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
