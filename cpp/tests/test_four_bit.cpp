// Every kernel quantises as the portable one does, with any number of threads, and reads back what it stored. That the
// bytes are bitsandbytes' is tested in Python, against bitsandbytes.
#include <vector>

#include "check.hpp"
#include "four_bit.hpp"
#include "matrices.hpp"
#include "norms.hpp"

using namespace pissa;

namespace {

struct Stored {
  explicit Stored(std::size_t count) : packed((count + 1) / 2), absmax(four_bit_blocks(count)) {}
  FourBit view(const FourBitCode& code) { return {&code, packed.data(), absmax.data()}; }
  std::vector<std::uint8_t> packed;
  std::vector<float> absmax;
};

void check_kernel(const Kernels& kernels, DType dtype, std::size_t count, const FourBitCode& code) {
  TestWeight w(dtype, 1, count, count);
  ThreadPool alone(1);
  Stored reference(count);
  CHECK(quantise(kPortable, alone, w.bytes.data(), dtype, count, reference.view(code)), "finite values");
  for (unsigned threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    Stored found(count);
    quantise(kernels, pool, w.bytes.data(), dtype, count, found.view(code));
    CHECK(found.packed == reference.packed && found.absmax == reference.absmax, "%s %s %zu: %u threads differ",
          kernels.name, name_of(dtype), count, threads);
    std::vector<float> difference(count);
    subtract_stored(kernels, pool, found.view(code), dtype, count, w.bytes.data(), dtype, difference.data());
    for (std::size_t i = 0; i < count; ++i) {
      // NF4's widest gap between neighbours is 0.304, FP4's a third.
      const float limit = 0.17f * found.absmax[i / kFourBitBlock];
      CHECK(std::fabs(difference[i]) <= limit, "%s %s: %g is off by %g", kernels.name, name_of(dtype), w.values[i],
            static_cast<double>(difference[i]));
    }
  }
}

void check_not_finite(const Kernels& kernels) {
  ThreadPool pool(2);
  for (const std::size_t place : {std::size_t{0}, std::size_t{63}, std::size_t{64}, std::size_t{99}}) {
    std::vector<float> values(100, 1.0f);
    values[place] = NAN;
    Stored stored(values.size());
    CHECK(!quantise(kernels, pool, values.data(), DType::f32, values.size(), stored.view(nf4_code())),
          "%s: NaN at %zu passes", kernels.name, place);
  }
}

void check_nesting() {
  std::vector<float> absmax(1000);
  for (std::size_t i = 0; i < absmax.size(); ++i) absmax[i] = 0.5f + 0.1f * random_value(1, i);
  const std::vector<float> original = absmax;
  std::vector<std::uint8_t> codes(absmax.size());
  std::vector<float> nested(4), again(absmax.size());
  const float mean = nest_absmax(absmax.data(), absmax.size(), codes.data(), nested.data());
  unnest_absmax(codes.data(), nested.data(), mean, again.size(), again.data());
  CHECK(again == absmax, "what is stored reads back otherwise");
  for (std::size_t i = 0; i < absmax.size(); ++i) {
    CHECK(std::fabs(absmax[i] - original[i]) < 2e-3f, "absmax %g became %g", static_cast<double>(original[i]),
          static_cast<double>(absmax[i]));
  }
}

void check_norms(const Kernels& kernels) {
  TestWeight w(DType::f32, 70, 90, 5);
  double squares = 0;
  for (const double value : w.values) squares += value * value;
  double nuclear = 0;
  for (unsigned threads = 1; threads <= 3; ++threads) {
    ThreadPool pool(threads);
    CHECK(std::fabs(frobenius_norm(kernels, pool, w.weight) - std::sqrt(squares)) < 1e-9, "%s: norm", kernels.name);
    const double estimate = estimate_nuclear_norm(kernels, pool, w.weight);
    if (threads == 1) nuclear = estimate;
    CHECK(estimate == nuclear, "%s: %u threads change the estimate", kernels.name, threads);
    const double exact = nuclear_norm(kernels, pool, w.weight).value;
    CHECK(std::fabs(estimate - exact) < 0.05 * exact, "%s: %g is not near %g", kernels.name, estimate, exact);
  }
}

// Also where it has to be in double, beside an estimate's long side, and with directions that it should be without.
void check_memory_of_norms(const Kernels& kernels) {
  TestWeight small(DType::f32, 330, 600, 6), tiny = small, large(DType::f32, 1100, 13000, 6);
  tiny.weight.data = tiny.bytes.data();
  for (std::size_t i = 0; i < 330 * 600; ++i) reinterpret_cast<float*>(tiny.bytes.data())[i] *= 1e-20f;
  const auto* outside = reinterpret_cast<const float*>(large.bytes.data());
  for (const TestWeight* w : {&small, &tiny, &large}) {
    ThreadPool pool(2);
    nuclear_norm(kernels, pool, w->weight, 300, outside);
    const std::size_t bound = nuclear_norm_workspace_bytes(w->weight, 2, 300);
    CHECK(pool.scratch().peak() <= bound, "%s: a norm took %zu bytes of %zu", kernels.name, pool.scratch().peak(),
          bound);
  }
}

}  // namespace

int main() {
  for (const Kernels* kernels : available_kernels()) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const std::size_t count : {1u, 63u, 64u, 65u, 1000u, 200001u}) {
        check_kernel(*kernels, dtype, count, nf4_code());
        check_kernel(*kernels, dtype, count, fp4_code());
      }
    }
    check_not_finite(*kernels);
    check_norms(*kernels);
    check_memory_of_norms(*kernels);
  }
  check_nesting();
  return failures == 0 ? 0 : 1;
}
