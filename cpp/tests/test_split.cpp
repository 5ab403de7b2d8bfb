// Whole splits through the core alone, so that sanitizers see every path: Krylov and exact, every dtype, any threads.
#include <stdexcept>

#include "check.hpp"
#include "matrices.hpp"
#include "split.hpp"

using namespace pissa;

namespace {

struct Case {
  std::size_t rows, cols, rank, passes;
};

const Case kCases[] = {{300, 400, 16, 0}, {400, 300, 40, 0}, {257, 131, 3, 4}, {64, 64, 64, 0},
                       {1, 9, 1, 0},      {9, 1, 1, 0},      {500, 40, 8, 0},  {700, 650, 20, 0}};

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
  }
  check_refusals();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
